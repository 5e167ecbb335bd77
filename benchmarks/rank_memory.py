"""What each of two ranks holds in a training step, beside what `genevolve-fast plan` says: gloo on this CPU.

A random Qwen3-VL of 9 million weights trains on two groups of three rollouts, two steps, under every strategy. The
meter listens to each rank's allocator from before the model is there; a phase's peak is that of the rank with more.
The training pass only: nothing samples.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.models import TOY, Model, random_policy, rollouts_of
from benchmarks.on_ranks import on_ranks
from genevolve_fast.ops import Objective
from genevolve_fast.profile.meter import Meter
from genevolve_fast.profile.plan import Plan, Settings, gib, plan
from genevolve_fast.profile.shapes import ModelShape
from genevolve_fast.train.config import OptimConfig
from genevolve_fast.train.optim import build_optimizer
from genevolve_fast.train.ranks import Ranks
from genevolve_fast.train.strategies import open_strategy
from genevolve_fast.train.update import accumulate_gradients

COMMAND = "python -m benchmarks.rank_memory"
STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
SHAPE = ModelShape(256, 8, 8, 4, 32, 768, 4096, False, vision=replace(TOY.vision, out_hidden=256))
PROMPT, REPLIES, PATCH = 256, (256, 384, 512), 64
MAX_TOKENS, TILE, WORKSPACE_MB, WORLD = 640, 256, 16, 2
PHASES = ("prefix", "student", "teacher", "head", "backward", "step")


def settings(strategy: str, lora: int = 0, dtype: str = "float32") -> Settings:
    """The step as the planner takes it."""
    return Settings(
        tokens=PROMPT + max(REPLIES), prefix=PROMPT, prompts_per_step=WORLD, num_generations=len(REPLIES), patch=PATCH,
        max_tokens_per_microbatch=MAX_TOKENS, tile_tokens=TILE, workspace_mb=WORKSPACE_MB, loss_share=0.3, dtype=dtype,
        lora=lora, reference=False, rollout=False, device="cpu", gpus_per_node=WORLD, strategy=strategy,
    )  # fmt: skip


def step(rank: int, strategy: str, lora: int, dtype: str, folder: str) -> None:
    """Two steps of one rank; writes the peak of each phase of the second, and what is held between them."""
    s = settings(strategy, lora, dtype)
    meter, held = Meter("cpu"), open_strategy(strategy, Ranks(rank, dist.get_world_size()))
    with meter.phase("weights"):
        policy = random_policy(Model(SHAPE, getattr(torch, dtype), lora), torch.device("cpu"))
        policy.tile_tokens = s.tile_tokens
        held.shard(policy)
    with meter.phase("optimizer"):
        optimizer = build_optimizer(policy, OptimConfig(lr=1e-4), 2, held)
    rollouts = [
        r for g in range(WORLD) for r in rollouts_of(PROMPT, REPLIES, PATCH, SHAPE.vocabulary, group=str(g), turn=128)
    ]
    for _ in (False, True):
        between, begun, begin = meter.held, len(meter._segments), time.process_time()
        with meter.phase("student"):
            accumulate_gradients(
                policy, rollouts, {}, Objective(kl_coef=0), temperature=0.7, max_tokens=s.max_tokens_per_microbatch,
                workspace_mb=s.workspace_mb, phase=meter.phase, strategy=held,
            )  # fmt: skip
        with meter.phase("step"):
            held.norm(policy, 1.0)
            optimizer.step()
        seconds = time.process_time() - begin
    peaks: dict[str, int] = {}
    for segment in meter._segments[begun:]:
        peaks[segment.phase] = max(peaks.get(segment.phase, 0), segment.peak)
    Path(folder, f"rank_{rank}.json").write_text(json.dumps(dict(held=between, peaks=peaks, seconds=seconds)))


def measured(strategy: str, lora: int = 0, dtype: str = "float32") -> dict:
    """(held between steps, peak by phase, own seconds) of the rank that has more of each."""
    with tempfile.TemporaryDirectory() as folder:
        on_ranks(Path(folder), step, strategy, lora, dtype, folder, world=WORLD)
        ranks = [json.loads(file.read_text()) for file in sorted(Path(folder).glob("rank_*.json"))]
    most = {name: max(r[name] for r in ranks) for name in ("held", "seconds")}
    return most | {"peaks": {name: max(r["peaks"].get(name, 0) for r in ranks) for name in PHASES}}


def predicted(strategy: str, lora: int = 0, dtype: str = "float32") -> Plan:
    return plan(SHAPE, settings(strategy, lora, dtype))


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog=COMMAND, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", nargs="+", default=STRATEGIES, choices=STRATEGIES)
    p.add_argument("--lora", type=int, default=0, help="rank; 0: all weights (default: %(default)s)")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    args = p.parse_args(argv)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    print(f"{'predicted / measured':10} {'held':>21} " + " ".join(f"{name:>21}" for name in PHASES))
    for strategy in args.only:
        found, made = measured(strategy, args.lora, args.dtype), predicted(strategy, args.lora, args.dtype)
        pairs = [(sum(t.bytes for t in made.held), found["held"])]
        pairs += [(made.phase_bytes(name), found["peaks"][name]) for name in PHASES]
        print(f"{strategy:10} " + " ".join(f"{gib(a):>9} / {gib(b):>9}" for a, b in pairs), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
