"""The world of strokes: requests by seed, scenes drawn, and pixel judges that neither noise nor near misses fool."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from genevolve_fast.process.scene_graph import OPPOSITE, GraphError, Node, Relation, SceneGraph, SceneRequest
from genevolve_fast.process.verdict import Found, compare
from genevolve_fast.sandbox import strokes
from genevolve_fast.sandbox.strokes import (
    CATEGORIES,
    COLOURS,
    COMPLEX,
    GRID,
    SHAPES,
    Figure,
    Scene,
    draw,
    judge,
    look,
    requests,
    sample_scene,
)

EVERY = (*CATEGORIES, COMPLEX)


def noisy(pixels: np.ndarray, random: np.random.Generator, std: float = 12) -> np.ndarray:
    return np.clip(pixels + random.normal(0, std, pixels.shape), 0, 255).round().astype(np.uint8)


def drawn(count: int, categories=EVERY):
    for n, request in enumerate(requests("train", 3, count, categories)):
        random = np.random.default_rng([7, n])
        yield request, sample_scene(request.graph, random), random


def free_cells(scene: Scene) -> list[tuple[int, int]]:
    taken = {f.cell for f in scene.figures}
    return [cell for cell in itertools.product(range(GRID), range(GRID)) if cell not in taken]


# --- the judge --------------------------------------------------------------------------------------------------------


HOW_MANY = [112, pytest.param(500, marks=pytest.mark.slow)]


@pytest.mark.parametrize("count", HOW_MANY)
def test_every_drawn_scene_passes_also_under_noise(count):
    for request, scene, random in drawn(count):
        pixels = draw(scene)
        assert judge(request, pixels).correct, request.text
        assert judge(request, noisy(pixels, random)).correct, request.text


def changed(request: SceneRequest, scene: Scene, random: np.random.Generator):
    """(what was changed, scene) that no longer show what the request asks."""
    graph, figures = request.graph, list(scene.figures)
    pick = int(random.integers(len(figures)))
    one = figures[pick]

    def put(figure: Figure) -> Scene:
        return Scene((*figures[:pick], figure, *figures[pick + 1 :]))

    yield "missing", Scene((*figures[:pick], *figures[pick + 1 :]))
    another = Figure("x", str(random.choice(SHAPES)), str(random.choice(list(COLOURS))), free_cells(scene)[-1])
    yield "one too many", Scene((*figures, another))
    yield "its double", Scene((*figures, replace(one, cell=free_cells(scene)[0])))
    yield "another shape", put(replace(one, shape=str(random.choice([s for s in SHAPES if s != one.shape]))))
    if "colour" in graph[one.id].attributes:
        yield "another colour", put(replace(one, colour=str(random.choice([c for c in COLOURS if c != one.colour]))))
    if request.category in ("position", "color_attr"):
        a, b = figures
        yield "colours exchanged", Scene((replace(a, colour=b.colour), replace(b, colour=a.colour)))
    if request.category == "position":
        yield "places exchanged", Scene((replace(a, cell=b.cell), replace(b, cell=a.cell)))
        other = SceneGraph(graph.objects, (replace(graph.relations[0], kind=OPPOSITE[graph.relations[0].kind]),))
        yield "wrong side", sample_scene(other, random)
        across = {"left of": "above", "right of": "below", "above": "right of", "below": "left of"}
        turned = SceneGraph(graph.objects, (replace(graph.relations[0], kind=across[graph.relations[0].kind]),))
        scene = sample_scene(turned, random)
        (ar, ac), (br, bc) = (f.cell for f in scene.figures)
        near, far = sorted((abs(ar - br), abs(ac - bc)))
        if near * 2 <= far:  # nearer to a diagonal both are said rightly
            yield "wrong direction", scene


@pytest.mark.parametrize("count", HOW_MANY)
def test_every_scene_with_one_thing_changed_fails_also_under_noise(count):
    seen = set()
    for request, scene, random in drawn(count):
        for what, wrong in changed(request, scene, random):
            seen.add((request.category, what))
            verdict = judge(request, draw(wrong))
            assert not verdict.correct and verdict.faults, (request.text, what)
            assert not judge(request, noisy(draw(wrong), random)).correct, (request.text, what)
    assert len(seen) > 30 and {("position", "wrong side"), ("color_attr", "colours exchanged")} <= seen


def test_the_verdict_says_which_part_is_wrong():
    red, blue = Node("a", "circle", {"colour": "red"}), Node("b", "square", {"colour": "blue"})
    request = SceneRequest("r", "", "position", SceneGraph((red, blue), (Relation("a", "left of", "b"),)))

    def seen(*figures):
        return judge(request, draw(Scene(figures)))

    circle, square = Figure("a", "circle", "red", (1, 0)), Figure("b", "square", "blue", (1, 2))
    assert seen(circle, square).correct
    swapped = seen(replace(circle, colour="blue"), replace(square, colour="red"))
    assert swapped.present == {"a": True, "b": True} and swapped.attributes == {"a": False, "b": False}
    assert swapped.relations == (True,) and "the circle is blue, not red" in swapped.faults
    turned = seen(replace(circle, cell=(1, 3)), square)
    assert all(turned.attributes.values()) and turned.relations == (False,)
    assert turned.faults == ("the red circle is not left of the blue square",)
    alone = seen(circle)
    assert alone.present == {"a": True, "b": False} and alone.faults == ("a blue square is missing",)
    twice = seen(circle, square, replace(square, cell=(3, 3)))
    assert twice.counts == {"a": True, "b": False}
    assert seen(circle, square, Figure("c", "ring", "green", (3, 3))).faults == ("a green ring was not asked for",)


def test_smears_are_rejected():
    for request, scene, random in drawn(60):
        pixels = draw(scene)
        row, column = (8 * k for k in free_cells(scene)[0])
        smeared = pixels.copy()
        smeared[row + 1 : row + 6, column + 1 : column + 7] = random.integers(0, 200, (5, 6, 3))
        assert not judge(request, smeared).correct, request.text
        faded = (pixels * 0.3 + 255 * 0.7).astype(np.uint8)
        assert not judge(request, faded).correct, request.text
    mixed = ((draw(Scene((Figure("a", "ring", "red", (0, 0)),))).astype(int)
              + draw(Scene((Figure("a", "square", "blue", (0, 0)),)))) // 2).astype(np.uint8)  # fmt: skip
    assert look(mixed).figures == ()
    two_coloured = draw(Scene((Figure("a", "square", "red", (0, 0)),)))
    two_coloured[:4, :7] = COLOURS["green"]
    assert look(two_coloured).figures == ()


def test_soft_edges_and_small_shifts_are_read():
    scene = Scene(
        tuple(Figure("a", s, c, (i % 4, i // 2)) for i, (s, c) in enumerate(zip(SHAPES, COLOURS, strict=False)))
    )
    pixels = np.roll(draw(scene), (1, 1), (0, 1)).astype(np.float32)
    soft = 0.8 * pixels + 0.05 * sum(np.roll(pixels, k, axis) for k in (-1, 1) for axis in (0, 1))
    found = look(soft.round().astype(np.uint8)).figures
    assert sorted((f.name, f.attributes["colour"]) for f in found) == sorted((f.shape, f.colour) for f in scene.figures)


def test_a_picture_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"uint8 \[32, 32, 3\]"):
        look(np.zeros((31, 32, 3), np.uint8))


# --- requests ---------------------------------------------------------------------------------------------------------


def test_requests_are_the_same_by_seed_and_differ_by_seed():
    assert requests("train", 1, 60, EVERY) == requests("train", 1, 60, EVERY)
    assert [r.text for r in requests("train", 1, 60)] != [r.text for r in requests("train", 2, 60)]
    assert {r.category for r in requests("held_out", 0, 60)} == set(CATEGORIES)


def test_held_out_compositions_are_not_trained_on():
    train = [r.graph for seed in (0, 1) for r in requests("train", seed, 1500, EVERY)]
    held = [r.graph for r in requests("held_out", 0, 1500, CATEGORIES)]
    assert not {g.key for g in train} & {g.key for g in held}
    assert not {g.text() for g in train} & {g.text() for g in held}

    def pairs(graph):
        nodes = [(n.name, n.attributes.get("colour")) for n in graph.objects]
        return {frozenset(p) for p in itertools.combinations(nodes, 2) if all(c for _, c in p)}

    trained = set().union(*map(pairs, train))
    assert trained and not trained & set().union(*map(pairs, held))


def test_there_are_enough_different_held_out_requests_of_the_two_that_count():
    texts = {r.text for r in requests("held_out", 0, 600, ["position"])}
    assert len(texts) == 600
    assert len({r.text for r in requests("held_out", 0, 300, ["color_attr"])}) == 168


def test_binding_and_position_need_both_figures():
    for r in requests("train", 0, 400, ["position", "color_attr"]):
        a, b = r.graph.objects
        assert a.name != b.name and a.attributes["colour"] != b.attributes["colour"]
        assert len(r.graph.relations) == (r.category == "position")


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="split"):
        requests("test", 0, 1)
    with pytest.raises(ValueError, match="unknown categories"):
        requests("train", 0, 1, ["colours"])


# --- the graph --------------------------------------------------------------------------------------------------------


def test_a_graph_goes_through_json_and_reads_as_text():
    for r in requests("train", 5, 70, EVERY):
        assert SceneRequest.from_json(r.to_json()) == r and r.text == r.graph.text()
    graph = SceneGraph(
        (Node("a", "circle", {"colour": "red"}), Node("b", "orange"), Node("c", "cross", {"colour": "blue"}, 3)),
        (Relation("a", "left of", "b"), Relation("b", "above", "c")),
    )
    assert graph.text() == "a red circle left of an orange and the orange above three blue crosses"
    assert graph.count == 5 and graph.subgraph("ab").relations == (Relation("a", "left of", "b"),)


def test_the_key_is_the_same_from_either_side():
    a, b = Node("a", "circle"), Node("b", "square")
    turned = SceneGraph((Node("x", "square"), Node("y", "circle")), (Relation("x", "right of", "y"),))
    assert SceneGraph((a, b), (Relation("a", "left of", "b"),)).key == turned.key
    assert SceneGraph((a, b), (Relation("b", "left of", "a"),)).key != turned.key


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ({"objects": [{"id": "a", "name": "dog"}, {"id": "a", "name": "cat"}]}, "share the id a"),
        ({"objects": [{"id": "a", "name": ""}]}, "without name"),
        ({"objects": [{"id": "a", "name": "dog", "count": 0}]}, "count 0"),
        ({"objects": [{"id": "a", "name": "dog", "count": True}]}, "whole number"),
        ({"objects": [{"id": "a", "name": "dog", "colour": "red"}]}, "not colour"),
        ({"objects": "dog"}, "list of objects"),
        ({"objects": [], "relations": [{"subject": "a", "kind": "above", "object": "b"}]}, "no object"),
        ({"things": []}, "not things"),
        ([], "not list"),
    ],
)  # fmt: skip
def test_what_is_no_graph_is_refused(data, told):
    with pytest.raises(GraphError, match=told):
        SceneGraph.from_json(data)


def test_contradictory_relations_are_refused():
    nodes = tuple(Node(id, "dog") for id in "abc")
    SceneGraph(nodes, (Relation("a", "left of", "b"), Relation("a", "above", "b"))).validate()
    around = (Relation("a", "left of", "b"), Relation("b", "left of", "c"), Relation("a", "right of", "c"))
    with pytest.raises(GraphError, match="contradict"):
        SceneGraph(nodes, around).validate()
    with pytest.raises(GraphError, match="unknown relation"):
        SceneGraph(nodes, (Relation("a", "near", "b"),)).validate()


def test_found_objects_are_matched_to_what_asks_most_of_them():
    graph = SceneGraph((Node("any", "dog"), Node("red", "dog", {"colour": "red"})))
    red, blue = Found("dog", (0, 0, 9, 9), {"colour": "red"}), Found("dog", (20, 0, 29, 9), {"colour": "blue"})
    verdict = compare(graph, [red, blue])
    assert verdict.correct and verdict.matched == {"any": (blue,), "red": (red,)}
    assert compare(graph, [blue, blue]).attributes == {"any": True, "red": False}


def test_a_detector_may_see_more_than_was_asked():
    graph = SceneGraph((Node("a", "dog"),))
    dogs = [Found("dog", (k, 0, k + 9, 9)) for k in (0, 20)] + [Found("tree", (40, 0, 50, 9))]
    assert not compare(graph, dogs).correct and compare(graph, dogs, exact=False).correct
    assert not compare(SceneGraph((Node("a", "dog", count=3),)), dogs, exact=False).correct


def test_places_are_judged_where_a_graph_names_them():
    graph = SceneGraph((Node("a", "ring", {"place": "row 2 column 3"}),))
    assert strokes.judge_graph(graph, draw(Scene((Figure("a", "ring", "red", (1, 2)),)))).correct
    wrong = strokes.judge_graph(graph, draw(Scene((Figure("a", "ring", "red", (2, 2)),))))
    assert wrong.faults == ("the ring is at row 3 column 3, not at row 2 column 3",)
    assert graph.text() == "a ring at row 2 column 3"
