"""The render service under load: `python -m benchmarks.render_load`.

100 requests wait at once, from client processes with a connection each. Some clients vanish while their request waits,
one worker is killed with SIGKILL while it draws, and further requests meet a full queue. A request is lost where a
client that stayed got neither its own picture nor a refusal with a reason.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import multiprocessing
import os
import signal
import socket
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
from PIL import Image

from genevolve_fast.evaluate.scoreboard import record
from genevolve_fast.sandbox.canvas import draw_program
from tests.loopback.render_service import RED, LoopbackRenderService, faulty

COMMAND = "python -m benchmarks.render_load"


@dataclass(frozen=True)
class Load:
    requests: int = 100  # two of them are being drawn while the others wait
    vanishing: int = 15  # of those that wait
    over: int = 20  # further requests, for which the queue has no room
    clients: int = 4  # processes
    seconds: float = 0.1  # of one picture


WORKERS = 2


@dataclass(frozen=True)
class Outcome:
    """What became of the requests whose clients stayed."""

    asked: int
    counts: dict[str, int]
    lost: list[str]
    restarts: int
    vanished: int  # as the service counts them
    calls: int  # of a pipeline that came back
    seconds: float

    def __str__(self) -> str:
        counts = ", ".join(f"{n} {what}" for what, n in sorted(self.counts.items()))
        return (
            f"{self.asked} requests of clients that stayed: {counts}; {len(self.lost)} lost; {self.vanished} clients "
            f"vanished; {self.restarts} worker restarted; {self.seconds:.1f} s"
        )


def run(load: Load) -> Outcome:
    waiting = load.requests - WORKERS
    flags = ("--devices", ",".join(["cpu"] * WORKERS), "--queue", str(waiting))
    with (
        LoopbackRenderService(*flags, *faulty(seconds=load.seconds)) as service,
        tempfile.TemporaryDirectory() as folder,
    ):
        started = time.monotonic()
        release = Path(folder) / "release"
        context = multiprocessing.get_context("spawn")
        gone, results = context.Event(), context.Queue()
        quitters = set(np.linspace(0, waiting - 1, load.vanishing, dtype=int).tolist())
        clients = [
            context.Process(target=client, args=(service.url, seeds.tolist(), quitters, gone, results))
            for seeds in np.array_split(np.arange(waiting), load.clients)
        ]
        with ThreadPoolExecutor(WORKERS) as threads:
            held = [threads.submit(_ask, service.url, waiting + i, f"wait-for {release} | ") for i in range(WORKERS)]
            _until(lambda: service.health()["queue"]["drawing"] == WORKERS)
            for process in clients:
                process.start()
            _until(lambda: service.health()["queue"]["waiting"] == waiting)
            found = [_ask(service.url, load.requests + i) for i in range(load.over)]  # the queue is full
            gone.set()
            _until(lambda: service.health()["queue"]["waiting"] == waiting - load.vanishing)
            os.kill(service.workers()[0], signal.SIGKILL)  # in the middle of its picture
            release.touch()
            found += [future.result() for future in held]
        found += [results.get(timeout=300) for _ in range(waiting - load.vanishing)]
        for process in clients:
            process.join(30)
        seconds = time.monotonic() - started
        restarts = int(service.metric("genevolve_render_worker_restarts_total"))
        vanished = int(service.metric("genevolve_render_requests_total", outcome="vanished"))
        calls = int(service.metric("genevolve_render_draw_seconds_count"))
        queue = service.health()["queue"]
    lost = [why for what, why in found if what == "lost"]
    if queue["waiting"] or queue["drawing"]:
        lost.append(f"the service still holds {queue}, though nobody waits")
    return Outcome(len(found), dict(Counter(what for what, _ in found)), lost, restarts, vanished, calls, seconds)


def client(url: str, seeds: Sequence[int], quitters: set[int], gone, results) -> None:
    """Ask for every seed at once, a connection each; those of `quitters` are broken off when `gone` is set."""
    with ThreadPoolExecutor(len(seeds)) as threads:
        for seed in seeds:
            if seed in quitters:
                threads.submit(_vanish, url, seed, gone)
            else:
                threads.submit(lambda s: results.put(_ask(url, s)), seed)


def _ask(url: str, seed: int, before: str = "") -> tuple[str, str]:
    """("drawn" | "refused" | "lost", why)."""
    try:
        answer = httpx.post(f"{url}/generate", json={"prompt": before + RED, "seed": seed}, timeout=240, verify=False)
        body = answer.json()
        if answer.status_code != 200:
            return ("refused", body["message"]) if body["message"] else ("lost", f"{seed}: refused without a reason")
        own = np.array_equal(_pixels(body), draw_program(before + RED, [], seed))
        return ("drawn", "") if own else ("lost", f"{seed}: not its own picture")
    except Exception as error:  # no answer, or none of the contract's
        return "lost", f"{seed}: {type(error).__name__}: {error}"


def _vanish(url: str, seed: int, gone) -> None:
    """Send a request, wait for `gone`, hang up."""
    address = httpx.URL(url)
    body = json.dumps({"prompt": RED, "seed": seed}).encode()
    with socket.create_connection((address.host, address.port)) as connection:
        head = f"POST /generate HTTP/1.1\r\nHost: {address.host}\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        gone.wait(240)


def _pixels(body: dict) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(body["image"]))))


def _until(true, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            raise RuntimeError("the requests did not arrive")
        time.sleep(0.02)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--requests", type=int, default=Load.requests, help="other than 100: nothing is recorded")
    args = p.parse_args()
    outcome = run(Load(requests=args.requests))
    print("\n".join([*outcome.lost, str(outcome)]))
    if args.requests == Load.requests:
        record("render/lost_requests", len(outcome.lost), n=outcome.asked + outcome.vanished, command=COMMAND)


if __name__ == "__main__":
    main()
