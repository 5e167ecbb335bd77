"""What is known of a set's samples without reading them: where they lie and how long they are. Made once, kept."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from genevolve_fast.data.prefetch import Prefetch
from genevolve_fast.data.rows import BadRow, BadRows, DataError
from genevolve_fast.data.tables import Span, Table
from genevolve_fast.files import file_hash, replacing

Counts = tuple[int, int, int]  # tokens, loss tokens, images
COUNTS = ("tokens", "loss_tokens", "images")
_PLACE = [("table", "i4"), ("number", "i8"), ("line", "i8"), ("at", "i8"), ("size", "i8")]
ROW = np.dtype(_PLACE + [(name, "i4") for name in COUNTS])  # number: as messages name it, on from table to table
_BAD = ("count", "fields", "first")  # of BadRows
_FORMAT = 1
_CHUNK = 16  # rows that a thread counts in one go

Count = Callable[[int, int, Span], Counts]  # of (table, number, span). Raises BadRow


def open_index(
    path: Path,
    tables: Sequence[Table],
    count: Count,
    codec: str,
    bad: BadRows,
    *,
    where: str,
    threads: int,
    settled: bool = False,
) -> np.ndarray:
    """Rows [samples] of dtype ROW: from `path` if that is of these tables and this codec, else made and kept there.

    `bad` is told of the bad rows either way. With `settled`, rows that differ from the ones at `path` are refused.
    Raises DataError, BadRow.
    """
    files = [file for table in tables for file in table.files]
    before = _load(path)
    if before is not None:
        rows, meta = before
        usable = meta["codec"] == codec and not (bad.strict and meta["bad"]["count"])
        if usable and (told := _unchanged(meta["files"], files)):
            if told != meta["files"]:
                _save(path, rows, meta | {"files": told})
            bad.count, bad.fields, bad.first = (meta["bad"][name] for name in _BAD)
            return rows
    stats = [_stat(file) for file in files]
    rows = _count_all(tables, count, bad, where, threads)
    told = [[*stat, file_hash(file)] for stat, file in zip(stats, files, strict=True)]
    if stats != [_stat(file) for file in files]:
        raise DataError(f"{where} changed while it was read: run again when it is complete")
    if settled and before is not None:
        shas = [file[-1] for file in before[1]["files"]]
        if shas != [file[-1] for file in told] or not np.array_equal(before[0], rows):
            raise DataError(
                f"{where} is not the data this run began with: its samples would come in another order. Start a run of "
                "another name, or put the data back"
            )
    told_bad = {name: getattr(bad, name) for name in _BAD}
    _save(path, rows, {"files": told, "codec": codec, "bad": told_bad})
    return rows


def _stat(file: Path) -> list[Any]:
    stat = file.stat()
    return [file.name, stat.st_size, stat.st_mtime_ns]


def _unchanged(told: list[list[Any]], files: Sequence[Path]) -> list[list[Any]]:
    """What is to be told of the files from now on, if they are the ones told of, else nothing.

    They are by name, size and time, or where only the time differs by their bytes.
    """
    stats = [_stat(file) for file in files]
    if [t[:2] for t in told] != [s[:2] for s in stats]:
        return []
    same = all(t[2] == s[2] or t[3] == file_hash(f) for t, s, f in zip(told, stats, files, strict=True))
    return [[*s, t[3]] for t, s in zip(told, stats, strict=True)] if same else []


def _count_all(tables: Sequence[Table], count: Count, bad: BadRows, where: str, threads: int) -> np.ndarray:
    from tqdm import tqdm

    def counted(place: tuple[int, int, Span]) -> tuple[int, int, Span, Counts | BadRow]:
        try:
            return *place, count(*place)
        except BadRow as error:
            return *place, error

    places = _places(tables)
    chunks = iter(lambda: list(islice(places, _CHUNK)), [])
    blocks: list[np.ndarray] = []
    unit, total = tables[0].unit, sum(table.total for table in tables)
    scale = {"unit_scale": True, "unit_divisor": 1024} if unit == "B" else {}
    with (
        tqdm(total=total, desc=f"index of {Path(where).name}", unit=unit, delay=1, dynamic_ncols=True, **scale) as bar,
        Prefetch(counted, chunks, threads=threads, ahead=2 * threads) as made,
    ):
        for chunk in made:
            block = []
            for table, number, span, found in chunk:
                if isinstance(found, BadRow):
                    bad.add(found)
                else:
                    block.append((table, number, *span, *found))
            blocks.append(np.array(block, dtype=ROW))
            bar.update(sum(span[2] or 1 for _, _, span, _ in chunk))
    return np.concatenate(blocks) if blocks else np.empty(0, dtype=ROW)


def _places(tables: Sequence[Table]) -> Iterator[tuple[int, int, Span]]:
    before = 0
    for index, table in enumerate(tables):
        last = 0
        for span in table.spans():
            last = span[0]
            yield index, before + last, span
        before += last


def _load(path: Path) -> tuple[np.ndarray, dict[str, Any]] | None:
    """None: there is none of this format, or it is broken."""
    try:
        with np.load(path, allow_pickle=False) as saved:
            rows, meta = saved["rows"], json.loads(str(saved["meta"]))
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):
        return None
    return (rows, meta) if meta.get("format") == _FORMAT and rows.dtype == ROW else None


def _save(path: Path, rows: np.ndarray, meta: dict[str, Any]) -> None:
    with replacing(path) as partial, partial.open("wb") as f:
        np.savez(f, rows=rows, meta=np.array(json.dumps({"format": _FORMAT, **meta})))
