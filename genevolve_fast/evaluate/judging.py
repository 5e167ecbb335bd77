"""What judging pictures shares, whoever judges: what names a judgement, its picture, what became of it."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable
from pathlib import Path

import numpy as np

from genevolve_fast.files import file_hash
from genevolve_fast.net.pictures import decode_image
from genevolve_fast.net.web import FetchError
from genevolve_fast.protocols import JudgeError
from genevolve_fast.resumable import Tally

_MAX_PIXELS = 100_000_000


class Judging(Tally):
    """Counts of a run of judgements: "judged", or how one failed."""

    good = "judged"
    hopeless = ("connect", "client_error")
    items = "judgements"

    def line(self) -> str:
        """One line: n judged, n failed by type."""
        return f"{self.succeeded} judged, {self.failures()}"


async def outcome(judged: Awaitable[None]) -> tuple[str, str]:
    """How one judgement ended and why it failed, for resumable.work_off."""
    try:
        await judged
    except (JudgeError, FetchError) as error:
        return error.kind, str(error)
    except Exception as error:  # one row's bug must not end the others
        return "other", f"{type(error).__name__}: {error}"
    return Judging.good, ""


def read_pixels(path: Path, max_side: int) -> np.ndarray:
    """uint8 [h, w, 3], its longest side at most `max_side`. Raises FetchError where the file is no picture."""
    try:
        return decode_image(path.read_bytes(), _MAX_PIXELS, max_side).pixels
    except FetchError as error:
        raise FetchError(f"{path.name} is no picture to judge: {error}", error.kind) from None
    except OSError as error:
        raise FetchError(f"{path.name} cannot be read: {error.strerror}", "other") from None


def key_of(*parts: str) -> str:
    """SHA-256 of what a judge is shown."""
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a picture's file, "" where it cannot be read: that is told when it is judged."""
    try:
        return file_hash(path)
    except OSError:
        return ""
