"""One HTTP exchange at a time: bounded, timed, its failures typed; nothing of a request stands in a message."""

from __future__ import annotations

import asyncio
import base64
import logging
import re
import ssl
import zlib
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from functools import lru_cache
from typing import Generic, TypeVar
from urllib.request import getproxies, proxy_bypass

import httpx
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, stop_after_attempt, wait_random_exponential
from tenacity.stop import stop_before_delay

from genevolve_fast.protocols import ToolError

logging.getLogger("hpack").setLevel(logging.INFO)  # at DEBUG it writes every header, keys included

MAX_RETRY_AFTER_S = 10.0
TRANSIENT = {"connect", "timeout", "rate_limited", "server_error"}
_FIRST_WAIT = wait_random_exponential(multiplier=0.3, max=4)

T = TypeVar("T")


class FetchError(ToolError):
    """A ToolError that knows whether asking again can help.

    `permanent`: it belongs to the content and may be remembered; `retry_after`: seconds the server asked for.
    """

    def __init__(self, message: str, kind: str, *, permanent: bool = False, retry_after: float | None = None) -> None:
        super().__init__(message, kind)
        self.permanent = permanent
        self.retry_after = retry_after


@lru_cache(maxsize=1)
def ssl_context() -> ssl.SSLContext:
    """httpx's default, read once: every event loop has a transport of its own."""
    return httpx.create_ssl_context()


class PerLoop(Generic[T]):
    """One value for each event loop: connections and semaphores cannot move between loops."""

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._values: dict[asyncio.AbstractEventLoop, T] = {}

    def __call__(self) -> T:
        loop = asyncio.get_running_loop()
        if loop not in self._values:
            for ended in [other for other in list(self._values) if other.is_closed()]:  # loops may run in other threads
                self._values.pop(ended, None)  # and with it the sockets of its connections
            self._values[loop] = self._make()
        return self._values[loop]


@dataclass(frozen=True)
class Answer:
    status: int
    headers: httpx.Headers
    body: bytes  # of a 2xx answer; of others the first bytes that were asked for, undecoded


class Exchange:
    """Requests over a bare transport: no cookies, no redirects, no log lines with addresses in them."""

    def __init__(self, transport: Callable[[], httpx.AsyncBaseTransport]) -> None:
        self._transport = PerLoop(transport)

    async def __call__(
        self,
        request: httpx.Request,
        *,
        where: str,
        max_bytes: int,
        timeout_s: float,
        inspect: Callable[[httpx.Headers], None] = lambda headers: None,
        error_bytes: int = 0,
    ) -> Answer:
        """The answer to `request`, its body of at most `max_bytes` also when decompressed.

        Of an answer that is no 2xx the first `error_bytes` are kept, in which services say what went wrong. `inspect`
        sees the headers of a 2xx answer before its body is read and may raise. Raises FetchError, whose message names
        `where` and nothing else of the request.
        """
        request.headers.setdefault("Accept-Encoding", "identity")
        request.headers.setdefault("User-Agent", "genevolve-fast")
        request.extensions["timeout"] = httpx.Timeout(timeout_s, connect=min(10.0, timeout_s)).as_dict()
        transport = self._transport()
        try:
            return await asyncio.wait_for(
                self._send(transport, request, where, max_bytes, inspect, error_bytes), timeout_s
            )
        except FetchError:
            raise
        except (asyncio.TimeoutError, httpx.TimeoutException):
            raise FetchError(f"{where} did not answer within {timeout_s:.3g} s", "timeout") from None
        except (httpx.NetworkError, OSError):
            raise FetchError(f"no connection to {where}", "connect") from None
        except Exception as error:  # whatever a hostile server makes the protocol stack raise
            if isinstance(error, httpx.RemoteProtocolError) and re.search("disconnected|closed", str(error)):
                raise FetchError(f"{where} hung up", "connect") from None
            raise FetchError(f"{where} does not speak HTTP: {type(error).__name__}", "bad_response") from None

    async def _send(
        self, transport, request: httpx.Request, where: str, max_bytes: int, inspect, error_bytes: int
    ) -> Answer:
        response = await transport.handle_async_request(request)
        try:
            if not response.is_success:
                said = await _beginning(response, error_bytes)
                return Answer(response.status_code, response.headers, said)
            inspect(response.headers)
            announced = response.headers.get("content-length", "")
            if announced.isdecimal() and int(announced[:20]) > max_bytes:
                raise _too_large(where, max_bytes)
            body = bytearray()
            async for chunk in response.stream:
                body += chunk
                if len(body) > max_bytes:
                    raise _too_large(where, max_bytes)
            encoding = response.headers.get("content-encoding", "").strip().lower()
            return Answer(response.status_code, response.headers, _decoded(bytes(body), encoding, where, max_bytes))
        finally:
            await response.aclose()


async def _beginning(response: httpx.Response, size: int) -> bytes:
    """The first `size` bytes of a body, or what came of them."""
    said = bytearray()
    if size:
        with suppress(httpx.HTTPError):  # the status says enough
            async for chunk in response.stream:
                said += chunk
                if len(said) >= size:
                    break
    return bytes(said[:size])


def _too_large(where: str, max_bytes: int) -> FetchError:
    return FetchError(f"the answer of {where} exceeds {max_bytes} bytes", "too_large", permanent=True)


def _decoded(body: bytes, encoding: str, where: str, max_bytes: int) -> bytes:
    """Undo the content encoding of a server that ignored `Accept-Encoding: identity`, never past the limit."""
    if encoding in ("", "identity"):
        return body
    if encoding not in ("gzip", "x-gzip", "deflate"):
        raise FetchError(f"{where} answers in the encoding {encoding[:20]!r}, nobody asked for it", "bad_response")
    inflate = zlib.decompressobj(wbits=47)
    try:
        out = inflate.decompress(body, max_bytes + 1)
    except zlib.error:
        raise FetchError(f"{where} sends broken {encoding}", "bad_response") from None
    if len(out) > max_bytes:
        raise _too_large(where, max_bytes)
    if not inflate.eof:
        raise FetchError(f"{where} sends broken {encoding}", "bad_response")
    return out


def check_status(answer: Answer, where: str) -> None:
    """Raise FetchError unless the status is a 2xx."""
    status = answer.status
    if 200 <= status < 300:
        return
    kind = "rate_limited" if status == 429 else "server_error" if status >= 500 else "client_error"
    if status < 400:
        kind = "bad_response"
    after = _seconds(answer.headers.get("retry-after", ""))
    raise FetchError(f"{where} answered HTTP {status}", kind, permanent=status in (404, 410), retry_after=after)


def _seconds(retry_after: str) -> float | None:
    """Seconds of a Retry-After header, which holds seconds or a date."""
    if retry_after.isdecimal():
        return float(retry_after[:9])
    try:
        return max(0.0, (parsedate_to_datetime(retry_after) - datetime.now(timezone.utc)).total_seconds())
    except (ValueError, TypeError, OverflowError):
        return None


async def persist(ask: Callable[[], Awaitable[T]], *, attempts: int, within_s: float, note: Callable[[str], None]) -> T:
    """`ask` until it answers: transient failures are asked again, `note` gets the kind of every failed attempt."""

    async def once() -> T:
        try:
            return await ask()
        except FetchError as error:
            note(error.kind)
            raise

    return await AsyncRetrying(
        retry=retry_if_exception(lambda e: isinstance(e, FetchError) and e.kind in TRANSIENT),
        stop=stop_after_attempt(attempts) | stop_before_delay(within_s),
        wait=_pause,
        reraise=True,
    )(once)


def _pause(state: RetryCallState) -> float:
    error = state.outcome.exception()
    if isinstance(error, FetchError) and error.retry_after is not None:
        return min(error.retry_after, MAX_RETRY_AFTER_S)
    return _FIRST_WAIT(state)


def check_address(name: str, address: str) -> None:
    """Raise ValueError unless `address` is one of http or https; the message does not repeat it: it may hold a key."""
    try:
        url = httpx.URL(address)
    except (httpx.InvalidURL, ValueError):
        url = None
    if url is None or url.scheme not in ("http", "https") or not url.host:
        raise ValueError(f"{name} is no http or https address")


def where_of(url: httpx.URL) -> str:
    return f"{url.host}:{url.port}" if url.port else url.host


def login_of(url: httpx.URL) -> dict[str, str]:
    if not url.userinfo:
        return {}
    return {"Authorization": "Basic " + base64.b64encode(f"{url.username}:{url.password}".encode()).decode()}


def open_transport(url: httpx.URL, connections: int) -> httpx.AsyncHTTPTransport:
    """HTTP/2 where offered, through the proxy of the environment: the service is the operator's own choice."""
    proxies = {} if proxy_bypass(url.host) else getproxies()
    proxy = proxies.get(url.scheme) or proxies.get("all")
    if proxy and "://" not in proxy:
        proxy = f"http://{proxy}"
    limits = httpx.Limits(max_connections=connections, keepalive_expiry=15.0)
    try:
        return httpx.AsyncHTTPTransport(verify=ssl_context(), http2=True, limits=limits, proxy=proxy)
    except (ValueError, ImportError):  # they quote the proxy's address
        message = f"the environment's proxy for {url.scheme} cannot be used: set {url.scheme}_proxy to http://host:port"
        raise FetchError(message, "other") from None
