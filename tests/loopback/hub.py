"""A dataset hub on loopback: one folder as the repository loopback/data, for the real `datasets` and `huggingface_hub`.

`python -m tests.loopback.hub --port P --folder DIR`
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import time
from pathlib import Path

from starlette.requests import Request

from tests.loopback.web import ROOT, free_port

REPOSITORY = "loopback/data"
SHA = "1" * 40


def build(folder: Path):
    from fastapi import FastAPI, HTTPException, Response
    from fastapi.responses import FileResponse

    app = FastAPI()
    files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    folders = sorted({parent.as_posix() for f in files for parent in Path(f).parents} - {"."})
    api = f"/api/datasets/{REPOSITORY}"

    def entry(name: str) -> dict:
        if name in folders:
            return {"type": "directory", "path": name, "oid": oid(name), "size": 0}
        return {"type": "file", "path": name, "oid": oid(name), "size": (folder / name).stat().st_size}

    def oid(name: str) -> str:
        content = (folder / name).read_bytes() if name in files else name.encode()
        return hashlib.sha1(content).hexdigest()

    @app.get("/health")
    def health():
        return {}

    @app.get(api)
    @app.get(api + "/revision/{revision}")
    def info(revision: str = "main"):
        siblings = [{"rfilename": name} for name in files]
        return {"_id": "1", "id": REPOSITORY, "sha": SHA, "siblings": siblings, "tags": [], "private": False,
                "gated": False, "downloads": 0, "likes": 0, "author": "loopback", "disabled": False}  # fmt: skip

    @app.get(api + "/tree/{revision}")
    @app.get(api + "/tree/{revision}/{path:path}")
    def tree(revision: str, path: str = "", recursive: bool = False):
        if path and path not in folders:
            raise HTTPException(404, headers={"X-Error-Code": "EntryNotFound"})
        begin = f"{path}/" if path else ""
        below = [name for name in [*folders, *files] if name.startswith(begin) and name != path]
        return [entry(name) for name in below if recursive or "/" not in name[len(begin) :]]

    @app.post(api + "/paths-info/{revision}")
    async def paths(revision: str, request: Request):
        if "json" in request.headers.get("content-type", ""):
            asked = (await request.json())["paths"]
        else:
            from urllib.parse import parse_qs

            asked = parse_qs((await request.body()).decode()).get("paths", [])
        return [entry(name) for name in asked if name in files or name in folders]

    @app.api_route("/datasets/" + REPOSITORY + "/resolve/{revision}/{path:path}", methods=["GET", "HEAD"])
    def resolve(revision: str, path: str, request: Request):
        if path not in files:
            raise HTTPException(404, headers={"X-Error-Code": "EntryNotFound"})
        headers = {"ETag": f'"{oid(path)}"', "X-Repo-Commit": SHA}
        if request.method == "HEAD":
            size = str((folder / path).stat().st_size)
            return Response(headers=headers | {"Content-Length": size, "Accept-Ranges": "bytes"})
        return FileResponse(folder / path, headers=headers)

    return app


class LoopbackHub:
    """The server as a process on a free port."""

    module = "tests.loopback.hub"
    flags: tuple[str, ...] = ()
    patience_s = 30

    def __init__(self, folder: Path) -> None:
        self.port, self.folder = free_port(), folder
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> LoopbackHub:
        import httpx

        command = [sys.executable, "-m", self.module, "--port", str(self.port), "--folder", str(self.folder)]
        self._process = subprocess.Popen([*command, *self.flags], cwd=ROOT)
        deadline = time.monotonic() + self.patience_s
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                httpx.get(f"{self.url}/health", timeout=5, trust_env=False, verify=False)
                return self
            except httpx.TransportError:
                time.sleep(0.05)
        raise RuntimeError("the hub did not start")

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()


if __name__ == "__main__":
    import uvicorn

    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    args = parser.parse_args()
    uvicorn.run(build(args.folder), host="127.0.0.1", port=args.port, log_level="warning", ws="none")
