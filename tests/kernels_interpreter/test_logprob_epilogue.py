"""The Triton epilogues in the interpreter against float64 (TRITON_INTERPRET=1 in a process of its own)."""

from __future__ import annotations

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 before triton is imported", allow_module_level=True)
pytest.importorskip("triton")

from bf16 import mend
from hypothesis import given, settings
from hypothesis import strategies as st

from genevolve_fast.kernels import logprob_epilogue
from genevolve_fast.kernels.logprob_epilogue import d_logits_epilogue, softmax_epilogue
from genevolve_fast.ops import Objective, SamplingMask, linear_grpo_sdl, linear_logprob

mend()
DISTRIBUTIONS = {
    "flat": lambda rows, v: 1e-3 * torch.randn(rows, v),
    "normal": lambda rows, v: 3 * torch.randn(rows, v),
    "peaked": lambda rows, v: 60 * torch.randn(rows, v),
    "shifted": lambda rows, v: torch.randn(rows, v) - 14,
}
OPTIONS = {
    "plain": {},
    "softcap, scale, temperature per row, bias": dict(softcap=5.0, logit_scale=1.7, temperature="rows", bias=True),
}


def truth(products, targets, bias=None, temperature=1.0, softcap=None, logit_scale=1.0):
    z = logit_scale * (products if bias is None else products + bias.double())
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    z = z / (temperature.double()[:, None] if isinstance(temperature, torch.Tensor) else temperature)
    log_p = z.log_softmax(-1)
    return log_p[torch.arange(len(targets)), targets], z.logsumexp(-1), -(log_p.exp() * log_p).sum(-1)


def options_of(name, rows, vocabulary):
    options = dict(OPTIONS[name])
    if "bias" in options:
        options |= dict(bias=torch.randn(vocabulary), temperature=torch.rand(rows) + 0.4)
    return options


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
@pytest.mark.parametrize("vocabulary", [1, 97, 1000, pytest.param(32003, marks=pytest.mark.slow)])
def test_softmax_against_float64(kind, vocabulary):
    torch.manual_seed(0)
    products = DISTRIBUTIONS[kind](5, vocabulary)
    targets = torch.randint(vocabulary, (5,))
    targets[0], targets[1] = vocabulary - 1, products[1].argmax()
    got = softmax_epilogue(products, targets, block=1024)
    lse = got.maximum + got.log_sum
    for mine, want in zip((got.logps, lse, got.entropy), truth(products.double(), targets), strict=True):
        assert ((mine - want).abs() <= 2e-6 * (lse.abs().double() / 16).clamp(min=1)).all()
    assert (got.logps <= 0).all()


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("used", [("logps",), ("lse",), ("entropy",), ("logps", "lse", "entropy")])
def test_d_logits_against_float64(name, used):
    torch.manual_seed(1)
    products, targets = 4 * torch.randn(6, 301), torch.randint(301, (6,))
    targets[0] = 300
    options = options_of(name, 6, 301)
    exact = products.double().requires_grad_()
    want = dict(zip(("logps", "lse", "entropy"), truth(exact, targets, **options), strict=True))
    got = softmax_epilogue(products, targets, block=128, **options)
    assert (got.logps - want["logps"]).abs().max() < 4e-6 and (got.entropy - want["entropy"]).abs().max() < 4e-6
    upstream = {n: torch.randn(6) for n in used}
    (gradient,) = torch.autograd.grad(sum((want[n] * g.double()).sum() for n, g in upstream.items()), exact)
    d_logits_epilogue(products, products, targets, got, block=128, **upstream, **options)
    assert (products - gradient).abs().max() < 4e-6


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "vocabulary"), [(2_049, 97), (8, 151_936), (3, 152_064), (3, 128_256)])
def test_many_rows_and_the_vocabularies_of_the_field(rows, vocabulary):
    torch.manual_seed(6)
    products, targets = 3 * torch.randn(rows, vocabulary), torch.randint(vocabulary, (rows,))
    targets[-1] = vocabulary - 1
    exact = products.double().requires_grad_()
    logps, lse, entropy = truth(exact, targets)
    upstream = torch.randn(rows)
    (want,) = torch.autograd.grad((logps * upstream).sum(), exact)
    got = softmax_epilogue(products, targets)
    for mine, true in ((got.logps, logps), (got.maximum + got.log_sum, lse), (got.entropy, entropy)):
        assert ((mine - true).abs() <= 2e-6 * (lse.abs() / 16).clamp(min=1)).all()
    d_logits_epilogue(products, products, targets, got, logps=upstream)
    assert (products - want).abs().max() < 2e-6


def test_rows_lie_on_the_only_axis_of_a_grid_that_holds_more_than_65535(monkeypatch):
    """Interpreted grids have no limit and real ones do: tests/gpu runs as many rows."""

    class Recorder:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *given, **named: None

    grids: list[tuple[int, ...]] = []
    for kernel in ("_softmax", "_d_logits"):
        monkeypatch.setattr(logprob_epilogue, kernel, Recorder())
    products, targets = torch.empty(65_537, 8), torch.zeros(65_537, dtype=torch.int64)
    d_logits_epilogue(products, products, targets, softmax_epilogue(products, targets), logps=torch.ones(65_537))
    assert grids == [(65_537,), (65_537,)]


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_call_into_poisoned_memory(data):
    """Shapes, tiles and options drawn by hypothesis; the kernels write every number of what they return."""
    draw = lambda what, name: data.draw(what, label=name)  # noqa: E731
    rows, vocabulary = draw(st.integers(0, 4), "rows"), draw(st.integers(1, 300), "V")
    torch.manual_seed(draw(st.integers(0, 99), "seed"))
    options = dict(
        softcap=draw(st.sampled_from([None, 4.0]), "softcap"),
        logit_scale=draw(st.sampled_from([1.0, 0.3]), "logit_scale"),
        temperature=draw(st.sampled_from([1.0, 0.7, torch.rand(rows) + 0.4]), "temperature"),
        bias=draw(st.sampled_from([None, torch.randn(vocabulary)]), "bias"),
    )
    block = draw(st.sampled_from([32, 128, 512]), "block")
    wide = torch.full((rows, vocabulary + draw(st.integers(0, 5), "padding")), torch.nan)
    products = wide[:, :vocabulary]
    products.copy_(draw(st.sampled_from([0.01, 3.0, 40.0]), "spread") * torch.randn(rows, vocabulary))
    targets = torch.randint(vocabulary, (rows,))
    used = draw(st.sets(st.sampled_from(["logps", "lse", "entropy"]), min_size=1), "upstream")
    upstream = {name: torch.randn(rows) for name in used}
    exact = products.double().requires_grad_()
    want = dict(zip(("logps", "lse", "entropy"), truth(exact, targets, **options), strict=True))
    (gradient,) = torch.autograd.grad(sum((want[n] * g.double()).sum() for n, g in upstream.items()), exact)
    torch.use_deterministic_algorithms(True)  # torch.empty is full of NaN
    try:
        got = softmax_epilogue(products, targets, block=block, **options)
        out = torch.empty(rows, vocabulary)
        d_logits_epilogue(products, out, targets, got, block=block, **upstream, **options)
    finally:
        torch.use_deterministic_algorithms(False)
    scale = want["lse"].abs().clamp(min=1)
    for name in ("logps", "entropy"):
        assert ((getattr(got, name) - want[name]).abs() <= 4e-6 * scale).all()
    assert ((out - gradient).abs() <= 1e-5 * (1 + gradient.abs().amax(1, keepdim=True) * scale[:, None])).all()


def test_banned_tokens_and_rows_that_are_not_numbers():
    torch.manual_seed(7)
    products, targets = torch.randn(3, 200), torch.tensor([1, 199, 5])
    bias = torch.zeros(200)
    bias[[0, 3, 64, 65, 66, 67, 150]] = -torch.inf
    bias[128:160] = -torch.inf  # every value of some lanes
    products[2, 7] = torch.nan
    got = softmax_epilogue(products, targets, bias=bias, block=32)
    log_p = (products[:2].double() + bias.double()).log_softmax(-1)
    p = log_p.exp()
    assert (got.logps[:2] - log_p[torch.arange(2), targets[:2]]).abs().max() < 2e-6
    assert (got.entropy[:2] + torch.where(p > 0, p * log_p, 0).sum(1)).abs().max() < 4e-6
    assert got.logps[2].isnan() and got.entropy[2].isnan()
    d_logits_epilogue(products, products, targets, got, logps=torch.ones(3), entropy=torch.ones(3), bias=bias, block=32)
    assert not products[:2, bias.isinf()].any() and products[:2].isfinite().all() and products[2].isnan().any()


def test_a_target_of_another_shard_counts_nowhere():
    products, targets = torch.randn(3, 50), torch.tensor([4, -1, 50])
    got = softmax_epilogue(products, targets, block=32)
    want = products.double().softmax(-1)
    d_logits_epilogue(products, products, targets, got, logps=torch.ones(3), block=32)
    want = -want
    want[0, 4] += 1
    assert (products - want).abs().max() < 2e-6


def test_half_width_results_overlay_the_products():
    torch.manual_seed(2)
    products, targets = 3 * torch.randn(5, 333), torch.randint(333, (5,))
    got, g = softmax_epilogue(products, targets, block=64), torch.randn(5)
    apart = torch.full((5, 333), torch.nan)
    d_logits_epilogue(products, apart, targets, got, logps=g, block=64)
    d_logits_epilogue(products, products.view(torch.bfloat16)[:, :333], targets, got, logps=g, block=64)
    assert torch.equal(products.view(torch.bfloat16)[:, :333], apart.bfloat16())


def test_equal_rows_give_equal_bits_and_strides_are_followed():
    torch.manual_seed(3)
    wide = torch.randn(8, 500)
    wide[5] = wide[1]
    view, targets = wide[:, :333], torch.full((8,), 17)
    got = softmax_epilogue(view, targets, block=64)
    assert all(x[5] == x[1] for x in got)
    again = softmax_epilogue(view.contiguous(), targets, block=64)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
    assert softmax_epilogue(view[:0], targets[:0]).logps.shape == (0,)


def test_wrong_inputs_are_named():
    with pytest.raises(ValueError, match="products"):
        softmax_epilogue(torch.zeros(2, 3, dtype=torch.float64), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="targets"):
        softmax_epilogue(torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="out"):
        got = softmax_epilogue(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64))
        d_logits_epilogue(torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64), got)


# --- the operations on these kernels ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trains", ["hidden", "both"])
def test_linear_logprob_by_triton_equals_torch(dtype, trains):
    results = []
    for impl in ("triton", "torch"):
        torch.manual_seed(4)
        h, w = torch.randn(21, 16).to(dtype).requires_grad_(), torch.randn(97, 16).to(dtype)
        w.requires_grad_(trains == "both")
        y = torch.randint(97, (21,))
        y[3] = -100
        out = linear_logprob(h, w, y, return_entropy=True, return_lse=True, temperature=0.8, block_rows=8, impl=impl)
        (out.logps.sum() + 0.3 * out.entropy.sum() - 0.1 * out.lse.sum()).backward()
        results.append([*(x.detach() for x in out), *(x.grad.float() for x in (h, w) if x.grad is not None)])
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for mine, theirs in zip(*results, strict=True):
        assert (mine - theirs).abs().max() <= tolerance * theirs.abs().max().clamp(min=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_grpo_sdl_by_triton_equals_torch(dtype):
    results = []
    for impl in ("triton", "torch"):
        torch.manual_seed(5)
        h, w = torch.randn(20, 16).to(dtype).requires_grad_(), torch.randn(97, 16).to(dtype).requires_grad_()
        loss, stats = linear_grpo_sdl(
            h, w, torch.randint(97, (20,)), advantages=torch.randn(3), cu_seqlens=[0, 6, 13, 20],
            teacher_hidden=torch.randn(20, 16).to(dtype), teacher_index=torch.arange(20), softcap=4.0,
            objective=Objective(kl_coef=0, sdl_permille=300), block_rows=8, impl=impl,
        )  # fmt: skip
        loss.backward()
        results.append([loss.detach(), stats["entropy"], h.grad.float(), w.grad.float()])
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for mine, theirs in zip(*results, strict=True):
        assert (mine - theirs).abs().max() <= tolerance * theirs.abs().max().clamp(min=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trains", ["hidden", "both"])
def test_sampling_masks_by_triton_equal_torch(dtype, trains):
    results = []
    for impl in ("triton", "torch"):
        torch.manual_seed(6)
        h, w, b = torch.randn(21, 16).to(dtype).requires_grad_(), torch.randn(97, 16).to(dtype), torch.randn(97)
        w.requires_grad_(trains == "both")
        y = torch.randint(97, (21,))
        sets = [[] if i % 4 == 1 else sorted({int(t), *range(i, i + 9)}) for i, t in enumerate(y)]
        mask = SamplingMask(torch.tensor(sum(sets, [])), torch.tensor([len(s) for s in sets]))
        more = dict(bias=b, temperature=0.8, sampling_mask=mask, block_rows=8, impl=impl)
        out = linear_logprob(h, w, y, return_entropy=True, return_lse=True, **more)
        loss, _ = linear_grpo_sdl(
            h, w, y, advantages=torch.randn(3), cu_seqlens=[0, 6, 13, 21], teacher_hidden=h.detach().flip(0),
            teacher_index=torch.arange(21), objective=Objective(kl_coef=0, sdl_permille=300), **more,
        )  # fmt: skip
        (out.logps.sum() + 0.3 * out.entropy.sum() - 0.1 * out.lse.sum()).backward()
        loss.backward()
        found = [*out, loss, *(x.grad.float() for x in (h, w) if x.grad is not None)]
        assert all(torch.isfinite(x).all() for x in found)
        results.append([x.detach() for x in found])
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for mine, theirs in zip(*results, strict=True):
        assert (mine - theirs).abs().max() <= tolerance * theirs.abs().max().clamp(min=1)


def test_what_cannot_run_says_why():
    h, w, y = torch.randn(2, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64), torch.zeros(2).long()
    with pytest.raises(ValueError, match="impl 'triton': triton computes in fp32"):
        linear_logprob(h, w, y, impl="triton")
    with pytest.raises(ValueError, match="one of auto, torch, triton, cuda"):
        linear_logprob(h, w, y, impl="fast")
