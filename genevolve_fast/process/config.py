"""The chat model that builds process data, as fields of a configuration."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from genevolve_fast.net.chat_config import ChatConfig


class ProcessChatConfig(ChatConfig):
    """The model that reads requests, writes the texts of the stages and looks at drafts."""

    kind: Literal["chat"] = Field("chat", description="A model behind a chat server")

    @model_validator(mode="after")
    def _refuse(self) -> ProcessChatConfig:
        self.refuse()
        return self
