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

from benchmarks.on_ranks import on_ranks
from genevolve_fast.batch.groups import TrainingRollout
from genevolve_fast.ops import Objective
from genevolve_fast.policy.adapters import add_lora
from genevolve_fast.policy.model import Policy
from genevolve_fast.policy.weights import Average, Snapshot
from genevolve_fast.train.ranks import Ranks
from genevolve_fast.train.strategies import Strategy, open_strategy
from genevolve_fast.train.update import accumulate_gradients
from tests.grouped import mixed_batch, text_policy

STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
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


def train(policy: Policy, strategy: Strategy, *, teacher: str, adamw: bool = False) -> list[tuple[float, dict]]:
    """(loss, whole trained weights) after each of five steps."""
    strategy.shard(policy)
    names = {n for n, p in policy.model.named_parameters() if p.requires_grad}
    trained = [p for p in policy.model.parameters() if p.requires_grad]
    kind = torch.optim.AdamW if adamw else torch.optim.SGD
    parts = [kind(trained, lr=1e-3 if adamw else 0.1)]
    strategy.prepare(policy, parts)
    reference = Snapshot(policy)
    average = Average(policy, 0.3) if teacher == "ema" else None
    out = []
    for rollouts, max_tokens in batches(policy):
        metrics, _ = accumulate_gradients(
            policy, rollouts, {}, OBJECTIVE, temperature=TEMPERATURE, max_tokens=max_tokens, reference=reference,
            teacher=average, strategy=strategy,
        )  # fmt: skip
        strategy.norm(policy, 1.0)
        strategy.step(parts)
        if average:
            average.update()
        with strategy.whole(policy):
            whole = {n: p.detach().cpu().clone() for n, p in policy.model.named_parameters() if n in names}
        out.append((metrics["loss"], whole))
    return out


def _on_rank(rank: int, name: str, lora: bool, teacher: str, tied: bool, adamw: bool, folder: str) -> None:
    policy = tiny(lora, tied)
    ours = train(policy, open_strategy(name, Ranks(rank, 2)), teacher=teacher, adamw=adamw)
    if rank == 0:
        torch.save(ours, Path(folder) / "distributed.pt")


def error(name: str, *, lora: bool, teacher: str = "live", tied: bool = False, adamw: bool = False) -> float:
    """Largest difference of a loss or a weight after any step between two ranks under `name` and one process."""
    alone = train(tiny(lora, tied), Strategy(), teacher=teacher, adamw=adamw)
    with tempfile.TemporaryDirectory() as folder:
        on_ranks(Path(folder), _on_rank, name, lora, teacher, tied, adamw, folder)
        ours = torch.load(Path(folder) / "distributed.pt", weights_only=True)
    worst = 0.0
    for (loss, weights), (their_loss, theirs) in zip(alone, ours, strict=True):
        assert weights.keys() == theirs.keys()
        worst = max(worst, abs(loss - their_loss), *(float((w - theirs[n]).abs().max()) for n, w in weights.items()))
    moved = max(float((alone[-1][1][n] - w).abs().max()) for n, w in alone[0][1].items())
    assert moved > 1e-3, "the weights hardly moved: nothing was compared"
    return worst


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--only", nargs="*", default=STRATEGIES, choices=STRATEGIES)
    p.add_argument("--record", action="store_true", help="write the errors to the scoreboard")
    args = p.parse_args(argv)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for name in args.only:
        worst = max(
            error(name, lora=lora, teacher=teacher) for lora in (False, True) for teacher in ("live", "ema")
        )  # fmt: skip
        adamw = error(name, lora=False, adamw=True)
        print(f"{name}: {worst:.2e} after {STEPS} SGD steps (AdamW, full: {adamw:.2e})", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
