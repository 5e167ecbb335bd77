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

import torch
import torch.distributed as dist

from benchmarks.on_ranks import on_ranks
from genevolve_fast.batch.groups import TrainingRollout
from genevolve_fast.evaluate.scoreboard import record
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


def tiny(lora: bool, tied: bool = False) -> Policy:
    """The same weights in every process; an adapter's B is not zero, or half of its gradients were."""
    policy = text_policy("Qwen3", tie_word_embeddings=tied)
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
        optimizer = build_optimizer(policy, OptimConfig(lr=1e-3, max_grad_norm=1.0), STEPS, strategy)
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


def _on_rank(rank: int, name: str, make: dict, options: dict, folder: str) -> None:
    policy = tiny(**make)
    ours = train(policy, open_strategy(name, Ranks(rank, dist.get_world_size())), **options)
    if rank == 0:
        torch.save(ours, Path(folder) / "distributed.pt")


def distributed(name: str, make: dict, world: int = 2, **options) -> list[tuple[float, dict]]:
    """What `train` returns on the first of `world` ranks."""
    with tempfile.TemporaryDirectory() as folder:
        on_ranks(Path(folder), _on_rank, name, make, options, folder, world=world)
        return torch.load(Path(folder) / "distributed.pt", weights_only=True)


def difference(ours: list[tuple[float, dict]], theirs: list[tuple[float, dict]]) -> float:
    """Largest difference of a loss or a weight after any step."""
    worst = 0.0
    for (loss, weights), (other_loss, others) in zip(ours, theirs, strict=True):
        assert weights.keys() == others.keys()
        worst = max(worst, abs(loss - other_loss), *(float((w - others[n]).abs().max()) for n, w in weights.items()))
    return worst


def error(name: str, *, lora: bool, tied: bool = False, **options) -> float:
    """Two ranks under `name` against one process."""
    make = dict(lora=lora, tied=tied)
    alone = train(tiny(**make), Strategy(), **options)
    moved = max(float((alone[-1][1][n] - w).abs().max()) for n, w in alone[0][1].items())
    assert moved > 1e-4, "the weights hardly moved: nothing was compared"
    return difference(alone, distributed(name, make, **options))


def resume_error(before: str, after: str, world: int, *, lora: bool, teacher: str = "ema") -> float:
    """Three AdamW steps of two ranks under `before`, two more from their checkpoint by `world` ranks under `after`,
    against the same two steps of the two ranks. Loss, weights, moments and average go on as they were."""
    make, options = dict(lora=lora), dict(teacher=teacher, adamw=True)
    with tempfile.TemporaryDirectory() as folder:
        whole = distributed(before, make, **options)
        first = distributed(before, make, steps=range(3), save=Path(folder), **options)
        assert difference(first, whole[:3]) == 0
        later = dict(steps=range(3, STEPS), resume=Path(folder) / "step_000003", **options)
        rest = train(tiny(**make), Strategy(), **later) if world == 1 else distributed(after, make, world, **later)
    return difference(rest, whole[3:])


RESUMES = (  # (ranks under, resumed under, ranks)
    ("fsdp2", "alone", 1),
    ("fsdp2", "fsdp2", 3),
    ("zero2", "alone", 1),
    ("zero3", "zero3", 3),
    ("zero1", "fsdp2", 3),
    ("ddp", "fsdp2", 2),
)


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--only", nargs="*", default=STRATEGIES, choices=STRATEGIES)
    p.add_argument("--resume", action=argparse.BooleanOptionalAction, default=True, help="also on other world sizes")
    p.add_argument("--record", action="store_true", help="write the errors to the scoreboard")
    args = p.parse_args(argv)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    command, cases = "python -m benchmarks.parity --record", [(lora, t) for lora in (False, True) for t in TEACHERS]
    for name in args.only:
        worst = max(error(name, lora=lora, teacher=teacher) for lora, teacher in cases)
        adamw = error(name, lora=False, adamw=True)
        print(f"{name}: {worst:.1e} after {STEPS} SGD steps (AdamW, all weights: {adamw:.1e})", flush=True)
        if args.record and name != "zero1":
            record(f"scale/parity_error_{name}", worst, n=len(cases), command=command)
    if args.resume:
        errors = []
        for before, after, world in RESUMES:
            for lora in (False, True):
                errors.append(resume_error(before, after, world, lora=lora))
                told = f"{before} on 2 ranks, resumed under {after} on {world}, {'LoRA' if lora else 'all weights'}"
                print(f"{told}: {errors[-1]:.1e}", flush=True)
        if args.record:
            record("scale/resume_other_world_size_error", max(errors), n=len(errors), command=command)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
