"""Which renderer a run has: typed configuration, and what is opened from it."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Literal

import httpx
from pydantic import BaseModel, ConfigDict, Field, model_validator

from genevolve_fast.incidents import Incidents
from genevolve_fast.net.cache import AnswerCache
from genevolve_fast.net.web import check_address
from genevolve_fast.protocols import Renderer
from genevolve_fast.render.cache import CachedRenderer
from genevolve_fast.render.endpoints import CallLimits
from genevolve_fast.render.nano_banana import GEMINI_BASE_URL, GEMINI_IMAGE_MODEL, NanoBanana
from genevolve_fast.render.process_config import ProcessBudgets
from genevolve_fast.render.routed import FixedSeed, RoutedRenderer
from genevolve_fast.render.service_client import ServiceRenderer, ServiceSettings

Kind = Literal["canvas", "qwen-image-edit", "text-to-image", "qwen-service", "nano-banana", "process"]
GEMINI_KEYS = ("GOOGLE_API_KEY", "GEMINI_API_KEY")
_MAX_REFERENCES = 4  # the released client's

_DRAWN = {"num_inference_steps", "true_cfg_scale", "guidance_scale", "negative_prompt", "long_side", "size_multiple"}
_CALLED = {
    *("api_key_env", "request_timeout_s", "picture_timeout_s", "patience_s", "attempts", "concurrency"),
    *("break_after", "probe_after_s", "max_answer_mb", "max_megapixels"),
}
_LOCAL = {"model", "device", "dtype", "offload", "max_references"} | _DRAWN
_SERVICE = {"urls", "model", "reference_side", "max_references"} | _DRAWN | _CALLED
_ANEW = ("canvas", "text-to-image")
_EVERY = {"kind", "seed", "cache", "cache_mode"}
_FIELDS = {  # kind -> the fields that do something
    "canvas": {"kind"},
    "qwen-image-edit": _EVERY | _LOCAL | {"text_to_image"},
    "text-to-image": _EVERY | _LOCAL - {"max_references"},
    "qwen-service": _EVERY | _SERVICE | {"text_to_image"},
    "nano-banana": _EVERY | _CALLED | {"base_url", "model", "aspect_ratio", "image_size", "reference_side"},
    "process": {"kind", "process", "seed"},
}
_PICTURE = _DRAWN | {"kind", "model", "dtype", "reference_side", "aspect_ratio", "image_size"}  # what changes a picture


class RendererConfig(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)  # addresses may hold keys

    kind: Kind = Field("canvas", description="Who draws: the sandbox's canvas, a pipeline here, a service, an API")
    model: str | None = Field(
        None, description="Folder or hub id of the weights, or the API's model; a service's, to tell its pictures apart"
    )
    device: str | None = Field(None, description="Where a pipeline runs, such as cuda:1; the GPU where there is one")
    dtype: Literal["bfloat16", "float16", "float32"] | None = Field(
        None, description="Of a pipeline's weights; bfloat16"
    )
    offload: Literal["none", "model", "sequential"] | None = Field(
        None, description="Of a pipeline: keep on the GPU only what computes; none"
    )
    num_inference_steps: int | None = Field(
        None, ge=1, description="Denoising steps; 40 for Qwen-Image-Edit, else the pipeline's or service's own"
    )
    true_cfg_scale: float | None = Field(None, ge=0, description="Classifier-free guidance; 4.0 for Qwen-Image-Edit")
    guidance_scale: float | None = Field(None, ge=0, description="Distilled guidance; 1.0 for Qwen-Image-Edit")
    negative_prompt: str | None = Field(None, description="What the picture shall not show; a blank")
    long_side: int = Field(1024, ge=16, le=8192, description="Pixels of a picture's longer side")
    size_multiple: int = Field(16, ge=1, le=256, description="Both sides are rounded to multiples of this")
    seed: int | None = Field(None, ge=0, description="Draw everything with this seed, whichever is asked for")
    urls: tuple[str, ...] = Field((), description="Addresses of services with POST /generate; the least busy is asked")
    base_url: str | None = Field(None, description="nano-banana: address of a gateway; none: the Gemini API's own")
    api_key_env: str | None = Field(
        None, description="Environment variable with the key; nano-banana: GOOGLE_API_KEY, else GEMINI_API_KEY"
    )
    aspect_ratio: str | None = Field(None, description="nano-banana: such as 16:9; its own choice")
    image_size: Literal["1K", "2K", "4K"] | None = Field(None, description="nano-banana: the size; its own choice")
    reference_side: int = Field(2048, ge=64, description="References are scaled down to this side before they are sent")
    max_references: int | None = Field(None, ge=1, le=16, description="References of a program at most; 4")
    request_timeout_s: float = Field(1800.0, gt=0, description="Seconds of one request")
    picture_timeout_s: float = Field(3600.0, gt=0, description="Seconds of one picture, all its requests together")
    patience_s: float = Field(120.0, ge=0, description="Seconds that a service may be away (restart, 5xx, busy)")
    attempts: int = Field(3, ge=1, description="Times a picture is asked for when its service fails")
    concurrency: int = Field(4, ge=1, description="Requests to one address at a time")
    break_after: int = Field(3, ge=1, description="Failures in a row after which an address is left alone")
    probe_after_s: float = Field(5.0, gt=0, description="Seconds until such an address is asked again, once")
    max_answer_mb: float = Field(64.0, gt=0, description="MiB of one answer at most")
    max_megapixels: float = Field(40.0, gt=0, description="Megapixels of one picture at most")
    cache: Path | None = Field(None, description="Folder of the picture cache; several processes may share it")
    cache_mode: Literal["off", "record", "replay"] = Field(
        "off", description="record: draw nothing twice; replay: draw nothing"
    )
    text_to_image: RendererConfig | None = Field(
        None, description="Who draws programs without references, which edit models refuse"
    )
    process: ProcessConfig | None = Field(
        None, description="kind process: who draws and who writes, and the budgets (render/process_config.py)"
    )

    @model_validator(mode="after")
    def _refuse(self) -> RendererConfig:
        told = {n for n, field in type(self).model_fields.items() if getattr(self, n) != field.default}
        if self.kind == "text-to-image" and self.urls:
            useful = (_EVERY | _SERVICE) - {"reference_side", "max_references"}
        else:
            useful = _FIELDS[self.kind]
        if useless := told - useful - {"kind"}:
            why = {
                "canvas": ": it has nothing to set",
                "text-to-image": " without urls",
                "process": " (process.renderer has the fields of who draws)",
            }.get(self.kind, "")
            raise ValueError(f"{', '.join(sorted(useless))} with kind {self.kind}{why} would do nothing")
        if self.kind == "qwen-service" and not self.urls:
            raise ValueError("kind qwen-service needs urls, the addresses of its services")
        if (self.cache is None) != (self.cache_mode == "off"):
            raise ValueError("cache and cache_mode go together: give the folder, and record or replay")
        self._refuse_addresses()
        if self.request_timeout_s > self.picture_timeout_s:
            raise ValueError("request_timeout_s above picture_timeout_s would do nothing: the picture ends first")
        if self.aspect_ratio and not re.fullmatch(r"[1-9]\d?:[1-9]\d?", self.aspect_ratio):
            raise ValueError("aspect_ratio is two numbers such as 16:9")
        if self.text_to_image is not None:
            self._refuse_second(self.text_to_image)
        if self.process is not None and self.process.renderer.seed is not None:
            raise ValueError("process.renderer.seed: the process around it has the seed")
        return self

    def _refuse_addresses(self) -> None:
        for name, address in (*(("urls", url) for url in self.urls), ("base_url", self.base_url or GEMINI_BASE_URL)):
            check_address(name, address)
            url = httpx.URL(address)
            if url.query or url.fragment:
                raise ValueError(f"{name}: what follows ? or # has no effect, the path of the call is appended")
            if name == "urls" and url.path.rstrip("/").endswith("/generate"):
                raise ValueError("urls are given without /generate, which is appended")
            if url.userinfo and self.api_key_env:
                raise ValueError(f"{name} with user:password and api_key_env: only one of them can be sent")
        if len(set(self.urls)) != len(self.urls):
            raise ValueError("urls names an address twice: concurrency says how many requests it takes")

    def _refuse_second(self, second: RendererConfig) -> None:
        if second.kind not in ("text-to-image", "nano-banana"):
            raise ValueError(f"text_to_image.kind {second.kind} does not draw without references")
        if second.cache is not None or second.seed is not None:
            raise ValueError("text_to_image has the cache and the seed of the renderer around it")

    def identity(self) -> dict[str, Any]:
        """What of this configuration changes the pictures; JSON-able."""
        useful = _FIELDS[self.kind] | (_SERVICE if self.urls else set())
        mine = {n: v for n in sorted(_PICTURE & useful) if (v := getattr(self, n)) is not None}
        if self.kind == "nano-banana":
            mine["model"] = self.model or GEMINI_IMAGE_MODEL
        if self.text_to_image is not None:
            mine["text_to_image"] = self.text_to_image.identity()
        if self.kind == "process":
            mine["process"] = self.grown.identity()
        return mine

    @property
    def grown(self) -> ProcessConfig:
        """The section of kind process; its defaults, where none is given."""
        return self.process or ProcessConfig()


class ProcessConfig(ProcessBudgets):
    """The section of kind process: `renderer` draws what `writer` plans."""

    renderer: RendererConfig = Field(default_factory=RendererConfig, description="Who draws the drafts")

    @model_validator(mode="after")
    def _refuse_renderer(self) -> ProcessConfig:
        if self.renderer.kind == "process":
            raise ValueError("renderer.kind process: a process cannot grow in another")
        if self.writer == "sandbox" and self.renderer.kind != "canvas":
            raise ValueError(
                f"writer sandbox writes what the canvas draws and knows no {self.renderer.kind}: set writer to chat, "
                "with model and base_url, or to policy, with the folder of one"
            )
        if self.prompts == "edit" and self.renderer.kind in _ANEW:
            raise ValueError(f"prompts edit: {self.renderer.kind} draws every picture anew and edits none")
        return self

    def identity(self) -> dict[str, Any]:
        """What of this section changes the pictures; JSON-able."""
        return self.own_identity() | {"prompts": self.drawn_by, "renderer": self.renderer.identity()}

    @property
    def drawn_by(self) -> Literal["scene", "edit"]:
        """How a draft is asked for: the whole scene, or what to edit in the last one."""
        return self.prompts or ("scene" if self.renderer.kind in _ANEW else "edit")


RendererConfig.model_rebuild()


def open_renderer(config: RendererConfig, incidents: Incidents) -> Renderer:
    """The renderer of a run. Raises ValueError naming what is missing."""
    if config.kind == "process":
        raise ValueError("renderer.kind process: it is composed of a renderer and a writer (commands/opening.py)")
    if config.kind == "canvas":
        raise ValueError("renderer.kind canvas: the sandbox brings its own renderer, there is nothing to open")
    if config.cache_mode == "replay":
        renderer: Renderer = _Absent(config)
    else:
        renderer = _one(config, incidents)
        if config.text_to_image is not None:
            renderer = RoutedRenderer(renderer, _one(config.text_to_image, incidents))
    if config.cache is not None and config.cache_mode != "off":
        cache = AnswerCache(config.cache, config.cache_mode, incidents, name="renderer.cache")
        renderer = CachedRenderer(renderer, config.identity(), cache)
    return renderer if config.seed is None else FixedSeed(renderer, config.seed)


class _Absent:
    """What stands behind a cache that only replays: it is never asked, needs no key and no GPU."""

    def __init__(self, config: RendererConfig) -> None:
        self.name = config.kind
        edits = config.kind in ("qwen-image-edit", "qwen-service") and config.text_to_image is None
        self.min_references = 1 if edits else 0
        own = {"nano-banana": 14, "text-to-image": 0}.get(config.kind, _MAX_REFERENCES)
        self.max_references = config.max_references or own

    async def render(self, program, references, seed):
        raise AssertionError("a replaying cache asked for a picture")


def _one(config: RendererConfig, incidents: Incidents) -> Renderer:
    if config.kind == "nano-banana":
        return NanoBanana(
            _gemini_key(config.api_key_env),
            config.model or GEMINI_IMAGE_MODEL,
            config.base_url or GEMINI_BASE_URL,
            config.aspect_ratio,
            config.image_size,
            config.reference_side,
            _limits(config),
            incidents,
        )
    if config.urls:
        key = _key(config.api_key_env) if config.api_key_env else ""
        own = {} if config.kind == "qwen-service" else dict.fromkeys(_DRAWN - {"long_side", "size_multiple"})
        settings = ServiceSettings(**own | _told(config, _DRAWN | {"reference_side"}))
        least, most = (0, 0) if config.kind == "text-to-image" else (1, config.max_references or _MAX_REFERENCES)
        return ServiceRenderer(config.urls, settings, _limits(config), key, incidents, config.kind, least, most)
    from genevolve_fast.render.local import LocalRenderer, PipelineSettings

    return LocalRenderer(PipelineSettings(kind=config.kind, **_told(config, _LOCAL)))


def _told(config: RendererConfig, names: set[str]) -> dict[str, Any]:
    """Fields with a value; the others are left to the defaults of what is opened."""
    return {name: value for name in sorted(names) if (value := getattr(config, name)) is not None}


def _limits(config: RendererConfig) -> CallLimits:
    names = "request_timeout_s picture_timeout_s patience_s attempts concurrency break_after probe_after_s"
    return CallLimits(
        **{name: getattr(config, name) for name in names.split()},
        max_answer_bytes=int(config.max_answer_mb * 2**20),
        max_pixels=int(config.max_megapixels * 1e6),
    )


def _gemini_key(variable: str | None) -> str:
    if variable:
        return _key(variable)
    for name in GEMINI_KEYS:
        if os.environ.get(name, "").strip():
            return _key(name)
    raise ValueError(f"{' or '.join(GEMINI_KEYS)} is not set: renderer.kind nano-banana asks an API that wants a key")


def _key(variable: str) -> str:
    """The key in the environment. Raises ValueError, without quoting it."""
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ValueError(f"{variable} is not set: renderer.api_key_env names it")
    if not (key.isascii() and key.isprintable()):
        raise ValueError(f"{variable} holds characters that cannot be sent in a header")
    return key
