"""The policy behind the server: sessions that keep their cache, weights that change under it, pauses."""

from __future__ import annotations

import asyncio
import secrets
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from genevolve_fast.policy.model import Policy
from genevolve_fast.protocols import EngineError, Generation, Sampling
from genevolve_fast.rollout.server_protocol import RequestError, not_found, unavailable
from genevolve_fast.rollout.server_weights import WeightsError, clear, digests, reload
from genevolve_fast.rollout.transformers_engine import TransformersEngine


class ServedPolicy:
    """One policy and its engine as an HTTP server needs them; used from one event loop.

    HTTP has no close, so sessions are forgotten by age: at most `max_sessions`, and those used last within
    `cache_bytes`. `keep_caches`: weight updates leave caches computed with older weights (to test clients).
    """

    def __init__(
        self,
        policy: Policy,
        name: str,
        *,
        max_batch: int = 64,
        max_model_len: int | None = None,
        max_sessions: int = 1024,
        cache_bytes: int = 4 << 30,
        keep_caches: bool = False,
    ) -> None:
        self.policy, self.name = policy, name
        self.codec = policy.codec
        self.engine = TransformersEngine(policy, max_batch=max_batch, deterministic=False)
        self.max_model_len = max_model_len or policy.text_config.max_position_embeddings
        self.max_sessions, self.cache_bytes, self.keep_caches = max_sessions, cache_bytes, keep_caches
        self.version = "default"
        self.eos = _end_ids(policy)
        self._sessions: OrderedDict[str, int] = OrderedDict()  # calls in flight by engine session, used last at the end
        self._broken = ""

    # --- calls --------------------------------------------------------------------------------------------------------

    def check_model(self, model: str | None) -> None:
        if model and model != self.name:
            raise not_found(f"The model `{model}` does not exist.", "model")

    def room(self, prompt_tokens: int) -> int:
        """Tokens that may follow. Raises RequestError for a prompt that fills the context."""
        if prompt_tokens >= self.max_model_len:
            raise RequestError(
                f"This model's maximum context length is {self.max_model_len} tokens. However, your prompt has "
                f"{prompt_tokens} tokens. Please reduce its length.",
                param="token_ids",
            )
        return self.max_model_len - prompt_tokens

    async def generate(
        self,
        model: str | None,
        session: str | None,
        ids: Sequence[int],
        images: Sequence[np.ndarray],
        sampling: Sampling,
        seed: int | None,
    ) -> Generation:
        """Raises RequestError. `session` None: nothing is kept."""
        if self._broken:
            raise unavailable(self._broken)
        vocabulary = self.policy.head_weight.shape[0]
        if bad := [t for t in ids if not 0 <= t < vocabulary]:
            raise RequestError(f"token_ids: {bad[0]} is outside the vocabulary of {vocabulary}", param="token_ids")
        key = f"{model or self.name}\x00{session or secrets.token_hex(16)}"
        self.engine.open(key)
        self._sessions[key] = self._sessions.get(key, 0) + 1
        self._sessions.move_to_end(key)
        try:
            return await self.engine.generate(
                key, ids, images, sampling, secrets.randbits(63) if seed is None else seed
            )
        except EngineError as error:
            raise RequestError(str(error), 500, "InternalServerError") from error
        finally:
            self._sessions[key] -= 1
            if session is None:
                self._forget(key)
            self._evict()

    def _evict(self) -> None:
        idle = [key for key, calls in self._sessions.items() if not calls]
        for key in idle:
            if len(self._sessions) <= self.max_sessions and self.engine.kept_bytes() <= self.cache_bytes:
                return
            self._forget(key)

    def _forget(self, key: str) -> None:
        self._sessions.pop(key, None)
        self.engine.close(key)

    # --- weights ------------------------------------------------------------------------------------------------------

    async def reload(self, folder: str) -> None:
        """Load the weights of `folder` in place between two decode steps. Raises RequestError."""
        try:
            await self._change(lambda: reload(self.policy, folder))
            self._broken = ""
        except WeightsError as error:
            raise RequestError(str(error), param="weights_path") from error
        except Exception as error:
            self._broken = f"loading {folder} failed halfway ({type(error).__name__}): load whole weights again"
            raise RequestError(self._broken, 500, "InternalServerError") from error

    async def reset_weights(self) -> None:
        await self._change(lambda: clear(self.policy))

    async def checksums(self) -> dict[str, str]:
        return await self.engine.exclusively(lambda: digests(self.policy))

    async def _change(self, work: Callable[[], Any]) -> None:
        await self.engine.exclusively(work)
        if not self.keep_caches:
            self.engine.update_weights(0)

    def reset_caches(self) -> bool:
        """False while calls hold their part of the cache."""
        self.engine.update_weights(0)
        return not any(self._sessions.values())

    async def drained(self) -> None:
        while any(self._sessions.values()):
            await asyncio.sleep(0.002)


def _end_ids(policy: Policy) -> tuple[int, ...]:
    """Ids that end a turn: the generation config's, else the tokenizer's."""
    configured = getattr(policy.model.generation_config, "eos_token_id", None) or policy.codec.tokenizer.eos_token_id
    if configured is None:
        return ()
    return tuple(configured) if isinstance(configured, list | tuple) else (configured,)
