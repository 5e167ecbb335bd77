"""Process data on disk: continued where it stopped, pictures by their pixels, filters that say why, statistics."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace

import numpy as np
import pytest

from genevolve_fast.cli import main
from genevolve_fast.process.builders import Attempt, Built, Rejected
from genevolve_fast.process.rows import Job, ProcessFilters, build_rows, open_processes, statistics
from genevolve_fast.process.trace import Cycle, Inspection, Plan, Process, interleave
from genevolve_fast.protocols import RenderError
from genevolve_fast.resumable import BatchError
from genevolve_fast.sandbox.strokes import SIZE
from genevolve_fast.trajectory import image_hash


def built(n: int, shade: int | None = None, cycles: int = 1) -> Built:
    pixels = np.full((SIZE, SIZE, 3), n if shade is None else shade, np.uint8)
    sha = image_hash(pixels)
    all_cycles = tuple(Cycle(Plan(f"draw {k}", "a scene"), sha, Inspection()) for k in range(cycles))
    return Built(Process(f"p{n}", "a request", all_cycles, extra={"category": "colors"}), {sha: pixels})


def job(n: int, do=None) -> Job:
    async def build() -> Built:
        return do() if do else built(n)

    return Job(f"p{n}", "multi_turn", "colors", build)


def build(folder, jobs, **kwargs):
    return asyncio.run(build_rows(folder, jobs, {"seed": 0}, **kwargs))


def test_other_line_ends_stay_in_their_texts(tmp_path):
    told = "a red\u2028circle\x85left of\x0ba square"
    row = built(0)
    build(tmp_path, [job(0, lambda: replace(row, process=replace(row.process, request=told))), job(1)])
    assert [p.request for p in open_processes(tmp_path)] == [told, built(1).process.request]


def raising(error):
    def do():
        raise error

    return do


def test_rows_and_pictures_come_back_as_they_were(tmp_path):
    made, tally = build(tmp_path, [job(n) for n in range(3)])
    data = open_processes(tmp_path)
    assert tally.succeeded == 3 == len(data) == made["rows"] and data.statistics() == json.loads(json.dumps(made))
    assert list(data) == [built(n).process for n in range(3)] and data[-1].id == "p2"
    for n, process in enumerate(data):
        assert (data.pixels[process.result] == n).all()
    assert len(data.pixels) == 3 and not list(tmp_path.rglob("*.tmp"))
    assert "3 rows, 3 pictures" in (tmp_path / "statistics.txt").read_text()


def test_what_is_built_is_not_built_again_and_failures_of_servers_are_tried_again(tmp_path):
    calls = []

    def once():
        calls.append(1)
        return built(1)

    down = RenderError("the server is away", "connect")
    made, tally = build(tmp_path, [job(1, once), job(2, raising(down))])
    assert tally.ends == {"kept": 1, "connect": 1} and made["rows"] == 1
    made, tally = build(tmp_path, [job(1, once), job(2), job(3)])
    assert tally.ends == {"kept": 2} and made["rows"] == 3 and len(calls) == 1
    with pytest.raises(BatchError, match="other settings"):
        asyncio.run(build_rows(tmp_path, [job(1)], {"seed": 1}))


def test_rejections_and_filters_are_counted_by_their_reason(tmp_path):
    jobs = [
        job(1),
        job(2, lambda: built(2, shade=1)),
        job(3, lambda: built(3, cycles=3)),
        job(4, raising(Rejected("no layout", "x"))),
    ]
    made, tally = build(tmp_path, jobs, filters=ProcessFilters(max_cycles=2))
    assert made["filtered"] == {
        "multi_turn": {"more cycles than max_cycles": 1, "no layout": 1, "repeats another row": 1}
    }
    assert (
        made["rows"] == 1 and tally.ends == {"kept": 3, "filtered": 1} and tally.reasons["filtered"] == "no layout: x"
    )
    made, _ = build(tmp_path, jobs, filters=ProcessFilters(unique=False))  # filters decide anew about what is built
    assert made["rows"] == 3
    with pytest.raises(ValueError, match="no row passes"):
        ProcessFilters(min_cycles=3, max_cycles=2)


def test_changed_pictures_and_bad_rows_are_refused(tmp_path):
    build(tmp_path, [job(1), job(2)])
    data = open_processes(tmp_path)
    first, second = (tmp_path / "images" / p.result[:2] / f"{p.result}.png" for p in data)
    first.write_bytes(second.read_bytes())
    with pytest.raises(BatchError, match="was changed"):
        data.pixels[data[0].result]
    with pytest.raises(KeyError):
        data.pixels["../../secret"]
    second.unlink()
    with pytest.raises(BatchError, match="line 2: drafts"):
        open_processes(tmp_path)
    (tmp_path / "processes.jsonl").write_text("{}\n")
    with pytest.raises(BatchError, match="line 1"):
        open_processes(tmp_path)
    with pytest.raises(BatchError, match="process data"):
        open_processes(tmp_path / "nowhere")


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_builds_all_subsets_and_goes_on_where_it_was(tmp_path, capsys):
    out = ["--out", str(tmp_path / "d"), "--seed", "5"]
    assert main(["process", "data", "--count", "30", *out]) == 0
    told = capsys.readouterr().out
    first = list(open_processes(tmp_path / "d"))
    assert {p.subset for p in first} == {"multi_turn", "instruction_conflict", "image_alignment"}
    assert "cycles by subset" in told and "written to" in told
    assert main(["process", "data", "--count", "33", *out]) == 0
    more = list(open_processes(tmp_path / "d"))
    assert more[: len(first)] == first and len(more) > len(first)
    assert main(["process", "data", "--count", "33", "--out", str(tmp_path / "other"), "--seed", "5"]) == 0
    assert list(open_processes(tmp_path / "other")) == more


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--count", "0"], "at least 1"),
        (["--categories", "colours"], "--categories colours: they are single_object"),
        (["--subset", "multi_turn", "--sampler", "a:b"], "would do nothing"),
        (["--sampler", "nowhere_to_be_found:f"], "No module named"),
        (["--sampler", "json"], "MODULE:FUNCTION"),
        (["--sampler", "."], "no policy"),
        (["--sampler", "a:b", "--temperature", "0.5"], "--temperature would do nothing"),
        (["--set", "max_cycles=9"], "max_cycles"),
        (["--set", "cycles=2"], "there is no such field"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(tmp_path, capsys, flags, told):
    assert main(["process", "data", "--out", str(tmp_path / "d"), *flags]) == 2
    assert told in capsys.readouterr().err and not (tmp_path / "d").exists()


def own_cycles(text: str, seed: int) -> list[Attempt]:
    """A model that forgets what was asked."""
    return [Attempt(Plan("draw", "a black cross at row 1 column 1"))]


def test_the_command_corrects_a_models_own_cycles(tmp_path):
    flags = ["--subset", "instruction_conflict", "--categories", "color_attr", "--sampler", f"{__name__}:own_cycles"]
    assert main(["process", "data", "--count", "30", "--out", str(tmp_path), *flags]) == 0
    data = open_processes(tmp_path)
    assert {p.extra["source"] for p in data} == {"ModelSampler"}
    assert data.statistics()["filtered"]["instruction_conflict"]["nothing of the plan is right"] > 0
    assert all(p.cycles[0].inspection.plan for p in data)


@pytest.mark.slow
def test_tokens_are_those_of_the_interleaved_trajectory(tmp_path):
    from genevolve_fast.policy.codec import TransformersCodec
    from genevolve_fast.sandbox.tiny_policy import start_path

    codec = TransformersCodec.from_pretrained(start_path())
    build(tmp_path, [job(n) for n in range(2)])
    data = open_processes(tmp_path)
    made = statistics(list(data), codec=codec, pixels=data.pixels)
    lengths = [len(interleave(p, codec, data.pixels)) for p in data]
    assert made["tokens"] == {"mean": sum(lengths) / 2, "max": max(lengths), "total": sum(lengths)}
    assert 0 < made["loss_tokens"] < sum(lengths) and made["image_tokens"] >= 2
