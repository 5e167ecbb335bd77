"""Attention of packed segments over a range of prefix rows and their own tokens: one online softmax, no merge.

Each segment attends fully to its prefix rows and causally to itself. Query heads that share a KV head read it where it
lies. Nothing is atomic: one program owns each tile of out, dq, dk, dv and of the prefix's gradients, which it adds to,
so equal calls give equal bits. `merge_attention` joins two attentions over different keys that others computed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# What differs from batch to batch is not specialised: a number divisible by 16, or a single run, compiles nothing anew.


@triton.jit
def _load(x, rows, head, row_stride, head_stride, inside, cols, d):
    """[rows, D] of one head, 0 outside."""
    at = x + head * head_stride + rows.to(tl.int64)[:, None] * row_stride + cols[None, :]  # tokens · heads · d > 2³¹
    return tl.load(at, mask=inside[:, None] & (cols < d)[None, :], other=0.0)


@triton.jit
def _dot(a, b):
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _query_step(q, k, v, m, s, acc, visible, scale):
    """One tile of keys into the running maximum m, sum s and acc of a tile of queries."""
    z = tl.where(visible, _dot(q, tl.trans(k)) * scale, float("-inf"))
    new = tl.maximum(m, tl.max(z, 1))  # finite: every query sees a key in the first tile it meets
    p = tl.exp(z - new[:, None])
    old = tl.exp(m - new)
    return new, s * old + tl.sum(p, 1), acc * old[:, None] + _dot(p.to(v.dtype), v)


@triton.jit(do_not_specialize=["tokens"])
def _forward(
    q, k, v, prefix_k, prefix_v, out, lse, tiles, groups, tokens, d, scale, q_row, q_head, k_row, k_head, v_row, v_head,
    pk_row, pk_head, pv_row, pv_head, out_row, out_head, BLOCK: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    tile, head = tiles + tl.program_id(0) * 5, tl.program_id(1).to(tl.int64)
    first, begin, end = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    start, stop = tl.load(tile + 3), tl.load(tile + 4)
    kv_head = head // groups
    cols = tl.arange(0, D)
    rows = first + tl.arange(0, BLOCK)
    mine = _load(q, rows, head, q_row, q_head, rows < end, cols, d)
    m = tl.full([BLOCK], float("-inf"), tl.float32)
    s = tl.zeros([BLOCK], tl.float32)
    acc = tl.zeros([BLOCK, D], tl.float32)
    for i in range(start, stop, BLOCK):
        keys = i + tl.arange(0, BLOCK)
        inside = keys < stop
        k_tile = _load(prefix_k, keys, kv_head, pk_row, pk_head, inside, cols, d)
        v_tile = _load(prefix_v, keys, kv_head, pv_row, pv_head, inside, cols, d)
        m, s, acc = _query_step(mine, k_tile, v_tile, m, s, acc, inside[None, :], scale)
    for i in range(begin, tl.minimum(first + BLOCK, end), BLOCK):
        keys = i + tl.arange(0, BLOCK)
        inside = keys < end
        k_tile = _load(k, keys, kv_head, k_row, k_head, inside, cols, d)
        v_tile = _load(v, keys, kv_head, v_row, v_head, inside, cols, d)
        visible = inside[None, :] & (keys[None, :] <= rows[:, None])
        m, s, acc = _query_step(mine, k_tile, v_tile, m, s, acc, visible, scale)
    at = out + head * out_head + rows.to(tl.int64)[:, None] * out_row + cols[None, :]
    mask = (rows < end)[:, None] & (cols < d)[None, :]
    tl.store(at, (acc / s[:, None]).to(out.dtype.element_ty), mask=mask)
    tl.store(lse + head * tokens + rows, m + tl.log(s), mask=rows < end)


@triton.jit
def _dq_step(q, k, v, d_out, lse, delta, visible, scale):
    """dS·K of one tile of keys."""
    p = tl.where(visible, tl.exp(_dot(q, tl.trans(k)) * scale - lse[:, None]), 0.0)
    ds = p * (_dot(d_out, tl.trans(v)) - delta[:, None])
    return _dot(ds.to(k.dtype), k)


@triton.jit(do_not_specialize=["tokens"])
def _dq(
    d_out, q, k, v, prefix_k, prefix_v, out, lse, delta, dq, tiles, groups, tokens, d, scale, do_row, do_head, q_row,
    q_head, k_row, k_head, v_row, v_head, pk_row, pk_head, pv_row, pv_head, out_row, out_head, dq_row, dq_head,
    BLOCK: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """dq, and delta = rowsum(dO·O) for the kernels that follow."""
    tile, head = tiles + tl.program_id(0) * 5, tl.program_id(1).to(tl.int64)
    first, begin, end = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    start, stop = tl.load(tile + 3), tl.load(tile + 4)
    kv_head = head // groups
    cols = tl.arange(0, D)
    rows = first + tl.arange(0, BLOCK)
    inside_q = rows < end
    mine = _load(q, rows, head, q_row, q_head, inside_q, cols, d)
    upstream = _load(d_out, rows, head, do_row, do_head, inside_q, cols, d)
    made = _load(out, rows, head, out_row, out_head, inside_q, cols, d)
    row_delta = tl.sum(upstream.to(tl.float32) * made.to(tl.float32), 1)
    tl.store(delta + head * tokens + rows, row_delta, mask=inside_q)
    row_lse = tl.load(lse + head * tokens + rows, mask=inside_q, other=0.0)
    acc = tl.zeros([BLOCK, D], tl.float32)
    for i in range(start, stop, BLOCK):
        keys = i + tl.arange(0, BLOCK)
        inside = keys < stop
        k_tile = _load(prefix_k, keys, kv_head, pk_row, pk_head, inside, cols, d)
        v_tile = _load(prefix_v, keys, kv_head, pv_row, pv_head, inside, cols, d)
        visible = inside_q[:, None] & inside[None, :]
        acc += _dq_step(mine, k_tile, v_tile, upstream, row_lse, row_delta, visible, scale)
    for i in range(begin, tl.minimum(first + BLOCK, end), BLOCK):
        keys = i + tl.arange(0, BLOCK)
        inside = keys < end
        k_tile = _load(k, keys, kv_head, k_row, k_head, inside, cols, d)
        v_tile = _load(v, keys, kv_head, v_row, v_head, inside, cols, d)
        visible = inside_q[:, None] & inside[None, :] & (keys[None, :] <= rows[:, None])
        acc += _dq_step(mine, k_tile, v_tile, upstream, row_lse, row_delta, visible, scale)
    at = dq + head * dq_head + rows.to(tl.int64)[:, None] * dq_row + cols[None, :]
    tl.store(at, (acc * scale).to(dq.dtype.element_ty), mask=inside_q[:, None] & (cols < d)[None, :])


@triton.jit
def _key_step(
    k, v, dk, dv, d_out, q, lse, delta, rows, end, head, tokens, cols, d, keys, inside, scale, do_row, do_head, q_row,
    q_head, CAUSAL: tl.constexpr,
):  # fmt: skip
    """dk, dv with one tile of one head's queries added; the scale of dk is left to the end."""
    inside_q = rows < end
    q_tile = _load(q, rows, head, q_row, q_head, inside_q, cols, d)
    upstream = _load(d_out, rows, head, do_row, do_head, inside_q, cols, d)
    row_lse = tl.load(lse + head * tokens + rows, mask=inside_q, other=0.0)
    row_delta = tl.load(delta + head * tokens + rows, mask=inside_q, other=0.0)
    visible = inside[:, None] & inside_q[None, :]
    if CAUSAL:
        visible = visible & (keys[:, None] <= rows[None, :])
    p = tl.where(visible, tl.exp(_dot(k, tl.trans(q_tile)) * scale - row_lse[None, :]), 0.0)  # [keys, rows]
    dv += _dot(p.to(upstream.dtype), upstream)
    ds = p * (_dot(v, tl.trans(upstream)) - row_delta[None, :])
    return dk + _dot(ds.to(q_tile.dtype), q_tile), dv


@triton.jit(do_not_specialize=["tokens"])
def _dkv(
    d_out, q, k, v, lse, delta, dk, dv, tiles, groups, tokens, d, scale, do_row, do_head, q_row, q_head, k_row, k_head,
    v_row, v_head, dk_row, dk_head, dv_row, dv_head, BLOCK: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """dk, dv of a tile of own tokens: the queries from there to the end of the segment."""
    tile, kv_head = tiles + tl.program_id(0) * 5, tl.program_id(1).to(tl.int64)
    first, end = tl.load(tile), tl.load(tile + 2)
    cols = tl.arange(0, D)
    keys = first + tl.arange(0, BLOCK)
    inside = keys < end
    k_tile = _load(k, keys, kv_head, k_row, k_head, inside, cols, d)
    v_tile = _load(v, keys, kv_head, v_row, v_head, inside, cols, d)
    dk_acc, dv_acc = tl.zeros([BLOCK, D], tl.float32), tl.zeros([BLOCK, D], tl.float32)
    for head in range(kv_head * groups, (kv_head + 1) * groups):
        for i in range(first, end, BLOCK):
            dk_acc, dv_acc = _key_step(
                k_tile, v_tile, dk_acc, dv_acc, d_out, q, lse, delta, i + tl.arange(0, BLOCK), end, head, tokens, cols,
                d, keys, inside, scale, do_row, do_head, q_row, q_head, CAUSAL=True,
            )  # fmt: skip
    mask = inside[:, None] & (cols < d)[None, :]
    wide = keys.to(tl.int64)[:, None]
    tl.store(
        dk + kv_head * dk_head + wide * dk_row + cols[None, :], (dk_acc * scale).to(dk.dtype.element_ty), mask=mask
    )
    tl.store(dv + kv_head * dv_head + wide * dv_row + cols[None, :], dv_acc.to(dv.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tokens", "run_count", "prefix_rows"])
def _prefix_dkv(
    d_out, q, prefix_k, prefix_v, lse, delta, prefix_dk, prefix_dv, runs, run_count, prefix_rows, groups, tokens, d,
    scale, do_row, do_head, q_row, q_head, pk_row, pk_head, pv_row, pv_head, dk_row, dk_head, dv_row, dv_head,
    BLOCK: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Add to the fp32 gradients of a tile of prefix rows: all queries of the runs whose range meets it."""
    lowest, kv_head = tl.program_id(0) * BLOCK, tl.program_id(1).to(tl.int64)
    cols = tl.arange(0, D)
    keys = lowest + tl.arange(0, BLOCK)
    there = keys < prefix_rows
    k_tile = _load(prefix_k, keys, kv_head, pk_row, pk_head, there, cols, d)
    v_tile = _load(prefix_v, keys, kv_head, pv_row, pv_head, there, cols, d)
    dk_acc, dv_acc = tl.zeros([BLOCK, D], tl.float32), tl.zeros([BLOCK, D], tl.float32)
    for r in range(0, run_count):
        begin, end = tl.load(runs + 4 * r), tl.load(runs + 4 * r + 1)
        start, stop = tl.load(runs + 4 * r + 2), tl.load(runs + 4 * r + 3)
        until = tl.where((start < lowest + BLOCK) & (lowest < stop), end, begin)
        inside = (keys >= start) & (keys < stop)
        for head in range(kv_head * groups, (kv_head + 1) * groups):
            for i in range(begin, until, BLOCK):
                dk_acc, dv_acc = _key_step(
                    k_tile, v_tile, dk_acc, dv_acc, d_out, q, lse, delta, i + tl.arange(0, BLOCK), end, head, tokens,
                    cols, d, keys, inside, scale, do_row, do_head, q_row, q_head, CAUSAL=False,
                )  # fmt: skip
    mask = there[:, None] & (cols < d)[None, :]
    wide = keys.to(tl.int64)[:, None]
    at_k = prefix_dk + kv_head * dk_head + wide * dk_row + cols[None, :]
    at_v = prefix_dv + kv_head * dv_head + wide * dv_row + cols[None, :]
    tl.store(at_k, tl.load(at_k, mask=mask, other=0.0) + dk_acc * scale, mask=mask)
    tl.store(at_v, tl.load(at_v, mask=mask, other=0.0) + dv_acc, mask=mask)


@triton.jit(do_not_specialize=["rows", "lse_head", "other_head"])
def _merge(out, lse, other, other_lse, rows, heads, d, lse_head, other_head, ROWS: tl.constexpr, D: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # row = token · heads + head
    cols = tl.arange(0, D)
    inside = row < rows
    token, head = row // heads, row % heads
    mine = tl.load(lse + head * lse_head + token, mask=inside, other=0.0)
    theirs = tl.load(other_lse + head * other_head + token, mask=inside, other=0.0)
    larger = tl.maximum(mine, theirs)
    a, b = tl.exp(mine - larger), tl.exp(theirs - larger)
    total = a + b
    at = row[:, None] * d + cols[None, :]
    mask = inside[:, None] & (cols < d)[None, :]
    x = tl.load(out + at, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(other + at, mask=mask, other=0.0).to(tl.float32)
    merged = x * (a / total)[:, None] + y * (b / total)[:, None]
    tl.store(out + at, merged.to(out.dtype.element_ty), mask=mask)
    tl.store(lse + head * lse_head + token, larger + tl.log(total), mask=inside)


def tile_tokens(d: int, dtype: torch.dtype) -> int:
    """Tokens of a tile, for the table of tiles: as many as registers hold for heads of d numbers without spilling."""
    wide = d > 128
    return (16 if wide else 32) if dtype == torch.float32 else (32 if wide else 64)


def _options(d: int, block: int) -> dict[str, int]:
    return dict(BLOCK=block, D=max(16, triton.next_power_of_2(d)), num_warps=4 if d <= 64 else 8, num_stages=2)


def prefix_attention_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    prefix_k: torch.Tensor | None,
    prefix_v: torch.Tensor | None,
    tiles: torch.Tensor,
    *,
    block: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [tokens, heads, d] in q's dtype, lse [heads, tokens] fp32).

    q [tokens, heads, d], k, v [tokens, kv_heads, d], prefix_k, prefix_v [prefix rows, kv_heads, d], all fp32, fp16 or
    bf16 with unit stride in d. tiles int32 [n, 5]: for every `block` tokens of a segment (first token, begin of the
    segment, its end, first prefix row, end of the prefix rows). Sums are fp32.
    """
    tokens, heads, d = q.shape
    pk, pv = (k, v) if prefix_k is None else (prefix_k, prefix_v)  # never read: then all ranges are empty
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(heads, tokens, dtype=torch.float32, device=q.device)
    if len(tiles):
        _forward[(len(tiles), heads)](
            q, k, v, pk, pv, out, lse, tiles, heads // k.shape[1], tokens, d, scale,
            *_strides(q, k, v, pk, pv, out), **_options(d, block),
        )  # fmt: skip
    return out, lse


def prefix_attention_backward(
    d_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    prefix_k: torch.Tensor | None,
    prefix_v: torch.Tensor | None,
    tiles: torch.Tensor,
    runs: torch.Tensor,
    prefix_grads: tuple[torch.Tensor, torch.Tensor] | None,
    *,
    block: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq, dk, dv); those of the prefix are added to prefix_grads, fp32 [prefix rows, kv_heads, d], or left out.

    runs int32 [n, 4]: (first token, end, first prefix row, end) of tokens that read the same rows.
    """
    tokens, heads, d = q.shape
    kv_heads = k.shape[1]
    groups = heads // kv_heads
    lse = lse.contiguous()
    pk, pv = (k, v) if prefix_k is None else (prefix_k, prefix_v)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    delta = torch.empty_like(lse)
    options = _options(d, block)
    if not len(tiles):
        return dq, dk, dv
    _dq[(len(tiles), heads)](
        d_out, q, k, v, pk, pv, out, lse, delta, dq, tiles, groups, tokens, d, scale,
        *_strides(d_out, q, k, v, pk, pv, out, dq), **options,
    )  # fmt: skip
    _dkv[(len(tiles), kv_heads)](
        d_out, q, k, v, lse, delta, dk, dv, tiles, groups, tokens, d, scale, *_strides(d_out, q, k, v, dk, dv),
        **options,
    )  # fmt: skip
    if prefix_grads is not None and len(runs):
        _prefix_dkv[(triton.cdiv(len(pk), block), kv_heads)](
            d_out, q, pk, pv, lse, delta, *prefix_grads, runs, len(runs), len(pk), groups, tokens, d, scale,
            *_strides(d_out, q, pk, pv, *prefix_grads), **options,
        )  # fmt: skip
    return dq, dk, dv


def merge_attention(
    out: torch.Tensor, lse: torch.Tensor, other: torch.Tensor, other_lse: torch.Tensor, *, rows: int = 16
) -> None:
    """Two attentions of the same queries over different keys become, in place in the first, the one over both.

    out, other [n, heads, d] contiguous; lse, other_lse [heads, n] fp32 with unit stride in n.
    """
    n, heads, d = out.shape
    if not (out.is_contiguous() and other.is_contiguous() and lse.stride(1) == 1 and other_lse.stride(1) == 1):
        raise ValueError("out and other must be contiguous, lse and other_lse have unit stride in their last dimension")
    if out.numel():
        _merge[(triton.cdiv(n * heads, rows),)](
            out, lse, other, other_lse, n * heads, heads, d, lse.stride(0), other_lse.stride(0), ROWS=rows,
            D=triton.next_power_of_2(d), num_warps=4,
        )  # fmt: skip


def _strides(*tensors: torch.Tensor) -> list[int]:
    """Of rows and heads, tensor by tensor."""
    return [s for x in tensors for s in x.stride()[:2]]
