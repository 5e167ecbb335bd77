"""The comparison of one pass and process: the same start and rows, equal steps, parts kept, what is counted."""

from __future__ import annotations

import json
import shutil
import xml.etree.ElementTree as ET
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks import plot_process, process_gain
from benchmarks.process_gain import (
    ARMS,
    COUNTED,
    Kept,
    Settings,
    asked,
    drawn,
    exchanged,
    inspected,
    second_plans,
    steps_told,
    two_level,
)
from genevolve_fast.evaluate.scoreboard import TARGETS
from genevolve_fast.process.rows import open_processes
from genevolve_fast.process.scene_graph import SceneRequest
from genevolve_fast.process.unified.train import trajectory_of
from genevolve_fast.resumable import held
from genevolve_fast.sandbox.stroke_data import placed
from genevolve_fast.sandbox.strokes import SIZE, PixelJudge, parse, requests, sample_scene
from genevolve_fast.sandbox.strokes import draw as paint
from genevolve_fast.sandbox.tiny_unified import model_for
from tests.reciting import always_a_black_cross

pytestmark = pytest.mark.slow

SMALL = Settings.small()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Rows, and both arms trained and drawn, in this process."""
    out = tmp_path_factory.mktemp("gain")
    process_gain.build(SMALL, out / "rows")
    for arm in ("process", "one_pass"):
        process_gain.one(SMALL, out, 0, arm)
    return out


def test_both_arms_start_from_the_same_weights_on_the_same_rows_with_the_same_settings(folder):
    rows = open_processes(folder / "rows")
    configs = [SMALL.config(0, arm) for arm in ARMS]
    starts = [model_for(c, rows, rows.pixels).state_dict() for c in configs]
    assert all(torch.equal(starts[0][name], starts[1][name]) for name in starts[0])
    differ = {k for k in dict(configs[0]) if getattr(configs[0], k) != getattr(configs[1], k)}
    assert differ == {"name", "target"}
    samples = [[json.loads(line)["samples"] for line in (folder / f"{a}_0" / "metrics.jsonl").open()] for a in ARMS]
    assert samples[0] == samples[1] == [4.0, 8.0, 12.0]


def test_one_pass_has_as_many_euler_steps_as_the_process_took_and_parts_are_not_made_twice(folder, capsys):
    of = {arm: drawn(SMALL, folder, 0, arm) for arm in ARMS}
    assert len(of["process"]) == len(of["one_pass"]) == SMALL.requests
    for p, o in zip(of["process"], of["one_pass"], strict=True):
        assert p.steps == SMALL.euler * len(p.drafts)
        assert o.steps == (p.steps or SMALL.euler) * len(o.drafts)
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*.npz")}
    process_gain.one(SMALL, folder, 0, "process")
    process_gain.one(SMALL, folder, 0, "one_pass")
    assert times == {path: path.stat().st_mtime_ns for path in folder.rglob("*.npz")}
    result = process_gain.summary(SMALL, folder, [0])
    process_gain.tell(result)
    assert "process - one pass" in capsys.readouterr().out and set(result["gains"]) == set(COUNTED)
    assert {f"process/{n}" for n in ("position_gain", "attribute_gain", "forgotten_objects")} <= set(TARGETS)


def test_ablations_leave_stages_out_and_are_summed_up_beside_the_comparison(folder):
    for arm in ("plan", "inspect", "unmended"):
        process_gain.one(SMALL, folder, 0, arm)
    rows = open_processes(folder / "rows")
    seen = {}
    assert {p.subset for p in rows} == {"multi_turn", "image_alignment"}
    assert {p.subset for p in process_gain.learnt(SMALL, folder, 0, "unmended")[0]} == {"multi_turn"}
    tokenizers = {(folder / f"{arm}_0" / "policy" / "tokenizer.json").read_bytes() for arm in ("process", "unmended")}
    assert len(tokenizers) == 1  # and so the same weights at the start
    for arm in ("process", "plan", "inspect", "one_pass"):
        config = SMALL.config(0, arm)
        policy = model_for(config, rows, rows.pixels)
        seen[arm] = sum(trajectory_of(p, config, policy.codec, rows.pixels).num_loss_tokens for p in rows)
    assert seen["process"] > max(seen["plan"], seen["inspect"]) and seen["one_pass"] == 3 * len(rows)
    result = process_gain.summary(SMALL, folder, [0], [*ARMS, "plan", "inspect", "unmended"])
    assert set(result["gains"]["position"]) == {"process", "plan", "inspect", "unmended"}
    assert all(arm in result["table"] for arm in ("plan", "inspect", "unmended"))
    process_gain.one(SMALL, folder, 0, "symbolic")
    assert not (folder / "symbolic_0").exists()  # it waits for the requests that the model's own traces give rows for


def test_two_comparisons_do_not_write_into_one_folder(folder, capsys):
    with held(folder / ".lock"), pytest.raises(SystemExit):
        process_gain.main(["--out", str(folder), "--small", "--seeds", "0"])
    assert f"{folder} is being written by another process" in capsys.readouterr().err


def test_less_than_the_whole_comparison_is_not_recorded(tmp_path, capsys):
    for flags, reason in ((["--small"], "without --small"), (["--seeds", "0", "1"], "seeds 0, 1 and 2")):
        with pytest.raises(SystemExit):
            process_gain.main(["--out", str(tmp_path / "out"), "--record", *flags])
        assert reason in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_critiques_are_held_against_as_many_steps_without_them(folder, tmp_path):
    for arm, made in {"process": "process", "one_pass": "one_pass", "more": "one_pass", "symbolic": "one_pass"}.items():
        shutil.copytree(folder / f"{made}_0", tmp_path / f"{arm}_0")
    right = [paint(sample_scene(r.graph, np.random.default_rng(0))) for r in asked(SMALL)]
    told = json.dumps([{"texts": ["", ""], "drafts": 1, "steps": 1, "ended": True}] * len(right))
    np.savez_compressed(tmp_path / "more_0" / "drawn" / "00000.npz", drafts=np.array(right), told=told)
    result = process_gain.summary(SMALL, tmp_path, [0], [*ARMS, "more", "symbolic"])
    for category, over in result["over_more"].items():
        shares = {arm: share["value"] for arm, share in result["shares"][category].items()}
        assert shares["more"] == 1 > shares["symbolic"] == shares["one_pass"]
        assert set(over) == {"symbolic"} and over["symbolic"]["value"] == shares["symbolic"] - 1
    assert set(result["over_more"]) == set(COUNTED)


def test_critiques_by_rule_are_of_the_requests_that_the_models_own_traces_gave_rows_for(folder, tmp_path):
    settings = replace(SMALL, critique_requests=40)
    (tmp_path / "rows").symlink_to(folder / "rows")
    always_a_black_cross(tmp_path / "process_0" / "policy")
    own, pixels = process_gain.learnt(settings, tmp_path, 0, "self_sampled")
    rule, _ = process_gain.learnt(settings, tmp_path, 0, "symbolic")
    more, _ = process_gain.learnt(settings, tmp_path, 0, "more")
    count = len(own) // 2
    assert count >= 2 and len(own) == len(rule) == 2 * count and len(more) == 2 * count
    assert [p.id for p in own] == [p.id for p in rule] and own[:count] == rule[:count] == more[:count]
    assert {p.extra["source"] for p in own[count:]} == {"UnifiedSampler"}
    assert not {p.extra["source"] for p in rule[count:]} & {"UnifiedSampler"}
    assert all(sha in pixels for p in own for sha in p.drafts)
    process_gain.train(settings, tmp_path, 0, "self_sampled")
    assert len((tmp_path / "self_sampled_0" / "metrics.jsonl").read_text().splitlines()) == settings.critique_steps


def test_the_plot_shows_every_arm_and_what_was_drawn(folder, tmp_path, capsys):
    with pytest.raises(SystemExit):
        plot_process.main([str(tmp_path)])
    assert "no finished comparison" in capsys.readouterr().err
    result = process_gain.summary(SMALL, folder, [0])
    (folder / "result.json").write_text(json.dumps(result))
    plot_process.main([str(folder), "--out", str(tmp_path / "p.svg"), "--count", "2"])
    svg = ET.parse(tmp_path / "p.svg").getroot()
    name = "{http://www.w3.org/2000/svg}"
    told = [t.text for t in svg.iter(f"{name}text")]
    assert {"one pass", "process", "position", "color_attr", *(r.text for r in asked(SMALL)[:2])} <= set(told)
    shown = drawn(SMALL, folder, 0, "process")[:2]
    assert len(list(svg.iter(f"{name}image"))) == 2 + sum(max(1, len(m.drafts)) for m in shown)
    assert len(list(svg.iter(f"{name}polyline"))) == len(ARMS)


def test_counted_requests_are_held_out_and_the_interval_covers_seeds():
    wanted = asked(Settings())
    assert len(wanted) == 300 and {r.category for r in wanted} == set(COUNTED)
    trained = {r.graph.key for r in requests("train", 0, 2000, COUNTED)}
    assert not trained & {r.graph.key for r in wanted}
    same = two_level(np.full((3, 20), 0.5))
    assert (same.value, same.low, same.high) == (0.5, 0.5, 0.5)
    apart = two_level(np.repeat([[0.0], [0.5], [1.0]], 20, axis=1), samples=500)
    assert apart.low < 0.2 and apart.high > 0.8 and apart.n == 60


def test_an_object_that_was_right_and_became_wrong_is_counted_as_forgotten():
    from genevolve_fast.process.compositional import consistency

    first = "a red circle at row 1 column 1"
    both = f"{first} and a blue square at row 3 column 3"
    texts = [
        f"<ins>x</ins><des>{first}</des>",
        f"<inspect>plan: none draft: none</inspect><ins>x</ins><des>{both}</des>",
    ]
    right, lost = (paint(placed(parse(t))) for t in (both, "a blue square at row 3 column 3"))
    before = paint(placed(parse(first)))
    keeps, forgets = (Kept(texts, [before, after], 2, True) for after in (right, lost))
    for made, share in ((keeps, 0.0), (forgets, 1.0)):
        runs = [s for s in steps_told(made) if len(s) > 1]
        assert consistency(runs, PixelJudge()).forgotten == share
    unread = Kept([texts[0], "<ins>x</ins><des>gibberish</des>"], [before, lost], 2, True)
    assert [len(s) for s in steps_told(unread)] == [1, 0]
    nothing = Kept([], [], 0, False)
    assert nothing.picture.shape == (SIZE, SIZE, 3) and (nothing.picture == 255).all()


def test_what_inspections_found_and_what_plans_exchanged_is_counted():
    first, asked_for = "a red circle at row 1 column 1", "a red circle and a blue square"
    both = f"{first} and a blue square at row 3 column 3"
    turned = "a red circle at row 3 column 3 and a blue square at row 1 column 1"
    plan = lambda told: f"<ins>x</ins><des>{told}</des>"  # noqa: E731
    sound, faulty = "<inspect>plan: none draft: none</inspect>", "<inspect>plan: none draft: it is green</inspect>"
    one, two = (paint(placed(parse(t))) for t in (first, both))
    request = SceneRequest("r", asked_for, "color_attr", parse(asked_for))
    kept = Kept([plan(first), sound + plan(both), sound], [one, two], 20, True)
    lost = Kept([plan(first), sound + plan(turned), sound], [one, two], 20, True)
    mended = Kept([plan(both), f"{faulty}<refine>y</refine>", ""], [one, two], 20, True)
    alarm = Kept([plan(first), faulty], [one], 10, True)
    unplanned = Kept(["", sound], [one], 10, True)
    assert [exchanged(m) for m in (kept, lost, mended)] == [False, True, False]
    counted = inspected([request] * 5, [kept, lost, mended, alarm, unplanned], PixelJudge())
    assert counted == dict(drafts=7, wrong=3, found=1, false_alarms=1, refined=1, right_after_refining=1)


def test_a_second_plan_is_held_against_the_request_and_against_the_first():
    asked_for = "a red circle left of a blue square"
    circle, square = "a red circle at row 1 column 3", "a blue square at row 1 column 1"
    turned = "a red circle at row 1 column 1 and a blue square at row 1 column 3"
    request = SceneRequest("r", asked_for, "position", parse(asked_for))
    sheet = paint(placed(parse(circle)))

    def two(first: str, second: str) -> Kept:
        return Kept([f"<ins>x</ins><des>{told}</des>" for told in (first, second)], [sheet, sheet], 20, True)

    made = [
        two(circle, turned),  # right, and the circle has moved
        two(square, turned),  # right, and the square has moved
        two(circle, f"{circle} and {square}"),  # kept, and on the wrong side
        two(circle, "a red circle at row 1 column 1 and a blue square at row 1 column 1"),  # one over the other
        two(circle, "gibberish"),
    ]
    counted = second_plans([request] * 5, made, PixelJudge())
    assert counted == dict(read=4, right=2, exchanged=3, named_first=3, named_first_exchanged=2)
    elsewhere = replace(request, category="color_attr")
    assert not any(second_plans([elsewhere] * 5, made, PixelJudge()).values())
