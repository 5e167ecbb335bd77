"""Workers, one process a device, and the bounded queue before them. All of it belongs to one event loop."""

from __future__ import annotations

import asyncio
import json
import math
import pickle
import signal
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from genevolve_fast.protocols import RenderError
from genevolve_fast.render.job import Job, Offer
from genevolve_fast.render.worker import HEADER, frame

MAX_PAUSE_S = 60.0  # between two starts of a worker that does not come up
_READ_BUFFER = 1 << 22


class RefusedError(Exception):
    """A request that gets no picture: the reason, its HTTP status, and seconds after which asking again may help."""

    def __init__(self, reason: str, status: int, retry_after: int | None = None) -> None:
        super().__init__(reason)
        self.status = status
        self.retry_after = retry_after


class _WorkerGoneError(Exception):
    """The process ended; the message says how."""


@dataclass(frozen=True)
class PoolSettings:
    """How many pictures wait and for how long; seconds, bytes. Raises ValueError.

    queue: pictures that wait before further ones are refused, besides those being drawn.
    max_batch: pictures that one call draws together; window_s: how long a free worker waits for such company.
    job_timeout_s: of one call of the pipeline; a worker that takes longer is killed.
    """

    queue: int = 64
    queue_bytes: int = 4 << 30
    max_batch: int = 1
    window_s: float = 0.02
    job_timeout_s: float = 600.0
    queue_timeout_s: float = 1800.0
    start_timeout_s: float = 1800.0

    def __post_init__(self) -> None:
        for name in ("queue", "queue_bytes", "max_batch", "job_timeout_s", "queue_timeout_s", "start_timeout_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0")


@dataclass(eq=False)
class _Ticket:
    job: Job
    future: asyncio.Future
    accepted: float  # time.monotonic()
    deaths: int = 0  # of workers that were drawing it


@dataclass(eq=False)
class Worker:
    """A device and the process that draws on it."""

    device: str
    state: str = "starting"  # "starting" | "idle" | "drawing" | "restarting" | "ended"
    pid: int | None = None
    restarts: int = 0
    reason: str = ""  # of the last restart
    process: asyncio.subprocess.Process | None = None
    drawing: list[_Ticket] = field(default_factory=list)

    def status(self) -> dict[str, Any]:
        shown = {"device": self.device, "state": self.state, "pid": self.pid, "restarts": self.restarts}
        return shown | ({"last_restart": self.reason} if self.reason else {})


class Observer:
    """What the pool tells; the service counts it."""

    def drawn(self, batch: int, seconds: float) -> None: ...

    def waited(self, seconds: float) -> None: ...

    def restarted(self) -> None: ...


class Pool:
    """Draws jobs on several devices. `start` and `close` it in the loop in which it is used.

    `broken` holds the reason when a worker cannot come up at its first start: the configuration is wrong then.
    """

    def __init__(
        self,
        factory: str,
        arguments: Mapping[str, Any],
        devices: Sequence[str],
        settings: PoolSettings,
    ) -> None:
        self.settings = settings
        self.workers = [Worker(device) for device in devices]
        self.offer: Offer | None = None  # known once a worker is up
        self.draining = False
        self.broken: asyncio.Future[str]
        self._factory, self._arguments = factory, json.dumps(dict(arguments))
        self._observer = Observer()
        self._waiting: deque[_Ticket] = deque()
        self._arrived: asyncio.Event
        self._arriving = 0
        self._seconds = 1.0  # that one call takes, a running mean
        self._tasks: list[asyncio.Task] = []

    def observe(self, observer: Observer) -> None:
        """Tell `observer` from now on."""
        self._observer = observer

    # --- requests -----------------------------------------------------------------------------------------------------

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def busy(self) -> int:
        """Pictures being drawn."""
        return sum(len(worker.drawing) for worker in self.workers)

    def check_room(self) -> None:
        """Raises RefusedError where one more request cannot be taken now."""
        if self.draining:
            raise RefusedError("the service is ending: ask another one, or this one once it is back", 503, 5)
        if len(self._waiting) + self._arriving >= self.settings.queue:
            raise RefusedError(f"{self.settings.queue} pictures wait already", 503, self._retry_after())

    def reserve(self) -> _Reservation:
        """A place in the queue while a request is still being read. Raises RefusedError."""
        self.check_room()
        return _Reservation(self)

    async def submit(self, job: Job, place: _Reservation) -> np.ndarray:
        """The picture; a caller that is cancelled leaves the queue. Raises RefusedError, RenderError."""
        place.give_back()
        self.check_room()
        if self.offer is not None and (reason := self.offer.refusal(job)):
            raise RefusedError(reason, 422)
        if sum(t.job.nbytes for t in self._waiting) + job.nbytes > self.settings.queue_bytes:
            raise RefusedError("the references of the waiting pictures fill the memory", 503, self._retry_after())
        loop = asyncio.get_running_loop()
        ticket = _Ticket(job, loop.create_future(), time.monotonic())
        self._waiting.append(ticket)
        self._arrived.set()
        timer = loop.call_later(self.settings.queue_timeout_s, self._expire, ticket)
        try:
            return await ticket.future
        finally:
            timer.cancel()
            self._forget(ticket)

    def _retry_after(self) -> int:
        calls = (len(self._waiting) + self.busy) / (max(1, len(self.workers)) * self.settings.max_batch)
        return min(60, max(1, math.ceil(calls * self._seconds / 2)))  # half of the queue is gone by then

    def _expire(self, ticket: _Ticket) -> None:
        if ticket in self._waiting:
            reason = f"no worker was free for {self.settings.queue_timeout_s:.4g} s"
            self._refuse(ticket, RefusedError(reason, 503, self._retry_after()))
            self._forget(ticket)

    def _forget(self, ticket: _Ticket) -> None:
        with suppress(ValueError):
            self._waiting.remove(ticket)
        if not self._waiting:
            self._arrived.clear()

    def _refuse(self, ticket: _Ticket, error: Exception) -> None:
        if not ticket.future.done():
            ticket.future.set_exception(error)

    # --- start and end ------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        self.broken = asyncio.get_running_loop().create_future()
        self._arrived = asyncio.Event()
        self._tasks = [asyncio.ensure_future(self._keep(worker)) for worker in self.workers]

    def drain(self, within_s: float) -> None:
        """Take no more; what is left after `within_s` is refused."""
        if not self.draining:
            self.draining = True
            asyncio.get_running_loop().call_later(within_s, self.refuse_all, "the service ended before it was drawn")

    def refuse_all(self, reason: str) -> None:
        for ticket in [*self._waiting, *(t for w in self.workers for t in w.drawing)]:
            self._refuse(ticket, RefusedError(reason, 503, 5))
        self._waiting.clear()
        self._arrived.clear()

    async def close(self) -> None:
        """End the workers; jobs that are left are refused."""
        self.draining = True
        self.refuse_all("the service ended before it was drawn")
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # --- one worker ---------------------------------------------------------------------------------------------------

    async def _keep(self, worker: Worker) -> None:
        """Start the worker's process again and again, for as long as the pool is open."""
        failures = 0
        ever_ready = False
        while True:
            try:
                offer = await self._spawn(worker)
                failures, ever_ready = 0, True
                self.offer = offer
                await self._feed(worker, offer)
            except _WorkerGoneError as gone:
                worker.reason = str(gone)
            finally:
                await self._end(worker)
            if not ever_ready:
                worker.state = "ended"
                if not self.broken.done():
                    self.broken.set_result(f"{worker.device}: {worker.reason}")
                return
            worker.state = "restarting"
            worker.restarts += 1
            self._observer.restarted()
            print(f"worker of {worker.device}: {worker.reason}; it is started again", file=sys.stderr, flush=True)
            failures += 1
            if failures > 1:
                await asyncio.sleep(min(MAX_PAUSE_S, 2.0 ** (failures - 2)))

    async def _spawn(self, worker: Worker) -> Offer:
        """Raises _WorkerGoneError."""
        command = sys.executable, "-m", "genevolve_fast.render.worker", self._factory, worker.device, self._arguments
        try:
            worker.process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                limit=_READ_BUFFER,
                start_new_session=True,  # a Ctrl-C in the terminal goes to the service alone
            )
        except OSError as error:  # no memory, processes or files left just now
            raise _WorkerGoneError(f"its process cannot be started: {error.strerror}") from None
        worker.pid = worker.process.pid
        try:
            what, value = await asyncio.wait_for(self._receive(worker), self.settings.start_timeout_s)
        except asyncio.TimeoutError:
            raise _WorkerGoneError(f"not up after {self.settings.start_timeout_s:.4g} s") from None
        if what == "failed":
            raise _WorkerGoneError(value)
        return value

    async def _feed(self, worker: Worker, offer: Offer) -> None:
        """Give the worker jobs until it ends. Raises _WorkerGoneError."""
        died = asyncio.ensure_future(worker.process.wait())
        try:
            while True:
                worker.state = "idle"
                if not await self._work(died):
                    raise _WorkerGoneError(await _how(worker.process))
                if self.settings.max_batch > 1 and self.settings.window_s:
                    await asyncio.sleep(self.settings.window_s)
                if batch := self._take(offer):
                    worker.state = "drawing"
                    await self._draw(worker, batch)
        finally:
            died.cancel()

    async def _work(self, died: asyncio.Future) -> bool:
        """Wait until something waits; False when the worker died before."""
        while not self._waiting and not died.done():
            arrival = asyncio.ensure_future(self._arrived.wait())
            try:
                await asyncio.wait({died, arrival}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                arrival.cancel()
        return not died.done()

    def _take(self, offer: Offer) -> list[_Ticket]:
        """The oldest waiting job and those that can be drawn with it."""
        batch: list[_Ticket] = []
        for ticket in list(self._waiting):
            if len(batch) == self.settings.max_batch or (batch and batch[0].deaths):
                break
            if batch and (ticket.deaths or not self._fits(offer, batch[0].job, ticket.job)):
                continue  # what was drawn when a worker died is drawn alone
            self._forget(ticket)
            if ticket.future.done():
                continue
            if reason := offer.refusal(ticket.job):
                self._refuse(ticket, RefusedError(reason, 422))
                continue
            self._observer.waited(time.monotonic() - ticket.accepted)
            batch.append(ticket)
        return batch

    def _fits(self, offer: Offer, first: Job, other: Job) -> bool:
        key = offer.key(first) if self.settings.max_batch > 1 else None
        return key is not None and key == offer.key(other)

    async def _draw(self, worker: Worker, batch: list[_Ticket]) -> None:
        worker.drawing = batch
        started = time.monotonic()
        limit = self.settings.job_timeout_s
        try:
            what, outcomes = await asyncio.wait_for(self._ask(worker, [t.job for t in batch]), limit)
        except asyncio.TimeoutError:
            if len(batch) == 1:
                self._refuse(batch[0], RefusedError(f"the picture was not drawn within {limit:.4g} s", 504))
            raise _WorkerGoneError(f"killed: it drew for more than {limit:.4g} s") from None
        if what == "lost":
            raise _WorkerGoneError(outcomes)
        seconds = time.monotonic() - started
        self._seconds += 0.2 * (seconds - self._seconds)
        self._observer.drawn(len(batch), seconds)
        worker.drawing = []
        for ticket, outcome in zip(batch, outcomes, strict=True):
            if isinstance(outcome, RenderError):
                self._refuse(ticket, outcome)
            elif not ticket.future.done():
                ticket.future.set_result(outcome)

    async def _ask(self, worker: Worker, jobs: list[Job]) -> tuple[str, Any]:
        try:
            worker.process.stdin.write(frame(jobs))
            await worker.process.stdin.drain()
        except ConnectionError:
            raise _WorkerGoneError(await _how(worker.process)) from None
        return await self._receive(worker)

    async def _receive(self, worker: Worker) -> tuple[str, Any]:
        stdout = worker.process.stdout
        try:
            body = await stdout.readexactly(int.from_bytes(await stdout.readexactly(HEADER), "big"))
        except asyncio.IncompleteReadError:
            raise _WorkerGoneError(await _how(worker.process)) from None
        return pickle.loads(body)

    async def _end(self, worker: Worker) -> None:
        """Nothing of the process is left afterwards, and its jobs are in the queue again or refused."""
        if worker.process is not None:
            with suppress(ProcessLookupError):
                worker.process.kill()
            await worker.process.wait()
        left, worker.drawing = worker.drawing, []
        worker.pid = worker.process = None
        for ticket in reversed(left):
            if ticket.future.done():
                continue
            ticket.deaths += 1
            if ticket.deaths > 1:
                self._refuse(ticket, RefusedError(f"two workers ended while drawing it ({worker.reason})", 500))
            else:
                self._waiting.appendleft(ticket)
                self._arrived.set()


class _Reservation:
    """A place in the queue for a request whose body is being read."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._held = True
        pool._arriving += 1

    def give_back(self) -> None:
        if self._held:
            self._held = False
            self._pool._arriving -= 1


async def _how(process: asyncio.subprocess.Process) -> str:
    """How it ended; a process that only closed its pipe is ended."""
    try:
        status = await asyncio.wait_for(process.wait(), 5)
    except asyncio.TimeoutError:
        process.kill()
        return "it stopped answering"
    return f"killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
