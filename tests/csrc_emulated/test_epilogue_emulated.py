"""The CUDA epilogues on an emulated GPU, through the C entry points and the ctypes wrappers, against float64."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from emulation import (
    DISTRIBUTIONS,
    OPTIONS,
    ORDERS,
    SOURCE,
    Laid,
    check_gradient,
    check_softmax,
    compile_for_host,
    options_of,
    targets_of,
    truth,
    upstream_of,
)  # fmt: skip
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from genevolve_fast.ops import Objective, SamplingMask, csrc, linear_grpo_sdl, linear_logprob
from genevolve_fast.ops.csrc import d_logits_epilogue, softmax_d_logits_epilogue, softmax_epilogue
from genevolve_fast.ops.epilogues import Upstream

pytestmark = [pytest.mark.slow, pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CAPABILITIES = (80, 90)
IN_TWO, IN_EIGHT = 32003, 113_001  # columns of rows that two and eight blocks share


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    return compile_for_host(tmp_path_factory.mktemp("csrc") / "libemulated.so")


@pytest.fixture
def gpu(compiled, monkeypatch):
    """The emulated library in the place of the installed one."""
    monkeypatch.setattr(csrc, "installed", lambda: compiled)
    compiled.configure()
    torch.manual_seed(0)
    return compiled


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
@pytest.mark.parametrize(
    "vocabulary", [1, 7, 97, 333, 1000, 4099, *(pytest.param(v, marks=pytest.mark.slow) for v in (IN_TWO, 152_064))]
)
def test_softmax_against_float64(gpu, kind, vocabulary):
    rows = 5 if vocabulary < 5000 else 2
    products, targets = DISTRIBUTIONS[kind](rows, vocabulary), targets_of(rows, vocabulary)
    targets[-1] = products[-1].argmax()
    check_softmax(softmax_epilogue(products, targets), truth(products, targets))


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("kind", DISTRIBUTIONS)
@pytest.mark.parametrize(
    "vocabulary", [1, 7, 97, 1000, *(pytest.param(v, marks=pytest.mark.slow) for v in (IN_TWO, 151_936))]
)
def test_softmax_and_gradient_in_one_launch(gpu, capability, kind, vocabulary):
    gpu.configure(capability)
    rows = 5 if vocabulary < 5000 else 1
    products, targets = DISTRIBUTIONS[kind](rows, vocabulary), targets_of(rows, vocabulary)
    up, out = upstream_of(("logps", "lse", "entropy"), rows), Laid.out(products)
    want = truth(products, targets, [up])
    check_softmax(softmax_d_logits_epilogue(products, targets, [(out.view, up)]), want)
    check_gradient(out.view, want)
    assert gpu.counts().launches == 1


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("used", [("logps",), ("lse",), ("entropy",), ("logps", "lse", "entropy"), ()])
def test_every_option_and_upstream(gpu, name, used):
    rows, vocabulary = 5, 333
    products, targets, options = 4 * torch.randn(rows, vocabulary), targets_of(rows, vocabulary), None
    options, up = options_of(name, rows, vocabulary), upstream_of(used, rows)
    want = truth(products, targets, [up], **options)
    softmax = softmax_epilogue(products, targets, **options)
    check_softmax(softmax, want)
    out = Laid.out(products)
    d_logits_epilogue(products, targets, softmax, [(out.view, up)], **options)
    check_gradient(out.view, want)
    for capability in CAPABILITIES:
        gpu.configure(capability)
        out.view.fill_(torch.nan)
        softmax_d_logits_epilogue(products, targets, [(out.view, up)], **options)
        check_gradient(out.view, want)


@pytest.mark.parametrize("rows", [0, 1, 5])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_rows(gpu, rows, capability):
    gpu.configure(capability)
    products, targets, up = torch.randn(rows, 97), targets_of(rows, 97), upstream_of(("logps",), rows)
    want, out = truth(products, targets, [up]), Laid.out(products)
    softmax = softmax_epilogue(products, targets)
    assert all(x.shape == (rows,) for x in softmax)
    d_logits_epilogue(products, targets, softmax, [(out.view, up)])
    check_gradient(out.view, want)
    check_softmax(softmax_d_logits_epilogue(products, targets, [(out.view, up)]), want)
    check_gradient(out.view, want)


@pytest.mark.slow
@settings(max_examples=99, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_shape_stride_alignment_dtype_and_order(gpu, data):
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 2**20)))
    rows, vocabulary = draw(st.integers(1, 4)), draw(st.integers(1, 700))
    gpu.configure(draw(st.sampled_from(CAPABILITIES)), draw(st.sampled_from(sorted(ORDERS))), draw(st.integers(0, 9)))
    values = draw(st.sampled_from(sorted(DISTRIBUTIONS)))
    products = Laid.filled(DISTRIBUTIONS[values](rows, vocabulary), draw(st.integers(0, 4)), draw(st.integers(0, 9)))
    options = options_of(draw(st.sampled_from(OPTIONS)), rows, vocabulary)
    names = st.sets(st.sampled_from(("logps", "lse", "entropy")))
    ups = [upstream_of(sorted(draw(names)), rows) for _ in range(draw(st.integers(1, 2)))]
    targets = torch.randint(-1, vocabulary + 1, (rows,))
    want = truth(products.view, targets, ups, **options)
    outs = [
        Laid.out(products.view, draw(st.integers(0, 9)), draw(st.integers(0, 9)), draw(st.sampled_from(DTYPES)))
        for _ in ups
    ]
    pairs = [(out.view, up) for out, up in zip(outs, ups, strict=True)]
    before = products.view.clone()
    if draw(st.booleans()):
        check_softmax(softmax_d_logits_epilogue(products.view, targets, pairs, **options), want)
    else:
        softmax = softmax_epilogue(products.view, targets, **options)
        check_softmax(softmax, want)
        d_logits_epilogue(products.view, targets, softmax, pairs, **options)
    for which, out in enumerate(outs):
        check_gradient(out.view, want, which)
        assert out.untouched_around()
    assert products.untouched_around() and torch.equal(products.view, before)


# --- overlays ---------------------------------------------------------------------------------------------------------


def overlaid(laid: Laid, dtype: torch.dtype) -> torch.Tensor:
    """The products' own rows, or the left half of them in 16 bits."""
    rows, vocabulary = laid.view.shape
    wide = 4 // dtype.itemsize
    return laid.buffer.view(dtype).as_strided(
        (rows, vocabulary), (laid.view.stride(0) * wide, 1), laid.view.storage_offset() * wide
    )


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary, offset, padding", [(9000, 0, 0), (4099, 0, 0), (1000, 3, 2)])
def test_results_may_overlay_the_products(gpu, order, dtype, vocabulary, offset, padding):
    rows = 2
    products, targets = 3 * torch.randn(rows, vocabulary), targets_of(rows, vocabulary)
    up, apart = upstream_of(("logps", "entropy"), rows), Laid.out(products, dtype=dtype)
    softmax = softmax_epilogue(products, targets)
    d_logits_epilogue(products, targets, softmax, [(apart.view, up)])
    check_gradient(apart.view, truth(products, targets, [up]))
    for capability in (None, *CAPABILITIES):
        gpu.configure(capability or 80, order, seed=3)
        laid = Laid.filled(products, offset, padding)
        out = overlaid(laid, dtype)
        if capability is None:
            d_logits_epilogue(laid.view, targets, softmax, [(out, up)])
        else:
            again = softmax_d_logits_epilogue(laid.view, targets, [(out, up)])
            assert all(map(torch.equal, again, softmax))
        assert torch.equal(out, apart.view)
        assert laid.untouched_around()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("vocabulary, blocks", [(IN_TWO, 2), (IN_EIGHT, 8)])
def test_a_cluster_shares_the_row(gpu, order, vocabulary, blocks):
    gpu.configure(90, order, seed=5)
    products, targets = 3 * torch.randn(2, vocabulary), torch.tensor([vocabulary - 1, vocabulary // 2])
    ups = [upstream_of(("logps",), 2), upstream_of(("entropy",), 2)]
    want, laid = truth(products, targets, ups), Laid.filled(products)
    out, second = overlaid(laid, torch.bfloat16), Laid.out(products, dtype=torch.bfloat16)
    check_softmax(softmax_d_logits_epilogue(laid.view, targets, [(out, ups[0]), (second.view, ups[1])]), want)
    assert gpu.counts().cluster == blocks
    check_gradient(out, want, 0)
    check_gradient(second.view, want, 1)
    assert laid.untouched_around() and second.untouched_around()


def test_two_upstreams_give_what_each_gives_alone(gpu):
    products, targets = 3 * torch.randn(3, 1000), targets_of(3, 1000)
    ups = [upstream_of(("logps", "lse"), 3), upstream_of(("entropy",), 3)]
    softmax = softmax_epilogue(products, targets)
    alone = [torch.empty(3, 1000, dtype=torch.bfloat16) for _ in ups]
    for out, up in zip(alone, ups, strict=True):
        d_logits_epilogue(products, targets, softmax, [(out, up)])
    for capability in (None, *CAPABILITIES):
        laid, second = Laid.filled(products), torch.full((3, 1000), torch.nan, dtype=torch.bfloat16)
        pairs = [(overlaid(laid, torch.bfloat16), ups[0]), (second, ups[1])]
        gpu.configure(capability or 90, "backwards")
        if capability is None:
            d_logits_epilogue(laid.view, targets, softmax, pairs)
        else:
            softmax_d_logits_epilogue(laid.view, targets, pairs)
        assert all(torch.equal(out, want) for (out, _), want in zip(pairs, alone, strict=True))


# --- bits, traffic, launches ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocabulary", [97, 4099, IN_TWO, pytest.param(IN_EIGHT, marks=pytest.mark.slow)])
def test_equal_rows_give_equal_bits_wherever_they_stand(gpu, vocabulary):
    """Whatever the row's alignment, the entry point, the launch and the order of threads."""
    products = torch.randn(1, vocabulary).mul_(5).expand(3, -1)
    targets, out = torch.full((3,), 17), torch.empty(3, vocabulary)
    odd = Laid.filled(products, offset=1, padding=1 - vocabulary % 2)  # odd strides: every row at its own alignment
    seen = []
    for laid in (Laid.filled(products), odd):
        seen.append(softmax_epilogue(laid.view, targets))
        for capability in CAPABILITIES:
            gpu.configure(capability, "shuffled", seed=capability)
            pairs = [(out, Upstream(logps=torch.ones(3)))]
            seen.append(softmax_d_logits_epilogue(laid.view, targets, pairs))
    for rows in seen:
        assert all((x == y[0]).all() for x, y in zip(rows, seen[0], strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_traffic(gpu, dtype):
    rows, vocabulary = 2, IN_TWO + 13  # a multiple of 16
    products, targets = torch.randn(rows, vocabulary), targets_of(rows, vocabulary)
    row, targets_read = 4 * products.numel(), 4 * rows
    out, up = torch.empty(rows, vocabulary, dtype=dtype), Upstream(logps=torch.ones(rows))
    softmax = softmax_epilogue(products, targets)
    counts = gpu.counts()
    assert (counts.bytes_read, counts.wide_reads) == (row + targets_read, row // 16)
    for capability, reads in ((90, 1), (80, 2)):
        gpu.configure(capability)
        softmax_d_logits_epilogue(products, targets, [(out, up)])
        counts = gpu.counts()
        assert counts.launches == 1 and counts.cluster == (2 if capability == 90 else 0)
        assert (counts.bytes_read, counts.wide_reads) == (reads * row + targets_read, reads * row // 16)
        assert (counts.bytes_written, counts.wide_writes) == (out.nbytes, out.nbytes // 16)
    gpu.configure()
    d_logits_epilogue(products, targets, softmax, [(out, up)])
    counts = gpu.counts()
    assert (counts.bytes_read, counts.wide_reads, counts.wide_writes) == (row, row // 16, out.nbytes // 16)


def test_rows_are_addressed_in_64_bits(gpu, tmp_path):
    stride = 2**31 + 16  # elements, of a file that is all hole
    memory = torch.from_file(str(tmp_path / "rows"), shared=True, size=stride + 128)
    products = memory.as_strided((2, 97), (stride, 1))
    products.copy_(torch.randn(2, 97))
    targets, up = targets_of(2, 97), upstream_of(("logps",), 2)
    want, before = truth(products, targets, [up]), products.clone()
    half = products.view(torch.bfloat16)[:, :97]
    for capability in CAPABILITIES:
        gpu.configure(capability)
        products.copy_(before)
        softmax = softmax_d_logits_epilogue(products, targets, [(half, up)])
        check_softmax(softmax, want)
        check_gradient(half, want)
    products.copy_(before)
    d_logits_epilogue(products, targets, softmax, [(half, up)])
    check_gradient(half, want)


def test_a_row_too_long_for_shared_memory_is_read_twice(gpu):
    gpu.configure(90, shared_limit=60 << 10)
    products, targets, up = torch.randn(1, IN_TWO), targets_of(1, IN_TWO), upstream_of(("logps",), 1)
    want, out = truth(products, targets, [up]), Laid.out(products)
    check_softmax(softmax_d_logits_epilogue(products, targets, [(out.view, up)]), want)
    check_gradient(out.view, want)
    assert gpu.counts().cluster == 0


# --- odd inputs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_banned_columns_and_nan(gpu, capability):
    gpu.configure(capability)
    products, targets = torch.randn(3, 333), torch.tensor([5, 6, 7])
    products[:, 16:64] = -torch.inf
    products[1, 100] = torch.nan
    up, out = upstream_of(("logps", "lse", "entropy"), 3), Laid.out(products)
    got = softmax_d_logits_epilogue(products, targets, [(out.view, up)])
    assert all(x[1].isnan() for x in (got.logps, got.log_sum, got.entropy)) and out.view[1].isnan().all()
    kept, clean = torch.tensor([0, 2]), [*range(16), *range(64, 333)]
    want = truth(products[kept][:, clean], targets[kept], [Upstream(*(g[kept] for g in up))])
    check_softmax(csrc.SoftmaxRows(*(x[kept] for x in got)), want)
    check_gradient(out.view[kept][:, clean], want)
    assert (out.view[kept, 16:64] == 0).all()


def test_ascending_and_huge_logits(gpu):
    products = torch.stack([torch.linspace(-80, 80, 4099), 1e30 * torch.randn(4099), torch.full((4099,), -3e38)])
    targets = products.argmax(1)
    got, want = softmax_epilogue(products, targets), truth(products, targets)
    assert torch.isfinite(torch.stack(got)).all()
    assert ((got.logps - want.values[0]).abs() <= 1e-5).all() and ((got.entropy - want.values[2]).abs() <= 1e-5).all()


def test_wrong_inputs_are_named(gpu):
    x, y = torch.randn(3, 8), torch.zeros(3, dtype=torch.int64)
    softmax, up = softmax_epilogue(x, y), Upstream(logps=torch.ones(3))
    wide = torch.zeros(3, 24)
    for name, call in (
        ("products must be fp32", lambda: softmax_epilogue(x.double(), y)),
        ("products must be fp32", lambda: softmax_epilogue(torch.zeros(8, 3).T, y)),
        ("at least one column", lambda: softmax_epilogue(x[:, :0], y)),
        ("targets", lambda: softmax_epilogue(x, y[:2])),
        ("targets must be int64", lambda: softmax_epilogue(x, y.int())),
        ("products must be on a cpu", lambda: softmax_epilogue(x.to("meta"), y)),
        ("targets is on meta", lambda: softmax_epilogue(x, y.to("meta"))),
        ("bias", lambda: softmax_epilogue(x, y, bias=torch.zeros(7))),
        ("bias must be float32 or bfloat16 or float16", lambda: softmax_epilogue(x, y, bias=torch.zeros(8).double())),
        ("temperature must be positive", lambda: softmax_epilogue(x, y, temperature=0.0)),
        ("temperature must be", lambda: softmax_epilogue(x, y, temperature=torch.ones(4))),
        ("softcap", lambda: softmax_epilogue(x, y, softcap=0.0)),
        ("one or two", lambda: d_logits_epilogue(x, y, softmax, [])),
        ("out must be", lambda: d_logits_epilogue(x, y, softmax, [(x[:, :4], up)])),
        ("out must be float32", lambda: d_logits_epilogue(x, y, softmax, [(x.double(), up)])),
        ("unit column stride", lambda: d_logits_epilogue(x, y, softmax, [(torch.zeros(8, 3).T, up)])),
        ("upstream logps", lambda: d_logits_epilogue(x, y, softmax, [(x, Upstream(torch.ones(2)))])),
        ("out's rows overlap", lambda: d_logits_epilogue(x, y, softmax, [(x[:1].expand(3, 8), up)])),
        ("out overlaps", lambda: d_logits_epilogue(wide[:, 1:9], y, softmax, [(wide[:, :8], up)])),
        ("out overlaps", lambda: d_logits_epilogue(x, y, softmax, [(x.view(torch.half)[:, 8:], up)])),
        ("second out overlaps", lambda: d_logits_epilogue(x, y, softmax, [(wide[:, :8], up), (x, up)])),
        ("second out overlaps", lambda: d_logits_epilogue(x, y, softmax, [(wide[:, :8], up), (wide[:, 4:12], up)])),
        (
            "softmax.entropy is missing",
            lambda: d_logits_epilogue(x, y, softmax._replace(entropy=None), [(x, Upstream(entropy=torch.ones(3)))]),
        ),
        ("softmax.maximum", lambda: d_logits_epilogue(x, y, softmax._replace(maximum=torch.ones(2)), [(x, up)])),
    ):
        with pytest.raises(ValueError, match=name):
            call()


def test_launch_errors_are_raised_by_name(gpu):
    with pytest.raises(RuntimeError, match=r"genevolve_softmax: cudaErrorInvalidValue \(1\)"):
        problem = csrc._Problem(rows=2**40, vocabulary=8)
        gpu.launch("genevolve_softmax", torch.device("cpu"), problem, csrc._Softmax())


def test_why_it_cannot_run(gpu, monkeypatch, tmp_path):
    assert csrc.reason() is None and csrc.reason(torch.zeros(1)) is None
    assert csrc.reason(torch.zeros(1, dtype=torch.float64)) == "csrc/ computes in fp32, not fp64"
    assert csrc.reason(torch.zeros(1, device="meta")) == "csrc/ needs a GPU, hidden is on meta"
    with pytest.raises(OSError, match="not compiled: reinstall genevolve-fast where nvcc is on PATH"):
        csrc.Library(tmp_path / "libgenevolve.so")
    (tmp_path / "stale.cpp").write_text('extern "C" int genevolve_abi() { return 0; }')
    subprocess.run(["g++", "-shared", "-fPIC", "stale.cpp", "-o", "libgenevolve.so"], cwd=tmp_path, check=True)
    with pytest.raises(OSError, match="another version"):
        csrc.Library(tmp_path / "libgenevolve.so")
    monkeypatch.setattr(csrc, "installed", lambda: csrc.Library(tmp_path / "missing.so"))
    assert "not compiled" in csrc.reason()


# --- in the place of the other epilogues ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trains", ["nothing", "hidden", "both"])
@pytest.mark.parametrize("rich", [False, True])
def test_linear_logprob_by_cuda_equals_torch(gpu, dtype, trains, rich):
    results = []
    for impl in ("cuda", "torch"):
        torch.manual_seed(4)
        h, w, y = torch.randn(21, 16).to(dtype), torch.randn(97, 16).to(dtype), torch.randint(97, (21,))
        y[3] = -100
        h.requires_grad_(trains != "nothing")
        w.requires_grad_(trains == "both")
        more = dict(bias=torch.randn(97).to(dtype), temperature=torch.rand(21) + 0.5, softcap=6.0) if rich else {}
        out = linear_logprob(h, w, y, return_entropy=True, return_lse=True, block_rows=8, impl=impl, **more)
        if trains != "nothing":
            (out.logps.sum() + 0.3 * out.entropy.sum() - 0.1 * out.lse.sum()).backward()
        results.append([*(x.detach() for x in out), *(x.grad.float() for x in (h, w) if x.grad is not None)])
    close(*results, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_grpo_sdl_by_cuda_equals_torch(gpu, dtype):
    results = []
    for impl in ("cuda", "torch"):
        torch.manual_seed(5)
        h, w = torch.randn(20, 16).to(dtype).requires_grad_(), torch.randn(97, 16).to(dtype).requires_grad_()
        loss, stats = linear_grpo_sdl(
            h, w, torch.randint(97, (20,)), advantages=torch.randn(3), cu_seqlens=[0, 6, 13, 20],
            teacher_hidden=torch.randn(20, 16).to(dtype), teacher_index=torch.arange(20), softcap=4.0,
            objective=Objective(kl_coef=0, sdl_permille=300), block_rows=8, impl=impl,
        )  # fmt: skip
        loss.backward()
        results.append([loss.detach(), stats["entropy"], h.grad.float(), w.grad.float()])
    close(*results, dtype)


@pytest.mark.parametrize("trains", ["hidden", "both"])
def test_sampling_masks_by_cuda_equal_torch(gpu, trains):
    results = []
    for impl in ("cuda", "torch"):
        torch.manual_seed(6)
        h, w = torch.randn(21, 16, requires_grad=True), torch.randn(97, 16, requires_grad=trains == "both")
        y = torch.randint(97, (21,))
        sets = [[] if i % 4 == 1 else sorted({int(t), *range(i, i + 9)}) for i, t in enumerate(y)]
        mask = SamplingMask(torch.tensor(sum(sets, [])), torch.tensor([len(s) for s in sets]))
        out = linear_logprob(h, w, y, return_entropy=True, return_lse=True, sampling_mask=mask, block_rows=8, impl=impl)
        loss, _ = linear_grpo_sdl(
            h, w, y, advantages=torch.randn(3), cu_seqlens=[0, 6, 13, 21], teacher_hidden=h.detach().flip(0),
            teacher_index=torch.arange(21), objective=Objective(kl_coef=0, sdl_permille=300), block_rows=8, impl=impl,
            sampling_mask=mask,
        )  # fmt: skip
        (out.logps.sum() + 0.3 * out.entropy.sum() - 0.1 * out.lse.sum() + loss).backward()
        results.append([*(x.detach() for x in out), loss.detach(), *(x.grad for x in (h, w) if x.grad is not None)])
    close(*results, torch.float32)


def test_upstream_gradients_known_beforehand_take_one_launch_a_block(gpu):
    h, w, y = torch.randn(16, 16, requires_grad=True), torch.randn(97, 16), torch.randint(97, (16,))
    before = gpu.counts().launches
    linear_logprob(h, w, y, return_entropy=True, block_rows=8, workspace_mb=1, impl="cuda")
    assert gpu.counts().launches == before + 1


def close(mine, theirs, dtype):
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for a, b in zip(mine, theirs, strict=True):
        assert (a - b).abs().max() <= tolerance * b.abs().max().clamp(min=1)


# --- what these tests notice ------------------------------------------------------------------------------------------

BEFORE_OVERLAY = "before any writes: half-width results lie on tiles already read.\n    __syncthreads();"
ARRIVE = "__cluster_barrier_arrive_relaxed();"
VALUES = None  # wrong values, the kernel itself runs through
MUTANTS = {  # what is replaced by what, and what is then said
    "no barrier before the overlay": ({BEFORE_OVERLAY: "before any writes"}, VALUES),
    "no barrier before warps are merged": ({"__syncthreads();\n  if (warp < part": "if (warp < part"}, VALUES),
    "no cluster barrier": ({"cluster.sync();": ""}, VALUES),
    "a cluster barrier without its wait": ({"cluster.sync();": "cluster.barrier_arrive();"}, "barrier twice"),
    "a block leaves without waiting": ({"cluster.barrier_wait();": ""}, "leaves without waiting"),
    "a block leaves before it is read": (
        {ARRIVE: "", "cluster.barrier_wait();": ""}, "shared memory of a block that has left",
    ),
    "a warp that does not arrive": (
        {ARRIVE: f"if (warp) {ARRIVE}"}, "without having arrived",
    ),
    "a divergent barrier": (
        {BEFORE_OVERLAY: "before any writes\n    if (threadIdx.x < 32) __syncthreads();"}, "deadlock: .* __syncthreads",
    ),
    "a divergent shuffle": (
        {"    r = across_lanes(r);\n": "    if (lane) r = across_lanes(r);\n"}, "deadlock: .* __syncthreads",
    ),
    "a shuffle in place of a barrier": (
        {"__syncthreads();\n  if (warp == 0) {\n    const": "if (warp == 0) {\n if (lane) __syncthreads();\n const"},
        "deadlock: .* a shuffle",
    ),
    "the wrong stride": ({"p.products + index * p.stride": "p.products + index * p.vocabulary"}, VALUES),
    "the wrong stride of results": ({"row * g.stride *": "row * (g.stride + 1) *"}, VALUES),
    "a tail read as zero": ({"z[i] = i < left ? z[i] : -INFINITY": "z[i] = i < left ? z[i] : 0.f"}, VALUES),
    "a tail that is dropped": ({"vocabulary / kGroup + (vocabulary % kGroup != 0)": "vocabulary / kGroup"}, VALUES),
    "writes beyond the tail": ({"if (i < left) __stcs": "if (i < left + 1) __stcs"}, VALUES),
    "wide reads of any row": ({"row.wide = aligned(row.x)": "row.wide = true"}, "misaligned for 16 bytes"),
    "wide writes of any row": ({"aligned(out)};": "true};"}, "misaligned for 16 bytes"),
    "too little shared memory": (
        {"groups_per_slice) * kGroup * sizeof": "groups_per_slice) * kGroup / 2 * sizeof"}, "beyond its .* of dynamic",
    ),
    "a first moment left behind": ({"fmaf(r.s, shift, r.t)": "r.t"}, VALUES),
    "a slice too few": ({"lane < part.slices ? of_slice": "lane < part.slices - 1 ? of_slice"}, VALUES),
}  # fmt: skip


def verify(gpu) -> None:
    """What the tests above check, on few shapes."""
    for capability in CAPABILITIES:
        for order in ("forwards", "backwards"):
            for vocabulary, offset, padding in ((1003, 0, 0), (9002, 1, 3), (IN_TWO, 0, 1)):
                torch.manual_seed(0)
                gpu.configure(capability, order)
                laid = Laid.filled(3 * torch.randn(2, vocabulary), offset, padding)
                targets, up = targets_of(2, vocabulary), upstream_of(("logps", "lse", "entropy"), 2)
                want, copy = truth(laid.view, targets, [up]), laid.view.clone()
                softmax = softmax_epilogue(laid.view, targets)
                check_softmax(softmax, want)
                d_logits_epilogue(laid.view, targets, softmax, [(overlaid(laid, torch.bfloat16), up)])
                check_gradient(overlaid(laid, torch.bfloat16), want)
                laid.view.copy_(copy)
                check_softmax(softmax_d_logits_epilogue(laid.view, targets, [(overlaid(laid, torch.half), up)]), want)
                check_gradient(overlaid(laid, torch.half), want)
                apart = Laid.out(laid.view, padding=1)
                laid.view.copy_(copy)
                d_logits_epilogue(laid.view, targets, softmax, [(apart.view, up)])
                check_gradient(apart.view, want)
                assert laid.untouched_around() and apart.untouched_around()


def test_the_kernels_pass_what_their_mutants_fail(gpu):
    verify(gpu)


@pytest.mark.slow
@pytest.mark.parametrize("name", [None, *MUTANTS])
def test_mutants_are_noticed(name, tmp_path: Path, monkeypatch):
    replacements, said = MUTANTS[name] if name else ({}, None)
    source = SOURCE.read_text()
    for old, new in replacements.items():
        assert source.count(old) == 1
        source = source.replace(old, new)
    (tmp_path / "mutant.cu").write_text(source)
    mutant = compile_for_host(tmp_path / "libmutant.so", tmp_path / "mutant.cu")
    monkeypatch.setattr(csrc, "installed", lambda: mutant)
    if not name:
        verify(mutant)
        return
    with pytest.raises(RuntimeError if said else AssertionError, match=said):
        verify(mutant)
