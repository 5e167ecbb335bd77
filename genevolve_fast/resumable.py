"""Long batches that continue where they stopped: a journal on disk, several items at a time, ends that lose nothing."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, TypeVar

from genevolve_fast.trajectory import json_text

_SAVE_EVERY_S = 5.0
_SAVE_SHARE = 20  # of the time at most one in so many is spent writing results

T = TypeVar("T")
B = TypeVar("B", bound="Tally")


class BatchError(ValueError):
    """What was asked for cannot be done; the message names the file, row, flag or setting and says what to do."""


def held(path: Path) -> BinaryIO:
    """The file, opened for appending by this process alone until it is closed, where the file system knows locks.

    Raises BatchError where another process holds it, or it cannot be written.
    """
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("a+b")
        except OSError as error:
            raise BatchError(f"{path.parent} cannot be written: {error.strerror}") from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # the second one from some network mounts
            file.close()
            raise BatchError(f"{path.parent} is being written by another process: wait for its end") from None
        except OSError:
            pass  # a file system without locks, as Lustre is often mounted
        if os.fstat(file.fileno()).st_nlink or path.exists():
            return file
        file.close()  # who held it before removed it


class Log:
    """A header and lines of JSON, each on disk before the next one; one process at a time holds it."""

    def __init__(self, path: Path, name: str, what: str) -> None:
        """`name` marks the header, `what` ("rollout") names a line in messages. Raises BatchError."""
        self.path, self._name, self._what = path, name, what
        self._file = held(path)

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
            raise BatchError(f"{self.path} is not a journal of {self._what}s: move it away")
        return header, [line for text in rest if (line := _object(text)) is not None]

    def close(self) -> None:
        self._file.close()


class Ledger:
    """Finished pieces by their key, each on disk before the next one; the last line of a key counts.

    All pieces of a file share its settings: it begins anew when none is finished yet, else other settings are refused.
    `fresh` forgets them all; None where the command has no --fresh to offer. Raises BatchError, like Log.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], what: str, fresh: bool | None = None) -> None:
        """`what` ("judgement") names a piece in messages."""
        self.done: dict[str, dict[str, Any]] = {}
        self._log = Log(path, "genevolve_fast_ledger", what)
        try:
            self._open(path, json.loads(json_text(dict(settings))), what, fresh)
        except BaseException:
            self.close()
            raise

    def _open(self, path: Path, settings: dict[str, Any], what: str, fresh: bool | None) -> None:
        if fresh:
            self._log.clear()
        header, lines = self._log.read()
        changed = "" if header is None else changes(header["settings"], settings)
        if changed and lines:
            anew = "" if fresh is None else ", or --fresh to start over"
            raise BatchError(f"{path} holds {what}s of other settings ({changed}): choose another --output-dir{anew}")
        if header is None or changed:
            self._log.begin(settings=settings)
        self.done = {line.pop("key"): line for line in lines if isinstance(line.get("key"), str)}

    def add(self, key: str, piece: Mapping[str, Any]) -> None:
        """Keep a piece for good."""
        self.done[key] = dict(piece)
        self._log.append({"key": key} | self.done[key])

    def close(self) -> None:
        self._log.close()


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


def read_objects(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON list. Raises BatchError naming file or row."""
    try:
        rows = parse_json(path.read_text(encoding="utf-8-sig"), str(path))
    except OSError as error:
        raise BatchError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise BatchError(f"{path} is not UTF-8: {error.reason} at byte {error.start}") from None
    if not isinstance(rows, list):
        raise BatchError(f"{path} is not a list of rows")
    for n, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise BatchError(f"{path}, row {n}: a row must be a JSON object, not {type(row).__name__}")
    return rows


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The settings that differ, in words; "" where none does."""
    names = sorted({*before, *now})
    return ", ".join(f"{n} {before.get(n)} then, {now.get(n)} now" for n in names if before.get(n) != now.get(n))


# --- working it off ---------------------------------------------------------------------------------------------------

_GIVE_UP_AFTER = 3  # items, or as many as run at a time


@dataclass
class Tally:
    """Counts of one `work_off`: `ends` by how items ended and the first reason of each failure; `stopped` why early."""

    good: ClassVar[str]  # the end that is no failure
    hopeless: ClassVar[tuple[str, ...]]  # failures that waiting does not mend
    items: ClassVar[str] = "rows"

    ends: Counter[str] = field(default_factory=Counter)
    reasons: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    stopped: str = ""
    signal: int | None = None
    refusals: list[str] = field(default_factory=list)  # the same one, item after item

    @property
    def succeeded(self) -> int:
        return self.ends[self.good]

    @property
    def failed(self) -> int:
        return self.ends.total() - self.succeeded

    def add(self, end: str, reason: str, parallel: int) -> None:
        """Count an item; too many of the same refusal stop the batch."""
        self.ends[end] += 1
        if end != self.good:
            self.reasons.setdefault(end, reason)
        if end not in self.hopeless:
            self.refusals = []
        elif self.refusals[:1] == [reason]:
            self.refusals.append(reason)
        else:
            self.refusals = [reason]
        if len(self.refusals) == max(_GIVE_UP_AFTER, parallel):
            self.stopped = f"the last {len(self.refusals)} {self.items} failed alike: {reason}"

    def failures(self) -> str:
        """`n failed`, and how many in which way."""
        kinds = ", ".join(f"{end} {n}" for end, n in sorted(self.ends.items()) if end != self.good)
        return f"{self.failed} failed{f' ({kinds})' if kinds else ''}"


async def work_off(
    todo: Iterable[T],
    work: Callable[[T], Awaitable[tuple[str, str]]],
    tally: B,
    *,
    parallel: int,
    progress: Callable[[B], None] = lambda tally: None,
    write: Callable[[], object] = lambda: None,
) -> B:
    """`work` every item, `parallel` at a time; it keeps what it made and returns (how it ended, why it failed).

    Ends early where item after item is refused alike, and by SIGINT and SIGTERM, which `tally` tells. What `work`
    raises ends it too. `write` is called now and then, seldom enough to cost little, and at every end.
    """
    waiting, started, save = iter(todo), time.monotonic(), _now_and_then(write)
    progress(tally)

    async def worker() -> None:
        for item in waiting:
            if tally.stopped:
                return
            tally.add(*await work(item), parallel)
            progress(tally)
            save()

    def end(number: int) -> None:
        tally.signal, tally.stopped = number, signal.Signals(number).name

    tasks = [asyncio.create_task(worker()) for _ in range(parallel)]
    with _ended_by_signals(tasks, end):
        try:
            await asyncio.gather(*tasks)
        except asyncio.CancelledError:
            if tally.signal is None:
                raise
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            write()
    tally.seconds = time.monotonic() - started
    return tally


def _now_and_then(write: Callable[[], object]) -> Callable[[], None]:
    due = time.monotonic() + _SAVE_EVERY_S

    def save() -> None:
        nonlocal due
        if (now := time.monotonic()) < due:
            return
        write()
        due = now + max(_SAVE_EVERY_S, _SAVE_SHARE * (time.monotonic() - now))

    return save


@contextmanager
def _ended_by_signals(tasks: Sequence[asyncio.Task], end: Callable[[int], None]) -> Iterator[None]:
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
