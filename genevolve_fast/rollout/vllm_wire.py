"""HTTP to vLLM servers: what is known of each, which failures pass, what an error says."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from genevolve_fast.protocols import EngineError


class Failure(Exception):
    """One failed attempt that may be repeated; `kind` is one of incidents.KINDS."""

    def __init__(self, text: str, kind: str) -> None:
        super().__init__(text)
        self.kind = kind


@dataclass
class Server:
    url: str
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)  # one weight update at a time
    label: str | None = None  # of the weights that it was given last
    updates: int = 0
    down_until: float = 0.0
    checked: bool = False  # its log-probs are of the distribution sampled from
    top_k: bool = False  # vLLM with sampling masks wants a bound on their size, and says so when asked without


class Http:
    """One client for all servers of a run. The key goes with every request and into no message."""

    def __init__(self, api_key: str | None, timeout_s: float) -> None:
        import httpx

        self.timeout_s, self._key = timeout_s, api_key
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        timeout = httpx.Timeout(timeout_s, connect=min(10.0, timeout_s))
        self.client = httpx.AsyncClient(headers=headers, limits=limits, timeout=timeout, trust_env=False)

    async def close(self) -> None:
        await self.client.aclose()

    async def command(self, server: Server, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        answer = self.accepted(server, *await self.post(server, path, body))
        return answer if isinstance(answer, dict) else {}

    async def post(self, server: Server, path: str, body: Any = None, headers: Mapping[str, str] | None = None):
        return await self._send(server, "POST", path, json=body, headers=headers)

    async def get(self, server: Server, path: str):
        return await self._send(server, "GET", path)

    async def _send(self, server: Server, method: str, path: str, **more) -> tuple[int, Any]:
        """(status, decoded body). Raises Failure where the attempt may be repeated."""
        import httpx

        where = f"{server.url}{path.partition('?')[0]}"
        try:
            answer = await self.client.request(method, server.url + path, **more)
        except httpx.TimeoutException as error:
            raise Failure(f"{where}: no answer in {self.timeout_s:g} s", "timeout") from error
        except httpx.TransportError as error:
            raise Failure(f"{where}: {type(error).__name__}: {error}", "connect") from error
        try:
            decoded = answer.json() if answer.content else {}
        except ValueError:
            decoded = answer.text
        if answer.status_code == 429 or answer.status_code >= 500:
            kind = "rate_limited" if answer.status_code == 429 else "server_error"
            raise Failure(f"{where}: HTTP {answer.status_code}: {self._said(decoded)}", kind)
        return answer.status_code, decoded

    def accepted(self, server: Server, status: int, answer: Any) -> Any:
        """The body of a 200. Raises EngineError where repeating would not help."""
        if status != 200:
            hint = ": start it by `genevolve-fast serve --training`" if status in (403, 404, 405) else ""
            raise EngineError(f"{server.url}: HTTP {status}{hint}: {self._said(answer)}", "client_error")
        return answer

    def _said(self, answer: Any) -> str:
        text = message(answer)
        return (text.replace(self._key, "***") if self._key else text)[:300]


def message(answer: Any) -> str:
    if isinstance(answer, dict):
        error = answer.get("error", answer.get("detail", answer))
        return str(error.get("message", error) if isinstance(error, dict) else error)
    return str(answer)


def one_choice(answer: Any) -> Mapping[str, Any]:
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not choices or not isinstance(choices[0], dict):
        raise EngineError(f"the server answered without choices: {message(answer)[:200]}", "bad_response")
    return choices[0]
