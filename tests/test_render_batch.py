"""Rendering a results.json: crashes, Ctrl-C, other settings, the released script's folders and files."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from loopback.canvas_service import GENERATE, LoopbackCanvas
from loopback.web import png

from genevolve_fast.cli import main
from genevolve_fast.protocols import RenderError
from genevolve_fast.render.batch import Gallery, render_batch
from genevolve_fast.render.rows import read_rows
from genevolve_fast.sandbox.canvas import CanvasRenderer, draw_reference
from genevolve_fast.trajectory import Program, Reference

ROOT = Path(__file__).parents[1]
RELEASED = Path(__file__).parent / "fixtures" / "released"
PROMPT = "Background blue. The emblem of the first reference image at the middle."


@pytest.fixture(scope="module")
def service():
    with LoopbackCanvas() as server:
        yield server


def reference(tmp_path: Path, name: str = "anchor.png", data: bytes | None = None) -> dict[str, str]:
    (tmp_path / name).write_bytes(png(draw_reference("anchor", "red")) if data is None else data)
    return {"img_id": "IMG_001", "note": "", "local_path": name, "url": "", "title": "", "page_url": ""}


def row(id: object, reference_images=(), **fields) -> dict:
    return {"id": id, "prompt": f"Request {id}.", "gen_prompt": PROMPT, "reference_images": list(reference_images)} | (
        fields
    )


def batch(tmp_path: Path, rows: list[dict]) -> Path:
    (tmp_path / "results.json").write_text(json.dumps(rows))
    return tmp_path / "results.json"


def arguments(source: Path, folder: Path, *more: str) -> list[str]:
    return ["render", "--input", str(source), "--output-dir", str(folder), *more]


def rows_of(folder: Path) -> list[dict]:
    return json.loads((folder / "results.json").read_text())


def pixels(path: str | Path) -> np.ndarray:
    from PIL import Image

    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


def canvas(prompt: str = PROMPT, count: int = 1, seed: int = 0) -> np.ndarray:
    program = Program(prompt, tuple(Reference(f"IMG_{i}") for i in range(count)))
    return asyncio.run(CanvasRenderer().render(program, [draw_reference("anchor", "red")] * count, seed))


def via(server: LoopbackCanvas, *more: str) -> list[str]:
    quick = ("patience_s=0", "attempts=1", "break_after=9")
    options = [x for pair in quick for x in ("--renderer-set", pair)]
    return ["--renderer", "qwen-service", "--service-url", server.url, *options, *more]


# --- what is written --------------------------------------------------------------------------------------------------


def test_rows_keep_their_fields_and_get_the_released_ones(tmp_path):
    rows = [row("a", [reference(tmp_path)], gt_image="g.png", meta={"x": [1]}), row(7, [reference(tmp_path)])]
    assert main(arguments(batch(tmp_path, rows), tmp_path / "out", "--seed", "5")) == 0
    for before, after in zip(rows, rows_of(tmp_path / "out"), strict=True):
        picture = str(tmp_path / "out" / "images" / f"{before['id']}.png")
        added = {"image_path": picture, "output_path": picture, "success": True, "image_status": "ok"}
        assert after == before | added and list(after) == [*before, *added]
        assert np.array_equal(pixels(picture), canvas(seed=5))


def test_faults_have_a_type_and_the_others_are_drawn(tmp_path, service, capsys):
    good = reference(tmp_path)
    service.fault(GENERATE, "failed:out of memory", 1)
    rows = [
        row("broken renderer", [good]),
        row("no file", [good | {"local_path": "gone.png"}]),
        row("no path", [good | {"local_path": ""}]),
        row("no picture", [reference(tmp_path, "text.png", b"hello")]),
        row("a folder", [good | {"local_path": "."}]),
        row("a device", [good | {"local_path": "/dev/zero"}]),
        row("nul", [good | {"local_path": "a\x00b"}]),
        row("none", []),
        row("five", [good] * 5),
        row("no prompt", [good], gen_prompt="", prompt=" "),
        row("wrong prompt", [good], gen_prompt=["x"]),
        row("wrong list", "x"),
        row("wrong item", [3]),
        row("fine", [good]),
    ]
    expected = [
        *("render/server_error", "reference/missing", "reference/missing", "reference/not_an_image"),
        *("reference/missing", "reference/missing", "reference/missing"),
        *("program", "program", "program", "program", "program", "program", None),
    ]
    assert main(arguments(batch(tmp_path, rows), tmp_path / "out", *via(service, "--parallel", "1"))) == 0
    got = rows_of(tmp_path / "out")
    assert [r.get("image_failure") for r in got] == expected
    for r in got[:-1]:
        assert r["image_status"].startswith("error: ") and r["success"] is False and r["output_path"] == ""
    said = capsys.readouterr()
    assert "1 drawn, 13 failed (program 6, reference/missing 5, reference/not_an_image 1, render/server_error 1)" in (
        said.out
    )
    assert "failed attempts: render/server_error 1" in said.out
    assert "needs at least 1 reference image" in said.err and "out of memory" in said.err


def test_rows_that_share_an_id_have_their_own_pictures(tmp_path):
    good = reference(tmp_path)
    other = PROMPT.replace("blue", "red")
    rows = [row("x", [good]), row("x", [good], gen_prompt=other), {"prompt": "Background red."}, {"prompt": "B."}]
    assert main(arguments(batch(tmp_path, rows), tmp_path / "out")) == 0
    paths = [r["output_path"] for r in rows_of(tmp_path / "out")]
    assert [Path(p).name for p in paths] == ["x.png", "x~2.png", "unknown.png", "unknown~2.png"]
    assert np.array_equal(pixels(paths[0]), canvas()) and np.array_equal(pixels(paths[1]), canvas(other))


def test_without_references_the_request_is_drawn_as_the_released_script_does_or_the_program(tmp_path):
    rows = [row("a", [], prompt="Background red."), row("b", [], prompt="Background red.", gen_prompt=" ")]
    source = batch(tmp_path, rows)
    assert main(arguments(source, tmp_path / "program")) == 0
    assert main(arguments(source, tmp_path / "request", "--without-references", "request")) == 0
    drawn = {
        folder: [pixels(r["output_path"]) for r in rows_of(tmp_path / folder)] for folder in ("program", "request")
    }
    request = canvas("Background red.", 0)
    assert np.array_equal(drawn["program"][0], canvas(count=0)) and np.array_equal(drawn["program"][1], request)
    assert np.array_equal(drawn["request"][0], request) and np.array_equal(drawn["request"][1], request)


def test_our_own_results_are_an_input_again(tmp_path, service):
    rows = [row("a", [reference(tmp_path)]), row("b", [reference(tmp_path) | {"local_path": "gone"}])]
    assert main(arguments(batch(tmp_path, rows), tmp_path / "one")) == 0
    first = rows_of(tmp_path / "one")
    first[1]["reference_images"] = first[0]["reference_images"]
    (tmp_path / "one.json").write_text(json.dumps(first))
    assert main(arguments(tmp_path / "one.json", tmp_path / "two", *via(service))) == 0
    assert all(r["success"] and "image_failure" not in r for r in rows_of(tmp_path / "two"))


# --- continuing -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_only_what_failed_is_drawn_again(tmp_path, service, capsys):
    rows = [row(i, [reference(tmp_path)]) for i in range(5)]
    command = arguments(batch(tmp_path, rows), tmp_path / "out", *via(service, "--parallel", "1"))
    service.fault(GENERATE, "status:500", 2)
    assert main(command) == 0 and [r["success"] for r in rows_of(tmp_path / "out")] == [False] * 2 + [True] * 3
    stamps = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out" / "images").iterdir()}
    before = service.calls()
    assert main(command) == 0 and service.calls() - before == 2
    assert all(r["success"] for r in rows_of(tmp_path / "out"))
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out" / "images").iterdir()}.items() >= stamps.items()
    assert main(command) == 0 and service.calls() - before == 2
    assert "5 drawn, 0 failed" in capsys.readouterr().out


@pytest.mark.slow
def test_a_killed_batch_continues_where_it_was(tmp_path):
    with LoopbackCanvas() as server:
        server.fault(GENERATE, "delay:0.1")
        rows = [row(i, [reference(tmp_path)]) for i in range(30)]
        command = arguments(batch(tmp_path, rows), tmp_path / "out", *via(server, "--parallel", "2"))
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        running = subprocess.Popen(
            [sys.executable, "-m", "genevolve_fast.cli", *command], cwd=ROOT, env=environment, stderr=subprocess.DEVNULL
        )
        while server.calls() < 8:
            assert running.poll() is None
            time.sleep(0.05)
        assert main(command) == 2  # one process at a time
        running.send_signal(signal.SIGKILL)
        running.wait()
        kept = len((tmp_path / "out" / "renders.jsonl").read_text().splitlines()) - 1
        asked = server.calls()
        server.fault(GENERATE, "", 0)
        assert kept >= 4 and main(command) == 0
        assert server.calls() - asked == 30 - kept
        drawn = rows_of(tmp_path / "out")
        assert [r["id"] for r in drawn] == list(range(30)) and all(r["success"] for r in drawn)
        assert all(np.array_equal(pixels(r["output_path"]), canvas()) for r in drawn)


@pytest.mark.slow
def test_services_that_die_and_come_back_lose_no_row(tmp_path, capsys):
    rows = [row(i, [reference(tmp_path)], gen_prompt=f"{PROMPT} The text '{i}'.") for i in range(60)]
    with LoopbackCanvas() as one, LoopbackCanvas() as two:

        def disturb() -> None:
            for server in (one, two, one):
                time.sleep(0.7)
                server.kill()
                if server is one:
                    two.fault(GENERATE, "status:503", 2)
                time.sleep(0.5)
                server.start()
                server.fault(GENERATE, "delay:0.1")

        for server in (one, two):
            server.fault(GENERATE, "delay:0.1")
        options = ["--service-url", two.url, "--renderer-set", "patience_s=60", "--renderer-set", "concurrency=2"]
        thread = threading.Thread(target=disturb)
        thread.start()
        folder = tmp_path / "out"
        status = main(
            arguments(batch(tmp_path, rows), folder, "--renderer", "qwen-service", "--service-url", one.url, *options)
        )
        thread.join()
    assert status == 0
    drawn = rows_of(folder)
    assert len(drawn) == 60 and all(r["success"] for r in drawn)
    assert all(np.array_equal(pixels(r["output_path"]), canvas(r["gen_prompt"])) for r in drawn)
    assert "render/connect" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_batch_with_its_results_written(tmp_path, number):
    with LoopbackCanvas() as server:
        server.fault(GENERATE, "delay:0.1")
        rows = [row(i, [reference(tmp_path)]) for i in range(60)]
        command = arguments(batch(tmp_path, rows), tmp_path / "out", *via(server, "--parallel", "2"))
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        running = subprocess.Popen(
            [sys.executable, "-m", "genevolve_fast.cli", *command],
            cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        while server.calls() < 6:
            time.sleep(0.05)
        running.send_signal(number)
        assert "the same command continues" in running.communicate(timeout=60)[1]
        assert running.returncode == 128 + number
        drawn = rows_of(tmp_path / "out")
        assert 4 <= len(drawn) < 60 and all(r["success"] and Path(r["output_path"]).is_file() for r in drawn)


def test_half_a_picture_is_drawn_again(tmp_path):
    rows = [row("a", [reference(tmp_path)])]
    command = arguments(batch(tmp_path, rows), tmp_path / "out")
    assert main(command) == 0
    picture = tmp_path / "out" / "images" / "a.png"
    whole = picture.read_bytes()
    picture.write_bytes(whole[:100])
    with (tmp_path / "out" / "renders.jsonl").open("a") as journal:
        journal.write('{"name": "a", "dig')
    assert main(command) == 0 and picture.read_bytes() == whole
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["images", "renders.jsonl", "results.json"]


def test_another_renderer_seed_or_input_is_refused(tmp_path, service, capsys):
    source, folder = batch(tmp_path, [row("a", [reference(tmp_path)])]), tmp_path / "out"
    assert main(arguments(source, folder)) == 0
    before = (folder / "results.json").read_text()
    for changed in (["--seed", "1"], via(service), ["--without-references", "request"]):
        assert main(arguments(source, folder, *changed)) == 2
        assert "holds pictures of other settings" in capsys.readouterr().err
    assert main(arguments(batch(tmp_path, [row("b", [reference(tmp_path)])]), folder)) == 2
    assert "a is not in this one" in capsys.readouterr().err
    assert (folder / "results.json").read_text() == before
    assert main(arguments(source, folder, "--fresh", "--seed", "1")) == 0


def test_programs_that_changed_are_drawn_again_and_rows_may_be_added(tmp_path, capsys):
    good, folder = reference(tmp_path), tmp_path / "out"
    assert main(arguments(batch(tmp_path, [row("b", [good]), row("c", [good])]), folder)) == 0
    other = PROMPT.replace("blue", "red")
    more = [row("a", [good]), row("b", [good], gen_prompt=other), row("c", [good])]
    assert main(arguments(batch(tmp_path, more), folder)) == 0
    assert "1 rows ask for another picture" in capsys.readouterr().out
    drawn = rows_of(folder)
    assert [r["id"] for r in drawn] == ["a", "b", "c"]
    assert np.array_equal(pixels(drawn[1]["output_path"]), canvas(other))


def test_a_service_that_refuses_every_row_ends_the_batch(tmp_path, service, capsys):
    service.fault(GENERATE, "status:401")
    rows = [row(i, [reference(tmp_path)]) for i in range(20)]
    before = service.calls()
    assert main(arguments(batch(tmp_path, rows), tmp_path / "out", *via(service, "--parallel", "1"))) == 1
    service.fault(GENERATE, "", 0)
    assert service.calls() - before == 3
    assert "the last 3 rows failed alike" in capsys.readouterr().err and len(rows_of(tmp_path / "out")) == 3


def test_a_renderers_bug_ends_no_other_row(tmp_path):
    class Odd:
        name, min_references, max_references = "odd", 0, 2

        async def render(self, program, references, seed):
            if "red" in program.gen_prompt:
                raise ZeroDivisionError("half")
            if "green" in program.gen_prompt:
                raise RenderError("busy", "timeout")
            return np.zeros((4, 4, 3), np.uint8)

    rows = read_rows(batch(tmp_path, [row(c, gen_prompt=f"Background {c}.") for c in ("red", "green", "blue")]))
    with closing(Gallery(tmp_path / "out", rows, {})) as gallery:
        done = asyncio.run(render_batch(rows, gallery, Odd(), parallel=2))
    assert done.ends == {"render/other": 1, "render/timeout": 1, "drawn": 1}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{}", "is not a list of rows"),
        ("[1]", "row 1: a row must be a JSON object"),
        ("[", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
    ],
)
def test_inputs_that_are_no_results_are_named(tmp_path, text, said, capsys):
    (tmp_path / "results.json").write_text(text)
    assert main(arguments(tmp_path / "results.json", tmp_path / "out")) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--parallel", "0"], "--parallel must be at least 1"),
        (["--renderer", "qwen-service"], "needs urls"),
        (["--service-url", "http://h"], "urls with kind canvas"),
        (["--renderer-set", "patience_s"], "takes FIELD=VALUE"),
        (["--renderer-set", "nothing=1"], "there is no such field"),
        (["--renderer-set", "kind=canvas", "--renderer-set", "seed=3"], "not --renderer-set"),
        (["--renderer", "nano-banana"], "GOOGLE_API_KEY or GEMINI_API_KEY is not set"),
        (["--seed", "-1"], "at least 0"),
    ],
)
def test_flags_that_cannot_work_are_refused(tmp_path, flags, said, capsys, monkeypatch):
    for name in ("GOOGLE_API_KEY", "GEMINI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    source = batch(tmp_path, [row("a", [reference(tmp_path)])])
    assert main(arguments(source, tmp_path / "out", *flags)) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_sections_are_set_with_a_dot(tmp_path, service, monkeypatch):
    monkeypatch.setenv("GEMINI_API_KEY", "k")
    second = [
        "--renderer-set",
        "text_to_image.kind=nano-banana",
        "--renderer-set",
        f"text_to_image.base_url={service.gemini}",
    ]
    rows = [row("a", [reference(tmp_path)]), row("b", [])]
    assert main(arguments(batch(tmp_path, rows), tmp_path / "out", *via(service, *second))) == 0
    drawn = [pixels(r["output_path"]) for r in rows_of(tmp_path / "out")]
    assert np.array_equal(drawn[0], canvas()) and np.array_equal(drawn[1], canvas(count=0))


def test_the_cache_serves_another_folder(tmp_path, service):
    source = batch(tmp_path, [row(i, [reference(tmp_path)], gen_prompt=f"{PROMPT} The text '{i}'.") for i in range(3)])
    cache = ["--renderer-set", f"cache={tmp_path / 'cache'}", "--renderer-set", "cache_mode=record"]
    assert main(arguments(source, tmp_path / "one", *via(service, *cache))) == 0
    before = service.calls()
    assert main(arguments(source, tmp_path / "two", *via(service, *cache))) == 0 and service.calls() == before
    for a, b in zip(rows_of(tmp_path / "one"), rows_of(tmp_path / "two"), strict=True):
        assert Path(a["output_path"]).read_bytes() == Path(b["output_path"]).read_bytes()


# --- the released script's files --------------------------------------------------------------------------------------


def test_a_folder_that_the_released_script_began_is_continued(tmp_path, service, capsys):
    """fixtures/released/rendered is what generate_images.py leaves; it had no renderer for the last row."""
    before = json.loads((RELEASED / "rendered" / "results.json").read_text())
    shutil.copytree(RELEASED / "rendered", tmp_path / "out")
    pictures = {p.name: p.read_bytes() for p in (tmp_path / "out" / "images").iterdir()}
    source, asked = tmp_path / "out" / "input.json", service.calls()
    text = ["--renderer-set", "text_to_image={kind: text-to-image, urls: [" + service.url + "]}"]
    assert main(arguments(source, tmp_path / "out", *via(service, *text))) == 0
    assert "2 pictures of an earlier results.json are kept" in capsys.readouterr().out
    assert service.calls() - asked == 1
    after = rows_of(tmp_path / "out")
    assert pictures.items() <= {p.name: p.read_bytes() for p in (tmp_path / "out" / "images").iterdir()}.items()
    for old, new in zip(before, after, strict=True):
        assert list(new) == list(old) and new["image_status"] == "ok" and new["success"] is True
        assert new["image_path"] == str(tmp_path / "out" / "images" / f"{Path(new['image_path']).name}")
        assert {
            k: v for k, v in new.items() if k in old and "image" not in k and k not in ("success", "output_path")
        } == {k: v for k, v in old.items() if "image" not in k and k not in ("success", "output_path")}
    assert [Path(r["image_path"]).name for r in after] == ["dor-abo.png", "two words.png", "no-reference.png"]


def test_the_same_rows_give_the_released_scripts_results(tmp_path, service):
    """The released script ran on the same input and service: same rows, order, pictures; only the reason differs."""
    theirs = json.loads((RELEASED / "rendered" / "results.json").read_text())
    assert main(arguments(RELEASED / "rendered" / "input.json", tmp_path / "out", *via(service))) == 0
    for ours, released in zip(rows_of(tmp_path / "out"), theirs, strict=True):
        assert [name for name in ours if name != "image_failure"] == list(released)
        assert {n: v for n, v in ours.items() if n in released and n not in _PLACES} == {
            n: v for n, v in released.items() if n not in _PLACES
        }
        assert ours["image_status"].partition(":")[0] == released["image_status"].partition(":")[0]
        if ours["success"]:
            drawn = RELEASED / "rendered" / "images" / Path(released["image_path"]).name
            assert np.array_equal(pixels(ours["output_path"]), pixels(drawn))


_PLACES = ("image_path", "output_path", "image_status")


def test_a_row_of_another_input_in_a_released_folder_is_refused(tmp_path, capsys):
    shutil.copytree(RELEASED / "rendered", tmp_path / "out")
    rows = json.loads((tmp_path / "out" / "input.json").read_text())
    rows[0]["gen_prompt"] = "Background red."
    assert main(arguments(batch(tmp_path, rows), tmp_path / "out")) == 2
    assert "a row that is not of this input (id 'dor-abo')" in capsys.readouterr().err
