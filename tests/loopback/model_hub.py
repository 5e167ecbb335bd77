"""A model hub on loopback that takes uploads, for the real `huggingface_hub`: small files in the commit, others by LFS.

`python -m tests.loopback.model_hub --port P --folder DIR --token TOKEN` keeps OWNER/NAME in DIR/OWNER/NAME. Cards are
checked as the hub's own documentation says: what it reads of them must be of the right form.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
from pathlib import Path

from fastapi import FastAPI, HTTPException, Request, Response

from tests.loopback.hub import LoopbackHub

SMALL = 1 << 20  # bytes of a file that goes into the commit itself


def build(folder: Path, token: str) -> FastAPI:
    app = FastAPI()
    objects = folder / ".lfs"
    objects.mkdir(parents=True)

    @app.middleware("http")
    async def known(request: Request, answer):
        allowed = request.headers.get("authorization") == f"Bearer {token}" or request.url.path.startswith("/lfs/")
        if request.url.path == "/health" or allowed:
            return await answer(request)
        return Response(json.dumps({"error": "Invalid username or password."}), status_code=401)

    @app.get("/health")
    def health():
        return {}

    @app.post("/api/repos/create")
    async def create(request: Request):
        body = await request.json()
        place = folder / body["organization"] / body["name"] if body.get("organization") else folder / body["name"]
        if place.exists():
            raise HTTPException(409, "You already created this model repo")
        place.mkdir(parents=True)
        (place / ".private").write_text(body.get("visibility") or ("private" if body.get("private") else "public"))
        name = place.relative_to(folder).as_posix()
        return {"url": f"{str(request.base_url).rstrip('/')}/{name}", "id": name, "name": name}

    @app.post("/api/validate-yaml")
    async def validate(request: Request):
        import yaml

        content = (await request.json())["content"]
        told = yaml.safe_load(content.split("---\n")[1])
        wrong = [
            k for k in ("license", "pipeline_tag", "library_name", "base_model") if not isinstance(told.get(k, ""), str)
        ]
        wrong += [k for k in ("tags", "datasets") if not isinstance(told.get(k, []), list)]
        return {"errors": [{"message": f"{k} has a wrong form"} for k in wrong], "warnings": []}

    @app.post("/api/models/{owner}/{name}/preupload/{revision}")
    async def preupload(owner: str, name: str, request: Request):
        there(owner, name)
        files = (await request.json())["files"]
        modes = [{"path": f["path"], "uploadMode": "lfs" if f["size"] > SMALL else "regular"} for f in files]
        return {"files": [m | {"shouldIgnore": False} for m in modes]}

    @app.post("/{owner}/{name}.git/info/lfs/objects/batch")
    async def batch(owner: str, name: str, request: Request):
        there(owner, name)
        made = []
        for each in (await request.json())["objects"]:
            action = {"upload": {"href": f"{str(request.base_url).rstrip('/')}/lfs/{each['oid']}", "header": {}}}
            made.append({"oid": each["oid"], "size": each["size"], "authenticated": True, "actions": action})
        return {"transfer": "basic", "objects": made}

    @app.put("/lfs/{oid}")
    async def put(oid: str, request: Request):
        data = await request.body()
        if hashlib.sha256(data).hexdigest() != oid:
            raise HTTPException(400, "not the bytes that were announced")
        (objects / oid).write_bytes(data)
        return Response()

    @app.post("/api/models/{owner}/{name}/commit/{revision}")
    async def commit(owner: str, name: str, request: Request):
        place = there(owner, name)
        for line in (await request.body()).decode().splitlines():
            row = json.loads(line)
            value = row["value"]
            if row["key"] == "file":
                (place / value["path"]).write_bytes(base64.b64decode(value["content"]))
            elif row["key"] == "lfsFile":
                (place / value["path"]).write_bytes((objects / value["oid"]).read_bytes())
        return {"commitOid": "1" * 40, "commitUrl": f"{request.base_url}{owner}/{name}/commit/1", "hookOutput": ""}

    @app.get("/api/models/{owner}/{name}")
    @app.get("/api/models/{owner}/{name}/revision/{revision}")
    def info(owner: str, name: str, revision: str = "main"):
        files = [{"rfilename": p.name} for p in there(owner, name).iterdir()]
        return {"_id": "1", "id": f"{owner}/{name}", "sha": "1" * 40, "siblings": files, "private": False, "tags": []}

    def there(owner: str, name: str) -> Path:
        place = folder / owner / name
        if not place.is_dir():
            raise HTTPException(404, headers={"X-Error-Code": "RepoNotFound"})
        return place

    return app


class LoopbackModelHub(LoopbackHub):
    token = "hf_loopback"
    module = "tests.loopback.model_hub"
    flags = ("--token", token)
    patience_s = 60


if __name__ == "__main__":
    import uvicorn

    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--token", required=True)
    args = parser.parse_args()
    app = build(args.folder, args.token)
    uvicorn.run(app, host="127.0.0.1", port=args.port, log_level="warning", ws="none")
