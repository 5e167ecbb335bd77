"""Several ranks (gloo) train as one process does: gradients, gathers, narrow weights, bad numbers, resume by others."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from grouped import mixed_batch
from warm_ranks import on_two_ranks

from benchmarks.on_ranks import on_ranks
from benchmarks.parity import (
    OBJECTIVE,
    STEPS,
    STRATEGIES,
    TEMPERATURE,
    Change,
    batches,
    distributed,
    errors,
    resume_errors,
    tiny,
    train,
)
from genevolve_fast.policy.model import Policy
from genevolve_fast.policy.weights import Average, Snapshot
from genevolve_fast.train.checkpoint import load_checkpoint, save_checkpoint
from genevolve_fast.train.config import OptimConfig
from genevolve_fast.train.finite import FiniteSteps
from genevolve_fast.train.optim import build_optimizer
from genevolve_fast.train.ranks import Ranks
from genevolve_fast.train.run import RunError
from genevolve_fast.train.strategies import Strategy, open_strategy
from genevolve_fast.train.update import accumulate_gradients, forwarded, share_of


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    """What the processes inherit: they would take a core each for every thread, and DeepSpeed a GPU."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


# --- the same step ----------------------------------------------------------------------------------------------------


def test_the_steps_of_the_comparison_are_uneven_and_leave_a_rank_without_work():
    policy = tiny()
    idle, tokens = set(), []
    for step, (rollouts, _) in enumerate(batches(policy)):
        live = forwarded(rollouts, reference=True)
        shares = [share_of(live, Ranks(rank, 2), policy) for rank in range(2)]
        assert sorted(r.trajectory.id for own in shares for r in own) == sorted(r.trajectory.id for r in live)
        assert not {r.trajectory.group_id for r in shares[0]} & {r.trajectory.group_id for r in shares[1]}
        idle |= {step for own in shares if not own}
        tokens.append([sum(len(r.trajectory) for r in own) for own in shares])
    assert idle == {2} and all(a != b for a, b in tokens)


@pytest.mark.slow
def test_two_ranks_take_the_steps_of_one_process():
    """Loss and all weights after each of five SGD steps in float32."""
    cases = [dict(make=dict(lora=lora), options={}) for lora in (False, True)]
    cases += [dict(make=dict(lora=lora), options=dict(teacher="ema")) for lora in (False, True)]
    jobs = [(name, *case.values()) for name in STRATEGIES for case in cases]
    jobs += [(name, dict(tied=True, lora=lora), {}) for name in ("zero3", "fsdp2") for lora in (False, True)]
    found = dict(zip(map(str, jobs), errors(jobs), strict=True))
    assert not {job: error for job, error in found.items() if not error <= 1e-5}


@pytest.mark.slow
def test_bf16_weights_with_fp32_copies_stay_as_near_on_two_ranks_as_bf16_is_to_fp32():
    names, options = ("zero2", "zero3", "fsdp2"), dict(adamw=True)
    wide = train(tiny(), Strategy(), **options)
    alone = train(tiny(dtype="bfloat16"), Strategy(), **options)
    ours = distributed([(name, dict(dtype="bfloat16"), options) for name in names])
    scale = apart(alone, wide)
    assert 0 < scale < 0.5
    assert not {n: x for n, run in zip(names, ours, strict=True) if not (x := apart(run, alone)) <= scale}
    losses = {
        n: max(abs(a[0] - b[0]) for a, b in zip(run, alone, strict=True)) for n, run in zip(names, ours, strict=True)
    }
    assert max(losses.values()) <= 2e-2, losses


def apart(ours, theirs) -> float:
    """How far the last weights lie apart, in units of how far they moved since the first step."""
    flat = lambda weights: torch.cat([w.float().flatten() for w in weights.values()])  # noqa: E731
    moved = flat(theirs[-1][1]) - flat(theirs[0][1])
    return float((flat(ours[-1][1]) - flat(theirs[-1][1])).norm() / moved.norm())


# --- what a visit gathers ---------------------------------------------------------------------------------------------


class Exchanges(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts collectives by name."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name().startswith("c10d::"):
            self.seen[func.name().removeprefix("c10d::")] += 1
        return func(*args, **(kwargs or {}))


CASES = [
    (name, lora, tied, streamed, taught)
    for name in ("fsdp2", "zero3")
    for lora in (False, True)
    for tied in (False, True)
    for streamed in (False, True)
    for taught in (False, True)
]


def count_gathers(rank: int, file: Path) -> None:
    counted = {}
    for name, lora, tied in dict.fromkeys(case[:3] for case in CASES):
        policy = tiny(lora=lora, tied=tied)
        strategy = open_strategy(name, Ranks(rank, 2))
        optimizer = sharded(policy, strategy, lr=1e-6)
        for _, _, _, streamed, taught in [case for case in CASES if case[:3] == (name, lora, tied)]:
            rollouts, _ = mixed_batch(policy.codec, [], experience=taught)
            rollouts = [replace(r, advantage=r.advantage or 0.5) for r in rollouts]
            with Exchanges() as exchanges:
                metrics, _ = accumulate_gradients(
                    policy, rollouts, {}, replace(OBJECTIVE, kl_coef=0.0), temperature=TEMPERATURE,
                    max_tokens=1 if streamed else 10**6, strategy=strategy,
                )  # fmt: skip
            assert bool(metrics["tokens/teacher"]) == taught
            strategy.norm(policy, None)
            optimizer.step()
            counted[name, lora, tied, streamed, taught] = exchanges.seen["_allgather_base_"]
    if rank == 0:
        torch.save(counted, file)


def sharded(policy: Policy, strategy: Strategy, lr: float):
    strategy.shard(policy)
    return build_optimizer(policy, OptimConfig(lr=lr, max_grad_norm=None), STEPS, strategy)


@pytest.mark.slow
def test_a_unit_is_gathered_once_each_way_for_student_and_teacher(tmp_path):
    """Embedding, layers and head; the prefix once, then every reply. A frozen embedding has no way back."""
    on_two_ranks(tmp_path, count_gathers, tmp_path / "counted.pt")
    counted = torch.load(tmp_path / "counted.pt", weights_only=True)
    layers, wrong = len(tiny().visits), {}
    for case in CASES:
        name, lora, tied, streamed, taught = case
        prefixes, replies = (2, 5) if streamed else (1, 1)  # of the rank that has most: ranks stay in step
        forward = prefixes * (1 + layers) + replies * (1 + layers + 1)
        back = forward - (prefixes + replies if lora else 0)
        if counted[case] != forward + back:
            wrong[case] = counted[case], forward + back
    assert not wrong


# --- numbers that are none --------------------------------------------------------------------------------------------


class Overflow(torch.autograd.Function):
    """The identity, whose gradient is not a number."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        return g * math.nan


def steps_with_overflow(rank: int, name: str, dtype: str, skip: int, plan: list[tuple[int, bool]]):
    """(weights after the steps of `plan`, what was said); where it says so the last rank's gradient overflows."""
    policy = tiny(dtype=dtype)
    strategy = open_strategy(name, Ranks(rank, 2))
    strategy.shard(policy)
    config = OptimConfig(lr=1e-3, bf16="master" if dtype == "bfloat16" else "nearest", skip_nonfinite=skip)
    optimizer = build_optimizer(policy, config, STEPS, strategy)
    reference, guard = Snapshot(policy), FiniteSteps(policy, skip)
    visit, said = policy.visits[1], []
    usual = visit.mlp
    for step, bad in plan:
        rollouts, max_tokens = batches(policy)[step]
        visit.mlp = (lambda x: Overflow.apply(usual(x))) if bad and rank == 1 else usual
        before, rate = whole(policy, strategy), optimizer.lr
        metrics, traces = accumulate_gradients(
            policy, rollouts, {}, OBJECTIVE, temperature=TEMPERATURE, max_tokens=max_tokens, reference=reference,
            strategy=strategy,
        )  # fmt: skip
        losses = {n: x for n, x in metrics.items() if n.endswith("_loss")}
        try:
            norm, taken = guard.step(step, optimizer, strategy, 1.0, losses, traces)
            assert math.isfinite(norm) == taken == (not bad), (norm, taken)
        except RunError as error:
            said.append(str(error))
        if bad:
            after = whole(policy, strategy)
            assert optimizer.lr == rate and all(torch.equal(w, before[n]) for n, w in after.items())
    return whole(policy, strategy), said


def whole(policy: Policy, strategy: Strategy) -> dict[str, torch.Tensor]:
    with strategy.whole(policy):
        return {n: p.detach().clone() for n, p in policy.model.named_parameters()}


def overflow_on_one_rank(rank: int) -> None:
    for name, dtype in [*((name, "float32") for name in STRATEGIES), ("fsdp2", "bfloat16"), ("zero3", "bfloat16")]:
        given = rank, name, dtype
        passed, _ = steps_with_overflow(*given, 1, [(0, False), (1, True), (4, False)])
        without, _ = steps_with_overflow(*given, 1, [(0, False), (4, False)])
        assert all(torch.equal(w, without[n]) for n, w in passed.items()), f"{given}: the bad gradient left something"
        _, said = steps_with_overflow(*given, 0, [(0, False), (1, True)])
        assert len(said) == 1 and "step 1: gradient norm" in said[0] and "Nothing was stepped" in said[0], said


@pytest.mark.slow
def test_a_gradient_that_is_not_finite_on_one_rank_is_dropped_on_all(tmp_path):
    """Skipped where that is allowed, with no trace in weights, moments or schedule; else every rank stops."""
    on_ranks(tmp_path, overflow_on_one_rank)


# --- a full disk ------------------------------------------------------------------------------------------------------


def full_disk_of_one_rank(rank: int, folder: Path) -> None:
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for name in ("fsdp2", "zero2", "zero3"):
        policy, kept = tiny(), folder / name
        strategy = open_strategy(name, Ranks(rank, 2))
        optimizer = sharded(policy, strategy, lr=1e-3)
        average = Average(policy, 0.3)
        save = partial(save_checkpoint, kept, policy=policy, optimizer=optimizer, strategy=strategy, average=average)
        save(step=1)
        for full in range(2):
            if rank == full:  # a write beyond it fails as on a full disk
                resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 10, hard))
            try:
                save(step=2)
            except RunError as error:
                assert "no room to save in" in str(error) and "Older checkpoints are whole" in str(error)
            else:
                raise AssertionError(f"{name}: rank {rank} did not see that rank {full} could not write")
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
            strategy.ranks.wait()
            assert [p.name for p in kept.iterdir()] == ["step_000001"]
            strategy.ranks.wait()
        assert load_checkpoint(kept / "step_000001", policy, optimizer, strategy, average) == 1
        save(step=2)
        assert load_checkpoint(kept / "step_000002", policy, optimizer, strategy, average) == 2


@pytest.mark.slow
def test_a_disk_that_is_full_for_one_rank_leaves_the_checkpoints_and_every_rank_says_so(tmp_path):
    on_ranks(tmp_path, full_disk_of_one_rank, tmp_path)


# --- other ranks go on ------------------------------------------------------------------------------------------------

CHANGES = [
    Change("fsdp2", "ddp", 1),
    Change("fsdp2", "fsdp2", 3),
    Change("fsdp2", "zero3", 3, lora=True),
    Change("zero1", "fsdp2", 2),
    Change("zero2", "ddp", 1),
    Change("zero2", "fsdp2", 3, lora=True),
    Change("zero3", "zero3", 3),
    Change("zero3", "ddp", 1, lora=True),
    Change("ddp", "fsdp2", 2),
    Change("ddp", "zero2", 3, lora=True),
]


@pytest.mark.slow
def test_other_ranks_and_strategies_go_on_where_two_ranks_stopped():
    """With AdamW and the EMA teacher: loss and weights of the next two steps are those of the ranks that stopped."""
    found = dict(zip(CHANGES, resume_errors(CHANGES), strict=True))
    assert not {change: error for change, error in found.items() if not error <= 1e-5}
