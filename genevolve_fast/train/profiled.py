"""Real steps of evolve under the meter: what `genevolve-fast profile` runs."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from genevolve_fast.files import write_text
from genevolve_fast.policy.model import Policy
from genevolve_fast.profile.flops import SHARED, GroupLengths, Passes, Pushed, gpu_named, pushed, step_flops
from genevolve_fast.profile.meter import Inline, Meter, Report, snapshot
from genevolve_fast.profile.plan import Plan, gib, plan
from genevolve_fast.profile.shapes import ModelShape
from genevolve_fast.profile.timeline import draw
from genevolve_fast.protocols import World
from genevolve_fast.train.config import EvolveConfig
from genevolve_fast.train.engines import open_engine
from genevolve_fast.train.evolve import new_memory
from genevolve_fast.train.fits import settings_of
from genevolve_fast.train.optim import build_optimizer
from genevolve_fast.train.prepare import other_weights, prepare
from genevolve_fast.train.run import RunError
from genevolve_fast.train.single import sample_step
from genevolve_fast.train.strategies import Strategy
from genevolve_fast.train.update import TrainingRollout, accumulate_gradients, forwarded
from genevolve_fast.trajectory import Request

LAYOUT = SHARED  # how update.py lays a step out


@dataclass(frozen=True)
class Profiled:
    """What was measured, and what the planner had said for the lengths that were drawn."""

    report: Report
    predicted: Plan
    device: str
    steps: int
    trained_tokens: int
    microbatch_tokens: int

    def predicted_bytes(self, phase: str) -> int | None:
        """Of a phase above an empty device, without the CUDA context, which no allocator reports."""
        held = {t.name: t.bytes for t in self.predicted.held}
        if phase in ("weights", "optimizer"):  # torch's optimizers allocate their state in their first step
            return sum(size for name, size in held.items() if name not in ("optimizer state", "EMA teacher"))
        if phase not in self.predicted.phases:
            return None
        return self.predicted.phase_bytes(phase) - self.predicted.overhead

    def as_dict(self) -> dict[str, Any]:
        r = self.report.as_dict()
        for row in r["phases"]:
            row["predicted_bytes"] = self.predicted_bytes(row["name"])
        return {
            "device": self.device,
            "torch": torch.__version__,
            "steps": self.steps,
            "trained_tokens": self.trained_tokens,
            "microbatch_tokens": self.microbatch_tokens,
            **r,
            "predicted": self.predicted.as_dict(),
        }

    def table(self) -> str:
        """Phase by phase: time, peak beside the prediction, tokens."""
        head = f"{'phase':10} {'seconds':>8} {'share':>6} {'peak':>11} {'predicted':>11} {'bytes/token':>12} "
        rows = [f"{head}{'tokens/s':>10} {'MFU':>6}"]
        for p in self.report.phases:
            said = self.predicted_bytes(p.name)
            cells = (
                f"{p.name:10} {p.seconds:8.2f} {p.share:6.1%} {gib(p.peak_bytes):>11}",
                f"{gib(said) if said is not None else '':>11}",
                f"{p.bytes_per_token:12,.0f}" if p.bytes_per_token else " " * 12,
                f"{p.tokens_per_second:10,.0f}" if p.tokens_per_second else " " * 10,
                f"{p.mfu:6.1%}" if p.mfu is not None else " " * 6,
            )
            rows.append(" ".join(cells).rstrip())
        r = self.report
        per_step = f"{self.trained_tokens / self.steps:,.0f} trained tokens a step"
        rows.append(f"{self.device}: {r.seconds:.1f} s in {self.steps} step(s), {per_step}, peak {gib(r.peak_bytes)}")
        rows.append(f"model FLOPs utilisation {r.mfu:.1%}" if r.mfu is not None else f"no MFU: {r.mfu_reason}")
        return "\n".join(rows)


def profile_steps(
    config: EvolveConfig,
    open_policy: Callable[[], Policy],
    world: World,
    pool: Sequence[Request],
    shape: ModelShape,
    device: torch.device,
    *,
    steps: int = 1,
    snapshot_file: Path | None = None,
) -> Profiled:
    """Sample, judge, learn and train for `steps` steps; nothing is saved but what the caller writes.

    On a CPU every operation is logged while a phase is open, which slows small ones down. Raises RunError where `steps`
    or a snapshot make no sense.
    """
    if steps < 1:
        raise RunError(f"steps must be at least 1, got {steps}")
    try:
        with snapshot(device, snapshot_file):
            return _measure(config, open_policy, world, pool, shape, device, steps)
    except ValueError as error:
        if snapshot_file is not None and device.type != "cuda":
            raise RunError(f"--snapshot {snapshot_file}: {error}") from error
        raise


def _measure(config, open_policy, world, pool, shape, device, steps: int) -> Profiled:
    meter = Meter(device)
    with meter.phase("weights"):
        policy = open_policy().eval()
        prepare(policy, config.policy, config.seed)
        reference, teacher = other_weights(config, policy)
    apart = {id(s): s.nbytes for s in (reference, teacher) if s is not None}
    meter.settle(_weight_bytes(policy) + sum(apart.values()))  # the loader allocates in threads of its own
    with meter.phase("optimizer"):
        optimizer = build_optimizer(policy, config.optim, steps)
    engine = open_engine(config, policy, world.incidents, executor=None if device.type == "cuda" else Inline())
    engine.update_weights(0)
    memory = new_memory(config, world)
    work, widest, longest, held = Pushed(), 0, (1, 0), 0
    for step in range(steps):
        batch, images = sample_step(config, policy, world, pool, engine, memory, step, meter.phase("rollout"))
        live = forwarded(batch, reference is not None)
        work += pushed(group_lengths(live), LAYOUT)
        longest = max(longest, *((len(r.trajectory), _prompt(r)) for r in live))
        held = max(held, meter.held)
        with meter.phase("student"):  # what lies between the pass's own phases: packing, the losses
            metrics, _ = accumulate_gradients(
                policy,
                batch,
                images,
                config.objective,
                temperature=config.rollout.temperature,
                max_tokens=config.max_tokens_per_microbatch,
                reference=reference,
                teacher=teacher,
                workspace_mb=config.head_workspace_mb,
                phase=meter.phase,
            )
        widest = max(widest, int(metrics["tokens/largest_microbatch"]))
        with meter.phase("step"):
            Strategy().norm(policy, config.optim.max_grad_norm)
            optimizer.step()
            engine.update_weights(step + 1)

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    gpu = gpu_named(name)
    settings = settings_of(
        config,
        device,
        tokens=longest[0],
        prefix=longest[1],
        mean_tokens=None,
        loss_share=1.0,
    )
    frozen_head = settings.lora > 0
    model = step_flops(shape, work, Passes(weight_gradients=not frozen_head, recompute=0, head=2 if frozen_head else 3))
    report = meter.report(
        tokens={
            "rollout": engine.sampled_tokens,
            "prefix": work.prefix.tokens,
            "student": work.student.tokens,
            "teacher": work.teacher.tokens,
            "head": work.prefix.rows + work.student.rows + work.teacher.rows,
            "backward": work.student_tokens,
        },
        flops=vars(model),
        microbatch_tokens=widest,
        above=held,
        peak_flops=gpu and gpu.flops,
    )
    return Profiled(report, plan(shape, settings), name, steps, work.student_tokens, widest)


def group_lengths(rollouts: Sequence[TrainingRollout]) -> list[GroupLengths]:
    """The lengths of a step's groups as the FLOP formulas take them."""
    groups: dict[str, list[TrainingRollout]] = defaultdict(list)
    for r in rollouts:
        groups[r.trajectory.group_id].append(r)
    found = []
    for members in groups.values():
        prefix = min(_prompt(r) for r in members)
        found.append(
            GroupLengths(
                prefix,
                tuple(len(r.trajectory) - prefix for r in members),
                tuple(len(r.experience_ids) for r in members),
                min(members[0].trajectory.request_stop, prefix),
                tuple(r.trajectory.num_loss_tokens for r in members),
            )
        )
    return found


def _weight_bytes(policy: Policy) -> int:
    storages = (t.untyped_storage() for t in (*policy.parameters(), *policy.buffers()))
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def _prompt(rollout: TrainingRollout) -> int:
    """Tokens before the first sampled one."""
    return int(np.argmax(rollout.trajectory.loss_mask))


def write_profile(folder: Path, made: Profiled, title: str) -> None:
    """profile.json and timeline.svg in `folder`, each written whole or not at all."""
    write_text(folder / "profile.json", json.dumps(made.as_dict(), indent=1))
    write_text(folder / "timeline.svg", draw(made.report, title))
