"""Which engine a configuration opens, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from genevolve_fast.incidents import Incidents
from genevolve_fast.profile.plan import Settings
from genevolve_fast.protocols import TrainedEngine
from genevolve_fast.rollout.transformers_engine import TransformersEngine
from genevolve_fast.rollout.vllm_server import VllmServerEngine
from genevolve_fast.train.config import ConfigError, EvolveConfig, RolloutConfig, parse_config
from genevolve_fast.train.engines import open_engine
from genevolve_fast.train.fits import settings_of

SERVER = {"urls": ["http://127.0.0.1:9"], "sync_dir": "weights"}


def parsed(rollout: dict, **more) -> EvolveConfig:
    return parse_config(EvolveConfig, {"rollout": rollout, **more})


@pytest.mark.parametrize(
    ("rollout", "more", "message"),
    [
        ({"server": SERVER}, {}, "server belongs to engine 'server'"),
        ({"engine": "server"}, {}, "needs server.urls"),
        ({"engine": "server", "server": {"urls": ["127.0.0.1:8000"], "sync_dir": "w"}}, {}, "does not begin with"),
        ({"engine": "server", "server": {"urls": ["http://h:1"]}}, {}, "needs sync_dir"),
        ({"engine": "server", "server": SERVER | {"sync": "nccl"}}, {}, "sync_dir with sync 'nccl' would do nothing"),
        ({"engine": "server", "server": SERVER, "max_batch": 8}, {}, "max_batch belongs to engine 'transformers'"),
        ({"engine": "server", "server": SERVER, "vllm": {"enforce_eager": True}}, {}, "vllm belongs to engine 'vllm'"),
        ({"vllm": {"bucket_mb": 64}}, {}, "vllm belongs to engine 'vllm'"),
        ({"engine": "vllm", "server": SERVER}, {}, "server belongs to engine 'server'"),
        ({"engine": "server", "server": SERVER | {"merge_lora": True}}, {}, "there is no adapter to merge"),
        (
            {"engine": "server", "server": {"urls": ["http://h:1"], "sync": "nccl"}},
            {"policy": {"lora": {"rank": 4}}},
            "an adapter needs sync 'disk'",
        ),
    ],
)
def test_sections_that_would_do_nothing_are_refused(rollout, more, message):
    with pytest.raises(ConfigError, match=message):
        parsed(rollout, **more)


def test_an_engine_elsewhere_needs_no_kv_here():
    device = torch.device("cpu")
    assert settings_of(parsed({}), device).rollout
    assert not settings_of(parsed({"engine": "server", "server": SERVER}), device).rollout
    assert not settings_of(parsed({"engine": "vllm"}), device).rollout
    assert Settings(tokens=10, prefix=5).rollout


def test_the_configured_engine_is_opened(policy, tmp_path, monkeypatch):
    incidents = Incidents()
    assert isinstance(open_engine(parsed({}), policy, incidents), TransformersEngine)
    server = SERVER | {"sync_dir": str(tmp_path), "api_key_env": "ENGINE_KEY", "dtype": "bfloat16", "verify_every": 3}
    config = parsed({"engine": "server", "server": server})
    monkeypatch.delenv("ENGINE_KEY", raising=False)
    with pytest.raises(ConfigError, match="the environment has no ENGINE_KEY"):
        open_engine(config, policy, incidents)
    monkeypatch.setenv("ENGINE_KEY", "not-to-be-seen")
    engine = open_engine(config, policy, incidents)
    try:
        assert isinstance(engine, VllmServerEngine) and isinstance(engine, TrainedEngine)
        assert (engine.dtype, engine.verify_every, engine.adapter_only) == (torch.bfloat16, 3, False)
        assert "not-to-be-seen" not in repr(vars(config.rollout.server))
    finally:
        engine.shutdown()


def test_what_this_machine_lacks_is_named(policy, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = parsed({"engine": "server", "server": {"urls": ["http://h:1"], "sync": "nccl"}})
    with pytest.raises(ConfigError, match="this machine has none: use 'disk'"):
        open_engine(config, policy, Incidents())


def test_sections_survive_being_written_and_read_again():
    config = parsed({"engine": "server", "server": SERVER, "deterministic": False})
    assert RolloutConfig(**config.rollout.model_dump()) == config.rollout
