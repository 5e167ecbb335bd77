"""Ranks in step where there is little to do or something fails, and what a strategy restores."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from warm_ranks import on_two_ranks

from benchmarks import parity
from genevolve_fast.batch.groups import TrainingRollout
from genevolve_fast.commands import opening
from genevolve_fast.ops import Objective
from genevolve_fast.policy.model import Policy
from genevolve_fast.profile.sharding import refusal
from genevolve_fast.sandbox.tiny_policy import start_path
from genevolve_fast.train.collect import Rollouts
from genevolve_fast.train.config import ConfigError, OptimConfig, PolicyConfig, SftConfig, parse_config
from genevolve_fast.train.finite import FiniteSteps
from genevolve_fast.train.optim import build_optimizer
from genevolve_fast.train.pipelined import InTurn
from genevolve_fast.train.ranks import Ranks
from genevolve_fast.train.run import RunError
from genevolve_fast.train.sharded import load_sharded, save_sharded, whole_tensors
from genevolve_fast.train.strategies import Strategy, _move_rest, open_strategy
from genevolve_fast.train.update import accumulate_gradients
from tests.grouped import text_policy

OBJECTIVE = Objective(kl_coef=0.0, sdl_permille=300)


def steps(strategy: Strategy, second: str) -> list[tuple[float, bool, float, torch.Tensor]]:
    """(norm, taken, learning rate, weights) after each of three steps; of the `second` nothing can be learnt, its
    gradient is NaN on one rank, or it is as the others and the weights are bf16."""
    policy = parity.tiny(lora=False).to(torch.bfloat16 if second == "bf16" else torch.float32)
    strategy.shard(policy)
    config = OptimConfig(lr=1e-3, weight_decay=0.1, warmup_ratio=0.9, skip_nonfinite=1)
    optimizer, finite, out = build_optimizer(policy, config, 4, strategy), FiniteSteps(policy, 1), []
    backward = strategy.backward
    for step in range(3):
        rollouts, max_tokens = parity.batches(policy)[step]
        strategy.backward = backward
        if step == 1 and second == "nan" and strategy.ranks.rank == strategy.ranks.world - 1:
            strategy.backward = lambda loss: backward(loss * torch.nan)
        elif step == 1 and second == "tied":
            rollouts = [tied(r) for r in rollouts]
        accumulate_gradients(
            policy, rollouts, {}, OBJECTIVE, temperature=0.7, max_tokens=max_tokens, strategy=strategy
        )  # fmt: skip
        norm, taken = finite.step(step, optimizer, strategy, 1.0, {})
        with strategy.whole(policy):
            weights = torch.cat([p.detach().float().flatten() for p in policy.model.parameters()])
        out.append((norm, taken, optimizer.lr, weights))
    return out


def tied(r: TrainingRollout) -> TrainingRollout:
    """As where all rewards of a group are equal and nothing is remembered: no gradient."""
    return replace(r, advantage=0.0, experience_ids=())


def _on_rank(rank: int, names: list[str], folder: str) -> None:
    ranks = Ranks(rank, 2)
    exchanges(ranks)
    ours = {}
    for name in names:
        kind, _, offload = name.partition(" ")
        for second in ("bf16",) if offload else ("tied", "nan", "bf16"):
            ours[name, second] = steps(open_strategy(kind, ranks, offload_optimizer=bool(offload)), second)
    if rank == 0:
        torch.save(ours, Path(folder) / "ours.pt")


def exchanges(ranks: Ranks) -> None:
    """What the first rank raises is raised everywhere, also where it cannot be pickled."""

    def fail():
        error = OSError("the judge is gone")
        error.connection = lambda: None
        raise error

    try:
        ranks.from_first(fail)
    except (OSError, RuntimeError) as error:
        assert "the judge is gone" in str(error) and ranks.first == isinstance(error, OSError)
    else:
        raise AssertionError("nothing was raised")


@pytest.mark.slow
@pytest.mark.parametrize("names", [["ddp", "fsdp2"], ["zero1", "zero2", "zero3", "zero1 offload", "zero2 offload"]])
def test_every_strategy_steps_as_one_process_does_or_not_at_all(tmp_path, names):
    """Without any gradient, with NaN on one rank, and with bf16 weights, where DeepSpeed takes other ways."""
    if "zero1" in names:
        pytest.importorskip("deepspeed", reason="ZeRO needs deepspeed")
    on_two_ranks(tmp_path, _on_rank, names, str(tmp_path))
    alone = {second: steps(Strategy(), second) for second in ("tied", "nan", "bf16")}
    assert [[taken for _, taken, _, _ in rows] for rows in alone.values()] == [
        [True] * 3,
        [True, False, True],
        [True] * 3,
    ]
    assert alone["tied"][1][0] == 0
    for (name, second), got in torch.load(tmp_path / "ours.pt").items():
        one, kept = alone[second], second != "bf16"
        assert [row[1:3] for row in got] == [row[1:3] for row in one], (name, second)
        assert torch.equal(got[1][3], got[0][3]) == torch.equal(one[1][3], one[0][3]) == kept, (name, second)
        for mine, theirs in zip(got, one, strict=True):
            assert mine[0] == pytest.approx(theirs[0], rel=1e-4 if kept else 2e-2) or not mine[1], (name, second)
            if kept:  # AdamW turns 1e-8 at g = 0 into more
                assert float((mine[3] - theirs[3]).abs().max()) < 2e-4, (name, second)


def test_layers_are_not_stepped_before_ranks_have_summed_their_gradients():
    policy = text_policy("Qwen3")
    config = OptimConfig(release_gradients=True)
    with pytest.raises(RunError, match="before the 2 ranks have summed"):
        build_optimizer(policy, config, 1, Strategy(Ranks(0, 2)))
    assert not any(p._post_accumulate_grad_hooks for p in policy.parameters())
    build_optimizer(policy, config, 1, Strategy())


def test_a_rank_without_requests_has_rollouts_to_hand_over():
    """There may be fewer requests than ranks."""
    none = Rollouts((), {}, {})
    sampler = InTurn(None, None, lambda *_: none)
    assert sampler.within(none, 3) is none


# --- what is restored -------------------------------------------------------------------------------------------------


def test_restored_step_counts_lie_where_the_optimizer_reads_them():
    """A fused kernel reads them on the weight's device."""
    p = torch.nn.Parameter(torch.ones(3, 2, device="meta"))
    optimizer = torch.optim.AdamW([p])
    state = {"step": torch.tensor(7.0), "exp_avg": torch.ones(3, 2), "exp_avg_sq": torch.ones(3, 2)}
    Strategy().put(p, torch.ones(3, 2), state, [optimizer])
    assert {x.device.type for x in optimizer.state[p].values()} == {"meta"}
    counts = type("OnHost", (torch.optim.AdamW,), {"__module__": "deepspeed.ops.adam.cpu_adam"})
    q = torch.nn.Parameter(torch.ones(3, 2))
    optimizer = counts([q])
    Strategy().put(q, torch.ones(3, 2), state, [optimizer])
    assert optimizer.state[q]["step"] == 7 and isinstance(optimizer.state[q]["step"], int)


def test_steps_that_were_counted_without_a_tensor_are_read(tmp_path):
    """As DeepSpeed's Adam on the host counts them."""
    policy = text_policy("Qwen3")
    policy.save_trainable(tmp_path)
    optimizer = build_optimizer(policy, OptimConfig(), 1)
    for p in policy.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    saved = optimizer.state_dict()
    for state in saved["parts"][0]["state"].values():
        state["step"] = 1
    read = whole_tensors(tmp_path, saved, policy)
    assert all(float(state["step"]) == 1 for _, state in read.values()) and len(read) > 10


def test_a_damaged_shard_is_an_exception(tmp_path):
    """torch's own is not one, so that nobody would catch it."""
    policy = text_policy("Qwen3")
    optimizer = build_optimizer(policy, OptimConfig(), 1)
    save_sharded(tmp_path / "s", policy, optimizer, Strategy())
    load_sharded(tmp_path / "s", policy, optimizer, Strategy())
    for file in (tmp_path / "s").glob("*.distcp"):
        file.write_bytes(file.read_bytes()[:4000])
    with pytest.raises(Exception) as damaged:
        load_sharded(tmp_path / "s", policy, optimizer, Strategy())
    assert isinstance(damaged.value, Exception)


# --- where things lie -------------------------------------------------------------------------------------------------


def test_what_no_unit_holds_moves_to_where_the_passes_run():
    """Ranks that share weights read them to the host, and their units are moved by who shares them."""
    policy = Policy.from_pretrained(start_path())
    _move_rest(policy, torch.device("meta"))
    assert policy.device.type == "meta"
    owned = {id(x) for unit in policy.units for x in unit.parameters()}
    everything = [*policy.model.named_parameters(), *policy.model.named_buffers()]
    assert {(id(x) in owned, x.device.type) for _, x in everything} == {(True, "cpu"), (False, "meta")}
    cos, sin = policy.rotary(torch.zeros(3, 5, dtype=torch.int64, device="meta"))
    assert cos.device.type == sin.device.type == "meta" and cos.dtype == policy.head_weight.dtype


def test_a_policy_that_is_read_to_the_host_says_where_it_will_run(monkeypatch):
    """What is refused without a GPU is asked before the weights are shared."""
    monkeypatch.setattr(opening, "device", lambda: torch.device("meta"))
    config = PolicyConfig(path="sandbox:start")
    policy = opening.open_policy(config, torch.device("cpu"))
    assert policy.device.type == "meta" and policy.head_weight.device.type == "cpu"
    assert opening.open_policy(config).head_weight.device.type == "meta"


# --- what ranks cannot share ------------------------------------------------------------------------------------------


def test_the_planner_and_the_trainer_refuse_the_same():
    fields = {
        "strategy": ("ddp", "zero1", "zero2", "zero3", "fsdp2"), "offload_optimizer": (False, True),
        "offload_params": (False, True), "optimizer": ("adamw", "muon"),
        "implementation": ("fused", "8bit", "paged_8bit", "cpu"), "bf16": ("nearest", "stochastic", "master"),
        "quantize": ("none", "nf4"), "freeze_vision": (True, False),
    }  # fmt: skip
    seen = set()
    for values in product(*fields.values()):
        of = dict(zip(fields, values, strict=True))
        policy = {"dtype": "bfloat16", "quantize": of["quantize"], "freeze_vision": of["freeze_vision"]}
        policy |= {"lora": {"rank": 4}} if of["quantize"] != "none" else {}
        alone = {"optim": {"name": of["optimizer"], "implementation": of["implementation"], "bf16": of["bf16"]}}
        alone |= {"policy": policy, "data": {"path": "x"}}
        if refused(alone):
            continue  # also without ranks
        distributed = {n: of[n] for n in ("strategy", "offload_optimizer", "offload_params")}
        trains, plans = refused(alone | {"distributed": distributed}), refusal(2, **of)
        assert bool(trains) == bool(plans), (of, trains, plans)
        seen.add(bool(plans))
    assert seen == {True, False}


def refused(fields: dict) -> str | None:
    try:
        parse_config(SftConfig, fields)
    except ConfigError as error:
        return re.sub(r"\s+", " ", str(error))
    return None
