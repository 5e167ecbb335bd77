"""Optimizers and their learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from genevolve_fast.policy.model import Policy
from genevolve_fast.train.config import OptimConfig


class Optimizer:
    """One or two torch optimizers that step, and are scheduled, saved and restored, together."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer], factor) -> None:
        self._parts = parts
        self._factor = factor
        self._schedules = [torch.optim.lr_scheduler.LambdaLR(part, factor) for part in parts]

    def step(self) -> None:
        """Update the weights, advance the schedule and drop the gradients."""
        for part, schedule in zip(self._parts, self._schedules, strict=True):
            part.step()
            schedule.step()
            part.zero_grad(set_to_none=True)

    @property
    def lr(self) -> float:
        """Learning rate of the next step."""
        return self._schedules[0].get_last_lr()[0]

    def state_dict(self) -> dict[str, Any]:
        return {
            "parts": [part.state_dict() for part in self._parts],
            "schedules": [schedule.state_dict() for schedule in self._schedules],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for part, saved in zip(self._parts, state["parts"], strict=True):
            part.load_state_dict(saved)
        for part, schedule, saved in zip(self._parts, self._schedules, state["schedules"], strict=True):
            schedule.load_state_dict(saved)
            for group, base in zip(part.param_groups, schedule.base_lrs, strict=True):
                group["lr"] = base * self._factor(schedule.last_epoch)  # the schedule decides, not the saved number


def build_optimizer(policy: Policy, config: OptimConfig, total_steps: int) -> Optimizer:
    """AdamW (no decay on vectors), or Muon for the layers' matrices with AdamW for the rest; warm-up, then schedule.

    With release_gradients every layer has an AdamW of its own, which its visit's backward steps.
    """
    named = [(n, p) for n, p in policy.named_parameters() if p.requires_grad]
    matrices = [p for n, p in named if config.name == "muon" and p.ndim == 2 and ".layers." in n]
    taken = {id(p) for p in matrices}

    def adamw(params) -> torch.optim.Optimizer:
        mine = [p for p in params if p.requires_grad and id(p) not in taken]
        taken.update(map(id, mine))
        groups = [
            {"params": [p for p in mine if p.ndim >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in mine if p.ndim < 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)

    parts: list[torch.optim.Optimizer] = []
    if config.release_gradients:
        for visit in policy.visits:
            parts.append(adamw(visit.layer.parameters()))
            visit.done = partial(_step_and_release, parts[-1])
    parts.append(adamw(p for _, p in named))
    if matrices:
        parts.append(
            torch.optim.Muon(
                matrices, lr=config.lr, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"
            )  # arXiv 2502.16982
        )
    warmup = max(1, math.ceil(config.warmup_ratio * total_steps))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        if config.schedule == "constant":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total_steps - warmup)))

    return Optimizer(parts, factor)


def _step_and_release(part: torch.optim.Optimizer) -> None:
    part.step()
    part.zero_grad(set_to_none=True)


def gradient_norm(policy: Policy, limit: float | None) -> float:
    """Global norm of the gradients, which are scaled down to `limit` where they exceed it; not where it is not finite:
    the scale would spread one bad gradient over all."""
    params = [p for p in policy.parameters() if p.requires_grad]
    norm = torch.nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
    if limit is not None and torch.isfinite(norm):
        torch.nn.utils.clip_grads_with_norm_(params, limit, norm)
    return float(norm)
