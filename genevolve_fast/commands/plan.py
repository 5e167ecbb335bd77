"""`plan`: will it fit on each GPU, what limits, and how long a step takes by the rates that were measured."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from genevolve_fast.commands.opening import AddCommand, device, load, policy_path, set_threads

RATES = Path("benchmarks/results/rates.json")


def add(command: AddCommand) -> None:
    """Add the parser of this module."""
    p = command(
        "plan",
        run_plan,
        "Predict the peak memory of a run before anything is loaded, and the time of a step by measured rates; exit "
        "status 1 if it does not fit.",
        "genevolve-fast plan --model qwen3-vl-8b --gpu 24GiB --tokens 36144 --prefix 6144 --lora 64 --offload-gib 40\n"
        "  genevolve-fast plan --config genevolve_8b --gpu h100 --nodes 2 --gpus-per-node 8 --strategy fsdp2",
    )
    p.add_argument("--config", default=None, help="take everything from an evolve configuration; flags below override")
    p.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="override one field, repeatable")
    p.add_argument("--model", default=None, help="folder, config.json, cached hub id or a name such as qwen3-vl-8b")
    p.add_argument("--gpu", default=None, help="size such as 24GiB, or a GPU's name (default: this machine)")
    p.add_argument("--json", action="store_true", help="print the plan as JSON")
    p.add_argument("--training-only", action="store_true", help="rollouts are sampled elsewhere")
    p.add_argument("--tokens", type=int, help="tokens of the longest rollout, prefix included")
    p.add_argument("--prefix", type=int, help="tokens that a group's rollouts share")
    p.add_argument("--prompts-per-step", type=int, help="requests of a step, over all GPUs")
    p.add_argument("--num-generations", type=int, help="rollouts of each request")
    p.add_argument("--max-tokens-per-microbatch", type=int, help="tokens packed into one forward and backward")
    p.add_argument("--max-batch", type=int, help="turns the embedded engine samples together")
    p.add_argument("--mean-tokens", type=int, help="mean length of a rollout (default: all as long as the longest)")
    p.add_argument("--patch", type=int, help="tokens of experience that the teacher reads")
    p.add_argument("--loss-share", type=float, help="share of a reply that the policy sampled")
    p.add_argument("--image-tokens", type=int, help="tokens of all pictures whose features are kept")
    p.add_argument("--dtype", choices=["float32", "bfloat16"], help="of weights and activations")
    p.add_argument("--optimizer", choices=["adamw", "muon"])
    p.add_argument(
        "--implementation",
        choices=["fused", "8bit", "paged_8bit", "cpu"],
        help="torch's AdamW, moments in 8 bits, those that leave a full GPU, or all of it on the host",
    )
    p.add_argument(
        "--bf16",
        choices=["nearest", "stochastic", "master"],
        help="how bf16 weights are rounded after an update; master: from fp32 copies",
    )
    p.add_argument("--quantize", choices=["none", "nf4"], help="of the frozen weights under an adapter")
    p.add_argument("--lora", type=int, help="rank of the adapters; 0 trains the weights")
    p.add_argument("--freeze-head", action=argparse.BooleanOptionalAction, help="no gradient of the LM head")
    p.add_argument("--teacher", choices=["live", "ema", "base", "off"])
    p.add_argument("--reference", action=argparse.BooleanOptionalAction, help="KL to the starting policy")
    p.add_argument("--offload-gib", type=float, help="host memory for layer inputs, of each GPU")
    p.add_argument("--workspace-mb", type=float, help="logits of the head that exist at once")
    p.add_argument("--tile-tokens", type=int, help="rows of one MLP tile")
    several = p.add_argument_group("several GPUs")
    several.add_argument("--nodes", type=int, help="machines that train (default: 1)")
    several.add_argument("--gpus-per-node", type=int, help="GPUs of each (default: 1)")
    several.add_argument(
        "--strategy",
        choices=["none", "ddp", "zero1", "zero2", "zero3", "fsdp2"],
        help="what is divided among them: zero1 optimizer state, zero2 gradients too, zero3 and fsdp2 weights too",
    )
    for what, kept in (("optimizer", "optimizer state and its step"), ("params", "divided weights")):
        several.add_argument(f"--offload-{what}", action=argparse.BooleanOptionalAction, help=f"{kept} on the host")
    time = p.add_argument_group("time of a step")
    time.add_argument("--rates", type=Path, help=f"what `python -m benchmarks.rates` measured (default: {RATES})")
    time.add_argument(
        "--rollout-gpus",
        type=int,
        help="GPUs that only sample, besides those that train (default: the configuration's rollout_gpus or servers)",
    )
    time.add_argument("--one-step-off", action="store_true", help="they sample while the step before is trained on")


def run_plan(args: argparse.Namespace) -> int:
    from dataclasses import fields, replace

    import torch

    from genevolve_fast.profile.plan import PlanError, Settings, memory_of, plan, table, verdict
    from genevolve_fast.profile.shapes import ModelShape
    from genevolve_fast.profile.step_time import Engines, time_table
    from genevolve_fast.train.config import EvolveConfig
    from genevolve_fast.train.fits import available_memory, beside_engine, settings_of

    where = torch.device("cuda") if args.gpu else device()
    limit = memory_of(args.gpu) if args.gpu else available_memory(where)
    named = {f.name: value for f in fields(Settings) if (value := getattr(args, f.name, None)) is not None}
    engines = Engines(args.rollout_gpus or 0, args.one_step_off and not args.config)
    if args.config:
        config = load(args, EvolveConfig)
        set_threads(config.threads)
        shape = ModelShape.from_config(args.model or policy_path(config.policy))
        settings = replace(settings_of(config, where), **({"mean_tokens": None} if args.tokens else {}) | named)
        engines = engines_of(config, args)
        if not engines.gpus:
            settings = replace(settings, **beside_engine(config, limit))
    elif args.model and args.tokens:
        if args.set:
            raise PlanError("--set overrides a field of --config")
        shape, settings = ModelShape.from_config(args.model), Settings(device=where.type, **named)
    else:
        raise PlanError("give --config, or --model and --tokens")
    if args.training_only:
        engines = Engines()
    if args.training_only or engines.gpus:
        settings = replace(settings, rollout=False, engine_bytes=0)
    made = plan(shape, settings)
    times = time_of_step(args, shape, settings, engines)
    if args.json:
        told = made.as_dict() | {"limit": limit, "fits": made.total <= limit}
        told |= {"step_time": times if isinstance(times, str) else times.as_dict()}
        print(json.dumps(told, indent=1))
    else:
        of_one = f"memory of each of {settings.world} GPUs, {settings.strategy}\n" if settings.world > 1 else ""
        print(f"{of_one}{table(made)}\n\n{verdict(shape, settings, limit)}")
        print(f"\ntime of a step\n{times if isinstance(times, str) else time_table(times, settings)}")
    return 0 if made.total <= limit else 1


def engines_of(config, args: argparse.Namespace):
    """Who samples for a configuration: a server of its own counts as one GPU unless the flag says how many."""
    from genevolve_fast.profile.step_time import Engines

    r = config.rollout
    gpus = args.rollout_gpus or len(config.rollout_gpus) or len(r.server.urls)
    return Engines(gpus, args.one_step_off or r.staleness == 1, r.engine)


def time_of_step(args: argparse.Namespace, shape, settings, engines):
    """The StepTime, or one line that says why there is none."""
    import torch

    from genevolve_fast.evaluate.scoreboard import processor
    from genevolve_fast.profile.flops import gpu_named
    from genevolve_fast.profile.rates import Rates, named_with_threads
    from genevolve_fast.profile.step_time import step_time

    if args.gpu and gpu_named(args.gpu) is None:
        return f"no estimate: {args.gpu} is a size, and rates belong to a device; name it with --gpu"
    file = args.rates or RATES
    if not file.exists():
        if args.rates:
            raise FileNotFoundError(f"no {file}: write it with `python -m benchmarks.rates`")
        return f"no estimate: no {file} here; write it with `python -m benchmarks.rates` and pass --rates"
    name = args.gpu
    if name is None:
        name = torch.cuda.get_device_name() if settings.device == "cuda" else named_with_threads(processor())
    return step_time(shape, settings, Rates.read(file), name, engines=engines)
