"""Are the numbers right? float64 of the same inputs, each contender's error against it, and what is too much."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from benchmarks.inputs import MODES, OBJECTIVE, Inputs, Shape
from benchmarks.peers import Contender
from genevolve_fast.ops import grpo_sdl

# Largest error, in nats and relative: far above what rounding explains, so what exceeds it is a bug.
LIMITS = {torch.float64: (1e-9, 1e-9), torch.float32: (1e-3, 1e-3), torch.bfloat16: (0.25, 0.1)}
GATE = dict(hidden=128, vocabulary=1408, rows=512, ratio=0.75)


def make_run(c: Contender, mode: str, x: Inputs, layout: str, main_grad: Tensor | None = None) -> Callable:
    """The timed call: loss and gradients; what it returns counts as result, not as overhead."""

    def run() -> list[Tensor]:
        hidden, weight = x.leaves(mode)
        with c.context():
            loss = c.loss(mode, x.batch(hidden, weight, mode, layout, main_grad))
            if loss.requires_grad:
                loss.backward()
        return [loss.detach(), *(t.grad for t in (hidden, weight) if t.grad is not None)]

    return run


def errors(c: Contender, mode: str, truth: Truth, layout: str, main_grad: Tensor | None = None) -> dict[str, float]:
    """Log-probs in nats (the largest error), loss |a - b| / max(1, |b|), gradients ‖a - b‖ / ‖b‖.

    With a teacher, rows on the border of the selection are left out of d hidden, and d head, which they reach, is too.
    """
    x, out = truth.inputs, {}
    if MODES[mode][0] == "linear_logprob" and c.logprob:
        with torch.no_grad(), c.context():
            b = x.batch(x.hidden, x.weight, mode, layout)
            got = c.logprob(b)
        got = got if b.keep is None else got[x.loss_rows]
        out["error_logp"] = float((got.double() - truth.logps).abs().max())
    if main_grad is not None:
        main_grad.zero_()
    loss, *grads = make_run(c, mode, x, layout, main_grad)()
    if mode in ("objective", "teacher", "ce"):
        want = truth.loss(mode)
        out["error_loss"] = abs(float(loss) - want) / max(1.0, abs(want))
    if grads:
        rows = truth.decided(0.1 if x.hidden.dtype == torch.bfloat16 else 1e-3) if mode == "teacher" else slice(None)
        out["error_d_hidden"] = _relative(grads[0][x.loss_rows][truth.rows][rows], truth.d_hidden(mode)[rows])
    d_weight = main_grad if main_grad is not None else grads[1] if len(grads) == 2 else None
    if d_weight is not None and mode != "teacher":
        out["error_d_weight"] = _relative(d_weight[truth.columns], truth.d_weight(mode))
    return out


def _relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm().clamp(min=1e-30))


def judge(c: Contender, mode: str, found: dict[str, float], dtype: torch.dtype) -> str | None:
    """What is wrong, or None. Composed distillation is not judged by its gradient: 16-bit logits move the gaps."""
    nats, relative = LIMITS[dtype]
    limits = {"error_logp": nats, "error_loss": nats if mode == "ce" else relative}
    if mode != "teacher" or c.teacher:
        limits |= {"error_d_hidden": relative, "error_d_weight": relative}
    wrong = [f"{name} {found[name]:.2g} > {limit:g}" for name, limit in limits.items() if _exceeds(found, name, limit)]
    return ", ".join(wrong) or None


def _exceeds(found: dict[str, float], name: str, limit: float) -> bool:
    return name in found and not found[name] <= limit  # NaN exceeds everything


class Gate:
    """The check on a small shape with ignored rows, once for each function of a contender."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        shape = Shape("gate", GATE["hidden"], GATE["vocabulary"], dtype)
        self._truth = Truth(Inputs.make(shape, GATE["rows"], device, "peaked", GATE["ratio"]))
        self._verdicts: dict[tuple[str, str], str | None] = {}

    def verdict(self, c: Contender, mode: str) -> str | None:
        """What is wrong with the function that serves `mode`, or None."""
        own = {"objective": c.objective, "teacher": c.teacher, "ce": c.cross_entropy}.get(mode)
        mode = mode if own else "trainable"
        if (c.name, mode) not in self._verdicts:
            weight = self._truth.inputs.weight
            main_grad = torch.empty_like(weight, dtype=torch.float32) if c.settings.get("main_grad") else None
            found = errors(c, mode, self._truth, "ignore", main_grad)
            self._verdicts[c.name, mode] = judge(c, mode, found, weight.dtype)
        return self._verdicts[c.name, mode]


class Truth:
    """float64 of the same inputs: log-probs of all loss rows, gradients at sampled `rows` and `columns` (of V)."""

    SAMPLES = 256
    BLOCK = 1024

    def __init__(self, x: Inputs) -> None:
        self.inputs = x
        self.weight = x.weight.double()
        self.hidden = x.hidden[x.loss_rows].double()
        self.targets = x.targets[x.loss_rows]
        self.upstream = x.upstream[x.loss_rows].double()
        n = len(self.targets)
        self.rows = torch.linspace(0, n - 1, min(self.SAMPLES, n), device=self.targets.device).long().unique()
        random = torch.randperm(len(self.weight), device=self.targets.device)[: self.SAMPLES // 2]
        self.columns = torch.cat([self.targets[: self.SAMPLES // 2], random]).unique()
        self.logps, self.lse = self._logps(self.hidden)

    @cached_property
    def teacher_logps(self) -> Tensor:
        return self._logps(self.inputs.teacher[self.inputs.loss_rows].double())[0]

    def loss(self, mode: str) -> float:
        return float(self._loss_and_slope(mode)[0])

    def d_hidden(self, mode: str) -> Tensor:
        """d loss / d hidden of the sampled loss rows [samples, H]."""
        h, y = self.hidden[self.rows], self.targets[self.rows]
        p = (h @ self.weight.T).sub_(self.lse[self.rows, None]).exp_()
        slope = self._loss_and_slope(mode)[1][self.rows, None]
        return slope * (self.weight[y] - p @ self.weight)

    def d_weight(self, mode: str) -> Tensor:
        """d loss / d weight of the sampled vocabulary rows [columns, H]."""
        d = (self.hidden @ self.weight[self.columns].T).sub_(self.lse[:, None]).exp_().neg_()
        d += self.targets[:, None] == self.columns
        return (d * self._loss_and_slope(mode)[1][:, None]).T @ self.hidden

    def decided(self, margin: float) -> Tensor:
        """bool [samples]: rows whose selection by the distillation does not hang on `margin` nats."""
        gap = (self.logps - self.teacher_logps).abs()
        unsure = torch.zeros_like(gap, dtype=torch.bool)
        borders, _ = self.inputs.sequences(self.inputs.uneven, True)
        for part in (slice(a, b) for a, b in itertools.pairwise(borders) if b > a):
            keep = -(-len(gap[part]) * OBJECTIVE.sdl_permille // 1000)
            border = gap[part].sort(descending=True).values[keep - 1 : keep + 1].mean()
            unsure[part] = (gap[part] - border).abs() < margin
        return ~unsure[self.rows]

    def _loss_and_slope(self, mode: str) -> tuple[Tensor, Tensor]:
        logps = self.logps.clone().requires_grad_()
        if mode in ("objective", "teacher"):
            _, seq_ids = self.inputs.sequences(mode == "teacher" and self.inputs.uneven, True)
            teacher = self.teacher_logps if mode == "teacher" else None
            loss, _ = grpo_sdl(
                logps, advantages=self.inputs.advantages.double(), seq_ids=seq_ids, teacher_logps=teacher,
                objective=OBJECTIVE,
            )  # fmt: skip
        else:
            loss = -logps.mean() if mode == "ce" else (logps * self.upstream).sum()
        return loss.detach(), torch.autograd.grad(loss, logps)[0]

    def _logps(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(log-prob of the target, log-sum-exp) [n]."""
        logps, lse = torch.empty(2, len(hidden), dtype=torch.float64, device=hidden.device)
        for first in range(0, len(hidden), self.BLOCK):
            part = slice(first, first + self.BLOCK)
            z = hidden[part] @ self.weight.T
            lse[part] = z.logsumexp(1)
            logps[part] = z.gather(1, self.targets[part, None])[:, 0] - lse[part]
        return logps, lse
