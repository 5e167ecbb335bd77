"""SIGTERM, as a scheduler sends before it takes the machine: a checkpoint of the last whole step, then a clean end."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress

from genevolve_fast.train.ranks import Ranks, sendable


class Preempted(SystemExit):
    """The run was asked to end, an exit with status 0. asyncio lets it through at once, as it does no other exception.

    It takes no arguments, or it could not be pickled for other ranks.
    """


class Stopping:
    """Whether this run was asked to end, and where it may be told so.

    A signal between the lines of an optimizer step must not be an exception: it waits for the next `pause`, which all
    ranks reach. Only inside `anytime`, where nothing of the policy changes, it interrupts at once.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._asked = False
        self._anytime = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """SIGTERM asks to end while inside; in the main thread only, where Python runs handlers."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, self._ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def _ask(self, *_) -> None:
        first, self._asked = not self._asked, True
        if first:
            with suppress(RuntimeError):  # the signal may have come in the midst of a print
                print("SIGTERM: saving the last whole step and ending", flush=True)
        if self._anytime:
            self._anytime = False
            raise Preempted

    @contextmanager
    def anytime(self) -> Iterator[None]:
        """Preempted may be raised at any point inside."""
        self._anytime = True
        try:
            if self._asked:
                raise Preempted
            yield
        finally:
            self._anytime = False

    def pause(self) -> None:
        """Raise Preempted where any rank was asked; all ranks call it equally often."""
        if self._ranks.any(self._asked):
            self._asked = True
            raise Preempted

    def alone(self, do: Callable[[], object], *, anytime: bool) -> None:
        """`do` on this rank, which exchanges nothing; what it raises is raised on all ranks, which meet here."""
        error: BaseException | None = None
        try:
            with self.anytime() if anytime else nullcontext():
                do()
        except (Exception, Preempted) as e:
            error = e
        told = [e for e in self._ranks.gather(error if self._ranks.world == 1 else sendable(error)) if e is not None]
        if any(isinstance(e, Preempted) for e in told):
            raise Preempted
        if told:
            raise error or told[0]
