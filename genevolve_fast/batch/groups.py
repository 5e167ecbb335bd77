"""Rollouts that share a prompt, laid out so that the prompt passes the layers once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from genevolve_fast.batch.packing import TrainingSequence, plan_microbatches, student_sequence, teacher_sequence
from genevolve_fast.ops.prefix_attention import Layout
from genevolve_fast.ops.sampling_mask import SamplingMask
from genevolve_fast.policy.positions import mrope_positions
from genevolve_fast.policy.visits import Packed
from genevolve_fast.trajectory import Trajectory, image_hash


@dataclass(frozen=True)
class TrainingRollout:
    """A rollout that enters the loss, its advantage, and the ids its teacher reads after the request (or none)."""

    trajectory: Trajectory
    advantage: float
    experience_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Sequenced:
    """One whole sequence: ids [T], positions [3, T], and for each placeholder its image token among the bundle's."""

    ids: np.ndarray
    positions: np.ndarray
    image_at: np.ndarray
    feature_rows: np.ndarray


class ImageTable:
    """The images of a bundle, each once, and where their tokens begin."""

    def __init__(self) -> None:
        self.images: list[np.ndarray] = []
        self._offsets: dict[str, int] = {}
        self._tokens = 0

    def offset(self, pixels: np.ndarray, tokens: int) -> int:
        key = image_hash(pixels)
        if key not in self._offsets:
            self._offsets[key] = self._tokens
            self._tokens += tokens
            self.images.append(pixels)
        return self._offsets[key]


@dataclass(frozen=True)
class MicroBatch:
    """Replies streamed together against their prefixes.

    `student` holds each reply up to the row that predicts its last loss token, `teacher` the experience, the rest of
    the prompt and the reply up to the last eligible token. Loss rows lie rollout by rollout (`cu_seqlens`):
    rows [M] index the bundle's prefix rows that predict a first token, then the student's rows; targets,
    rollout_logps, eligible [M]; teacher_rows [E] of the teacher's rows, teacher_index [M] into those or -1;
    sampling_mask the sets of ids that the M tokens were sampled from, none where no engine told them.
    """

    members: tuple[TrainingRollout, ...]
    student: Packed
    student_layout: Layout
    cu_seqlens: tuple[int, ...]
    rows: Tensor
    targets: Tensor
    rollout_logps: Tensor
    eligible: Tensor
    teacher: Packed | None
    teacher_layout: Layout
    teacher_rows: Tensor
    teacher_index: Tensor
    sampling_mask: SamplingMask | None = None

    @property
    def advantages(self) -> Tensor:
        """[rollouts] on the host."""
        return torch.tensor([m.advantage for m in self.members], dtype=torch.float32)


@dataclass(frozen=True)
class Bundle:
    """Some groups: their prefixes packed, their images, their replies in micro-batches."""

    prefix: Packed
    layout: Layout
    images: tuple[np.ndarray, ...]
    microbatches: tuple[MicroBatch, ...]

    @property
    def last_rows(self) -> Tensor:
        """[groups] the rows of the prefix that predict a first token."""
        return torch.tensor(self.layout.cu_seqlens[1:], device=self.prefix.ids.device) - 1


@dataclass(frozen=True)
class PlannedBundle:
    """A bundle that is made when it is called for; how many micro-batches it will have, and whether any is taught."""

    make: Callable[[], Bundle]
    microbatches: int
    taught: bool

    def __call__(self) -> Bundle:
        return self.make()


def idle_prefix(device: torch.device | str) -> tuple[Packed, Layout]:
    """One row to pass the layers with ranks that have prompts."""
    return _idle(device), Layout((0, 1))


def idle_reply(prefix: Layout, device: torch.device | str) -> tuple[Packed, Layout]:
    """One row that reads the first prompt, to pass the layers with ranks that have replies."""
    return _idle(device), Layout((0, 1), ((0, prefix.cu_seqlens[1]),))


def _idle(device) -> Packed:
    zeros = lambda *shape: torch.zeros(*shape, dtype=torch.int64, device=device)  # noqa: E731
    return Packed(zeros(1), zeros(3, 1), zeros(0), zeros(0))


@dataclass(frozen=True)
class PushedTokens:
    """Rows that pass the layers once in the forward."""

    prefix: int = 0
    student: int = 0
    teacher: int = 0

    def __add__(self, other: PushedTokens) -> PushedTokens:
        return PushedTokens(self.prefix + other.prefix, self.student + other.student, self.teacher + other.teacher)


def pushed_tokens(bundle: Bundle) -> PushedTokens:
    """Rows of a bundle's prefix, student and teacher."""
    teachers = [len(m.teacher) for m in bundle.microbatches if m.teacher is not None]
    return PushedTokens(len(bundle.prefix), sum(len(m.student) for m in bundle.microbatches), sum(teachers))


@dataclass
class _Reply:
    """A rollout and its two sequences; the student's reply begins at `start`, where its first token was sampled."""

    rollout: TrainingRollout
    student: TrainingSequence
    scope: str
    start: int = field(init=False)
    eligible: np.ndarray = field(init=False)  # [T] bool
    targets: np.ndarray = field(init=False)  # [M] where the loss tokens stand

    def __post_init__(self) -> None:
        t = self.rollout.trajectory
        self.targets = np.flatnonzero(t.loss_mask)
        self.start = int(self.targets[0])
        self.eligible = (t.decision_mask if self.scope == "decision" else t.loss_mask) & bool(
            self.rollout.experience_ids
        )

    @property
    def prompt(self) -> tuple[bytes, tuple[str, ...]]:
        """What must be equal for two rollouts to share their prefix: ids and pixels before the first sampled token."""
        t = self.rollout.trajectory
        return t.ids[: self.start].tobytes(), tuple(r.sha256 for r in t.images if r.start < self.start)

    @property
    def student_rows(self) -> int:
        return int(self.targets[-1]) - self.start

    @property
    def teacher_span(self) -> tuple[int, int]:
        """Rows of the teacher's sequence that pass the layers: from the experience to its last eligible token."""
        if not self.eligible.any():
            return 0, 0
        stop = int(np.flatnonzero(self.eligible)[-1]) + len(self.rollout.experience_ids)
        return self.rollout.trajectory.request_stop, stop

    @property
    def rows(self) -> int:
        first, stop = self.teacher_span
        return max(self.student_rows, stop - first)


def bundles(
    rollouts: Sequence[TrainingRollout],
    images: Mapping[str, np.ndarray],
    codec,
    device: torch.device | str,
    *,
    max_tokens: int,
    sdl_scope: str = "all",
) -> list[PlannedBundle]:
    """The rollouts in bundles of groups, each made when it is called for.

    Rollouts with equal prompts (ids and pixels) form a group. Groups that fit into max_tokens together with all their
    replies form one bundle; a larger one is alone, its replies streamed in micro-batches of at most max_tokens rows (a
    longer reply alone). Raises ImageMismatchError where an image is missing or has changed.
    """
    groups: dict[tuple, list[_Reply]] = {}
    for r in rollouts:
        reply = _Reply(r, student_sequence(r.trajectory, images, codec.image_grid), sdl_scope)
        groups.setdefault(reply.prompt, []).append(reply)
    members = list(groups.values())
    weights = [g[0].start + sum(reply.rows for reply in g) for g in members]
    planned = []
    for chosen in plan_microbatches(weights, max_tokens):
        inside = [members[i] for i in chosen]
        replies = [reply for group in inside for reply in group]
        planned.append(
            PlannedBundle(
                partial(_bundle, inside, codec, device, max_tokens),
                len(plan_microbatches([reply.rows for reply in replies], max_tokens)),
                any(reply.eligible.any() for reply in replies),
            )
        )
    return planned


def _bundle(groups: Sequence[Sequence[_Reply]], codec, device, max_tokens: int) -> Bundle:
    table = ImageTable()
    students = [[_sequenced(r.student, codec, table) for r in g] for g in groups]
    starts = [g[0].start for g in groups]
    cu = _cumulative(starts)
    layout = Layout(cu)
    prefix = _pack([(s[0], 0, start) for s, start in zip(students, starts, strict=True)], device)
    flat = [(g, reply, students[g][k]) for g, group in enumerate(groups) for k, reply in enumerate(group)]
    microbatches = tuple(
        _microbatch([flat[i] for i in chosen], cu, codec, table, device)
        for chosen in plan_microbatches([reply.rows for _, reply, _ in flat], max_tokens)
    )
    return Bundle(prefix, layout, tuple(table.images), microbatches)


def _microbatch(members, prefix_cu: tuple[int, ...], codec, table: ImageTable, device) -> MicroBatch:
    groups = len(prefix_cu) - 1
    stretches, ranges, rows, targets = [], [], [], []
    teachers, teacher_ranges, teacher_rows, teacher_index = [], [], [], []
    student_at, teacher_at, taught = 0, 0, 0
    for group, reply, student in members:
        t, begin = reply.rollout.trajectory, prefix_cu[group]
        stretches.append((student, reply.start, reply.start + reply.student_rows))
        ranges.append((begin, prefix_cu[group + 1]))
        predicting = reply.targets - 1 - reply.start
        rows.append(np.where(predicting < 0, group, groups + student_at + predicting))
        targets.append(t.ids[reply.targets])
        student_at += reply.student_rows
        eligible = reply.eligible[reply.targets]
        index = np.full(len(eligible), -1, dtype=np.int64)
        index[eligible] = taught + np.arange(int(eligible.sum()))
        teacher_index.append(index)
        first, stop = reply.teacher_span
        if stop > first:
            patch = reply.rollout.experience_ids
            whole = teacher_sequence(reply.student, t.request_stop, patch)
            teachers.append((_sequenced(whole, codec, table), first, stop))
            teacher_ranges.append((begin, begin + t.request_stop))
            teacher_rows.append(teacher_at + reply.targets[eligible] + len(patch) - 1 - first)
            teacher_at += stop - first
            taught += int(eligible.sum())
    put = lambda parts, dtype: torch.from_numpy(np.concatenate(parts).astype(dtype)).to(device, non_blocking=True)  # noqa: E731
    nothing = [np.empty(0, dtype=np.int64)]
    replies = [reply for _, reply, _ in members]
    return MicroBatch(
        members=tuple(r.rollout for r in replies),
        student=_pack(stretches, device),
        student_layout=Layout(_cumulative([b - a for _, a, b in stretches]), tuple(ranges)),
        cu_seqlens=_cumulative([len(r.targets) for r in replies]),
        rows=put(rows, np.int64),
        targets=put(targets, np.int64),
        rollout_logps=put([r.rollout.trajectory.rollout_logps[r.targets] for r in replies], np.float32),
        eligible=put([r.eligible[r.targets] for r in replies], bool),
        teacher=_pack(teachers, device) if teachers else None,
        teacher_layout=Layout(_cumulative([b - a for _, a, b in teachers]), tuple(teacher_ranges))
        if teachers
        else None,
        teacher_rows=put(teacher_rows or nothing, np.int64),
        teacher_index=put(teacher_index, np.int64),
        sampling_mask=_sampling_mask([r.rollout.trajectory for r in replies], device),
    )


def _sampling_mask(trajectories: Sequence[Trajectory], device) -> SamplingMask | None:
    if not any(t.masked_tokens for t in trajectories):
        return None
    nothing = lambda t: np.zeros(t.num_loss_tokens, dtype=np.int32)  # noqa: E731
    counts = np.concatenate([t.mask_counts if len(t.mask_counts) else nothing(t) for t in trajectories])
    ids = torch.from_numpy(np.concatenate([t.mask_ids for t in trajectories]))
    return SamplingMask(ids.to(device, non_blocking=True), torch.from_numpy(counts))


def _sequenced(sequence: TrainingSequence, codec, table: ImageTable) -> Sequenced:
    positions, _ = mrope_positions(sequence.ids, codec.image_pad_id, sequence.grids, codec.merge_size)
    parts = [
        table.offset(pixels, codec.image_tokens(grid)) + np.arange(codec.image_tokens(grid))
        for pixels, grid in zip(sequence.images, sequence.grids, strict=True)
    ]
    at = np.flatnonzero(sequence.ids == codec.image_pad_id)
    return Sequenced(sequence.ids, positions, at, np.concatenate([np.empty(0, dtype=np.int64), *parts]))


def _pack(stretches: Sequence[tuple[Sequenced, int, int]], device) -> Packed:
    ids, positions, image_rows, feature_rows, at = [], [], [], [], 0
    for s, start, stop in stretches:
        ids.append(s.ids[start:stop])
        positions.append(s.positions[:, start:stop])
        a, b = np.searchsorted(s.image_at, (start, stop))
        image_rows.append(s.image_at[a:b] - start + at)
        feature_rows.append(s.feature_rows[a:b])
        at += stop - start
    join = lambda parts, axis=0: torch.from_numpy(np.concatenate(parts, axis)).to(device, non_blocking=True)  # noqa: E731
    return Packed(join(ids), join(positions, 1), join(image_rows), join(feature_rows))


def _cumulative(lengths: Sequence[int]) -> tuple[int, ...]:
    return (0, *np.cumsum(np.asarray(lengths, dtype=np.int64)).tolist())
