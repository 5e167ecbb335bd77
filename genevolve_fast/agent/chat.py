"""A conversation with an OpenAI-compatible chat endpoint: messages instead of tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from genevolve_fast.agent.conversation import IMAGE_MARK, Reply
from genevolve_fast.agent.images import SeenImage
from genevolve_fast.net.chat import ChatEndpoint, Completion
from genevolve_fast.net.pictures import data_url
from genevolve_fast.protocols import EngineError, Sampling

_CHARACTERS_PER_TOKEN = 4


class ChatConversation:
    """The turns of one rollout as messages {role, content} (agent/conversation.py::Conversation).

    Tokens are the server's `usage`: `prompt_tokens` those of the first call, `response_tokens` those of the latest call
    less the first prompt. What no usage has covered yet (the request before the first call, an observation not sent
    yet, everything where a server reports none) counts as one token for four characters; pictures then count nothing.
    `seeded`: send the rollout's seed with each call, for servers that know the parameter. `sampled_tokens` sums the
    completions, None while no usage is known; `failure` is the last EngineError.
    """

    markers: Sequence[str] = ()  # a chat server's template turns text into text; harmless() breaks up its markers

    def __init__(self, endpoint: ChatEndpoint, *, seeded: bool = False) -> None:
        self.endpoint = endpoint
        self.seeded = seeded
        self.messages: list[dict[str, Any]] = []
        self.failure: EngineError | None = None
        self.sampled_tokens: int | None = None
        self._prompt = 0
        self._counted = 0
        self._uncounted_characters = 0
        self._measured = False
        self._completion = Completion("", True, None)

    @property
    def prompt_tokens(self) -> int:
        return self._prompt

    @property
    def response_tokens(self) -> int:
        return self._counted + _estimate(self._uncounted_characters)

    def begin(self, system_prompt: str, question: str) -> None:
        self.messages += [{"role": "system", "content": system_prompt}, {"role": "user", "content": question}]
        self._prompt = _estimate(len(system_prompt) + len(question))

    async def ask(self, sampling: Sampling, seed: int) -> Reply:
        try:
            completion = await self.endpoint.complete(self.messages, sampling, seed if self.seeded else None)
        except EngineError as error:
            self.failure = error
            raise
        return self._taken(completion)

    def said(self) -> dict[str, Any]:
        """What `ask` got last, for JSON."""
        return asdict(self._completion)

    def recall(self, said: Mapping[str, Any]) -> Reply:
        """As if `ask` had got what `said` told: the server is not asked."""
        usage = said["usage"]
        return self._taken(Completion(said["text"], said["ended"], usage and tuple(usage)))

    def _taken(self, completion: Completion) -> Reply:
        self._completion = completion
        self._count(completion)
        return Reply(completion.text, completion.ended)

    def keep(self, reply: Reply, tool: str | None) -> None:
        self.messages.append({"role": "assistant", "content": reply.text})

    def observe(self, text: str, images: Sequence[SeenImage] = (), tool: str | None = None) -> None:
        self._uncounted_characters += len(text)
        self.messages.append({"role": "user", "content": _parts(text, images) if images else text})

    def _count(self, completion: Completion) -> None:
        if completion.usage is None:
            self._uncounted_characters += len(completion.text)
            return
        prompt, sampled = completion.usage
        self.sampled_tokens = (self.sampled_tokens or 0) + sampled
        if not self._measured and len(self.messages) == 2:
            self._prompt = prompt
        self._measured = True
        self._counted, self._uncounted_characters = max(0, prompt + sampled - self._prompt), 0


def _estimate(characters: int) -> int:
    return -(-characters // _CHARACTERS_PER_TOKEN)


def _parts(text: str, images: Sequence[SeenImage]) -> list[dict[str, Any]]:
    """The observation as content parts; the n-th mark becomes the n-th picture."""
    first, *rest = text.split(IMAGE_MARK)
    parts: list[dict[str, Any]] = [{"type": "text", "text": first}]
    for seen, after in zip(images, rest, strict=True):
        parts.append({"type": "image_url", "image_url": {"url": data_url(seen.found.pixels)}})
        parts.append({"type": "text", "text": after})
    return parts
