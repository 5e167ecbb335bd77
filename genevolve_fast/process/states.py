"""Operations on graphs: what a plan gets wrong of a request, what grows first, what is rewritten or corrupted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from genevolve_fast.process.scene_graph import (
    MAX_COUNT,
    OPPOSITE,
    PLACE,
    Node,
    Relation,
    SceneGraph,
    listed,
    places,
)
from genevolve_fast.process.verdict import Found, Verdict, holds

Box = tuple[float, float, float, float]
Where = Callable[[str], Box]  # the box of a place


@dataclass(frozen=True)
class Vocabulary:
    """What else an object could have been: names, and values by attribute."""

    names: tuple[str, ...]
    attributes: Mapping[str, tuple[str, ...]]


# --- plan against request ---------------------------------------------------------------------------------------------


def matching(plan: SceneGraph, request: SceneGraph) -> dict[str, str]:
    """Which object of the request an object of the plan means, by ids; those that mean none are left out.

    First what agrees, then the same name with other attributes, then another name with an attribute in common, last
    what is told once too often. A group of the request can be told in parts.
    """
    room = {node.id: node.count for node in request.objects}
    meant: dict[str, str] = {}

    def take(fits: Callable[[Node, Node], bool]) -> None:
        for node in sorted(plan.objects, key=lambda n: -len(n.attributes)):
            fitting = [r for r in request.objects if node.id not in meant and fits(node, r)]
            if fitting:
                best = min(fitting, key=lambda r: (len(_conflicts(node, r)), room[r.id] < node.count, r.id != node.id))
                meant[node.id] = best.id
                room[best.id] -= node.count

    take(lambda n, r: n.name == r.name and not _conflicts(n, r) and room[r.id] >= n.count)
    take(lambda n, r: n.name == r.name and not _conflicts(n, r) and room[r.id] > 0)
    take(lambda n, r: n.name == r.name and room[r.id] > 0)
    take(lambda n, r: room[r.id] == r.count == n.count and (_in_common(n, r) or not r.attributes))
    take(lambda n, r: n.name == r.name and not _conflicts(n, r))
    return meant


def contradictions(plan: SceneGraph, request: SceneGraph, where: Where | None = None) -> tuple[str, ...]:
    """What of `plan` the request forbids, in words. What the plan does not have yet is no contradiction.

    where: also the places of the plan are held against the relations of the request.
    """
    meant, faults = matching(plan, request), []
    counts: dict[str, int] = {}
    for node in plan.objects:
        if node.id not in meant:
            faults.append(f"{node.text()} was not asked for")
            continue
        asked = request[meant[node.id]]
        counts[asked.id] = counts.get(asked.id, 0) + node.count
        if node.name != asked.name:
            faults.append(f"{_plain(node).text(True)} should be {_plain(asked).text()}")
            continue
        for key, value in _conflicts(node, asked).items():
            faults.append(
                f"the {node.name} should be {'at ' if key == PLACE else ''}{asked.attributes[key]}, not {value}"
            )
    for id, count in counts.items():
        if count > request[id].count:
            faults.append(
                f"there should be {_plain(request[id]).text()}, not {_plain(replace(request[id], count=count)).text()}"
            )
    asked = {(r.subject, r.object): r for told in request.relations for r in (told, told.mirrored)}
    for r in plan.relations:
        pair = meant.get(r.subject), meant.get(r.object)
        if pair in asked and asked[pair].kind == OPPOSITE[r.kind]:
            faults.append(_relation_fault(asked[pair], request))
    if where is not None:
        faults += [
            f for r in request.relations if (f := _misplaced(r, plan, request, meant, where)) and f not in faults
        ]
    return tuple(faults)


def missing(plan: SceneGraph, request: SceneGraph) -> tuple[str, ...]:
    """What the request asks for and the plan does not have yet, in words."""
    meant, told = matching(plan, request), {node.id: 0 for node in request.objects}
    for node in plan.objects:
        if node.id in meant:
            told[meant[node.id]] += node.count
    lacking = [replace(n, count=n.count - told[n.id]) for n in request.objects if told[n.id] < n.count]
    return tuple(_plain(node).text() for node in lacking)


def mended(plan: SceneGraph, request: SceneGraph, where: Where | None = None) -> tuple[SceneGraph, dict[str, int]]:
    """(the request with what the plan chose freely where the request agrees, how many of each object the plan has).

    Places that the request's relations forbid are left open.
    """
    meant = matching(plan, request)
    nodes, counts = [], {}
    for asked in request.objects:
        told = [plan[id] for id, target in meant.items() if target == asked.id]
        if not told:
            nodes.append(asked)
            continue
        chosen = {k: v for k, v in told[0].attributes.items() if k != PLACE}
        spots = [spot for n in told for spot in places(n.attributes.get(PLACE, "")) if spot]
        counts[asked.id] = min(asked.count, sum(n.count for n in told))
        if spots and PLACE not in asked.attributes:
            chosen[PLACE] = listed(spots[: asked.count])
        nodes.append(replace(asked, attributes=chosen | dict(asked.attributes)))
    graph = replace(request, objects=tuple(nodes))
    if where is not None:
        same = {n.id: n.id for n in nodes}
        wrong = {
            id for r in graph.relations if _misplaced(r, graph, request, same, where) for id in (r.subject, r.object)
        }
        graph = replace(graph, objects=tuple(_plain(n) if n.id in wrong else n for n in graph.objects))
    return graph, counts


def renamed(plan: SceneGraph, request: SceneGraph) -> SceneGraph:
    """The plan with the ids of the objects of the request that it means."""
    meant, names, taken = matching(plan, request), {}, set()
    for node in plan.objects:
        id = meant.get(node.id, f"other {node.id}")
        names[node.id] = id if id not in taken else f"{id} {node.id}"
        taken.add(names[node.id])
    return SceneGraph(
        tuple(replace(n, id=names[n.id]) for n in plan.objects),
        tuple(Relation(names[r.subject], r.kind, names[r.object]) for r in plan.relations),
    )


def carried(graph: SceneGraph, state: SceneGraph) -> SceneGraph:
    """What `graph` leaves open of objects that `state` has already, as it is there."""
    nodes = []
    for node in graph.objects:
        known = dict(state[node.id].attributes) if node.id in state else {}
        if PLACE in known and len(places(known[PLACE])) != node.count:
            del known[PLACE]
        nodes.append(replace(node, attributes=known | dict(node.attributes)))
    return replace(graph, objects=tuple(nodes))


def settled(graph: SceneGraph, seen: Verdict) -> SceneGraph:
    """What `graph` leaves open as a picture shows it."""
    nodes = []
    for node in graph.objects:
        found = seen.matched.get(node.id, ())
        known: dict[str, str] = {}
        if len(found) == node.count:
            known = {k: v for k, v in found[0].attributes.items() if all(f.attributes.get(k) == v for f in found)}
            if all(PLACE in f.attributes for f in found):
                known[PLACE] = listed(f.attributes[PLACE] for f in found)
        nodes.append(replace(node, attributes=known | dict(node.attributes)))
    return replace(graph, objects=tuple(nodes))


def without_places(graph: SceneGraph) -> SceneGraph:
    return replace(graph, objects=tuple(_plain(n) for n in graph.objects))


def _plain(node: Node) -> Node:
    return replace(node, attributes={k: v for k, v in node.attributes.items() if k != PLACE})


def _conflicts(node: Node, asked: Node) -> dict[str, str]:
    """Attributes that both name, and differ in; places of which one lists the other's agree."""
    both = node.attributes.keys() & asked.attributes.keys()
    wrong = {}
    for key in sorted(both):
        told, wanted = node.attributes[key], asked.attributes[key]
        agree = set(places(told)) <= set(places(wanted)) if key == PLACE else told == wanted
        if not agree:
            wrong[key] = told
    return wrong


def _in_common(node: Node, asked: Node) -> bool:
    return any(node.attributes.get(k) == v for k, v in asked.attributes.items())


def _relation_fault(asked: Relation, request: SceneGraph) -> str:
    subject, object = (_plain(request[id]) for id in (asked.subject, asked.object))
    return f"{subject.text(True)} should be {asked.kind} {object.text(True)}"


def _misplaced(r: Relation, plan: SceneGraph, request: SceneGraph, meant: Mapping[str, str], where: Where) -> str:
    ends = []
    for id in (r.subject, r.object):
        told = [n for n in plan.objects if meant.get(n.id) == id and PLACE in n.attributes]
        ends.append([Found(n.name, where(spot)) for n in told for spot in places(n.attributes[PLACE])])
    return _relation_fault(r, request) if all(ends) and not holds(r, *ends) else ""


# --- increments -------------------------------------------------------------------------------------------------------


def part(graph: SceneGraph, counts: Mapping[str, int]) -> SceneGraph:
    """Of each object of `graph` as many as `counts` says, none where it says nothing; relations of what is there."""
    nodes = []
    for node in graph.objects:
        if count := min(node.count, counts.get(node.id, 0)):
            spots = {PLACE: listed(places(node.attributes[PLACE])[:count])} if PLACE in node.attributes else {}
            nodes.append(replace(node, count=count, attributes={**node.attributes, **spots}))
    ids = [n.id for n in nodes]
    return SceneGraph(tuple(nodes), graph.subgraph(ids).relations)


def increments(graph: SceneGraph, random: np.random.Generator, most: int) -> list[SceneGraph]:
    """States that grow to `graph`, each without contradiction to it: an object comes before a relation of it is told.

    Objects come one after another, those of a group one by one or together; at most `most` states.
    """
    states, counts = [], dict.fromkeys((n.id for n in graph.objects), 0)
    for units in increment_units(graph, {n.id: n.count for n in graph.objects}, random, most):
        for id, count in units:
            counts[id] += count
        states.append(part(graph, counts))
    return states


def increment_units(
    graph: SceneGraph, lacking: Mapping[str, int], random: np.random.Generator, most: int
) -> list[list[tuple[str, int]]]:
    """What comes in each increment, as (id, how many), until nothing of `lacking` is left."""
    if most < 1:
        return []
    units: list[tuple[str, int]] = []
    for i in random.permutation(len(graph.objects)):
        id = graph.objects[i].id
        count = lacking.get(id, 0)
        if count > 0:
            units += [(id, 1)] * count if random.random() < 0.7 else [(id, count)]
    steps = min(len(units), most)
    if steps > 2 and random.random() < 0.25:  # some go faster than one by one
        steps -= 1
    cuts = sorted((random.choice(len(units) - 1, steps - 1, replace=False) + 1).tolist()) if steps > 1 else []
    return [units[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(units)], strict=True) if start < stop]


# --- rewrites and corruptions -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Change:
    """A graph with something changed. `kind`: in one word; `moved`: ids whose places are exchanged."""

    kind: str
    graph: SceneGraph
    moved: tuple[str, ...] = ()


def rewrites(graph: SceneGraph, random: np.random.Generator, words: Vocabulary) -> Iterator[Change]:
    """What `graph` could have been before a modification, a swap or a removal, in random order."""
    options = [*_modified(graph, random, words), *_swapped(graph), *_with_extra(graph, random, words, "removal")]
    for i in random.permutation(len(options)):
        yield options[i]


def corruptions(
    graph: SceneGraph, random: np.random.Generator, words: Vocabulary, *, lacking: bool = False
) -> Iterator[Change]:
    """Wrong versions of `graph`, every kind once before a kind comes again, in random order.

    lacking: also one with an object missing, which is a fault of a draft and none of a plan.
    """
    kinds = [
        [replace(c, kind="attribute" if c.graph.objects != graph.objects and _same_names(c.graph, graph) else "object")
         for c in _modified(graph, random, words)],
        [replace(c, kind="exchanged" if not c.moved else "relation") for c in _swapped(graph)],
        [replace(c, kind="extra") for c in _with_extra(graph, random, words, "extra")],
        list(_miscounted(graph)),
        list(_lacking(graph)) if lacking else [],
    ]  # fmt: skip
    kinds = [[options[i] for i in random.permutation(len(options))] for options in kinds]
    while any(kinds):
        for i in random.permutation(len(kinds)):
            if kinds[i]:
                yield kinds[i].pop()


def placed_before(change: Change, laid: SceneGraph) -> SceneGraph:
    """The changed graph with the places of `laid`, which has the same ids; moved ones exchange theirs."""
    spots = {n.id: n.attributes[PLACE] for n in laid.objects if PLACE in n.attributes}
    if change.moved and all(id in spots for id in change.moved):
        a, b = change.moved
        spots[a], spots[b] = spots[b], spots[a]
    nodes = []
    for node in change.graph.objects:
        known = spots.get(node.id)
        fits = known is not None and len(places(known)) == node.count
        open_ones = {k: v for n in laid.objects if n.id == node.id for k, v in n.attributes.items() if k != PLACE}
        nodes.append(
            replace(_plain(node), attributes=open_ones | _plain(node).attributes | ({PLACE: known} if fits else {}))
        )
    return replace(change.graph, objects=tuple(nodes))


def _same_names(a: SceneGraph, b: SceneGraph) -> bool:
    return [n.name for n in a.objects] == [n.name for n in b.objects]


def _modified(graph: SceneGraph, random: np.random.Generator, words: Vocabulary) -> list[Change]:
    out = []
    for node in graph.objects:
        for key, value in node.attributes.items():
            others = [v for v in words.attributes.get(key, ()) if v != value]
            if others:
                other = str(random.choice(others))
                changed = replace(node, attributes={**node.attributes, key: other})
                out.append(Change("modification", graph.with_object(changed)))
        names = [n for n in words.names if n != node.name]
        if names:
            out.append(Change("modification", graph.with_object(replace(node, name=str(random.choice(names))))))
    return out


def _swapped(graph: SceneGraph) -> list[Change]:
    """Places exchanged between two single objects that a relation tells, or values of one attribute between any two."""
    out = []
    for r in graph.relations:
        a, b = graph[r.subject], graph[r.object]
        others = [o for o in graph.relations if o != r and {o.subject, o.object} & {a.id, b.id}]
        if a.count == b.count == 1 and not others:
            told = tuple(replace(o, kind=OPPOSITE[o.kind]) if o == r else o for o in graph.relations)
            out.append(Change("swap", replace(graph, relations=told), (a.id, b.id)))
    for i, a in enumerate(graph.objects):
        for b in graph.objects[i + 1 :]:
            for key in sorted((a.attributes.keys() & b.attributes.keys()) - {PLACE}):
                if a.attributes[key] != b.attributes[key] and a.name != b.name:
                    x = replace(a, attributes={**a.attributes, key: b.attributes[key]})
                    y = replace(b, attributes={**b.attributes, key: a.attributes[key]})
                    out.append(Change("swap", graph.with_object(x).with_object(y)))
    return out


def _with_extra(graph: SceneGraph, random: np.random.Generator, words: Vocabulary, kind: str) -> list[Change]:
    names = [n for n in words.names if n not in {o.name for o in graph.objects}]
    if not names:
        return []
    values = {k: str(random.choice(v)) for k, v in words.attributes.items()}
    return [Change(kind, graph.with_object(Node("extra", str(random.choice(names)), values)))]


def _miscounted(graph: SceneGraph) -> Iterator[Change]:
    for node in graph.objects:
        if node.count < MAX_COUNT:
            yield Change("count", graph.with_object(_plain(replace(node, count=node.count + 1))))


def _lacking(graph: SceneGraph) -> Iterator[Change]:
    for node in graph.objects:
        if len(graph.objects) > 1:
            yield Change("missing", graph.subgraph([n.id for n in graph.objects if n.id != node.id]))
