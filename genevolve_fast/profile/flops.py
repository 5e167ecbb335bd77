"""Tokens pushed through the layers and the FLOPs of a step, for real lengths and for every way to lay them out.

A product of a [rows, in] by an [in, out] matrix is 2·rows·in·out FLOPs; attention is 4·q FLOPs a layer for every pair
of a query and a key. Norms, rotary embedding and the vision tower are left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from genevolve_fast.profile.shapes import ModelShape

ATTENTION_BACKWARD = 2.5  # of its forward: scores again, then dq, dk, dv and d scores


@dataclass(frozen=True)
class GroupLengths:
    """One request's rollouts in tokens.

    `prefix` is what all of them begin with, `replies` what each adds; `patch` is what the teacher reads after
    `request_stop` (none: after the prefix), 0 for a rollout without teacher; `loss_tokens` of each reply, none: all.
    """

    prefix: int
    replies: tuple[int, ...]
    patch: int | tuple[int, ...] = 0
    request_stop: int | None = None
    loss_tokens: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("patch", "loss_tokens"):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != len(self.replies):
                raise ValueError(f"{name} holds {len(value)} numbers for {len(self.replies)} replies")
        if self.request_stop is not None and not 0 <= self.request_stop <= self.prefix:
            raise ValueError(f"request_stop {self.request_stop} lies outside the prefix of {self.prefix} tokens")

    @property
    def cut(self) -> int:
        """Prefix rows that student and teacher have in common."""
        return self.prefix if self.request_stop is None else self.request_stop

    @property
    def patches(self) -> tuple[int, ...]:
        return self.patch if isinstance(self.patch, tuple) else (self.patch,) * len(self.replies)

    @property
    def rows(self) -> tuple[int, ...]:
        """Loss rows of each reply."""
        return self.replies if self.loss_tokens is None else self.loss_tokens


@dataclass(frozen=True)
class Layout:
    """How a step's sequences are laid out.

    `pad_to`: every reply that long. `share_prefix`: computed once for the rollouts of a group. `teacher_reads_student`:
    the teacher takes the prefix's keys and values from the student up to the patch. `patch_per_group`: one patch
    serves all rollouts of a group (else each computes its own). `system`: tokens that all groups share.
    """

    pad_to: int | None = None
    share_prefix: bool = False
    teacher_reads_student: bool = False
    patch_per_group: bool = False
    system: int = 0
    head: Literal["loss", "reply", "all"] = "loss"

    def __post_init__(self) -> None:
        if (self.teacher_reads_student or self.patch_per_group or self.system) and not self.share_prefix:
            raise ValueError("teacher_reads_student, patch_per_group and system need share_prefix")


UNSHARED = Layout()
SHARED = Layout(share_prefix=True, teacher_reads_student=True)  # what the training pass does


@dataclass(frozen=True)
class Work:
    """Tokens through the layers, pairs of query and key, rows through the head."""

    tokens: int = 0
    pairs: int = 0
    rows: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(self.tokens + other.tokens, self.pairs + other.pairs, self.rows + other.rows)


@dataclass(frozen=True)
class Pushed:
    """The work of a step: shared prefixes, the student's other tokens, the teacher's."""

    prefix: Work = Work()
    student: Work = Work()
    teacher: Work = Work()

    def __add__(self, other: Pushed) -> Pushed:
        return Pushed(self.prefix + other.prefix, self.student + other.student, self.teacher + other.teacher)

    @property
    def student_tokens(self) -> int:
        return self.prefix.tokens + self.student.tokens

    @property
    def teacher_tokens(self) -> int:
        return self.teacher.tokens


def causal(tokens: int, context: int = 0) -> Work:
    """Tokens that see `context` earlier ones and, causally, each other."""
    return Work(tokens, tokens * context + tokens * (tokens + 1) // 2)


def pushed(groups: Iterable[GroupLengths], layout: Layout) -> Pushed:
    """What a step pushes through the layers."""
    total = Pushed()
    for index, group in enumerate(groups):
        if layout.system > group.cut:
            raise ValueError(f"system {layout.system} is longer than the {group.cut} tokens before a group's patch")
        one = _shared(group, layout) if layout.share_prefix else _unshared(group, layout)
        if index and layout.system:
            one += Pushed(prefix=_minus(causal(layout.system)))
            if not layout.teacher_reads_student and any(group.patches):
                one += Pushed(teacher=_minus(causal(layout.system)))
        total += one
    return total


def _unshared(group: GroupLengths, layout: Layout) -> Pushed:
    student = teacher = Work()
    for reply, patch, rows in zip(group.replies, group.patches, group.rows, strict=True):
        reply = layout.pad_to or reply
        student += causal(group.prefix + reply) + _head(group.prefix + reply, reply, rows, layout)
        if patch:
            whole = group.prefix + patch + reply
            teacher += causal(whole) + _head(whole, reply, rows, layout)
    return Pushed(student=student, teacher=teacher)


def _shared(group: GroupLengths, layout: Layout) -> Pushed:
    student = teacher = Work()
    for reply, rows in zip(group.replies, group.rows, strict=True):
        reply = layout.pad_to or reply
        student += causal(reply, group.prefix) + _head(reply, reply, rows, layout)
    taught = [(r, p, n) for r, p, n in zip(group.replies, group.patches, group.rows, strict=True) if p]
    cut, tail = group.cut, group.prefix - group.cut
    if taught and not layout.teacher_reads_student:
        teacher += causal(cut)
    if taught and layout.patch_per_group:
        teacher += causal(taught[0][1] + tail, cut)
    for reply, patch, rows in taught:
        reply, own = layout.pad_to or reply, patch + tail
        teacher += causal(reply, cut + own) if layout.patch_per_group else causal(own + reply, cut)
        teacher += _head(reply, reply, rows, layout)
    prefix = causal(group.prefix)
    if layout.head == "all":
        prefix += Work(rows=group.prefix)
    return Pushed(prefix, student, teacher)


def _head(tokens: int, reply: int, rows: int, layout: Layout) -> Work:
    return Work(rows={"loss": rows, "reply": reply, "all": tokens}[layout.head])


def _minus(work: Work) -> Work:
    return Work(-work.tokens, -work.pairs, -work.rows)


@dataclass(frozen=True)
class Passes:
    """How often a step does what: forward products count 1.

    With LoRA the weights' own gradients fall away (their adapters' are small): `weight_gradients` 0.
    `recompute` 1: the layers' forward once more in the backward, which counts as work but not as model FLOPs.
    `head` products of a student's loss row: 3 in the fused sweep, 2 with a frozen head.
    """

    weight_gradients: float = 1.0
    recompute: float = 1.0
    head: float = 3.0

    @property
    def linear_backward(self) -> float:
        return 1 + self.weight_gradients + self.recompute

    @property
    def attention_backward(self) -> float:
        return ATTENTION_BACKWARD + self.recompute


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of a step's phases."""

    prefix: float
    student: float
    teacher: float
    head: float
    backward: float

    @property
    def total(self) -> float:
        return self.prefix + self.student + self.teacher + self.head + self.backward


def forward_flops(shape: ModelShape, work: Work) -> float:
    """Of one forward through the layers, without the head."""
    return 2.0 * shape.linear_parameters * work.tokens + attention_flops(shape, work)


def attention_flops(shape: ModelShape, work: Work) -> float:
    return 4.0 * shape.q * shape.layers * work.pairs


def step_flops(shape: ModelShape, work: Pushed, passes: Passes | None = None) -> StepFlops:
    """FLOPs of a step that pushes `work`."""
    passes = passes or Passes()
    trained = work.prefix + work.student
    one_row = 2.0 * shape.vocabulary * shape.hidden
    return StepFlops(
        prefix=forward_flops(shape, work.prefix),
        student=forward_flops(shape, work.student),
        teacher=forward_flops(shape, work.teacher),
        head=one_row * (passes.head * trained.rows + work.teacher.rows),
        backward=2.0 * shape.linear_parameters * trained.tokens * passes.linear_backward
        + attention_flops(shape, trained) * passes.attention_backward,
    )


def sharing_ratio(
    shape: ModelShape, groups: Iterable[GroupLengths], passes: Passes | None = None, shared: Layout = SHARED
) -> float:
    """FLOPs of the packed, unshared step over those of the shared one: the speed-up that sharing can give."""
    groups = list(groups)
    before, after = (step_flops(shape, pushed(groups, layout), passes).total for layout in (UNSHARED, shared))
    return before / after


# --- what a rank gets -------------------------------------------------------------------------------------------------


def sequence_cost(shape: ModelShape, tokens: int, loss_tokens: int, passes: Passes | None = None) -> float:
    """FLOPs of one sequence trained alone: linear maps, attention among its own tokens, the head on its loss rows."""
    work = causal(tokens) + Work(rows=loss_tokens)
    return step_flops(shape, Pushed(student=work), passes).total


def group_cost(shape: ModelShape, group: GroupLengths, layout: Layout = SHARED, passes: Passes | None = None) -> float:
    """FLOPs of one group: prefix, student, teacher, head."""
    return step_flops(shape, pushed([group], layout), passes).total


# --- GPUs -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gpu:
    """Dense bf16 FLOP/s with fp32 accumulation, and memory in bytes, as the vendor's data sheet says."""

    flops: float
    memory: int


GPUS = {
    "a10": Gpu(125e12, 24 << 30),
    "a100": Gpu(312e12, 80 << 30),
    "b200": Gpu(2250e12, 180 << 30),
    "h100": Gpu(989.4e12, 80 << 30),
    "h100 pcie": Gpu(756e12, 80 << 30),
    "h200": Gpu(989.4e12, 139 << 30),
    "l4": Gpu(121e12, 24 << 30),
    "l40s": Gpu(362e12, 48 << 30),
    "rtx 3090": Gpu(71e12, 24 << 30),
    "rtx 4090": Gpu(165.2e12, 24 << 30),
}
_SAYS_NOTHING = {"nvidia", "geforce", "tesla", "sxm", "sxm4", "sxm5", "hbm3", "hbm3e", "hbm2e", "gpu"}


def gpu_named(name: str) -> Gpu | None:
    """The GPU a driver or a user calls `name`; None where the name says anything that the table does not know."""
    words = [w for w in re.split(r"[\s_-]+", name.lower()) if w not in _SAYS_NOTHING and not re.fullmatch(r"\d+gb", w)]
    found = " ".join(words)
    if found == "a100 pcie":  # as fast as on a board
        found = "a100"
    return GPUS.get(found)
