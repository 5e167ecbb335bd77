"""SFT: the released format gives the live session's tokens, loss falls, resuming continues at the exact sample."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from rollouts import demonstrated

from genevolve_fast.agent.results import to_sft
from genevolve_fast.batch.packing import TrainingSequence, pack
from genevolve_fast.data.conversations import (
    Conversation,
    Conversations,
    DataError,
    encode_conversation,
    open_conversations,
)
from genevolve_fast.policy.passes import through_layers
from genevolve_fast.policy.visits import Stream
from genevolve_fast.profile.shapes import ModelShape
from genevolve_fast.sandbox.bootstrap import new_start, write_demonstrations, write_recitations
from genevolve_fast.sandbox.world import SandboxWorld
from genevolve_fast.train.checkpoint import checkpoints
from genevolve_fast.train.config import ConfigError, SftConfig, parse_config
from genevolve_fast.train.run import RunError
from genevolve_fast.train.sft import Schedule, accumulate, batch_order, prefetched, sft

ROOT = Path(__file__).parents[1]
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

        def dies(*args, **named):
            if next(calls) == 5:
                raise KeyboardInterrupt
            return real(*args, **named)

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


# --- packing ----------------------------------------------------------------------------------------------------------


def documents(policy, pictures, seed: int = 0) -> list[Conversation]:
    """A text, one with a picture, another text."""
    random, grid = np.random.default_rng(seed), policy.codec.image_grid(pictures[0])
    ids = [random.integers(50, 400, n) for n in (17, 40, 23)]
    ids[1][5 : 5 + policy.codec.image_tokens(grid)] = policy.codec.image_pad_id
    shown = ((), (pictures[seed % 2],), ())
    masks = [np.arange(len(i)) > 20 - 10 * (len(i) < 20) for i in ids]
    return [Conversation(i, m, p, (grid,) * len(p)) for i, m, p in zip(ids, masks, shown, strict=True)]


def test_no_token_attends_across_documents_and_positions_begin_anew(policy, pictures):
    def states(batch):
        sequences = [TrainingSequence(c.ids, c.loss_mask, c.images, c.grids) for c in batch]
        packed = pack(sequences, policy.codec.image_pad_id, policy.codec.merge_size, "cpu")
        rows, features = packed.stretch, policy.image_features(packed.images)
        with torch.no_grad():
            x, _ = through_layers(policy, features, (rows, Stream(policy.rotary(rows.positions), packed.layout)))
        return x, packed

    one, other = documents(policy, pictures, 0), documents(policy, pictures, 1)
    x, packed = states([one[0], one[1], one[2]])
    cu = packed.cu_seqlens
    assert cu == (0, 17, 57, 80)
    assert packed.positions[:, 0, list(cu[:-1])].tolist() == [[0, 0, 0]] * 3
    alone = states([one[1]])[1]
    assert torch.equal(packed.positions[:, :, cu[1] : cu[2]], alone.positions)
    for changed in ([other[0], one[1], one[2]], [one[0], other[1], one[2]], [one[0], one[1], other[2]]):
        y, _ = states(changed)
        kept = [torch.equal(x[a:b], y[a:b]) for a, b in zip(cu, cu[1:], strict=False)]
        assert kept == [c is o for c, o in zip(changed, one, strict=True)]


def gradients(policy) -> list[torch.Tensor]:
    return [p.grad.clone() for p in policy.parameters() if p.grad is not None]


@pytest.mark.slow
def test_shares_of_ranks_add_up_to_the_whole_step(data, policy, tmp_path):
    """Each rank divides by the loss tokens of all ranks, so that their gradients add."""
    c = config(max_tokens_per_microbatch=900, batch_size=9)
    samples = open_conversations(data, policy.codec, 4096, tmp_path / "index.npz")
    shape = ModelShape.from_config(policy.model.config.to_dict())
    whole = Schedule(c, samples).plan(1)
    loss = accumulate(policy, ([samples[i] for i in m] for m in whole.microbatches()), whole.loss_tokens)
    want = gradients(policy)
    for world in (2, 12):  # 12 ranks for 9 samples: some have nothing to train on
        plan = Schedule(c, samples, world=world, shape=shape).plan(1)
        policy.zero_grad(set_to_none=True)
        parts = [
            accumulate(policy, ([samples[i] for i in m] for m in plan.microbatches(rank)), plan.loss_tokens)
            for rank in range(world)
        ]
        assert sum(parts) == pytest.approx(loss, abs=1e-6) and parts.count(0.0) == max(0, world - 9)
        for a, b in zip(gradients(policy), want, strict=True):
            assert torch.allclose(a, b, atol=1e-6 + 1e-5 * float(b.abs().max()))
        assert (plan.tokens, plan.loss_tokens, plan.images) == (whole.tokens, whole.loss_tokens, whole.images)
        assert plan.rounds == max(len(plan.microbatches(r)) for r in range(world)) <= len(whole.microbatches())
        seen = [i for own in plan.packs for members in own for i in members]
        assert sorted(seen) == sorted(batch_order(c, 48, 1).tolist())


def test_a_rank_reads_its_own_share_only(data, policy, tmp_path, monkeypatch):
    c = config(batch_size=7, epochs=1)
    samples = open_conversations(data, policy.codec, 4096, tmp_path / "index.npz")
    schedule = Schedule(c, samples, world=3)
    read, real = [], Conversations.__getitem__
    monkeypatch.setattr(Conversations, "__getitem__", lambda self, i: read.append(i) or real(self, i))
    everywhere = []
    for rank in range(3):
        read.clear()
        with prefetched(schedule, policy, c, 2, rank) as feed:
            lengths = [sum(len(s.ids) for s in microbatch) for microbatch in feed]
        packs = [m for step in range(2, schedule.steps) for m in schedule.plan(step).microbatches(rank)]
        assert sorted(read) == sorted(i for m in packs for i in m)
        assert lengths == [sum(samples.tokens[list(m)]) for m in packs]
        everywhere += read
    assert sorted(everywhere) == sorted(i for step in range(2, 7) for i in batch_order(c, 48, step))


def test_progress_counts_samples(data, policy, tmp_path):
    samples = open_conversations(data, policy.codec, 4096, tmp_path / "index.npz")
    schedule = Schedule(config(batch_size=20), samples, opening=samples)  # 20, 20, 8 and then the same twice
    assert schedule.steps == 9
    sizes = np.cumsum([len(schedule.batch(step)[1]) for step in range(9)])
    assert [schedule.samples_before(step) for step in range(10)] == [0, *sizes.tolist()] and sizes[-1] == 144


# --- a run of its own -------------------------------------------------------------------------------------------------


def command(data: Path, runs: Path, *extra: str) -> list[str]:
    fields = {
        "name": "t",
        "epochs": 2,
        "batch_size": 8,
        "max_tokens_per_microbatch": 1500,
        "threads": 1,
        "policy.path": "sandbox:start",
        "data.path": data,
        "optim.lr": 1e-3,
        "checkpoint.every": 4,
    }
    sets = [part for name, value in fields.items() for part in ("--set", f"{name}={value}")]
    shipped = str(ROOT / "configs" / "sandbox_sft.yaml")
    sets += ["--set", "data.recitations=0", "--set", "optim.name=adamw", "--set", "policy.freeze_vision=true"]
    return [sys.executable, "-m", "genevolve_fast.cli", "sft", "--config", shipped, "--runs", str(runs), *sets, *extra]


def run(data: Path, runs: Path, *extra: str) -> None:
    done = subprocess.run(command(data, runs, *extra), capture_output=True, text=True, cwd=ROOT, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_killed_in_the_middle_of_an_epoch_and_resumed_equals_uninterrupted(data, tmp_path):
    run(data, tmp_path / "whole")
    want = read(tmp_path / "whole" / "t")
    assert [r["step"] for r in want] == list(range(1, 13))  # 48 samples: six steps an epoch
    cut = tmp_path / "cut" / "t"
    process = subprocess.Popen(
        command(data, tmp_path / "cut"), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    until = time.time() + 300
    while time.time() < until and process.poll() is None:
        log = cut / "metrics.jsonl"
        if log.exists() and len(log.read_bytes().splitlines()) >= 9:
            break
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    before = read(cut)
    assert 9 <= len(before) < 12 and before == want[: len(before)]
    index = (cut / "index" / "data.npz").stat().st_mtime_ns
    run(data, tmp_path / "cut", "--resume")
    assert read(cut) == want and (cut / "index" / "data.npz").stat().st_mtime_ns == index
    for file in ("model.safetensors", "config.json"):
        assert (cut / "policy" / file).read_bytes() == (tmp_path / "whole" / "t" / "policy" / file).read_bytes()
    rows = [json.loads(line) for line in (cut / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["samples"] == 96 and rows[0]["perf/images"] >= 0 and 0 < rows[0]["perf/packing_efficiency"] <= 1
    assert rows[0]["perf/peak_bytes_per_token"] > 0 and all("perf/data_seconds" in r for r in rows)
    text = data.read_text()
    other = data.with_name("other.jsonl")
    other.write_text(text.replace("assistant", "assistent", 1))
    done = subprocess.run(command(other, tmp_path / "bad"), capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and "line 1: messages[2].role" in done.stderr and not (tmp_path / "bad" / "t").exists()


@pytest.mark.slow
def test_memory_does_not_grow_with_the_data(tmp_path):
    """A fifth of the data and all of it, each in a process of its own."""
    found = []
    for size in (12, 60):
        sizes = [sys.executable, "-m", "benchmarks.sft_stream", "--gib", str(size / 1024), "--json"]
        done = subprocess.run(
            [*sizes, "--image-cache-mb", "16", "--workers", "2"], capture_output=True, text=True, cwd=ROOT, timeout=600
        )
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(json.loads(done.stdout.splitlines()[-1]))
    small, large = found
    assert large["data_bytes"] > 3.5 * small["data_bytes"] and large["images"] == large["samples"]
    if large["stream_growth"] is None:
        pytest.skip("this system does not tell the peak of a process")
    for name in ("index_growth", "stream_growth"):
        assert large[name] < small[name] + 24e6, found
