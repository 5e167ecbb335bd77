"""What services answered, kept by content: who asks the same again reads the same, also without a network."""

from __future__ import annotations

import asyncio
import hashlib
import json
import sqlite3
import threading
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from tenacity import Retrying, retry_if_exception, stop_after_delay, wait_random

from genevolve_fast.files import write_bytes
from genevolve_fast.incidents import Incidents
from genevolve_fast.net.harmless import readable
from genevolve_fast.net.web import FetchError, PerLoop

FORMAT_VERSION = 1
_SCHEMA = """
CREATE TABLE IF NOT EXISTS answers (
  key TEXT PRIMARY KEY, source TEXT NOT NULL, asked TEXT NOT NULL,
  sha256 TEXT, kind TEXT, message TEXT, CHECK ((sha256 IS NULL) <> (kind IS NULL))
)"""


class AnswerCache:
    """`folder/index.sqlite3` and `folder/files/`; several processes may share it.

    record: answers what is known, asks for the rest and keeps it. replay: answers what is known, never asks.
    Kept are answers and permanent failures (FetchError.permanent). A file is written under another name and renamed
    before the index names it, so a crash leaves at most a file that nothing names; a file whose bytes do not have the
    hash of its name counts as unknown.
    """

    def __init__(
        self, folder: Path, mode: Literal["record", "replay"], incidents: Incidents, name: str = "tools.cache"
    ) -> None:
        """Raises ValueError, beginning with `name`, when nothing can be replayed or another release wrote `folder`."""
        self.folder, self.mode, self._name = folder.absolute(), mode, name
        self._incidents = incidents
        self._lock = threading.Lock()
        self._flights: PerLoop[dict[str, asyncio.Task[bytes]]] = PerLoop(dict)
        index = self.folder / "index.sqlite3"
        if mode == "replay" and not index.exists():
            raise ValueError(f"{name}: nothing is recorded in {folder}; run with cache_mode record first")
        (self.folder / "files").mkdir(parents=True, exist_ok=True)
        self._index = sqlite3.connect(index, timeout=30, check_same_thread=False, isolation_level=None)
        _patiently(self._prepare)

    def _prepare(self) -> None:
        version = self._index.execute("PRAGMA user_version").fetchone()[0]
        if version not in (0, FORMAT_VERSION):
            raise ValueError(f"{self._name}: {self.folder} has format {version}, this release reads {FORMAT_VERSION}")
        self._index.execute("PRAGMA journal_mode=WAL")
        self._index.execute("PRAGMA synchronous=NORMAL")
        self._index.execute(_SCHEMA)
        self._index.execute(f"PRAGMA user_version={FORMAT_VERSION}")

    async def get(self, source: str, asked: Mapping[str, Any], ask: Callable[[], Awaitable[bytes]]) -> bytes:
        """The bytes recorded for (source, asked), or those of `ask`; identical concurrent calls ask once.

        Raises FetchError: a recorded failure, whatever `ask` raises, or when replaying `not_recorded` (never asked)
        and `bad_response` (a damaged file). What does not come from `ask` is counted here.
        """
        text = json.dumps(asked, sort_keys=True)
        key = hashlib.sha256(f"{source}\n{text}".encode()).hexdigest()
        flights = self._flights()
        if key not in flights:
            flights[key] = asyncio.ensure_future(self._answer(key, source, text, ask))
            flights[key].add_done_callback(lambda task: (flights.pop(key), task.cancelled() or task.exception()))
        return await asyncio.shield(flights[key])

    async def _answer(self, key: str, source: str, asked: str, ask: Callable[[], Awaitable[bytes]]) -> bytes:
        try:
            known = await asyncio.to_thread(self._read, key)
            if known is None and self.mode == "replay":
                raise FetchError("this was not recorded", "not_recorded")
        except FetchError as error:
            self._incidents.note(source, error.kind)
            raise
        if known is not None:
            return known
        try:
            answer = await ask()
        except FetchError as error:
            if error.permanent:
                row = (key, source, asked, None, error.kind, readable(str(error)))
                await asyncio.to_thread(self._write, row)
            raise
        return await asyncio.to_thread(self._keep, key, source, asked, answer)

    def _keep(self, key: str, source: str, asked: str, answer: bytes) -> bytes:
        sha = hashlib.sha256(answer).hexdigest()
        write_once(self._file(sha), answer)
        self._write((key, source, asked, sha, None, None))
        return self._read(key) or answer  # another process may have been first: both go on with its answer

    def _file(self, sha: str) -> Path:
        return self.folder / "files" / sha[:2] / sha

    def _write(self, row: tuple[str | None, ...]) -> None:
        with self._lock:
            _patiently(lambda: self._index.execute("INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?, ?, ?)", row))

    def _read(self, key: str) -> bytes | None:
        """The recorded answer; a damaged one is forgotten (record) or refused (replay). Raises FetchError."""
        question = "SELECT sha256, kind, message FROM answers WHERE key = ?"
        with self._lock:
            row = _patiently(lambda: self._index.execute(question, (key,)).fetchone())
        if row is None:
            return None
        sha, kind, message = row
        if kind is not None:
            raise FetchError(message, kind, permanent=True)
        try:
            data = self._file(sha).read_bytes()
        except FileNotFoundError:
            data = None
        if data is not None and hashlib.sha256(data).hexdigest() == sha:
            return data
        if self.mode == "replay":
            raise FetchError(f"the recorded answer {sha[:12]} is damaged", "bad_response")
        with self._lock:
            _patiently(lambda: self._index.execute("DELETE FROM answers WHERE key = ? AND sha256 = ?", (key, sha)))
        return None

    def close(self) -> None:
        with self._lock:
            self._index.close()


def _patiently(run: Callable[[], Any]) -> Any:
    """sqlite answers "locked" at once while another process switches the journal."""
    return Retrying(
        retry=retry_if_exception(lambda e: isinstance(e, sqlite3.OperationalError) and "locked" in str(e)),
        stop=stop_after_delay(30),
        wait=wait_random(0, 0.05),
        reraise=True,
    )(run)


def write_once(path: Path, data: bytes) -> None:
    """Write a file whose name says its content, atomically; one that holds it already is left alone."""
    if path.exists() and path.read_bytes() == data:
        return
    write_bytes(path, data)
