"""Rows of tables by where they lie on disk: any row at any time, none of them kept in memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from genevolve_fast.data.published import HubSet, LocalSet, PublishedSet
from genevolve_fast.data.rows import BadRow, DataError, begins_list, list_rows, parse_row

MAX_LIST_BYTES = 256 << 20  # of a JSON list, which is one value and is held in memory

Span = tuple[int, int, int]  # line or row number from 1, where it begins, its bytes (0: a row that is found by number)


class Table(Protocol):
    """One file of rows. Threads may share it."""

    files: tuple[Path, ...]  # its rows are what these hold
    total: int
    unit: str  # of total and of a span's share in it: "B", or "row" where a span's size is 0

    def spans(self) -> Iterator[Span]:
        """Where each row lies, in order. Raises DataError where the file cannot be read."""
        ...

    def read(self, span: Span) -> dict[str, Any] | BadRow:
        """The row there. Raises DataError where the file cannot be read any more."""
        ...


def open_tables(source: PublishedSet, cache: Path) -> list[Table]:
    """The tables of a set in their order; `cache` is a folder for what parquet files are unpacked to."""
    if isinstance(source, HubSet):
        return [ArrowTable(*_from_hub(source))]
    assert isinstance(source, LocalSet)
    return [_open(path, cache) for path in source.tables]


def _open(path: Path, cache: Path) -> Table:
    if path.suffix == ".parquet":
        return ArrowTable(_from_parquet(path, cache), (path,))
    try:
        with path.open("rb") as f:
            return ListTable(path) if begins_list(f.read(4096)) else JsonLines(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None


class JsonLines:
    """A JSONL file."""

    unit = "B"

    def __init__(self, path: Path) -> None:
        self.files = (path,)
        self.total = path.stat().st_size

    def spans(self) -> Iterator[Span]:
        at = 0
        try:
            with self.files[0].open("rb") as f:
                for number, line in enumerate(f, 1):
                    if line.strip():
                        yield number, at, len(line)
                    at += len(line)
        except OSError as error:
            raise DataError(f"{self.files[0]} cannot be read: {error.strerror}") from None

    def read(self, span: Span) -> dict[str, Any] | BadRow:
        number, at, size = span
        try:
            with self.files[0].open("rb") as f:
                f.seek(at)
                return parse_row(self.files[0], number, f.read(size))
        except OSError as error:
            raise DataError(f"{self.files[0]} cannot be read: {error.strerror}") from None


class ListTable:
    """A file that holds one JSON list, in memory. Raises DataError where it is larger than MAX_LIST_BYTES."""

    unit = "row"

    def __init__(self, path: Path) -> None:
        self.files = (path,)
        if (size := path.stat().st_size) > MAX_LIST_BYTES:
            raise DataError(
                f"{path} is a JSON list of {size} bytes, which would have to be held in memory: write one row a line "
                f"(jq -c '.[]' {path.name} > {path.stem}.jsonl)"
            )
        self._rows = [row for _, row in list_rows(path, path.read_bytes())]
        self.total = len(self._rows)

    def spans(self) -> Iterator[Span]:
        return ((number, 0, 0) for number in range(1, self.total + 1))

    def read(self, span: Span) -> dict[str, Any] | BadRow:
        return self._rows[span[0] - 1]


class ArrowTable:
    """Rows of a `datasets.Dataset`, which maps its Arrow files into memory."""

    unit = "row"

    def __init__(self, dataset, files: tuple[Path, ...]) -> None:
        self.files = files
        self.total = len(dataset)
        self._dataset = dataset.with_format("arrow")  # rows as they lie there: pictures stay encoded

    def spans(self) -> Iterator[Span]:
        return ((number, 0, 0) for number in range(1, self.total + 1))

    def read(self, span: Span) -> dict[str, Any]:
        return self._dataset[span[0] - 1].to_pylist()[0]


def _from_parquet(path: Path, cache: Path):
    try:
        import datasets
        from pyarrow import ArrowException
    except ImportError as error:
        raise DataError(f"{path} is parquet: reading it needs `pip install 'genevolve-fast[data]'`") from error
    try:
        return datasets.Dataset.from_parquet(str(path), cache_dir=str(cache))
    except (ArrowException, OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        cause = error.__cause__ or error
        raise DataError(f"{path} is no readable parquet file: {_told(cause)}") from None


def _from_hub(source: HubSet) -> tuple[Any, tuple[Path, ...]]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise DataError(f"{source.where}: the hub needs `pip install 'genevolve-fast[data]'`") from error
    try:
        dataset = load_dataset(source.repository, source.which, split=source.split)
    except Exception as error:  # datasets raises what its file systems and parsers raise
        raise DataError(f"{source.where} cannot be read from the hub: {_told(error)}") from None
    return dataset, tuple(Path(f["filename"]) for f in dataset.cache_files)


def _told(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
