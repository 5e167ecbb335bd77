"""One event loop for the whole process: HTTP clients keep their connections from one phase of a step to the next."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")
_loop: asyncio.AbstractEventLoop | None = None


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """As asyncio.run, on a loop that stays. For the main thread; raises RuntimeError inside a running loop."""
    global _loop
    if _loop is None or _loop.is_closed():
        _loop = asyncio.new_event_loop()
    task = _loop.create_task(coroutine)
    try:
        return _loop.run_until_complete(task)
    except BaseException:
        _cancel(_loop)  # nothing may go on in the next phase that this one began
        raise


def _cancel(loop: asyncio.AbstractEventLoop) -> None:
    left = asyncio.all_tasks(loop)
    for task in left:
        task.cancel()
    with suppress(Exception, asyncio.CancelledError):
        loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
