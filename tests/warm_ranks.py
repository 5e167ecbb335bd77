"""Two gloo ranks that stay up between tests: starting them takes longer than most of what they are asked."""

from __future__ import annotations

import gc
import queue
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks.on_ranks import join

_WORLD = 2
_running: list[_Ranks] = []


def on_two_ranks(folder: Path, function, *arguments, seconds: float = 240) -> None:
    """function(rank, *arguments) on both ranks, as `benchmarks.on_ranks` does with new processes.

    The first traceback is raised here; after it, and after `seconds`, the next call starts new ranks.
    """
    if not _running:
        _running.append(_Ranks(folder))
    try:
        _running[0].run(function, arguments, seconds)
    except BaseException:
        _running.pop().kill()
        raise


class _Ranks:
    def __init__(self, folder: Path) -> None:
        context = mp.get_context("spawn")
        self._jobs = [context.SimpleQueue() for _ in range(_WORLD)]
        self._told = context.Queue()
        address = f"file://{folder}/rendezvous_{time.time_ns()}"
        self._processes = [
            context.Process(target=_serve, args=(rank, address, jobs, self._told), daemon=True)
            for rank, jobs in enumerate(self._jobs)
        ]
        for process in self._processes:
            process.start()

    def run(self, function, arguments: tuple, seconds: float) -> None:
        for jobs in self._jobs:
            jobs.put((function, arguments))
        until = time.monotonic() + seconds
        for _ in range(_WORLD):
            try:
                failure = self._told.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                failure = f"a rank still waits after {seconds:g} s"
            assert failure is None, failure

    def kill(self) -> None:
        for process in self._processes:
            process.kill()


def _serve(rank: int, address: str, jobs, told) -> None:
    join(rank, _WORLD, address)
    while True:
        function, arguments = jobs.get()
        torch.manual_seed(0)
        try:
            function(rank, *arguments)
            dist.barrier()
            told.put(None)
        except BaseException:
            told.put(f"rank {rank}: {traceback.format_exc()}")
        del function, arguments
        gc.collect()
