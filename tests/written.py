"""The sandbox's process script behind the Engine protocol, and scripts with one bad habit each."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from genevolve_fast.agent.images import SeenImage
from genevolve_fast.data.demonstrations import conversation
from genevolve_fast.process.trace import Correction, Plan
from genevolve_fast.protocols import Codec, FoundImage, Generation, Sampling
from genevolve_fast.sandbox.process_writer import SymbolicWriter


class WritingEngine:
    """protocols.Engine: a script a session, asked in ids, answering in ids; log-probs are 0, it is certain."""

    def __init__(
        self, codec: Codec, script: Callable[[str], SymbolicWriter] = lambda session: SymbolicWriter()
    ) -> None:
        self._codec, self._script = codec, script
        self._scripts: dict[str, SymbolicWriter] = {}
        self._images: dict[str, int] = {}

    def open(self, session_id: str) -> None:
        self._scripts.setdefault(session_id, self._script(session_id))

    def close(self, session_id: str) -> None:
        self._scripts.pop(session_id, None)

    async def generate(
        self, session_id: str, ids: Sequence[int], images: Sequence[np.ndarray], sampling: Sampling, seed: int
    ) -> Generation:
        writer, messages = self._scripts[session_id], conversation(self._codec.decode(ids))
        if len(messages) == 2:
            writer.begin(messages[0].content, messages[1].content)
        else:
            fresh = images[self._images.get(session_id, 0) :]
            writer.observe(messages[-1].content, [SeenImage("DRAFT", FoundImage("", p), "") for p in fresh])
        self._images[session_id] = len(images)
        reply = await writer.ask(sampling, seed)
        out = self._codec.encode(f"{reply.text}<|im_end|>")[: sampling.max_tokens]
        return Generation(out, [0.0] * len(out), "stop" if out[-1] in sampling.stop_ids else "length")


class Blind(SymbolicWriter):
    """Finds every draft sound."""

    def _faults(self) -> list[str]:
        return []


class Spoiler(SymbolicWriter):
    """Plans what the canvas draws right, finds a fault in it all the same and refines to an empty ground."""

    def _plan(self) -> str:
        if not self._groups:
            return super()._plan()
        super()._plan()
        return str(Plan("Paint it.", " ".join(f"{m.sentence}." for m in self._meant)))

    def _faults(self) -> list[str]:
        return ["it is plain"]

    def _refine(self) -> str:
        return str(Correction("Background black."))


class Forgetful(SymbolicWriter):
    """Plans the ground alone, whatever is asked for."""

    def _plan(self) -> str:
        before = self._groups
        if before:
            self._groups = []
            return str(Plan("Paint the ground.", "Background white."))
        return super()._plan()

    def _faults(self) -> list[str]:
        return []
