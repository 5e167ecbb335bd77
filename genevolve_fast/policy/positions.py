"""Multimodal rotary positions of Qwen3-VL, for one sequence at a time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Grid = tuple[int, int, int]


class ImageMismatchError(ValueError):
    """Placeholders and images disagree; training on would use wrong or missing pixels."""


def mrope_positions(
    ids: np.ndarray, image_pad_id: int, grids: Sequence[Grid], merge_size: int, start: int = 0
) -> tuple[np.ndarray, int]:
    """Positions int64 [3, len(ids)] (temporal, height, width) and the position of the next token.

    Text advances all three axes by one; an image of grid (t, h, w) occupies t·h·w / merge² placeholders laid out in
    (t, h, w) and advances by max(h, w) / merge (Qwen3-VL, transformers `get_rope_index`). Placeholder runs must lie
    wholly inside `ids`. Raises ImageMismatchError when runs and grids disagree.
    """
    positions = np.empty((3, len(ids)), dtype=np.int64)
    is_image = ids == image_pad_id
    cursor, position = 0, start
    for grid in grids:
        frames, rows, columns = grid[0], grid[1] // merge_size, grid[2] // merge_size
        count = frames * rows * columns
        ahead = np.flatnonzero(is_image[cursor:])
        if not len(ahead):
            raise ImageMismatchError(f"{len(grids)} image grids but fewer placeholder runs")
        first = cursor + int(ahead[0])
        text = first - cursor
        positions[:, cursor:first] = np.arange(position, position + text)
        position += text
        if not is_image[first : first + count].all() or first + count > len(ids):
            raise ImageMismatchError(f"an image of grid {grid} needs {count} placeholders at token {first}")
        layout = np.stack(np.meshgrid(np.arange(frames), np.arange(rows), np.arange(columns), indexing="ij"))
        positions[:, first : first + count] = position + layout.reshape(3, count)
        position += max(rows, columns)
        cursor = first + count
    if is_image[cursor:].any():
        raise ImageMismatchError(f"placeholder at token {cursor + int(is_image[cursor:].argmax())} has no image")
    positions[:, cursor:] = np.arange(position, position + len(ids) - cursor)
    return positions, position + len(ids) - cursor
