"""Published results beside ours: every row names where its numbers were read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources

TABLES = ("genevolve_bench", "wise", "wise_verified")
_SHORT = {"visual_correctness": "visual", "text_accuracy": "text", "Knowledge-Anchored": "Knowledge"}
_SHORT |= {"Quality-Anchored": "Quality", "faithfulness": "faithful"}


@dataclass(frozen=True)
class PublishedRow:
    """A row of a published table; `source` holds keys of `sources()`, empty for a result of our own."""

    name: str
    values: Mapping[str, float | None]
    source: tuple[str, ...] = ()


@lru_cache(maxsize=1)
def _data() -> dict:
    return json.loads((resources.files("genevolve_fast.evaluate") / "published_results.json").read_text("utf-8"))


def sources() -> dict[str, str]:
    return dict(_data()["sources"])


def columns(table: str) -> tuple[str, ...]:
    return tuple(_data()[table]["columns"])


def published(table: str) -> list[PublishedRow]:
    """The rows of one of TABLES."""
    names = columns(table)
    return [
        PublishedRow(row["name"], dict(zip(names, row["values"], strict=True)), tuple(row["source"]))
        for row in _data()[table]["rows"]
    ]


def beside(table: str, ours: Sequence[PublishedRow], digits: int) -> str:
    """Published rows and ours as text, by `overall`; ours are marked, and every source is named below."""
    names = columns(table)
    rows = sorted([*published(table), *ours], key=lambda r: (r.values.get("overall") is None, r.values.get("overall")))
    width = max(len(r.name) for r in rows) + 2
    heads = [_SHORT.get(n, n.lower() if n.isupper() else n) for n in names]
    lines = [f"{'':{width}} " + " ".join(f"{h:>9}" for h in heads) + "  source"]
    for r in rows:
        cells = (f"{r.values[n]:9.{digits}f}" if r.values.get(n) is not None else f"{'-':>9}" for n in names)
        mark = "> " if not r.source else "  "
        lines.append(f"{mark + r.name:{width}} " + " ".join(cells) + f"  {', '.join(r.source) or 'this run'}")
    used = sorted({s for r in rows for s in r.source})
    return "\n".join([*lines, "", *(f"{s}: {sources()[s]}" for s in used)])
