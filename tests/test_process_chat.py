"""Builders over a chat model and a renderer, against a server process that speaks the protocol or misbehaves."""

from __future__ import annotations

import asyncio
import json

import numpy as np
import pytest
from loopback.scenes import LoopbackScenes

from genevolve_fast.cli import main
from genevolve_fast.incidents import Incidents
from genevolve_fast.net.asking import JsonChat, Lane
from genevolve_fast.net.chat import ChatEndpoint
from genevolve_fast.process.builders import Corrupter, Rejected, image_alignment, instruction_conflict, multi_turn
from genevolve_fast.process.chat_workshop import (
    ChatAuthor,
    ChatDraftJudge,
    ChatReader,
    RendererPainter,
    category_of,
    chat_workshop,
)
from genevolve_fast.process.rows import Job, build_rows, open_processes
from genevolve_fast.process.scene_graph import GraphError, SceneGraph
from genevolve_fast.protocols import EngineError, RenderError, Sampling
from genevolve_fast.sandbox.stroke_data import WORDS, StrokeRenderer, placed
from genevolve_fast.sandbox.strokes import CATEGORIES, COMPLEX, draw, judge_graph, parse, requests
from genevolve_fast.trajectory import Program

TEXT = "a red circle left of a blue square"


@pytest.fixture(scope="module")
def server():
    process = LoopbackScenes().start(90)
    yield process
    process.kill()


@pytest.fixture(autouse=True)
def well(server):
    server.faults()


def ask(server, use, incidents: Incidents | None = None, reasks: int = 1):
    """What `use(chat)` gives, its connections closed."""
    incidents = incidents or Incidents()

    async def main():
        endpoints = []

        def open_endpoint(limiter):
            endpoints.append(ChatEndpoint("rules", server.url, attempts=1, incidents=incidents, source="scenes"))
            return endpoints[-1]

        chat = JsonChat("rules", open_endpoint, Lane(4), incidents, source="scenes", sampling=Sampling(), reasks=reasks)
        try:
            return await use(chat)
        finally:
            for endpoint in endpoints:
                await endpoint.close()

    return asyncio.run(main())


def test_a_text_becomes_a_graph_and_a_request_its_category(server):
    request = ask(server, lambda chat: ChatReader(chat).request("r1", TEXT))
    assert request.graph == parse(TEXT) and request.category == "position" and request.text == TEXT
    assert server.seen() == {"scene_graph": 1}


@pytest.mark.parametrize("spoil", ["fenced", "trailing", "prose"])
def test_sloppy_json_is_read(server, spoil):
    server.faults({"spoil": spoil})
    assert ask(server, lambda chat: ChatReader(chat).read(TEXT)) == parse(TEXT)
    assert server.seen() == {"scene_graph": 1}


@pytest.mark.parametrize(
    "text",
    [
        "I cannot do that.",
        '{"objects": [{"id": "a", "name": ""}], "relations": []}',
        '{"objects": [{"id": "a", "name": "dog"}], "relations": [{"subject": "a", "kind": "near", "object": "a"}]}',
        '{"objects": [{"id": "a", "name": "dog", "count": 100}], "relations": []}',
    ],
)
def test_an_unusable_graph_is_complained_about_and_then_a_typed_failure(server, text):
    incidents = Incidents()
    server.faults({"text": text})
    assert ask(server, lambda chat: ChatReader(chat).read(TEXT), incidents) == parse(TEXT)  # asked again
    assert incidents.take() == {"scenes/bad_response": 1}
    server.faults({"text": text}, {"text": text})
    with pytest.raises(EngineError) as failed:
        ask(server, lambda chat: ChatReader(chat).read(TEXT))
    assert failed.value.kind == "bad_response"


def test_servers_that_fail_are_typed_failures(server):
    for status, kind in ((429, "rate_limited"), (500, "server_error"), (404, "client_error")):
        server.faults({"status": status}, {"status": status})
        with pytest.raises(EngineError) as failed:
            ask(server, lambda chat: ChatAuthor(chat).plan(TEXT, SceneGraph(), parse(TEXT)))
        assert failed.value.kind == kind


def test_a_text_without_objects_is_no_graph(server):
    with pytest.raises(GraphError, match="tells no object"):
        ask(server, lambda chat: ChatReader(chat).read("hello there"))


@pytest.mark.slow
def test_the_judge_that_sees_agrees_with_the_judge_of_pixels(server):
    pixels = draw(placed(parse("a red circle at row 2 column 1 and a green ring at row 2 column 3")))
    for told in (
        TEXT,
        "a red circle left of a green ring",
        "a green ring left of a red circle",
        "a red circle",
        "two red circles",
    ):
        graph = parse(told)
        seen = ask(server, lambda chat, graph=graph: ChatDraftJudge(chat).judge(graph, pixels))
        assert seen.faults == judge_graph(graph, pixels).faults, told
    loose = ask(server, lambda chat: ChatDraftJudge(chat, exact=False).judge(parse("a red circle"), pixels))
    assert loose.correct
    for text in (
        '{"objects": [{"name": "ring", "box": [0, 0, 2, 1]}], "unclear": ""}',
        '{"objects": "none", "unclear": ""}',
    ):
        server.faults({"text": text}, {"text": text})
        with pytest.raises(EngineError, match="box|list of objects"):
            ask(server, lambda chat: ChatDraftJudge(chat).judge(parse(TEXT), pixels))


@pytest.mark.slow
def test_all_three_subsets_are_built_by_a_chat_model_and_a_renderer(server, tmp_path):
    texts = [r.text for r in requests("train", 9, 16, (*CATEGORIES, COMPLEX, COMPLEX))]

    async def use(chat):
        reader, shop = ChatReader(chat), chat_workshop(chat, StrokeRenderer(), WORDS)

        def job(n, text):
            async def build():
                request = await reader.request(f"r{n}", text)
                if n % 3 == 0:
                    return await multi_turn(request, shop, 0)
                if n % 3 == 1:
                    return await instruction_conflict(request, shop, 0, Corrupter(shop))
                return await image_alignment(request, shop, 0, negative=n % 2 == 0)

            return Job(f"r{n}", "multi_turn", "", build)

        jobs = [job(n, text) for n, text in enumerate(texts)]
        server.faults({}, {}, {"status": 500}, {"status": 500})
        made, tally = await build_rows(tmp_path, jobs, {}, parallel=4)
        assert tally.ends["server_error"] == 2
        return await build_rows(tmp_path, jobs, {}, parallel=4)

    made, tally = ask(server, use)
    assert made["rows"] >= 12 and not tally.ends["server_error"], made["filtered"]
    data = open_processes(tmp_path)
    assert {p.subset for p in data} == {"multi_turn", "instruction_conflict", "image_alignment"}
    for p in data:
        assert judge_graph(SceneGraph.from_json(p.extra["graph"]), data.pixels[p.result]).correct
    assert any(c.correction for p in data for c in p.cycles)


def test_the_draft_before_is_the_renderers_reference():
    class Canvas(StrokeRenderer):
        async def render(self, program, references, seed):
            program.validate(min_references=0, max_references=1)
            assert len(program.reference_images) == len(references)
            return await super().render(program, references, seed)

    async def main():
        painter = RendererPainter(Canvas())
        first = await painter.paint(parse("a red circle"), "", None, 3)
        return first, await painter.paint(parse(TEXT), "add a blue square\nThe scene so far: x", first, 4)

    first, second = asyncio.run(main())
    assert judge_graph(parse(TEXT), second).correct
    red = (first != 255).any(-1)
    assert np.array_equal(first[red], second[red])


def test_what_cannot_be_painted_is_a_typed_failure():
    with pytest.raises(RenderError, match="cannot be drawn"):
        asyncio.run(StrokeRenderer().render(Program("a lighthouse at dusk"), [], 0))

    class Needy(StrokeRenderer):
        min_references = 1

    with pytest.raises(ValueError, match="a first draft has none"):
        RendererPainter(Needy())


def test_categories_are_those_of_the_sandbox():
    for r in requests("train", 0, 60):
        assert category_of(r.graph) == r.category
    assert category_of(parse("a ring, a cross and a circle")) == "complex" and Rejected("x").reason == "x"


@pytest.mark.slow
def test_the_command_builds_rows_of_a_file_of_requests(server, tmp_path, capsys):
    file = tmp_path / "asked.jsonl"
    asked = requests("train", 3, 9, CATEGORIES)
    file.write_text(
        "".join(json.dumps({"id": r.id, "text": r.text}) + "\n" for r in asked) + '{"id": "x", "text": "joy"}\n'
    )
    second = [f"text_to_image.{field}" for field in ("kind=text-to-image", f"urls=[{server.address}]")]
    flags = ["--requests", str(file), "--model", "rules", "--base-url", server.url, "--out", str(tmp_path / "d")]
    flags += ["--renderer", "qwen-service", "--service-url", server.address, "--chat-set", "attempts=1"]
    flags += [f"--{name}-set={value}" for name in ("renderer",) for value in second]
    server.faults({"status": 404}, {"status": 404})
    assert main(["process", "data", *flags, "--chat-set", "reasks=0"]) == 0
    told = capsys.readouterr()
    assert "process/client_error" in told.out and "unreadable" in told.err
    assert main(["process", "data", *flags]) == 0  # what failed is read and built now
    data = open_processes(tmp_path / "d")
    assert len(data) >= 7 and {p.subset for p in data} == {"multi_turn", "instruction_conflict", "image_alignment"}
    counts = server.seen()
    assert counts["pictures"] and counts["plan"] and counts["seen"]
    assert main(["process", "data", *flags]) == 0 and server.seen() == counts  # nothing is asked again


FILE = ["--requests", "FILE"]
SERVED = ["--model", "m", "--base-url", "http://h/v1", "--renderer", "canvas"]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--model", "m"], "--model would do nothing without --requests"),
        (FILE, "--requests needs --model, --base-url, --renderer"),
        ([*FILE, "--split", "train"], "--split would do nothing with --requests"),
        (["--requests", "nowhere.jsonl", *SERVED], "cannot be read"),
        ([*FILE, *SERVED, "--base-url", "h"], "base_url must be a URL"),
        ([*FILE, *SERVED, "--api-key-env", "NO_SUCH"], "NO_SUCH"),
        ([*FILE, *SERVED, "--renderer", "process"], "grows a picture by itself"),
    ],
)
def test_the_command_refuses_what_cannot_work(tmp_path, capsys, flags, told):
    file = tmp_path / "asked.txt"
    file.write_text("a red circle\n")
    asked = [str(file) if flag == "FILE" else flag for flag in flags]
    assert main(["process", "data", "--out", str(tmp_path / "d"), *asked]) == 2
    assert told in capsys.readouterr().err and not (tmp_path / "d").exists()
    (tmp_path / "bad.jsonl").write_text('{"id": 1}\n')
    real = [*SERVED, "--requests", str(tmp_path / "bad.jsonl")]
    assert main(["process", "data", "--out", str(tmp_path / "d"), *real]) == 2
    assert "line 1: a request is an object" in capsys.readouterr().err
