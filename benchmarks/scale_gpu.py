"""Tokens a second, MFU and peak of a whole training step against TRL's GRPOTrainer: QLoRA, LoRA and full weights.

Both train the same model with random weights on the same six rollouts of one request, in the same process and in turns:
gradients of TRL's loss without a teacher, clipping, and the same fused AdamW. TRL runs with what its GRPOTrainer has:
bf16, gradient checkpointing, its head in chunks, liger-kernel's layers, and the batch that gives it most tokens a
second. It packs no GRPO batches, so shorter rollouts are padded; it trains adapters over 4-bit weights in bf16, where
this library keeps them in fp32. Before anything is timed the two gradients are compared. A case leaves a row for each
contender; rows of the same code are kept.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.models import MODELS, Model, random_policy, ready_gradients, shape_of, uneven_replies
from benchmarks.run import DEVICE_LOST, OUT_OF_TIME
from benchmarks.step import MEASURED, as_meant, measured, versions
from benchmarks.step_cases import (
    OBJECTIVE,
    TEMPERATURE,
    TRL_BATCHES,
    Bench,
    gradients,
    group_lengths,
    short_rollouts,
    verdict,
)
from benchmarks.store import Results, Row, device_name, fingerprint, freeze_imports
from genevolve_fast.batch.groups import TrainingRollout
from genevolve_fast.evaluate.scoreboard import record
from genevolve_fast.policy.model import Policy
from genevolve_fast.profile.flops import SHARED, Layout, Passes, gpu_named, pushed, step_flops

COMMAND = "python -m benchmarks.scale_gpu"
FILE = Path("benchmarks/results/gpu_scale.json")
GROUP = ("mode", "case", "model", "device", "torch")
KINDS = ("qlora", "lora", "full")
RANK, REPLY = 64, 4096  # of the adapters; mean tokens of a reply
MINUTES = {"2b": 2.0, "8b": 4.5}  # of a case on an H200: an estimate
GIB = 2**30


@dataclass(frozen=True)
class Case:
    kind: str
    model: str

    @property
    def name(self) -> str:
        return f"{self.model} {self.kind}"


CASES = tuple(Case(kind, model) for model, kind in itertools.product(("8b", "2b"), KINDS))


def code() -> str:
    return fingerprint((*MEASURED, "benchmarks/scale_gpu.py"))


# --- what takes turns -------------------------------------------------------------------------------------------------


def policy_of(bench: Bench, case: Case) -> tuple[Policy, Model]:
    """Random weights of the case's model, frozen, quantized or neither; the same ones every time."""
    model = replace(bench.model(case.model), lora=0 if case.kind == "full" else 4 if bench.toy else RANK)
    if case.kind != "qlora":
        return random_policy(model, bench.device), model
    from genevolve_fast.policy.adapters import add_lora
    from genevolve_fast.policy.quantize import quantize

    policy = random_policy(model, bench.device, lora=0)
    quantize(policy)
    torch.manual_seed(0)
    add_lora(policy, rank=model.lora)
    policy.to(bench.device)
    for name, p in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.01)
    return policy, model


def stepped(policy: Policy, gradients: Callable[[], object]) -> Callable[[], None]:
    """`gradients`, then clipping and AdamW: a step. Its state is there before the first."""
    learning = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-6, fused=True)

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    ready_gradients(policy)
    update()

    def step() -> None:
        gradients()
        update()

    return step


def held_bytes(policy: Policy) -> int:
    """Of weights and AdamW's two moments."""
    every = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
             for t in (*policy.parameters(), *policy.buffers())}  # fmt: skip
    return sum(every.values()) + 2 * sum(p.nbytes for p in policy.parameters() if p.requires_grad)


def measure(bench: Bench, case: Case, apart: bool | None = None) -> dict[str, Row]:
    """A row of ours, and one of each of TRL's batches; ratios are of TRL's seconds over ours.

    apart: one model after the other instead of in turns; none: where the device cannot hold both.
    """
    from benchmarks.trl_step import TrlStep, Unavailable

    bench.forget()
    ours, model = policy_of(bench, case)
    shape = shape_of(ours)
    rollouts = bench.rollouts(uneven_replies(REPLY), shape.vocabulary, teacher=False)
    short = [replace(r, experience_ids=()) for r in short_rollouts(bench, shape.vocabulary)]
    ready_gradients(ours)
    bench.shared(ours, short)()
    want = [g.to("cpu", copy=True) for g in gradients(ours)]
    rows: dict[str, Row] = {}
    mine = {"shared": stepped(ours, bench.shared(ours, rollouts))}
    rows["shared"] = weighed(bench, mine["shared"], ours)
    if apart is None:
        apart = not fits_twice(bench.device, ours)
    if apart:
        bench.time(rows, mine)
        mine = {}
        del ours
        bench.release()
    theirs, _ = policy_of(bench, case)
    try:
        trl = TrlStep(theirs, OBJECTIVE, TEMPERATURE)
    except Unavailable as e:
        return {"trl": dict(status="absent", reason=str(e))}
    ready_gradients(theirs)
    trl.run(short, len(short))
    narrowest = min((model.dtype, *(p.dtype for p in theirs.parameters() if p.requires_grad)), key=lambda d: d.itemsize)
    agrees = verdict(relative_distance(gradients(theirs), want), narrowest)
    del want
    said = dict(liger=trl.liger, why_no_liger=trl.why_no_liger, apart=apart)
    runs = {f"trl [batch {n}]": stepped(theirs, lambda n=n: trl.run(rollouts, n)) for n in (*TRL_BATCHES, 1)}
    for (impl, run), batch in zip(runs.items(), (*TRL_BATCHES, 1), strict=True):
        rows[impl] = weighed(bench, run, theirs) | said | dict(batch=batch)
        rows[impl] |= agrees if rows[impl]["status"] == "timed" else {}
    bench.time(rows, mine | runs)
    for row in rows.values():
        row |= figures(row, rollouts, case, model, bench)
    return rows


def weighed(bench: Bench, run: Callable[[], object], policy: Policy) -> Row:
    """One step's peak above an empty device, and its seconds."""
    row = bench.weigh(run)
    return row | (dict(total_bytes=row["peak_bytes"] + held_bytes(policy)) if row["status"] == "timed" else {})


def fits_twice(device: torch.device, policy: Policy) -> bool:
    """Whether a second model with its gradients and moments has room beside the first one's, and both their steps."""
    if device.type != "cuda":
        return True
    trained = sum(p.nbytes for p in policy.parameters() if p.requires_grad)
    return 2 * (held_bytes(policy) + trained) < 0.7 * torch.cuda.mem_get_info(device)[1]


def relative_distance(have: Sequence[torch.Tensor], want: Sequence[torch.Tensor]) -> float:
    off = sum(float((a.float() - b.to(a.device).float()).square().sum()) for a, b in zip(have, want, strict=True))
    return (off / sum(float(b.float().square().sum()) for b in want)) ** 0.5


def figures(row: Row, rollouts: Sequence[TrainingRollout], case: Case, model: Model, bench: Bench) -> Row:
    """Tokens a second, and MFU by the work that the contender lays out, recomputation not counted."""
    real = sum(len(r.trajectory) for r in rollouts)
    if row["status"] != "timed":
        return dict(real_tokens=real)
    layout = SHARED
    if batch := row.get("batch"):
        layout = Layout(pad_to=None if batch == 1 else max(group_lengths(rollouts)[0].replies), head="reply")
    frozen = case.kind != "full"
    passes = Passes(weight_gradients=0 if frozen else 1, recompute=0, head=2 if frozen else 3)
    flops = step_flops(model.shape, pushed(group_lengths(rollouts), layout), passes).total
    peak = gpu_named(device_name(bench.device)) if bench.device.type == "cuda" else None
    return dict(
        real_tokens=real, tokens_per_second=real / row["seconds"], model_flops=flops,
        mfu=flops / row["seconds"] / peak.flops if peak else None,
    )  # fmt: skip


# --- scores and telling -----------------------------------------------------------------------------------------------


def scores(rows: Sequence[Row], code: str) -> dict[str, tuple[float, int]]:
    """Scoreboard id -> (value, samples): tokens a second over TRL's best batch, the smaller of 2B and 8B."""
    timed = [r for r in rows if r["code"] == code and r["status"] == "timed" and "seconds" in r]
    out = {}
    for kind in KINDS:
        found = []
        for model in MINUTES:
            mine = next((r for r in timed if r["case"] == f"{model} {kind}" and r["impl"] == "shared"), None)
            peers = [r for r in timed if r["case"] == f"{model} {kind}" and r["impl"].startswith("trl")]
            if mine and peers:
                best = max(peers, key=lambda r: r["tokens_per_second"])
                found.append((mine["tokens_per_second"] / best["tokens_per_second"], best["samples"]))
        if found:
            out[f"scale/tokens_per_s_vs_trl_{kind}"] = min(found)
    return out


def line(row: Row) -> str:
    head = f"{row['case']:9} {row['impl']:14}"
    if row["status"] != "timed":
        return f"{head} {row['status']}: {row['reason']}"
    mfu = f"MFU {row['mfu']:.1%}" if row.get("mfu") is not None else "no MFU: no peak FLOP/s known"
    return (
        f"{head} {row['seconds']:.3g} s  {row['tokens_per_second']:,.0f} tokens/s  {mfu}  "
        f"peak {row['total_bytes'] / GIB:.3f} GiB" + (f"  × {row['ratio']:.2f}" if "ratio" in row else "")
    )


# --- the command ------------------------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> int:
    """Measure what is missing; the exit code."""
    where, toy = torch.device(args.device), args.model == "toy"
    results = Results(args.file, where, fresh=args.fresh, at=args.commit, group=GROUP, code=code())
    until = None if args.minutes is None else time.monotonic() + 60 * args.minutes
    bench, versioned, left = Bench(where, args.repeats, toy=toy), versions(), []
    freeze_imports()
    for case in CASES:
        if case.kind not in args.kind or args.model not in (None, "toy", case.model):
            continue
        model = "toy" if toy else case.model
        group = dict(mode="scale", case=case.name, model=model, device=device_name(where), torch=torch.__version__)
        known = [r for r in results.rows if r["code"] == results.code and all(r[k] == group[k] for k in GROUP)]
        if known:
            print("\n".join(f"kept: {line(r)}" for r in known), flush=True)
            continue
        if until is not None and time.monotonic() + 60 * MINUTES[case.model] > until:
            left.append(case.name)
            continue
        more = dict(stands_for=case.model, command=f"{COMMAND} --kind {case.kind}", versions=versioned)
        if not measured(results, bench, group, more, lambda: measure(bench, case), line, args.debug):  # noqa: B023
            return DEVICE_LOST
    rows = results.rows if args.dry_run else as_meant(results.rows)
    for name, (value, n) in scores(rows, results.code).items():
        if args.record:
            record(name, value, n=n, command=COMMAND, at=args.commit)
        else:
            print(f"{name} = {value:g} (n {n})")
    if left:
        print(f"out of time, left: {'; '.join(left)}")
    return OUT_OF_TIME if left else 0


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        prog=COMMAND, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )  # fmt: skip
    cuda = torch.cuda.is_available()
    p.add_argument("--kind", nargs="+", choices=KINDS, default=list(KINDS), help="(default: all)")
    p.add_argument("--model", choices=MODELS, help="only this model's cases; toy: all of them at toy size")
    p.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
    p.add_argument("--repeats", type=int, default=3, help="steps of each contender, in turns (default: %(default)s)")
    p.add_argument("--minutes", type=float, help="begin no case that would end after this; exit code 75: some are left")
    p.add_argument("--file", type=Path, default=FILE, help="(default: %(default)s)")
    p.add_argument("--fresh", action="store_true", help="forget recorded rows; else those of the same code are kept")
    p.add_argument("--record", action="store_true", help="write the scores on the scoreboard")
    p.add_argument("--commit", help="what to record where the tree is a copy that git does not know")
    p.add_argument("--debug", action="store_true", help="let a failing case raise")
    p.add_argument("--dry-run", action="store_true", help="every case at toy size on the CPU; nothing is kept")
    args = p.parse_args(argv)
    if args.dry_run:
        with tempfile.TemporaryDirectory() as folder:
            args.file, args.device, args.model, args.record = Path(folder) / "scale.json", "cpu", "toy", False
            args.repeats = 1
            return run(args)
    if args.device == "cpu" and args.model != "toy":
        p.error("real sizes need a GPU: --dry-run runs every case here at toy size")
    try:
        return run(args)
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
