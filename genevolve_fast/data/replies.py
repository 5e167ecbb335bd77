"""JSON objects out of what chat models write around them; a reply that can be read in two ways is not read at all."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

M = TypeVar("M", bound=BaseModel)
_THOUGHT = re.compile(r"<think>.*?</think>", re.DOTALL)


class ReplyError(ValueError):
    """The reply does not hold what was asked for; the message says why."""


def read_reply(text: str, form: type[M]) -> M:
    """The one object of `form` in a reply; fences, prose and slips of syntax are repaired. Raises ReplyError."""
    try:
        return form.model_validate(_object(text), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the object"
        raise ReplyError(f"{where}: {first['msg']}") from None


def _object(text: str) -> dict[str, Any]:
    import json_repair

    text = _THOUGHT.sub("", text)  # servers with reasoning parsers send the thought along
    found = list(_objects(text))
    if not found:
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


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """The JSON objects that stand in a text as they are."""
    decoder, at = json.JSONDecoder(), text.find("{")
    while at >= 0:
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            end = at + 1
        else:
            yield value
        at = text.find("{", end)
