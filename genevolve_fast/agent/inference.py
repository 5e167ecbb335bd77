"""The agent in three lines: a model behind a chat server, live tools, one prompt."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from genevolve_fast.agent.chat import ChatConversation
from genevolve_fast.agent.prompts import system_prompt as default_prompt
from genevolve_fast.agent.results import AgentResult, with_files
from genevolve_fast.agent.session import Session, SessionSettings
from genevolve_fast.incidents import Incidents
from genevolve_fast.net.chat import DEFAULT_BASE_URL, NO_KEY, ChatEndpoint, checked_base_url, checked_key
from genevolve_fast.protocols import Tool
from genevolve_fast.trajectory import Request


class Agent:
    """GenEvolve inference over an OpenAI-compatible chat server (vLLM, `transformers serve`, a hosted API).

    `api_key` None: the environment's OPENAI_API_KEY, else "EMPTY"; `base_url` None: OPENAI_BASE_URL, else
    http://localhost:8000/v1. `tools` None: Serper's search and image search (SERPER_API_KEY) and the eight skills.
    Limits and sampling are the released runtime's: `max_rounds` model calls of at most `max_tokens_per_round` tokens;
    `max_prompt_length` and `max_response_length` tokens before and after the request. `observe_images="tokens"` shows
    retrieved pictures to the model as image_url parts, "text" their titles and addresses. `request_timeout` and
    `tool_timeout` are seconds; for `patience` seconds a server that restarts is waited for. `seed` goes with each call
    where given. `incidents` counts every failed attempt of engine and tools.

    Connections belong to an event loop: `run` opens and closes its own, `arun` keeps them until `aclose` or the end of
    `async with`.
    """

    def __init__(
        self,
        model: str = "GenEvolve",
        base_url: str | None = DEFAULT_BASE_URL,
        api_key: str | None = None,
        tools: Mapping[str, Tool] | None = None,
        *,
        max_rounds: int = 11,
        max_tokens_per_round: int = 4096,
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_prompt_length: int = 6144,
        max_response_length: int = 30_000,
        n_max_reference_images: int = 2,
        system_prompt: str | None = None,
        request_timeout: float = 600.0,
        tool_timeout: float = 60.0,
        observe_images: Literal["text", "tokens"] = "text",
        attempts: int = 3,
        patience: float = 0.0,
        seed: int | None = None,
        incidents: Incidents | None = None,
    ) -> None:
        self.settings = session_settings(
            max_rounds=max_rounds,
            max_tokens_per_round=max_tokens_per_round,
            temperature=temperature,
            top_p=top_p,
            max_prompt_length=max_prompt_length,
            max_response_length=max_response_length,
            n_max_reference_images=n_max_reference_images,
            observe_images=observe_images,
            tool_timeout=tool_timeout,
        )
        self.model = model
        self.base_url = checked_base_url(base_url or os.environ.get("OPENAI_BASE_URL") or DEFAULT_BASE_URL)
        self.incidents = incidents or Incidents()
        self.seed = seed
        self._tools = tools if tools is not None else default_tools(self.incidents)
        self._system_prompt = system_prompt
        self._api_key = checked_key(api_key or os.environ.get("OPENAI_API_KEY") or NO_KEY)
        self._limits = {"request_timeout": request_timeout, "attempts": attempts, "patience_s": patience}
        self._endpoints: dict[asyncio.AbstractEventLoop, ChatEndpoint] = {}

    @property
    def system_prompt(self) -> str:
        return self._system_prompt or default_prompt(self._tools)

    def run(self, prompt: str) -> AgentResult:
        """Answer one prompt. Never raises for what model, server or tools do; see `termination` and `error`."""
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return asyncio.run(self._run_and_close(prompt))
        raise RuntimeError("Agent.run cannot wait inside a running event loop; use `await agent.arun(prompt)`")

    async def arun(self, prompt: str) -> AgentResult:
        """`run` for async code; prompts may run concurrently."""
        session, _ = await self.rollout(prompt, self.seed)
        return result_of(prompt, session)

    async def rollout(self, prompt: str, seed: int | None) -> tuple[Session, ChatConversation]:
        """The finished session of one prompt and its conversation."""
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError("the prompt is empty: say what the picture shall show")
        talk = ChatConversation(self._connect(), seeded=seed is not None)
        session = Session(Request("", prompt), talk, self._tools, self.settings, seed or 0)
        await session.run(self.system_prompt)
        return session, talk

    async def aclose(self) -> None:
        """Close the connections of this event loop."""
        endpoint = self._endpoints.pop(asyncio.get_running_loop(), None)
        if endpoint is not None:
            await endpoint.close()

    async def __aenter__(self) -> Agent:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def _run_and_close(self, prompt: str) -> AgentResult:
        try:
            return await self.arun(prompt)
        finally:
            await self.aclose()

    def _connect(self) -> ChatEndpoint:
        """The endpoint of the running event loop; one of a loop that is gone cannot be used again."""
        loop = asyncio.get_running_loop()
        if loop not in self._endpoints:
            for ended in [other for other in list(self._endpoints) if other.is_closed()]:
                self._endpoints.pop(ended, None)
            self._endpoints[loop] = ChatEndpoint(
                self.model, self.base_url, self._api_key, incidents=self.incidents, **self._limits
            )
        return self._endpoints[loop]


def session_settings(
    *,
    max_rounds: int,
    max_tokens_per_round: int,
    temperature: float,
    top_p: float,
    max_prompt_length: int,
    max_response_length: int,
    n_max_reference_images: int,
    observe_images: Literal["text", "tokens"],
    tool_timeout: float = 60.0,
) -> SessionSettings:
    """Limits under the released runtime's names. Raises ValueError naming the first that cannot be."""
    counts = {
        "max_rounds": max_rounds,
        "max_tokens_per_round": max_tokens_per_round,
        "max_prompt_length": max_prompt_length,
        "max_response_length": max_response_length,
        "n_max_reference_images": n_max_reference_images,
    }
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    if temperature < 0:
        raise ValueError(f"temperature must be at least 0, not {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], not {top_p}")
    if observe_images not in ("text", "tokens"):
        raise ValueError(f"observe_images is 'text' or 'tokens', not {observe_images!r}")
    return SessionSettings(
        max_tool_calls=max_rounds - 1,
        max_model_calls=max_rounds,
        max_tokens_per_turn=max_tokens_per_round,
        max_response_tokens=max_response_length,
        max_prompt_tokens=max_prompt_length,
        temperature=temperature,
        top_p=top_p,
        min_references=0,
        max_references=n_max_reference_images,
        observe_images=observe_images,
        tool_timeout_s=tool_timeout,
    )


def result_of(prompt: str, session: Session, pictures: Path | None = None) -> AgentResult:
    """What a finished session leaves; references without a file get theirs from `pictures`."""
    s = session
    program = with_files(s.program, pictures) if pictures else s.program
    return AgentResult.of(prompt, program, s.messages, s.termination, s.model_calls, s.error)


def default_tools(incidents: Incidents) -> dict[str, Tool]:
    """Serper's; pictures go to IMAGE_DOWNLOAD_DIR where that is set. Raises ValueError without SERPER_API_KEY."""
    from genevolve_fast.agent.tools import ToolsConfig, open_tools

    folder = os.environ.get("IMAGE_DOWNLOAD_DIR")
    return open_tools(ToolsConfig(kind="serper", **({"image_dir": folder} if folder else {})), incidents)
