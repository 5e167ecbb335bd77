"""What stands between the head's GEMMs: fp32 products h·Wᵀ to log-probs, and to the gradient of the logits in place.

Contract (DESIGN §4): logp = (z_y - m) - log s, never z_y - lse, so that no digits cancel when p is near 1 and logp <= 0
holds always. Running maximum, sum and first moment are kept per lane and merged once at the end of the row; there are
no atomics, and equal rows give equal bits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

LOWEST: tl.constexpr = tl.constexpr(-3.4e38)  # below every logit, and finite
NOTHING: tl.constexpr = tl.constexpr(-256.0)  # exp of it is 0 in fp32, and 0 times it too


@triton.jit
def _logit(x, bias, cols, inside, tau, softcap, scale, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    """softcap·tanh(scale·(x + b)/softcap) / tau."""
    if HAS_BIAS:
        x += tl.load(bias + cols, mask=inside, other=0.0).to(tl.float32)
    z = x * scale
    if HAS_SOFTCAP:
        e = tl.exp(-2.0 * tl.abs(z / softcap))  # tanh by exp: libdevice has no interpreter
        z = tl.where(z < 0, -1.0, 1.0) * softcap * (1.0 - e) / (1.0 + e)
    return z / tau


@triton.jit
def _softmax(
    products, bias, targets, temperature, logps, maximum, log_sum, entropy, V, stride, softcap, scale,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, PER_ROW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # rows · V passes 2³¹
    target = tl.load(targets + row)
    tau = tl.load(temperature + row) if PER_ROW else tl.load(temperature)
    m = tl.full([BLOCK], LOWEST, tl.float32)  # [BLOCK] running maximum of each lane; finite, so no inf - inf
    s = tl.zeros([BLOCK], tl.float32)  # sum of exp(z - m)
    t = tl.zeros([BLOCK], tl.float32)  # sum of exp(z - m)·(z - m)
    z_y = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        inside = cols < V
        x = tl.load(products + row * stride + cols, mask=inside, other=0.0)
        z = _logit(x, bias, cols, inside, tau, softcap, scale, HAS_BIAS, HAS_SOFTCAP)
        z_y += tl.where(inside & (cols == target), z, 0.0)
        z = tl.where(inside, z, float("-inf"))
        new = tl.maximum(m, z, propagate_nan=tl.PropagateNan.ALL)
        shift = tl.maximum(m - new, NOTHING)
        old = tl.exp(shift)
        d = tl.maximum(z - new, NOTHING, propagate_nan=tl.PropagateNan.ALL)
        p = tl.exp(d)
        t = (t + s * shift) * old + p * d  # moving the origin from m to new shifts the first moment by s·(m - new)
        s = s * old + p
        m = new
    top = tl.max(m, 0)
    shift = tl.maximum(m - top, NOTHING)
    weight = tl.exp(shift)
    total = tl.sum(s * weight, 0)
    moment = tl.sum((t + s * shift) * weight, 0)
    log_s = tl.log(total.to(tl.float64))  # once a row in fp64, so that logp is rounded once
    logp = ((tl.sum(z_y, 0).to(tl.float64) - top) - log_s).to(tl.float32)
    tl.store(logps + row, tl.minimum(logp, 0.0, propagate_nan=tl.PropagateNan.ALL))
    tl.store(maximum + row, top)
    tl.store(log_sum + row, log_s.to(tl.float32))
    tl.store(entropy + row, (log_s - moment / total).to(tl.float32))


@triton.jit
def _d_logits(
    products, out, bias, targets, temperature, maximum, log_sum, entropy, g_logps, g_lse, g_entropy, V, stride,
    out_stride, softcap, scale, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, PER_ROW: tl.constexpr,
    HAS_LOGPS: tl.constexpr, HAS_LSE: tl.constexpr, HAS_ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    tau = tl.load(temperature + row) if PER_ROW else tl.load(temperature)
    m, log_s = tl.load(maximum + row), tl.load(log_sum + row)
    g = tl.load(g_logps + row) if HAS_LOGPS else 0.0
    share = (tl.load(g_lse + row) if HAS_LSE else 0.0) - g
    h = tl.load(entropy + row) if HAS_ENTROPY else 0.0
    g_h = tl.load(g_entropy + row) if HAS_ENTROPY else 0.0
    for start in range(0, V, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        inside = cols < V
        x = tl.load(products + row * stride + cols, mask=inside, other=0.0)
        z = _logit(x, bias, cols, inside, tau, softcap, scale, HAS_BIAS, HAS_SOFTCAP)
        log_p = (z - m) - log_s
        p = tl.exp(log_p)
        d = p * share
        if HAS_ENTROPY:
            d -= g_h * p * (tl.maximum(log_p, NOTHING) + h)  # 0·inf at a banned token
        if HAS_LOGPS:
            d += tl.where(cols == target, g, 0.0)
        slope = scale / tau
        if HAS_SOFTCAP:
            bent = z * tau / softcap
            slope *= 1.0 - bent * bent
        # every warp has read its part of this tile before any writes: half-width results lie on tiles already read
        tl.debug_barrier()
        tl.store(out + row * out_stride + cols, (d * slope).to(out.dtype.element_ty), mask=inside)


class Softmax(NamedTuple):
    """fp32 [rows]: log-prob of the target, largest logit, log of the sum of exp(z - maximum), entropy."""

    logps: torch.Tensor
    maximum: torch.Tensor
    log_sum: torch.Tensor
    entropy: torch.Tensor


def softmax_epilogue(
    products: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    temperature: float | torch.Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    block: int = 4096,
) -> Softmax:
    """The softmax of z = softcap·tanh(scale·(products + b)/softcap)/temperature at `targets`, in one read.

    products fp32 [rows, V] with unit column stride, targets int64 [rows] in [0, V), bias [V], temperature a number or
    [rows]. Raises ValueError for other dtypes, shapes or strides.
    """
    _check(products, targets)
    rows, vocabulary = products.shape
    tau, per_row = _temperature(temperature, products.device)
    out = torch.empty(4, rows, dtype=torch.float32, device=products.device)
    if rows:
        _softmax[(rows,)](
            products, products if bias is None else bias.contiguous(), targets.contiguous(), tau, *out, vocabulary,
            products.stride(0), softcap or 1.0, logit_scale, HAS_BIAS=bias is not None, HAS_SOFTCAP=softcap is not None,
            PER_ROW=per_row, BLOCK=min(block, triton.next_power_of_2(vocabulary)), num_warps=8,
        )  # fmt: skip
    return Softmax(*out)


def d_logits_epilogue(
    products: torch.Tensor,
    out: torch.Tensor,
    targets: torch.Tensor,
    softmax: Softmax,
    *,
    logps: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    entropy: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    temperature: float | torch.Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    block: int = 4096,
) -> None:
    """Write d/d products of logps·logp + lse·lse + entropy·H (upstream gradients fp32 [rows]) into `out` [rows, V].

    `out` may be the products themselves, or the left half of their rows seen in a 16-bit dtype.
    """
    _check(products, targets)
    rows, vocabulary = products.shape
    if out.shape != products.shape or out.stride(1) != 1:
        raise ValueError(f"out must be {list(products.shape)} with unit column stride, got {list(out.shape)}")
    tau, per_row = _temperature(temperature, products.device)
    unused = softmax.logps
    given = [unused if g is None else g.float().contiguous() for g in (logps, lse, entropy)]
    if rows:
        _d_logits[(rows,)](
            products, out, products if bias is None else bias.contiguous(), targets.contiguous(), tau, softmax.maximum,
            softmax.log_sum, softmax.entropy, *given, vocabulary, products.stride(0), out.stride(0), softcap or 1.0,
            logit_scale, HAS_BIAS=bias is not None, HAS_SOFTCAP=softcap is not None, PER_ROW=per_row,
            HAS_LOGPS=logps is not None, HAS_LSE=lse is not None, HAS_ENTROPY=entropy is not None,
            BLOCK=min(block, triton.next_power_of_2(vocabulary)), num_warps=8,
        )  # fmt: skip


def _check(products: torch.Tensor, targets: torch.Tensor) -> None:
    if products.dtype != torch.float32 or products.ndim != 2 or products.stride(1) != 1:
        raise ValueError(
            f"products must be fp32 [rows, V], unit column stride; got {products.dtype} {products.stride()}"
        )
    if targets.shape != products.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(f"targets must be int64 [{len(products)}], got {targets.dtype} {tuple(targets.shape)}")


def _temperature(temperature: float | torch.Tensor, device: torch.device) -> tuple[torch.Tensor, bool]:
    """(fp32 tensor, whether it holds one number a row); a plain number is made on the device, not copied to it."""
    if not isinstance(temperature, torch.Tensor):
        return torch.full((), temperature, dtype=torch.float32, device=device), False
    return temperature.to(torch.float32).contiguous(), temperature.ndim == 1
