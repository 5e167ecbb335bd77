"""What the builders of process data need, over the world of strokes: all is known, nothing is asked."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from genevolve_fast.process.author import GraphAuthor
from genevolve_fast.process.builders import Immediate, Workshop
from genevolve_fast.process.scene_graph import PLACE, SceneGraph, listed, places
from genevolve_fast.process.states import Vocabulary
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
    meets_held_out_pair,
    parse,
    place_cell,
    sample_scene,
)

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
