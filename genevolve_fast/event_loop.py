"""One event loop for each thread: HTTP clients keep their connections from one phase of a step to the next."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")
_of_thread = threading.local()


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """As asyncio.run, on this thread's loop, which stays. Raises RuntimeError inside a running loop."""
    loop = own()
    task = loop.create_task(coroutine)
    try:
        return loop.run_until_complete(task)
    except BaseException:
        _cancel(loop)  # nothing may go on in the next phase that this one began
        raise


def own() -> asyncio.AbstractEventLoop:
    """This thread's loop, made where there is none yet."""
    loop = getattr(_of_thread, "loop", None)
    if loop is None or loop.is_closed():
        loop = _of_thread.loop = asyncio.new_event_loop()
    return loop


def cancel(loop: asyncio.AbstractEventLoop) -> None:
    """Cancel what `run` runs on another thread's loop; `run` raises CancelledError there."""
    loop.call_soon_threadsafe(lambda: [task.cancel() for task in asyncio.all_tasks(loop)])


def _cancel(loop: asyncio.AbstractEventLoop) -> None:
    left = asyncio.all_tasks(loop)
    for task in left:
        task.cancel()
    with suppress(Exception, asyncio.CancelledError):
        loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
