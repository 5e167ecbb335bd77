"""Generalised causal attention: text sees what stands before it, an image's rows see each other and all before.

A noised copy of an image is to its sequence what a reply is to a prompt: it reads the rows before the image and its own
and nobody reads it. Each block of rows is one or two unmasked attentions and each text a causal one, merged by
log-sum-exp as in `ops.prefix_attention`; no mask is ever made.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from genevolve_fast.ops.prefix_attention import (
    Layout,
    accumulator,
    attention_backward,
    attention_forward,
    full_backward,
    full_forward,
    merge,
)

Span = tuple[int, int]


@dataclass(frozen=True)
class TextBlock:
    """Rows [begin, end) that see each other causally and the rows [start, begin) of their sequence."""

    begin: int
    end: int
    start: int


@dataclass(frozen=True)
class ImageBlock:
    """Rows [begin, end) that see all rows of the disjoint spans `sees`, their own among them."""

    begin: int
    end: int
    sees: tuple[Span, ...]

    @property
    def rows(self) -> slice:
        return slice(self.begin, self.end)


@dataclass(frozen=True)
class Blocks:
    """Who sees whom among packed rows. Every row is in one block; the host alone knows."""

    texts: tuple[TextBlock, ...]
    images: tuple[ImageBlock, ...]

    @cached_property
    def rows(self) -> int:
        return sum(b.end - b.begin for b in (*self.texts, *self.images))

    @cached_property
    def text_layout(self) -> Layout:
        """Of the text rows laid end to end; their prefix is all rows."""
        lengths = accumulate((t.end - t.begin for t in self.texts), initial=0)
        return Layout(tuple(lengths), tuple((t.start, t.begin) for t in self.texts))

    def text_rows(self, device: torch.device) -> Tensor:
        return torch.cat([torch.arange(t.begin, t.end, device=device) for t in self.texts])

    def mask(self) -> Tensor:
        """bool [rows, rows], what each row sees: for tests and pictures, never for the pass."""
        sees = torch.zeros(self.rows, self.rows, dtype=torch.bool)
        for t in self.texts:
            sees[t.begin : t.end, t.start : t.begin] = True
            sees[t.begin : t.end, t.begin : t.end] = torch.ones(t.end - t.begin, t.end - t.begin).tril().bool()
        for b in self.images:
            for first, last in b.sees:
                sees[b.rows, first:last] = True
        return sees


class _Generalised(torch.autograd.Function):
    """The parts of a softmax get the merged out and log-sum-exp in the backward; the merge is never differentiated."""

    @staticmethod
    def forward(ctx, q, k, v, blocks, texts, scale, impl):
        out = torch.empty_like(q)
        lse = q.new_empty(q.shape[1], len(q), dtype=accumulator(q.dtype))
        if blocks.texts:
            own = [x[texts] for x in (q, k, v)]
            out[texts], lse[:, texts] = attention_forward(*own, blocks.text_layout, k, v, scale=scale, impl=impl)
        for block in blocks.images:
            rows, (first, *others) = block.rows, (slice(*span) for span in block.sees)
            part = full_forward(q[rows], k[first], v[first], scale=scale, impl=impl)
            part = part[0].contiguous(), part[1]
            for other in others:
                merge(*part, *full_forward(q[rows], k[other], v[other], scale=scale, impl=impl))
            out[rows], lse[:, rows] = part
        ctx.save_for_backward(q, k, v, out, lse, texts)
        ctx.blocks, ctx.options = blocks, {"scale": scale, "impl": impl}
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        q, k, v, out, lse, texts = ctx.saved_tensors
        d_q = torch.empty_like(q)
        d_k, d_v = (torch.zeros_like(x, dtype=accumulator(x.dtype)) for x in (k, v))
        if ctx.blocks.texts:
            given = [x[texts] for x in (d_out, q, k, v, out)]
            d_q[texts], own_k, own_v = attention_backward(
                *given, lse[:, texts].contiguous(), ctx.blocks.text_layout, k, v, (d_k, d_v), **ctx.options
            )
            d_k.index_add_(0, texts, own_k.to(d_k.dtype))
            d_v.index_add_(0, texts, own_v.to(d_v.dtype))
        for block in ctx.blocks.images:
            rows, total = block.rows, 0
            for span in block.sees:
                keys = slice(*span)
                of_q, of_k, of_v = full_backward(
                    d_out[rows], q[rows], k[keys], v[keys], out[rows], lse[:, rows].contiguous(), **ctx.options
                )
                d_k[keys] += of_k
                d_v[keys] += of_v
                total = total + of_q
            d_q[rows] = total
        return d_q, d_k.to(k.dtype), d_v.to(v.dtype), None, None, None, None


class GeneralisedAttention:
    """`policy.attention.Attend` for the rows of one packed batch."""

    def __init__(self, blocks: Blocks, device: torch.device, impl: str = "auto") -> None:
        self.blocks, self.impl = blocks, impl
        self._texts = blocks.text_rows(device) if blocks.texts else torch.zeros(0, dtype=torch.int64, device=device)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float, layer: int) -> Tensor:
        """[1, heads, rows, d] of q [1, heads, rows, d], k and v [1, kv_heads, rows, d]."""
        q, k, v = (x[0].transpose(0, 1).contiguous() for x in (q, k, v))
        out = _Generalised.apply(q, k, v, self.blocks, self._texts, scale, self.impl)
        return out.transpose(0, 1)[None]
