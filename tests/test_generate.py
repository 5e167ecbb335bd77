"""`generate`: request to picture in one line, with the sandbox's policy, a chat server, services, and failures."""

from __future__ import annotations

import asyncio
import json

import numpy as np
import pytest
from loopback.canvas_service import GEMINI, GENERATE, LoopbackCanvas
from loopback.chat import LoopbackChat

from genevolve_fast.cli import main
from genevolve_fast.sandbox.canvas import CanvasRenderer
from genevolve_fast.sandbox.world import SandboxWorld
from genevolve_fast.trajectory import Program, Reference

pytestmark = pytest.mark.slow  # server processes, or pipelines of diffusers


@pytest.fixture(scope="module")
def chat():
    server = LoopbackChat().start()
    yield server
    server.kill()


@pytest.fixture(scope="module")
def service():
    with LoopbackCanvas() as server:
        yield server


@pytest.fixture(scope="module")
def question() -> str:
    """One whose perfect program has a reference."""
    return next(r.question for r in SandboxWorld().requests("bench", 60) if "emblem" in r.question)


def arguments(question: str, chat: LoopbackChat, output, *more: str) -> list[str]:
    server = ["--base-url", chat.url, "--tools", "sandbox", "--patience", "0"]
    return ["generate", question, "-o", str(output), *server, *(more or ["--renderer", "canvas"])]


def pixels(path) -> np.ndarray:
    from PIL import Image

    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


def redrawn(made: dict, seed: int = 0) -> np.ndarray:
    """What the canvas draws from the program in OUT.json and the references beside it."""
    program = Program(made["gen_prompt"], tuple(Reference(r["img_id"]) for r in made["reference_images"]))
    given = [pixels(r["local_path"]) for r in made["reference_images"]]
    return asyncio.run(CanvasRenderer().render(program, given, seed))


def test_a_request_becomes_a_picture(chat, question, tmp_path, capsys):
    output = tmp_path / "new" / "out.png"
    assert main(arguments(question, chat, output)) == 0
    made = json.loads(output.with_suffix(".json").read_text())
    assert np.array_equal(pixels(output), redrawn(made))
    assert made["prompt"] == question and made["image_status"] == "ok" and made["output_path"] == str(output)
    assert made["reference_images"][0]["local_path"].startswith(str(output.with_suffix(".references")))
    assert {"agent", "tools", "references", "render", "write"} == set(made["seconds"])
    assert made["seconds"]["tools"].keys() >= {"image_search"}
    out = capsys.readouterr().out
    assert f"program     {made['gen_prompt']}" in out and "reference 1 IMG_" in out and "render 0." in out
    assert f"picture     {output}, 96 × 96" in out
    assert sorted(p.name for p in output.parent.iterdir()) == ["out.json", "out.png", "out.references"]


def test_the_policy_in_this_process_needs_no_server(tmp_path):
    question = "Draw on a white background the motto of Gal Abo at the bottom center and its emblem at the top center."
    output = tmp_path / "out.png"
    policy = ["--policy", "sandbox:start", "--tools", "sandbox", "--observe-images", "tokens", "--renderer", "canvas"]
    assert main(["generate", question, "-o", str(output), *policy]) == 0
    made = json.loads(output.with_suffix(".json").read_text())
    assert np.array_equal(pixels(output), redrawn(made)) and made["settings"]["policy"] == "sandbox:start"


@pytest.mark.parametrize("renderer", ["qwen-service", "nano-banana"])
def test_services_draw_it(chat, service, question, tmp_path, renderer, monkeypatch):
    monkeypatch.setenv("GEMINI_API_KEY", "sk-generate-0123")
    address = {
        "qwen-service": ["--service-url", service.url],
        "nano-banana": ["--renderer-set", f"base_url={service.gemini}"],
    }
    output, before = tmp_path / "out.png", service.calls()
    assert main(arguments(question, chat, output, "--renderer", renderer, *address[renderer], "--seed", "3")) == 0
    made = json.loads(output.with_suffix(".json").read_text())
    assert service.calls() - before == 1 and np.array_equal(pixels(output), redrawn(made, 3))
    assert "sk-generate" not in output.with_suffix(".json").read_text()


def test_a_renderer_that_fails_leaves_no_picture_and_the_reason(chat, service, question, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("GEMINI_API_KEY", "k")
    output = tmp_path / "out.png"
    output.write_bytes(b"an older picture")
    service.fault(GEMINI, "blocked:SAFETY", 1)
    flags = ["--renderer", "nano-banana", "--renderer-set", f"base_url={service.gemini}"]
    assert main(arguments(question, chat, output, *flags)) == 1
    assert "no picture (render/blocked)" in capsys.readouterr().err
    made = json.loads(output.with_suffix(".json").read_text())
    assert made["success"] is False and made["image_failure"] == "render/blocked" and made["gen_prompt"]
    assert made["failed_attempts"] == {"render/blocked": 1} and output.read_bytes() == b"an older picture"
    service.fault(GENERATE, "status:500", 3)
    quick = ["--renderer-set", "patience_s=0", "--renderer-set", "attempts=1"]
    flags = ["--renderer", "qwen-service", "--service-url", service.url, *quick]
    assert main(arguments(question, chat, output, *flags)) == 1
    assert "no picture (render/server_error)" in capsys.readouterr().err


def test_an_agent_without_an_answer_says_so(chat, tmp_path, capsys):
    chat.faults({"status": 400, "message": "no such model"})
    assert main(arguments("A town.", chat, tmp_path / "out.png")) == 1
    said = capsys.readouterr().err
    assert "no picture (engine/client_error)" in said and "no such model" in said
    made = json.loads((tmp_path / "out.json").read_text())
    assert made["termination"] == "error" and not (tmp_path / "out.png").exists()


def test_edit_models_refuse_programs_without_references(chat, service, tmp_path, capsys):
    question = next(r.question for r in SandboxWorld().requests("bench", 60) if "emblem" not in r.question)
    before = service.calls()
    flags = ["--renderer", "qwen-service", "--service-url", service.url]
    assert main(arguments(question, chat, tmp_path / "out.png", *flags)) == 1
    assert "no picture (program): qwen-service edits pictures" in capsys.readouterr().err
    assert service.calls() == before


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--renderer", "canvas", "-o", "out.jpg"], "ends in .png"),
        (["--renderer", "qwen-service", "-o", "out.png"], "needs urls"),
        (["--renderer", "canvas", "-o", "out.png", "--renderer-set", "patience_s=1"], "it has nothing to set"),
        (
            ["--renderer", "canvas", "-o", "out.png", "--policy", "sandbox:start", "--model", "x"],
            "--model is of a server",
        ),
        (["--renderer", "canvas", "-o", "out.png", "--tools", "serper"], "SERPER_API_KEY"),
    ],
)
def test_flags_that_cannot_work_are_refused(tmp_path, flags, said, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SERPER_API_KEY", raising=False)
    tools = [] if "--tools" in flags else ["--tools", "sandbox"]
    assert main(["generate", "A town.", *tools, *flags]) == 2
    assert said in capsys.readouterr().err and list(tmp_path.iterdir()) == []
