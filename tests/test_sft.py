"""SFT: the released format gives the live session's tokens, loss falls, resuming continues at the exact sample."""

from __future__ import annotations

import json

import numpy as np
import pytest
from rollouts import demonstrated

from genevolve_fast.agent.results import to_sft
from genevolve_fast.data.conversations import DataError, encode_conversation, open_conversations
from genevolve_fast.sandbox.bootstrap import new_start, write_demonstrations, write_recitations
from genevolve_fast.sandbox.world import SandboxWorld
from genevolve_fast.train.checkpoint import checkpoints
from genevolve_fast.train.config import ConfigError, SftConfig, parse_config
from genevolve_fast.train.run import RunError
from genevolve_fast.train.sft import batch_order, sft

WORLD = SandboxWorld()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_demonstrations(WORLD, tmp_path_factory.mktemp("data"), count=48, experience_share=0.3, seed=0)


def config(**changes) -> SftConfig:
    fields = {
        "name": "t",
        "epochs": 2,
        "batch_size": 12,
        "max_tokens_per_microbatch": 4096,
        "policy": {"path": "sandbox:new", "freeze_vision": False},
        "data": {"demonstrations": 48, "recitations": 14},
        "optim": {"name": "muon", "lr": 2e-3},
        "checkpoint": {"every": 3},
    }
    return parse_config(SftConfig, fields | changes)


def test_conversations_have_the_live_sessions_tokens(policy):
    trajectories, images = demonstrated(WORLD, policy.codec, WORLD.requests("train", 10))
    for t in trajectories:
        row = to_sft(t, [r.sha256 for r in t.images])
        ids, mask = encode_conversation(row["messages"], [images[s] for s in row["images"]], policy.codec)
        live = t.ids[: len(ids)]
        assert np.array_equal(ids, live) and np.array_equal(mask, t.loss_mask[: len(ids)])
        assert t.loss_mask.sum() == mask.sum()


def test_demonstrations_carry_experience_in_the_stated_share(data):
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    carrying = ["<experience>" in r["messages"][1]["content"] for r in rows]
    assert len(rows) == 48 and 4 <= sum(carrying) <= 24
    assert all((data.parent / name).exists() for r in rows for name in r["images"])


def test_recitations_are_lists_to_repeat(tmp_path):
    rows = [json.loads(line) for line in write_recitations(tmp_path, count=20, seed=0).read_text().splitlines()]
    lists = [[m["content"] for m in row["messages"]] for row in rows]
    assert len(rows) == 20 and all(asked == said and asked.startswith("Repeat: ") for asked, said in lists)
    assert len({asked for asked, _ in lists}) == 20 and max(len(a.split()) for a, _ in lists) > 30
    with pytest.raises(ConfigError, match="sandbox:new"):
        config(policy={"path": "sandbox:start"})


def read(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if not k.startswith(("timing", "memory", "perf"))} for r in rows]


@pytest.mark.slow
def test_learning_and_resuming(data, tmp_path):
    whole, _, recitations = new_start(config(), WORLD, data.parent)
    sft(config(), whole, data, tmp_path / "whole", first=recitations)
    rows = read(tmp_path / "whole")
    assert [r["step"] for r in rows] == list(range(1, 11)) and rows[-1]["loss"] < rows[0]["loss"] - 0.5
    assert rows[1]["num_tokens"] < rows[0]["num_tokens"] < rows[2]["num_tokens"]  # 12 + 2 recitations come first
    stopped = new_start(config(), WORLD, data.parent)[0]
    with pytest.MonkeyPatch.context() as patch:
        import genevolve_fast.train.sft as module

        calls = iter(range(100))
        real = module.accumulate

        def dies(*args):
            if next(calls) == 5:
                raise KeyboardInterrupt
            return real(*args)

        patch.setattr(module, "accumulate", dies)
        with pytest.raises(KeyboardInterrupt):
            sft(config(), stopped, data, tmp_path / "cut", first=recitations)
    assert [p.name for p in checkpoints(tmp_path / "cut" / "checkpoints")] == ["step_000003"]
    again = new_start(config(), WORLD, data.parent)[0]
    with pytest.raises(RunError, match="--resume"):
        sft(config(), again, data, tmp_path / "cut")
    with pytest.raises(RunError, match="batch_size"):
        sft(config(batch_size=6), again, data, tmp_path / "cut", resume=True)
    sft(config(), again, data, tmp_path / "cut", first=recitations, resume=True)
    assert read(tmp_path / "cut") == rows
    assert (tmp_path / "cut" / "policy" / "model.safetensors").exists()


def test_every_sample_is_seen_once_an_epoch():
    c = config()
    for epoch in (0, 1):
        seen = np.concatenate([batch_order(c, 48, step) for step in range(4 * epoch, 4 * epoch + 4)])
        assert sorted(seen.tolist()) == list(range(48))
    assert not np.array_equal(batch_order(c, 48, 0), batch_order(c, 48, 4))


def test_bad_data_is_named(tmp_path, policy):
    path = tmp_path / "d.jsonl"
    good = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    cases = {
        "not JSON": "{",
        "too few images": json.dumps({"messages": [{"role": "user", "content": "<image>"}]}),
        "more images": json.dumps(
            {"messages": [{"role": "user", "content": "<image>"}, *good["messages"]], "images": ["x.png", "x.png"]}
        ),
        "cannot read image": json.dumps(
            {"messages": [{"role": "user", "content": "<image>"}, *good["messages"]], "images": ["y.png"]}
        ),
        "no sample": json.dumps(good),
    }
    from PIL import Image

    Image.new("RGB", (96, 96)).save(tmp_path / "x.png")
    for reason, text in cases.items():
        path.write_text(text)
        with pytest.raises(DataError, match=reason):
            open_conversations(path, policy.codec, 2 if reason == "no sample" else 100, tmp_path / "index.npz")
