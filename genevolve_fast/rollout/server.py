"""vLLM's HTTP protocols over the transformers engine: `python -m genevolve_fast.rollout.server --model FOLDER`.

For machines without vLLM and for whatever is tested on loopback: token ids in and out, chat, weight updates.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import socket
import sys
import time
import uuid
from collections.abc import Awaitable, Sequence
from importlib import resources
from typing import Annotated, Any, Literal, TypeVar

import genevolve_fast
from genevolve_fast.net.serving import BearerKey, ClientGoneError, while_connected
from genevolve_fast.rollout.server_policy import ServedPolicy
from genevolve_fast.rollout.server_prompts import chat_prompt, expand, images_of_parts
from genevolve_fast.rollout.server_protocol import (
    AbortRequest,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    GenerateRequest,
    LoadAdapter,
    NewVersion,
    RequestError,
    Rpc,
    TokenizeMessages,
    TokenizePrompt,
    UnloadAdapter,
    WeightCheck,
    unavailable,
)
from genevolve_fast.rollout.transformers_engine import SampledTurn

try:
    import uvicorn
    from fastapi import FastAPI, Query, Request, Response
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse
    from starlette.exceptions import HTTPException
except ImportError as error:  # an extra, not a dependency
    raise SystemExit(f"{error.name} is not installed: pip install 'genevolve-fast[serve]'") from error

LOOPBACK = ("127.0.0.1", "::1", "localhost")
OPEN_PATHS = ("/health", "/ping", "/version")  # need no key
Mode = Literal["abort", "wait", "keep"]
Level = Annotated[int, Query(ge=0, le=2)]
T = TypeVar("T")


def build_app(
    served: ServedPolicy,
    *,
    api_key: str | None = None,
    return_sampling_mask: bool = False,
    max_request_bytes: int = 256 << 20,
) -> FastAPI:
    """The endpoints. `api_key`: what every request but OPEN_PATHS must bring as a bearer token."""
    app = FastAPI(title="genevolve-fast", version=genevolve_fast.__version__, docs_url=None, redoc_url=None)
    codec = served.codec

    @app.exception_handler(RequestError)
    async def refused(_: Request, error: RequestError) -> JSONResponse:
        return JSONResponse(error.body(), error.status)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        text = str(first["msg"]).removeprefix("Value error, ")
        return JSONResponse(RequestError(f"{where}: {text}" if where else text, param=where or None).body(), 400)

    @app.exception_handler(HTTPException)
    async def unknown(_: Request, error: HTTPException) -> JSONResponse:
        kind = "NotFoundError" if error.status_code == 404 else "BadRequestError"
        return JSONResponse(RequestError(str(error.detail), error.status_code, kind).body(), error.status_code)

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> JSONResponse:
        return JSONResponse(RequestError(f"{type(error).__name__}: {error}", 500, "InternalServerError").body(), 500)

    # --- tokens in, tokens out ----------------------------------------------------------------------------------------

    @app.post("/inference/v1/generate")
    async def generate(request: GenerateRequest, raw: Request) -> JSONResponse:
        served.check_model(request.model)
        images = images_of_parts(request.content_parts)
        ids, ranges = expand(request.token_ids, images, codec)
        params = request.sampling_params
        sampling = params.sampling(served.eos, served.room(len(ids)), return_sampling_mask)
        session = _session(raw, request.cache_salt)
        name = _request_id(raw, request.request_id)
        work = served.generate(request.model, session, ids, images, sampling, params.seed, name)
        made = await _while_connected(raw, work)
        choice = {
            "index": 0,
            "token_ids": made.ids,
            "finish_reason": made.finish_reason,
            "stop_reason": _stop_reason(made, served.eos, params.ignore_eos),
            "logprobs": {"content": _token_logprobs(made)} if params.logprobs is not None else None,
            "routed_experts": None,
            "sampling_mask": made.sampling_mask,
            "weight_versions": _spans(made),
        }
        return JSONResponse(
            {
                "request_id": f"generate-tokens-{name}",
                "model": request.model or served.name,
                "created": int(time.time()),
                "usage": _usage(len(ids), made),
                "prompt_logprobs": None,
                "prompt_token_id_logprobs": None,
                "prompt_token_ids": ids if request.return_token_ids else None,
                "mm_placeholders": {"image": ranges} if request.return_token_ids and ranges else None,
                "metrics": None,
                "kv_transfer_params": None,
                "ec_transfer_params": None,
                "output_mode": "tokens",
                "choices": [choice],
            }
        )

    # --- text ---------------------------------------------------------------------------------------------------------

    @app.post("/v1/chat/completions")
    async def chat(request: ChatRequest, raw: Request) -> JSONResponse:
        served.check_model(request.model)
        prompt, images = chat_prompt(
            request.messages, codec, request.add_generation_prompt, request.chat_template_kwargs
        )
        ids, _ = expand(codec.encode(prompt), images, codec)
        name = _request_id(raw, request.request_id)
        made = await _answer(request, raw, name, ids, images)
        text = _text(made, request.skip_special_tokens is not False)
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": {"content": _chat_logprobs(made, codec)} if request.logprobs else None,
            "finish_reason": made.finish_reason,
            "stop_reason": _stop_reason(made, served.eos, request.ignore_eos),
            "token_ids": made.ids if request.return_token_ids else None,
            "weight_versions": _spans(made),
        }
        return JSONResponse(
            {
                "id": f"chatcmpl-{name}",
                "object": "chat.completion",
                "created": int(time.time()),
                "model": request.model or served.name,
                "choices": [choice],
                "usage": _usage(len(ids), made),
                "prompt_token_ids": ids if request.return_token_ids else None,
            }
        )

    @app.post("/v1/completions")
    async def completions(request: CompletionRequest, raw: Request) -> JSONResponse:
        served.check_model(request.model)
        ids = codec.encode(request.prompt) if isinstance(request.prompt, str) else request.prompt
        if not ids:
            raise RequestError("prompt: is empty", param="prompt")
        ids, _ = expand(ids, [], codec)
        name = _request_id(raw, request.request_id)
        made = await _answer(request, raw, name, ids, [])
        choice = {
            "index": 0,
            "text": _text(made, request.skip_special_tokens),
            "logprobs": _completion_logprobs(made, codec) if request.logprobs is not None else None,
            "finish_reason": made.finish_reason,
            "stop_reason": _stop_reason(made, served.eos, request.ignore_eos),
            "token_ids": made.ids if request.return_token_ids else None,
            "prompt_token_ids": ids if request.return_token_ids else None,
            "weight_versions": _spans(made),
        }
        return JSONResponse(
            {
                "id": f"cmpl-{name}",
                "object": "text_completion",
                "created": int(time.time()),
                "model": request.model or served.name,
                "choices": [choice],
                "usage": _usage(len(ids), made),
            }
        )

    async def _answer(request: ChatRequest | CompletionRequest, raw: Request, name: str, ids, images) -> SampledTurn:
        sampling = request.sampling(served.eos, served.room(len(ids)))
        session = request.session_id or _session(raw, None)
        if session and request.cache_salt:
            session = f"{request.cache_salt}\x00{session}"
        work = served.generate(request.model, session, ids, images, sampling, request.seed, name)
        return await _while_connected(raw, work)

    def _text(made: SampledTurn, skip_special_tokens: bool) -> str:
        ids = made.ids[:-1] if made.finish_reason == "stop" else made.ids
        return codec.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)

    @app.post("/tokenize")
    async def tokenize(request: TokenizePrompt | TokenizeMessages) -> dict[str, Any]:
        served.check_model(request.model)
        if isinstance(request, TokenizePrompt):
            ids = codec.tokenizer.encode(request.prompt, add_special_tokens=request.add_special_tokens)
        else:
            prompt, images = chat_prompt(
                request.messages, codec, request.add_generation_prompt, request.chat_template_kwargs
            )
            ids, _ = expand(codec.encode(prompt), images, codec)
        strings = codec.tokenizer.convert_ids_to_tokens(ids) if request.return_token_strs else None
        return {"count": len(ids), "max_model_len": served.max_model_len, "tokens": ids, "token_strs": strings}

    @app.post("/detokenize")
    async def detokenize(request: DetokenizeRequest) -> dict[str, str]:
        served.check_model(request.model)
        return {"prompt": codec.decode(request.tokens)}

    # --- what is served -----------------------------------------------------------------------------------------------

    @app.get("/health")
    @app.get("/ping")
    async def health() -> Response:
        return Response(status_code=503 if served.broken else 200)

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": genevolve_fast.__version__, "server": "genevolve-fast"}

    @app.get("/server_info")
    async def server_info() -> dict[str, Any]:
        model = {
            "served_model_name": served.name,
            "max_model_len": served.max_model_len,
            "dtype": str(served.policy.head_weight.dtype),
            "logprobs_mode": "processed_logprobs",  # after temperature and top-p
            "sampling_mask": return_sampling_mask,  # vLLM's flag would mean that top_k must be given
        }
        return {"vllm_config": {"model_config": model, "scheduler_config": {"max_num_seqs": served.engine.max_batch}}}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        def card(name: str, root: str, parent: str | None, length: int | None) -> dict[str, Any]:
            made = {"id": name, "object": "model", "created": started, "owned_by": "genevolve-fast"}
            return {**made, "root": root, "parent": parent, "max_model_len": length}

        base = card(served.name, served.name, None, served.max_model_len)
        adapters = [card(name, folder, served.name, None) for name, folder in served.adapters.items()]
        return {"object": "list", "data": [base, *adapters]}

    # --- pause and sleep ----------------------------------------------------------------------------------------------

    @app.post("/pause")
    async def pause(mode: Mode = "abort", clear_cache: bool = True) -> dict[str, str]:
        await served.pause(mode, clear_cache)
        return {"status": "paused"}

    @app.post("/resume")
    async def resume() -> dict[str, str]:
        served.resume()
        return {"status": "resumed"}

    @app.get("/is_paused")
    async def is_paused() -> dict[str, bool]:
        return {"is_paused": served.is_paused}

    @app.post("/sleep")
    async def sleep(level: Level = 1, mode: Mode = "abort") -> dict[str, Any]:
        await served.sleep(level, mode)
        return {"status": "sleeping", "level": level}

    @app.post("/wake_up")
    async def wake_up(raw: Request) -> dict[str, Any]:
        tags = raw.query_params.getlist("tags") or None
        awake = await served.wake_up(tags, device)
        return {"status": "awake" if awake else "sleeping", "tags": tags}

    @app.get("/is_sleeping")
    async def is_sleeping() -> dict[str, bool]:
        return {"is_sleeping": served.is_paused}

    @app.post("/abort_requests")
    async def abort_requests(request: AbortRequest) -> dict[str, Any]:
        return {"status": "aborted", "aborted": served.abort(request.request_ids or None)}

    @app.post("/inference/v1/abort_requests")
    async def abort_named(request: AbortRequest) -> Response:
        if request.request_ids is None:
            raise RequestError("Missing 'request_ids' in request body", param="request_ids")
        served.abort(request.request_ids)
        return Response(status_code=200)

    # --- weights ------------------------------------------------------------------------------------------------------

    @app.post("/collective_rpc")
    async def collective_rpc(request: Rpc) -> dict[str, Any]:
        path = request.kwargs.get("weights_path")
        if request.method != "reload_weights" or request.args or list(request.kwargs) != ["weights_path"]:
            raise RequestError('method: only "reload_weights" with kwargs {"weights_path": folder}', param="method")
        await served.reload(str(path))
        return {"results": [None]}

    @app.post("/weight_checker")
    async def weight_checker(request: WeightCheck) -> dict[str, Any]:
        if request.action == "reset":
            await served.reset_weights()
            return {"status": "reset"}
        if request.action == "compare" and request.baseline is None:
            raise RequestError("action='compare' requires a 'baseline' object", param="baseline")
        found = await served.checksums()
        if request.action == "checksum":
            return {"checksums": found}
        names = found.keys() | (request.baseline or {}).keys()
        mismatches = sorted(n for n in names if found.get(n) != (request.baseline or {}).get(n))
        return {"match": not mismatches, "mismatches": mismatches}

    @app.get("/weight_info")
    async def weight_info() -> dict[str, str]:
        return {"weight_version": served.version}

    @app.post("/update_weight_version")
    async def update_weight_version(request: NewVersion) -> dict[str, Any]:
        served.version = request.new_version
        return {"success": True, "new_version": served.version}

    @app.post("/reset_prefix_cache")
    async def reset_prefix_cache(reset_running_requests: bool = False) -> dict[str, bool]:
        return {"success": await served.reset_caches(reset_running_requests)}

    @app.post("/reset_mm_cache")
    @app.post("/reset_encoder_cache")
    async def reset_image_caches() -> Response:
        await served.reset_images()
        return Response(status_code=200)

    @app.post("/v1/load_lora_adapter")
    async def load_lora_adapter(request: LoadAdapter) -> Response:
        await served.load_adapter(request.lora_name, request.lora_path, request.load_inplace)
        return Response(f"Success: LoRA adapter '{request.lora_name}' added successfully.")

    @app.post("/v1/unload_lora_adapter")
    async def unload_lora_adapter(request: UnloadAdapter) -> Response:
        await served.unload_adapter(request.lora_name)
        return Response(f"Success: LoRA adapter '{request.lora_name}' removed successfully.")

    device = served.policy.device
    started = int(time.time())
    app.add_middleware(_BodyLimit, limit=max_request_bytes)
    if api_key is not None:  # added last, asked first
        app.add_middleware(BearerKey, key=api_key, open_paths=OPEN_PATHS, refuse=_unauthorized)
    return app


def _unauthorized() -> JSONResponse:
    return JSONResponse(RequestError("Unauthorized", 401, "AuthenticationError").body(), 401)


class _BodyLimit:
    """Answers 413 to a body of more than `limit` bytes, declared or sent."""

    def __init__(self, app, limit: int) -> None:
        self.app, self.limit = app, limit

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        more = True
        too_large = int(dict(scope["headers"]).get(b"content-length", b"0") or 0) > self.limit
        parts = []
        size = 0
        while more and not too_large:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            more = message.get("more_body", False)
            too_large = size > self.limit
        if too_large:
            error = RequestError(f"the body is larger than {self.limit} bytes", 413, "RequestEntityTooLarge")
            return await JSONResponse(error.body(), 413)(scope, receive, send)
        pending = [{"type": "http.request", "body": b"".join(parts), "more_body": False}]

        async def replay():
            return pending.pop() if pending else await receive()

        return await self.app(scope, replay, send)


async def _while_connected(raw: Request, work: Awaitable[T]) -> T:
    """Raises RequestError where the client is gone, or the server about to be."""
    try:
        return await while_connected(raw, work)
    except ClientGoneError:
        raise RequestError("Client disconnected", 499) from None
    except asyncio.CancelledError:  # the time for calls to finish is over
        raise unavailable("The server is ending. Please retry on another one.") from None


def _session(raw: Request, salt: str | None) -> str | None:
    session = raw.headers.get("x-session-id")
    return f"{salt}\x00{session}" if session and salt else session


def _request_id(raw: Request, given: str | None) -> str:
    return raw.headers.get("x-request-id") or given or uuid.uuid4().hex


def _usage(prompt: int, made: SampledTurn) -> dict[str, Any]:
    completion, cached = len(made.ids), {"cached_tokens": made.cached}
    total = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    return {**total, "prompt_tokens_details": cached}


def _stop_reason(made: SampledTurn, eos: Sequence[int], ignore_eos: bool) -> int | None:
    """The stop id that ended the turn; None where it was the model's own end."""
    if made.finish_reason != "stop" or (made.ids[-1] in eos and not ignore_eos):
        return None
    return made.ids[-1]


def _spans(made: SampledTurn) -> list[dict[str, Any]]:
    """Which weights sampled which tokens, as {"version", "start", "end"}."""
    bounds = [start for _, start in made.versions] + [len(made.ids)]
    versions = [str(version) for version, _ in made.versions]
    return [{"version": v, "start": a, "end": b} for v, a, b in zip(versions, bounds, bounds[1:], strict=False)]


def _token_logprobs(made: SampledTurn) -> list[dict[str, Any]]:
    pairs = zip(made.ids, made.logps, strict=True)
    entries = [{"token_id": t, "logprob": p, "rank": None} for t, p in pairs]
    return [{**e, "top_logprobs": [e]} for e in entries]


def _chat_logprobs(made: SampledTurn, codec) -> list[dict[str, Any]]:
    found = []
    for token, logprob in zip(made.ids, made.logps, strict=True):
        text = codec.decode([token])
        found.append({"token": text, "logprob": logprob, "bytes": list(text.encode()), "top_logprobs": []})
    return found


def _completion_logprobs(made: SampledTurn, codec) -> dict[str, Any]:
    tokens = [codec.decode([t]) for t in made.ids]
    offsets = [sum(map(len, tokens[:i])) for i in range(len(tokens))]
    return {"tokens": tokens, "token_logprobs": made.logps, "text_offset": offsets, "top_logprobs": []}


# --- the process ------------------------------------------------------------------------------------------------------


class _Announced(uvicorn.Server):
    """Says on stdout where it listens, once it does."""

    async def startup(self, sockets=None) -> None:
        await super().startup(sockets)
        for server in self.servers:
            for listening in server.sockets:
                host, port = listening.getsockname()[:2]
                print(json.dumps({"ready": f"http://{host}:{port}", "pid": os.getpid()}), flush=True)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m genevolve_fast.rollout.server", description=__doc__)
    p.add_argument("--model", required=True, help="folder of a policy, a hub name, or sandbox:start")
    p.add_argument("--served-model-name", help="name that requests use (default: --model as given)")
    p.add_argument("--host", default="127.0.0.1")
    p.add_argument("--port", type=int, default=8000, help="0: any free one, see the ready line (default: %(default)s)")
    p.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    p.add_argument("--max-batch", type=int, default=64, help="rows in flight (default: %(default)s)")
    p.add_argument("--max-model-len", type=int, help="prompt and reply (default: what the model was made for)")
    p.add_argument("--max-sessions", type=int, default=1024, help="sessions whose cache is kept (default: %(default)s)")
    p.add_argument("--cache-gb", type=float, default=4.0, help="memory for these caches (default: %(default)s)")
    p.add_argument("--max-request-mb", type=float, default=256.0, help="largest body (default: %(default)s)")
    p.add_argument("--threads", type=int, help="CPU threads of torch")
    p.add_argument("--api-key-env", metavar="NAME", help="environment variable with the key that requests must bring")
    p.add_argument("--insecure", action="store_true", help="listen beyond this machine without a key")
    p.add_argument("--return-sampling-mask", action="store_true", help="return the ids that top-p kept")
    p.add_argument("--keep-caches-over-updates", action="store_true", help=argparse.SUPPRESS)  # to test clients
    return p


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    key = os.environ.get(args.api_key_env) if args.api_key_env else None
    if args.api_key_env and not key:
        return _refuse(f"--api-key-env {args.api_key_env}: the environment has no such variable, or it is empty")
    if args.host not in LOOPBACK and not (key or args.insecure):
        return _refuse(f"--host {args.host} is reachable from elsewhere: set --api-key-env, or say --insecure")
    if taken := _cannot_listen(args.host, args.port):  # before the weights are loaded
        return _refuse(f"--host {args.host} --port {args.port}: {taken}; port 0 takes any free one")
    import torch

    from genevolve_fast.policy.model import Policy

    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, args.dtype) if args.dtype != "auto" else _own_dtype(device)
    try:
        policy = Policy.from_pretrained(_folder(args.model), dtype).to(device).eval()
    except FileNotFoundError as error:
        return _refuse(f"--model: {error}")
    served = ServedPolicy(
        policy,
        args.served_model_name or args.model,
        max_batch=args.max_batch,
        max_model_len=args.max_model_len,
        max_sessions=args.max_sessions,
        cache_bytes=int(args.cache_gb * 2**30),
        keep_caches=args.keep_caches_over_updates,
    )
    app = build_app(
        served,
        api_key=key,
        return_sampling_mask=args.return_sampling_mask,
        max_request_bytes=int(args.max_request_mb * 2**20),
    )
    config = uvicorn.Config(
        app, args.host, args.port, log_level="warning", timeout_graceful_shutdown=5, timeout_keep_alive=75
    )
    signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn ends well, then raises the signal again
    _Announced(config).run()
    return 0


def _folder(model: str) -> str:
    """Where the weights are; the sandbox's start lies in the package and is not imported for it."""
    return str(resources.files("genevolve_fast") / "sandbox" / "start") if model == "sandbox:start" else model


def _cannot_listen(host: str, port: int) -> str:
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        return str(error.strerror or error).split(" (")[0]
    return ""


def _own_dtype(device):
    import torch

    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _refuse(reason: str) -> int:
    print(reason, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
