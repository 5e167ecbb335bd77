"""Compositional scores with intervals, and what drafts keep of the drafts before them."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest

from genevolve_fast.process.builders import Corrupter, instruction_conflict, multi_turn
from genevolve_fast.process.compositional import (
    CATEGORIES,
    Score,
    Step,
    by_category,
    changed_outside,
    consistency,
    difference_of,
    kept_along,
    paired_differences,
    parts,
    score,
    score_table,
    steps_of,
)
from genevolve_fast.process.verdict import compare
from genevolve_fast.sandbox import strokes
from genevolve_fast.sandbox.stroke_data import place_box, placed, workshop
from genevolve_fast.sandbox.strokes import PixelJudge, draw, parse, requests, sample_scene

JUDGE = PixelJudge()
RIGHT, WRONG = (
    compare(parse("a ring"), found)
    for found in (strokes.look(draw(placed(parse("a red ring at row 1 column 1")))).figures, [])
)


def pictures(asked, spoil=lambda n, scene: scene):
    out = {}
    for n, r in enumerate(asked):
        out[r.id] = draw(spoil(n, sample_scene(r.graph, np.random.default_rng(n))))
    return out


def test_categories_are_scored_and_the_overall_score_is_their_mean():
    asked = requests("held_out", 0, 60)
    assert CATEGORIES == strokes.CATEGORIES

    def blank_every_other(n, scene):
        return replace(scene, figures=()) if n % 6 == 4 and n % 12 == 4 else scene  # position, every other one

    shares = by_category(score(asked, pictures(asked, blank_every_other), JUDGE))
    assert list(shares) == [*CATEGORIES, "overall"]
    assert shares["position"].value == 0.5 and shares["position"].low < 0.3 and shares["position"].high > 0.7
    assert all(shares[c].value == shares[c].low == 1 for c in CATEGORIES if c != "position")
    assert shares["overall"].value == pytest.approx(5.5 / 6) and shares["overall"].n == 60
    with pytest.raises(ValueError, match="have no picture"):
        score(asked, {}, JUDGE)


def test_parts_say_what_is_right_of_wrong_pictures():
    asked = requests("train", 0, 40, ["color_attr"])

    def exchange(n, scene):
        a, b = scene.figures
        return replace(scene, figures=(replace(a, colour=b.colour), replace(b, colour=a.colour)))

    found = parts(score(asked, pictures(asked, exchange), JUDGE))
    assert found == {"objects": 1, "counts": 1, "attributes": 0, "clean": 1, "nothing surplus": 1}


def scores(right: dict[str, bool], category: str = "position") -> list[Score]:
    return [Score(id, category, RIGHT if ok else WRONG) for id, ok in right.items()]


def test_differences_are_paired_by_request_and_count_requests_not_pictures():
    before = scores({f"r{n}": n % 2 == 0 for n in range(100)})
    after = scores({f"r{n}": n % 2 == 0 or n < 40 for n in range(100)})
    gain = paired_differences(before, list(reversed(after)))
    assert gain["position"].value == gain["overall"].value == 0.2 and gain["position"].n == 100
    assert 0.1 < gain["position"].low < 0.2 < gain["position"].high < 0.3
    thrice = paired_differences(before * 3, after * 3)
    assert thrice["position"].n == 100 and thrice["position"].low == gain["position"].low
    assert paired_differences(before, before)["position"].high == 0
    with pytest.raises(ValueError, match="the same requests"):
        paired_differences(before, after[1:])
    with pytest.raises(ValueError, match="no scores"):
        paired_differences([], [])
    assert difference_of([1.0, 0.0, 0.0, 1.0]).value == 0.5


def test_the_table_has_a_row_a_category():
    shares = by_category(scores({"a": True}) + scores({"b": False}, "color_attr"))
    table = score_table({"one pass": shares, "process": shares})
    assert "| position | 1.000 [1.000, 1.000], n 1 |" in table and table.splitlines()[-1].startswith(
        "| overall | 0.500"
    )


# --- from draft to draft ----------------------------------------------------------------------------------------------


def step(told: str, shown: str | None = None) -> Step:
    return Step(parse(told), draw(placed(parse(shown or told))))


ONE = "a red circle at row 1 column 1"
TWO = f"{ONE} and a blue square at row 3 column 3"


def test_a_planned_addition_changes_nothing_outside_its_place():
    (kept,) = kept_along([step(ONE), step(TWO)], JUDGE)
    assert kept.changed_outside == 0 and kept.at_stake == 1 and kept.forgotten == ()


def test_what_moves_or_appears_unplanned_counts_as_changed_outside():
    moved = TWO.replace("row 1 column 1", "row 1 column 3")
    (kept,) = kept_along([step("a red circle", ONE), step("a red circle and a blue square", moved)], JUDGE)
    circle = int(strokes.figure_mask("circle").sum())
    region = 9 * 9  # of the square, one pixel wider all round
    assert kept.changed_outside == pytest.approx(2 * circle / (32 * 32 - region)) and kept.forgotten == ()
    (kept,) = kept_along([step(ONE), step(TWO, moved)], JUDGE, where=place_box)
    assert kept.forgotten == (ONE,) and kept.changed_outside > 0


def test_objects_once_right_that_became_wrong_are_forgotten():
    lost = "a blue square at row 3 column 3"
    (kept,) = kept_along([step(ONE), step(TWO, lost)], JUDGE)
    assert kept.at_stake == 1 and kept.forgotten == (ONE,)
    green = TWO.replace("red", "green")
    (kept,) = kept_along([step(ONE), step(TWO, green)], JUDGE)
    assert kept.forgotten == (ONE,)
    (kept,) = kept_along([step(ONE), step(green)], JUDGE)  # planned: no longer asked for
    assert kept.at_stake == 0 and kept.forgotten == () and kept.changed_outside == 0
    (kept,) = kept_along([step(ONE, lost), step(TWO, lost)], JUDGE)  # never was right
    assert kept.at_stake == 0


def test_of_a_growing_group_only_the_new_one_is_planned():
    two = "two red rings at row 1 column 1 and row 3 column 1"
    three = "three red rings at row 1 column 1, row 3 column 1 and row 3 column 3"
    one_moved = three.replace("row 1 column 1", "row 1 column 3")
    for where in (None, place_box):
        (kept,) = kept_along([step(two), step(three)], JUDGE, where=where)
        assert kept.changed_outside == 0 and kept.at_stake == 1 and not kept.forgotten
    (kept,) = kept_along([step(two), step(three, one_moved)], JUDGE, where=place_box)
    assert kept.changed_outside > 0 and kept.forgotten == (two,)


def test_built_rows_forget_nothing_and_change_nothing_else():
    shop = workshop()

    async def rows():
        out = []
        for r in requests("train", 2, 16, ["position", "counting", "complex"]):
            out.append(await multi_turn(r, shop, 0, rewritten=False))
            out.append(await instruction_conflict(r, shop, 0, Corrupter(shop)))
        return out

    steps = [steps_of(row.process, row.pixels) for row in asyncio.run(rows())[::2]]
    found = consistency(steps, JUDGE, where=place_box)
    assert found.changed_outside == 0 and found.forgotten == 0 and found.steps > 20 and found.at_stake > 20
    spoilt = [[*steps_[:-1], replace(steps_[-1], pixels=draw(strokes.Scene()))] for steps_ in steps if len(steps_) > 1]
    found = consistency(spoilt, JUDGE, where=place_box)
    assert found.forgotten > 0.3 and found.changed_outside > 0
    assert consistency([], JUDGE).changed_outside is None


def test_noise_is_no_change_and_sizes_must_agree():
    blank = np.full((32, 32, 3), 240, np.uint8)
    nowhere = np.zeros((32, 32), bool)
    noise = np.random.default_rng(0).integers(0, 12, blank.shape).astype(np.uint8)
    assert changed_outside(blank, blank + noise, nowhere) == 0
    assert changed_outside(blank, np.zeros_like(blank), nowhere) == 1
    assert changed_outside(blank, np.zeros_like(blank), ~nowhere) == 0
    with pytest.raises(ValueError, match="different sizes"):
        changed_outside(blank, blank[:16], nowhere)
