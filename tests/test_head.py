"""The head's operations against autograd through full logits in float64: values, gradients, GEMMs, memory."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.memory import body_of, peak_bytes
from genevolve_fast.ops import Objective, fused, grpo_sdl, head, linear_grpo_sdl, linear_logprob
from genevolve_fast.ops.reference import logprobs

D = torch.float64
TOLERANCE = 1e-10
HEADS = {
    "plain": {},
    "temperature": dict(temperature=0.7),
    "temperature per row": dict(temperature="rows"),
    "bias": dict(bias=True),
    "softcap, scale, bias, temperature per row": dict(softcap=3.0, logit_scale=1.3, bias=True, temperature="rows"),
}


class Gemms(TorchDispatchMode):
    """2·rows·H·V products, in units of one over `rows` rows."""

    def __init__(self, hidden, weight) -> None:
        super().__init__()
        self.unit = hidden.numel() * len(weight)
        self.count = 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if body := body_of(func):
            with self:
                return body(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            a, b = [x for x in args if isinstance(x, torch.Tensor)][-2:]
            self.count += a.numel() * b.shape[1] / self.unit
        return func(*args, **(kwargs or {}))


def head_inputs(rows, seed, name, weight_grad=True):
    torch.manual_seed(seed)
    options = dict(HEADS[name])
    h = torch.randn(rows, 12, dtype=D, requires_grad=True)
    w = torch.randn(37, 12, dtype=D, requires_grad=weight_grad)
    if options.pop("bias", False):
        options["bias"] = torch.randn(37, dtype=D, requires_grad=weight_grad)
    if options.get("temperature") == "rows":
        options["temperature"] = torch.rand(rows, dtype=D) + 0.3
    y = torch.randint(37, (rows,))
    y[0], y[-1] = 36, 0
    return h, w, y, options


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("used", [("logps",), ("entropy",), ("lse",), ("logps", "entropy", "lse")])
def test_frozen_head_gives_the_same_gradient(name, used):
    h, w, y, options = head_inputs(21, 0, name, weight_grad=False)
    mine = linear_logprob(h, w, y, return_entropy=True, return_lse=True, block_rows=8, **options)
    logps, entropy, lse = logprobs(h, w, y, **options)
    theirs = dict(logps=logps, entropy=entropy, lse=lse)
    g = torch.randn(3, 21, dtype=D)
    got = torch.autograd.grad(sum((getattr(mine, n) * v).sum() for n, v in zip(used, g, strict=False)), h)[0]
    want = torch.autograd.grad(sum((theirs[n] * v).sum() for n, v in zip(used, g, strict=False)), h)[0]
    assert (got - want).abs().max() < TOLERANCE


def test_a_bias_of_minus_infinity_bans_a_token():
    h, w, y, _ = head_inputs(9, 1, "plain")
    bias = torch.zeros(37, dtype=D)
    bias[[2, 5]] = -torch.inf
    y = torch.where((y == 2) | (y == 5), 7, y)
    allowed = bias == 0
    mine = linear_logprob(h, w, y, bias=bias, return_entropy=True, block_rows=4)
    place = allowed.cumsum(0)[y] - 1
    logps, entropy, _ = logprobs(h, w[allowed], place)
    assert (mine.logps - logps).abs().max() < TOLERANCE and (mine.entropy - entropy).abs().max() < TOLERANCE
    got = torch.autograd.grad(mine.logps.sum() + mine.entropy.sum(), [h, w])
    want = torch.autograd.grad(logps.sum() + entropy.sum(), [h, w])
    assert all((a - b).abs().max() < TOLERANCE for a, b in zip(got, want, strict=True))


def test_detached_entropy_has_no_gradient():
    h, w, y, _ = head_inputs(5, 0, "plain")
    assert not linear_logprob(h, w, y, return_entropy="detached").entropy.requires_grad
    assert linear_logprob(h, w, y, return_entropy=True).entropy.requires_grad
    with pytest.raises(ValueError, match="return_entropy"):
        linear_logprob(h, w, y, return_entropy="no")


@pytest.mark.parametrize(
    ("trains", "entropy", "want"),
    [("nothing", False, 1), ("hidden", False, 2), ("hidden", True, 3), ("hidden", "detached", 2), ("both", False, 4)],
)
def test_logprob_gemm_budget(trains, entropy, want):
    h, w = torch.randn(32, 8, requires_grad=trains != "nothing"), torch.randn(50, 8, requires_grad=trains == "both")
    y = torch.randint(50, (32,))
    with Gemms(h, w) as gemms:
        out = linear_logprob(h, w, y, return_entropy=entropy, block_rows=8)
        if trains != "nothing":
            (out.logps.sum() + (out.entropy.sum() if entropy is True else 0)).backward()
    assert gemms.count == want


def test_ignored_rows_enter_no_gemm():
    h, w = torch.randn(64, 8, requires_grad=True), torch.randn(50, 8)
    y = torch.where(torch.arange(64) % 4 == 0, torch.arange(64) % 50, -100)
    with Gemms(h, w) as gemms:
        linear_logprob(h, w, y, block_rows=8).logps.sum().backward()
    assert gemms.count == 2 / 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dtype", ["the same", torch.float32])
@pytest.mark.parametrize("trains", ["both", "hidden"])
@pytest.mark.parametrize("spread", [0.02, 1.0])
def test_half_precision_has_fp32_logits(dtype, head_dtype, trains, spread):
    """Log-probs to fp32's error, gradients not worse than full logits and autograd in the same dtypes."""
    torch.manual_seed(0)
    head_dtype = dtype if head_dtype == "the same" else head_dtype
    data = torch.randn(40, 64).to(dtype), (spread * torch.randn(9_000, 64) / 4).to(head_dtype)
    y = torch.randint(9_000, (40,))
    mine_in, plain_in = (
        [x.clone().requires_grad_(i == 0 or trains == "both") for i, x in enumerate(data)] for _ in "12"
    )
    truth_in = [x.double().requires_grad_() for x in data]
    truth = logprobs(*truth_in, y)
    mine = linear_logprob(*mine_in, y, return_entropy=True, block_rows=16)
    assert mine.logps.dtype == torch.float32 and (mine.logps - truth[0]).abs().max() < 1e-5
    plain = logprobs(plain_in[0].to(head_dtype), plain_in[1], y)
    g = torch.randn(40)
    for out in (mine[:2], plain[:2], truth[:2]):
        ((out[0] * g).sum() + out[1].sum()).backward()
    for mine_x, plain_x, true_x in zip(mine_in, plain_in, truth_in, strict=True):
        if mine_x.grad is not None:
            assert mine_x.grad.dtype == mine_x.dtype
            error, theirs = ((x.grad.double() - true_x.grad).square().mean().sqrt() for x in (mine_x, plain_x))
            assert error <= 1.1 * theirs


def test_a_temperature_in_half_precision_costs_no_digits():
    h, w, y, _ = head_inputs(9, 2, "plain")
    tau = (torch.rand(9) + 0.5).bfloat16()
    got = torch.autograd.grad(linear_logprob(h, w, y, temperature=tau, block_rows=4).logps.sum(), [h, w])
    want = torch.autograd.grad(logprobs(h, w, y, temperature=tau.to(D))[0].sum(), [h, w])
    assert all((a - b).abs().max() < TOLERANCE for a, b in zip(got, want, strict=True))


def test_equal_rows_give_equal_bits_on_several_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for seed in range(10):
            torch.manual_seed(seed)
            h, w = torch.randn(1, 4).repeat(4, 1), torch.randn(151_936, 4)  # strips of three rows and of one
            out = linear_logprob(h, w, torch.full((4,), 7), return_entropy=True, return_lse=True, block_rows=4)
            assert all((x == x[0]).all() for x in out), seed
    finally:
        torch.set_num_threads(threads)


def test_workspace_below_one_block_names_what_it_needs():
    h, w, y, _ = head_inputs(5, 0, "plain")
    with pytest.raises(ValueError, match="workspace_mb 0.01 .* at least 1"):
        linear_logprob(h, w, y, workspace_mb=0.01)
    for mb in (1, 2, None):
        assert torch.equal(linear_logprob(h, w, y, workspace_mb=mb).logps, linear_logprob(h, w, y).logps)


# --- the fused objective ----------------------------------------------------------------------------------------------

OBJECTIVES = {
    "on policy": dict(kl_coef=0.0),
    "everything": dict(kl_coef=0.1, rollout_is="token", dual_clip=3.0),
    "sequence correction, token mean": dict(kl_coef=0.1, rollout_is="sequence", loss_agg_mode="token-mean"),
    "sequence mean of token means, all selected": dict(
        kl_coef=0.0, loss_agg_mode="seq-mean-token-mean", sdl_permille=1000
    ),
    "k3, half selected": dict(kl_coef=0.0, sdl_grad="k3", sdl_permille=500),
    "no distillation": dict(kl_coef=0.2, sdl_coef=0.0),
}
LENGTHS = (5, 1, 9, 0, 6)


def fused_inputs(name, head, seed=0, weight_grad=True):
    rows = sum(LENGTHS)
    h, w, y, options = head_inputs(rows, seed, head, weight_grad)
    o = Objective(**OBJECTIVES[name])
    now = logprobs(h, w, y, **options)[0].detach()
    rest = dict(advantages=torch.tensor([1.0, -0.5, 0.0, 2.0, -1.5], dtype=D), teacher_logps=now + torch.randn(rows))
    rest["sdl_mask"] = torch.rand(rows) < 0.8
    if o.kl_coef:
        rest["ref_logps"] = now + 0.3 * torch.randn(rows)
    if o.rollout_is != "none":
        rest |= dict(old_logps=now + 0.2 * torch.randn(rows), rollout_logps=now + 0.2 * torch.randn(rows))
    if o.sdl_coef == 0:
        del rest["teacher_logps"], rest["sdl_mask"]
    return h, w, y, options, rest, o


def sequence_ids():
    return torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))


def by_autograd(h, w, y, options, rest, o, ignored=None):
    logps = logprobs(h, w, y.clamp(min=0), **options)[0]
    loss, stats = grpo_sdl(logps, seq_ids=sequence_ids(), loss_mask=ignored, objective=o, **rest)
    inputs = [x for x in (h, w, options.get("bias")) if x is not None and x.requires_grad]
    return loss, stats, torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("trains", ["both", "hidden"])
def test_fused_objective_equals_autograd_through_full_logits(name, head, trains):
    h, w, y, options, rest, o = fused_inputs(name, head, weight_grad=trains == "both")
    want, stats, grads = by_autograd(h, w, y, options, rest, o)
    cu = torch.tensor([0, *LENGTHS]).cumsum(0)
    loss, mine = linear_grpo_sdl(h, w, y, cu_seqlens=cu, objective=o, block_rows=4, **options, **rest)
    inputs = [x for x in (h, w, options.get("bias")) if x is not None and x.requires_grad]
    got = torch.autograd.grad(loss, inputs)
    assert (loss - want).abs() < TOLERANCE
    assert all((a - b).abs().max() < TOLERANCE for a, b in zip(got, grads, strict=True))
    for key in ("pg_loss", "kl_loss", "sdl_loss", "sdl_kl", "sdl_rho_saturated", "sdl_selected_fraction"):
        assert (mine[key] - stats[key]).abs() < TOLERANCE, key


def test_teacher_rows_go_through_the_same_head():
    h, w, y, options, rest, o = fused_inputs("on policy", "temperature per row")
    rest.pop("teacher_logps"), rest.pop("sdl_mask")
    t = torch.randn(9, 12, dtype=D)
    index = torch.full((len(h),), -1)
    index[4:13] = torch.randperm(9)
    has = index >= 0
    tau = options["temperature"]
    teacher = torch.where(has, logprobs(t[index.clamp(min=0)], w, y, temperature=tau)[0].detach(), 0)
    want, _, grads = by_autograd(h, w, y, options, rest | dict(teacher_logps=teacher, sdl_mask=has), o)
    loss, _ = linear_grpo_sdl(
        h, w, y, seq_ids=sequence_ids(), teacher_hidden=t, teacher_index=index, objective=o, block_rows=4,
        **options, **rest,
    )  # fmt: skip
    assert (loss - want).abs() < TOLERANCE
    assert all((a - b).abs().max() < TOLERANCE for a, b in zip(torch.autograd.grad(loss, [h, w]), grads, strict=True))


def test_ignored_rows_may_hold_anything():
    h, w, y, options, rest, o = fused_inputs("everything", "bias")
    y[[2, 7]] = -100
    want, _, grads = by_autograd(h, w, y, options, rest, o, y != -100)
    poisoned = h.detach().clone()
    poisoned[[2, 7]] = torch.nan
    poisoned.requires_grad_()
    rest["old_logps"][2] = torch.inf
    loss, _ = linear_grpo_sdl(poisoned, w, y, seq_ids=sequence_ids(), objective=o, block_rows=4, **options, **rest)
    got = torch.autograd.grad(loss, [poisoned, w, options["bias"]])
    assert (loss - want).abs() < TOLERANCE
    assert all((a - b).abs().max() < TOLERANCE for a, b in zip(got, grads, strict=True))


@pytest.mark.parametrize(
    ("teacher", "permille", "borders", "block", "want"),
    [
        (False, 100, [0, 16, 32], 8, 3),
        (True, 1000, [0, 16, 32], 8, 4),
        (True, 250, [0, 16, 32], 16, 4),
        (True, 250, [0, 16, 32], 8, 4 + 3 * 8 / 32),
        (True, 250, [0, 8, 32], 8, 4 + (8 + 6 + 6) / 32),  # the forward's GEMM is padded to the block
    ],
)
def test_fused_gemm_budget(teacher, permille, borders, block, want):
    """The selected rows of a rollout pass again only where a border of the blocks cuts it."""
    h, w = torch.randn(32, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    y, advantages = torch.randint(50, (32,)), torch.tensor([1.0, -1.0])
    more = dict(teacher_hidden=torch.randn(32, 8), teacher_index=torch.arange(32)) if teacher else {}
    o = Objective(kl_coef=0, sdl_permille=permille)
    with Gemms(h, w) as gemms:
        loss, _ = linear_grpo_sdl(
            h, w, y, advantages=advantages, cu_seqlens=borders, objective=o, block_rows=block, **more
        )
        loss.backward()
    assert gemms.count == want


def test_rows_without_gradient_enter_no_gemm():
    h, w, y = torch.randn(32, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True), torch.randint(50, (32,))
    with Gemms(h, w) as gemms:
        loss, _ = linear_grpo_sdl(
            h, w, y, advantages=torch.tensor([0.0, 1.0]), cu_seqlens=[0, 16, 32], objective=Objective(kl_coef=0),
            block_rows=8,
        )  # fmt: skip
        loss.backward()
    assert gemms.count == 1.5 and not h.grad[:16].any() and h.grad[16:].any()
    with torch.no_grad(), Gemms(h, w) as gemms:
        linear_grpo_sdl(
            h, w, y, advantages=torch.tensor([1.0, 1.0]), cu_seqlens=[0, 16, 32], objective=Objective(kl_coef=0),
            block_rows=8,
        )  # fmt: skip
    assert gemms.count == 1


def test_main_grad_takes_the_weight_gradient_and_the_scale_is_the_callers():
    h, w, y, options, rest, o = fused_inputs("on policy", "plain")
    _, _, (d_hidden, d_weight) = by_autograd(h, w, y, options, rest, o)
    main = torch.ones_like(w)
    loss, _ = linear_grpo_sdl(
        h, w, y, seq_ids=sequence_ids(), objective=o, main_grad=main, loss_scale=0.5, block_rows=4, **rest
    )
    loss.backward()
    assert w.grad is None and (main - 1 - 0.5 * d_weight).abs().max() < TOLERANCE
    assert (h.grad - 0.5 * d_hidden).abs().max() < TOLERANCE
    h.grad = None
    loss, _ = linear_grpo_sdl(h, w, y, seq_ids=sequence_ids(), objective=o, **rest)
    (2 * loss).backward()
    assert h.grad.isnan().all()


def test_fused_arguments_are_named():
    h, w, y, options, rest, o = fused_inputs("on policy", "plain")
    good = dict(hidden=h, weight=w, targets=y, seq_ids=sequence_ids(), objective=o, **rest)
    for wrong, message in (
        (dict(seq_ids=None), "cu_seqlens or seq_ids"),
        (dict(teacher_hidden=h), "teacher_index"),
        (dict(teacher_logps=None, teacher_index=y), "teacher_hidden"),
        (dict(teacher_logps=None, teacher_hidden=h[:, :3], teacher_index=y), "teacher_hidden"),
        (dict(teacher_logps=None, teacher_hidden=h, teacher_index=y[:3]), "teacher_index"),
        (dict(main_grad=torch.zeros(3, 3)), "main_grad"),
        (dict(old_logps=h[:3, 0]), "old_logps"),
        (dict(targets=y + 37), "targets"),
    ):
        with pytest.raises(ValueError, match=message):
            linear_grpo_sdl(**good | wrong)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_call_equals_the_reference(data):
    """Shapes, options and masks drawn by hypothesis: one call of each operation against autograd in float64."""
    draw = lambda what, name: data.draw(what, label=name)  # noqa: E731
    lengths = draw(st.lists(st.integers(0, 9), min_size=1, max_size=5), "sequences")
    rows, hidden, vocabulary = sum(lengths), draw(st.integers(1, 9), "H"), draw(st.integers(1, 40), "V")
    torch.manual_seed(draw(st.integers(0, 99), "seed"))
    scale = draw(st.sampled_from([1e-3, 1.0, 30.0]), "spread")
    trains = draw(st.sampled_from(["both", "hidden"]), "trains") == "both"
    h, w = torch.randn(rows, hidden, dtype=D), scale * torch.randn(vocabulary, hidden, dtype=D)
    options = dict(
        temperature=draw(st.sampled_from([1.0, 0.6, torch.rand(rows, dtype=D) + 0.4]), "temperature"),
        softcap=draw(st.sampled_from([None, 7.0]), "softcap"),
        logit_scale=draw(st.sampled_from([1.0, 1.4]), "logit_scale"),
        bias=draw(st.sampled_from([None, torch.randn(vocabulary, dtype=D)]), "bias"),
    )
    y = torch.randint(vocabulary, (rows,))
    keep = torch.rand(rows) < draw(st.sampled_from([0.0, 0.5, 1.0]), "kept")
    size = dict(block_rows=draw(st.integers(1, 12), "block_rows"))
    targets = torch.where(keep, y, -100)
    leaves = lambda: [x.clone().requires_grad_(i == 0 or trains) for i, x in enumerate((h, w))]  # noqa: E731
    wanted = slice(0, 2 if trains else 1)

    mine, theirs = leaves(), leaves()
    got = linear_logprob(mine[0], mine[1], targets, return_entropy=True, return_lse=True, **options, **size)
    want = [torch.where(keep, x, 0) for x in logprobs(theirs[0], theirs[1], y, **options)]
    g = torch.randn(3, rows, dtype=D)
    loss, expected = (
        sum((x * v).sum() for x, v in zip(out, g, strict=True)) for out in ((got[0], got[1], got[2]), want)
    )
    for a, b in zip(
        torch.autograd.grad(loss, mine[wanted]), torch.autograd.grad(expected, theirs[wanted]), strict=True
    ):
        assert (a - b).abs().sum() <= TOLERANCE * (1 + b.abs().sum())

    permille = draw(st.sampled_from([1, 300, 1000]), "permille")
    by, slope = draw(st.sampled_from(["sequence", "batch"]), "by"), draw(st.sampled_from(["reverse_kl", "k3"]), "slope")
    o = Objective(kl_coef=0.1, rollout_is="token", sdl_permille=permille, sdl_select=by, sdl_grad=slope)
    near = lambda width: want[0].detach() + width * torch.randn(rows, dtype=D)  # noqa: E731
    rest = dict(old_logps=near(0.3), rollout_logps=near(0.3), ref_logps=near(0.5), teacher_logps=near(3.0))
    rest |= dict(advantages=torch.randn(len(lengths), dtype=D), sdl_mask=torch.rand(rows) < 0.7, objective=o)
    seq_ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    shuffled = draw(st.booleans(), "seq_ids in any order")
    order = torch.randperm(rows) if shuffled else torch.arange(rows)
    rest |= {k: x[order] for k, x in rest.items() if k.endswith(("logps", "mask"))}
    by = dict(seq_ids=seq_ids[order]) if shuffled else dict(cu_seqlens=torch.tensor([0, *lengths]).cumsum(0))
    tau = options["temperature"]
    moved = options | dict(temperature=tau[order] if isinstance(tau, torch.Tensor) else tau)
    mine, theirs = leaves(), leaves()
    loss, _ = linear_grpo_sdl(mine[0][order], mine[1], targets[order], **rest, **by, **moved, **size)
    logps = logprobs(theirs[0][order], theirs[1], y[order], **moved)[0]
    if not shuffled:  # with cu_seqlens they are read by sequence, also where there are as many as rows
        rest["advantages"] = rest["advantages"][seq_ids]
    expected, _ = grpo_sdl(logps, loss_mask=keep[order], seq_ids=seq_ids[order], **rest)
    assert (loss - expected).abs() <= TOLERANCE * (1 + expected.abs())
    for a, b in zip(
        torch.autograd.grad(loss, mine[wanted]), torch.autograd.grad(expected, theirs[wanted]), strict=True
    ):
        assert (a - b).abs().sum() <= TOLERANCE * (1 + b.abs().sum())


def test_sequences_that_only_the_host_drops_enter_no_gemm(monkeypatch):
    """As on a GPU: nothing is read back from the device, the advantages of a list of sequences lie on the host."""
    torch.manual_seed(0)
    h, w, y = torch.randn(32, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True), torch.randint(50, (32,))
    borders = dict(cu_seqlens=[0, 16, 16, 32], block_rows=8)
    given = dict(advantages=torch.tensor([0.0, 0.0, 1.0]), objective=Objective(kl_coef=0), **borders)
    with_kl = given | dict(objective=Objective(kl_coef=0.5), ref_logps=-torch.ones(32))
    want = [torch.autograd.grad(linear_grpo_sdl(h, w, y, **x)[0], [h, w]) for x in (given, with_kl)]
    monkeypatch.setattr(fused, "_live_rows", lambda c: (None, False))
    for call, grads, count in zip((given, with_kl), want, (1.5, 3), strict=True):
        with Gemms(h, w) as gemms:
            loss, _ = linear_grpo_sdl(h, w, y, **call)
        assert gemms.count == count
        for a, b in zip(torch.autograd.grad(loss, [h, w]), grads, strict=True):
            torch.testing.assert_close(a, b)
    loss, stats = linear_grpo_sdl(h, w, y, **(given | dict(advantages=torch.zeros(3))))
    assert not any(x.any() for x in torch.autograd.grad(loss, [h, w])) and all(v.isfinite() for v in stats.values())


def test_on_a_device_that_is_not_read_ignored_rows_are_made_zero(monkeypatch):
    """Nothing is left out there; what ignored rows hold must not reach any gradient."""
    h, w, y, options, rest, o = fused_inputs("everything", "bias")
    y[[2, 7]] = -100
    wants = [
        torch.autograd.grad(linear_logprob(h, w, y, block_rows=4, **options).logps.sum(), [h, w]),
        by_autograd(h, w, y, options, rest, o, y != -100)[2],
    ]
    monkeypatch.setattr(fused, "_live_rows", lambda c: (None, False))
    monkeypatch.setattr(head, "entering_rows", lambda *_: (None, False))
    poisoned = h.detach().clone()
    poisoned[[2, 7]] = torch.nan
    poisoned.requires_grad_()
    logps = linear_logprob(poisoned, w, y, block_rows=4, **options).logps
    loss, _ = linear_grpo_sdl(poisoned, w, y, seq_ids=sequence_ids(), objective=o, block_rows=4, **options, **rest)
    for x, want in zip((logps.sum(), loss), wants, strict=True):
        for a, b in zip(torch.autograd.grad(x, [poisoned, w]), want, strict=False):
            assert (a - b).abs().max() < TOLERANCE


def test_statistics_of_the_fused_objective_are_the_references():
    """Also where rows of a sequence without advantage enter no GEMM; entropy and ratio_max are of the others then."""
    for a in ([1.0, -1.0, 0.5, 2.0, -1.5], [0.0, -1.0, 0.0, 2.0, -1.5]):
        h, w, y, options, rest, o = fused_inputs("no distillation", "plain")
        o = Objective(kl_coef=0.0, sdl_coef=0.0, rollout_is="token")
        now = logprobs(h, w, y)[0].detach()
        rest = dict(advantages=torch.tensor(a, dtype=D), old_logps=now + torch.randn(len(y)))
        rest["rollout_logps"] = rest["old_logps"] + 0.3 * torch.randn(len(y))
        _, want, _ = by_autograd(h, w, y, options, rest, o)
        _, got = linear_grpo_sdl(h, w, y, seq_ids=sequence_ids(), objective=o, block_rows=4, **rest)
        for name in ("pg_loss", "pg_clipfrac_low", "pg_clipfrac_high", "rollout_is_mean"):
            assert (got[name] - want[name]).abs() < 1e-7, name  # fractions are fp32
        ratio = (now - rest["old_logps"]).exp()[rest["advantages"][sequence_ids()] != 0]
        assert (got["ratio_max"] - ratio.max()).abs() < TOLERANCE and ratio.max() != ratio.min()
        low = ((now - rest["old_logps"]).exp() < 0.8) & (rest["advantages"][sequence_ids()] < 0)
        assert (got["pg_clipfrac_low"] - low.double().mean()).abs() < 1e-7 and low.any()


def test_numbers_of_the_step_and_the_scale():
    h, w, y, options, rest, o = fused_inputs("sequence correction, token mean", "plain")
    for name, objective in (("num_tokens", o), ("num_sequences", Objective(**OBJECTIVES["everything"]))):
        for number in (7, torch.tensor(7.0)):
            want, _, grads = by_autograd(h, w, y, options, rest | {name: 7}, objective)
            for scale in (0.25, torch.tensor(0.25)):
                loss, _ = linear_grpo_sdl(
                    h, w, y, seq_ids=sequence_ids(), objective=objective, loss_scale=scale, **{name: number}, **rest
                )
                assert (loss - want / 4).abs() < TOLERANCE
                for a, b in zip(torch.autograd.grad(loss, [h, w]), grads, strict=True):
                    assert (a - b / 4).abs().max() < TOLERANCE
    for wrong in (dict(num_sequences=0), dict(loss_scale=-1.0)):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            linear_grpo_sdl(h, w, y, seq_ids=sequence_ids(), objective=objective, **wrong, **rest)


def test_the_head_alone_may_be_scaled_afterwards():
    h, w, y, options, rest, o = fused_inputs("on policy", "bias")
    bias, frozen = options["bias"], h.detach()
    _, _, (_, d_weight, d_bias) = by_autograd(h, w, y, options, rest, o)
    loss, _ = linear_grpo_sdl(frozen, w, y, seq_ids=sequence_ids(), objective=o, bias=bias, **rest)
    got = torch.autograd.grad(3 * loss, [w, bias])
    assert all((a - 3 * b).abs().max() < TOLERANCE for a, b in zip(got, (d_weight, d_bias), strict=True))


def test_teacher_rows_that_cannot_be_told_apart_are_refused():
    h, w, y, options, rest, o = fused_inputs("on policy", "plain")
    rest.pop("teacher_logps"), rest.pop("sdl_mask")
    t, index = torch.randn(4, 12, dtype=D), torch.full((len(y),), -1)
    for bad in (4, 5, 1):
        index[:3] = torch.tensor([0, 1, bad])
        with pytest.raises(ValueError, match=rf"teacher_index\[{1 if bad == 1 else 2}\] is {bad}"):
            linear_grpo_sdl(
                h, w, y, seq_ids=sequence_ids(), objective=o, teacher_hidden=t, teacher_index=index, **rest
            )  # fmt: skip


def test_as_many_sequences_as_rows():
    """Advantages are read by sequence with cu_seqlens, by row with seq_ids."""
    h, w, y, options, _, _ = fused_inputs("on policy", "plain")
    h, y, o = h[:6], y[:6], Objective(kl_coef=0.0)
    a, borders = torch.tensor([1.0, -2.0, 3.0, 0.5, -1.0, 2.0], dtype=D), [0, 3, 3, 4, 4, 5, 6]
    ids = torch.tensor([0, 0, 0, 2, 4, 5])
    logps = logprobs(h, w, y)[0]
    for by, advantages in ((dict(cu_seqlens=borders), a[ids]), (dict(seq_ids=ids), a)):
        want, _ = grpo_sdl(logps, advantages=advantages, seq_ids=ids, objective=o)
        assert (linear_grpo_sdl(h, w, y, advantages=a, objective=o, **by)[0] - want).abs() < TOLERANCE
    assert torch.equal(fused.ids_of(torch.tensor(borders), 6), ids)


def test_values_that_cannot_be_right_are_named():
    h, w, y = torch.randn(6, 8), torch.randn(50, 8), torch.randint(50, (6,))
    given = dict(advantages=torch.ones(2), cu_seqlens=[0, 3, 6], objective=Objective(kl_coef=0))
    bad_h, bad_w = h.clone(), w.clone()
    bad_h[4, 1], bad_w[2, 2] = torch.nan, torch.inf
    for run in (linear_logprob, lambda *x: linear_grpo_sdl(*x, **given)):
        with pytest.raises(ValueError, match=r"hidden\[4\] holds NaN"):
            run(bad_h, w, y)
        with pytest.raises(ValueError, match="weight holds NaN or infinity"):
            run(h, bad_w, y)
    for wrong, message in (
        (dict(cu_seqlens=[0, 3, 5]), "cu_seqlens must rise from 0 to the number of rows 6"),
        (dict(cu_seqlens=[0, 4, 3, 6]), "cu_seqlens"),
        (dict(cu_seqlens=torch.tensor([0, 6])), r"advantages must be \[1\]"),
        (dict(cu_seqlens=None, seq_ids=torch.full((6,), 2)), "seq_ids"),
        (dict(teacher_hidden=h.double(), teacher_index=y), "teacher_hidden"),
        (dict(sdl_mask=y > 3), "sdl_mask"),
        (dict(teacher_logps=y.float(), sdl_mask=torch.ones(1).bool()), "sdl_mask"),
        (dict(temperature=torch.tensor(-1.0)), "temperature"),
        (dict(old_logps=torch.zeros(6, device="meta")), "old_logps is on meta"),
        (dict(main_grad=torch.nn.Parameter(w)), "main_grad must be a plain tensor"),
    ):
        with pytest.raises(ValueError, match=message):
            linear_grpo_sdl(h, w, y, **(given | wrong))


# --- shapes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "vocabulary"), [(1, 1), (1, 97), (65_537, 97), (3, 32_003), (2, 151_936), (2, 152_064)]
)
def test_any_shape(rows, vocabulary):
    torch.manual_seed(0)
    h = torch.randn(rows, 4, requires_grad=True)
    w = torch.randn(vocabulary, 4, requires_grad=True)
    y = torch.randint(vocabulary, (rows,))
    y[-1] = vocabulary - 1
    mine = linear_logprob(h, w, y, return_entropy=True, return_lse=True, block_rows=256)
    theirs = logprobs(h.double(), w.double(), y)
    assert (mine.logps <= 0).all()
    exact = torch.cat([(h @ w.T)[i : i + 4096].detach().double().log_softmax(-1) for i in range(0, rows, 4096)])
    bound = 2e-6 * (theirs[2].abs() / 16).clamp(min=1)
    gemm = (exact[torch.arange(rows), y] - theirs[0]).abs().max()
    for a, b in zip(mine, (theirs[0], theirs[1], theirs[2]), strict=True):
        assert ((a - b).abs() <= bound + 2 * gemm).all()
    exact = [x.detach().double().requires_grad_() for x in (h, w)]
    truth = torch.autograd.grad(logprobs(*exact, y)[0].sum(), exact)
    plain = torch.autograd.grad(logprobs(h, w, y)[0].sum(), [h, w])
    for a, b, want in zip(torch.autograd.grad(mine.logps.sum(), [h, w]), plain, truth, strict=True):
        assert (a - want).norm() <= 1.1 * (b - want).norm() + 1e-6 * want.norm()


def test_peaked_flat_and_shifted_logits():
    torch.manual_seed(0)
    for scale, shift in ((1e-3, 0.0), (60.0, 0.0), (1.0, -14.0)):
        h, w = torch.randn(16, 8), torch.randn(1000, 8) * scale
        bias = torch.full((1000,), shift)
        y = torch.randint(1000, (16,))
        y[0] = (h[0] @ w.T).argmax()
        mine = linear_logprob(h, w, y, bias=bias, return_lse=True)
        theirs = logprobs(h.double(), w.double(), y, bias=bias.double())
        plain = torch.log_softmax((h @ w.T + bias).double(), -1).gather(1, y[:, None])[:, 0]
        error, gemm = (mine.logps - theirs[0]).abs().max(), (plain - theirs[0]).abs().max()
        assert error <= 2 * gemm + 1e-6 * (theirs[2].abs().max() / 16).clamp(min=1) and (mine.logps <= 0).all()


def test_strided_inputs_tied_weights_and_nothing_to_learn():
    torch.manual_seed(0)
    wide = torch.randn(10, 24, dtype=D)
    h, w, y = wide[:, ::2], torch.randn(12, 37, dtype=D).T, torch.randint(37, (10,))
    assert (linear_logprob(h, w, y).logps - logprobs(h, w, y)[0]).abs().max() < TOLERANCE
    embedding = torch.randn(37, 12, dtype=D, requires_grad=True)  # input embedding and head in one
    kwargs = dict(advantages=torch.ones(1, dtype=D), objective=Objective(kl_coef=0))
    loss, _ = linear_grpo_sdl(embedding[y], embedding, y, cu_seqlens=[0, 10], **kwargs)
    want = grpo_sdl(
        logprobs(embedding[y], embedding, y)[0], seq_ids=torch.zeros(10, dtype=torch.int64), **kwargs
    )[0]  # fmt: skip
    got, expected = (torch.autograd.grad(x, embedding)[0] for x in (loss, want))
    assert (got - expected).abs().max() < TOLERANCE
    for targets in (torch.full((10,), -100), y[:0]):
        states = h[: len(targets)].detach().requires_grad_()
        loss, stats = linear_grpo_sdl(states, embedding, targets, cu_seqlens=[0, len(targets)], **kwargs)
        loss.backward()
        assert loss == 0 and not states.grad.any() and all(torch.isfinite(v) for v in stats.values())


@pytest.mark.slow
def test_log_probs_pass_gradcheck():
    for weight_grad in (False, True):
        h, w, y, options = head_inputs(6, 3, "softcap, scale, bias, temperature per row", weight_grad)
        bias = options.pop("bias")

        def run(h, w, b, y=y, options=options):
            return linear_logprob(h, w, y, bias=b, return_entropy=True, return_lse=True, block_rows=4, **options)

        assert torch.autograd.gradcheck(run, (h, w, bias))


# --- memory -----------------------------------------------------------------------------------------------------------


def test_the_meter_counts_what_is_alive():
    def run():
        a = torch.zeros(1000)
        b = a + 1  # two of 4000 bytes at once
        del a
        return [b * 2]

    assert peak_bytes(run, torch.device("cpu")) == 8000 - 4000


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["logprob", "frozen", "entropy", "trainable", "objective", "main_grad"])
@pytest.mark.parametrize(
    "dtype", [torch.float32, *(pytest.param(d, marks=pytest.mark.slow) for d in (torch.bfloat16, torch.float16))]
)
@pytest.mark.parametrize(("rows", "hidden", "vocabulary"), [(3_000, 64, 20_000), (1_200, 2_048, 2_000)])
def test_peak_bytes_stay_below_the_formula(mode, dtype, rows, hidden, vocabulary):
    block, trains = 512, mode in ("trainable", "objective", "main_grad")
    torch.manual_seed(0)
    h = torch.randn(rows, hidden).to(dtype).requires_grad_(mode != "logprob")
    w = torch.randn(vocabulary, hidden).to(dtype).requires_grad_(trains)
    y = torch.randint(vocabulary, (rows,))
    main_grad = torch.zeros(vocabulary, hidden) if mode == "main_grad" else None

    def run():
        if mode in ("objective", "main_grad"):
            loss, _ = linear_grpo_sdl(
                h, w, y, advantages=torch.randn(rows), cu_seqlens=[0, rows], teacher_logps=torch.zeros(rows),
                block_rows=block, objective=Objective(kl_coef=0), main_grad=main_grad,
            )  # fmt: skip
        else:
            out = linear_logprob(h, w, y, return_entropy=mode == "entropy", block_rows=block)
            loss = out.logps.sum() + (out.entropy.sum() if mode == "entropy" else 0)
        if loss.requires_grad:
            loss.backward()
        made = [x.grad for x in (h, w) if x.grad is not None]
        h.grad = w.grad = None
        return [loss, *made]

    two = mode == "entropy"
    formula = (4 + (h.element_size() if two else 0)) * vocabulary * block
    formula += 16 * hidden * block + 40 * rows + (32 << 20)
    if trains:
        formula += 0 if main_grad is not None else 4 * vocabulary * hidden
    else:
        formula += rows * hidden * (4 if dtype == torch.float16 else h.element_size()) * (2 if two else 1)
    if mode in ("objective", "main_grad"):
        formula += 160 * rows
    assert peak_bytes(run, torch.device("cpu")) <= formula
