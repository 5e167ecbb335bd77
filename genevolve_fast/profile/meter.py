"""Seconds and peak bytes of a step's phases, without a synchronisation inside it."""

from __future__ import annotations

import ctypes
import os
import time
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

TRAINING = ("prefix", "student", "teacher", "head", "backward", "step")
PHASES = ("weights", "optimizer", "rollout", *TRAINING)
SMALLEST = 64  # bytes; a Python number in an expression is an allocation too
_MARK = "genevolve_fast.meter:"


def allocations(profiler: profile) -> Iterator[tuple[int, int]]:
    """(nanosecond, bytes) of what the CPU allocator gave (positive) and took back, in order of time."""
    events = (e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]")
    rows = [(e.start_ns(), e.nbytes()) for e in events if abs(e.nbytes()) >= SMALLEST]
    return iter(sorted(rows, key=lambda row: row[0]))


class Inline(Executor):
    """Runs what is submitted at once, in the thread that submits: the CPU's allocator is heard in one thread only."""

    def submit(self, fn, /, *args, **kwargs) -> Future:
        future: Future = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


@dataclass
class Segment:
    """An uninterrupted stretch of one phase. Bytes are above what was allocated when the meter began."""

    phase: str
    begin: float = 0.0
    end: float = 0.0
    peak: int = 0
    held: int = 0  # at its end


@dataclass(frozen=True)
class Phase:
    """What a phase took. None: unknown, or of no meaning in this phase."""

    name: str
    seconds: float
    share: float
    peak_bytes: int
    tokens: int | None = None
    tokens_per_second: float | None = None
    bytes_per_token: float | None = None
    mfu: float | None = None


@dataclass(frozen=True)
class Report:
    phases: tuple[Phase, ...]
    segments: tuple[Segment, ...]
    curve: tuple[tuple[float, int], ...]  # (second, bytes above the start) at every allocation, where they were heard
    seconds: float
    peak_bytes: int
    mfu: float | None
    mfu_reason: str  # why there is none

    def as_dict(self) -> dict[str, Any]:
        plain = asdict(self)
        del plain["curve"]
        return plain


class Meter:
    """Phases of a run on `device`; bytes count from the moment it is made.

    Nested phases: time and bytes go to the innermost. On a GPU a phase's border is an event and a reading of the
    allocator's statistics, which the report resolves; on a CPU the profiler listens to the allocator while a phase is
    open, in the thread that opened it, and every operation costs about a microsecond more.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self.cuda = self.device.type == "cuda"
        self._open: list[str] = []
        self._segments: list[Segment] = []
        self._curve: list[tuple[float, int]] = []
        self._live = 0
        self._listener: profile | None = None
        self._marked = 0  # segments there were when it began to listen
        self._running = False  # the last segment is not over
        self._started = time.perf_counter()
        if self.cuda:
            self._base = torch.cuda.memory_allocated(self.device)
            self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
            self._origin = self._event()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Everything inside belongs to `name`, but for phases opened inside."""
        self._border(name)
        self._open.append(name)
        try:
            yield
        finally:
            self._open.pop()
            self._border(self._open[-1] if self._open else None)

    @property
    def held(self) -> int:
        """Bytes above the start now, between phases."""
        return torch.cuda.memory_allocated(self.device) - self._base if self.cuda else self._live

    def settle(self, held: int) -> None:
        """Say what is held now, after a phase whose allocations other threads made or a file backs: a CPU's meter did
        not hear them. A GPU's allocator needs no help."""
        if self.cuda or self._running or not self._segments:
            return
        last = self._segments[-1]
        last.peak, last.held, self._live = max(last.peak, held), held, held
        self._curve.append((last.end, held))

    def report(
        self,
        *,
        tokens: Mapping[str, int] | None = None,
        flops: Mapping[str, float] | None = None,
        microbatch_tokens: int | None = None,
        above: int = 0,
        peak_flops: float | None = None,
    ) -> Report:
        """What was measured so far; every phase must be closed.

        `tokens` and `flops` by phase; FLOPs are model FLOPs, without recomputation; `peak_flops` of the device for the
        utilisation, which counts the phases that `flops` names. `microbatch_tokens`: those of the largest one, by which
        the bytes over `above` (what was held before the pass) of a training phase are divided.
        """
        if self._open:
            raise RuntimeError(f"phase {self._open[-1]!r} is still open: report after it")
        if self.cuda:
            self._resolve()
        tokens, flops = tokens or {}, flops or {}
        names = [n for n in PHASES if any(s.phase == n for s in self._segments)]
        names += sorted({s.phase for s in self._segments} - set(PHASES))
        seconds = {n: sum(s.end - s.begin for s in self._segments if s.phase == n) for n in names}
        whole = sum(seconds.values())
        rows = []
        for name in names:
            peak = max(s.peak for s in self._segments if s.phase == name)
            count, took = tokens.get(name), seconds[name]
            rows.append(
                Phase(
                    name,
                    took,
                    took / whole if whole else 0.0,
                    peak,
                    count,
                    count / took if count and took else None,
                    (peak - above) / microbatch_tokens if microbatch_tokens and name in TRAINING else None,
                    flops[name] / took / peak_flops if peak_flops and took and flops.get(name) else None,
                )
            )
        counted = [n for n in names if flops.get(n)]
        mfu = None
        if peak_flops and counted:
            mfu = sum(flops[n] for n in counted) / sum(seconds[n] for n in counted) / peak_flops
        reason = "" if mfu is not None else "no peak FLOP/s known" if not peak_flops else "no FLOPs counted"
        peak = max((s.peak for s in self._segments), default=0)
        return Report(tuple(rows), tuple(self._segments), tuple(self._curve), whole, peak, mfu, reason)

    # --- borders ------------------------------------------------------------------------------------------------------

    def _border(self, following: str | None) -> None:
        """The phase that ran until now ends; `following` begins (None: no phase)."""
        if self.cuda:
            self._border_cuda(following)
        else:
            self._border_cpu(following)

    def _border_cuda(self, following: str | None) -> None:
        event = self._event()
        if self._running:
            segment = self._segments[-1]
            segment.peak = torch.cuda.max_memory_allocated(self.device) - self._base
            segment.held = torch.cuda.memory_allocated(self.device) - self._base
            self._events[-1] = (self._events[-1][0], event)
        torch.cuda.reset_peak_memory_stats(self.device)
        if following is not None:
            self._segments.append(Segment(following))
            self._events.append((event, event))
        self._running = following is not None

    def _event(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def _resolve(self) -> None:
        torch.cuda.synchronize(self.device)
        for segment, (begin, end) in zip(self._segments, self._events, strict=True):
            segment.begin = self._origin.elapsed_time(begin) / 1e3
            segment.end = self._origin.elapsed_time(end) / 1e3

    def _border_cpu(self, following: str | None) -> None:
        if self._listener is None:
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it reports its own start and stop
            self._listener = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            self._listener.start()
            self._marked = len(self._segments)
        with record_function(f"{_MARK}{len(self._segments)}"):  # a border on the profiler's own clock
            now = time.perf_counter() - self._started
        if self._running:
            self._segments[-1].end = now
        if following is not None:
            self._segments.append(Segment(following, now, now))
        self._running = following is not None
        if following is None:
            self._hear()

    def _hear(self) -> None:
        """Stop listening and give what was allocated to the segments since the outermost phase began."""
        listener, self._listener = self._listener, None
        listener.stop()
        fresh = self._segments[self._marked :]
        events = listener.profiler.kineto_results.events()
        marks = sorted(e.start_ns() for e in events if e.name().startswith(_MARK))
        assert len(marks) == len(fresh) + 1
        shift = fresh[0].begin - marks[0] / 1e9
        at = 0
        for segment in fresh:
            segment.peak = self._live
        for ns, size in allocations(listener):
            index = min(max(bisect_right(marks, ns) - 1, 0), len(fresh) - 1)
            for segment in fresh[at + 1 : index + 1]:  # a segment begins with what the one before left
                segment.peak = self._live
            for segment in fresh[at:index]:
                segment.held = self._live
            at = index
            self._live += size
            fresh[index].peak = max(fresh[index].peak, self._live)
            self._curve.append((ns / 1e9 + shift, self._live))
        for segment in fresh[at + 1 :]:
            segment.peak = self._live
        for segment in fresh[at:]:
            segment.held = self._live


# --- one number a step ------------------------------------------------------------------------------------------------

CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


class PeakBytes:
    """Most bytes held since this was made above what was held then; cheap enough for every step.

    On a GPU from the allocator, whose peak it resets; on Linux the resident set's high-water mark, in pages, after the
    C library gave back what it holds of freed ones; elsewhere unknown.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self._before: int | None = None
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        elif CLEAR.exists():
            try:
                _give_back_freed_pages()
                CLEAR.write_text("5")  # man 5 proc: the high-water mark starts again
                self._before = resident("VmRSS")
            except OSError:
                self._before = None

    def read(self) -> int | None:
        """None where the system does not tell."""
        if self._before is None:
            return None
        cuda = self.device.type == "cuda"
        return (torch.cuda.max_memory_allocated(self.device) if cuda else resident("VmHWM")) - self._before


def _give_back_freed_pages() -> None:
    """Freed pages that are taken again would not show in the resident set."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc
    if trim is not None:
        trim(0)


def resident(name: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


# --- snapshots --------------------------------------------------------------------------------------------------------


@contextmanager
def snapshot(device: torch.device | str, path: str | os.PathLike | None) -> Iterator[None]:
    """Record the CUDA allocator's history and write it to `path` (for pytorch.org/memory_viz); None: do nothing.

    Raises ValueError on a CPU, whose allocator keeps no history.
    """
    if path is None:
        yield
        return
    if torch.device(device).type != "cuda":
        raise ValueError("a memory snapshot is the CUDA allocator's history: there is none on a CPU, see timeline.svg")
    torch.cuda.memory._record_memory_history(max_entries=1_000_000)
    try:
        yield
    finally:
        torch.cuda.memory._dump_snapshot(str(path))
        torch.cuda.memory._record_memory_history(enabled=None)
