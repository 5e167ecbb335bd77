"""Work spread over ranks: whole items, the same on every process."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence


def assign(costs: Sequence[float], ranks: int) -> list[list[int]]:
    """Each rank's items, as indices in increasing order; a rank may get none.

    Longest processing time first, ties by index: the largest load is at most 4/3 - 1/(3·ranks) of the smallest one
    possible (Graham 1969). Raises ValueError for a cost that is negative or no number.
    """
    if ranks < 1:
        raise ValueError(f"ranks must be at least 1, got {ranks}")
    if wrong := [c for c in costs if not (math.isfinite(c) and c >= 0)]:
        raise ValueError(f"a cost must be a number of at least 0, got {wrong[0]}")
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [(0.0, 0, rank) for rank in range(ranks)]  # load, items, rank: items of no cost are spread as well
    for item in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        load, count, rank = loads[0]
        shares[rank].append(item)
        heapq.heapreplace(loads, (load + costs[item], count + 1, rank))
    return [sorted(share) for share in shares]
