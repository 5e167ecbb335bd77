"""The filter step: programmatic filters, then a reviewer's opinion, kept as it comes."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from genevolve_fast.data.filters import FILTERS, Sifted, dropped_row
from genevolve_fast.data.review import Review, TrajectoryReviewer
from genevolve_fast.data.steps import Step, close_step, link_picture, write_rows
from genevolve_fast.data.trajectories import TABLE, Teaching
from genevolve_fast.resumable import Ledger


async def review_all(
    trajectories: Sequence[Teaching],
    reviewer: TrajectoryReviewer,
    step: Step,
    ledger: Ledger,
    *,
    parallel: int = 8,
    progress: Callable[[], None] = lambda: None,
) -> dict[str, Review]:
    """A review of each id; verdicts are kept in the ledger, undecided ones are asked for again next time."""
    slots = asyncio.Semaphore(parallel)
    out: dict[str, Review] = {}

    async def one(t: Teaching) -> None:
        async with slots:
            if t.id in ledger.done:
                out[t.id] = Review(**ledger.done[t.id])
            else:
                out[t.id] = await reviewer.review(t, step)
                if out[t.id].decision != "undecided":
                    ledger.add(t.id, out[t.id].to_row())
            progress()

    await asyncio.gather(*map(one, trajectories))
    return out


def write_filtered(
    folder: Path, source: Step, sifted: Sifted, reviews: Mapping[str, Review] | None, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Kept trajectories with their pictures, dropped and undecided ones with their reasons; returns the manifest."""
    reviews = reviews or {}
    decided: dict[str, list[Teaching]] = {"pass": [], "fail": [], "undecided": []}
    for t in sifted.kept:
        decided[reviews[t.id].decision if t.id in reviews else "pass"].append(t)
    for t in decided["pass"]:
        keep_pictures(t, source, folder)
    write_rows(folder / TABLE, (t.to_row() for t in decided["pass"]))
    failed = [dropped_row(t, {"review": reviews[t.id].reason}) for t in decided["fail"]]
    write_rows(folder / "dropped.jsonl", [*(dropped_row(t, reasons) for t, reasons in sifted.dropped), *failed])
    open_ = [
        dropped_row(t, {"review": reviews[t.id].reason}) | {"kind": reviews[t.id].kind} for t in decided["undecided"]
    ]
    write_rows(folder / "undecided.jsonl", open_)
    kinds = Counter(reviews[t.id].kind for t in decided["undecided"])
    counts = {
        "read": len(sifted.kept) + len(sifted.dropped),
        "kept": len(decided["pass"]),
        "dropped": len(sifted.dropped) + len(failed),
        **{f"failed: {f.name}": sifted.failed[f.name] for f in FILTERS},
        **{f"failed only: {f.name}": sifted.only[f.name] for f in FILTERS},
        "failed: review": len(failed),
        "undecided": len(open_),
        **{f"undecided: {kind}": n for kind, n in sorted(kinds.items())},
    }
    tables = [TABLE, "dropped.jsonl", "undecided.jsonl"]
    return close_step(folder, "filter", source=source, settings=settings, tables=tables, counts=counts)


def keep_pictures(t: Teaching, source: Step, folder: Path) -> None:
    """Every picture of a trajectory in `folder` under the name it has in `source`, checked against its hash."""
    for image in t.images:
        if image["file"]:
            link_picture(source.picture(image["file"], image["sha256"]), folder / image["file"])
