"""What is fed to every contender: shapes, logits as a model's or as noise, loss tokens, and what each mode computes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from genevolve_fast.ops import Objective

SEQUENCES = 16
OBJECTIVE = Objective(kl_coef=0)
LOGITS = {
    "normal": "logits N(0, 3²), random targets",
    "peaked": "as a trained model's: centred at -14, most targets hold much of the mass",
    "flat": "logits N(0, 0.1²): every probability near 1/V",
}
MODES = {  # mode -> (operation, GEMMs of 2·rows·H·V that it cannot do without, meaning)
    "logprob": ("linear_logprob", 1.0, "log-probs, no gradient"),
    "frozen": ("linear_logprob", 2.0, "log-probs and d hidden, any loss of them"),
    "trainable": ("linear_logprob", 3.0, "log-probs, d hidden and d head, any loss of them"),
    "objective": ("linear_grpo_sdl", 3.0, "GRPO's loss, d hidden and d head"),
    "teacher": ("linear_grpo_sdl", 4.3, "GRPO + distillation of a tenth of the tokens, teacher rows included"),
    "ce": ("linear_logprob", 3.0, "mean cross-entropy, d hidden and d head: what scalar-only peers can do"),
}
OWN_MODES = [mode for mode in MODES if mode != "ce"]


@dataclass(frozen=True)
class Shape:
    """A head [vocabulary, hidden]."""

    name: str
    hidden: int
    vocabulary: int
    dtype: torch.dtype

    @classmethod
    def parse(cls, text: str) -> Shape:
        """2b, 4b, 8b (Qwen3-VL), cpu, toy, or HxV: 4096x151936, 1024x32000xfloat32. Raises ValueError for others."""
        if text in SHAPES:
            return SHAPES[text]
        hidden, vocabulary, dtype = (text + "xbfloat16").split("x")[:3]
        if dtype not in ("bfloat16", "float32"):
            raise ValueError(f"dtype must be bfloat16 or float32, got {dtype!r}")
        return cls(text, int(hidden), int(vocabulary), getattr(torch, dtype))


SHAPES = {
    s.name: s
    for s in (
        Shape("2b", 2048, 151_936, torch.bfloat16),
        Shape("4b", 2560, 151_936, torch.bfloat16),
        Shape("8b", 4096, 151_936, torch.bfloat16),
        Shape("cpu", 1024, 32_000, torch.float32),
        Shape("toy", 64, 1408, torch.float32),  # 1408 leaves what 151 936 leaves modulo 128, 256 and 1024
    )
}


@dataclass(frozen=True)
class Batch:
    """What one call sees: hidden [n, H], targets [n] (-100 where ignored), keep [n] the loss rows (None: all).

    upstream [n] multiplies the log-probs. Sequences lie one after the other, from borders[i] to borders[i + 1].
    """

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    upstream: Tensor
    advantages: Tensor
    teacher: Tensor
    keep: Tensor | None
    borders: list[int]
    seq_ids: Tensor
    main_grad: Tensor | None = None

    @cached_property
    def safe_targets(self) -> Tensor:
        """For implementations without an ignore_index; their rows get no upstream gradient."""
        return self.targets.clamp(min=0)


@dataclass
class Inputs:
    """One set of inputs; `loss_rows` [n] are the indices of the loss tokens, as many in each of 16 equal sequences.

    The teacher's mode may see the same rows as 16 uneven sequences instead: real rollouts do not end where blocks do.
    """

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    upstream: Tensor
    advantages: Tensor
    teacher: Tensor
    loss_rows: Tensor
    uneven: bool = False

    @classmethod
    def make(
        cls,
        shape: Shape,
        rows: int,
        device: torch.device,
        logits: str = "normal",
        ratio: float = 1.0,
        lengths: str = "equal",
    ) -> Inputs:
        """Reproducible for a device. Raises ValueError where the sequences cannot be of equal length."""
        if rows % SEQUENCES:
            raise ValueError(f"rows must be a multiple of {SEQUENCES}, got {rows}")
        torch.manual_seed(0)
        h, t = torch.randn(2, rows, shape.hidden, device=device, dtype=shape.dtype)
        w = torch.randn(shape.vocabulary, shape.hidden, device=device) * shape.hidden**-0.5 * 3
        y = torch.randint(shape.vocabulary, (rows,), device=device)
        upstream, advantages = torch.randn(rows, device=device), torch.randn(SEQUENCES, device=device)
        t = h + 0.1 * t
        if logits == "flat":
            w *= 0.1 / 3
        elif logits == "peaked":
            h, w, t = _peak(h, w, y, t)
        length = rows // SEQUENCES
        count = max(1, round(ratio * length))
        order = torch.rand(SEQUENCES, length, device=device).argsort(1)[:, :count].sort(1).values
        loss_rows = (order + length * torch.arange(SEQUENCES, device=device)[:, None]).flatten()
        return cls(h, w.to(shape.dtype), y, upstream, advantages, t, loss_rows, lengths == "uneven")

    @property
    def dense(self) -> bool:
        """Whether every row is a loss row."""
        return len(self.loss_rows) == len(self.targets)

    def leaves(self, mode: str) -> tuple[Tensor, Tensor]:
        hidden = self.hidden.detach().requires_grad_(mode != "logprob")
        return hidden, self.weight.detach().requires_grad_(mode not in ("logprob", "frozen"))

    def batch(self, hidden: Tensor, weight: Tensor, mode: str, layout: str, main_grad: Tensor | None = None) -> Batch:
        """The call's view of `hidden` [rows, H]: all rows with ignored targets, or gathered by the caller (compact)."""
        teacher = self.teacher
        compact = layout == "compact" and not self.dense
        if compact:
            hidden, teacher = hidden.index_select(0, self.loss_rows), teacher.index_select(0, self.loss_rows)
        targets, upstream, keep = self._compact if compact else self._whole
        sequences = self.sequences(mode == "teacher" and self.uneven, compact)
        return Batch(hidden, weight, targets, upstream, self.advantages, teacher, keep, *sequences, main_grad)

    def sequences(self, uneven: bool, compact: bool) -> tuple[list[int], Tensor]:
        """(borders, seq_ids [n]) over all rows, or over the loss rows."""
        if (uneven, compact) not in self._sequences:
            random = torch.Generator().manual_seed(1)
            lengths = 0.25 + 1.5 * torch.rand(SEQUENCES, generator=random) if uneven else torch.ones(SEQUENCES)
            ends = (lengths.double().cumsum(0) / lengths.double().sum() * len(self.targets)).round().long()
            if compact:
                ends = torch.searchsorted(self.loss_rows.cpu(), ends)
            borders = [0, *ends.tolist()]
            counts = torch.tensor(borders).diff()
            ids = torch.repeat_interleave(torch.arange(SEQUENCES), counts).to(self.targets.device)
            self._sequences[uneven, compact] = borders, ids
        return self._sequences[uneven, compact]

    @cached_property
    def _sequences(self) -> dict[tuple[bool, bool], tuple[list[int], Tensor]]:
        return {}

    @cached_property
    def _compact(self) -> tuple[Tensor, Tensor, None]:
        return self.targets[self.loss_rows], self.upstream[self.loss_rows], None

    @cached_property
    def _whole(self) -> tuple[Tensor, Tensor, Tensor | None]:
        if self.dense:
            return self.targets, self.upstream, None
        keep = torch.zeros_like(self.targets, dtype=torch.bool)
        keep[self.loss_rows] = True
        return torch.where(keep, self.targets, -100), torch.where(keep, self.upstream, 0.0), keep


def _peak(h: Tensor, w: Tensor, y: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Lift the target's logit of noise N(0, 3²) to about the log-sum-exp of the others, and lower all by 14."""
    w[:, 0] = 0  # this column carries the shift
    lift = torch.log(torch.tensor(float(len(w)))) + 4.5
    towards = w[y] * (lift / w[y].square().sum(1, keepdim=True))
    h, t = ((x + towards).to(h.dtype) for x in (h, t))
    h[:, 0] = t[:, 0] = 4.0
    w[:, 0] = -14 / 4.0
    return h, w, t
