"""Ground truth and views: resumable, typed failures, the published formats, no ground truth where none may be."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from contextlib import closing

import numpy as np
import pytest
from data_folders import chat_server, copied, made
from loopback.canvas_service import LoopbackCanvas

from genevolve_fast.cli import main
from genevolve_fast.data.config import DataConfig, open_requests
from genevolve_fast.data.conversations import open_conversations
from genevolve_fast.data.published import CONSTRUCTION, EVAL_TYPES
from genevolve_fast.data.review import JudgedPicture, Review
from genevolve_fast.data.rows import read_jsonl, read_picture
from genevolve_fast.data.steps import MANIFEST, open_step
from genevolve_fast.data.trajectories import read_trajectories
from genevolve_fast.data.truth import draw_truth, picture_seed, write_truth
from genevolve_fast.data.views import ViewError, read_truth, write_feedback_view, write_sft_view
from genevolve_fast.files import file_hash
from genevolve_fast.protocols import JudgeError, RenderError
from genevolve_fast.resumable import Ledger
from genevolve_fast.sandbox.canvas import CanvasRenderer
from genevolve_fast.sandbox.judges import SandboxImageJudge
from genevolve_fast.sandbox.world import SandboxWorld

pytestmark = pytest.mark.slow

WORLD = SandboxWorld()
RL_FIELDS = [
    "id",
    "question",
    "gt_image",
    "eval_type",
    "category",
    "difficulty",
    "prompt_pool_index",
    "meta",
    "extra_info",
]


def manifest(folder) -> dict:
    return json.loads((folder / MANIFEST).read_text())


def filtered():
    step = open_step(made("filter"), "filter")
    return step, list(read_trajectories(step))


class Counting(CanvasRenderer):
    """The canvas, with programs it fails at by number of the call."""

    def __init__(self, fails=()) -> None:
        self.calls, self.fails = 0, fails

    async def render(self, program, references, seed):
        self.calls += 1
        if self.calls - 1 in self.fails:
            raise RenderError("no memory left", "server_error")
        return await super().render(program, references, seed)


class Slow(CanvasRenderer):
    async def render(self, program, references, seed):
        await asyncio.sleep(60)


def draw(folder, trajectories, step, renderer, reviewer=None, **options):
    with closing(Ledger(folder / "done.jsonl", {"input": step.digest}, "picture")) as ledger:
        return asyncio.run(draw_truth(trajectories, step, folder, renderer, reviewer, ledger, **options))


# --- ground truth -----------------------------------------------------------------------------------------------------


def test_truth_is_what_the_renderer_draws_and_only_what_passed_the_second_look(tmp_path):
    step = open_step(made("truth"), "truth")
    truths = read_truth(step)
    counts = manifest(made("truth"))["counts"]
    assert counts["kept"] == len(truths) > 0 and counts["dropped"] > 0 and counts["failed"] == 0
    for t in truths[:6]:
        teaching, source = t.teaching, open_step(made("filter"), "filter")
        references = [read_picture(source.picture(r.local_path, r.sha256)) for r in teaching.program.reference_images]
        drawn = asyncio.run(CanvasRenderer().render(teaching.program, references, picture_seed(0, teaching.id)))
        assert np.array_equal(read_picture(step.picture(t.gt_file, t.gt_sha256)), drawn)
        assert np.array_equal(drawn, WORLD.truth(teaching.request)), "only what shows the known scene is kept"
    rows = list(read_jsonl(made("truth") / "dropped.jsonl"))
    assert len(rows) == counts["dropped"] and all(row["reasons"]["picture"] for row in rows)


def test_what_is_drawn_is_not_drawn_again_and_failures_are_typed(tmp_path):
    step, trajectories = filtered()
    first = Counting(fails=(2, 5))
    drawn = draw(tmp_path, trajectories, step, first, parallel=1)
    assert first.calls == len(trajectories) and len(drawn.failed) == 2
    assert set(drawn.failed.values()) == {("server_error", "no memory left")}
    told = write_truth(tmp_path, step, trajectories, drawn, {})
    assert told["counts"]["failed: render/server_error"] == 2 and told["counts"]["kept"] == len(trajectories) - 2
    failed = list(read_jsonl(tmp_path / "failed.jsonl"))
    assert [row["kind"] for row in failed] == ["server_error"] * 2 and failed[0]["stage"] == "render"
    spoilt = tmp_path / next(iter(drawn.pictures.values()))[0]
    spoilt.write_bytes(spoilt.read_bytes()[:-9])
    second = Counting()
    again = draw(tmp_path, trajectories, step, second, parallel=1)
    assert second.calls == 3 and not again.failed and len(again.pictures) == len(trajectories)
    assert {k: v for k, v in again.pictures.items() if k in drawn.pictures} == drawn.pictures


def test_a_renderer_that_never_answers_or_cannot_draw_a_program_is_a_typed_failure(tmp_path):
    step, trajectories = filtered()
    drawn = draw(tmp_path / "a", trajectories[:2], step, Slow(), timeout_s=0.05)
    assert {kind for kind, _ in drawn.failed.values()} == {"timeout"}
    editor = Counting()
    editor.min_references = 1
    plain = [t for t in trajectories if not t.program.reference_images][:2]
    drawn = draw(tmp_path / "b", plain, step, editor)
    assert editor.calls == 0 and {kind for kind, _ in drawn.failed.values()} == {"bad_arguments"}
    assert "0 reference images; this renderer takes 1 to 2" in next(iter(drawn.failed.values()))[1]


def test_a_picture_that_was_drawn_again_is_reviewed_again(tmp_path):
    """A verdict belongs to the bytes it was given on, and every request is drawn from a seed of its own."""
    step, trajectories = filtered()
    seeds = []

    class Seeded(Counting):
        def __init__(self, changed: bool) -> None:
            super().__init__()
            self.changed = changed

        async def render(self, program, references, seed):
            seeds.append(seed)
            return await super().render(program, references, seed) - np.uint8(self.changed)

    class Approving:
        name, seen = "approving", 0

        async def review(self, t, picture, step):
            self.seen += 1
            return Review("pass", "fine")

    reviewer = Approving()
    drawn = draw(tmp_path, trajectories[:3], step, Seeded(False), reviewer, seed=7)
    assert seeds == [picture_seed(7, t.id) for t in trajectories[:3]] and len(set(seeds)) == 3
    (tmp_path / drawn.pictures[trajectories[0].id][0]).unlink()
    draw(tmp_path, trajectories[:3], step, Seeded(True), reviewer, seed=7)
    assert reviewer.seen == 4 and seeds[3:] == seeds[:1]


def test_a_judge_that_fails_decides_nothing_and_is_asked_again(tmp_path):
    step, trajectories = filtered()

    class Failing(SandboxImageJudge):
        async def judge(self, request, image, truth):
            raise JudgeError("out of reach", "connect")

    drawn = draw(tmp_path, trajectories[:4], step, Counting(), JudgedPicture(Failing(), WORLD.truth))
    assert {r.decision for r in drawn.reviews.values()} == {"undecided"}
    told = write_truth(tmp_path, step, trajectories[:4], drawn, {})["counts"]
    assert told["kept"] == told["dropped"] == 0 and told["failed: review/connect"] == 4
    renderer = Counting()
    drawn = draw(tmp_path, trajectories[:4], step, renderer, JudgedPicture(SandboxImageJudge(), WORLD.truth))
    assert renderer.calls == 0 and "undecided" not in {r.decision for r in drawn.reviews.values()}


@pytest.mark.slow
def test_a_vision_language_model_looks_at_the_pictures(tmp_path):
    server = chat_server()
    passes, fails = ({"text": json.dumps({"pass": p, "reason": "I see it."})} for p in (True, False))
    step, trajectories = filtered()
    server.faults(passes, fails, {"text": "Hm."}, *[passes] * len(trajectories))
    command = ["data", "truth", "--input", str(made("filter")), "--output-dir", str(tmp_path / "t")]
    command += ["--review", "chat", "--model", "vlm", "--base-url", server.url, "--patience", "0", "--parallel", "1"]
    assert main(command) == 1
    counts = manifest(tmp_path / "t")["counts"]
    assert counts["dropped"] == 1 and counts["failed: review/bad_response"] == 1
    assert counts["kept"] == len(trajectories) - 2
    parts = server.seen()[0]["body"]["messages"][1]["content"]
    references = len(trajectories[0].program.reference_images)
    assert sum(p["type"] == "image_url" for p in parts) == 1 + references
    assert parts[-1]["image_url"]["url"].startswith("data:image/png;base64,")
    server.faults(passes)
    assert main(command) == 0 and len(server.seen()) == 1


@pytest.mark.slow
def test_the_ground_truth_is_drawn_by_whichever_renderer_is_named(tmp_path, capsys):
    """Services and APIs draw it as the canvas here does, because the canvas is behind them."""
    command = ["data", "truth", "--input", str(made("filter")), "--output-dir", str(tmp_path / "t")]
    with LoopbackCanvas() as service:
        command += ["--renderer", "qwen-service", "--service-url", service.url]
        text = ["--renderer-set", "text_to_image={kind: text-to-image, urls: [" + service.url + "]}"]
        assert main([*command, *text]) == 0
        assert service.calls() > 0
        assert main([*command, *text]) == 0
        assert "is complete" in capsys.readouterr().out
    there, here = (list(read_jsonl(folder / "truth.jsonl")) for folder in (tmp_path / "t", made("truth")))
    assert [(r["request"]["id"], r["gt_sha256"]) for r in there] == [(r["request"]["id"], r["gt_sha256"]) for r in here]
    settings = manifest(tmp_path / "t")["settings"]["renderer"]
    assert settings["kind"] == "qwen-service" and "urls" not in settings
    assert main([*command, "--renderer-set", "long_side=512"]) == 2
    assert "other settings (renderer)" in capsys.readouterr().err
    assert main([*command, "--renderer-set", "attempts=none"]) == 2
    assert "attempts" in capsys.readouterr().err


@pytest.mark.parametrize("step", ["filter", "truth"])
def test_the_sandboxs_review_refuses_requests_that_are_not_its_own(tmp_path, step, capsys):
    source = "trajectories" if step == "filter" else "filter"
    folder = copied(source, tmp_path / source)
    rows = list(read_jsonl(folder / "trajectories.jsonl"))
    for row in rows:
        row["request"].pop("checklist", None)
    rewritten(folder, "trajectories.jsonl", rows)
    command = ["data", step, "--input", str(folder), "--output-dir", str(tmp_path / "out")]
    assert main(command) == 2
    assert "--review rule is the sandbox's" in capsys.readouterr().err and not (tmp_path / "out").exists()


# --- views ------------------------------------------------------------------------------------------------------------


def test_views_have_the_published_form():
    view, truth = made("view"), read_truth(open_step(made("truth"), "truth"))
    for set_, table, split in (("GenEvolve-Data-RL", "train", "train"), ("GenEvolve-Bench", "test", "bench")):
        rows = list(read_jsonl(view / set_ / f"{table}.jsonl"))
        source = [t for t in truth if t.teaching.split == split]
        assert len(rows) == len(source) > 0
        for number, (row, t) in enumerate(zip(rows, source, strict=True)):
            assert list(row) == RL_FIELDS and row["id"] == number and row["eval_type"] in EVAL_TYPES
            assert row["gt_image"] == f"images/case_{number:05d}.png"
            assert file_hash(view / set_ / row["gt_image"]) == t.gt_sha256
            assert row["meta"]["primary_skills"] and set(row["meta"]) >= {"secondary_skills", "skill_bundle"}
            assert row["extra_info"]["pool_id"] == t.teaching.id
    sft = list(read_jsonl(view / "GenEvolve-Data-SFT" / "train.jsonl"))
    assert len(sft) == sum(t.teaching.split == "train" for t in truth)
    assert all(set(row) == {"messages", "images"} for row in sft)
    seeing = [row for row in sft if row["images"]]
    assert seeing and seeing[0]["images"][0].startswith("images/traj_")
    assert all((view / "GenEvolve-Data-SFT" / name).exists() for row in sft for name in row["images"])


def test_pictures_are_on_disk_once_by_content(tmp_path):
    folder = copied("truth", tmp_path / "truth")
    rows = list(read_jsonl(folder / "truth.jsonl"))
    twin = json.loads(json.dumps(next(row for row in rows if row["images"] and row["split"] == "train")))
    twin["request"] |= {"id": "twin", "question": "Somebody else's wish, about the same pictures, in other words."}
    rewritten(folder, "truth.jsonl", [*rows, twin])
    write_sft_view(tmp_path / "view", open_step(folder, "truth"), {})
    files = [p for p in (tmp_path / "view" / "GenEvolve-Data-SFT" / "images").rglob("*") if p.is_file()]
    nodes = {}
    for path in files:
        nodes.setdefault(file_hash(path), set()).add(path.stat().st_ino)
    assert len(files) >= len(nodes) + len(twin["images"]) and all(len(inodes) == 1 for inodes in nodes.values())


def test_judges_work_from_the_view_and_the_agent_never_sees_the_construction():
    requests, truth = open_requests(DataConfig(path=str(made("view"))), "rl")
    for request in requests:
        assert request.extra["checklist"]["items"] and "entity" in request.extra
        verdict = asyncio.run(SandboxImageJudge().judge(request, truth(request), WORLD.truth(request)))
        assert verdict.faithfulness == verdict.visual_correctness == 1
        assert CONSTRUCTION not in request.question and "checklist" not in request.question


def test_sft_reads_the_view_and_feeds_its_pictures(policy, tmp_path):
    samples = open_conversations(made("view"), policy.codec, 32768, tmp_path / "index.npz")
    rows = list(read_jsonl(made("view") / "GenEvolve-Data-SFT" / "train.jsonl"))
    assert len(samples) == len(rows) and not samples.dropped
    assert [len(s.images) for s in samples] == [len(row["images"]) for row in rows] and any(s.images for s in samples)


def test_no_ground_truth_is_in_the_sft_view_and_one_that_would_be_is_refused(tmp_path):
    step = open_step(made("truth"), "truth")
    secrets = {t.gt_sha256 for t in read_truth(step)}
    view = made("view") / "GenEvolve-Data-SFT"
    assert not secrets & {file_hash(p) for p in view.rglob("*.png")}
    assert "gt_image" not in (view / "train.jsonl").read_text() + (view / "eval.jsonl").read_text()
    folder = copied("truth", tmp_path / "truth")
    rows = list(read_jsonl(folder / "truth.jsonl"))
    seeing = next(i for i, row in enumerate(rows) if row["images"] and row["split"] == "train")
    gt = folder / rows[0]["gt_file"]
    for how in ("its bytes", "its pixels", "its name"):
        spoilt = json.loads(json.dumps(rows))
        image = spoilt[seeing]["images"][0]
        if how == "its bytes":
            image["file"], image["sha256"] = rows[0]["gt_file"], rows[0]["gt_sha256"]
        elif how == "its pixels":
            from PIL import Image

            Image.fromarray(read_picture(gt)).save(folder / "images" / "again.webp", lossless=True)
            image["file"], image["sha256"] = "images/again.webp", file_hash(folder / "images" / "again.webp")
        else:
            spoilt[seeing]["messages"][2]["content"] += rows[0]["gt_file"]
        rewritten(folder, "truth.jsonl", spoilt)
        with pytest.raises(ViewError, match="which an SFT view must not hold"):
            write_sft_view(tmp_path / "view", open_step(folder, "truth"), {})
        assert not list((tmp_path / "view").rglob("*.jsonl")), how


def rewritten(folder, table, rows) -> None:
    (folder / table).write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = manifest(folder)
    told["files"][table] = file_hash(folder / table)
    (folder / MANIFEST).write_text(json.dumps(told))


def test_what_repeats_the_bench_is_in_neither_training_view(tmp_path, capsys):
    folder = copied("truth", tmp_path / "truth")
    rows = list(read_jsonl(folder / "truth.jsonl"))
    bench = next(row for row in rows if row["split"] == "bench")
    train = [row for row in rows if row["split"] == "train"]
    train[0]["request"]["question"] = bench["request"]["question"].upper()
    rewritten(folder, "truth.jsonl", rows)
    out = str(tmp_path / "view")
    for step in ("feedback-view", "sft-view"):
        assert main(["data", step, "--input", str(folder), "--output-dir", out]) == 0
    counts = manifest(tmp_path / "view" / "GenEvolve-Data-RL")["counts"]
    assert counts == {"train": len(train) - 1, "repeats the bench": 1}
    assert manifest(tmp_path / "view" / "GenEvolve-Data-SFT")["counts"]["repeats the bench"] == 1
    asked = {row["question"] for row in read_jsonl(tmp_path / "view" / "GenEvolve-Data-RL" / "train.jsonl")}
    assert train[0]["request"]["question"] not in asked and train[1]["request"]["question"] in asked


def test_a_published_bench_is_kept_apart_too(tmp_path):
    other = tmp_path / "other" / "GenEvolve-Bench"
    shutil.copytree(made("view") / "GenEvolve-Data-RL", other)
    os.replace(other / "train.jsonl", other / "test.jsonl")
    with pytest.raises(ViewError, match="holds no request with a ground truth"):
        step = open_step(made("truth"), "truth")
        write_feedback_view(tmp_path / "view", step, {}, bench=str(tmp_path / "other"), near=0.85)
    assert not (tmp_path / "view" / "GenEvolve-Data-RL").exists()


def test_a_view_is_there_whole_or_not_at_all(tmp_path, monkeypatch, capsys):
    import genevolve_fast.data.views as views

    folder, command = tmp_path / "view", ["data", "sft-view", "--input", str(made("truth")), "--output-dir"]
    linked = views.link_picture
    calls = iter(range(1000))

    def dies(source, target):
        if next(calls) == 4:
            raise KeyboardInterrupt
        linked(source, target)

    monkeypatch.setattr(views, "link_picture", dies)
    assert main([*command, str(folder)]) == 130
    assert not list(folder.iterdir())
    monkeypatch.setattr(views, "link_picture", linked)
    assert main([*command, str(folder)]) == 0
    before = (folder / "GenEvolve-Data-SFT" / MANIFEST).stat().st_mtime_ns
    assert main([*command, str(folder)]) == 0
    assert (folder / "GenEvolve-Data-SFT" / MANIFEST).stat().st_mtime_ns == before
    assert main([*command, str(folder), "--near", "0.5"]) == 2 and "other settings (near)" in capsys.readouterr().err
    (tmp_path / "mine" / "GenEvolve-Data-SFT").mkdir(parents=True)
    (tmp_path / "mine" / "GenEvolve-Data-SFT" / "notes.txt").write_text("mine")
    assert main([*command, str(tmp_path / "mine")]) == 2 and "holds something else" in capsys.readouterr().err
    assert (tmp_path / "mine" / "GenEvolve-Data-SFT" / "notes.txt").read_text() == "mine"


def test_a_truth_picture_that_was_changed_is_noticed(tmp_path, capsys):
    folder = copied("truth", tmp_path / "truth")
    truth = next(t for t in read_truth(open_step(folder, "truth")) if t.teaching.split == "train")
    picture = folder / truth.gt_file
    picture.write_bytes(picture.read_bytes() + b"x")
    command = ["data", "feedback-view", "--input", str(folder), "--output-dir", str(tmp_path / "view")]
    assert main(command) == 2 and "was changed since the truth step wrote it" in capsys.readouterr().err
    assert not (tmp_path / "view" / "GenEvolve-Data-RL").exists()


def test_text_observations_name_the_views_files(tmp_path):
    from test_filters import example

    from genevolve_fast.data.views import sft_row

    t, step = example(tmp_path)
    import dataclasses

    from genevolve_fast.trajectory import Message

    told = t.messages[5].content.replace("  url: https://pictures.example/1.png", "  local_path: /home/me/found/1.png")
    images = (t.images[0] | {"local_path": "/home/me/found/1.png"}, *t.images[1:])
    messages = (*t.messages[:5], Message("user", told), t.messages[6])
    row, files = sft_row(dataclasses.replace(t, messages=messages, images=images), "traj_00007")
    assert row["images"] == [f"images/traj_00007/IMG_00{i}.png" for i in (1, 2, 3)] == list(files)
    assert "local_path: images/traj_00007/IMG_001.png" in row["messages"][5]["content"]
    assert "/home/me" not in json.dumps(row)
    assert Review("pass", "x").to_row() == {"decision": "pass", "reason": "x"}
