"""The six decisions that make or break a sandbox rollout, and how to see them in one."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from genevolve_fast.sandbox import grammar
from genevolve_fast.trajectory import Message, Program, Request

HABITS: dict[str, float] = {  # how often the demonstrator does the right thing, each decided independently
    "search_fact": 0.6,
    "right_reference": 0.6,
    "fitting_skill": 0.6,
    "apply_rule": 0.65,
    "ordinal_binding": 0.6,
    "one_line_per_text": 0.6,
}
FITTING_SKILL = {
    "count_row": "quantity_counting",
    "relation": "spatial_layout",
    "text_sign": "text_rendering",
    "emblem_motto": "text_rendering",
}
_TOOL_CALL = re.compile(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", re.DOTALL)


def applicable(request: Request) -> list[str]:
    """The habits that this request puts to the test."""
    knowledge = request.category in ("emblem_field", "emblem_motto")
    texts = sum(i["kind"] == "text" for i in request.extra["checklist"]["items"])
    names = ["search_fact", "right_reference"] if knowledge else []
    names += ["fitting_skill", "apply_rule"] if request.category in FITTING_SKILL else []
    names += ["ordinal_binding"] if knowledge else []
    names += ["one_line_per_text"] if texts > 1 else []
    return names


def tool_calls(messages: Sequence[Message]) -> list[tuple[str, dict]]:
    """(name, arguments) of every readable tool call, in order."""
    calls = []
    for message in messages:
        if message.role == "assistant" and (match := _TOOL_CALL.search(message.content)):
            try:
                call = json.loads(match[1])
                calls.append((str(call["name"]), dict(call["arguments"])))
            except (ValueError, TypeError, KeyError, RecursionError):
                continue
    return calls


def observed(request: Request, messages: Sequence[Message], program: Program | None) -> dict[str, bool]:
    """Which of the applicable habits a rollout showed."""
    calls = tool_calls(messages)
    statements = grammar.parse(program.gen_prompt) if program else []
    skill = FITTING_SKILL.get(request.category)
    emblems = [s for s in statements if isinstance(s, grammar.Emblem)]
    texts = [s for s in statements if isinstance(s, grammar.Text)]
    objects = [s for s in statements if isinstance(s, grammar.Object)]
    titles = [r.title for r in program.reference_images] if program else []
    seen = {
        "search_fact": any(name == "search" for name, _ in calls),
        "right_reference": f"emblem of {request.extra.get('entity')}" in titles,
        "fitting_skill": any(name == "query_knowledge" and a.get("skill_name") == skill for name, a in calls),
        "apply_rule": {
            "quantity_counting": bool(objects) and not any(isinstance(s, grammar.Group) for s in statements),
            "spatial_layout": bool(objects) and all(o.cell and not o.relation for o in objects),
            "text_rendering": bool(texts) and all(t.cell for t in texts),
            None: False,
        }[skill],
        "ordinal_binding": bool(emblems) and all(e.reference is not None for e in emblems),
        "one_line_per_text": bool(texts) and not any(t.shared for t in texts),
    }
    return {name: seen[name] for name in applicable(request)}
