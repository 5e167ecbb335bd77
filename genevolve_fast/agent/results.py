"""Rollouts in the released formats: rows of results.json, and {messages, images} conversations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from genevolve_fast.agent.images import SeenImage
from genevolve_fast.files import replacing, write_text
from genevolve_fast.protocols import Observation, Tool
from genevolve_fast.trajectory import Message, Program, Reference, Request, Trajectory, image_hash, json_text

REFERENCE_FIELDS = ("img_id", "note", "local_path", "url", "title", "page_url")


@dataclass(frozen=True)
class AgentResult:
    """What one rollout leaves, in the released runtime's fields.

    `reference_images` are dicts of img_id, note, local_path, url, title, page_url (all str); `messages` are
    {role, content} dicts; `termination` is one of answer, no_answer, max_response_length, error (the released runtime
    also writes max_rounds_reached, for a tool call in the last round); `error` says what went wrong, or is None.
    """

    prompt: str
    gen_prompt: str
    reference_images: list[dict[str, str]]
    messages: list[dict[str, str]]
    termination: str
    rounds: int
    error: str | None = None

    @classmethod
    def of(
        cls,
        prompt: str,
        program: Program | None,
        messages: Sequence[Message],
        termination: str,
        rounds: int,
        error: str | None,
    ) -> AgentResult:
        references = program.reference_images if program else ()
        return cls(
            prompt,
            program.gen_prompt if program else "",
            [{name: getattr(r, name) for name in REFERENCE_FIELDS} for r in references],
            [{"role": m.role, "content": m.content} for m in messages],
            termination,
            rounds,
            error,
        )

    @classmethod
    def failed(cls, prompt: str, error: str) -> AgentResult:
        """A rollout that never began."""
        return cls(prompt, "", [], [], "error", 0, error)

    def to_dict(self) -> dict[str, Any]:
        """The released order: prompt, gen_prompt, reference_images, messages, termination, rounds, error."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    def to_row(self, sample: Mapping[str, Any]) -> dict[str, Any]:
        """A row of results.json: the result, then every field of `sample` that the result does not have, in order."""
        result = self.to_dict()
        return result | {name: value for name, value in sample.items() if name not in result}


def to_row(request: Request, trajectory: Trajectory) -> dict[str, Any]:
    """One row of the released runtime's results.json; every field of the request is kept."""
    t = trajectory
    result = AgentResult.of(request.question, t.program, t.messages, t.termination, t.rounds, t.error)
    return result.to_row(request.to_row())


class Filed:
    """An image_search (protocols.Tool) whose pictures that have no file yet are kept in `folder` by pixel hash."""

    def __init__(self, tool: Tool, folder: Path) -> None:
        self.name, self.description, self.parameters = tool.name, tool.description, tool.parameters
        self._tool, self._folder = tool, folder

    async def __call__(self, arguments: Mapping[str, Any]) -> Observation:
        observation = await self._tool(arguments)
        for found in observation.images:
            if found.pixels is not None and not found.local_path:
                _file_picture(found.pixels, self._folder)
        return observation


def _file_picture(pixels: np.ndarray, folder: Path) -> None:
    from PIL import Image

    target = folder / f"{image_hash(pixels)}.png"
    if not target.exists():
        with replacing(target) as partial:
            Image.fromarray(pixels).save(partial, format="PNG")


def with_files(program: Program | None, folder: Path) -> Program | None:
    """The program with the files that `Filed` kept as `local_path` of references that name none."""
    if program is None:
        return None

    def filed(r: Reference) -> Reference:
        target = (folder / f"{r.sha256}.png").resolve()
        return replace(r, local_path=str(target)) if r.sha256 and not r.local_path and target.exists() else r

    return replace(program, reference_images=tuple(map(filed, program.reference_images)))


def picture_row(seen: SeenImage, folder: Path) -> dict[str, str]:
    """What a found picture is: img_id, title, url, page_url, and the file that the tool or `Filed` kept, or ""."""
    f = seen.found
    filed = (folder / f"{seen.sha256}.png").resolve()
    path = f.local_path or (str(filed) if seen.sha256 and filed.exists() else "")
    return {"img_id": seen.img_id, "title": f.title, "local_path": path, "url": f.url, "page_url": f.page_url}


def to_sft(trajectory: Trajectory, image_paths: Sequence[str]) -> dict[str, Any]:
    """A conversation in the released SFT format; `image_paths` in the order of its `<image>` placeholders."""
    messages = [{"role": m.role, "content": m.content} for m in trajectory.messages]
    placeholders = sum(m["content"].count("<image>") for m in messages)
    if placeholders != len(image_paths):
        raise ValueError(f"{trajectory.id}: {placeholders} image placeholders but {len(image_paths)} paths")
    return {"messages": messages, "images": list(image_paths)}


def write_results(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write results.json atomically, as the released scripts read it."""
    write_text(path, json_text(list(rows), indent=2))
