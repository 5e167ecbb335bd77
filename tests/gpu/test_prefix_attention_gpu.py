"""Attention over shared prefixes on a GPU: every backend against float64, no synchronisation, graph capture, size.

The checks of values also run on a CPU, at toy shapes and with torch's implementation, so that they are known to work.
"""

from __future__ import annotations

import sys

import pytest
import torch
from dense_attention import LAYOUTS, NAMES, dense, error, inputs

from genevolve_fast.ops import Layout, attention_backward, attention_forward, attention_supported, prefix_attention

module = sys.modules["genevolve_fast.ops.prefix_attention"]
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
gpu_only = pytest.mark.skipif(not GPU, reason="needs a GPU")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# heads, kv_heads, d: the field's, one KV head, odd heads
HEADS = [(32, 8, 128), (4, 1, 256), (6, 2, 80), (4, 4, 20)] if GPU else [(4, 2, 16), (4, 1, 20)]
CASES = [(torch.bfloat16, h) for h in HEADS] + [(torch.float32, HEADS[0]), (torch.float32, HEADS[-1])]
CASES += [(torch.float16, HEADS[0])]
LARGE = {
    "a group": Layout((0, 700, 701, 1500, 1500, 2300), ((0, 1025),) * 5),
    "two prefixes": Layout((0, 300, 900, 1300, 1301), ((0, 600), (0, 600), (600, 1700), (600, 1650))),
    "no prefix": Layout((0, 1000, 1001, 2100)),
}
SHAPES = LAYOUTS | (LARGE if GPU else {})
RUNNING = [i for i in module.IMPLEMENTATIONS if any(attention_supported(i, DEVICE, t, 128) is None for t in DTYPES)]


def skip_unless_supported(impl, dtype, d):
    if reason := attention_supported(impl, DEVICE, dtype, d):
        pytest.skip(reason)


def by_parts(q, k, v, prefix_k, prefix_v, d_out, layout, scale, impl):
    """NAMES -> what the forward and backward pair gives."""
    into = None if prefix_k is None else tuple(torch.zeros_like(x, dtype=torch.float32) for x in (prefix_k, prefix_v))
    out, lse = attention_forward(q, k, v, layout, prefix_k, prefix_v, scale=scale, impl=impl)
    grads = attention_backward(d_out, q, k, v, out, lse, layout, prefix_k, prefix_v, into, scale=scale, impl=impl)
    return dict(zip(NAMES, (out, *grads, *(into or ())), strict=False))


def assert_near(got, want, dtype):
    bound = 2e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    for name, x in got.items():
        floor = bound * want["dv"].abs().amax() if want["dv"].numel() else 0  # dq of what sees one key is 0
        small = not x.numel() or (x.double() - want[name]).abs().max() <= 0.1 * floor
        assert small or error(x, want[name]) <= bound, (name, error(x, want[name]))


@pytest.mark.parametrize("impl", RUNNING)
@pytest.mark.parametrize(("dtype", "shape"), CASES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_values_and_gradients_against_float64(impl, dtype, shape, name):
    heads, kv_heads, d = shape
    skip_unless_supported(impl, dtype, d)
    layout = SHAPES[name]
    given = inputs(layout, heads, kv_heads, d, layout.prefix_rows + 3, dtype, DEVICE)
    assert_near(by_parts(*given, layout, d**-0.5, impl), dense(*given, layout, d**-0.5), dtype)


@pytest.mark.parametrize("impl", RUNNING)
def test_strides_of_a_packed_projection_change_no_bit_of_out(impl):
    dtype = torch.bfloat16
    skip_unless_supported(impl, dtype, 64)
    layout = LAYOUTS["several prefixes"]
    q, k, v, prefix_k, prefix_v, d_out = inputs(layout, 4, 2, 64, dtype=dtype, device=DEVICE)
    packed = torch.cat([q, k, v], 1)
    views = packed[:, :4], packed[:, 4:6], packed[:, 6:]
    got = by_parts(*views, prefix_k, prefix_v, d_out, layout, 0.1, impl)
    want = by_parts(q, k, v, prefix_k, prefix_v, d_out, layout, 0.1, impl)
    assert torch.equal(got["out"], want["out"])
    assert all(error(got[n], want[n].double()) <= 1e-2 for n in NAMES)


@gpu_only
@pytest.mark.parametrize("dtype", DTYPES)
def test_triton_repeats_itself_bit_for_bit(dtype):
    skip_unless_supported("triton", dtype, 128)
    layout = LARGE["two prefixes"]
    given = inputs(layout, 8, 2, 128, dtype=dtype, device=DEVICE)
    first = by_parts(*given, layout, 0.1, "triton")
    for _ in range(5):
        again = by_parts(*given, layout, 0.1, "triton")
        assert all(torch.equal(first[n], again[n]) for n in NAMES)


@gpu_only
def test_auto_is_flash_where_it_serves_and_triton_elsewhere():
    empty = lambda dtype, d: torch.empty(1, 1, d, dtype=dtype, device=DEVICE)  # noqa: E731
    assert module.choose("auto", empty(torch.bfloat16, 128)) == "flash"
    assert module.choose("auto", empty(torch.float32, 128)) == "triton"
    assert module.choose("auto", empty(torch.bfloat16, 20)) == "triton"


@gpu_only
@pytest.mark.parametrize("impl", RUNNING)
def test_no_synchronisation(impl):
    skip_unless_supported(impl, torch.bfloat16, 64)
    layouts = [LARGE["a group"], LARGE["two prefixes"], Layout((0, 11, 30), ((0, 5), (0, 5)))]
    given = [inputs(x, 4, 2, 64, dtype=torch.bfloat16, device=DEVICE) for x in layouts]
    by_parts(*given[0], layouts[0], 0.1, impl)  # what is loaded and compiled the first time may wait
    by_parts(*given[1], layouts[1], 0.1, impl)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for layout, tensors in zip(layouts, given, strict=True):  # the last one is new: its borders are copied
            by_parts(*tensors, layout, 0.1, impl)
            *leaves, d_out = (x.detach().requires_grad_() for x in tensors)
            prefix_attention(*leaves[:3], layout, *leaves[3:], impl=impl).backward(d_out.detach())
    finally:
        torch.cuda.set_sync_debug_mode("default")


@gpu_only
@pytest.mark.parametrize("impl", RUNNING)
def test_graph_capture(impl):
    skip_unless_supported(impl, torch.bfloat16, 64)
    layout = LARGE["two prefixes"]
    given = inputs(layout, 4, 2, 64, dtype=torch.bfloat16, device=DEVICE)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            by_parts(*given, layout, 0.1, impl)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = by_parts(*given, layout, 0.1, impl)
    for x in given:
        x.copy_(torch.randn_like(x))
    graph.replay()
    torch.cuda.synchronize()
    want = dense(*given, layout, 0.1)
    assert_near(captured, want, torch.bfloat16)


@gpu_only
@pytest.mark.parametrize("impl", RUNNING)
def test_more_than_two_to_the_31_numbers(impl):
    """524 288 tokens and more of 32 heads of 128: the last segment is that segment alone."""
    heads, kv_heads, d, length = 32, 8, 128, 4096
    skip_unless_supported(impl, torch.bfloat16, d)
    count = 524_288 // length + 1
    tokens = count * length
    if torch.cuda.mem_get_info()[0] < 28 * tokens * heads * d:
        pytest.skip("needs 57 GiB of GPU memory")
    torch.manual_seed(0)
    new = lambda n, h: torch.randn(n, h, d, dtype=torch.bfloat16, device=DEVICE)  # noqa: E731
    q, k, v, d_out = new(tokens, heads), new(tokens, kv_heads), new(tokens, kv_heads), new(tokens, heads)
    prefix_k, prefix_v = new(100, kv_heads), new(100, kv_heads)
    layout = Layout(tuple(range(0, tokens + 1, length)), ((0, 100),) * count)
    got = by_parts(q, k, v, prefix_k, prefix_v, d_out, layout, d**-0.5, impl)
    last = slice(tokens - length, tokens)
    alone = Layout((0, length), ((0, 100),))
    want = by_parts(q[last], k[last], v[last], prefix_k, prefix_v, d_out[last], alone, d**-0.5, impl)
    for name in NAMES[:4]:
        assert error(got[name][last], want[name].double()) <= 1e-2, name
