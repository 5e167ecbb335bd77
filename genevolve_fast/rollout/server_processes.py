"""Servers that a run starts itself: watched, started again when they die, ended with the run however it ends."""

from __future__ import annotations

import atexit
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from genevolve_fast.protocols import EngineError
from genevolve_fast.rollout.serve import Command

MOST_DEATHS = 5  # one after the other, none of them healthy in between
_LOOK_S = 0.25
_LONGEST_WAIT_S = 30.0  # before a server that keeps dying is started again
_TAIL_LINES = 15
_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "GROUP_RANK", "ROLE_RANK",
             "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # fmt: skip


def free_port() -> int:
    """A port of this machine that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass
class _Running:
    command: Command
    url: str
    log: Path
    process: subprocess.Popen | None = None
    healthy: bool = False
    deaths: int = 0  # since it was healthy
    next_start: float = 0.0


class ServerProcesses:
    """`commands[i]` listens on `urls[i]` and writes to `folder/server_I.log`.

    `start` returns when all answer; from then on a server that ends is started again, and given up after MOST_DEATHS
    in a row: `check` raises then. They end with `stop`, with this process whatever ends it (rollout.guard), and never
    see the variables by which torchrun tells this process its rank.
    """

    def __init__(self, commands: Sequence[Command], urls: Sequence[str], folder: Path, start_timeout_s: float) -> None:
        self.urls = tuple(urls)
        self.start_timeout_s = start_timeout_s
        folder = Path(folder)
        self._servers = [
            _Running(command, url, folder / f"server_{i}.log")
            for i, (command, url) in enumerate(zip(commands, urls, strict=True))
        ]
        self._given_up: str | None = None
        self._ending = threading.Event()
        self._watch: threading.Thread | None = None

    @property
    def pids(self) -> list[int]:
        """Of the processes that hold the servers."""
        return [s.process.pid for s in self._servers if s.process is not None]

    def start(self) -> None:
        """Start all and wait until they answer; nothing to do the second time.

        Raises EngineError with the last lines of the log of one that ended, or took longer than start_timeout_s.
        """
        if self._watch is not None:
            return
        atexit.register(self.stop)
        until = time.monotonic() + self.start_timeout_s
        try:
            for server in self._servers:
                self._spawn(server)
            total = len(self._servers)
            with tqdm(total=total, desc="rollout servers", unit="server", dynamic_ncols=True, mininterval=1.0) as bar:
                while not all(s.healthy for s in self._servers):
                    self._await_some(until)
                    bar.update(sum(s.healthy for s in self._servers) - bar.n)
        except BaseException:
            self.stop()
            raise
        self._watch = threading.Thread(target=self._watch_them, name="rollout-servers", daemon=True)
        self._watch.start()

    def check(self) -> None:
        """Raises EngineError where a server was given up."""
        if self._given_up:
            raise EngineError(self._given_up, "server_error")

    def stop(self) -> None:
        """End them and wait until they have."""
        atexit.unregister(self.stop)
        self._ending.set()
        if self._watch is not None and self._watch is not threading.current_thread():
            self._watch.join()
        running = [s.process for s in self._servers if s.process is not None]
        for process in running:
            process.stdin.close()  # the guard ends what it started
        for process in running:
            process.wait()

    # --- one server ---------------------------------------------------------------------------------------------------

    def _spawn(self, server: _Running) -> None:
        secrets = {name: os.environ[source] for name, source in server.command.secrets.items()}
        kept = {n: v for n, v in os.environ.items() if n not in _LAUNCHER and not n.startswith("TORCHELASTIC_")}
        server.log.parent.mkdir(parents=True, exist_ok=True)
        with server.log.open("a", encoding="utf-8") as log:
            log.write(f"$ {server.command}\n")
            log.flush()
            server.healthy = False
            server.process = subprocess.Popen(
                [sys.executable, "-m", "genevolve_fast.rollout.guard", *server.command.arguments],
                env={**kept, **server.command.environment, **secrets},
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _await_some(self, until: float) -> None:
        for server in self._servers:
            if server.process.poll() is not None:
                raise EngineError(f"{_ended(server)}: {_tail(server.log)}", "server_error")
            server.healthy = server.healthy or _answers(server.url)
        if time.monotonic() > until:
            late = next((s for s in self._servers if not s.healthy), None)
            if late:
                raise EngineError(
                    f"the server of {late.log} does not answer after {self.start_timeout_s:g} s: {_tail(late.log)}",
                    "timeout",
                )
        self._ending.wait(_LOOK_S)

    def _watch_them(self) -> None:
        while not self._ending.wait(_LOOK_S):
            for server in self._servers:
                self._look_after(server)

    def _look_after(self, server: _Running) -> None:
        now = time.monotonic()
        if server.process is None:
            if now >= server.next_start and not self._given_up:
                self._spawn(server)
        elif server.process.poll() is not None:
            server.deaths += 1
            if server.deaths >= MOST_DEATHS:
                self._given_up = f"{_ended(server)}, {server.deaths} times in a row: {_tail(server.log)}"
            else:
                tqdm.write(f"{_ended(server)}; it is started again", file=sys.stderr)
            server.process.stdin.close()
            server.process = None
            server.next_start = now + min(_LONGEST_WAIT_S, 0.5 * 2 ** (server.deaths - 1))
        elif not server.healthy and _answers(server.url):
            server.healthy, server.deaths = True, 0


def _answers(url: str) -> bool:
    import httpx

    with suppress(httpx.HTTPError):
        return httpx.get(f"{url}/health", timeout=2.0, trust_env=False).status_code == 200
    return False


def _ended(server: _Running) -> str:
    return f"the server of {server.log} ended with status {server.process.poll()}"


def _tail(log: Path) -> str:
    """The last lines of a log, on lines of their own."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    return "".join(f"\n  {line}" for line in lines[-_TAIL_LINES:])
