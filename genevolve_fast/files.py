"""Files written whole: under another name first and then renamed, so that nobody ever meets half of one."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to; at the end it takes the place of `path`, after an error it is gone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """An empty folder beside `folder` to fill; at the end it takes the place of `folder`, after an error it is gone."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial, old = (folder.with_name(f".{folder.name}.{os.getpid()}.{what}") for what in ("tmp", "old"))
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        if folder.exists():
            os.replace(folder, old)
        os.replace(partial, folder)
    finally:
        for left in (partial, old):
            shutil.rmtree(left, ignore_errors=True)


def out_of_space(error: BaseException) -> bool:
    """Whether a write failed for want of space; torch and safetensors do not pass the error's number on."""
    if isinstance(error, OSError) and error.errno in _FULL:
        return True
    told = str(error)
    return any(f"(os error {number})" in told for number in _FULL) or "inline_container.cc" in told


def write_bytes(path: Path, data: bytes) -> None:
    """Write `path` whole; its folder is made."""
    with replacing(path) as partial:
        partial.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write `path` whole, as UTF-8 and with the line ends of `text`; its folder is made."""
    write_bytes(path, text.encode())


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
