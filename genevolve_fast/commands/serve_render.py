"""`render-serve`: a renderer over HTTP."""

from __future__ import annotations

import argparse
import json
import os
from typing import Any

from genevolve_fast.commands.opening import AddCommand

_KIND_FLAGS = ("kind", "dtype", "steps", "true_cfg_scale", "guidance_scale", "offload")


def add(command: AddCommand) -> None:
    """Add the parsers of this module."""
    p = command(
        "render-serve",
        run_render_serve,
        "Serve a renderer over HTTP: one process a GPU, a bounded queue, POST /generate, /health, /metrics.",
        "genevolve-fast render-serve --model Qwen/Qwen-Image-Edit-2511 --devices cuda:0,cuda:1 --port 8001",
    )
    p.add_argument("--model", help="folder or hub id of a diffusers pipeline, or sandbox:canvas (default: of --kind)")
    p.add_argument("--kind", choices=["qwen-image-edit", "text-to-image"], help="(default: qwen-image-edit)")
    p.add_argument("--devices", help="cuda:0,cuda:1: one worker each (default: every GPU, else cpu)")
    p.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], help="of the weights (default: bfloat16)")
    p.add_argument("--offload", choices=["none", "model", "sequential"], help="keep on the GPU only what computes")
    p.add_argument("--steps", type=int, help="of requests that name none (default: 40, from text 28)")
    p.add_argument("--true-cfg-scale", type=float, help="of requests that name none (default: 4.0, from text 1.0)")
    p.add_argument("--guidance-scale", type=float, help="of requests that name none (default: 1.0, from text 3.5)")
    p.add_argument("--factory", metavar="MODULE:FUNCTION", help="your own pipeline instead of --model")
    p.add_argument("--arguments", metavar="JSON", help="keyword arguments of --factory, besides device")
    p.add_argument("--host", default="127.0.0.1", help="(default: %(default)s)")
    p.add_argument("--port", type=int, default=8001, help="0: any free one, see the ready line (default: %(default)s)")
    p.add_argument("--queue", type=int, default=64, help="pictures that wait before others get 503 (default: 64)")
    p.add_argument(
        "--max-batch", type=int, default=1, help="pictures one call draws; equal up to rounding only (default: 1)"
    )
    p.add_argument("--batch-window-ms", type=float, help="how long a free worker waits for company (default: 20)")
    p.add_argument("--job-timeout", type=float, default=600, help="seconds of one call of the pipeline (default: 600)")
    p.add_argument("--queue-timeout", type=float, default=1800, help="seconds a picture may wait (default: 1800)")
    p.add_argument("--drain", type=float, default=120, help="seconds to finish in after SIGTERM (default: 120)")
    p.add_argument("--max-request-mb", type=float, default=64, help="largest body (default: %(default)s)")
    p.add_argument("--api-key-env", metavar="NAME", help="environment variable with the key that requests must bring")
    p.add_argument("--insecure", action="store_true", help="listen beyond this machine without a key")


def run_render_serve(args: argparse.Namespace) -> int:
    from genevolve_fast.rollout.serve import LOOPBACK, ServeError

    try:
        from genevolve_fast.render.pool import PoolSettings
        from genevolve_fast.render.service import ServiceSettings, serve
    except ImportError as error:
        raise ServeError(f"the service needs more ({error}): pip install 'genevolve-fast[render]'") from None
    key = os.environ.get(args.api_key_env) if args.api_key_env else None
    if args.api_key_env and not key:
        raise ServeError(f"--api-key-env {args.api_key_env}: the environment has no such variable, or it is empty")
    if args.host not in LOOPBACK and not (key or args.insecure):
        raise ServeError(f"--host {args.host} is reachable from elsewhere: set --api-key-env, or say --insecure")
    if args.batch_window_ms is not None and args.max_batch == 1:
        raise ServeError("--batch-window-ms does nothing without --max-batch")
    if args.drain < 0 or args.max_request_mb <= 0:
        raise ServeError("--drain must be at least 0 and --max-request-mb above it")
    factory, arguments = _factory(args, ServeError)
    devices = args.devices.split(",") if args.devices else _devices(factory)
    gpus = [device for device in devices if device != "cpu"]
    if len(set(gpus)) < len(gpus):
        raise ServeError(f"--devices {args.devices} names a GPU twice: a pipeline fills one")
    try:
        pool = PoolSettings(
            queue=args.queue,
            max_batch=args.max_batch,
            window_s=(20 if args.batch_window_ms is None else args.batch_window_ms) / 1000,
            job_timeout_s=args.job_timeout,
            queue_timeout_s=args.queue_timeout,
        )
    except ValueError as error:
        raise ServeError(str(error)) from None
    settings = ServiceSettings(
        factory,
        arguments,
        devices,
        host=args.host,
        port=args.port,
        api_key=key,
        pool=pool,
        max_request_bytes=int(args.max_request_mb * 2**20),
        drain_s=args.drain,
    )
    try:
        broken = serve(settings)
    except OSError as error:
        reason = str(error.strerror or error).split(" (")[0]
        raise ServeError(f"--host {args.host} --port {args.port}: {reason}; port 0 takes any free one") from None
    if broken:
        raise ServeError(broken)
    return 0


def _factory(args: argparse.Namespace, mistake: type[Exception]) -> tuple[str, dict[str, Any]]:
    """("module:function", its arguments) of the flags."""
    given = [name for name in _KIND_FLAGS if getattr(args, name) is not None]
    if args.factory:
        if args.model or given:
            raise mistake(f"--factory makes the pipeline: --{(given or ['model'])[0].replace('_', '-')} does nothing")
        try:
            arguments = json.loads(args.arguments or "{}")
        except json.JSONDecodeError as error:
            raise mistake(f"--arguments is no JSON: {error}") from None
        if not isinstance(arguments, dict):
            raise mistake("--arguments must be a JSON object")
        return args.factory, arguments
    if args.arguments:
        raise mistake("--arguments does nothing without --factory")
    if args.model == "sandbox:canvas":
        if given:
            raise mistake(f"--{given[0].replace('_', '-')} does nothing with the canvas")
        return f"{__name__}:open_canvas", {}
    from genevolve_fast.render.local import PipelineSettings

    names = {"steps": "num_inference_steps"}
    arguments = {names.get(name, name): getattr(args, name) for name in given}
    arguments |= {"model": args.model} if args.model else {}
    try:
        made = PipelineSettings(**arguments)
    except ValueError as error:
        raise mistake(str(error)) from None
    return "genevolve_fast.render.local:open_pipeline", {**arguments, "kind": made.kind, "model": made.model}


def _devices(factory: str) -> list[str]:
    if not factory.startswith("genevolve_fast.render."):
        return ["cpu"]
    import torch

    return [f"cuda:{i}" for i in range(torch.cuda.device_count())] or ["cpu"]


# --- the canvas -------------------------------------------------------------------------------------------------------


class CanvasPipeline:
    """The sandbox's canvas as a pipeline; it always draws 96 × 96 pixels, in no time."""

    def __init__(self) -> None:
        from genevolve_fast.render.job import Offer
        from genevolve_fast.sandbox.canvas import CanvasRenderer

        least, most = CanvasRenderer.min_references, CanvasRenderer.max_references
        self.offer = Offer("sandbox:canvas", least, most, together="anything")

    def load(self) -> None:
        """There is nothing to load."""

    def draw(self, jobs) -> list:
        """Raises RenderError."""
        from genevolve_fast.sandbox.canvas import draw_program

        return [draw_program(job.prompt, job.references, job.seed) for job in jobs]


def open_canvas(device: str) -> CanvasPipeline:
    """A worker's factory; the canvas draws on the processor, whatever `device` says."""
    return CanvasPipeline()
