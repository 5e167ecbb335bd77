"""The policy behind the server: sessions that keep their cache, weights and adapters that change, pauses and sleep."""

from __future__ import annotations

import asyncio
import secrets
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from genevolve_fast.policy.adapters import AdapterError, SavedAdapters
from genevolve_fast.policy.model import Policy
from genevolve_fast.protocols import EngineError, Generation, Sampling
from genevolve_fast.rollout.server_protocol import RequestError, not_found, unavailable
from genevolve_fast.rollout.server_weights import WeightsError, base_parameters, clear, digests, reload
from genevolve_fast.rollout.transformers_engine import TransformersEngine

TAGS = ("weights", "kv_cache", "scheduling")


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
        self._saved = SavedAdapters(policy)
        self.engine = TransformersEngine(
            policy,
            max_batch=max_batch,
            deterministic=False,
            adapted=lambda name: self._saved.active(name and _module_name(name)),
        )
        self.engine.version = "default"
        self.adapters: dict[str, str] = {}  # name -> folder
        self.max_model_len = max_model_len or policy.text_config.max_position_embeddings
        self.max_sessions, self.cache_bytes, self.keep_caches = max_sessions, cache_bytes, keep_caches
        self.eos = _end_ids(policy)
        self._used: OrderedDict[str, int] = OrderedDict()  # calls by engine session, the last used at the end
        self._flying: Counter[str] = Counter()  # calls in the engine, by engine session
        self._by_request: dict[str, str] = {}  # request id -> engine session
        self._paused: str | None = None
        self._asleep: set[str] = set()
        self._awake = asyncio.Event()
        self._awake.set()
        self._frozen = False
        self._sizes: dict[str, torch.Size] = {}  # of discarded weights
        self.broken = ""  # why nothing can be sampled

    @property
    def version(self) -> str:
        return str(self.engine.version)

    @version.setter
    def version(self, label: str) -> None:
        self.engine.version = label

    # --- calls --------------------------------------------------------------------------------------------------------

    def check_model(self, model: str | None) -> None:
        if model and model != self.name and model not in self.adapters:
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
        request_id: str = "",
    ) -> Generation:
        """Raises RequestError. `session` None: nothing is kept."""
        if self.broken:
            raise unavailable(self.broken)
        if self._paused in ("abort", "wait"):
            raise unavailable("Generation is paused. Please retry after it resumes.")
        key = _key(model or self.name, session or secrets.token_hex(16))
        self._used[key] = self._used.get(key, 0) + 1
        self._used.move_to_end(key)
        self._by_request[request_id] = key
        try:
            await self._awake.wait()
            self.check_model(model)  # the adapter may have left while the server slept
            self.engine.open(key, model if model in self.adapters else None)
            self._flying[key] += 1
            try:
                random = secrets.randbits(63) if seed is None else seed
                return await self.engine.generate(key, ids, images, sampling, random)
            finally:
                self._flying[key] -= 1
        except EngineError as error:
            if error.kind == "bad_arguments":
                raise RequestError(str(error), param="token_ids") from error
            raise RequestError(str(error), 500, "InternalServerError") from error
        finally:
            self._by_request.pop(request_id, None)
            self._used[key] -= 1
            if session is None and not self._used[key]:
                self._forget(key)
            self._evict()

    def abort(self, request_ids: Collection[str] | None) -> int:
        """End these requests, or all, with what they have; how many there were."""
        keys = None if request_ids is None else [self._by_request[r] for r in request_ids if r in self._by_request]
        return self.engine.abort(keys)

    def _evict(self) -> None:
        for key in [key for key, calls in self._used.items() if not calls]:
            if len(self._used) <= self.max_sessions and self.engine.kept_bytes() <= self.cache_bytes:
                return
            self._forget(key)

    def _forget(self, key: str) -> None:
        self._used.pop(key, None)
        self._flying.pop(key, None)
        self.engine.close(key)

    async def _drained(self, keys: Callable[[str], bool] = lambda _: True) -> None:
        """Returns when none of the calls is in the engine any more."""
        while any(n and keys(key) for key, n in self._flying.items()):
            await asyncio.sleep(0.002)

    # --- pause and sleep ----------------------------------------------------------------------------------------------

    @property
    def is_paused(self) -> bool:
        return self._paused is not None or bool(self._asleep)

    async def pause(self, mode: str, clear_cache: bool) -> None:
        """abort and wait: calls end (cut off, or by themselves) and new ones get 503; keep: all stand still."""
        self._freeze(mode == "keep")
        self._paused = mode
        if mode == "abort":
            self.engine.abort()
        if mode != "keep":
            await self._drained()
            if clear_cache:
                self.engine.sleep()

    def resume(self) -> None:
        self._paused = None
        self._freeze(False)

    def _freeze(self, on: bool) -> None:
        if on != self._frozen:
            self._frozen = on
            (self.engine.hold if on else self.engine.release)()

    async def sleep(self, level: int, mode: str) -> None:
        """New calls wait. Level 1: caches are dropped and a GPU's weights move to the host; 2: weights are dropped."""
        self._awake.clear()
        self._freeze(mode == "keep")
        if mode == "abort":
            self.engine.abort()
        if mode != "keep":
            await self._drained()
        parked = "weights" in self._asleep
        self._asleep |= {"scheduling"} if level == 0 else {"weights", "kv_cache"}
        if level and not parked:  # weights that are asleep stay as they are
            await self.engine.exclusively(lambda: self._park(level))

    def _park(self, level: int) -> None:
        self.engine.update_weights(self.engine.version)  # calls that stand still are computed again
        for name, p in base_parameters(self.policy).items():
            if level == 2:
                self._sizes[name] = p.shape
                p.data = p.data.new_empty(0)
            else:
                p.data = p.data.cpu()

    async def wake_up(self, tags: Collection[str] | None, device: torch.device) -> bool:
        """Whether the server is fully awake. Weights dropped at level 2 are zero until they are loaded."""
        if unknown := set(tags or ()) - set(TAGS):
            raise RequestError(f"tags: {sorted(unknown)[0]!r} is none of {', '.join(TAGS)}", param="tags")
        if "weights" in self._asleep and (tags is None or "weights" in tags):
            await self.engine.exclusively(lambda: self._unpark(device))
        self._asleep -= set(TAGS if tags is None else tags)
        if not self._asleep - {"scheduling"}:
            self._asleep.clear()
            self.resume()
            self._awake.set()
        return not self._asleep

    def _unpark(self, device: torch.device) -> None:
        for name, p in base_parameters(self.policy).items():
            p.data = p.data.new_zeros(self._sizes[name], device=device) if name in self._sizes else p.data.to(device)
        self._sizes.clear()

    # --- weights ------------------------------------------------------------------------------------------------------

    async def reload(self, folder: str) -> None:
        """Load the weights of `folder` in place between two decode steps. Raises RequestError."""
        self._need_weights()
        try:
            await self._change(lambda: reload(self.policy, folder))
            self.broken = ""
        except WeightsError as error:
            raise RequestError(str(error), param="weights_path") from error
        except Exception as error:
            self.broken = f"loading {folder} failed halfway ({type(error).__name__}): load whole weights again"
            raise RequestError(self.broken, 500, "InternalServerError") from error

    async def reset_weights(self) -> None:
        self._need_weights()
        await self._change(lambda: clear(self.policy))

    async def checksums(self) -> dict[str, str]:
        self._need_weights()
        return await self.engine.exclusively(lambda: digests(self.policy))

    def _need_weights(self) -> None:
        if "weights" in self._asleep:
            raise RequestError("the weights are asleep: POST /wake_up?tags=weights first", 409, "ConflictError")

    async def _change(self, work: Callable[[], Any]) -> None:
        def changed() -> None:
            work()
            if not self.keep_caches:
                self.engine.update_weights(self.engine.version)

        await self.engine.exclusively(changed)

    async def reset_caches(self, reset_running: bool) -> bool:
        """False, and nothing happens, while calls hold their part of the cache."""
        if any(self._flying.values()) and not reset_running:
            return False
        await self.engine.exclusively(lambda: self.engine.update_weights(self.engine.version))
        return True

    async def reset_images(self) -> None:
        await self.engine.exclusively(self.policy.forget_images)

    # --- adapters -----------------------------------------------------------------------------------------------------

    async def load_adapter(self, name: str, folder: str, in_place: bool) -> None:
        if name == self.name:
            raise RequestError(
                f"The lora adapter '{name}' conflicts with a served base model.", kind="InvalidUserInput"
            )
        if name in self.adapters and not in_place:
            raise RequestError(
                f"The lora adapter '{name}' has already been loaded. If you want to load the adapter in place, set "
                "'load_inplace' to True.",
                kind="InvalidUserInput",
            )
        if not (Path(folder) / "adapter_config.json").is_file():
            raise not_found(f"No adapter found for '{name}': {folder} has no adapter_config.json", "lora_path")
        self._need_weights()
        try:
            if name in self.adapters:
                await self._change(lambda: self._replace(name, folder))
            else:
                await self.engine.exclusively(lambda: self._saved.add(_module_name(name), folder))
        except AdapterError as error:
            raise RequestError(str(error), param="lora_path") from error
        self.adapters[name] = folder

    def _replace(self, name: str, folder: str) -> None:
        self._saved.add(_module_name(name) + "_next", folder)  # a folder that does not fit leaves the old one
        self._saved.remove(_module_name(name) + "_next")
        self._saved.remove(_module_name(name))
        self._saved.add(_module_name(name), folder)

    async def unload_adapter(self, name: str) -> None:
        """Its calls end first; those that stand still are cut off."""
        if name not in self.adapters:
            raise not_found(f"The lora adapter '{name}' cannot be found.")
        del self.adapters[name]
        own = [key for key in self._used if key.startswith(_key(name, ""))]
        if self._frozen:
            self.engine.abort(own)
        await self._drained(lambda key: key in own)
        await self.engine.exclusively(lambda: self._saved.remove(_module_name(name)))
        for key in own:
            self.engine.close(key)


def _key(model: str, session: str) -> str:
    return f"{model}\x00{session}"


def _module_name(adapter: str) -> str:
    """A name that torch takes for a module, whatever the adapter is called."""
    return "served_" + adapter.encode().hex()


def _end_ids(policy: Policy) -> tuple[int, ...]:
    """Ids that end a turn: the generation config's, else the tokenizer's."""
    configured = getattr(policy.model.generation_config, "eos_token_id", None) or policy.codec.tokenizer.eos_token_id
    if configured is None:
        return ()
    return tuple(configured) if isinstance(configured, list | tuple) else (configured,)
