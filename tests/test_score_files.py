"""The released score files: the same bytes from the same rows and verdicts; failures are typed and never a 0."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
from record_released_scores import FILES, FIXTURES, TOTAL_CASES, lay_out, run_released

from genevolve_fast.cli import main
from genevolve_fast.evaluate.score import Scoring
from genevolve_fast.evaluate.score_files import (
    average_scores,
    read_rows,
    roots_of,
    scores_of,
    summarize,
    truth_path,
)
from genevolve_fast.evaluate.tracks import beside_published, tracks
from genevolve_fast.protocols import ImageVerdict, JudgeError, ProgramVerdict
from genevolve_fast.resumable import BatchError, Ledger
from genevolve_fast.sandbox.world import SandboxWorld
from genevolve_fast.trajectory import Diagnostic

SETTINGS = {"judge": "recorded"}


class Recorded:
    """An ImageJudge that gives the recorded replies in order, as the released evaluator reads them."""

    def __init__(self) -> None:
        self.replies = json.loads((FIXTURES / "replies.json").read_text(encoding="utf-8"))
        self.seen: list[str] = []

    async def judge(self, request, image, truth):
        assert image.shape == truth.shape == (24, 32, 3) and "gen_prompt" not in request.extra
        reply = self.replies[len(self.seen)]
        self.seen.append(request.id)
        if "status" in reply:
            raise JudgeError(f"Error code: {reply['status']} - {reply['message']}", "client_error")
        said = json.loads(reply["text"].removeprefix("```json\n").removesuffix("\n```"))
        na = said.pop("text_accuracy_na") in (True, "true")
        return ImageVerdict(**said, text_required=not na)


class Everything:
    """An ImageJudge of one opinion; `broken` ids fail."""

    def __init__(self, score: float = 0.5, broken: dict[str, Exception] | None = None) -> None:
        self.score, self.broken, self.seen = score, broken or {}, []

    async def judge(self, request, image, truth):
        self.seen.append(request.id)
        if request.id in self.broken:
            raise self.broken[request.id]
        evidence = Diagnostic("image", "text_rendering", "pass", "the word is there")
        return ImageVerdict(self.score, self.score, self.score, self.score, True, (evidence,))


def scoring_of(folder: Path, settings=SETTINGS, **options) -> Scoring:
    results = folder / "results.json"
    roots = roots_of(results, [folder / "bench"])
    return Scoring(read_rows(results), folder, settings, roots=roots, **options)


def score(folder: Path, judge, *, parallel: int = 1, total: int = TOTAL_CASES, programs=None, **options):
    with closing(scoring_of(folder, programs=programs is not None, **options)) as scoring:
        counts = asyncio.run(scoring.run(judge, programs, parallel=parallel))
        scoring.write(total)
    return scoring, counts


@pytest.fixture
def folder(tmp_path, monkeypatch):
    lay_out(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def written(folder: Path, name: str) -> str:
    return (folder / name).read_bytes().decode().replace(str(folder.resolve()), "FOLDER")


def test_the_three_files_are_the_released_ones_byte_for_byte(folder):
    _, counts = score(folder, Recorded())
    assert counts.ends == {"judged": 8, "client_error": 1}
    for name in FILES:
        assert written(folder, name) == (FIXTURES / name).read_bytes().decode(), name


def test_rows_that_the_released_evaluator_judged_are_not_judged_again_but_its_failures_are(folder):
    text = (FIXTURES / "results_eval.json").read_text(encoding="utf-8")
    (folder / "results_eval.json").write_text(text, encoding="utf-8")
    judge = Everything()
    scoring, counts = score(folder, judge)
    assert scoring.adopted == 8 and judge.seen == ["11"] and counts.ends == {"judged": 1}
    rows = {row.get("id"): row for row in read_rows(folder / "results_eval.json")}
    theirs = {row.get("id"): row for row in json.loads(text)}
    assert [i for i in rows if rows[i] != theirs[i]] == [11]
    assert json.loads((folder / "summary.json").read_text())["all"]["count_eval_success"] == 9


@pytest.mark.skipif("GENEVOLVE_RELEASED" not in os.environ, reason="GENEVOLVE_RELEASED names no checkout of theirs")
def test_the_released_evaluator_goes_on_from_our_files(folder):
    score(folder, Recorded())
    before = {name: written(folder, name) for name in FILES}
    out = run_released(Path(os.environ["GENEVOLVE_RELEASED"]), folder, "http://127.0.0.1:9/v1", "--resume")
    assert "pending_eval=0" in out
    assert {name: written(folder, name) for name in FILES} == before


def test_started_over_the_scores_of_another_judge_do_not_come_back(folder):
    """--fresh, and a kill before the new files are written: the old file must not be taken for the released one's."""
    score(folder, Everything(), settings={"judge": "old"})
    with closing(scoring_of(folder, {"judge": "new"}, fresh=True)):
        pass  # as a kill leaves it: nothing judged, nothing written
    scoring, counts = score(folder, Everything(), settings={"judge": "new"})
    assert scoring.adopted == 0 and counts.ends["judged"] == len(scoring.items)


def test_pictures_without_a_ground_truth_are_told(folder, capsys, monkeypatch):
    """A forgotten --gt-root once ended in a table of nothing."""
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")
    (folder / "bench").rename(folder / "elsewhere" / "moved")
    command = ["score", "--results", str(folder / "results.json"), "--judge", "sandbox"]
    assert main(command) == 1
    told = capsys.readouterr().err
    assert "10 of 12 rows have a picture but no ground truth" in told and "--gt-root" in told


def test_the_two_averages_differ_where_a_row_needs_no_text(folder):
    score(folder, Recorded())
    rows = read_rows(folder / "results_eval.json")
    judged = [row["scores"] for row in rows if row["eval_success"]]
    assert average_scores(judged)["text_accuracy"] == 0.375 and average_scores(judged)["overall"] == 0.475
    whole = summarize(rows, TOTAL_CASES)
    assert (whole["text_accuracy"], whole["overall"], whole["overall_missing_zero"]) == (0.4375, 0.5, 0.25)
    ours = tracks(rows, TOTAL_CASES)["all"]
    assert (ours["text_accuracy"], ours["text_rows"], ours["overall"]) == (0.375, 4, 0.5)
    assert ours["overall_missing_zero"] == 0.25 and ours["denominator"] == TOTAL_CASES
    nothing = tracks([row for row in rows if row["id"] in (8, 9)])["all"]
    assert nothing["overall"] is None and nothing["overall_missing_zero"] == 0.0


def test_missing_as_zero_comes_from_the_rounded_mean_as_released():
    judged = [{"eval_success": True, "scores": {"overall": v}} for v in (0.05, 0.0, 0.0)]
    made = summarize(judged, 7)
    assert (made["overall"], made["overall_missing_zero"]) == (0.0167, 0.0072)  # 0.05 / 7 is 0.0071


def test_our_row_stands_beside_the_published_ones_with_its_judge(folder):
    score(folder, Recorded())
    text = beside_published("mine", "some-judge", json.loads((folder / "summary.json").read_text()))
    (mine,) = [line for line in text.splitlines() if line.startswith("> mine")]
    assert mine.split()[2:] == ["0.6663", "0.5000", "0.4375", "0.5837", "0.5000", "0.6000", "0.4250", "this", "run"]
    assert "GenEvolve + Nano Banana Pro" in text and "8 of 16 rows judged by some-judge" in text


def test_scores_are_clipped_rounded_and_weighed_as_released():
    v = ImageVerdict(0.333, 1.7, -2, 0.666, True, rationale="r" * 1500)
    made = scores_of(v)
    assert list(made) == ["rationale", "faithfulness", "visual_correctness", "text_accuracy", "aesthetics", "overall"]
    assert [made[k] for k in list(made)[1:]] == [0.33, 1.0, 0.0, 0.67, 0.5] and len(made["rationale"]) == 1000
    without = scores_of(ImageVerdict(1, 1, 0, 1, False))
    assert without["text_accuracy"] == 0.5 and without["text_accuracy_na"] is True and without["overall"] == 0.8


def test_a_failed_judgement_is_no_zero_and_is_asked_again(folder):
    broken = {"0": JudgeError("late", "timeout"), "teapots": ValueError("a bug")}
    scoring, counts = score(folder, Everything(broken=broken), parallel=4)
    assert counts.ends == {"judged": 7, "timeout": 1, "other": 1}
    rows = read_rows(folder / "results_eval.json")
    assert [(r["eval_success"], r["scores"], r["error"]) for r in rows[:2]] == [
        (False, None, "late"),
        (False, None, "ValueError: a bug"),
    ]
    assert json.loads((folder / "summary.json").read_text())["all"]["overall"] == 0.5
    again = Everything()
    score(folder, again)
    assert sorted(again.seen) == ["0", "teapots"]
    assert score(folder, again)[0].todo() == [] and len(again.seen) == 2


def test_a_picture_that_changed_is_judged_again(folder):
    score(folder, Everything())
    (folder / "pictures" / "7.png").write_bytes((folder / "pictures" / "0.png").read_bytes())
    judge = Everything(1.0)
    score(folder, judge)
    assert judge.seen == ["7"] and read_rows(folder / "results_eval.json")[2]["scores"]["overall"] == 1.0


def test_a_broken_picture_is_a_typed_failure(folder):
    (folder / "pictures" / "0.png").write_bytes(b"\x89PNG\r\n\x1a\n cut")
    (folder / "bench" / "images" / "b.png").write_bytes(b"no picture")
    judge = Everything()
    _, counts = score(folder, judge)
    assert counts.ends == {"judged": 7, "not_an_image": 2} and "0" not in judge.seen
    assert "0.png is no picture to judge" in read_rows(folder / "results_eval.json")[0]["error"]


def test_rows_with_the_same_id_and_rows_without_one_are_judged_each(folder):
    rows = [row for row in read_rows(folder / "results.json") if row.get("id") in (0, "teapots", 7)]
    rows[1] |= {"id": 0}
    del rows[2]["id"]
    (folder / "results.json").write_text(json.dumps(rows))
    score(folder, Everything())
    assert [row["eval_success"] for row in read_rows(folder / "results_eval.json")] == [True] * 3


def test_programs_are_judged_beside_and_diagnostics_are_kept(folder):
    class Programs:
        async def judge(self, request, program):
            assert program.gen_prompt.startswith("A program for")
            return ProgramVerdict(0.75)

    scoring, counts = score(folder, Everything(), programs=Programs())
    assert counts.ends == {"judged": 19}
    assert {line["program_score"] for line in scoring.verdicts("program").values()} == {0.75}
    assert scoring.verdicts("image")[0]["diagnostics"][0]["evidence"] == "the word is there"


def test_judging_stops_when_the_judge_refuses_row_after_row(folder):
    class Refusing:
        async def judge(self, request, image, truth):
            raise JudgeError("no such model", "client_error")

    _, counts = score(folder, Refusing(), parallel=2)
    assert counts.ends.total() in (3, 4) and "failed alike: no such model" in counts.stopped


def test_bad_input_is_named(folder):
    for text, told in (("{", "not JSON"), ("{}", "list of rows"), ("[1]", "row 1: a row must be a JSON object")):
        (folder / "results.json").write_text(text)
        with pytest.raises(BatchError, match=told):
            read_rows(folder / "results.json")
    with pytest.raises(BatchError, match="cannot be read"):
        read_rows(folder / "nowhere.json")


def test_hostile_paths_are_no_files(folder):
    for value in ("images\0/a.png", "x" * 5000, "~nobody-here/x.png", 7, ["images/a.png"], {"a": 1}):
        assert truth_path({"gt_image": value}, [folder / "bench"]) is None
    assert truth_path({"gt_image": "images/a.png"}, [folder, folder / "bench"]) == folder / "bench/images/a.png"


def test_the_ledger_keeps_one_writer_one_judge_and_what_a_crash_left(tmp_path):
    path = tmp_path / "scores.jsonl"
    with closing(Ledger(path, SETTINGS, "judgement", False)) as ledger:
        ledger.add("a", {"n": 1})
        with pytest.raises(BatchError, match="another process"):
            Ledger(path, SETTINGS, "judgement", False)
    with path.open("a") as file:
        file.write('{"key": "b", "n"')
    with closing(Ledger(path, SETTINGS, "judgement", False)) as ledger:
        assert ledger.done == {"a": {"n": 1}}
        ledger.add("c", {"n": 3})
    with pytest.raises(BatchError, match="judge recorded then, other now.*or --fresh"):
        Ledger(path, {"judge": "other"}, "judgement", False)
    with closing(Ledger(path, {"judge": "other"}, "judgement", True)) as ledger:
        assert ledger.done == {}
    path.write_text("[]\n")
    with pytest.raises(BatchError, match="not a journal of judgements"):
        Ledger(path, SETTINGS, "judgement", False)


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A published-format folder, and the truth of its bench as rendered pictures."""
    folder = tmp_path_factory.mktemp("sandbox")
    SandboxWorld().write_dataset(folder, train=1, bench=12)
    rows = [json.loads(line) for line in (folder / "bench.jsonl").read_text().splitlines()]
    rows = [row | {"prompt": row["question"], "output_path": row["gt_image"], "success": True} for row in rows]
    (folder / "results.json").write_text(json.dumps(rows))
    return folder


def test_scores_of_another_rubric_or_temperature_are_not_taken_for_these(drawn, tmp_path, capsys, monkeypatch):
    """The verdicts' cache forgets them with the rubric; the ledger must not keep half a table of the older one."""
    from genevolve_fast.reward import rubric

    settings = {"judge": "m", "program_judge": "m", "rubric": rubric.VERSION, "temperature": 0.0}
    with closing(Ledger(tmp_path / "scores.jsonl", settings, "judgement")) as ledger:
        ledger.add("a", {"position": 0, "kind": "image", "scores": {}})
    command = ["score", "--results", str(drawn / "results.json"), "--output-dir", str(tmp_path), "--judge-model", "m"]
    command += ["--judge-base-url", "http://127.0.0.1:9/v1"]
    assert main([*command, "--judge-set", "temperature=1"]) == 2
    assert "temperature 0.0 then, 1.0 now" in capsys.readouterr().err
    monkeypatch.setattr(rubric, "VERSION", rubric.VERSION + 1)
    assert main(command) == 2
    assert f"rubric {rubric.VERSION - 1} then, {rubric.VERSION} now" in capsys.readouterr().err


def test_score_judges_prints_and_writes(drawn, tmp_path, capsys):
    command = ["score", "--results", str(drawn / "results.json"), "--judge", "sandbox", "--output-dir", str(tmp_path)]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "12 judged, 0 failed" in out and "Knowledge-Anchored" in out and "published" not in out
    made = json.loads((tmp_path / "evaluation.json").read_text())
    assert made["all"]["judged"] == 12 and made["all"]["visual_correctness"] == made["all"]["text_accuracy"] == 1.0
    assert json.loads((tmp_path / "diagnostics.json").read_text())["rows"] == 12
    assert main(command) == 0 and "judged, 0 failed" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--judge-model", "m"], "are of the chat judge"),
        (["--judge-parallel", "0"], "at least 1"),
        (["--total-cases", "3"], "less than the 12 rows"),
        (["--price", "gold=1"], "there are prices of"),
        (["--price", "search=cheap"], "takes dollars"),
    ],
)
def test_flags_that_cannot_work_are_refused(drawn, tmp_path, capsys, flags, told):
    command = ["score", "--results", str(drawn / "results.json"), "--judge", "sandbox", "--output-dir", str(tmp_path)]
    assert main([*command, *flags]) == 2 and told in capsys.readouterr().err


@pytest.mark.slow
def test_a_killed_score_goes_on_where_it_was(drawn, tmp_path):
    rows = json.loads((drawn / "results.json").read_text())
    many = [row | {"id": f"{i}", "output_path": str(drawn / row["gt_image"])} for i, row in enumerate(rows * 8)]
    (tmp_path / "results.json").write_text(json.dumps(many))
    flags = ["--results", str(tmp_path / "results.json"), "--gt-root", str(drawn), "--judge", "sandbox"]
    command = [sys.executable, "-m", "genevolve_fast.cli", "score", *flags]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    ledger = tmp_path / "scores.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and (not ledger.exists() or ledger.read_bytes().count(b"\n") < 20):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = ledger.read_bytes().count(b"\n") - 1
    assert 0 < before < len(many)
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and f"{len(many) - before} judged, 0 failed" in done.stdout, done.stderr
    assert json.loads((tmp_path / "summary.json").read_text())["all"]["count_eval_success"] == len(many)
