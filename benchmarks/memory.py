"""Peak bytes of a computation, as the allocators report them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

import torch
from torch._library.custom_ops import OPDEFS
from torch.profiler import ProfilerActivity, profile

from genevolve_fast.profile.meter import allocations


def body_of(operator) -> Callable | None:
    """The Python function behind one of this library's custom operators: a dispatch mode sees it as one call only."""
    definition = OPDEFS.get(operator.name()) if operator.namespace == "genevolve_fast" else None
    return definition and definition._init_fn


def peak_bytes(run: Callable[[], Iterable[torch.Tensor]], device: torch.device) -> int:
    """Most bytes that `run` held at once above its inputs and the tensors it returns.

    On a CPU the profiler listens to the allocator: what compiled code and custom operations allocate counts as well.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        returned = list(run())
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
    else:
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it reports its own start and stop
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            returned = list(run())
        live = peak = 0
        for _, size in allocations(profiler):
            live += size
            peak = max(peak, live)
    return peak - sum(x.untyped_storage().nbytes() for x in returned)


def saved_bytes(run: Callable[[], object]) -> int:
    """Bytes that autograd keeps for the backward of what `run` returns, each storage once."""
    kept: dict[int, int] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        result = run()
    del result
    return sum(kept.values())
