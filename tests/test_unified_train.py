"""Training of a unified model: what is learnt of a row, a run that resumes to the bit, and the two commands."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from genevolve_fast.cli import main
from genevolve_fast.process.trace import Correction, Cycle, Inspection, Plan, Process
from genevolve_fast.process.unified.config import UnifiedConfig
from genevolve_fast.process.unified.model import Unified
from genevolve_fast.process.unified.sequences import drawn_images
from genevolve_fast.process.unified.train import batch_of, rows_for, train_unified, trajectory_of
from genevolve_fast.resumable import held
from genevolve_fast.sandbox.tiny_unified import model_for
from genevolve_fast.train.config import ConfigError, parse_config
from genevolve_fast.train.run import RunError
from genevolve_fast.trajectory import STAGES, image_hash

RNG = np.random.default_rng(0)
PICTURES = [RNG.integers(0, 256, (8, 8, 3), dtype=np.uint8) for _ in range(4)]
PIXELS = {image_hash(p): p for p in PICTURES}
SHAS = list(PIXELS)
SMALL = dict(
    steps=4,
    batch_size=3,
    model=dict(hidden=32, layers=1, heads=2, patch_size=4),
    samples=dict(every=0),
    checkpoint=dict(every=1, keep_last=9),
)


def process(n: int) -> Process:
    plan = Plan(f"add {n}", f"a scene of {n}")
    if n % 2:
        fault = Inspection(draft="it is green")
        return Process(
            f"p{n}", f"request {n}", (Cycle(plan, SHAS[0], fault, Correction("mend it"), SHAS[n % 4], STAGES),)
        )
    return Process(f"p{n}", f"request {n}", tuple(Cycle(plan, SHAS[k], Inspection()) for k in range(1 + n % 3)))


PROCESSES = [process(n) for n in range(5)]


def config(**changes) -> UnifiedConfig:
    return parse_config(UnifiedConfig, SMALL | changes)


def metrics(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_an_interrupted_run_ends_as_an_uninterrupted_one(tmp_path, monkeypatch):
    c = config(max_tokens_per_microbatch=120)  # several micro-batches a step
    whole = train_unified(c, model_for(c, PROCESSES, PIXELS), PROCESSES, PIXELS, tmp_path / "whole")

    from genevolve_fast.process.unified import train

    real = train.accumulate

    def crash(config, policy, processes, pixels, step, finite):
        if step == 2:
            raise KeyboardInterrupt
        return real(config, policy, processes, pixels, step, finite)

    monkeypatch.setattr(train, "accumulate", crash)
    with pytest.raises(KeyboardInterrupt):
        train_unified(c, model_for(c, PROCESSES, PIXELS), PROCESSES, PIXELS, tmp_path / "parts")
    monkeypatch.setattr(train, "accumulate", real)
    with pytest.raises(RunError, match="--resume"):
        train_unified(c, model_for(c, PROCESSES, PIXELS), PROCESSES, PIXELS, tmp_path / "parts")
    parts = train_unified(c, model_for(c, PROCESSES, PIXELS), PROCESSES, PIXELS, tmp_path / "parts", resume=True)
    a, b = (Unified.from_pretrained(f).state_dict() for f in (whole, parts))
    assert all(torch.equal(a[name], b[name]) for name in a)
    losses = [[(row["step"], row["loss/text"], row["loss/flow"]) for row in metrics(f.parent)] for f in (whole, parts)]
    assert losses[0] == losses[1] and len(losses[0]) == 4


def test_micro_batches_sum_to_the_loss_of_the_whole_step(tmp_path):
    """By text alone, as each micro-batch draws noise of its own."""
    rows = []
    for size in (120, 4000):
        c = config(steps=1, batch_size=5, max_tokens_per_microbatch=size)
        folder = tmp_path / str(size)
        train_unified(c, model_for(c, PROCESSES, PIXELS), PROCESSES, PIXELS, folder)
        rows += metrics(folder)
    assert rows[0]["loss/text"] == pytest.approx(rows[1]["loss/text"], rel=1e-5)
    assert rows[0]["num_tokens"] == rows[1]["num_tokens"] and rows[0]["noised_drafts"] == rows[1]["noised_drafts"] > 5
    assert all(r["loss"] == pytest.approx(0.25 * r["loss/text"] + r["loss/flow"]) for r in rows)


def test_rows_come_in_another_order_every_pass_and_each_once():
    seen = [batch_of(5, 3, seed=0, step=n) for n in range(5)]
    flat = [i for batch in seen for i in batch]
    assert sorted(flat[:5]) == sorted(flat[5:10]) == sorted(flat[10:]) == list(range(5)) and flat[:5] != flat[5:10]
    assert batch_of(5, 12, seed=0, step=0)[:3] == seen[0] and batch_of(5, 3, seed=1, step=0) != seen[0]


def test_one_pass_learns_the_request_and_the_last_picture_and_stages_are_chosen():
    c = config()
    policy = model_for(c, PROCESSES, PIXELS)
    t = trajectory_of(PROCESSES[1], config(target="one_pass"), policy.codec, PIXELS)
    assert [i.sha256 for i in drawn_images(t)] == [SHAS[1]]
    reply = t.ids[t.turns[1].start :].tolist()
    told = policy.codec.decode([i for i in reply if i != policy.codec.image_pad_id])
    assert told == "<|vision_start|><|vision_end|><|im_end|>"
    whole = trajectory_of(PROCESSES[1], c, policy.codec, PIXELS)
    only = trajectory_of(PROCESSES[1], config(flow=dict(stages=["plan"])), policy.codec, PIXELS)
    assert only.num_loss_tokens < whole.num_loss_tokens and drawn_images(only) == drawn_images(whole) != ()


def test_rows_whose_last_plan_was_wrong_have_no_form_without_inspection(tmp_path):
    mended = Cycle(Plan("a", "b"), SHAS[0], Inspection(plan="c"), Correction("d"), SHAS[1], ("inspect", "refine"))
    wrong = Process("w", "request", (mended,))
    assert rows_for([wrong, PROCESSES[0]], "plan") == [PROCESSES[0]] and rows_for([wrong], "inspect") == [wrong]
    c = config(target="plan")
    with pytest.raises(RunError, match="no row has a form"):
        train_unified(c, model_for(c, [wrong], PIXELS), [wrong], PIXELS, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (dict(optim=dict(release_gradients=True)), "release_gradients"),
        (dict(optim=dict(bf16="master")), "would do nothing"),
        (dict(target="one_pass", flow=dict(stages=["plan"])), "hold no texts"),
        (dict(target="inspect", flow=dict(stages=["plan", "inspect"])), "plan would do nothing"),
        (dict(flow=dict(stages=["plan", "plan"])), "twice"),
        (dict(model=dict(path="x", layers=2)), "would do nothing"),
    ],
)
def test_what_cannot_work_is_refused(changes, told):
    with pytest.raises(ConfigError, match=told):
        config(**changes)


@pytest.mark.slow
def test_commands_train_draw_and_refuse(tmp_path, capsys):
    data = str(tmp_path / "data")
    assert main(["process", "data", "--count", "6", "--subset", "multi_turn", "--out", data]) == 0
    small = ["steps=2", "batch_size=2", "model.hidden=32", "model.layers=1", "model.heads=2", "model.patch_size=8"]
    small.append("flow.shift=2.0")
    sets = [word for pair in [f"data={data}", "name=tiny", *small] for word in ("--set", pair)]
    runs = ["--runs", str(tmp_path)]
    assert main(["process", "train", *sets, *runs]) == 0
    assert main(["process", "train", *sets, *runs]) == 2
    assert "already holds a run" in capsys.readouterr().err
    with held(tmp_path / "tiny" / ".lock"):
        assert main(["process", "train", *sets, *runs, "--resume"]) == 2
    assert "is being written by another process" in capsys.readouterr().err
    model = ["--model", str(tmp_path / "tiny" / "policy")]
    assert json.loads((tmp_path / "tiny" / "policy" / "config.json").read_text())["shift"] == 2.0
    main(["process", "draw", *model, "--out", str(tmp_path / "drawn"), "--steps", "1", "a red circle"])
    (line,) = map(json.loads, (tmp_path / "drawn" / "drawn.jsonl").read_text().splitlines())
    assert line["request"] == "a red circle" and len(list((tmp_path / "drawn").glob("*_draft_*"))) == line["drafts"]
    assert main(["process", "draw", *model, "--out", data, "--steps", "0", "a"]) == 2
    assert main(["process", "train", "--set", "steps=1"]) == 2
    assert "data is empty" in capsys.readouterr().err
