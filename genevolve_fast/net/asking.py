"""One JSON object from a chat model: asked, read, checked, asked again with the complaint, kept."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any

from genevolve_fast.incidents import Incidents
from genevolve_fast.net.cache import AnswerCache
from genevolve_fast.net.chat import AttemptFailed, ChatEndpoint, Completion
from genevolve_fast.net.replies import ReplyError, read_object
from genevolve_fast.net.web import FetchError, PerLoop
from genevolve_fast.protocols import EngineError, Sampling

_MAX_ECHO = 4000  # characters of an unusable reply that the model is shown again


class NoAnswer(RuntimeError):
    """No usable object came; `kind` is one of incidents.KINDS."""

    def __init__(self, message: str, kind: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class Question:
    """What is asked, and what a usable answer is.

    identity: what the answer depends on besides the model, JSON that names it in the cache. messages: made when it is
    the question's turn, since pictures are large. schema: the object's JSON schema, named `name`. keys: what tells the
    object from others; spelt: those whose value a repaired reply must spell out (net/replies.py). check: the object
    checked and normalised to JSON that it accepts itself; raises ReplyError. It is told whether there is no asking
    again. read: what makes the object of a reply in place of net/replies.py; raises ReplyError.
    """

    identity: Mapping[str, Any]
    messages: Callable[[], list[dict[str, Any]]]
    name: str
    schema: Mapping[str, Any]
    keys: Sequence[str]
    spelt: Sequence[str]
    check: Callable[[Mapping[str, Any], bool], dict[str, Any]]
    read: Callable[[str], Mapping[str, Any]] | None = None


class Lane:
    """What the models behind one server share: questions under way at once, and attempts a minute, evenly spaced."""

    def __init__(self, concurrency: int, requests_per_minute: float | None = None) -> None:
        self.slots = PerLoop(lambda: asyncio.Semaphore(concurrency))
        self._pace = PerLoop(lambda: _pace(requests_per_minute)) if requests_per_minute else lambda: None

    def limiter(self) -> AbstractAsyncContextManager | None:
        """Of the running event loop."""
        return self._pace()


def _pace(requests_per_minute: float):
    from aiolimiter import AsyncLimiter

    return AsyncLimiter(1, 60 / requests_per_minute)  # a bucket of more would let twice as many through at first


class JsonChat:
    """Questions to one model. Failures are counted in `incidents` as "<source>/<kind>", unusable replies among them.

    `endpoint` opens the model for one event loop, given the lane's limiter. An unusable reply is complained about and
    asked for again `reasks` times. json_schema tells the server the schema as its `response_format`; one that refuses
    it is asked without from then on. `cache` keeps usable answers only.
    """

    def __init__(
        self,
        model: str,
        endpoint: Callable[[AbstractAsyncContextManager | None], ChatEndpoint],
        lane: Lane,
        incidents: Incidents,
        *,
        source: str,
        sampling: Sampling,
        reasks: int = 2,
        json_schema: bool = True,
        cache: AnswerCache | None = None,
    ) -> None:
        self.model = model
        self.source = source
        self.reasks = reasks
        self._endpoint = PerLoop(lambda: endpoint(lane.limiter()))
        self._lane = lane
        self._incidents = incidents
        self._sampling = sampling
        self._json_schema = json_schema
        self._cache = cache

    async def ask(self, question: Question) -> dict[str, Any]:
        """The checked object. Raises NoAnswer."""
        if self._cache is None:
            return await self._answer(question)

        async def answer() -> bytes:
            return json.dumps(await self._answer(question), sort_keys=True).encode()

        asked = {"model": self.model, "temperature": self._sampling.temperature, **question.identity}
        try:
            kept = await self._cache.get(self.source, asked, answer)
            return question.check(json.loads(kept), True)
        except FetchError as error:
            raise NoAnswer(str(error), error.kind) from None
        except ValueError:  # of another release
            self._incidents.note(self.source, "bad_response")
            raise NoAnswer("the recorded answer cannot be used", "bad_response") from None

    async def _answer(self, question: Question) -> dict[str, Any]:
        async with self._lane.slots():
            messages = said = await asyncio.to_thread(question.messages)
            for left in range(self.reasks, -1, -1):
                text = ""
                try:
                    completion = await self._complete(said, question)
                    text = completion.text
                    return _read(completion, question, not left)
                except ReplyError as error:
                    self._incidents.note(self.source, "bad_response")
                    complaint = self._endpoint().without_secrets(str(error))
                    if not left:
                        raise NoAnswer(f"{self.model} gave no usable answer: {complaint}", "bad_response") from None
                    said = [*messages, *_complaint(text, complaint)]
                except EngineError as error:
                    if error.kind != "bad_response" or not left:
                        raise NoAnswer(str(error), error.kind) from None
        raise AssertionError("unreachable")

    async def _complete(self, messages: Sequence[Mapping[str, Any]], question: Question) -> Completion:
        endpoint = self._endpoint()
        if self._json_schema:
            form = {"type": "json_schema", "json_schema": {"name": question.name, "schema": dict(question.schema)}}
            try:
                return await endpoint.complete(messages, self._sampling, response_format=form)
            except AttemptFailed as error:
                if error.status not in (400, 422):
                    raise
        completion = await endpoint.complete(messages, self._sampling)
        self._json_schema = False  # it answers this way, and the other way it did not
        return completion


async def ask_once(
    endpoint: ChatEndpoint,
    messages: Sequence[Mapping[str, Any]],
    sampling: Sampling,
    keys: Sequence[str],
    spelt: Sequence[str] = (),
    seed: int | None = None,
) -> dict[str, Any]:
    """The object with `keys` in a whole reply, without a second chance. Raises EngineError and ReplyError."""
    said = await endpoint.complete(messages, sampling, seed)
    if not said.ended:
        raise ReplyError("the reply was cut off")
    return read_object(said.text, keys, spelt)


def _read(completion: Completion, question: Question, final: bool) -> dict[str, Any]:
    try:
        text = completion.text
        values = question.read(text) if question.read else read_object(text, question.keys, question.spelt)
        return question.check(values, final)
    except ReplyError as error:
        if completion.ended:
            raise
        raise ReplyError(f"{error}; the reply was cut off at its token limit: be shorter") from None


def _complaint(reply: str, reason: str) -> list[dict[str, Any]]:
    return [
        {"role": "assistant", "content": reply[:_MAX_ECHO] or "(nothing)"},
        {"role": "user", "content": f"This cannot be used: {reason}. Send the whole JSON object again, nothing else."},
    ]
