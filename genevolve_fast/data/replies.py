"""JSON objects out of what chat models write around them; a reply that can be read in two ways is not read at all."""

from __future__ import annotations

import json
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

M = TypeVar("M", bound=BaseModel)


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

    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        try:
            value = json_repair.loads(text)
        except (ValueError, RecursionError) as error:
            raise ReplyError(f"no JSON: {type(error).__name__}") from None
    if isinstance(value, list):  # json_repair's answer to several objects
        found = [v for v in value if isinstance(v, dict)]
        if len(found) != 1:
            raise ReplyError(f"{len(found)} JSON objects, one was asked for")
        value = found[0]
    if not isinstance(value, dict):
        raise ReplyError("no JSON object")
    return value
