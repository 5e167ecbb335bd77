"""Heads on two ranks (gloo): vocabulary-parallel with uneven shards, FSDP2 and ZeRO-3 weights."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from warm_ranks import on_two_ranks

from genevolve_fast.ops import Objective, SamplingMask, linear_grpo_sdl, linear_logprob

D = torch.float64
ROWS, HIDDEN, VOCABULARY, SPLIT = 14, 6, 29, 11
SEQUENCES = [0, 4, 9, 14]


def problem(dtype=D):
    torch.manual_seed(0)
    h, t = torch.randn(2, ROWS, HIDDEN, dtype=dtype)
    w, b = torch.randn(VOCABULARY, HIDDEN, dtype=dtype), torch.randn(VOCABULARY, dtype=dtype)
    y = torch.randint(VOCABULARY, (ROWS,))
    y[:4] = torch.tensor([0, SPLIT - 1, SPLIT, VOCABULARY - 1])
    y[5] = -100
    return h, t, w, b, y


def logprob_loss(h, w, b, y, *, softcap=9.0, **more):
    out = linear_logprob(
        h, w, y, bias=b, temperature=0.8, softcap=softcap, return_entropy=True, return_lse=True, block_rows=4, **more
    )
    return out.logps.sum() + 0.3 * out.entropy.sum() - 0.2 * out.lse.square().sum(), out.logps.detach()


def objective_loss(h, w, b, y, t, **more):
    objective = Objective(kl_coef=0, sdl_permille=300)
    index = torch.where(y >= 0, torch.arange(ROWS), -1)
    loss, stats = linear_grpo_sdl(
        h, w, y, bias=b, advantages=torch.tensor([1.0, 0.0, -0.5], dtype=h.dtype), cu_seqlens=SEQUENCES,
        teacher_hidden=t, teacher_index=index, objective=objective, block_rows=4, **more,
    )  # fmt: skip
    return loss, torch.stack(list(stats.values()))


def leaves(*tensors, trains_head=True):
    first, *rest = (x.clone() for x in tensors)
    return first.requires_grad_(), *(x.requires_grad_(trains_head) for x in rest)


def sets_across_both_shards(y):
    """Sets in both shards, in one of them, and none."""
    sets = [sorted({int(t), 2, SPLIT - 1, SPLIT, VOCABULARY - 3}) for t in y.clamp(min=0)]
    sets[1], sets[3], sets[6], sets[11] = [1, SPLIT - 1], [SPLIT + 3, VOCABULARY - 1], [], []
    return SamplingMask(torch.tensor(sum(sets, [])), torch.tensor([len(s) for s in sets]))


def vocabulary_parallel(rank, dtype, tolerance):
    h, t, w, b, y = problem(dtype)
    mine = slice(0, SPLIT) if rank == 0 else slice(SPLIT, VOCABULARY)
    group = dict(process_group=dist.group.WORLD, vocab_start=mine.start)
    masked = dict(sampling_mask=sets_across_both_shards(y))
    runs = (logprob_loss, (), {}), (objective_loss, (t,), {})
    runs += (logprob_loss, (), masked | dict(softcap=None)), (objective_loss, (t,), masked)
    for trains_head in (True, False):
        for run, more, given in runs:
            whole, part = leaves(h, w, b, trains_head=trains_head), leaves(h, w[mine], b[mine], trains_head=trains_head)
            want, values = run(*whole, y, *more, **given)
            got, own = run(*part, y, *more, **given, **group)
            want.backward()
            got.backward()
            close(own, values, tolerance)
            close(got, want, tolerance)
            close(part[0].grad, whole[0].grad, tolerance)
            if trains_head:
                close(part[1].grad, whole[1].grad[mine], tolerance)
                close(part[2].grad, whole[2].grad[mine], tolerance)
    banned = b.clone()
    banned[:SPLIT] = -torch.inf  # every token of the first shard
    allowed = torch.where(y >= 0, torch.where(y < SPLIT, VOCABULARY - 1, y), y)
    want = linear_logprob(
        h, w[SPLIT:], torch.where(allowed >= 0, allowed - SPLIT, -100), bias=b[SPLIT:], return_entropy=True
    )
    got = linear_logprob(h, w[mine], allowed, bias=banned[mine], return_entropy=True, **group)
    close(got.logps, want.logps, tolerance)
    close(got.entropy, want.entropy, tolerance)
    elsewhere = SamplingMask(torch.tensor([3, SPLIT + 2]), torch.tensor([2, *[0] * (ROWS - 1)]))  # without target 0
    try:
        linear_logprob(h, w[mine], y, bias=b[mine], sampling_mask=elsewhere, **group)
    except ValueError as error:
        assert "targets[0] is 0, which is not among its row's ids" in str(error), error
    else:
        raise AssertionError("a target outside its set was accepted")
    nobody = y.clone()
    nobody[2] = VOCABULARY  # on no rank
    try:
        linear_logprob(h, w[mine], nobody, bias=b[mine], **group)
    except ValueError as error:
        assert "row 2" in str(error), error
    else:
        raise AssertionError("a target that no rank holds was accepted")


def fsdp2(rank):
    """Each rank has its own rows; the gradient is the average over ranks, sharded, from one all-gather."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, distribute_tensor

    h, t, w, _, y = problem(torch.float32)
    head = torch.nn.Linear(HIDDEN, VOCABULARY, bias=False)
    head.weight.data.copy_(w)
    fully_shard(head, mesh=dist.init_device_mesh("cpu", (2,)))
    assert isinstance(head.weight, DTensor)
    own = h + rank
    gathers = count_gathers(lambda: objective_loss(own, head.weight, None, y, t)[0].backward())
    assert gathers == 1, gathers
    want = torch.zeros_like(w)
    for r in range(2):
        plain = w.clone().requires_grad_()
        objective_loss(h + r, plain, None, y, t)[0].backward()
        want += plain.grad / 2
    assert head.weight.grad.placements == head.weight.placements
    close(head.weight.grad.full_tensor(), want, 1e-5)

    biased = torch.nn.Linear(HIDDEN, VOCABULARY)
    fully_shard(biased, mesh=dist.init_device_mesh("cpu", (2,)))
    main_grad, plain = (
        torch.zeros(VOCABULARY, HIDDEN),
        [x.clone().requires_grad_() for x in (w, torch.zeros(VOCABULARY))],
    )
    for x, value in zip((biased.weight, biased.bias), plain, strict=True):
        x.data.copy_(distribute_tensor(value.detach(), x.device_mesh, x.placements))
    objective_loss(own, biased.weight, biased.bias, y, t, main_grad=main_grad)[0].backward()
    objective_loss(own, *plain, y, t)[0].backward()
    close(main_grad, plain[0].grad, 1e-5)  # this rank's own
    assert biased.weight.grad is None and biased.bias.grad.placements == biased.bias.placements


class Model(torch.nn.Module):
    """A body and a head whose weight the objective reads, for an engine that partitions them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.body = torch.nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.lm_head = torch.nn.Linear(HIDDEN, VOCABULARY, bias=False)

    def forward(self, h, y, t):
        return objective_loss(self.body(h), self.lm_head.weight, None, y, t)[0]


def zero3(rank):
    """A weight read inside the module's forward is gathered by DeepSpeed; gradients are averaged over ranks."""
    import deepspeed
    from deepspeed.comm import torch as backend
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    backend.build_shm_op = lambda: None  # gloo will do; the shared-memory kernel takes a minute to compile
    h, t, _, _, y = problem(torch.float32)
    model, plain = Model(), Model()
    config = dict(train_batch_size=2, train_micro_batch_size_per_gpu=1, gradient_clipping=0.0)
    config |= dict(zero_optimization=dict(stage=3, stage3_param_persistence_threshold=0))
    config |= dict(zero_allow_untested_optimizer=True, zero_force_ds_cpu_optimizer=False)
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    engine, *_ = deepspeed.initialize(model=model, optimizer=sgd, config=config)
    assert model.lm_head.weight.ds_status == ZeroParamStatus.NOT_AVAILABLE
    try:
        objective_loss(h, list(model.parameters())[1], None, y, t)
    except ValueError as error:
        assert "GatheredParameters" in str(error), error
    else:
        raise AssertionError("a partitioned weight was accepted")
    engine.backward(engine(h + rank, y, t))
    engine.step()
    for r in range(2):
        plain(h + r, y, t).backward()
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        for mine, want in zip(model.parameters(), plain.parameters(), strict=True):
            close(mine, want - want.grad / 2, 1e-5)


def shared_pass(rank, max_tokens, dtype):
    """Layer visits under FSDP2: each rank its own rollouts, gradients averaged; a visit gathers once each way.

    Every rank must make the same number of visits: streamed in micro-batches, both have the same rollouts.
    """
    from grouped import mixed_batch, text_policy
    from naive import gradient
    from test_passes import OBJECTIVE, TEMPERATURE
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    from genevolve_fast.train.update import accumulate_gradients

    streamed = max_tokens < 1000

    def run(policy, batch):
        accumulate_gradients(policy, batch, {}, OBJECTIVE, temperature=TEMPERATURE, max_tokens=max_tokens)

    plain, sharded = (text_policy("Qwen3").double() for _ in range(2))
    rollouts, _ = mixed_batch(plain.codec, [])
    halves = (rollouts, rollouts) if streamed else (rollouts[:4], rollouts[3:])
    for half in halves:
        run(plain, half)
    want = gradient(plain) / 2
    mesh = dist.init_device_mesh("cpu", (2,))
    mixed = MixedPrecisionPolicy()
    if dtype == torch.bfloat16:
        mixed = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        sharded.float()
    for visit in sharded.visits:
        fully_shard(visit, mesh=mesh, reshard_after_forward=True, mp_policy=mixed)
    sharded.gradient_checkpointing = True
    gathers = count_gathers(lambda: run(sharded, halves[rank]))
    layers = len(sharded.visits)
    # prefix and replies, forward and backward; the teacher rides for nothing
    assert gathers > 4 * layers and gathers % layers == 0 if streamed else gathers == 2 * 2 * layers, gathers
    parts = []
    for p in sharded.parameters():
        if hasattr(p.grad, "full_tensor"):
            parts.append(p.grad.full_tensor())
        else:
            dist.all_reduce(p.grad)
            parts.append(p.grad / 2)
    got = torch.cat([p.flatten() for p in parts])
    assert (got - want).norm() <= (1e-12 if dtype == D else 2e-2) * want.norm()


def count_gathers(run) -> int:
    class Gathers(torch.utils._python_dispatch.TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.seen += "all_gather" in func.name()
            return func(*args, **(kwargs or {}))

    with Gathers() as mode:
        run()
    return mode.seen


def close(mine, want, tolerance):
    error = (mine.detach().double() - want.detach().double()).abs().max()
    assert error <= tolerance * want.abs().max().clamp(min=1), float(error)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(D, 1e-10), pytest.param(torch.bfloat16, 1e-2, marks=pytest.mark.slow)]
)
def test_vocabulary_parallel_gives_what_one_rank_gives(tmp_path, dtype, tolerance):
    on_two_ranks(tmp_path, vocabulary_parallel, dtype, tolerance)


@pytest.mark.slow
def test_an_fsdp2_weight_is_gathered_once(tmp_path):
    on_two_ranks(tmp_path, fsdp2)


@pytest.mark.slow
@pytest.mark.parametrize(("max_tokens", "dtype"), [(10**6, D), (90, D), (90, torch.bfloat16)])
def test_the_shared_pass_under_fsdp2_gathers_a_layer_once_each_way(tmp_path, max_tokens, dtype):
    on_two_ranks(tmp_path, shared_pass, max_tokens, dtype)


@pytest.mark.slow
def test_a_zero3_weight_is_gathered_by_deepspeed(tmp_path, monkeypatch):
    pytest.importorskip("deepspeed", reason="ZeRO-3 needs deepspeed")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    on_two_ranks(tmp_path, zero3)
