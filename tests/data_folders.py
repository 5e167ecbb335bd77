"""Folders of the data chain for tests, made once by the real commands on the sandbox."""

from __future__ import annotations

import shutil
import tempfile
from functools import lru_cache
from pathlib import Path

from genevolve_fast.cli import main

SIZE = 48


@lru_cache(maxsize=1)
def _root() -> Path:
    import atexit

    root = Path(tempfile.mkdtemp(prefix="data_chain_"))
    atexit.register(shutil.rmtree, root, True)
    return root


@lru_cache(maxsize=8)
def made(step: str) -> Path:
    """The folder of a finished step: pool, trajectories, filter, truth, view. Tests copy it before they change it."""
    folder = _root() / step
    if step == "pool":
        run("data", "pool", "--output-dir", folder, "--count", SIZE, "--shares", "0.6,0.2,0.2")
    elif step == "trajectories":
        run("data", step, "--input", made("pool"), "--output-dir", folder, "--teacher", "demonstrator")
    elif step == "filter":
        run("data", step, "--input", made("trajectories"), "--output-dir", folder)
    elif step == "truth":
        run("data", step, "--input", made("filter"), "--output-dir", folder)
    else:
        for view in ("sft-view", "feedback-view", "bench-view"):
            run("data", view, "--input", made("truth"), "--output-dir", folder)
    return folder


@lru_cache(maxsize=1)
def chat_server():
    """One chat server process for all tests; each plans its own faults."""
    import atexit

    from loopback.chat import LoopbackChat

    server = LoopbackChat().start()
    atexit.register(server.kill)
    return server


def copied(step: str, target: Path) -> Path:
    """A copy of its own of a step's folder."""
    shutil.copytree(made(step), target)
    return target


def run(*arguments: object) -> None:
    status = main([str(a) for a in arguments])
    assert status == 0, f"{arguments} ended with status {status}"
