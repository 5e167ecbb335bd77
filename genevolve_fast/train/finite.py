"""A step whose loss or gradient is not a number: never taken, skipped where that is allowed, else the run stops."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from genevolve_fast.ops.head import NonFiniteError
from genevolve_fast.policy.model import Policy
from genevolve_fast.policy.weights import held_part
from genevolve_fast.train.optim import Optimizer
from genevolve_fast.train.run import RunError
from genevolve_fast.train.strategies import Strategy


class FiniteSteps:
    """Says of every step whether it may be taken; up to `skip` in a row may not."""

    def __init__(self, policy: Policy, skip: int, released: bool = False) -> None:
        """`released`: with optim.release_gradients layers step in the backward."""
        self._policy, self._skip, self._in_a_row, self._released = policy, skip, 0, released
        self._told = ""

    def note(self, error: NonFiniteError) -> None:
        """What the head said of this step; on a GPU it says nothing, because that would wait for the kernels."""
        self._told = str(error)

    def step(
        self,
        step: int,
        optimizer: Optimizer,
        strategy: Strategy,
        limit: float | None,
        losses: Mapping[str, float],
        traces: Mapping[str, Any] = {},
    ) -> tuple[float, bool]:
        """(the gradients' norm before it was clipped to `limit`, whether the step was taken). Raises RunError."""
        norm = strategy.norm(self._policy, limit)
        if norm is None:  # DeepSpeed looks itself, and leaves out what is not finite
            norm = optimizer.step()
            return norm, self.may_step(step, norm, losses, traces)
        if taken := self.may_step(step, norm, losses, traces):
            optimizer.step()
        return norm, taken

    def may_step(self, step: int, norm: float, losses: Mapping[str, float], traces: Mapping[str, Any] = {}) -> bool:
        """False: gradients are dropped, weights and schedule stay as they were. Raises RunError after too many.

        `norm` is the gradients' before clipping; `traces` of the step's rollouts have `logps`. Equal on all ranks where
        `norm` and `losses` are.
        """
        bad = [f"{name} {value}" for name, value in losses.items() if not math.isfinite(value)]
        if not math.isfinite(norm):
            bad.append(f"gradient norm {norm}")
        if not bad:
            self._in_a_row = 0
            return True
        self._in_a_row += 1
        where = self._where(traces)
        self._policy.zero_grad(set_to_none=True)
        told = f"step {step}: {', '.join(bad)}; {where}"
        if self._in_a_row <= self._skip:
            print(f"{told}; skipped, {self._in_a_row} of optim.skip_nonfinite {self._skip} in a row", flush=True)
            return False
        begun = "Nothing was stepped"
        if self._released:
            begun = "optim.release_gradients has stepped layers already"
        mend = "with optim.skip_nonfinite=1 past such a step"
        if self._skip:
            mend = f"but {self._in_a_row} such steps in a row are no accident"
        raise RunError(
            f"{told}. {begun} and the last checkpoint is good: --resume goes on from it, {mend}. A run that diverges "
            "wants a lower optim.lr, under another name"
        )

    def _where(self, traces: Mapping[str, Any]) -> str:
        """The first thing that is not finite: a weight, a rollout's log-probs, a gradient; of what this rank holds."""
        named = dict(self._policy.model.named_parameters())
        told, self._told = self._told, ""
        if name := _first(named):
            return f"first bad weight {name}, which was so before this step"
        found = [told] if told else []
        if rollout := next((i for i, t in traces.items() if not _finite(torch.as_tensor(t.logps))), None):
            found.append(f"first bad rollout {rollout}")
        grads = {n: p.grad for n, p in named.items() if p.grad is not None}
        if name := _first(grads):
            found.append(f"first bad gradient {name}")
        alone = "every weight and gradient is finite alone"
        return ", ".join(found) or (alone if grads else "every weight is finite, gradients lie in DeepSpeed's buffers")


def _first(tensors: Mapping[str, Tensor]) -> str | None:
    return next((name for name, t in tensors.items() if not _finite(_here(t))), None)


def _here(t: Tensor) -> Tensor:
    """This rank's part: whole tensors would be an exchange, and ranks look at different numbers of them."""
    part = held_part(t).detach()
    return part.to_local() if hasattr(part, "to_local") else part


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())
