"""Folders that the steps of the data chain write: a manifest says what made them, from what, and what they hold."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from genevolve_fast.data.rows import DataError, read_jsonl, safe_file
from genevolve_fast.trajectory import json_text

MANIFEST = "manifest.json"
_VERSION = 1
_HEADER = "genevolve_fast_ledger"


class StepError(DataError):
    """A folder is not what the step needs, or was changed since it was written; the message says what to do."""


# --- files ------------------------------------------------------------------------------------------------------------


def write_bytes(path: Path, data: bytes) -> None:
    """Write to a temporary file beside `path` and rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        partial.write_bytes(data)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """JSONL, written under another name and renamed; returns the number of rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    count = 0
    try:
        with partial.open("w", encoding="utf-8") as f:
            for row in rows:
                f.write(json_text(dict(row)) + "\n")
                count += 1
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return count


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(f)


def _digest(f) -> str:  # Python 3.10
    digest = hashlib.sha256()
    while block := f.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def keep_picture(source: Path, folder: Path) -> tuple[str, str]:
    """Copy a picture into `folder/images` under its content's hash, once; returns (relative path, SHA-256)."""
    sha = file_hash(source)
    name = f"images/{sha}{source.suffix.lower()}"
    if not (folder / name).exists():
        write_bytes(folder / name, source.read_bytes())
    return name, sha


def link_picture(source: Path, target: Path) -> None:
    """`target` as another name of `source`'s bytes, or a copy where the file system has no such names."""
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except FileExistsError:
        pass
    except OSError:
        write_bytes(target, source.read_bytes())


# --- a step's folder --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """A finished step's folder; `digest` is the hash of its manifest, which holds the hashes of its tables."""

    folder: Path
    name: str
    digest: str
    manifest: Mapping[str, Any]

    def rows(self, table: str) -> Iterator[dict[str, Any]]:
        return read_jsonl(self.folder / table)

    def picture(self, name: str, sha: str) -> Path:
        """A picture that a row names with the hash of its bytes. Raises StepError when it is not that any more."""
        try:
            path = safe_file(self.folder, name)
        except DataError as error:
            raise StepError(f"{self.folder}: {error}") from None
        if not path.exists():
            raise StepError(f"{path} is missing: run the step that wrote {self.folder} again")
        if file_hash(path) != sha:
            raise StepError(f"{path} was changed since the {self.name} step wrote it")
        return path


def open_step(folder: Path, *names: str) -> Step:
    """The folder that one of the steps `names` finished, its tables unchanged. Raises StepError."""
    wanted = " or ".join(f"`genevolve-fast data {name}`" for name in names)
    manifest = read_manifest(folder)
    if manifest is None:
        raise StepError(f"{folder} is no folder that {wanted} finished: it has no {MANIFEST}")
    if manifest["step"] not in names:
        raise StepError(f"{folder} was written by `data {manifest['step']}`, this step reads what {wanted} wrote")
    for table, sha in manifest["files"].items():
        path = safe_file(folder, table)
        if not path.exists():
            raise StepError(f"{path} is missing: run `data {manifest['step']}` again")
        if file_hash(path) != sha:
            raise StepError(f"{path} was changed since `data {manifest['step']}` wrote it")
    return Step(folder, manifest["step"], file_hash(folder / MANIFEST), manifest)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """A folder's manifest, None where there is none. Raises StepError for one that is broken."""
    path = folder / MANIFEST
    if not path.exists():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        whole = manifest["genevolve_data"] == _VERSION and isinstance(manifest["step"], str)
        whole = whole and all(isinstance(manifest[name], dict) for name in ("files", "settings", "counts"))
    except (ValueError, KeyError, TypeError, RecursionError):
        whole = False
    if not whole:
        raise StepError(f"{path} is not the manifest of a data folder")
    return manifest


def finished(folder: Path, step: str, source: Step | None, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """The manifest where `folder` already holds this step of this source and these settings, None where it is new.

    Raises StepError where it holds anything else: nothing is written over.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        return None
    if manifest["step"] != step:
        raise StepError(f"{folder} holds what `data {manifest['step']}` wrote: choose another --output-dir")
    before = manifest["settings"]
    now = json.loads(json_text(dict(settings)))
    if changed := [name for name in {**before, **now} if before.get(name) != now.get(name)]:
        raise StepError(
            f"{folder} was made with other settings ({', '.join(sorted(changed))}): choose another --output-dir"
        )
    if (manifest.get("source") or {}).get("sha256") != (source.digest if source else None):
        raise StepError(f"{folder} was made from another input: choose another --output-dir")
    return manifest


def close_step(
    folder: Path,
    step: str,
    *,
    source: Step | None,
    settings: Mapping[str, Any],
    tables: Sequence[str],
    counts: Mapping[str, Any],
) -> dict[str, Any]:
    """Write the manifest, last of all: a folder without one is unfinished."""
    manifest = {
        "genevolve_data": _VERSION,
        "step": step,
        "source": source and {"step": source.name, "sha256": source.digest},
        "settings": dict(settings),
        "counts": dict(counts),
        "files": {name: file_hash(folder / name) for name in tables},
    }
    write_bytes(folder / MANIFEST, (json_text(manifest, indent=1) + "\n").encode())
    return manifest


# --- what is done so far ----------------------------------------------------------------------------------------------


class Ledger:
    """A JSONL of finished pieces by key, on disk before the next one starts; a crash loses at most one line.

    The first line holds what all pieces share. Raises StepError when the file was begun with anything else, or while
    another process holds it.
    """

    def __init__(self, path: Path, shared: Mapping[str, Any]) -> None:
        self.path = path
        self.done: dict[str, dict[str, Any]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b")
        try:
            self._open(json.loads(json_text(dict(shared))))
        except BaseException:
            self._file.close()
            raise

    def _open(self, shared: dict[str, Any]) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise StepError(f"{self.path.parent} is being written by another process") from None
        self._file.seek(0)
        data = self._file.read()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            self._file.truncate(len(whole))
        lines = whole.splitlines()
        if not lines:
            self._append({_HEADER: 1, "shared": shared})
            return
        header, *rows = [_object(line) for line in lines]
        if not header or header.get(_HEADER) != 1:
            raise StepError(f"{self.path} is no ledger of a data step: move it away")
        if header["shared"] != shared:
            changed = sorted(n for n in {**header["shared"], **shared} if header["shared"].get(n) != shared.get(n))
            raise StepError(
                f"{self.path.parent} was begun with another {', '.join(changed)}: choose another --output-dir"
            )
        for row in rows:
            if row and isinstance(row.get("key"), str) and isinstance(row.get("value"), dict):
                self.done[row["key"]] = row["value"]

    def add(self, key: str, value: Mapping[str, Any]) -> None:
        self.done[key] = dict(value)
        self._append({"key": key, "value": dict(value)})

    def _append(self, value: Any) -> None:
        self._file.write(json_text(value).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
