"""The texts of a process from its graphs alone: plans, inspections and corrections in the words of SceneGraph.text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from genevolve_fast.process.scene_graph import NUMBERS, PLACE, Node, SceneGraph, listed, places
from genevolve_fast.process.trace import Correction, Plan
from genevolve_fast.process.verdict import Verdict


class GraphAuthor:
    """Implements process.builders.Author without a model."""

    async def plan(self, request: str, before: SceneGraph, after: SceneGraph) -> Plan:
        return Plan(edit(before, after), after.text())

    async def reason(self, graph: SceneGraph, verdict: Verdict) -> str:
        """What the picture shows, read off what was found in it."""
        return f"the picture shows {seen(graph, verdict).text()}"

    async def correction(self, graph: SceneGraph, wrong: SceneGraph, faults: Sequence[str]) -> Correction:
        return Correction(edit(wrong, graph) or f"paint {graph.text()} again")


def seen(graph: SceneGraph, verdict: Verdict) -> SceneGraph:
    """The graph of a picture, in what `graph` names: found objects under the ids that they stand for."""
    nodes = []
    for node in graph.objects:
        found = verdict.matched.get(node.id, ())
        if found:
            first = found[0].attributes
            attributes = {k: first[k] for k in node.attributes if k != PLACE and k in first}
            if PLACE in node.attributes:
                attributes[PLACE] = _places(node, [f.attributes.get(PLACE, "") for f in found])
            nodes.append(Node(node.id, found[0].name, attributes, min(len(found), len(NUMBERS) - 1)))
    for n, f in enumerate(verdict.surplus):
        nodes.append(Node(f"surplus {n}", f.name, dict(f.attributes)))
    told = {n.id for n in nodes}
    held = [r for r, right in zip(graph.relations, verdict.relations, strict=True) if right]
    return SceneGraph(tuple(nodes), tuple(r for r in held if {r.subject, r.object} <= told))


def _places(node: Node, found: Sequence[str]) -> str:
    """In the order in which the graph lists them."""
    wanted = places(node.attributes[PLACE])
    return listed(sorted(found, key=lambda spot: (wanted.index(spot) if spot in wanted else len(wanted), spot)))


def edit(before: SceneGraph, after: SceneGraph) -> str:
    """What to do to come from one graph to the other; objects are known by their ids. Empty where nothing differs."""
    parts = []
    swapped = _swapped(before, after)
    if swapped:
        parts.append(f"swap {_name(before[swapped[0]])} and {_name(before[swapped[1]])}")
    parts += [f"remove {_name(n)}" for n in before.objects if n.id not in after]
    for node in after.objects:
        if node.id in swapped:
            continue
        if node.id not in before:
            parts.append(f"add {node.text()}{_beside(node, before, after)}")
        elif before[node.id] != node:
            parts.append(_altered(before[node.id], node))
    return listed(parts)


def _altered(old: Node, new: Node) -> str:
    known, wanted = places(old.attributes.get(PLACE, "")), places(new.attributes.get(PLACE, ""))
    same = {**old.attributes, PLACE: ""} == {**new.attributes, PLACE: ""} and old.name == new.name
    if same and new.count > old.count:
        more = new.count - old.count
        spots = f" at {listed(s for s in wanted if s not in known)}" if wanted[0] and set(known) <= set(wanted) else ""
        kind = _bare(replace(new, count=more)).text()
        return f"add {'another ' + kind.split(' ', 1)[1] if more == 1 else kind.replace(' ', ' more ', 1)}{spots}"
    if same and new.count < old.count:
        gone = f" at {listed(s for s in known if s not in wanted)}" if known[0] and set(wanted) <= set(known) else ""
        return f"remove {_bare(replace(new, count=old.count - new.count)).text()}{gone}"
    if same and old.count == new.count:
        return f"move {_name(old)} to {new.attributes[PLACE]}" if PLACE in new.attributes else f"move {_name(old)}"
    return f"change {_name(old)} to {(new if known != wanted else _bare(new)).text()}"


def _beside(node: Node, before: SceneGraph, after: SceneGraph) -> str:
    """` left of the blue square`, where that one is there already."""
    for r in after.relations:
        r = r if r.subject == node.id else r.mirrored
        if r.subject == node.id and r.object in before and r.object in after:
            return f" {r.kind} {_name(after[r.object])}"
    return ""


def _swapped(before: SceneGraph, after: SceneGraph) -> tuple[str, ...]:
    """Ids of two objects that only exchange places."""
    moved = [
        n.id for n in after.objects if n.id in before and n.attributes.get(PLACE) != before[n.id].attributes.get(PLACE)
    ]
    if len(moved) != 2:
        return ()
    a, b = moved
    exchanged = after[a].attributes.get(PLACE) == before[b].attributes.get(PLACE) and (
        after[b].attributes.get(PLACE) == before[a].attributes.get(PLACE)
    )
    return (a, b) if exchanged and all(_bare(after[id]) == _bare(before[id]) for id in moved) else ()


def _bare(node: Node) -> Node:
    return replace(node, attributes={k: v for k, v in node.attributes.items() if k != PLACE})


def _name(node: Node) -> str:
    return _bare(node).text(definite=True)
