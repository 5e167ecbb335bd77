"""What our own HTTP services share: a key at the door, and work that ends when its client goes away."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Awaitable, Callable, Collection
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from starlette.requests import Request

T = TypeVar("T")


class ClientGoneError(Exception):
    """The client went away before it was answered."""


async def while_connected(raw: Request, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled when the client goes away. Raises ClientGoneError."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(raw))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        gone.cancel()
        task.cancel()


async def _disconnected(raw: Request) -> None:
    while (await raw.receive())["type"] != "http.disconnect":
        pass


class BearerKey:
    """ASGI middleware: requests without the bearer token get what `refuse` makes; `open_paths` need none."""

    def __init__(self, app, key: str, open_paths: Collection[str], refuse: Callable[[], Any]) -> None:
        self.app, self.expected = app, f"Bearer {key}".encode()
        self.open_paths, self.refuse = open_paths, refuse

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "http" and scope["path"] not in self.open_paths:
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self.expected):
                return await self.refuse()(scope, receive, send)
        return await self.app(scope, receive, send)
