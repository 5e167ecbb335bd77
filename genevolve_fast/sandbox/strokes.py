"""A world for strokes: 32 x 32 pictures of flat figures in a 4 x 4 grid, requests with known graphs, pixel judges."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

import numpy as np

from genevolve_fast.process.scene_graph import (
    NUMBERS,
    PLACE,
    GraphError,
    Node,
    Relation,
    SceneGraph,
    SceneRequest,
    places,
    plural,
)
from genevolve_fast.process.verdict import Found, Verdict, compare

SIZE = 32
CELL = 8
GRID = SIZE // CELL
BACKGROUND = (255, 255, 255)
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 40),
    "yellow": (250, 215, 30),
    "green": (30, 150, 60),
    "cyan": (40, 200, 230),
    "blue": (30, 70, 220),
    "purple": (150, 40, 180),
    "black": (20, 20, 20),
}
_FIGURES = {
    "circle": ("..###..", ".#####.", "#######", "#######", "#######", ".#####.", "..###.."),
    "square": ("#######",) * 7,
    "triangle": ("...#...", "...#...", "..###..", "..###..", ".#####.", ".#####.", "#######"),
    "ring": ("..###..", ".#####.", "##...##", "##...##", "##...##", ".#####.", "..###.."),
    "cross": ("##...##", "###.###", ".#####.", "..###..", ".#####.", "###.###", "##...##"),
}
SHAPES = tuple(_FIGURES)
CATEGORIES = ("single_object", "two_object", "counting", "colors", "position", "color_attr")  # as GenEval names them
COMPLEX = "complex"  # three or four kinds of objects and relations; for training, GenEval has none
COUNTS = (2, 3, 4)
Split = Literal["train", "held_out"]
Cell = tuple[int, int]  # row, column

_HELD_OUT_ONE_IN = 5


# --- scenes -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Figure:
    """A figure in a cell; `id` is the object of the graph that it belongs to."""

    id: str
    shape: str
    colour: str
    cell: Cell

    @property
    def place(self) -> str:
        return place_name(self.cell)


@dataclass(frozen=True)
class Scene:
    figures: tuple[Figure, ...] = ()


def place_name(cell: Cell) -> str:
    """`row 1 column 4` is the upper right corner."""
    return f"row {cell[0] + 1} column {cell[1] + 1}"


_CELLS = {place_name((r, c)): (r, c) for r in range(GRID) for c in range(GRID)}


def place_cell(place: str) -> Cell:
    """Raises KeyError for what is no place."""
    return _CELLS[place]


def figure_mask(shape: str) -> np.ndarray:
    """bool [7, 7]."""
    return np.array([[c == "#" for c in line] for line in _FIGURES[shape]])


def draw(scene: Scene) -> np.ndarray:
    """uint8 [32, 32, 3]: every figure in the upper left 7 x 7 pixels of its cell, so that no two touch."""
    pixels = np.full((SIZE, SIZE, 3), BACKGROUND, dtype=np.uint8)
    for f in scene.figures:
        mask = figure_mask(f.shape)
        top, left = f.cell[0] * CELL, f.cell[1] * CELL
        pixels[top : top + 7, left : left + 7][mask] = COLOURS[f.colour]
    return pixels


def sample_scene(graph: SceneGraph, random: np.random.Generator) -> Scene:
    """Figures in cells so that `graph` holds; what it leaves open is drawn by lot, for a group once.

    Figures share no edge of their cells where there is room. Raises ValueError where no placing was found.
    """
    chosen = [(n, n.attributes.get("colour") or str(random.choice(list(COLOURS)))) for n in graph.objects]
    if unknown := [s for n in graph.objects for s in places(n.attributes.get(PLACE, "")) if s and s not in _CELLS]:
        raise ValueError(f"no such place: {', '.join(unknown)}")
    attempts = 1 if all(PLACE in n.attributes for n in graph.objects) else 40
    for spread in (True, False):
        for _ in range(attempts):
            cells = _place(graph, random, spread)
            if cells is not None:
                return Scene(tuple(Figure(n.id, n.name, c, cell) for n, c in chosen for cell in cells[n.id]))
    raise ValueError(f"no placing found for {graph.text()!r}")


def _place(graph: SceneGraph, random: np.random.Generator, spread: bool) -> dict[str, list[Cell]] | None:
    """Cells of every object; those whose place is told come first, and may share an edge."""
    free = set(_CELLS.values())
    cells: dict[str, list[Cell]] = {}
    for node in sorted(graph.objects, key=lambda n: PLACE not in n.attributes):
        told = [_CELLS[spot] for spot in places(node.attributes.get(PLACE, "")) if spot]
        cells[node.id] = []
        for n in range(node.count):
            fitting = sorted(c for c in (told[n : n + 1] if told else free) if _fits(graph, node, c, cells))
            if not fitting or (told and fitting[0] in _taken(cells)):
                return None
            cell = fitting[int(random.integers(len(fitting)))]
            cells[node.id].append(cell)
            r, c = cell
            free -= {cell, *({(r - 1, c), (r + 1, c), (r, c - 1), (r, c + 1)} if spread else ())}
    return cells


def _taken(cells: Mapping[str, list[Cell]]) -> set[Cell]:
    return {cell for mine in cells.values() for cell in mine}


def _fits(graph: SceneGraph, node: Node, cell: Cell, cells: Mapping[str, list[Cell]]) -> bool:
    for r in graph.relations:
        if node.id not in (r.subject, r.object) or not (r.subject in cells and r.object in cells):
            continue
        ends = {id: [cell] if id == node.id else cells[id] for id in (r.subject, r.object)}
        if not all(_plainly(r, a, b) for a in ends[r.subject] for b in ends[r.object]):
            return False
    return True


def _plainly(relation: Relation, a: Cell, b: Cell) -> bool:
    """Stricter than the judge: further in the relation's direction than across it."""
    down, right = a[0] - b[0], a[1] - b[1]
    along, across = (right, down) if relation.kind in ("left of", "right of") else (down, right)
    return (along if relation.kind in ("right of", "below") else -along) > abs(across)


# --- words ------------------------------------------------------------------------------------------------------------

_COUNTED = {w: n for n, w in enumerate(NUMBERS) if n} | {"an": 1}
_NAMED = {s: s for s in SHAPES} | {plural(s): s for s in SHAPES}
_PLACES = r"row [1-4] column [1-4]"
_PHRASE = re.compile(
    rf"(?P<count>the|{'|'.join(_COUNTED)}) (?:(?P<colour>{'|'.join(COLOURS)}) )?(?P<name>{'|'.join(_NAMED)})\b"
    rf"(?: at (?P<place>{_PLACES}(?:(?:, | and ){_PLACES})*))?"
)
_JOINT = re.compile(r" (left of|right of|above|below) |, | and ")


class UnreadableText(GraphError):
    """A text is not in the words in which graphs are told."""


def parse(text: str) -> SceneGraph:
    """The graph that a text in the words of `SceneGraph.text` tells. Raises UnreadableText."""
    nodes: list[Node] = []
    relations: list[Relation] = []
    text, at, kind, before = text.strip().rstrip("."), 0, None, ""
    while True:
        match = _PHRASE.match(text, at)
        if not match:
            raise UnreadableText(f"this tells no figure: {text[at : at + 60]!r}")
        id = _told(match, nodes)
        if kind:
            relations.append(Relation(before, kind, id))
        if match.end() == len(text):
            break
        joint = _JOINT.match(text, match.end())
        if not joint:
            raise UnreadableText(f"no words of a scene: {text[match.end() : match.end() + 60]!r}")
        at, kind, before = joint.end(), joint[1], id
    try:
        return SceneGraph(tuple(nodes), tuple(relations)).validate()
    except GraphError as error:
        raise UnreadableText(str(error)) from None


def _told(match: re.Match[str], nodes: list[Node]) -> str:
    """The id of a figure told, a new one unless it is `the` one told before."""
    attributes = {k: match[k] for k in ("colour", PLACE) if match[k]}
    name, word = _NAMED[match["name"]], match["count"]
    plain = {k: v for k, v in attributes.items() if k != PLACE}
    if word == "the":
        for node in nodes:
            if (
                node.name == name
                and plain.items() <= node.attributes.items()
                and (node.count > 1) == (name != match["name"])
            ):
                return node.id
        raise UnreadableText(f"{match[0]!r} was not told before")
    count = _COUNTED[word]
    if (count > 1) != (match["name"] != name) or (PLACE in attributes and len(places(attributes[PLACE])) != count):
        raise UnreadableText(f"{match[0]!r} does not agree in number")
    nodes.append(Node(chr(ord("a") + len(nodes)), name, attributes, count))
    return nodes[-1].id


# --- requests ---------------------------------------------------------------------------------------------------------


def requests(split: Split, seed: int, count: int, categories: Sequence[str] = CATEGORIES) -> list[SceneRequest]:
    """`count` requests, the categories in turn, the same for the same arguments.

    A category repeats none before all of its requests of the split were given once. No held-out composition is
    among the training requests, and no two coloured figures of a held-out pair meet in any of them.
    """
    if split not in ("train", "held_out"):
        raise ValueError(f"split must be train or held_out, not {split!r}")
    if unknown := set(categories) - {*CATEGORIES, COMPLEX}:
        raise ValueError(f"unknown categories {sorted(unknown)}; they are {', '.join((*CATEGORIES, COMPLEX))}")
    if not categories:
        raise ValueError("no category is asked for")
    streams = {c: _stream(split, seed, c) for c in categories}
    out = []
    for n, category in zip(range(count), itertools.cycle(categories), strict=False):
        graph = next(streams[category])
        out.append(SceneRequest(f"{split}-{seed}-{n:05d}", graph.text(), category, graph))
    return out


def held_out(graph: SceneGraph) -> bool:
    """Whether the graph is a held-out composition, or two of its figures are a held-out pair."""
    return meets_held_out_pair(graph) or graph.key in _held_out_keys()


def meets_held_out_pair(graph: SceneGraph) -> bool:
    pairs = itertools.combinations([n for n in graph.objects if "colour" in n.attributes], 2)
    return any(_pair(a, b) in _held_out_pairs() for a, b in pairs)


def _stream(split: str, seed: int, category: str) -> Iterator[SceneGraph]:
    random = np.random.default_rng([seed, *hashlib.blake2b(f"{split}/{category}".encode(), digest_size=8).digest()])
    if category == COMPLEX:
        yield from _complex(split, random)
    graphs = [g for g in _compositions(category) if held_out(g) == (split == "held_out")]
    while True:
        for i in random.permutation(len(graphs)):
            yield graphs[i]


@cache
def _compositions(category: str) -> tuple[SceneGraph, ...]:
    """Every request of a category, told from each side."""
    coloured = list(itertools.product(COLOURS, SHAPES))
    match category:
        case "single_object":
            return tuple(SceneGraph((Node("a", s),)) for s in SHAPES)
        case "two_object":
            return tuple(SceneGraph((Node("a", s), Node("b", t))) for s, t in itertools.permutations(SHAPES, 2))
        case "counting":
            return tuple(SceneGraph((Node("a", s, count=n),)) for s in SHAPES for n in COUNTS)
        case "colors":
            return tuple(SceneGraph((Node("a", s, {"colour": c}),)) for c, s in coloured)
        case "color_attr":
            return tuple(SceneGraph(pair) for pair in _pairs())
        case "position":
            kinds = ("left of", "right of", "above", "below")
            return tuple(SceneGraph(pair, (Relation("a", kind, "b"),)) for pair in _pairs() for kind in kinds)
    raise ValueError(f"unknown category {category!r}")


@cache
def _pairs() -> tuple[tuple[Node, Node], ...]:
    """Two figures that differ in colour and in shape: exchanging their colours gives another picture."""
    coloured = list(itertools.product(COLOURS, SHAPES))
    return tuple(
        (Node("a", s, {"colour": c}), Node("b", t, {"colour": d}))
        for (c, s), (d, t) in itertools.permutations(coloured, 2)
        if c != d and s != t
    )


def _pair(a: Node, b: Node) -> frozenset[tuple[str, str]]:
    return frozenset((n.attributes["colour"], n.name) for n in (a, b))


@cache
def _held_out_pairs() -> frozenset[frozenset[tuple[str, str]]]:
    pairs = sorted({_pair(a, b) for a, b in _pairs()}, key=lambda p: _rank(str(sorted(p))))
    return frozenset(pairs[: len(pairs) // _HELD_OUT_ONE_IN])


@cache
def _held_out_keys() -> frozenset[str]:
    keys: set[str] = set()
    for category in ("single_object", "two_object", "counting", "colors"):
        all_keys = sorted({g.key for g in _compositions(category)}, key=_rank)
        keys.update(all_keys[: max(1, len(all_keys) // _HELD_OUT_ONE_IN)])
    return frozenset(keys)


def _rank(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


def _complex(split: str, random: np.random.Generator) -> Iterator[SceneGraph]:
    coloured = list(itertools.product(COLOURS, SHAPES))
    while True:
        kinds = int(random.integers(3, 5))
        picked = [coloured[i] for i in random.choice(len(coloured), kinds, replace=False)]
        if len({s for _, s in picked}) < min(kinds, 3):
            continue
        nodes = [Node("abcd"[i], s, {"colour": c}) for i, (c, s) in enumerate(picked)]
        if kinds == 3:
            nodes[2] = replace(nodes[2], count=int(random.integers(1, 4)))
        told = [Relation("a", _kind(random), "b")]
        if random.random() < 0.5 and nodes[2].count == 1:
            told.append(Relation("c", _kind(random), "ab"[int(random.integers(2))]))
        graph = SceneGraph(tuple(nodes), tuple(told))
        if held_out(graph) == (split == "held_out") and _possible(graph):
            yield graph


def _kind(random: np.random.Generator) -> str:
    return str(random.choice(["left of", "right of", "above", "below"]))


def _possible(graph: SceneGraph) -> bool:
    try:
        sample_scene(graph, np.random.default_rng(0))
    except ValueError:
        return False
    return True


# --- pixel judge ------------------------------------------------------------------------------------------------------

_MATCH = 0.7  # share of common pixels (IoU) that makes a figure recognisable
_MARGIN = 0.04  # by which it must fit better than any other shape
_SURE = 0.7  # share of a figure's pixels that are nearest to its colour
_NEAR = 110.0  # of the mean colour of a figure from its palette colour; half way to white it is further off
_SPECK = 4  # pixels of paint that are no figure and no smear
_SMEAR = 12  # pixels of paint in specks altogether that are one
_NAMES = ("", *COLOURS)
_PALETTE = np.array([BACKGROUND, *COLOURS.values()], dtype=np.float32)


@dataclass(frozen=True)
class Sight:
    """What a picture shows: its figures, and `unread` pixels of paint that are none."""

    figures: tuple[Found, ...]
    unread: int


def look(pixels: np.ndarray) -> Sight:
    """Every figure with its colour and place. Raises ValueError for a picture of another size."""
    if pixels.shape != (SIZE, SIZE, 3) or pixels.dtype != np.uint8:
        raise ValueError(f"a picture must be uint8 [{SIZE}, {SIZE}, 3], got {pixels.dtype} {list(pixels.shape)}")
    colours = pixels.astype(np.float32)
    nearest = ((colours[:, :, None] - _PALETTE) ** 2).sum(-1).argmin(-1)
    figures, unread, specks = [], 0, 0
    for region in _regions(nearest > 0):
        if len(region) <= _SPECK:
            specks += len(region)
            continue
        found = _read(region, nearest, colours)
        if found is None:  # two figures that a blurred pixel joins
            parts = [
                p for c in np.unique(nearest[region[:, 0], region[:, 1]]) for p in _regions(_only(region, nearest, c))
            ]
            large = [p for p in parts if len(p) > _SPECK]
            reads = [_read(p, nearest, colours) for p in large]
            if len(reads) > 1 and all(reads):
                figures += reads
                specks += len(region) - sum(map(len, large))
            else:
                unread += len(region)
        else:
            figures.append(found)
    return Sight(tuple(figures), unread + (specks if specks > _SMEAR else 0))


def judge_graph(graph: SceneGraph, pixels: np.ndarray) -> Verdict:
    """The picture against a graph; nothing may be missing, surplus or smeared. Raises ValueError like `look`."""
    sight = look(pixels)
    smear = f"{sight.unread} pixels of paint are no figure" if sight.unread else ""
    return compare(graph, sight.figures, smear)


def judge(request: SceneRequest, pixels: np.ndarray) -> Verdict:
    return judge_graph(request.graph, pixels)


class PixelJudge:
    """process.verdict.GraphJudge over pixels alone."""

    def judge(self, graph: SceneGraph, pixels: np.ndarray) -> Verdict:
        return judge_graph(graph, pixels)


def _only(region: np.ndarray, nearest: np.ndarray, colour: int) -> np.ndarray:
    mask = np.zeros_like(nearest, dtype=bool)
    mask[region[:, 0], region[:, 1]] = nearest[region[:, 0], region[:, 1]] == colour
    return mask


def _regions(mask: np.ndarray) -> list[np.ndarray]:
    """Connected regions (by edges) as int [pixels, 2] of row and column."""
    left = {(int(r), int(c)) for r, c in np.argwhere(mask)}
    out = []
    while left:
        stack, region = [left.pop()], []
        while stack:
            r, c = stack.pop()
            region.append((r, c))
            for near in ((r - 1, c), (r + 1, c), (r, c - 1), (r, c + 1)):
                if near in left:
                    left.remove(near)
                    stack.append(near)
        out.append(np.array(region))
    return sorted(out, key=lambda r: (int(r[:, 0].min()), int(r[:, 1].min())))


def _read(region: np.ndarray, nearest: np.ndarray, colours: np.ndarray) -> Found | None:
    """The figure that a region is; None where its shape or colour is not clear."""
    (top, left), (bottom, right) = region.min(0), region.max(0) + 1
    if bottom - top > CELL + 1 or right - left > CELL + 1:
        return None
    mask = np.zeros((bottom - top, right - left), dtype=bool)
    mask[region[:, 0] - top, region[:, 1] - left] = True
    fits = sorted(zip(_fits_of(mask).tolist(), SHAPES, strict=True), reverse=True)
    if fits[0][0] < _MATCH or fits[0][0] - fits[1][0] < _MARGIN:
        return None
    painted = nearest[region[:, 0], region[:, 1]]
    counts = np.bincount(painted, minlength=len(_NAMES))
    colour = int(counts.argmax())
    if counts[colour] < _SURE * len(region):
        return None
    mean = colours[region[:, 0], region[:, 1]].mean(0)
    if float(np.linalg.norm(mean - _PALETTE[colour])) > _NEAR:
        return None
    cell = (int((top + bottom) / 2 // CELL), int((left + right) / 2 // CELL))
    seen = {"colour": _NAMES[colour], PLACE: place_name((min(cell[0], GRID - 1), min(cell[1], GRID - 1)))}
    return Found(fits[0][1], (float(left), float(top), float(right), float(bottom)), seen, fits[0][0])


def _fits_of(mask: np.ndarray) -> np.ndarray:
    """[shapes]: best IoU of `mask` with each shape over all shifts."""
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(mask, 3), (7, 7)).reshape(-1, 49).astype(np.float32)
    common = windows @ _templates().T
    return (common / (mask.sum() + _templates().sum(1) - common)).max(0)


@cache
def _templates() -> np.ndarray:
    """float32 [shapes, 49]."""
    return np.stack([figure_mask(s).ravel() for s in SHAPES]).astype(np.float32)
