"""Log-probs under the sampling mask: the softmax over the ids that top-p kept, against brute force in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_head import HEADS, LENGTHS, OBJECTIVES, fused_inputs, head_inputs, sequence_ids
from test_operators import OnTheDevice, is_float

from benchmarks.memory import peak_bytes
from genevolve_fast.ops import Objective, SamplingMask, grpo_sdl, linear_grpo_sdl, linear_logprob
from genevolve_fast.ops.reference import logprobs
from genevolve_fast.ops.sampling_mask import RowSets

D = torch.float64
TOLERANCE = 1e-10
MASKABLE = [name for name in HEADS if "softcap" not in name] + ["scale, bias"]
HEADS["scale, bias"] = dict(logit_scale=1.3, bias=True)


def sets_of(targets, vocabulary=37, seed=0, most=9, bare=3):
    """Random sets with the target somewhere in each; every `bare`-th row has none."""
    random, ids, counts = torch.Generator().manual_seed(seed), [], []
    for row, y in enumerate(targets.tolist()):
        if bare and row % bare == 1:
            counts.append(0)
            continue
        size = int(torch.randint(1, most, (), generator=random))
        others = torch.randperm(vocabulary, generator=random)[:size]
        own = others if y < 0 else torch.cat([others[others != y], torch.tensor([y])])
        ids.append(own[torch.randperm(len(own), generator=random)])
        counts.append(len(own))
    return SamplingMask(torch.cat(ids).int(), torch.tensor(counts, dtype=torch.int32))


def as_on_a_gpu(monkeypatch):
    """The host knows bounds of sizes only, and ignored rows go through the head."""
    monkeypatch.setattr(RowSets, "_bound", lambda self, rows, last: self._at_most(rows, len(last)))
    monkeypatch.setattr("genevolve_fast.ops.head.entering_rows", lambda *x: (None, False))
    monkeypatch.setattr("genevolve_fast.ops.fused._live_rows", lambda c: (None, False))


def test_the_reference_is_the_softmax_over_the_set():
    h, w, y, options = head_inputs(10, 0, "temperature per row")
    h, w, mask = h.detach(), w.detach(), sets_of(y)
    logps, entropy, lse = logprobs(h, w, y, sampling_mask=mask, **options)
    for row, ids in enumerate(mask.ids.split(mask.counts.tolist())):
        ids = ids.tolist() or list(range(len(w)))
        z = [float(h[row] @ w[i]) / float(options["temperature"][row]) for i in ids]
        p = [math.exp(x) / sum(map(math.exp, z)) for x in z]
        assert math.isclose(math.log(p[ids.index(int(y[row]))]), float(logps[row]), abs_tol=1e-12)
        assert math.isclose(-sum(x * math.log(x) for x in p), float(entropy[row]), abs_tol=1e-12)
        assert math.isclose(math.log(sum(map(math.exp, z))), float(lse[row]), abs_tol=1e-12)


@pytest.mark.parametrize("name", MASKABLE)
@pytest.mark.parametrize("trains", ["both", "hidden"])
@pytest.mark.parametrize("host_knows", [True, False])
def test_logprobs_and_their_gradients(name, trains, host_knows, monkeypatch):
    if not host_knows:
        as_on_a_gpu(monkeypatch)
    h, w, y, options = head_inputs(21, 0, name, weight_grad=trains == "both")
    mask = sets_of(y)
    mine = linear_logprob(
        h, w, y, return_entropy=True, return_lse=True, block_rows=8, workspace_mb=1, sampling_mask=mask, **options
    )
    theirs = logprobs(h, w, y, sampling_mask=mask, **options)
    assert all((a - b).abs().max() < TOLERANCE for a, b in zip(mine, theirs, strict=True))
    g = torch.randn(3, 21, dtype=D)
    inputs = [x for x in (h, w, options.get("bias")) if x is not None and x.requires_grad]
    got, want = (
        torch.autograd.grad(sum((x * v).sum() for x, v in zip(out, g, strict=True)), inputs) for out in (mine, theirs)
    )
    assert all((a - b).abs().max() < TOLERANCE for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("trains", ["both", "hidden"])
def test_in_fp32_and_bf16_it_is_as_exact_as_without(trains):
    torch.manual_seed(0)
    h64, w64, y = torch.randn(30, 64, dtype=D), torch.randn(900, 64, dtype=D), torch.randint(900, (30,))
    mask = sets_of(y, 900, most=40)
    for dtype, tolerance in ((torch.float32, 2e-5), (torch.bfloat16, 2e-2)):
        h, w = h64.to(dtype).requires_grad_(), w64.to(dtype).requires_grad_(trains == "both")
        truth = [x.detach().double().requires_grad_(x.requires_grad) for x in (h, w)]
        outs = (
            linear_logprob(h, w, y, return_entropy=True, sampling_mask=mask, block_rows=16)[:2],
            logprobs(*truth, y, sampling_mask=mask)[:2],
        )
        assert (outs[0][0] - outs[1][0]).abs().max() < 2e-5 and (outs[0][1] - outs[1][1]).abs().max() < 2e-5
        for logps, entropy in outs:
            (logps.sum() + entropy.sum()).backward()
        for mine, true in zip((h, w), truth, strict=True):
            if true.grad is not None:
                assert (mine.grad.double() - true.grad).abs().max() <= tolerance * true.grad.abs().max()


def objective_by_autograd(h, w, y, options, rest, o, mask):
    rest = dict(rest)
    states, index = rest.pop("teacher_hidden", None), rest.pop("teacher_index", None)
    if states is not None:
        has = index >= 0
        scored = logprobs(states[index.clamp(min=0)], w, y, sampling_mask=mask, **options)[0].detach()
        rest |= dict(teacher_logps=torch.where(has, scored, 0), sdl_mask=has)
    logps, entropy, _ = logprobs(h, w, y, sampling_mask=mask, **options)
    loss, stats = grpo_sdl(logps, seq_ids=sequence_ids(), objective=o, **rest)
    inputs = [x for x in (h, w, options.get("bias")) if x is not None and x.requires_grad]
    return loss, stats | dict(entropy=entropy.mean()), torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("head", ["temperature per row", "scale, bias"])
@pytest.mark.parametrize("teacher", ["log-probs", "hidden"])
@pytest.mark.parametrize("host_knows", [True, False])
def test_the_objective(name, head, teacher, host_knows, monkeypatch):
    """Blocks of four rows cut three of the five sequences; the last teacher rows serve nobody."""
    if not host_knows:
        as_on_a_gpu(monkeypatch)
    h, w, y, options, rest, o = fused_inputs(name, head)
    if teacher == "hidden" and o.sdl_coef:
        rest.pop("teacher_logps"), rest.pop("sdl_mask")
        index = torch.full((len(h),), -1)
        index[4:17] = torch.randperm(13)
        rest |= dict(teacher_hidden=torch.randn(15, 12, dtype=D), teacher_index=index)
        if head == "temperature per row":  # every teacher row, also an idle one, has a temperature of its own
            rest["teacher_hidden"] = rest["teacher_hidden"][:13]
    mask = sets_of(y)
    want, stats, grads = objective_by_autograd(h, w, y, options, rest, o, mask)
    cu = torch.tensor([0, *LENGTHS]).cumsum(0)
    loss, mine = linear_grpo_sdl(
        h, w, y, cu_seqlens=cu, objective=o, block_rows=4, sampling_mask=mask, **options, **rest
    )
    got = torch.autograd.grad(loss, [x for x in (h, w, options.get("bias")) if x is not None])
    assert (loss - want).abs() < TOLERANCE
    assert all((a - b).abs().max() < TOLERANCE for a, b in zip(got, grads, strict=True))
    entropy = ["entropy"] if o.kl_coef else []  # without the KL term rows without a slope are left out of it
    for key in ("pg_loss", "kl_loss", "sdl_loss", "sdl_kl", "kl", *entropy):
        assert (mine[key] - stats[key]).abs() < TOLERANCE, key


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_a_set_of_the_whole_vocabulary_is_none(data):
    rows, vocabulary = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 40))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    h, w = torch.randn(rows, 6, requires_grad=True), torch.randn(vocabulary, 6, requires_grad=True)
    y = torch.randint(vocabulary, (rows,))
    whole = [data.draw(st.booleans()) for _ in range(rows)]
    ids = [torch.randperm(vocabulary) for has in whole if has]
    mask = SamplingMask(torch.cat([torch.empty(0).long(), *ids]), torch.tensor([vocabulary * has for has in whole]))
    more = dict(block_rows=data.draw(st.integers(1, 5)))
    results = []
    for given_mask in (None, mask):
        out = linear_logprob(h, w, y, return_entropy=True, return_lse=True, sampling_mask=given_mask, **more)
        loss, _ = linear_grpo_sdl(
            h, w, y, advantages=torch.ones(1), cu_seqlens=[0, rows], teacher_hidden=h.detach().flip(0),
            teacher_index=torch.arange(rows), objective=Objective(kl_coef=0, sdl_permille=400),
            sampling_mask=given_mask, **more,
        )  # fmt: skip
        total = out.logps.sum() + out.entropy.sum() + loss
        results.append([*(x.detach() for x in out), *torch.autograd.grad(total, [h, w])])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_bits_do_not_depend_on_the_other_rows():
    torch.manual_seed(0)
    h, w, y = torch.randn(1, 16).repeat(40, 1), torch.randn(301, 16), torch.full((40,), 7)
    own = torch.tensor([9, 7, 200, 41])
    mask = SamplingMask(own.repeat(20), torch.tensor([4, 0]).repeat(20))
    for size in (dict(block_rows=64), dict(block_rows=8)):
        out = linear_logprob(h, w, y, return_entropy=True, return_lse=True, sampling_mask=mask, **size)
        plain = linear_logprob(h, w, y, return_entropy=True, return_lse=True, **size)
        assert all((a[::2] == a[0]).all() and torch.equal(a[1::2], b[1::2]) for a, b in zip(out, plain, strict=True))
    assert (out.logps[0] > out.logps[1]) and out.entropy[0] < math.log(4) < out.entropy[1]


def test_probabilities_outside_the_set_are_zero_at_any_temperature():
    h, w, y, _ = head_inputs(9, 3, "plain")
    for tau in (1e-6, 0.7, 1e6):
        h32, w32 = (x.detach().float().requires_grad_() for x in (h, w))
        out = linear_logprob(
            h32, w32, y, temperature=tau, return_entropy=True, block_rows=4, sampling_mask=sets_of(y, bare=0)
        )
        want = logprobs(h, w, y, temperature=tau, sampling_mask=sets_of(y, bare=0))
        assert torch.isfinite(out.logps).all() and (out.entropy - want[1]).abs().max() < 1e-3
        d = torch.autograd.grad(out.logps.sum() + out.entropy.sum(), w32)[0]
        never = torch.ones(37, dtype=torch.bool)
        never[sets_of(y, bare=0).ids.long()] = False
        assert torch.isfinite(d).all() and not d[never].any()


def test_one_id_is_certain_and_an_id_may_stand_twice():
    h, w, y, _ = head_inputs(6, 1, "plain")
    alone = linear_logprob(h, w, y, return_entropy=True, sampling_mask=SamplingMask(y, torch.ones(6).long()))
    assert not alone.logps.any() and not alone.entropy.any()
    once, twice = sets_of(y), sets_of(y)
    repeated = [x.repeat(2) for x in twice.ids.split(twice.counts.tolist())]
    twice = SamplingMask(torch.cat(repeated), 2 * twice.counts)
    assert torch.equal(linear_logprob(h, w, y, sampling_mask=once)[0], linear_logprob(h, w, y, sampling_mask=twice)[0])


@pytest.mark.parametrize("host_knows", [True, False])
def test_ignored_rows_may_hold_anything(host_knows, monkeypatch):
    if not host_knows:
        as_on_a_gpu(monkeypatch)
    h, w, y, options, rest, o = fused_inputs("everything", "bias")
    mask, keep = sets_of(y), torch.arange(len(y)) % 5 != 2
    poisoned, targets = torch.where(keep[:, None], h, torch.nan), torch.where(keep, y, -100)
    more = dict(block_rows=4, sampling_mask=mask, **options)
    loss, _ = linear_grpo_sdl(poisoned, w, targets, seq_ids=sequence_ids(), objective=o, **more, **rest)
    out = linear_logprob(poisoned, w, targets, return_entropy=True, **more)
    logps, entropy, _ = logprobs(h, w, y, sampling_mask=mask, **options)
    want, _ = grpo_sdl(logps, seq_ids=sequence_ids(), loss_mask=keep, objective=o, **rest)
    assert (loss - want).abs() < TOLERANCE
    assert (out.logps - torch.where(keep, logps, 0)).abs().max() < TOLERANCE
    assert (out.entropy - torch.where(keep, entropy, 0)).abs().max() < TOLERANCE
    got = torch.autograd.grad(loss + out.logps.sum() + out.entropy.sum(), [h, w])
    true = torch.autograd.grad(want + (logps + entropy)[keep].sum(), [h, w])
    assert all((a - b).abs().max() < TOLERANCE for a, b in zip(got, true, strict=True))


GOOD = dict(ids=torch.tensor([3, 5, 1, 4]), counts=torch.tensor([2, 0, 2]))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(ids=torch.tensor([3, 5, 1, 9])), r"sampling_mask.ids must lie in \[0, 7\), got 1 to 9"),
        (dict(ids=torch.tensor([3, 5, 1, 2])), r"targets\[2\] is 4, which is not among its row's ids"),
        (dict(ids=torch.tensor([3.0, 5, 1, 4])), "sampling_mask.ids must be int32 or int64"),
        (dict(ids=torch.tensor([[3, 5, 1, 4]])), "sampling_mask.ids must be int32 or int64"),
        (dict(counts=torch.tensor([2, 2])), r"sampling_mask.counts must be int32 or int64 \[3\]"),
        (dict(counts=torch.tensor([2, 1, 2])), "sum to the 4 ids of sampling_mask, got 0 at least and a sum of 5"),
        (dict(counts=torch.tensor([3, -1, 2])), "sum to the 4 ids of sampling_mask, got -1 at least"),
        (dict(counts=torch.tensor([2, 0, 2], device="meta")), "sampling_mask.counts must be on the CPU"),
        (dict(ids=torch.tensor([3, 5, 1, 4], device="meta")), "sampling_mask.ids is on meta"),
        (dict(softcap=3.0), "sampling_mask cannot be given with softcap"),
        (dict(logit_scale=-1.0), "sampling_mask needs a positive logit_scale"),
    ],
)
def test_wrong_masks_are_named(wrong, message):
    h, w, y = torch.randn(3, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True), torch.tensor([5, 0, 4])
    mask = SamplingMask(wrong.pop("ids", GOOD["ids"]), wrong.pop("counts", GOOD["counts"]))
    with pytest.raises(ValueError, match=message):
        linear_logprob(h, w, y, sampling_mask=mask, **wrong)
    objective = dict(advantages=torch.ones(1), cu_seqlens=[0, 3], objective=Objective(kl_coef=0))
    with pytest.raises(ValueError, match=message):
        linear_grpo_sdl(h, w, y, sampling_mask=mask, **objective, **wrong)


def test_a_target_outside_its_set_is_nan_where_nobody_checks(monkeypatch):
    """On a GPU the values of targets are not read back."""
    h, w, y, _ = head_inputs(6, 0, "plain")
    mask = sets_of(y, bare=0)
    other = next(i for i in range(37) if i not in mask.ids[: int(mask.counts[0])])
    y[0] = other
    for name in ("check_values", "check_result"):
        monkeypatch.setattr(f"genevolve_fast.ops.head.{name}", lambda *x: None)
    logps = linear_logprob(h, w, y, sampling_mask=mask, block_rows=4).logps
    assert logps.isnan().tolist() == [True, *[False] * 5]


def test_workspace_formula_with_a_mask():
    """One more row of logits, and 80 bytes for each id of a visit."""
    rows, hidden, vocabulary, block, each = 512, 32, 4_000, 128, 50
    torch.manual_seed(0)
    h, w = torch.randn(rows, hidden, requires_grad=True), torch.randn(vocabulary, hidden, requires_grad=True)
    y = torch.randint(vocabulary, (rows,))
    ids = torch.randint(vocabulary, (rows, each))
    ids[:, 0] = y
    mask = SamplingMask(ids.flatten().int(), torch.full((rows,), each))
    more = dict(advantages=torch.ones(1), cu_seqlens=[0, rows], objective=Objective(kl_coef=0), block_rows=block)

    def peak(**given):
        def run():
            loss = linear_grpo_sdl(h, w, y, **more, **given)[0]
            return [loss.detach(), *torch.autograd.grad(loss, [h, w])]

        run()
        return peak_bytes(run, torch.device("cpu"))

    assert peak(sampling_mask=mask) - peak() <= 4 * vocabulary + 80 * each * block + 32 * rows


# --- as registered operators ------------------------------------------------------------------------------------------

ROWS = 12
OBJECTIVE = Objective(kl_coef=0, sdl_permille=400)


def both(h, w, y, ids, counts):
    mask = SamplingMask(ids, counts)
    out = linear_logprob(h, w, y, return_entropy=True, return_lse=True, block_rows=4, sampling_mask=mask)
    loss = linear_grpo_sdl(
        h, w, y, advantages=torch.linspace(1, -2, 3, device=h.device), cu_seqlens=[0, 5, 5, 12], block_rows=4,
        teacher_hidden=2 * h.detach(), teacher_index=torch.arange(ROWS, device=h.device).flip(0), sampling_mask=mask,
        objective=OBJECTIVE,
    )[0]  # fmt: skip
    return out.logps.sum() + 0.3 * out.entropy.sum() + 0.1 * out.lse.square().sum() + loss


def small(trains="both"):
    h, w, y, _ = head_inputs(ROWS, 0, "plain", trains == "both")
    mask = sets_of(y)
    y[3] = -100
    return h.detach().float().requires_grad_(), w.detach().float().requires_grad_(trains == "both"), y, *mask


@pytest.mark.parametrize("trains", ["hidden", pytest.param("both", marks=pytest.mark.slow)])
def test_the_operators_keep_their_promises(trains):
    calls = {}

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "genevolve_fast":
                calls[func.overloadpacket.__name__] = (func, args)
            return func(*args, **(kwargs or {}))

    with Recorder():
        both(*small(trains)).backward()
    assert len(calls) == 3
    for name, (func, args) in calls.items():
        grads = name == "linear_logprob"
        bare = [x.detach().requires_grad_(grads and x.requires_grad) if is_float(x) else x for x in args]
        torch.library.opcheck(func, tuple(bare))


@pytest.mark.parametrize("trains", ["both", pytest.param("hidden", marks=pytest.mark.slow)])
def test_compiled_without_a_graph_break_it_gives_the_same(trains):
    results = []
    for function in (both, torch.compile(both, fullgraph=True, backend="aot_eager")):
        h, w, *rest = small(trains)
        loss = function(2 * h, w, *rest)
        loss.backward()
        results.append([loss.detach(), *(x.grad for x in (h, w) if x.requires_grad)])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)


def test_uninitialised_memory_changes_nothing():
    h, w, *rest = small()
    want = both(h, w, *rest)
    grads = torch.autograd.grad(want, [h, w])
    torch.use_deterministic_algorithms(True)
    try:
        got = both(h, w, *rest)
        again = torch.autograd.grad(got, [h, w])
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(got, want) and all(torch.equal(a, b) for a, b in zip(again, grads, strict=True))


@pytest.mark.parametrize("trains", ["both", "hidden"])
def test_nothing_waits_for_the_device(trains):
    """The counts are copied to it once a call without a wait; nothing else passes."""
    *inputs, counts = small(trains)
    h, w, y, ids = (x.detach().to("meta").requires_grad_(x.requires_grad) for x in inputs)
    with OnTheDevice():
        loss = both(h, w, y, ids, counts)
        loss.backward()
    assert loss.is_meta and h.grad.is_meta
