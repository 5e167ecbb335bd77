"""Rows of a results.json as the released render script reads and writes them."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from genevolve_fast.net.pictures import decode_image
from genevolve_fast.net.web import FetchError
from genevolve_fast.resumable import read_objects
from genevolve_fast.trajectory import Program, Reference, safe_name

MAX_FILE_BYTES = 64 << 20  # of a reference picture
MAX_PIXELS = 40_000_000
MAX_SIDE = 4096  # larger references are scaled down
_FIELDS = ("img_id", "note", "local_path", "url", "title", "page_url")


@dataclass(frozen=True, eq=False)
class Row:
    """A row of the input; `name` is its picture's file name without .png, `digest` what it asks to be drawn."""

    name: str
    fields: Mapping[str, Any]
    digest: str


class RowError(ValueError):
    """The row cannot be drawn. `failure`: "program", or "reference/" and a kind of incidents.KINDS or `missing`."""

    def __init__(self, message: str, failure: str) -> None:
        super().__init__(message)
        self.failure = failure


def read_rows(path: Path) -> list[Row]:
    """Rows of a results.json. Rows that share an id get pictures of their own. Raises BatchError."""
    taken: Counter[str] = Counter()
    read = []
    for row in read_objects(path):
        name = safe_name(str(row.get("id", "unknown")))
        taken[name] += 1
        if taken[name] > 1:
            name = f"{name}~{taken[name]}"  # no id has such a name
        read.append(Row(name, row, _digest(row)))
    return read


def _digest(row: Mapping[str, Any]) -> str:
    """Of all that is drawn from; a picture is that of its row only while this stays the same."""
    paths = [r.get("local_path") for r in _list(row.get("reference_images")) if isinstance(r, dict)]
    asked = [row.get("gen_prompt"), row.get("prompt") or row.get("question"), paths]
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:32]


def program_of(row: Mapping[str, Any], draw_request: bool) -> Program:
    """What a row asks to be drawn: its program, or the request where it has none and no failure took it.

    `draw_request`: the request also where the program has no references or its rollout failed, as the released script
    does. Raises RowError.
    """
    gen_prompt, listed = row.get("gen_prompt") or "", row.get("reference_images") or []
    if not isinstance(gen_prompt, str):
        raise RowError(f"gen_prompt is of type {type(gen_prompt).__name__}", "program")
    if not isinstance(listed, list) or not all(isinstance(r, dict) for r in listed):
        raise RowError("reference_images is no list of objects", "program")
    if gen_prompt.strip() and (listed or not draw_request):
        return Program(gen_prompt.strip(), tuple(Reference(**{k: _text(r.get(k)) for k in _FIELDS}) for r in listed))
    if row.get("termination") == "error" and not draw_request:
        raise RowError("its rollout failed, so there is no program", "program")
    request = row.get("prompt") or row.get("question") or ""
    if not isinstance(request, str) or not request.strip():
        raise RowError("there is neither a gen_prompt nor a prompt", "program")
    return Program(request.strip())


def read_references(program: Program, bases: Sequence[Path]) -> list[np.ndarray]:
    """Pixels of the references; a relative path is looked up under each of `bases`. Raises RowError."""
    return [_read(reference, i, bases) for i, reference in enumerate(program.reference_images, 1)]


def _read(reference: Reference, number: int, bases: Sequence[Path]) -> np.ndarray:
    called = f"reference image {number}" + (f" ({reference.img_id[:40]})" if reference.img_id else "")
    if not reference.local_path.strip():
        raise RowError(f"{called} has no local_path", "reference/missing")
    data = None
    for base in bases:
        try:
            path = base / reference.local_path.strip()
            if not path.is_file():  # a device or a pipe would never end
                continue
            with path.open("rb") as file:
                data = file.read(MAX_FILE_BYTES + 1)
            break
        except (OSError, ValueError):  # no such name, no right to read, a NUL in it
            continue
    if data is None:
        raise RowError(f"{called}: there is no file {reference.local_path[:200]!r}", "reference/missing")
    if len(data) > MAX_FILE_BYTES:
        raise RowError(f"{called} is larger than {MAX_FILE_BYTES >> 20} MiB", "reference/too_large")
    try:
        return decode_image(data, MAX_PIXELS, MAX_SIDE).pixels
    except FetchError as error:
        raise RowError(f"{called}: {error}", f"reference/{error.kind}") from None


def drawn(row: Mapping[str, Any], picture: Path) -> dict[str, Any]:
    """The row with the released fields of a picture."""
    return _clean(row) | {
        "image_path": str(picture),
        "output_path": str(picture),
        "success": True,
        "image_status": "ok",
    }


def not_drawn(row: Mapping[str, Any], error: str, failure: str) -> dict[str, Any]:
    """The row with the released fields of a failure, and `image_failure`: its type."""
    told = {"image_path": "", "output_path": "", "success": False, "image_status": f"error: {error}"}
    return _clean(row) | told | {"image_failure": failure}


def _clean(row: Mapping[str, Any]) -> dict[str, Any]:
    """Without the failure that an earlier rendering left."""
    return {name: value for name, value in row.items() if name != "image_failure"}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _list(value: Any) -> list:
    return value if isinstance(value, list) else []
