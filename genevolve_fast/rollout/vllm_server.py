"""vLLM servers as the engine of a training run: token ids in, token ids and log-probs out, weights kept in step."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import hashlib
import shutil
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from genevolve_fast.incidents import Incidents
from genevolve_fast.policy.adapters import has_adapters, save_adapter
from genevolve_fast.policy.model import Policy
from genevolve_fast.protocols import EngineError, Generation, Sampling
from genevolve_fast.rollout.exchange import MASK_TOP_K, SEEDS, DataUrls, check_prompt, checked_generation, collapsed
from genevolve_fast.rollout.loop_thread import LoopThread
from genevolve_fast.rollout.server_processes import ServerProcesses
from genevolve_fast.rollout.vllm_wire import Failure, Http, Server, message, one_choice
from genevolve_fast.rollout.weights import (
    HeadShape,
    differing,
    folder_weights,
    full_weights,
    write_folder,
    write_whole,
)

_AVOID_S = 2.0  # a server that failed is the last choice for this long
_RESET_TRIES = 20
_PROBE_TOKENS = 8


class VllmServerEngine:
    """protocols.TrainedEngine over one or several vLLM servers.

    A session stays on one server (rendezvous hashing) while that one answers. Failed attempts are repeated for up to
    `patience_s` seconds and counted in `incidents` as engine/KIND; ids and seed belong to the request, so a repeated
    attempt asks the same question. A server that comes back with other weights than the last update's is given them
    again, and what it answered meanwhile is thrown away.

    `sync`: "disk" writes the weights to `sync_dir`, which the servers must see under the same path; "nccl" broadcasts
    them and needs vLLM and a GPU here. A policy with an adapter sends the adapter alone, unless `merge_lora`. Every
    `verify_every`-th update is followed by a comparison of all parameters' digests (0: none); `dtype` is that of the
    servers' weights, by default the policy's.

    `processes` are the servers where the run starts them: with the first update, until `shutdown`. `overlaps`: the
    policy trains while turns are sampled, so a server that comes back is given the weights of the last update from
    their files, and with "nccl", which keeps none, it is left out until the next update.
    """

    def __init__(
        self,
        policy: Policy,
        urls: Sequence[str],
        *,
        incidents: Incidents,
        sync: Literal["disk", "nccl"] = "disk",
        sync_dir: Path | None = None,
        merge_lora: bool = False,
        dtype: torch.dtype | None = None,
        patience_s: float = 600.0,
        timeout_s: float = 600.0,
        verify_every: int = 1,
        api_key: str | None = None,
        processes: ServerProcesses | None = None,
        overlaps: bool = False,
    ) -> None:
        if not urls:
            raise ValueError("urls is empty: name at least one server")
        if sync == "disk" and sync_dir is None:
            raise ValueError("sync 'disk' needs sync_dir: a folder that trainer and servers see under the same path")
        self.policy, self.incidents = policy, incidents
        self.processes, self.overlaps = processes, overlaps
        self.adapter_only = has_adapters(policy) and not merge_lora
        self.sync_dir = sync_dir and Path(sync_dir).absolute()
        self.dtype = dtype or policy.head_weight.dtype
        self.patience_s, self.timeout_s, self.verify_every = patience_s, timeout_s, verify_every
        self.mismatches = 0  # parameters that differed after an update, over the engine's life
        self.verified = 0  # parameters compared
        self.sampled_tokens = self.prompt_tokens = self.cached_tokens = 0
        if sync == "nccl":
            _refuse_nccl(self.adapter_only)
        self._senders: dict[str, Any] | None = {} if sync == "nccl" else None
        self._servers = [Server(url.rstrip("/")) for url in dict.fromkeys(urls)]
        self._run_id = uuid.uuid4().hex[:12]  # no other run's weights carry our labels
        self._label: str | None = None
        self._updates = 0
        self._sessions: set[str] = set()
        self._asking = 0  # turns that are being sampled
        self._urls = DataUrls()
        self._loop = LoopThread("vllm-client")
        atexit.register(self.shutdown)
        self._http = Http(api_key, timeout_s)

    # --- protocols.TrainedEngine --------------------------------------------------------------------------------------

    def open(self, session_id: str) -> None:
        self._sessions.add(session_id)

    def close(self, session_id: str) -> None:
        self._sessions.discard(session_id)

    def wake(self) -> None:
        """Nothing to do: servers keep the memory of their own GPUs."""

    def sleep(self) -> None:
        """Nothing to do: servers keep the memory of their own GPUs."""

    def shutdown(self) -> None:
        """Close the connections, remove the weights' folder, end the servers that were started here.

        Others keep running with what they have.
        """
        if self.processes:
            self.processes.stop()
        atexit.unregister(self.shutdown)
        if self._loop.closed:
            return
        self._loop.run(self._http.close())
        self._loop.close()
        if self._label and self._senders is None:
            shutil.rmtree(self._folder(self._label), ignore_errors=True)

    async def generate(
        self, session_id: str, ids: Sequence[int], images: Sequence[np.ndarray], sampling: Sampling, seed: int
    ) -> Generation:
        if session_id not in self._sessions:
            raise EngineError(f"session {session_id!r} is not open")
        body = self._question(ids, images, sampling, seed)

        async def attempt() -> Generation:
            server = self._server_of(session_id)
            try:
                return await self._attempt(server, session_id, body, ids, images, sampling)
            except (Failure, EngineError) as failure:
                self._failed(server, failure)
                raise

        self._asking += 1
        try:
            made = await self._loop.call(self._patiently(attempt, "generate"))
        finally:
            self._asking -= 1
        self.sampled_tokens += len(made.ids)
        return made

    def update_weights(self, version: int) -> None:
        if self._asking:
            raise RuntimeError(f"update_weights while {self._asking} turns are being sampled")
        if self.processes:
            self.processes.start()
        self._updates += 1
        previous, self._label = self._label, f"{self._run_id}-{version}.{self._updates}"
        if self._senders is None:
            self._write(self._folder(self._label))
        verify = bool(self.verify_every) and self._updates % self.verify_every == 0
        try:
            self._loop.run(self._update_all(previous, verify))
        finally:
            if self._senders is None and previous:
                shutil.rmtree(self._folder(previous), ignore_errors=True)

    # --- questions and answers ----------------------------------------------------------------------------------------

    def _question(self, ids, images, sampling: Sampling, seed: int) -> dict[str, Any]:
        codec = self.policy.codec
        body: dict[str, Any] = {
            "token_ids": collapsed(ids, images, codec),
            "sampling_params": {
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "max_tokens": sampling.max_tokens,
                "seed": seed % SEEDS,
                "stop_token_ids": list(sampling.stop_ids),
                "ignore_eos": True,  # only stop_ids end a turn, whatever the model's generation_config says
                "logprobs": 0,
                "detokenize": False,
            },
            "return_token_ids": True,
        }
        if images:
            body["content_parts"] = [{"type": "image_url", "url": self._urls(pixels)} for pixels in images]
        return body

    async def _attempt(self, server: Server, session_id: str, body, ids, images, sampling: Sampling) -> Generation:
        label = self._label
        if label is not None and server.label != label:
            await self._bring_up(server, sampling=True)
        if not server.checked:
            await self._check_mode(server)
        updates = server.updates
        answer = await self._ask(server, body, session_id, label)
        choice = one_choice(answer)
        if choice.get("finish_reason") == "abort":  # perhaps before its first token, which would have a version
            raise Failure(f"{server.url} aborted the request", "server_error")
        if label is not None:
            self._refuse_stale(server, choice, label, updates)
        check_prompt(ids, answer.get("prompt_token_ids"), images, self.policy.codec)
        usage = answer.get("usage") or {}
        self.prompt_tokens += len(ids)
        self.cached_tokens += (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        content = (choice.get("logprobs") or {}).get("content") or []
        token_ids = choice.get("token_ids") or []
        if [c.get("token_id") for c in content] != token_ids:
            raise EngineError(f"{server.url} gave log-probs of other tokens than it sampled", "bad_response")
        logps = [c["logprob"] for c in content]
        mask = choice.get("sampling_mask")
        return checked_generation(token_ids, logps, choice.get("finish_reason"), mask, sampling, self.policy.codec)

    async def _ask(self, server: Server, body: Mapping[str, Any], session_id: str, label: str | None) -> Any:
        body = dict(body)
        if server.top_k:
            body["sampling_params"] = body["sampling_params"] | {"top_k": MASK_TOP_K}
        if label and self.adapter_only:
            body["model"] = label
        status, answer = await self._http.post(server, "/inference/v1/generate", body, {"X-Session-ID": session_id})
        if status == 404 and "model" in body:
            if server.label == label:
                server.label = None
            raise Failure(f"{server.url} has lost the adapter {label}", "stale_weights")
        if status == 400 and not server.top_k and "requires top_k > 0" in message(answer):
            server.top_k = True
            return await self._ask(server, body, session_id, label)
        return self._http.accepted(server, status, answer)

    def _refuse_stale(self, server: Server, choice: Mapping[str, Any], label: str, updates: int) -> None:
        spans = choice.get("weight_versions")
        if not spans:
            raise EngineError(
                f"{server.url} does not say which weights sampled an answer (weight_versions): it needs vLLM 0.33 or "
                "newer, or `genevolve-fast serve`",
                "bad_response",
            )
        if any(span.get("version") != label for span in spans):
            if server.updates == updates:  # not mended since the question was asked
                server.label = None
            raise Failure(f"{server.url} sampled with other weights than the last update's", "stale_weights")

    async def _check_mode(self, server: Server) -> None:
        """Refuse a server whose log-probs are not those of the distribution it samples from.

        vLLM says so under /server_info when it is started for training. Elsewhere a turn is sampled with a nucleus
        of one token: its log-probs are 0 after top-p, and those of the whole vocabulary before it.
        """
        status, answer = await self._http.get(server, "/server_info?config_format=json")
        config = (answer.get("vllm_config") or {}) if isinstance(answer, dict) else {}
        model = config.get("model_config") if status == 200 and isinstance(config, dict) else None
        if isinstance(model, dict) and "logprobs_mode" in model:
            processed = model["logprobs_mode"] == "processed_logprobs"
            server.top_k = bool(model.get("return_sampling_mask"))  # asked without one, vLLM 0.33 says 500 and no more
        else:
            processed = await self._probe(server)
        if not processed:
            raise EngineError(
                f"{server.url} reports log-probs from before temperature and top-p: start it with --logprobs-mode "
                "processed_logprobs, or by `genevolve-fast serve --training`",
                "bad_response",
            )
        server.checked = True

    async def _probe(self, server: Server) -> bool:
        params = {"temperature": 1.0, "top_p": 1e-6, "max_tokens": _PROBE_TOKENS, "seed": 0, "logprobs": 0}
        prompt = self.policy.codec.encode("<|im_start|>user\n")
        body = {"token_ids": prompt, "sampling_params": params | {"ignore_eos": True}}
        choice = one_choice(await self._ask(server, body, "probe", None))
        logps = sorted(c["logprob"] for c in (choice.get("logprobs") or {}).get("content") or [])
        return bool(logps) and abs(logps[len(logps) // 2]) < 1e-6  # the median: two tokens may tie for the nucleus

    # --- weights ------------------------------------------------------------------------------------------------------

    def _folder(self, label: str) -> Path:
        return self.sync_dir / label

    def _write(self, folder: Path) -> None:
        if self.adapter_only:
            write_whole(folder, lambda partial: save_adapter(self.policy, partial))
        else:
            write_folder(folder, full_weights(self.policy), self.dtype)

    async def _update_all(self, previous: str | None, verify: bool) -> None:
        """Give the weights to every server; those that cannot be reached get them when they answer again."""

        async def one(server: Server) -> Exception | None:
            try:
                await self._bring_up(server, previous, verify)
            except Failure as failure:
                self._failed(server, failure)
                return failure
            return None

        async def some() -> None:
            failures = await asyncio.gather(*(one(server) for server in self._servers))
            if all(failures):
                raise failures[0]

        await self._patiently(some, "update_weights")

    async def _bring_up(
        self, server: Server, previous: str | None = None, verify: bool = True, sampling: bool = False
    ) -> None:
        """Load, verify, forget what was cached, say the new version, resume. Single-flight for each server.

        `sampling`: between turns and not in `update_weights`, when the policy may have other weights already.
        """
        async with server.lock:
            label = self._label
            if label is None or server.label == label:
                return
            moved = sampling and self.overlaps
            if moved and self._senders is not None:
                raise Failure(  # of a kind that sends the session to another server
                    f"{server.url} is left out until the next update: nccl keeps no old weights", "server_error"
                )
            verify = verify and bool(self.verify_every)
            await self._http.command(server, "/pause?mode=wait")
            try:
                unchecked = f"{label} unchecked"  # gone if the server restarts before it is checked
                await self._http.command(server, "/update_weight_version", {"new_version": unchecked})
                await self._load(server, label)
                if verify:
                    await self._verify(server, from_files=moved)
                await self._forget(server)
                status, answer = await self._http.get(server, "/weight_info")
                if self._http.accepted(server, status, answer).get("weight_version") != unchecked:
                    raise Failure(f"{server.url} restarted during the update", "server_error")
                await self._http.command(server, "/update_weight_version", {"new_version": label})
            finally:
                await self._http.command(server, "/resume")
            server.label, server.updates = label, server.updates + 1
            if self.adapter_only and previous:
                with contextlib.suppress(EngineError):  # a server that restarted does not have the old one
                    await self._http.command(server, "/v1/unload_lora_adapter", {"lora_name": previous})

    async def _load(self, server: Server, label: str) -> None:
        folder = str(self._folder(label)) if self.sync_dir else ""
        if self.adapter_only:
            body = {"lora_name": label, "lora_path": folder}
            status, answer = await self._http.post(server, "/v1/load_lora_adapter", body)
            if status == 400 and "already" in message(answer):
                return  # loaded by an attempt whose answer was lost
            self._http.accepted(server, status, answer)
        elif self._senders is None:
            call = {"method": "reload_weights", "kwargs": {"weights_path": folder}}
            await self._http.command(server, "/collective_rpc", call)
        else:
            await self._broadcast(server)

    async def _broadcast(self, server: Server) -> None:
        from genevolve_fast.rollout.vllm_transfer import nccl_sender, policy_source

        status, answer = await self._http.get(server, "/get_world_size")
        workers = self._http.accepted(server, status, answer)["world_size"]

        def send() -> None:
            if server.url not in self._senders:
                source = policy_source(lambda: full_weights(self.policy), self.dtype, self.policy.device)
                self._senders[server.url] = nccl_sender(server.url, source, workers, self.timeout_s)
            try:
                self._senders[server.url].send_weights()
            except Exception:
                del self._senders[server.url]  # its group died with the server: the next attempt makes another
                raise

        try:
            await asyncio.to_thread(send)
        except Exception as error:
            raise Failure(f"{server.url}: {type(error).__name__}: {error}", "server_error") from error

    async def _verify(self, server: Server, from_files: bool) -> None:
        """Raises EngineError where the server's parameters are not the policy's, byte for byte.

        `from_files`: those of the last update, which the policy has left behind. A base under an adapter never changes.
        """
        status, answer = await self._http.post(server, "/weight_checker", {"action": "checksum"})
        reported = self._http.accepted(server, status, answer)["checksums"]
        if from_files and not self.adapter_only:
            weights = await asyncio.to_thread(folder_weights, self._folder(self._label))
        else:
            weights = full_weights(self.policy, merged=not self.adapter_only)
        heads = HeadShape.of(self.policy.model.config)
        wrong = await asyncio.to_thread(differing, reported, weights, heads, self.dtype)
        self.verified += len(reported)
        self.mismatches += len(wrong)
        if wrong:
            dtype = str(self.dtype).removeprefix("torch.")
            must = "serve the base that the adapter belongs to" if self.adapter_only else f"hold weights in {dtype}"
            raise EngineError(
                f"{len(wrong)} of {len(reported)} parameters of {server.url} differ from the policy's after the "
                f"update, {', '.join(wrong[:3])} first: it must {must}",
                "bad_response",
            )

    async def _forget(self, server: Server) -> None:
        """Drop the prefix cache, and what an encoder that is trained has cached."""
        for _ in range(_RESET_TRIES):
            if (await self._http.command(server, "/reset_prefix_cache")).get("success"):
                break
            await asyncio.sleep(0.25)
        else:
            raise EngineError(f"{server.url} did not reset its prefix cache in {_RESET_TRIES} tries", "server_error")
        if not self.policy.vision_frozen:
            await self._http.command(server, "/reset_mm_cache")
            await self._http.command(server, "/reset_encoder_cache")

    # --- attempts -----------------------------------------------------------------------------------------------------

    async def _patiently(self, attempt: Callable[[], Any], what: str) -> Any:
        """Repeat `attempt` while it fails for reasons that pass. Raises EngineError of the last one's kind."""
        import tenacity

        try:
            async for trial in tenacity.AsyncRetrying(
                retry=tenacity.retry_if_exception_type(Failure),
                wait=tenacity.wait_random_exponential(multiplier=0.2, max=5),
                stop=tenacity.stop_after_delay(self.patience_s),
            ):
                with trial:
                    if self.processes:
                        self.processes.check()
                    return await attempt()
        except tenacity.RetryError as error:
            last = error.last_attempt.exception()
            raise EngineError(f"{what}: {last}; gave up after {self.patience_s:g} s", last.kind) from None

    def _server_of(self, session_id: str) -> Server:
        """The session's own server; while that one is failing, the next."""
        now = time.monotonic()
        return min(self._servers, key=lambda s: (s.down_until > now, _weight(s.url, session_id)))

    def _failed(self, server: Server, failure: Failure | EngineError) -> None:
        self.incidents.note("engine", failure.kind)
        if failure.kind in ("connect", "timeout", "server_error"):
            server.down_until = time.monotonic() + _AVOID_S


def _refuse_nccl(adapter_only: bool) -> None:
    if adapter_only:
        raise ValueError("sync 'nccl' sends whole weights: a policy with an adapter uses 'disk', or merge_lora")
    if not torch.cuda.is_available():
        raise ValueError("sync 'nccl' broadcasts between GPUs, and this machine has none: use 'disk'")
    try:
        import vllm.distributed.weight_transfer.nccl_engine  # noqa: F401
    except ImportError as error:
        raise ValueError("sync 'nccl' is vLLM's own: pip install 'genevolve-fast[vllm]', or use 'disk'") from error


def _weight(url: str, session_id: str) -> bytes:
    return hashlib.blake2b(f"{url}\0{session_id}".encode(), digest_size=8).digest()
