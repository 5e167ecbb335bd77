"""What the builders of process data need, over the world of strokes: all is known, nothing is asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from genevolve_fast.process.author import GraphAuthor
from genevolve_fast.process.builders import Immediate, Workshop
from genevolve_fast.process.scene_graph import PLACE, SceneGraph, listed, places
from genevolve_fast.process.states import Vocabulary, without_places
from genevolve_fast.protocols import RenderError
from genevolve_fast.sandbox.strokes import (
    CELL,
    COLOURS,
    SHAPES,
    Figure,
    PixelJudge,
    Scene,
    Split,
    UnreadableText,
    draw,
    judge_graph,
    meets_held_out_pair,
    parse,
    place_cell,
    sample_scene,
)
from genevolve_fast.trajectory import Program

WORDS = Vocabulary(SHAPES, {"colour": tuple(COLOURS)})


def place_box(place: str) -> tuple[float, float, float, float]:
    """The pixels of a figure in a cell."""
    row, column = place_cell(place)
    return column * CELL, row * CELL, column * CELL + 7, row * CELL + 7


class StrokePainter:
    """process.builders.Painter. Chooses colours and cells beforehand, so that a state is one picture only."""

    def __init__(self, split: Split = "train") -> None:
        self._split = split

    async def layout(self, graph: SceneGraph, seed: int) -> SceneGraph:
        """Raises UnreadableText where the figures find no room."""
        random = np.random.default_rng(seed)
        for _ in range(20):
            try:
                scene = sample_scene(graph, random)
            except ValueError as error:
                raise UnreadableText(str(error)) from None
            laid = _laid(graph, scene)
            if self._split != "train" or not meets_held_out_pair(laid) or meets_held_out_pair(graph):
                break
        return laid

    async def paint(self, graph: SceneGraph, text: str, before: np.ndarray | None, seed: int) -> np.ndarray:
        return draw(placed(graph))


class StrokeReader:
    async def read(self, text: str) -> SceneGraph:
        """Raises UnreadableText."""
        return parse(text)


def placed(graph: SceneGraph) -> Scene:
    """The scene of a graph that tells every colour and place."""
    return Scene(
        tuple(
            Figure(n.id, n.name, n.attributes["colour"], place_cell(spot))
            for n in graph.objects
            for spot in places(n.attributes[PLACE])
        )
    )


def _laid(graph: SceneGraph, scene: Scene) -> SceneGraph:
    nodes = []
    for node in graph.objects:
        mine = [f for f in scene.figures if f.id == node.id]
        known = {"colour": mine[0].colour, PLACE: listed(f.place for f in mine)}
        nodes.append(replace(node, attributes=known | dict(node.attributes)))
    return replace(graph, objects=tuple(nodes))


def workshop(split: Split = "train", tell_places: bool = True) -> Workshop:
    """tell_places: plans say in which cell every figure stands."""
    return Workshop(
        author=GraphAuthor(),
        reader=StrokeReader(),
        painter=StrokePainter(split),
        judge=Immediate(PixelJudge()),
        words=WORDS,
        where=place_box,
        allowed=lambda graph: split != "train" or not meets_held_out_pair(graph),
        tell_places=tell_places,
    )


class StrokeRenderer:
    """protocols.Renderer: draws the scene that a prompt's last line tells, what a reference shows of it where it is."""

    name = "strokes"
    min_references = 0
    max_references = 1

    async def render(self, program: Program, references: Sequence[np.ndarray], seed: int) -> np.ndarray:
        """uint8 [32, 32, 3]. Raises RenderError for a prompt that tells no scene."""
        line = program.gen_prompt.strip().splitlines()[-1]
        try:
            graph = parse(line.removeprefix("The whole scene then: "))
            if references:
                graph = _where_seen(graph, references[0])
            return draw(_sampled(graph, seed))
        except ValueError as error:
            raise RenderError(f"the prompt cannot be drawn: {error}", "bad_arguments") from None


def _where_seen(graph: SceneGraph, picture: np.ndarray) -> SceneGraph:
    seen = judge_graph(without_places(graph), picture)
    nodes = []
    for node in graph.objects:
        spots = [f.attributes[PLACE] for f in seen.matched[node.id]][: node.count]
        known = {PLACE: listed(spots)} if spots and PLACE not in node.attributes else {}
        nodes.append(replace(node, attributes={**node.attributes, **known}))
    return replace(graph, objects=tuple(nodes))


def _sampled(graph: SceneGraph, seed: int) -> Scene:
    random = np.random.default_rng(seed)
    try:
        return sample_scene(graph, random)
    except ValueError:  # what stands where it is leaves no room for the rest
        return sample_scene(without_places(graph), random)
