"""Rendering services on loopback that draw with the sandbox's canvas, with every fault of them.

`python -m tests.loopback.canvas_service --port 8098`:

    POST /generate                                    the released service's contract
    POST /v1beta/models/{model}:generateContent       the Gemini API's
    POST /v1/chat/completions                         a judge that gives every picture the same scores
    any of them                                       faults by POST /control/fault, see FAULTS below and in web.py
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import os
import re
import struct
import sys
import zlib
from collections import Counter

from fastapi import FastAPI, Request, Response

from . import web
from .web import LoopbackWeb, png

GENERATE = "/generate"
MODEL = "gemini-3-pro-image-preview"
GEMINI = f"/v1beta/models/{MODEL}:generateContent"
SCORES = {"faithfulness": 1, "visual_correctness": 0.5, "text_accuracy": 0.5, "aesthetics": 0.5}


def make_app():
    app = FastAPI()
    seen: Counter[str] = Counter()
    active: Counter[str] = Counter()
    peak: Counter[str] = Counter()
    faults: dict[str, list] = {}  # path -> [fault, how often still, None for ever]
    files: dict[str, bytes] = {}
    asked: list[dict] = []

    @app.middleware("http")
    async def misbehave(request: Request, answer):
        path = request.url.path
        if path.startswith("/control") or path == "/health":
            return await answer(request)
        seen[path] += 1
        active[path] += 1
        peak[path] = max(peak[path], active[path])
        try:
            body = await request.body()
            asked.append({"path": path, "headers": dict(request.headers), "body": body.decode("utf-8", "replace")})
            entry = faults.get(path)
            if entry and entry[1] != 0:
                entry[1] = entry[1] if entry[1] is None else entry[1] - 1
                kind, _, argument = entry[0].partition(":")
                made = FAULTS[kind](path, argument, files) if kind in FAULTS else await web.FAULTS[kind](argument)
                if made is not None:
                    return made
            return await answer(request)
        finally:
            active[path] -= 1

    @app.post(GENERATE)
    async def generate(request: Request):
        body = await request.json()
        pictures = [base64.b64decode(url.partition(",")[2]) for url in body["image_urls"]]
        drawn = await asyncio.to_thread(draw, body["prompt"], pictures, body["seed"])
        return {"success": True, "image": base64.b64encode(drawn).decode()}

    @app.post("/v1beta/models/{model}:generateContent")
    async def generate_content(request: Request):
        body = await request.json()
        parts = body["contents"][0]["parts"]
        prompt = " ".join(part["text"] for part in parts if "text" in part)
        pictures = [base64.b64decode(part["inline_data"]["data"]) for part in parts if "inline_data" in part]
        seed = body.get("generationConfig", {}).get("seed", 0)
        drawn = await asyncio.to_thread(draw, prompt, pictures, seed)
        return gemini_answer([{"text": "Here it is."}, inline(drawn)])

    @app.post("/v1/chat/completions")
    async def judge(request: Request):
        body = await request.json()
        images = sum(part["type"] == "image_url" for m in body["messages"] for part in _parts(m["content"]))
        text = json.dumps({"rationale": f"{images} images"} | SCORES | {"text_accuracy_na": images != 2})
        message = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        return {"id": "x", "object": "chat.completion", "created": 0, "model": body["model"], "choices": [message]}

    @app.get("/health")
    async def health():
        return {"status": "healthy"}

    @app.get("/control/log")
    async def log():
        return {"seen": dict(seen), "peak": dict(peak), "asked": asked[-50:]}

    @app.post("/control/fault")
    async def fault(request: Request):
        said = await request.json()
        faults[said["path"]] = [said["fault"], said.get("times")]
        return {}

    @app.post("/control/file")
    async def keep(request: Request):
        said = await request.json()
        files[said["name"]] = base64.b64decode(said["data"])
        return {}

    return app


def draw(prompt: str, pictures: list[bytes], seed: int) -> bytes:
    import io

    import numpy as np
    from PIL import Image

    from genevolve_fast.sandbox.canvas import draw_program

    pixels = [np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in pictures]
    return png(draw_program(prompt, pixels, seed))


def bomb() -> bytes:
    """A small PNG file of 2.5 gigapixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(1 << 20))) + chunk(b"IEND", b"")


def inline(data: bytes, **more) -> dict:
    return {"inlineData": {"mimeType": "image/png", "data": base64.b64encode(data).decode()}} | more


def gemini_answer(parts: list[dict], reason: str = "STOP") -> dict:
    return {"candidates": [{"content": {"role": "model", "parts": parts}, "finishReason": reason, "index": 0}]}


def _parts(content) -> list[dict]:
    return content if isinstance(content, list) else []


# --- faults: (path, argument, files) -> response ----------------------------------------------------------------------


def _json(value, status: int = 200) -> Response:
    return Response(json.dumps(value), status, media_type="application/json")


def _with(path: str, text: object) -> Response:
    """An answer of the path's contract that has `text` where the picture's base64 belongs."""
    if path == GENERATE:
        return _json({"success": True, "image": text})
    return _json(gemini_answer([{"inlineData": {"mimeType": "image/png", "data": text}}]))


def failed(path: str, argument: str, files) -> Response:
    """failed:REASON, with status 200 as the released service has it"""
    if path == GENERATE:
        return _json({"success": False, "message": f"Inference failed: {argument}"})
    return _json({"error": {"code": 500, "message": argument, "status": "INTERNAL"}})


def error(path: str, argument: str, files) -> Response:
    """error:STATUS,MESSAGE"""
    status, _, message = argument.partition(",")
    return _json({"detail": message} if path == GENERATE else {"error": {"message": message}}, int(status))


FAULTS = {
    "failed": failed,
    "error": error,
    "picture": lambda path, name, files: _with(path, base64.b64encode(files[name]).decode()),
    "raw": lambda path, name, files: Response(files[name], media_type="application/json"),
    "bomb": lambda path, argument, files: _with(path, base64.b64encode(bomb()).decode()),
    "not_base64": lambda path, argument, files: _with(path, "not base64!"),
    "number": lambda path, argument, files: _with(path, 7),
    "cut": lambda path, argument, files: Response(b'{"success": true, "image": "iVBORw0K', media_type="text/plain"),
    "html": lambda path, argument, files: Response("<html>Bad gateway</html>", media_type="text/html"),
    "deep": lambda path, argument, files: Response(b"[" * 200_000, media_type="application/json"),
    "list": lambda path, argument, files: _json([1]),
    "reason": lambda path, argument, files: _json(gemini_answer([], argument)),
    "blocked": lambda path, argument, files: _json(
        {"promptFeedback": {"blockReason": argument or "SAFETY", "blockReasonMessage": "it breaks a rule"}}
    ),
    "text": lambda path, argument, files: _json(gemini_answer([{"text": argument}], "NO_IMAGE")),
    "busy": lambda path, argument, files: _json(
        {"error": {"message": "quota", "details": [{"retryDelay": f"{argument}s"}]}}, 429
    ),
    "thought": lambda path, name, files: _json(
        gemini_answer([inline(png(_grey()), thought=True), inline(files[name]), {"text": "done"}])
    ),
}


def _grey():
    import numpy as np

    return np.full((8, 8, 3), 90, np.uint8)


# --- running it -------------------------------------------------------------------------------------------------------


class LoopbackCanvas(LoopbackWeb):
    """The server in a process of its own, which can be killed and started again on the same port."""

    def __init__(self, port: int | None = None) -> None:
        super().__init__(port)
        self.gemini = f"{self.url}/v1beta"
        self._command = [sys.executable, "-m", "tests.loopback.canvas_service", f"--port={self.port}"]
        self._command += [f"--parent={os.getpid()}"]

    def calls(self) -> int:
        """Pictures asked for since the start of the process."""
        return sum(n for path, n in self.seen().items() if re.search("generate", path))

    def asked(self) -> list[dict]:
        """path, headers and body of the last requests."""
        return self.get("/control/log")["asked"]


def main() -> None:
    import uvicorn

    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--port", type=int, default=8098)
    p.add_argument("--parent", type=int, default=0, help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.parent:
        web._end_with(args.parent)
    uvicorn.run(make_app(), host="127.0.0.1", port=args.port, log_level="critical", access_log=False)


if __name__ == "__main__":
    main()
