"""vLLM in this process' GPU: asleep while the policy trains, woken with its new weights before the next rollouts."""

from __future__ import annotations

import asyncio
import atexit
import itertools
import os
import shutil
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from genevolve_fast.incidents import Incidents
from genevolve_fast.policy.adapters import adapter_rank, has_adapters, save_adapter
from genevolve_fast.policy.model import Policy
from genevolve_fast.protocols import EngineError, Generation, Sampling
from genevolve_fast.rollout.exchange import MASK_TOP_K, SEEDS, check_prompt, checked_generation, collapsed
from genevolve_fast.rollout.loop_thread import LoopThread
from genevolve_fast.rollout.weights import HeadShape, differing, full_weights, write_folder, write_whole
from genevolve_fast.trajectory import image_hash

_ADAPTER_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # those that vLLM has kernels for
_IMAGES = 256  # of one rollout
_RESET_TRIES = 20


class VllmEngine:
    """protocols.TrainedEngine over vLLM's AsyncLLM.

    `sleep` drains it and gives its memory back; `wake` takes the memory of the weights, loads them, compares them with
    the policy's, and only then takes that of the KV cache and resets what was cached. Weights arrive in buckets of
    `bucket_bytes` by CUDA IPC, which reaches one GPU; with more (`tensor_parallel_size`) by files. A policy with an
    adapter keeps vLLM's base and loads each version's adapter, unless `merge_lora`. Every `verify_every`-th update is
    followed by a comparison of all parameters' digests (0: none).

    Raises ValueError where vLLM or a GPU is missing.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        incidents: Incidents,
        max_model_len: int,
        tensor_parallel_size: int = 1,
        gpu_memory_utilization: float = 0.45,
        max_num_seqs: int = 64,
        enforce_eager: bool = False,
        merge_lora: bool = False,
        sampling_mask: bool = False,
        verify_every: int = 1,
        bucket_bytes: int = 512 << 20,
        seed: int = 0,
    ) -> None:
        os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # IPC handles go to the engine's own process
        _refuse_without_vllm()
        self.policy, self.incidents = policy, incidents
        self.adapter_only = has_adapters(policy) and not merge_lora
        self.dtype = policy.head_weight.dtype
        self.sampling_mask, self.verify_every, self.bucket_bytes = sampling_mask, verify_every, bucket_bytes
        self.by_files = tensor_parallel_size > 1
        self.mismatches = 0  # parameters that differed after an update, over the engine's life
        self.verified = 0  # parameters compared
        self.sampled_tokens = self.prompt_tokens = self.cached_tokens = 0
        self._run_id = uuid.uuid4().hex[:12]
        self._label: str | None = None
        self._loaded: str | None = None  # label of the weights in vLLM's memory; none while they are discarded
        self._updates = 0
        self._asleep = False
        self._adapter: Any = None
        self._adapter_ids = itertools.count(1)
        self._requests = itertools.count()
        self._sender: Any = None
        self._sessions: set[str] = set()
        self._folder = Path(tempfile.mkdtemp(prefix="genevolve-vllm-"))
        self._loop = LoopThread("vllm")
        atexit.register(self.shutdown)
        arguments = {
            "model": policy.model.name_or_path,
            "dtype": str(self.dtype).removeprefix("torch."),
            "seed": seed,
            "max_model_len": max_model_len,
            "tensor_parallel_size": tensor_parallel_size,
            "gpu_memory_utilization": gpu_memory_utilization,
            "max_num_seqs": max_num_seqs,
            "enforce_eager": enforce_eager,
            "enable_sleep_mode": True,
            "enable_prefix_caching": True,
            "logprobs_mode": "processed_logprobs",
            "return_sampling_mask": sampling_mask,
            "generation_config": "vllm",  # the folder's own would change top_k and penalties
            "disable_log_stats": True,
        }
        if policy.has_vision:
            arguments["limit_mm_per_prompt"] = {"image": _IMAGES, "video": 0}
        if self.adapter_only:
            rank = adapter_rank(policy)
            arguments |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": _rank_of_kernels(rank)}
        self._llm = self._loop.run(_start(arguments))

    # --- protocols.TrainedEngine --------------------------------------------------------------------------------------

    def open(self, session_id: str) -> None:
        self._sessions.add(session_id)

    def close(self, session_id: str) -> None:
        self._sessions.discard(session_id)

    def sleep(self) -> None:
        if self._asleep:
            return
        self._loop.run(self._llm.sleep(level=1 if self.adapter_only else 2, mode="wait"))
        self._asleep = True
        if not self.adapter_only:
            self._loaded = None  # level 2 discards the weights

    def wake(self) -> None:
        if self._asleep:
            self._loop.run(self._llm.wake_up(tags=["weights"]))
            self._bring_up()
            if not self._loop.run(self._llm.wake_up(tags=["kv_cache"])):
                raise EngineError("vLLM did not wake up whole", "other")
            self._asleep = False
            self._loop.run(self._forget())
        elif self._loaded != self._label:
            self._update_awake()

    def update_weights(self, version: int) -> None:
        self._updates += 1
        self._label = f"{self._run_id}-{version}.{self._updates}"
        if not self._asleep:
            self._update_awake()  # else `wake` loads them, before anything is sampled

    def shutdown(self) -> None:
        """End vLLM and remove the files that it read."""
        atexit.unregister(self.shutdown)
        if self._loop.closed:
            return
        if hasattr(self, "_llm"):
            self._loop.run(_call(self._llm.shutdown))
        self._loop.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    async def generate(
        self, session_id: str, ids: Sequence[int], images: Sequence[np.ndarray], sampling: Sampling, seed: int
    ) -> Generation:
        if session_id not in self._sessions:
            raise EngineError(f"session {session_id!r} is not open")
        if self._asleep:
            raise EngineError("vLLM is asleep: call wake() before the rollouts")
        try:
            made = await self._loop.call(self._sample(session_id, ids, images, sampling, seed))
        except EngineError as error:
            self.incidents.note("engine", error.kind)
            raise
        self.sampled_tokens += len(made.ids)
        return made

    # --- questions and answers ----------------------------------------------------------------------------------------

    async def _sample(self, session_id: str, ids, images, sampling: Sampling, seed: int) -> Generation:
        prompt, params = self._prompt(ids, images), self._params(sampling, seed)
        request = f"{session_id}#{next(self._requests)}"
        try:
            answers = [
                answer
                async for answer in self._llm.generate(
                    prompt, params, request, lora_request=self._adapter, session_id=session_id
                )
            ]
        except asyncio.CancelledError:
            raise
        except Exception as error:  # vLLM's own kinds are not part of its interface
            cause = error.__cause__ or error  # EngineGenerateError itself says nothing
            raise EngineError(f"vLLM: {type(cause).__name__}: {cause}", "server_error") from error
        if not answers or not answers[-1].outputs:
            raise EngineError("vLLM ended a request without an answer", "server_error")
        last = answers[-1]
        check_prompt(ids, last.prompt_token_ids, images, self.policy.codec)
        out = last.outputs[0]
        stale = [s.version for s in out.weight_versions or () if s.version != self._label]
        if stale and self._label is not None:
            raise EngineError(f"sampled with the weights {stale[0]} instead of {self._label}", "stale_weights")
        self.prompt_tokens += len(ids)
        self.cached_tokens += last.num_cached_tokens or 0
        tokens = list(out.token_ids)
        logps = [step[token].logprob for token, step in zip(tokens, out.logprobs or (), strict=False)]
        mask = out.sampling_mask.token_ids if out.sampling_mask is not None else None
        return checked_generation(tokens, logps, out.finish_reason, mask, sampling, self.policy.codec)

    def _prompt(self, ids: Sequence[int], images: Sequence[np.ndarray]) -> Any:
        from PIL import Image
        from vllm.inputs import TokensPrompt

        prompt = TokensPrompt(prompt_token_ids=collapsed(ids, images, self.policy.codec))
        if images:
            prompt["multi_modal_data"] = {"image": [Image.fromarray(pixels) for pixels in images]}
            prompt["multi_modal_uuids"] = {"image": [image_hash(pixels) for pixels in images]}
        return prompt

    def _params(self, sampling: Sampling, seed: int) -> Any:
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        bounded = {"top_k": MASK_TOP_K} if self.sampling_mask else {}
        return SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=sampling.max_tokens,
            seed=seed % SEEDS,
            stop_token_ids=list(sampling.stop_ids),
            ignore_eos=True,  # only stop_ids end a turn, whatever the model's generation_config says
            logprobs=0,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            **bounded,
        )

    # --- weights ------------------------------------------------------------------------------------------------------

    def _update_awake(self) -> None:
        self._loop.run(self._llm.pause_generation(mode="wait"))
        try:
            self._bring_up()
            self._loop.run(self._forget())
        finally:
            self._loop.run(self._llm.resume_generation())

    def _bring_up(self) -> None:
        """Load what is not loaded, and compare."""
        if self._label is not None and self._loaded == self._label:
            return
        if self.adapter_only:
            self._load_adapter()
        elif self.by_files:
            self._load_files()
        else:
            self._send()
        if self.verify_every and self._updates % self.verify_every == 0:
            self._verify()
        if self._label is not None:
            self._loop.run(self._llm.update_weight_version(self._label))
        self._loaded = self._label

    def _send(self) -> None:
        from genevolve_fast.rollout.vllm_transfer import ipc_sender, policy_source

        if self._sender is None:
            source = policy_source(lambda: full_weights(self.policy), self.dtype, self.policy.device)
            self._sender = ipc_sender(_Control(self._llm, self._loop), source, self.bucket_bytes)
        self._sender.send_weights()

    def _load_files(self) -> None:
        folder = self._folder / "weights"
        write_folder(folder, full_weights(self.policy), self.dtype)
        self._loop.run(self._llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)}))
        shutil.rmtree(folder)

    def _load_adapter(self) -> None:
        from vllm.lora.request import LoRARequest

        number, old = next(self._adapter_ids), self._adapter
        folder = self._folder / f"adapter-{number}"
        write_whole(folder, lambda partial: save_adapter(self.policy, partial))
        if old is not None:
            self._loop.run(self._llm.remove_lora(old.lora_int_id))
            shutil.rmtree(old.lora_path, ignore_errors=True)
        self._adapter = LoRARequest(lora_name=f"adapter-{number}", lora_int_id=number, lora_path=str(folder))
        if not self._loop.run(self._llm.add_lora(self._adapter)):
            raise EngineError(f"vLLM did not load the adapter in {folder}", "server_error")

    def _verify(self) -> None:
        """Raises EngineError where vLLM's parameters are not the policy's, byte for byte."""
        reported: dict[str, str] = {}
        for rank in self._loop.run(self._llm.compute_weight_checksums()):
            reported |= rank
        weights: Mapping[str, torch.Tensor] = full_weights(self.policy, merged=not self.adapter_only)
        wrong = differing(reported, weights, HeadShape.of(self.policy.model.config), self.dtype)
        self.verified += len(reported)
        self.mismatches += len(wrong)
        if wrong:
            raise EngineError(
                f"{len(wrong)} of {len(reported)} parameters of vLLM differ from the policy's after the update, "
                f"{', '.join(wrong[:3])} first",
                "bad_response",
            )

    async def _forget(self) -> None:
        """Drop the prefix cache, and what an encoder that is trained has cached."""
        for _ in range(_RESET_TRIES):
            if await self._llm.reset_prefix_cache():
                break
            await asyncio.sleep(0.05)
        else:
            raise EngineError(f"vLLM did not reset its prefix cache in {_RESET_TRIES} tries", "server_error")
        if not self.policy.vision_frozen:
            await self._llm.reset_mm_cache()
            await self._llm.reset_encoder_cache()


class _Control:
    """vLLM's VLLMWeightSyncClient over an AsyncLLM of this process."""

    def __init__(self, llm: Any, loop: LoopThread) -> None:
        self._llm, self._loop = llm, loop

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        self._loop.run(self._llm.init_weight_transfer_engine(WeightTransferInitRequest(init_info=init_info)))

    def start_weight_update(self) -> None:
        self._loop.run(self._llm.start_weight_update())

    def update_weights(self, update_info: Any) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        self._loop.run(self._llm.update_weights(WeightTransferUpdateRequest(update_info=update_info)))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._loop.run(self._llm.finish_weight_update(weight_version))


async def _start(arguments: Mapping[str, Any]) -> Any:
    from vllm.config.weight_transfer import WeightTransferConfig
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    return AsyncLLM.from_engine_args(
        AsyncEngineArgs(weight_transfer_config=WeightTransferConfig(backend="ipc"), **arguments)
    )


async def _call(function: Any) -> Any:
    return function()


def _rank_of_kernels(rank: int) -> int:
    for known in _ADAPTER_RANKS:
        if rank <= known:
            return known
    raise ValueError(f"policy.lora.rank {rank}: vLLM runs adapters of rank {_ADAPTER_RANKS[-1]} at most; merge_lora")


def _refuse_without_vllm() -> None:
    try:
        import vllm  # noqa: F401
    except ImportError as error:
        raise ValueError("vllm is not installed: pip install 'genevolve-fast[vllm]'") from error
    if not torch.cuda.is_available():
        raise ValueError("vLLM needs a GPU, and this machine has none: use rollout.engine transformers or server")
