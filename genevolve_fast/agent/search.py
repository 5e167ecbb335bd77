"""Text and image search on the web, behind protocols.Tool: the released runtime's observations from any backend."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol
from urllib.parse import quote

import httpx

from genevolve_fast.agent.fetch import ImageFetcher
from genevolve_fast.incidents import Incidents
from genevolve_fast.net.cache import AnswerCache, write_once
from genevolve_fast.net.harmless import one_line
from genevolve_fast.net.web import (
    Exchange,
    FetchError,
    check_status,
    login_of,
    open_transport,
    persist,
    where_of,
)
from genevolve_fast.protocols import FoundImage, Observation, ToolError

SERPER_BASE_URL = "https://google.serper.dev"
MAX_QUERY, MAX_TITLE, MAX_SNIPPET, MAX_URL = 400, 200, 800, 1500  # characters

What = Literal["text", "images"]


# --- backends ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Hit:
    """One result, every field a string of one line and of bounded length."""

    title: str = ""
    url: str = ""
    snippet: str = ""
    image_url: str = ""
    page_url: str = ""


@dataclass(frozen=True)
class Ask:
    """One HTTP request to a search service. Url and headers may hold keys: never show them."""

    method: str
    url: str
    headers: Mapping[str, str]
    body: Mapping[str, Any] | None = None


class SearchBackend(Protocol):
    """How one search service is asked and read."""

    identity: str  # names the service in the tool cache; no keys, no port

    def ask(self, what: What, query: str, count: int) -> Ask: ...

    def hits(self, what: What, payload: Any) -> list[Hit]:
        """Raises ValueError when `payload` (parsed JSON) is not what the service promises."""
        ...


@dataclass(frozen=True, repr=False)
class Serper:
    """serper.dev and services that speak its protocol: POST {base}/search and /images."""

    key: str
    base_url: str = SERPER_BASE_URL
    identity: str = "serper"

    def ask(self, what: What, query: str, count: int) -> Ask:
        path = "search" if what == "text" else "images"
        return Ask("POST", f"{self.base_url}/{path}", {"X-API-KEY": self.key}, {"q": query, "num": count})

    def hits(self, what: What, payload: Any) -> list[Hit]:
        if what == "text":
            return [
                Hit(_title(row.get("title")), _url(row.get("link") or row.get("url")), _snippet(row.get("snippet")))
                for row in _rows(payload, "organic")
            ]
        names = ("imageUrl", "image_url", "thumbnailUrl", "url")
        return [
            Hit(
                _title(row.get("title")),
                image_url=next((u for n in names if (u := _url(row.get(n)))), ""),
                page_url=_url(row.get("link") or row.get("source")),
            )
            for row in _rows(payload, "images")
        ]


@dataclass(frozen=True, repr=False)
class SearXNG:
    """A SearXNG instance with `json` among its formats: GET {base}/search."""

    base_url: str
    identity: str = "searxng"

    def ask(self, what: What, query: str, count: int) -> Ask:
        category = "general" if what == "text" else "images"
        return Ask("GET", f"{self.base_url}/search?q={_quoted(query)}&format=json&categories={category}", {})

    def hits(self, what: What, payload: Any) -> list[Hit]:
        rows = _rows(payload, "results")
        if what == "text":
            return [Hit(_title(r.get("title")), _url(r.get("url")), _snippet(r.get("content"))) for r in rows]
        return [
            Hit(
                _title(r.get("title")),
                image_url=self._absolute(_url(r.get("img_src")) or _url(r.get("thumbnail_src"))),
                page_url=_url(r.get("url")),
            )
            for r in rows
        ]

    def _absolute(self, url: str) -> str:
        """SearXNG proxies pictures under its own relative addresses."""
        try:
            return str(httpx.URL(self.base_url + "/").copy_with(userinfo=b"").join(url)) if url else ""
        except (httpx.InvalidURL, ValueError):
            return ""


@dataclass(frozen=True)
class JsonPaths:
    """Where a custom service keeps its results: dotted paths, numbers index lists, "" is the whole."""

    results: str
    title: str = "title"
    url: str = "url"
    snippet: str = "snippet"
    image_url: str = "image_url"
    page_url: str = "page_url"


@dataclass(frozen=True, repr=False)
class Template:
    """Any service that answers GET with JSON; `{query}`, `{count}` and `{key}` of an address are filled in."""

    text_url: str
    image_url: str
    text_paths: JsonPaths
    image_paths: JsonPaths
    key: str = ""

    @property
    def identity(self) -> str:
        text, image = (httpx.URL(re.sub("[{}]", "", url)) for url in (self.text_url, self.image_url))
        asked = hashlib.sha256(text.raw_path + b"\n" + image.raw_path).hexdigest()[:12]  # what they ask may hold a key
        return f"template:{text.host}/{asked}"

    def ask(self, what: What, query: str, count: int) -> Ask:
        values = {"{query}": query, "{count}": str(count), "{key}": self.key}
        template = self.text_url if what == "text" else self.image_url
        return Ask("GET", re.sub(r"\{(query|count|key)\}", lambda m: _quoted(values[m.group()]), template), {})

    def hits(self, what: What, payload: Any) -> list[Hit]:
        paths = self.text_paths if what == "text" else self.image_paths
        rows = _at(payload, paths.results)
        if not isinstance(rows, list):
            raise ValueError(f"there is no list at {paths.results!r}")
        return [
            Hit(
                _title(_at(row, paths.title)),
                _url(_at(row, paths.url)),
                _snippet(_at(row, paths.snippet)),
                _url(_at(row, paths.image_url)),
                _url(_at(row, paths.page_url)),
            )
            for row in rows
        ]


def _quoted(text: str) -> str:
    return quote(text, safe="", errors="replace")


def _at(value: Any, path: str) -> Any:
    """The value at a dotted path, or None."""
    for name in path.split(".") if path else ():
        if isinstance(value, dict):
            value = value.get(name)
        elif isinstance(value, list) and name.isdecimal() and int(name) < len(value):
            value = value[int(name)]
        else:
            return None
    return value


def _rows(payload: Any, name: str) -> list[dict[str, Any]]:
    if not isinstance(payload, dict):
        raise ValueError("the answer is not a JSON object")
    rows = payload.get(name) or []
    if not isinstance(rows, list):
        raise ValueError(f"`{name}` is not a list")
    return [row for row in rows if isinstance(row, dict)]


def _title(value: Any) -> str:
    return one_line(value, MAX_TITLE) if isinstance(value, str) else ""


def _snippet(value: Any) -> str:
    return one_line(value, MAX_SNIPPET) if isinstance(value, str) else ""


def _url(value: Any) -> str:
    """An address as it came, or "": part of one is worth nothing."""
    url = value.strip() if isinstance(value, str) else ""
    return url if len(url) <= MAX_URL and url.isprintable() and " " not in url else ""


# --- asking -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SearchLimits:
    top_k: int = 5
    max_top_k: int = 10
    max_queries: int = 5
    max_images: int = 5
    timeout_s: float = 45.0  # of one call of a tool, downloads included
    attempts: int = 3
    connections: int = 64
    max_response_bytes: int = 2 << 20
    max_observation_chars: int = 12_000


class SearchClient:
    """Asks a backend: retries, deadline, cache, typed failures."""

    def __init__(
        self, backend: SearchBackend, limits: SearchLimits, incidents: Incidents, cache: AnswerCache | None = None
    ) -> None:
        self.backend, self.limits, self.incidents, self.cache = backend, limits, incidents, cache
        self._exchange = Exchange(lambda: open_transport(httpx.URL(backend.ask("text", "", 1).url), limits.connections))

    async def find(self, what: What, query: str, count: int) -> list[Hit]:
        """At most `count` results. Raises FetchError; a failed attempt counts as one of the tool."""
        source = "search" if what == "text" else "image_search"
        asked = {"backend": self.backend.identity, "what": what, "query": query, "count": count}

        async def ask() -> bytes:
            return await self._ask(source, what, query, count)

        body = await (self.cache.get(source, asked, ask) if self.cache else ask())
        return self._read(what, body)[:count]

    async def _ask(self, source: str, what: What, query: str, count: int) -> bytes:
        ends = time.monotonic() + self.limits.timeout_s
        return await persist(
            lambda: self._once(what, query, count, ends - time.monotonic()),
            attempts=self.limits.attempts,
            within_s=self.limits.timeout_s,
            note=lambda kind: self.incidents.note(source, kind),
        )

    async def _once(self, what: What, query: str, count: int, left_s: float) -> bytes:
        ask = self.backend.ask(what, query, count)
        url = httpx.URL(ask.url)
        headers = dict(ask.headers) | login_of(url)
        request = httpx.Request(ask.method, url.copy_with(userinfo=b""), headers=headers, json=ask.body)
        where = where_of(url)
        try:
            answer = await self._exchange(
                request, where=where, max_bytes=self.limits.max_response_bytes, timeout_s=max(left_s, 0.001)
            )
            check_status(answer, where)
        except FetchError as error:
            error.permanent = False  # a failure of the service, not an answer to the query
            raise
        self._read(what, answer.body)
        return answer.body

    def _read(self, what: What, body: bytes) -> list[Hit]:
        """Raises FetchError when the answer is not what the backend promises."""
        try:
            return self.backend.hits(what, json.loads(body.decode("utf-8", "replace")))
        except (ValueError, RecursionError):
            raise FetchError("the search service did not answer with its JSON", "bad_response") from None


# --- the tools --------------------------------------------------------------------------------------------------------


class WebSearch:
    """protocols.Tool: text search of several queries at once."""

    name = "search"
    description = "Web text search. Supply an array of queries."
    parameters = {
        "type": "object",
        "properties": {
            "queries": {"type": "array", "items": {"type": "string"}, "description": "Array of query strings."},
            "top_k": {"type": "integer", "description": "Max results."},
        },
        "required": ["queries"],
    }

    def __init__(self, client: SearchClient) -> None:
        self._client = client

    async def __call__(self, arguments: Mapping[str, Any]) -> Observation:
        """A block of results a query, an error block for a query that failed. Raises ToolError when all of them did."""
        limits = self._client.limits
        queries, count = _queries(arguments), _count(arguments, limits)
        asked, ignored = queries[: limits.max_queries], queries[limits.max_queries :]
        found = await asyncio.gather(*(self._client.find("text", q, count) for q in asked), return_exceptions=True)
        errors = [f for f in found if isinstance(f, BaseException)]
        if unexpected := [e for e in errors if not isinstance(e, ToolError)]:
            raise unexpected[0]
        if len(errors) == len(found):
            raise errors[0]
        share = limits.max_observation_chars // (len(asked) + bool(ignored))
        blocks = [_text_block(query, result, share) for query, result in zip(asked, found, strict=True)]
        if ignored:
            notice = f"--- search error: {len(ignored)} queries not asked, only {limits.max_queries} at a time ---"
            blocks.append(notice[:share])
        return Observation("\n".join(blocks)[: limits.max_observation_chars])


def _text_block(query: str, result: Sequence[Hit] | ToolError, room: int) -> str:
    """The released runtime's block of a query; results that do not fit into `room` characters are left out."""
    shown = query[: room // 4]
    if isinstance(result, ToolError):
        return f"--- search error for [{shown}]: {result} ---"[: room - 1]
    lines, end = [f"--- search result for [{shown}] ---"], "--- end of search result ---"
    room -= len(lines[0]) + len(end) + 2
    for rank, hit in enumerate(result, 1):
        entry = f"{rank}. title: {hit.title}"
        entry += f"\n  url: {hit.url}" if hit.url else ""
        entry += f"\n  snippet: {hit.snippet}" if hit.snippet else ""
        room -= len(entry) + 1
        if room < 0:
            break
        lines.append(entry)
    return "\n".join([*lines, end])


class WebImageSearch:
    """protocols.Tool: image search; the pictures are downloaded to `folder` under the hash of their bytes."""

    name = "image_search"
    description = "Text-to-image search. Returns image results with titles and IDs."
    parameters = {
        "type": "object",
        "properties": {
            "query": {"type": "string", "description": "Descriptive text query."},
            "top_k": {"type": "integer", "description": "Max results."},
        },
        "required": ["query"],
    }

    def __init__(self, client: SearchClient, fetcher: ImageFetcher, folder: Path) -> None:
        self._client, self._fetcher, self._folder = client, fetcher, folder.absolute()

    async def __call__(self, arguments: Mapping[str, Any]) -> Observation:
        """The pictures that could be downloaded and read. Raises ToolError when the search failed."""
        limits = self._client.limits
        started = time.monotonic()
        query = _query(arguments.get("query"), "`query` must be a non-empty string")
        count = min(_count(arguments, limits), limits.max_images)
        hits = [h for h in await self._client.find("images", query, count) if h.image_url]
        found = await self._pictures(hits, limits.timeout_s - (time.monotonic() - started))
        return Observation(images=_fitting(found, limits.max_observation_chars))

    async def _pictures(self, hits: Sequence[Hit], left_s: float) -> list[FoundImage]:
        """In the order of `hits`, without those that failed or were not there in time."""
        tasks = [asyncio.ensure_future(self._picture(hit)) for hit in hits]
        if not tasks:
            return []
        try:
            await asyncio.wait(tasks, timeout=max(left_s, 0))
        finally:
            for task in tasks:
                if not task.done():
                    task.cancel()
                    self._client.incidents.note("image_download", "timeout")
        await asyncio.gather(*tasks, return_exceptions=True)
        results = [None if task.cancelled() else task.exception() or task.result() for task in tasks]
        if unexpected := [r for r in results if isinstance(r, BaseException) and not isinstance(r, ToolError)]:
            raise unexpected[0]
        return [r for r in results if isinstance(r, FoundImage)]

    async def _picture(self, hit: Hit) -> FoundImage:
        async def ask() -> bytes:
            return await self._fetcher.download(hit.image_url)

        cache = self._client.cache
        data = await (cache.get("image_download", {"url": hit.image_url}, ask) if cache else ask())
        try:
            picture = await self._fetcher.decode(data)
        except ToolError as error:
            self._client.incidents.note("image_download", error.kind)
            raise
        path = self._folder / f"{hashlib.sha256(data).hexdigest()}{picture.extension}"
        await asyncio.to_thread(write_once, path, data)
        return FoundImage(hit.title or "image", picture.pixels, hit.image_url, str(path), hit.page_url)


def _fitting(found: Sequence[FoundImage], room: int) -> tuple[FoundImage, ...]:
    """The first of `found` whose lines fit into an observation of `room` characters."""
    room -= MAX_QUERY + 80  # the block's first and last line
    kept = []
    for image in found:
        room -= len(image.title) + len(image.url) + len(image.local_path) + len(image.page_url) + 60
        if room < 0:
            break
        kept.append(image)
    return tuple(kept)


def _queries(arguments: Mapping[str, Any]) -> list[str]:
    queries = arguments.get("queries")
    complaint = "`queries` must be a non-empty array of strings"
    queries = [queries] if isinstance(queries, str) else queries
    if not isinstance(queries, list) or not queries:
        raise ToolError(complaint, "bad_arguments")
    return [_query(q, complaint) for q in queries]


def _query(value: Any, complaint: str) -> str:
    query = one_line(value, MAX_QUERY) if isinstance(value, str) else ""
    if not query:
        raise ToolError(complaint, "bad_arguments")
    return query


def _count(arguments: Mapping[str, Any], limits: SearchLimits) -> int:
    value = arguments.get("top_k")
    if value is None:
        return limits.top_k
    if isinstance(value, bool) or not isinstance(value, int):
        raise ToolError("`top_k` must be an integer", "bad_arguments")
    return max(1, min(value, limits.max_top_k))
