"""The demonstrator: a script with stated bad habits that shows the tiny policy the protocol."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence

from genevolve_fast.protocols import Experience
from genevolve_fast.sandbox.comparer import habits_in
from genevolve_fast.sandbox.habits import FITTING_SKILL, HABITS, applicable
from genevolve_fast.sandbox.scene import CELLS, PALETTE, Item, Scene
from genevolve_fast.sandbox.world import MOTTOS, NUMBER_WORDS, RELATION_CELLS
from genevolve_fast.trajectory import Message, Request

OBEDIENCE = 0.9  # below 1, so that the policy learns to carry on calmly where a decision was not the one it was told
_UNFITTING = ("aesthetic_drawing", "creative_drawing", "anatomy_body_coherence")
_IMAGE_LINE = re.compile(r"(IMG_\d+): title: ([^\n<]+)")
_ORDINALS = ("", "second ", "third ")


def coin(seed: int, *parts: object) -> float:
    """A number in [0, 1) that depends on its arguments only."""
    digest = hashlib.blake2b(repr((seed, *parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


class Demonstrator:
    """Writes the next turn from the conversation so far. Its habits are coins, drawn once per trajectory."""

    def __init__(self, habits: Mapping[str, float] = HABITS) -> None:
        self.habits = dict(habits)

    def decisions(self, request: Request, coin_seed: int, experience: Experience | None = None) -> dict[str, bool]:
        """Right or wrong for every applicable habit; what an experience names is obeyed, with a slip now and then."""
        told = habits_in(experience) if experience else set()
        return {
            h: coin(coin_seed, request.id, h) < (max(OBEDIENCE, self.habits[h]) if h in told else self.habits[h])
            for h in applicable(request)
        }

    def next_turn(
        self, request: Request, messages: Sequence[Message], coin_seed: int, experience: Experience | None = None
    ) -> str:
        """Text of the next assistant turn (without the token that ends it)."""
        right = self.decisions(request, coin_seed, experience)
        plan = self._plan(request, right, coin_seed)
        done = sum(m.role == "assistant" for m in messages)
        return plan[done] if done < len(plan) else self._answer(request, messages, right, coin_seed)

    # --- tool calls ---------------------------------------------------------------------------------------------------

    def _plan(self, request: Request, right: Mapping[str, bool], seed: int) -> list[str]:
        entity, calls = request.extra["entity"], []
        if right.get("search_fact"):
            fact = "field" if request.category == "emblem_field" else "motto"
            calls.append(_call(f"Find the {fact} of {entity}.", "search", {"queries": [f"{entity} {fact}"]}))
        if entity:
            queries = (f"{entity} emblem", f"emblem of {entity}", f"{entity} emblem picture")
            query = queries[int(coin(seed, request.id, "query") * len(queries))]  # no place has one order of results
            calls.append(_call(f"Find the emblem of {entity}.", "image_search", {"query": query}))
        if skill := self._skill(request, right, seed):
            calls.append(_call(f"Read {skill}.", "query_knowledge", {"skill_name": skill}))
        return calls

    def _skill(self, request: Request, right: Mapping[str, bool], seed: int) -> str | None:
        """The skill called: the fitting one, or with even chances an unfitting one or none."""
        if "fitting_skill" not in right:
            return None
        if right["fitting_skill"]:
            return FITTING_SKILL[request.category]
        pick = int(coin(seed, request.id, "unfitting") * 2 * len(_UNFITTING))
        return _UNFITTING[pick] if pick < len(_UNFITTING) else None

    # --- the answer ---------------------------------------------------------------------------------------------------

    def _answer(self, request: Request, messages: Sequence[Message], right: Mapping[str, bool], seed: int) -> str:
        skill = self._skill(request, right, seed)
        rule = bool(right.get("fitting_skill") and right.get("apply_rule"))  # no guidance, no rule to apply
        scene = Scene.from_json(request.extra["checklist"])
        sentences = [f"Background {self._ground(request, scene, messages, seed)}."]
        references, thought = [], []
        if request.extra["entity"]:
            image = self._reference(request, messages, right, seed)
            if image:
                references.append({"img_id": image[0], "note": image[1]})
                thought.append(f"Use {image[0]}.")
        if skill:
            thought.append(f"Apply {skill}." if rule else f"Note {skill}.")
        sentences += self._things(request, scene, messages, right, rule, seed)
        answer = json.dumps({"gen_prompt": " ".join(sentences), "reference_images": references})
        return f"<think>\n{' '.join(thought) or 'Write the program.'}\n</think>\n<answer>\n{answer}\n</answer>"

    def _ground(self, request: Request, scene: Scene, messages: Sequence[Message], seed: int) -> str:
        if request.category != "emblem_field":
            return scene.background
        found = re.search(rf"field of {request.extra['entity']} is (\w+)", _observations(messages))
        return found[1] if found else list(PALETTE)[int(coin(seed, request.id, "guess") * len(PALETTE))]

    def _motto(self, request: Request, messages: Sequence[Message], seed: int) -> str:
        found = re.search(rf"motto of {request.extra['entity']} is (\w+)", _observations(messages))
        return found[1] if found else MOTTOS[int(coin(seed, request.id, "guess") * len(MOTTOS))]

    def _reference(self, request: Request, messages: Sequence[Message], right: Mapping[str, bool], seed: int):
        """(id, title) of the reference chosen: the entity's emblem, or another of the results."""
        shown = [(i, t.strip()) for i, t in _IMAGE_LINE.findall(_observations(messages))]
        wanted = f"emblem of {request.extra['entity']}"
        fitting = [s for s in shown if s[1] == wanted]
        others = [s for s in shown if s[1] != wanted]
        if (right["right_reference"] and fitting) or not others:
            return fitting[0] if fitting else None
        return others[int(coin(seed, request.id, "other") * len(others))]

    def _things(self, request, scene: Scene, messages, right: Mapping[str, bool], rule: bool, seed: int) -> list[str]:
        match request.category:
            case "emblem_field" | "emblem_motto":
                emblem = next(i for i in scene.items if i.kind == "emblem")
                name = "the first reference image" if right["ordinal_binding"] else request.extra["entity"]
                out = [f"The emblem of {name} at the {emblem.cell}."]
                if request.category == "emblem_motto":
                    text = scene.texts[0]
                    motto = self._motto(request, messages, seed)
                    out.append(_text(Item("text", motto, text.cell), rule))
                return out
            case "count_row":
                return _objects(scene.items) if rule else plurals(scene.items)
            case "relation":
                return _objects(scene.items) if rule else _relative(request, scene.items)
            case _:
                objects = [i for i in scene.items if i.kind == "object"]
                return _texts(scene.texts, rule, right.get("one_line_per_text", True)) + _objects(objects)


class PerfectDemonstrator(Demonstrator):
    """The demonstrator with every habit right: the ceiling of the bench."""

    def __init__(self) -> None:
        super().__init__(dict.fromkeys(HABITS, 1.0))


def _call(thought: str, tool: str, arguments: dict) -> str:
    call = json.dumps({"name": tool, "arguments": arguments})
    return f"<think>\n{thought}\n</think>\n<tool_call>\n{call}\n</tool_call>"


def _observations(messages: Sequence[Message]) -> str:
    return "\n".join(m.content for m in messages[2:] if m.role != "assistant")


def _text(item: Item, placed: bool) -> str:
    return f"The text '{item.value}' at the {item.cell}." if placed else f"The text '{item.value}'."


def _texts(items: Sequence[Item], placed: bool, separate: bool) -> list[str]:
    if separate:
        return [_text(i, placed) for i in items]
    parts = [f"'{i.value}' at the {i.cell}" if placed else f"'{i.value}'" for i in items]
    return [f"The texts {' and '.join(parts)}."]


def _objects(items: Sequence[Item]) -> list[str]:
    """One sentence for each object; equal ones are told apart by an ordinal."""
    seen: dict[tuple[str, str], int] = {}
    out = []
    for i in items:
        n = seen[i.colour, i.value] = seen.get((i.colour, i.value), -1) + 1
        out.append(f"A {_ORDINALS[n]}{i.colour} {i.value} at the {i.cell}.")
    return out


def plurals(items: Sequence[Item]) -> list[str]:
    """Equal objects of a row in one sentence, without places."""
    groups: dict[tuple[str, str, int], int] = {}
    for i in items:
        key = (i.colour, i.value, CELLS[i.cell][0])
        groups[key] = groups.get(key, 0) + 1
    rows = ("top", "middle", "bottom")
    return [f"{NUMBER_WORDS[n].capitalize()} {c} {s}s at the {rows[r]}." for (c, s, r), n in groups.items()]


def _relative(request: Request, items: Sequence[Item]) -> list[str]:
    return [paired(request, items), *_objects(items[2:])]


def paired(request: Request, items: Sequence[Item]) -> str:
    """The first two items by their relation, without places."""
    how = next(h for h, cells in RELATION_CELLS.items() if f" {h} " in request.question and cells[0] == items[0].cell)
    a, b = items[0], items[1]
    return f"A {a.colour} {a.value} {how} a {b.colour} {b.value}."
