"""The released evaluator's files results_eval.json, summary.json and summary.csv: the same bytes from the same rows.

It averages in two ways. `average_scores` (the rows appended to results_eval.json) leaves text_accuracy of rows that
need no text out and weighs the four means anew; `summarize` (summary.json and summary.csv) averages every field,
`overall` included, over all judged rows, those 0.5 among them.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from genevolve_fast.files import write_text
from genevolve_fast.protocols import ImageVerdict
from genevolve_fast.resumable import read_objects
from genevolve_fast.trajectory import json_text

DIMENSIONS = ("faithfulness", "visual_correctness", "text_accuracy", "aesthetics")
FIELDS = (*DIMENSIONS, "overall")
COUNTS = ("count_eval_success", "denominator", "missing_or_failed")
NOT_EVALUATED = "not_evaluated"
_MAX_RATIONALE = 1000
_MAX_ERROR = 300
_PICTURE_FIELDS = ("output_path", "image_path", "generated_image", "gen_image")
_TRUTH_FIELDS = ("gt_image", "ground_truth", "target_image", "reference_image")
_META_TRUTH_FIELDS = ("gt_image", "ground_truth", "target_image", "gt_copied_path")

Row = Mapping[str, Any]


# --- rows -------------------------------------------------------------------------------------------------------------


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a results.json (or results_eval.json, without its summaries). Raises BatchError naming the bad row."""
    return [row for row in read_objects(path) if "summary_type" not in row]


def row_id(row: Row, position: int) -> str:
    """The id as text; a row without one has its position."""
    return str(row.get("id", position))


def prompt_of(row: Row) -> str:
    return str(row.get("prompt") or row.get("question") or "").strip()


def track_of(row: Row) -> str:
    """Knowledge-Anchored, Quality-Anchored, or what else the row names."""
    return str(_meta(row).get("eval_type") or row.get("eval_type") or row.get("tier") or "unknown")


def category_of(row: Row) -> str:
    return str(row.get("category") or _meta(row).get("category") or "unknown")


def difficulty_of(row: Row) -> str:
    return str(row.get("difficulty") or _meta(row).get("difficulty") or "unknown")


def _case_id(row: Row) -> str:
    return str(_meta(row).get("case_id") or _meta(row).get("source_id") or row.get("id"))


def _meta(row: Row) -> Row:
    return row["meta"] if isinstance(row.get("meta"), dict) else {}


# --- paths ------------------------------------------------------------------------------------------------------------


def roots_of(results: Path, truth_roots: Sequence[Path] = ()) -> list[Path]:
    """Where relative paths are looked up: beside results.json, here, then the given roots."""
    return [results.resolve().parent, Path.cwd(), *(Path(root).resolve() for root in truth_roots)]


def picture_path(row: Row, roots: Sequence[Path]) -> Path | None:
    """The generated picture of a row, where one exists."""
    return _first_existing(row, _PICTURE_FIELDS, roots)


def truth_path(row: Row, roots: Sequence[Path]) -> Path | None:
    """The ground-truth picture of a row, where one exists."""
    return _first_existing(row, _TRUTH_FIELDS, roots) or _first_existing(_meta(row), _META_TRUTH_FIELDS, roots)


def _first_existing(row: Row, names: Sequence[str], roots: Sequence[Path]) -> Path | None:
    return next((path for name in names if (path := existing_file(row.get(name), roots))), None)


def existing_file(value: Any, roots: Sequence[Path]) -> Path | None:
    """The file that a field of a row names, looked up in `roots` where it is relative."""
    raw = os.path.expanduser("" if value is None else str(value).strip())
    for root in roots if raw else ():  # an absolute path replaces the root
        if os.path.isfile(path := os.path.join(root, raw)):
            return Path(path)
    return None


def rendered(row: Row, roots: Sequence[Path]) -> bool:
    """Whether the renderer says that it drew the row."""
    if "success" in row:
        return bool(row["success"])
    return row.get("image_status") == "ok" or picture_path(row, roots) is not None


# --- one row ----------------------------------------------------------------------------------------------------------


def scores_of(verdict: ImageVerdict) -> dict[str, Any]:
    """The `scores` object of a row; `text_accuracy_na` only stands in it when it is true."""
    f, v, a = (_clipped(getattr(verdict, n)) for n in ("faithfulness", "visual_correctness", "aesthetics"))
    t = _clipped(verdict.text_accuracy) if verdict.text_required else 0.5
    scores = {
        "rationale": verdict.rationale[:_MAX_RATIONALE],
        "faithfulness": f,
        "visual_correctness": v,
        "text_accuracy": t,
        "aesthetics": a,
        "overall": round(_weighed(f, v, t, a), 2),
    }
    return scores if verdict.text_required else scores | {"text_accuracy_na": True}


def judged_row(row: Row, scores: Row) -> dict[str, Any]:
    return dict(row) | {"eval_success": True, "scores": dict(scores), "error": None}


def failed_row(row: Row, error: str = NOT_EVALUATED) -> dict[str, Any]:
    return dict(row) | {"eval_success": False, "scores": None, "error": error[:_MAX_ERROR]}


def is_judged(row: Row) -> bool:
    return row.get("eval_success") is True and isinstance(row.get("scores"), dict)


def needs_text(scores: Row) -> bool:
    return not scores.get("text_accuracy_na")


def _clipped(value: float) -> float:
    return round(max(0.0, min(1.0, float(value))), 2)


def _weighed(f: float, v: float, t: float, a: float) -> float:
    return 0.1 * f + 0.4 * v + 0.4 * t + 0.1 * a  # in this order: the last bit decides a rounding


# --- averages ---------------------------------------------------------------------------------------------------------


def average_scores(scores: Sequence[Row]) -> dict[str, float]:
    """Means with text_accuracy over rows that need text (0.5 where none does) and `overall` from these means."""
    if not scores:
        return dict.fromkeys(FIELDS, 0.0)
    means = {n: _mean(_numbers(scores, n)) for n in ("faithfulness", "visual_correctness", "aesthetics")}
    text = _numbers([s for s in scores if needs_text(s)], "text_accuracy")
    means["text_accuracy"] = _mean(text) if text else 0.5
    return {n: means[n] for n in DIMENSIONS} | {"overall": round(_weighed(*(means[n] for n in DIMENSIONS)), 4)}


def summarize(rows: Sequence[Row], denominator: int) -> dict[str, Any]:
    """Means over judged rows, counts, and `overall_missing_zero` over the full denominator."""
    judged = [row for row in rows if is_judged(row)]
    out: dict[str, Any] = {name: _mean(_numbers([r["scores"] for r in judged], name)) for name in FIELDS}
    out |= dict(zip(COUNTS, (len(judged), denominator, max(0, denominator - len(judged))), strict=True))
    missing_zero = round(out["overall"] * len(judged) / denominator, 4) if denominator else 0.0
    return out | {"overall_missing_zero": missing_zero}


def _numbers(scores: Sequence[Row], name: str) -> list[float]:
    return [float(s[name]) for s in scores if isinstance(s.get(name), int | float)]


def _mean(values: Sequence[float]) -> float:
    return round(sum(values) / len(values), 4) if values else 0.0


def _split(rows: Sequence[Row], of: Callable[[Row], str]) -> dict[str, list[Row]]:
    out: dict[str, list[Row]] = {}
    for row in rows:
        out.setdefault(of(row), []).append(row)
    return dict(sorted(out.items()))


# --- files ------------------------------------------------------------------------------------------------------------


def evaluated(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The content of results_eval.json: all rows in their order, then the means of each track and of all."""
    out = [dict(row) for row in rows]
    for track, members in _split(rows, track_of).items():
        out.append(_appended(f"eval_type:{track}", members))
    return [*out, _appended("overall_avg", rows)]


def _appended(name: str, rows: Sequence[Row]) -> dict[str, Any]:
    scores = [row["scores"] for row in rows if is_judged(row)]
    return {"summary_type": name, "avg_scores": average_scores(scores), "count": len(scores)}


def summary(rows: Sequence[Row], eval_path: Path, total_cases: int = 0, roots: Sequence[Path] = ()) -> dict[str, Any]:
    """The content of summary.json; `total_cases` is the denominator of all rows, their number where it is 0."""
    total = total_cases or len(rows)
    out: dict[str, Any] = {"eval_json": str(eval_path), "total_cases": total, "all": summarize(rows, total)}
    splits = (("by_eval_type", track_of), ("by_category", category_of), ("by_difficulty", difficulty_of))
    for name, of in splits:
        out[name] = {value: summarize(members, len(members)) for value, members in _split(rows, of).items()}
    drawn = [rendered(row, roots) for row in rows]
    out["missing_case_ids"] = [_case_id(row) for row, ok in zip(rows, drawn, strict=True) if not ok]
    out["failed_case_ids"] = [
        _case_id(row) for row, ok in zip(rows, drawn, strict=True) if ok and row.get("eval_success") is not True
    ]
    return out


def summary_csv(made: Row) -> str:
    """The content of summary.csv: one line for all rows, each track, category and difficulty."""
    names = ("split", *COUNTS, *FIELDS, "overall_missing_zero")
    lines = [{"split": "all", **made["all"]}]
    for kind in ("eval_type", "category", "difficulty"):
        lines += [{"split": f"{kind}:{value}", **metrics} for value, metrics in sorted(made[f"by_{kind}"].items())]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=names)
    writer.writeheader()
    writer.writerows({name: line.get(name, "") for name in names} for line in lines)
    return text.getvalue()


def write_score_files(
    folder: Path, rows: Sequence[Row], total_cases: int = 0, roots: Sequence[Path] = ()
) -> dict[str, Any]:
    """Write the three files of judged and failed `rows` into `folder`; returns what summary.json holds."""
    folder = folder.resolve()
    write_text(folder / "results_eval.json", json_text(evaluated(rows), indent=2))
    made = summary(rows, folder / "results_eval.json", total_cases, roots)
    write_text(folder / "summary.json", json_text(made, indent=2))
    write_text(folder / "summary.csv", summary_csv(made))
    return made
