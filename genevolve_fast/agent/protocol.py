"""The released turn protocol: one tool call or one answer after a thought. Parsing never raises."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

_BLOCK = re.compile(r"<(tool_call|answer)>(.*?)</\1>", re.DOTALL)
_OPEN = re.compile(r"<(tool_call|answer)>")
_MAX_REASON = 160

FINAL_STEP = (
    "FINAL STEP: this is your last turn. Tool calls are ignored now. Write only <answer>{...}</answer> with what you "
    "have, in the form "
    '{"gen_prompt": "...", "reference_images": [{"img_id": "IMG_###", "note": "..."}]}.'
)
TOO_LONG = (
    "RESPONSE TOO LONG: the reply was cut off. Without a thought, write one short <tool_call>{...}</tool_call> or one "
    "<answer>{...}</answer>."
)
APPLY_GUIDANCE = "Say in your next thought how you apply this guidance."


def format_error(reason: str) -> str:
    """The corrective observation after a reply that could not be read."""
    return f"Format error: {reason}. Write one <tool_call>{{...}}</tool_call> or one <answer>{{...}}</answer>."


@dataclass(frozen=True)
class ToolCall:
    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Answer:
    gen_prompt: str
    reference_images: tuple[tuple[str, str], ...]  # (img_id, note) as written


@dataclass(frozen=True)
class FormatError:
    reason: str


ParsedReply = ToolCall | Answer | FormatError


def parse_reply(text: str) -> ParsedReply:
    """What a reply asks for. Exactly one block is allowed; whatever else it is, it is a FormatError with its reason."""
    blocks = _BLOCK.findall(text)
    opened = len(_OPEN.findall(text))
    if not blocks:
        return FormatError("a block is opened but not closed" if opened else "there is no tool call and no answer")
    if len(blocks) > 1 or opened > 1:
        return FormatError(f"{max(len(blocks), opened)} blocks in one reply, only one is allowed")
    kind, body = blocks[0]
    try:
        payload = json.loads(body)
    except (ValueError, RecursionError) as error:
        return FormatError(_short(f"the {kind} is not JSON: {error}"))
    if not isinstance(payload, dict):
        return FormatError(f"the {kind} is not a JSON object")
    return _tool_call(payload) if kind == "tool_call" else _answer(payload)


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _MAX_REASON else text[:_MAX_REASON] + "..."


def _tool_call(payload: dict[str, Any]) -> ToolCall | FormatError:
    name, arguments = payload.get("name"), payload.get("arguments", {})
    if not isinstance(name, str) or not name.strip():
        return FormatError("the tool call has no name")
    if not isinstance(arguments, dict):
        return FormatError("the arguments of the tool call are not a JSON object")
    return ToolCall(name.strip(), arguments)


def _answer(payload: dict[str, Any]) -> Answer | FormatError:
    prompt, references = payload.get("gen_prompt"), payload.get("reference_images", [])
    if not isinstance(prompt, str) or not prompt.strip():
        return FormatError("the answer has no gen_prompt")
    if not isinstance(references, list):
        return FormatError("reference_images is not a list")
    rows = []
    for r in references:
        if not isinstance(r, dict) or not isinstance(r.get("img_id"), str):
            return FormatError("a reference image has no img_id")
        note = r.get("note")
        rows.append((r["img_id"].strip(), note.strip() if isinstance(note, str) else ""))
    return Answer(prompt.strip(), tuple(rows))
