"""The world and its canvas: reproducible, cleanly split, exact where the prompt is exact and wrong where it is not."""

from __future__ import annotations

import asyncio
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genevolve_fast.protocols import RenderError, ToolError
from genevolve_fast.sandbox import grammar
from genevolve_fast.sandbox.canvas import CanvasRenderer, draw_map, draw_program, draw_reference, draw_scene
from genevolve_fast.sandbox.scene import CELLS, EMBLEMS, PALETTE, SHAPES, Item, Scene
from genevolve_fast.sandbox.world import FIRST_NAMES, SECOND_NAMES, SandboxWorld
from genevolve_fast.trajectory import Program

WORLD = SandboxWorld()


NAMES = {f" {word}" for word in (*FIRST_NAMES, *SECOND_NAMES)}


def call(tool: str, **arguments):
    return asyncio.run(WORLD.tools()[tool](arguments))


def precise(scene: Scene) -> str:
    """The prompt that leaves nothing open."""
    sentences = [f"Background {scene.background}."]
    for i in scene.items:
        what = {"text": f"The text '{i.value}'", "emblem": "The emblem of the first reference image"}
        sentences.append(f"{what.get(i.kind, f'A {i.colour} {i.value}')} at the {i.cell}.")
    return " ".join(sentences)


@pytest.mark.parametrize("request_", WORLD.requests("train", 60) + WORLD.requests("bench", 60), ids=lambda r: r.id)
def test_precise_prompts_are_drawn_as_the_truth(request_):
    scene = Scene.from_json(request_.extra["checklist"])
    emblems = [draw_reference(i.value, i.colour) for i in scene.items if i.kind == "emblem"]
    assert np.array_equal(draw_program(precise(scene), emblems, seed=3), WORLD.truth(request_))


def scene(*items: tuple[str, str, str, str]) -> Scene:
    return Scene("white", tuple(Item(*i) for i in items))


RED_CIRCLE, BLUE_STAR = ("object", "circle", "middle left", "red"), ("object", "star", "middle right", "blue")
ROW = [("object", "circle", f"top {c}", "red") for c in ("left", "center", "right")]
TEXTS = (("text", "NOVA", "top center", "black"), ("text", "OPEN", "center", "black"))
KEY = ("emblem", "key", "center", "red")
VAGUE = {
    "count": ("Three red circles at the top.", scene(*ROW)),
    "shared sentence": (
        "A red circle at the middle left and a blue star at the middle right.",
        scene(RED_CIRCLE, BLUE_STAR),
    ),
    "relation": ("A red circle left of a blue star.", scene(RED_CIRCLE, BLUE_STAR)),
    "no place": ("A red circle.", scene(RED_CIRCLE)),
    "two texts": ("The texts 'NOVA' at the top center and 'OPEN' at the center.", scene(*TEXTS)),
    "text without place": ("The text 'NOVA'.", scene(TEXTS[0])),
    "unbound emblem": ("The emblem of Bel Abo at the center.", scene(KEY)),
    "missing reference": ("The emblem of the second reference image at the center.", scene(KEY)),
    "unreadable": ("Something lovely.", scene()),
}


@pytest.mark.parametrize("case", VAGUE)
def test_vague_prompts_fail_the_same_way_every_time(case):
    prompt, wanted = VAGUE[case]
    references = [draw_reference("key", "red")]
    for seed in range(5):
        picture = draw_program(f"Background white. {prompt}", references, seed)
        assert not np.array_equal(picture, draw_scene(wanted)), seed
        assert np.array_equal(picture, draw_program(f"Background white. {prompt}", references, seed))


def test_no_background_is_left_unpainted():
    assert (draw_program("A red circle at the center.", [], 0)[0, 0] == 225).all()


def test_quoted_words_are_content_not_instructions():
    (text,) = grammar.parse("The text 'red circle at the top left' at the center.")
    assert text == grammar.Text("RED CIRCLE AT THE TOP LEFT", "center")


FRAGMENTS = ["a red circle", "at the", ".", "'", "two", "background", "\x00", "first reference image", *CELLS]


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=200) | st.lists(st.sampled_from(FRAGMENTS), max_size=20).map(" ".join))
def test_the_canvas_never_raises(prompt):
    picture = draw_program(prompt, [draw_map("x")], 1)
    assert picture.shape == (96, 96, 3) and picture.dtype == np.uint8


def test_references_must_fit_the_program():
    with pytest.raises(RenderError, match="0 references in the program, 1 given"):
        asyncio.run(CanvasRenderer().render(Program("a"), [draw_map("x")], 0))


def test_figures_are_distinct():
    pictures = [draw_scene(Scene("white", (Item("object", s, "center", "red"),))) for s in SHAPES]
    pictures += [draw_reference(e, "red") for e in EMBLEMS]
    assert len({p.tobytes() for p in pictures}) == len(SHAPES) + len(EMBLEMS)


def test_the_world_is_the_same_every_time():
    again = SandboxWorld()
    assert again.requests("train", 50) == WORLD.requests("train", 50) and again.documents == WORLD.documents
    assert WORLD.requests("train", 50, seed=1) != WORLD.requests("train", 50)


def test_splits_share_nothing():
    train, bench = WORLD.requests("train", 3000), WORLD.requests("bench", 300)
    assert not {r.extra["entity"] for r in train} & {r.extra["entity"] for r in bench} - {""}
    assert not {r.question for r in train} & {r.question for r in bench}
    assert len({r.question for r in bench}) == 300
    scenes = [{str(r.extra["checklist"]) for r in part if not r.extra["entity"]} for part in (train, bench)]
    assert not scenes[0] & scenes[1]
    names = {e.name for e in WORLD.entities}
    assert {n.split()[0] for n in names} == set(FIRST_NAMES) and {n.split()[1] for n in names} == set(SECOND_NAMES)
    assert len(WORLD.all_entities) == 60 and len({(e.emblem, e.emblem_colour) for e in WORLD.all_entities}) == 60
    held_out = re.compile(r"Draw on an? \w+ background |Paint at the [a-z ]+ the emblem ")
    assert all(held_out.match(r.question) for r in bench) and not any(held_out.match(r.question) for r in train)


def test_templates_and_difficulties_are_all_there():
    requests = WORLD.requests("train", 500)
    assert {r.category for r in requests} == {"emblem_field", "emblem_motto", "count_row", "text_sign", "relation"}
    assert {r.difficulty for r in requests} == {"easy", "medium", "hard"}
    assert {r.eval_type for r in requests} == {"Knowledge-Anchored", "Quality-Anchored"}
    words = "\n".join(r.question for r in WORLD.requests("bench", 200))
    known = "\n".join(r.question for r in requests)
    assert set(re.findall(r" ?[A-Za-z]+", words)) <= set(re.findall(r" ?[A-Za-z]+", known)) | NAMES


def test_search_finds_every_fact_first():
    for e in WORLD.all_entities:
        for fact, value in (("field", e.field), ("motto", e.motto)):
            first = call("search", queries=[f"{e.name} {fact}"]).text.split("2. title")[0]
            assert f"The {fact} of {e.name} is {value}." in first
    block = call("search", queries=["Bel Abo field"]).text.splitlines()
    assert block[0] == "--- search result for [Bel Abo field] ---" and block[-1] == "--- end of search result ---"
    assert block[1].startswith("1. title: ") and block[2].startswith("  snippet: ")


def test_image_search_hides_the_right_one_among_distractors():
    places = []
    for e in WORLD.all_entities:
        titles = [i.title for i in call("image_search", query=f"{e.name} emblem").images]
        assert len(titles) == 3 and f"map of {e.name}" in titles
        places.append(titles.index(f"emblem of {e.name}"))
    assert min(places.count(i) for i in range(3)) >= 10


def test_tools_refuse_wrong_arguments():
    for tool, arguments in (
        ("search", {}),
        ("search", {"queries": [3]}),
        ("image_search", {"query": " "}),
        ("query_knowledge", {"skill_name": "x"}),
    ):
        with pytest.raises(ToolError):
            call(tool, **arguments)
    assert call("search", queries=["zzz"]).text.count("\n") == 1


def test_free_standing_punctuation_is_no_word():
    assert (
        call("search", queries=["motto of Bel Abo ?"]).text.splitlines()[1:]
        == (call("search", queries=["motto of Bel Abo"]).text.splitlines()[1:])
    )
    assert [i.title for i in call("image_search", query="emblem of Bel Abo - !").images]
    assert call("search", queries=["? !"]).text.count("\n") == 1


def test_dataset_is_written_in_the_released_format(tmp_path):
    from genevolve_fast.data.rows import read_jsonl
    from genevolve_fast.trajectory import Request

    WORLD.write_dataset(tmp_path, train=5, bench=5)
    rows = list(read_jsonl(tmp_path / "bench.jsonl"))
    assert {"id", "question", "gt_image", "eval_type", "category", "difficulty"} <= set(rows[0])
    assert (tmp_path / rows[0]["gt_image"]).exists()
    assert [Request.from_row(r) for r in rows] == WORLD.requests("bench", 5)
    assert set(PALETTE) >= {WORLD.requests("bench", 5)[0].extra["checklist"]["background"]}
