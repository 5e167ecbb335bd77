"""The addresses of a service: the least busy is asked, a failing one is left alone, a restarting one waited for."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx
import numpy as np

from genevolve_fast.incidents import Incidents
from genevolve_fast.net.harmless import one_line
from genevolve_fast.net.pictures import decode_image, from_base64
from genevolve_fast.net.web import (
    Answer,
    Exchange,
    FetchError,
    PerLoop,
    check_status,
    login_of,
    open_transport,
    where_of,
)
from genevolve_fast.protocols import RenderError

SOURCE = "render"  # what incidents count failed attempts as
MAX_SIDE = 16_384  # of a picture that comes back; it is never scaled
_LONGEST_REST_S = 60.0
_ERROR_BYTES = 4096
_MAX_SAID = 300  # characters of what a service says went wrong
_DECODERS = ThreadPoolExecutor(2, "pictures")  # a picture of 40 megapixels needs 500 MB while it is decoded

T = TypeVar("T")


@dataclass(frozen=True)
class CallLimits:
    """How long and how often a picture is asked for."""

    request_timeout_s: float = 1800.0  # of one request
    picture_timeout_s: float = 3600.0  # of one picture: all requests and what lies between them
    attempts: int = 3
    patience_s: float = 120.0  # a service that cannot be reached, answers 5xx or is busy is asked again for so long
    concurrency: int = 4  # requests to one address at a time
    break_after: int = 3  # failures in a row that open an address's circuit
    probe_after_s: float = 5.0  # then it is left alone for so long, and asked once
    max_answer_bytes: int = 64 << 20
    max_pixels: int = 40_000_000


class CallError(FetchError):
    """One request failed. `fault`: of the request, of what answered at this address, or nobody answers there now."""

    def __init__(self, message: str, kind: str, fault: str, retry_after: float | None = None) -> None:
        super().__init__(message, kind, permanent=fault == "request", retry_after=retry_after)
        self.fault = fault


class Endpoint:
    """One address and how it is doing. `failed` counts failures in a row; before `rest_until` it is left alone."""

    def __init__(self, url: str, limits: CallLimits) -> None:
        whole = httpx.URL(url)
        self.url = whole.copy_with(userinfo=b"")
        self.where = where_of(whole)
        self.login = login_of(whole)
        self.secrets = _of_login(whole, self.login)
        self.exchange = Exchange(lambda: open_transport(self.url, limits.concurrency))
        self.limits = limits
        self.active = self.failed = self.turn = 0
        self.rest_until = 0.0

    @property
    def broken(self) -> bool:
        """Its circuit is open, or half open: one request may find out."""
        return self.failed >= self.limits.break_after

    def ready(self, now: float) -> bool:
        return now >= self.rest_until and self.active < (1 if self.broken else self.limits.concurrency)

    def succeeded(self) -> None:
        self.failed, self.rest_until = 0, 0.0

    def failed_with(self, error: CallError, now: float) -> None:
        if error.fault == "request":
            self.succeeded()  # it is there and judged the request
            return
        busy = error.kind == "rate_limited" or error.retry_after is not None
        self.failed += not busy
        rest = min(8.0, 0.25 * 2**self.failed) if error.fault == "away" else 0.0
        if self.broken:
            rest = max(rest, self.limits.probe_after_s)
        if error.retry_after is not None:
            rest = max(rest if self.broken else 0.0, error.retry_after)
        self.rest_until = max(self.rest_until, now + min(rest, _LONGEST_REST_S))


class _Pool:
    """The endpoints as one event loop sees them."""

    def __init__(self, urls: Sequence[str], limits: CallLimits) -> None:
        self.endpoints = [Endpoint(url, limits) for url in urls]
        self._turns = 0
        self._changed = asyncio.Event()

    async def take(
        self, avoid: Endpoint | None, away_since: float | None, patience_s: float, deadline: float | None
    ) -> Endpoint:
        """A free endpoint, waited for. Raises FetchError: all circuits stay open too long, or the deadline is over."""
        clock, since = asyncio.get_running_loop().time, away_since
        while True:
            now = clock()
            if ready := [e for e in self.endpoints if e.ready(now)]:
                best = min(ready, key=lambda e: (e is avoid, e.failed > 0, e.active, e.turn))
                self._turns += 1
                best.active, best.turn = best.active + 1, self._turns
                return best
            resting = [e.rest_until for e in self.endpoints if e.rest_until > now]
            if not all(e.broken for e in self.endpoints):
                since = away_since
            elif resting and min(resting) > (since := since or now) + patience_s:
                raise FetchError("", "connect")
            if deadline is not None and now >= deadline:
                raise FetchError("", "timeout")
            until = min([*resting, *([] if deadline is None else [deadline])], default=None)
            try:
                await asyncio.wait_for(self._changed.wait(), None if until is None else max(0.001, until - now))
            except asyncio.TimeoutError:
                continue

    def give_back(self, endpoint: Endpoint) -> None:
        endpoint.active -= 1
        self._changed.set()
        self._changed = asyncio.Event()


class Endpoints:
    """Calls to one of several addresses; the next one is tried where an attempt fails. Every failed one is counted."""

    def __init__(self, urls: Sequence[str], limits: CallLimits, incidents: Incidents) -> None:
        self._urls, self.limits, self._incidents = tuple(urls), limits, incidents
        self._pools = PerLoop(lambda: _Pool(self._urls, limits))

    async def call(self, ask: Callable[[Endpoint, float], Awaitable[T]]) -> T:
        """What `ask(endpoint, seconds)` returns for the first endpoint that answers. Raises RenderError.

        `ask` raises FetchError; one that is no CallError is a fault of what answered, or of the way to it.
        """
        pool, clock, limits = self._pools(), asyncio.get_running_loop().time, self.limits
        tries, error, last = 0, CallError("no service answers", "connect", "away"), None
        began = away_since = None
        while True:
            deadline = None if began is None else began + limits.picture_timeout_s  # waiting for a turn is no fault
            try:
                last = await pool.take(last, away_since, limits.patience_s, deadline)
            except FetchError as reason:
                raise self._given_up(error, tries, reason.kind) from None
            began = began or clock()
            try:
                left = began + limits.picture_timeout_s - clock()
                answer = await ask(last, min(limits.request_timeout_s, left))
                last.succeeded()
                return answer
            except FetchError as failure:
                tries, error = tries + 1, _typed(failure)
                self._incidents.note(SOURCE, error.kind)
                now = clock()
                last.failed_with(error, now)
                away_since = (away_since or now) if error.fault == "away" else None
                if self._over(error, tries, now - began, now - (away_since or now)):
                    raise self._given_up(error, tries) from None
            finally:
                pool.give_back(last)

    def _over(self, error: CallError, tries: int, seconds: float, away_s: float) -> bool:
        if error.fault == "request" or seconds >= self.limits.picture_timeout_s:
            return True
        if error.kind == "client_error":  # this address does not want us; another may
            return tries >= min(len(self._urls), self.limits.attempts)
        patient = error.fault == "away" and away_s < self.limits.patience_s
        return tries >= self.limits.attempts and not patient

    def _given_up(self, error: CallError, tries: int, why: str = "") -> RenderError:
        if why == "timeout":
            return RenderError(f"no picture within {self.limits.picture_timeout_s:g} s: {error}", "timeout")
        if not tries:
            who = "every address" if len(self._urls) > 1 else "the address"
            return RenderError(f"{error}: {who} failed {self.limits.break_after} times in a row", error.kind)
        return RenderError(f"{error}{f' ({tries} attempts)' if tries > 1 else ''}", error.kind)


def _typed(failure: FetchError) -> CallError:
    if isinstance(failure, CallError):
        return failure
    fault = "away" if failure.kind in ("connect", "server_error", "rate_limited") else "service"
    return CallError(str(failure), failure.kind, fault, failure.retry_after)


async def post(
    endpoint: Endpoint, body: bytes, headers: Mapping[str, str], timeout_s: float, secrets: Sequence[str] = ()
) -> Answer:
    """The 2xx answer to a JSON body. Raises FetchError with what the service said, `secrets` removed."""
    try:
        request = httpx.Request(
            "POST",
            endpoint.url,
            headers={"Content-Type": "application/json", **endpoint.login, **headers},
            content=body,
        )
    except ValueError:
        raise CallError(f"{endpoint.where} cannot be asked", "other", "request") from None
    answer = await endpoint.exchange(
        request,
        where=endpoint.where,
        max_bytes=endpoint.limits.max_answer_bytes,
        timeout_s=timeout_s,
        error_bytes=_ERROR_BYTES,
    )
    try:
        check_status(answer, endpoint.where)
    except FetchError as error:
        raise _refusal(answer, error, (*secrets, *endpoint.secrets)) from None
    return answer


def _refusal(answer: Answer, error: FetchError, secrets: Sequence[str]) -> CallError:
    said = told(answer.body, secrets)
    message = f"{error}: {said}" if said else str(error)
    if answer.status in (400, 413, 415, 422):
        return CallError(message, "client_error", "request")
    if answer.status in (408, 504):  # a gateway's word for it: the request may be what takes too long
        return CallError(message, "timeout", "service", error.retry_after)
    fault = "away" if error.kind in ("server_error", "rate_limited") else "service"
    return CallError(message, error.kind, fault, error.retry_after or _retry_delay(answer.body))


def _retry_delay(body: bytes) -> float | None:
    """Seconds that Google's services ask for inside the error."""
    found = re.search(rb'"retryDelay"\s*:\s*"(\d{1,6}(?:\.\d{1,9})?)s"', body)
    return float(found[1]) if found else None


def told(body: bytes, secrets: Sequence[str] = ()) -> str:
    """What an error's body says, on one line."""
    text = body.decode("utf-8", "replace")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    for name in ("error", "message", "detail"):
        if isinstance(value, dict) and value.get(name):
            value = value[name]
    return without(secrets, value if isinstance(value, str) else text, _MAX_SAID)


def without(secrets: Sequence[str], text: str, limit: int = _MAX_SAID) -> str:
    """`text` on one line of at most `limit` characters, stars for `secrets`: taken out first, a cut hides one."""
    for secret in secrets:
        text = text.replace(secret, "***")
    return one_line(text, limit)


def _of_login(url: httpx.URL, header: Mapping[str, str]) -> tuple[str, ...]:
    """What of an address's login a service may repeat."""
    sent = header.get("Authorization", "").removeprefix("Basic ")
    return tuple(s for s in (sent, url.password, url.username) if len(s) > 3)


def parsed(body: bytes, where: str) -> dict[str, Any]:
    """A JSON object. Raises FetchError."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise FetchError(f"{where} did not answer with a JSON object", "bad_response")
    return value


async def off_loop(work: Callable[..., T], *arguments: Any) -> T:
    """`work(*arguments)` in one of two threads: work on pictures must neither hold up requests nor fill the memory."""
    return await asyncio.get_running_loop().run_in_executor(_DECODERS, work, *arguments)


def picture_of(text: object, where: str, max_pixels: int) -> np.ndarray:
    """uint8 [height, width, 3] of a picture's base64. Raises FetchError naming `where`."""
    try:
        return decode_image(from_base64(text), max_pixels, MAX_SIDE).pixels
    except FetchError as error:
        raise CallError(f"{where} sent no picture: {error}", error.kind, "service") from None
