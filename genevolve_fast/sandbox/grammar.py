"""The controlled English that the canvas reads. Parsing never raises: what cannot be read becomes Unreadable."""

from __future__ import annotations

import re
from dataclasses import dataclass

from genevolve_fast.sandbox.scene import CELLS, EMBLEMS, PALETTE, SHAPES

COUNTS = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6}
INSTANCES = ("first", "second", "third", "fourth", "fifth", "sixth")
RELATIONS = ("left of", "right of", "above", "below")
_MAX_SENTENCES = 64  # a prompt longer than that is noise to any renderer

_COLOUR = "|".join(PALETTE)
_SHAPE = "|".join(SHAPES)
_ORDINALS = {"first": 0, "second": 1}
_SENTENCE = re.compile(r"""(?:'[^'\n]{0,40}'|"[^"\n]{0,40}"|[^.'"]|['"])+""")
_CELL = re.compile(r"\b(" + "|".join(sorted(map(re.escape, CELLS), key=len, reverse=True)) + r")\b", re.IGNORECASE)
_BACKGROUND = re.compile(rf"^(?:background ({_COLOUR})|(?:an? |the )?({_COLOUR}) background)$", re.IGNORECASE)
_OBJECT = re.compile(rf"\b({_COLOUR}) ({_SHAPE})\b", re.IGNORECASE)
_GROUP = re.compile(rf"\b({'|'.join(COUNTS)}) ({_COLOUR}) ({_SHAPE})s\b", re.IGNORECASE)
_QUOTED = re.compile(r"'([^'\n]{1,40})'|\"([^\"\n]{1,40})\"")
_TEXT_WORD = re.compile(r"\b(?:text|texts|word|words)\b", re.IGNORECASE)
_EMBLEM_WORD = re.compile(r"\b(?:emblem|reference image)\b", re.IGNORECASE)
_REFERENCE = re.compile(r"\b(first|second) reference image\b", re.IGNORECASE)
_RELATION = re.compile(r"\b(left of|right of|above|below)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Background:
    colour: str


@dataclass(frozen=True)
class Object:
    """One shape. `shared` when its sentence names several objects; `relation` when it is placed beside another."""

    colour: str
    shape: str
    cell: str | None = None
    relation: str | None = None
    shared: bool = False


@dataclass(frozen=True)
class Group:
    """A plural count such as "three red circles at the top"; `row` is top, middle or bottom where one is named."""

    count: int
    colour: str
    shape: str
    row: str | None = None
    shared: bool = False


@dataclass(frozen=True)
class Text:
    value: str
    cell: str | None = None
    shared: bool = False


@dataclass(frozen=True)
class Emblem:
    """`reference` is 0 for the first reference image, 1 for the second, None when no ordinal binds it."""

    reference: int | None
    cell: str | None = None


@dataclass(frozen=True)
class Unreadable:
    sentence: str


Statement = Background | Object | Group | Text | Emblem | Unreadable


def parse(prompt: str) -> list[Statement]:
    """Statements of a prompt in order of appearance; sentences end with a full stop outside quotes."""
    return [statement for sentence in sentences(prompt) for statement in _sentence(sentence)]


def sentences(prompt: str) -> list[str]:
    """The sentences of a prompt, without their full stops."""
    return [" ".join(s.split()) for s in _SENTENCE.findall(prompt)[:_MAX_SENTENCES] if s.strip()]


def _sentence(text: str) -> list[Statement]:
    if match := _BACKGROUND.match(text):
        return [Background((match[1] or match[2]).lower())]
    bare = _QUOTED.sub(lambda m: " " * len(m[0]), text)  # quoted words are content, never instructions
    groups, objects = list(_GROUP.finditer(bare)), list(_OBJECT.finditer(bare))
    objects = [o for o in objects if not any(g.start() <= o.start() < g.end() for g in groups)]
    texts = list(_QUOTED.finditer(text)) if _TEXT_WORD.search(bare) else []
    emblems = list(_EMBLEM_WORD.finditer(bare))[:1]
    things = sorted([*groups, *objects, *texts, *emblems], key=lambda m: m.start())
    if not things:
        return [Unreadable(text)]
    shared = len(things) > 1
    relation = _RELATION.search(bare)
    out: list[Statement] = []
    for i, thing in enumerate(things):
        until = things[i + 1].start() if i + 1 < len(things) else len(bare)
        cell = _CELL.search(bare, thing.end(), until)
        place = cell[1].lower() if cell else None
        if thing in groups:
            row = re.search(r"\b(top|middle|bottom)\b", bare[thing.end() : until], re.IGNORECASE)
            out.append(
                Group(COUNTS[thing[1].lower()], thing[2].lower(), thing[3].lower(), row and row[1].lower(), shared)
            )
        elif thing in objects:
            beside = relation[1].lower() if relation and relation.start() >= things[0].start() else None
            out.append(Object(thing[1].lower(), thing[2].lower(), place, beside, shared))
        elif thing in texts:
            out.append(Text((thing[1] or thing[2]).upper(), place, shared))
        else:
            reference = _REFERENCE.search(bare)
            out.append(Emblem(_ORDINALS[reference[1].lower()] if reference else None, place))
    return out


assert not set(EMBLEMS) & set(SHAPES), "an emblem may not share its name with a shape"
