"""Pictures over HTTP: `POST /generate` of the released contract before a pool of workers, `GET /health`, `/metrics`."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import math
import os
import re
import signal
import socket
from binascii import Error as Base64Error
from collections.abc import Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any

import numpy as np
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

import genevolve_fast
from genevolve_fast.net.pictures import decode_image
from genevolve_fast.net.serving import BearerKey, ClientGoneError, while_connected
from genevolve_fast.net.web import FetchError
from genevolve_fast.protocols import RenderError
from genevolve_fast.render.job import Job
from genevolve_fast.render.pool import Observer, Pool, PoolSettings, RefusedError

MAX_SIDE = 4096  # of a picture to draw
MAX_IMAGES = 16
_KEEP_SIDE = 1 << 16  # references stay as large as they came: the pipelines resize them as they were trained
_STATUS = {"bad_arguments": 422, "too_large": 507}  # of a pipeline's failure; others are 500
_DATA_URL = re.compile(r"data:[^,;]*(?:;[^,;]+)*;base64,", re.IGNORECASE)


@dataclass(frozen=True)
class ServiceSettings:
    """Where the service listens, what it draws with, and its limits in seconds and bytes."""

    factory: str  # "module:function", see render.worker.make_pipeline
    arguments: Mapping[str, Any] = field(default_factory=dict)
    devices: Sequence[str] = ("cpu",)
    host: str = "127.0.0.1"
    port: int = 8001  # 0: any free one, see the ready line
    api_key: str | None = field(default=None, repr=False)
    pool: PoolSettings = PoolSettings()
    max_request_bytes: int = 64 << 20
    max_reference_pixels: int = 40_000_000
    body_timeout_s: float = 60.0
    drain_s: float = 120.0


class GenerateRequest(BaseModel):
    """Body of POST /generate. What is absent or null is the pipeline's own setting."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    prompt: str = Field(min_length=1, max_length=32_000)
    image_urls: list[str] | None = Field(default=None, max_length=MAX_IMAGES)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**64)
    true_cfg_scale: float | None = Field(default=None, ge=0, le=100, allow_inf_nan=False)
    negative_prompt: str | None = Field(default=None, max_length=32_000)
    num_inference_steps: int | None = Field(default=None, ge=1, le=200)
    guidance_scale: float | None = Field(default=None, ge=0, le=100, allow_inf_nan=False)
    num_images_per_prompt: int | None = None
    width: Annotated[int, Field(ge=16, le=MAX_SIDE)] | None = None
    height: Annotated[int, Field(ge=16, le=MAX_SIDE)] | None = None

    @model_validator(mode="after")
    def _works(self) -> GenerateRequest:
        if not self.prompt.strip():
            raise ValueError("the prompt is empty")
        if self.num_images_per_prompt not in (None, 1):
            raise ValueError("num_images_per_prompt: an answer holds one picture; ask again with another seed")
        if (self.width is None) != (self.height is None):
            raise ValueError("width and height go together")
        return self

    def job(self, max_pixels: int) -> Job:
        """Decodes the references. Raises RefusedError."""
        urls = self.image_urls or []
        references = tuple(_reference(f"image_urls[{i}]", url, max_pixels) for i, url in enumerate(urls))
        own = {"num_images_per_prompt", "image_urls", "seed"}
        return Job(references=references, seed=self.seed or 0, **self.model_dump(exclude=own))


def _reference(name: str, url: str, max_pixels: int) -> np.ndarray:
    head = _DATA_URL.match(url[:200])
    if head is None:
        if url[:8].lower().startswith(("http://", "https://")):
            reason = "addresses are not fetched here, a caller could reach the service's own network with them"
            raise RefusedError(f"{name}: {reason}; send the picture as a data URL", 400)
        raise RefusedError(f"{name} is no data URL (data:image/png;base64,…)", 400)
    try:
        data = base64.b64decode(url[head.end() :], validate=True)
    except (Base64Error, ValueError):
        raise RefusedError(f"{name} holds broken base64", 400) from None
    try:
        return decode_image(data, max_pixels, _KEEP_SIDE).pixels
    except FetchError as error:
        raise RefusedError(f"{name}: {error}", 413 if error.kind == "too_large" else 400) from None


def parse(body: bytes, max_pixels: int) -> Job:
    """Raises RefusedError."""
    try:
        return GenerateRequest.model_validate_json(body).job(max_pixels)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        text = str(first["msg"]).removeprefix("Value error, ")
        raise RefusedError(f"{where}: {text}" if where else text, 422) from None


def encode(pixels: np.ndarray) -> str:
    """uint8 [height, width, 3] as base64 of a PNG."""
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG", compress_level=3)
    return base64.b64encode(out.getvalue()).decode()


# --- numbers ----------------------------------------------------------------------------------------------------------


class Metrics(Observer):
    """What the service counts, in the Prometheus format."""

    def __init__(self, pool: Pool) -> None:
        self.registry = CollectorRegistry()
        prefix = "genevolve_render_"
        self.requests = Counter(f"{prefix}requests", "Requests by outcome", ["outcome"], registry=self.registry)
        times, sizes = (0.01, 0.1, 1, 3, 10, 30, 60, 120, 300, 600, 1800), (1, 2, 4, 8, 16, 32)
        self.seconds = Histogram(f"{prefix}draw_seconds", "Of one call", buckets=times, registry=self.registry)
        self.wait = Histogram(f"{prefix}wait_seconds", "In the queue", buckets=times, registry=self.registry)
        self.batch = Histogram(f"{prefix}batch_size", "Pictures of one call", buckets=sizes, registry=self.registry)
        self.restarts = Counter(f"{prefix}worker_restarts", "Workers started again", registry=self.registry)
        self._gauge("queue_depth", "Pictures that wait", lambda: pool.waiting)
        self._gauge("drawing", "Pictures being drawn", lambda: pool.busy)
        self._gauge("workers", "Workers that can draw", lambda: _able(pool))

    def _gauge(self, name: str, text: str, value) -> None:
        Gauge(f"genevolve_render_{name}", text, registry=self.registry).set_function(value)

    def drawn(self, batch: int, seconds: float) -> None:
        self.batch.observe(batch)
        self.seconds.observe(seconds)

    def waited(self, seconds: float) -> None:
        self.wait.observe(seconds)

    def restarted(self) -> None:
        self.restarts.inc()


def _able(pool: Pool) -> int:
    return sum(worker.state in ("idle", "drawing") for worker in pool.workers)


def health(pool: Pool) -> tuple[dict[str, Any], int]:
    """(body, HTTP status); 200 as long as somebody draws."""
    able = _able(pool)
    status = "healthy" if able == len(pool.workers) else "degraded"
    if not able:
        status = "unhealthy" if pool.offer else "starting"
    if pool.draining:
        status = "ending"
    body = {
        "status": status,
        "model": pool.offer.model if pool.offer else None,
        "min_references": pool.offer.min_references if pool.offer else None,
        "max_references": pool.offer.max_references if pool.offer else None,
        "workers": [worker.status() for worker in pool.workers],
        "queue": {"waiting": pool.waiting, "drawing": pool.busy, "limit": pool.settings.queue},
    }
    return body, 200 if status in ("healthy", "degraded") else 503


# --- the application --------------------------------------------------------------------------------------------------


def build_app(pool: Pool, settings: ServiceSettings) -> FastAPI:
    """The endpoints before `pool`, which starts and ends with the application."""

    @asynccontextmanager
    async def lifespan(_: FastAPI):
        await pool.start()
        yield
        await pool.close()

    metrics = Metrics(pool)
    pool.observe(metrics)
    decoding = asyncio.Semaphore(4)  # a reference of 40 megapixels takes 300 MB while it is decoded
    options = {"docs_url": None, "redoc_url": None, "openapi_url": None}
    app = FastAPI(title="genevolve-fast", version=genevolve_fast.__version__, lifespan=lifespan, **options)

    @app.post("/generate")
    async def generate(raw: Request) -> Response:
        outcome = "failed"
        try:
            picture = await _drawn(raw)
            outcome = "drawn"
            return JSONResponse({"success": True, "image": picture})
        except RefusedError as error:
            outcome = _outcome(error.status)
            return _failure(str(error), error.status, error.retry_after)
        except RenderError as error:
            status = _STATUS.get(error.kind, 500)
            outcome = _outcome(status)
            return _failure(str(error), status)
        except (ClientDisconnect, ClientGoneError):
            outcome = "vanished"
            return Response(status_code=499)
        except asyncio.CancelledError:  # the time to finish is over
            return _failure("the service ended before it was drawn", 503, 5)
        finally:
            metrics.requests.labels(outcome).inc()

    async def _drawn(raw: Request) -> str:
        try:
            place = pool.reserve()
        except RefusedError:
            await _discard(raw, settings)  # a client that is still sending would not read the answer
            raise
        try:
            body = await _body(raw, settings)
            async with decoding:
                job = await asyncio.to_thread(parse, body, settings.max_reference_pixels)
            del body
            pixels = await while_connected(raw, pool.submit(job, place))
        finally:
            place.give_back()
        return await asyncio.to_thread(encode, pixels)

    @app.get("/health")
    async def healthy() -> JSONResponse:
        body, status = health(pool)
        return JSONResponse(body, status)

    @app.get("/metrics")
    async def numbers() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.exception_handler(HTTPException)
    async def unknown(_: Request, error: HTTPException) -> JSONResponse:
        return _failure(str(error.detail), error.status_code)

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> JSONResponse:
        return _failure(f"{type(error).__name__} in the service", 500)

    if settings.api_key:
        refusal = partial(_failure, "the key is missing or wrong", 401)
        app.add_middleware(BearerKey, key=settings.api_key, open_paths=("/health",), refuse=refusal)
    return app


def _outcome(status: int) -> str:
    return {503: "busy", 504: "timeout"}.get(status, "refused" if status < 500 else "failed")


def _failure(reason: str, status: int, retry_after: int | None = None) -> JSONResponse:
    headers = {"Retry-After": str(retry_after)} if retry_after else None
    return JSONResponse({"success": False, "message": reason}, status, headers)


async def _body(raw: Request, settings: ServiceSettings) -> bytes:
    """Raises RefusedError, ClientDisconnect."""
    limit = settings.max_request_bytes
    parts = bytearray()

    async def read() -> None:
        async for chunk in raw.stream():
            if len(parts) + len(chunk) > limit:
                parts.clear()
                raise RefusedError(f"the body is larger than {limit} bytes", 413)
            parts.extend(chunk)

    announced = raw.headers.get("content-length", "")
    try:
        if announced.isdecimal() and int(announced[:20]) > limit:
            raise RefusedError(f"the body is larger than {limit} bytes", 413)
        await asyncio.wait_for(read(), settings.body_timeout_s)
    except asyncio.TimeoutError:
        raise RefusedError(f"the body did not arrive within {settings.body_timeout_s:.4g} s", 408) from None
    except RefusedError:
        await _discard(raw, settings)
        raise
    return bytes(parts)


async def _discard(raw: Request, settings: ServiceSettings) -> None:
    """Read what a refused client still sends, within reason. Raises ClientDisconnect."""

    async def read() -> None:
        size = 0
        while size <= 4 * settings.max_request_bytes:
            message = await raw.receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            size += len(message.get("body", b""))
            if not message.get("more_body", False):
                return

    try:
        await asyncio.wait_for(read(), min(10.0, settings.body_timeout_s))
    except asyncio.TimeoutError:
        return


# --- the process ------------------------------------------------------------------------------------------------------


class _Server(uvicorn.Server):
    """Says on stdout where it listens, and drains the pool when it is asked to end."""

    def __init__(self, config: uvicorn.Config, pool: Pool, drain_s: float) -> None:
        super().__init__(config)
        self.pool, self.drain_s, self.broken = pool, drain_s, ""
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._loop = asyncio.get_running_loop()
        self.pool.broken.add_done_callback(self._give_up)
        for listening in sockets or ():
            host, port = listening.getsockname()[:2]
            host = f"[{host}]" if ":" in host else host
            print(json.dumps({"ready": f"http://{host}:{port}", "pid": os.getpid()}), flush=True)

    def _give_up(self, broken: asyncio.Future) -> None:
        if not broken.cancelled():
            self.broken = broken.result()
            self.pool.drain(0)
            self.should_exit = True

    def handle_exit(self, sig: int, frame) -> None:
        super().handle_exit(sig, frame)
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self.pool.drain, self.drain_s)


def serve(settings: ServiceSettings) -> str:
    """Serve until SIGTERM or SIGINT; the reason where the workers cannot come up, else empty. Raises OSError."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listening = socket.create_server((settings.host, settings.port), family=family, backlog=1024)
    pool = Pool(settings.factory, settings.arguments, settings.devices, settings.pool)
    config = uvicorn.Config(
        build_app(pool, settings),
        log_level="warning",
        timeout_graceful_shutdown=math.ceil(settings.drain_s) + 5,
        timeout_keep_alive=75,
    )
    server = _Server(config, pool, settings.drain_s)
    signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn ends well, then raises the signal again
    try:
        server.run(sockets=[listening])
    finally:
        listening.close()
    return server.broken
