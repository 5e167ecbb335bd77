"""Layer inputs that wait for their backward in pinned host memory, up to a byte budget."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass

import torch
from torch import Tensor

_ALIGNMENT = 512  # bytes
_IN_FLIGHT = 2  # layers whose copies may be on their way; each keeps its device tensor alive


@dataclass
class _Parked:
    """A tensor in the host buffer; `here` is its copy on the device once that is on its way back."""

    host: Tensor
    below: _Parked | None  # what the backward needs next
    arrived: torch.cuda.Event | None = None
    here: Tensor | None = None


class ActivationOffload:
    """A pinned buffer of `nbytes`, allocated once; the first layers' inputs go there until it is full.

    The first layers' inputs are needed last. Copies run on a stream of their own: out during the forward of the next
    layers, back during the backward of the layer above. What does not fit stays where it is. Frames nest: what was
    parked in a frame is forgotten at its end.
    """

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self.device = torch.device(device)
        self._on_gpu = self.device.type == "cuda"
        self._buffer = _pinned(nbytes) if self._on_gpu else torch.empty(nbytes, dtype=torch.uint8)
        self._used = 0
        self._top: _Parked | None = None
        self._leaving: deque[tuple[Tensor, torch.cuda.Event]] = deque()
        self._side = torch.cuda.Stream(self.device) if self._on_gpu else None
        self.peak_bytes = 0

    @property
    def nbytes(self) -> int:
        return len(self._buffer)

    @contextmanager
    def frame(self) -> Iterator[None]:
        """Room for one pass's layer inputs, given back at the end."""
        used, top = self._used, self._top
        self._top = None
        try:
            yield
        finally:
            self._let_go(0)
            if self._side is not None:  # a copy back that no backward waited for still writes to its tensor
                torch.cuda.current_stream(self.device).wait_stream(self._side)
            self._used, self._top = used, top

    def layer(self) -> AbstractContextManager:
        """Around one layer's forward: what autograd saves there is parked."""
        return torch.autograd.graph.saved_tensors_hooks(self._park, self._fetch)

    def _park(self, x: Tensor) -> _Parked | Tensor:
        size = -(-x.nbytes // _ALIGNMENT) * _ALIGNMENT
        if self._used + size > len(self._buffer):
            return x
        host = self._buffer[self._used : self._used + x.nbytes].view(x.dtype).view(x.shape)
        self._used += size
        self.peak_bytes = max(self.peak_bytes, self._used)
        self._top = _Parked(host, self._top)
        if self._side is None:
            host.copy_(x)
            return self._top
        self._side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._side):
            host.copy_(x, non_blocking=True)
            self._leaving.append((x, self._side.record_event()))
        self._let_go(_IN_FLIGHT)
        return self._top

    def _let_go(self, but: int) -> None:
        """Free the device tensors of all but the last copies out; whoever reuses their memory waits for the copy."""
        while len(self._leaving) > but:
            _, done = self._leaving.popleft()
            torch.cuda.current_stream(self.device).wait_event(done)

    def _fetch(self, parked: _Parked | Tensor) -> Tensor:
        if isinstance(parked, Tensor):
            return parked
        self._let_go(0)
        self._begin(parked)
        if parked.below is not None:
            self._begin(parked.below)
        x, parked.here = parked.here, None
        if parked.arrived is not None:
            torch.cuda.current_stream(self.device).wait_event(parked.arrived)
        return x

    def _begin(self, parked: _Parked) -> None:
        """Start the copy back."""
        if parked.here is not None:
            return
        parked.here = torch.empty_like(parked.host, device=self.device, pin_memory=False)
        if self._side is None:
            parked.here.copy_(parked.host)
            return
        self._side.wait_stream(torch.cuda.current_stream(self.device))  # the new tensor's memory may still be in use
        with torch.cuda.stream(self._side):
            parked.here.copy_(parked.host, non_blocking=True)
            parked.arrived = self._side.record_event()


def _pinned(nbytes: int) -> Tensor:
    """[nbytes] page-locked bytes. torch's own allocator would round up to a power of two and keep what is freed.

    Raises RuntimeError where the driver refuses.
    """
    buffer, runtime = torch.empty(nbytes, dtype=torch.uint8), torch.cuda.cudart()
    address = buffer.data_ptr()
    if not nbytes:
        return buffer
    if runtime.cudaHostRegister(address, nbytes, 0) != runtime.cudaError.success:
        with suppress(RuntimeError):
            torch.zeros(1, device="cuda").zero_()  # a launch takes the refusal off the context
        raise RuntimeError(f"the driver refuses to pin {nbytes / 2**30:.1f} GiB of host memory: see ulimit -l")

    def release() -> None:
        torch.cuda.synchronize()  # copies may be on their way
        runtime.cudaHostUnregister(address)

    weakref.finalize(buffer, release).atexit = False
    return buffer
