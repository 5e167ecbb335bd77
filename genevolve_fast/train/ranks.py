"""The processes of a run: who this one is, and what all of them exchange on the host."""

from __future__ import annotations

import datetime
import os
import pickle
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


class RanksError(RuntimeError):
    """This process was not launched as the configuration needs it."""


class Ranks:
    """One process of `world`. Exchanges go through gloo, so that they never wait for a GPU's queue."""

    def __init__(self, rank: int = 0, world: int = 1, group: dist.ProcessGroup | None = None) -> None:
        self.rank = rank
        self.world = world
        self.group = group

    @property
    def first(self) -> bool:
        """Whether this is the process that writes, judges the whole and talks."""
        return self.rank == 0

    def gather(self, mine: T) -> list[T]:
        """Everybody's object, by rank."""
        if self.world == 1:
            return [mine]
        everybodys: list[Any] = [None] * self.world
        dist.all_gather_object(everybodys, mine, group=self.group)
        return everybodys

    def from_first(self, make: Callable[[], T]) -> T:
        """What the first rank makes. An exception there is raised everywhere."""
        if self.world == 1:
            return make()
        failed: BaseException | None = None
        told: list[Any] = [None, None]
        if self.first:
            try:
                told[0] = make()
            except (Exception, SystemExit) as error:
                failed, told[1] = error, sendable(error)
        dist.broadcast_object_list(told, 0, group=self.group)
        if told[1] is not None:
            raise failed or told[1]
        return told[0]

    def to_first(self, mine: T) -> list[T]:
        """Everybody's object on the first rank, nothing on the others."""
        if self.world == 1:
            return [mine]
        everybodys: list[Any] | None = [None] * self.world if self.first else None
        dist.gather_object(mine, everybodys, 0, group=self.group)
        return everybodys or []

    def first_then_all(self, make: Callable[[], T]) -> T:
        """What every rank makes of its own, the first one before the others: they find what it left on the disk."""
        made: list[T] = []
        self.from_first(lambda: made.append(make()))
        return made[0] if made else make()

    def most(self, numbers: Sequence[int]) -> list[int]:
        """The largest of each number over all ranks, which bring equally many."""
        if self.world == 1:
            return list(numbers)
        x = torch.tensor(numbers, dtype=torch.int64)
        dist.all_reduce(x, dist.ReduceOp.MAX, group=self.group)
        return x.tolist()

    def any(self, here: bool) -> bool:
        return bool(self.most([int(here)])[0])

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.world > 1:
            dist.barrier(group=self.group)


def sendable(error: BaseException | None) -> BaseException | None:
    """An exception that other processes can be told: not all can be pickled and made again."""
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")


def launched() -> bool:
    """Whether torchrun or deepspeed started this process, as one of several or alone."""
    return "WORLD_SIZE" in os.environ


def local_device() -> torch.device:
    """The GPU of this process's place on its node, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def join(timeout_s: float = 1800.0) -> Ranks:
    """The ranks that the launcher's RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe; alone without them.

    timeout_s: how long a rank waits for the others in an exchange. Raises RanksError where a variable is missing.
    """
    if not launched():
        return Ranks()
    if missing := [n for n in ("RANK", "MASTER_ADDR", "MASTER_PORT") if n not in os.environ]:
        raise RanksError(f"WORLD_SIZE is set without {', '.join(missing)}: launch with torchrun or deepspeed")
    where, patience = local_device(), datetime.timedelta(seconds=timeout_s)
    if where.type == "cuda":
        torch.cuda.set_device(where)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if where.type == "cuda" else "gloo"  # offloaded shards are summed on the host
        dist.init_process_group(backend, timeout=patience)
    return Ranks(dist.get_rank(), dist.get_world_size(), dist.new_group(backend="gloo", timeout=patience))


def leave(ranks: Ranks) -> None:
    """Orderly end: everybody has left the last exchange before the first one closes its connections."""
    if ranks.world > 1:
        ranks.wait()
        dist.destroy_process_group()
