"""Which tools a run has: typed configuration, and what is opened from it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from genevolve_fast.agent.fetch import FetchLimits, ImageFetcher
from genevolve_fast.agent.knowledge import QueryKnowledge
from genevolve_fast.agent.search import (
    SERPER_BASE_URL,
    JsonPaths,
    SearchBackend,
    SearchClient,
    SearchLimits,
    SearXNG,
    Serper,
    Template,
    WebImageSearch,
    WebSearch,
)
from genevolve_fast.incidents import Incidents
from genevolve_fast.net.cache import AnswerCache
from genevolve_fast.net.web import check_address
from genevolve_fast.protocols import Tool


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)  # inputs may hold keys


class TextTemplate(_Section):
    """A text search of your own: an address and where its JSON keeps what."""

    url: str = Field(description="Address with {query}, and {count} and {key} (SEARCH_API_KEY) where it takes them")
    results: str = Field("results", description="Dotted path to the list of results; empty: the answer is the list")
    title: str = Field("title", description="Path to the title, inside a result")
    link: str = Field("url", description="Path to the page's address, inside a result")
    snippet: str = Field("snippet", description="Path to the snippet, inside a result")


class ImageTemplate(_Section):
    """An image search of your own: an address and where its JSON keeps what."""

    url: str = Field(description="Address with {query}, and {count} and {key} (SEARCH_API_KEY) where it takes them")
    results: str = Field("results", description="Dotted path to the list of results; empty: the answer is the list")
    title: str = Field("title", description="Path to the title, inside a result")
    image_url: str = Field("image_url", description="Path to the picture's address, inside a result")
    page_url: str = Field("page_url", description="Path to the address of the page it stands on, inside a result")


class ToolsConfig(_Section):
    kind: Literal["sandbox", "serper", "searxng", "template"] = Field(
        "sandbox", description="Who searches: the sandbox's own tools, or a web search service"
    )
    base_url: str | None = Field(None, description="Address of the service; serper: SERPER_BASE_URL, or serper.dev")
    text_template: TextTemplate | None = Field(None, description="kind template: how text search is asked and read")
    image_template: ImageTemplate | None = Field(None, description="kind template: the same of image search")
    image_dir: Path = Field(Path("runs/images"), description="Where downloaded pictures are kept, by hash")
    cache: Path | None = Field(None, description="Folder of the tool cache")
    cache_mode: Literal["off", "record", "replay"] = Field(
        "off", description="record: answer from the cache, else ask and keep it; replay: never touch the network"
    )
    allow_hosts: tuple[str, ...] = Field(
        (), description="Hosts (name or name:port) that pictures may come from though their address is private"
    )
    top_k: int = Field(5, ge=1, le=100, description="Results a query when the policy names no number")
    max_top_k: int = Field(10, ge=1, le=100, description="Results a query at most")
    max_queries: int = Field(5, ge=1, description="Queries of one text search that are asked")
    max_images: int = Field(5, ge=1, le=100, description="Pictures downloaded for one image search at most")
    max_observation_chars: int = Field(12_000, ge=1000, description="Characters of one tool answer at most")
    timeout_s: float = Field(45.0, gt=0, description="Seconds of one tool call, retries and downloads included")
    attempts: int = Field(3, ge=1, description="Times a search is asked when the service fails")
    connections: int = Field(64, ge=1, description="Connections to the search service at a time")
    max_response_kb: int = Field(2048, ge=1, description="KiB of one search answer at most")
    download_timeout_s: float = Field(20.0, gt=0, description="Seconds of one picture, redirects and retries included")
    download_attempts: int = Field(2, ge=1, description="Times a picture is asked for when its host fails")
    downloads_per_host: int = Field(8, ge=1, description="Downloads from one host at a time")
    max_image_mb: float = Field(20.0, gt=0, description="MiB of one picture's file at most")
    max_image_megapixels: float = Field(40.0, gt=0, description="Megapixels of one picture at most")
    max_image_side: int = Field(2048, ge=16, description="Pictures the policy sees are scaled down to this side")

    @model_validator(mode="after")
    def _refuse(self) -> ToolsConfig:
        told = {n for n, field in type(self).model_fields.items() if getattr(self, n) != field.default} - {"kind"}
        if self.kind == "sandbox" and told:
            raise ValueError(f"{', '.join(sorted(told))} with kind sandbox would do nothing: it has its own tools")
        if (self.cache is None) != (self.cache_mode == "off"):
            raise ValueError("cache and cache_mode go together: give the folder, and record or replay")
        if self.kind == "template":
            self._refuse_templates()
        elif self.text_template or self.image_template:
            raise ValueError(f"text_template and image_template with kind {self.kind} would do nothing")
        if self.kind == "searxng" and not self.base_url:
            raise ValueError("kind searxng needs base_url, the address of the instance")
        if self.base_url:
            check_address("base_url", self.base_url)
        if self.top_k > self.max_top_k:
            raise ValueError("top_k is above max_top_k")
        if self.download_timeout_s > self.timeout_s:
            raise ValueError("download_timeout_s above timeout_s would do nothing: the call ends first")
        for host in self.allow_hosts:
            if not host or set(host) & set("/*@ "):
                raise ValueError("allow_hosts holds names or name:port, without scheme, path or wildcard")
        return self

    def _refuse_templates(self) -> None:
        if not (self.text_template and self.image_template):
            raise ValueError("kind template needs text_template and image_template")
        if self.base_url:
            raise ValueError("base_url with kind template would do nothing: the templates hold the addresses")
        for name, template in (("text_template", self.text_template), ("image_template", self.image_template)):
            check_address(f"{name}.url", template.url.replace("{", "").replace("}", ""))
            if "{query}" not in template.url:
                raise ValueError(f"{name}.url has no {{query}}")


def open_tools(config: ToolsConfig, incidents: Incidents) -> dict[str, Tool]:
    """`search`, `image_search` and `query_knowledge` of a run. Raises ValueError naming what is missing."""
    if config.kind == "sandbox":
        raise ValueError("tools.kind sandbox: the sandbox brings its own tools, there is nothing to open")
    cache = None
    if config.cache is not None and config.cache_mode != "off":
        cache = AnswerCache(config.cache, config.cache_mode, incidents)
    backend = _backend(config)
    client = SearchClient(backend, _search_limits(config), incidents, cache)
    fetcher = ImageFetcher(_fetch_limits(config), incidents, config.allow_hosts)
    tools = (WebSearch(client), WebImageSearch(client, fetcher, config.image_dir), QueryKnowledge())
    return {tool.name: tool for tool in tools}


def _backend(config: ToolsConfig) -> SearchBackend:
    if config.kind == "searxng":
        return SearXNG(config.base_url.rstrip("/"))
    if config.kind == "serper":
        base = config.base_url or os.environ.get("SERPER_BASE_URL", "").strip() or SERPER_BASE_URL
        check_address("SERPER_BASE_URL", base)
        return Serper(_key("SERPER_API_KEY", config), base.rstrip("/"))
    text, image = config.text_template, config.image_template
    return Template(
        text.url,
        image.url,
        JsonPaths(text.results, title=text.title, url=text.link, snippet=text.snippet),
        JsonPaths(image.results, title=image.title, image_url=image.image_url, page_url=image.page_url),
        _key("SEARCH_API_KEY", config) if "{key}" in text.url + image.url else "",
    )


def _key(variable: str, config: ToolsConfig) -> str:
    """The key in the environment; replaying asks nobody and needs none."""
    key = os.environ.get(variable, "").strip()
    if not key and config.cache_mode != "replay":
        raise ValueError(f"{variable} is not set: tools.kind {config.kind} asks a service that wants a key")
    return key


def _search_limits(config: ToolsConfig) -> SearchLimits:
    names = ("top_k", "max_top_k", "max_queries", "max_images", "timeout_s", "attempts", "connections")
    return SearchLimits(
        **{name: getattr(config, name) for name in names},
        max_response_bytes=config.max_response_kb << 10,
        max_observation_chars=config.max_observation_chars,
    )


def _fetch_limits(config: ToolsConfig) -> FetchLimits:
    return FetchLimits(
        timeout_s=config.download_timeout_s,
        attempts=config.download_attempts,
        max_bytes=int(config.max_image_mb * 2**20),
        max_pixels=int(config.max_image_megapixels * 1e6),
        max_side=config.max_image_side,
        per_host=config.downloads_per_host,
    )
