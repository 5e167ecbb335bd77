"""Rollouts in the released formats: rows of results.json, and {messages, images} conversations."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from genevolve_fast.trajectory import Request, Trajectory, json_text


def to_row(request: Request, trajectory: Trajectory) -> dict[str, Any]:
    """One row of the released runtime's results.json; every field of the request is kept."""
    program = trajectory.program
    references = [
        {
            "img_id": r.img_id,
            "note": r.note,
            "local_path": r.local_path,
            "url": r.url,
            "title": r.title,
            "page_url": r.page_url,
        }
        for r in (program.reference_images if program else ())
    ]
    return request.to_row() | {
        "prompt": request.question,
        "gen_prompt": program.gen_prompt if program else "",
        "reference_images": references,
        "messages": [{"role": m.role, "content": m.content} for m in trajectory.messages],
        "termination": trajectory.termination,
        "rounds": trajectory.rounds,
        "error": trajectory.error,
    }


def to_sft(trajectory: Trajectory, image_paths: Sequence[str]) -> dict[str, Any]:
    """A conversation in the released SFT format; `image_paths` in the order of its `<image>` placeholders."""
    messages = [{"role": m.role, "content": m.content} for m in trajectory.messages]
    placeholders = sum(m["content"].count("<image>") for m in messages)
    if placeholders != len(image_paths):
        raise ValueError(f"{trajectory.id}: {placeholders} image placeholders but {len(image_paths)} paths")
    return {"messages": messages, "images": list(image_paths)}


def write_results(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write results.json atomically, as the released scripts read it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    partial.write_text(json_text(list(rows), indent=2), encoding="utf-8")
    os.replace(partial, path)
