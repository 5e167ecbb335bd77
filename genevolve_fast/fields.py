"""Fields of a configuration by name: FIELD=VALUE read, wrong ones told, all of them listed."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError


class FieldError(ValueError):
    """A FIELD=VALUE that cannot be read; the message names flag and field."""


def set_fields(data: dict[str, Any], pairs: Iterable[str], flag: str) -> None:
    """Put every `section.field=value` of `flag` into `data`, values in YAML. Raises FieldError."""
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals:
            raise FieldError(f"{flag} takes FIELD=VALUE, not {pair!r}")
        *sections, last = name.strip().split(".")
        inner = data
        for section in sections:
            inner = inner.setdefault(section, {})
            if not isinstance(inner, dict):
                raise FieldError(f"{flag} {name.strip()}: {section} is not a section")
        try:
            inner[last] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise FieldError(f"{flag} {name.strip()}: its value is not YAML") from None


def wrong_fields(error: ValidationError, whole: str = "(combination)") -> list[str]:
    """`field: what is wrong`, without pydantic's own words around a message of ours; `whole` is what has the fields."""
    found = []
    for e in error.errors():
        told = "there is no such field" if e["type"] == "extra_forbidden" else e["msg"].removeprefix("Value error, ")
        found.append(f"{'.'.join(map(str, e['loc'])) or whole}: {told}")
    return found


def describe(cls: type[BaseModel], prefix: str = "") -> list[tuple[str, Any, str]]:
    """(dotted field, default, description) of every field, sections expanded; a dataclass by its comments."""
    rows = []
    for name, info in cls.model_fields.items():
        default = info.get_default(call_default_factory=True)
        if isinstance(default, BaseModel):
            rows += describe(type(default), f"{prefix}{name}.")
        elif is_dataclass(default):
            comments = dict(re.findall(r"^    (\w+): .*  # (.+)$", inspect.getsource(type(default)), re.M))
            rows += [(f"{prefix}{name}.{f.name}", f.default, comments.get(f.name, "")) for f in fields(default)]
        else:
            rows.append((prefix + name, default, info.description or ""))
    return rows
