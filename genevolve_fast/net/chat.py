"""One model behind an OpenAI-compatible chat server: retries, patience, typed failures that hold no key."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import SplitResult, unquote, urlsplit

from genevolve_fast.incidents import Incidents
from genevolve_fast.protocols import EngineError, Sampling

DEFAULT_BASE_URL = "http://localhost:8000/v1"
NO_KEY = "EMPTY"  # what servers without keys are given, as the released runtime does

_LONGEST_WAIT_S = 60.0
_CONNECT_S = 30.0
_MAX_SAID = 300  # characters of a server's own error text
_PASSING = ("connect", "timeout", "rate_limited", "server_error")
_RESTARTING = ("connect", "server_error")
_TOO_LONG = ("context length", "context_length", "maximum context", "max_model_len", "max_seq_len", "too many tokens")


@dataclass(frozen=True)
class Completion:
    """A model's answer; `usage` is (prompt, completion) tokens where the server says so."""

    text: str
    ended: bool
    usage: tuple[int, int] | None


class AttemptFailed(EngineError):
    """One call failed; `retry_after_s` is what the server asked for, `status` that of its HTTP answer, if any."""

    def __init__(self, message: str, kind: str, retry_after_s: float | None = None, status: int | None = None) -> None:
        super().__init__(message, kind)
        self.retry_after_s = retry_after_s
        self.status = status


def checked_base_url(base_url: str) -> str:
    """`base_url` itself. Raises ValueError, without quoting what may hold a password."""
    parts = urlsplit(base_url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"base_url must be a URL such as {DEFAULT_BASE_URL}")
    if parts.query or parts.fragment:  # the client would append the endpoint's path to them
        raise ValueError(f"base_url ends with its path, such as {DEFAULT_BASE_URL}: what follows ? or # has no effect")
    return base_url


def checked_key(api_key: str) -> str:
    """`api_key` without the newline of a file's end. Raises ValueError, without quoting it."""
    key = api_key.strip()
    if not (key.isascii() and key.isprintable()):
        raise ValueError("api_key (or OPENAI_API_KEY) holds characters that cannot be sent in a header")
    return key


def _login(parts: SplitResult) -> str:
    """User and password of an address as HTTP's basic authentication sends them, or ""."""
    if parts.username is None:
        return ""
    return base64.b64encode(f"{unquote(parts.username)}:{unquote(parts.password or '')}".encode()).decode()


class ChatEndpoint:
    """One model behind an OpenAI-compatible server; shared by the conversations of one event loop.

    A failed attempt is counted in `incidents` as "<source>/<kind>" and made again where a later one may succeed:
    `attempts` times, and while the server restarts (it cannot be reached, or answers 5xx) for `patience_s` seconds.
    `request_timeout` (seconds) bounds every attempt. `limiter` is entered before each of them, also by the endpoints
    that share it; neither clock runs while an attempt waits there for the first time.
    """

    def __init__(
        self,
        model: str,
        base_url: str = DEFAULT_BASE_URL,
        api_key: str = NO_KEY,
        *,
        request_timeout: float = 600.0,
        attempts: int = 3,
        patience_s: float = 0.0,
        incidents: Incidents | None = None,
        source: str = "engine",
        limiter: AbstractAsyncContextManager | None = None,
    ) -> None:
        from openai import AsyncOpenAI, DefaultAsyncHttpxClient, Timeout

        parts = urlsplit(checked_base_url(base_url))
        api_key, login = checked_key(api_key), _login(parts)
        self.model = model
        self.address = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"  # no userinfo
        self.request_timeout = request_timeout
        self.attempts = attempts
        self.patience_s = patience_s
        self.incidents = incidents or Incidents()
        self.source = source
        self._limiter = limiter or nullcontext()
        secrets = {api_key, login, *(unquote(s) for s in (parts.username, parts.password) if s)} - {NO_KEY}
        self._secrets = sorted((s for s in secrets if len(s) > 3), key=len, reverse=True)  # one may begin another
        timeout = Timeout(request_timeout, connect=min(_CONNECT_S, request_timeout))
        # Retries are ours: the client's own would not be counted.
        self._client = AsyncOpenAI(
            base_url=self.address,  # the client logs it
            api_key=api_key,
            timeout=timeout,
            http_client=DefaultAsyncHttpxClient(),  # its own closes itself when garbage, in a loop that may be gone
            max_retries=0,
            default_headers={"Authorization": f"Basic {login}"} if login else None,
        )

    async def close(self) -> None:
        await self._client.close()

    async def complete(
        self,
        messages: Sequence[Mapping[str, Any]],
        sampling: Sampling,
        seed: int | None = None,
        response_format: Mapping[str, Any] | None = None,
    ) -> Completion:
        """The next assistant message. Raises EngineError, whose text never holds a key."""
        from tenacity import AsyncRetrying, retry_if_exception

        began: list[float] = []

        async def attempt() -> Completion:
            async with self._limiter:
                began.append(time.monotonic())
            return await self._attempt(messages, sampling, seed, response_format)

        retrying = AsyncRetrying(
            retry=retry_if_exception(lambda e: isinstance(e, AttemptFailed) and e.kind in _PASSING),
            stop=lambda state: self._give_up(state, began[0]),
            wait=_pause,
            reraise=True,
        )
        return await retrying(attempt)

    def _give_up(self, state, began: float) -> bool:
        failure = state.outcome.exception()
        patient = failure.kind in _RESTARTING and time.monotonic() - began < self.patience_s
        return state.attempt_number >= self.attempts and not patient

    async def _attempt(
        self,
        messages: Sequence[Mapping[str, Any]],
        sampling: Sampling,
        seed: int | None,
        response_format: Mapping[str, Any] | None,
    ) -> Completion:
        options: dict[str, Any] = {} if seed is None else {"seed": seed}
        if response_format is not None:
            options["response_format"] = response_format
        call = self._client.chat.completions.create(
            model=self.model,
            messages=list(messages),
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            **options,
        )
        try:
            answer = await asyncio.wait_for(call, self.request_timeout)  # the client only bounds each read
            return _completion(answer)
        except Exception as error:  # openai passes on what httpx and json raise
            failure = self._failure(error)
            self.incidents.note(self.source, failure.kind)
            raise failure from None  # the cause may quote request headers

    def _failure(self, error: Exception) -> AttemptFailed:
        import openai

        told = str(error)
        if isinstance(error, openai.APIStatusError) and error.body and " - " not in told:
            told = f"{told} - {error.body}"  # openai tells only errors of its own form
        said = " ".join(self.without_secrets(told).split())[:_MAX_SAID]
        if isinstance(error, (openai.APITimeoutError, asyncio.TimeoutError)):
            return AttemptFailed(f"{self.address} gave no answer within {self.request_timeout:g} s", "timeout")
        if isinstance(error, openai.APIStatusError):
            return self._refusal(error, said)
        if isinstance(error, openai.APIConnectionError):
            reason = self.without_secrets(str(error.__cause__ or ""))[:_MAX_SAID]
            return AttemptFailed(f"{self.address} cannot be reached: {reason or said}", "connect")
        return AttemptFailed(f"{self.address} did not answer in the chat protocol: {said}", "bad_response")

    def _refusal(self, error, said: str) -> AttemptFailed:
        status = error.status_code
        if status == 429:
            return AttemptFailed(f"{self.address}: {said}", "rate_limited", _retry_after(error.response.headers))
        if status >= 500:
            return AttemptFailed(f"{self.address}: {said}", "server_error", _retry_after(error.response.headers))
        if status == 408:
            return AttemptFailed(f"{self.address}: {said}", "timeout")
        if status == 400 and any(mark in str(error).lower() for mark in _TOO_LONG):
            shorter = "lower max_response_length or max_tokens_per_round, or " * (self.source == "engine")
            return AttemptFailed(
                f"the conversation no longer fits the model's context: {shorter}"
                f"serve it with a longer one (vLLM: --max-model-len). {self.address}: {said}",
                "client_error",
            )
        hint = " (such an address mostly ends in /v1)" if status == 404 and "/v1" not in self.address else ""
        return AttemptFailed(f"{self.address}: {said}{hint}", "client_error", status=status)

    def without_secrets(self, text: str) -> str:
        """`text` with stars for the key and the address's login."""
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text


def _completion(answer: Any) -> Completion:
    """Raises for whatever is not a chat completion: openai hands on bodies it cannot read."""
    choice = answer.choices[0]
    usage = getattr(answer, "usage", None)
    counts = getattr(usage, "prompt_tokens", None), getattr(usage, "completion_tokens", None)
    known = all(isinstance(n, int) and n >= 0 for n in counts)
    sendable = _written(choice.message).encode("utf-8", "replace").decode()  # half an emoji would not go back
    return Completion(sendable.strip(), choice.finish_reason != "length", counts if known else None)


def _written(message: Any) -> str:
    """The reply as the model wrote it: `transformers serve`, and vLLM with parsers, take thought and calls out."""
    thought = getattr(message, "reasoning_content", None) or getattr(message, "reasoning", None)
    parts = [f"<think>\n{thought.strip()}\n</think>"] if isinstance(thought, str) else []
    parts += [message.content] if message.content else []
    for call in message.tool_calls or ():
        name, arguments = json.dumps(call.function.name, ensure_ascii=False), call.function.arguments
        parts.append(f'<tool_call>\n{{"name": {name}, "arguments": {arguments}}}\n</tool_call>')
    return "\n".join(parts)


def _pause(state) -> float:
    """Seconds before the next attempt: what the server asked for, else 1, 2, 4, ... 8."""
    asked = state.outcome.exception().retry_after_s
    return min(_LONGEST_WAIT_S, asked) if asked is not None else min(8.0, 0.5 * 2**state.attempt_number)


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds of a Retry-After header, a number or a date."""
    value = headers.get("retry-after", "")
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None
