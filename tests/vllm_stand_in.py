"""A `vllm` package whose every entry binds its arguments against the released one's recorded signatures.

Behind it our transformers engine samples from weights of its own, which only arrive as vLLM's would: so sleep, wake,
update, verification, adapters, images and caches really happen, and what is forgotten shows.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import inspect
import json
import sys
import types
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from genevolve_fast.policy.adapters import merge_saved
from genevolve_fast.policy.model import Policy
from genevolve_fast.protocols import Sampling
from genevolve_fast.rollout.transformers_engine import TransformersEngine

RECORDED = json.loads(Path(__file__).with_name("vllm_signatures.json").read_text(encoding="utf-8"))


def signature(name: str) -> inspect.Signature:
    kinds = {"positional": inspect.Parameter.POSITIONAL_OR_KEYWORD, "keyword": inspect.Parameter.KEYWORD_ONLY}
    parameters = [
        inspect.Parameter(n, kinds[kind], default=None if has_default else inspect.Parameter.empty)
        for n, kind, has_default in RECORDED["methods"][name]["parameters"]
    ]
    return inspect.Signature(parameters)


def bound(name: str):
    """Refuse arguments that the released method would not take, and note the call."""
    recorded = signature(name)

    def wrap(function):
        @functools.wraps(function)
        def checked(self, *args, **kwargs):
            given = recorded.bind(*args, **kwargs).arguments
            self.calls.append((name.partition(".")[2], given))
            return function(self, **given)

        return checked

    return wrap


def plain(name: str, *also: str) -> type:
    """A class of the recorded fields, which refuses any other."""
    names = [f for n in (*also, name) for f in RECORDED["fields"][n]]

    def __init__(self, *args, **kwargs):
        given = dict(zip(names, args, strict=False)) | kwargs
        if unknown := given.keys() - set(names):
            raise TypeError(f"{name} has no {sorted(unknown)}")
        self.__dict__.update(dict.fromkeys(names) | given)

    return type(name, (), {"__init__": __init__})


AsyncEngineArgs = plain("AsyncEngineArgs", "EngineArgs")
SamplingParams = plain("SamplingParams")
LoRARequest = plain("LoRARequest")
WeightTransferConfig = plain("WeightTransferConfig")
WeightTransferInitRequest = plain("WeightTransferInitRequest")
WeightTransferUpdateRequest = plain("WeightTransferUpdateRequest")
ParamMeta = plain("ParamMeta")
IPCTrainerInitInfo = plain("IPCTrainerInitInfo", "TrainerInitInfo")
CompletionOutput = plain("CompletionOutput")
Logprob = plain("Logprob")
SamplingMask = plain("SamplingMask")
WeightVersionSpan = plain("WeightVersionSpan")
RequestOutputKind = types.SimpleNamespace(**{name: name for name in RECORDED["fields"]["RequestOutputKind"]})


def TokensPrompt(**given: Any) -> dict[str, Any]:  # noqa: N802 - a TypedDict there
    allowed = {*RECORDED["fields"]["TokensPrompt"], *RECORDED["fields"]["_PromptOptions"]}
    if unknown := given.keys() - allowed:
        raise TypeError(f"TokensPrompt has no {sorted(unknown)}")
    return given


class WeightSource:
    def __init_subclass__(cls) -> None:
        if not isinstance(cls.__dict__.get("metadata"), cached_property):
            raise TypeError("metadata must be a functools.cached_property")


class IPCTrainerWeightTransferEngine:
    """Packs tensors into buckets; what goes through the client is bytes, as a CUDA handle would be."""

    @classmethod
    def trainer_init(cls, *args, **kwargs):
        given = signature("IPCTrainerWeightTransferEngine.trainer_init").bind(*args, **kwargs).arguments
        self = cls()
        self.info, self.client, self.source = given["init_info"], given["client"], given["source"]
        self.client.init_weight_transfer_engine({"packed": self.info.packed})
        return self

    def send_weights(self) -> None:
        self.client.start_weight_update()
        metadata = {m.name: m for m in self.source.metadata}
        bucket: list[tuple[str, torch.Tensor]] = []
        for name, tensor in self.source.iter_full():
            assert (tensor.dtype, tuple(tensor.shape)) == (metadata[name].dtype, metadata[name].shape)
            bucket.append((name, tensor))
            if sum(t.nbytes for _, t in bucket) > self.info.packed_buffer_size_bytes:
                self._ship(bucket)
                bucket = []
        if bucket:
            self._ship(bucket)
        self.client.finish_weight_update()

    def _ship(self, bucket: list[tuple[str, torch.Tensor]]) -> None:
        parts = [t.detach().contiguous().view(-1).view(torch.uint8) for _, t in bucket]
        info = {
            "names": [n for n, _ in bucket],
            "dtype_names": [str(t.dtype).removeprefix("torch.") for _, t in bucket],
            "shapes": [list(t.shape) for _, t in bucket],
            "ipc_handles": {"gpu": torch.cat(parts)},
            "tensor_sizes": [p.numel() for p in parts],
        }
        assert info.keys() <= set(RECORDED["fields"]["IPCWeightTransferUpdateInfo"])
        self.client.update_weights(info)


class AsyncLLM:
    """One at a time (`made` is the last). Tests may set `corrupt`, a function of (name, tensor), and `expand_by`."""

    made: AsyncLLM

    @classmethod
    def from_engine_args(cls, *args, **kwargs):
        signature("AsyncLLM.from_engine_args").bind(*args, **kwargs)
        self = cls()
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.args = args[0]
        self.policy = Policy.from_pretrained(self.args.model, getattr(torch, self.args.dtype)).eval()
        self.codec = self.policy.codec
        self.base = TransformersEngine(self.policy, deterministic=False)
        self.adapters: dict[int, TransformersEngine] = {}
        self.opened: set[tuple[int, str]] = set()
        self.awake = {"weights", "kv_cache"}
        self.paused = self.updating = False
        self.version = "default"
        self.corrupt = lambda name, tensor: tensor
        self.expand_by = 0
        AsyncLLM.made = self
        return self

    @bound("AsyncLLM.shutdown")
    def shutdown(self, timeout=None) -> None:
        self.awake = set()

    @bound("AsyncLLM.sleep")
    async def sleep(self, level=1, mode="abort") -> None:
        assert mode == "wait", "sleeping under a running request is illegal"
        self.awake = set()
        self.forget()
        if level == 2:
            for p in self.policy.model.parameters():
                p.data.fill_(float("nan"))

    @bound("AsyncLLM.wake_up")
    async def wake_up(self, tags=None) -> bool:
        self.awake |= set(tags or ("weights", "kv_cache"))
        return self.awake == {"weights", "kv_cache"}

    @bound("AsyncLLM.pause_generation")
    async def pause_generation(self, mode="abort", clear_cache=True) -> None:
        self.paused = True

    @bound("AsyncLLM.resume_generation")
    async def resume_generation(self) -> None:
        self.paused = False

    @bound("AsyncLLM.reset_prefix_cache")
    async def reset_prefix_cache(self, reset_running_requests=False, reset_connector=False) -> bool:
        self.forget()
        return True

    @bound("AsyncLLM.reset_mm_cache")
    async def reset_mm_cache(self) -> None: ...

    @bound("AsyncLLM.reset_encoder_cache")
    async def reset_encoder_cache(self) -> None:
        self.policy.forget_images()

    @bound("AsyncLLM.update_weight_version")
    async def update_weight_version(self, new_version) -> None:
        self.version = new_version

    @bound("AsyncLLM.init_weight_transfer_engine")
    async def init_weight_transfer_engine(self, request) -> None:
        assert self.args.weight_transfer_config.backend == "ipc"
        self.packed = request.init_info["packed"]

    @bound("AsyncLLM.start_weight_update")
    async def start_weight_update(self) -> None:
        assert "weights" in self.awake, "weights pushed into memory that is asleep"
        self.updating = True

    @bound("AsyncLLM.update_weights")
    async def update_weights(self, request) -> None:
        assert self.updating and self.packed
        info = request.update_info
        own = dict(self.policy.model.named_parameters())
        raw = info["ipc_handles"]["gpu"].split(info["tensor_sizes"])
        for name, dtype, shape, part in zip(info["names"], info["dtype_names"], info["shapes"], raw, strict=True):
            tensor = part.clone().view(getattr(torch, dtype)).view(shape)
            own[name].data.copy_(self.corrupt(name, tensor))

    @bound("AsyncLLM.finish_weight_update")
    async def finish_weight_update(self, weight_version=None) -> None:
        self.updating = False

    @bound("AsyncLLM.collective_rpc")
    async def collective_rpc(self, method, timeout=None, args=(), kwargs=None) -> list[None]:
        from safetensors.torch import load_file

        assert method == "reload_weights" and "weights" in self.awake
        own = dict(self.policy.model.named_parameters())
        for file in sorted(Path(kwargs["weights_path"]).glob("*.safetensors")):
            for name, tensor in load_file(file).items():
                own[name].data.copy_(tensor)
        return [None]

    @bound("AsyncLLM.compute_weight_checksums")
    async def compute_weight_checksums(self) -> list[dict[str, str]]:
        return [{f"dp0:pp0:pcp0:tp0:{name}": _sha256(t) for name, t in _as_vllm(self.policy).items()}]

    @bound("AsyncLLM.add_lora")
    async def add_lora(self, lora_request) -> bool:
        assert self.args.enable_lora
        model = merge_saved(copy.deepcopy(self.policy.model), lora_request.lora_path)
        self.adapters[lora_request.lora_int_id] = TransformersEngine(Policy(model, self.codec), deterministic=False)
        assert len(self.adapters) <= self.args.max_loras
        return True

    @bound("AsyncLLM.remove_lora")
    async def remove_lora(self, lora_id) -> bool:
        return self.adapters.pop(lora_id, None) is not None

    def forget(self) -> None:
        for engine in (self.base, *self.adapters.values()):
            engine.update_weights(0)

    async def _generate(self, prompt, sampling_params, request_id, lora_request=None, session_id=None, **_):
        assert self.awake == {"weights", "kv_cache"} and not self.paused
        p = sampling_params
        if self.args.return_sampling_mask and not (p.top_k and p.temperature > 0):
            raise ValueError("sampling distribution replay requires top_k > 0")
        assert p.ignore_eos and p.logprobs == 0 and p.output_kind == "FINAL_ONLY"
        number = lora_request.lora_int_id if lora_request else 0
        engine = self.adapters[number] if number else self.base
        if (number, session_id) not in self.opened:
            self.opened.add((number, session_id))
            engine.open(session_id)
        pictures = (prompt.get("multi_modal_data") or {}).get("image", [])
        assert len(prompt.get("multi_modal_uuids", {}).get("image", [])) == len(pictures)
        assert len(pictures) <= self.args.limit_mm_per_prompt["image"]
        images = [np.asarray(picture) for picture in pictures]
        ids = self._expanded(prompt["prompt_token_ids"], images, 0)
        wanted = bool(self.args.return_sampling_mask)
        sampling = Sampling(p.temperature, p.top_p, p.max_tokens, tuple(p.stop_token_ids), wanted)
        made = await engine.generate(session_id, ids, images, sampling, p.seed)
        out = CompletionOutput(
            index=0,
            token_ids=made.ids,
            logprobs=[{t: Logprob(logprob=lp, rank=1)} for t, lp in zip(made.ids, made.logps, strict=True)],
            finish_reason=made.finish_reason,
            sampling_mask=SamplingMask(token_ids=made.sampling_mask) if wanted else None,
            weight_versions=[WeightVersionSpan(version=self.version, start=0, end=len(made.ids))],
        )
        read = self._expanded(prompt["prompt_token_ids"], images, self.expand_by)
        yield types.SimpleNamespace(prompt_token_ids=read, outputs=[out], num_cached_tokens=0, finished=True)

    def generate(self, *args, **kwargs):
        given = signature("AsyncLLM.generate").bind(*args, **kwargs).arguments
        self.calls.append(("generate", given))
        return self._generate(**given)

    def _expanded(self, ids: list[int], images, more: int) -> list[int]:
        out, left = [], list(images)
        for token in ids:
            if token == self.codec.image_pad_id:
                pixels = left.pop(0)
                out += [token] * (self.codec.image_tokens(self.codec.image_grid(pixels)) + more)
            else:
                out.append(token)
        assert not left
        return out


def _sha256(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


def _as_vllm(policy: Policy) -> dict[str, torch.Tensor]:
    """Names and fused layers of vLLM on one rank, written without the code under test."""
    own = dict(policy.model.named_parameters())
    out: dict[str, torch.Tensor] = {}
    for name, tensor in own.items():
        new = name.replace("model.language_model.", "language_model.model.").replace("model.visual.", "visual.")
        if ".q_proj." in name:
            names = [name.replace("q_proj", part) for part in ("q_proj", "k_proj", "v_proj")]
            out[new.replace("q_proj", "qkv_proj")] = torch.cat([own[n] for n in names])
        elif ".gate_proj." in name:
            both = [own[name], own[name.replace("gate_proj", "up_proj")]]
            out[new.replace("gate_proj", "gate_up_proj")] = torch.cat(both)
        elif not any(part in name for part in (".k_proj.", ".v_proj.", ".up_proj.")):
            if name.endswith("embed_tokens.weight"):
                tensor = torch.nn.functional.pad(tensor, (0, 0, 0, -len(tensor) % 64))
            out[new] = tensor
    return out


def install(monkeypatch) -> None:
    """Make `import vllm` find this package."""
    homes = {
        "AsyncLLM": AsyncLLM,
        "AsyncEngineArgs": AsyncEngineArgs,
        "SamplingParams": SamplingParams,
        "RequestOutputKind": RequestOutputKind,
        "LoRARequest": LoRARequest,
        "TokensPrompt": TokensPrompt,
        "WeightTransferConfig": WeightTransferConfig,
        "WeightTransferInitRequest": WeightTransferInitRequest,
        "WeightTransferUpdateRequest": WeightTransferUpdateRequest,
        "ParamMeta": ParamMeta,
        "WeightSource": WeightSource,
        "IPCTrainerInitInfo": IPCTrainerInitInfo,
        "IPCTrainerWeightTransferEngine": IPCTrainerWeightTransferEngine,
    }
    modules: dict[str, types.ModuleType] = {}
    for name, value in homes.items():
        home = RECORDED["modules"][name]
        home = "vllm.inputs" if name == "TokensPrompt" else home  # re-exported there
        parts = home.split(".")
        for i in range(1, len(parts) + 1):
            dotted = ".".join(parts[:i])
            modules.setdefault(dotted, types.ModuleType(dotted))
        setattr(modules[home], name, value)
    for dotted, module in modules.items():
        monkeypatch.setitem(sys.modules, dotted, module)
