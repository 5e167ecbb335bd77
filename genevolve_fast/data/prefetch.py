"""What comes next, made by threads while the caller works on what came before."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

A = TypeVar("A")
B = TypeVar("B")


def default_threads() -> int:
    """One a core this process may use, at most 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, cores)


class Prefetch(Generic[A, B]):
    """`make(item)` of every item of every pack, pack by pack in order.

    At most `ahead` packs are made or being made besides the one the caller has. What `make` raises is raised where its
    pack is asked for. `waited` is how long the caller stood still, in seconds.
    """

    def __init__(
        self, make: Callable[[A], B], packs: Iterable[Sequence[A]], *, threads: int | None = None, ahead: int = 2
    ) -> None:
        self.waited = 0.0
        self._make, self._packs, self._ahead = make, iter(packs), ahead
        self._pool = ThreadPoolExecutor(threads or default_threads(), thread_name_prefix="prefetch")
        self._pending: deque[list[Future[B]]] = deque()

    def __enter__(self) -> Prefetch[A, B]:
        self._fill()
        return self

    def __exit__(self, *exception) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __iter__(self) -> Iterator[list[B]]:
        return self

    def __next__(self) -> list[B]:
        self._fill()
        if not self._pending:
            raise StopIteration
        begin = time.perf_counter()
        made = [future.result() for future in self._pending.popleft()]
        self.waited += time.perf_counter() - begin
        self._fill()
        return made

    def _fill(self) -> None:
        while len(self._pending) < self._ahead and (pack := next(self._packs, None)) is not None:
            self._pending.append([self._pool.submit(self._make, item) for item in pack])
