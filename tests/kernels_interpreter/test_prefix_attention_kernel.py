"""The Triton attention in the interpreter against the dense softmax in float64."""

from __future__ import annotations

import os
import sys

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 before triton is imported", allow_module_level=True)
pytest.importorskip("triton")

from bf16 import mend
from dense_attention import LAYOUTS, NAMES, dense, error, inputs
from hypothesis import given, settings
from hypothesis import strategies as st

from genevolve_fast.kernels import prefix_attention as kernels
from genevolve_fast.ops import Layout, attention_backward, attention_forward

mend()
module = sys.modules["genevolve_fast.ops.prefix_attention"]
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
ACROSS = {
    "tiles that end within a segment": Layout((0, 70, 71, 200), ((0, 90), (0, 90), (0, 90))),
    "ranges that share a tile of rows": Layout((0, 40, 75), ((0, 70), (50, 130))),
}


def by_triton(q, k, v, prefix_k, prefix_v, d_out, layout, scale, detached=False):
    into = None
    if prefix_k is not None and not detached:
        into = tuple(torch.ones_like(x, dtype=torch.float32) for x in (prefix_k, prefix_v))
    torch.use_deterministic_algorithms(True)  # torch.empty is full of NaN
    try:
        out, lse = attention_forward(q, k, v, layout, prefix_k, prefix_v, scale=scale, impl="triton")
        grads = attention_backward(
            d_out, q, k, v, out, lse, layout, prefix_k, prefix_v, into, scale=scale, impl="triton"
        )
    finally:
        torch.use_deterministic_algorithms(False)
    return dict(zip(NAMES, (out, *grads, *(x - 1 for x in into or ())), strict=False))


def assert_near(got, want, dtype):
    for name, x in got.items():
        floor = 1e-6 if dtype == torch.float32 else 1e-3  # dq of a token that sees one key is 0 but for rounding
        near = (x.double() - want[name]).abs().max() <= floor if x.numel() else True
        assert near or error(x, want[name]) <= TOLERANCE[dtype], (name, error(x, want[name]))


@pytest.mark.parametrize("name", [*LAYOUTS, *ACROSS])
@pytest.mark.parametrize(("kv_heads", "d"), [pytest.param(1, 16, marks=pytest.mark.slow), (2, 20)])
def test_values_and_gradients(name, kv_heads, d):
    layout = (LAYOUTS | ACROSS)[name]
    given = inputs(layout, 2, kv_heads, d, layout.prefix_rows + 3, torch.float32)
    assert_near(by_triton(*given, layout, 0.3), dense(*given, layout, 0.3), torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("d", [32, 160])
def test_lower_precision(dtype, d):
    layout = Layout((0, 30, 31, 80), ((0, 40), (0, 40), (10, 50)))
    given = inputs(layout, 4, 2, d, dtype=dtype)
    got = by_triton(*given, layout, d**-0.5)
    assert got["prefix_dk"].dtype == torch.float32 and got["dk"].dtype == dtype
    assert_near(got, dense(*given, layout, d**-0.5), dtype)


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_layout_into_poisoned_memory(data):
    draw = lambda what, name: data.draw(what, label=name)  # noqa: E731
    lengths = draw(st.lists(st.integers(0, 40), max_size=4), "lengths")
    rows = draw(st.integers(0, 70), "prefix rows")
    ranges = [sorted(draw(st.tuples(st.integers(0, rows), st.integers(0, rows)), "range")) for _ in lengths]
    layout = Layout(tuple(sum(lengths[:i]) for i in range(len(lengths) + 1)), tuple(map(tuple, ranges)))
    d = draw(st.sampled_from([1, 16, 33, 200]), "d")
    given = inputs(layout, 2, draw(st.sampled_from([1, 2]), "kv heads"), d, rows, torch.float32)
    if draw(st.booleans(), "strided"):
        given = [x if x is None else torch.stack([x, x * torch.nan], 1)[:, 0] for x in given]
    detached = draw(st.booleans(), "detached")
    assert_near(by_triton(*given, layout, d**-0.5, detached), dense(*given, layout, d**-0.5), torch.float32)


def test_what_other_segments_hold_reaches_nobody():
    tile = kernels.tile_tokens(16, torch.float32)  # only within a tile of prefix rows could NaN times 0 spread
    layout = Layout((0, 20, 40, 60), ((0, tile), (tile, tile + 30), (0, tile)))
    given = inputs(layout, 2, 1, 16, tile + 30, torch.float32)
    want = dense(*given, layout, 0.25)
    for x, rows in zip(given, (slice(20, 40),) * 3 + (slice(tile, None),) * 2 + (slice(20, 40),), strict=True):
        x[rows] = torch.nan
    got = by_triton(*given, layout, 0.25)
    for name in NAMES:
        kept = slice(0, tile) if name.startswith("prefix") else [*range(20), *range(40, 60)]
        assert error(got[name][kept], want[name][kept]) <= 2e-6
        others = slice(tile, None) if name.startswith("prefix") else slice(20, 40)
        assert got[name][others].isnan().all()


@pytest.mark.slow
def test_rows_further_apart_than_32_bits_count():
    """Of 4 GiB of which a few pages are ever touched."""
    layout, dtype = Layout((0, 20, 40), ((0, 30), (10, 40))), torch.bfloat16
    stride = 2**31 // 39 + 1
    apart = [torch.empty(39 * stride + 64, dtype=dtype).as_strided((40, 2, 16), (stride, 16, 1)) for _ in range(6)]
    given = inputs(layout, 2, 2, 16, dtype=dtype)
    for x, near in zip(apart, given, strict=True):
        x.copy_(near)
    got, want = by_triton(*apart, layout, 0.25), by_triton(*given, layout, 0.25)
    assert all(torch.equal(got[name], want[name]) for name in NAMES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spread", [1.0, 300.0])
def test_merge_equals_torch(dtype, spread):
    torch.manual_seed(0)
    out, other = torch.randn(2, 37, 3, 20).to(dtype)
    whole, other_lse = spread * torch.randn(2, 3, 50)
    lse, other_lse = whole.clone(), other_lse[:, :37].contiguous()
    want, want_lse = out.clone(), lse[:, 5:42].clone()
    module.merge(want, want_lse, other, other_lse)
    kernels.merge_attention(out, lse[:, 5:42], other, other_lse)
    assert (out.float() - want.float()).abs().max() <= (1e-6 if dtype == torch.float32 else 2e-2)
    assert (lse[:, 5:42] - want_lse).abs().max() <= 1e-6 * spread
    assert torch.equal(lse[:, :5], whole[:, :5]) and torch.equal(lse[:, 42:], whole[:, 42:])
    with pytest.raises(ValueError, match="contiguous"):
        kernels.merge_attention(out.transpose(0, 1), lse[:, :3], other.transpose(0, 1), other_lse)


def test_what_triton_cannot_serve_is_refused():
    q = torch.zeros(2, 1, 16, dtype=torch.float64)
    with pytest.raises(ValueError, match="impl 'triton': triton computes in fp32, fp16 and bf16, not torch.float64"):
        attention_forward(q, q, q, Layout((0, 2)), scale=1.0, impl="triton")
    q = torch.zeros(2, 1, 264)
    with pytest.raises(ValueError, match="impl 'triton': triton holds heads up to 256, not 264"):
        attention_forward(q, q, q, Layout((0, 2)), scale=1.0, impl="triton")
