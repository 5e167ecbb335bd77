"""The process as a renderer: a program's prompt grown over cycles, its drafts handed back to policy and renderer."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import numpy as np

from genevolve_fast.agent.chat import ChatConversation
from genevolve_fast.agent.conversation import Reply, TokenConversation
from genevolve_fast.incidents import Incidents
from genevolve_fast.net.chat import ChatEndpoint
from genevolve_fast.net.web import PerLoop
from genevolve_fast.process.growing import Draw, Growth, GrowthSettings, Ungrown
from genevolve_fast.process.prompts import VERSION
from genevolve_fast.process.record import Record, Talk, process_key
from genevolve_fast.protocols import Codec, Engine, Renderer, RenderError, Sampling
from genevolve_fast.resumable import BatchError
from genevolve_fast.trajectory import Program, Reference, image_hash

# (session id, pixels of the program's references) -> a conversation, open within the context
OpenTalk = Callable[[str, Sequence[np.ndarray]], AbstractContextManager[Talk]]


# --- who writes -------------------------------------------------------------------------------------------------------


class AskedAfresh(TokenConversation):
    """Every turn is a session of its own: what is sampled follows from ids and seed, not from keys and values that an
    engine kept, so a process that goes on elsewhere samples the same bits."""

    async def ask(self, sampling: Sampling, seed: int) -> Reply:
        self.engine.open(self.session_id)
        try:
            return await super().ask(sampling, seed)
        finally:
            self.engine.close(self.session_id)


def token_talk(engine: Engine, codec: Codec) -> OpenTalk:
    """The policy behind a token engine."""

    @contextmanager
    def opened(session_id: str, references: Sequence[np.ndarray]) -> Iterator[Talk]:
        yield AskedAfresh(engine, codec, session_id)

    return opened


def chat_talk(endpoint: Callable[[], ChatEndpoint]) -> OpenTalk:
    """A model behind a chat server; `endpoint` opens it for the running event loop."""
    of_loop = PerLoop(endpoint)

    @contextmanager
    def opened(session_id: str, references: Sequence[np.ndarray]) -> Iterator[Talk]:
        yield ChatConversation(of_loop(), seeded=True)

    return opened


# --- the renderer -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Grown:
    """A picture, the folder that holds how it came about, and why it ended there."""

    picture: np.ndarray
    folder: Path
    end: str


class ProcessRenderer:
    """Any renderer, with a policy that plans, inspects and refines (protocols.Renderer).

    Every process is kept in a folder of its own under `folder`, named by what it follows from: program, references,
    seed and `identity` (what of writer, renderer and budgets changes the picture). A process that has ended is not
    grown again, one that was cut off goes on. Failed stages are counted in `incidents` as "process/<kind>", failed
    drafts as "draft/<kind>".
    """

    def __init__(
        self,
        renderer: Renderer,
        open_talk: OpenTalk,
        settings: GrowthSettings,
        folder: Path,
        identity: Mapping[str, Any],
        incidents: Incidents | None = None,
    ) -> None:
        self.renderer, self.settings, self.folder = renderer, settings, folder
        self.name = f"process over {renderer.name}"
        self.min_references, self.max_references = renderer.min_references, renderer.max_references
        if settings.prompts == "edit" and renderer.max_references < 1:
            raise ValueError(f"prompts edit: {renderer.name} takes no references, so it would never see the draft")
        self._open_talk = open_talk
        self._identity = {"words": VERSION, "settings": dataclasses.asdict(settings), **identity}
        self._incidents = incidents or Incidents()
        self._locks = PerLoop(WeakValueDictionary)  # a lock lives while somebody grows with it

    async def render(self, program: Program, references: Sequence[np.ndarray], seed: int) -> np.ndarray:
        """uint8 [height, width, 3]. Raises RenderError, whose kind is the engine's where that failed first."""
        return (await self.grow(program, references, seed)).picture

    async def grow(self, program: Program, references: Sequence[np.ndarray], seed: int) -> Grown:
        """`render`, and where to read about it."""
        hashes = [image_hash(pixels) for pixels in references]
        key = process_key(prompt=program.gen_prompt, references=hashes, seed=seed, identity=self._identity)
        lock = self._locks().setdefault(key, asyncio.Lock())
        async with lock:  # two of one program: the second finds what the first drew
            try:
                return await self._grow(program, references, seed, key)
            except (BatchError, OSError) as error:
                raise RenderError(f"the process cannot be kept: {error}") from error

    async def _grow(self, program: Program, references: Sequence[np.ndarray], seed: int, key: str) -> Grown:
        folder = self.folder / key
        record = Record(folder, self._identity | {"seed": seed})
        try:
            if (ended := await record.ended()) is not None:
                return Grown(ended[1], folder, str(ended[0]["end"]))
            began = time.monotonic()
            with self._open_talk(key, references) as talk:
                draw = drawing(self.renderer, program, references)
                growth = Growth(program.gen_prompt, talk, draw, self.settings, record, seed, self._incidents)
                picture = await growth.run(len(references))
            record.end(
                request=program.gen_prompt,
                references=[r.title or r.img_id for r in program.reference_images],
                identity=self._identity,
                seed=seed,
                end=growth.end,
                picture=image_hash(picture),
                prompt=growth.prompt,
                seconds=round(time.monotonic() - began, 3),
            )
            return Grown(picture, folder, growth.end)
        except Ungrown as error:
            raise RenderError(f"the {error.source} left no draft: {error}", error.kind) from error
        finally:
            record.close()


def drawing(renderer: Renderer, program: Program, references: Sequence[np.ndarray]) -> Draw:
    """Draws a prompt with the program's references and, where the renderer takes one more, the last draft."""

    async def draw(prompt: str, last: np.ndarray | None, seed: int) -> np.ndarray:
        named, given = program.reference_images, list(references)
        if last is not None and len(given) < renderer.max_references:
            named = (*named, Reference("IMG_DRAFT", "the last draft", sha256=image_hash(last)))
            given.append(last)
        return await renderer.render(Program(prompt, tuple(named)), given, seed)

    return draw
