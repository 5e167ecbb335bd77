"""One rollout, turn by turn: token ids in, token ids out, never decoded and re-encoded."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from genevolve_fast.agent.images import ImageIds, SeenImage
from genevolve_fast.agent.protocol import (
    APPLY_GUIDANCE,
    FINAL_STEP,
    TOO_LONG,
    Answer,
    FormatError,
    Reply,
    ToolCall,
    format_error,
    parse_reply,
)
from genevolve_fast.protocols import Codec, Engine, EngineError, Observation, Sampling, Tool, ToolError
from genevolve_fast.trajectory import (
    Failed,
    ImageRecord,
    InvariantError,
    Message,
    Program,
    Request,
    Role,
    Trajectory,
    Turn,
)

_TAGS = ("tool_call", "answer")
_MARKS = ("<|im_start|>", "<|im_end|>", "<|image_pad|>", "<|vision_start|>", "<|vision_end|>", "<|endoftext|>")


@dataclass(frozen=True)
class SessionSettings:
    """Limits and sampling of a rollout; the defaults are the released runtime's."""

    max_tool_calls: int = 10
    max_model_calls: int = 11
    max_tokens_per_turn: int = 4096
    max_response_tokens: int = 30_000
    max_prompt_tokens: int = 6144
    temperature: float = 0.6
    top_p: float = 0.9
    min_references: int = 1
    max_references: int = 2
    observe_images: Literal["tokens", "text"] = "text"
    tool_timeout_s: float = 60.0
    max_observation_images: int = 5


@dataclass(frozen=True)
class SessionResult:
    """The rollout and the pixels (uint8 [h, w, 3]) of its images by hash."""

    trajectory: Trajectory
    images: Mapping[str, np.ndarray]


async def run_session(
    request: Request,
    *,
    engine: Engine,
    codec: Codec,
    tools: Mapping[str, Tool],
    system_prompt: str,
    settings: SessionSettings,
    rollout_id: str,
    group_id: str,
    seed: int,
    policy_step: int = 0,
) -> SessionResult:
    """Let the policy behind `engine` answer `request`. Never raises for what policy, tools or engine do."""
    transcript = _Transcript(codec)
    session = _Session(request, engine, codec, tools, settings, rollout_id, seed, transcript)
    engine.open(rollout_id)
    try:
        await session.run(system_prompt)
    finally:
        engine.close(rollout_id)
    trajectory = Trajectory(
        id=rollout_id,
        request_id=request.id,
        group_id=group_id,
        request_stop=transcript.request_stop,
        turns=tuple(transcript.turns),
        images=tuple(transcript.records),
        messages=tuple(transcript.messages),
        program=session.program,
        termination=session.termination,
        error=session.error,
        outcome=session.failure,
        rounds=session.model_calls,
        seed=seed,
        policy_step=policy_step,
        **transcript.arrays(),
    )
    return SessionResult(trajectory, transcript.images_by_hash)


def harmless(text: str) -> str:
    """Text from outside with chat and image markers broken up, so that a web page cannot open a turn of its own."""
    for mark in _MARKS:
        text = text.replace(mark, mark.replace("|", "¦"))
    return text


class _Transcript:
    """The token record of a rollout: ids, mask, log-probs, turns and images grow together."""

    def __init__(self, codec: Codec) -> None:
        self.codec = codec
        self.ids: list[int] = []
        self.mask: list[bool] = []
        self.logps: list[float] = []
        self.turns: list[Turn] = []
        self.records: list[ImageRecord] = []
        self.pixels: list[np.ndarray] = []
        self.images_by_hash: dict[str, np.ndarray] = {}
        self.messages: list[Message] = []
        self.request_stop = 0

    def arrays(self) -> dict[str, np.ndarray]:
        return {
            "ids": np.array(self.ids, dtype=np.int64),
            "loss_mask": np.array(self.mask, dtype=bool),
            "rollout_logps": np.array(self.logps, dtype=np.float32),
        }

    def given(self, role: Role, text: str, images: Sequence[SeenImage] = (), tool: str | None = None) -> None:
        """Append tokens the policy did not write; the n-th `<image>` mark of `text` becomes the n-th image's tokens."""
        start = len(self.ids)
        parts = text.split(_IMAGE_MARK)
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

    def sampled(self, ids: Sequence[int], logps: Sequence[float], ending: Sequence[int], tool: str | None) -> None:
        """Append a reply and, where the policy did not end its turn, the ids that do (which carry no loss)."""
        start = len(self.ids)
        self._append(ids, True, logps)
        self._append(ending, False, [0.0] * len(ending))
        decision = decision_span(ids, self.codec)
        shifted = (start + decision[0], start + decision[1]) if decision else None
        self.turns.append(Turn("assistant", start, len(self.ids), tool, shifted))

    def _append(self, ids: Sequence[int], loss: bool, logps: Sequence[float]) -> None:
        self.ids.extend(ids)
        self.mask.extend([loss] * len(ids))
        self.logps.extend(min(0.0, p) for p in logps)


_IMAGE_MARK = "\x00image\x00"


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


class _Session:
    def __init__(self, request, engine, codec, tools, settings: SessionSettings, rollout_id, seed, transcript) -> None:
        self.request: Request = request
        self.engine: Engine = engine
        self.codec: Codec = codec
        self.tools: Mapping[str, Tool] = tools
        self.settings = settings
        self.rollout_id: str = rollout_id
        self.seed: int = seed
        self.transcript: _Transcript = transcript
        self.image_ids = ImageIds()
        self.end_of_turn = codec.encode("<|im_end|>")
        self.model_calls = 0
        self.tool_calls = 0
        self.program: Program | None = None
        self.termination = ""
        self.error: str | None = None
        self.failure: Failed | None = None

    async def run(self, system_prompt: str) -> None:
        if not self._open(system_prompt):
            return
        while not self.termination:
            reply = await self._model_call()
            if reply is None:
                return
            if isinstance(reply, Answer):
                self._finish(reply)
            elif self._is_last():
                self.termination, self.error = "no_answer", "no answer in the final turn"
            else:
                await self._respond(reply)

    # --- the request --------------------------------------------------------------------------------------------------

    def _open(self, system_prompt: str) -> bool:
        t, question = self.transcript, harmless(self.request.question)
        t.given("system", f"<|im_start|>system\n{system_prompt}<|im_end|>\n")
        start = len(t.ids)
        t.given("user", f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n")
        t.request_stop = start + t.ids[start:].index(self.end_of_turn[0])
        t.messages += [Message("system", system_prompt), Message("user", question)]
        if t.request_stop > self.settings.max_prompt_tokens:
            self.termination = "error"
            self.error = (
                f"prompt of {t.request_stop} tokens exceeds max_prompt_tokens {self.settings.max_prompt_tokens}"
            )
            self.failure = Failed("engine", self.error)
        return not self.termination

    # --- the policy's turn --------------------------------------------------------------------------------------------

    def _budget(self) -> int:
        """Response tokens left, observations included."""
        return self.settings.max_response_tokens - (len(self.transcript.ids) - self.transcript.request_stop)

    def _is_last(self) -> bool:
        return self.model_calls >= self.settings.max_model_calls

    async def _model_call(self) -> Reply | None:
        budget = min(self.settings.max_tokens_per_turn, self._budget())
        if budget < 1:
            self.termination, self.error = "max_response_length", "the response budget is used up"
            return None
        s = self.settings
        sampling = Sampling(s.temperature, s.top_p, budget, tuple(self.end_of_turn))
        t = self.transcript
        try:
            out = await self.engine.generate(
                self.rollout_id, t.ids, t.pixels, sampling, self.seed * 1000 + self.model_calls
            )
        except EngineError as error:
            self.termination, self.error = "error", f"llm_call_failed: {error}"
            self.failure = Failed("engine", str(error))
            return None
        self.model_calls += 1
        ended = bool(out.ids) and out.ids[-1] in self.end_of_turn
        text = self.codec.decode(out.ids[:-1] if ended else out.ids)
        reply = parse_reply(text)
        if not ended and not isinstance(reply, Answer):
            reply = FormatError("")  # cut off: answered with TOO_LONG
        t.sampled(out.ids, out.logps, () if ended else self.end_of_turn, _name(reply))
        t.messages.append(Message("assistant", text))
        return reply

    # --- the world's turn ---------------------------------------------------------------------------------------------

    async def _respond(self, reply: ToolCall | FormatError) -> None:
        """Observe the tool's answer, or what was wrong; announces the final turn when the next call is the last."""
        images: list[SeenImage] = []
        tool = None
        if isinstance(reply, ToolCall):
            tool = reply.name
            text, images = await self._call_tool(reply)
        else:
            text = format_error(reply.reason) if reply.reason else TOO_LONG
        if self.model_calls + 1 >= self.settings.max_model_calls or self._budget() < 2 * self._reserve():
            text += f"\n{FINAL_STEP}"
            self.model_calls = max(self.model_calls, self.settings.max_model_calls - 1)
        self._observe(text, images, tool)

    def _reserve(self) -> int:
        """Tokens kept for the answer when the response budget runs out."""
        return min(self.settings.max_tokens_per_turn, self.settings.max_response_tokens // 8)

    def _observe(self, text: str, images: list[SeenImage], tool: str | None) -> None:
        body = f"<tool_response>\n{text}\n</tool_response>"
        newline = "\n" if self.transcript.ids else ""
        self.transcript.given(
            "tool", f"{newline}<|im_start|>user\n{body}<|im_end|>\n<|im_start|>assistant\n", images, tool
        )
        self.transcript.messages.append(Message("user", body.replace(_IMAGE_MARK, "<image>")))

    async def _call_tool(self, call: ToolCall) -> tuple[str, list[SeenImage]]:
        if self.tool_calls >= self.settings.max_tool_calls:
            return f"[tool error] {call.name}: the limit of {self.settings.max_tool_calls} tool calls is reached", []
        self.tool_calls += 1
        tool = self.tools.get(call.name)
        if tool is None:
            return f"[tool error] {harmless(call.name[:60])}: unknown tool, there are {', '.join(self.tools)}", []
        try:
            observation = await asyncio.wait_for(tool(call.arguments), self.settings.tool_timeout_s)
        except asyncio.TimeoutError:
            return f"[tool error] {call.name}: no answer within {self.settings.tool_timeout_s:g} s", []
        except ToolError as error:
            return f"[tool error] {call.name}: {harmless(str(error))}", []
        except Exception as error:  # a tool's bug must not end the other rollouts
            return f"[tool error] {call.name}: {type(error).__name__}: {harmless(str(error))}", []
        if call.name == "image_search":
            return self._image_block(call, observation)
        text = harmless(observation.text)
        return (f"{text}\n{APPLY_GUIDANCE}" if call.name == "query_knowledge" else text), []

    def _image_block(self, call: ToolCall, observation: Observation) -> tuple[str, list[SeenImage]]:
        """The released runtime's block; images as tokens where they have pixels and `observe_images` asks for it."""
        query = harmless(str(call.arguments.get("query", "")).strip())
        lines, shown = [f"--- image search result for [{query}] ---"], []
        for found in observation.images[: self.settings.max_observation_images]:
            seen = self.image_ids.register(found)
            lines.append(f"{seen.img_id}: title: {harmless(found.title)}")
            if self.settings.observe_images == "tokens" and found.pixels is not None:
                lines.append(_IMAGE_MARK)
                shown.append(seen)
            else:
                pairs = (("url", found.url), ("local_path", found.local_path), ("page_url", found.page_url))
                lines += [f"  {name}: {harmless(value)}" for name, value in pairs if value]
        return "\n".join([*lines, "--- end of image search result ---"]), shown

    # --- the end ------------------------------------------------------------------------------------------------------

    def _finish(self, answer: Answer) -> None:
        """Resolve references as the released runtime does (unknown ids dropped, sorted, capped) and check the rules."""
        named = {img_id: self.image_ids.reference(img_id, note) for img_id, note in answer.reference_images}
        known = sorted((r for r in named.values() if r is not None), key=lambda r: r.img_id)
        self.program = Program(answer.gen_prompt, tuple(known[: self.settings.max_references]))
        self.termination = "answer"
        try:
            self.program.validate(
                min_references=self.settings.min_references, max_references=self.settings.max_references
            )
        except InvariantError as error:
            self.error = f"invalid program: {error}"


def _name(reply: Reply) -> str | None:
    return reply.name if isinstance(reply, ToolCall) else None


def describe_tools(tools: Mapping[str, Tool]) -> str:
    """Tool schemas in Qwen's `<tools>` form."""
    rows = [
        {
            "type": "function",
            "function": {"name": t.name, "description": t.description, "parameters": dict(t.parameters)},
        }
        for t in tools.values()
    ]
    return "<tools>\n" + "\n".join(json.dumps(r, ensure_ascii=False) for r in rows) + "\n</tools>"
