"""Processes to learn from: the script's set, the policy that learns it by the command line, RL on what it writes."""

from __future__ import annotations

import json
from typing import get_args

import numpy as np
import pytest
from written import WritingEngine

from genevolve_fast.data.conversations import open_conversations
from genevolve_fast.process.growing import GrowthSettings
from genevolve_fast.process.prompts import is_end
from genevolve_fast.process.rollouts import judge_processes, sample_processes
from genevolve_fast.process.stagewise import PHRASES, findings, first_difference
from genevolve_fast.process.trace import Correction, Inspection, Plan
from genevolve_fast.sandbox.process_demonstrator import (
    HABITS,
    ProcessDemonstrator,
    decisions,
    lesson,
    parts_of,
    write_processes,
)
from genevolve_fast.sandbox.world import TEMPLATES, SandboxWorld, WorldConfig, open_world
from genevolve_fast.train.config import Category, ConfigError, EvolveConfig, SftConfig, parse_config

DRAWN = ("count_row", "text_sign", "relation")
WORLD = SandboxWorld(WorldConfig(categories=DRAWN))
ROOMY = GrowthSettings(max_tokens=100_000, max_tokens_per_stage=4000)


@pytest.fixture(scope="module")
def codec(tokenizer):
    from genevolve_fast.policy.codec import TransformersCodec
    from genevolve_fast.sandbox.tiny_policy import image_processor

    return TransformersCodec(tokenizer, image_processor())


def live(codec, requests, right):
    """A judged process of every request, written by the script in the engine's place; `right(i)`: its habits."""
    by_group = {f"000000/{i:04d}-{r.id}/0": (i, r) for i, r in enumerate(requests)}

    def script(session: str) -> ProcessDemonstrator:
        i, request = by_group[session]
        return ProcessDemonstrator(request, right(i))

    world = open_world(WORLD)
    engine = WritingEngine(codec, script)
    rollouts = sample_processes(requests, 1, world=world, engine=engine, codec=codec, settings=ROOMY, seed=0)
    return judge_processes(rollouts, {r.id: r for r in requests}, world)


# --- the set ----------------------------------------------------------------------------------------------------------


def test_a_row_has_the_ids_of_the_live_process(codec, tmp_path):
    """Of sft's own reading of the written set, against what an engine is asked and trained on."""
    data = write_processes(WORLD, tmp_path / "data", count=9, experience_share=0.0, seed=5)
    rows = open_conversations(data, codec, 10**6, tmp_path / "index.npz")
    requests = WORLD.requests("train", 9, seed=6)
    lived = live(codec, requests, lambda i: decisions(requests[i], 5 + i))
    refined = 0
    for row, t in zip(rows, lived.trajectories, strict=True):
        assert t.termination == "done" and row.ids.tolist() == t.ids.tolist()
        assert row.loss_mask.tolist() == t.loss_mask.tolist()
        drafts = [lived.images[i.sha256] for i in t.images]
        assert len(drafts) == len(row.images) and all(map(np.array_equal, drafts, row.images))
        refined += any(s.name == "refine" for s in t.stages)
    assert 0 < refined < 9


def test_the_set_is_stages_in_their_form_and_some_are_told_what_to_do(tmp_path):
    data = write_processes(WORLD, tmp_path, count=30, experience_share=0.5, seed=0)
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    requests = WORLD.requests("train", 30, seed=1)
    told = [lesson(request, i, 0.5) for i, request in enumerate(requests)]
    seen = set()
    for row, request, (what, experience) in zip(rows, requests, told, strict=True):
        texts = [m["content"] for m in row["messages"] if m["role"] == "assistant"]
        assert is_end(texts[-1]) and row["messages"][-1]["role"] == "assistant"
        for text in texts[:-1]:
            kind = {"<ins>": Plan, "<insp": Inspection, "<refi": Correction}[text[:5]]
            assert str(kind.parse(text)) == text
            seen.add(kind)
        asked = row["messages"][1]["content"]
        assert asked.startswith(request.question) and ("<experience>" in asked) == (what is not None)
        assert experience is None or PHRASES[what][1] in asked
        assert sum(m["content"].count("<image>") for m in row["messages"]) == len(row["images"])
        assert all((tmp_path / name).exists() for name in row["images"])
    assert seen == {Plan, Inspection, Correction} and 5 <= sum(what is not None for what, _ in told) <= 25


def test_what_is_told_is_obeyed_but_for_slips():
    (request,) = WORLD.requests("train", 1)
    for what, share in HABITS.items():
        plain, told = (np.mean([decisions(request, i, t)[what] for i in range(400)]) for t in (None, what))
        assert abs(plain - share) < 0.08 and 0.85 < told < 0.95


WRONG = {  # habits that are wrong together -> what the comparer finds first
    ("draft against plan", "inspection missed a fault"): "inspection missed a fault",
    ("draft against plan", "refinement made it worse"): "refinement made it worse",
    ("plan against request",): "plan against request",
}


def test_the_scripts_habits_are_what_the_comparer_finds(codec):
    """With every habit right the picture is right; one wrong costs reward, and the comparer calls it by its name."""
    several = [r for r in WORLD.requests("train", 40) if len(parts_of(r, False)) > 1]
    requests = list({r.category: r for r in several}.values())

    def without(*wrong):
        return live(codec, requests, lambda i: {what: what not in wrong for what in HABITS}).trajectories

    best, mended = without(), without("draft against plan")
    assert {r.category for r in requests} == set(DRAWN) and not any(map(findings, best))
    assert all(t.outcome.program == t.outcome.visual_correctness == 1 for t in (*best, *mended))
    assert all("draft against plan" in {f.what for f in findings(t) if f.mended} for t in mended)
    for wrong, found in WRONG.items():
        lower = [(b, w) for b, w in zip(best, without(*wrong), strict=True) if w.reward < b.reward]
        assert found in {first_difference(b, w).finding.what for b, w in lower}, wrong


# --- what works and what does not -------------------------------------------------------------------------------------


def test_requests_come_from_the_named_categories_only():
    assert set(get_args(Category)) == {t.__name__ for t in TEMPLATES}
    for split in ("train", "bench"):
        assert {r.category for r in WORLD.requests(split, 12)} == set(DRAWN)
    assert {r.category for r in SandboxWorld().requests("train", 10)} == set(get_args(Category))
    emblem = SandboxWorld(WorldConfig(categories=("emblem_field",))).requests("train", 1)[0]
    with pytest.raises(ValueError, match="has to be searched"):
        parts_of(emblem, True)


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (SftConfig, {"data": {"path": "sandbox:processes"}}, "needs world.categories of count_row"),
        (
            SftConfig,
            {"data": {"path": "sandbox:processes"}, "world": {"categories": ["relation", "emblem_motto"]}},
            "has to be searched",
        ),
        (SftConfig, {"data": {"path": "x.jsonl"}, "world": {"categories": ["relation"]}}, "has its own requests"),
        (EvolveConfig, {"data": {"path": "x.jsonl"}, "world": {"categories": ["relation"]}}, "has its own requests"),
        (SftConfig, {"data": {"path": "sandbox:processes", "strict": False}}, "no row of it is bad"),
    ],
)
def test_sets_and_categories_that_would_do_nothing_are_refused(kind, fields, message):
    with pytest.raises(ConfigError, match=message):
        parse_config(kind, fields)


def test_a_share_has_an_interval_also_where_all_are_counted():
    from genevolve_fast.evaluate.bench import share_interval

    assert share_interval(60, 60) == pytest.approx((0.9398, 1.0), abs=1e-4)
    assert share_interval(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert share_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)  # the worked example of Newcombe 1998


# --- by the command line ----------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_a_policy_learns_processes_and_is_trained_on_its_own(tmp_path, capsys):
    """sft on the script's set, evolve and bench on what the policy samples: the real engine, gradients and teacher."""
    from genevolve_fast.cli import main
    from genevolve_fast.trajectory import load

    runs = ["--runs", str(tmp_path / "runs"), "--set", "threads=1"]
    learned = tmp_path / "runs" / "sandbox_process_sft"
    few = {"data.demonstrations": 400, "world.categories": "[relation]", "optim.schedule": "constant"}
    assert main(["sft", "--config", "sandbox_process_sft", *runs, *flags(few)]) == 0
    loss = [row["loss"] for row in metrics(learned)]
    assert len(loss) == 50 and loss[-1] < 0.05 * loss[0]
    assert len((learned / "data" / "sft.jsonl").read_text().splitlines()) == 400

    told = {"policy.path": learned / "policy", "checkpoint.every": 1, "pool_size": 40, "world.categories": "[relation]"}
    told |= {"steps": 1, "rollout.prompts_per_step": 4, "rollout.num_generations": 4, "experience.min_gap": 0.01}
    assert main(["evolve", "--config", "sandbox_process_evolve", *runs, *flags(told)]) == 0
    evolved = tmp_path / "runs" / "sandbox_process_evolve"
    (row,) = metrics(evolved)
    assert row["actor/grad_norm"] > 0 and row["rollout_corr/logp_difference_abs"] < 0.01
    ts, _ = load(evolved / "rollouts" / "step_000000.safetensors")
    assert len(ts) == 16 and all(t.stages[0].name == "plan" for t in ts)
    assert any(s.drawn and s.score is not None for t in ts for s in t.stages)
    assert len({t.reward for t in ts}) > 1 and row["experience/compared"] > 0

    capsys.readouterr()
    bench = ["bench", "--config", "sandbox_process_evolve", "--requests", "6", "--out", str(tmp_path / "bench")]
    assert main([*bench, "--policy", str(evolved / "policy"), "--set", "world.categories=[relation]"]) == 0
    rows = json.loads((tmp_path / "bench" / "bench.json").read_text())["rows"]
    done = sum(r["end"] == "done" for r in rows)
    assert {r["category"] for r in rows} == {"relation"} and f"done {done / 6:.3f} [" in capsys.readouterr().out


def flags(fields):
    return [part for name, value in fields.items() for part in ("--set", f"{name}={value}")]


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
