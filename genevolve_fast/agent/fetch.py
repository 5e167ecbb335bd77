"""Downloads of pictures that the web names: addresses checked after name resolution, sizes before they cost memory."""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
import time
import weakref
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import httpcore
import httpx

from genevolve_fast.incidents import Incidents
from genevolve_fast.net.pictures import Picture, decode_image, sniff
from genevolve_fast.net.web import Answer, Exchange, FetchError, PerLoop, check_status, persist, ssl_context

MAX_REDIRECTS = 5
_IMAGE_TYPES = re.compile(r"image/(jpe?g|pjpeg|png|x-png|apng|webp|gif)$|(application|binary)/octet-stream$|$")

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
