"""Attention over own tokens and a shared prefix against the dense softmax in float64: values and every gradient."""

from __future__ import annotations

import sys
import types
from itertools import pairwise

import pytest
import torch
from dense_attention import LAYOUTS, NAMES, dense, error, inputs
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import prefix_attention as benchmark
from benchmarks.memory import body_of
from genevolve_fast.ops import Layout, attention_backward, attention_forward, attention_supported, prefix_attention

module = sys.modules["genevolve_fast.ops.prefix_attention"]  # the function has the name of its file
D = torch.float64
TOLERANCE = 1e-10
SCALE = 0.3


def by_parts(q, k, v, prefix_k, prefix_v, d_out, layout, impl="auto", scale=SCALE):
    """NAMES -> what the forward and backward pair gives."""
    kind = module.accumulator(q.dtype)
    into = None if prefix_k is None else tuple(torch.zeros_like(x, dtype=kind) for x in (prefix_k, prefix_v))
    out, lse = attention_forward(q, k, v, layout, prefix_k, prefix_v, scale=scale, impl=impl)
    grads = attention_backward(d_out, q, k, v, out, lse, layout, prefix_k, prefix_v, into, scale=scale, impl=impl)
    return dict(zip(NAMES, (out, *grads, *(into or ())), strict=False))


def assert_equal(got, want, tolerance=TOLERANCE):
    assert got.keys() == want.keys()
    for name, x in got.items():
        assert x.shape == want[name].shape
        assert error(x, want[name]) <= tolerance or (x.double() - want[name]).abs().max() <= 1e-13, name


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_forward_and_backward_equal_the_dense_softmax(name, kv_heads):
    layout = LAYOUTS[name]
    given = inputs(layout, kv_heads=kv_heads, prefix_rows=layout.prefix_rows + 2)
    assert_equal(by_parts(*given, layout), dense(*given, layout, SCALE))


@pytest.mark.parametrize("name", LAYOUTS)
def test_autograd_gives_the_prefix_its_gradients(name):
    layout = LAYOUTS[name]
    *tensors, d_out = inputs(layout)
    leaves = [x.requires_grad_() for x in tensors if x is not None]
    out = prefix_attention(*leaves[:3], layout, *leaves[3:])
    out.backward(d_out)
    want = dense(*tensors, d_out, layout, tensors[0].shape[2] ** -0.5)
    assert_equal(dict(zip(NAMES, (out.detach(), *(x.grad for x in leaves)), strict=False)), want)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_layout_into_poisoned_memory(data):
    """Lengths, ranges, heads, strides and head sizes drawn by hypothesis; torch.empty is full of NaN."""
    draw = lambda what, name: data.draw(what, label=name)  # noqa: E731
    lengths = draw(st.lists(st.integers(0, 9), max_size=6), "lengths")
    rows = draw(st.integers(0, 12), "prefix rows")
    ranges = [sorted(draw(st.tuples(st.integers(0, rows), st.integers(0, rows)), "range")) for _ in lengths]
    if draw(st.booleans(), "one range"):
        ranges = ranges[:1] * len(lengths)
    layout = Layout(tuple(sum(lengths[:i]) for i in range(len(lengths) + 1)), tuple(map(tuple, ranges)))
    groups, kv_heads = draw(st.sampled_from([1, 2, 4]), "groups"), draw(st.sampled_from([1, 3]), "kv heads")
    d, scale = draw(st.sampled_from([1, 3, 16, 20]), "d"), draw(st.sampled_from([0.1, 1.0, 4.0]), "scale")
    given = inputs(layout, groups * kv_heads, kv_heads, d, rows, seed=draw(st.integers(0, 99), "seed"))
    if draw(st.booleans(), "strided"):  # slices of a packed projection, and an upstream gradient that is expanded
        given = [x if x is None else torch.stack([x, x], 1)[:, 1] for x in given]
        given[-1] = given[-1][:, :, :1].expand_as(given[-1])
    torch.use_deterministic_algorithms(True)
    try:
        got = by_parts(*given, layout, scale=scale)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_equal(got, dense(*given, layout, scale), 1e-11)


def test_prefix_gradients_add_up_over_calls_and_the_prefix_gets_none_of_its_own():
    layouts = [Layout((0, 4, 9), ((0, 6), (0, 6))), Layout((0, 3), ((2, 9),))]
    *_, prefix_k, prefix_v, _ = inputs(layouts[0], prefix_rows=9)
    prefix_k.requires_grad_(), prefix_v.requires_grad_()
    into = torch.ones_like(prefix_k.detach()), torch.zeros_like(prefix_k.detach())
    want = [into[0].clone(), into[1].clone()]
    for seed, layout in enumerate(layouts):
        q, k, v, _, _, d_out = inputs(layout, seed=seed + 1)
        q.requires_grad_()
        prefix_attention(q, k, v, layout, prefix_k, prefix_v, scale=SCALE, prefix_grads=into).backward(d_out)
        true = dense(q, k, v, prefix_k, prefix_v, d_out, layout, SCALE)
        assert error(q.grad, true["dq"]) <= TOLERANCE
        want = [a + true[name] for a, name in zip(want, NAMES[4:], strict=True)]
    assert prefix_k.grad is None and prefix_v.grad is None
    assert all(error(a, b) <= TOLERANCE for a, b in zip(into, want, strict=True))


def test_a_detached_prefix_gets_no_gradient_and_changes_none():
    layout = LAYOUTS["several prefixes"]
    q, k, v, prefix_k, prefix_v, d_out = inputs(layout)
    out, lse = attention_forward(q, k, v, layout, prefix_k, prefix_v, scale=SCALE)
    got = attention_backward(d_out, q, k, v, out, lse, layout, prefix_k, prefix_v, scale=SCALE)
    want = dense(q, k, v, prefix_k, prefix_v, d_out, layout, SCALE)
    assert_equal(dict(zip(NAMES[1:], got, strict=False)), {n: want[n] for n in NAMES[1:4]})
    leaf = q.clone().requires_grad_()
    prefix_attention(leaf, k, v, layout, prefix_k, prefix_v, scale=SCALE).backward(d_out)
    assert error(leaf.grad, want["dq"]) <= TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision_is_as_good_as_its_rounding(dtype):
    layout = Layout((0, 40, 41, 130), ((0, 70), (0, 70), (10, 50)))
    given = inputs(layout, d=32, dtype=dtype)
    got = by_parts(*given, layout)
    assert {x.dtype for n, x in got.items() if n.startswith("prefix")} == {torch.float32}
    assert {x.dtype for n, x in got.items() if not n.startswith("prefix")} == {dtype}
    assert_equal(got, dense(*given, layout, SCALE), 1e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps)


def test_lse_is_that_of_the_whole_softmax():
    layout = LAYOUTS["mixed lengths"]
    q, k, v, prefix_k, prefix_v, _ = inputs(layout, kv_heads=4)
    _, lse = attention_forward(q, k, v, layout, prefix_k, prefix_v, scale=SCALE)
    for begin, end in pairwise(layout.cu_seqlens):
        scores = SCALE * torch.einsum("ihd,jhd->hij", q[begin:end], torch.cat([prefix_k, k[begin:end]]))
        hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(len(prefix_k) + 1)
        want = scores.masked_fill(hidden, -torch.inf).logsumexp(-1)
        assert (lse[:, begin:end] - want).abs().max() <= TOLERANCE


def test_a_part_that_weighs_nothing_leaves_the_other_exact():
    """Scores hundreds apart: the weight of one part underflows, the gradients stay those of the dense softmax."""
    layout = LAYOUTS["one segment"]
    for factor in (40.0, -40.0):
        q, k, v, prefix_k, prefix_v, d_out = inputs(layout, kv_heads=4)
        q, k, prefix_k = q.abs() + 1, k.abs(), factor * (prefix_k.abs() + 1)
        given = q, k, v, prefix_k, prefix_v, d_out
        assert_equal(by_parts(*given, layout, scale=1.0), dense(*given, layout, 1.0))


class Calls(TorchDispatchMode):
    """(queries, keys) of every flash attention, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if body := body_of(func):
            with self:
                return body(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name.startswith("_scaled_dot_product_flash"):
            q, k = args[1:3] if name.endswith("backward") else args[:2]
            self.seen.append((q.shape[2], k.shape[2]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("one segment", [(9, 9), (9, 7)]),
        ("mixed lengths", [(5, 5), (1, 1), (11, 11), (13, 13), (30, 11)]),
        ("empty segments", [(5, 5), (7, 7), (12, 6)]),
        ("several prefixes", [(4, 4), (5, 5), (1, 1), (11, 11), (9, 5), (12, 13)]),
        ("empty ranges", [(3, 3), (4, 4)]),
        ("no prefix", [(3, 3), (9, 9)]),
        ("no tokens", []),
    ],
)
def test_one_call_a_segment_and_one_for_all_that_read_the_same_rows(name, want):
    layout = LAYOUTS[name]
    with Calls() as calls:
        by_parts(*inputs(layout), layout)
    assert calls.seen == 2 * want


def test_nothing_but_its_inputs_and_one_number_a_head_is_saved():
    layout = LAYOUTS["several prefixes"]
    *tensors, _ = inputs(layout)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        out = prefix_attention(*(x.requires_grad_() for x in tensors[:3]), layout, *tensors[3:])
    known = {x.data_ptr() for x in (*tensors, out)}
    others = [tuple(x.shape) for x in saved if x.data_ptr() not in known]
    assert len(saved) == 7 and others == [(4, layout.tokens)]


def test_the_operators_keep_their_promises():
    layout = LAYOUTS["several prefixes"]
    q, k, v, prefix_k, prefix_v, d_out = inputs(layout)
    numbers = module._numbers(layout)
    out, lse = module._forward(q, k, v, prefix_k, prefix_v, *numbers, SCALE, "torch")
    check = ("test_schema", "test_faketensor")
    torch.library.opcheck(module._forward, (q, k, v, prefix_k, prefix_v, *numbers, SCALE, "torch"), test_utils=check)
    into = torch.zeros_like(prefix_k), torch.zeros_like(prefix_v)
    for grads in (into, (None, None)):
        args = (d_out, q, k, v, out, lse, prefix_k, prefix_v, *grads, *numbers, SCALE, "torch")
        torch.library.opcheck(module._backward, args, test_utils=check)


@pytest.mark.slow
@pytest.mark.parametrize("accumulates", [False, True])
def test_compiles_without_a_graph_break(accumulates):
    def loss(q, k, v, prefix_k, prefix_v, d_out, layout, into):
        return (prefix_attention(q, k, v, layout, prefix_k, prefix_v, prefix_grads=into) * d_out).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for name in ("several prefixes", "mixed lengths"):  # the second one with other numbers
        layout = LAYOUTS[name]
        *tensors, d_out = inputs(layout)
        results = []
        for run in (loss, compiled):
            leaves = [x.detach().clone().requires_grad_() for x in tensors]
            into = tuple(torch.ones_like(x) for x in tensors[3:]) if accumulates else None
            run(*leaves, d_out, layout, into).backward()
            results.append([*(x.grad for x in leaves[:3]), *(into or (x.grad for x in leaves[3:]))])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# --- the GPU's flash attentions: their calls, answered by the CPU's ---------------------------------------------------


def packed_forward(q, k, v, cu_q, cu_k, max_q, max_k, causal, scale):
    """What flash attention says of itself: sequences [cu[i], cu[i + 1]), lse [heads, queries]; out has q's strides."""
    pairs = sequences(cu_q, cu_k, max_q, max_k)
    parts = [module._cpu_forward(q[a], k[b], v[b], causal, scale) for a, b in pairs]
    out = torch.empty_like(q).copy_(torch.cat([p[0] for p in parts]))
    return out, torch.cat([p[1] for p in parts], 1)


def packed_backward(d_out, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, causal, scale):
    assert lse.is_contiguous() and lse.shape == (q.shape[1], len(q))
    parts = [
        module._cpu_backward(d_out[a], q[a], k[b], v[b], out[a], lse[:, a], causal, scale)
        for a, b in sequences(cu_q, cu_k, max_q, max_k)
    ]
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def sequences(cu_q, cu_k, max_q, max_k):
    assert cu_q.dtype == cu_k.dtype == torch.int32 and len(cu_q) == len(cu_k)
    assert int(cu_q.diff().max()) == max_q and int(cu_k.diff().max()) == max_k
    borders = [[slice(a, b) for a, b in pairwise(x.tolist())] for x in (cu_q, cu_k)]
    return list(zip(*borders, strict=True))


@pytest.fixture
def torch_flash(monkeypatch):
    """torch's own operators, with an implementation for CPUs."""
    library = torch.library.Library("aten", "IMPL")

    def forward(q, k, v, cu_q, cu_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, *, scale=None, **_):
        assert dropout_p == 0 and not return_debug_mask
        nothing = torch.empty(0)
        return *packed_forward(q, k, v, cu_q, cu_k, max_q, max_k, is_causal, scale), nothing, nothing, nothing

    def backward(
        d_out, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, dropout_p, is_causal, rng_state, unused, *, scale=None, **_
    ):
        assert dropout_p == 0 and rng_state.dtype == torch.uint64
        return packed_backward(d_out, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, is_causal, scale)

    library.impl("_flash_attention_forward", forward, "CPU")
    library.impl("_flash_attention_backward", backward, "CPU")
    monkeypatch.setattr(module._Flash, "reason", staticmethod(lambda *_: None))
    yield
    library._destroy()


@pytest.fixture
def flash_attn_package(monkeypatch):
    """The two functions of flash-attn 2.8 that are called, with their signatures."""
    package, interface = types.ModuleType("flash_attn"), types.ModuleType("flash_attn.flash_attn_interface")

    def _flash_attn_varlen_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False,
        block_table=None, leftpad_k=None, seqused_k=None, zero_tensors=False,
    ):  # fmt: skip
        assert dropout_p == 0
        numbers = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, softmax_scale
        return *packed_forward(q, k, v, *numbers), None, None

    def _flash_attn_varlen_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
        softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic,
        rng_state=None, zero_tensors=False,
    ):  # fmt: skip
        assert (dropout_p, window_size_left, window_size_right, softcap, alibi_slopes) == (0, -1, -1, 0, None)
        numbers = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, softmax_scale
        for into, x in zip((dq, dk, dv), packed_backward(dout, q, k, v, out, softmax_lse, *numbers), strict=True):
            into.copy_(x)

    interface._flash_attn_varlen_forward = _flash_attn_varlen_forward
    interface._flash_attn_varlen_backward = _flash_attn_varlen_backward
    package.flash_attn_interface = interface
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", interface)
    monkeypatch.setattr(module._FlashAttn, "reason", staticmethod(lambda *_: None))


@pytest.mark.parametrize("impl", ["flash", "flash_attn"])
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("heads_first", [False, True])
def test_the_calls_of_the_gpu_flash_attentions(impl, name, heads_first, request):
    request.getfixturevalue({"flash": "torch_flash", "flash_attn": "flash_attn_package"}[impl])
    layout = LAYOUTS[name]
    given = inputs(layout)
    if heads_first:  # as transformers lays them out
        given = [x if x is None else x.transpose(0, 1).contiguous().transpose(0, 1) for x in given]
    got = by_parts(*given, layout, impl=impl)
    assert_equal(got, dense(*given, layout, SCALE))
    assert all(got[n].is_contiguous() for n in NAMES[:4])


def test_torch_knows_the_shapes_of_the_calls():
    layout = LAYOUTS["several prefixes"]
    q, k, v, prefix_k, prefix_v, d_out = (x.to("meta") for x in inputs(layout, dtype=torch.bfloat16))
    part, lse = module._Flash.causal(q, k, v, layout, SCALE)
    assert part.shape == q.shape and lse.shape == (q.shape[1], len(q)) and lse.dtype == torch.float32
    part, lse = module._Flash.full(q, prefix_k, prefix_v, SCALE)
    assert part.shape == q.shape and lse.shape == (q.shape[1], len(q)) and lse.dtype == torch.float32
    for run in ("causal_backward", "full_backward"):
        keys = (k, v) if run == "causal_backward" else (prefix_k, prefix_v)
        more = (layout,) if run == "causal_backward" else ()
        grads = getattr(module._Flash, run)(d_out, q, *keys, q, lse, *more, SCALE)
        assert [x.shape for x in grads] == [q.shape, keys[0].shape, keys[1].shape]


@pytest.mark.slow
def test_the_benchmark_runs_at_toy_size_and_writes_nothing(tmp_path, capsys):
    assert benchmark.main(["--dry-run", "--file", str(tmp_path / "rows.json")]) == 0
    printed = capsys.readouterr().out
    assert printed.count("repeated") == 16 and "float64 against the dense softmax" in printed
    assert not any(tmp_path.iterdir())


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cu_seqlens", "ranges", "match"),
    [
        ((1, 3), (), "cu_seqlens must rise from 0"),
        ((0, 3, 2), (), "cu_seqlens must rise from 0"),
        ((), (), "cu_seqlens must rise from 0"),
        ((0, 3), ((0, 1), (0, 1)), "prefix_ranges must be one for each of 1 segments, got 2"),
        ((0, 3), ((2, 1),), r"prefix_ranges must be \(start, stop\)"),
        ((0, 3), ((-1, 1),), r"prefix_ranges must be \(start, stop\)"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(cu_seqlens, ranges, match):
    with pytest.raises(ValueError, match=match):
        Layout(cu_seqlens, ranges)


def test_wrong_arguments_are_named():
    layout = Layout((0, 4), ((0, 3),))
    q, k, v, prefix_k, prefix_v, d_out = inputs(layout)
    f = lambda *args, **more: attention_forward(*args, scale=1.0, **more)  # noqa: E731
    wrong = {
        r"q must be \[4, heads, d\]": (q[:3], k, v, layout, prefix_k, prefix_v),
        r"k must be \[4, kv_heads, 8\] with kv_heads a divisor of 4": (q, k.repeat(1, 2, 1)[:, :3], v, layout),
        r"v must be \[4, 2, 8\] as k": (q, k, v[:, :1], layout, prefix_k, prefix_v),
        "prefix_k and prefix_v belong together": (q, k, v, layout, prefix_k),
        "reads 3 prefix rows": (q, k, v, layout),
        r"prefix_ranges is empty": (q, k, v, Layout((0, 4)), prefix_k, prefix_v),
        r"prefix_k must be \[3 or more, 2, 8\]": (q, k, v, layout, prefix_k[:2], prefix_v[:2]),
        "prefix_v must have 3 rows": (q, k, v, layout, prefix_k, torch.cat([prefix_v, prefix_v])),
        "v must be torch.float64": (q, k, v.float(), layout, prefix_k, prefix_v),
        "prefix_k must be torch.float64": (q, k, v, layout, prefix_k.float(), prefix_v),
    }
    for match, args in wrong.items():
        with pytest.raises(ValueError, match=match):
            f(*args)
    out, lse = f(q, k, v, layout, prefix_k, prefix_v)
    transposed = prefix_k.mT.contiguous().mT
    results = {
        "d_out must be": (d_out[:2], q, k, v, out, lse, layout, prefix_k, prefix_v),
        "lse must be": (d_out, q, k, v, out, lse.float(), layout, prefix_k, prefix_v),
        "prefix_grads must be": (d_out, q, k, v, out, lse, layout, prefix_k, prefix_v, (prefix_k.float(),) * 2),
        "prefix_grads must have unit": (d_out, q, k, v, out, lse, layout, prefix_k, prefix_v, (transposed,) * 2),
        "prefix_grads takes": (d_out, q, k, v, out, lse, Layout((0, 4)), None, None, (prefix_k, prefix_v)),
    }
    for match, args in results.items():
        with pytest.raises(ValueError, match=match):
            attention_backward(*args, scale=1.0)
    with pytest.raises(ValueError, match="prefix_grads takes"):
        prefix_attention(q, k, v, Layout((0, 4)), prefix_grads=(prefix_k, prefix_v))


@pytest.mark.parametrize(
    ("impl", "device", "dtype", "d", "want"),
    [
        ("torch", "cpu", torch.bfloat16, 128, None),
        ("torch", "cuda", torch.bfloat16, 128, "torch is for CPUs, q is on cuda"),
        ("torch", "cpu", torch.int64, 128, "torch computes in fp64, fp32, bf16 and fp16, not torch.int64"),
        ("flash", "cpu", torch.bfloat16, 128, "flash needs a GPU, q is on cpu"),
        ("triton", "cpu", torch.float64, 128, "triton computes in fp32, fp16 and bf16"),
        ("triton", "cpu", torch.float32, 264, "triton holds heads up to 256, not 264"),
        ("flash_attn", "cpu", torch.bfloat16, 128, "flash_attn needs a GPU, q is on cpu"),
        ("auto", "cpu", torch.float32, 20, None),
        ("fast", "cpu", torch.bfloat16, 128, "impl must be one of auto, torch, flash, triton, flash_attn, not 'fast'"),
    ],
)
def test_an_implementation_that_cannot_serve_says_why(impl, device, dtype, d, want):
    got = attention_supported(impl, device, dtype, d)
    assert got is None if want is None else want in got
    if want is not None and device == "cpu":
        q = torch.zeros(2, 2, d, dtype=dtype)
        with pytest.raises(ValueError, match=want.replace("(", r"\(")):
            attention_forward(q, q, q, Layout((0, 2)), scale=1.0, impl=impl)


@pytest.mark.parametrize(
    ("dtype", "d", "want"),
    [
        (torch.float32, 128, "computes in fp16 and bf16, not torch.float32"),
        (torch.bfloat16, 20, "needs heads of a multiple of 8 up to 256, not 20"),
        (torch.bfloat16, 264, "needs heads of a multiple of 8 up to 256, not 264"),
    ],
)
def test_what_flash_attention_cannot_do(dtype, d, want):
    assert want in module._flash_reason("flash", torch.device("cuda"), dtype, d)


@pytest.mark.parametrize(
    ("capability", "d", "refused"),
    [((7, 5), 128, True), ((8, 0), 256, False), ((8, 9), 256, True), ((8, 9), 128, False), ((9, 0), 256, False)],
)
def test_what_a_gpu_cannot_do(capability, d, refused, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    reason = module._flash_reason("flash", torch.device("cuda"), torch.bfloat16, d)
    assert (reason is not None) == refused


def test_where_nothing_can_serve_all_reasons_are_given():
    q = torch.zeros(2, 2, 8, dtype=torch.float64, device="meta")
    with pytest.raises(ValueError, match="impl 'auto': torch is .*; flash needs .*; triton computes .*; flash_attn "):
        attention_forward(q, q, q, Layout((0, 2)), scale=1.0)
