"""What a picture shows against what a graph asks: matching of found objects, and what is right of each part."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from genevolve_fast.process.scene_graph import PLACE, Node, Relation, SceneGraph, places, plural

_SIDE = 0.5  # of the distance between two objects that must lie in a relation's direction, as GenEval asks
_CLEAR = 0.1  # of both objects' size that the centres must be apart at least, as GenEval asks


@dataclass(frozen=True)
class Found:
    """An object seen in a picture; `box` is (left, top, right, bottom) in pixels."""

    name: str
    box: tuple[float, float, float, float]
    attributes: Mapping[str, str] = field(default_factory=dict)
    score: float = 1.0

    @property
    def centre(self) -> tuple[float, float]:
        left, top, right, bottom = self.box
        return (left + right) / 2, (top + bottom) / 2


@dataclass(frozen=True)
class Verdict:
    """By object id: `present` (at least one), `counts` (as many as asked), `attributes` (all of all of them).

    relations: in the graph's order. surplus: found objects that nothing asks for. clean: nothing is unreadable.
    matched: which found objects stand for an id. faults: all that is wrong, in words.
    """

    present: Mapping[str, bool]
    counts: Mapping[str, bool]
    attributes: Mapping[str, bool]
    relations: tuple[bool, ...]
    surplus: tuple[Found, ...] = ()
    clean: bool = True
    matched: Mapping[str, tuple[Found, ...]] = field(default_factory=dict)
    faults: tuple[str, ...] = ()

    @property
    def correct(self) -> bool:
        return not self.faults

    def right(self, id: str) -> bool:
        """Whether the object is there as asked, relations aside."""
        return self.present[id] and self.counts[id] and self.attributes[id]


class GraphJudge(Protocol):
    """Says what of a graph a picture shows. What the graph does not ask for yet is no fault, unless it is drawn."""

    def judge(self, graph: SceneGraph, pixels: np.ndarray) -> Verdict:
        """`pixels` uint8 [height, width, 3]."""
        ...


def compare(graph: SceneGraph, found: Sequence[Found], smear: str = "", *, exact: bool = True) -> Verdict:
    """What of `graph` is among `found`. `smear`: what else the picture shows that cannot be read, in words.

    exact: an object that nobody asked for is a fault, as is one too many; else only a count above one is exact.
    """
    matched = _match(graph.objects, found)
    present, counts, attributes, faults = {}, {}, {}, []
    for node in graph.objects:
        mine = matched[node.id]
        wrong = [f for f in mine if not has(node, f)]
        present[node.id] = bool(mine)
        counts[node.id] = len(mine) == node.count if exact or node.count > 1 else bool(mine)
        attributes[node.id] = bool(mine) and not wrong
        if not mine:
            faults.append(f"{node.text()} is missing")
        elif not counts[node.id]:
            faults.append(f"there should be {node.text()}, but there {_are(len(mine), node.name)}")
        for f in wrong:
            faults.append(_difference(node, f))
    relations = tuple(holds(r, matched[r.subject], matched[r.object]) for r in graph.relations)
    for r, right in zip(graph.relations, relations, strict=True):
        if not right and present[r.subject] and present[r.object]:
            subject, object = graph[r.subject].text(True), graph[r.object].text(True)
            faults.append(f"{subject} {'is' if graph[r.subject].count == 1 else 'are'} not {r.kind} {object}")
    used = {id(f) for mine in matched.values() for f in mine}
    surplus = [f for f in found if id(f) not in used]
    if exact:
        faults += [f"{Node('', f.name, _seen(f)).text()} was not asked for" for f in surplus]
    if smear:
        faults.append(smear)
    return Verdict(present, counts, attributes, relations, tuple(surplus), not smear, matched, tuple(faults))


def holds(relation: Relation, subjects: Sequence[Found], objects: Sequence[Found]) -> bool:
    """Whether every one of `subjects` stands so to every one of `objects`; False where there are none."""
    if not subjects or not objects:
        return False
    return all(_stands(relation.kind, a, b) for a in subjects for b in objects)


def _stands(kind: str, a: Found, b: Found) -> bool:
    (ax, ay), (bx, by) = a.centre, b.centre
    dx, dy = ax - bx, ay - by
    along = {"left of": -dx, "right of": dx, "above": -dy, "below": dy}[kind]
    axis = 0 if kind in ("left of", "right of") else 1
    sizes = sum(f.box[axis + 2] - f.box[axis] for f in (a, b))
    return along > _CLEAR * sizes and along > _SIDE * math.hypot(dx, dy)


def has(node: Node, found: Found) -> bool:
    """Whether a found object has every attribute that is asked; a place is one of those that a group lists."""
    return all(_agrees(key, value, found) for key, value in node.attributes.items())


def _agrees(key: str, value: str, found: Found) -> bool:
    seen = found.attributes.get(key)
    return seen in places(value) if key == PLACE else seen == value


def _match(nodes: Sequence[Node], found: Sequence[Found]) -> dict[str, tuple[Found, ...]]:
    """Found objects by id: those that have all that is asked first, then those of the right name that are left over.

    One too many of a node's own kind is its own, so that a count can be too high.
    """
    left = list(found)
    matched: dict[str, list[Found]] = {node.id: [] for node in nodes}
    choosy = sorted(nodes, key=lambda n: -len(n.attributes))

    def take(fits, most: int | None) -> None:
        for node in choosy:
            fitting = [f for f in left if f.name == node.name and fits(node, f)]
            fitting.sort(key=lambda f: -sum(_agrees(k, v, f) for k, v in node.attributes.items()))
            for f in fitting[: None if most is None else max(0, node.count - len(matched[node.id]))]:
                matched[node.id].append(f)
                left[:] = [other for other in left if other is not f]

    take(has, 1)
    take(lambda node, f: True, 1)
    take(has, None)
    return {id: tuple(mine) for id, mine in matched.items()}


def _seen(found: Found) -> dict[str, str]:
    return {k: v for k, v in found.attributes.items() if k != PLACE}


def _are(count: int, name: str) -> str:
    return f"is one {name}" if count == 1 else f"are {count} {plural(name)}"


def _difference(node: Node, found: Found) -> str:
    wrong = {k: v for k, v in node.attributes.items() if not _agrees(k, v, found)}
    told = [
        f"at {found.attributes.get(k, 'another place')}, not at {v}"
        if k == PLACE
        else f"{found.attributes.get(k, f'of no clear {k}')}, not {v}"
        for k, v in wrong.items()
    ]
    return f"the {node.name} is {' and '.join(told)}"
