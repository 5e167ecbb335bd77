"""Real processes in a gloo group: what tests of distributed training run on each rank."""

from __future__ import annotations

import os
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def join(rank: int, world: int, address: str) -> None:
    """Make this process a rank of the group at `address`."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "DS_ACCELERATOR": "cpu"}
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world)
    torch.set_num_threads(1)


def _worker(rank, world, function, arguments, address, failures):
    join(rank, world, address)
    try:
        function(rank, *arguments)
    except Exception:
        failures.put(f"rank {rank}: {traceback.format_exc()}")
        raise
    dist.barrier()
    time.sleep(0.2)  # the other rank has the barrier's last message too
    os._exit(0)  # gloo's threads now and then abort an orderly end


def on_ranks(folder: Path, function, *arguments, world: int = 2, seconds: int = 240) -> None:
    """function(rank, *arguments) in `world` processes; the first traceback is raised here."""
    context = mp.get_context("spawn")
    failures = context.Queue()
    address = f"file://{folder}/rendezvous_{time.time_ns()}"
    ranks = [
        context.Process(target=_worker, args=(r, world, function, arguments, address, failures)) for r in range(world)
    ]
    for p in ranks:
        p.start()
    for p in ranks:
        p.join(seconds)
    told = [] if failures.empty() else [failures.get()]
    for p in ranks:
        if p.is_alive():
            told.append("a rank still waits")
            p.kill()
    assert all(p.exitcode == 0 for p in ranks), "\n".join(told) or [p.exitcode for p in ranks]
