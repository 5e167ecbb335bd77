"""WISE: grades read strictly, categories and weights, score files that its own scripts read."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from loopback.chat import LoopbackChat

from genevolve_fast.cli import main
from genevolve_fast.evaluate.wise import PROTOCOLS, read_grades, read_prompts, read_scores, summary, table
from genevolve_fast.net.replies import ReplyError
from genevolve_fast.resumable import BatchError

pytestmark = pytest.mark.slow  # server processes, or pipelines of diffusers

ORIGINAL, VERIFIED = PROTOCOLS["original"], PROTOCOLS["verified"]
KEY = "sk-a-wise-secret"
CATEGORIES = ("CULTURE", "TIME", "SPACE", "BIOLOGY", "PHYSICS", "CHEMISTRY")


@pytest.fixture(scope="module")
def process():
    server = LoopbackChat().start()
    yield server
    server.kill()


@pytest.fixture
def server(process):
    process.faults()
    return process


FILES = {"cultural_common_sense": (1, 2), "spatio-temporal_reasoning": (401, 568), "natural_science": (701, 801, 901)}


@pytest.fixture
def bench(tmp_path):
    """A data folder as published, one or two prompts of each category, and a picture of each but number 2."""
    from PIL import Image

    data, pictures = tmp_path / "data", tmp_path / "pictures"
    data.mkdir(), pictures.mkdir()
    for name, numbers in FILES.items():
        rows = [
            {
                "Prompt": f"What is number {n}",
                "Explanation": f"It is {n}",
                "Category": "c",
                "Subcategory": f"s{n}",
                "prompt_id": n,
            }
            for n in numbers
        ]
        (data / f"{name}.json").write_text(json.dumps(rows))
        (data / f"{name}_rewrite.json").write_text(json.dumps(rows))
        for n in set(numbers) - {2}:
            Image.fromarray(np.full((8, 8, 3), n % 256, np.uint8)).save(pictures / f"{n}.png")
    return tmp_path


def command(bench, server, *more) -> list[str]:
    flags = ["--data", "data", "--images", "pictures", "--output-dir", "scores"]
    flags = [str(bench / f) if not f.startswith("--") else f for f in flags]
    return ["wise", *flags, "--judge-model", "grader", "--judge-base-url", server.url, "--judge-parallel", "1", *more]


def grades(c, r, a) -> dict:
    return {"text": json.dumps({"consistency": c, "realism": r, "aesthetic_quality": a})}


def test_pictures_are_judged_into_the_published_files(bench, server, capsys):
    server.faults(grades(2, 1, 0), grades(1, 1, 1), grades(2, 2, 2), grades(0, 0, 0), grades(1, 0, 2), grades(2, 1, 1))
    assert main(command(bench, server)) == 0
    out = capsys.readouterr().out
    assert "6 judged, 0 failed" in out and "GenEvolve + Qwen-Image-Edit" in out and "judged by grader" in out
    (mine,) = [line for line in out.splitlines() if line.startswith("> this run")]
    assert mine.split()[3:10] == ["0.80", "0.50", "1.00", "0.00", "0.45", "0.85", "0.67"]
    lines = (bench / "scores" / "natural_science_scores_results.jsonl").read_text().splitlines()
    assert json.loads(lines[1]) == {
        "prompt_id": 801, "Subcategory": "s801", "consistency": 1.0, "realism": 0.0, "aesthetic_quality": 2.0,
    }  # fmt: skip
    full = json.loads((bench / "scores" / "cultural_common_sense_full_results.json").read_text())
    assert [list(row) for row in full] == [["prompt_id", "prompt", "key", "image_path", "evaluation"]]
    made = json.loads((bench / "scores" / "summary.json").read_text())
    assert made["categories"]["CULTURE"] == {"wiscore": pytest.approx(0.8), "judged": 1, "expected": 400}
    assert made["overall"] == pytest.approx(0.4 * 0.8 + 0.167 * 0.5 + 0.133 + 0.1 * (0 + 0.45 + 0.85))


def test_the_judge_sees_prompt_explanation_and_picture(bench, server):
    server.faults(*[grades(1, 1, 1)] * 6)
    main(command(bench, server))
    asked = server.seen()[0]["body"]
    text, picture = asked["messages"][1]["content"]
    assert "What is number 1\n" in text["text"] and "It is 1\n" in text["text"]
    assert picture["image_url"]["url"].startswith("data:image/png;base64,") and asked["temperature"] == 0


def test_an_unusable_reply_is_asked_again_and_then_a_typed_failure_never_a_zero(bench, server, capsys):
    good = grades(2, 2, 2)
    server.faults({"text": "A lovely picture!"}, good, *[{"text": '{"consistency": 5}'}] * 3, good, good, good, good)
    assert main(command(bench, server)) == 0
    said = capsys.readouterr()
    assert "5 judged, 1 failed (bad_response 1)" in said.out and "consistency must be a whole number" in said.err
    told = server.seen()[1]["body"]["messages"]
    assert [m["role"] for m in told] == ["system", "user", "assistant", "user"] and "no JSON object" in told[3][
        "content"
    ]
    made = json.loads((bench / "scores" / "summary.json").read_text())
    assert made["judged"] == 5 and made["categories"]["TIME"]["wiscore"] is None and made["overall"] is None
    server.faults(good)
    assert main(command(bench, server)) == 0 and len(server.seen()) == 1
    assert json.loads((bench / "scores" / "summary.json").read_text())["overall"] == pytest.approx(1.0)


def test_a_judge_that_refuses_stops_the_work_and_no_key_is_told(bench, server, monkeypatch, capsys):
    monkeypatch.setenv("WISE_KEY", KEY)
    server.faults(*[{"status": 401, "message": "wrong key: KEY"}] * 9)
    assert main(command(bench, server, "--judge-api-key-env", "WISE_KEY")) == 1
    said = capsys.readouterr()
    assert "failed alike" in said.err and KEY not in said.out + said.err and len(server.seen()) == 3
    assert server.seen()[0]["key"] == f"Bearer {KEY}"
    assert json.loads((bench / "scores" / "summary.json").read_text())["judged"] == 0


@pytest.mark.parametrize(
    ("reply", "read"),
    [
        ('{"consistency": 2, "realism": 1, "aesthetic_quality": 0}', (2, 1, 0)),
        ('```json\n{"Consistency": "2", "Realism": 1.0, "Aesthetic Quality": 0,}\n```', (2, 1, 0)),
        ('<think>{"consistency": 0}</think>{"consistency": 2, "realism": 1, "aesthetic_quality": 0', (2, 1, 0)),
        ("Consistency: 2\n**Realism**: 1\nAesthetic Quality: 0", (2, 1, 0)),
        ("Consistency: 2\nRealism: 1", None),
        ("Consistency: 2\nConsistency: 1\nRealism: 1\nAesthetic Quality: 0", None),
        ('{"consistency": 3, "realism": 1, "aesthetic_quality": 0}', None),
        ('{"consistency": 1.5, "realism": 1, "aesthetic_quality": 0}', None),
        ('{"consistency": true, "realism": 1, "aesthetic_quality": 0}', None),
        ('{"consistency": -1, "realism": 1, "aesthetic_quality": 0}', None),
        ('{"consistency": null, "realism": 1, "aesthetic_quality": 0}', None),
        ("I give consistency 2, realism 1 and aesthetic quality 0.", None),
        ("[2, 1, 0]", None),
        ("{", None),
        ("", None),
    ],
)
def test_grades_are_read_strictly(reply, read):
    if read is None:
        with pytest.raises(ReplyError):
            read_grades(reply, ORIGINAL)
    else:
        assert tuple(read_grades(reply, ORIGINAL).values()) == read


def test_the_verified_protocol_has_one_binary_grade():
    assert read_grades('{"score": 1}', VERIFIED) == {"score": 1.0}
    assert read_grades("Score: 0", VERIFIED) == {"score": 0}
    with pytest.raises(ReplyError, match="score must be a whole number from 0 to 1"):
        read_grades('{"score": 2}', VERIFIED)
    made = summary(VERIFIED, {1: {"score": 1.0}, 2: {"score": 0.0}, 520: {"score": 1.0}, 521: {"score": 1.0}})
    assert [c["judged"] for c in made["categories"].values()] == [2, 1, 1, 0, 0, 0]
    assert "QwenImage" in table("mine", made)


def test_every_prompt_id_has_the_published_category():
    for protocol, ends in ((ORIGINAL, (400, 567, 700, 800, 900, 1000)), (VERIFIED, (400, 520, 640, 760, 880, 1000))):
        names = [protocol.category(i).name for i in range(1, 1001)]
        assert [names.index(n) for n in CATEGORIES] == [0, *ends[:5]] and protocol.category(1001) is None
        assert sum(c.weight for c in protocol.categories) == pytest.approx(1)
    assert ORIGINAL.wiscore({"consistency": 2, "realism": 1, "aesthetic_quality": 0}) == pytest.approx(0.8)


def test_bad_data_and_bad_score_files_are_named(bench):
    data = bench / "data" / "natural_science.json"
    rows = json.loads(data.read_text())
    for change, told in (
        ({"prompt_id": 1}, "prompt_id 1 is taken by cultural_common_sense"),
        ({"prompt_id": 1001}, "row 1: prompt_id 1001 is of no category"),
        ({"Explanation": " "}, "row 1 has no Explanation"),
    ):
        data.write_text(json.dumps([rows[0] | change, *rows[1:]]))
        with pytest.raises(BatchError, match=re.escape(told)):
            read_prompts(bench / "data")
    scores = bench / "s.jsonl"
    good = {"prompt_id": 1, "Subcategory": "s", "consistency": 1, "realism": 1, "aesthetic_quality": 1}
    for lines, told in (
        ([good, good], "line 2: prompt_id 1 is scored twice"),
        ([good | {"realism": 3}], "realism 3 is not from 0 to 2"),
        ([good | {"prompt_id": "1"}], "is of no category"),
        (["nothing"], "line 1: prompt_id None"),
    ):
        scores.write_text("\n".join(map(json.dumps, lines)))
        with pytest.raises(BatchError, match=re.escape(told)):
            read_scores([scores], ORIGINAL)


def test_flags_that_cannot_work_are_refused(bench, server, capsys):
    for flags, told in (
        (["wise", "--data", "d"], "--images, --output-dir is missing"),
        (["wise", "--score-only", "s.jsonl", "--data", "d"], "give it alone"),
        (["wise", "--score-only", str(bench / "s.jsonl")], "cannot be read"),
        (command(bench, server, "--judge-api-key-env", "NOWHERE_SET"), "NOWHERE_SET is not set"),
        (command(bench, server, "--judge-parallel", "0"), "at least 1"),
    ):
        assert main(flags) == 2 and told in capsys.readouterr().err


def test_fresh_forgets_nothing_when_the_judge_cannot_be_opened(bench, server, capsys):
    server.faults(*[grades(1, 1, 1)] * 6)
    assert main(command(bench, server)) == 0
    ledger = (bench / "scores" / "wise.jsonl").read_text()
    assert main(command(bench, server, "--fresh", "--judge-api-key-env", "NOWHERE_SET")) == 2
    assert (bench / "scores" / "wise.jsonl").read_text() == ledger
    server.faults(*[grades(2, 2, 2)] * 6)
    assert main(command(bench, server, "--fresh")) == 0
    assert json.loads((bench / "scores" / "summary.json").read_text())["overall"] == pytest.approx(1.0)


def full_scores(folder: Path) -> list[Path]:
    """Score files of all 1000 prompts, of random grades."""
    random, files = np.random.default_rng(0), []
    for name, first, last in (("c", 1, 400), ("s", 401, 700), ("n", 701, 1000)):
        lines = []
        for n in range(first, last + 1):
            c, r, a = map(float, random.integers(0, 3, 3))
            lines.append({"prompt_id": n, "Subcategory": "s", "consistency": c, "realism": r, "aesthetic_quality": a})
        files.append(folder / f"{name}_scores_results.jsonl")
        files[-1].write_text("".join(json.dumps(line) + "\n" for line in lines))
    return files


def test_score_only_prints_the_weighed_categories(tmp_path, capsys):
    files = full_scores(tmp_path)
    assert main(["wise", "--score-only", *map(str, files), "--name", "mine"]) == 0
    out = capsys.readouterr().out
    assert "1000 of 1000 prompts judged" in out and "means over what is there" not in out
    made = summary(ORIGINAL, read_scores(files, ORIGINAL))
    assert f"{made['overall']:.2f}" in next(line for line in out.splitlines() if line.startswith("> mine"))


@pytest.mark.skipif("WISE_CHECKOUT" not in os.environ, reason="WISE_CHECKOUT names no checkout of the benchmark")
def test_its_own_calculator_reads_our_files_and_agrees(tmp_path):
    files = full_scores(tmp_path)
    script = Path(os.environ["WISE_CHECKOUT"]) / "WISE_legacy" / "Calculate.py"
    done = subprocess.run([sys.executable, script, *files], capture_output=True, text=True, check=True)
    made = summary(ORIGINAL, read_scores(files, ORIGINAL))
    means = [f"{c['wiscore']:.2f}" for c in made["categories"].values()]
    assert done.stdout.strip().splitlines()[-1].split() == [*means, f"{made['overall']:.2f}"]
    data = Path(os.environ["WISE_CHECKOUT"])
    assert len(read_prompts(data / "WISE_legacy" / "data")[1]) == 1000
    protocol, prompts = read_prompts(data / "data_verified")
    assert protocol is VERIFIED and len(prompts) == 1000
