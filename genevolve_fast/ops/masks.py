"""Rows that count and rows that do not, without a synchronisation."""

from __future__ import annotations

import torch
from torch import Tensor

Rows = slice | Tensor  # some rows of a call: a range, or their indices


def where(mask: Tensor, x: Tensor, otherwise: float = 0) -> Tensor:
    """x where mask holds, a number elsewhere; the gradient of the rest is 0 whatever it holds."""
    return x.masked_fill(~mask, otherwise)


def mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x where mask holds, 0 where it holds nowhere; in fp32 (fp64)."""
    x = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    return where(mask, x).sum() / mask.sum().clamp(min=1)


def masked(hidden: Tensor, kept: Tensor, all_kept: bool) -> Tensor:
    """hidden [n, H] with 0 in the rows that do not count, because 0 · NaN would reach every gradient."""
    return hidden if all_kept else where(kept[:, None], hidden)
