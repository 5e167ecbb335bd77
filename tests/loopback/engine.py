"""Our engine server as a process of its own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx

ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class LoopbackEngine:
    """`python -m genevolve_fast.rollout.server` on a port that stays the same over restarts.

    with LoopbackEngine("--served-model-name", "tiny") as engine: httpx.get(f"{engine.url}/v1/models")
    """

    def __init__(self, *arguments: str, model: str | Path = "sandbox:start", env: dict[str, str] | None = None) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        module = "genevolve_fast.rollout.server"
        own = ("--model", str(model), "--port", str(self.port), "--threads", "1")
        self.command = [sys.executable, "-m", module, *own, *arguments]
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        threads = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self.env = {**os.environ, **threads, "PYTHONPATH": os.pathsep.join(paths), **(env or {})}
        self.process: subprocess.Popen | None = None
        self._log = tempfile.NamedTemporaryFile("w+", prefix="engine-", suffix=".log")  # noqa: SIM115 - closed with us

    def start(self, wait: bool = True) -> LoopbackEngine:
        self.process = subprocess.Popen(self.command, env=self.env, stdout=self._log, stderr=subprocess.STDOUT)
        return self.wait_until_healthy() if wait else self

    def wait_until_healthy(self, timeout: float = 60.0) -> LoopbackEngine:
        """Raises RuntimeError with the end of the server's log."""
        until = time.monotonic() + timeout
        while time.monotonic() < until and self.process.poll() is None:
            try:
                if httpx.get(f"{self.url}/health", timeout=2, verify=False).status_code == 200:
                    return self
            except httpx.HTTPError:
                time.sleep(0.05)
        raise RuntimeError(f"the server is not up (exit status {self.process.poll()}):\n{self.log_tail()}")

    def log_tail(self, characters: int = 4000) -> str:
        return Path(self._log.name).read_text(encoding="utf-8", errors="replace")[-characters:]

    def kill(self) -> None:
        """As a crash would: no goodbye to open connections."""
        self._end(signal.SIGKILL)

    def terminate(self) -> int:
        """SIGTERM; the exit status."""
        return self._end(signal.SIGTERM)

    def _end(self, how: signal.Signals) -> int:
        self.process.send_signal(how)
        return self.process.wait(30)

    def restart(self, wait: bool = True) -> LoopbackEngine:
        if self.process.poll() is None:
            self.kill()
        return self.start(wait)

    def __enter__(self) -> LoopbackEngine:
        return self.start()

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.kill()
        self._log.close()
