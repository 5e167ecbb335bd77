"""What only a GPU can show: real kernels against float64, no synchronisation, graph capture, the allocator's peak.

The checks of values also run on a CPU, at toy shapes and with the torch implementation, so that they are known to work.
"""

from __future__ import annotations

import pytest
import torch

from genevolve_fast.ops import Objective, SamplingMask, linear_grpo_sdl, linear_logprob, supported
from genevolve_fast.ops.epilogues import IMPLEMENTATIONS
from genevolve_fast.ops.reference import logprobs

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
RUNNING = [i for i in IMPLEMENTATIONS if supported(i, torch.empty(0, device=DEVICE)) is None]
gpu_only = pytest.mark.skipif(not GPU, reason="needs a GPU")
# (rows, H, V): the heads of the field, odd vocabularies, more rows than a grid's second dimension
SHAPES = [(513, 256, 97), (65_540, 64, 1_000), (1_025, 2048, 151_936), (300, 512, 152_064), (300, 512, 128_256)]
SHAPES = SHAPES if GPU else [(33, 16, 97), (257, 8, 1_000)]
SPREADS = {"flat": 0.02, "normal": 1.0, "peaked": 12.0}


def problem(rows, hidden, vocabulary, spread=1.0, dtype=torch.bfloat16, seed=0):
    torch.manual_seed(seed)
    h = torch.randn(rows, hidden, device=DEVICE).to(dtype)
    w = (spread * hidden**-0.5 * 3 * torch.randn(vocabulary, hidden, device=DEVICE)).to(dtype)
    y = torch.randint(vocabulary, (rows,), device=DEVICE)
    y[0], y[-1] = vocabulary - 1, 0
    return h, w, y


def truth(h, w, y, upstream, rows_at_once=256):
    """(logps, lse, entropy, dH, dW) in float64, some rows at a time; dW of the rows together."""
    parts, d_weight = [], torch.zeros(w.shape, dtype=torch.float64, device=w.device)
    w64 = w.double().requires_grad_()
    for first in range(0, len(h), rows_at_once):
        s = slice(first, first + rows_at_once)
        h64 = h[s].double().requires_grad_()
        logps, entropy, lse = logprobs(h64, w64, y[s])
        d_h, d_w = torch.autograd.grad((logps * upstream[s].double()).sum(), [h64, w64])
        d_weight += d_w
        parts.append([x.detach() for x in (logps, lse, entropy, d_h)])
    return (*(torch.cat(column) for column in zip(*parts, strict=True)), d_weight)


def by_torch(h, w, y, upstream):
    """The same by full logits in the inputs' dtype and autograd: what the gradients must not be worse than."""
    h, w = h.detach().requires_grad_(), w.detach().requires_grad_()
    logps = torch.log_softmax((h @ w.T).float(), -1).gather(1, y[:, None])[:, 0]
    return torch.autograd.grad((logps * upstream).sum(), [h, w])


def error(x, want):
    return ((x.double() - want).norm() / want.norm().clamp(min=1e-30)).item()


@pytest.mark.parametrize("impl", RUNNING)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("spread", SPREADS)
def test_log_probs_and_gradients_against_float64(impl, shape, spread):
    h, w, y = problem(*shape, spread=SPREADS[spread])
    upstream = torch.randn(len(h), device=DEVICE)
    few = slice(0, 300)  # float64 of every row would take longer than all the rest
    logps64, lse64, entropy64, d_h64, _ = truth(h[few], w, y[few], upstream[few])
    with torch.no_grad():
        out = linear_logprob(h, w, y, return_entropy=True, return_lse=True, impl=impl)
        products = torch.mm(h[few], w.T, out_dtype=torch.float32) if GPU else h[few].float() @ w.float().T
        gemm = products.double().log_softmax(-1).gather(1, y[few, None])[:, 0]
    floor = (gemm - logps64).abs().max()
    bound = 2 * floor + 1e-6 * (lse64.abs().max() / 16).clamp(min=1) + 1e-6
    assert (out.logps <= 0).all() and (out.logps[few] - logps64).abs().max() <= bound
    assert (out.lse[few] - lse64).abs().max() <= 2 * floor + 1e-5
    assert (out.entropy[few] - entropy64).abs().max() <= 4 * floor + 1e-5 * entropy64.abs().max().clamp(min=1)

    frozen = h.detach().requires_grad_()
    (linear_logprob(frozen, w, y, impl=impl).logps * upstream).sum().backward()
    plain, _ = by_torch(h[few], w, y[few], upstream[few])
    assert error(frozen.grad[few], d_h64) <= 1.1 * error(plain, d_h64) + 1e-6


@pytest.mark.parametrize("impl", RUNNING)
def test_weight_gradient_against_float64(impl):
    shape = (2_100, 512, 32_003) if GPU else (65, 16, 301)
    h, w, y = problem(*shape)
    upstream = torch.randn(len(h), device=DEVICE)
    *_, d_h64, d_w64 = truth(h, w, y, upstream)
    plain = by_torch(h, w, y, upstream)
    leaves = h.detach().requires_grad_(), w.detach().requires_grad_()
    (linear_logprob(*leaves, y, impl=impl).logps * upstream).sum().backward()
    for mine, theirs, want in zip(leaves, plain, (d_h64, d_w64), strict=True):
        assert error(mine.grad, want) <= 1.1 * error(theirs, want) + 1e-6


def objective_call(h, w, y, impl="auto", borders=None, **more):
    rows, sequences = len(h), 8
    borders = [i * rows // sequences for i in range(sequences + 1)] if borders is None else borders
    a = torch.linspace(-1, 1, sequences, device=h.device)
    index = torch.arange(rows, device=h.device)
    return linear_grpo_sdl(
        h, w, y, advantages=a, cu_seqlens=borders, teacher_hidden=h.detach().roll(1, 0), teacher_index=index,
        objective=Objective(kl_coef=0), impl=impl, **more,
    )  # fmt: skip


@pytest.mark.parametrize("impl", RUNNING)
def test_the_objective_by_every_implementation(impl):
    shape = (4_096, 1024, 32_003) if GPU else (64, 16, 301)
    h, w, y = problem(*shape, dtype=torch.float32 if not GPU else torch.bfloat16)
    results = []
    for name, block in ((impl, 1024), ("torch", 512)):
        leaves = h.detach().requires_grad_(), w.detach().requires_grad_()
        loss, stats = objective_call(*leaves, y, impl=name, block_rows=block)
        loss.backward()
        results.append([loss.detach(), stats["sdl_kl"], *(x.grad for x in leaves)])
    for mine, theirs in zip(*results, strict=True):
        assert error(mine, theirs.double()) <= 2e-2


def sets_of(y, vocabulary, size=20):
    """Each row's target and its next ids; every fifth row has no set."""
    ids = (y[:, None].clamp(min=0) + torch.arange(size, device=y.device)) % vocabulary
    has = torch.arange(len(y), device=y.device) % 5 > 0
    return SamplingMask(ids[has].flatten().int(), size * has.int().cpu())


@pytest.mark.parametrize("impl", RUNNING)
def test_sampling_masks_by_every_implementation(impl):
    shape = (4_096, 1024, 32_003) if GPU else (64, 16, 301)
    h, w, y = problem(*shape, dtype=torch.float32)
    mask = sets_of(y, shape[2])
    truth = logprobs(h.double(), w.double(), y, sampling_mask=mask)[0]
    assert (linear_logprob(h, w, y, impl=impl, sampling_mask=mask).logps - truth).abs().max() < 1e-3
    results = []
    for name, block in ((impl, 1024), ("torch", 512)):
        leaves = h.detach().requires_grad_(), w.detach().requires_grad_()
        loss, stats = objective_call(*leaves, y, impl=name, block_rows=block, sampling_mask=mask)
        loss.backward()
        results.append([loss.detach(), stats["sdl_kl"], *(x.grad for x in leaves)])
    for mine, theirs in zip(*results, strict=True):
        assert error(mine, theirs.double()) <= 2e-2


@pytest.mark.parametrize("impl", RUNNING)
def test_equal_rows_give_equal_bits_and_calls_repeat(impl):
    h, w, y = problem(3_000 if GPU else 50, 128, 5_003)
    first = linear_logprob(h, w, y, return_entropy=True, return_lse=True, impl=impl, block_rows=256)
    order = torch.randperm(len(h), device=DEVICE)
    moved = linear_logprob(h[order], w, y[order], return_entropy=True, return_lse=True, impl=impl, block_rows=256)
    assert all(torch.equal(a[order], b) for a, b in zip(first, moved, strict=True))
    grads = []
    for _ in range(20):
        leaf, head = h.detach().requires_grad_(), w.detach().requires_grad_()
        objective_call(leaf, head, y, impl=impl)[0].backward()
        grads.append((leaf.grad, head.grad))
    assert all(torch.equal(a, b) for pair in grads[1:] for a, b in zip(pair, grads[0], strict=True))


@gpu_only
@pytest.mark.parametrize("impl", RUNNING)
@pytest.mark.parametrize("trains", ["both", "hidden"])
def test_no_synchronisation(impl, trains):
    h, w, y = problem(3_000, 128, 5_003)
    h.requires_grad_()
    w.requires_grad_(trains == "both")
    y[7] = -100
    on_device = torch.linspace(0, 3_000, 9, device=DEVICE).long()
    mask = sets_of(y, 5_003)

    def run():
        linear_logprob(h, w, y, return_entropy=True, impl=impl).logps.sum().backward()
        objective_call(h, w, y, impl=impl)[0].backward()
        objective_call(h, w, y, impl=impl, borders=on_device)[0].backward()
        linear_logprob(h, w, y, impl=impl, sampling_mask=mask).logps.sum().backward()
        objective_call(h, w, y, impl=impl, sampling_mask=mask)[0].backward()

    run()  # what is loaded and compiled the first time may wait
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
        given = dict(advantages=torch.tensor([0.0, 1.0]), cu_seqlens=[0, 1500, 3000], objective=Objective(kl_coef=0))
        linear_grpo_sdl(h, w, y, impl=impl, **given)[0].backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@gpu_only
@pytest.mark.parametrize("impl", RUNNING)
def test_graph_capture(impl):
    h, w, y = problem(2_000, 128, 5_003)
    h.requires_grad_()
    w.requires_grad_()

    def step():
        h.grad = w.grad = None
        logp = linear_logprob(h, w, y, impl=impl).logps
        loss, _ = objective_call(h, w, y, impl=impl)
        (logp.sum() * 1e-3).backward()
        loss.backward()
        return loss

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    d_hidden, d_weight = h.grad, w.grad
    with torch.no_grad():
        h.copy_(torch.randn_like(h))
    graph.replay()
    got = [x.clone() for x in (captured, d_hidden, d_weight)]
    want = [step().detach(), h.grad, w.grad]
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@gpu_only
@pytest.mark.parametrize("mode", ["logprob", "frozen", "trainable", "objective"])
def test_peak_of_the_allocator_stays_below_the_formula(mode):
    rows, hidden, vocabulary, workspace = 8_192, 1024, 151_936, 640
    h, w, y = problem(rows, hidden, vocabulary)
    h.requires_grad_(mode != "logprob")
    w.requires_grad_(mode in ("trainable", "objective"))

    def run():
        if mode == "objective":
            loss = objective_call(h, w, y, workspace_mb=workspace)[0]
        else:
            loss = linear_logprob(h, w, y, workspace_mb=workspace).logps.sum()
        if loss.requires_grad:
            loss.backward()
        return sum(x.grad.nbytes for x in (h, w) if x.grad is not None)

    run()
    h.grad = w.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    returned = run()
    formula = (workspace << 20) + 16 * hidden * 1024 + 40 * rows + (32 << 20)
    formula += 4 * vocabulary * hidden if w.requires_grad else rows * hidden * h.element_size()
    if mode == "objective":
        formula += 160 * rows
    assert torch.cuda.max_memory_allocated() - before - returned <= formula


@gpu_only
def test_a_target_outside_the_vocabulary_gives_nan_or_an_error():
    h, w, y = problem(10, 64, 1_000)
    y[3] = 1_000
    assert linear_logprob(h, w, y).logps.isnan().tolist() == [i == 3 for i in range(10)]
    with pytest.raises(ValueError, match=r"targets\[3\]"):
        linear_logprob(h, w, y, check_targets=True)
