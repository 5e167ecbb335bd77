"""Teacher trajectories through the real tool loop, and the filters: each sees its own defect and no other."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest
from data_folders import chat_server, copied, made
from PIL import Image

from genevolve_fast.cli import main
from genevolve_fast.data.filters import FILTERS, FilterConfig, names_of, sift
from genevolve_fast.data.rows import read_jsonl
from genevolve_fast.data.steps import MANIFEST, StepError, open_step
from genevolve_fast.data.trajectories import TABLE, Teaching, read_trajectories
from genevolve_fast.files import file_hash
from genevolve_fast.trajectory import Message, Program, Reference, Request

CONFIG = FilterConfig()


def kept() -> list[Teaching]:
    return list(read_trajectories(open_step(made("filter"), "filter")))


def manifest(folder) -> dict:
    return json.loads((folder / MANIFEST).read_text())


# --- trajectories -----------------------------------------------------------------------------------------------------


def test_a_trajectory_keeps_messages_program_and_every_picture_by_content():
    step = open_step(made("trajectories"), "trajectories")
    rows = list(read_trajectories(step))
    assert len(rows) == sum(manifest(made("pool"))["counts"][s] for s in ("train", "eval", "bench"))
    seeing = [t for t in rows if t.images]
    assert seeing and all(t.termination == "answer" and t.program for t in rows)
    for t in seeing:
        assert len(set(t.placed())) == len(t.images) and all(i["file"] and i["sha256"] for i in t.images)
        for image in t.images:
            assert step.picture(image["file"], image["sha256"]).exists()
    assert [t.to_row() for t in rows] == list(step.rows(TABLE))


@pytest.mark.slow
def test_a_batch_goes_on_where_it_was_cut(tmp_path, capsys):
    folder = copied("trajectories", tmp_path / "t")
    whole = (folder / TABLE).read_bytes()
    journal = (folder / "rollouts.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "rollouts.jsonl").write_bytes(b"".join(journal[:11]) + journal[11][:40])  # ten rows and half of one
    for name in (MANIFEST, TABLE):
        (folder / name).unlink()
    command = ["data", "trajectories", "--input", str(made("pool")), "--output-dir", str(folder)]
    assert main([*command, "--teacher", "demonstrator"]) == 0
    assert (folder / TABLE).read_bytes() == whole
    assert (folder / "rollouts.jsonl").read_bytes().startswith(b"".join(journal[:11]))
    assert main([*command, "--teacher", "demonstrator"]) == 0 and "is complete" in capsys.readouterr().out
    assert main([*command, "--teacher", "perfect-demonstrator"]) == 2
    assert "other settings (teacher)" in capsys.readouterr().err
    assert main([*command, "--teacher", "demonstrator", "--temperature", "0.3"]) == 2
    assert "--temperature would do nothing with --teacher demonstrator" in capsys.readouterr().err


@pytest.fixture
def server():
    return chat_server()


def test_any_chat_model_teaches_its_pictures_are_kept_and_what_failed_runs_again(server, tmp_path, capsys):
    """The loopback model knows the questions of the sandbox's first 60 requests."""
    assert main(["data", "pool", "--output-dir", str(tmp_path / "pool"), "--count", "6"]) == 0
    command = ["data", "trajectories", "--input", str(tmp_path / "pool"), "--output-dir", str(tmp_path / "t")]
    command += ["--model", "tiny", "--base-url", server.url, "--tools", "sandbox", "--patience", "0", "--parallel", "1"]
    server.faults({"status": 400})
    assert main(command) == 1 and "engine/client_error" in capsys.readouterr().err
    assert manifest(tmp_path / "t")["counts"]["failed"] == 1
    assert len(list(read_trajectories(open_step(tmp_path / "t", "trajectories")))) == 5
    assert main(command) == 0
    rows = list(read_trajectories(open_step(tmp_path / "t", "trajectories")))
    seeing = [t for t in rows if t.images]
    assert len(rows) == 6 and seeing and not any(t.placed() for t in rows)  # text observations
    assert all(i["file"].startswith("images/") for t in seeing for i in t.images)
    told = json.dumps(server.seen())
    assert rows[0].request.question in told and "emblem_design" not in told and "checklist" not in told
    assert main(["data", "filter", "--input", str(tmp_path / "t"), "--output-dir", str(tmp_path / "f")]) == 0
    assert manifest(tmp_path / "f")["counts"]["kept"] == 6  # the perfect demonstrator speaks through the server


# --- filters ----------------------------------------------------------------------------------------------------------


def test_the_demonstrators_habits_are_what_the_filters_drop():
    counts = manifest(made("filter"))["counts"]
    assert counts["read"] == counts["kept"] + counts["dropped"] and counts["failed: ordinals_right"] > 0
    rows = list(read_jsonl(made("filter") / "dropped.jsonl"))
    assert len(rows) == counts["dropped"] and all(row["reasons"] for row in rows)
    for f in FILTERS:
        assert sum(f.name in row["reasons"] for row in rows) == counts[f"failed: {f.name}"]
    assert sum("review" in row["reasons"] for row in rows) == counts["failed: review"] > 0


def example(tmp_path) -> tuple[Teaching, object]:
    """A sound trajectory with two references, and the step that holds its pictures."""
    folder = tmp_path / "t"
    (folder / "images").mkdir(parents=True)
    images = []
    for i in (1, 2, 3):
        path = folder / "images" / f"{i}.png"
        Image.fromarray(np.full((9, 9, 3), 60 * i, np.uint8)).save(path)
        url = f"https://pictures.example/{i}.png"
        images.append(
            {"img_id": f"IMG_00{i}", "title": f"picture {i}", "file": f"images/{i}.png", "sha256": file_hash(path),
             "url": url, "page_url": "", "local_path": ""}
        )  # fmt: skip
    question = "A poster of Ada Lovelace beside the Analytical Engine, titled 'FIRST PROGRAM', in warm light."
    prompt = (
        "A poster in warm light: Ada Lovelace, her face as in the first reference image, stands beside the Analytical "
        "Engine of the second reference image. The title 'FIRST PROGRAM' runs along the top in dark serif letters."
    )
    refs = [{"img_id": "IMG_001", "note": "her face"}, {"img_id": "IMG_002", "note": "the engine"}]
    shown = "\n".join(f"{i['img_id']}: title: {i['title']}\n  url: {i['url']}" for i in images)
    messages = [
        Message("system", "Rules."),
        Message("user", question),
        Message("assistant", call("search", queries=["Analytical Engine"])),
        Message("user", "<tool_response>\nBrass.\n</tool_response>"),
        Message("assistant", call("image_search", query="Ada Lovelace")),
        Message("user", f"<tool_response>\n{shown}\n</tool_response>"),
        Message("assistant", answer(prompt, refs)),
    ]
    references = tuple(Reference(r["img_id"], r["note"], "", "", f"picture {i}") for i, r in enumerate(refs))
    t = Teaching(
        Request("pool-0-000007", question), "train", tuple(messages), Program(prompt, references), tuple(images),
        "answer", 3,
    )  # fmt: skip
    from genevolve_fast.data.steps import close_step, write_rows

    write_rows(folder / TABLE, [t.to_row()])
    close_step(folder, "trajectories", source=None, settings={}, tables=[TABLE], counts={"trajectories": 1})
    return t, open_step(folder, "trajectories")


def call(name: str, **arguments) -> str:
    return f"<think>a</think><tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


def answer(prompt: str, refs: list[dict]) -> str:
    return f"<think>b</think><answer>{json.dumps({'gen_prompt': prompt, 'reference_images': refs})}</answer>"


def changed(t: Teaching, prompt=None, refs=None, messages=None, **changes) -> Teaching:
    """`t` with another prompt, references or messages, consistent as a real rollout would leave it."""
    refs = [{"img_id": r.img_id, "note": r.note} for r in t.program.reference_images] if refs is None else refs
    prompt = t.program.gen_prompt if prompt is None else prompt
    messages = list(t.messages) if messages is None else messages
    if messages[-1].content.startswith("<think>b"):
        messages[-1] = Message("assistant", answer(prompt, refs))
    known = [r for r in refs if t.image(r["img_id"])]
    program = Program(prompt, tuple(Reference(r["img_id"], r["note"]) for r in known))
    return dataclasses.replace(t, messages=tuple(messages), program=program, **changes)


def ref(*numbers: int) -> list[dict]:
    return [{"img_id": f"IMG_00{n}", "note": "Ada Lovelace, Analytical Engine"} for n in numbers]


def with_turn(t: Teaching, index: int, message: Message | None) -> list[Message]:
    messages = list(t.messages)
    messages[index : index + 1] = [message] if message else []
    return messages


DEFECTS = {
    "no answer": ("tool_loop_complete", lambda t: changed(t, termination="no_answer"), "ended in no_answer"),
    "an unanswered call": (
        "tool_loop_complete",
        lambda t: changed(t, messages=with_turn(t, 3, None)),
        "turn 2 is the assistant's, out of order",
    ),
    "a call that is none": (
        "tool_loop_complete",
        lambda t: changed(t, messages=with_turn(t, 2, Message("assistant", "<think>Let me see.</think>"))),
        "turn 1 cannot be read: there is no tool call",
    ),
    "somebody's word instead of an answer": (
        "tool_loop_complete",
        lambda t: changed(t, messages=with_turn(t, 3, Message("user", "Brass."))),
        "turn 2 answers no call",
    ),
    "another request": (
        "tool_loop_complete",
        lambda t: changed(t, messages=with_turn(t, 1, Message("user", "Another picture."))),
        "the first turn is not the request",
    ),
    "the same call again": (
        "calls_repeated",
        lambda t: changed(t, messages=with_turn(t, 2, t.messages[4])),
        "2 times image_search",
    ),
    "an id never shown": ("references_valid", lambda t: changed(t, refs=[*ref(1, 2), *ref(9)]), "3 references"),
    "an id never shown, alone": (
        "references_valid",
        lambda t: changed(t, refs=ref(1, 9), prompt=t.program.gen_prompt.replace("second reference", "old")),
        "IMG_009 was never shown",
    ),
    "the same id twice": (
        "references_valid",
        lambda t: changed(t, refs=ref(1, 1)),
        "the same id twice",
    ),
    "the wrong order": ("references_valid", lambda t: changed(t, refs=ref(2, 1)), "not sorted by id"),
    "the same picture twice": (
        "references_valid",
        lambda t: changed(t, images=(t.images[0], t.images[0] | {"img_id": "IMG_002"}, t.images[2])),
        "IMG_001 and IMG_002 are the same picture",
    ),
    "no file": (
        "references_valid",
        lambda t: changed(t, images=(t.images[0] | {"file": "", "sha256": ""}, *t.images[1:])),
        "IMG_001 has no file",
    ),
    "an address": (
        "nothing_leaked",
        lambda t: changed(t, prompt=t.program.gen_prompt + " See https://a.b/c."),
        "an address",
    ),
    "a bare domain": (
        "nothing_leaked",
        lambda t: changed(t, prompt=t.program.gen_prompt + " As on en.wikipedia.org there."),
        "an address: en.wikipedia.org",
    ),
    "an image id": ("nothing_leaked", lambda t: changed(t, prompt=t.program.gen_prompt + " Like IMG_001."), "IMG_001"),
    "a file": ("nothing_leaked", lambda t: changed(t, prompt=t.program.gen_prompt + " As ada.png shows."), "ada.png"),
    "a path": (
        "nothing_leaked",
        lambda t: changed(t, prompt=t.program.gen_prompt + " As /tmp/images/ada shows."),
        "a file: /tmp/images/ada",
    ),
    "the request's id": (
        "nothing_leaked",
        lambda t: changed(t, prompt=t.program.gen_prompt + " For pool-0-000007."),
        "the request's id",
    ),
    "an unbound reference": (
        "ordinals_right",
        lambda t: changed(t, prompt=t.program.gen_prompt.replace("of the second reference image", "she described")),
        "no ordinal binds reference image 2 of 2",
    ),
    "an ordinal beyond": (
        "ordinals_right",
        lambda t: changed(t, prompt=t.program.gen_prompt + " Colours of the third reference image."),
        "names reference image 3 of 2",
    ),
    "a number beyond": (
        "ordinals_right",
        lambda t: changed(t, prompt=t.program.gen_prompt + " Colours of reference image 4."),
        "names reference image 4 of 2",
    ),
    "too short": (
        "enough_detail",
        lambda t: changed(t, prompt="The first and the second reference image."),
        "7 words for a request of 15",
    ),
    "lost names": (
        "enough_detail",
        lambda t: changed(
            t,
            refs=[{"img_id": f"IMG_00{n}", "note": ""} for n in (1, 2)],
            prompt="A poster in warm light: a lady with the face of the first reference image stands beside the "
            "machine of the second reference image, both in the same room.",
        ),
        "lost of the request: FIRST PROGRAM, Ada Lovelace, Analytical Engine",
    ),
    "a repeated sentence": (
        "text_repeated",
        lambda t: changed(t, prompt=t.program.gen_prompt + " The light is warm and low. The light is warm and low."),
        "2 times 'the light is warm and low'",
    ),
    "a loop": (
        "text_repeated",
        lambda t: changed(t, prompt=t.program.gen_prompt + " with warm golden soft light" * 12),
        "five-word runs repeat",
    ),
}


def test_a_sound_trajectory_passes_every_filter(tmp_path):
    t, step = example(tmp_path)
    assert sift([t], CONFIG, step).dropped == []
    joined = t.program.gen_prompt.replace("the first reference image", "the first and second reference images")
    joined = joined.replace("of the second reference image", "behind her")
    assert sift([changed(t, prompt=joined)], CONFIG, step).dropped == []
    numbered = t.program.gen_prompt.replace("the first reference image", "reference image 1")
    assert sift([changed(t, prompt=numbered)], CONFIG, step).dropped == []


@pytest.mark.parametrize("case", DEFECTS)
def test_each_defect_meets_its_filter_and_no_other(tmp_path, case):
    t, step = example(tmp_path)
    name, spoil, reason = DEFECTS[case]
    sifted = sift([spoil(t)], CONFIG, step)
    ((_, reasons),) = sifted.dropped
    assert set(reasons) == {name} and reason in reasons[name], reasons
    assert sifted.failed == {name: 1} and sifted.only == {name: 1}


def test_a_picture_that_is_gone_or_broken_is_no_reference(tmp_path):
    t, step = example(tmp_path)
    path = step.folder / t.images[0]["file"]
    path.write_bytes(b"\xff\xd8\xff no picture")
    ((_, reasons),) = sift([t], CONFIG, step).dropped
    assert "was changed since the trajectories step wrote it" in reasons["references_valid"]
    images = (t.images[0] | {"sha256": file_hash(path)}, *t.images[1:])
    ((_, reasons),) = sift([changed(t, images=images)], CONFIG, step).dropped
    assert "broken JPEG" in reasons["references_valid"]
    path.unlink()
    with pytest.raises(StepError, match="is missing"):
        step.picture(t.images[0]["file"], t.images[0]["sha256"])


def test_limits_are_settings_and_wrong_ones_are_named(tmp_path, capsys):
    t, step = example(tmp_path)
    assert sift([t], FilterConfig(max_references=1), step).failed == {"references_valid": 1}
    assert sift([t], FilterConfig(min_length=9.0), step).failed == {"enough_detail": 1}
    command = ["data", "filter", "--input", str(made("trajectories")), "--output-dir", str(tmp_path / "f")]
    for flags, reason in (
        (["--set", "max_referenced=1"], "max_referenced: there is no such field"),
        (["--set", "names_kept=2"], "names_kept: Input should be less than"),
        (["--set", "names_kept"], "takes FIELD=VALUE"),
        (["--model", "m"], "--model would do nothing without --review chat"),
        (["--review", "chat"], "--review chat needs --model"),
        (["--review", "none", "--min-score", "0.5"], "--min-score would do nothing"),
    ):
        assert main([*command, *flags]) == 2, flags
        assert reason in capsys.readouterr().err
    assert main([*command, "--fields"]) == 0 and "max_references" in capsys.readouterr().out
    assert not (tmp_path / "f").exists()


def test_names_are_capitals_within_a_sentence_and_quoted_words():
    question = "Draw Marie Curie's desk in Paris. The sign says 'NO SMOKING' and \"Radium\". It's late, don't wait."
    assert names_of(question) == ["NO SMOKING", "Radium", "Marie Curie", "Paris"]
    assert names_of("Three red circles in a row at the top.") == []


# --- review -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_silent_or_unclear_reviewer_leaves_a_row_undecided_until_it_is_asked_again(server, tmp_path, capsys):
    source = tmp_path / "t"
    example(tmp_path)
    rows = [json.loads((source / TABLE).read_text())] * 6
    for i, row in enumerate(rows):
        rows[i] = row | {"request": row["request"] | {"id": f"pool-1-00000{i}"}}
    (source / TABLE).write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = manifest(source)
    told["files"][TABLE] = file_hash(source / TABLE)
    (source / MANIFEST).write_text(json.dumps(told))
    command = ["data", "filter", "--input", str(source), "--output-dir", str(tmp_path / "f"), "--review", "chat"]
    command += ["--model", "vlm", "--base-url", server.url, "--patience", "0", "--parallel", "1"]
    passes = {"text": '{"pass": true, "reason": "All there."}'}
    fails = {"text": 'I think:\n```json\n{"pass": false, "reason": "The face is wrong."}\n```'}
    cut = {"text": '{"pass": true, "reason": "All', "finish_reason": "length"}
    server.faults(
        passes, fails, {"text": "It passes."}, cut, {"status": 400}, {"text": '{"pass": "no", "reason": "x"}'}
    )
    assert main(command) == 1
    counts = manifest(tmp_path / "f")["counts"]
    assert (counts["kept"], counts["failed: review"], counts["undecided"]) == (1, 1, 4)
    assert counts["undecided: bad_response"] == 3 and counts["undecided: client_error"] == 1
    assert [row["reasons"]["review"] for row in read_jsonl(tmp_path / "f" / "dropped.jsonl")] == ["The face is wrong."]
    body = server.seen()[0]["body"]
    parts = body["messages"][1]["content"]
    assert sum(part["type"] == "image_url" for part in parts) == 2 and "her face" in json.dumps(parts)
    server.faults(*[passes] * 4)
    assert main(command) == 0 and len(server.seen()) == 4  # decided rows are not asked again
    assert manifest(tmp_path / "f")["counts"]["kept"] == 5
    server.faults()
    assert main(command) == 0 and not server.seen()
    shutil.rmtree(tmp_path / "f")


def test_a_missing_key_variable_is_named(tmp_path, capsys):
    command = ["data", "filter", "--input", str(made("trajectories")), "--output-dir", str(tmp_path / "f")]
    assert main([*command, "--review", "chat", "--model", "m", "--api-key-env", "NO_SUCH_KEY"]) == 2
    assert "--api-key-env NO_SUCH_KEY: there is no such variable" in capsys.readouterr().err
