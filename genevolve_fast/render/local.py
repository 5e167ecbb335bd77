"""Pictures by a diffusers pipeline of this process: Qwen-Image-Edit from references, FLUX and its kin from text."""

from __future__ import annotations

import asyncio
import inspect
import math
import re
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock
from typing import Any, Literal

import numpy as np

from genevolve_fast.protocols import RenderError
from genevolve_fast.render.job import DeviceLostError, Job, Offer, draw_each
from genevolve_fast.trajectory import Program

Kind = Literal["qwen-image-edit", "text-to-image"]
LATENT_MULTIPLE = 16  # pixels of one latent patch; the pipelines cut other sizes down to it without a word
_OWN = {  # kind -> what a setting of None means
    "qwen-image-edit": {
        "model": "Qwen/Qwen-Image-Edit-2511",
        "num_inference_steps": 40,
        "true_cfg_scale": 4.0,
        "guidance_scale": 1.0,
        "max_references": 4,
    },
    "text-to-image": {
        "model": "black-forest-labs/FLUX.1-dev",
        "num_inference_steps": 28,
        "true_cfg_scale": 1.0,
        "guidance_scale": 3.5,
        "max_references": 0,
    },
}


@dataclass(frozen=True)
class PipelineSettings:
    """A pipeline and how it draws. None is the kind's own value, which stands there once the settings are made.

    kind: "qwen-image-edit" loads a QwenImageEditPlusPipeline, "text-to-image" any text-to-image pipeline of diffusers.
    model: folder or hub id. device: the GPU where there is one. long_side, size_multiple: pixels of the picture.
    true_cfg_scale > 1 draws against negative_prompt at twice the cost; guidance_scale is for models distilled with it.
    offload: keep on the GPU only what computes ("model": one model, "sequential": one layer), for GPUs it does not fit.
    Raises ValueError for settings that cannot work.
    """

    kind: Kind = "qwen-image-edit"
    model: str | None = None
    device: str | None = None
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    num_inference_steps: int | None = None
    true_cfg_scale: float | None = None
    guidance_scale: float | None = None
    negative_prompt: str = " "
    long_side: int = 1024
    size_multiple: int = LATENT_MULTIPLE
    max_references: int | None = None
    offload: Literal["none", "model", "sequential"] = "none"

    def __post_init__(self) -> None:
        if self.kind not in _OWN:
            raise ValueError(f"kind {self.kind!r} is none of {', '.join(_OWN)}")
        for name, value in _OWN[self.kind].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if self.device is not None and not re.fullmatch(r"[a-z]+(:\d+)?", self.device):
            raise ValueError(f"device {self.device!r} is no device, such as cpu or cuda:0")
        if self.dtype not in ("bfloat16", "float16", "float32"):
            raise ValueError(f"dtype {self.dtype!r} is none of bfloat16, float16, float32")
        if self.offload not in ("none", "model", "sequential"):
            raise ValueError(f"offload {self.offload!r} is none of none, model, sequential")
        if self.num_inference_steps < 1:
            raise ValueError("num_inference_steps must be at least 1")
        if self.size_multiple < 1 or self.size_multiple % LATENT_MULTIPLE:
            raise ValueError(f"size_multiple {self.size_multiple} is no multiple of {LATENT_MULTIPLE} pixels")
        if self.long_side < self.size_multiple:
            raise ValueError(f"long_side {self.long_side} is below size_multiple {self.size_multiple}")
        if self.kind == "text-to-image" and self.max_references:
            raise ValueError("max_references: text-to-image draws from text alone")
        if self.kind == "qwen-image-edit" and self.max_references < 1:
            raise ValueError("max_references: qwen-image-edit needs at least one")
        if reason := _idle_negative(self.true_cfg_scale, self.negative_prompt):
            raise ValueError(reason)

    def size(self, references: Sequence[np.ndarray]) -> tuple[int, int]:
        """(width, height): the first reference's aspect with the longer side at `long_side`, else a square."""
        if not references:
            return self._rounded(self.long_side), self._rounded(self.long_side)
        height, width = references[0].shape[:2]
        scale = self.long_side / max(width, height)
        return self._rounded(width * scale), self._rounded(height * scale)

    def _rounded(self, side: float) -> int:
        return max(self.size_multiple, round(side / self.size_multiple) * self.size_multiple)


def open_pipeline(device: str, **settings: Any) -> DiffusersPipeline:
    """A worker's factory; `settings` are the fields of PipelineSettings."""
    return DiffusersPipeline(PipelineSettings(device=device, **settings))


class DiffusersPipeline:
    """The synchronous core: draws jobs on one device; implements render.job.Pipeline. Loaded on first use."""

    def __init__(self, settings: PipelineSettings) -> None:
        self.settings = settings
        self._pipe = None
        self._accepts: frozenset[str] = frozenset()
        self._distilled = True
        self._failure: RenderError | None = None
        self._lock = Lock()

    @property
    def offer(self) -> Offer:
        s = self.settings
        edits = s.kind == "qwen-image-edit"
        return Offer(
            s.model,
            min_references=1 if edits else 0,
            max_references=s.max_references,
            size_multiple=LATENT_MULTIPLE,
            together="seeds" if edits else "prompts",
        )

    def load(self) -> None:
        """Raises RenderError; a pipeline that failed to load is not tried again."""
        with self._lock:
            if self._failure is not None:
                raise RenderError(str(self._failure), self._failure.kind)
            if self._pipe is not None:
                return
            try:
                self._pipe = self._opened()
            except RenderError as error:
                self._failure = error
                raise

    def draw(self, jobs: Sequence[Job]) -> list[np.ndarray]:
        """uint8 [height, width, 3] for each job; their keys (Offer.key) must be equal. Raises RenderError."""
        import torch

        offer = self.offer
        for job in jobs:
            if reason := offer.refusal(job):
                raise RenderError(reason, "bad_arguments")
        if len(jobs) > 1 and (offer.key(jobs[0]) is None or len({offer.key(job) for job in jobs}) > 1):
            raise RenderError("one call cannot draw these pictures together", "bad_arguments")
        self.load()
        arguments = self._arguments(jobs)
        message = ""
        try:
            with self._lock, torch.inference_mode():
                pictures = self._pipe(**arguments, output_type="np").images  # float32 [n, height, width, 3] in [0, 1]
        except torch.OutOfMemoryError:
            message = f"{self._device} has not enough memory for {len(jobs)} picture(s) of {self._sizes(jobs)}"
        except Exception as error:  # whatever a model's code raises
            if _lost(error):
                message = f"{self._device} is lost to this process: {_line(error)}"
                raise DeviceLostError(message, "server_error") from None
            raise RenderError(f"{self.settings.model} failed: {_line(error)}", "other") from error
        if message:  # outside of the handler, whose traceback holds the tensors
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            raise RenderError(message, "too_large")
        if not np.isfinite(pictures).all():
            raise RenderError(f"{self.settings.model} computed numbers that are no colours (NaN)", "bad_response")
        return [(picture * 255).round().astype(np.uint8) for picture in pictures]

    # --- loading ------------------------------------------------------------------------------------------------------

    @property
    def _device(self) -> str:
        import torch

        return self.settings.device or ("cuda" if torch.cuda.is_available() else "cpu")

    def _opened(self):
        try:
            import diffusers
            import torch
        except ImportError as error:
            message = f"local pipelines need diffusers ({error}): pip install 'genevolve-fast[render]'"
            raise RenderError(message) from None
        s = self.settings
        if s.offload != "none" and self._device == "cpu":
            raise RenderError(f"offload {s.offload!r} needs a GPU", "bad_arguments")
        gpus = torch.cuda.device_count()
        if self._device.startswith("cuda") and int(self._device.partition(":")[2] or 0) >= gpus:
            raise RenderError(f"device {self._device}: torch sees {gpus} GPUs here", "bad_arguments")
        try:
            name = diffusers.DiffusionPipeline.load_config(s.model)["_class_name"]
            kind = self._pipeline_class(diffusers, name)
            extra = {"processor": _processor(s.model)} if s.kind == "qwen-image-edit" and not _torchvision() else {}
            pipe = kind.from_pretrained(s.model, dtype=getattr(torch, s.dtype), **extra)
            match s.offload:
                case "none":
                    pipe.to(self._device)
                case "model":
                    pipe.enable_model_cpu_offload(device=self._device)
                case "sequential":
                    pipe.enable_sequential_cpu_offload(device=self._device)
        except RenderError:
            raise
        except torch.OutOfMemoryError:
            raise RenderError(f"{s.model} does not fit on {self._device}: set offload to model", "too_large") from None
        except Exception as error:  # hub, files, versions: all of them can fail in ways of their own
            raise RenderError(f"{s.model} cannot be loaded: {_line(error)}") from error
        pipe.set_progress_bar_config(disable=True)
        self._accepts = frozenset(inspect.signature(pipe.__call__).parameters)
        self._distilled = s.kind != "qwen-image-edit" or bool(pipe.transformer.config.guidance_embeds)
        return pipe

    def _pipeline_class(self, diffusers, name: str):
        s = self.settings
        from diffusers.pipelines.auto_pipeline import AUTO_TEXT2IMAGE_PIPELINES_MAPPING

        draws_text = name in {known.__name__ for known in AUTO_TEXT2IMAGE_PIPELINES_MAPPING.values()}
        if s.kind == "text-to-image":
            if not draws_text:
                other = "use kind qwen-image-edit" if name == "QwenImageEditPlusPipeline" else "choose another model"
                raise RenderError(f"{s.model} is a {name}, which draws no text alone: {other}", "bad_arguments")
            return diffusers.AutoPipelineForText2Image
        if name != "QwenImageEditPlusPipeline":
            other = "use kind text-to-image" if draws_text else "choose another model"
            message = f"{s.model} is a {name}, kind qwen-image-edit needs a QwenImageEditPlusPipeline: {other}"
            raise RenderError(message, "bad_arguments")
        return diffusers.QwenImageEditPlusPipeline

    # --- one call -----------------------------------------------------------------------------------------------------

    def _arguments(self, jobs: Sequence[Job]) -> dict[str, Any]:
        """Of the pipeline's call, for jobs that share everything but what `together` names. Raises RenderError."""
        import torch
        from PIL import Image

        s, first = self.settings, jobs[0]
        true_cfg = s.true_cfg_scale if first.true_cfg_scale is None else first.true_cfg_scale
        guidance = s.guidance_scale if first.guidance_scale is None else first.guidance_scale
        negative = s.negative_prompt if first.negative_prompt is None else first.negative_prompt
        if reason := _idle_negative(true_cfg, negative):
            raise RenderError(reason, "bad_arguments")
        made: dict[str, Any] = {
            "num_inference_steps": first.num_inference_steps or s.num_inference_steps,
            "generator": [torch.Generator(self._device).manual_seed(job.seed) for job in jobs],
            "width": first.width,
            "height": first.height,
        }
        if true_cfg > 1 and not {"true_cfg_scale", "negative_prompt"} <= self._accepts:
            raise RenderError(f"{s.model} takes no true_cfg_scale: leave it at 1.0", "bad_arguments")
        if "true_cfg_scale" in self._accepts:
            made["true_cfg_scale"] = true_cfg
        if self._distilled and "guidance_scale" in self._accepts:
            made["guidance_scale"] = guidance
        elif guidance != 1.0:
            raise RenderError(f"{s.model} takes no guidance_scale: leave it at 1.0", "bad_arguments")
        if s.kind == "qwen-image-edit":
            made["image"] = [Image.fromarray(r) for r in first.references]
            made["prompt"] = first.prompt
            made["num_images_per_prompt"] = len(jobs)  # it refuses a list of prompts
            made["negative_prompt"] = negative if true_cfg > 1 else None
        else:
            made["prompt"] = [job.prompt for job in jobs]
            if true_cfg > 1:
                made["negative_prompt"] = [negative] * len(jobs)
        return made

    def _sizes(self, jobs: Sequence[Job]) -> str:
        return f"{jobs[0].width} × {jobs[0].height}" if jobs[0].width else "its own size"


def _idle_negative(true_cfg_scale: float, negative_prompt: str) -> str:
    if not (math.isfinite(true_cfg_scale) and true_cfg_scale >= 0):
        return f"true_cfg_scale {true_cfg_scale} is no scale"
    if true_cfg_scale <= 1 and negative_prompt.strip():
        return "negative_prompt does nothing at a true_cfg_scale of 1 or less"
    return ""


def _torchvision() -> bool:
    from transformers.utils import is_torchvision_available

    return is_torchvision_available()


def _processor(model: str):
    """Qwen2VLProcessor without the video half, which alone needs torchvision; pictures are resized by Pillow then."""
    from transformers import AutoTokenizer, Qwen2VLProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    class PictureProcessor(Qwen2VLProcessor):
        def __init__(self, image_processor, tokenizer) -> None:
            self.image_processor, self.tokenizer = image_processor, tokenizer
            self.video_processor = self.chat_template = None
            self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
            self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
            self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)

    return PictureProcessor(
        Qwen2VLImageProcessorPil.from_pretrained(model, subfolder="processor"),
        AutoTokenizer.from_pretrained(model, subfolder="processor"),
    )


def _lost(error: Exception) -> bool:
    """Whether the error is the device's, after which CUDA refuses every further call of the process."""
    import torch

    return isinstance(error, getattr(torch, "AcceleratorError", ())) or "CUDA error" in str(error)


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


# --- the protocol -----------------------------------------------------------------------------------------------------


class LocalRenderer:
    """Draws programs with a pipeline of this process; implements protocols.Renderer.

    One thread draws, in the order of the calls. With `max_batch` above 1, waiting calls that the pipeline can draw
    together are drawn together: faster on small pictures, and equal to a picture drawn alone only up to rounding.
    """

    def __init__(self, settings: PipelineSettings, max_batch: int = 1) -> None:
        if max_batch < 1:
            raise ValueError("max_batch must be at least 1")
        self.settings = settings
        self.name = settings.kind
        self.pipeline = DiffusersPipeline(settings)
        self.min_references = self.pipeline.offer.min_references
        self.max_references = self.pipeline.offer.max_references
        self._max_batch = max_batch
        self._waiting: deque[tuple[Job, Future]] = deque()
        self._lock = Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="render")
        self._closed = False

    async def render(self, program: Program, references: Sequence[np.ndarray], seed: int) -> np.ndarray:
        """uint8 [height, width, 3]; equal arguments give equal pictures. Raises RenderError."""
        if len(references) != len(program.reference_images):
            message = f"{len(program.reference_images)} references in the program, {len(references)} given"
            raise RenderError(message, "bad_arguments")
        width, height = self.settings.size(references)
        job = Job(program.gen_prompt, tuple(references), seed, width, height)
        if reason := self.pipeline.offer.refusal(job):
            raise RenderError(reason, "bad_arguments")
        future: Future = Future()
        with self._lock:
            if self._closed:
                raise RenderError("the renderer was closed")
            self._waiting.append((job, future))
            self._thread.submit(self._draw_next)
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """Finish what is being drawn, refuse the rest, give the memory back."""
        with self._lock:
            waiting, self._waiting, self._closed = self._waiting, deque(), True
        for _, future in waiting:
            if future.set_running_or_notify_cancel():
                future.set_exception(RenderError("the renderer was closed"))
        self._thread.shutdown()
        self.pipeline = DiffusersPipeline(self.settings)

    def _draw_next(self) -> None:
        if not (batch := self._take()):
            return  # drawn with an earlier call, or nobody waits for it any more
        try:
            outcomes: list[Any] = draw_each(self.pipeline, [job for job, _ in batch])
        except BaseException as error:
            outcomes = [error] * len(batch)
        for (_, future), outcome in zip(batch, outcomes, strict=True):
            if isinstance(outcome, BaseException):
                future.set_exception(outcome)
            else:
                future.set_result(outcome)

    def _take(self) -> list[tuple[Job, Future]]:
        """The oldest waiting job and those that can be drawn with it."""
        taken: list[tuple[Job, Future]] = []
        with self._lock:
            for entry in list(self._waiting):
                if len(taken) == self._max_batch:
                    break
                if taken and not self._fits(taken[0][0], entry[0]):
                    continue
                self._waiting.remove(entry)
                if entry[1].set_running_or_notify_cancel():
                    taken.append(entry)
        return taken

    def _fits(self, first: Job, other: Job) -> bool:
        offer = self.pipeline.offer
        return self._max_batch > 1 and offer.key(first) is not None and offer.key(first) == offer.key(other)
