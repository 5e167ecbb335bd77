"""A model behind a chat server that is asked for JSON objects, as fields of a configuration."""

from __future__ import annotations

import os
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from genevolve_fast.incidents import Incidents
from genevolve_fast.net.asking import JsonChat, Lane
from genevolve_fast.net.cache import AnswerCache
from genevolve_fast.net.chat import NO_KEY, ChatEndpoint, checked_base_url, checked_key
from genevolve_fast.protocols import Sampling


class ChatConfig(BaseModel):
    """The fields that judges and summariser share; each section adds its `kind`."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)  # inputs may hold keys

    kind: Literal["rules", "chat"] = Field("rules", description="The sandbox's rules, or a model behind a chat server")
    model: str | None = Field(None, description="Name of the model that is asked")
    base_url: str | None = Field(None, description="Address of its OpenAI-compatible server, mostly ending in /v1")
    api_key_env: str | None = Field(None, description="Environment variable that holds the server's key, if it has one")
    requests_per_minute: float | None = Field(None, gt=0, description="Attempts a minute to one server; none: no limit")
    concurrency: int = Field(16, ge=1, description="Questions to one server under way at a time")
    timeout_s: float = Field(300.0, gt=0, description="Seconds of one attempt")
    attempts: int = Field(3, ge=1, description="Times a failing call is made")
    patience_s: float = Field(300.0, ge=0, description="Seconds a server may take to come back before a call fails")
    reasks: int = Field(2, ge=0, description="Times an unusable reply is complained about and asked for again")
    max_tokens: int = Field(8192, ge=64, description="Tokens of one reply, a reasoning model's thought included")
    temperature: float = Field(0.0, ge=0, description="Sampling temperature")
    json_schema: bool = Field(True, description="Tell the server the reply's schema; one that refuses it is not told")
    cache: Path | None = Field(None, description="Folder where usable answers are kept")
    cache_mode: Literal["off", "record", "replay"] = Field(
        "off", description="record: ask for what the cache does not know and keep it; replay: never ask anybody"
    )

    def refuse(self) -> None:
        """Raise ValueError for what cannot work or would do nothing."""
        told = {n for n, field in type(self).model_fields.items() if getattr(self, n) != field.default} - {"kind"}
        if self.kind == "rules" and told:
            raise ValueError(f"{', '.join(sorted(told))} with kind rules would do nothing: no model is asked")
        if self.kind == "chat" and not (self.model and self.base_url):
            raise ValueError("kind chat needs model and base_url: who answers, and where it is served")
        if self.base_url:
            checked_base_url(self.base_url)
        if (self.cache is None) != (self.cache_mode == "off"):
            raise ValueError("cache and cache_mode go together: give the folder, and record or replay")


def open_cache(config: ChatConfig, section: str, incidents: Incidents) -> AnswerCache | None:
    """Raises ValueError, beginning with the section's name."""
    if config.cache is None or config.cache_mode == "off":
        return None
    return AnswerCache(config.cache, config.cache_mode, incidents, name=f"{section}.cache")


def read_key(config: ChatConfig, field: str, variable: str | None) -> str:
    """The key in the environment; replaying asks nobody and needs none. Raises ValueError, without quoting it."""
    key = os.environ.get(variable, "").strip() if variable else NO_KEY
    if not key and config.cache_mode != "replay":
        raise ValueError(f"{field}: {variable} is not set")
    return checked_key(key or NO_KEY)


def open_chat(
    config: ChatConfig,
    source: str,
    incidents: Incidents,
    *,
    model: str,
    base_url: str,
    api_key: str,
    lane: Lane,
    cache: AnswerCache | None,
) -> JsonChat:
    """Questions to `model` with the limits of `config`, failures counted as "<source>/<kind>"."""

    def endpoint(limiter: AbstractAsyncContextManager | None) -> ChatEndpoint:
        return ChatEndpoint(
            model,
            base_url,
            api_key,
            request_timeout=config.timeout_s,
            attempts=config.attempts,
            patience_s=config.patience_s,
            incidents=incidents,
            source=source,
            limiter=limiter,
        )

    return JsonChat(
        model,
        endpoint,
        lane,
        incidents,
        source=source,
        sampling=Sampling(config.temperature, 1.0, config.max_tokens),
        reasks=config.reasks,
        json_schema=config.json_schema,
        cache=cache,
    )
