"""Pictures as rows of a sequence and back: square patches of pixels in [-1, 1], a patch a row."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def to_latents(pictures: Sequence[np.ndarray], patch: int) -> Tensor:
    """float32 [pictures · rows · columns, patch² · 3] of uint8 [h, w, 3] pictures of one size, row by row."""
    x = torch.from_numpy(np.stack(pictures)).float().div_(127.5).sub_(1)
    n, height, width, channels = x.shape
    x = x.view(n, height // patch, patch, width // patch, patch, channels).permute(0, 1, 3, 2, 4, 5)
    return x.reshape(-1, patch * patch * channels)


def to_pictures(latents: Tensor, patch: int, size: int) -> list[np.ndarray]:
    """uint8 [size, size, 3] pictures of what `to_latents` gives, clipped."""
    side = size // patch
    x = latents.detach().float().cpu().view(-1, side, side, patch, patch, 3).permute(0, 1, 3, 2, 4, 5)
    x = x.reshape(-1, size, size, 3).add(1).mul(127.5).round().clamp(0, 255)
    return list(x.to(torch.uint8).numpy())
