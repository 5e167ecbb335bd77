"""Which checkpoints stay: the last ones, and those that were best by a logged metric."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from genevolve_fast.files import write_text
from genevolve_fast.train.config import CheckpointConfig
from genevolve_fast.train.run import RunError

MARKER = "best.json"  # beside the checkpoints: which of them is the best, and the scores of all there were


def kept(checkpoints: Iterable[int], scores: Mapping[int, float], keep_last: int, keep_best: int) -> set[int]:
    """Steps that stay: the `keep_last` newest, and beside them the `keep_best` best of all; of equals the newer.

    `scores`: higher is better. A checkpoint without a score, or with NaN, is never among the best.
    """
    steps = sorted(checkpoints)
    return set(steps[len(steps) - min(keep_last, len(steps)) :]) | set(ranked(steps, scores)[:keep_best])


def ranked(checkpoints: Iterable[int], scores: Mapping[int, float]) -> list[int]:
    """Steps with a score, best first."""
    known = [s for s in checkpoints if not math.isnan(scores.get(s, math.nan))]
    return sorted(known, key=lambda s: (scores[s], s), reverse=True)


def score(rows: Sequence[Mapping[str, Any]], metric: str, after: int, step: int) -> float:
    """Mean of `metric` over the logged steps after `after` up to `step`, negated for "-metric"; NaN where none is.

    One step says little of a policy: its requests are few and not those of the next one.
    """
    sign, name = (-1.0, metric[1:]) if metric.startswith("-") else (1.0, metric)
    seen = [row[name] for row in rows if after < row["step"] <= step and math.isfinite(row.get(name, math.nan))]
    return sign * sum(seen) / len(seen) if seen else math.nan


def check_metric(metric: str | None, row: Mapping[str, Any]) -> None:
    """Raise RunError where `row`, a step's metrics, does not know what checkpoint.metric names."""
    if metric is not None and metric.removeprefix("-") not in row:
        known = ", ".join(sorted(name for name in row if not name.startswith(("timing_s/", "memory_gb/"))))
        raise RunError(
            f"checkpoint.metric {metric!r} is no metric of this run: start it again under another name with one of "
            f"{known} (a leading - means that lower is better)"
        )


class Retention:
    """What a checkpoint section says of the checkpoints in `folder`, which lies in a run's."""

    def __init__(self, folder: Path, config: CheckpointConfig) -> None:
        self._folder, self._config = folder, config

    def kept(self, checkpoints: Iterable[int]) -> set[int]:
        """Steps of `checkpoints` that stay, the newest of which is perhaps not written yet."""
        steps = sorted(checkpoints)
        return kept(steps, self._scores(steps), self._config.keep_last, self._config.keep_best)

    def mark(self, checkpoints: Iterable[int]) -> None:
        """Write down which of `checkpoints` is the best, before others are removed."""
        if not self._config.keep_best:
            return
        steps = sorted(checkpoints)
        scores = self._scores(steps)
        best = ranked(steps, scores)
        said = {"metric": self._config.metric, "best": best[0] if best else None}
        told = {str(s): v for s, v in sorted(scores.items()) if not math.isnan(v)}
        write_text(self._folder / MARKER, json.dumps(said | {"scores": told}, indent=1) + "\n")

    def _scores(self, steps: Sequence[int]) -> dict[int, float]:
        """Of every checkpoint there was up to the newest of `steps`: a removed one ends the next one's window."""
        if not self._config.keep_best or not steps:
            return {}
        scores = {s: v for s, v in read_marker(self._folder)[1].items() if s < steps[-1]}
        if missing := [s for s in steps if s not in scores]:
            rows = logged(self._folder.parent / "metrics.jsonl")
            for step in missing:
                before = max((s for s in scores if s < step), default=0)
                scores[step] = score(rows, self._config.metric, before, step)
        return scores


def read_marker(folder: Path) -> tuple[int | None, dict[int, float]]:
    """(the best checkpoint's step or None, scores by step), as the last checkpoint in `folder` left them."""
    try:
        told = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None, {}
    return told["best"], {int(step): value for step, value in told["scores"].items()}


def logged(file: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, without a line that a crash cut."""
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows
