"""Long batches that continue where they stopped: a journal on disk, results seldom rewritten, signals that end well."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from genevolve_fast.trajectory import json_text

_SAVE_EVERY_S = 5.0
_SAVE_SHARE = 20  # of the time at most one in so many is spent writing results


class BatchError(ValueError):
    """The batch cannot start; the message names the row or setting and says what to do."""


class Log:
    """A header and lines of JSON, each on disk before the next one; one process at a time holds it."""

    def __init__(self, path: Path, name: str, what: str) -> None:
        """`name` marks the header, `what` ("rollout") names a line in messages. Raises BatchError."""
        self.path, self._name, self._what = path, name, what
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+b")
        except OSError as error:
            raise BatchError(f"{path.parent} cannot be written: {error.strerror}") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise BatchError(f"{path.parent} is being written by another {self._what}") from None

    def begin(self, **header: Any) -> None:
        """Forget every line and write a new header."""
        self.clear()
        self.append({self._name: 1} | header)

    def clear(self) -> None:
        self._file.truncate(0)

    def append(self, value: Any) -> None:
        self._file.write(json_text(value).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def read(self) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
        """(header, lines), (None, []) when empty; what a crash cut off is dropped. Raises BatchError."""
        self._file.seek(0)
        data = self._file.read()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            self._file.truncate(len(whole))
        first, *rest = whole.splitlines() or [b""]
        if not first:
            return None, []
        header = _object(first)
        if header is None or header.get(self._name) != 1 or not isinstance(header.get("settings"), dict):
            raise BatchError(f"{self.path} is not a journal of {self._what}s: move it away, or --fresh")
        return header, [line for text in rest if (line := _object(text)) is not None]

    def close(self) -> None:
        self._file.close()


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def parse_json(text: str, where: str) -> Any:
    """Raises BatchError naming `where`."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BatchError(f"{where} is not JSON: {error}") from None


def write_text(path: Path, text: str) -> None:
    """Write `text` to a temporary file beside `path` and rename it."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to a temporary file beside `path` and rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        partial.write_bytes(data)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The settings that differ, in words; "" where none does."""
    names = sorted({*before, *now})
    return ", ".join(f"{n} {before.get(n)} then, {now.get(n)} now" for n in names if before.get(n) != now.get(n))


def now_and_then(write: Callable[[], object]) -> Callable[[], None]:
    """Calls `write` seldom enough to cost little of a long batch; the journal loses nothing meanwhile."""
    due = time.monotonic() + _SAVE_EVERY_S

    def save() -> None:
        nonlocal due
        if (now := time.monotonic()) < due:
            return
        write()
        due = now + max(_SAVE_EVERY_S, _SAVE_SHARE * (time.monotonic() - now))

    return save


@contextmanager
def ended_by_signals(tasks: Sequence[asyncio.Task], end: Callable[[int], None]) -> Iterator[None]:
    """SIGINT and SIGTERM call `end(number)` and cancel `tasks`; outside the main thread signals stay as they are."""
    loop = asyncio.get_running_loop()

    def stop(number: int) -> None:
        end(number)
        for task in tasks:
            task.cancel()

    taken = []
    with suppress(ValueError, RuntimeError, NotImplementedError):
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop, number)
            taken.append(number)
    try:
        yield
    finally:
        for number in taken:
            loop.remove_signal_handler(number)
