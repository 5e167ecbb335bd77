"""Times of things that take turns, so that a clock, a temperature or a neighbour that changes hits them all alike."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable

import torch

_FLUSHED_BYTES = 256 << 20  # several times the L2 of any GPU so far


def take_turns(
    runs: dict[str, Callable[[], object]],
    device: torch.device,
    rounds: int,
    seconds: float | None = None,
    least: int = 3,
    tick: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Milliseconds of each run, `rounds` of them; one that has used up `seconds` stops after `least`.

    One round before that is not counted. Each round begins with another run. On a GPU: CUDA events, the L2 overwritten
    before each run; on a CPU: wall time (every run reads far more than the caches hold).
    """
    timed = _cuda_timer(device) if device.type == "cuda" else _wall_time
    names = list(runs)
    times: dict[str, list[float]] = {name: [] for name in names}
    for run in runs.values():
        timed(run)
    gc.collect()
    gc.disable()
    try:
        for turn in range(rounds):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                spent = sum(times[name]) / 1e3
                if seconds is None or spent < seconds or len(times[name]) < least:
                    times[name].append(timed(runs[name]))
                tick()
    finally:
        gc.enable()
    return times


def quantiles(times: list[float]) -> tuple[float, float, float]:
    """(20 %, 50 %, 80 %)."""
    q20, q50, q80 = torch.tensor(times, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8]).double()).tolist()
    return q20, q50, q80


def _wall_time(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - begin)


def _cuda_timer(device: torch.device) -> Callable[[Callable[[], object]], float]:
    cache = torch.empty(_FLUSHED_BYTES, dtype=torch.int8, device=device)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def timed(run: Callable[[], object]) -> float:
        cache.zero_()
        begin.record()
        made = run()
        end.record()
        end.synchronize()
        del made
        return begin.elapsed_time(end)

    return timed
