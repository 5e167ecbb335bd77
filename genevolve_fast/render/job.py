"""One picture to draw, what a pipeline takes, and which pictures one call of it can draw together."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol

import numpy as np

from genevolve_fast.protocols import RenderError
from genevolve_fast.trajectory import image_hash

# seeds: one program under several seeds; prompts: several programs without references; anything: whatever waits
Together = Literal["nothing", "seeds", "prompts", "anything"]


@dataclass(frozen=True, eq=False)
class Job:
    """A picture to draw; None is the pipeline's own setting."""

    prompt: str
    references: tuple[np.ndarray, ...] = ()  # uint8 [height, width, 3]
    seed: int = 0
    width: int | None = None
    height: int | None = None
    num_inference_steps: int | None = None
    true_cfg_scale: float | None = None
    guidance_scale: float | None = None
    negative_prompt: str | None = None

    @property
    def nbytes(self) -> int:
        """Of the references."""
        return sum(r.nbytes for r in self.references)

    @property
    def numbers(self) -> tuple[Hashable, ...]:
        """What all pictures of one call share."""
        scales = self.num_inference_steps, self.true_cfg_scale, self.guidance_scale
        return self.width, self.height, *scales, self.negative_prompt

    @cached_property
    def program(self) -> tuple[str, ...]:
        """The prompt and the references by their pixels."""
        return self.prompt, *(image_hash(r) for r in self.references)


@dataclass(frozen=True)
class Offer:
    """What a pipeline draws."""

    model: str
    min_references: int
    max_references: int
    size_multiple: int = 1
    together: Together = "nothing"

    def refusal(self, job: Job) -> str:
        """Why this pipeline cannot draw `job`; empty where it can."""
        given, least, most = len(job.references), self.min_references, self.max_references
        name = self.model.rstrip("/").rpartition("/")[2]
        if given < least:
            return (
                f"{name} edits references and needs at least {least}, the program has {given}: "
                "draw it with a text-to-image model (kind text-to-image)"
            )
        if given > most == 0:
            return (
                f"{name} draws from text alone, the program has {given} references: "
                "draw it with a model that edits references (kind qwen-image-edit)"
            )
        if given > most:
            return f"{name} takes at most {most} references, the program has {given}"
        for which, side in (("width", job.width), ("height", job.height)):
            if side is not None and side % self.size_multiple:
                return f"{which} {side} is no multiple of {self.size_multiple}"
        return ""

    def key(self, job: Job) -> Hashable | None:
        """Jobs of equal keys can be drawn in one call; None: this one is drawn alone."""
        match self.together:
            case "anything":
                return ()
            case "seeds":
                return *job.numbers, *job.program
            case "prompts":
                return None if job.references else job.numbers
        return None


class Pipeline(Protocol):
    """Draws on one device; what a worker's factory makes."""

    @property
    def offer(self) -> Offer: ...

    def load(self) -> None:
        """Take the memory that drawing needs; may be called twice. Raises RenderError."""
        ...

    def draw(self, jobs: Sequence[Job]) -> list[np.ndarray]:
        """uint8 [height, width, 3] for each of `jobs`, whose keys are equal. Raises RenderError."""
        ...


class DeviceLostError(RenderError):
    """The device answers this process no more; a new process has to be started."""


def draw_each(pipeline: Pipeline, jobs: Sequence[Job]) -> list[np.ndarray | RenderError]:
    """Each job's picture or its failure: where a batch fails, its jobs are drawn alone. Raises DeviceLostError."""
    try:
        return list(pipeline.draw(jobs))
    except DeviceLostError:
        raise
    except RenderError as error:
        if len(jobs) == 1:
            return [error]
    return [outcome for job in jobs for outcome in draw_each(pipeline, [job])]
