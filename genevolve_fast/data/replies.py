"""JSON objects out of what chat models write around them; a reply that can be read in two ways is not read at all."""

from __future__ import annotations

import json
import re
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

M = TypeVar("M", bound=BaseModel)
_THOUGHT = re.compile(r"<think>.*?</think>", re.DOTALL)


class ReplyError(ValueError):
    """The reply does not hold what was asked for; the message says why."""


def read_reply(text: str, form: type[M]) -> M:
    """The one object of `form` in a reply; fences, prose and slips of syntax are repaired. Raises ReplyError."""
    first, field = next(iter(form.model_fields.items()))
    try:
        return form.model_validate(_object(text, field.alias or first), strict=True)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"])) or "the object"
        raise ReplyError(f"{where}: {problem['msg']}") from None


def _object(text: str, key: str) -> dict[str, Any]:
    """The object with `key`: as it stands, else repaired where the key stands only once."""
    import json_repair

    text = _THOUGHT.sub("", text)  # servers with reasoning parsers send the thought along
    found = _objects(text)
    if not found:
        if (times := len(re.findall(rf"['\"]{re.escape(key)}['\"]\s*:", text))) > 1:
            raise ReplyError(f"{key} stands {times} times in what is no JSON")
        try:
            value = json_repair.loads(text)
        except (ValueError, RecursionError) as error:
            raise ReplyError(f"no JSON: {type(error).__name__}") from None
        found = [v for v in (value if isinstance(value, list) else [value]) if isinstance(v, dict) and v]
    if any(other != found[0] for other in found[1:]):
        raise ReplyError(f"{len(found)} different JSON objects, one was asked for")
    if not found:
        raise ReplyError("no JSON object")
    return found[0]


def _objects(text: str) -> list[dict[str, Any]]:
    """The JSON objects that stand in a text as they are; none where a brace opens anything else."""
    decoder, found, at = json.JSONDecoder(), [], text.find("{")
    while at >= 0:
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            return []
        found.append(value)
        at = text.find("{", end)
    return found
