"""What each of two ranks holds in a training step, beside what `genevolve-fast plan` says: gloo on this CPU.

A random Qwen3-VL of 8 million weights trains on two groups of three rollouts, two steps, under every strategy. What is
held between them are the tensors that exist; a phase's peak above that is of the resident set, in the second step, of
the rank with more. The training pass only: nothing samples.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.models import TOY, Model, random_policy, rollouts_of
from benchmarks.on_ranks import on_ranks
from genevolve_fast.ops import Objective
from genevolve_fast.profile.meter import CLEAR, PeakBytes, resident
from genevolve_fast.profile.plan import Plan, Settings, plan
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


class Resident:
    """Peaks of a step's phases by the resident set, which also sees what gloo's threads free; nested: the innermost.

    Bytes are above what was resident when this was made, and `held` besides.
    """

    def __init__(self, held: int) -> None:
        self.peaks: dict[str, int] = {}
        self._open: list[str] = []
        self._held = held
        PeakBytes("cpu")  # freed pages go back
        self._base = resident("VmRSS")

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._border()
        self._open.append(name)
        try:
            yield
        finally:
            self._border()
            self._open.pop()

    def _border(self) -> None:
        if self._open:
            peak = resident("VmHWM") - self._base + self._held
            self.peaks[self._open[-1]] = max(self.peaks.get(self._open[-1], 0), peak)
        CLEAR.write_text("5")


def live_bytes() -> int:
    """Of all tensors that Python reaches, each storage once."""
    gc.collect()
    found: dict[int, int] = {}
    for x in gc.get_objects():
        if issubclass(type(x), torch.Tensor):
            storage = getattr(x, "_local_tensor", x).untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def step(rank: int, strategy: str, lora: int, dtype: str, folder: str) -> None:
    """Two steps of one rank; writes the peak of each phase of the second, and what is held between them."""
    s = settings(strategy, lora, dtype)
    before, held = live_bytes(), open_strategy(strategy, Ranks(rank, dist.get_world_size()))
    policy = random_policy(Model(SHAPE, getattr(torch, dtype), lora), torch.device("cpu"))
    policy.tile_tokens = s.tile_tokens
    held.shard(policy)
    optimizer = build_optimizer(policy, OptimConfig(lr=1e-4), 2, held)
    rollouts = [
        r for g in range(WORLD) for r in rollouts_of(PROMPT, REPLIES, PATCH, SHAPE.vocabulary, group=str(g), turn=128)
    ]
    for _ in range(2):  # the first one makes the optimizer's state, and warms up
        between = live_bytes() - before
        memory, begin = Resident(between), time.process_time()
        with memory.phase("step"):  # what lies between the pass's own phases: packing, DDP's sum
            accumulate_gradients(
                policy, rollouts, {}, Objective(kl_coef=0), temperature=0.7, max_tokens=s.max_tokens_per_microbatch,
                workspace_mb=s.workspace_mb, phase=memory.phase, strategy=held,
            )  # fmt: skip
        with memory.phase("step"):
            held.norm(policy, 1.0)
            optimizer.step()
        seconds = time.process_time() - begin
    made = dict(held=between, peaks=memory.peaks, seconds=seconds)
    Path(folder, f"rank_{rank}.json").write_text(json.dumps(made))


def measured(strategy: str, lora: int = 0, dtype: str = "float32") -> dict:
    """(held between steps, peak by phase, own seconds) of the rank that has more of each."""
    os.environ |= {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed goes back at once
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
    print(f"predicted / measured, MiB\n\n| strategy | between steps | {' | '.join(PHASES)} |")
    print("|" + "---|" * (2 + len(PHASES)), flush=True)
    for strategy in args.only:
        found, made = measured(strategy, args.lora, args.dtype), predicted(strategy, args.lora, args.dtype)
        pairs = [(sum(t.bytes for t in made.held), found["held"])]
        pairs += [(made.phase_bytes(name), found["peaks"][name]) for name in PHASES]
        cells = " | ".join(f"{a / 2**20:.0f} / {b / 2**20:.0f}" for a, b in pairs)
        print(f"| `{strategy}` | {cells} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
