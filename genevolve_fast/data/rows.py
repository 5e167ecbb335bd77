"""Rows and pictures of data files that nobody vouches for: streamed, and named where they are bad."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from genevolve_fast.net.pictures import decode_image
from genevolve_fast.net.web import FetchError

MAX_PICTURE_BYTES = 64 << 20
MAX_PIXELS = 64_000_000
MAX_SIDE = 4096  # longest side of a decoded picture
_KEPT = 20  # bad rows whose words are kept


class DataError(ValueError):
    """The data cannot be used; the message names file, line and reason."""


class BadRow(DataError):
    """One row cannot be used: which file, line (from 1), field and why."""

    def __init__(self, file: str | Path, line: int, field: str, reason: str) -> None:
        super().__init__(f"{file}, line {line}: {f'{field}: ' if field else ''}{reason}")
        self.file, self.line, self.field, self.reason = str(file), line, field, reason


class BadRows:
    """What becomes of bad rows: strict raises the first, otherwise they are counted by field."""

    def __init__(self, strict: bool = True) -> None:
        self.strict = strict
        self.count = 0
        self.fields: dict[str, int] = {}
        self.first: list[str] = []

    def add(self, bad: BadRow) -> None:
        if self.strict:
            raise bad
        self.count += 1
        self.fields[bad.field or "row"] = self.fields.get(bad.field or "row", 0) + 1
        if len(self.first) < _KEPT:
            self.first.append(str(bad))


# --- tables -----------------------------------------------------------------------------------------------------------


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
    """(line or row number from 1, row) of a JSONL, JSON list or parquet file; what is no row comes as BadRow."""
    if path.suffix == ".parquet":
        yield from _parquet_rows(path)
        return
    try:
        with path.open("rb") as f:
            if begins_list(f.read(4096)):
                f.seek(0)
                yield from list_rows(path, f.read())
                return
            f.seek(0)
            for number, line in enumerate(f, 1):
                if line.strip():
                    yield number, parse_row(path, number, line)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None


def begins_list(data: bytes) -> bool:
    """Whether these first bytes of a file are those of a JSON list, not of JSONL."""
    return data.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")


def list_rows(path: Path, data: bytes) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
    """(number from 1, row) of a JSON list. Raises DataError."""
    try:
        rows = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {error}") from None
    for number, row in enumerate(rows, 1):
        yield number, row if isinstance(row, dict) else _no_object(path, number, row)


def parse_row(path: Path, number: int, line: bytes) -> dict[str, Any] | BadRow:
    """The row on one line of a JSONL file."""
    try:
        row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        return BadRow(path, number, "", f"not UTF-8: {error.reason} at byte {error.start}")
    except (ValueError, RecursionError) as error:
        return BadRow(path, number, "", f"not JSON: {error}")
    return row if isinstance(row, dict) else _no_object(path, number, row)


def _no_object(path: Path, number: int, row: Any) -> BadRow:
    return BadRow(path, number, "", f"a row must be a JSON object, not {type(row).__name__}")


def _parquet_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise DataError(f"{path} is parquet: reading it needs `pip install 'genevolve-fast[data]'`") from error
    number = 0
    try:
        for batch in ParquetFile(path).iter_batches(64):
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except (ArrowException, OSError) as error:
        raise DataError(f"{path} is no readable parquet file after row {number}: {error}") from None


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a JSONL (or JSON list, or parquet) file. Raises BadRow naming the line."""
    for _, row in read_rows(path):
        if isinstance(row, BadRow):
            raise row
        yield row


# --- pictures ---------------------------------------------------------------------------------------------------------


def relative_problem(name: Any) -> str:
    """Why `name` cannot be the relative path of a file in a data folder; empty when it can."""
    if not isinstance(name, str) or not name:
        return "no path"
    if "\\" in name or "\0" in name or ":" in name:
        return f"{name[:80]!r} holds a character that no path here needs"
    parts = PurePosixPath(name).parts
    if name.startswith("/") or ".." in parts:
        return f"{name[:80]!r} leaves the data folder: paths are relative and without `..`"
    return ""


def safe_file(root: Path, name: Any) -> Path:
    """The file that `name` means inside `root`. Raises DataError for a path, or a link, that leads out of it.

    Links into the blobs of a hub cache, which its snapshots consist of, are inside.
    """
    if problem := relative_problem(name):
        raise DataError(problem)
    inside = root.resolve()
    homes = [inside] + [p.parent / "blobs" for p in inside.parents if p.name == "snapshots"]
    file = (inside / name).resolve()
    if not any(file.is_relative_to(home) for home in homes):
        raise DataError(f"{name[:80]!r} is a link out of {root}")
    return file


def read_picture(path: Path) -> np.ndarray:
    """uint8 [height, width, 3] of a picture file. Raises DataError: absent, too large, broken, no picture."""
    try:
        size = path.stat().st_size
        if size > MAX_PICTURE_BYTES:
            raise DataError(f"cannot read image {path}: {size} bytes, the limit is {MAX_PICTURE_BYTES}")
        return _decoded(path.read_bytes(), str(path))
    except OSError as error:
        raise DataError(f"cannot read image {path}: {error.strerror}") from None


@dataclass(frozen=True)
class InlinePicture:
    """A picture that lies in its row, encoded, and the name it goes by there (empty: none)."""

    name: str
    data: bytes

    @classmethod
    def from_url(cls, url: str) -> InlinePicture:
        """Of a data URL. Raises DataError: not base64."""
        try:
            return cls("", base64.b64decode(url.partition(",")[2], validate=True))
        except ValueError:
            raise DataError(f"{url[:40]!r} is a data URL whose picture is not base64") from None

    def pixels(self) -> np.ndarray:
        """uint8 [height, width, 3]. Raises DataError: too large, broken, no picture."""
        if len(self.data) > MAX_PICTURE_BYTES:
            raise DataError(f"cannot read the row's image: {len(self.data)} bytes, the limit is {MAX_PICTURE_BYTES}")
        return _decoded(self.data, self.name or "in the row")


def _decoded(data: bytes, what: str) -> np.ndarray:
    try:
        return decode_image(data, MAX_PIXELS, MAX_SIDE).pixels
    except FetchError as error:
        raise DataError(f"cannot read image {what}: {error}") from None
