"""Grown pictures as process.json tells them: a strip of drafts, each with what was planned and what was found."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

PROCESS = "process.json"


class ProcessError(ValueError):
    """A folder holds no grown picture; the message says what is missing."""


@dataclass(frozen=True)
class Cell:
    """One draft: `said` is what was to be done (plan or correction), `found` what the inspection saw in it.

    `sound`: it saw no fault; None where nobody inspected it. `file`: "" where the renderer failed, as `found` says.
    """

    cycle: int
    stage: str
    file: str
    said: str
    scene: str
    found: str = ""
    sound: bool | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class Strip:
    request: str
    end: str
    writer: str
    cells: tuple[Cell, ...]
    seconds: float

    @property
    def cycles(self) -> int:
        return len({c.cycle for c in self.cells})

    def line(self) -> str:
        """In how many cycles and drafts, and why it ended."""
        drafts = sum(bool(c.file) for c in self.cells)
        why = {
            "done": "found complete",
            "cycles": "all cycles are used up",
            "renders": "all drafts are used up",
            "tokens": "all tokens are used up",
            "format": "a stage could not be read",
        }.get(self.end, self.end)
        return f"{self.cycles} cycles, {drafts} drafts; {why}"


def process_folders(folder: Path) -> list[Path]:
    """Folders with a grown picture: `folder` itself, those in it, and those of its `processes/`; by name."""
    if (folder / PROCESS).exists():
        return [folder]
    found = [p.parent for part in (folder, folder / "processes") for p in part.glob(f"*/{PROCESS}")]
    return sorted(found)


def read_strip(folder: Path) -> Strip:
    """Raises ProcessError."""
    path = folder / PROCESS
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        cells = _cells(told["steps"])
        writer = str(told["identity"].get("process", {}).get("writer", ""))
        return Strip(told["request"], told["end"], writer, tuple(cells), float(told["seconds"]))
    except OSError as error:
        raise ProcessError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ProcessError(f"{path} is no process: {type(error).__name__} {error}") from None


def _cells(steps: list[Mapping[str, Any]]) -> list[Cell]:
    cells: list[Cell] = []
    said = scene = ""
    for s in steps:
        read = s["read"]
        if s["what"] == "draft":
            failed = f"not drawn: {s['fault']}" if s["fault"] else ""
            cells.append(
                Cell(s["cycle"], s["stage"], s.get("file", ""), said, s["text"], failed, None, float(s["seconds"]))
            )
        elif read and s["stage"] == "plan":
            said, scene = read["instruction"], read["description"]
        elif read and s["stage"] == "inspect" and cells:
            faults = [f"{what}: {read[what]}" for what in ("plan", "draft") if read[what]]
            cells[-1] = replace(cells[-1], found="; ".join(faults) or "no fault", sound=not faults)
        elif read and s["stage"] == "refine":
            said = read["text"] if read["text"] != scene else "as planned"
    return cells
