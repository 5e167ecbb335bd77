"""Bytes a second between ranks: all-gather, reduce-scatter, all-reduce. Started by `torchrun`, on one node or several.

  torchrun --nproc-per-node 8 -m benchmarks.collectives
  torchrun --nnodes 2 --nproc-per-node 8 --rdzv-endpoint HOST:29500 -m benchmarks.collectives   # on each node

NCCL where there are GPUs, gloo on a CPU. Rank 0 writes the rates into the file. A collective of n bytes over W ranks
counts as n·(W − 1)/W bytes moved, an all-reduce as twice that: what each rank sends in a ring.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.rate_cases import Found, found
from benchmarks.rates import device_called, merge
from genevolve_fast.profile.rates import FILE

SIZES = {"cpu": (1 << 20, 16 << 20), "cuda": (16 << 20, 512 << 20)}  # bytes that all ranks hold together
WARM_UP = 2


def measure(where: torch.device, sizes: tuple[int, ...], repeats: int) -> list[Found]:
    """The slowest rank's median of each collective and size."""
    ranks, nodes = dist.get_world_size(), dist.get_world_size() // int(os.environ["LOCAL_WORLD_SIZE"])
    made = []
    for size in sizes:
        count = size // 4 // ranks
        part, whole = (torch.ones(n, device=where) for n in (count, count * ranks))
        runs = {
            "all_gather": (1, lambda part=part, whole=whole: dist.all_gather_into_tensor(whole, part)),
            "reduce_scatter": (1, lambda part=part, whole=whole: dist.reduce_scatter_tensor(part, whole)),
            "all_reduce": (2, lambda whole=whole: dist.all_reduce(whole)),
        }
        for name, (times, run) in runs.items():
            seconds = torch.tensor(timed(run, where, repeats))
            dist.all_reduce(moved := seconds.to(where), op=dist.ReduceOp.MAX)
            at = dict(
                spans="nodes" if nodes > 1 else "node", ranks=ranks, nodes=nodes, backend=dist.get_backend(), bytes=size
            )
            made.append(found(name, times * size * (ranks - 1) / ranks, float(moved), "bytes/s", repeats, **at))
    return made


def timed(run, where: torch.device, repeats: int) -> float:
    """Median seconds; every one begins when all ranks are there."""
    seconds = []
    for turn in range(WARM_UP + repeats):
        dist.barrier()
        begin = time.perf_counter()
        run()
        if where.type == "cuda":
            torch.cuda.synchronize()
        if turn >= WARM_UP:
            seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        prog="torchrun … -m benchmarks.collectives",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--file", type=Path, default=FILE, help="(default: %(default)s)")
    p.add_argument("--repeats", type=int, default=20, help="(default: %(default)s)")
    p.add_argument("--bytes", type=int, nargs="+", help="that all ranks hold together")
    p.add_argument("--commit", help="what to record where the tree is a copy that git does not know")
    args = p.parse_args(argv)
    if "WORLD_SIZE" not in os.environ:
        p.error("start it with torchrun, on two ranks or more")
    cuda = torch.cuda.is_available()
    where = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(where)
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        if dist.get_world_size() < 2:
            p.error("one rank has nobody to exchange anything with")
        made = measure(where, tuple(args.bytes or SIZES[where.type]), args.repeats)
        if dist.get_rank() == 0:
            merge(args.file, device_called(where), made, command=p.prog, at=args.commit)
        dist.barrier()
    finally:
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
