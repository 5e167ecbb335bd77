"""Fetching what the web names: addresses checked after name resolution, sizes before they cost memory."""

from __future__ import annotations

import asyncio
import io
import ipaddress
import logging
import re
import socket
import ssl
import time
import weakref
import zlib
from collections.abc import Awaitable, Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from functools import lru_cache, partial
from typing import Generic, TypeVar

import httpcore
import httpx
import numpy as np
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, stop_after_attempt, wait_random_exponential
from tenacity.stop import stop_before_delay

from genevolve_fast.incidents import Incidents
from genevolve_fast.protocols import ToolError

logging.getLogger("hpack").setLevel(logging.INFO)  # at DEBUG it writes every header, keys included

MAX_REDIRECTS = 5
MAX_RETRY_AFTER_S = 10.0
MAX_ASPECT = 100  # image processors refuse longer strips, and no picture is one
MAX_SCANS = 500  # of a JPEG; progressive ones have about ten, and each passes all pixels though it may hold no byte
EXTENSIONS = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp", "GIF": ".gif"}
_IMAGE_TYPES = re.compile(r"image/(jpe?g|pjpeg|png|x-png|apng|webp|gif)$|(application|binary)/octet-stream$|$")
_TRANSIENT = {"connect", "timeout", "rate_limited", "server_error"}
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


# --- addresses --------------------------------------------------------------------------------------------------------

_RESOLVERS = ThreadPoolExecutor(16, "resolve")  # names that nobody answers for must not hold up files and the cache
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


def is_public(address: str) -> bool:
    """Whether a numeric address is one of the public internet, judged by the IPv4 address embedded in it if any."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        nat64 = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF) if ip in _NAT64 else None
        embedded = ip.ipv4_mapped or ip.sixtofour or nat64
        if embedded:
            return is_public(str(embedded))
        if ip.is_site_local:
            return False
    return ip.is_global and not (ip.is_multicast or ip.is_reserved)


class GuardedBackend(httpcore.AsyncNetworkBackend):
    """Connects to public addresses only, and to the very address that was checked (a name may resolve anew each time).

    `allow_hosts` holds names or `name:port` pairs that may resolve to anything.
    """

    def __init__(self, allow_hosts: Collection[str] = ()) -> None:
        self._allowed = frozenset(host.lower() for host in allow_hosts)
        self._network = httpcore.AnyIOBackend()

    async def connect_tcp(self, host, port, timeout=None, local_address=None, socket_options=None):
        failed: Exception | None = None
        addresses = await self._addresses(host, port, timeout)
        each = timeout / len(addresses) if timeout and addresses else timeout
        for address in addresses:
            try:
                return await self._network.connect_tcp(address, port, each, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failed = error
        raise failed or httpcore.ConnectError(f"{host} has no address")

    async def connect_unix_socket(self, path, timeout=None, socket_options=None):
        raise FetchError("unix sockets are not fetched from", "refused_address", permanent=True)

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def _addresses(self, host: str, port: int, timeout: float | None) -> list[str]:
        ask = partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
        lookup = asyncio.get_running_loop().run_in_executor(_RESOLVERS, ask)
        try:
            found = [entry[4][0] for entry in await asyncio.wait_for(lookup, timeout)]
        except asyncio.TimeoutError:
            raise httpcore.ConnectTimeout(f"no address of {host} in time") from None
        except (OSError, UnicodeError) as error:
            raise httpcore.ConnectError(f"no address of {host}: {error}") from None
        if {host.lower(), f"{host.lower()}:{port}"} & self._allowed:
            return found
        public = [address for address in found if is_public(address)]
        if found and not public:
            raise FetchError(f"{host} is no public address", "refused_address", permanent=True)
        return public


@lru_cache(maxsize=1)
def ssl_context() -> ssl.SSLContext:
    """httpx's default, read once: every event loop has a transport of its own."""
    return httpx.create_ssl_context()


class GuardedTransport(httpx.AsyncHTTPTransport):
    """An httpx transport over GuardedBackend; proxies of the environment are not used, they would bypass it."""

    def __init__(self, allow_hosts: Collection[str] = ()) -> None:
        super().__init__(verify=ssl_context(), http2=True)
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=ssl_context(),
            max_connections=None,  # downloads_per_host bounds them
            max_keepalive_connections=16,  # the pool's cost a request is idle connections × all connections
            keepalive_expiry=15.0,
            http2=True,
            network_backend=GuardedBackend(allow_hosts),
        )


# --- one exchange -----------------------------------------------------------------------------------------------------


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
    body: bytes  # of a 2xx answer, otherwise empty


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
    ) -> Answer:
        """The answer to `request`, its body of at most `max_bytes` also when decompressed.

        `inspect` sees the headers of a 2xx answer before its body is read and may raise. Raises FetchError, whose
        message names `where` and nothing else of the request.
        """
        request.headers.setdefault("Accept-Encoding", "identity")
        request.headers.setdefault("User-Agent", "genevolve-fast")
        request.extensions["timeout"] = httpx.Timeout(timeout_s, connect=min(10.0, timeout_s)).as_dict()
        transport = self._transport()
        try:
            return await asyncio.wait_for(self._send(transport, request, where, max_bytes, inspect), timeout_s)
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

    async def _send(self, transport, request: httpx.Request, where: str, max_bytes: int, inspect) -> Answer:
        response = await transport.handle_async_request(request)
        try:
            if not response.is_success:
                return Answer(response.status_code, response.headers, b"")
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
        retry=retry_if_exception(lambda e: isinstance(e, FetchError) and e.kind in _TRANSIENT),
        stop=stop_after_attempt(attempts) | stop_before_delay(within_s),
        wait=_pause,
        reraise=True,
    )(once)


def _pause(state: RetryCallState) -> float:
    error = state.outcome.exception()
    if isinstance(error, FetchError) and error.retry_after is not None:
        return min(error.retry_after, MAX_RETRY_AFTER_S)
    return _FIRST_WAIT(state)


# --- images -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FetchLimits:
    """What one downloaded picture may cost."""

    timeout_s: float = 20.0  # all redirects and attempts together
    attempts: int = 2
    max_bytes: int = 20 << 20
    max_pixels: int = 40_000_000
    max_side: int = 2048  # larger pictures are scaled down
    per_host: int = 8  # downloads from one host at a time


@dataclass(frozen=True)
class Picture:
    pixels: np.ndarray  # uint8 [height, width, 3]
    extension: str


class ImageFetcher:
    """Downloads and decodes pictures from addresses that nobody vouches for."""

    def __init__(self, limits: FetchLimits, incidents: Incidents, allow_hosts: Collection[str] = ()) -> None:
        self.limits = limits
        self._incidents = incidents
        self._exchange = Exchange(lambda: GuardedTransport(allow_hosts))
        self._slots: PerLoop[weakref.WeakValueDictionary[str, asyncio.Semaphore]] = PerLoop(weakref.WeakValueDictionary)
        self._decoders = ThreadPoolExecutor(2, "decode-image")  # a picture may need 4 bytes a pixel while it is decoded

    async def download(self, url: str) -> bytes:
        """The file at `url`, JPEG, PNG, WEBP or GIF by its first bytes. Every failed attempt is counted.

        Raises FetchError.
        """
        clock = _Clock(self.limits.timeout_s)
        note = lambda kind: self._incidents.note("image_download", kind)  # noqa: E731
        return await persist(
            lambda: self._follow(url, clock), attempts=self.limits.attempts, within_s=self.limits.timeout_s, note=note
        )

    async def decode(self, data: bytes) -> Picture:
        """Decode off the event loop. Raises FetchError."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(
            self._decoders, decode_image, data, self.limits.max_pixels, self.limits.max_side
        )

    async def _follow(self, url: str, clock: _Clock) -> bytes:
        target = _web_address(url)
        for _ in range(MAX_REDIRECTS + 1):
            async with self._slot(target.host):
                with clock:
                    answer = await self._hop(target, clock.left())
            if answer.status not in (301, 302, 303, 307, 308):
                check_status(answer, target.host)
                if sniff(answer.body) is None:
                    raise FetchError(f"{target.host} sent no picture", "not_an_image", permanent=True)
                return answer.body
            target = _web_address(answer.headers.get("location", ""), target)
        raise FetchError(f"more than {MAX_REDIRECTS} redirects", "bad_response")

    async def _hop(self, url: httpx.URL, left_s: float) -> Answer:
        if left_s <= 0:
            raise FetchError(f"{url.host} did not answer within {self.limits.timeout_s:g} s", "timeout")
        try:
            request = httpx.Request("GET", url.copy_with(userinfo=b"", fragment=None), headers={"Accept": "image/*"})
        except ValueError:
            raise FetchError("the address cannot be asked for", "refused_address", permanent=True) from None
        return await self._exchange(
            request, where=url.host, max_bytes=self.limits.max_bytes, timeout_s=left_s, inspect=_expect_image
        )

    def _slot(self, host: str) -> asyncio.Semaphore:
        slots = self._slots()
        slot = slots.get(host) or asyncio.Semaphore(self.limits.per_host)
        slots[host] = slot  # for as long as somebody waits in it: hosts come from outside
        return slot


class _Clock:
    """Counts the seconds inside its `with` blocks: waiting for a free slot is not the server's fault."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._since = 0.0

    def __enter__(self) -> None:
        self._since = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self._seconds -= time.monotonic() - self._since

    def left(self) -> float:
        return self._seconds


def _web_address(url: str, base: httpx.URL | None = None) -> httpx.URL:
    """`url`, relative to `base` if given. Raises FetchError for anything but http and https."""
    try:
        parsed = base.join(url) if base and url else httpx.URL(url)
        host = parsed.host  # decoded only now: a broken international name raises here
    except (httpx.InvalidURL, ValueError, TypeError):
        parsed, host = None, ""
    if parsed is None or parsed.scheme not in ("http", "https") or not host:
        raise FetchError("only http and https addresses are fetched", "refused_address", permanent=True)
    return parsed


def _expect_image(headers: httpx.Headers) -> None:
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if not _IMAGE_TYPES.match(kind):
        raise FetchError(f"content type {kind[:40]!r} is no picture", "not_an_image", permanent=True)


def sniff(data: bytes) -> str | None:
    """JPEG, PNG, WEBP or GIF by the first bytes, or None."""
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data[:6] in (b"GIF87a", b"GIF89a"):
        return "GIF"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    return None


def decode_image(data: bytes, max_pixels: int, max_side: int) -> Picture:
    """First frame, upright, transparency on white, the longest side at most `max_side`. Raises FetchError."""
    from PIL import Image

    form = sniff(data)
    if form is None:
        raise FetchError("neither JPEG, PNG, WEBP nor GIF", "not_an_image", permanent=True)
    if form == "JPEG" and data.count(b"\xff\xda") > MAX_SCANS:
        raise FetchError(f"a JPEG of more than {MAX_SCANS} scans", "too_large", permanent=True)
    try:
        with Image.open(io.BytesIO(data), formats=(form,)) as image:
            _check_size(image.size, max_pixels)
            image.load()
            return Picture(_rgb(_upright(image), max_side), EXTENSIONS[form])
    except FetchError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise FetchError(f"more than {max_pixels} pixels", "too_large", permanent=True) from None
    except Exception as error:  # decoders raise anything on broken files
        message = f"a broken {form} file: {type(error).__name__}"
        raise FetchError(message, "not_an_image", permanent=True) from None


def _check_size(size: Iterable[int], max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels:
        message = f"{width} × {height} pixels, the limit is {max_pixels}"
        raise FetchError(message, "too_large", permanent=True)
    if min(width, height) < 1 or max(width, height) > MAX_ASPECT * min(width, height):
        raise FetchError(f"{width} × {height} pixels are no picture", "not_an_image", permanent=True)


def _upright(image):
    """Turned as its EXIF orientation says; a picture with broken EXIF stays as it is."""
    from PIL import ImageOps

    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # the parser raises anything
        return image


def _rgb(image, max_side: int) -> np.ndarray:
    from PIL import Image

    if image.mode.startswith("I"):  # 16-bit grey, which convert() would clip at 255
        image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    image = image.convert("RGB")
    image.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    return np.asarray(image).copy()
