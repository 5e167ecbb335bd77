"""Servers that a run starts: waited for, started again, ended with it however it ends. Real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest

from genevolve_fast.protocols import EngineError
from genevolve_fast.rollout import server_processes
from genevolve_fast.rollout.serve import Command
from genevolve_fast.rollout.server_processes import ServerProcesses, free_port

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
SERVER = """
import http.server, os, subprocess, sys
port, must_exist = int(sys.argv[1]), sys.argv[2]
if must_exist and not os.path.exists(must_exist):
    sys.exit("no weights at " + must_exist)
print("rank", os.environ.get("RANK"), "gpus", os.environ["CUDA_VISIBLE_DEVICES"], flush=True)
worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])  # as a vLLM has its workers
class Healthy(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers(); self.wfile.write(f"{os.getpid()} {worker.pid}".encode())
    def log_message(self, *_): pass
http.server.ThreadingHTTPServer(("127.0.0.1", port), Healthy).serve_forever()
"""


def commands(number: int, must_exist: str = "") -> tuple[list[Command], list[str]]:
    ports = [free_port() for _ in range(number)]
    made = [
        Command((sys.executable, "-c", SERVER, str(port), must_exist), {"CUDA_VISIBLE_DEVICES": str(i)})
        for i, port in enumerate(ports)
    ]
    return made, [f"http://127.0.0.1:{port}" for port in ports]


@pytest.fixture
def started(tmp_path):
    opened = []

    def open_(number: int = 1, must_exist: str = "", timeout_s: float = 60.0) -> ServerProcesses:
        opened.append(ServerProcesses(*commands(number, must_exist), tmp_path / "servers", timeout_s))
        return opened[-1]

    yield open_
    for processes in opened:
        processes.stop()


def pids(url: str) -> list[int]:
    """Of a server and of its worker."""
    return [int(pid) for pid in httpx.get(f"{url}/health", trust_env=False).text.split()]


def gone(*found: int) -> bool:
    return not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in found)


def until(condition, seconds: float = 40.0) -> None:
    stop = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < stop, "it did not come to that"
        time.sleep(0.05)


def up(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=2, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def test_servers_are_waited_for_and_ended_with_all_their_processes(started, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "3")  # of a torchrun around the trainer: a server is no rank of it
    servers = started(2)
    servers.start()
    found = [pid for url in servers.urls for pid in pids(url)]
    assert len(set(found)) == 4
    logs = [(tmp_path / "servers" / f"server_{i}.log").read_text() for i in range(2)]
    assert [log.splitlines()[-1] for log in logs] == ["rank None gpus 0", "rank None gpus 1"]
    assert logs[1].startswith("$ CUDA_VISIBLE_DEVICES=1 ")
    servers.stop()
    assert gone(*found)
    servers.stop()  # the second time there is nothing to do


def test_one_that_cannot_start_ends_the_others_and_says_why(started):
    servers = started(2, must_exist="/no/such/weights")
    with pytest.raises(
        EngineError, match=r"server_\d.log ended with status 1: \n(.*\n)*  no weights at /no/such/weights"
    ):
        servers.start()
    assert not any(map(up, servers.urls))


def test_one_that_does_not_answer_in_time_is_named(tmp_path):
    silent = Command((sys.executable, "-c", "import time; print('loading', flush=True); time.sleep(1000)"))
    servers = ServerProcesses([silent], ["http://127.0.0.1:9"], tmp_path, 1.0)
    with pytest.raises(EngineError, match=r"server_0.log does not answer after 1 s") as late:
        servers.start()
    assert late.value.kind == "timeout"


@pytest.mark.slow
def test_a_server_that_dies_is_started_again_at_its_address_and_given_up_when_it_keeps_dying(
    started, tmp_path, monkeypatch
):
    monkeypatch.setattr(server_processes, "MOST_DEATHS", 2)
    weights = tmp_path / "weights"
    weights.touch()
    servers = started(1, must_exist=str(weights))
    servers.start()
    (url,) = servers.urls
    first = pids(url)
    os.kill(first[0], signal.SIGKILL)
    until(lambda: up(url) and pids(url) != first)
    assert gone(*first)  # its worker too
    servers.check()
    time.sleep(1)  # until it is known to be healthy
    weights.unlink()
    os.kill(pids(url)[0], signal.SIGKILL)
    until(lambda: servers._given_up)
    with pytest.raises(EngineError, match=r"ended with status 1, 2 times in a row: \n(.*\n)*  no weights at"):
        servers.check()


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_no_server_outlives_the_process_that_started_it(tmp_path, how):
    script = (
        "import sys; from tests.test_server_processes import *\n"
        f"servers = ServerProcesses(*commands(1), {str(tmp_path)!r}, 60.0)\n"
        "servers.start(); print(servers.urls[0], flush=True); time.sleep(1000)"
    )
    trainer = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    url = trainer.stdout.readline().strip()
    found = pids(url)
    trainer.send_signal(how)
    trainer.wait(20)
    until(lambda: gone(*found), 20)


def test_the_guard_that_is_killed_takes_its_command_along(started):
    servers = started(1)
    servers.start()
    found = pids(servers.urls[0])
    os.kill(servers.pids[0], signal.SIGKILL)
    until(lambda: gone(found[0]))
    os.kill(found[1], signal.SIGKILL)  # whose own business it is to notice: nobody is left who knows of it
