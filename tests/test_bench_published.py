"""`bench` on published benches: stage by stage against real chat servers, resumed, beside the published rows."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from loopback.chat import LoopbackChat

from genevolve_fast.cli import main
from genevolve_fast.evaluate.published import TABLES, beside, columns, published, sources
from genevolve_fast.evaluate.wise import PROTOCOLS
from genevolve_fast.sandbox.world import SandboxWorld

pytestmark = pytest.mark.slow  # server processes, or pipelines of diffusers

ROWS = 8


@pytest.fixture(scope="module")
def agent():
    server = LoopbackChat().start()
    yield server
    server.kill()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The sandbox's bench as published: test.jsonl and the ground truth beside it."""
    folder = tmp_path_factory.mktemp("published") / "GenEvolve-Bench"
    SandboxWorld().write_dataset(folder, train=1, bench=ROWS)
    (folder / "bench.jsonl").rename(folder / "test.jsonl")
    return folder.parent


def command(data: Path, agent, out: Path, *more: str) -> list[str]:
    flags = ["--base-url", agent.url, "--tools", "sandbox", "--judge", "sandbox", "--out", str(out)]
    return ["bench", "--data", str(data), *flags, *more]


def test_rollout_render_and_score_end_in_the_tables(data, agent, tmp_path, capsys):
    out = tmp_path / "bench"
    agent.faults()
    assert main(command(data, agent, out, "--name", "demonstrator", "--judge-programs", "--price", "picture=2")) == 0
    said = capsys.readouterr().out
    assert f"{ROWS} answered" in said and f"{2 * ROWS} judged, 0 failed" in said and "Quality-Anchored" in said
    rows = json.loads((out / "render" / "results.json").read_text())
    assert len(rows) == ROWS and all(row["success"] and row["gt_image"] for row in rows)
    made = json.loads((out / "score" / "summary.json").read_text())
    assert made["all"]["count_eval_success"] == ROWS and made["all"]["overall"] > 0.6
    assert set(made["by_eval_type"]) == {"Knowledge-Anchored", "Quality-Anchored"}
    found = json.loads((out / "score" / "diagnostics.json").read_text())
    assert found["references"]["decodable"] == found["references"]["shown_before"] == 1.0
    assert found["tools"]["image_search"]["succeeded"] == 1.0 and found["sampled_tokens"] > 0
    assert found["cost"]["dollars"] == 2 * ROWS and set(found["seconds"]) == {"rollout", "render", "score"}
    calls = len(agent.seen())
    assert main(command(data, agent, out, "--name", "demonstrator", "--judge-programs")) == 0
    said = capsys.readouterr().out
    assert f"rollout: {ROWS} rows are answered already" in said and "judged, 0 failed" not in said
    assert len(agent.seen()) == calls


def test_only_what_failed_is_done_again(data, agent, tmp_path, capsys):
    out = tmp_path / "bench"
    agent.faults({"status": 422, "message": "not this one"})
    assert main(command(data, agent, out, "--parallel", "1")) == 0
    assert f"{ROWS - 1} answered, 1 failed" in capsys.readouterr().out
    made = json.loads((out / "score" / "summary.json").read_text())
    assert (made["all"]["count_eval_success"], made["all"]["denominator"]) == (ROWS - 1, ROWS)
    assert made["all"]["overall_missing_zero"] < made["all"]["overall"] and len(made["missing_case_ids"]) == 1
    (out / "render" / "images" / "bench-0-000003.png").unlink()
    agent.faults()
    assert main(command(data, agent, out, "--parallel", "1")) == 0
    assert "2 judged" not in (said := capsys.readouterr().out) and "1 judged, 0 failed" in said
    assert json.loads((out / "score" / "summary.json").read_text())["all"]["count_eval_success"] == ROWS


def test_an_agent_that_refuses_everything_ends_before_anything_is_drawn(data, tmp_path, agent, capsys):
    agent.faults(*[{"status": 404, "message": "no such model"}] * ROWS)
    flags = command(data, agent, tmp_path / "bench", "--parallel", "1")
    assert main(flags) == 1 and "stopped" in capsys.readouterr().err
    assert not (tmp_path / "bench" / "render").exists()


@pytest.mark.slow
def test_a_killed_bench_goes_on_where_it_was(data, agent, tmp_path):
    out = tmp_path / "bench"
    agent.faults(*[{"delay_s": 0.2}] * 100)
    run = [sys.executable, "-m", "genevolve_fast.cli", *command(data, agent, out, "--parallel", "2")]
    process = subprocess.Popen(run, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    journal, deadline = out / "rollout" / "rollouts.jsonl", time.monotonic() + 120
    while time.monotonic() < deadline and (not journal.exists() or journal.read_bytes().count(b"\n") < 3):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    answered = journal.read_bytes().count(b"\n") - 1
    assert 0 < answered < ROWS
    agent.faults()
    done = subprocess.run(run, capture_output=True, text=True, timeout=300, env=os.environ)
    assert done.returncode == 0, done.stderr
    assert json.loads((out / "score" / "summary.json").read_text())["all"]["count_eval_success"] == ROWS
    asked = {call["body"]["messages"][1]["content"] for call in agent.seen()}
    assert len(asked) == ROWS - answered


def test_wise_prompts_go_the_same_way(agent, tmp_path, capsys):
    questions = [r.question for r in SandboxWorld().requests("bench", ROWS)[:3]]
    rows = [
        {"Prompt": q, "Explanation": "It is so", "Category": "c", "Subcategory": "s", "prompt_id": n}
        for q, n in zip(questions, (1, 2, 401), strict=True)
    ]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "all.json").write_text(json.dumps(rows))
    judge = LoopbackChat().start()
    try:
        agent.faults()
        judge.faults(*[{"text": '{"consistency": 2, "realism": 1, "aesthetic_quality": 0}'}] * 3)
        flags = command(tmp_path / "data", agent, tmp_path / "bench")
        flags[1:3] = ["--wise", str(tmp_path / "data")]
        i = flags.index("--judge")
        flags[i : i + 2] = ["--judge-model", "grader", "--judge-base-url", judge.url, "--renderer", "canvas"]
        assert main(flags) == 0
    finally:
        judge.kill()
    made = json.loads((tmp_path / "bench" / "score" / "summary.json").read_text())
    assert made["judged"] == 3 and made["categories"]["TIME"]["wiscore"] == pytest.approx(0.8)
    assert (tmp_path / "bench" / "score" / "all_scores_results.jsonl").read_text().count("\n") == 3


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--model", "m"], "--model is of a published bench"),
        (["--judge", "sandbox"], "--judge is of a published bench"),
        (["--data", "nowhere"], "no such file or folder"),
        (["--data", "nowhere", "--set", "a=b"], "--set is of the sandbox"),
        (["--requests", "0"], "at least 1"),
        (["--wise", "nowhere", "--judge-model", "m"], "cannot be read"),
    ],
)
def test_flags_that_would_do_nothing_are_refused(flags, told, capsys):
    assert main(["bench", *flags]) == 2 and told in capsys.readouterr().err


def test_a_model_grades_no_canvas_that_nobody_asked_for(data, agent, tmp_path, capsys):
    """The sandbox's canvas once drew a bench whose command names no renderer, beside the published rows."""
    flags = command(data, agent, tmp_path / "bench", "--judge-model", "m", "--judge-base-url", "http://127.0.0.1:9/v1")
    i = flags.index("--judge")
    del flags[i : i + 2]
    agent.faults()
    assert main(flags) == 2
    assert "--renderer is missing" in capsys.readouterr().err and not agent.seen()
    assert not (tmp_path / "bench").exists()


def test_a_judge_that_is_missing_is_told_before_anything_is_sampled(data, agent, tmp_path, capsys):
    agent.faults()
    flags = command(data, agent, tmp_path / "bench", "--judge-model", "m")
    assert main(flags) == 2 and "are of the chat judge" in capsys.readouterr().err
    assert agent.seen() == [] and not (tmp_path / "bench").exists()


# --- published rows ---------------------------------------------------------------------------------------------------


def test_every_published_row_names_its_source():
    for table in TABLES:
        rows = published(table)
        assert rows and len({r.name for r in rows}) == len(rows)
        for row in rows:
            assert set(row.values) == set(columns(table)) and row.source and set(row.source) <= set(sources())
            assert all(0 <= v <= 1 for v in row.values.values())


def test_published_rows_follow_from_their_own_parts():
    """A number copied wrong would not: KScore from its dimensions and tracks, WiScore from its categories."""
    for row in published("genevolve_bench"):
        f, v, t, a, overall, knowledge, quality = row.values.values()
        assert 0.1 * f + 0.4 * v + 0.4 * t + 0.1 * a == pytest.approx(overall, abs=1e-4), row.name
        assert (335 * knowledge + 259 * quality) / 594 == pytest.approx(overall, abs=5e-4), row.name
    known = {
        "BAGEL": 0.02,
        "GenAgent": 0.012,
        "OpenUni-B-512": 0.011,
        "DeepGen 1.0": 0.003,
    }  # rounded so when published
    for name, rounding in (("original", 0.0101), ("verified", 1e-4)):
        protocol = PROTOCOLS[name]
        for row in published(protocol.table):
            mean = sum(c.weight * row.values[c.name] for c in protocol.categories)
            assert mean == pytest.approx(row.values["overall"], abs=known.get(row.name, rounding)), row.name


def test_ours_stand_among_them_by_their_overall():
    from genevolve_fast.evaluate.published import PublishedRow

    lines = beside("wise", [PublishedRow("mine", {"overall": 0.81})], 2).splitlines()
    names = [line[2:40].strip() for line in lines[1:]]
    at = names.index(next(n for n in names if n.startswith("mine")))
    assert names[at - 1].startswith("GPT4o") and names[at + 1].startswith("GenEvolve + Qwen-Image-Edit")
    assert lines[at + 1].startswith("> mine") and lines[at + 1].count(" - ") == 6 and "this run" in lines[at + 1]
