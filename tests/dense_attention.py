"""Attention of packed segments over repeated prefixes with a dense mask, and its gradients by autograd, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from genevolve_fast.ops import Layout

NAMES = ("out", "dq", "dk", "dv", "prefix_dk", "prefix_dv")


def inputs(layout: Layout, heads=4, kv_heads=2, d=8, prefix_rows=None, dtype=torch.float64, device="cpu", seed=0):
    """(q, k, v, prefix_k, prefix_v, d_out); the prefix is None for a layout without ranges."""
    torch.manual_seed(seed)
    rows = layout.prefix_rows if prefix_rows is None else prefix_rows
    new = lambda n, h: torch.randn(n, h, d, dtype=torch.float64).to(device, dtype)  # noqa: E731
    q, k, v = new(layout.tokens, heads), new(layout.tokens, kv_heads), new(layout.tokens, kv_heads)
    prefix = (new(rows, kv_heads), new(rows, kv_heads)) if layout.prefix_ranges else (None, None)
    return q, k, v, *prefix, new(layout.tokens, heads)


def dense(q, k, v, prefix_k, prefix_v, d_out, layout: Layout, scale: float) -> dict[str, Tensor]:
    """NAMES -> float64; one softmax over prefix and own keys of every segment, keys repeated for heads and segments."""
    leaves = [None if x is None else x.detach().double().requires_grad_() for x in (q, k, v, prefix_k, prefix_v)]
    q, k, v, prefix_k, prefix_v = leaves
    ranges = layout.prefix_ranges or ((0, 0),) * (len(layout.cu_seqlens) - 1)
    groups, outs = q.shape[1] // k.shape[1], []
    for begin, end, (start, stop) in zip(layout.cu_seqlens, layout.cu_seqlens[1:], ranges, strict=False):
        own, n = slice(begin, end), stop - start
        keys = k[own] if prefix_k is None else torch.cat([prefix_k[start:stop], k[own]])
        values = v[own] if prefix_v is None else torch.cat([prefix_v[start:stop], v[own]])
        keys, values = (x.repeat_interleave(groups, 1) for x in (keys, values))
        scores = torch.einsum("ihd,jhd->hij", q[own], keys) * scale
        hidden = torch.ones(end - begin, end - begin + n, dtype=torch.bool, device=q.device).triu(n + 1)
        outs.append(torch.einsum("hij,jhd->ihd", scores.masked_fill(hidden, -torch.inf).softmax(-1), values))
    out = torch.cat(outs) if outs else q * 0
    given = [x for x in leaves if x is not None]
    grads = torch.autograd.grad((out * d_out.double()).sum(), given, allow_unused=True)
    grads = [torch.zeros_like(x) if g is None else g for x, g in zip(given, grads, strict=True)]
    return dict(zip(NAMES, (out.detach(), *grads), strict=False))


def error(got: Tensor, want: Tensor) -> float:
    """‖got - want‖ / ‖want‖."""
    return float((got.double() - want).norm() / want.norm().clamp(min=1e-30))


# segments of every kind: (cu_seqlens, prefix_ranges)
LAYOUTS = {
    "one segment": Layout((0, 9), ((0, 7),)),
    "one token": Layout((0, 1), ((0, 5),)),
    "mixed lengths": Layout((0, 5, 6, 17, 30), ((0, 11),) * 4),
    "empty segments": Layout((0, 0, 5, 5, 12, 12), ((0, 6), (0, 6), (3, 4), (0, 6), (0, 6))),
    "several prefixes": Layout((0, 4, 9, 10, 21), ((0, 5), (0, 5), (5, 18), (5, 18))),
    "ranges that stop early": Layout((0, 4, 9, 10, 21), ((0, 13), (0, 9), (4, 9), (2, 6))),
    "a run that is cut": Layout((0, 4, 9, 12), ((0, 8), (0, 0), (0, 8))),
    "a one-row prefix": Layout((0, 3, 7), ((4, 5), (4, 5))),
    "empty ranges": Layout((0, 3, 7), ((0, 0), (2, 2))),
    "no prefix": Layout((0, 3, 3, 12)),
    "no tokens": Layout((0, 0), ((0, 4),)),
}
