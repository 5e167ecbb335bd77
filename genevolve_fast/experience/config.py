"""Who compares rollouts and who embeds requests, as sections of the configuration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from genevolve_fast.experience.embedder import HashedNgramEmbedder
from genevolve_fast.experience.summarizer import ChatSummarizer
from genevolve_fast.incidents import Incidents
from genevolve_fast.net.asking import Lane
from genevolve_fast.net.chat_config import ChatConfig, open_cache, open_chat, read_key
from genevolve_fast.protocols import Embedder, Summarizer


class SummarizerConfig(ChatConfig):
    """Who names the decisions that made the best rollout of a group better than the worst."""

    @model_validator(mode="after")
    def _refuse(self) -> SummarizerConfig:
        self.refuse()
        return self


class EmbedderConfig(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["hashed", "qwen"] = Field("hashed", description="Hashed character n-grams, or Qwen3-Embedding")
    model: str = Field("Qwen/Qwen3-Embedding-0.6B", description="Folder or hub name")
    device: str = Field("auto", description="cpu, cuda, cuda:1, …; auto: the GPU where there is one")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Of the weights; auto: bfloat16 on a GPU, float32 elsewhere"
    )
    batch_size: int = Field(16, ge=1, description="Texts embedded together")
    max_tokens: int = Field(2048, ge=8, description="Tokens of one text that are read")

    @model_validator(mode="after")
    def _refuse(self) -> EmbedderConfig:
        told = {n for n, field in type(self).model_fields.items() if getattr(self, n) != field.default} - {"kind"}
        if self.kind == "hashed" and told:
            raise ValueError(f"{', '.join(sorted(told))} with kind hashed would do nothing: no model is loaded")
        return self


def open_summarizer(config: SummarizerConfig, incidents: Incidents, markers: Sequence[str] = ()) -> Summarizer:
    """`markers` are those of the policy's codec. Raises ValueError naming what is missing."""
    if config.kind == "rules":
        raise ValueError("summarizer.kind rules: the sandbox brings its own comparer, there is nothing to open")
    chat = open_chat(
        config,
        "summarizer",
        incidents,
        model=config.model,
        base_url=config.base_url,
        api_key=read_key(config, "summarizer.api_key_env", config.api_key_env),
        lane=Lane(config.concurrency, config.requests_per_minute),
        cache=open_cache(config, "summarizer", incidents),
    )
    return ChatSummarizer(chat, incidents, markers)


def open_embedder(config: EmbedderConfig) -> Embedder:
    """Raises ValueError where the model cannot be loaded."""
    if config.kind == "hashed":
        return HashedNgramEmbedder()
    from genevolve_fast.experience.qwen_embedder import QwenEmbedder

    return QwenEmbedder(
        config.model,
        device=config.device,
        dtype=config.dtype,
        batch_size=config.batch_size,
        max_tokens=config.max_tokens,
    )
