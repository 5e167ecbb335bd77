"""Who this process is among several, what they exchange, and configurations that they cannot share."""

from __future__ import annotations

from pathlib import Path

import pytest
from warm_ranks import on_two_ranks

from genevolve_fast.cli import main
from genevolve_fast.train.config import ConfigError, DistributedConfig, EvolveConfig, SftConfig, parse_config
from genevolve_fast.train.ranks import Ranks, RanksError, join, launched
from genevolve_fast.train.strategies import Fsdp2, Strategy, Zero, open_strategy

LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def unlaunched(monkeypatch):
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)


def test_without_a_launcher_a_process_is_alone_and_exchanges_with_itself(unlaunched):
    assert not launched()
    ranks = join()
    assert (ranks.rank, ranks.world, ranks.first) == (0, 1, True)
    assert ranks.gather("x") == ranks.to_first("x") == ["x"] and ranks.from_first(lambda: 3) == 3
    assert ranks.most([2, 7]) == [2, 7] and ranks.any(True) and not ranks.any(False)
    assert ranks.first_then_all(lambda: "made") == "made"
    ranks.wait()


def test_a_launcher_that_says_half_of_it_is_refused(unlaunched, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(RanksError, match="WORLD_SIZE is set without MASTER_ADDR, MASTER_PORT: launch with torchrun"):
        join()


def test_sharing_needs_a_launcher(unlaunched, tmp_path, capsys):
    assert type(open_strategy("ddp", Ranks())) is Strategy
    for name in ("zero1", "zero2", "zero3", "fsdp2"):
        with pytest.raises(RanksError, match=f"strategy '{name}' shares .* torchrun --nproc-per-node"):
            open_strategy(name, Ranks())
    command = ["evolve", "--config", "demo", "--runs", str(tmp_path), "--set", "distributed.strategy=fsdp2"]
    assert main(command) == 2
    told = capsys.readouterr().err
    assert told.startswith("genevolve-fast evolve: distributed.strategy 'fsdp2' shares") and told.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_what_a_strategy_says_of_itself():
    shared = [
        Fsdp2(Ranks(0, 2)),
        *(Zero(Ranks(0, 2), n, offload_optimizer=False, offload_params=False) for n in (2, 3)),
    ]
    assert [
        (type(s).__name__, s.in_step, s.sharded_weights, s.loss_scale) for s in [Strategy(Ranks(0, 2)), *shared]
    ] == [
        ("Strategy", False, False, 1.0),
        ("Fsdp2", True, True, 1.0),
        ("Zero", True, False, 2.0),
        ("Zero", True, True, 2.0),
    ]


ZERO2, FSDP2 = {"distributed": {"strategy": "zero2"}}, {"distributed": {"strategy": "fsdp2"}}
NF4 = {"quantize": "nf4", "lora": {"rank": 4}, "dtype": "bfloat16"}
REFUSED = {
    "'ddp': DeepSpeed offloads it": {"distributed": {"offload_optimizer": True}},
    r"\(fsdp2 moves it together with the weights": {"distributed": {"strategy": "fsdp2", "offload_optimizer": True}},
    "offload_params with strategy 'zero2' does nothing": {"distributed": {"strategy": "zero2", "offload_params": True}},
    "timeout_s": {"distributed": {"timeout_s": 0}},
    "strategy": {"distributed": {"strategy": "zero4"}},
    "muon with distributed.strategy 'zero2': it orthogonalises": ZERO2 | {"optim": {"name": "muon"}},
    "freeze_vision false with distributed.strategy 'fsdp2'": FSDP2 | {"policy": {"freeze_vision": False}},
    "4-bit weights are not cut into shards: set ddp, zero1 or zero2": FSDP2 | {"policy": NF4},
    "8-bit moments are of whole weights": ZERO2 | {"optim": {"implementation": "8bit"}},
    "implementation paged_8bit with distributed.strategy 'fsdp2'": FSDP2 | {"optim": {"implementation": "paged_8bit"}},
    "it steps what distributed.offload_optimizer keeps": ZERO2
    | {"optim": {"implementation": "cpu", "bf16": "master"}, "policy": {"dtype": "bfloat16"}},
    "stochastic with distributed.strategy 'zero2': set master": ZERO2
    | {"optim": {"bf16": "stochastic"}, "policy": {"dtype": "bfloat16"}},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_ranks_cannot_share_is_refused_with_the_reason(reason):
    for kind in (EvolveConfig, SftConfig):
        policy = {"freeze_vision": True} | REFUSED[reason].get("policy", {})
        with pytest.raises(ConfigError, match=reason):
            parse_config(kind, REFUSED[reason] | {"policy": policy, "data": {"path": "x"}})


def test_gradients_that_are_released_cannot_be_shared():
    optim = {"release_gradients": True, "max_grad_norm": None}
    fields = {"batch_size": 1, "optim": optim, "policy": {"gradient_checkpointing": True, "freeze_vision": True}}
    parse_config(SftConfig, fields)
    with pytest.raises(ConfigError, match="release_gradients with distributed.strategy 'zero2': gradients are shared"):
        parse_config(SftConfig, fields | ZERO2)


def test_what_ranks_can_share_is_taken():
    for name in ("ddp", "zero1", "zero2"):
        parse_config(EvolveConfig, {"policy": NF4, "distributed": {"strategy": name}})
    assert not DistributedConfig().shards and DistributedConfig(strategy="zero1").shards
    DistributedConfig(strategy="zero1", offload_optimizer=True)
    DistributedConfig(strategy="fsdp2", offload_params=True)


def exchanges(rank: int, folder: Path) -> None:
    ranks = Ranks(rank, 2)
    assert ranks.gather(f"of {rank}") == ["of 0", "of 1"]
    assert ranks.to_first(rank) == ([0, 1] if rank == 0 else [])
    assert ranks.from_first(lambda: f"made by {rank}") == "made by 0"
    assert ranks.most([rank, 5 - rank]) == [1, 5] and ranks.any(rank == 1) and not ranks.any(False)
    file = folder / "made"
    assert ranks.first_then_all(lambda: file.exists() or bool(file.touch())) == (rank == 1)
    for made in (lambda: 1 / 0, lambda: exit(3)):
        try:
            ranks.from_first(made)
        except (ZeroDivisionError, SystemExit):
            pass
        else:
            raise AssertionError("the first rank's exception is not everybody's")
    ranks.wait()


@pytest.mark.slow
def test_ranks_exchange_what_they_have(tmp_path):
    on_two_ranks(tmp_path, exchanges, tmp_path)
