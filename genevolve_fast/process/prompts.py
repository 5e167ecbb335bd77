"""What the policy is told when it grows a picture, and what it reads between its stages."""

from __future__ import annotations

from typing import Literal

from genevolve_fast.process.trace import SOUND
from genevolve_fast.trajectory import StageName

VERSION = 1  # of these words; a process begun with others is not continued
DONE = "done"
Prompts = Literal["scene", "edit"]

_INSTRUCTION = """\
You grow a picture in cycles until it shows what the request asks for. Every turn is one stage; write it in its form and
nothing else.
Plan: <ins>what to add or change now</ins><des>the whole scene as it should be so far</des>
Inspect, after a draft: <inspect>what it shows plan: {sound} draft: {sound}</inspect>. Write after "plan:" where the
plan contradicts the request and after "draft:" where the draft contradicts the plan. What is not yet painted is no
fault.
Refine, after a fault: <refine>what to mend</refine>
There are at most {cycles} cycles. In place of a next plan write {done} when the picture is complete."""
_DRAWS = {
    "scene": "The renderer knows no earlier draft: it draws <des> and, when you refine, <refine> in its place. Write "
    "both as a whole prompt.",
    "edit": "The renderer edits the last draft as <ins> or <refine> says; <des> tells it the whole scene.",
}
_FORMS = {
    "plan": "<ins>what to add or change now</ins><des>the whole scene so far</des>",
    "sketch": "",
    "inspect": f"<inspect>plan: {SOUND} draft: {SOUND}</inspect>, with the faults in place of {SOUND}",
    "refine": "<refine>what to mend</refine>",
}


def instruction(prompts: Prompts, max_cycles: int, references: int = 0) -> str:
    """The system prompt; `references`: pictures that the program hands to the renderer."""
    text = _INSTRUCTION.format(sound=SOUND, cycles=max_cycles, done=DONE)
    given = "The renderer is also given the first reference image"
    given += " and the second" * (references > 1) + " and others" * (references > 2) + "."
    return f"{text}\n{_DRAWS[prompts]}" + (f"\n{given}" if references else "")


def next_stage(stage: StageName, ends: bool = False) -> str:
    """What asks for a stage's text; `ends`: or for the end."""
    return f"{stage.capitalize()}: {_FORMS[stage]}" + (f"; or {DONE}" if ends else "")


def unreadable(reason: str, stage: StageName, ends: bool) -> str:
    return f"This could not be read: {reason}. {next_stage(stage, ends)}"


def not_drawn(reason: str) -> str:
    return f"No draft: the renderer failed ({reason}). The picture is still the last draft."


def is_end(text: str) -> bool:
    return text.strip().rstrip(".").lower() in ("", DONE)
