"""The one JSON object that a model was asked for, read from whatever it wrote, and never guessed."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

MAX_REPLY = 200_000  # characters; more is no verdict
_MAX_REPAIRED = 40_000  # repairing takes the square of it at worst
_MAX_BRACKETS = 1000  # of what is repaired, and tried as the beginning of an object
_SHOWN = 60


class ReplyError(ValueError):
    """A reply that cannot be used; the message tells the model why."""


def read_object(text: str, keys: Sequence[str], spelt: Sequence[str]) -> dict[str, Any]:
    """The object with `keys` in a model's reply. Raises ReplyError.

    Taken is JSON as it should be; else the only whole object in prose or code fences that has one of `keys`; else what
    json_repair makes of the text from that object's beginning on. Whatever else gives one of `keys` a value must be
    equal to it: a reply with two verdicts has none.
    Repairing may invent: it closes what was cut, so that 0.5 cut to "0" reads as 0. So the values of `spelt` (numbers
    and booleans) are believed only where the reply spells them to their end, each time the same.
    """
    if len(text) > MAX_REPLY:
        raise ReplyError(f"the reply has {len(text)} characters, it should be one short JSON object")
    said = _after_thought(text)
    if not said:
        raise ReplyError("the reply is empty")
    found, rest = _whole_objects(said, keys)
    if len(found) > 1 or (found and any(re.search(_QUOTED.format(key), rest) for key in map(re.escape, keys))):
        raise ReplyError("the reply holds several JSON objects, it should hold one")
    return found[0] if found else _repaired(said, keys, spelt)


def number_on(scale: Sequence[float], values: Mapping[str, Any], key: str) -> float:
    """The number at `key`, snapped to a step of `scale` within 1e-6. Raises ReplyError."""
    value = _at(values, key)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        for step in scale:
            if value == step or abs(min(value, 2) - step) <= 1e-6:  # an int may be too large for a float
                return float(step)
    raise ReplyError(f"{key} must be one of the numbers {', '.join(f'{s:g}' for s in scale)}, not {_short(value)}")


def boolean(values: Mapping[str, Any], key: str) -> bool:
    """Raises ReplyError where there is none."""
    value = _at(values, key)
    if not isinstance(value, bool):
        raise ReplyError(f"{key} must be true or false, not {_short(value)}")
    return value


def string(values: Mapping[str, Any], key: str) -> str:
    """Raises ReplyError where there is none."""
    value = _at(values, key)
    if not isinstance(value, str):
        raise ReplyError(f"{key} must be a string, not {_short(value)}")
    return value


def _at(values: Mapping[str, Any], key: str) -> Any:
    if key not in values:
        raise ReplyError(f"the key {key} is missing")
    return values[key]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _after_thought(text: str) -> str:
    """Without the thought that reasoning models write first, also where a template ate its opening tag."""
    _, closing, rest = text.partition("</think>")
    if not closing:
        return "" if text.lstrip().startswith("<think>") else text.strip()
    return text.strip() if text.lstrip().startswith("{") else rest.strip()  # inside a string it closes nothing


# --- whole objects ----------------------------------------------------------------------------------------------------


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) < len(pairs):
        raise ReplyError("a key of the JSON object is given twice")
    return out


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, strict=False)  # models break lines inside strings
_QUOTED = r"[\"'“”]{}[\"'“”]\s*:"


def _whole_objects(text: str, keys: Sequence[str]) -> tuple[list[dict[str, Any]], str]:
    """(the different objects with one of `keys` that are JSON as it should be, the text around them)."""
    found: list[dict[str, Any]] = []
    around, read_to, at = "", 0, text.find("{")
    for _ in range(_MAX_BRACKETS):
        if at < 0:
            break
        try:
            value, end = _DECODER.raw_decode(text, at)
        except ReplyError:
            raise
        except (ValueError, RecursionError):  # ValueError: also a number of thousands of digits
            at = text.find("{", at + 1)
            continue
        if any(key in value for key in keys):
            around, read_to = around + text[read_to:at], end
            if value not in found:
                found.append(value)
        at = text.find("{", end)
    return found, around + text[read_to:]


# --- repair -----------------------------------------------------------------------------------------------------------


def _repaired(text: str, keys: Sequence[str], spelt: Sequence[str]) -> dict[str, Any]:
    from json_repair import repair_json

    first = min((m.start() for key in keys if (m := re.search(_key(key), text))), default=-1)
    start = text.rfind("{", 0, first) if first >= 0 else -1
    if start < 0:
        raise ReplyError("the reply holds no JSON object with the keys that were asked for")
    text = text[start:]
    if len(text) > _MAX_REPAIRED or text.count("{") + text.count("[") > _MAX_BRACKETS:
        raise ReplyError("the reply is no JSON, and too long to make some of it")
    try:
        values = repair_json(text, return_objects=True, skip_json_loads=True)
    except (ValueError, RecursionError):
        raise ReplyError("the reply is no JSON") from None
    objects = values if isinstance(values, list) else [values]
    objects = [v for v in objects if isinstance(v, dict) and any(key in v for key in keys)]
    if len(objects) != 1:
        raise ReplyError("the reply holds no JSON object that could be told from the rest")
    for key in spelt:
        _check_spelt(text, key, objects[0])
    return objects[0]


def _key(key: str) -> str:
    return rf"(?<!\w)[\"'“”]?{re.escape(key)}[\"'“”]?\s*:"


def _check_spelt(text: str, key: str, values: Mapping[str, Any]) -> None:
    """Every time the text gives `key` a value it must be the one read, and something must end it."""
    written = [text[m.end() :].lstrip()[:_SHOWN] for m in re.finditer(_key(key), text)]
    read = [re.match(r"(-?\d+(?:\.\d+)?|true|false|null)\s*(?:,\s*[^\s\d]|[}\n])", w, re.IGNORECASE) for w in written]
    said = {_value(m[1]) if m else None for m in read}
    if None in said or said != {_value(str(values.get(key)))}:
        raise ReplyError(f"the reply is no JSON, and the value of {key} is cut or cannot be told")


def _value(literal: str) -> float | str | None:
    literal = {"none": "null"}.get(literal.lower(), literal.lower())
    if literal in ("true", "false", "null"):
        return literal
    try:
        return float(literal)
    except ValueError:
        return None
