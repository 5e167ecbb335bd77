"""Where a rollout's turns are kept, and who is asked for the next one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Protocol

import numpy as np

from genevolve_fast.agent.images import SeenImage
from genevolve_fast.protocols import Codec, Engine, Generation, Sampling
from genevolve_fast.trajectory import ImageRecord, Role, Turn

IMAGE_MARK = "\x00image\x00"
_TAGS = ("tool_call", "answer")


@dataclass(frozen=True)
class Reply:
    """What the policy wrote; `ended`: it closed its turn itself, and was not cut off."""

    text: str
    ended: bool


class Conversation(Protocol):
    """The turns of one rollout, in tokens or in messages."""

    @property
    def markers(self) -> Sequence[str]:
        """Texts that would become control ids, as far as it is known: none may come from outside (harmless.py)."""
        ...

    @property
    def prompt_tokens(self) -> int:
        """Tokens of system prompt and request."""
        ...

    @property
    def response_tokens(self) -> int:
        """Tokens after the request, observations included."""
        ...

    def begin(self, system_prompt: str, question: str) -> None: ...

    async def ask(self, sampling: Sampling, seed: int) -> Reply:
        """The policy's next turn, not kept yet. Raises EngineError."""
        ...

    def keep(self, reply: Reply, tool: str | None) -> None:
        """Keep the turn that `ask` returned last; `tool` is the tool it calls."""
        ...

    def observe(self, text: str, images: Sequence[SeenImage] = (), tool: str | None = None) -> None:
        """The world's answer; the n-th IMAGE_MARK of `text` stands for the n-th image."""
        ...


class TokenConversation:
    """The token record of a rollout: ids, mask, log-probs, turns and images grow together; nothing is re-encoded."""

    def __init__(self, engine: Engine, codec: Codec, session_id: str) -> None:
        self.engine, self.codec, self.session_id = engine, codec, session_id
        self.end_of_turn = codec.encode("<|im_end|>")
        self.ids: list[int] = []
        self.mask: list[bool] = []
        self.logps: list[float] = []
        self.turns: list[Turn] = []
        self.records: list[ImageRecord] = []
        self.pixels: list[np.ndarray] = []
        self.images_by_hash: dict[str, np.ndarray] = {}
        self.request_stop = 0
        self.mask_ids: list[int] = []
        self.mask_counts: list[int] = []  # of the sampled ids
        self._sampled = Generation([], [])

    @property
    def markers(self) -> Sequence[str]:
        return self.codec.markers

    @property
    def prompt_tokens(self) -> int:
        return self.request_stop

    @property
    def response_tokens(self) -> int:
        return len(self.ids) - self.request_stop

    def begin(self, system_prompt: str, question: str) -> None:
        self._given("system", f"<|im_start|>system\n{system_prompt}<|im_end|>\n")
        start = len(self.ids)
        self._given("user", f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n")
        self.request_stop = start + self.ids[start:].index(self.end_of_turn[0])

    async def ask(self, sampling: Sampling, seed: int) -> Reply:
        sampling = replace(sampling, stop_ids=tuple(self.end_of_turn))
        self._sampled = await self.engine.generate(self.session_id, self.ids, self.pixels, sampling, seed)
        return self._reply()

    def _reply(self) -> Reply:
        ids = self._sampled.ids
        ended = bool(ids) and ids[-1] in self.end_of_turn
        return Reply(self.codec.decode(ids[:-1] if ended else ids), ended)

    def said(self) -> dict[str, Any]:
        """What `ask` got last, for JSON."""
        got = asdict(self._sampled)
        return {f.name: got[f.name] for f in fields(Generation)}

    def recall(self, said: Mapping[str, Any]) -> Reply:
        """As if `ask` had got what `said` told: the engine is not asked."""
        self._sampled = Generation(**said)
        return self._reply()

    def keep(self, reply: Reply, tool: str | None) -> None:
        """Append the reply and, where the policy did not end its turn, the ids that do (which carry no loss)."""
        start, ids = len(self.ids), self._sampled.ids
        self._append(ids, True, self._sampled.logps)
        for kept in self._sampled.sampling_mask or [[]] * len(ids):
            self.mask_ids += kept
            self.mask_counts.append(len(kept))
        if not reply.ended:
            self._append(self.end_of_turn, False, [0.0] * len(self.end_of_turn))
        decision = decision_span(ids, self.codec)
        shifted = (start + decision[0], start + decision[1]) if decision else None
        self.turns.append(Turn("assistant", start, len(self.ids), tool, shifted))

    def observe(self, text: str, images: Sequence[SeenImage] = (), tool: str | None = None) -> None:
        newline = "\n" if self.ids else ""
        self._given("tool", f"{newline}<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n", images, tool)

    def arrays(self) -> dict[str, np.ndarray]:
        return {
            "ids": np.array(self.ids, dtype=np.int64),
            "loss_mask": np.array(self.mask, dtype=bool),
            "rollout_logps": np.array(self.logps, dtype=np.float32),
            "mask_ids": np.array(self.mask_ids, dtype=np.int32),
            "mask_counts": np.array(self.mask_counts if self.mask_ids else [], dtype=np.int32),
        }

    def _given(self, role: Role, text: str, images: Sequence[SeenImage] = (), tool: str | None = None) -> None:
        """Append tokens the policy did not write; the n-th `<image>` mark of `text` becomes the n-th image's tokens."""
        start = len(self.ids)
        parts = text.split(IMAGE_MARK)
        with_tokens = parts[0]
        for seen, part in zip(images, parts[1:], strict=True):
            count = self.codec.image_tokens(self.codec.image_grid(seen.found.pixels))
            with_tokens += f"<|vision_start|>{'<|image_pad|>' * count}<|vision_end|>{part}"
        piece = self.codec.encode(with_tokens)
        self._record_images(piece, start, images)
        self._append(piece, False, [0.0] * len(piece))
        self.turns.append(Turn(role, start, len(self.ids), tool))

    def _record_images(self, piece: Sequence[int], start: int, images: Sequence[SeenImage]) -> None:
        at = 0
        for seen in images:
            pixels = seen.found.pixels
            grid = self.codec.image_grid(pixels)
            count = self.codec.image_tokens(grid)
            at = piece.index(self.codec.image_pad_id, at)
            self.records.append(ImageRecord(seen.img_id, seen.sha256, grid, start + at, start + at + count))
            self.pixels.append(pixels)
            self.images_by_hash[seen.sha256] = pixels
            at += count

    def _append(self, ids: Sequence[int], loss: bool, logps: Sequence[float]) -> None:
        self.ids.extend(ids)
        self.mask.extend([loss] * len(ids))
        self.logps.extend(min(0.0, p) for p in logps)


def decision_span(ids: Sequence[int], codec: Codec) -> tuple[int, int] | None:
    """Tokens [start, stop) of a reply's first tool call or answer, tags included; None when there is no whole one."""
    text = codec.decode(ids)
    found = [(text.find(f"<{t}>"), t) for t in _TAGS if f"<{t}>" in text]
    if not found:
        return None
    begin, tag = min(found)
    closing = text.find(f"</{tag}>", begin)
    if closing < 0:
        return None
    return _token_at(ids, codec, begin), _token_at(ids, codec, closing + len(tag) + 2) + 1


def _token_at(ids: Sequence[int], codec: Codec, character: int) -> int:
    """Index of the token that writes `character`: the first whose prefix decodes to more than that many characters."""
    low, high = 0, len(ids) - 1
    while low < high:
        middle = (low + high) // 2
        if len(codec.decode(ids[: middle + 1])) > character:
            high = middle
        else:
            low = middle + 1
    return low
