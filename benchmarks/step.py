"""The training step: against packed whole sequences, against TRL, its bytes, its longest rollout, its planner.

A case is measured in one go and leaves a row for each contender; rows of the same code are kept, so a run that was cut
short goes on where it stopped. Models have random weights and are made on the device. Sections:
  speedup    the training pass against the same step unshared: packed whole sequences, the teacher a pass of its own
  trl        against TRL's GRPOTrainer for the same loss, a batch of six padded to its longest
  bytes      GPU bytes per student token of one rollout alone, checkpoints on the GPU or offloaded; what that costs
  longest    the longest rollout that trains end to end
  planner    measured peaks of whole steps, which the planner's predictions are compared with
  loop       a whole step of evolve, rollouts by the transformers engine
  exactness  (CPU) gradients against naive passes; bytes that the teacher leaves for the backward
  demo       (CPU) the demo's training phase against the pass it was trained with before
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

from benchmarks.group import DeviceLost
from benchmarks.models import MODELS
from benchmarks.run import DEVICE_LOST, OUT_OF_TIME
from benchmarks.step_cases import ALONE, CASES, ON_CPU, PLANNED, SECTIONS, Bench, Case, failure
from benchmarks.store import Results, Row, device_name, fingerprint, freeze_imports
from genevolve_fast.evaluate.scoreboard import record
from genevolve_fast.profile.plan import Settings, plan

GROUP = ("mode", "case", "model", "device", "torch")
MEASURED = (
    *(f"genevolve_fast/{room}/*.py" for room in ("ops", "policy", "batch")),
    "genevolve_fast/train/update.py",
    "kernels/*.py",
    "csrc/*.cu",
    *(f"benchmarks/{name}.py" for name in ("models", "whole_sequences", "trl_step", "step_cases", "memory", "timing")),
)
FILES = {"cpu": Path("benchmarks/results/step.json"), "cuda": Path("benchmarks/results/gpu_step.json")}
COMMAND = "python -m benchmarks.step"
GIB, KIB = 2**30, 2**10


def code() -> str:
    return fingerprint(MEASURED)


# --- scores -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """Timed rows of one code; `model` is what a row's model stands for."""

    rows: Sequence[Row]

    def find(self, mode: str, case: str | None = None, impl: str | None = None) -> list[Row]:
        return [
            r for r in self.rows
            if r["mode"] == mode and case in (None, r["case"]) and (impl is None or r["impl"].startswith(impl))
        ]  # fmt: skip

    def one(self, mode: str, case: str, impl: str) -> Row | None:
        return next(iter(self.find(mode, case, impl)), None)


def scores(rows: Sequence[Row], code: str) -> dict[str, tuple[float, int]]:
    """Scoreboard id -> (value, fewest samples), of those ids whose rows are there and were measured by `code`."""
    table = Table([r for r in rows if r["code"] == code and r["status"] == "timed"])
    out: dict[str, tuple[float, int]] = {}
    shares = []
    for reply in ("reply8k", "reply2k"):
        if row := table.one("speedup", f"8b lora {reply}", "unshared"):
            out[f"speedup_{reply}"] = row["ratio"], row["samples"]
            shares.append((row["ratio"] / row["flop_ratio"], row["samples"]))
    if len(shares) == 2:
        out["share_of_flop_ratio"] = min(shares)
    peers = [r for r in table.find("trl", None, "trl") if "ratio" in r]
    if peers and (mine := table.one("trl", peers[0]["case"], "shared")):
        widest = max(peers, key=lambda r: r["batch"])
        out["speedup_vs_trl"] = widest["ratio"], widest["samples"]
        out["memory_vs_trl"] = mine["peak_bytes"] / widest["peak_bytes"], 1
    for name, offloaded in (("gpu", False), ("offload", True)):
        found = kib_per_token([r for r in table.find("bytes", None, "shared") if r["offloaded"] == offloaded])
        if len(found) == 2:
            out[f"kib_per_token_{name}"] = max(measured for measured, _ in found.values()), 1
    if row := table.one("bytes", "offload cost", "offloaded"):
        out["offload_cost"] = row["ratio"] - 1, row["samples"]
    if whole := [r["tokens"] for r in table.find("longest") if r["whole"]]:
        out["longest_rollout_tokens"] = max(whole), 1
    if len(found := table.find("planner")) == len(PLANNED):
        out["planner_error"] = max(abs(predicted_bytes(r) / r["total_bytes"] - 1) for r in found), len(found)
    if found := table.find("exactness", "grad error"):
        out["grad_error"] = max(r["error"] for r in found), sum(r["samples"] for r in found)
    if found := table.find("exactness", "teacher saved bytes"):
        differences = [r["saved_bytes"] - r["saved_bytes_without"] for r in found]
        out["teacher_saved_bytes"] = max(differences, key=abs), len(found)
    if row := table.one("demo", "first step", "former"):
        out["demo_train_ratio"] = row["ratio"], row["samples"]
    return {f"step/{name}": value for name, value in out.items()}


def kib_per_token(rows: Sequence[Row]) -> dict[bool, tuple[float, float]]:
    """Teacher off and on -> (measured, predicted) KiB that one student token more takes, from the two lengths."""
    found = {}
    for teacher in (False, True):
        pair = sorted((r for r in rows if r["teacher"] == teacher), key=lambda r: r["tokens"])
        if len(pair) == len(ALONE):
            more = (pair[1]["tokens"] - pair[0]["tokens"]) * KIB
            measured = (pair[1]["peak_bytes"] - pair[0]["peak_bytes"]) / more
            found[teacher] = measured, (predicted_bytes(pair[1]) - predicted_bytes(pair[0])) / more
    return found


def predicted_bytes(row: Row) -> int:
    """What the planner says of a row's step, without the CUDA context, which no allocator reports."""
    shape = MODELS[row["model"]].shape
    made = plan(shape, Settings(**row["settings"]))
    return made.total - made.overhead


# --- telling ----------------------------------------------------------------------------------------------------------


def line(row: Row) -> str:
    head = f"{row['mode']:9} {row['case']:42} {row['impl']:14}"
    if row["status"] != "timed":
        return f"{head} {row['status']}: {row['reason']}"
    parts = [
        f"{row['seconds']:.3g} s" if "seconds" in row else "",
        f"× {row['ratio']:.3f} [{row['ratio_20']:.3f}, {row['ratio_80']:.3f}]" if "ratio" in row else "",
        f"of {row['flop_ratio']:.3f} by FLOPs" if "flop_ratio" in row else "",
        f"{row['peak_bytes'] / GIB:.3f} GiB" if "peak_bytes" in row else "",
        f"{row['tokens']} tokens" if "tokens" in row else "",
        f"{row['tflops']:.0f} TFLOP/s" if "tflops" in row else "",
        f"{row['step_tokens_per_second']:.0f} tokens/s" if "step_tokens_per_second" in row else "",
        f"error {row['error']:.2g}" if "error" in row else "",
        f"saves {row['saved_bytes']} bytes, {row['saved_bytes_without']} without" if "saved_bytes" in row else "",
    ]
    return f"{head} {'  '.join(p for p in parts if p)}"


def print_formulas(rows: Sequence[Row]) -> None:
    """Measured beside what the planner says."""
    timed = [r for r in rows if r["status"] == "timed"]
    for offloaded in (False, True):
        for teacher, (measured, said) in kib_per_token(
            [r for r in timed if r["mode"] == "bytes" and r.get("offloaded") == offloaded]
        ).items():
            where = "offloaded" if offloaded else "on the GPU"
            print(f"KiB a token, {where}, teacher {'on' if teacher else 'off'}: {measured:.1f}, formula {said:.1f}")
    for r in timed:
        if r["mode"] == "planner":
            said = predicted_bytes(r)
            print(f"{r['case']}: {r['total_bytes'] / GIB:.3f} GiB, planner {said / GIB:.3f} GiB "
                  f"({said / r['total_bytes'] - 1:+.1%})")  # fmt: skip


def versions() -> dict[str, str]:
    found = {"torch": torch.__version__}
    for name in ("transformers", "peft", "trl", "liger-kernel", "triton"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


# --- the command ------------------------------------------------------------------------------------------------------


def chosen_cases(args: argparse.Namespace) -> list[Case]:
    sections = args.section or [s for s in SECTIONS if (s in ON_CPU) == (args.device == "cpu" and args.model != "toy")]
    cases = [c for c in CASES if c.section in sections and all(word in c.name for word in args.case)]
    return [c for c in cases if args.model in (None, "toy", c.model) or c.section in ON_CPU]


def run(args: argparse.Namespace) -> int:
    """Measure what is missing; the exit code."""
    where = torch.device(args.device)
    results = Results(args.file, where, fresh=args.fresh, at=args.commit, group=GROUP, code=code())
    until = None if args.minutes is None else time.monotonic() + 60 * args.minutes
    toy = args.model == "toy"
    bench = Bench(where, args.repeats, toy=toy, small=args.dry_run)
    left, versioned = [], versions()
    freeze_imports()
    for case in chosen_cases(args):
        on_cpu = case.section in ON_CPU
        model = "toy" if toy and not on_cpu else case.model
        group = dict(mode=case.section, case=case.name, model=model, device=device_name(where), torch=torch.__version__)
        known = [r for r in results.rows if r["code"] == results.code and all(r[k] == group[k] for k in GROUP)]
        if known and not (args.again and any(r["status"] != "timed" for r in known)):
            print("\n".join(f"kept: {line(r)}" for r in known), flush=True)
            continue
        if case.unless([r for r in results.rows if r["code"] == results.code]):
            continue
        if until is not None and time.monotonic() + 60 * case.minutes > until:
            left.append(f"{case.section} {case.name}")
            continue
        command = f"{COMMAND} --section {case.section} --case '{case.name}'"
        more = dict(stands_for=case.model, command=command, versions=versioned)
        if not measured(results, bench, group, more, lambda: case.measure(bench), line, args.debug):  # noqa: B023
            return DEVICE_LOST
    rows = [r for r in results.rows if r["code"] == results.code]
    print_formulas([r for r in rows if r["mode"] in {c.section for c in chosen_cases(args)}])
    for name, (value, n) in scores(rows if args.dry_run else as_meant(rows), results.code).items():
        if args.record:
            record(name, value, n=n, command=COMMAND, at=args.commit)
        else:
            print(f"{name} = {value:g} (n {n})")
    if left:
        print(f"out of time, left: {'; '.join(left)}")
    return OUT_OF_TIME if left else 0


def measured(
    results: Results, bench: Bench, group: Row, more: Row, measure: Callable[[], dict[str, Row]], line, debug: bool
) -> bool:
    """Measure a case and keep its rows, or why there are none; False where the device is lost."""
    results.note(results.stamp(group, "shared", "") | more)
    try:
        found = measure()
    except DeviceLost as e:
        lost = results.stamp(group, "shared", "") | more | dict(status="failed", reason=str(e), fatal=True)
        results.add([lost])
        print(f"{e}\nRun the same command again: rows so far are kept, and this case is left out.")
        return False
    except Exception as e:
        if debug:
            raise
        found = {"shared": failure(e)}
        bench.forget()
    finally:
        results.note(None)
    trl = more["versions"]["trl"]
    rows = [
        results.stamp(group, impl, trl if impl.startswith("trl") else "") | more | row for impl, row in found.items()
    ]
    results.add(rows)
    print("\n".join(map(line, rows)), flush=True)
    return True


def as_meant(rows: Sequence[Row]) -> list[Row]:
    """Without rows of toys, which give scores in a dry run only."""
    return [r for r in rows if r["model"] == r["stands_for"]]


def parser() -> argparse.ArgumentParser:
    cuda = torch.cuda.is_available()
    p = argparse.ArgumentParser(
        prog=COMMAND, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )  # fmt: skip
    on_cpu = " ".join(ON_CPU)
    p.add_argument("--section", nargs="+", choices=SECTIONS, help=f"(default: on a GPU all but {on_cpu}, else those)")
    p.add_argument("--case", nargs="+", default=[], metavar="WORD", help="only cases whose name holds all these words")
    p.add_argument("--model", choices=MODELS, help="only this model's cases; toy: all of them at toy size")
    p.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
    p.add_argument("--repeats", type=int, default=3, help="rounds of what takes turns (default: %(default)s)")
    p.add_argument("--minutes", type=float, help="begin no case that would end after this; exit code 75: some are left")
    p.add_argument("--file", type=Path, help=f"(default: {FILES['cpu']}, {FILES['cuda'].name} on a GPU)")
    p.add_argument("--fresh", action="store_true", help="forget recorded rows; else those of the same code are kept")
    p.add_argument("--again", action="store_true", help="measure once more what failed, was wrong or had no memory")
    p.add_argument("--record", action="store_true", help="write the scores on the scoreboard")
    p.add_argument("--commit", help="what to record where the tree is a copy that git does not know")
    p.add_argument("--debug", action="store_true", help="let a failing case raise")
    p.add_argument("--dry-run", action="store_true", help="every case at toy size on the CPU; nothing is kept")
    return p


def main(argv: list[str] | None = None) -> int:
    p = parser()
    args = p.parse_args(argv)
    if args.dry_run:
        with tempfile.TemporaryDirectory() as folder:
            args.file, args.device, args.model, args.record = Path(folder) / "step.json", "cpu", "toy", False
            args.repeats, args.section = 1, args.section or list(SECTIONS)
            return run(args)
    gpu_only = [s for s in args.section or () if s not in ON_CPU]
    if args.device == "cpu" and gpu_only and args.model != "toy":
        p.error(f"{', '.join(gpu_only)} at real size need a GPU: --model toy runs them here, --dry-run runs everything")
    if args.device == "cuda" and (wrong := [s for s in args.section or () if s in ON_CPU]):
        p.error(f"{', '.join(wrong)} are measured with --device cpu")
    args.file = args.file or FILES[args.device]
    try:
        return run(args)
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
