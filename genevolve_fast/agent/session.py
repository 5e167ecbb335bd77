"""One rollout, turn by turn: what the policy asks for, what the world answers, when it ends."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from genevolve_fast.agent.conversation import IMAGE_MARK, Conversation, TokenConversation
from genevolve_fast.agent.images import ImageIds, SeenImage
from genevolve_fast.agent.protocol import (
    APPLY_GUIDANCE,
    FINAL_STEP,
    TOO_LONG,
    Answer,
    FormatError,
    ParsedReply,
    ToolCall,
    format_error,
    parse_reply,
)
from genevolve_fast.net.harmless import harmless
from genevolve_fast.protocols import Codec, Engine, EngineError, Observation, Sampling, Tool, ToolError
from genevolve_fast.trajectory import (
    Failed,
    Incident,
    InvariantError,
    Message,
    Program,
    Request,
    Trajectory,
)


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
    sampling_mask: bool = False  # record the ids that top-p kept, where the engine tells them
    min_references: int = 1
    max_references: int = 2
    observe_images: Literal["tokens", "text"] = "text"
    tool_timeout_s: float = 60.0
    max_observation_images: int = 5


@dataclass(frozen=True)
class SessionResult:
    """The rollout, by hash the pixels (uint8 [h, w, 3]) of the images it saw or names, and all that tools showed."""

    trajectory: Trajectory
    images: Mapping[str, np.ndarray]
    shown: tuple[SeenImage, ...] = ()


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
    talk = TokenConversation(engine, codec, rollout_id)
    session = Session(request, talk, tools, settings, seed)
    engine.open(rollout_id)
    try:
        await session.run(system_prompt)
    finally:
        engine.close(rollout_id)
    trajectory = Trajectory(
        id=rollout_id,
        request_id=request.id,
        group_id=group_id,
        request_stop=talk.request_stop,
        turns=tuple(talk.turns),
        images=tuple(talk.records),
        messages=tuple(session.messages),
        program=session.program,
        termination=session.termination,
        error=session.error,
        outcome=session.failure,
        incidents=tuple(session.incidents),
        rounds=session.model_calls,
        seed=seed,
        policy_step=policy_step,
        **talk.arrays(),
    )
    named = session.image_ids.pixels(session.program.reference_images) if session.program else {}
    return SessionResult(trajectory, talk.images_by_hash | named, session.image_ids.shown())


class Session:
    """The protocol of one rollout over any conversation. `run` never raises for what policy, tools or engine do."""

    def __init__(
        self,
        request: Request,
        conversation: Conversation,
        tools: Mapping[str, Tool],
        settings: SessionSettings,
        seed: int = 0,
    ) -> None:
        self.request = request
        self.conversation = conversation
        self.tools = tools
        self.settings = settings
        self.seed = seed
        self.image_ids = ImageIds()
        self.messages: list[Message] = []
        self.incidents: list[Incident] = []
        self.model_calls = 0
        self.tool_calls = 0
        self.final_turn = False
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
        question = self._harmless(self.request.question)
        self.conversation.begin(system_prompt, question)
        self.messages += [Message("system", system_prompt), Message("user", question)]
        asked, limit = self.conversation.prompt_tokens, self.settings.max_prompt_tokens
        if asked > limit:
            self.termination, self.error = "error", f"prompt of {asked} tokens exceeds max_prompt_tokens {limit}"
            self.failure = Failed("engine", self.error)
        return not self.termination

    # --- the policy's turn --------------------------------------------------------------------------------------------

    def _budget(self) -> int:
        """Response tokens left, observations included."""
        return self.settings.max_response_tokens - self.conversation.response_tokens

    def _is_last(self) -> bool:
        return self.final_turn or self.model_calls >= self.settings.max_model_calls

    async def _model_call(self) -> ParsedReply | None:
        budget = min(self.settings.max_tokens_per_turn, self._budget())
        if budget < 1:
            self.termination, self.error = "max_response_length", "the response budget is used up"
            return None
        s = self.settings
        sampling = Sampling(s.temperature, s.top_p, budget, sampling_mask=s.sampling_mask)
        try:
            said = await self.conversation.ask(sampling, self.seed * 1000 + self.model_calls)
        except EngineError as error:
            self.termination, self.error = "error", f"llm_call_failed: {error}"
            self.failure = Failed("engine", str(error))
            return None
        self.model_calls += 1
        reply = parse_reply(said.text)
        if not said.ended and not isinstance(reply, Answer):
            reply = FormatError("")  # cut off: answered with TOO_LONG
        self.conversation.keep(said, _name(reply))
        self.messages.append(Message("assistant", said.text))
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
            text = format_error(self._harmless(reply.reason)) if reply.reason else TOO_LONG
        if self.model_calls + 1 >= self.settings.max_model_calls or self._budget() < 2 * self._reserve():
            text += f"\n{FINAL_STEP}"
            self.final_turn = True
        self._observe(text, images, tool)

    def _reserve(self) -> int:
        """Tokens kept for the answer when the response budget runs out."""
        return min(self.settings.max_tokens_per_turn, self.settings.max_response_tokens // 8)

    def _observe(self, text: str, images: list[SeenImage], tool: str | None) -> None:
        body = f"<tool_response>\n{text}\n</tool_response>"
        self.conversation.observe(body, images, tool)
        self.messages.append(Message("user", body.replace(IMAGE_MARK, "<image>")))

    def _harmless(self, text: str) -> str:
        return harmless(text, self.conversation.markers)

    async def _call_tool(self, call: ToolCall) -> tuple[str, list[SeenImage]]:
        """The answer, harmless as a whole: a marker could also arise where words of ours meet words from outside."""
        observation = await self._observation(call)
        if isinstance(observation, str):
            return self._harmless(observation), []
        if call.name == "image_search":
            return self._image_block(call, observation)
        text = self._harmless(observation.text)
        return (f"{text}\n{APPLY_GUIDANCE}" if call.name == "query_knowledge" else text), []

    async def _observation(self, call: ToolCall) -> Observation | str:
        """What the tool answers, or why it did not."""
        if self.tool_calls >= self.settings.max_tool_calls:
            return f"[tool error] {call.name}: the limit of {self.settings.max_tool_calls} tool calls is reached"
        self.tool_calls += 1
        tool = self.tools.get(call.name)
        if tool is None:
            self._failed("tool", "bad_arguments")
            return f"[tool error] {call.name[:60]}: unknown tool, there are {', '.join(self.tools)}"
        try:
            return await asyncio.wait_for(tool(call.arguments), self.settings.tool_timeout_s)
        except asyncio.TimeoutError:
            self._failed(call.name, "timeout")
            return f"[tool error] {call.name}: no answer within {self.settings.tool_timeout_s:g} s"
        except ToolError as error:
            self._failed(call.name, error.kind)
            return f"[tool error] {call.name}: {error}"
        except Exception as error:  # a tool's bug must not end the other rollouts
            self._failed(call.name, "other")
            return f"[tool error] {call.name}: {type(error).__name__}: {error}"

    def _failed(self, source: str, kind: str) -> None:
        self.incidents.append(Incident(source, kind, self.model_calls))

    def _image_block(self, call: ToolCall, observation: Observation) -> tuple[str, list[SeenImage]]:
        """The released runtime's block; images as tokens where they have pixels and `observe_images` asks for it."""
        lines, shown = [f"--- image search result for [{_line(str(call.arguments.get('query', '')))}] ---"], []
        for found in observation.images[: self.settings.max_observation_images]:
            seen = self.image_ids.register(found)
            lines.append(f"{seen.img_id}: title: {_line(found.title)}")
            if self.settings.observe_images == "tokens" and found.pixels is not None:
                lines.append(IMAGE_MARK)
                shown.append(seen)
            else:
                pairs = (("url", found.url), ("local_path", found.local_path), ("page_url", found.page_url))
                lines += [f"  {name}: {_line(value)}" for name, value in pairs if value]
        lines.append("--- end of image search result ---")
        return "\n".join(line if line == IMAGE_MARK else self._harmless(line) for line in lines), shown

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


def _line(text: str) -> str:
    """On one line, so that a title cannot look like a result of its own."""
    return " ".join(text.split())


def _name(reply: ParsedReply) -> str | None:
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
