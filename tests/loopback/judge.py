"""A chat server that judges sandbox pictures and programs and compares rollouts by the sandbox's rules.

`python -m tests.loopback.judge --port 8098` answers POST /v1/chat/completions as OpenAI-compatible servers do: it
reads the data URLs, finds the request by its question among the sandbox's (a line of its own), draws the ground truth
itself, and replies in the JSON that reward/rubric.py and experience/summarizer.py ask for; the released evaluator's
messages it understands too. `--seed`, `--train` and `--bench` say which requests it knows.

    POST /control/fault  {"fault", "times", "share", "of"}: see FAULTS and SPOILT; `times` calls (null: all), of those a
                         share chosen by the hash of their messages, of image, program or comparison; "" ends it
    GET  /control/log    {"seen": calls by what they ask, "keys", "times", "last": bodies of the last calls}
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import hashlib
import io
import json
import os
import sys
import time
from collections import Counter, deque
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
from fastapi import FastAPI, Request, Response

from tests.loopback import web
from tests.loopback.web import LoopbackWeb, _end_with, free_port

BETTER, WORSE, PROGRAM = "\nBetter rollout:\n", "\nWorse rollout:\n", "\nProgram:\n"


# --- what it answers --------------------------------------------------------------------------------------------------


class Rules:
    """The sandbox's judges and comparer behind texts and pictures."""

    def __init__(self, seed: int = 0, train: int = 2000, bench: int = 200) -> None:
        from genevolve_fast.sandbox.world import SandboxWorld

        self.world = SandboxWorld()
        made = self.world.requests("train", train, seed) + self.world.requests("bench", bench)
        self.requests = {r.question: r for r in made}

    def answer(self, text: str, pictures: list[np.ndarray]) -> str:
        request = next((self.requests[line] for line in text.splitlines() if line in self.requests), None)
        if request is None:
            return "I do not know this request."
        judge = {"comparison": self.compared, "program": self.program_judged}.get(asked(text))
        return json.dumps(judge(request, text) if judge else self.image_judged(request, pictures[0]))

    def image_judged(self, request, picture: np.ndarray) -> dict:
        from genevolve_fast.sandbox.judges import judge_picture
        from genevolve_fast.sandbox.scene import Scene

        seen = judge_picture(Scene.from_json(request.extra["checklist"]), picture, self.world.truth(request))
        return {
            "rationale": "Constraints: those of the checklist.",
            "faithfulness": seen.faithfulness,
            "visual_correctness": seen.visual_correctness,
            "text_accuracy": seen.text_accuracy,
            "aesthetics": seen.aesthetics,
            "text_accuracy_na": not seen.text_required,
            "diagnostics": _rows(seen.diagnostics),
        }

    def program_judged(self, request, text: str) -> dict:
        from genevolve_fast.sandbox.judges import judge_program
        from genevolve_fast.sandbox.scene import Scene

        scene, entity = Scene.from_json(request.extra["checklist"]), str(request.extra["entity"])
        verdict = judge_program(scene, _program(_json_after(PROGRAM, text)), entity)
        return {"rationale": "By the checklist.", "score": verdict.score, "diagnostics": _rows(verdict.diagnostics)}

    def compared(self, request, text: str) -> dict:
        from genevolve_fast.protocols import EXPERIENCE_SLOTS
        from genevolve_fast.sandbox.comparer import RuleComparer

        better, worse = (_rollout(_json_after(mark, text)) for mark in (BETTER, WORSE))
        found = asyncio.run(RuleComparer().compare(request, better, worse))
        return {slot: getattr(found, slot) if found else "" for slot in EXPERIENCE_SLOTS}


def asked(text: str) -> str:
    """What a question asks for: image, program or comparison."""
    return "comparison" if BETTER in text else "program" if PROGRAM in text else "image"


def _rows(diagnostics) -> list[dict]:
    return [{k: v for k, v in asdict(d).items() if k != "judge"} for d in diagnostics]


def _json_after(mark: str, text: str) -> dict:
    return json.JSONDecoder().raw_decode(text, text.index(mark) + len(mark))[0]


def _program(written: dict | None):
    from genevolve_fast.trajectory import Program, Reference

    if not written:
        return None
    rows = enumerate(written["reference_images"], 1)
    references = (Reference(f"IMG_{i:03d}", note=row["note"], title=row["title"]) for i, row in rows)
    return Program(written["gen_prompt"], tuple(references))


def _rollout(shown: dict):
    """What the rule comparer reads of a rollout."""
    from genevolve_fast.trajectory import Diagnostic, Message

    calls = [{"name": c["tool"], "arguments": json.loads(c["arguments"])} for c in shown["calls"]]
    return SimpleNamespace(
        messages=[Message("assistant", f"<tool_call>{json.dumps(call)}</tool_call>") for call in calls],
        program=_program(shown["program"]),
        diagnostics=[Diagnostic(**row) for row in shown["noted"]],
    )


def _read(messages: list[dict]) -> tuple[str, list[np.ndarray]]:
    """(all text, the pictures) of the user's first message."""
    from PIL import Image

    content = next(m["content"] for m in messages if m["role"] == "user")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    text = "\n\n".join(p["text"] for p in parts if p["type"] == "text")
    urls = [p["image_url"]["url"] for p in parts if p["type"] == "image_url"]
    data = (base64.b64decode(url.partition(",")[2]) for url in urls)
    return text, [np.asarray(Image.open(io.BytesIO(d)).convert("RGB")) for d in data]


# --- faults -----------------------------------------------------------------------------------------------------------


def _changed(reply: str, **changes) -> str:
    """The reply with keys changed, a value of ... removing its key."""
    values = json.loads(reply) | changes
    return json.dumps({k: v for k, v in values.items() if v is not ...})


SPOILT = {  # what becomes of a good reply, and why the model stopped
    "cut": lambda r, n: (r[: int(n) if n else len(r) // 2], "length"),
    "empty": lambda r, _: ("", "stop"),
    "text": lambda r, text: (text, "stop"),
    "fenced": lambda r, _: (f"```json\n{r}\n```", "stop"),
    "prose": lambda r, _: (f"I looked at both. My verdict {{so far}}:\n{r}\nI hope this helps!", "stop"),
    "thought": lambda r, _: (f"<think>\nIs it {{1}}?\n</think>\n{r}", "stop"),
    "trailing": lambda r, _: (r[:-1] + ",}", "stop"),
    "twice": lambda r, _: (f"{r}\n{_changed(r, rationale='again')}", "stop"),
    "off_scale": lambda r, n: (
        _changed(r, **{key: float(n or 0.7) for key in ("faithfulness", "score") if key in r}),
        "stop",
    ),
    "missing": lambda r, key: (_changed(r, **{key: ...}), "stop"),
    "string_boolean": lambda r, _: (_changed(r, text_accuracy_na="false"), "stop"),
    "contradiction": lambda r, _: (_changed(r, text_accuracy_na=True, text_accuracy=1), "stop"),
    "nan": lambda r, _: (_changed(r, faithfulness=float("nan"), score=float("nan")), "stop"),
}


async def raw(argument: str) -> Response:
    """raw:BASE64, the body of the answer"""
    return Response(base64.b64decode(argument), media_type="application/json")


FAULTS = {"status": web.status, "delay": web.delay, "hangup": web.hangup, "raw": raw}


# --- the server -------------------------------------------------------------------------------------------------------


def make_app(rules: Rules, latency_s: float = 0.0) -> FastAPI:
    app = FastAPI()
    seen: Counter[str] = Counter()
    keys: deque[str] = deque(maxlen=100)
    last: deque[dict] = deque(maxlen=20)
    times: deque[float] = deque(maxlen=1000)
    plan = {"fault": "", "times": None, "share": 1.0, "of": None}
    flying = [0, 0]  # now, at most

    @app.get("/health")
    def health():
        return {}

    @app.get("/control/log")
    def log():
        return {"seen": seen, "keys": list(keys), "times": list(times), "peak": flying[1], "last": list(last)}

    @app.post("/control/fault")
    async def fault(request: Request):
        plan.update({"times": None, "share": 1.0, "of": None} | await request.json())
        return {}

    def due(what: str, messages: list[dict]) -> str:
        """The fault that this call meets, or ""."""
        if plan["times"] == 0 or plan["of"] not in (None, what):
            return ""
        digest = hashlib.sha256(json.dumps(messages, sort_keys=True).encode()).digest()
        if int.from_bytes(digest[:4], "big") >= plan["share"] * 2**32:
            return ""
        plan["times"] = plan["times"] if plan["times"] is None else plan["times"] - 1
        return plan["fault"]

    @app.post("/v1/chat/completions")
    async def chat(request: Request):
        times.append(time.monotonic())
        body = await request.json()
        keys.append(request.headers.get("authorization", ""))
        last.append(body)
        flying[0] += 1
        flying[1] = max(flying)
        try:
            await asyncio.sleep(latency_s)
            return await answered(body)
        finally:
            flying[0] -= 1

    async def answered(body: dict):
        text, pictures = _read(body["messages"])
        seen[asked(text)] += 1
        kind, _, argument = due(asked(text), body["messages"]).partition(":")
        if kind in FAULTS and (response := await FAULTS[kind](argument)) is not None:
            return response
        reply, reason = "", "stop"
        if kind not in ("text", "empty"):  # these need no verdict
            reply = await asyncio.to_thread(rules.answer, text, pictures)
        if kind in SPOILT:
            reply, reason = SPOILT[kind](reply, argument)
        prompt, sampled = len(json.dumps(body["messages"])) // 4, len(reply) // 4
        choice = {"index": 0, "message": {"role": "assistant", "content": reply}, "finish_reason": reason}
        usage = {"prompt_tokens": prompt, "completion_tokens": sampled, "total_tokens": prompt + sampled}
        head = {"id": "judge", "object": "chat.completion", "created": 0, "model": body["model"]}
        return Response(json.dumps(head | {"choices": [choice], "usage": usage}), media_type="application/json")

    return app


class LoopbackJudge(LoopbackWeb):
    """The server in a process of its own, which can be killed and started again on the same port."""

    def __init__(self, port: int | None = None, latency_ms: float = 0, seed: int = 0, train: int = 2000) -> None:
        self.port = port or free_port()
        self.host = f"127.0.0.1:{self.port}"
        self.url = f"http://{self.host}"
        self.base_url = f"{self.url}/v1"
        self._command = [sys.executable, "-m", "tests.loopback.judge", f"--port={self.port}", f"--seed={seed}"]
        self._command += [f"--latency-ms={latency_ms}", f"--train={train}", f"--parent={os.getpid()}"]
        self._process = None

    def fault(self, fault: str, times: int | None = None, share: float = 1.0, of: str | None = None) -> None:
        """What the next `times` calls meet (none: all), or a share of them; "" ends it."""
        self.post("/control/fault", fault=fault, times=times, share=share, of=of)

    def log(self) -> dict:
        return self.get("/control/log")

    def seen(self) -> dict[str, int]:
        """Calls by what they asked, since the start of the process."""
        return self.log()["seen"]


def main() -> None:
    import uvicorn

    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--port", type=int, default=8098)
    p.add_argument("--latency-ms", type=float, default=0.0)
    p.add_argument("--seed", type=int, default=0, help="of the training requests")
    p.add_argument("--train", type=int, default=2000)
    p.add_argument("--bench", type=int, default=200)
    p.add_argument("--parent", type=int, default=0, help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.parent:
        _end_with(args.parent)
    app = make_app(Rules(args.seed, args.train, args.bench), args.latency_ms / 1000)
    uvicorn.run(app, host="127.0.0.1", port=args.port, log_level="critical", access_log=False)


if __name__ == "__main__":
    main()
