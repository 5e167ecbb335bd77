"""Attention as an argument: each pass hands its own `attend` to the layers, transformers only routes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

IMPLEMENTATION = "genevolve_fast"

# (q [batch, heads, new, d], k, v [batch, kv_heads, new, d], softmax scale, layer index) -> [batch, heads, new, d]
Attend = Callable[[Tensor, Tensor, Tensor, float, int], Tensor]


def _route(module, query, key, value, attention_mask, *, attend: Attend, scaling: float, dropout: float = 0.0, **_):
    if dropout:
        raise ValueError("attention dropout is not supported")
    return attend(query, key, value, scaling, module.layer_idx).transpose(1, 2), None


def register() -> str:
    """Register the router with transformers; returns its implementation name."""
    from transformers import AttentionInterface

    AttentionInterface.register(IMPLEMENTATION, _route)
    return IMPLEMENTATION


def repeat_kv(x: Tensor, groups: int) -> Tensor:
    """[batch, kv_heads, n, d] -> [batch, kv_heads * groups, n, d]."""
    return x if groups == 1 else x.repeat_interleave(groups, dim=1)


def packed_causal(cu_seqlens: Sequence[int]) -> Attend:
    """Causal attention inside each packed sequence [cu[i], cu[i+1]); no mask and no padding is ever built."""
    lengths = [b - a for a, b in zip(cu_seqlens, cu_seqlens[1:], strict=False)]

    def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, layer: int) -> Tensor:
        groups = q.shape[1] // k.shape[1]
        k, v = repeat_kv(k, groups), repeat_kv(v, groups)
        parts = zip(q.split(lengths, 2), k.split(lengths, 2), v.split(lengths, 2), strict=True)
        return torch.cat([F.scaled_dot_product_attention(*p, is_causal=True, scale=scale) for p in parts], 2)

    return attend
