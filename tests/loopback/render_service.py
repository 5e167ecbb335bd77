"""The render service as a process of its own, and a canvas that misbehaves when the prompt says so."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx

from genevolve_fast.commands.serve_render import CanvasPipeline
from genevolve_fast.protocols import RenderError
from genevolve_fast.render.job import DeviceLostError
from tests.loopback.engine import free_port

ROOT = Path(__file__).resolve().parents[2]
RED = "Background blue. A red circle in the middle."


class FaultyCanvas(CanvasPipeline):
    """Draws, and obeys what stands before " | ": wait-for FILE, fail, die, die-once FILE, hang, lost."""

    def __init__(self, seconds: float = 0.0) -> None:
        super().__init__()
        self.seconds = seconds

    def draw(self, jobs) -> list:
        time.sleep(self.seconds)
        for job in jobs:
            self._obey(*job.prompt.partition(" | ")[0].split(" ")[:2])
        return super().draw(jobs)

    def _obey(self, word: str, argument: str = "") -> None:
        match word:
            case "fail":
                raise RenderError("it failed as it was told")
            case "die":
                os.kill(os.getpid(), signal.SIGKILL)
            case "die-once":
                if not Path(argument).exists():
                    Path(argument).touch()
                    os.kill(os.getpid(), signal.SIGKILL)
            case "hang":
                time.sleep(3600)
            case "wait-for":
                until = time.monotonic() + 60
                while not Path(argument).exists() and time.monotonic() < until:
                    time.sleep(0.01)
            case "lost":
                raise DeviceLostError("the device is gone", "server_error")


def open_faulty(device: str, seconds: float = 0.0) -> FaultyCanvas:
    """A worker's factory; every call takes `seconds`."""
    return FaultyCanvas(seconds)


def own(factory: str, **arguments) -> tuple[str, ...]:
    """Flags that serve a pipeline of your own."""
    return "--factory", factory, "--arguments", json.dumps(arguments)


def faulty(**arguments) -> tuple[str, ...]:
    """Flags that serve FaultyCanvas."""
    return own("tests.loopback.render_service:open_faulty", **arguments)


class LoopbackRenderService:
    """`genevolve-fast render-serve` on a port that stays the same over restarts.

    with LoopbackRenderService("--model", "sandbox:canvas") as service:
        httpx.post(f"{service.url}/generate", json={...})
    """

    def __init__(self, *flags: str, env: dict[str, str] | None = None) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        cli = [sys.executable, "-m", "genevolve_fast.cli", "render-serve"]
        self.command = [*cli, "--port", str(self.port), *flags]
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(paths)}
        self.env = {**os.environ, **quiet, **(env or {})}
        self.process: subprocess.Popen | None = None
        self._log = tempfile.NamedTemporaryFile("w+", prefix="render-", suffix=".log")  # noqa: SIM115 - closed with us

    def start(self, wait: bool = True) -> LoopbackRenderService:
        self.process = subprocess.Popen(self.command, env=self.env, stdout=self._log, stderr=subprocess.STDOUT)
        return self.wait_until_healthy() if wait else self

    def wait_until_healthy(self, timeout: float = 90.0) -> LoopbackRenderService:
        """All workers are up. Raises RuntimeError with the end of the service's log."""
        until = time.monotonic() + timeout
        while time.monotonic() < until and self.process.poll() is None:
            try:
                if self.health()["status"] == "healthy":
                    return self
            except httpx.HTTPError:
                pass
            time.sleep(0.05)
        raise RuntimeError(f"the service is not up (exit status {self.process.poll()}):\n{self.log_tail()}")

    def health(self) -> dict:
        return httpx.get(f"{self.url}/health", timeout=5, verify=False).json()

    def metric(self, name: str, **labels: str) -> float:
        """A number of /metrics, summed over the labels that are not named."""
        from prometheus_client.parser import text_string_to_metric_families

        text = httpx.get(f"{self.url}/metrics", timeout=5, verify=False).text
        samples = [s for family in text_string_to_metric_families(text) for s in family.samples if s.name == name]
        return sum(s.value for s in samples if labels.items() <= s.labels.items())

    def workers(self) -> list[int]:
        return [worker["pid"] for worker in self.health()["workers"] if worker["pid"]]

    def log_tail(self, characters: int = 4000) -> str:
        return Path(self._log.name).read_text(encoding="utf-8", errors="replace")[-characters:]

    def kill(self) -> None:
        """As a crash would: no goodbye to open connections."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(30)

    def terminate(self) -> None:
        """SIGTERM, which drains; `process.wait()` for its end."""
        self.process.send_signal(signal.SIGTERM)

    def __enter__(self) -> LoopbackRenderService:
        return self.start()

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.kill()
        self._log.close()
