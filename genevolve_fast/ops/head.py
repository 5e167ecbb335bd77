"""Exact log-probabilities from hidden states, one block of logits at a time."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor


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
    return_entropy: bool = False,
    return_lse: bool = False,
    block_rows: int = 1024,
) -> LogProbs:
    """log softmax(z)[target] of z = softcap·tanh(scale·(h·Wᵀ + b)/softcap) / temperature, differentiable.

    hidden [rows, H], weight [V, H], targets [rows] int64, bias [V], temperature a number or [rows] > 0 (constant).
    Logits are fp32 (fp64 for fp64 inputs) and at most `block_rows` x V of them exist; every forward GEMM has that
    exact shape, so equal hidden rows give equal bits wherever they stand. Backward recomputes a block at a time and
    accumulates dW in fp32, autocast or not. Ignored rows may hold anything. Raises ValueError naming the argument of a
    wrong shape or value; on a GPU a target outside the vocabulary is torch's device-side assertion.
    """
    _check(hidden, weight, targets, bias, temperature, softcap, block_rows)
    if targets.device.type == "cpu":
        _check_targets(targets, len(weight), ignore_index)
    logps, entropy, lse = _LinearLogprob.apply(
        hidden, weight, bias, targets, temperature, softcap, logit_scale, ignore_index, return_entropy, block_rows
    )
    return LogProbs(logps, entropy if return_entropy else None, lse if return_lse else None)


def _check(hidden, weight, targets, bias, temperature, softcap, block_rows) -> None:
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden [rows, H] and weight [V, H] do not fit: {tuple(hidden.shape)}, {tuple(weight.shape)}")
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(f"targets must be int64 [{len(hidden)}], got {targets.dtype} {tuple(targets.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [{len(weight)}], got {tuple(bias.shape)}")
    if isinstance(temperature, Tensor):
        if temperature.ndim and temperature.shape != targets.shape:
            raise ValueError(f"temperature must be a number or [{len(hidden)}], got {tuple(temperature.shape)}")
    elif not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive, got {softcap}")
    if block_rows < 1:
        raise ValueError(f"block_rows must be at least 1, got {block_rows}")


def _check_targets(targets: Tensor, vocabulary: int, ignore_index: int) -> None:
    wrong = (targets != ignore_index) & ((targets < 0) | (targets >= vocabulary))
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(f"targets[{row}] is {int(targets[row])}: neither in [0, {vocabulary}) nor {ignore_index}")


def _full_precision(method):
    """Run a method of an autograd function without autocast: bf16 logits would be silently inexact."""

    @functools.wraps(method)
    def run(ctx, first, *rest):
        with torch.autocast(first.device.type, enabled=False):
            return method(ctx, first, *rest)

    return run


class _Block(NamedTuple):
    """Softmax pieces of one block of rows."""

    shifted: Tensor  # z - max, [block, V]
    log_sum: Tensor  # log sum exp of it, [block, 1]
    maximum: Tensor  # [block, 1]
    slope: Tensor | float  # dz / d(h·Wᵀ + b)


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    @_full_precision
    def forward(
        ctx, hidden, weight, bias, targets, temperature, softcap, scale, ignore_index, want_entropy, block_rows
    ):
        ctx.save_for_backward(hidden, weight, bias, targets, temperature if isinstance(temperature, Tensor) else None)
        ctx.options = (temperature, softcap, scale, ignore_index, block_rows)
        rows, kind = len(hidden), _accumulator(hidden)
        logps = torch.zeros(rows, dtype=kind, device=hidden.device)
        entropy = torch.zeros(rows if want_entropy else 0, dtype=kind, device=hidden.device)
        lse = torch.zeros(rows, dtype=kind, device=hidden.device)
        keep = targets != ignore_index
        for first in range(0, rows, block_rows):
            part = slice(first, first + block_rows)
            count = len(targets[part])
            block = _softmax_block(hidden[part], weight, bias, _rows(temperature, part), softcap, scale, block_rows)
            index = torch.where(keep[part], targets[part], 0)[:, None]
            z = block.shifted[:count]
            logps[part] = (z.gather(1, index) - block.log_sum[:count])[:, 0]
            lse[part] = (block.maximum + block.log_sum)[:count, 0]
            if want_entropy:
                entropy[part] = (block.log_sum[:count] - (z.exp() * z).sum(1, True) / block.log_sum[:count].exp())[:, 0]
        zero = torch.zeros((), dtype=kind, device=hidden.device)
        if want_entropy:
            entropy = torch.where(keep, entropy, zero)
        return torch.where(keep, logps, zero), entropy, torch.where(keep, lse, zero)

    @staticmethod
    @_full_precision
    def backward(ctx, g_logps, g_entropy, g_lse):
        hidden, weight, bias, targets, per_row = ctx.saved_tensors
        temperature, softcap, scale, ignore_index, block_rows = ctx.options
        temperature = per_row if per_row is not None else temperature
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        kind = _accumulator(hidden)
        d_hidden = torch.empty_like(hidden) if need_hidden else None
        d_weight = torch.zeros(weight.shape, dtype=kind, device=weight.device) if need_weight else None
        d_bias = torch.zeros(bias.shape, dtype=kind, device=bias.device) if need_bias else None
        keep = (targets != ignore_index)[:, None]
        for first in range(0, len(hidden), block_rows):
            part = slice(first, first + block_rows)
            rows = torch.where(keep[part], hidden[part], 0)  # 0 · NaN of an ignored row would reach dW
            block = _softmax_block(rows, weight, bias, _rows(temperature, part), softcap, scale, len(rows))
            index = torch.where(keep[part, 0], targets[part], 0)
            d_logits = _d_logits(block, index, g_logps[part], _rows(g_entropy, part), g_lse[part])
            d_logits = torch.where(keep[part], d_logits * block.slope, 0).to(hidden.dtype)
            if need_hidden:
                torch.mm(d_logits, weight.to(d_logits.dtype), out=d_hidden[part])
            if need_weight:
                d_weight += d_logits.to(kind).T @ rows.to(kind)
            if need_bias:
                d_bias += d_logits.to(kind).sum(0)
        cast = lambda grad, like: None if grad is None else grad.to(like.dtype)  # noqa: E731
        return (d_hidden, cast(d_weight, weight), cast(d_bias, bias), *[None] * 7)


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _rows(value, part: slice):
    """The block's share of a per-row tensor; numbers and empty tensors pass as they are."""
    return value[part] if isinstance(value, Tensor) and value.ndim and len(value) else value


def _softmax_block(rows, weight, bias, temperature, softcap, scale, block_rows: int) -> _Block:
    """Softmax pieces of `rows`, padded to block_rows so that the GEMM has one shape."""
    kind = _accumulator(rows)
    if len(rows) < block_rows:
        rows = torch.cat([rows, rows.new_zeros(block_rows - len(rows), rows.shape[1])])
    z = torch.mm(rows.to(kind), weight.to(kind).T)
    if bias is not None:
        z += bias.to(kind)
    if scale != 1:
        z *= scale
    slope: Tensor | float = scale
    if softcap is not None:
        squashed = torch.tanh(z / softcap)
        slope = scale * (1 - squashed * squashed)
        z = softcap * squashed
    if isinstance(temperature, Tensor) and temperature.ndim:
        padded = torch.ones(block_rows, dtype=kind, device=z.device)
        padded[: len(temperature)] = temperature.to(kind)
        temperature = padded[:, None]
    z = z / temperature
    maximum = z.amax(1, keepdim=True)
    shifted = z.sub_(maximum)
    return _Block(shifted, shifted.exp().sum(1, keepdim=True).log(), maximum, slope / temperature)


def _d_logits(block: _Block, targets: Tensor, g_logps: Tensor, g_entropy: Tensor, g_lse: Tensor) -> Tensor:
    """d/dz of g_logps·logp + g_entropy·H + g_lse·lse."""
    log_p = block.shifted - block.log_sum
    p = log_p.exp()
    out = p * (g_lse - g_logps)[:, None]
    out.scatter_add_(1, targets[:, None], g_logps[:, None].to(out.dtype))
    if g_entropy.numel():
        entropy = -(p * log_p).sum(1, keepdim=True)
        out -= g_entropy[:, None] * p * (log_p + entropy)
    return out
