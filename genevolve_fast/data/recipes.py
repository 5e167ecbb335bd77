"""Recipes of requests: what a request shall put to the test, in closed vocabularies. The agent never sees one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, get_args

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from genevolve_fast.agent.knowledge import SKILLS

Family = Literal[
    "landmark_scene", "person_portrait", "event_poster", "product_shot", "artwork_homage", "emblem_design",
    "object_count", "signage_text", "spatial_arrangement", "material_study", "character_pose",
]  # fmt: skip
Evidence = Literal["nothing_missing", "fact_missing", "appearance_missing", "fact_and_appearance_missing"]
Anchor = Literal["no_anchor", "identity_anchor", "place_anchor", "style_anchor"]
Requirement = Literal[
    "spatial_layout", "aesthetic_drawing", "text_rendering", "creative_drawing", "anatomy_body_coherence",
    "attribute_binding", "physical_material_consistency", "quantity_counting",
]  # fmt: skip
Difficulty = Literal["easy", "medium", "hard"]
assert get_args(Requirement) == SKILLS

_UNANCHORED = ("nothing_missing", "no_anchor")
_WORDS = re.compile(r"\w+")


class Recipe(BaseModel):
    """What one request is built from. `withheld` are the facts that the agent has to find out."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str = Field(min_length=1, description="The request's id")
    family: Family = Field(description="What kind of picture")
    evidence: Evidence = Field(description="What the request does not say and a search can")
    anchor: Anchor = Field(description="What must look like itself")
    requirement: Requirement = Field(description="The skill that decides")
    difficulty: Difficulty
    subject: str = Field("", description="Whom or what the request names; requests of one subject stay in one split")
    withheld: tuple[str, ...] = Field((), description="Facts that the request must not give away")
    notes: str = Field("", description="Anything else for the writer")

    @property
    def cell(self) -> tuple[str, str, str]:
        """What coverage is counted by and splits are stratified by."""
        return self.family, self.difficulty, self.requirement

    @property
    def eval_type(self) -> str:
        return "Quality-Anchored" if self.evidence == "nothing_missing" else "Knowledge-Anchored"


# family -> (evidence and anchor that go together, the skills that can decide it)
_SENSIBLE: Mapping[str, tuple[Sequence[tuple[str, str]], Sequence[str]]] = {
    "landmark_scene": (
        [("appearance_missing", "place_anchor"), ("fact_and_appearance_missing", "place_anchor")],
        ["spatial_layout", "aesthetic_drawing", "physical_material_consistency"],
    ),
    "person_portrait": (
        [("appearance_missing", "identity_anchor"), ("fact_and_appearance_missing", "identity_anchor")],
        ["anatomy_body_coherence", "attribute_binding", "aesthetic_drawing"],
    ),
    "event_poster": (
        [("fact_missing", "no_anchor"), ("fact_and_appearance_missing", "identity_anchor")],
        ["text_rendering", "spatial_layout"],
    ),
    "product_shot": (
        [("appearance_missing", "identity_anchor")],
        ["physical_material_consistency", "attribute_binding", "aesthetic_drawing"],
    ),
    "artwork_homage": (
        [("appearance_missing", "style_anchor"), ("fact_and_appearance_missing", "style_anchor")],
        ["creative_drawing", "aesthetic_drawing"],
    ),
    "emblem_design": (
        [("appearance_missing", "identity_anchor"), ("fact_and_appearance_missing", "identity_anchor")],
        ["attribute_binding", "text_rendering"],
    ),
    "object_count": ([_UNANCHORED], ["quantity_counting"]),
    "signage_text": ([_UNANCHORED, ("fact_missing", "no_anchor")], ["text_rendering"]),
    "spatial_arrangement": ([_UNANCHORED], ["spatial_layout", "attribute_binding"]),
    "material_study": ([_UNANCHORED], ["physical_material_consistency", "creative_drawing"]),
    "character_pose": ([_UNANCHORED, ("appearance_missing", "identity_anchor")], ["anatomy_body_coherence"]),
}
assert set(_SENSIBLE) == set(get_args(Family))


def draw_recipes(count: int, seed: int) -> list[Recipe]:
    """`count` recipes over all sensible cells, each as often as every other (by one at most)."""
    random = np.random.default_rng((seed, 6))
    cells = [
        (family, requirement, difficulty)
        for family, (_, requirements) in _SENSIBLE.items()
        for requirement in requirements
        for difficulty in get_args(Difficulty)
    ]
    drawn: list[Recipe] = []
    while len(drawn) < count:
        for index in random.permutation(len(cells))[: count - len(drawn)]:
            family, requirement, difficulty = cells[index]
            pairs = _SENSIBLE[family][0]
            evidence, anchor = pairs[int(random.integers(len(pairs)))]
            drawn.append(
                Recipe(
                    id=f"pool-{seed}-{len(drawn):06d}",
                    family=family,
                    evidence=evidence,
                    anchor=anchor,
                    requirement=requirement,
                    difficulty=difficulty,
                )
            )
    return drawn


def given_away(recipe: Recipe, question: str) -> str:
    """What of its recipe a request gives away: a name of the vocabularies, its id, a withheld fact; empty: nothing."""
    text = f" {' '.join(_WORDS.findall(question.lower()))} "
    names = [recipe.family, recipe.evidence, recipe.anchor, recipe.requirement, recipe.id]
    for name in names:
        words = _WORDS.findall(name.lower())
        if len(name) > 5 and f" {' '.join(words)} " in text:
            return f"it names {name}"
    for fact in (*recipe.withheld, recipe.notes):
        words = _WORDS.findall(fact.lower())
        if words and f" {' '.join(words)} " in text:
            return f"it says {fact[:60]!r}"
    return ""


# --- coverage ---------------------------------------------------------------------------------------------------------


def coverage(recipes: Iterable[Recipe]) -> list[dict]:
    """Rows {family, requirement, easy, medium, hard, total} of the cells that occur, and their sum."""
    rows: dict[tuple[str, str], dict] = {}
    for recipe in recipes:
        key = recipe.family, recipe.requirement
        empty = {"family": key[0], "requirement": key[1], **dict.fromkeys(get_args(Difficulty), 0), "total": 0}
        row = rows.setdefault(key, empty)
        row[recipe.difficulty] += 1
        row["total"] += 1
    return [rows[key] for key in sorted(rows)]


def coverage_table(rows: Sequence[Mapping]) -> str:
    """`coverage` as text, with the sums of its columns."""
    columns = (*get_args(Difficulty), "total")
    sums = {name: sum(row[name] for row in rows) for name in columns}
    lines = [f"{'family':20} {'dominant requirement':30} " + " ".join(f"{name:>7}" for name in columns)]
    for row in [*rows, {"family": "all", "requirement": "", **sums}]:
        lines.append(f"{row['family']:20} {row['requirement']:30} " + " ".join(f"{row[name]:7}" for name in columns))
    return "\n".join(lines)


# --- splits -----------------------------------------------------------------------------------------------------------


def split_recipes(recipes: Sequence[Recipe], shares: Mapping[str, float], seed: int) -> dict[str, str]:
    """Split of each recipe id: every cell in the given shares, as near as whole subjects allow.

    Equal seed, equal splits. Recipes of one subject go together, so that no subject stands in two splits.
    """
    total = sum(shares.values())
    random = np.random.default_rng((seed, 7))
    groups: dict[str, list[Recipe]] = {}
    for recipe in recipes:
        groups.setdefault(f"subject/{recipe.subject.casefold()}" if recipe.subject else recipe.id, []).append(recipe)
    order = sorted(groups)
    random.shuffle(order)
    order.sort(key=lambda name: -len(groups[name]))
    wanted: dict[tuple, dict[str, float]] = {}
    for recipe in recipes:
        cell = wanted.setdefault(recipe.cell, dict.fromkeys(shares, 0.0))
        for name, share in shares.items():
            cell[name] += share / total
    lacking = {name: sum(cell[name] for cell in wanted.values()) for name in shares}
    of: dict[str, str] = {}
    for group in order:
        members = groups[group]

        def need(name: str, members=members) -> tuple[float, float]:
            """What the split lacks in these cells, a full cell counting against it; then what it lacks at all."""
            return sum(wanted[r.cell][name] for r in members), lacking[name]

        chosen = max(shares, key=need)
        for recipe in members:
            of[recipe.id] = chosen
            wanted[recipe.cell][chosen] -= 1
            lacking[chosen] -= 1
    return of
