"""Trajectories to packed micro-batches: no padding, and only the rows that predict a loss token reach the head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from genevolve_fast.ops import Layout
from genevolve_fast.policy.positions import Grid, ImageMismatchError, mrope_positions
from genevolve_fast.policy.visits import Packed
from genevolve_fast.trajectory import Trajectory


@dataclass(frozen=True)
class TrainingSequence:
    """One sequence to train on: ids [T], loss_mask [T] and its images in order."""

    ids: np.ndarray
    loss_mask: np.ndarray
    images: tuple[np.ndarray, ...]
    grids: tuple[Grid, ...]


@dataclass(frozen=True)
class PackedBatch:
    """Sequences laid end to end.

    ids [1, tokens], positions [3, 1, tokens], cu_seqlens (host, len sequences + 1), image_rows [image tokens];
    rows [loss tokens] are the positions whose hidden state predicts targets [loss tokens].
    """

    ids: Tensor
    positions: Tensor
    cu_seqlens: tuple[int, ...]
    image_rows: Tensor
    images: tuple[np.ndarray, ...]
    rows: Tensor
    targets: Tensor

    @property
    def num_tokens(self) -> int:
        return self.cu_seqlens[-1]

    @property
    def stretch(self) -> Packed:
        """The tokens as the training pass takes them; their images are `images` in order."""
        feature_rows = torch.arange(len(self.image_rows), device=self.ids.device)
        return Packed(self.ids[0], self.positions[:, 0], self.image_rows, feature_rows)

    @property
    def layout(self) -> Layout:
        return Layout(self.cu_seqlens)


def student_sequence(trajectory: Trajectory, images: Mapping[str, np.ndarray], grid_of) -> TrainingSequence:
    """The trajectory as the policy saw it. Raises ImageMismatchError when an image is absent or its grid changed."""
    pixels = []
    for record in trajectory.images:
        if record.sha256 not in images:
            raise ImageMismatchError(f"{trajectory.id}: pixels of {record.img_id} ({record.sha256[:12]}) are missing")
        grid = tuple(grid_of(images[record.sha256]))
        if grid != tuple(record.grid):
            raise ImageMismatchError(f"{trajectory.id}: {record.img_id} had grid {record.grid} at rollout, {grid} now")
        pixels.append(images[record.sha256])
    grids = tuple(tuple(r.grid) for r in trajectory.images)
    return TrainingSequence(trajectory.ids, trajectory.loss_mask, tuple(pixels), grids)


def teacher_sequence(student: TrainingSequence, request_stop: int, patch_ids: Sequence[int]) -> TrainingSequence:
    """The same sampled ids after the experience, which is spliced in before the request's turn closes."""
    patch = np.asarray(patch_ids, dtype=np.int64)
    ids = np.concatenate([student.ids[:request_stop], patch, student.ids[request_stop:]])
    mask = np.insert(student.loss_mask, request_stop, np.zeros(len(patch), dtype=bool))
    return TrainingSequence(ids, mask, student.images, student.grids)


def pack(
    sequences: Sequence[TrainingSequence], image_pad_id: int, merge_size: int, device: torch.device | str
) -> PackedBatch:
    """Lay `sequences` end to end on `device`."""
    if not sequences:
        raise ValueError("nothing to pack")
    lengths = [len(s.ids) for s in sequences]
    cu = np.concatenate([[0], np.cumsum(lengths)])
    ids = np.concatenate([s.ids for s in sequences])
    positions = np.concatenate([mrope_positions(s.ids, image_pad_id, s.grids, merge_size)[0] for s in sequences], 1)
    mask = np.concatenate([s.loss_mask for s in sequences])
    if mask[cu[:-1]].any():
        raise ValueError("the first token of a sequence carries loss, but no row predicts it")
    targets_at = np.flatnonzero(mask)

    def tensor(x: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(x)).to(device, non_blocking=True)

    return PackedBatch(
        ids=tensor(ids)[None],
        positions=tensor(positions)[:, None],
        cu_seqlens=tuple(int(c) for c in cu),
        image_rows=tensor(np.flatnonzero(ids == image_pad_id)),
        images=tuple(p for s in sequences for p in s.images),
        rows=tensor(targets_at - 1),
        targets=tensor(ids[targets_at]),
    )


def plan_microbatches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """First-fit decreasing: index groups whose lengths sum to at most max_tokens (a longer sequence goes alone)."""
    bins: list[tuple[int, list[int]]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        for b, (used, members) in enumerate(bins):
            if used + lengths[index] <= max_tokens:
                bins[b] = (used + lengths[index], [*members, index])
                break
        else:
            bins.append((lengths[index], [index]))
    return [sorted(members) for _, members in bins]
