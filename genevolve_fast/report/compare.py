"""`compare.html`: the same programs through two renderers, side by side, in one self-contained file."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from genevolve_fast.files import write_text
from genevolve_fast.net.pictures import decode_image
from genevolve_fast.net.web import FetchError
from genevolve_fast.report.build import ReportError, filled

DIMENSIONS = ("faithfulness", "visual_correctness", "text_accuracy", "aesthetics", "overall")
MAX_ROWS = 600  # in the file; every row counts in its numbers
THUMBNAIL = 320  # pixels of the longest side
_MAX_PIXELS = 100_000_000
_MAX_TEXT = 4000  # characters of a prompt or a rationale

Key = tuple[str, int]  # id, and which of the rows with that id


@dataclass(frozen=True)
class Side:
    """A folder of pictures: its rows, scored where a results_eval.json is there."""

    name: str
    rows: Mapping[Key, Mapping[str, Any]]
    roots: tuple[Path, ...]

    def scores(self, key: Key) -> Mapping[str, Any] | None:
        row = self.rows[key]
        judged = row.get("eval_success") is True and isinstance(row.get("scores"), dict)
        return row["scores"] if judged else None


def read_side(folder: Path, truth_roots: Sequence[Path] = (), name: str = "") -> Side:
    """A folder with results.json, scored or not, or that of a bench with its stages. Raises ReportError."""
    staged = (folder / "render" / "results.json").exists()
    results = folder / "render" / "results.json" if staged else folder / "results.json"
    scored = folder / "score" / "results_eval.json" if staged else folder / "results_eval.json"
    rows = _rows(results)
    if scored.exists():
        judged = _rows(scored)
        for key in rows.keys() & judged.keys():
            rows[key] = rows[key] | {n: judged[key].get(n) for n in ("eval_success", "scores") if n in judged[key]}
            if judged[key].get("eval_success") is False:
                rows[key]["judge_error"] = judged[key].get("error")
    roots = (results.resolve().parent, Path.cwd(), *(Path(root).resolve() for root in truth_roots))
    return Side(name or folder.resolve().name, rows, roots)


def _rows(path: Path) -> dict[Key, dict[str, Any]]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ReportError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ReportError(f"{path} is not JSON: {error}") from None
    if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
        raise ReportError(f"{path} must hold a list of rows")
    out: dict[Key, dict[str, Any]] = {}
    times: Counter[str] = Counter()
    for n, row in enumerate(found):
        if "summary_type" not in row:
            name = str(row.get("id", n))
            out[name, times[name]] = row
            times[name] += 1
    return out


def build_comparison(a: Side, b: Side, out: Path, interval: Callable[[Sequence[float]], object] | None = None) -> Path:
    """Write the page of rows that both sides have to `out`. Raises ReportError where they share none.

    `interval` makes a text of a dimension's differences b − a, such as their mean with a confidence interval.
    """
    shared = [key for key in a.rows if key in b.rows]
    if not shared:
        raise ReportError(f"{a.name} and {b.name} share no id: compare two renderings of the same results.json")
    thumbnails = Thumbnails()
    shown = sorted(shared, key=lambda key: -abs(_difference(a, b, key, "overall") or 0.0))[:MAX_ROWS]
    kept = set(shown)
    data = {
        "names": [a.name, b.name] if a.name != b.name else [f"{a.name} (A)", f"{b.name} (B)"],
        "dimensions": DIMENSIONS,
        "shared": len(shared),
        "only": [len(a.rows) - len(shared), len(b.rows) - len(shared)],
        "other_programs": sum(not _same_program(a.rows[k], b.rows[k]) for k in shared),
        "summary": [_summary(a, b, shared, dimension, interval) for dimension in DIMENSIONS],
        "rows": [_row(a, b, key, thumbnails) for key in shared if key in kept],
    }
    data["images"] = thumbnails.uris
    write_text(out, filled("compare.html", " · ".join(data["names"]), _plain(data)))
    return out


class Thumbnails:
    """WEBP data URIs of at most THUMBNAIL pixels, each picture once."""

    def __init__(self) -> None:
        self.uris: list[str] = []
        self._index: dict[str, int | None] = {}

    def add(self, value: Any, roots: Sequence[Path]) -> int | None:
        """The number of the picture that a field names; None where there is none."""
        path = _file(value, roots)
        if path is None:
            return None
        try:
            data = path.read_bytes()
        except OSError:
            return None
        key = hashlib.sha256(data).hexdigest()
        if key not in self._index:
            self._index[key] = self._shrunk(data)
        return self._index[key]

    def _shrunk(self, data: bytes) -> int | None:
        from PIL import Image

        try:
            pixels = decode_image(data, _MAX_PIXELS, THUMBNAIL).pixels
        except FetchError:
            return None
        out = io.BytesIO()
        Image.fromarray(pixels).save(out, "WEBP", quality=80)
        self.uris.append("data:image/webp;base64," + base64.b64encode(out.getvalue()).decode())
        return len(self.uris) - 1


def _file(value: Any, roots: Sequence[Path]) -> Path | None:
    raw = value.strip() if isinstance(value, str) else ""
    found = (os.path.join(root, raw) for root in roots if raw)  # an absolute path replaces the root
    return next((Path(path) for path in found if os.path.isfile(path)), None)


def _row(a: Side, b: Side, key: Key, thumbnails: Thumbnails) -> dict[str, Any]:
    first, second = a.rows[key], b.rows[key]
    meta = first["meta"] if isinstance(first.get("meta"), dict) else {}
    truth = first.get("gt_image") or meta.get("gt_image")
    same = _same_program(first, second)
    sides = []
    for side, row in ((a, first), (b, second)):
        scores = side.scores(key)
        sides.append(
            {
                "image": thumbnails.add(row.get("output_path") or row.get("image_path"), side.roots),
                "scores": None if scores is None else [_score(scores, d) for d in DIMENSIONS],
                "why": _text(scores.get("rationale") if scores else row.get("judge_error") or row.get("render_error")),
                "program": None if same and sides else _text(row.get("gen_prompt")),
            }
        )
    return {
        "id": key[0] if not key[1] else f"{key[0]} #{key[1] + 1}",
        "prompt": _text(first.get("prompt") or first.get("question")),
        "track": str(meta.get("eval_type") or first.get("eval_type") or ""),
        "truth": thumbnails.add(truth, [*a.roots, *b.roots]),
        "sides": sides,
    }


def _summary(
    a: Side, b: Side, keys: Sequence[Key], dimension: str, interval: Callable[[Sequence[float]], object] | None
) -> dict[str, Any]:
    """Means of both over the rows where both have the score, and how often which is higher."""
    pairs = [
        (x, y) for k in keys if (x := _of(a, k, dimension)) is not None and (y := _of(b, k, dimension)) is not None
    ]
    differences = [y - x for x, y in pairs]
    n = len(pairs)
    return {
        "dimension": dimension,
        "n": n,
        "means": [math.fsum(x for x, _ in pairs) / n, math.fsum(y for _, y in pairs) / n] if n else None,
        "difference": str(interval(differences)) if n and interval else "",
        "higher": [sum(d < 0 for d in differences), sum(d > 0 for d in differences)],
    }


def _difference(a: Side, b: Side, key: Key, dimension: str) -> float | None:
    x, y = _of(a, key, dimension), _of(b, key, dimension)
    return None if x is None or y is None else y - x


def _of(side: Side, key: Key, dimension: str) -> float | None:
    scores = side.scores(key)
    return None if scores is None else _score(scores, dimension)


def _score(scores: Mapping[str, Any], dimension: str) -> float | None:
    """A score; the text_accuracy of a row that needs no text is none."""
    if dimension == "text_accuracy" and scores.get("text_accuracy_na"):
        return None
    value = scores.get(dimension)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _same_program(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    return first.get("gen_prompt") == second.get("gen_prompt")


def _text(value: Any) -> str:
    return str(value)[:_MAX_TEXT] if value else ""


def _plain(value: Any) -> Any:
    """Floats of four digits, for a smaller file."""
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value
