"""Nano Banana Pro: the Gemini API's image models, with and without references."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from genevolve_fast.incidents import Incidents
from genevolve_fast.net.pictures import encoded
from genevolve_fast.net.web import FetchError
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
from genevolve_fast.render.service_client import check_references
from genevolve_fast.trajectory import Program

GEMINI_BASE_URL = "https://generativelanguage.googleapis.com/v1beta"
GEMINI_IMAGE_MODEL = "gemini-3-pro-image-preview"
# https://ai.google.dev/api/generate-content#FinishReason
_BLOCKED = re.compile("SAFETY|RECITATION|BLOCKLIST|PROHIBITED_CONTENT|SPII")


@dataclass(frozen=True)
class NanoBanana:
    """An image model behind `models/{model}:generateContent` (protocols.Renderer).

    `aspect_ratio` ("16:9") and `image_size` ("2K") are the API's own choice where None. The key goes as x-goog-api-key.
    """

    api_key: str = field(repr=False)
    model: str = GEMINI_IMAGE_MODEL
    base_url: str = GEMINI_BASE_URL
    aspect_ratio: str | None = None
    image_size: str | None = None
    reference_side: int = 2048
    limits: CallLimits = field(default_factory=lambda: CallLimits(request_timeout_s=600.0, concurrency=8))
    incidents: Incidents = field(default_factory=Incidents)
    name: str = "nano-banana"
    min_references: int = 0
    max_references: int = 14

    def __post_init__(self) -> None:
        address = f"{self.base_url.rstrip('/')}/models/{self.model}:generateContent"
        object.__setattr__(self, "_endpoints", Endpoints([address], self.limits, self.incidents))

    async def render(self, program: Program, references: Sequence[np.ndarray], seed: int) -> np.ndarray:
        """uint8 [height, width, 3]. Raises RenderError; `blocked` where a safety rule forbids the picture."""
        check_references(self, program, references)
        body = await off_loop(self._body, program.gen_prompt, references, seed)
        return await self._endpoints.call(lambda endpoint, seconds: self._ask(endpoint, seconds, body))

    def _body(self, prompt: str, references: Sequence[np.ndarray], seed: int) -> bytes:
        parts: list[dict[str, Any]] = [{"text": prompt}]
        for kind, data in (encoded(pixels, self.reference_side) for pixels in references):
            parts.append({"inline_data": {"mime_type": kind, "data": base64.b64encode(data).decode()}})
        generation: dict[str, Any] = {"seed": seed & 0x7FFFFFFF}  # the API's is an int32
        shape = {"aspectRatio": self.aspect_ratio, "imageSize": self.image_size}
        if shape := {name: value for name, value in shape.items() if value}:
            generation["imageConfig"] = shape
        return json.dumps({"contents": [{"role": "user", "parts": parts}], "generationConfig": generation}).encode()

    async def _ask(self, endpoint: Endpoint, seconds: float, body: bytes) -> np.ndarray:
        answer = await post(endpoint, body, {"x-goog-api-key": self.api_key}, seconds, [self.api_key])
        return await off_loop(self._read, answer.body, endpoint.where, [self.api_key, *endpoint.secrets])

    def _read(self, body: bytes, where: str, secrets: Sequence[str]) -> np.ndarray:
        said = parsed(body, where)
        candidates = [c for c in _list(said.get("candidates")) if isinstance(c, dict)]
        parts = [part for c in candidates for part in _list(_dict(c.get("content")).get("parts"))]
        parts = [p for p in parts if isinstance(p, dict) and p.get("thought") is not True]
        for part in parts:
            inline = _dict(part.get("inlineData") or part.get("inline_data"))
            if inline.get("data"):
                return picture_of(inline["data"], where, self.limits.max_pixels)
        raise _no_picture(said, candidates, parts, where, secrets)


def _no_picture(
    said: dict, candidates: list[dict], parts: list[dict], where: str, secrets: Sequence[str]
) -> FetchError:
    if isinstance(said.get("error"), dict):  # gateways send it with status 200
        reason = without(secrets, str(said["error"].get("message", "")))
        return CallError(f"{where} could not draw it: {reason}", "server_error", "service")
    feedback = _dict(said.get("promptFeedback"))
    reasons = [feedback.get("blockReason"), *(c.get("finishReason") for c in candidates)]
    text = without(secrets, " ".join(p["text"] for p in parts if isinstance(p.get("text"), str)), 200)
    for reason in reasons:
        if isinstance(reason, str) and (reason == feedback.get("blockReason") or _BLOCKED.search(reason)):
            told = text or without(secrets, str(feedback.get("blockReasonMessage") or ""), 200)
            message = f"{where} refuses to draw it ({without(secrets, reason, 60)}){f': {told}' if told else ''}"
            return CallError(message, "blocked", "request")
    return CallError(f"{where} answered without a picture: {text or 'nothing'}", "bad_response", "service")


def _list(value: object) -> list:
    return value if isinstance(value, list) else []


def _dict(value: object) -> dict:
    return value if isinstance(value, dict) else {}
