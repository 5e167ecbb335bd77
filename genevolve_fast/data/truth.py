"""Ground truth: filtered programs drawn by a strong renderer, and a second look at every picture."""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from genevolve_fast.data.review import PictureReviewer, Review
from genevolve_fast.data.rows import read_picture
from genevolve_fast.data.sifting import keep_pictures
from genevolve_fast.data.steps import Step, close_step, write_rows
from genevolve_fast.data.trajectories import Teaching
from genevolve_fast.files import file_hash, write_bytes
from genevolve_fast.net.pictures import png_bytes
from genevolve_fast.protocols import Renderer, RenderError
from genevolve_fast.resumable import Ledger
from genevolve_fast.trajectory import InvariantError, safe_name

TABLE = "truth.jsonl"
PICTURES = "gt"


@dataclass
class Drawn:
    """Pictures by id, (relative path, SHA-256), reviews by id, and (kind, reason) of what could not be drawn."""

    pictures: dict[str, tuple[str, str]] = field(default_factory=dict)
    reviews: dict[str, Review] = field(default_factory=dict)
    failed: dict[str, tuple[str, str]] = field(default_factory=dict)


async def draw_truth(
    trajectories: Sequence[Teaching],
    source: Step,
    folder: Path,
    renderer: Renderer,
    reviewer: PictureReviewer | None,
    ledger: Ledger,
    *,
    seed: int = 0,
    parallel: int = 4,
    timeout_s: float = 900.0,
    progress: Callable[[], None] = lambda: None,
) -> Drawn:
    """Draw and review every program; what is on disk already is neither drawn nor reviewed again.

    Failures and undecided reviews are not kept: the same command tries them again.
    """
    slots = asyncio.Semaphore(parallel)
    out = Drawn()

    async def one(t: Teaching) -> None:
        async with slots:
            try:
                pixels = await _picture(t)
            except RenderError as error:
                out.failed[t.id] = error.kind, str(error)
            except asyncio.TimeoutError:
                out.failed[t.id] = "timeout", f"no picture within {timeout_s:g} s"
            else:
                await _review(t, pixels)
            progress()

    async def _picture(t: Teaching) -> np.ndarray:
        known = ledger.done.get(f"picture/{t.id}")
        if known and (folder / known["file"]).exists() and file_hash(folder / known["file"]) == known["sha256"]:
            out.pictures[t.id] = known["file"], known["sha256"]
            return read_picture(folder / known["file"])
        try:
            t.program.validate(min_references=renderer.min_references, max_references=renderer.max_references)
        except InvariantError as error:
            raise RenderError(f"{renderer.name} cannot draw this: {error}", "bad_arguments") from None
        pixels = [read_picture(source.picture(r.local_path, r.sha256)) for r in t.program.reference_images]
        drawn = await asyncio.wait_for(renderer.render(t.program, pixels, picture_seed(seed, t.id)), timeout_s)
        name = f"{PICTURES}/{safe_name(t.id)}.png"
        write_bytes(folder / name, png_bytes(drawn))
        out.pictures[t.id] = name, file_hash(folder / name)
        ledger.add(f"picture/{t.id}", {"file": name, "sha256": out.pictures[t.id][1]})
        return drawn

    async def _review(t: Teaching, pixels: np.ndarray) -> None:
        if reviewer is None:
            return
        key = f"review/{t.id}/{out.pictures[t.id][1]}"
        if key in ledger.done:
            out.reviews[t.id] = Review(**ledger.done[key])
            return
        out.reviews[t.id] = await reviewer.review(t, pixels, source)
        if out.reviews[t.id].decision != "undecided":
            ledger.add(key, out.reviews[t.id].to_row())

    await asyncio.gather(*map(one, trajectories))
    return out


def picture_seed(seed: int, id_: str) -> int:
    """The renderer's seed for a request: 31 bits that depend on (seed, id) only."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{id_}".encode(), digest_size=4).digest(), "big") >> 1


def write_truth(
    folder: Path, source: Step, trajectories: Sequence[Teaching], drawn: Drawn, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Trajectories with a ground truth that passed, the rest with reasons; returns the manifest."""
    rows, dropped, open_ = [], [], []
    for t in trajectories:
        if t.id in drawn.failed:
            kind, reason = drawn.failed[t.id]
            open_.append({"id": t.id, "split": t.split, "stage": "render", "kind": kind, "reason": reason})
            continue
        review = drawn.reviews.get(t.id, Review("pass", "not reviewed"))
        if review.decision == "undecided":
            row = {"id": t.id, "split": t.split, "stage": "review", "kind": review.kind, "reason": review.reason}
            open_.append(row)
        elif review.decision == "fail":
            dropped.append({"id": t.id, "split": t.split, "reasons": {"picture": review.reason}})
        else:
            keep_pictures(t, source, folder)
            file, sha = drawn.pictures[t.id]
            rows.append(t.to_row() | {"gt_file": file, "gt_sha256": sha})
    write_rows(folder / TABLE, rows)
    write_rows(folder / "dropped.jsonl", dropped)
    write_rows(folder / "failed.jsonl", open_)
    kinds = Counter(f"failed: {row['stage']}/{row['kind']}" for row in open_)
    counts = {"read": len(trajectories), "kept": len(rows), "dropped": len(dropped), "failed": len(open_)}
    tables = [TABLE, "dropped.jsonl", "failed.jsonl"]
    return close_step(
        folder, "truth", source=source, settings=settings, tables=tables, counts=counts | dict(sorted(kinds.items()))
    )
