"""A chat server process that answers as the sandbox's perfect demonstrator, with faults on demand.

`python -m tests.loopback.chat --port P`: POST /v1/chat/completions as OpenAI-compatible servers speak it; POST /faults
with a list of faults, one for each of the next calls ({} for a good answer); GET /seen for the last calls.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import deque
from pathlib import Path

from starlette.requests import Request

ROOT = Path(__file__).parents[2]


def build():
    from fastapi import FastAPI
    from fastapi.responses import JSONResponse, Response

    from genevolve_fast.sandbox.demonstrator import PerfectDemonstrator
    from genevolve_fast.sandbox.world import SandboxWorld
    from genevolve_fast.trajectory import Message

    world, demonstrator = SandboxWorld(), PerfectDemonstrator()
    known = {r.question: r for split in ("train", "bench") for r in world.requests(split, 60)}
    faults: deque[dict] = deque()
    seen: deque[dict] = deque(maxlen=200)
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
        return list(seen)

    @app.post("/v1/chat/completions")
    async def chat(request: Request):
        body = await request.json()
        fault = faults.popleft() if faults else {}
        seen.append({"key": request.headers.get("authorization"), "body": body, "at": time.monotonic()})
        await asyncio.sleep(fault.get("delay_s", 0))
        if "status" in fault:
            said = fault.get("message", "the fault you asked for").replace("KEY", request.headers["authorization"])
            headers = {"Retry-After": str(fault["retry_after"])} if "retry_after" in fault else {}
            return JSONResponse({"error": {"message": said}}, fault["status"], headers)
        if "raw" in fault:
            return Response(fault["raw"], media_type="application/json")
        messages = [Message(m["role"], text_of(m["content"])) for m in body["messages"]]
        asked = known.get(messages[1].content)
        text = fault.get("text") or (demonstrator.next_turn(asked, messages, 0) if asked else "What is this?")
        prompt, sampled = sum(len(m.content) for m in messages) // 4, len(text) // 4
        message = split(text) if fault.get("split") else {"content": text}
        answer = {
            "id": "chat",
            "object": "chat.completion",
            "created": 0,
            "model": body["model"],
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant"} | message,
                    "finish_reason": fault.get("finish_reason", "stop"),
                }
            ],
        }
        usage = {"prompt_tokens": prompt, "completion_tokens": sampled, "total_tokens": prompt + sampled}
        return answer if fault.get("no_usage") else answer | {"usage": usage}

    return app


def split(text: str) -> dict:
    """A reply as servers with parsers send it: thought and call taken out."""
    thought = re.search(r"<think>\n(.*?)\n</think>", text, re.DOTALL)
    call = re.search(r"<tool_call>\n(.*?)\n</tool_call>", text, re.DOTALL)
    if not call:
        return {"content": text.partition("</think>\n")[2], "reasoning": thought[1]}
    made = json.loads(call[1])
    function = {"name": made["name"], "arguments": json.dumps(made["arguments"])}
    return {
        "content": "",
        "reasoning_content": thought[1],
        "tool_calls": [{"id": "0", "type": "function", "function": function}],
    }


def text_of(content) -> str:
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


class LoopbackChat:
    """The server as a process on a free port; it can be killed and started again on the same port."""

    module = "tests.loopback.chat"

    def __init__(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}"
        self.url = f"{self.address}/v1"
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - as long as the process
        self._process: subprocess.Popen | None = None

    def start(self, wait_s: float = 30.0) -> LoopbackChat:
        import httpx

        command = [sys.executable, "-m", self.module, "--port", str(self.port)]
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        self._process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, stdout=self._log, stderr=self._log
        )
        deadline = time.monotonic() + wait_s
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                httpx.get(f"{self.address}/health", timeout=5, trust_env=False, verify=False)
                return self
            except httpx.TransportError:
                time.sleep(0.05)
        self._log.seek(0)
        raise RuntimeError(f"the chat server did not start: {self._log.read()[-2000:]}")

    def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def faults(self, *planned: dict) -> None:
        """What the next calls meet; `seen` starts anew."""
        import httpx

        httpx.post(f"{self.address}/faults", json=list(planned), trust_env=False).raise_for_status()

    def seen(self) -> list[dict]:
        import httpx

        return httpx.get(f"{self.address}/seen", trust_env=False).json()


if __name__ == "__main__":
    import uvicorn

    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    uvicorn.run(build(), host="127.0.0.1", port=parser.parse_args().port, log_level="warning", ws="none")
