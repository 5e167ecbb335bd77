"""Attention as an argument: each pass hands its own `attend` to the layers, transformers only routes it."""

from __future__ import annotations

from collections.abc import Callable

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
