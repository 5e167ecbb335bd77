"""Two ranks against one process: loss and weights after five SGD steps, for every way to distribute.

`python -m benchmarks.parity` runs DDP, ZeRO-1, ZeRO-2, ZeRO-3 and FSDP2 in two gloo processes on this CPU, all weights
and LoRA, over the same rollouts: uneven token counts, streamed micro-batches, and a step that leaves a rank without
work. The error is the largest difference of a weight, and of a loss, after any of the steps, in float32.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from benchmarks.on_ranks import on_ranks
from genevolve_fast.batch.groups import TrainingRollout
from genevolve_fast.evaluate.scoreboard import TARGETS, record
from genevolve_fast.ops import Objective
from genevolve_fast.policy.adapters import add_lora
from genevolve_fast.policy.model import Policy
from genevolve_fast.policy.weights import Average, Snapshot
from genevolve_fast.train.checkpoint import load_checkpoint, save_checkpoint
from genevolve_fast.train.config import OptimConfig
from genevolve_fast.train.optim import Optimizer, build_optimizer
from genevolve_fast.train.ranks import Ranks
from genevolve_fast.train.strategies import Strategy, open_strategy
from genevolve_fast.train.update import accumulate_gradients
from tests.grouped import mixed_batch, text_policy

STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
TEACHERS = ("live", "ema")
STEPS = 5
OBJECTIVE = Objective(kl_coef=1e-2, sdl_permille=300)
TEMPERATURE = 0.7


def tiny(lora: bool = False, tied: bool = False, dtype: str = "float32") -> Policy:
    """The same weights in every process; an adapter's B is not zero, or half of its gradients were."""
    policy = text_policy("Qwen3", tie_word_embeddings=tied).to(getattr(torch, dtype))
    policy.gradient_checkpointing = True
    if lora:
        add_lora(policy, rank=4, seed=0)
        for name, p in policy.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.05, generator=torch.Generator().manual_seed(p.numel()))
    return policy


def batches(policy: Policy) -> list[tuple[list[TrainingRollout], int]]:
    """(rollouts, max_tokens) of five steps: uneven groups, streamed replies, one group alone."""
    rollouts, _ = mixed_batch(policy.codec, [])
    alone = [r for r in rollouts if r.trajectory.group_id == rollouts[0].trajectory.group_id]
    return [(rollouts, 10**6), (rollouts, 40), (alone, 40), (rollouts[3:], 60), (rollouts, 90)]


def train(
    policy: Policy,
    strategy: Strategy,
    *,
    teacher: str = "live",
    adamw: bool = False,
    steps: range = range(STEPS),
    resume: Path | None = None,
    save: Path | None = None,
) -> list[tuple[float, dict]]:
    """(loss, whole trained weights) after each of `steps`; from a checkpoint, into a checkpoint.

    SGD, or the product's AdamW.
    """
    strategy.shard(policy)
    names = {n for n, p in policy.model.named_parameters() if p.requires_grad}
    if adamw:
        narrow = policy.head_weight.dtype == torch.bfloat16
        config = OptimConfig(lr=1e-3, max_grad_norm=1.0, bf16="master" if narrow else "nearest")
        optimizer = build_optimizer(policy, config, STEPS, strategy)
    else:
        parts = [torch.optim.SGD([p for p in policy.model.parameters() if p.requires_grad], lr=0.1)]
        strategy.prepare(policy, parts)
        optimizer = Optimizer(parts, lambda _: 1.0, strategy)
    reference = Snapshot(policy)
    average = Average(policy, 0.3) if teacher == "ema" else None
    if resume is not None:
        assert load_checkpoint(resume, policy, optimizer, strategy, average) == steps.start
    out = []
    for step in steps:
        rollouts, max_tokens = batches(policy)[step]
        metrics, _ = accumulate_gradients(
            policy, rollouts, {}, OBJECTIVE, temperature=TEMPERATURE, max_tokens=max_tokens, reference=reference,
            teacher=average, strategy=strategy,
        )  # fmt: skip
        strategy.norm(policy, 1.0)
        optimizer.step()
        if average:
            average.update()
        with strategy.whole(policy):
            whole = {n: p.detach().cpu().clone() for n, p in policy.model.named_parameters() if n in names}
        out.append((metrics["loss"], whole))
    if save is not None:
        save_checkpoint(save, steps.stop, policy, optimizer, strategy=strategy, average=average)
    return out


Job = tuple[str, dict, dict]  # strategy, what `tiny` makes, how `train` trains it


def _on_rank(rank: int, jobs: Sequence[Job], folder: str) -> None:
    ranks = Ranks(rank, dist.get_world_size())
    for i, (name, make, options) in enumerate(jobs):
        ours = train(tiny(**make), open_strategy(name, ranks), **options)
        if rank == 0:
            torch.save(ours, Path(folder) / f"{i}.pt")


def distributed(jobs: Sequence[Job], world: int = 2) -> list[list[tuple[float, dict]]]:
    """What `train` returns on the first of `world` ranks, which do one job after another."""
    with tempfile.TemporaryDirectory() as folder:
        on_ranks(Path(folder), _on_rank, jobs, folder, world=world, seconds=60 + 30 * len(jobs))
        return [torch.load(Path(folder) / f"{i}.pt", weights_only=True) for i in range(len(jobs))]


def difference(ours: list[tuple[float, dict]], theirs: list[tuple[float, dict]]) -> float:
    """Largest difference of a loss or a weight after any step."""
    worst = 0.0
    for (loss, weights), (other_loss, others) in zip(ours, theirs, strict=True):
        assert weights.keys() == others.keys()
        worst = max(worst, abs(loss - other_loss), *(float((w - others[n]).abs().max()) for n, w in weights.items()))
    return worst


def errors(jobs: Sequence[Job], world: int = 2) -> list[float]:
    """`world` ranks against one process, each job."""
    alone: dict[str, list] = {}
    for _, make, options in jobs:
        if (case := repr((make, options))) not in alone:
            run = alone[case] = train(tiny(**make), Strategy(), **options)
            moved = max(float((run[-1][1][n] - w).abs().max()) for n, w in run[0][1].items())
            assert moved > 1e-4, "the weights hardly moved: nothing was compared"
    whole = [alone[repr((make, options))] for _, make, options in jobs]
    return [difference(*pair) for pair in zip(whole, distributed(jobs, world), strict=True)]


class Change(NamedTuple):
    """A run of two ranks under `before` that `world` ranks go on with under `after`; one process shares nothing."""

    before: str
    after: str
    world: int
    lora: bool = False


def resume_errors(changes: Sequence[Change], teacher: str = "ema") -> list[float]:
    """Three AdamW steps of two ranks, two more from their checkpoint by others, against the same two steps of the two
    ranks. Loss, weights, moments and average go on as they were."""
    options = dict(teacher=teacher, adamw=True)
    starts = list(dict.fromkeys((c.before, c.lora) for c in changes))
    with tempfile.TemporaryDirectory() as folder:
        kept = {start: Path(folder) / f"{start[0]}_{start[1]}" for start in starts}
        jobs: list[Job] = [(name, dict(lora=lora), options) for name, lora in starts]
        saving = [(n, m, o | dict(steps=range(3), save=kept[s])) for s, (n, m, o) in zip(starts, jobs, strict=True)]
        done = distributed([*jobs, *saving])
        whole, cut = dict(zip(starts, done, strict=False)), dict(zip(starts, done[len(starts) :], strict=True))
        assert all(difference(cut[s], whole[s][:3]) == 0 for s in starts)
        rest: dict[Change, list] = {}
        for world in {c.world for c in changes}:
            mine = [c for c in changes if c.world == world]
            later = [options | dict(steps=range(3, STEPS), resume=kept[c.before, c.lora] / "step_000003") for c in mine]
            if world == 1:
                ran = [train(tiny(c.lora), Strategy(), **o) for c, o in zip(mine, later, strict=True)]
            else:
                ran = distributed([(c.after, dict(lora=c.lora), o) for c, o in zip(mine, later, strict=True)], world)
            rest |= zip(mine, ran, strict=True)
    return [difference(rest[c], whole[c.before, c.lora][3:]) for c in changes]


RESUMES = [
    Change(*change, lora)
    for change in (
        ("fsdp2", "ddp", 1),
        ("fsdp2", "fsdp2", 3),
        ("zero2", "ddp", 1),
        ("zero3", "zero3", 3),
        ("zero1", "fsdp2", 3),
        ("ddp", "fsdp2", 2),
    )
    for lora in (False, True)
]


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--only", nargs="*", default=STRATEGIES, choices=STRATEGIES)
    p.add_argument("--resume", action=argparse.BooleanOptionalAction, default=True, help="also on other world sizes")
    p.add_argument("--record", action="store_true", help="write the errors to the scoreboard")
    args = p.parse_args(argv)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    command = "python -m benchmarks.parity --record"
    cases = [(dict(lora=lora), dict(teacher=teacher)) for lora in (False, True) for teacher in ("live", "ema")]
    cases.append(({}, dict(adamw=True)))
    found = errors([(name, *case) for name in args.only for case in cases])
    for i, name in enumerate(args.only):
        *sgd, adamw = found[i * len(cases) :][: len(cases)]
        print(f"{name}: {max(sgd):.1e} after {STEPS} SGD steps (AdamW, all weights: {adamw:.1e})", flush=True)
        if args.record and f"scale/parity_error_{name}" in TARGETS:
            record(f"scale/parity_error_{name}", max(sgd), n=len(sgd), command=command)
    if not args.resume:
        return 0
    resumed = resume_errors(RESUMES)
    for c, worst in zip(RESUMES, resumed, strict=True):
        under = f"under {c.after} on {c.world}" if c.world > 1 else "by one process"
        print(f"{c.before} on 2 ranks, resumed {under}, {'LoRA' if c.lora else 'all weights'}: {worst:.1e}")
    if args.record:
        record("scale/resume_other_world_size_error", max(resumed), n=len(resumed), command=command)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
