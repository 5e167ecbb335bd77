"""The head against its peers and against the GEMM floor, on this machine.

A row is one contender in one group; a group is one mode at one shape, number of rows, share of loss tokens, layout and
kind of logits. Before anything of a group is timed, each contender's numbers are compared with float64: on a small
shape, and on the timed inputs themselves. Then the contenders take turns, together with one plain torch.mm of the full
shape: `ratio_to_floor` is the median time over that product's, times the GEMMs that the mode cannot do without.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.check import Gate, Truth
from benchmarks.group import DeviceLost, describe, line, measure, release, version_of
from benchmarks.inputs import LOGITS, MODES, OWN_MODES, Inputs, Shape
from benchmarks.peers import OURS, PEERS, Contender, Unavailable, find, ours
from benchmarks.store import Results, Row, device_name, freeze_imports
from genevolve_fast.evaluate.scoreboard import record

EXAMPLES = """examples:
  python -m benchmarks.run                                    what the scoreboard's CPU rows are made of (eight minutes)
  python -m benchmarks.run linear_grpo_sdl --peers all        the objective and the teacher against everyone
  python -m benchmarks.run --modes frozen --rows 2048 8192 32768 --shapes 8b 4096x128256
  python -m benchmarks.run --ratio 0.3 --layout compact ignore --logits peaked flat
  python -m benchmarks.run --workspaces 640 1280 2560 --impls auto triton cuda --peers none

modes (GEMMs of the floor):
""" + "\n".join(f"  {name:10} {floor:3g}  {meaning}" for name, (_, floor, meaning) in MODES.items())  # fmt: skip

TIME_TARGETS = {"frozen": 1.0, "trainable": 1.45, "objective": 1.0, "teacher": 1.0}  # of the naive path, on a CPU
CPU_CASE = dict(shape="cpu", rows=4096, ratio=1.0, logits="normal", lengths="equal")
FILES = {"cpu": Path("benchmarks/results/head.json"), "cuda": Path("benchmarks/results/head_gpu.json")}
OUT_OF_TIME, DEVICE_LOST = 75, 86  # exit codes


def contenders_of(args: argparse.Namespace, dtype: torch.dtype, where: torch.device) -> dict[str, Contender | str]:
    """Name -> contender, or the reason why it cannot run here; this library's first."""
    found: dict[str, Contender | str] = {}
    probe = torch.empty(1, 8, dtype=dtype, device=where)
    for impl, workspace in itertools.product(args.impls, args.workspaces):
        try:
            c = ours(probe, impl, None if workspace == "default" else float(workspace), args.main_grad)
            found[c.name] = c
        except Unavailable as e:
            found[f"{OURS} [{impl}]"] = str(e)
    for name in chosen_peers(args.peers, where):
        try:
            found[name] = find(name, where)
        except Unavailable as e:
            found[name] = str(e)
    return found


def chosen_peers(names: list[str] | None, where: torch.device) -> list[str]:
    if names is None:
        names = ["all"] if where.type == "cuda" else ["eager"]
    return list(PEERS) if "all" in names else [n for n in names if n != "none"]


def groups_of(args: argparse.Namespace, where: torch.device) -> Iterator[Row]:
    """In the order in which inputs can be reused."""
    for shape, logits, rows, ratio in itertools.product(args.shapes, args.logits, args.rows, args.ratio):
        for layout in args.layout if ratio < 1 else ["dense"]:
            for mode in args.modes:
                dtype = str(Shape.parse(shape).dtype).removeprefix("torch.")
                yield dict(
                    op=MODES[mode][0], shape=shape, rows=rows, ratio=ratio, layout=layout, logits=logits, mode=mode,
                    lengths=args.lengths if mode == "teacher" else "equal", dtype=dtype, device=device_name(where),
                    torch=torch.__version__,
                )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Measure what is missing; the exit code."""
    where = torch.device(args.device)
    results = Results(args.file, where, fresh=args.fresh, at=args.commit)
    until = None if args.minutes is None else time.monotonic() + 60 * args.minutes
    contenders = functools.cache(lambda dtype: contenders_of(args, dtype, where))
    gate = functools.cache(lambda dtype: Gate(dtype, where))
    truth, case, layout, left = None, None, None, []
    freeze_imports()
    groups = list(groups_of(args, where))
    for name, c in contenders(Shape.parse(groups[0]["shape"]).dtype).items():
        reasons = [c] if isinstance(c, str) else sorted({r for m in args.modes if (r := c.why_not(m))})
        print("".join(f"{name}: {r}\n" for r in reasons), end="")
    for group in groups:
        shape = Shape.parse(group["shape"])
        todo = contenders(shape.dtype)
        known = {name: known_row(results, group, name, version_of(c)) for name, c in todo.items()}
        if all(known.values()):
            kept = [row for row in known.values() if row["status"] not in ("absent", "not offered")]
            tqdm.write("\n".join(f"kept: {line(row)}" for row in kept))
            continue
        if until is not None and time.monotonic() > until:
            left.append(group)
            continue
        wanted = (group["shape"], group["rows"], where, group["logits"], group["ratio"])
        if (wanted, group["layout"]) != (case, layout):
            torch.compiler.reset()  # else a peer's compiled code turns dynamic, or falls back to eager
        if wanted != case:
            truth = None
            release(where)
            truth = Truth(Inputs.make(shape, *wanted[1:], args.lengths))
        case, layout = wanted, group["layout"]
        alive = {name: c for name, c in todo.items() if not (known[name] and known[name]["status"] == "failed")}
        measure(group, truth, alive, gate(shape.dtype), results, args.repeats, args.seconds)
    if left:
        print(f"out of time, left: {'; '.join(map(describe, left))}")
    if where.type == "cpu" and args.file == FILES["cpu"]:
        record_cpu(results, args)
    return OUT_OF_TIME if left else 0


def known_row(results: Results, group: Row, name: str, version: str) -> Row | None:
    """The recorded row that still holds; a contender that has killed a process is not tried again."""
    row, why = results.find(group, name, version), results.fatal().get(name)
    if row is None and why:
        row = results.stamp(group, name, version) | {"status": "failed", "reason": f"not tried again: {why}"}
        results.add([row])
    return row


def record_cpu(results: Results, args: argparse.Namespace) -> None:
    """The worst mode against its target: time of the naive path, and a tenth of its memory."""
    by = {
        (r["mode"], r["impl"]): r
        for r in results.rows
        if r["code"] == results.code and r["status"] == "timed" and all(r[k] == v for k, v in CPU_CASE.items())
    }
    if not all((mode, name) in by for mode in OWN_MODES for name in (OURS, "eager")):
        return
    slowness, memory = [], []
    for mode, allowed in TIME_TARGETS.items():
        a, b = by[mode, OURS], by[mode, "eager"]
        slowness.append(a["ms"] / b["ms"] / allowed)
        memory.append(a["peak_mib"] / b["peak_mib"])
    n = min(by[mode, OURS]["samples"] for mode in TIME_TARGETS)
    for name, value in (("time", max(slowness)), ("memory", max(memory))):
        record(f"head/cpu_{name}_vs_naive", value, n=n, command="python -m benchmarks.run", at=args.commit)


def parser() -> argparse.ArgumentParser:
    cuda = torch.cuda.is_available()
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.run", description=__doc__, epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    p.add_argument("op", nargs="?", choices=("linear_logprob", "linear_grpo_sdl"), help="only this operation's modes")
    p.add_argument("--modes", nargs="+", choices=MODES, help=f"(default: {' '.join(OWN_MODES)})")
    p.add_argument(
        "--peers", nargs="+", choices=[*PEERS, "all", "none"], metavar="PEER",
        help="`python -m benchmarks.peers` lists them (default: eager on a CPU, all on a GPU)",
    )  # fmt: skip
    p.add_argument(
        "--shapes", nargs="+", type=lambda s: Shape.parse(s).name, default=["8b" if cuda else "cpu"],
        help="2b 4b 8b: Qwen3-VL's heads in bf16; cpu: 1024 x 32000 in fp32; or HxV, HxVxfloat32 (default: 8b, cpu)",
    )  # fmt: skip
    p.add_argument("--rows", nargs="+", type=int, default=[16_384 if cuda else 4096], help="(default: %(default)s)")
    p.add_argument("--ratio", nargs="+", type=float, default=[1.0], help="share of loss tokens (default: 1.0)")
    p.add_argument(
        "--layout", nargs="+", choices=("compact", "ignore"), default=["compact"],
        help="below ratio 1: the caller gathers the loss rows in the timed call, as this library's trainer does, "
        "or all rows go in with ignored targets (zero upstream gradient where a peer has no ignore_index)",
    )  # fmt: skip
    p.add_argument(
        "--logits", nargs="+", choices=LOGITS, default=["peaked" if cuda else "normal"],
        help="; ".join(f"{k}: {v}" for k, v in LOGITS.items()).replace("%", "%%") + " (default: %(default)s)",
    )  # fmt: skip
    p.add_argument(
        "--lengths", choices=("equal", "uneven"), default="uneven" if cuda else "equal",
        help="of the teacher mode's 16 sequences; equal ones happen to end where blocks of rows do (%(default)s)",
    )  # fmt: skip
    p.add_argument("--impls", nargs="+", default=["auto"], help="of this library: auto torch triton cuda")
    p.add_argument("--workspaces", nargs="+", default=["default"], help="of this library, in MB, or `default`")
    p.add_argument("--main-grad", action="store_true", help="d head goes into the caller's fp32 buffer")
    p.add_argument("--device", default="cuda" if cuda else "cpu")
    p.add_argument("--repeats", type=int, default=20 if cuda else 5, help="rounds (default: %(default)s)")
    p.add_argument(
        "--seconds", type=float, default=1.0 if cuda else None, help="most of a contender, but 3 runs at least"
    )
    p.add_argument("--minutes", type=float, help="start no group after this; exit code 75 says that some are left")
    p.add_argument("--file", type=Path, help=f"(default: {FILES['cpu']}, {FILES['cuda'].name} on a GPU)")
    p.add_argument("--fresh", action="store_true", help="forget recorded rows; else those of the same code are kept")
    p.add_argument("--commit", help="what to record where the tree is a copy that git does not know")
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.modes is None:
        args.modes = [m for m in OWN_MODES if args.op in (None, MODES[m][0])]
    args.file = args.file or FILES[torch.device(args.device).type]
    try:
        return run(args)
    except DeviceLost as e:
        print(f"{e}\nRun the same command again: rows so far are kept, and it is left out.")
        return DEVICE_LOST


if __name__ == "__main__":
    raise SystemExit(main())
