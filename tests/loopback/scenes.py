"""A chat server that reads, plans, corrects and looks at scenes of strokes, with faults on demand.

`python -m tests.loopback.scenes --port P` answers POST /v1/chat/completions as OpenAI-compatible servers do, by the
rules of the sandbox, in the JSON that process/chat_workshop.py asks for; POST /faults with a list of faults, one for
each of the next calls ({} for a good answer): {"status": 429} or {"spoil": "fenced" | "trailing" | "prose" | "cut" |
"twice", "text": any}; GET /seen for what was asked; POST /generate, the released rendering service's contract.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
from collections import Counter, deque

from starlette.requests import Request

from tests.loopback.chat import LoopbackChat

SPOILT = {
    "fenced": lambda r: f"```json\n{r}\n```",
    "trailing": lambda r: r[:-1] + ",}",
    "prose": lambda r: f"Here it is:\n{r}\nAnything else?",
    "cut": lambda r: r[: len(r) // 2],
    "twice": lambda r: f'{r}\n{r[:-1]}, "again": 1}}',
}


def answer(system: str, told: dict, picture) -> dict:
    from genevolve_fast.process.author import GraphAuthor, edit
    from genevolve_fast.process.chat_workshop import CORRECT, LOOK, PLAN, READ
    from genevolve_fast.process.scene_graph import SceneGraph
    from genevolve_fast.sandbox.strokes import SIZE, UnreadableText, look, parse

    if system == READ:
        try:
            return parse(told["text"].partition(", then ")[0]).to_json()
        except UnreadableText:
            return {"objects": [], "relations": []}
    if system == PLAN:
        before, after = (SceneGraph.from_json(told[k]) for k in ("there", "after the step"))
        plan = asyncio.run(GraphAuthor().plan("", before, after))
        return {"instruction": plan.instruction, "description": plan.description}
    if system == CORRECT:
        wrong, right = (SceneGraph.from_json(told[k]) for k in ("is", "should be"))
        return {"correction": edit(wrong, right) or "draw it again"}
    assert system == LOOK
    sight, rows = look(picture), []
    for f in sight.figures:
        attributes = {k: f.attributes[k] for k in told["attributes"] if k in f.attributes}
        rows.append({"name": f.name, "attributes": attributes, "box": [x / SIZE for x in f.box]})
    return {"objects": rows, "unclear": "a smear" if sight.unread else ""}


def build():
    import numpy as np
    from fastapi import FastAPI
    from fastapi.responses import JSONResponse
    from PIL import Image

    faults: deque[dict] = deque()
    seen: Counter[str] = Counter()
    app = FastAPI()

    @app.get("/health")
    def health():
        return {}

    @app.post("/faults")
    async def plan(request: Request):
        faults.clear()
        faults.extend(await request.json())
        seen.clear()
        return {}

    @app.get("/seen")
    def shown():
        return seen

    @app.post("/generate")
    async def generate(request: Request):
        from genevolve_fast.net.pictures import png_bytes
        from genevolve_fast.sandbox.stroke_data import StrokeRenderer
        from genevolve_fast.trajectory import Program

        body = await request.json()
        seen["pictures"] += 1
        before = [picture_of(url) for url in body.get("image_urls") or []]
        drawn = await StrokeRenderer().render(Program(body["prompt"]), before, body["seed"])
        return {"success": True, "image": base64.b64encode(png_bytes(drawn)).decode()}

    def picture_of(url: str):
        data = base64.b64decode(url.partition(",")[2])
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))

    @app.post("/v1/chat/completions")
    async def chat(request: Request):
        body = await request.json()
        fault = faults.popleft() if faults else {}
        form = body.get("response_format", {}).get("json_schema", {}).get("name", "no form")
        seen[form] += 1
        if "status" in fault:
            return JSONResponse({"error": {"message": "the fault you asked for"}}, fault["status"])
        system, content = (m["content"] for m in body["messages"][:2])
        picture = None
        if not isinstance(content, str):
            picture = picture_of(content[1]["image_url"]["url"])
            content = content[0]["text"]
        said = await asyncio.to_thread(answer, system, json.loads(content), picture)
        text = fault.get("text") or SPOILT.get(fault.get("spoil"), str)(json.dumps(said))
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        head = {"id": "scenes", "object": "chat.completion", "created": 0, "model": body["model"]}
        return head | {"choices": [choice], "usage": usage}

    return app


class LoopbackScenes(LoopbackChat):
    """The server as a process on a free port."""

    module = "tests.loopback.scenes"


if __name__ == "__main__":
    import uvicorn

    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    uvicorn.run(build(), host="127.0.0.1", port=parser.parse_args().port, log_level="warning", ws="none")
