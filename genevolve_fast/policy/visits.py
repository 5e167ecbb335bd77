"""One visit of a layer: the student's rows, then the teacher's on the same weights; backward from the input alone.

The only tensor a checkpointed visit saves is the student's input. Its backward runs the layer again in the order that
holds least at once: attention forward, then the MLP forward and backward in token tiles, then attention backward, then
the projections backward in token tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from genevolve_fast.ops.prefix_attention import Layout, attention_backward, attention_forward, prefix_attention

TILE_ROWS = 8192  # rows of the projections and of the MLP that are in memory at once


@dataclass(frozen=True)
class Packed:
    """Stretches of sequences laid end to end: ids [n], positions [3, n]; row image_rows[i] is image token
    feature_rows[i] of the image features that go with it."""

    ids: Tensor
    positions: Tensor
    image_rows: Tensor
    feature_rows: Tensor

    def __len__(self) -> int:
        return len(self.ids)


@dataclass
class PrefixCache:
    """Keys and values [prefix rows, kv_heads, d] of each layer, detached, and where their gradients gather in fp32."""

    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    grads: list[tuple[Tensor, Tensor]] | None = None

    def keep(self, k: Tensor, v: Tensor) -> None:
        """Add the next layer."""
        self.keys.append(k)
        self.values.append(v)

    def collect_gradients(self) -> None:
        """From now on the rows that read this cache add their gradients to it."""
        wide = lambda x: torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))  # noqa: E731
        self.grads = [(wide(k), wide(v)) for k, v in zip(self.keys, self.values, strict=True)]

    def release(self, layer: int) -> None:
        """Forget a layer that its backward has passed."""
        empty = self.keys[layer].new_empty(0)
        self.keys[layer] = self.values[layer] = empty
        self.grads[layer] = (empty, empty)


class Stream:
    """Packed rows on their way through the layers.

    rotary: cos, sin [n, d]; `reads` is the prefix whose keys and values they attend to, `fills` the one they make;
    `phase` is entered around the teacher's part of a visit.
    No dataclass: FSDP2 would cast a copy of it, caches included.
    """

    def __init__(
        self,
        rotary: tuple[Tensor, Tensor],
        layout: Layout,
        reads: PrefixCache | None = None,
        fills: PrefixCache | None = None,
        phase: Callable[[], AbstractContextManager] = nullcontext,
    ) -> None:
        self.rotary = rotary
        self.layout = layout
        self.reads = reads
        self.fills = fills
        self.phase = phase

    def prefix(self, layer: int) -> tuple[Tensor | None, Tensor | None]:
        return (None, None) if self.reads is None else (self.reads.keys[layer], self.reads.values[layer])

    def prefix_grads(self, layer: int) -> tuple[Tensor, Tensor] | None:
        return None if self.reads is None or self.reads.grads is None else self.reads.grads[layer]


class Visit(nn.Module):
    """A decoder layer as the training pass calls it: its weights are gathered once for student and teacher."""

    def __init__(self, layer: nn.Module, index: int, rotate: Callable) -> None:
        super().__init__()
        self.layer = layer
        self.index = index
        self.rotate = rotate
        self.checkpoint = True
        self.tile_rows = TILE_ROWS

    def forward(
        self, x: Tensor | None, stream: Stream | None, teacher_x: Tensor | None = None, teacher: Stream | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """(y, teacher's y) of x [n, H] and teacher_x [m, H]; the teacher's rows leave nothing for the backward."""
        y = None
        if x is not None:
            if not torch.is_grad_enabled():
                y = self.bare(x, stream)
            elif self.checkpoint and self.draws:
                y = checkpoint(self.differentiable, x, stream, use_reentrant=False)  # it restores the random state
            elif self.checkpoint:
                y = _Checkpointed.apply(x, self, stream, *self.trained)
            else:
                y = self.differentiable(x, stream)
        if teacher_x is not None:
            with teacher.phase(), torch.no_grad():
                teacher_x = self.bare(teacher_x, teacher)
        return y, teacher_x

    @property
    def trained(self) -> list[nn.Parameter]:
        """The layer's weights that take gradients, as they are now: gathered inside a visit."""
        return [p for p in self.layer.parameters() if p.requires_grad]

    @property
    def draws(self) -> bool:
        """Whether the layer drops at random, as an adapter's dropout does in training."""
        return any(isinstance(m, nn.Dropout) and m.training and m.p > 0 for m in self.layer.modules())

    # --- the layer's parts, each of a tile of rows --------------------------------------------------------------------

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated q [n, heads, d], k and v [n, kv_heads, d] of x [n, H]."""
        attention = self.layer.self_attn
        x = self.layer.input_layernorm(x)
        heads = (len(x), -1, attention.head_dim)
        q, k, v = (p(x).view(heads) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
        if hasattr(attention, "q_norm"):
            q, k = attention.q_norm(q), attention.k_norm(k)
        q, k = self.rotate(q, k, cos.to(x.dtype), sin.to(x.dtype))  # the weights' dtype differs where FSDP2 narrows it
        return q, k, v

    def output(self, attended: Tensor, x: Tensor) -> Tensor:
        """The residual stream after attention [n, H] of attended [n, heads·d]."""
        return x + self.layer.self_attn.o_proj(attended)

    def mlp(self, x: Tensor) -> Tensor:
        return x + self.layer.mlp(self.layer.post_attention_layernorm(x))

    # --- forward ------------------------------------------------------------------------------------------------------

    def differentiable(self, x: Tensor, stream: Stream) -> Tensor:
        """The layer as autograd sees it: everything is saved."""
        q, k, v = self.project(x, *stream.rotary)
        if stream.fills is not None:
            layer, cache = self.index, stream.fills
            cache.keep(k.detach(), v.detach())
            for x_, which in ((k, 0), (v, 1)):  # what the replies added arrives with the prefix's own gradient
                x_.register_hook(lambda g, which=which: g + cache.grads[layer][which].to(g.dtype))
        out = prefix_attention(
            q, k, v, stream.layout, *stream.prefix(self.index), scale=self.scale,
            prefix_grads=stream.prefix_grads(self.index),
        )  # fmt: skip
        return self.mlp(self.output(out.flatten(1), x))

    def bare(self, x: Tensor, stream: Stream) -> Tensor:
        """The layer in token tiles, without a graph."""
        tiles = tiles_of(len(x), self.tile_rows)
        q, k, v = _joined(tiles, lambda t: self.project(x[t], *(r[t] for r in stream.rotary)))
        if stream.fills is not None:
            stream.fills.keep(k, v)
        out, _ = attention_forward(q, k, v, stream.layout, *stream.prefix(self.index), scale=self.scale)
        del q, k, v
        out = out.flatten(1)
        (y,) = _joined(tiles, lambda t: (self.mlp(self.output(out[t], x[t])),))
        return y

    @property
    def scale(self) -> float:
        return self.layer.self_attn.scaling

    # --- backward -----------------------------------------------------------------------------------------------------

    def gradient(self, x: Tensor, stream: Stream, g: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        """Gradients of x [n, H] and of the `trained` weights, from that of the output, g [n, H]: it is overwritten."""
        layer, tiles = self.index, tiles_of(len(x), self.tile_rows)
        weights = _WeightGradients(self.trained, len(tiles))
        projections = _Tiled(lambda t, x_t: self.project(x_t, *(r[t] for r in stream.rotary)), x, tiles)
        q, k, v = projections.outputs
        out, lse = attention_forward(q, k, v, stream.layout, *stream.prefix(layer), scale=self.scale)
        attended = out.flatten(1).requires_grad_()
        with torch.enable_grad():
            mid = self.output(attended, x.detach())
        for t in tiles:
            part = mid.detach()[t].requires_grad_()
            with torch.enable_grad():
                y = self.mlp(part)
            g[t] = weights.backward((y,), (g[t],), part)
            del y
        d_out = weights.backward((mid,), (g,), attended).view_as(out)
        del mid
        d_q, d_k, d_v = attention_backward(
            d_out, q, k, v, out.detach(), lse, stream.layout, *stream.prefix(layer), stream.prefix_grads(layer),
            scale=self.scale,
        )  # fmt: skip
        del d_out, out, attended, lse, q, k, v
        if stream.fills is not None:
            from_replies = stream.fills.grads[layer]
            d_k, d_v = ((a + b).to(d_k.dtype) for a, b in zip((d_k, d_v), from_replies, strict=True))
            stream.fills.release(layer)
        for t, d_x in projections.backward((d_q, d_k, d_v), weights):
            g[t] += d_x
        return g, weights.results()


class _Checkpointed(torch.autograd.Function):
    """A visit's student rows: saves their input, and nothing else.

    The weights are inputs so that each gets one gradient a backward, whatever the number of tiles: engines that reduce
    gradients as they come take a second one for an error.
    """

    @staticmethod
    def forward(ctx, x, visit, stream, *weights):
        ctx.save_for_backward(x)
        ctx.visit, ctx.stream = visit, stream
        return visit.bare(x, stream)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        g = g.contiguous()  # an expanded gradient, as sum() hands out, cannot be written to
        d_x, d_weights = ctx.visit.gradient(x.detach(), ctx.stream, g)
        return d_x, None, None, *d_weights


class _WeightGradients:
    """Gradients of some weights, summed over tiles: in fp32 where there are several and the weights are narrower."""

    def __init__(self, weights: Sequence[Tensor], tiles: int) -> None:
        self.weights = weights
        self.tiles = tiles
        self._sums: list[Tensor | None] = [None] * len(weights)

    def backward(self, outputs: Sequence[Tensor], grads: Sequence[Tensor], x: Tensor) -> Tensor:
        """Gradient of x; what the weights get is added to theirs."""
        d_x, *own = torch.autograd.grad(outputs, (x, *self.weights), grads, allow_unused=True)
        for i, d in enumerate(own):
            if d is None:
                continue
            if self._sums[i] is None:
                wide = d.dtype if self.tiles == 1 else torch.promote_types(d.dtype, torch.float32)
                self._sums[i] = d.to(wide)
            else:
                self._sums[i] += d
            own[i] = None
        return d_x

    def results(self) -> list[Tensor | None]:
        """One gradient a weight, in its dtype."""
        for i, (d, w) in enumerate(zip(self._sums, self.weights, strict=True)):
            self._sums[i] = None if d is None else d.to(w.dtype)
        return self._sums


class _Tiled:
    """A function of rows in tiles: one tile keeps its graph, several are run again in the backward."""

    def __init__(self, function: Callable[[slice, Tensor], Sequence[Tensor]], x: Tensor, tiles: list[slice]) -> None:
        self.function, self.x, self.tiles = function, x, tiles
        self._graph: tuple[Tensor, Sequence[Tensor]] | None = None
        if len(tiles) == 1:
            self._graph = self._run(tiles[0])
            self.outputs = tuple(y.detach() for y in self._graph[1])
        else:
            self.outputs = _joined(tiles, lambda t: function(t, x[t]))

    def _run(self, t: slice) -> tuple[Tensor, Sequence[Tensor]]:
        leaf = self.x[t].detach().requires_grad_()
        with torch.enable_grad():
            return leaf, self.function(t, leaf)

    def backward(self, grads: Sequence[Tensor], weights: _WeightGradients) -> Iterator[tuple[slice, Tensor]]:
        """(tile, gradient of its rows) one after another; the weights gather theirs."""
        self.outputs = ()
        for t in self.tiles:
            leaf, outputs = self._graph or self._run(t)
            self._graph = None
            d_x = weights.backward(outputs, [g[t] for g in grads], leaf)
            del outputs
            yield t, d_x


def tiles_of(rows: int, most: int) -> list[slice]:
    """Equal tiles of at most `most` rows; an empty one where there are none."""
    size = -(-rows // max(1, -(-rows // most)))
    return [slice(a, min(a + size, rows)) for a in range(0, rows, max(1, size))] or [slice(0, 0)]


def _joined(tiles: list[slice], function: Callable[[slice], Sequence[Tensor]]) -> tuple[Tensor, ...]:
    """The results of all tiles under each other."""
    if len(tiles) == 1:
        return tuple(function(tiles[0]))
    whole: tuple[Tensor, ...] = ()
    with torch.no_grad():
        for t in tiles:
            parts = function(t)
            if not whole:
                whole = tuple(p.new_empty(tiles[-1].stop, *p.shape[1:]) for p in parts)
            for w, p in zip(whole, parts, strict=True):
                w[t] = p
    return whole


class _Rowwise(torch.autograd.Function):
    """A module of single rows, as a norm is, in tiles: saves its input, runs again in the backward.

    `forward` is called instead of the module: DeepSpeed's hooks would gather its weights once a tile.
    """

    @staticmethod
    def forward(ctx, x, module, tile_rows, *weights):
        ctx.save_for_backward(x)
        ctx.module, ctx.tile_rows = module, tile_rows
        return _joined(tiles_of(len(x), tile_rows), lambda t: (module.forward(x[t]),))[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        out, tiles = torch.empty_like(x), tiles_of(len(x), ctx.tile_rows)
        weights = _WeightGradients([p for p in ctx.module.parameters() if p.requires_grad], len(tiles))
        for t in tiles:
            part = x[t].detach().requires_grad_()
            with torch.enable_grad():
                y = ctx.module.forward(part)
            out[t] = weights.backward((y,), (g[t],), part)
        return out, None, None, *weights.results()


def in_tiles(module: nn.Module, x: Tensor, tile_rows: int) -> Tensor:
    """module(x) of rows [n, H] that do not see each other, with at most tile_rows of them widened at once."""
    return _Rowwise.apply(x, module, tile_rows, *(p for p in module.parameters() if p.requires_grad))
