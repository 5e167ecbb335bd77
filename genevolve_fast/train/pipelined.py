"""When a step's rollouts are sampled: in their turn, or one step ahead while the policy trains."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field

from genevolve_fast import event_loop
from genevolve_fast.protocols import TrainedEngine
from genevolve_fast.train.collect import Rollouts
from genevolve_fast.train.run import Run, RunError

Phase = Callable[[str, int], AbstractContextManager]
Collect = Callable[[int, int, Phase], Rollouts]  # (step, updates that the engine's weights have seen, phase)


def open_sampler(staleness: int, run: Run, engine: TrainedEngine, collect: Collect, steps: int) -> InTurn:
    """What gives a run of `steps` steps its judged rollouts, none older than `staleness` updates."""
    return OneStepAhead(run, engine, collect, steps) if staleness else InTurn(run, engine, collect)


class InTurn:
    """Synchronous: a step begins by sampling with the weights that it starts from.

    For each step `next`, then, when the policy has changed, `wait` and `sync`.
    """

    staleness = 0

    def __init__(self, run: Run, engine: TrainedEngine, collect: Collect) -> None:
        self.run, self.engine, self.collect = run, engine, collect
        self.version = 0  # updates that the engine's weights have seen
        self._ages: dict[str, float] = {}

    def next(self, step: int) -> Rollouts:
        """The step's judged rollouts. Raises RunError for those that are too old."""
        return self.within(self.collect(step, self.version, self.run.phase), step)

    def wait(self, step: int) -> None:
        """Until nothing is sampled."""

    def sync(self, version: int) -> None:
        """Give the engine the weights as they are after `version` updates."""
        self.engine.update_weights(version)
        self.version = version

    def metrics(self) -> dict[str, float]:
        """Of the last step."""
        return self._ages

    def close(self) -> None:
        """End what is under way."""

    def within(self, rollouts: Rollouts, step: int) -> Rollouts:
        """`rollouts`, if the weights that sampled each are at most `staleness` updates behind the step's."""
        ages = [step - t.policy_step for t in rollouts.trajectories]
        if wrong := [age for age in ages if not 0 <= age <= self.staleness]:
            raise RunError(
                f"step {step}: {len(wrong)} of {len(ages)} rollouts were sampled with weights {wrong[0]} updates old, "
                f"and rollout.staleness is {self.staleness}: remove rollouts/step_{step:06d}.safetensors of the run "
                "and run again with --resume"
            )
        if ages:  # a rank may have none
            self._ages = {"rollout/staleness/mean": sum(ages) / len(ages), "rollout/staleness/max": float(max(ages))}
        return rollouts


@dataclass
class _Ahead:
    """The rollouts of a step that are sampled in the other thread."""

    step: int
    future: Future[Rollouts] | None = None
    began: float = 0.0
    ended: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)


class OneStepAhead(InTurn):
    """One step off: `next(k)` starts on step k + 1, in a thread beside the update of step k.

    The thread has an event loop of its own. Weights change only while nothing is sampled: `sync` raises otherwise. What
    fails in the thread is raised by the `next` that asks for it, after the step before has been trained and kept.
    """

    staleness = 1

    def __init__(self, run: Run, engine: TrainedEngine, collect: Collect, steps: int) -> None:
        super().__init__(run, engine, collect)
        self.steps = steps
        self._thread = ThreadPoolExecutor(1, "sampler")
        self._loop = self._thread.submit(event_loop.own).result()
        self._ending = threading.Event()
        self._ahead: _Ahead | None = None
        self._overlap: dict[str, float] = {}

    def next(self, step: int) -> Rollouts:
        ahead = self._ahead if self._ahead and self._ahead.step == step else self._start(step)
        with self.run.phase("wait_rollout", step):
            rollouts = self.within(ahead.future.result(), step)
        self._ahead, self._overlap = None, {}
        if step + 1 < self.steps:
            self._ahead = self._start(step + 1)
        return rollouts

    def wait(self, step: int) -> None:
        ahead = self._ahead
        if ahead is None:
            return
        asked = time.perf_counter()
        with self.run.phase("wait_rollout", step):
            wait([ahead.future])
        beside = max(0.0, min(asked, ahead.ended) - ahead.began)
        self._overlap = {"perf/overlap_seconds": beside}
        self._overlap |= {f"ahead_s/{name}": seconds for name, seconds in ahead.seconds.items()}

    def sync(self, version: int) -> None:
        if self._ahead and not self._ahead.future.done():
            raise RuntimeError(f"the rollouts of step {self._ahead.step} are being sampled: weights may not change now")
        super().sync(version)

    def metrics(self) -> dict[str, float]:
        return self._ages | self._overlap

    def close(self) -> None:
        self._ending.set()
        event_loop.cancel(self._loop)
        self._thread.submit(self._loop.close)
        self._thread.shutdown()

    def _start(self, step: int) -> _Ahead:
        ahead = _Ahead(step)
        ahead.future = self._thread.submit(self._sample, ahead, self.version)
        return ahead

    def _sample(self, ahead: _Ahead, version: int) -> Rollouts:
        ahead.began = time.perf_counter()

        @contextmanager
        def phase(name: str, step: int) -> Iterator[None]:
            if self._ending.is_set():
                raise asyncio.CancelledError
            self.run.mark(name, step)
            begin = time.perf_counter()
            try:
                yield
            finally:
                ahead.seconds[name] = ahead.seconds.get(name, 0.0) + time.perf_counter() - begin

        try:
            return self.collect(ahead.step, version, phase)
        finally:
            ahead.ended = time.perf_counter()
