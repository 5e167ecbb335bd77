"""The published sets: streamed from JSONL, parquet and hub, the bad row named or counted, no path trusted."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from data_folders import copied, made
from PIL import Image
from pydantic import ValidationError

from genevolve_fast.cli import main
from genevolve_fast.data.config import DataConfig, open_requests
from genevolve_fast.data.conversations import open_conversations
from genevolve_fast.data.published import HubSet, inspect, open_set, read_requests
from genevolve_fast.data.rows import BadRow, BadRows, DataError, read_rows, safe_file
from genevolve_fast.policy.codec import TransformersCodec
from genevolve_fast.sandbox.tiny_policy import start_path

ROW = {
    "id": 0,
    "question": "The Eiffel Tower at dusk",
    "gt_image": "images/case_00000.png",
    "eval_type": "Knowledge-Anchored",
    "category": "architecture_landmark",
    "difficulty": "hard",
    "prompt_pool_index": 12,
    "meta": {"primary_skills": ["spatial_layout"], "skill_bundle": ["spatial_layout"]},
    "extra_info": {"source": "x"},
}
TALK = [
    {"role": "system", "content": "Rules."},
    {"role": "user", "content": "A tower"},
    {
        "role": "assistant",
        "content": '<think>a</think><tool_call>{"name": "image_search", "arguments": {}}</tool_call>',
    },
    {"role": "user", "content": "<tool_response>\nIMG_001: title: tower\n</tool_response>"},
    {
        "role": "assistant",
        "content": '<answer>{"gen_prompt": "It.", "reference_images": [{"img_id": "IMG_001", "note": ""}]}</answer>',
    },
]


def bench(folder, rows, pictures=3):
    """A repository with a GenEvolve-Bench of `rows`, which are dicts or lines as they are."""
    home = folder / "GenEvolve-Bench"
    (home / "images").mkdir(parents=True)
    for i in range(pictures):
        Image.fromarray(np.full((8, 6, 3), 40 * i, np.uint8)).save(home / "images" / f"case_{i:05d}.png")
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (home / "test.jsonl").write_text("\n".join(lines) + "\n")
    return home


def test_a_repository_and_a_set_are_read_alike_and_truth_is_the_pixels(tmp_path):
    home = bench(tmp_path, [ROW, ROW | {"id": "b", "gt_image": "images/case_00001.png"}])
    for path in (tmp_path, home, home / "test.jsonl"):
        requests, truth = open_requests(DataConfig(path=str(path)), "bench")
        assert [r.id for r in requests] == ["0", "b"] and requests[0].extra["prompt_pool_index"] == 12
        assert requests[0].extra["meta"]["primary_skills"] == ["spatial_layout"]
        assert truth(requests[1]).shape == (8, 6, 3) and (truth(requests[1]) == 40).all()


BAD = {
    "no JSON": ("{", "row: not JSON", ""),
    "no object": ("[1]", "a row must be a JSON object", ""),
    "no id": ({"id": None}, "id: must be a number or a text, not absent", "id"),
    "a bool as id": ({"id": True}, "id: must be", "id"),
    "the same id": ({}, "'0' is also the id of line 1", "id"),
    "no question": ({"id": 1, "question": "  "}, "question: must be a text", "question"),
    "a list as question": ({"id": 1, "question": ["a"]}, "question: must be a text", "question"),
    "no gt_image": ({"id": 1, "gt_image": None}, "gt_image: no path", "gt_image"),
    "a lost picture": ({"id": 1, "gt_image": "images/no.png"}, "gt_image: no file images/no.png", "gt_image"),
    "out of the folder": ({"id": 1, "gt_image": "../secret.png"}, "leaves the data folder", "gt_image"),
    "an absolute path": ({"id": 1, "gt_image": "/etc/passwd"}, "leaves the data folder", "gt_image"),
    "a URL": ({"id": 1, "gt_image": "http://x/a.png"}, "holds a character", "gt_image"),
    "a NUL": ({"id": 1, "gt_image": "a\0.png"}, "holds a character", "gt_image"),
    "another track": ({"id": 1, "eval_type": "Other"}, "eval_type: must be one of Knowledge", "eval_type"),
    "a number as category": ({"id": 1, "category": 3}, "category: must be a text", "category"),
    "meta as text": ({"id": 1, "meta": "{"}, "meta: is a text that is not JSON", "meta"),
    "construction over the question": (
        {"id": 1, "extra_info": {"construction": {"question": "x"}}},
        "construction: may not hold question",
        "extra_info.construction",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_the_bad_row_is_named_or_counted(tmp_path, case):
    change, reason, field = BAD[case]
    home = bench(tmp_path, [ROW, change if isinstance(change, str) else ROW | change, ROW | {"id": 9}])
    with pytest.raises(BadRow) as error:
        open_requests(DataConfig(path=str(tmp_path)), "bench")
    assert error.value.line == 2 and error.value.field == field and str(home / "test.jsonl") in str(error.value)
    assert reason.removeprefix("row: ") in str(error.value)
    kept, _ = open_requests(DataConfig(path=str(tmp_path), strict=False), "bench")
    assert [r.id for r in kept] == ["0", "9"] and kept.bad.count == 1 and "line 2" in kept.bad.first[0]


def test_bytes_that_are_no_utf8_are_a_bad_row_and_other_line_ends_none(tmp_path):
    home = bench(tmp_path, [ROW])
    table = home / "test.jsonl"
    other = json.dumps(ROW | {"id": 2, "question": "two\u2028lines\x85"}, ensure_ascii=False)
    table.write_bytes(table.read_bytes() + b'{"id": "\xff"}\n\n' + other.encode() + b"\n")
    rows = list(read_rows(table))
    assert [n for n, _ in rows] == [1, 2, 4] and isinstance(rows[1][1], BadRow) and "UTF-8" in str(rows[1][1])
    assert rows[2][1]["question"] == "two\u2028lines\x85"


def test_a_link_out_of_the_folder_is_refused_and_one_of_a_hub_cache_is_not(tmp_path):
    home = bench(tmp_path / "data", [ROW])
    secret = tmp_path / "secret.png"
    Image.new("RGB", (4, 4)).save(secret)
    os.symlink(secret, home / "images" / "case_00009.png")
    with pytest.raises(DataError, match="a link out of"):
        safe_file(home, "images/case_00009.png")
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "abc"
    (snapshot / "images").mkdir(parents=True)
    blobs.mkdir()
    (blobs / "1234").write_bytes(secret.read_bytes())
    os.symlink("../../../blobs/1234", snapshot / "images" / "a.png")
    assert safe_file(snapshot, "images/a.png") == (blobs / "1234").resolve()


def test_truth_that_is_no_picture_is_named(tmp_path):
    home = bench(tmp_path, [ROW])
    (home / "images" / "case_00000.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    requests, truth = open_requests(DataConfig(path=str(tmp_path)), "bench")
    with pytest.raises(DataError, match=r"id 0: gt_image: cannot read image .*broken PNG"):
        truth(requests[0])


def test_rows_are_streamed(tmp_path):
    home = bench(tmp_path, [ROW | {"id": i} for i in range(200)] + ["{"])
    source = open_set(str(home), "bench")
    rows = source.rows()
    assert [next(rows)[0] for _ in range(3)] == [1, 2, 3]  # the broken last line is not met
    assert sum(1 for _ in read_requests(source, BadRows(strict=False))) == 200


def test_limit_draws_by_seed_and_keeps_the_order(tmp_path):
    bench(tmp_path, [ROW | {"id": i} for i in range(50)])
    draws = [
        [int(r.id) for r in open_requests(DataConfig(path=str(tmp_path), limit=8, seed=seed), "bench")[0]]
        for seed in (0, 0, 1)
    ]
    assert draws[0] == draws[1] != draws[2] and draws[0] == sorted(draws[0]) and len(set(draws[0])) == 8


def test_settings_without_effect_are_refused(tmp_path):
    with pytest.raises(ValidationError, match="limit with path 'sandbox' would do nothing"):
        DataConfig(limit=3)
    with pytest.raises(ValidationError, match="seed without limit"):
        DataConfig(path="x", seed=1)
    with pytest.raises(DataError, match="world brings its own"):
        open_requests(DataConfig(), "rl")
    bench(tmp_path, [ROW])
    for path, reason in (
        (tmp_path / "nowhere", "no such file or folder"),
        (tmp_path, "holds no GenEvolve-Data-RL"),
        (tmp_path / "GenEvolve-Bench", "holds no GenEvolve-Data-RL"),
    ):
        with pytest.raises(DataError, match=reason):
            open_requests(DataConfig(path=str(path)), "rl")
    with pytest.raises(DataError, match="has no split 'train': test"):
        open_requests(DataConfig(path=str(tmp_path), split="train"), "bench")


def parquet(folder, name, rows):
    pytest.importorskip("pyarrow")
    import pyarrow
    import pyarrow.parquet

    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / name)


def test_parquet_is_read_as_jsonl_is_shards_included(tmp_path):
    home = bench(tmp_path, [])
    (home / "test.jsonl").unlink()
    rows = [ROW | {"id": i, "extra_info": {"construction": {"checklist": {"n": i}, "entity": "x"}}} for i in range(3)]
    rows[1]["extra_info"] = {"construction": {"checklist": {"n": 1}}}  # the table's schema fills the gap with null
    parquet(home, "test-00000-of-00002.parquet", rows[:2])
    parquet(home, "test-00001-of-00002.parquet", [*rows[2:], ROW | {"id": 3, "question": None, "extra_info": None}])
    with pytest.raises(BadRow, match="line 4: question: must be a text, not absent"):
        open_requests(DataConfig(path=str(tmp_path)), "bench")
    requests, truth = open_requests(DataConfig(path=str(tmp_path), strict=False), "bench")
    assert [r.id for r in requests] == ["0", "1", "2"] and requests[2].extra["checklist"] == {"n": 2}
    assert "entity" in requests[0].extra and "entity" not in requests[1].extra and truth(requests[0]).any() == 0
    (home / "test-00000-of-00002.parquet").write_bytes(b"PAR1 nothing PAR1")
    with pytest.raises(DataError, match="no readable parquet"):
        open_requests(DataConfig(path=str(tmp_path)), "bench")


# --- conversations ----------------------------------------------------------------------------------------------------


def sft(folder, rows):
    home = folder / "GenEvolve-Data-SFT"
    (home / "images" / "traj_00000").mkdir(parents=True)
    Image.new("RGB", (96, 96), "red").save(home / "images" / "traj_00000" / "IMG_001.png")
    (home / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return home


IMAGES = ["images/traj_00000/IMG_001.png"]


def test_listed_pictures_that_no_placeholder_places_are_not_fed(tmp_path, policy):
    home = sft(tmp_path, [{"messages": TALK, "images": IMAGES}])
    samples = open_conversations(tmp_path, policy.codec, 4096, tmp_path / "index.npz")
    (sample,) = samples
    assert sample.images == () and sample.grids == () and samples.dropped == 0
    assert policy.codec.image_pad_id not in sample.ids and sample.loss_mask.any()
    placed = [*TALK[:3], {"role": "user", "content": "<image>"}, TALK[4]]
    (home / "train.jsonl").write_text(json.dumps({"messages": placed, "images": IMAGES}))
    (sample,) = open_conversations(home, policy.codec, 4096, tmp_path / "index.npz")
    assert len(sample.images) == 1 and (sample.ids == policy.codec.image_pad_id).sum() == 9


def test_a_bad_conversation_is_named_or_counted(tmp_path, policy):
    good = {"messages": TALK, "images": IMAGES}
    cases = {
        "messages: must be a list": {"messages": "x"},
        r"messages\[1\].role: must be one of": {"messages": [TALK[0], {"role": "agent", "content": ""}]},
        r"messages\[0\].content: must be a text": {"messages": [{"role": "user", "content": None}]},
        "nothing to learn": {"messages": TALK[:2]},
        r"images\[0\]: .*leaves": {"images": ["../../x.png"]},
        "images: 2 image placeholders but too few": {"messages": [{"role": "user", "content": "<image><image>"}]},
    }
    home = sft(tmp_path, [])
    for reason, change in cases.items():
        (home / "train.jsonl").write_text(json.dumps(good) + "\n" + json.dumps(good | change) + "\n")
        with pytest.raises(BadRow, match=f"line 2: .*{reason}"):
            open_conversations(tmp_path, policy.codec, 4096, tmp_path / "index.npz")
        bad = BadRows(strict=False)
        samples = open_conversations(tmp_path, policy.codec, 4096, tmp_path / "index.npz", bad=bad)
        assert len(samples) == 1 and bad.count == 1


def test_the_demonstrators_rows_cannot_be_left_out():
    from genevolve_fast.train.config import SftDataConfig

    with pytest.raises(ValueError, match="strict false with path 'sandbox:demonstrations' would do nothing"):
        SftDataConfig(strict=False)
    assert not SftDataConfig(path="GenEvolve-Data-SFT", strict=False).strict


@pytest.mark.slow
def test_sft_trains_on_a_published_folder_with_text_only_observations(tmp_path, capsys):
    sft(tmp_path, [*[{"messages": TALK, "images": IMAGES}] * 6, {"messages": TALK[:2], "images": []}])
    fields = {"policy.path": "sandbox:start", "data.path": tmp_path, "data.recitations": 0, "checkpoint.every": 5}
    fields |= {"policy.freeze_vision": "true"}
    flags = [part for name, value in fields.items() for part in ("--set", f"{name}={value}")]
    command = ["sft", "--config", "sandbox_sft", "--runs", str(tmp_path / "runs"), *flags, "--set", "batch_size=3"]
    assert main(command) == 2 and "nothing to learn" in capsys.readouterr().err
    assert main([*command, "--set", "data.strict=false"]) == 0
    assert "data: 1 bad rows of" in capsys.readouterr().out
    rows = (tmp_path / "runs" / "sandbox_sft" / "metrics.jsonl").read_text().splitlines()
    assert len(rows) == 2 and json.loads(rows[1])["loss"] < json.loads(rows[0])["loss"]


# --- check ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_check_says_what_a_folder_holds_and_what_is_wrong_with_it(tmp_path, capsys):
    view = copied("view", tmp_path / "view")
    assert main(["data", "check", str(view)]) == 0
    out = capsys.readouterr().out
    assert "GenEvolve-Data-SFT/train.jsonl" in out and "eval_type" in out and out.count("0 bad rows") == 4
    picture = next((view / "GenEvolve-Data-RL" / "images").iterdir())
    picture.unlink()
    (view / "GenEvolve-Bench" / "images" / "case_00000.png").write_bytes(b"GIF89a")
    assert main(["data", "check", str(view)]) == 1
    out = capsys.readouterr().out
    assert out.count("1 bad rows") == 2 and picture.name in out and "broken GIF" in out
    assert main(["data", "check", str(view), "--no-pictures"]) == 1 and capsys.readouterr().out.count("1 bad rows") == 1
    assert main(["data", "check", str(tmp_path)]) == 2
    assert "holds none of GenEvolve-Data-SFT" in capsys.readouterr().err


def test_check_misses_pictures_that_answers_name(tmp_path):
    home = sft(tmp_path, [{"messages": TALK, "images": IMAGES}])
    assert inspect(open_set(str(home), "sft"), "sft", "train").bad.count == 0
    named = {"messages": [dict(m) for m in TALK], "images": IMAGES}
    named["messages"][-1]["content"] = named["messages"][-1]["content"].replace("IMG_001", "IMG_002")
    (home / "train.jsonl").write_text(json.dumps(named))
    assert "names IMG_002" in inspect(open_set(str(home), "sft"), "sft", "train").bad.first[0]


# --- through datasets -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_datasets_streams_the_views_as_the_published_configs():
    pytest.importorskip("datasets")
    view = made("view")
    for which, split in (("sft", "train"), ("sft", "eval"), ("rl", "train"), ("bench", "test")):
        local = [row for _, row in open_set(str(view), which, split).rows()]
        streamed = [row for _, row in HubSet(str(view), which, split).rows()]
        assert len(local) == len(streamed) > 0
        name = "messages" if which == "sft" else "question"
        assert [row[name] for row in local] == [row[name] for row in streamed]
    requests = list(read_requests(HubSet(str(view), "rl", "train"), BadRows()))
    assert requests[0].extra["checklist"]["items"][0]["kind"] in ("object", "text", "emblem")


HUB = """
import sys
from genevolve_fast.data.config import DataConfig, open_requests
from genevolve_fast.data.published import open_set

requests, truth = open_requests(DataConfig(path=sys.argv[1]), "rl")
print(len(requests), truth(requests[0]).shape, sorted(requests[0].extra["checklist"]))
print(sum(1 for _ in open_set(sys.argv[1], "sft", "eval").rows()))
try:
    open_requests(DataConfig(path="loopback/absent"), "rl")
except ValueError as error:
    print(error)

from pathlib import Path
from genevolve_fast.data.conversations import open_conversations
from genevolve_fast.policy.codec import TransformersCodec
from genevolve_fast.sandbox.tiny_policy import start_path

print(sum(1 for _ in Path(sys.argv[2]).parent.rglob("*.png")))
codec = TransformersCodec.from_pretrained(start_path())
talks = open_conversations(Path(sys.argv[1]), codec, 10**6, Path(sys.argv[2]))
print(len(talks), sum(len(t.ids) for t in talks), sum(len(t.images) for t in talks))
"""


@pytest.mark.slow
def test_a_hub_id_is_streamed_and_its_pictures_come_when_they_are_asked_for(tmp_path):
    """The real clients against a hub on loopback; in a process of its own, since they read their settings once."""
    pytest.importorskip("datasets")
    import subprocess
    import sys

    from loopback.hub import REPOSITORY, ROOT, LoopbackHub

    view = made("view")
    with LoopbackHub(view) as hub:
        settings = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path), "NO_PROXY": "127.0.0.1"}
        settings |= {"PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        arguments = [sys.executable, "-c", HUB, REPOSITORY, str(tmp_path / "hub.npz")]
        done = subprocess.run(arguments, env=os.environ | settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    rows, talks = (sum(1 for _ in open_set(str(view), *of).rows()) for of in (("rl", "train"), ("sft", "eval")))
    assert lines[:2] == [f"{rows} (96, 96, 3) ['background', 'items']", str(talks)]
    assert "loopback/absent/GenEvolve-Data-RL/train cannot be read from the hub" in lines[2]
    codec = TransformersCodec.from_pretrained(start_path())
    local = open_conversations(view, codec, 10**6, tmp_path / "local.npz")
    assert lines[3] == "1"  # only the picture that was asked for
    assert lines[4] == f"{len(local)} {local.tokens.sum()} {local.images.sum()}"


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch):
    pytest.importorskip("datasets")
    with pytest.raises(DataError, match="somebody/nothing/GenEvolve-Bench/test cannot be read from the hub"):
        open_requests(DataConfig(path="somebody/nothing"), "bench")
