"""Process data: states that grow without contradiction, three subsets whose every draft is judged, what is filtered."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from genevolve_fast.process.author import edit
from genevolve_fast.process.builders import (
    Attempt,
    Corrupter,
    ModelSampler,
    Rejected,
    image_alignment,
    instruction_conflict,
    multi_turn,
)
from genevolve_fast.process.scene_graph import Node, Relation, SceneGraph, SceneRequest
from genevolve_fast.process.states import contradictions, corruptions, increments, matching, mended, missing, rewrites
from genevolve_fast.process.trace import MAX_CYCLES, Plan
from genevolve_fast.sandbox.stroke_data import WORDS, place_box, placed, workshop
from genevolve_fast.sandbox.strokes import (
    CATEGORIES,
    COMPLEX,
    draw,
    judge_graph,
    meets_held_out_pair,
    parse,
    requests,
)
from genevolve_fast.trajectory import image_hash

MIX = (*CATEGORIES, COMPLEX, COMPLEX)
REQUESTS = requests("train", 11, 64, MIX)
SHOP = workshop()
FREE = workshop("held_out")  # with pairs that are held out of the training rows
RED, BLUE = Node("a", "circle", {"colour": "red"}), Node("b", "square", {"colour": "blue"})
PAIR = SceneGraph((RED, BLUE), (Relation("a", "left of", "b"),))
ASKED = SceneRequest("r", PAIR.text(), "position", PAIR)


def built(build, asked=REQUESTS):
    """(rows, rejections by reason)."""

    async def main():
        rows, why = [], Counter()
        for request in asked:
            try:
                rows.append(await build(request))
            except Rejected as rejected:
                why[rejected.reason] += 1
        return rows, why

    return asyncio.run(main())


def check_row(row, tell_places: bool = True) -> None:
    """Everything a row claims, judged again from its texts and pixels alone."""
    p, graphs = row.process.validate(), row.process.extra["graphs"]
    assert len(graphs) == len(p.cycles) and set(row.pixels) == set(p.drafts)
    assert all(image_hash(pixels) == sha for sha, pixels in row.pixels.items())
    for cycle, stored in zip(p.cycles, graphs, strict=True):
        told = parse(cycle.plan.description)
        assert told.key == SceneGraph.from_json(stored["plan"]).key
        assert ("row " in cycle.plan.description) == tell_places
        draft = judge_graph(told, row.pixels[cycle.draft])
        assert draft.correct == (not cycle.inspection.draft)
        if cycle.corrected:
            assert judge_graph(SceneGraph.from_json(stored["corrected"]), row.pixels[cycle.corrected]).correct
            assert "sketch" not in cycle.trained and {"inspect", "refine"} <= set(cycle.trained)
        assert ("plan" in cycle.trained) == (not cycle.inspection.plan)
    assert judge_graph(SceneGraph.from_json(p.extra["graph"]), row.pixels[p.result]).correct
    assert p.request.startswith(ASKED.text) or not meets_held_out_pair(parse(p.cycles[-1].plan.description))


# --- operations on graphs ---------------------------------------------------------------------------------------------


def test_increments_grow_without_contradiction_and_tell_relations_of_what_is_there():
    seen = Counter()
    for n, request in enumerate(requests("train", 1, 200, MIX)):
        states = increments(request.graph, np.random.default_rng(n), MAX_CYCLES)
        assert 1 <= len(states) <= MAX_CYCLES and states[-1].key == request.graph.key
        for before, after in itertools.pairwise(states):
            assert before.count < after.count and missing(before, after) and not contradictions(before, after)
        for state in states:
            state.validate()
            assert not contradictions(state, request.graph)
            there = {node.id for node in state.objects}
            assert set(state.relations) == {r for r in request.graph.relations if {r.subject, r.object} <= there}
        seen[len(states)] += 1
    assert len(seen) >= 4


@pytest.mark.parametrize(
    ("told", "fault"),
    [
        ("a red circle", None),
        ("a blue square", None),
        ("a circle", None),
        ("a blue square right of a red circle", None),
        ("a red circle above a blue square", None),
        ("a green circle", "the circle should be red, not green"),
        ("a blue circle and a red square", "the circle should be red, not blue"),
        ("a red circle and a blue ring", "the blue ring should be a blue square"),
        ("a red circle, a blue square and a green ring", "a green ring was not asked for"),
        ("two red circles", "there should be a red circle, not two red circles"),
        ("a red circle right of a blue square", "the red circle should be left of the blue square"),
        ("a blue square left of a red circle", "the blue square should be right of the red circle"),
        ("a red circle at row 1 column 4 and a blue square at row 1 column 1", "should be left of"),
    ],
)
def test_a_plan_is_held_against_the_request(told, fault):
    faults = contradictions(parse(told), PAIR, place_box)
    assert (not faults) if fault is None else any(fault in f for f in faults), faults


def test_every_corruption_is_seen_and_every_rewrite_is_another_scene():
    kinds = set()
    for n, request in enumerate(REQUESTS[:40]):
        random = np.random.default_rng(n)
        for change in corruptions(request.graph, random, WORDS):
            kinds.add(change.kind)
            wrong = contradictions(change.graph, request.graph)
            assert wrong or change.graph.key == request.graph.key, (request.text, change)
        for change in rewrites(request.graph, random, WORDS):
            kinds.add(change.kind)
            assert change.graph.validate().key != request.graph.key
    assert kinds == {
        "attribute",
        "object",
        "exchanged",
        "relation",
        "extra",
        "count",
        "modification",
        "swap",
        "removal",
    }


def test_what_is_right_of_a_wrong_plan_is_kept():
    plan = parse("a red circle at row 2 column 4 and a blue square at row 2 column 1")
    full, counts = mended(plan, PAIR, place_box)
    assert counts == {"a": 1, "b": 1} and full == PAIR  # both stand where they may not
    full, counts = mended(parse("a blue ring at row 2 column 3"), PAIR, place_box)
    assert counts == {"b": 1} and full["b"].attributes == {"colour": "blue", "place": "row 2 column 3"}
    assert matching(parse("a green cross"), PAIR) == {}


def test_edits_are_told():
    def told(before: str, after: str) -> str:
        return edit(parse(before), parse(after))

    assert told("a red circle", "a red circle left of a blue square") == "add a blue square right of the red circle"
    assert told("a red ring", "two red rings") == "add another red ring"
    assert told("a ring at row 1 column 1", "three rings at row 1 column 1, row 2 column 2 and row 3 column 3") == (
        "add two more rings at row 2 column 2 and row 3 column 3"
    )
    assert told("a red ring", "a red cross") == "change the red ring to a red cross"
    assert told("a ring at row 1 column 1", "a ring at row 2 column 1") == "move the ring to row 2 column 1"
    assert told("a ring and a cross", "a ring") == "remove the cross" and told("a ring", "a ring") == ""
    swapped = (
        "a ring at row 1 column 1 and a cross at row 2 column 2",
        "a ring at row 2 column 2 and a cross at row 1 column 1",
    )
    assert told(*swapped) == "swap the ring and the cross"


# --- the subsets ------------------------------------------------------------------------------------------------------


def test_multi_turn_rows_hold_what_they_claim():
    rows, why = built(lambda r: multi_turn(r, SHOP, 0))
    assert not why and len(rows) == len(REQUESTS)
    for row in rows:
        check_row(row)
        assert all(c.inspection.sound for c in row.process.cycles)
    cycles = [len(row.process.cycles) for row in rows]
    assert set(cycles) == {1, 2, 3, 4, 5} and 2.3 <= np.mean(cycles) <= 2.9
    kinds = Counter(row.process.extra.get("rewrite") for row in rows)
    assert {"modification", "swap", "removal"} <= set(kinds) and len(rows) / 3 < kinds[None] < len(rows) * 0.8


def test_a_rewritten_request_says_the_scene_and_what_is_done_to_it():
    (row,), _ = built(lambda r: multi_turn(r, FREE, 3, rewritten=True), [ASKED])
    p = row.process
    assert ", then " in p.request and p.extra["graph"] == PAIR.to_json() and p.extra["base"] != PAIR.to_json()
    before, after = (judge_graph(PAIR, row.pixels[c.draft]).correct for c in p.cycles[-2:])
    assert (before, after) == (False, True)


def test_instruction_conflicts_are_found_and_mended_and_the_wrong_plan_is_not_learned():
    corrupter = Corrupter(SHOP)
    rows, why = built(lambda r: instruction_conflict(r, SHOP, 0, corrupter))
    assert len(rows) > 0.9 * len(REQUESTS), why
    for row in rows:
        check_row(row)
        graph = SceneGraph.from_json(row.process.extra["graph"])
        (wrong,) = [c for c in row.process.cycles if c.inspection.plan]
        assert wrong.trained == ("inspect", "refine") and not wrong.inspection.draft
        assert contradictions(parse(wrong.plan.description), graph, place_box)
        assert not judge_graph(graph, row.pixels[wrong.draft]).correct
        for cycle in row.process.cycles:
            assert cycle is wrong or not contradictions(parse(cycle.plan.description), graph, place_box)


def test_image_alignment_has_reasons_for_right_drafts_and_faults_of_wrong_ones():
    rows, why = built(lambda r: image_alignment(r, SHOP, 0, negative=int(r.id[-1]) % 2 == 0))
    assert not why
    faults = Counter()
    for row in rows:
        check_row(row)
        wrong = [c for c in row.process.cycles if not c.inspection.sound]
        faults[row.process.extra.get("fault")] += 1
        assert len(wrong) == ("fault" in row.process.extra)
        assert all(c.inspection.draft and not c.inspection.plan and c.correction.text for c in wrong)
        for cycle in row.process.cycles:
            assert cycle.inspection.reason.startswith("the picture shows ") or not cycle.inspection.sound
    assert faults[None] == len(rows) / 2 and {"count", "extra", "object", "missing", "attribute"} <= set(faults)


def test_plans_need_not_tell_places():
    shop = workshop(tell_places=False)
    for build in (
        lambda r: multi_turn(r, shop, 1),
        lambda r: instruction_conflict(r, shop, 1, Corrupter(shop)),
        lambda r: image_alignment(r, shop, 1, negative=True),
    ):
        rows, _ = built(build, REQUESTS[:24])
        assert len(rows) >= 20
        for row in rows:
            check_row(row, tell_places=False)


def test_the_same_seed_builds_the_same_row():
    def rows(seed):
        return [r.process.to_row() for r in built(lambda r: multi_turn(r, SHOP, seed), REQUESTS[:10])[0]]

    assert rows(4) == rows(4) != rows(5)


# --- what is filtered -------------------------------------------------------------------------------------------------


class ClumsyPainter:
    """Paints one figure of every scene in another colour."""

    async def layout(self, graph, seed):
        return await SHOP.painter.layout(graph, seed)

    async def paint(self, graph, text, before, seed):
        scene = placed(graph)
        first = scene.figures[0]
        other = replace(first, colour="black" if first.colour != "black" else "red")
        return draw(replace(scene, figures=(other, *scene.figures[1:])))


def test_drafts_that_contradict_their_plan_are_filtered():
    rows, why = built(lambda r: multi_turn(r, replace(SHOP, painter=ClumsyPainter()), 0), REQUESTS[:20])
    assert not rows and why == {"draft contradicts plan": 20}


def test_corrections_that_do_not_mend_are_filtered():
    class Stubborn(ClumsyPainter):
        async def paint(self, graph, text, before, seed):
            return before if before is not None else draw(placed(graph))

    rows, why = built(lambda r: image_alignment(r, replace(FREE, painter=Stubborn()), 0, True), [ASKED])
    assert not rows and set(why) <= {"correction does not mend", "draft contradicts plan", "nothing to corrupt"} and why


def test_plans_that_say_something_else_are_filtered():
    class Forgetful(type(SHOP.author)):
        async def plan(self, request, before, after):
            return Plan("add something", "a black cross at row 1 column 1")

    rows, why = built(lambda r: multi_turn(r, replace(SHOP, author=Forgetful()), 0), REQUESTS[:8])
    assert not rows and why == {"plan says something else": 8}


def model(*cycles: tuple[str, str]):
    """A model that samples these cycles: (description of its plan, what it draws)."""

    def sample(text: str, seed: int):
        assert text == ASKED.text
        return [Attempt(Plan("draw", plan), draw(placed(parse(drawn))) if drawn else None) for plan, drawn in cycles]

    return ModelSampler(sample)


def conflict(*cycles):
    return built(lambda r: instruction_conflict(r, FREE, 0, model(*cycles)), [ASKED])


FIRST = "a red circle at row 2 column 1"
GOOD = "a red circle at row 2 column 1 left of a blue square at row 2 column 3"
WRONG = "a red circle at row 2 column 1 left of a green square at row 2 column 3"


def test_a_models_own_wrong_plan_is_mended_and_its_good_drafts_are_kept():
    (row,), _ = conflict((FIRST, FIRST), (WRONG, WRONG))
    check_row(row)
    first, second = row.process.cycles
    assert np.array_equal(row.pixels[first.draft], draw(placed(parse(FIRST)))) and first.inspection.sound
    assert np.array_equal(row.pixels[second.draft], draw(placed(parse(WRONG))))
    assert second.inspection.plan == "the square should be blue, not green"
    assert second.correction.text == "change the green square to a blue square"
    assert np.array_equal(row.pixels[second.corrected], draw(placed(parse(GOOD))))
    assert row.process.extra["source"] == "ModelSampler"


def test_a_models_trace_is_completed_after_its_fault():
    (row,), _ = conflict(("a green circle at row 2 column 1", None))
    check_row(row)
    assert len(row.process.cycles) == 2 and "blue square" in row.process.cycles[1].plan.instruction


def test_traces_without_conflict_and_unreadable_ones_are_filtered():
    assert conflict((FIRST, FIRST), (GOOD, GOOD))[1] == {"no conflict in the trace": 1}
    assert conflict(("a thing of beauty", None))[1] == {"unreadable plan": 1}


def test_a_models_own_wrong_draft_becomes_a_negative():
    def build(*cycles):
        return built(lambda r: image_alignment(r, FREE, 0, True, model(*cycles)), [ASKED])

    (row,), _ = build((FIRST, FIRST), (GOOD, WRONG))
    check_row(row)
    assert row.process.cycles[1].inspection.draft == "the square is green, not blue"
    assert build((FIRST, FIRST), (GOOD, GOOD))[1] == {"no wrong draft in the trace": 1}
    assert build((WRONG, WRONG))[1] == {"plan contradicts request": 1}
