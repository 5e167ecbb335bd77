"""Process data on disk: JSONL, a PNG for every draft by its pixel hash, what was filtered and why, statistics."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from genevolve_fast.files import replacing, write_bytes, write_text
from genevolve_fast.net.pictures import png_bytes
from genevolve_fast.process.builders import Built, Rejected
from genevolve_fast.process.trace import MAX_CYCLES, Process, interleave
from genevolve_fast.protocols import Codec, EngineError, JudgeError, RenderError
from genevolve_fast.resumable import BatchError, Ledger, Tally, work_off
from genevolve_fast.trajectory import InvariantError, image_hash, json_text

TABLE = "processes.jsonl"
PICTURES = "images"
STATISTICS = "statistics.json"
_LEDGER = "building.jsonl"


class ProcessFilters(BaseModel):
    """Which rows are kept of those that were built and verified."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    min_cycles: int = Field(1, ge=1, le=MAX_CYCLES, description="Rows with fewer cycles are left out")
    max_cycles: int = Field(MAX_CYCLES, ge=1, le=MAX_CYCLES, description="Rows with more cycles are left out")
    max_words: int = Field(600, ge=1, description="Rows whose texts have more words are left out")
    unique: bool = Field(True, description="Leave out rows of the same request, texts and drafts as an earlier one")

    @model_validator(mode="after")
    def _refuse(self) -> ProcessFilters:
        if self.min_cycles > self.max_cycles:
            raise ValueError(f"min_cycles {self.min_cycles} is more than max_cycles {self.max_cycles}: no row passes")
        return self

    def reason(self, process: Process, earlier: set[str]) -> str:
        """Why a row is left out, "" where it is kept; `earlier` takes what tells it from others."""
        if len(process.cycles) < self.min_cycles:
            return "fewer cycles than min_cycles"
        if len(process.cycles) > self.max_cycles:
            return "more cycles than max_cycles"
        if words(process) > self.max_words:
            return "more words than max_words"
        row = process.to_row()
        content = json.dumps([row["request"], row["cycles"]], sort_keys=True)
        if self.unique and content in earlier:
            return "repeats another row"
        earlier.add(content)
        return ""


# --- writing ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """A row to build. `subset` and `category` say of what kind also where it is filtered."""

    id: str
    subset: str
    category: str
    build: Callable[[], Awaitable[Built]]


@dataclass
class BuildTally(Tally):
    """How many rows were built (or requests read), and how many not and why."""

    good: ClassVar[str] = "kept"
    hopeless: ClassVar[tuple[str, ...]] = ("connect", "client_error")
    items: ClassVar[str] = "rows"

    def line(self) -> str:
        return f"{self.succeeded} rows built, {self.failures()}, {self.seconds:.1f} s"


async def build_rows(
    folder: Path,
    jobs: Sequence[Job],
    settings: Mapping[str, Any],
    filters: ProcessFilters | None = None,
    *,
    codec: Codec | None = None,
    parallel: int = 1,
    progress: Callable[[BuildTally], None] = lambda tally: None,
) -> tuple[dict[str, Any], BuildTally]:
    """Build what `folder` does not have yet, then write table and statistics; returns the statistics.

    A row that is rejected is not tried again; one whose model or server failed is, by the next call. Raises BatchError
    where the folder holds rows of other settings.
    """
    with closing(Ledger(folder / _LEDGER, settings, "row")) as ledger:
        tally = BuildTally()

        async def work(job: Job) -> tuple[str, str]:
            try:
                built = await job.build()
            except Rejected as rejected:
                ledger.add(job.id, {"rejected": rejected.reason, "detail": str(rejected)[:300]})
                return "filtered", str(rejected)[:300]
            except (EngineError, RenderError, JudgeError) as error:  # tried again by the next call
                return error.kind, str(error)[:300]
            for sha, pixels in built.pixels.items():
                _keep_picture(folder, sha, pixels)
            ledger.add(job.id, {"row": built.process.to_row()})
            return "kept", ""

        todo = [job for job in jobs if job.id not in ledger.done]
        tally = await work_off(todo, work, tally, parallel=parallel, progress=progress)
        pieces = [(job, ledger.done[job.id]) for job in jobs if job.id in ledger.done]
        return _write(folder, pieces, filters or ProcessFilters(), settings, codec), tally


def _write(folder: Path, pieces, filters: ProcessFilters, settings, codec) -> dict[str, Any]:
    kept: list[Process] = []
    filtered: dict[str, Counter[str]] = {}
    earlier: set[str] = set()
    for job, piece in pieces:
        reason = piece.get("rejected")
        if reason is None:
            process = Process.from_row(piece["row"])
            reason = filters.reason(process, earlier)
            if not reason:
                kept.append(process)
                continue
        filtered.setdefault(job.subset, Counter())[reason] += 1
    with replacing(folder / TABLE) as partial, partial.open("w", encoding="utf-8") as f:
        for process in kept:
            f.write(json_text(process.to_row()) + "\n")
    pixels = Pictures(folder) if codec else None
    made = statistics(kept, filtered, codec=codec, pixels=pixels)
    made["settings"] = dict(settings) | {"filters": filters.model_dump()}
    write_text(folder / STATISTICS, json_text(made, indent=1) + "\n")
    write_text(folder / "statistics.txt", table(made) + "\n")
    return made


def _keep_picture(folder: Path, sha: str, pixels: np.ndarray) -> None:
    path = _picture(folder, sha)
    if not path.exists():
        write_bytes(path, png_bytes(pixels))


def _picture(folder: Path, sha: str) -> Path:
    return folder / PICTURES / sha[:2] / f"{sha}.png"


# --- reading ----------------------------------------------------------------------------------------------------------


class Pictures(Mapping[str, np.ndarray]):
    """Pixels of a folder's drafts by pixel hash, read when they are asked for and kept."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._read: dict[str, np.ndarray] = {}

    def __getitem__(self, sha: str) -> np.ndarray:
        """uint8 [height, width, 3]. Raises KeyError where it is missing, BatchError where it was changed."""
        if sha not in self._read:
            path = _picture(self._folder, sha)
            if not (set(sha) <= set("0123456789abcdef")) or not path.is_file():
                raise KeyError(sha)
            self._read[sha] = _pixels(path, sha)
        return self._read[sha]

    def __iter__(self) -> Iterator[str]:
        return (path.stem for path in sorted((self._folder / PICTURES).glob("*/*.png")))

    def __len__(self) -> int:
        return sum(1 for _ in self)


class Processes(Sequence[Process]):
    """The rows of a folder; `pixels` maps the hashes of their drafts to pictures."""

    def __init__(self, folder: Path, rows: Sequence[Process]) -> None:
        self.folder = folder
        self.pixels = Pictures(folder)
        self._rows = tuple(rows)

    def __getitem__(self, index):
        return self._rows[index]

    def __len__(self) -> int:
        return len(self._rows)

    def statistics(self) -> dict[str, Any]:
        return json.loads((self.folder / STATISTICS).read_text(encoding="utf-8"))


def open_processes(folder: str | Path) -> Processes:
    """The rows that `genevolve-fast process data` wrote. Raises BatchError naming file and line."""
    folder = Path(folder)
    path = folder / TABLE
    try:
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")  # a text may hold other line ends
    except (OSError, UnicodeDecodeError) as error:
        raise BatchError(f"{path} cannot be read ({error}): `genevolve-fast process data` writes it") from None
    rows = []
    for number, line in enumerate(lines if any(lines) else (), 1):
        try:
            process = Process.from_row(json.loads(line))
        except (ValueError, InvariantError, AttributeError) as error:
            raise BatchError(f"{path}, line {number}: {error}") from None
        if lost := [sha[:12] for sha in process.drafts if not _picture(folder, sha).is_file()]:
            raise BatchError(f"{path}, line {number}: drafts {', '.join(lost)} are not in {folder / PICTURES}")
        rows.append(process)
    return Processes(folder, rows)


def _pixels(path: Path, sha: str) -> np.ndarray:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(path.read_bytes()), formats=("PNG",)) as image:
            pixels = np.array(image.convert("RGB"))
    except Exception as error:  # decoders raise anything on broken files
        raise BatchError(f"{path} is no PNG file: {type(error).__name__}") from None
    if image_hash(pixels) != sha:
        raise BatchError(f"{path} was changed: its pixels have another hash")
    return pixels


# --- statistics -------------------------------------------------------------------------------------------------------


def words(process: Process) -> int:
    """Words of the request and of every stage's text."""
    texts = [process.request]
    for cycle in process.cycles:
        texts += [cycle.plan.instruction, cycle.plan.description, cycle.inspection.reason]
        texts += [cycle.inspection.plan, cycle.inspection.draft, cycle.correction.text if cycle.correction else ""]
    return sum(len(text.split()) for text in texts)


def statistics(
    rows: Sequence[Process],
    filtered: Mapping[str, Mapping[str, int]] | None = None,
    *,
    codec: Codec | None = None,
    pixels: Mapping[str, np.ndarray] | None = None,
) -> dict[str, Any]:
    """Counts of everything one asks about a data set; tokens as `codec` makes them, where it is given."""
    cycles = [len(p.cycles) for p in rows]
    all_cycles = [c for p in rows for c in p.cycles]
    extras, subsets = [p.extra for p in rows], _counted(p.subset for p in rows)
    made: dict[str, Any] = {
        "rows": len(rows),
        "subsets": subsets,
        "categories": _counted(str(e.get("category", "unknown")) for e in extras),
        "cycles": _counted(cycles) | {"mean": _mean(cycles)},
        "cycles_by_subset": {s: _mean([len(p.cycles) for p in rows if p.subset == s]) for s in subsets},
        "rewrites": _counted(e["rewrite"] for e in extras if "rewrite" in e),
        "faults": {
            "plan contradicts request": sum(bool(c.inspection.plan) for c in all_cycles),
            "draft contradicts plan": sum(bool(c.inspection.draft) for c in all_cycles),
            "none": sum(c.inspection.sound for c in all_cycles),
        },
        "fault_kinds": _counted(e["fault"] for e in extras if "fault" in e),
        "sources": _counted(e["source"] for e in extras if "source" in e),
        "trained_stages": _counted(stage for c in all_cycles for stage in c.trained),
        "pictures": len({sha for p in rows for sha in p.drafts}),
        "words": _spread([words(p) for p in rows]),
        "filtered": {subset: dict(sorted(why.items())) for subset, why in sorted((filtered or {}).items())},
    }  # fmt: skip
    if codec is not None:
        trajectories = [interleave(p, codec, pixels or {}) for p in rows]
        drawn = [sum(i.stop - i.start for i in t.images) for t in trajectories]
        made["tokens"] = _spread([len(t) for t in trajectories])
        made["image_tokens"], made["loss_tokens"] = sum(drawn), sum(t.num_loss_tokens for t in trajectories)
    return made


def table(made: Mapping[str, Any]) -> str:
    """The statistics to be read."""
    lines = [f"{made['rows']} rows, {made['pictures']} pictures"]

    def row(name: str, values: Mapping[Any, Any]) -> None:
        if values:
            lines.append(
                f"{name:16} "
                + "  ".join(f"{k} {v:g}" if isinstance(v, (int, float)) else f"{k} {v}" for k, v in values.items())
            )

    for name in ("subsets", "categories", "cycles", "cycles_by_subset", "rewrites", "faults", "fault_kinds"):
        row(name.replace("_", " "), made[name])
    for name in ("sources", "trained_stages", "words", "tokens"):
        row(name.replace("_", " "), made.get(name, {}))
    if "tokens" in made:
        row("of all tokens", {"image": made["image_tokens"], "with loss": made["loss_tokens"]})
    for subset, why in made["filtered"].items():
        row("filtered", {f"{subset}:": "", **why})
    return "\n".join(line.rstrip() for line in lines)


def _counted(values) -> dict[Any, int]:
    return {str(k): n for k, n in sorted(Counter(values).items())}


def _mean(values: Sequence[float]) -> float:
    return round(sum(values) / len(values), 3) if values else 0.0


def _spread(values: Sequence[int]) -> dict[str, float]:
    return {"mean": _mean(values), "max": max(values, default=0), "total": sum(values)}
