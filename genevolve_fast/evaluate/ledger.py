"""What has been judged: a line of JSON for every finished item, on disk before the next; and who works it off."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from genevolve_fast.trajectory import json_text

_HEADER = "genevolve_fast_ledger"
_GIVE_UP_AFTER = 3  # items, or as many as run at a time
_HOPELESS = ("connect", "client_error")

T = TypeVar("T")


class EvaluateError(ValueError):
    """Nothing can be scored as asked; the message names the file, row or flag and says what to do."""


def replace_file(path: Path, data: str | bytes) -> None:
    """Write to a temporary file beside `path` and rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    partial.write_bytes(data.encode() if isinstance(data, str) else data)
    os.replace(partial, path)


class Ledger:
    """Finished items by their `key`, the last line of a key first to count.

    The first line holds the settings that all items share; one process at a time holds the file. Raises EvaluateError
    where another process holds it, where it was begun with other settings, or where it is no ledger.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], fresh: bool = False) -> None:
        self.path = path
        self.done: dict[str, dict[str, Any]] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+b")
        except OSError as error:
            raise EvaluateError(f"{path} cannot be written: {error.strerror}") from None
        try:
            self._open(dict(settings), fresh)
        except BaseException:
            self._file.close()
            raise

    def add(self, key: str, line: Mapping[str, Any]) -> None:
        """Keep an item for good."""
        self.done[key] = dict(line)
        self._append({"key": key} | dict(line))

    def close(self) -> None:
        self._file.close()

    def _open(self, settings: dict[str, Any], fresh: bool) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise EvaluateError(f"{self.path} is being written by another process") from None
        if fresh:
            self._file.truncate(0)
        header, lines = self._read()
        if header is not None and not lines and header["settings"] != settings:
            self._file.truncate(0)  # nothing was judged with them
            header = None
        if header is None:
            self._append({_HEADER: 1, "settings": settings})
        elif header["settings"] != settings:
            then = header["settings"]
            changed = [n for n in sorted({*then, *settings}) if then.get(n) != settings.get(n)]
            told = ", ".join(f"{n} {then.get(n)} then, {settings.get(n)} now" for n in changed)
            raise EvaluateError(
                f"{self.path} holds scores of other settings ({told}): choose another --output-dir, or --fresh to "
                "start over"
            )
        self.done = {line.pop("key"): line for line in lines}

    def _append(self, value: Any) -> None:
        self._file.write(json_text(value).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def _read(self) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
        """(header, items); what a crash cut off is dropped."""
        self._file.seek(0)
        data = self._file.read()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            self._file.truncate(len(whole))
        if not whole:
            return None, []
        first, *rest = whole.splitlines()
        header = _object(first)
        if header is None or header.get(_HEADER) != 1 or not isinstance(header.get("settings"), dict):
            raise EvaluateError(f"{self.path} is not a ledger of scores: move it away, or --fresh")
        items = [line for text in rest if (line := _object(text)) is not None]
        return header, [line for line in items if isinstance(line.get("key"), str)]


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


# --- working it off ---------------------------------------------------------------------------------------------------


@dataclass
class Judging:
    """Counts of one `judge_all`: `ends` ("judged", or how it failed), the first reason of each; `stopped` why early."""

    ends: Counter[str] = field(default_factory=Counter)
    reasons: dict[str, str] = field(default_factory=dict)
    stopped: str = ""
    refusals: list[str] = field(default_factory=list)  # the same one, item after item

    @property
    def failed(self) -> int:
        return self.ends.total() - self.ends["judged"]

    def add(self, kind: str | None, reason: str, parallel: int) -> None:
        """Count an item; too many of the same refusal stop the work, because waiting would not help."""
        self.ends[kind or "judged"] += 1
        if kind:
            self.reasons.setdefault(kind, reason)
        if kind not in _HOPELESS:
            self.refusals = []
        elif self.refusals[:1] == [reason]:
            self.refusals.append(reason)
        else:
            self.refusals = [reason]
        if len(self.refusals) == max(_GIVE_UP_AFTER, parallel):
            self.stopped = f"the last {len(self.refusals)} judgements failed alike: {reason}"

    def line(self) -> str:
        kinds = ", ".join(f"{kind} {n}" for kind, n in sorted(self.ends.items()) if kind != "judged")
        return f"{self.ends['judged']} judged, {self.failed} failed" + (f" ({kinds})" if kinds else "")


async def judge_all(
    todo: Sequence[T],
    judge: Callable[[T], Awaitable[tuple[str | None, str]]],
    *,
    parallel: int,
    progress: Callable[[Judging], None] = lambda counts: None,
) -> Judging:
    """`judge` every item, `parallel` at a time; it keeps its result and returns (kind of failure or None, why)."""
    counts, waiting = Judging(), iter(todo)

    async def worker() -> None:
        for item in waiting:
            if counts.stopped:
                return
            counts.add(*await judge(item), parallel)
            progress(counts)

    tasks = [asyncio.create_task(worker()) for _ in range(max(1, min(parallel, len(todo))))]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return counts
