"""What a unified model drew, as drawn.jsonl tells it: by request, and of a training run at every sampled step."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from genevolve_fast.resumable import BatchError, parse_json

DRAWN = "drawn.jsonl"
_STEP = re.compile(r"step_(\d+)")
_DRAFTS = 64  # more of one request nobody wrote


@dataclass(frozen=True)
class Sample:
    """One request drawn once: a text before each draft and after the last; `ended`: by the model itself."""

    texts: tuple[str, ...]
    drafts: tuple[Path, ...]
    ended: bool


def sampled_steps(folder: Path) -> list[tuple[int | None, Path]]:
    """(step, folder) of every drawing of a run, first to last; (None, `folder`) where `process draw` wrote into it."""
    if (folder / DRAWN).exists():
        return [(None, folder)]
    found = ((_STEP.fullmatch(p.parent.name), p.parent) for p in (folder / "samples").glob(f"step_*/{DRAWN}"))
    return sorted((int(name[1]), path) for name, path in found if name)


def read_samples(folder: Path) -> dict[tuple[str, int], Sample]:
    """What was drawn, by request and how often the same came before it. Raises BatchError."""
    path = folder / DRAWN
    try:
        lines = path.read_bytes().decode().removesuffix("\n").split("\n")  # a text may hold other line ends
    except (OSError, UnicodeDecodeError) as error:
        raise BatchError(f"{path} cannot be read: {error}") from None
    out: dict[tuple[str, int], Sample] = {}
    met: Counter[str] = Counter()
    for n, line in enumerate(lines if any(lines) else ()):
        where = f"{path}, line {n + 1}"
        told = parse_json(line, where)
        try:
            request, sample = _sample(told, folder, n)
        except (KeyError, TypeError, ValueError) as error:
            raise BatchError(f"{where} is no drawn request: {type(error).__name__} {error}") from None
        out[request, met[request]] = sample
        met[request] += 1
    return out


def _sample(told: dict[str, Any], folder: Path, n: int) -> tuple[str, Sample]:
    count, texts = told["drafts"], told["texts"]
    if not isinstance(count, int) or not 0 <= count <= _DRAFTS:
        raise ValueError(f"drafts is not a number up to {_DRAFTS}")
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in [told["request"], *texts]):
        raise ValueError("request and texts are no text")
    drafts = tuple(folder / f"{n:03d}_draft_{k}.png" for k in range(count))
    return told["request"], Sample(tuple(texts), drafts, told["ended"] is True)
