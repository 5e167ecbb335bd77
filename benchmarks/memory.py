"""Peak bytes of a computation: the allocator's count on a GPU, every storage seen by the dispatcher on a CPU."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable

import torch
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def body_of(operator) -> Callable | None:
    """The Python function behind one of this library's custom operators: a dispatch mode sees it as one call only."""
    definition = OPDEFS.get(operator.name()) if operator.namespace == "genevolve_fast" else None
    return definition and definition._init_fn


class StorageMeter(TorchDispatchMode):
    """Bytes of the storages made inside the context: `live` now, `peak` at most."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if body := body_of(func):
            with self:
                return body(*args, **(kwargs or {}))
        known = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self._add(x.untyped_storage(), known)
        return out

    def _add(self, storage: torch.UntypedStorage, known: set[int]) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in known or key in self._seen:
            return
        self._seen.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size


def peak_bytes(run: Callable[[], Iterable[torch.Tensor]], device: torch.device) -> int:
    """Most bytes that `run` held at once above its inputs and the tensors it returns."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        returned = list(run())
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
    else:
        with StorageMeter() as meter:
            returned = list(run())
        peak = meter.peak
    return peak - sum(x.untyped_storage().nbytes() for x in returned)
