"""Who judges, as a section of the configuration."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from pydantic import Field, model_validator

from genevolve_fast.incidents import Incidents
from genevolve_fast.net.asking import Lane
from genevolve_fast.net.chat import checked_base_url
from genevolve_fast.net.chat_config import ChatConfig, open_cache, open_chat, read_key
from genevolve_fast.protocols import ImageJudge, ProgramJudge
from genevolve_fast.reward.chat_judges import ChatImageJudge, ChatProgramJudge
from genevolve_fast.trajectory import Request


class JudgeConfig(ChatConfig):
    """`model` judges pictures, and programs unless another one is named for them."""

    program_model: str | None = Field(None, description="Model that judges programs; none: `model`")
    program_base_url: str | None = Field(None, description="Address of its server; none: `base_url`")
    program_api_key_env: str | None = Field(None, description="The variable of that server's key, if it has one")
    program_sees_truth: bool = Field(False, description="Show the ground-truth picture to the judge of programs")

    @model_validator(mode="after")
    def _refuse(self) -> JudgeConfig:
        self.refuse()
        if self.program_base_url and not self.program_model:
            raise ValueError("program_base_url needs program_model: which model of that server judges programs")
        if self.program_api_key_env and not self.program_base_url:
            raise ValueError("program_api_key_env without program_base_url would do nothing: the key is api_key_env's")
        if self.program_base_url:
            checked_base_url(self.program_base_url)
        return self


def open_judges(
    config: JudgeConfig, incidents: Incidents, truth: Callable[[Request], np.ndarray] | None = None
) -> tuple[ImageJudge, ProgramJudge]:
    """The judges of pictures and of programs. `truth` gives the ground truth that program_sees_truth shows.

    Raises ValueError naming what is missing.
    """
    if config.kind == "rules":
        raise ValueError("judge.kind rules: the sandbox brings its own judges, there is nothing to open")
    if config.program_sees_truth and truth is None:
        raise ValueError("judge.program_sees_truth: there is no ground truth to show here")
    cache = open_cache(config, "judge", incidents)
    lane = Lane(config.concurrency, config.requests_per_minute)
    key = read_key(config, "judge.api_key_env", config.api_key_env)
    of_images = {"model": config.model, "base_url": config.base_url, "api_key": key, "lane": lane, "cache": cache}
    of_programs = of_images | {"model": config.program_model or config.model}
    if config.program_base_url:
        key = read_key(config, "judge.program_api_key_env", config.program_api_key_env)
        of_programs |= {"base_url": config.program_base_url, "api_key": key}
        if config.program_base_url.rstrip("/") != config.base_url.rstrip("/"):
            of_programs["lane"] = Lane(config.concurrency, config.requests_per_minute)
    images = open_chat(config, "image_judge", incidents, **of_images)
    programs = open_chat(config, "program_judge", incidents, **of_programs)
    return ChatImageJudge(images), ChatProgramJudge(programs, truth if config.program_sees_truth else None)
