"""What a growing picture leaves on disk: every text and draft before the next one, so that it can go on from there."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from genevolve_fast.agent.conversation import Conversation, Reply
from genevolve_fast.files import write_bytes, write_text
from genevolve_fast.net.harmless import one_line
from genevolve_fast.net.pictures import decode_image, png_bytes
from genevolve_fast.net.web import FetchError
from genevolve_fast.protocols import RenderError, Sampling
from genevolve_fast.render.endpoints import MAX_SIDE, off_loop
from genevolve_fast.resumable import Ledger, parse_json
from genevolve_fast.trajectory import StageName, image_hash, json_text

STEPS = "steps.jsonl"
PROCESS = "process.json"
DRAFTS = "drafts"
_MAX_FAULT = 300


class Talk(Conversation, Protocol):
    """A conversation that can take up what an earlier one was told."""

    def said(self) -> dict[str, Any]:
        """What `ask` got last, for JSON."""
        ...

    def recall(self, said: Mapping[str, Any]) -> Reply:
        """As if `ask` had got it: nobody is asked."""
        ...


@dataclass(frozen=True)
class Step:
    """A text that was asked for, or a draft that was.

    `text`: what was written, or the prompt that was drawn. `fault`: why the text could not be read or the draft not
    drawn; `kind` of such a failure. `read`: what the text says, by part. `verdict` of an inspection: "sound", or what
    it found.
    """

    what: Literal["text", "draft"]
    stage: StageName
    cycle: int
    seed: int
    text: str
    seconds: float = 0.0
    sha256: str = ""
    fault: str = ""
    kind: str = ""
    read: Mapping[str, str] = field(default_factory=dict)
    verdict: str = ""
    ended: bool = False  # the policy ended the process with it


class Record:
    """The steps of one process in order; with a folder each is on disk before the next one, and is not made again.

    One process at a time holds the folder. Raises BatchError.
    """

    def __init__(self, folder: Path | None = None, settings: Mapping[str, Any] | None = None) -> None:
        self.folder = folder
        self.settings = dict(settings or {})
        self.steps: list[Step] = []
        self.fresh = False  # the last step was made now, not read
        self._ledger = None if folder is None else Ledger(folder / STEPS, self.settings, "stage")

    async def ask(self, talk: Talk, sampling: Sampling, stage: StageName, cycle: int, seed: int) -> Reply:
        """The next text. Raises EngineError."""
        if (kept := self._next()) is not None:
            self.steps.append(kept[0])
            return talk.recall(kept[1]["said"])
        began = time.monotonic()
        reply = await talk.ask(sampling, seed)
        seconds = round(time.monotonic() - began, 3)
        self._add(Step("text", stage, cycle, seed, reply.text, seconds), said=talk.said())
        return reply

    async def draft(
        self,
        draw: Callable[[], Awaitable[np.ndarray]],
        stage: StageName,
        cycle: int,
        seed: int,
        prompt: str,
        needed: bool,
    ) -> np.ndarray | None:
        """The next draft; None where it failed and the process goes on without it. Raises RenderError if `needed`."""
        if (kept := self._next()) is not None:
            pixels = await self._read(kept[0].sha256) if kept[0].sha256 else None
            self.steps.append(kept[0])
            return pixels
        began = time.monotonic()
        step = Step("draft", stage, cycle, seed, prompt)
        try:
            pixels = await draw()
        except RenderError as error:
            if needed:
                raise
            failed = replace(step, fault=one_line(str(error), _MAX_FAULT), kind=error.kind)
            self._add(replace(failed, seconds=round(time.monotonic() - began, 3)))
            return None
        sha = await off_loop(image_hash, pixels)
        if self.folder is not None:
            await asyncio.to_thread(write_bytes, self.path(sha), await off_loop(png_bytes, pixels))
        self._add(replace(step, sha256=sha, seconds=round(time.monotonic() - began, 3)))
        return pixels

    def note(self, **changes: Any) -> None:
        """What became of the last step; follows from its text, so that it needs no line of its own."""
        self.steps[-1] = replace(self.steps[-1], **changes)

    def path(self, sha256: str) -> Path:
        return self.folder / DRAFTS / f"{sha256[:32]}.png"

    def end(self, **told: Any) -> None:
        """Write process.json, the whole process for readers."""
        if self.folder is None:
            return
        steps = [dataclasses.asdict(s) | self._file(s) for s in self.steps]
        write_text(self.folder / PROCESS, json_text({"version": 1} | told | {"steps": steps}, indent=2))

    async def ended(self) -> tuple[dict[str, Any], np.ndarray] | None:
        """process.json and its picture, if the process has ended."""
        if self.folder is None or not (self.folder / PROCESS).exists():
            return None
        path = self.folder / PROCESS
        told = parse_json(await asyncio.to_thread(path.read_text, encoding="utf-8"), str(path))
        return told, await self._read(str(told["picture"]))

    def close(self) -> None:
        if self._ledger is not None:
            self._ledger.close()

    def _file(self, step: Step) -> dict[str, str]:
        return {"file": str(self.path(step.sha256).relative_to(self.folder))} if step.sha256 else {}

    def _next(self) -> tuple[Step, dict[str, Any]] | None:
        key = f"{len(self.steps):04d}"
        if self._ledger is None or key not in self._ledger.done:
            return None
        line, self.fresh = self._ledger.done[key], False
        return Step(**line["step"]), line

    def _add(self, step: Step, **more: Any) -> None:
        if self._ledger is not None:
            self._ledger.add(f"{len(self.steps):04d}", {"step": dataclasses.asdict(step)} | more)
        self.steps.append(step)
        self.fresh = True

    async def _read(self, sha: str) -> np.ndarray:
        path = self.path(sha)
        try:
            data = await asyncio.to_thread(path.read_bytes)
            pixels = (await off_loop(decode_image, data, MAX_SIDE**2, MAX_SIDE)).pixels
        except (OSError, FetchError) as error:
            raise RenderError(f"the draft {path} cannot be read: {error}; remove {self.folder}") from None
        if image_hash(pixels) != sha:
            raise RenderError(f"{path} is not the draft that was drawn: remove {self.folder}")
        return pixels


def process_key(**identity: Any) -> str:
    """A folder's name for what a process follows from."""
    return hashlib.sha256(json_text(identity).encode()).hexdigest()[:24]
