"""The sandbox's templates as recipes: what each puts to the test, in the prompt pool's vocabularies."""

from __future__ import annotations

from genevolve_fast.data.pool import Item
from genevolve_fast.data.recipes import Recipe
from genevolve_fast.sandbox.world import SandboxWorld
from genevolve_fast.trajectory import Request

_TEMPLATES = {  # family, evidence, anchor, requirement
    "emblem_field": ("emblem_design", "fact_and_appearance_missing", "identity_anchor", "attribute_binding"),
    "emblem_motto": ("emblem_design", "fact_and_appearance_missing", "identity_anchor", "text_rendering"),
    "count_row": ("object_count", "nothing_missing", "no_anchor", "quantity_counting"),
    "text_sign": ("signage_text", "nothing_missing", "no_anchor", "text_rendering"),
    "relation": ("spatial_arrangement", "nothing_missing", "no_anchor", "spatial_layout"),
}


def recipe_of(world: SandboxWorld, request: Request) -> Recipe:
    family, evidence, anchor, requirement = _TEMPLATES[request.category]
    name = request.extra["entity"]
    entity = next((e for e in world.all_entities if e.name == name), None)
    fact = None
    if entity:
        motto = request.category == "emblem_motto"
        what, value = ("motto", entity.motto) if motto else ("field", entity.field)
        fact = f"The {what} of {name} is {value}."
    return Recipe(
        id=request.id,
        family=family,
        evidence=evidence,
        anchor=anchor,
        requirement=requirement,
        difficulty=request.difficulty,
        subject=name,
        withheld=(fact, f"{name} shows a {entity.emblem_colour} {entity.emblem}.") if fact else (),
    )


def sandbox_items(world: SandboxWorld, count: int, seed: int) -> list[Item]:
    """`count` requests of the world's training templates with their recipes."""
    return [Item(recipe_of(world, r), r) for r in world.requests("train", count, seed=seed)]
