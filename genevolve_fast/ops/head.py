"""Exact log-probabilities from hidden states, a few blocks of logits at a time."""

from __future__ import annotations

import functools
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from genevolve_fast.ops.blocks import Head, Upstream, Workspace, add_weight_gradient, mm_hidden, target_slope


class LogProbs(NamedTuple):
    """logps [rows] in nats; entropy [rows] and lse [rows] where asked for. Ignored rows are 0."""

    logps: Tensor
    entropy: Tensor | None
    lse: Tensor | None


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    return_entropy: bool | Literal["detached"] = False,
    return_lse: bool = False,
    impl: str = "auto",
    workspace_mb: float | None = None,
    block_rows: int = 1024,
    check_targets: bool = False,
) -> LogProbs:
    """log softmax(z)[target] of z = softcap·tanh(scale·(h·Wᵀ + b)/softcap) / temperature, differentiable.

    hidden [rows, H], weight [V, H], targets [rows] int64, bias [V], temperature a number or [rows] > 0 (constant).
    Logits are fp32 (fp64 for fp64 inputs), autocast or not, and every forward GEMM has exactly `block_rows` rows, so
    equal hidden rows give equal bits wherever they stand. Ignored rows may hold anything; on a CPU they enter no GEMM.

    GEMMs of 2·rows·H·V: 1 without gradients; 2 where only `hidden` needs one (the gradient of each row's log-prob is
    made in the forward and scaled in the backward), 3 with a differentiable entropy; 4 where weight or bias need one
    (the backward recomputes the logits), dW accumulated in fp32. `return_entropy="detached"` saves the third GEMM.

    Peak bytes above inputs and results: the workspace (`workspace_mb`, or one block 4·V·block_rows on a CPU and four on
    a GPU) + 40·rows + 12 MiB, + 4·V·H for dW, + without dW hidden's bytes (twice with entropy).
    impl "torch" runs everywhere, "triton" on a GPU, "auto" takes the faster one that runs (`supported` says why not).
    Raises ValueError naming the argument of a wrong shape, dtype or value. Targets are checked where that costs no
    synchronisation, on a CPU, or with `check_targets`; else a wrong one is the device's assertion.
    """
    head = Head.of(weight, bias, temperature, softcap, logit_scale)
    check_head(hidden, head, targets, block_rows)
    if return_entropy not in (True, False, "detached"):
        raise ValueError(f"return_entropy must be True, False or 'detached', got {return_entropy!r}")
    on_cpu = targets.device.type == "cpu"
    if on_cpu or check_targets:
        check_target_range(targets, len(weight), ignore_index)
    live = None
    if on_cpu and bool((dropped := targets == ignore_index).any()):
        live = (~dropped).nonzero()[:, 0]
        head = head.rows(live)
        hidden, targets = hidden[live], targets[live]
    out = _LinearLogprob.apply(
        hidden, weight, bias, targets, head, ignore_index, return_entropy, (impl, workspace_mb, block_rows)
    )
    if live is not None:
        out = tuple(x if x is None else x.new_zeros(len(dropped)).index_put((live,), x) for x in out)
    logps, entropy, lse = out
    return LogProbs(logps, entropy if return_entropy else None, lse if return_lse else None)


def check_head(hidden: Tensor, head: Head, targets: Tensor, block_rows: int) -> None:
    """Raises ValueError naming the argument of a wrong shape, dtype, device or value; nothing is synchronised."""
    weight, bias, temperature = head.weight, head.bias, head.temperature
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden [rows, H] and weight [V, H] do not fit: {tuple(hidden.shape)}, {tuple(weight.shape)}")
    for name, x in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if x is not None and not x.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {x.dtype}")
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(f"targets must be int64 [{len(hidden)}], got {targets.dtype} {tuple(targets.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [{len(weight)}], got {tuple(bias.shape)}")
    for name, x in (("weight", weight), ("targets", targets), ("bias", bias)):
        if x is not None and x.device != hidden.device:
            raise ValueError(f"{name} is on {x.device}, hidden on {hidden.device}")
    if isinstance(temperature, Tensor):
        if temperature.ndim and temperature.shape != targets.shape:
            raise ValueError(f"temperature must be a number or [{len(hidden)}], got {tuple(temperature.shape)}")
    elif not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if head.softcap is not None and not head.softcap > 0:
        raise ValueError(f"softcap must be positive, got {head.softcap}")
    if block_rows < 1:
        raise ValueError(f"block_rows must be at least 1, got {block_rows}")


def check_target_range(targets: Tensor, vocabulary: int, ignore_index: int) -> None:
    """Raises ValueError naming the first target outside the vocabulary; synchronises a GPU."""
    wrong = (targets != ignore_index) & ((targets < 0) | (targets >= vocabulary))
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(f"targets[{row}] is {int(targets[row])}: neither in [0, {vocabulary}) nor {ignore_index}")


def _full_precision(method):
    """Run a method of an autograd function without autocast: bf16 logits would be silently inexact."""

    @functools.wraps(method)
    def run(ctx, *args):
        devices = {a.device.type for a in args if isinstance(a, Tensor)} or {"cpu"}
        with torch.autocast(devices.pop(), enabled=False):
            return method(ctx, *args)

    return run


def _kept_rows(hidden: Tensor, targets: Tensor, ignore_index: int, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
    """(hidden, targets, kept) of some rows; what is ignored becomes 0, because 0 · NaN would reach every gradient."""
    kept = targets[rows] != ignore_index
    zero = torch.zeros((), dtype=hidden.dtype, device=hidden.device)
    return torch.where(kept[:, None], hidden[rows], zero), torch.where(kept, targets[rows], 0), kept


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    @_full_precision
    def forward(ctx, hidden, weight, bias, targets, head, ignore_index, entropy, size):
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        ctx.set_materialize_grads(False)  # None, not zeros, for outputs that the loss does not use
        ctx.frozen = need_hidden and not (need_weight or need_bias)
        units = [torch.empty_like(hidden) for _ in range(2 if entropy is True else 1)] if ctx.frozen else []
        work = Workspace(len(hidden), hidden, head, *size, two=len(units) == 2)
        logps, lse = torch.empty(2, len(hidden), dtype=work.kind, device=hidden.device)
        entropies = torch.empty_like(logps) if entropy else None
        for visit in work.visits(len(hidden)):
            h, y, kept = _kept_rows(hidden, targets, ignore_index, visit)
            softmax = work.softmax(h, y, head, visit, bool(entropy))
            logps[visit] = torch.where(kept, softmax.logps, 0)
            lse[visit] = torch.where(kept, softmax.lse, 0)
            if entropy:
                entropies[visit] = torch.where(kept, softmax.entropy, 0)
            if units:
                each = (Upstream(logps=kept.to(work.kind)), Upstream(entropy=kept.to(work.kind)))[: len(units)]
                for unit, d in zip(units, work.d_logits(softmax, y, head, visit, *each), strict=True):
                    unit[visit] = mm_hidden(d, head.weight)
        ctx.options = (head, ignore_index, size, need_weight, need_bias)
        ctx.save_for_backward(*((logps, lse, targets, *units) if ctx.frozen else (hidden, targets)))
        if entropy == "detached":
            ctx.mark_non_differentiable(entropies)
        return logps, entropies, lse

    @staticmethod
    @_full_precision
    def backward(ctx, *upstream):
        g = Upstream(upstream[0], upstream[2], upstream[1])
        grads = _frozen_gradient(ctx, g) if ctx.frozen else _gradients(ctx, g)
        return (*grads, *[None] * 5)


def _frozen_gradient(ctx, g: Upstream) -> tuple[Tensor | None, None, None]:
    """Every gradient of a row is linear in its upstream numbers: scale what the forward kept."""
    logps, lse, targets, *units = ctx.saved_tensors
    head, ignore_index, (*_, block_rows) = ctx.options[:3]
    d_hidden = torch.zeros_like(units[0])
    for first in range(0, len(d_hidden), block_rows):
        rows = slice(first, first + block_rows)
        kept = targets[rows] != ignore_index
        up = Upstream(*(None if x is None else torch.where(kept, x[rows], 0)[:, None] for x in g))
        total = torch.zeros((), dtype=logps.dtype, device=logps.device)
        if up.logps is not None:
            total = total + up.logps * units[0][rows]
        if up.entropy is not None:
            total = total + up.entropy * units[1][rows]
        if up.lse is not None:  # logp = z_y - lse, so the gradient of lse is that of z_y less the one kept for logp
            slope = target_slope((logps + lse)[rows], head, rows)[:, None]
            own = head.weight[torch.where(kept, targets[rows], 0)]
            total = total + up.lse * (slope * own - units[0][rows])
        d_hidden[rows] = total
    return d_hidden, None, None


def _gradients(ctx, g: Upstream) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    hidden, targets = ctx.saved_tensors
    head, ignore_index, size, need_weight, need_bias = ctx.options
    need_hidden = ctx.needs_input_grad[0]
    work = Workspace(len(hidden), hidden, head, *size)
    d_hidden = torch.empty_like(hidden) if need_hidden else None
    d_weight = torch.zeros(head.weight.shape, dtype=work.kind, device=hidden.device) if need_weight else None
    d_bias = torch.zeros(head.bias.shape, dtype=work.kind, device=hidden.device) if need_bias else None
    for visit in work.visits(len(hidden)):
        h, y, kept = _kept_rows(hidden, targets, ignore_index, visit)
        softmax = work.softmax(h, y, head, visit, g.entropy is not None)
        own = Upstream(*(None if x is None else torch.where(kept, x[visit], 0) for x in g))
        (d,) = work.d_logits(softmax, y, head, visit, own)
        if need_hidden:
            d_hidden[visit] = mm_hidden(d, head.weight)
        if need_weight:
            add_weight_gradient(d_weight, d, h)
        if need_bias:
            d_bias += d.sum(0, dtype=work.kind)
    cast = lambda x, like: None if x is None else x.to(like.dtype)  # noqa: E731
    return d_hidden, cast(d_weight, head.weight), cast(d_bias, head.bias)
