"""The vocabulary of the sandbox: a 96 x 96 picture is a background and items in the nine cells of a 3 x 3 grid."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

IMAGE_SIZE = 96
CELL_SIZE = 32

PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (206, 44, 49),
    "orange": (240, 138, 36),
    "yellow": (250, 214, 60),
    "green": (48, 150, 84),
    "blue": (42, 98, 196),
    "purple": (128, 66, 168),
    "black": (28, 28, 32),
    "white": (246, 246, 242),
}
SHAPES = ("circle", "square", "triangle", "star", "diamond", "ring")
EMBLEMS = (
    "anchor",
    "arrow",
    "chevron",
    "cross",
    "crown",
    "crescent",
    "key",
    "leaf",
    "sun",
    "tower",
    "wave",
    "hourglass",
)
CELLS: dict[str, tuple[int, int]] = {  # name -> (row, column)
    "top left": (0, 0),
    "top center": (0, 1),
    "top right": (0, 2),
    "middle left": (1, 0),
    "center": (1, 1),
    "middle right": (1, 2),
    "bottom left": (2, 0),
    "bottom center": (2, 1),
    "bottom right": (2, 2),
}

Kind = Literal["object", "text", "emblem"]


@dataclass(frozen=True)
class Item:
    """One thing in one cell. `value` is the shape, the text (upper case, at most four letters) or the emblem."""

    kind: Kind
    value: str
    cell: str
    colour: str = "black"  # texts are drawn in black or white, whichever the background lets one read


@dataclass(frozen=True)
class Scene:
    """What a picture should show. A request's checklist is its scene: `request.extra["checklist"]`."""

    background: str
    items: tuple[Item, ...] = ()

    @property
    def texts(self) -> tuple[Item, ...]:
        return tuple(i for i in self.items if i.kind == "text")

    def to_json(self) -> dict[str, Any]:
        return {"background": self.background, "items": [asdict(i) for i in self.items]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Scene:
        return cls(data["background"], tuple(Item(**i) for i in data["items"]))


def cell_box(cell: str) -> tuple[int, int, int, int]:
    """Pixel box (left, top, right, bottom) of a cell, right and bottom exclusive."""
    row, column = CELLS[cell]
    return column * CELL_SIZE, row * CELL_SIZE, (column + 1) * CELL_SIZE, (row + 1) * CELL_SIZE
