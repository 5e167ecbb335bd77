"""`genevolve-fast`: everything from the command line."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from genevolve_fast.commands import (
    bench,
    data,
    export,
    generate,
    plan,
    process,
    render,
    rollout,
    score,
    serve_render,
    wise,
)
from genevolve_fast.commands.bench import bench_once
from genevolve_fast.commands.opening import (
    RUNS,
    device,
    load,
    loaded_on,
    open_policy,
    open_pool,
    open_ranks,
    open_sandbox,
    open_world,
    policy_path,
    refuse_ranks,
    set_threads,
    show_fields,
    subcommands,
)
from genevolve_fast.files import out_of_space


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; errors a user can mend are one line on stderr and exit status 2."""
    argv = sys.argv[1:] if argv is None else argv
    args = parser(argv).parse_args(argv)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers' bars would break ours
    try:
        try:
            return args.run(args) or 0
        finally:
            end_bars()
    except KeyboardInterrupt:
        how = "; `--resume` continues from the last checkpoint" if "resume" in args else ""
        print(f"\ninterrupted{how}", file=sys.stderr)
        return 130
    except user_errors() as error:
        print(f"genevolve-fast {args.command}: {error}", file=sys.stderr)
        return 2
    except Exception as error:
        if not out_of_space(error):
            raise
        how = "; make room and run again with --resume" if "resume" in args else ""
        told = str(error).splitlines()[0]
        print(f"genevolve-fast {args.command}: the disk is full: {told}{how}", file=sys.stderr)
        return 2


def end_bars() -> None:
    """Leave the line of a progress bar that an error stopped: what is told begins on its own."""
    if bars := sys.modules.get("tqdm"):
        for bar in list(getattr(bars.tqdm, "_instances", ())):
            bar.close()


_USER_ERRORS = {
    "data.rows": "DataError",
    "experience.memory": "OtherEmbedder",
    "policy.adapters": "AdapterError",
    "policy.quantize": "QuantizeError",
    "policy.export": "ExportError",
    "profile.plan": "PlanError",
    "profile.rates": "RatesError",
    "profile.shapes": "ShapeError",
    "protocols": "EngineError",
    "report.build": "ReportError",
    "report.processes": "ProcessError",
    "resumable": "BatchError",
    "rollout.serve": "ServeError",
    "train.config": "ConfigError",
    "train.ranks": "RanksError",
    "train.run": "RunError",
    "trajectory": "InvariantError",
}


def user_errors() -> tuple[type[Exception], ...]:
    """Of the modules that are loaded: the others raised nothing, and loading torch for an error would take seconds."""
    loaded = {name: sys.modules.get(f"genevolve_fast.{name}") for name in _USER_ERRORS}
    return *(getattr(module, _USER_ERRORS[name]) for name, module in loaded.items() if module), FileNotFoundError


def parser(asked: Sequence[str] = ()) -> argparse.ArgumentParser:
    """All commands; `asked` are the arguments, because --fields needs no --config."""
    top = argparse.ArgumentParser(
        prog="genevolve-fast",
        description="Train tool-using image-generation agents on few GPUs.",
        epilog="First steps: `genevolve-fast demo` lets the sandbox agent evolve on this machine, no GPU needed.",
    )
    command = subcommands(top.add_subparsers(dest="command", required=True, metavar="COMMAND"))

    def training(p: argparse.ArgumentParser, config: str | None) -> None:
        needed = config is None and "--fields" not in asked
        p.add_argument("--config", default=config, required=needed, help="YAML file, or a built-in name")
        p.add_argument(
            "--set", action="append", default=[], metavar="FIELD=VALUE", help="override one field, repeatable"
        )
        p.add_argument("--runs", type=Path, default=RUNS, help="folder of all runs (default: %(default)s)")
        p.add_argument("--resume", action="store_true", help="continue the run of that name from its last checkpoint")
        p.add_argument("--fields", action="store_true", help="list every field of the configuration and stop")

    p = command(
        "sft",
        run_sft,
        "Supervised fine-tuning on {messages, images} conversations.",
        "genevolve-fast sft --config configs/sandbox_sft.yaml",
    )
    training(p, None)

    p = command(
        "evolve",
        run_evolve,
        "Self-evolution: GRPO and distillation from the teacher that saw the experience.",
        "genevolve-fast evolve --config configs/demo.yaml --set steps=20 --set name=mine",
    )
    training(p, None)

    p = command(
        "demo",
        run_demo,
        "Let the sandbox agent evolve itself on this machine and show that it got better.",
        "genevolve-fast demo",
    )
    training(p, "demo")

    plan.add(command)

    p = command(
        "profile",
        run_profile,
        "Run real steps of evolve and print each phase's time and peak memory beside the predicted one.",
        "genevolve-fast profile --config demo --set rollout.prompts_per_step=2 --out runs/profile",
    )
    p.add_argument("--config", required=True, help="YAML file, or a built-in name")
    p.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="override one field, repeatable")
    p.add_argument("--steps", type=int, default=1, help="(default: %(default)s)")
    p.add_argument("--out", type=Path, default=RUNS / "profile", help="folder of profile.json and timeline.svg")
    p.add_argument("--snapshot", type=Path, default=None, help="also write torch's memory snapshot there; GPU only")

    p = command(
        "verify",
        run_verify,
        "Compare the shared training pass with whole sequences, one at a time, on your own model and first batch.",
        "genevolve-fast verify --config demo --set rollout.prompts_per_step=2",
    )
    p.add_argument("--config", required=True, help="YAML file, or a built-in name")
    p.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="override one field, repeatable")

    bench.add(command)
    score.add(command)
    wise.add(command)

    p = command(
        "serve",
        run_serve,
        "Start the right server for a model: vLLM where it is installed, else our own; prints the command it becomes.",
        "genevolve-fast serve --model MeiGen-AI/GenEvolve --tp 2 --training -- --enable-lora --max-lora-rank 64",
    )
    p.add_argument("--model", required=True, help="folder, hub name, or sandbox:start")
    p.add_argument("--backend", choices=["auto", "vllm", "transformers"], default="auto", help="(default: %(default)s)")
    p.add_argument("--tp", type=int, default=1, help="GPUs that share the weights; vLLM only")
    p.add_argument("--dp", type=int, default=1, help="copies of the model; vLLM only")
    p.add_argument("--host", default="127.0.0.1", help="(default: %(default)s)")
    p.add_argument("--port", type=int, default=8000, help="(default: %(default)s)")
    p.add_argument("--served-model-name", default="GenEvolve", help="name that requests use (default: %(default)s)")
    p.add_argument("--max-model-len", type=int, help="tokens of prompt and replies (default: 65536 with vLLM)")
    p.add_argument("--gpu-memory-utilization", type=float, help="share of the GPU; vLLM only (default: 0.85)")
    p.add_argument("--training", action="store_true", help="take weight updates, report exact log-probs")
    p.add_argument("--api-key-env", metavar="NAME", help="environment variable with the key that requests must bring")
    p.add_argument("--insecure", action="store_true", help="listen beyond this machine without a key")
    p.add_argument("--dry-run", action="store_true", help="print the command and stop; vLLM need not be installed then")
    p.add_argument("extra", nargs="*", metavar="-- FLAGS", help="passed to the server as they are")

    export.add(command)
    generate.add(command)
    rollout.add(command)
    render.add(command)
    serve_render.add(command)
    data.add(command)
    process.add(command)

    p = command(
        "report",
        run_report,
        "Write runs/NAME/report.html from what a run left behind, or two renderings of the same programs side by side. "
        "A folder of pictures that grew, or that `process draw` drew, gets one too.",
        "genevolve-fast report runs/demo\n  genevolve-fast report --compare runs/qwen runs/nano -o compare.html",
    )
    p.add_argument("run_folder", type=Path, nargs="?", help="folder of a run")
    p.add_argument(
        "--compare",
        type=Path,
        nargs=2,
        metavar=("A", "B"),
        help="folders of results.json, scored or not, or of benches",
    )
    p.add_argument("-o", "--output", type=Path, help="page of --compare (default: compare.html)")
    p.add_argument("--gt-root", type=Path, action="append", default=[], help="where --compare finds ground truth")

    p = command(
        "scoreboard",
        run_scoreboard,
        "Print what the benchmarks measured, against their targets.",
        "genevolve-fast scoreboard",
    )
    p.add_argument(
        "--file", type=Path, default=Path("benchmarks/results/scoreboard.json"), help="(default: %(default)s)"
    )
    return top


# --- commands ---------------------------------------------------------------------------------------------------------


def run_sft(args: argparse.Namespace) -> int:
    from genevolve_fast.sandbox.bootstrap import new_start, scripted_set
    from genevolve_fast.train.config import SftConfig
    from genevolve_fast.train.optim import check_optimizer
    from genevolve_fast.train.run import claimed
    from genevolve_fast.train.sft import sft

    if args.fields:
        return show_fields(SftConfig)
    config = load(args, SftConfig)
    set_threads(config.threads)
    check_optimizer(config.optim, device())
    folder = args.runs / config.name
    with open_ranks(config) as strategy, claimed(folder, config, args.resume, strategy.ranks):
        if config.policy.path == "sandbox:new":
            sandbox = open_sandbox(config.world)
            policy, data, first = strategy.ranks.first_then_all(lambda: new_start(config, sandbox, folder / "data"))
        else:
            policy, data, first = open_policy(config.policy, loaded_on(strategy)), Path(config.data.path), None
            if config.data.scripted:
                sandbox = open_sandbox(config.world)
                data = strategy.ranks.first_then_all(lambda: scripted_set(config, sandbox, folder / "data"))
        final = sft(config, policy, data, folder, first=first, resume=args.resume, strategy=strategy)
        print(f"policy: {final}")
    return 0


def run_evolve(args: argparse.Namespace) -> int:
    from genevolve_fast.profile.shapes import ModelShape
    from genevolve_fast.train.config import EvolveConfig
    from genevolve_fast.train.engines import check_engine
    from genevolve_fast.train.evolve import evolve
    from genevolve_fast.train.fits import check_fits
    from genevolve_fast.train.gpus import take_share
    from genevolve_fast.train.optim import check_optimizer

    if args.fields:
        return show_fields(EvolveConfig)
    config = load(args, EvolveConfig)
    take_share(config)
    set_threads(config.threads)
    check_engine(config)
    check_optimizer(config.optim, device())
    check_fits(config, ModelShape.from_config(policy_path(config.policy)), device())
    pool, world = open_pool(config)
    with open_ranks(config) as strategy:
        policy = open_policy(config.policy, loaded_on(strategy))
        folder = args.runs / config.name
        final = evolve(config, policy, world, pool, folder, resume=args.resume, strategy=strategy)
        print(f"policy: {final}")
    return 0


def run_profile(args: argparse.Namespace) -> int:
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # it warns of memory that is older than the meter
    from genevolve_fast.profile.shapes import ModelShape
    from genevolve_fast.train.config import EvolveConfig
    from genevolve_fast.train.fits import check_fits
    from genevolve_fast.train.gpus import take_share
    from genevolve_fast.train.profiled import profile_steps, write_profile

    config = load(args, EvolveConfig)
    refuse_ranks(config, "profile")
    take_share(config)
    set_threads(config.threads)
    where, shape = device(), ModelShape.from_config(policy_path(config.policy))
    check_fits(config, shape, where)
    pool, world = open_pool(config)
    made = profile_steps(
        config,
        lambda: open_policy(config.policy),
        world,
        pool,
        shape,
        where,
        steps=args.steps,
        snapshot_file=args.snapshot,
    )
    write_profile(args.out, made, f"{config.name}: {config.policy.path}, {args.steps} step(s) on {made.device}")
    print(f"{made.table()}\nwritten to {args.out}")
    return 0


def run_verify(args: argparse.Namespace) -> int:
    """Exit status 1 where the gradients differ by more than their dtype explains."""
    from genevolve_fast.train.config import EvolveConfig
    from genevolve_fast.train.engines import check_engine, open_engine
    from genevolve_fast.train.evolve import new_memory
    from genevolve_fast.train.gpus import take_share
    from genevolve_fast.train.prepare import other_weights, prepare, refuse_dropout
    from genevolve_fast.train.single import sample_step
    from genevolve_fast.train.verify import verify

    config = load(args, EvolveConfig)
    refuse_ranks(config, "verify")
    take_share(config)
    set_threads(config.threads)
    check_engine(config)
    pool, world = open_pool(config)
    policy = open_policy(config.policy).eval()
    refuse_dropout(policy)
    prepare(policy, config.policy, config.seed)
    reference, teacher = other_weights(config, policy)
    print(f"sampling {config.rollout.prompts_per_step} x {config.rollout.num_generations} rollouts", flush=True)
    engine = open_engine(config, policy, world.incidents)
    engine.update_weights(0)
    batch, images = sample_step(config, policy, world, pool, engine, new_memory(config, world), 0)
    deviation = verify(
        policy,
        batch,
        images,
        config.objective,
        temperature=config.rollout.temperature,
        max_tokens=config.max_tokens_per_microbatch,
        reference=reference,
        teacher=teacher,
        workspace_mb=config.head_workspace_mb,
    )
    print(deviation)
    return 0 if deviation.holds else 1


def run_demo(args: argparse.Namespace) -> int:
    """Bench, evolve, bench again, compare, report. Every part that is already there is kept."""
    from genevolve_fast.evaluate.bench import paired_gain, table
    from genevolve_fast.files import write_text
    from genevolve_fast.train.config import ConfigError, EvolveConfig
    from genevolve_fast.train.evolve import evolve
    from genevolve_fast.train.gpus import take_share

    if args.fields:
        return show_fields(EvolveConfig)
    config = load(args, EvolveConfig)
    refuse_ranks(config, "demo")
    if config.process.enabled:
        raise ConfigError("process.enabled: the demo benches agents with tools; train processes by `evolve`")
    take_share(config)
    set_threads(config.threads)
    folder = args.runs / config.name
    sandbox, world = open_world(config)
    policy = open_policy(config.policy)
    resume = args.resume or (folder / "config.yaml").exists()
    if resume:
        print(f"{folder} exists: continuing it (delete the folder to start again)")
    print(f"1/3  bench of the start: {config.evaluate.requests} held-out requests", flush=True)
    before = bench_once(folder / "bench" / "before", "SFT start", policy, sandbox, world, config)
    print(f"2/3  evolve: {config.steps} steps of {config.rollout.prompts_per_step} requests", flush=True)
    pool = sandbox.requests("train", config.pool_size, seed=config.seed)
    evolve(config, policy, world, pool, folder, resume=resume)
    print("3/3  bench of the evolved policy", flush=True)
    after = bench_once(folder / "bench" / "after", "evolved", policy, sandbox, world, config)
    gain = paired_gain(before, after)
    summary = {"before": before.summary(), "after": after.summary(), "gain": gain.__dict__, "categories": {}}
    for side, of in (("before", before), ("after", after)):
        summary["categories"][side] = of.by_category()
    write_text(folder / "summary.json", json.dumps(summary, indent=1))
    print(f"\n{table([before, after])}\n\nreward, after - before, 95 % interval: {gain}")
    return write_report(folder, policy)


def run_serve(args: argparse.Namespace) -> int:
    from genevolve_fast.rollout.serve import command

    names = "backend host port tp dp served_model_name max_model_len gpu_memory_utilization training api_key_env"
    flags = {name: getattr(args, name) for name in (*names.split(), "insecure", "extra")}
    becomes = command(args.model, **flags, for_elsewhere=args.dry_run)
    print(becomes, flush=True)
    if not args.dry_run:
        becomes.become()
    return 0


def run_report(args: argparse.Namespace) -> int:
    from genevolve_fast.report.build import ReportError

    if args.compare:
        return run_compare(args)
    if args.run_folder is None or args.output or args.gt_root:
        raise ReportError("give the folder of a run, or --compare A B with -o and --gt-root")
    from genevolve_fast.report.build import build_report, shown_steps

    decode = reader(args.run_folder) if shown_steps(args.run_folder) else no_tokens
    print(f"report: {build_report(args.run_folder, decode)}")
    return 0


def reader(run: Path):
    """What turns the tokens of a run's rollouts to text."""
    from genevolve_fast.policy.codec import TransformersCodec

    saved = [p for p in (run / "policy", *sorted(run.glob("checkpoints/*/policy"))) if p.exists()]
    return TransformersCodec.from_pretrained(saved[0] if saved else started_from(run)).decode


def no_tokens(ids: Sequence[int]) -> str:
    raise AssertionError("without rollouts there is no token to read")


def run_compare(args: argparse.Namespace) -> int:
    from genevolve_fast.evaluate.bench import bootstrap
    from genevolve_fast.report.build import ReportError
    from genevolve_fast.report.compare import build_comparison, read_side

    if args.run_folder is not None:
        raise ReportError(f"--compare takes two folders, and {args.run_folder} is a third")
    a, b = (read_side(folder, args.gt_root) for folder in args.compare)

    def interval(differences: Sequence[float]) -> str:
        gain = bootstrap(differences)
        return f"{gain.mean:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]"

    print(f"comparison: {build_comparison(a, b, args.output or Path('compare.html'), interval)}")
    return 0


def started_from(folder: Path) -> str | Path:
    """The policy that a run began with: its tokenizer reads the rollouts where no checkpoint is written yet."""
    import yaml

    from genevolve_fast.report.build import ReportError
    from genevolve_fast.train.config import PolicyConfig

    config = folder / "config.yaml"
    if not config.exists():
        raise ReportError(f"{folder} is not the folder of a run: it has no config.yaml and no policy")
    path = yaml.safe_load(config.read_text(encoding="utf-8"))["policy"]["path"]
    if path == "sandbox:new":
        raise ReportError(f"{folder} has no checkpoint yet, and a policy made from nothing has no tokenizer before")
    return policy_path(PolicyConfig(path=path))


def write_report(folder: Path, policy) -> int:
    from genevolve_fast.report.build import build_report

    print(f"report: {build_report(folder, policy.codec.decode)}")
    return 0


def run_scoreboard(args: argparse.Namespace) -> int:
    from genevolve_fast.evaluate.scoreboard import print_table

    if not args.file.exists():
        raise FileNotFoundError(f"no {args.file}: it lies in the repository, so run this there, or name it with --file")
    print_table(args.file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
