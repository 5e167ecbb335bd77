"""Generalised causal attention: text sees what stands before it, an image's rows see each other and all before.

A noised copy of an image is to its sequence what a reply is to a prompt: it reads the rows before the image and its own
and nobody reads it. For long sequences each block of rows is one or two unmasked attentions and each text a causal one,
merged by log-sum-exp as in `ops.prefix_attention`, and no mask is ever made. For short ones such parts cost more to
call than to compute: the sequences are laid beside each other under a mask of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention

from genevolve_fast.ops.prefix_attention import (
    Layout,
    accumulator,
    attention_backward,
    attention_forward,
    full_backward,
    full_forward,
    merge,
)
from genevolve_fast.policy.attention import Attend

Span = tuple[int, int]
_SHORT = 512  # rows of the longest sequence up to which a mask costs less than parts


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

    @cached_property
    def sequences(self) -> tuple[tuple[Span, ...], ...]:
        """The rows of each sequence, its noised copies among them, as spans in order."""
        spans: dict[int, list[Span]] = {}
        for t in self.texts:
            spans.setdefault(t.start, []).append((t.begin, t.end))
        for b in self.images:
            spans.setdefault(b.sees[0][0], []).append((b.begin, b.end))
        return tuple(tuple(sorted(of)) for of in spans.values())

    @cached_property
    def longest(self) -> int:
        return max(sum(end - begin for begin, end in spans) for spans in self.sequences)

    def text_rows(self, device: torch.device) -> Tensor:
        return torch.cat([torch.arange(t.begin, t.end, device=device) for t in self.texts])

    def mask(self) -> Tensor:
        """bool [rows, rows]: what each row sees."""
        return self.masks([range(self.rows)])[0]

    def masks(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """bool [sequences, n, n] for lists of n rows that hold whole blocks: what each sees of its own list."""
        place = [{row: n for n, row in enumerate(rows)} for rows in sequences]
        where = {row: i for i, rows in enumerate(sequences) for row in rows}
        sees = torch.zeros(len(sequences), *(max(map(len, sequences)),) * 2, dtype=torch.bool)
        for t in self.texts:
            if t.begin < t.end:
                at, mine = place[where[t.begin]], sees[where[t.begin]]
                begin, end = at[t.begin], at[t.begin] + t.end - t.begin
                mine[begin:end, at[t.start] : begin] = True
                mine[begin:end, begin:end] = torch.ones(end - begin, end - begin).tril().bool()
        for b in self.images:
            at, mine = place[where[b.begin]], sees[where[b.begin]]
            for first, last in b.sees:
                if first < last:
                    mine[at[b.begin] : at[b.begin] + b.end - b.begin, at[first] : at[first] + last - first] = True
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


def generalised_attention(blocks: Blocks, device: torch.device, dtype: torch.dtype) -> Attend:
    """For the rows of one packed batch, the way that suits their lengths."""
    if blocks.longest <= _SHORT:
        return MaskedAttention(blocks, device, dtype)
    return GeneralisedAttention(blocks, device)


class MaskedAttention:
    """Sequences beside each other, the shorter ones filled up, under an additive mask: one call a layer."""

    def __init__(self, blocks: Blocks, device: torch.device, dtype: torch.dtype) -> None:
        rows = [[r for span in spans for r in range(*span)] for spans in blocks.sequences]
        longest = blocks.longest
        sees = blocks.masks(rows)
        for i, own in enumerate(rows):
            sees[i, len(own) :, 0] = True  # what fills up sees something, or its softmax would be NaN
        self._mask = torch.zeros(sees.shape, dtype=dtype).masked_fill_(~sees, float("-inf")).to(device)[:, None]
        filled = torch.tensor([[*own, *[own[0]] * (longest - len(own))] for own in rows], device=device)
        self._rows = filled.flatten()
        back = torch.empty(blocks.rows, dtype=torch.int64)
        for i, own in enumerate(rows):
            back[own] = torch.arange(len(own)) + i * longest
        self._back, self._shape = back.to(device), filled.shape

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float, layer: int) -> Tensor:
        """As GeneralisedAttention."""
        q, k, v = (self._beside(x) for x in (q, k, v))
        out = scaled_dot_product_attention(q, k, v, attn_mask=self._mask, scale=scale, enable_gqa=True)
        return out.transpose(1, 2).flatten(0, 1)[self._back].transpose(0, 1)[None]

    def _beside(self, x: Tensor) -> Tensor:
        """[sequences, heads, n, d] of x [1, heads, rows, d]."""
        return x[0].transpose(0, 1)[self._rows].unflatten(0, self._shape).transpose(1, 2)


class GeneralisedAttention:
    """`policy.attention.Attend` for the rows of one packed batch, without masks."""

    def __init__(self, blocks: Blocks, device: torch.device, impl: str = "auto") -> None:
        self.blocks, self.impl = blocks, impl
        self._texts = blocks.text_rows(device) if blocks.texts else torch.zeros(0, dtype=torch.int64, device=device)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float, layer: int) -> Tensor:
        """[1, heads, rows, d] of q [1, heads, rows, d], k and v [1, kv_heads, rows, d]."""
        q, k, v = (x[0].transpose(0, 1).contiguous() for x in (q, k, v))
        out = _Generalised.apply(q, k, v, self.blocks, self._texts, scale, self.impl)
        return out.transpose(0, 1)[None]
