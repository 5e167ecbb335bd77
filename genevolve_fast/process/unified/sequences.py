"""Processes to packed batches: clean rows as they are read, and behind them noised copies of each draft to draw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from genevolve_fast.batch.packing import PackedBatch, pack, student_sequence
from genevolve_fast.process.unified.attention import Blocks, ImageBlock, TextBlock
from genevolve_fast.process.unified.codec import LatentCodec
from genevolve_fast.process.unified.latents import to_latents
from genevolve_fast.trajectory import ImageRecord, InvariantError, Trajectory

Times = Literal["uniform", "logistic_normal"]


@dataclass(frozen=True)
class UnifiedBatch:
    """Whole sequences laid end to end, then the noised copies.

    clean: the sequences; latents [image rows, numbers] and places [image rows] of their pictures; copied [noised rows]
    which of these image rows each noised row copies, `patches` of them a draft; ids [1, rows] and positions
    [3, 1, rows] of all rows, image_rows those with latents: the clean ones, then the noised.
    """

    clean: PackedBatch
    ids: Tensor
    positions: Tensor
    image_rows: Tensor
    latents: Tensor
    places: Tensor
    copied: Tensor
    patches: int
    blocks: Blocks

    @property
    def noised(self) -> int:
        """Noised copies."""
        return len(self.copied) // self.patches


@dataclass(frozen=True)
class Noise:
    """What the noised copies of a batch are mixed with: times [copies] in 0..1 and z0 [noised rows, numbers]."""

    times: Tensor
    z0: Tensor

    @classmethod
    def draw(
        cls, copies: int, patches: int, numbers: int, generator: torch.Generator, times: Times, shift: float
    ) -> Noise:
        """Logistic-normal or uniform times, moved towards noise by `shift` > 1 as in BAGEL (arXiv 2403.03206)."""
        if times == "uniform":
            t = torch.rand(copies, generator=generator)
        else:
            t = torch.randn(copies, generator=generator).sigmoid()
        return cls(shifted(t, shift), torch.randn(copies * patches, numbers, generator=generator))

    def to(self, device: torch.device) -> Noise:
        return Noise(self.times.to(device), self.z0.to(device))


def shifted(times: Tensor, shift: float) -> Tensor:
    return shift * times / (1 + (shift - 1) * times)


def drawn_images(trajectory: Trajectory) -> tuple[ImageRecord, ...]:
    """Images that are learnt to be drawn: those whose opening marker carries loss."""
    return tuple(i for i in trajectory.images if i.start and trajectory.loss_mask[i.start - 1])


def rows_of(trajectory: Trajectory, copies: int = 1) -> int:
    """Rows that a trajectory takes in a batch, its noised copies among them."""
    return len(trajectory) + copies * sum(i.stop - i.start for i in drawn_images(trajectory))


def pack_processes(
    trajectories: Sequence[Trajectory],
    pixels: Mapping[str, np.ndarray],
    codec: LatentCodec,
    device: torch.device | str = "cpu",
    copies: int = 1,
) -> UnifiedBatch:
    """Lay the trajectories end to end; `pixels` maps pixel hash to uint8 [h, w, 3], each draft has noised `copies`.

    Raises InvariantError for a trajectory without any image, ImageMismatchError where pixels are missing.
    """
    sequences = [student_sequence(t, pixels, codec.image_grid) for t in trajectories]
    clean = pack(sequences, codec.image_pad_id, codec.merge_size, device)
    texts: list[TextBlock] = []
    images: list[ImageBlock] = []
    noised: list[ImageBlock] = []
    copied: list[np.ndarray] = []
    rows = clean.num_tokens
    image_rows_before = 0
    for trajectory, start in zip(trajectories, clean.cu_seqlens, strict=False):
        if not trajectory.images:
            raise InvariantError(f"process {trajectory.id!r} holds no draft")
        drawn, position = drawn_images(trajectory), start
        for image in trajectory.images:
            begin, end = start + image.start, start + image.stop
            texts.append(TextBlock(position, begin, start))
            images.append(ImageBlock(begin, end, ((start, end),)))
            count, position = end - begin, end
            for _ in range(copies if image in drawn else 0):
                noised.append(ImageBlock(rows, rows + count, ((start, begin), (rows, rows + count))))
                copied.append(np.arange(image_rows_before, image_rows_before + count))
                rows += count
            image_rows_before += count
        texts.append(TextBlock(position, start + len(trajectory), start))
    patches = image_rows_before // len(clean.images)
    where = np.concatenate(copied) if copied else np.zeros(0, dtype=np.int64)
    copies = torch.from_numpy(where).to(device)
    of_copies = clean.image_rows[copies]
    return UnifiedBatch(
        clean=clean,
        ids=torch.cat([clean.ids, clean.ids[:, of_copies]], 1),
        positions=torch.cat([clean.positions, clean.positions[:, :, of_copies]], 2),
        image_rows=torch.cat([clean.image_rows, torch.arange(clean.num_tokens, rows, device=device)]),
        latents=to_latents(clean.images, codec.patch).to(device),
        places=torch.arange(patches, device=device).repeat(len(clean.images)),
        copied=copies,
        patches=patches,
        blocks=Blocks(tuple(t for t in texts if t.begin < t.end), (*images, *noised)),
    )
