"""The embedded engine: a transformers policy that keeps every rollout's keys and values between its turns."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from genevolve_fast.policy.model import Policy
from genevolve_fast.protocols import EngineError, Generation, Sampling
from genevolve_fast.rollout.flights import Flights
from genevolve_fast.rollout.rows import GROW_BY, Call, Forwards, Fresh, Row, Session
from genevolve_fast.rollout.sampling import sample

_COMPACT_BELOW = 0.6  # drop finished rows from the batch once fewer than this share are still sampling
_PREFILL_TOKENS = 16_384  # of newcomers between two decode steps, padding included; a longer one enters alone
_log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class SampledTurn(Generation):
    """`versions`: which weights sampled it, as (version, index of their first token); `cached` ids were known."""

    versions: tuple[tuple[int | str, int], ...] = field(default=(), compare=False)
    cached: int = field(default=0, compare=False)


class TransformersEngine:
    """Batches the turns of concurrent sessions through one policy (protocols.TrainedEngine).

    deterministic=True waits until every open session asks for a turn and then runs them in order of session id, so
    that batches, and with them every bit, do not depend on which tool answered first. Otherwise batching is continuous:
    rows enter between two decode steps and leave, answered, when they end; at most `max_batch` are in flight.
    `executor` runs the policy, one job at a time; none: a thread of the engine's own. `adapted(name)` is entered
    around the forwards of sessions opened with an adapter, or without one.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        max_batch: int = 64,
        deterministic: bool = True,
        executor: Executor | None = None,
        adapted: Callable[[str | None], AbstractContextManager] | None = None,
    ) -> None:
        self.policy = policy
        self.max_batch = max_batch
        self.deterministic = deterministic
        self.version: int | str = 0
        self.sampled_tokens = 0
        self._forwards = Forwards(policy)
        self._adapted = adapted or (lambda _: nullcontext())
        self._sessions: dict[str, Session] = {}
        self._waiting: list[Call] = []
        self._entering: list[Call] = []  # neither waiting any more nor in flight yet
        self._flights = Flights(self._forwards, max_batch, self._sample)
        self._running = False
        self._holds = 0
        self._stale = False
        self._lock = threading.Lock()  # around what both threads touch: sessions, waiting calls, the flags
        self._executor = executor or ThreadPoolExecutor(1, "engine")
        self._own_executor = executor is None

    def open(self, session_id: str, adapter: str | None = None) -> None:
        with self._lock:
            self._sessions.setdefault(session_id, Session(adapter))

    def close(self, session_id: str) -> None:
        with self._lock:
            self._sessions.pop(session_id, None)
        if self.deterministic:
            self._wake()

    # --- weights ------------------------------------------------------------------------------------------------------

    def wake(self) -> None:
        """Nothing to take: caches grow with what is asked."""

    def sleep(self) -> None:
        """Forget every session's cache."""
        with self._lock:
            for session in self._sessions.values():
                session.forget()

    def update_weights(self, version: int | str) -> None:
        """Forget everything computed with the old weights; call it while nothing is sampled, or in `exclusively`.

        Rows in flight keep what they sampled and go on with the new weights.
        """
        self.version = version
        self.sleep()
        self._stale = True
        if not self.policy.vision_frozen:
            self.policy.forget_images()

    def shutdown(self) -> None:
        """End the engine's own thread."""
        if self._own_executor:
            self._executor.shutdown(wait=False)

    async def exclusively(self, work: Callable[[], T]) -> T:
        """The result of `work`, called by the executor between two forwards."""
        self.hold()
        try:
            return await asyncio.get_running_loop().run_in_executor(self._executor, work)
        finally:
            self.release()

    def hold(self) -> None:
        """Stop after the forward in progress, in continuous batching; rows stay where they are until `release`."""
        with self._lock:
            self._holds += 1

    def release(self) -> None:
        with self._lock:
            self._holds -= 1
        self._wake()

    def kept_bytes(self) -> int:
        """Of the keys and values that sessions keep between turns."""
        with self._lock:
            return sum(s.cache.nbytes for s in self._sessions.values() if s.cache is not None)

    # --- calls --------------------------------------------------------------------------------------------------------

    async def generate(
        self, session_id: str, ids: Sequence[int], images: Sequence[np.ndarray], sampling: Sampling, seed: int
    ) -> Generation:
        if session_id not in self._sessions:
            raise EngineError(f"session {session_id!r} is not open")
        if sampling.max_tokens < 1:
            raise EngineError(f"max_tokens must be at least 1, got {sampling.max_tokens}")
        call = Call(session_id, list(ids), images, sampling, seed, asyncio.get_running_loop().create_future())
        with self._lock:
            self._waiting.append(call)
        self._wake()
        return await call.future

    def abort(self, session_ids: Collection[str] | None = None) -> int:
        """End these sessions' calls, or all, with what they have sampled (finish_reason "abort"); how many they are.

        Of continuous batching; a batch of the deterministic mode runs to its end.
        """
        with self._lock:
            calls = [*self._waiting, *self._entering, *(row.call for row in self._flights.rows)]
            calls = [c for c in calls if session_ids is None or c.session_id in session_ids]
            for call in calls:
                call.aborted = True
            if not self._running:
                self._drop_abandoned()
            return len(calls)

    def _wake(self) -> None:
        if self.deterministic:
            if not self._running and self._ready():
                self._running = True
                asyncio.get_running_loop().create_task(self._drain())
        elif not self._running:
            asyncio.get_running_loop().call_soon(self._take_off)  # whoever is ready in this tick queues its turn first

    def _take_off(self) -> None:
        with self._lock:
            if self._running or not self._ready():
                return
            self._running = True
        self._executor.submit(self._fly)

    def _ready(self) -> bool:
        if self.deterministic:
            return bool(self._waiting) and len(self._waiting) >= len(self._sessions)
        return not self._holds and bool(self._waiting or len(self._flights))

    @staticmethod
    def _answer(call: Call, result: Generation | Exception) -> None:
        """From any thread; nobody may be waiting any more."""

        def settle() -> None:
            if call.future.done():
                return
            if isinstance(result, Exception):
                call.future.set_exception(result)
            else:
                call.future.set_result(result)

        with contextlib.suppress(RuntimeError):  # its event loop is closed
            call.future.get_loop().call_soon_threadsafe(settle)

    def _fail(self, calls: Sequence[Call], error: Exception) -> None:
        if not isinstance(error, EngineError):
            _log.error("%d calls failed", len(calls), exc_info=error)
            error = EngineError(f"{type(error).__name__}: {error}")
        for call in calls:
            self._answer(call, error)

    def _finished(self, row: Row) -> None:
        self.sampled_tokens += len(row.out_ids)
        made = SampledTurn(
            row.out_ids, row.out_logps, row.finish or "stop", row.out_kept or None, tuple(row.versions), row.cached
        )
        self._answer(row.call, made)

    def _rows(self, calls: Sequence[Call]) -> tuple[list[Row], list[Fresh]]:
        """Rows of those calls that can be computed; the others have failed."""
        rows, new = [], []
        for call in calls:
            with self._lock:
                row = Row.of(call, self._sessions.get(call.session_id) or Session())
            try:
                new.append(self._forwards.fresh(row))
                rows.append(row)
            except Exception as error:
                self._fail([call], error)
        return rows, new

    # --- one batch after the other ------------------------------------------------------------------------------------

    async def _drain(self) -> None:
        try:
            await asyncio.sleep(0)  # let every session that is ready in this tick queue its turn
            while self._ready():
                round_ = sorted(self._waiting, key=lambda c: c.session_id)
                self._waiting = []
                for first in range(0, len(round_), self.max_batch):
                    batch = round_[first : first + self.max_batch]
                    await asyncio.get_running_loop().run_in_executor(self._executor, self._run, batch)
                await asyncio.sleep(0)
        finally:
            self._running = False

    def _run(self, calls: Sequence[Call]) -> None:
        try:
            rows = self._whole_batch(calls)
        except Exception as error:
            self._fail(calls, error)
            return
        for row in rows:
            self._finished(row)

    @torch.inference_mode()
    def _whole_batch(self, calls: Sequence[Call]) -> list[Row]:
        self.policy.eval()
        rows, new = self._rows(calls)
        if not rows:
            return rows
        active = list(rows)
        width = max(len(fresh.ids) for fresh in new)
        cache = self._forwards.empty_cache(len(rows), len(rows), max(row.length for row in rows) + width + GROW_BY)
        logits = self._forwards.prefill(active, new, cache)
        while True:
            self._sample(active, logits)
            still = [i for i, row in enumerate(active) if row.finish is None]
            for i, row in enumerate(active):
                if row.finish is not None and row.session.cache is None:
                    row.keep(cache.kv[:, :, i])
            if not still:
                return rows
            if len(still) < _COMPACT_BELOW * len(active):
                cache = cache.select(still)
                active = [active[i] for i in still]
            logits = self._forwards.decode(active, cache)

    # --- continuous batching ------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def _fly(self) -> None:
        """Step by step, in the executor, until nothing is in flight or somebody holds."""
        self.policy.eval()
        while True:
            with self._lock:
                self._entering = []
                self._drop_abandoned()
                self._running = self._ready()
                if not self._running:
                    return
                stale, self._stale = self._stale, False
                entering = self._admitted()
            for adapter, calls in entering.items():
                flying = self._flights.rows_of(adapter)  # rows that fail to start over are in no flight any more
                try:
                    with self._adapted(adapter):
                        self._advance(adapter, stale)
                        self._enter(adapter, calls)
                except Exception as error:
                    self._flights.drop(adapter)
                    self._fail([*calls, *(row.call for row in flying)], error)

    def _admitted(self) -> dict[str | None, list[Call]]:
        """Calls that find a place, by adapter; every adapter in flight is there. Needs the lock."""
        free = min(self.max_batch - len(self._flights), self._prefilled_at_once())
        self._entering, self._waiting = self._waiting[:free], self._waiting[free:]
        by_adapter: dict[str | None, list[Call]] = {adapter: [] for adapter in self._flights.adapters}
        for call in self._entering:
            by_adapter.setdefault(self._sessions[call.session_id].adapter, []).append(call)
        return by_adapter

    def _prefilled_at_once(self) -> int:
        """How many of the calls that waited longest one forward computes, so that rows in flight wait for no longer."""
        width = 0
        for i, call in enumerate(self._waiting):
            width = max(width, len(call.ids) - len(self._sessions[call.session_id].ids))
            if i and (i + 1) * width > _PREFILL_TOKENS:
                return i
        return len(self._waiting)

    def _advance(self, adapter: str | None, stale: bool) -> None:
        if adapter in self._flights.adapters:
            self._land(self._flights.start_over(adapter) if stale else self._flights.step(adapter))

    def _enter(self, adapter: str | None, calls: Sequence[Call]) -> None:
        """A batch of newcomers that fails leaves the rows in flight alone."""
        try:
            rows, new = self._rows(calls)
            if rows:
                self._land(self._flights.enter(adapter, rows, new))
        except Exception as error:
            self._fail(calls, error)

    def _land(self, ended: Iterable[tuple[Row, Tensor]]) -> None:
        """Sessions keep what was computed for them, callers go on."""
        for row, kv in ended:
            with self._lock:
                if not self._stale:
                    row.keep(kv)
            self._finished(row)

    def _drop_abandoned(self) -> None:
        """Let go of calls that nobody waits for, that were aborted, or whose session is closed. Needs the lock."""
        for call in self._waiting:
            if call.aborted:
                self._answer(call, SampledTurn([], [], "abort"))
            elif call.session_id not in self._sessions:
                self._answer(call, EngineError(f"session {call.session_id!r} was closed"))
        self._waiting = [
            c for c in self._waiting if c.session_id in self._sessions and not (c.aborted or c.future.done())
        ]
        self._flights.remove(self._is_abandoned)

    def _is_abandoned(self, row: Row) -> bool:
        if row.call.aborted:
            row.finish = "abort"
            self._finished(row)
        elif self._sessions.get(row.call.session_id) is not row.session:
            self._answer(row.call, EngineError(f"session {row.call.session_id!r} was closed"))
        else:
            return row.call.future.done()
        return True

    # --- sampling -----------------------------------------------------------------------------------------------------

    def _sample(self, rows: Sequence[Row], logits: Tensor) -> None:
        """One token for every row still sampling; rows with equal settings are drawn together."""
        settings: dict[tuple[float, float, bool], list[int]] = {}
        for i, row in enumerate(rows):
            if row.finish is None:
                s = row.call.sampling
                settings.setdefault((s.temperature, s.top_p, s.sampling_mask), []).append(i)
        for (temperature, top_p, masked), members in settings.items():
            uniforms = torch.tensor([rows[i].random.uniform() for i in members], dtype=torch.float64)
            picked = logits[torch.tensor(members, device=logits.device)]
            ids, logps, kept = sample(picked, temperature, top_p, uniforms.to(logits.device), return_kept=masked)
            if kept is not None:
                for i, allowed in zip(members, kept, strict=True):
                    rows[i].out_kept.append(allowed)
            for i, token, logp in zip(members, ids.tolist(), logps.tolist(), strict=True):
                row = rows[i]
                if not row.versions or row.versions[-1][0] != self.version:
                    row.versions.append((self.version, len(row.out_ids)))
                row.out_ids.append(token)
                row.out_logps.append(logp)
                if token in row.call.sampling.stop_ids:
                    row.finish = "stop"
                elif len(row.out_ids) >= row.call.sampling.max_tokens:
                    row.finish = "length"
