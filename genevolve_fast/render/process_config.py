"""Who writes a growing picture's stages, and how long it may grow: the budgets of `renderer.process`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from genevolve_fast.net.chat import checked_base_url

_CHAT = ("model", "base_url", "api_key_env", "request_timeout_s", "engine_attempts", "patience_s")
_IDENTITY = ("writer", "model", "policy", "max_cycles", "max_renders", "max_tokens", "max_tokens_per_stage") + (
    "attempts", "temperature", "top_p",
)  # fmt: skip


class ProcessBudgets(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)  # addresses may hold keys

    writer: Literal["sandbox", "chat", "policy"] = Field(
        "sandbox",
        description="Who plans and inspects: the canvas's script (a demonstration), a chat server, a policy here",
    )
    policy: str | None = Field(None, description="Folder of the policy, or sandbox:start; writer policy")
    model: str | None = Field(None, description="Name the server gave the model; writer chat")
    base_url: str | None = Field(None, description="Address of the chat server, mostly ending in /v1; writer chat")
    api_key_env: str | None = Field(None, description="Environment variable that holds the server's key, if it has one")
    request_timeout_s: float = Field(300.0, gt=0, description="Seconds of one call to the chat server")
    engine_attempts: int = Field(3, ge=1, description="Times a failing call to the chat server is made")
    patience_s: float = Field(120.0, ge=0, description="Seconds that the chat server may be away")
    prompts: Literal["scene", "edit"] | None = Field(
        None,
        description="scene: every draft is drawn from the whole description; edit: the last draft is edited by the "
        "instruction. None: scene for canvas and text-to-image, else edit",
    )
    max_cycles: int = Field(5, ge=1, le=5, description="Cycles of plan, sketch, inspect and refine")
    max_renders: int | None = Field(None, ge=1, description="Drafts asked for, failed ones included; none: 2 a cycle")
    max_tokens: int = Field(8192, ge=16, description="Tokens after the request, drafts and questions included")
    max_tokens_per_stage: int = Field(512, ge=8, description="Tokens of one stage's text")
    attempts: int = Field(3, ge=1, description="Times a stage is asked for until its text can be read")
    temperature: float = Field(0.7, ge=0, description="Sampling temperature of the stages")
    top_p: float = Field(0.95, gt=0, le=1, description="Nucleus of the stages")
    folder: Path | None = Field(
        None, description="Where every process is kept and continued, a folder each; a command that writes has its own"
    )

    @model_validator(mode="after")
    def _refuse(self) -> ProcessBudgets:
        told = {n for n, field in type(self).model_fields.items() if getattr(self, n) != field.default}
        useless = (told & set(_CHAT) if self.writer != "chat" else set()) | (
            told & {"policy"} if self.writer != "policy" else set()
        )
        if self.writer == "sandbox":
            useless |= told & {"temperature", "top_p", "attempts", "max_tokens_per_stage"}
        if useless:
            raise ValueError(f"{', '.join(sorted(useless))} with writer {self.writer} would do nothing")
        if self.writer == "chat" and not (self.model and self.base_url):
            raise ValueError("writer chat needs model and base_url: who writes, and where it is served")
        if self.writer == "policy" and not self.policy:
            raise ValueError("writer policy needs policy, its folder")
        if self.base_url:
            checked_base_url(self.base_url)
        if self.max_renders is not None and self.max_renders >= 2 * self.max_cycles:
            raise ValueError(
                f"max_renders {self.max_renders} would do nothing: {self.max_cycles} cycles draw {2 * self.max_cycles} "
                "drafts at most"
            )
        if self.max_tokens_per_stage > self.max_tokens:
            raise ValueError("max_tokens_per_stage above max_tokens would do nothing: the process ends first")
        return self

    @property
    def renders(self) -> int:
        """Drafts at most."""
        return self.max_renders or 2 * self.max_cycles

    def own_identity(self) -> dict[str, Any]:
        """What of these fields changes what is written; JSON-able."""
        return {n: v for n in _IDENTITY if (v := getattr(self, n)) is not None}
