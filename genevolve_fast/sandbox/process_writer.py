"""A script that grows canvas pictures: it plans a program's sentences and inspects with the pixel judge's eyes.

A demonstration of the process, never a measurement of it: what it writes follows from the canvas's own rules.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np

from genevolve_fast.agent.conversation import Reply
from genevolve_fast.agent.images import SeenImage
from genevolve_fast.process.prompts import DONE
from genevolve_fast.process.trace import MAX_CYCLES, Correction, Inspection, Plan
from genevolve_fast.protocols import Sampling
from genevolve_fast.sandbox import grammar
from genevolve_fast.sandbox.canvas import draw_program, draw_reference
from genevolve_fast.sandbox.judges import Sight, look
from genevolve_fast.sandbox.scene import CELLS, EMBLEMS, PALETTE, Item, Scene
from genevolve_fast.sandbox.world import RELATION_CELLS, row_cells

_ORDINALS = ("first", "second")
_FIRST = ("center", "top center", "bottom center")  # of free cells


class SymbolicWriter:
    """process.record.Talk without a model: one sentence of the program a cycle, the rest in the last.

    It plans a sentence as the program has it, so the canvas's faults happen; finds them in the draft; and refines to
    sentences that the canvas cannot get wrong.
    """

    markers: Sequence[str] = ()

    def __init__(self, references: Sequence[np.ndarray] = (), max_cycles: int = MAX_CYCLES) -> None:
        self._references = list(references)
        self._max_cycles = max_cycles
        self._groups: list[list[str]] = []  # sentences that cycles still have to add
        self._written: list[str] = []  # the scene so far, in the program's words or mended
        self._meant: list[Meant] = []  # what those sentences mean
        self._seen: np.ndarray | None = None
        self._found: list[str] = []  # faults of that draft
        self._named: set[str] = set()  # cells that the program gives to something
        self._stage = "plan"
        self._text = ""
        self._characters = 0
        self.prompt_tokens = 0

    @property
    def response_tokens(self) -> int:
        return self._characters // 4

    def begin(self, system_prompt: str, question: str) -> None:
        self.prompt_tokens = (len(system_prompt) + len(question)) // 4
        self._intend(question)

    async def ask(self, sampling: Sampling, seed: int) -> Reply:
        self._text = {"plan": self._plan, "inspect": self._inspect, "refine": self._refine}[self._stage]()
        return Reply(self._text, True)

    def said(self) -> dict[str, Any]:
        return {"text": self._text}

    def recall(self, said: Mapping[str, Any]) -> Reply:
        """It is a script: what it said is what it says."""
        text = {"plan": self._plan, "inspect": self._inspect, "refine": self._refine}[self._stage]()
        if text != said["text"]:
            raise ValueError("the kept stage was written by another release of the script")
        return Reply(text, True)

    def keep(self, reply: Reply, tool: str | None) -> None:
        self._characters += len(reply.text)

    def observe(self, text: str, images: Sequence[SeenImage] = (), tool: str | None = None) -> None:
        self._characters += len(text)
        drawn = bool(images)
        self._seen = images[0].found.pixels if images else self._seen
        if self._stage == "plan" and drawn:
            self._stage, self._found = "inspect", self._faults()
        elif self._stage == "inspect":
            self._stage = "refine" if self._found else "plan"
        else:
            self._stage = "plan"

    # --- the stages ---------------------------------------------------------------------------------------------------

    def _intend(self, question: str) -> None:
        """What the cycles will add."""
        self._groups = _groups(grammar.sentences(question), self._max_cycles)
        self._named = _named(grammar.parse(question))

    def _means(self, sentence: str) -> list[Meant]:
        taken = self._named | {m.item.cell for m in self._meant if m.item}
        return meant(sentence, taken, self._references)

    def _plan(self) -> str:
        if not self._groups:
            return DONE
        added = self._groups.pop(0)
        self._written += added
        for sentence in added:
            self._meant += self._means(sentence)
        what = "Paint" if len(self._written) == len(added) else "Add"
        return str(Plan(f"{what}: {prompt_of(added)}", prompt_of(self._written)))

    def _inspect(self) -> str:
        shown = sum(m.item is not None for m in self._meant)
        things = "thing" if shown == 1 else "things"
        reason = f"The plan has {shown} {things} so far." if self._groups else "Everything is planned."
        return str(Inspection(draft="; ".join(self._found), reason=reason))

    def _refine(self) -> str:
        self._written = [m.sentence for m in self._meant]
        return str(Correction(prompt_of(self._written)))

    def _faults(self) -> list[str]:
        """What the draft shows differently from what the plan means, in words."""
        scene = Scene(self._ground(), tuple(m.item for m in self._meant if m.item))
        truth = draw_program(prompt_of([m.sentence for m in self._meant]), self._references, 0)
        if np.array_equal(self._seen, truth):
            return []
        sight = Sight(self._seen)
        seen, surplus = look(scene, sight, Sight(truth))
        faults = [f"the {_called(s.item)} is not at the {s.item.cell}" for s in seen if not s.in_place]
        if named := [m for m in self._meant if m.ground]:
            faults += [f"the background is not {named[-1].ground}"] * (sight.background != named[-1].ground)
        return faults or ["there is more of something than planned"] * surplus

    def _ground(self) -> str:
        return next((m.ground for m in reversed(self._meant) if m.ground), "white")


def symbolic_talk(max_cycles: int = MAX_CYCLES):
    """process.renderer.OpenTalk of the script."""

    @contextmanager
    def opened(session_id: str, references: Sequence[np.ndarray]) -> Iterator[SymbolicWriter]:
        yield SymbolicWriter(references, max_cycles)

    return opened


def _groups(sentences: Sequence[str], most: int) -> list[list[str]]:
    """One sentence a cycle; grounds go with the first thing, what is too much with the last cycle."""
    grounds = [s for s in sentences if all(isinstance(x, grammar.Background) for x in grammar.parse(s))]
    things = [s for s in sentences if s not in grounds]
    if not things:
        return [grounds] if grounds else []
    groups = [[s] for s in things]
    groups[0] = [*grounds, *groups[0]]
    return [*groups[: most - 1], [s for group in groups[most - 1 :] for s in group]] if len(groups) > most else groups


def prompt_of(sentences: Sequence[str]) -> str:
    return " ".join(f"{s.rstrip('.')}." for s in sentences)


# --- what a sentence means --------------------------------------------------------------------------------------------


class Meant:
    """One thing in words that the canvas draws right, with the item to look for (None: nothing to find)."""

    def __init__(self, sentence: str, item: Item | None = None, ground: str = "") -> None:
        self.sentence, self.item, self.ground = sentence, item, ground


def meant(sentence: str, taken: set[str], references: Sequence[np.ndarray]) -> list[Meant]:
    """The things of a sentence, each in its cell: the one it names, that of its row or relation, or a free one."""
    out: list[Meant] = []
    statements = grammar.parse(sentence)
    related = [s for s in statements if isinstance(s, grammar.Object) and s.relation]
    for s in statements:
        match s:
            case grammar.Background():
                out.append(Meant(f"Background {s.colour}", ground=s.colour))
            case grammar.Object():
                at = related.index(s) if s in related else 2
                beside = RELATION_CELLS[s.relation][at] if s.relation and at < 2 else None
                out.append(object_meant(s.colour, s.shape, s.cell or beside or _free(taken, out)))
            case grammar.Group():
                row = row_cells(s.row or "middle", s.count) if s.count <= 3 else []
                cells = row or [c for c in CELLS if c not in taken][: s.count]
                out += [object_meant(s.colour, s.shape, cell) for cell in cells]
            case grammar.Text():
                cell = s.cell or _free(taken, out)
                out.append(text_meant(s.value, cell))
            case grammar.Emblem() if references:
                out.append(_emblem(s, s.cell or _free(taken, out), references))
    return out


def _named(statements: Sequence[grammar.Statement]) -> set[str]:
    cells = {c for s in statements if (c := getattr(s, "cell", None))}
    for s in statements:
        if isinstance(s, grammar.Group):
            cells |= set(row_cells(s.row or "middle", s.count))
        elif isinstance(s, grammar.Object) and s.relation:
            cells |= set(RELATION_CELLS[s.relation])
    return cells


def object_meant(colour: str, shape: str, cell: str) -> Meant:
    article = "An" if colour[0] in "aeiou" else "A"
    return Meant(f"{article} {colour} {shape} at the {cell}", Item("object", shape, cell, colour))


def text_meant(value: str, cell: str) -> Meant:
    return Meant(f"The text '{value}' at the {cell}", Item("text", value, cell))


def _emblem(s: grammar.Emblem, cell: str, references: Sequence[np.ndarray]) -> Meant:
    which = min(s.reference or 0, len(references) - 1)
    sentence = f"The emblem of the {_ORDINALS[which]} reference image at the {cell}"
    known = _emblems().get(references[which].tobytes())
    return Meant(sentence, known and Item("emblem", known[0], cell, known[1]))


@lru_cache(maxsize=1)
def _emblems() -> dict[bytes, tuple[str, str]]:
    """(emblem, colour) by the bytes of its reference picture."""
    return {draw_reference(e, c).tobytes(): (e, c) for e in EMBLEMS for c in PALETTE if c != "white"}


def _free(taken: set[str], made: Sequence[Meant]) -> str:
    used = taken | {m.item.cell for m in made if m.item}
    return next((c for c in (*_FIRST, *CELLS) if c not in used), "center")


def _called(item: Item) -> str:
    return f"text '{item.value}'" if item.kind == "text" else f"{item.colour} {item.value}"
