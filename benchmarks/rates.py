"""Measure on this machine the rates that `genevolve-fast plan` estimates a step from, and merge them into one file.

On a CPU with one thread (--threads 1) that thread's own seconds count, so that neighbours do not.
Entries belong to a device and a condition (dtype, a layer's widths, rows, ranks): measuring one again replaces it, and
another device's stay. Models have random weights; where one is large two of its layers are measured.
  layers      FLOP/s of a layer visit, forward and backward, full weights and adapters, checkpointed or not
  attention   FLOP/s of causal attention, forward and backward
  head        FLOP/s of the loss with gradients, trained and frozen head, and of scoring
  optimizer   parameters a second of each implementation and rounding that runs here
  sampling    sampled tokens a second in the sandbox, of the embedded engine, or of servers (--servers)
  copies      bytes a second between host and GPU
  writing     bytes a second of a checkpoint's file
  collectives bytes a second between ranks on this machine; between machines: benchmarks/collectives.py
  run         real steps of `genevolve-fast evolve`, which the plan is compared with
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from benchmarks import rate_cases as cases
from benchmarks.models import Model
from benchmarks.step import versions
from benchmarks.store import ROOT, device_name
from genevolve_fast.evaluate.scoreboard import commit, write_json
from genevolve_fast.profile.rates import FILE, named_with_threads
from genevolve_fast.profile.shapes import BUILT_IN, ModelShape

COMMAND = "python -m benchmarks.rates"
OF_MODEL = ("layers", "attention", "head", "optimizer", "sampling")
OF_DEVICE = ("copies", "writing", "collectives", "run")
SANDBOX = "sandbox:start"
IMPLEMENTATIONS = ("fused", "8bit", "paged_8bit", "cpu")
ROWS = {"cpu": (256, 1024, 4096), "cuda": (2048, 8192, 32_768)}
LENGTHS = {"cpu": (64, 256, 1024), "cuda": (2048, 8192, 32_768)}
# One thread's own seconds, as the rates are: what evolve times does not grow with the neighbours' load.
OWN_SECONDS = (
    "import sys, time; time.perf_counter = time.process_time; from genevolve_fast.cli import main; "
    "sys.exit(main(sys.argv[1:]))"
)
ADAPTERS = 64  # rank that layers are measured with, where the model is as wide


def device_called(where: torch.device) -> str:
    """A GPU's name, or the processor's with the threads that work: other threads, other rates."""
    return named_with_threads(device_name(where)) if where.type == "cpu" else device_name(where)


def merge(
    file: Path, device: str, rates: Sequence[cases.Found], runs: Sequence[dict] = (), *, command: str, at: str | None
) -> None:
    """Put `rates` and `runs` of `device` in place of those measured under the same conditions."""
    data = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"devices": {}}
    mine = data["devices"].setdefault(device, {"rates": [], "runs": []})
    stamp = dict(commit=at or commit(), date=date.today().isoformat(), command=command)
    for r in rates:
        same = [x for x in mine["rates"] if (x["name"], x["at"]) == (r["name"], r["at"])]
        mine["rates"] = [x for x in mine["rates"] if x not in same] + [r | stamp]
        print(f"{r['name']:18} {r['value']:10.4g} {r['unit']:12} {json.dumps(r['at'])}", flush=True)
    for r in runs:
        mine["runs"] = [x for x in mine["runs"] if x["plan"] != r["plan"]] + [stamp | r]
    mine["versions"] = versions()
    data["devices"] = dict(sorted(data["devices"].items()))
    write_json(file, data)


def shape_named(name: str) -> ModelShape:
    from genevolve_fast.sandbox.tiny_policy import start_path

    return ModelShape.from_config(start_path() if name == SANDBOX else name)


def of_model(
    name: str,
    device: cases.Device,
    sections: Sequence[str],
    dtype: torch.dtype,
    implementations: Sequence[str] = IMPLEMENTATIONS,
    urls: Sequence[str] = (),
) -> Iterator[cases.Found]:
    """Every rate of a model, one after another."""
    shape = shape_named(name)
    whole = Model(shape, dtype, 0)
    adapted = Model(shape, dtype, min(ADAPTERS, shape.hidden // 8))
    if "attention" in sections:
        yield from cases.attention(shape, whole, device)
    if "head" in sections:
        yield from cases.head(shape, whole, device)
    for model in (whole, adapted):
        if not {"layers", "optimizer"} & set(sections):
            break
        if "layers" in sections:
            yield from cases.layers(cases.policy_of(model, device), model, device)
        for kind in cases.kinds_of_steps(model, device, implementations) if "optimizer" in sections else ():
            yield from cases.optimizer(cases.policy_of(model, device), model, device, *kind)
    if "layers" in sections and importlib.util.find_spec("bitsandbytes"):
        yield from cases.layers(cases.policy_of(adapted, device, "nf4"), adapted, device, "nf4")
    if "sampling" in sections:
        policy, new = sampler(name, whole, device, served=bool(urls))
        for prompts in (8, 2):
            yield from cases.sampling(policy, whole, device, prompts, 6, new, urls)


def sampler(name: str, model: Model, device: cases.Device, served: bool):
    """(policy, tokens of a turn): the sandbox's own speaks its protocol, random weights never end a turn.

    Of servers: the policy in the folder that they serve.
    """
    from transformers import AutoTokenizer

    from benchmarks.models import random_policy
    from genevolve_fast.policy.codec import TransformersCodec
    from genevolve_fast.policy.model import Policy
    from genevolve_fast.sandbox.tiny_policy import start_path

    if name == SANDBOX:
        return Policy.from_pretrained(start_path(), model.dtype).to(device.where), 160
    if served:
        return Policy.from_pretrained(name, model.dtype), 512
    codec = TransformersCodec(AutoTokenizer.from_pretrained(start_path()), None)
    return random_policy(model, device.where, codec=codec), 512


# --- a real run -------------------------------------------------------------------------------------------------------


def evolved(config: str, steps: int, sets: Sequence[str], ranks: int, threads: int | None) -> dict[str, Any]:
    """`steps` real steps after one that warms up, in a process of their own, and the lengths that were drawn."""
    name = "measured"
    options = [f"name={name}", f"steps={steps + 1}", f"checkpoint.every={steps + 1}", "evaluate.requests=0", *sets]
    options += [f"threads={threads}"] if threads else []
    with tempfile.TemporaryDirectory() as folder:
        flags = [part for option in options for part in ("--set", option)]
        own = threads == 1 and not torch.cuda.is_available()
        command = [sys.executable, *(["-c", OWN_SECONDS] if own else ["-m", "genevolve_fast.cli"])]
        command += ["evolve", "--config", config, "--runs", folder, *flags]
        if ranks > 1:
            launch = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "--no-python"]
            command = [sys.executable, "-m", *launch, *command]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} exits with {done.returncode}: {done.stderr.strip()[-800:]}")
        lines = (Path(folder) / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        trajectories = sorted((Path(folder) / name / "rollouts").glob("step_*.safetensors"))[1:]
        lengths = drawn(trajectories)
    metrics = [json.loads(line) for line in lines][1:]

    def average(field: str) -> float:
        return mean(m.get(field, 0.0) for m in metrics)

    teacher = average("tokens/teacher") / max(1.0, average("actor/teacher_share") * lengths.pop("rollouts"))
    lengths["patch"] = max(0, round(teacher - (lengths["mean_tokens"] - lengths["prefix"])))
    seconds = {"rollout": average("timing_s/rollout"), "training": average("perf/train_seconds")}
    seconds["step"] = average("timing_s/step") - average("timing_s/checkpoint")
    return dict(lengths=lengths, seconds={k: round(v, 4) for k, v in seconds.items()}, steps=steps)


def drawn(files: Sequence[Path]) -> dict[str, Any]:
    """What the planner needs to know of the rollouts in `files`: means, and the longest."""
    from genevolve_fast.trajectory import load

    every = [t for file in files for t in load(file)[0] if t.num_loss_tokens]
    prefix = mean(int(t.loss_mask.argmax()) for t in every)
    whole, sampled = mean(len(t) for t in every), mean(t.num_loss_tokens for t in every)
    return dict(
        tokens=max(len(t) for t in every), prefix=round(prefix), mean_tokens=round(whole),
        loss_share=round(sampled / (whole - prefix), 3), rollouts=len(every) / len(files),
    )  # fmt: skip


def run_of(config: str, steps: int, sets: Sequence[str], ranks: int, threads: int | None, where: torch.device) -> dict:
    """The entry of a real run: settings of the plan that it is compared with, and what it took."""
    from dataclasses import asdict, replace

    from genevolve_fast.commands.opening import config_path
    from genevolve_fast.train.config import EvolveConfig, load_config
    from genevolve_fast.train.fits import settings_of

    made = evolved(config, steps, sets, ranks, threads)
    of = load_config(EvolveConfig, config_path(config), list(sets))
    known = made["lengths"] | ({"gpus_per_node": ranks} if ranks > 1 else {})
    settings = asdict(replace(settings_of(of, where), **known))
    flags = [f"--{name.replace('_', '-')} {value}" for name, value in known.items()]
    changed = [f"--set {one}" for one in (*sets, *([f"threads={threads}"] if threads else []))]
    command = f"{COMMAND} --only run --config {config} --steps {steps}"
    plan = " ".join(["genevolve-fast plan --config", config, *changed, *flags])
    print(f"compare: {plan}", flush=True)
    return dict(settings=settings, seconds=made["seconds"], steps=steps, command=command, plan=plan)


# --- the command ------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    p = argparse.ArgumentParser(
        prog=COMMAND, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )  # fmt: skip
    p.add_argument("--only", nargs="+", choices=(*OF_MODEL, *OF_DEVICE), help="(default: all that this machine has)")
    models = [SANDBOX, *BUILT_IN]
    usual = [SANDBOX] if kind == "cpu" else ["qwen3-vl-2b", "qwen3-vl-8b"]
    p.add_argument("--model", nargs="+", default=usual, help=f"{', '.join(models)} or a folder (default: {usual})")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32" if kind == "cpu" else "bfloat16")
    p.add_argument("--rows", type=int, nargs="+", default=ROWS[kind], help="of layer visits and head")
    p.add_argument("--lengths", type=int, nargs="+", default=LENGTHS[kind], help="of sequences that attend")
    p.add_argument("--repeats", type=int, default=5, help="(default: %(default)s)")
    p.add_argument("--ranks", type=int, default=torch.cuda.device_count() if kind == "cuda" else 2)
    p.add_argument(
        "--servers", nargs="+", default=[], metavar="URL",
        help="sampling by `genevolve-fast serve --training`, one a GPU of this machine, of the --model they serve",
    )  # fmt: skip
    p.add_argument(
        "--implementations", nargs="+", choices=IMPLEMENTATIONS,
        default=IMPLEMENTATIONS if kind == "cuda" else ["fused"], help="of the optimizer; cpu compiles for a minute",
    )  # fmt: skip
    p.add_argument("--config", default="demo", help="of run (default: %(default)s)")
    p.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="of run, repeatable")
    p.add_argument("--steps", type=int, default=3, help="of run (default: %(default)s)")
    p.add_argument("--run-ranks", type=int, default=1, help="of run: started by torchrun (default: %(default)s)")
    p.add_argument("--threads", type=int, help="CPU threads of everything; none: torch's default")
    p.add_argument("--folder", type=Path, default=Path("."), help="on the disk that checkpoints are written to")
    p.add_argument("--file", type=Path, default=FILE, help="(default: %(default)s)")
    p.add_argument("--commit", help="what to record where the tree is a copy that git does not know")
    args = p.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    where = torch.device(kind)
    device = cases.Device(where, args.repeats, tuple(args.rows), tuple(args.lengths))
    sections = args.only or [s for s in (*OF_MODEL, *OF_DEVICE) if kind == "cuda" or s != "copies"]
    if args.servers and (args.only != ["sampling"] or len(args.model) > 1):
        p.error("--servers goes with --only sampling and the one --model that they serve")
    if "copies" in sections and kind == "cpu":
        p.error("copies go between a host and its GPU, and there is none")
    name = device_called(where)
    print(f"{name}, torch {torch.__version__}, {torch.get_num_threads()} threads", flush=True)

    def keep(rates: Iterator[cases.Found]) -> None:
        for rate in rates:
            merge(args.file, name, [rate], command=COMMAND, at=args.commit)

    for model in args.model if set(sections) & set(OF_MODEL) else ():
        keep(of_model(model, device, sections, getattr(torch, args.dtype), args.implementations, args.servers))
    if "copies" in sections:
        keep(cases.copies(device))
    if "writing" in sections:
        keep(cases.writing(device, args.folder))
    if "collectives" in sections and args.ranks > 1:
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(args.ranks)]
        more = ["--commit", args.commit] if args.commit else []
        subprocess.run([*start, "-m", "benchmarks.collectives", "--file", str(args.file.resolve()), *more], check=True)
    if "run" in sections and (kind == "cpu" or args.only):
        run = run_of(args.config, args.steps, args.set, args.run_ranks, args.threads, where)
        merge(args.file, name, [], [run], command=COMMAND, at=args.commit)
        print(json.dumps(run["seconds"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
