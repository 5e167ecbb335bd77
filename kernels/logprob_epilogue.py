"""Rows of fp32 logits to log-prob of the target, log-sum-exp and entropy, in one read.

Contract (DESIGN §4): logp = (z_y - m) - log s, never z_y - lse, so that no digits cancel when p is near 1 and logp <= 0
holds always. Running maximum, sum and first moment are kept per lane and merged once at the end of the row; there are
no atomics, and equal rows give equal bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _epilogue(
    logits, targets, temperature, logps, lse, entropy, V, stride, softcap, scale, ignore_index,
    HAS_SOFTCAP: tl.constexpr, PER_ROW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # rows · V passes 2³¹
    target = tl.load(targets + row)
    tau = tl.load(temperature + row) if PER_ROW else tl.load(temperature)
    m = tl.full([BLOCK], float("-inf"), tl.float32)  # [BLOCK] running maximum of each lane
    s = tl.zeros([BLOCK], tl.float32)  # sum of exp(z - m)
    t = tl.zeros([BLOCK], tl.float32)  # sum of exp(z - m)·(z - m)
    z_y = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        inside = cols < V
        z = tl.load(logits + row * stride + cols, mask=inside, other=0.0) * scale
        if HAS_SOFTCAP:
            e = tl.exp(-2.0 * tl.abs(z / softcap))  # tanh by exp: libdevice has no interpreter
            z = tl.where(z < 0, -1.0, 1.0) * softcap * (1.0 - e) / (1.0 + e)
        z = z / tau
        z_y += tl.where(inside & (cols == target), z, 0.0)
        z = tl.where(inside, z, float("-inf"))
        new = tl.maximum(m, z)
        shift = tl.where(m == float("-inf"), 0.0, m - new)
        old = tl.exp(shift)
        d = tl.where(inside, z - new, 0.0)
        p = tl.where(inside, tl.exp(d), 0.0)
        t = (t + s * shift) * old + p * d  # moving the origin from m to new shifts the first moment by s·(m - new)
        s = s * old + p
        m = new
    top = tl.max(m, 0)
    shift = tl.where(m == float("-inf"), 0.0, m - top)
    weight = tl.where(m == float("-inf"), 0.0, tl.exp(shift))
    total = tl.sum(s * weight, 0)
    moment = tl.sum((t + s * shift) * weight, 0)
    log_s = tl.log(total)
    keep = target != ignore_index
    tl.store(logps + row, tl.where(keep, tl.minimum((tl.sum(z_y, 0) - top) - log_s, 0.0), 0.0))
    tl.store(lse + row, tl.where(keep, top + log_s, 0.0))
    tl.store(entropy + row, tl.where(keep, log_s - moment / total, 0.0))


def logprob_epilogue(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    temperature: float | torch.Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    block: int = 4096,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(logp, lse, entropy), each fp32 [rows], of z = softcap·tanh(scale·logits/softcap)/temperature.

    logits fp32 [rows, V] with unit column stride, targets int64 [rows], temperature a number or fp32 [rows]. Ignored
    rows give 0. Raises ValueError for other dtypes or strides.
    """
    if logits.dtype != torch.float32 or logits.ndim != 2 or logits.stride(1) != 1:
        raise ValueError(f"logits must be fp32 [rows, V] with unit column stride, got {logits.dtype} {logits.stride()}")
    rows, vocabulary = logits.shape
    if targets.shape != (rows,) or targets.dtype != torch.int64:
        raise ValueError(f"targets must be int64 [{rows}], got {targets.dtype} {tuple(targets.shape)}")
    per_row = isinstance(temperature, torch.Tensor) and temperature.ndim == 1
    tau = torch.as_tensor(temperature, dtype=torch.float32, device=logits.device).contiguous()
    out = torch.empty(3, rows, dtype=torch.float32, device=logits.device)
    if rows:
        _epilogue[(rows,)](
            logits, targets.contiguous(), tau, out[0], out[1], out[2], vocabulary, logits.stride(0), softcap or 1.0,
            logit_scale, ignore_index, HAS_SOFTCAP=softcap is not None, PER_ROW=per_row,
            BLOCK=min(block, triton.next_power_of_2(vocabulary)), num_warps=8,
        )  # fmt: skip
    return out[0], out[1], out[2]
