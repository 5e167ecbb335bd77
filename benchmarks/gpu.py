"""Everything that needs a GPU, in one command: its tests, and if they are green the benchmarks, by importance.

Each section is `python -m benchmarks.run` for the head, `python -m benchmarks.step` for the training step, or
`python -m benchmarks.scale_gpu` for whole steps against TRL's, in a process of its own, writing into one file each:
what a section has measured survives its end, a contender that kills its process is left out of the next attempt, and a
section that is there already is not measured twice. When time runs out the rest is listed, not begun. The scoreboard's
GPU rows are computed from those files. Rollouts by vLLM have a script of their own, benchmarks/rollout_vllm.py: they
need vLLM, and a GPU for nothing else.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import run, scale_gpu, step
from benchmarks.inputs import OWN_MODES
from benchmarks.peers import OURS
from benchmarks.store import ROOT, Row, fingerprint, read
from genevolve_fast.evaluate.scoreboard import record, write_json

FILE = Path("benchmarks/results/gpu_head.json")
CORE_CASE = dict(shape="8b", rows=16_384, logits="peaked")
WORKSPACES = (640, 1280, 2560)
ATTEMPTS = 8  # of a section whose contenders kill its process
LAST_GROUP = 30  # seconds before the end in which no group is begun


@dataclass(frozen=True)
class Section:
    """Options of `benchmarks.run`, or of another program; the time they take on an H200 is an estimate."""

    name: str
    minutes: float
    options: dict[str, str]
    why: str
    program: str = "benchmarks.run"

    @property
    def of_step(self) -> bool:
        return self.program == "benchmarks.step"

    @property
    def of_scale(self) -> bool:
        return self.program == "benchmarks.scale_gpu"

    def argv(self, changes: dict[str, str]) -> list[str]:
        """`changes` replaces options that the section has; other ones are added."""
        head = {"shapes": "8b", "rows": "16384", "logits": "peaked", "lengths": "uneven"}
        options = (head if self.program == "benchmarks.run" else {}) | self.options | changes
        return [part for name, value in options.items() for part in (f"--{name}", *value.split())]


ALL = " ".join(["objective", "frozen", "logprob", "teacher", "trainable"])  # by importance
CORE = [
    Section(
        "epilogue", 0.6, {"modes": "objective frozen logprob", "impls": "triton cuda", "peers": "none"},
        "CUDA against Triton around the same GEMMs",
    ),
    Section(
        "dense", 3.4, {"modes": ALL, "workspaces": f"default {' '.join(map(str, WORKSPACES))}", "peers": "all"},
        "every mode, workspace and peer in the same turns",
    ),
    Section(
        "workspace640", 0.4,
        {"modes": "objective teacher", "workspaces": "640", "main-grad": "", "peers": "none"},
        "the smallest workspace with d head going into the trainer's own buffer",
    ),
    Section("masked30", 1.2, {"modes": ALL, "ratio": "0.3", "peers": "all"}, "three loss tokens in ten, compacted"),
    Section("ce", 0.5, {"modes": "ce", "peers": "all"}, "mean cross-entropy, for peers that give only that"),
]  # fmt: skip
ROWS = "2048 4096 8192 32768 65536 131072"
REST = [
    *(
        Section(f"rows-{shape}", minutes, {"shapes": shape, "rows": ROWS, "modes": "objective frozen logprob"}, "rows")
        for shape, minutes in (("8b", 12), ("4b", 9), ("2b", 8))
    ),
    *(
        Section(f"masked-{shape}", 5, {"shapes": shape, "modes": ALL, "ratio": "0.3", "layout": "compact ignore"}, why)
        for shape, why in (("8b", "gathered by the caller, and with ignored targets"), ("2b", "the same, small head"))
    ),
    Section("flat", 4, {"modes": ALL, "logits": "flat"}, "probabilities near 1/V: what gradient filters do"),
]
STEP = [
    Section(f"step-{name}", minutes, options, why, "benchmarks.step")
    for name, minutes, options, why in (
        ("speedup", 5.5, {"section": "speedup", "model": "8b"}, "8B, LoRA, against packed whole sequences"),
        ("bytes", 8, {"section": "bytes"}, "bytes of a student token, on the GPU and offloaded; what that costs"),
        ("longest", 8.5, {"section": "longest", "case": "all layers"}, "262 144 tokens, end to end"),
        ("trl", 8, {"section": "trl"}, "against TRL's GRPOTrainer"),
        ("planner", 6, {"section": "planner"}, "six measured peaks for the planner"),
        ("speedup-2b", 3, {"section": "speedup", "model": "2b"}, "2B, all weights"),
        ("loop", 2.5, {"section": "loop"}, "a whole step of evolve"),
        ("deep", 7, {"section": "longest", "case": "524288"}, "524 288 tokens on 8 of 36 layers"),
    )
]
SCALE = [
    Section(f"scale-{kind}", minutes, {"kind": kind}, why, "benchmarks.scale_gpu")
    for kind, minutes, why in (
        ("qlora", 7, "4-bit weights under adapters, 8B and 2B, against TRL's GRPOTrainer"),
        ("lora", 6.5, "the same with bf16 weights under adapters"),
        ("full", 7, "the same with all weights trained"),
    )
]
TIERS = {"core": CORE, "full": CORE + STEP + SCALE + REST}
GROUPS = {
    "step": [s.name for s in STEP],
    "scale": [s.name for s in SCALE],
}  # what `--only` takes besides a section's name


# --- the plan and its parts -------------------------------------------------------------------------------------------


def print_plan(sections: list[Section], tier: str, minutes: float) -> None:
    print(f"tier {tier}: on an H200, at most {minutes:g} minutes")
    print(f"  {'tests':13} {1.5:4.1f} min  tests/gpu; nothing is timed unless they are green")
    for s in sections:
        print(f"  {s.name:13} {s.minutes:4.1f} min  {s.why}\n{'':26}python -m {s.program} {' '.join(s.argv({}))}")


def run_tests(seconds: float) -> str:
    """`green`, or what is wrong."""
    if not (ROOT / "tests" / "gpu").is_dir():
        return "there is no tests/gpu"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu"]
    try:
        code = subprocess.run(command, cwd=ROOT, timeout=seconds).returncode
    except subprocess.TimeoutExpired:
        return f"not done after {seconds:.0f} s"
    return "green" if code == 0 else "no test was collected" if code == 5 else f"red (pytest exits with {code})"


def run_section(argv: list[str], seconds: float, program: str = "benchmarks.run") -> str:
    """Run `program` until it ends by itself; `done`, or what is missing."""
    until = time.monotonic() + seconds
    command = [sys.executable, "-m", program, *argv]
    for _ in range(ATTEMPTS):
        left = until - time.monotonic()
        if left < 5:
            return "out of time"
        limit = ["--minutes", f"{max(0.0, left - LAST_GROUP) / 60:.2f}"]
        try:
            code = subprocess.run([*command, *limit], cwd=ROOT, timeout=left).returncode
        except subprocess.TimeoutExpired:
            continue  # the next attempt finds out what hung, and leaves it out
        if code == 0:
            return "done"
        if code == run.OUT_OF_TIME:
            return "out of time, some groups are left"
        if code != run.DEVICE_LOST and code > 0:
            return f"failed: {program} exits with {code}"
    return f"given up after {ATTEMPTS} attempts"


def smi() -> dict[str, str]:
    """What nvidia-smi says of the card: driver, clocks, power. Nothing is set."""
    fields = ["driver_version", "clocks.sm", "clocks.max.sm", "clocks.max.mem", "power.limit", "temperature.gpu"]
    if not shutil.which("nvidia-smi"):
        return {}
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    out = subprocess.run(command, capture_output=True, text=True).stdout.strip().splitlines()
    return dict(zip(fields, out[0].split(", "), strict=False)) if out else {}


# --- scores -----------------------------------------------------------------------------------------------------------


def scores(rows: list[Row], code: str) -> dict[str, tuple[float, int]]:
    """Scoreboard id -> (value, fewest samples), of those ids whose rows are there and were measured by `code`."""
    core = [r for r in rows if r["code"] == code and r["status"] == "timed"]
    core = [r for r in core if all(r[k] == v for k, v in CORE_CASE.items())]
    dense = {(r["mode"], r["impl"]): r for r in core if r["ratio"] == 1.0}
    masked = {(r["mode"], r["impl"]): r for r in core if r["ratio"] == 0.3 and r["layout"] == "compact"}
    out: dict[str, tuple[float, int]] = {}

    def put(name: str, value: float, used: list[Row]) -> None:
        out[f"head/{name}"] = (value, min(r["samples"] for r in used))

    floors = {"logprob": "logprob_vs_1gemm", "frozen": "frozen_vs_2gemm", "objective": "trainable_vs_3gemm"}
    for mode, name in (floors | {"teacher": "teacher_vs_4.3gemm"}).items():
        if mine := dense.get((mode, OURS)):
            put(name, mine["ratio_to_floor"], [mine])
    pairs = [(masked.get((m, OURS)), dense.get((m, OURS))) for m in OWN_MODES]
    if all(a and b for a, b in pairs):
        put("masked30_vs_dense", max(a["ms"] / b["ms"] for a, b in pairs), [r for pair in pairs for r in pair])
    for mode, name in (("objective", "speedup_trainable_vs_best_peer"), ("frozen", "speedup_frozen_vs_best_peer")):
        peers = [r for (m, impl), r in dense.items() if m == mode and not impl.startswith(OURS)]
        if peers and (mine := dense.get((mode, OURS))):
            best = min(peers, key=lambda r: r["ms"])
            put(name, best["ms"] / mine["ms"], [best, mine])
    liger, mine = dense.get(("objective", "liger_grpo")), dense.get(("objective", OURS))
    if liger and mine:
        put("speedup_vs_liger_grpo", liger["ms"] / mine["ms"], [liger, mine])
    plain, into = f"{OURS} [640 MB]", f"{OURS} [640 MB, main_grad]"
    small = [dense.get(k) for k in (("logprob", plain), ("frozen", plain), ("objective", into), ("teacher", into))]
    if all(small):
        put("workspace640_peak_mib", max(r["peak_mib"] for r in small), small)
        put("workspace640_vs_floor", max(r["ratio_to_floor"] for r in small), small)
    mine = [dense.get((mode, f"{OURS} [{mb} MB]")) for mode, mb in itertools.product(OWN_MODES, WORKSPACES)]
    peers = [r for (mode, impl), r in dense.items() if mode in OWN_MODES and not impl.startswith(OURS)]
    if all(mine) and peers:
        put("peers_dominating", len(dominating(mine, peers)), [*mine, *peers])
    return out


def dominating(mine: list[Row], peers: list[Row]) -> list[tuple[str, str]]:
    """(peer, mode) of those both faster and leaner than this library in the same mode at one of its workspaces."""
    return [
        (p["impl"], p["mode"])
        for p in peers
        if any(p["mode"] == m["mode"] and p["ms"] < m["ms"] and p["peak_mib"] < m["peak_mib"] for m in mine)
    ]


# --- the command ------------------------------------------------------------------------------------------------------


def dry_run(sections: list[Section], peers: str) -> int:
    """Every section at toy size on the CPU, in this process, into a folder that is thrown away."""
    with tempfile.TemporaryDirectory() as folder:
        file, of_step, of_scale = (Path(folder) / name for name in (FILE.name, "step.json", "scale.json"))
        print(f"== tests: {run_tests(180.0)}", flush=True)
        for s in sections:
            print(f"== {s.name}", flush=True)
            if s.of_step:
                if code := step.main(s.argv({"device": "cpu", "model": "toy", "repeats": "1", "file": str(of_step)})):
                    return code
                continue
            if s.of_scale:
                toy = {"device": "cpu", "model": "toy", "repeats": "1", "file": str(of_scale)}
                if code := scale_gpu.main(s.argv(toy)):
                    return code
                continue
            changes = {"device": "cpu", "shapes": "toy", "rows": "256", "repeats": "1", "file": str(file)}
            changes |= {"impls": "torch"} if "impls" in s.options else {}
            changes |= {} if s.options.get("peers") == "none" else {"peers": peers}
            if code := run.main(s.argv(changes)):
                return code
        rows = read(file)["rows"]
        found = scores([r | CORE_CASE for r in rows], fingerprint())
        steps = read(of_step)["rows"]
        found |= step.scores(steps, step.code())
        scaled = read(of_scale)["rows"]
        found |= scale_gpu.scores(scaled, scale_gpu.code())
        rows += steps + scaled
        print(f"{len(rows)} rows in {len(sections)} sections; ids that a GPU run records: {' '.join(found)}")
    return 0


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--tier", choices=TIERS, default="core", help="core: 8B head, 16 384 rows; full: and all the rest")
    p.add_argument(
        "--only", nargs="+", metavar="SECTION", help=f"of {' '.join(GROUPS)} {' '.join(s.name for s in TIERS['full'])}"
    )
    p.add_argument("--minutes", type=float, help="(default: 8 for core, 60 for full)")
    p.add_argument("--dry-run", action="store_true", help="print the plan, run its code on the CPU at toy size")
    p.add_argument("--peers", nargs="+", default=["all"], help="of a dry run: fewer are quicker")
    p.add_argument("--file", type=Path, default=FILE, help="(default: %(default)s)")
    p.add_argument("--step-file", type=Path, default=step.FILES["cuda"], help="(default: %(default)s)")
    p.add_argument("--scale-file", type=Path, default=scale_gpu.FILE, help="(default: %(default)s)")
    p.add_argument("--commit", help="what to record where the tree is a copy that git does not know")
    args = p.parse_args(argv)
    only = {name for given in args.only or () for name in GROUPS.get(given, [given])}
    if unknown := only - {s.name for s in TIERS["full"]}:
        p.error(f"no section {', '.join(sorted(unknown))}")
    chosen = TIERS["full" if only else args.tier]
    sections = [s for s in chosen if not only or s.name in only]
    minutes = args.minutes or {"core": 8.0, "full": 60.0}[args.tier]
    print_plan(sections, args.tier, minutes)
    if args.dry_run:
        return dry_run(sections, " ".join(args.peers))
    if not torch.cuda.is_available():
        p.error("no GPU: --dry-run shows the plan and runs its code at toy size")
    return measure(args, sections, minutes)


def measure(args: argparse.Namespace, sections: list[Section], minutes: float) -> int:
    begin = time.monotonic()
    report: dict[str, dict] = {}

    def left() -> float:
        return 60 * minutes - (time.monotonic() - begin)

    def save(name: str, outcome: str, since: float, file: Path) -> None:
        data = read(file)
        report[name] = {"outcome": outcome, "seconds": round(time.monotonic() - since, 1)}
        data.setdefault("machine", {}).update(smi())
        data["sections"] = data.get("sections", {}) | {name: report[name]}
        write_json(file, data)
        print(f"== {name}: {outcome} ({report[name]['seconds']} s)", flush=True)

    def file_of(s: Section) -> Path:
        return args.step_file if s.of_step else args.scale_file if s.of_scale else args.file

    since = time.monotonic()
    outcome = run_tests(min(180.0, left()))
    for file in dict.fromkeys(map(file_of, sections)):
        save("tests", outcome, since, file)
    if outcome != "green":
        print("nothing is timed while the GPU tests are not green")
        return 1
    for s in sections:
        since, file = time.monotonic(), file_of(s)
        if left() < 60 * s.minutes / 2:
            save(s.name, "left: no time", since, file)
            continue
        options = {"file": str(file)} | ({"commit": args.commit} if args.commit else {})
        most = min(left(), 60 * (2 * s.minutes + 0.5))  # a section that hangs leaves time for the others
        save(s.name, run_section(s.argv(options), most, s.program), since, file)
    rows, command = read(args.file)["rows"], f"python -m benchmarks.gpu --tier {args.tier}"
    for name, (value, n) in scores(rows, fingerprint()).items():
        record(name, value, n=n, command=command, at=args.commit)
    if any(s.of_step for s in sections):
        steps = step.as_meant(read(args.step_file)["rows"])
        for name, (value, n) in step.scores(steps, step.code()).items():
            record(name, value, n=n, command="python -m benchmarks.gpu --only step", at=args.commit)
    if any(s.of_scale for s in sections):
        scaled = step.as_meant(read(args.scale_file)["rows"])
        for name, (value, n) in scale_gpu.scores(scaled, scale_gpu.code()).items():
            record(name, value, n=n, command="python -m benchmarks.gpu --only scale", at=args.commit)
    missing = [name for name, r in report.items() if r["outcome"] not in ("done", "green")]
    print(f"left or failed: {', '.join(missing)}" if missing else "all sections are done")
    ours = [r for r in rows if r["impl"].startswith(OURS) and r["code"] == fingerprint() and r["status"] == "failed"]
    for r in ours:
        print(f"{run.line(r)}")
    return 1 if ours or missing else 0


if __name__ == "__main__":
    raise SystemExit(main())
