"""The head's operations as registered operators: schemas, fake tensors, torch.compile without a graph break."""

from __future__ import annotations

import pytest
import torch

from benchmarks.memory import body_of
from genevolve_fast.ops import Objective, linear_grpo_sdl, linear_logprob

ROWS, HIDDEN, VOCABULARY = 12, 8, 31


def inputs(trains="both", dtype=torch.float32):
    torch.manual_seed(0)
    h = torch.randn(ROWS, HIDDEN, dtype=dtype, requires_grad=trains != "nothing")
    w = torch.randn(VOCABULARY, HIDDEN, dtype=dtype, requires_grad=trains == "both")
    y = torch.randint(VOCABULARY, (ROWS,))
    y[3] = -100
    return h, w, y


def is_float(x):
    return isinstance(x, torch.Tensor) and x.is_floating_point()


def logprob(h, w, y):
    out = linear_logprob(h, w, y, return_entropy=True, return_lse=True, temperature=0.7, softcap=5.0, block_rows=4)
    return out.logps.sum() + 0.3 * out.entropy.sum() + 0.1 * out.lse.square().sum()


OBJECTIVE = Objective(sdl_permille=400)
TEACHER = dict(
    teacher_hidden=torch.linspace(-1, 1, ROWS * HIDDEN).sin().view(ROWS, HIDDEN), ref_logps=-torch.ones(ROWS)
)


def objective(h, w, y, **more):
    return linear_grpo_sdl(
        h, w, y, advantages=torch.tensor([1.0, 0.0, -2.0]), cu_seqlens=[0, 5, 5, 12], objective=OBJECTIVE, block_rows=4,
        teacher_index=torch.arange(ROWS).flip(0), **TEACHER, **more,
    )[0]  # fmt: skip


@pytest.mark.parametrize("trains", ["both", "hidden"])
def test_the_operators_keep_their_promises(trains):
    """Schema (nothing mutated or aliased in secret), fake tensors, autograd and AOT dispatch of every operator."""
    calls = {}
    names = ("linear_logprob", "linear_logprob_backward", "linear_logprob_frozen_backward", "linear_grpo_sdl")

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "genevolve_fast":
                calls[func.overloadpacket.__name__] = (func, args)
            return func(*args, **(kwargs or {}))

    h, w, y = inputs(trains)
    with Recorder():
        logprob(h, w, y).backward()
        objective(h, w, y, main_grad=torch.zeros(VOCABULARY, HIDDEN) if trains == "both" else None).backward()
    skipped = names[2] if trains == "both" else names[1]
    assert set(calls) == set(names) - {skipped}
    for name, (func, args) in calls.items():
        differentiable = name == "linear_logprob"
        bare = [x.detach().requires_grad_(differentiable and x.requires_grad) if is_float(x) else x for x in args]
        torch.library.opcheck(func, tuple(bare))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("run", [logprob, objective])
@pytest.mark.parametrize("trains", ["both", "hidden", "nothing"])
def test_compiled_without_a_graph_break_it_gives_the_same(backend, run, trains):
    results = []
    for function in (run, torch.compile(run, fullgraph=True, backend=backend)):
        h, w, y = inputs(trains)
        loss = function(2 * h, w, y)  # the hidden states of a graph, not a leaf
        if trains != "nothing":
            loss.backward()
        results.append([loss.detach(), *(x.grad for x in (h, w) if x.requires_grad)])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)


def test_compiled_it_adds_to_main_grad():
    h, w, y = inputs()
    main = [torch.ones(VOCABULARY, HIDDEN) for _ in range(2)]
    for function, into in zip(
        (objective, torch.compile(objective, fullgraph=True, backend="aot_eager")), main, strict=True
    ):
        function(h, w, y, main_grad=into).backward()
    assert w.grad is None and not torch.equal(main[0], torch.ones_like(main[0]))
    torch.testing.assert_close(*main)


def test_a_number_of_rows_seen_before_is_not_compiled_again():
    compiled = torch.compile(
        lambda h, w, y: linear_logprob(h, w, y, block_rows=4).logps.sum(),
        fullgraph=True,
        backend="aot_eager",
        dynamic=True,
    )
    h, w, y = inputs("nothing")
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (12, 7, 9):
            want = linear_logprob(h[:rows], w, y[:rows], block_rows=4).logps.sum()
            torch.testing.assert_close(compiled(h[:rows].clone(), w, y[:rows].clone()), want)


def test_changing_the_weight_between_forward_and_backward_is_noticed():
    h, w, y = inputs()
    loss = linear_logprob(h, w, y).logps.sum()
    with torch.no_grad():
        w += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_autocast_and_uninitialised_memory_change_nothing():
    """torch.empty filled with NaN: the workspace and every result are written before they are read."""
    h, w, y = inputs()
    want = [run(h, w, y) for run in (logprob, objective)]
    grads = [torch.autograd.grad(x, [h, w]) for x in want]
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = [run(h, w, y) for run in (logprob, objective)]
        again = [torch.autograd.grad(x, [h, w]) for x in got]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert all(torch.equal(a, b) for x, y in zip(again, grads, strict=True) for a, b in zip(x, y, strict=True))


class OnTheDevice(torch.utils._python_dispatch.TorchDispatchMode):
    """Fails where an operation mixes tensors of host and device: on a GPU that is a copy, and a wait for it, unless the
    copy is said to be non-blocking.

    Reading a value back needs no check here: on the meta device there is none to read.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        with self:
            if body := body_of(func):
                return body(*args, **(kwargs or {}))
            parts = func.decompose(*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {})) if parts is NotImplemented else parts
        if (kwargs or {}).get("non_blocking"):
            return out
        leaves = torch.utils._pytree.tree_leaves((args, kwargs, out))
        assert len({x.device for x in leaves if isinstance(x, torch.Tensor)}) <= 1, func
        return out


@pytest.mark.parametrize("trains", ["both", "hidden", "nothing"])
@pytest.mark.parametrize("borders", ["host", "device", "ids"])
def test_nothing_passes_between_host_and_device(trains, borders):
    h, w, y = (x.detach().to("meta").requires_grad_(x.requires_grad) for x in inputs(trains))
    tau, bias, rows = (torch.empty(n, device="meta") for n in (ROWS, VOCABULARY, ROWS))
    given = dict(
        advantages=torch.empty(3, device="meta"), old_logps=rows, rollout_logps=rows, ref_logps=rows, bias=bias,
        temperature=tau, teacher_hidden=h.detach(), teacher_index=y, sdl_mask=rows > 0, softcap=4.0, block_rows=4,
        objective=Objective(rollout_is="token", dual_clip=3.0, loss_agg_mode="seq-mean-token-mean"),
    )  # fmt: skip
    given |= {
        "host": dict(cu_seqlens=[0, 5, 5, 12]),
        "device": dict(cu_seqlens=torch.empty(4, dtype=torch.int64, device="meta")),
        "ids": dict(seq_ids=y, objective=Objective(rollout_is="sequence", sdl_select="batch")),
    }[borders]
    with OnTheDevice():
        out = linear_logprob(h, w, y, return_entropy=True, return_lse=True, temperature=tau, bias=bias, block_rows=4)
        loss, stats = linear_grpo_sdl(h, w, y, **given)
        if trains != "nothing":
            (out.logps.sum() + out.entropy.sum() + out.lse.sum()).backward()
            loss.backward()
    assert loss.is_meta and out.logps.shape == (ROWS,) and all(v.is_meta for v in stats.values())


def test_numbers_that_change_from_step_to_step_are_not_compiled_again():
    """Borders of the sequences on the host, counts and scale, given as tensors."""

    def step(h, w, y, borders, count, scale):
        return linear_grpo_sdl(
            h, w, y, advantages=torch.tensor([1.0, 0.0, -2.0]), cu_seqlens=borders, num_sequences=count,
            loss_scale=scale, objective=OBJECTIVE, block_rows=4, ref_logps=TEACHER["ref_logps"],
        )[0]  # fmt: skip

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    h, w, y = inputs()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for borders, count, scale in (([0, 5, 5, 12], 3.0, 1.0), ([0, 1, 7, 12], 8.0, 0.5), ([0, 0, 2, 12], 2.0, 4.0)):
            numbers = torch.tensor(borders), torch.tensor(count), torch.tensor(scale)
            torch.testing.assert_close(compiled(h, w, y, *numbers), step(h, w, y, *numbers))
