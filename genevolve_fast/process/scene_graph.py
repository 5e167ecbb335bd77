"""What a request asks for, as a graph: objects with attributes and counts, and relations between them."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
RELATIONS = tuple(OPPOSITE)
NUMBERS = ("no", "a", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PLACE = "place"  # the attribute that says where an object stands; it is written behind the name, all others before it
MAX_COUNT = len(NUMBERS) - 1


class GraphError(ValueError):
    """A graph that cannot be; the message says which object or relation, and why."""


@dataclass(frozen=True)
class Node:
    """An object, or `count` alike. `attributes`: what is asked of it ({"colour": "red"}); what is not asked is open."""

    id: str
    name: str
    attributes: Mapping[str, str] = field(default_factory=dict)
    count: int = 1

    @property
    def signature(self) -> tuple[str, tuple[tuple[str, str], ...], int]:
        """What it is, whatever its id."""
        return self.name, tuple(sorted(self.attributes.items())), self.count

    def text(self, definite: bool = False) -> str:
        """`a red circle`, `three red circles`, `the red circle at row 1 column 2`."""
        words = [v for k, v in sorted(self.attributes.items()) if k != PLACE]
        what = " ".join([*words, self.name if self.count == 1 else plural(self.name)])
        if definite:
            what = f"the {what}"
        else:
            what = f"{NUMBERS[self.count]} {what}" if self.count > 1 else f"{article(what)} {what}"
        return f"{what} at {self.attributes[PLACE]}" if PLACE in self.attributes else what


@dataclass(frozen=True)
class Relation:
    """`subject` stands `kind` (one of RELATIONS) `object`; both are ids of nodes."""

    subject: str
    kind: str
    object: str

    @property
    def mirrored(self) -> Relation:
        """The same said of the other one."""
        return Relation(self.object, OPPOSITE[self.kind], self.subject)


@dataclass(frozen=True)
class SceneGraph:
    """Objects and relations, in the order in which they are told."""

    objects: tuple[Node, ...] = ()
    relations: tuple[Relation, ...] = ()

    def __getitem__(self, id: str) -> Node:
        for node in self.objects:
            if node.id == id:
                return node
        raise KeyError(id)

    def __contains__(self, id: object) -> bool:
        return any(node.id == id for node in self.objects)

    @property
    def count(self) -> int:
        """Single objects, those of every group together."""
        return sum(node.count for node in self.objects)

    def validate(self) -> SceneGraph:
        """Return self. Raises GraphError for repeated or unknown ids, empty names, counts out of range, contradictions.

        Contradictory are relations that together put an object left of, or above, itself.
        """
        ids = [node.id for node in self.objects]
        if repeated := {id for id in ids if ids.count(id) > 1}:
            raise GraphError(f"objects share the id {', '.join(sorted(repeated))}")
        for node in self.objects:
            if not node.id or not node.name.strip():
                raise GraphError(f"an object without {'name' if node.id else 'id'}: {node}")
            if not 1 <= node.count <= MAX_COUNT:
                raise GraphError(f"object {node.id} has count {node.count}; it must be 1 to {MAX_COUNT}")
            if empty := [k for k, v in node.attributes.items() if not k or not v]:
                raise GraphError(f"object {node.id} has empty attributes: {empty}")
        for r in self.relations:
            if r.kind not in RELATIONS:
                raise GraphError(f"unknown relation {r.kind!r}; relations are {', '.join(RELATIONS)}")
            if missing := {r.subject, r.object} - set(ids):
                raise GraphError(f"relation {r.kind!r} names {', '.join(sorted(missing))}, which is no object")
        for kind in ("left of", "above"):
            if cycle := _cycle(ids, [r for r in map(_towards, self.relations) if r.kind == kind]):
                raise GraphError(f"the relations contradict each other: {' '.join(cycle)} would be {kind} itself")
        return self

    def subgraph(self, ids: Collection[str]) -> SceneGraph:
        """The objects `ids` and the relations among them."""
        return SceneGraph(
            tuple(node for node in self.objects if node.id in ids),
            tuple(r for r in self.relations if r.subject in ids and r.object in ids),
        )

    def with_object(self, node: Node) -> SceneGraph:
        """The same with `node` in the place of its id, or behind all others where that is new."""
        if node.id in self:
            return replace(self, objects=tuple(node if n.id == node.id else n for n in self.objects))
        return replace(self, objects=(*self.objects, node))

    @property
    def key(self) -> str:
        """Equal for graphs that ask for the same, whatever the ids, the order and the side a relation is told from."""
        names = {node.id: json.dumps(node.signature) for node in self.objects}
        relations = sorted((names[r.subject], r.kind, names[r.object]) for r in map(_towards, self.relations))
        return json.dumps([sorted(names.values()), relations])

    def text(self) -> str:
        """`a red circle left of a blue square and three green rings`."""
        told: set[str] = set()
        parts = []

        def named(id: str) -> str:
            text = self[id].text(definite=id in told)
            told.add(id)
            return text

        for r in self.relations:
            parts.append(f"{named(r.subject)} {r.kind} {named(r.object)}")
        parts += [named(node.id) for node in self.objects if node.id not in told]
        return listed(parts)

    def to_json(self) -> dict[str, Any]:
        return {
            "objects": [
                {"id": n.id, "name": n.name}
                | ({"attributes": dict(n.attributes)} if n.attributes else {})
                | ({"count": n.count} if n.count != 1 else {})
                for n in self.objects
            ],
            "relations": [{"subject": r.subject, "kind": r.kind, "object": r.object} for r in self.relations],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> SceneGraph:
        """Raises GraphError for what is no graph, unknown keys among it."""
        if not isinstance(data, Mapping):
            raise GraphError(f"a graph is an object with objects and relations, not {type(data).__name__}")
        if unknown := set(data) - {"objects", "relations"}:
            raise GraphError(f"a graph has objects and relations, not {', '.join(map(str, unknown))}")
        nodes = [_node(row) for row in _rows(data, "objects")]
        relations = [_relation(row) for row in _rows(data, "relations")]
        return cls(tuple(nodes), tuple(relations)).validate()


@dataclass(frozen=True)
class SceneRequest:
    """A request whose graph is known. `category`: one of GenEval's, or what a source calls its own."""

    id: str
    text: str
    category: str
    graph: SceneGraph

    def to_json(self) -> dict[str, Any]:
        return {"id": self.id, "text": self.text, "category": self.category, "graph": self.graph.to_json()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> SceneRequest:
        """Raises GraphError."""
        try:
            return cls(str(data["id"]), str(data["text"]), str(data["category"]), SceneGraph.from_json(data["graph"]))
        except KeyError as error:
            raise GraphError(f"a request lacks its {error.args[0]}") from None


# --- words ------------------------------------------------------------------------------------------------------------


def article(words: str) -> str:
    return "an" if words[:1].lower() in "aeiou" else "a"


def plural(name: str) -> str:
    return f"{name}es" if name.endswith(("s", "x", "ch", "sh")) else f"{name}s"


def places(value: str) -> tuple[str, ...]:
    """The places that the attribute PLACE of a group lists."""
    return tuple(value.replace(" and ", ", ").split(", "))


def listed(parts: Iterable[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    parts = list(parts)
    return f"{', '.join(parts[:-1])} and {parts[-1]}" if len(parts) > 1 else "".join(parts)


# --- reading and checking ---------------------------------------------------------------------------------------------


def _towards(relation: Relation) -> Relation:
    """Told as left of or above."""
    return relation if relation.kind in ("left of", "above") else relation.mirrored


def _cycle(ids: Iterable[str], relations: Iterable[Relation]) -> list[str]:
    """Ids of a chain of `relations` that comes back to where it began; empty where there is none."""
    after: dict[str, list[str]] = {id: [] for id in ids}
    for r in relations:
        after[r.subject].append(r.object)
    done: set[str] = set()

    def walk(id: str, path: list[str]) -> list[str]:
        if id in path:
            return [*path[path.index(id) :], id]
        if id in done:
            return []
        for following in after[id]:
            if found := walk(following, [*path, id]):
                return found
        done.add(id)
        return []

    return next((found for id in after if (found := walk(id, []))), [])


def _rows(data: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    rows = data.get(name, [])
    if not isinstance(rows, list) or not all(isinstance(row, Mapping) for row in rows):
        raise GraphError(f"{name} must be a list of objects")
    return rows


def _node(row: Mapping[str, Any]) -> Node:
    if unknown := set(row) - {"id", "name", "attributes", "count"}:
        raise GraphError(f"an object has id, name, attributes and count, not {', '.join(map(str, unknown))}")
    attributes, count = row.get("attributes") or {}, row.get("count", 1)
    if not isinstance(row.get("id"), (str, int)) or not isinstance(row.get("name"), str):
        raise GraphError(f"an object needs an id and a name: {str(dict(row))[:100]}")
    if not isinstance(attributes, Mapping) or not all(isinstance(v, str) for v in attributes.values()):
        raise GraphError(f"the attributes of object {row['id']} must be strings by their name")
    if not isinstance(count, int) or isinstance(count, bool):
        raise GraphError(f"the count of object {row['id']} must be a whole number")
    return Node(str(row["id"]), row["name"].strip(), dict(attributes), count)


def _relation(row: Mapping[str, Any]) -> Relation:
    if set(row) != {"subject", "kind", "object"}:
        raise GraphError(f"a relation has subject, kind and object, not {', '.join(map(str, row)) or 'nothing'}")
    return Relation(str(row["subject"]), str(row["kind"]), str(row["object"]))
