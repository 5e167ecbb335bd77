"""Every regime of the objective against DESIGN's formula written out by hand, in float64 to 1e-10."""

from __future__ import annotations

import math

import pytest
import torch

from genevolve_fast.ops import Objective, grpo_sdl, linear_logprob, reference, select_sdl
from genevolve_fast.ops.reference import logprobs

D = torch.float64
TOLERANCE = 1e-10


def by_hand(logp, a, o: Objective, *, old=None, rollout=None, ref=None, teacher=None, chosen=(), seqs=None):
    """(loss, gradient per row) of N = 1-sequence-per-row defaults: seq-mean-token-sum, plain floats."""
    seqs = seqs or [0] * len(logp)
    n = len(set(seqs))
    loss, grad = 0.0, []
    for i, lp in enumerate(logp):
        before = lp if old is None else old[i]
        ratio = math.exp(max(-20, min(20, lp - before)))
        w = 1.0
        if o.rollout_is == "token":
            w = min(math.exp(max(-20, min(20, before - rollout[i]))), o.rollout_is_cap)
        elif o.rollout_is == "sequence":
            total = sum(old[j] - rollout[j] for j in range(len(logp)) if seqs[j] == seqs[i])
            w = min(math.exp(max(-20, min(20, total))), o.rollout_is_cap)
        advantage = a[seqs[i]]
        low, high = 1 - o.clip_ratio_low, 1 + o.clip_ratio_high
        free, bounded = ratio * advantage, min(max(ratio, low), high) * advantage
        inside = low <= ratio <= high or free < bounded
        value, slope = min(free, bounded), ratio * advantage if inside else 0.0
        if o.dual_clip and advantage < 0 and value < o.dual_clip * advantage:
            value, slope = o.dual_clip * advantage, 0.0
        g = -w * slope
        loss -= w * value / n
        if ref is not None:
            d = ref[i] - lp
            clamped = max(-20, min(20, d))
            loss += o.kl_coef * (math.exp(clamped) - 1 - clamped) / n
            g += o.kl_coef * (1 - math.exp(d)) if abs(d) < 20 else 0.0
        if i in chosen:
            gap = max(-o.sdl_clamp, min(o.sdl_clamp, lp - teacher[i]))
            rho = min(math.exp(max(-20, min(20, lp - before))), o.sdl_rho_cap)
            loss += o.sdl_coef * w * rho * (math.exp(-gap) - 1 + gap) / n
            if o.sdl_grad == "k3":
                g += o.sdl_coef * w * rho * (1 - math.exp(-gap)) * (abs(lp - teacher[i]) < o.sdl_clamp)
            else:
                g += o.sdl_coef * w * rho * gap
        grad.append(g / n)
    return loss, grad


REGIMES = {
    "on policy, inside the clip": dict(logp=[-1.0, -0.2], a=[0.7], kl=0),
    "ratio above the upper clip, positive advantage": dict(logp=[-0.5], old=[-1.0], a=[1.0], kl=0),
    "ratio above the upper clip, negative advantage": dict(logp=[-0.5], old=[-1.0], a=[-1.0], kl=0),
    "ratio below the lower clip, negative advantage": dict(logp=[-1.5], old=[-1.0], a=[-1.0], kl=0),
    "ratio below the lower clip, positive advantage": dict(logp=[-1.5], old=[-1.0], a=[1.0], kl=0),
    "dual clip": dict(logp=[-0.1], old=[-2.5], a=[-1.0], kl=0, o=dict(dual_clip=3.0)),
    "log-ratio beyond its clamp": dict(logp=[-0.1], old=[-40.0], a=[-1.0], kl=0, clamp=True),
    "KL inside its clamp": dict(logp=[-1.0, -3.0], ref=[-1.4, -0.5], a=[0.0], kl=0.3),
    "KL beyond its clamp": dict(logp=[-30.0, -1.0], ref=[-2.0, -28.0], a=[0.0], kl=0.3),
    "rollout correction per token": dict(
        logp=[-1.0, -2.0], rollout=[-1.2, -0.5], a=[0.8], kl=0, o=dict(rollout_is="token")
    ),
    "rollout correction at its cap": dict(logp=[-1.0], rollout=[-4.0], a=[0.8], kl=0, o=dict(rollout_is="token")),
    "rollout correction per sequence": dict(
        logp=[-1.0, -2.0, -0.3],
        old=[-1.1, -1.9, -0.4],
        rollout=[-1.3, -2.0, -0.1],
        a=[0.8, -0.5],
        seqs=[0, 0, 1],
        kl=0,
        o=dict(rollout_is="sequence"),
    ),
    "distillation inside everything": dict(logp=[-1.0, -2.0], teacher=[-0.4, -2.5], chosen=(0, 1), a=[0.0], kl=0),
    "distillation beyond its clamp": dict(logp=[-15.0, -0.1], teacher=[-1.0, -14.0], chosen=(0, 1), a=[0.0], kl=0),
    "distillation at the cap of rho": dict(logp=[-0.5], old=[-3.0], teacher=[-0.1], chosen=(0,), a=[0.0], kl=0),
    "distillation, slope of k3": dict(
        logp=[-1.0, -12.0], teacher=[-0.4, -1.0], chosen=(0, 1), a=[0.0], kl=0, o=dict(sdl_grad="k3")
    ),
    "everything at once": dict(
        logp=[-1.0, -2.0, -0.3],
        old=[-1.1, -1.5, -0.4],
        rollout=[-1.3, -2.0, -0.1],
        ref=[-1.2, -1.0, -0.9],
        teacher=[-0.4, -2.5, -0.2],
        chosen=(0, 1, 2),
        a=[0.8, -0.5],
        seqs=[0, 0, 1],
        kl=0.05,
        o=dict(rollout_is="token"),
    ),
    "one-token reply": dict(logp=[-0.7], teacher=[-0.1], chosen=(0,), a=[1.3], kl=0),
    "zero advantage": dict(logp=[-0.7, -0.9], a=[0.0], kl=0),
}


@pytest.mark.parametrize("name", REGIMES)
def test_regime(name):
    r = dict(REGIMES[name])
    o = Objective(kl_coef=r["kl"], sdl_permille=1000, **r.get("o", {}))
    seqs, a = r.get("seqs", [0] * len(r["logp"])), r["a"]
    tensor = lambda key: None if r.get(key) is None else torch.tensor(r[key], dtype=D)  # noqa: E731
    logp = torch.tensor(r["logp"], dtype=D, requires_grad=True)
    given = dict(
        advantages=torch.tensor(a, dtype=D),
        seq_ids=torch.tensor(seqs),
        old_logps=tensor("old"),
        rollout_logps=tensor("rollout"),
        ref_logps=tensor("ref"),
        teacher_logps=tensor("teacher"),
        objective=o,
    )
    loss, stats = grpo_sdl(logp, **given)
    loss.backward()
    want, slope = by_hand(
        r["logp"],
        a,
        o,
        old=r.get("old"),
        rollout=r.get("rollout"),
        ref=r.get("ref"),
        teacher=r.get("teacher"),
        chosen=r.get("chosen", ()),
        seqs=seqs,
    )
    if r.get("clamp"):
        slope = [0.0]  # beyond the clamp the ratio is constant
    assert abs(loss.item() - want) <= TOLERANCE * max(1, abs(want))
    assert (logp.grad - torch.tensor(slope, dtype=D)).abs().max() <= TOLERANCE * max(1, max(map(abs, slope)))
    parts = stats["pg_loss"] + stats["kl_loss"] + stats["sdl_loss"]
    assert torch.allclose(parts, loss.detach(), atol=1e-12)
    closed_form = slopes(logp.detach(), o, given)
    assert (logp.grad - closed_form).abs().max() <= TOLERANCE * max(1, max(map(abs, slope)))


def slopes(logps, o, given):
    """d loss / d logp as a pass that makes d logits computes it."""
    unused = dict(sdl_mask=None, loss_mask=None, num_sequences=None, num_tokens=None)
    c = reference.constants(logps, **given, **unused)
    slope, w = reference.policy_slope(logps, c, o)
    if c.teacher is not None:
        slope = slope + reference.distillation_slope(logps, c, w, o)[0]
    return slope / c.denominator


@pytest.mark.parametrize("mode", ["seq-mean-token-sum", "seq-mean-token-mean", "token-mean", "seq-mean-token-sum-norm"])
@pytest.mark.parametrize("given", [False, True])
def test_aggregation(mode, given):
    seqs = torch.tensor([0, 0, 0, 1, 2, 2])
    logp = torch.tensor([-0.1, -0.2, -0.3, -0.4, -0.5, -0.6], dtype=D, requires_grad=True)
    a = torch.tensor([1.0, 2.0, -1.0], dtype=D)
    o = Objective(kl_coef=0, loss_agg_mode=mode, max_length=50 if mode.endswith("norm") else None)
    n, m = (7, 40) if given else (3, 6)
    loss, _ = grpo_sdl(
        logp,
        advantages=a,
        seq_ids=seqs,
        objective=o,
        num_sequences=n if given else None,
        num_tokens=m if given else None,
    )
    loss.backward()
    divisor = {
        "seq-mean-token-sum": [n] * 6,
        "seq-mean-token-mean": [n * c for c in (3, 3, 3, 1, 2, 2)],
        "token-mean": [m] * 6,
        "seq-mean-token-sum-norm": [n * 50] * 6,
    }[mode]
    want = -a[seqs] / torch.tensor(divisor, dtype=D)
    assert (logp.grad - want).abs().max() <= TOLERANCE


@pytest.mark.parametrize("bad", [float("-inf"), float("nan")])
@pytest.mark.parametrize("own", [-2.0, float("-inf"), float("nan")])
@pytest.mark.parametrize("sdl_grad", ["reverse_kl", "k3"])
def test_masked_rows_give_nothing_whatever_they_hold(bad, own, sdl_grad):
    logp = torch.tensor([-1.0, own, -3.0], dtype=D, requires_grad=True)
    keep = torch.tensor([True, False, True])
    poison = torch.tensor([-1.0, bad, -2.0], dtype=D)
    loss, stats = grpo_sdl(
        logp,
        advantages=torch.tensor([1.0, bad, 0.5], dtype=D),
        seq_ids=torch.zeros(3, dtype=torch.int64),
        old_logps=poison,
        ref_logps=poison,
        teacher_logps=poison,
        loss_mask=keep,
        objective=Objective(kl_coef=0.1, sdl_grad=sdl_grad),
    )
    loss.backward()
    assert torch.isfinite(loss) and logp.grad[1] == 0 and torch.isfinite(logp.grad).all()
    assert all(torch.isfinite(v) for v in stats.values())


def test_only_logps_get_a_gradient():
    logp, *others = (torch.tensor([-1.0, -2.0], dtype=D, requires_grad=True) for _ in range(6))
    old, rollout, ref, teacher, advantages = others
    o = Objective(kl_coef=0.1, rollout_is="token")
    loss, _ = grpo_sdl(
        logp,
        advantages=advantages,
        seq_ids=torch.tensor([0, 1]),
        old_logps=old - 0.1,
        rollout_logps=rollout - 0.2,
        ref_logps=ref - 0.3,
        teacher_logps=teacher - 0.4,
        objective=o,
    )
    loss.backward()
    assert logp.grad.any() and all(x.grad is None for x in others)


def test_shapes_that_would_broadcast_are_refused():
    x, s = torch.zeros(3), torch.zeros(3, dtype=torch.int64)
    good = dict(logps=x, advantages=torch.zeros(1), seq_ids=s, objective=Objective(kl_coef=0))
    for name in ("old_logps", "rollout_logps", "ref_logps", "teacher_logps"):
        for wrong in (x[:1], x[:, None], torch.zeros(())):
            with pytest.raises(ValueError, match=name):
                grpo_sdl(**good | {name: wrong})
    for name, wrong in (
        ("logps", x[:, None]),
        ("seq_ids", s[:2]),
        ("seq_ids", s.int()),
        ("advantages", x[None]),
        ("sdl_mask", torch.ones(2, dtype=torch.bool)),
        ("loss_mask", torch.ones(3)),
    ):
        with pytest.raises(ValueError, match=name):
            grpo_sdl(**good | {name: wrong})


def test_all_rows_masked_keep_the_graph_connected():
    logp = torch.tensor([-1.0], dtype=D, requires_grad=True)
    loss, _ = grpo_sdl(
        logp,
        advantages=torch.tensor([1.0]),
        seq_ids=torch.tensor([0]),
        loss_mask=torch.tensor([False]),
        objective=Objective(kl_coef=0),
    )
    loss.backward()
    assert loss == 0 and logp.grad == 0


def test_smooth_parts_pass_gradcheck():
    torch.manual_seed(0)
    logp = (-torch.rand(6, dtype=D) - 0.1).requires_grad_()
    old, ref, teacher = logp.detach() + 0.05, logp.detach() - 0.3, logp.detach() + 0.2
    seqs, a = torch.tensor([0, 0, 1, 1, 1, 2]), torch.tensor([0.5, -0.4, 1.0], dtype=D)
    o = Objective(sdl_coef=0.0, kl_coef=0.2)
    run = lambda x: grpo_sdl(x, advantages=a, seq_ids=seqs, old_logps=old, ref_logps=ref, objective=o)[0]  # noqa: E731
    assert torch.autograd.gradcheck(run, logp)
    k3 = Objective(sdl_grad="k3", kl_coef=0.0, sdl_permille=1000, sdl_rho_cap=1e9)
    rho = (logp.detach() - old).exp()  # the k3 option detaches ρ: compare with ρ held fixed
    value = lambda x: (rho * (torch.exp(teacher - x) - 1 + x - teacher)).sum() * 2 / 3  # noqa: E731
    zero = torch.zeros(3, dtype=D)
    x = logp.detach().clone().requires_grad_()
    loss, _ = grpo_sdl(x, advantages=zero, seq_ids=seqs, old_logps=old, teacher_logps=teacher, objective=k3)
    loss.backward()
    y = logp.detach().clone().requires_grad_()
    value(y).backward()
    assert torch.allclose(x.grad, y.grad, atol=1e-12)


def test_selection_takes_the_widest_gaps_and_ties_go_to_the_smaller_position():
    o = Objective(sdl_permille=400)
    logp = torch.zeros(8, dtype=D)
    teacher = torch.tensor([1.0, 3.0, 3.0, 2.0, 3.0, 9.0, 0.5, 0.5], dtype=D)
    seqs = torch.tensor([0, 0, 0, 0, 0, 1, 2, 2])
    eligible = torch.tensor([True, True, True, True, True, False, True, True])
    got = select_sdl(logp, teacher, eligible, seqs, o)
    assert got.nonzero()[:, 0].tolist() == [1, 2, 6]
    batch = select_sdl(logp, teacher, eligible, seqs, Objective(sdl_permille=400, sdl_select="batch"))
    assert batch.nonzero()[:, 0].tolist() == [1, 2, 4]
    none = select_sdl(logp, teacher, torch.zeros_like(eligible), seqs, o)
    assert not none.any()


def test_unclamped_gaps_decide_the_selection():
    teacher = torch.tensor([-30.0, -50.0], dtype=D)
    got = select_sdl(
        torch.zeros(2, dtype=D),
        teacher,
        torch.ones(2, dtype=torch.bool),
        torch.zeros(2, dtype=torch.int64),
        Objective(sdl_permille=500),
    )
    assert got.tolist() == [False, True]


def test_arguments_that_cannot_work_are_refused():
    x, s = torch.zeros(1), torch.zeros(1, dtype=torch.int64)
    for o, message in (
        (Objective(rollout_is="token", kl_coef=0), "rollout_logps"),
        (Objective(kl_coef=0.1), "ref_logps"),
    ):
        with pytest.raises(ValueError, match=message):
            grpo_sdl(x, advantages=x, seq_ids=s, objective=o)
    with pytest.raises(ValueError, match="old_logps"):
        grpo_sdl(x, advantages=x, seq_ids=s, rollout_logps=x, objective=Objective(rollout_is="sequence", kl_coef=0))
    for wrong in (
        dict(loss_agg_mode="mean"),
        dict(clip_ratio_low=1.0),
        dict(sdl_permille=0),
        dict(dual_clip=0.5),
        dict(loss_agg_mode="seq-mean-token-sum-norm"),
        dict(max_length=5),
        dict(kl_coef=-1),
        dict(sdl_clamp=0),
        *({name: float("nan")} for name in ("clip_ratio_low", "clip_ratio_high", "kl_coef", "sdl_coef", "sdl_rho_cap")),
        dict(dual_clip=float("nan")),
        dict(max_length=-1, loss_agg_mode="seq-mean-token-sum-norm"),
    ):
        with pytest.raises(ValueError, match=next(iter(wrong)).split("_")[0]):
            Objective(**wrong)


# --- the head ---------------------------------------------------------------------------------------------------------

OPTIONS = {
    "plain": {},
    "temperature": dict(temperature=0.7),
    "temperature per row": dict(temperature="rows"),
    "bias": dict(bias=True),
    "softcap, scale, bias, temperature": dict(softcap=3.0, logit_scale=1.3, bias=True, temperature=0.9),
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("rows", [1, 7, 8, 21])
def test_head_equals_the_reference(name, rows):
    torch.manual_seed(rows)
    options = dict(OPTIONS[name])
    h = torch.randn(rows, 12, dtype=D, requires_grad=True)
    w = torch.randn(37, 12, dtype=D, requires_grad=True)
    b = torch.randn(37, dtype=D, requires_grad=True) if options.pop("bias", False) else None
    if options.get("temperature") == "rows":
        options["temperature"] = torch.rand(rows, dtype=D) + 0.3
    y = torch.randint(37, (rows,))
    y[0], y[-1] = 36, 0
    g = torch.randn(3, rows, dtype=D)
    inputs = [h, w] + ([b] if b is not None else [])
    mine = linear_logprob(h, w, y, bias=b, block_rows=8, return_entropy=True, return_lse=True, **options)
    theirs = logprobs(h, w, y, bias=b, **options)
    for x, z in zip(mine, theirs, strict=True):
        assert (x - z).abs().max() < TOLERANCE
    got = torch.autograd.grad(sum((x * v).sum() for x, v in zip(mine, g, strict=True)), inputs)
    want = torch.autograd.grad(sum((x * v).sum() for x, v in zip(theirs, g, strict=True)), inputs)
    assert all((x - z).abs().max() < TOLERANCE for x, z in zip(got, want, strict=True))


def test_head_leaves_ignored_rows_alone():
    h, w = torch.randn(5, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    y = torch.tensor([1, -100, 3, -100, 10])
    out = linear_logprob(h, w, y, return_entropy=True)
    (out.logps.sum() + out.entropy.sum()).backward()
    assert out.logps[1] == 0 and out.entropy[3] == 0 and not h.grad[[1, 3]].any() and h.grad[0].any()
    empty = linear_logprob(h[:0], w, y[:0])
    assert empty.logps.shape == (0,)
    empty.logps.sum().backward()


def test_head_ignores_rows_that_are_not_finite():
    torch.manual_seed(0)
    clean = torch.randn(4, 8)
    w, y = torch.randn(11, 8), torch.tensor([1, -100, 3, 10])
    grads = []
    for fill in (0.5, float("nan"), float("inf")):
        h, weight = clean.clone(), w.clone().requires_grad_()
        h[1] = fill
        h.requires_grad_()
        linear_logprob(h, weight, y).logps.sum().backward()
        assert not h.grad[1].any()
        grads.append(weight.grad)
    assert torch.equal(grads[0], grads[1]) and torch.equal(grads[0], grads[2])


def test_head_is_exact_under_autocast():
    torch.manual_seed(0)
    y = torch.tensor([1, 2, 3])
    results = []
    for mixed in (False, True):
        torch.manual_seed(1)
        h, w = torch.randn(3, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
            out = linear_logprob(h, w, y).logps
            out.sum().backward()
        results.append((out.detach(), h.grad, w.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_head_gives_equal_rows_equal_bits():
    torch.manual_seed(0)
    w, row = torch.randn(513, 64), torch.randn(1, 64)
    y = torch.full((1,), 7)
    alone = linear_logprob(row, w, y, return_entropy=True, return_lse=True, block_rows=32)
    for n in (2, 31, 32, 33, 100):
        for at in (0, n // 2, n - 1):
            h = torch.randn(n, 64)
            h[at] = row[0]
            out = linear_logprob(h, w, y.expand(n).contiguous(), return_entropy=True, return_lse=True, block_rows=32)
            assert all(torch.equal(a[0], b[at]) for a, b in zip(alone, out, strict=True))


def test_head_is_never_above_zero():
    h, w = 40 * torch.randn(64, 16), torch.randn(29, 16)
    assert (linear_logprob(h, w, torch.randint(29, (64,))).logps <= 0).all()


def test_head_names_the_wrong_argument():
    h, w, y = torch.randn(3, 4), torch.randn(5, 4), torch.zeros(3, dtype=torch.int64)
    for wrong, message in (
        (dict(hidden=torch.randn(3, 5)), "hidden"),
        (dict(targets=y[:2]), "targets"),
        (dict(targets=y.int()), "targets"),
        (dict(targets=torch.tensor([0, -1, 0])), r"targets\[1\] is -1"),
        (dict(targets=torch.tensor([0, 0, 5])), r"targets\[2\] is 5"),
        (dict(temperature=float("nan")), "temperature"),
        (dict(bias=torch.zeros(4)), "bias"),
        (dict(temperature=0.0), "temperature"),
        (dict(softcap=-1.0), "softcap"),
        (dict(block_rows=0), "block_rows"),
        (dict(temperature=torch.ones(2)), "temperature"),
    ):
        with pytest.raises(ValueError, match=message):
            linear_logprob(**(dict(hidden=h, weight=w, targets=y) | wrong))
