"""Folders that the steps of the data chain write: a manifest says what made them, from what, and what they hold."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from genevolve_fast.data.rows import DataError, read_jsonl, safe_file
from genevolve_fast.files import file_hash, replacing, write_bytes, write_text
from genevolve_fast.trajectory import json_text

MANIFEST = "manifest.json"
_VERSION = 1


class StepError(DataError):
    """A folder is not what the step needs, or was changed since it was written; the message says what to do."""


# --- files ------------------------------------------------------------------------------------------------------------


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """JSONL, written whole."""
    with replacing(path) as partial, partial.open("w", encoding="utf-8") as f:
        for row in rows:
            f.write(json_text(dict(row)) + "\n")


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
    write_text(folder / MANIFEST, json_text(manifest, indent=1) + "\n")
    return manifest
