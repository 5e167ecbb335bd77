"""Services that speak the released `POST /generate`: program in, picture out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from genevolve_fast.incidents import Incidents
from genevolve_fast.net.pictures import data_url
from genevolve_fast.protocols import RenderError
from genevolve_fast.render.endpoints import (
    CallError,
    CallLimits,
    Endpoint,
    Endpoints,
    off_loop,
    parsed,
    picture_of,
    post,
    without,
)
from genevolve_fast.trajectory import Program


@dataclass(frozen=True)
class ServiceSettings:
    """What is asked for with every program: the released client's values; None leaves it to the service."""

    num_inference_steps: int | None = 40
    true_cfg_scale: float | None = 4.0
    guidance_scale: float | None = 1.0
    negative_prompt: str | None = " "
    long_side: int = 1024  # pixels of the picture's longer side; its shape is the first reference's
    size_multiple: int = 16
    reference_side: int = 2048  # larger references are scaled down before they are sent


@dataclass(frozen=True)
class ServiceRenderer:
    """One or several addresses of a rendering service (protocols.Renderer).

    `urls` are addresses without the path `/generate`. `api_key` goes as a Bearer token.
    """

    urls: Sequence[str]
    settings: ServiceSettings = field(default_factory=ServiceSettings)
    limits: CallLimits = field(default_factory=CallLimits)
    api_key: str = field(default="", repr=False)
    incidents: Incidents = field(default_factory=Incidents)
    name: str = "qwen-service"
    min_references: int = 1
    max_references: int = 4

    def __post_init__(self) -> None:
        addresses = [f"{url.rstrip('/')}/generate" for url in self.urls]
        object.__setattr__(self, "_endpoints", Endpoints(addresses, self.limits, self.incidents))

    async def render(self, program: Program, references: Sequence[np.ndarray], seed: int) -> np.ndarray:
        """uint8 [height, width, 3]. Raises RenderError."""
        check_references(self, program, references)
        body = await off_loop(self._body, program.gen_prompt, references, seed)
        return await self._endpoints.call(lambda endpoint, seconds: self._ask(endpoint, seconds, body))

    def _body(self, prompt: str, references: Sequence[np.ndarray], seed: int) -> bytes:
        s = self.settings
        width, height = output_size(references, s.long_side, s.size_multiple)
        payload: Mapping[str, Any] = {
            "image_urls": [data_url(pixels, s.reference_side) for pixels in references],
            "prompt": prompt,
            "seed": seed,
            "true_cfg_scale": s.true_cfg_scale,
            "negative_prompt": s.negative_prompt,
            "num_inference_steps": s.num_inference_steps,
            "guidance_scale": s.guidance_scale,
            "num_images_per_prompt": 1,
            "width": width,
            "height": height,
        }
        return json.dumps({name: value for name, value in payload.items() if value is not None}).encode()

    async def _ask(self, endpoint: Endpoint, seconds: float, body: bytes) -> np.ndarray:
        secrets = [self.api_key] if self.api_key else []
        headers = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        answer = await post(endpoint, body, headers, seconds, secrets)
        return await off_loop(self._read, answer.body, endpoint.where, [*secrets, *endpoint.secrets])

    def _read(self, body: bytes, where: str, secrets: Sequence[str]) -> np.ndarray:
        said = parsed(body, where)
        if said.get("success") is not True:
            reason = without(secrets, str(said.get("message") or said.get("error") or "it does not say why"))
            raise CallError(f"{where} could not draw it: {reason}", "server_error", "service")
        return picture_of(said.get("image") or said.get("image_base64"), where, self.limits.max_pixels)


def check_references(renderer, program: Program, references: Sequence[np.ndarray]) -> None:
    """Raises RenderError where `renderer` cannot draw from so many, or they are not the program's."""
    if len(references) != len(program.reference_images):
        raise RenderError(f"{len(program.reference_images)} references in the program, {len(references)} given")
    if not renderer.min_references <= len(references) <= renderer.max_references:
        raise RenderError(refusal(renderer, len(references)), "bad_arguments")


def refusal(renderer, count: int) -> str:
    """Why `renderer` does not draw from `count` references."""
    if count < renderer.min_references:
        return (
            f"{renderer.name} edits pictures and needs at least {renderer.min_references} reference image; "
            "configure text_to_image for programs without one"
        )
    if not renderer.max_references:
        return f"{renderer.name} draws from text alone, the program has {count} reference images"
    return f"{count} reference images, {renderer.name} takes at most {renderer.max_references}"


def output_size(references: Sequence[np.ndarray], long_side: int, multiple: int) -> tuple[int, int]:
    """(width, height) in the shape of the first reference, square without one; as the released client rounds."""
    if not len(references):
        return long_side, long_side
    height, width = references[0].shape[:2]
    scale = long_side / max(width, height)
    return tuple(max(multiple, round(side * scale / multiple) * multiple) for side in (width, height))
