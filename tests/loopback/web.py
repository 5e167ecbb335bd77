"""A small web on loopback: Serper, SearXNG and a custom search over one corpus, an image host, and every fault of them.

`python -m tests.loopback.web --port 8099 --latency-ms 200` serves the sandbox's documents and pictures:

    POST /search, /images                     Serper, body {"q", "num"}
    GET  /searxng/search?q=&format=json&categories=general|images
    GET  /find?q=&n=                          {"data": {"items": [{"name", "href", "text", "pic", "page"}]}}
    GET  /img/7.png                           a picture of the corpus
    GET  /file/{name}                         bytes given to POST /control/file
    any  ?fault=NAME (see FAULTS)             or set for a path by POST /control/fault
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import gzip
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from functools import lru_cache
from pathlib import Path

from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse

ROOT = Path(__file__).parents[2]
MARKED_LENGTH = "1000000000000"


# --- the server -------------------------------------------------------------------------------------------------------


def make_app(latency_s: float = 0.0, corpus: str = "sandbox", image_host: str = ""):
    documents, pictures, best_documents, best_pictures = load_corpus(corpus)
    app = FastAPI()
    seen: Counter[str] = Counter()
    active: Counter[str] = Counter()  # requests under way by first part of the path
    peak: Counter[str] = Counter()
    latency = [latency_s]
    faults: dict[str, list] = {}  # path -> [fault, how often still, None for ever]
    files: dict[str, tuple[bytes, str]] = {}
    keys: list[str] = []

    @app.middleware("http")
    async def misbehave(request: Request, answer):
        path = request.url.path
        if path.startswith("/control") or path == "/health":
            return await answer(request)
        seen[path] += 1
        part = path.split("/")[1]
        active[part] += 1
        peak[part] = max(peak[part], active[part])
        try:
            if latency[0]:
                await asyncio.sleep(latency[0])
            return await faulty(path, request, answer)
        finally:
            active[part] -= 1

    async def faulty(path: str, request: Request, answer):
        name = request.query_params.get("fault")
        if not name and (entry := faults.get(path)) and entry[1] != 0:
            name = entry[0]
            entry[1] = entry[1] if entry[1] is None else entry[1] - 1
        if not name:
            return await answer(request)
        kind, _, argument = name.partition(":")
        return await FAULTS[kind](argument) or await answer(request)

    def picture_url(request: Request, i: int) -> str:
        return f"{image_host or f'http://{request.url.netloc}'}/img/{i}.png"

    @app.post("/search")
    async def search(request: Request):
        asked = await request.json()
        keys.append(request.headers.get("x-api-key", ""))
        found = [documents[i] for i in best_documents(asked["q"], int(asked["num"]))]
        rows = [{"title": d["title"], "link": d["url"], "snippet": d["text"]} for d in found]
        return {"searchParameters": asked, "organic": [r | {"position": n} for n, r in enumerate(rows, 1)]}

    @app.post("/images")
    async def images(request: Request):
        asked = await request.json()
        keys.append(request.headers.get("x-api-key", ""))
        return {
            "images": [
                {"title": pictures[i][0], "imageUrl": picture_url(request, i), "link": ""}
                for i in await best_pictures(asked["q"], int(asked["num"]))
            ]
        }

    @app.get("/searxng/search")
    async def searxng(request: Request, q: str, format: str, categories: str):
        if format != "json":
            return Response(status_code=403)
        if categories == "images":
            return {
                "results": [
                    {"title": pictures[i][0], "img_src": picture_url(request, i), "url": ""}
                    for i in await best_pictures(q, 10)
                ]
            }
        found = [documents[i] for i in best_documents(q, 10)]
        return {"results": [{"title": d["title"], "url": d["url"], "content": d["text"]} for d in found]}

    @app.get("/find")
    async def find(request: Request, q: str, n: int, pics: bool = False, key: str = ""):
        keys.append(key)
        if pics:
            rows = [
                {"name": pictures[i][0], "pic": picture_url(request, i), "page": ""} for i in await best_pictures(q, n)
            ]
        else:
            found = [documents[i] for i in best_documents(q, n)]
            rows = [{"name": d["title"], "href": d["url"], "text": d["text"]} for d in found]
        return {"data": {"items": rows}}

    @app.get("/img/{name}")
    async def image(name: str):
        return Response(pictures[int(name.partition(".")[0])][1], media_type="image/png")

    @app.get("/file/{name}")
    async def file(name: str):
        data, kind = files[name]
        return Response(data, headers={"content-type": kind} if kind else None)

    @app.get("/health")
    async def health():
        return {"ok": True}

    @app.get("/control/log")
    async def log():
        return {"seen": dict(seen), "keys": keys[-100:], "peak": dict(peak)}

    @app.post("/control/fault")
    async def fault(request: Request):
        """{"path", "fault", "times"}: the next `times` requests of the path (null: all of them)."""
        asked = await request.json()
        faults[asked["path"]] = [asked["fault"], asked.get("times")]
        return {}

    @app.post("/control/latency")
    async def slow(request: Request):
        latency[0] = (await request.json())["ms"] / 1000
        return {}

    @app.post("/control/file")
    async def keep(request: Request):
        """{"name", "data" (base64), "type"}: GET /file/NAME; also the answer of the fault `file:NAME`."""
        asked = await request.json()
        files[asked["name"]] = base64.b64decode(asked["data"]), asked["type"]
        return {}

    async def from_file(name: str):
        return await file(name)

    app.state.files = files
    FAULTS["file"] = from_file
    return app


def load_corpus(corpus: str):
    """Documents, (title, PNG) pictures, and the functions that rank them; `corpus` is "sandbox" or a JSON file."""
    if corpus == "sandbox":
        from genevolve_fast.sandbox.search import MAX_TEXT_RESULTS, Index, SandboxImageSearch
        from genevolve_fast.sandbox.world import SandboxWorld

        world = SandboxWorld()
        documents = [{"title": d.title, "text": d.text, "url": ""} for d in world.documents]
        pictures = [(p.title, png(p.pixels)) for p in world.pictures]
        tool = SandboxImageSearch(world.pictures, world.config.seed)
        place = {p.title: i for i, p in enumerate(world.pictures)}
        index = Index([f"{d['title']} {d['text']}" for d in documents])

        async def best_pictures(query: str, k: int) -> list[int]:
            return [place[found.title] for found in (await tool({"query": query or "?"})).images][:k]

        return documents, pictures, lambda query, k: index.best(query, min(k, MAX_TEXT_RESULTS)), best_pictures

    from genevolve_fast.sandbox.search import Index

    data = json.loads(Path(corpus).read_text(encoding="utf-8"))
    documents = [{"title": "", "text": "", "url": ""} | d for d in data["documents"]]
    base = Path(corpus).parent
    pictures = [(p["title"], (base / p["path"]).read_bytes()) for p in data["pictures"]]
    index = Index([f"{d['title']} {d['text']}" for d in documents])
    titles = Index([title for title, _ in pictures])

    async def by_title(query: str, k: int) -> list[int]:
        return titles.best(query, k)

    return documents, pictures, index.best, by_title


def png(pixels) -> bytes:
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


# --- faults -----------------------------------------------------------------------------------------------------------


def _response(body: bytes = b"", status: int = 200, kind: str = "image/png", **headers: str):
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Response(body, status, headers=named, media_type=kind)


def _stream(chunks, kind: str = "image/png", **headers: str):
    return StreamingResponse(chunks, media_type=kind, headers={k.replace("_", "-"): v for k, v in headers.items()})


async def status(argument: str):
    """status:429 or status:429,3 (Retry-After: 3)"""
    code, _, after = argument.partition(",")
    return _response(b"no", int(code), "text/plain", **({"retry_after": after} if after else {}))


async def delay(argument: str) -> None:
    await asyncio.sleep(float(argument))


async def loris(argument: str):
    async def drip():
        yield b"\x89PNG\r\n\x1a\n"
        while True:
            await asyncio.sleep(0.05)
            yield b"\x00"

    return _stream(drip())


async def endless(argument: str):
    async def flood():
        while True:
            yield b"\x89PNG\r\n\x1a\n" + bytes(1 << 16)
            await asyncio.sleep(0)

    return _stream(flood(), argument or "image/png")


async def hangup(argument: str):
    async def half():
        yield b"\x89PNG\r\n\x1a\n"
        raise asyncio.CancelledError

    return _stream(half(), content_length="1000")


async def announced(argument: str):
    async def some():
        yield b"\x89PNG\r\n\x1a\n"
        await asyncio.sleep(30)

    return _stream(some(), content_length=MARKED_LENGTH)


async def redirect(argument: str):
    """redirect:URL, or redirect: without a Location"""
    return _response(status=302, **({"location": argument} if argument else {}))


async def loop(argument: str):
    n = int(argument or 0) + 1
    return _response(status=302, location=f"/img/0.png?fault=loop:{n}")


async def gzipped(argument: str):
    """gzip:MEGABYTES of zeros behind a PNG signature, compressed as a content encoding"""
    return _response(_gzipped(int(argument or 1)), content_encoding="gzip")


@lru_cache(maxsize=2)
def _gzipped(megabytes: int) -> bytes:
    return gzip.compress(b"\x89PNG\r\n\x1a\n" + bytes(megabytes << 20), 1)


async def encoded(argument: str):
    return _response(b"\x89PNG\r\n\x1a\n", content_encoding=argument)


async def typed(argument: str):
    return _response(b"<html>no</html>", kind=argument)


async def cookies(argument: str):
    response = _response(b"\x89PNG\r\n\x1a\n")
    for i in range(200):
        response.headers.append("set-cookie", f"c{i}={'x' * 100}")
    return response


FAULTS = {
    "status": status,
    "delay": delay,
    "loris": loris,
    "endless": endless,
    "hangup": hangup,
    "announced": announced,
    "redirect": redirect,
    "loop": loop,
    "gzip": gzipped,
    "encoded": encoded,
    "type": typed,
    "cookies": cookies,
}


# --- running it -------------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class LoopbackWeb:
    """The server in a process of its own, which can be killed and started again on the same port."""

    def __init__(
        self, port: int | None = None, latency_ms: float = 0, corpus: str = "sandbox", image_host: str = ""
    ) -> None:
        self.port = port or free_port()
        self.host = f"127.0.0.1:{self.port}"
        self.url = f"http://{self.host}"
        self._command = [sys.executable, "-m", "tests.loopback.web", f"--port={self.port}"]
        self._command += [f"--latency-ms={latency_ms}", f"--corpus={corpus}", f"--parent={os.getpid()}"]
        self._command += [f"--image-host={image_host}"] * bool(image_host)
        self._process: subprocess.Popen | None = None

    def start(self) -> LoopbackWeb:
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(self._command, cwd=ROOT, env=environment)
        for _ in range(600):
            if self._process.poll() is not None:
                raise RuntimeError(f"the loopback web ended with {self._process.returncode}")
            try:
                self.get("/health")
                return self
            except OSError:
                time.sleep(0.05)
        raise RuntimeError("the loopback web does not answer")

    def kill(self) -> None:
        """Without a good-bye, as a crash would."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            self._process = None

    def restart(self) -> None:
        self.kill()
        self.start()

    def __enter__(self) -> LoopbackWeb:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.kill()

    def get(self, path: str):
        with _direct.open(self.url + path, timeout=30) as answer:
            return json.loads(answer.read())

    def post(self, path: str, /, **body) -> None:
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}, method="POST"
        )
        _direct.open(request, timeout=30).close()

    def fault(self, path: str, fault: str, times: int | None = None) -> None:
        """Let `path` misbehave; times=0 ends it."""
        self.post("/control/fault", path=path, fault=fault, times=times)

    def latency(self, ms: float) -> None:
        self.post("/control/latency", ms=ms)

    def file(self, name: str, data: bytes, kind: str = "image/png") -> str:
        """The address under which `data` is served."""
        self.post("/control/file", name=name, data=base64.b64encode(data).decode(), type=kind)
        return f"{self.url}/file/{name}"

    def answer(self, path: str, body: bytes, kind: str = "application/json") -> None:
        """Let `path` answer `body`, whatever is asked."""
        self.file("answer", body, kind)
        self.fault(path, "file:answer")

    def seen(self) -> dict[str, int]:
        """Requests by path since the start of the process."""
        return self.get("/control/log")["seen"]

    def peak(self) -> dict[str, int]:
        """The most requests that were under way at once, by first part of the path."""
        return self.get("/control/log")["peak"]

    def keys(self) -> list[str]:
        """The API keys of the last requests."""
        return self.get("/control/log")["keys"]


_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def _end_with(parent: int) -> None:
    """Do not outlive the test that started this."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(0)

    import threading

    threading.Thread(target=watch, daemon=True).start()


def main() -> None:
    import uvicorn

    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--port", type=int, default=8099)
    p.add_argument("--latency-ms", type=float, default=0.0)
    p.add_argument("--corpus", default="sandbox", help="sandbox, or a JSON file of documents and pictures")
    p.add_argument("--image-host", default="", help="another server's address, for the pictures of search results")
    p.add_argument("--parent", type=int, default=0, help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.parent:
        _end_with(args.parent)
    app = make_app(args.latency_ms / 1000, args.corpus, args.image_host)
    uvicorn.run(app, host="127.0.0.1", port=args.port, log_level="critical", access_log=False)


if __name__ == "__main__":
    main()
