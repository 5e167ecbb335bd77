"""Our own table of a scored results.json: each track and all rows, text_accuracy over the rows that need text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from genevolve_fast.evaluate.published import PublishedRow, beside
from genevolve_fast.evaluate.score_files import DIMENSIONS, is_judged, needs_text, track_of

PUBLISHED_ROWS = 594
PUBLISHED_JUDGE = "gemini-3.1-pro-preview"
TRACKS = ("Knowledge-Anchored", "Quality-Anchored")
_COLUMNS = ("denominator", "judged", *DIMENSIONS, "text_rows", "overall", "overall_missing_zero")
_HEADS = ("rows", "judged", "faithful", "visual", "text", "aesthet.", "text rows", "overall", "miss.=0")


def tracks(rows: Sequence[Mapping[str, Any]], total_cases: int = 0) -> dict[str, dict[str, float | int | None]]:
    """`all` and each eval_type: means over judged rows, None where there is none to average.

    text_accuracy over the `text_rows` that need text; overall over all judged rows; overall_missing_zero over the
    denominator (`total_cases` for all rows, where given).
    """
    out = {"all": _means(rows, total_cases or len(rows))}
    for track in sorted({track_of(row) for row in rows}):
        members = [row for row in rows if track_of(row) == track]
        out[track] = _means(members, len(members))
    return out


def _means(rows: Sequence[Mapping[str, Any]], denominator: int) -> dict[str, float | int | None]:
    scores = [row["scores"] for row in rows if is_judged(row)]
    text = [s for s in scores if needs_text(s)]
    out: dict[str, float | int | None] = {"denominator": denominator, "judged": len(scores)}
    for name in DIMENSIONS:
        out[name] = _mean([s[name] for s in (text if name == "text_accuracy" else scores)])
    out |= {"text_rows": len(text), "overall": _mean([s["overall"] for s in scores])}
    zero = math.fsum(s["overall"] for s in scores) / denominator if denominator else None
    return out | {"overall_missing_zero": zero}


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def table(made: Mapping[str, Mapping[str, float | int | None]]) -> str:
    """`tracks` as text."""
    width = max(len(name) for name in made)
    lines = [f"{'':{width}} " + " ".join(f"{head:>9}" for head in _HEADS)]
    for name, means in made.items():
        lines.append(f"{name:{width}} " + " ".join(_cell(means[column]) for column in _COLUMNS))
    return "\n".join(lines)


def _cell(value: float | int | None) -> str:
    if value is None:
        return f"{'-':>9}"
    return f"{value:9d}" if isinstance(value, int) else f"{value:9.4f}"


def beside_published(name: str, judge: str, summary: Mapping[str, Any]) -> str:
    """Our row beside the paper's, in the paper's average: that of summary.json, every judged row in every column."""
    whole, by_track = summary["all"], summary["by_eval_type"]
    ours = []
    if whole["count_eval_success"]:
        values = {n: whole[n] for n in (*DIMENSIONS, "overall")}
        for track in TRACKS:
            judged = track in by_track and by_track[track]["count_eval_success"]
            values[track] = by_track[track]["overall"] if judged else None
        ours = [PublishedRow(name, values)]
    note = (
        f"this run: {whole['count_eval_success']} of {whole['denominator']} rows judged by {judge}; published rows: "
        f"{PUBLISHED_ROWS} rows, judged by {PUBLISHED_JUDGE}. Another judge or other rows are another scale."
    )
    return f"{beside('genevolve_bench', ours, 4)}\n{note}"
