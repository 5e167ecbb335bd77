"""Programs of a results.json to pictures, resumable."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from genevolve_fast import event_loop
from genevolve_fast.protocols import Renderer, RenderError
from genevolve_fast.trajectory import InvariantError, Program, Reference, json_text, safe_name

_FIELDS = ("img_id", "note", "local_path", "url", "title", "page_url")


def render_results(source: Path, folder: Path, renderer: Renderer, seed: int = 0) -> tuple[int, int]:
    """Draw every row of `source` that has no picture in `folder` yet; returns (pictures, rows without one).

    `folder/results.json` keeps the rows in the released format with `output_path`, `success` and `render_error`.
    """
    from PIL import Image

    try:
        rows: list[dict[str, Any]] = json.loads(source.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise InvariantError(f"{source} is not a results.json: {error}") from error
    folder.mkdir(parents=True, exist_ok=True)
    for i, row in enumerate(rows):
        target = folder / f"{safe_name(str(row.get('id', i)))}.png"
        row |= {"output_path": str(target), "success": target.exists(), "render_error": None}
        if row["success"]:
            continue
        try:
            references = tuple(Reference(**{k: r.get(k, "") for k in _FIELDS}) for r in row["reference_images"])
            program = Program(row["gen_prompt"], references)
            program.validate(min_references=renderer.min_references, max_references=renderer.max_references)
            pixels = [_read(source.parent, r) for r in references]
            partial = target.with_name(f".{target.name}.tmp")  # half a picture must not count as finished
            Image.fromarray(event_loop.run(renderer.render(program, pixels, seed))).save(partial, "PNG")
            partial.replace(target)
            row["success"] = True
        except (InvariantError, RenderError, OSError, KeyError, TypeError) as error:
            row |= {"render_error": f"{type(error).__name__}: {error}", "output_path": ""}
    partial = folder / ".results.json.tmp"
    partial.write_text(json_text(rows, indent=2), encoding="utf-8")
    partial.replace(folder / "results.json")
    done = sum(row["success"] for row in rows)
    return done, len(rows) - done


def _read(base: Path, reference: Reference) -> np.ndarray:
    from PIL import Image

    if not reference.local_path:
        raise RenderError(f"{reference.img_id} has no local_path")
    with Image.open(base / reference.local_path) as picture:
        return np.asarray(picture.convert("RGB"))
