"""A policy as a folder that transformers, peft and vLLM load: weights, config, tokenizer and processors."""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from genevolve_fast.files import write_text
from genevolve_fast.policy.adapters import SavedAdapters, adapter_base
from genevolve_fast.policy.codec import TransformersCodec
from genevolve_fast.policy.model import Policy
from genevolve_fast.policy.weights import human_bytes

SHARD = "5GB"  # longest file of weights, as the hub's own are
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
_ADAPTER = "default"
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_VIDEO = "video_preprocessor_config.json"
# the form in which sessions, SFT and our own server write turns
CHAT_TEMPLATE = """\
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['content'] is string %}
{{- message['content'] }}
{%- else %}
{%- for part in message['content'] %}
{{- part['text'] if part['type'] == 'text' else '<|vision_start|><|image_pad|><|vision_end|>' }}
{%- endfor %}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}"""


class ExportError(ValueError):
    """The policy cannot be exported like that; the message says why and what would do."""


@dataclass(frozen=True)
class Written:
    """What a folder of weights holds; `rank` is an adapter's, 0 for whole weights."""

    parameters: int
    nbytes: int
    files: int
    dtype: str
    architecture: str
    vision: bool
    rank: int = 0


def export_merged(
    source: Path, folder: Path, *, dtype: torch.dtype | None = None, base: str | None = None, origin: str | None = None
) -> Written:
    """Write the policy in `source` to the empty `folder` as an ordinary transformers model.

    An adapter is added to its base, or to `base` where that lies elsewhere now: W + scale·B·A in fp32, rounded once, a
    tensor at a time. dtype: None keeps that of the stored weights. `origin` is the model that training began with, from
    which processor files come that a policy does not carry. Raises ExportError.
    """
    adapter_of = adapter_base(source)
    whole = (base or adapter_of) if adapter_of else str(source)
    try:
        policy = Policy.from_pretrained(whole, stored_dtype(whole))
    except FileNotFoundError as error:
        if adapter_of is None:
            raise
        raise ExportError(
            f"{source} is an adapter and its base is missing: {error}. Say where it is now with --base, or write the "
            "adapter alone with --adapter"
        ) from error
    if adapter_of:
        SavedAdapters(policy).add(_ADAPTER, source)
        policy.codec = TransformersCodec.from_pretrained(source)
    dtype = dtype or stored_dtype(whole)
    written = _write_weights(policy.model, _weights(policy, dtype), folder, dtype)
    _write_config(policy.model, folder, dtype)
    _write_processors(policy.codec, folder, [source, whole, origin])
    return written


def export_sharded(
    source: Path,
    folder: Path,
    trained: Mapping[str, Callable[[], Tensor]],
    *,
    dtype: torch.dtype | None = None,
    base: str | Path | None = None,
) -> Written:
    """Write to the empty `folder` the policy whose outline is in `source` and whose trained weights `trained` reads.

    What was not trained comes from `base`, the model that training began with. Weights are read as they are written:
    one file of them is in memory. dtype: None rounds full-precision weights to that of the policy. Raises ExportError.
    """
    model, own = _outline(source), stored_dtype(source)
    shapes = {n: p.shape for n, p in model.named_parameters()}
    if unknown := sorted(trained.keys() - shapes.keys()):
        raise ExportError(f"{source} belongs to other weights than those beside it: it has no {unknown[0]}")
    frozen = _of_base(base, shapes.keys() - trained.keys(), source)
    dtype = dtype or own

    def made(name: str) -> Tensor:
        tensor = trained[name]() if name in trained else frozen[name]().to(own)  # as the policy was trained with it
        if tensor.shape != shapes[name]:
            where = source if name in trained else base
            raise ExportError(f"{name} of {where} is {list(tensor.shape)}, the policy's {list(shapes[name])}")
        return tensor.to(dtype).contiguous()

    written = _write_weights(model, {n: partial(made, n) for n in shapes}, folder, dtype)
    _write_config(model, folder, dtype)
    _write_processors(TransformersCodec.from_pretrained(source), folder, [source, base])
    return written


def export_adapter(source: Path, folder: Path, *, dtype: torch.dtype | None = None, base: str | None = None) -> Written:
    """Write the adapter in `source` to the empty `folder` as peft and vLLM read it; it names `base`, or its own.

    Raises ExportError where `source` holds whole weights.
    """
    from safetensors.torch import load_file, save_file

    adapter_of = adapter_base(source)
    if adapter_of is None:
        raise ExportError(f"{source} holds whole weights: there is no adapter to export, use --merged")
    config = json.loads((source / _CONFIG).read_text(encoding="utf-8"))
    tensors = {n: t if dtype is None else t.to(dtype) for n, t in load_file(source / _WEIGHTS).items()}
    for name, tensor in tensors.items():
        _refuse_nonfinite(name, tensor, source)
    config["base_model_name_or_path"] = base or adapter_of
    if names := _names_in_every_layer(tensors):
        config["target_modules"] = names  # some servers read names only, no expression over paths
    write_text(folder / _CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")
    save_file(tensors, folder / _WEIGHTS, metadata={"format": "pt"})
    codec = TransformersCodec.from_pretrained(source)
    _write_processors(codec, folder, [source, adapter_of])
    return Written(
        parameters=sum(t.numel() for t in tensors.values()),
        nbytes=sum(t.nbytes for t in tensors.values()),
        files=1,
        dtype=str(next(iter(tensors.values())).dtype).removeprefix("torch."),
        architecture="LoRA",
        vision=codec.image_processor is not None,
        rank=config["r"],
    )


def stored_dtype(path: str | Path) -> torch.dtype:
    """Of most of the weights in a folder; of a hub id what its config.json says."""
    from safetensors import safe_open

    counts: dict[torch.dtype, int] = {}
    for file in sorted(Path(path).glob("*.safetensors")) if Path(path).is_dir() else []:
        with safe_open(file, "pt") as f:
            for name in f.keys():  # noqa: SIM118 - it is no dictionary
                part = f.get_slice(name)
                kind = _STORED.get(part.get_dtype(), torch.float32)
                counts[kind] = counts.get(kind, 0) + math.prod(part.get_shape())
    if counts:
        return max(counts, key=counts.__getitem__)
    from transformers import AutoConfig

    try:
        told = AutoConfig.from_pretrained(path).dtype
    except (OSError, ValueError):
        return torch.float32  # whoever loads it says what is missing
    return told if isinstance(told, torch.dtype) else torch.float32


# --- weights ----------------------------------------------------------------------------------------------------------


def _write_weights(
    model: nn.Module, makes: Mapping[str, Callable[[], Tensor]], folder: Path, dtype: torch.dtype
) -> Written:
    """Shards of at most SHARD, and their index where there are several; one shard is in memory beside the model.

    `makes` makes each tensor on the host.
    """
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file
    from tqdm import tqdm

    own = {n.replace(".base_layer.", "."): p for n, p in model.named_parameters()}
    shapes = {n: torch.empty(own[n].shape, dtype=dtype, device="meta") for n in makes}
    plan = split_torch_state_dict_into_shards(shapes, max_shard_size=SHARD)
    needed, free = sum(t.numel() * dtype.itemsize for t in shapes.values()), shutil.disk_usage(folder).free
    if needed > free:
        told = f"the weights take {human_bytes(needed)}, {human_bytes(free)} are free"
        raise ExportError(f"no room in {folder.parent}: {told}")
    with tqdm(total=len(makes), desc="export", unit="tensor", dynamic_ncols=True) as bar:
        for file, names in plan.filename_to_tensors.items():
            shard = {}
            for name in names:
                shard[name] = makes[name]()
                _refuse_nonfinite(name, shard[name], "the policy")
                bar.update()
            save_file(shard, folder / file, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": dict(sorted(plan.tensor_to_filename.items()))}
        write_text(folder / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")
    count = sum(t.numel() for t in shapes.values())
    return Written(
        parameters=count,
        nbytes=count * dtype.itemsize,
        files=len(plan.filename_to_tensors),
        dtype=str(dtype).removeprefix("torch."),
        architecture=type(model).__name__,
        vision=model.config is not model.config.get_text_config(),
    )


def _weights(policy: Policy, dtype: torch.dtype) -> dict[str, Callable[[], Tensor]]:
    """What makes each tensor of the checkpoint on the host, by its name; a tied head is the embedding and has none."""
    adapted = {n: m for n, m in policy.model.named_modules() if hasattr(m, "lora_A") and hasattr(m, "base_layer")}

    def made(name: str, tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        if layer := adapted.get(name.removesuffix(".base_layer.weight")):
            delta = layer.get_delta_weight(_ADAPTER).detach()
            tensor = tensor.to(delta.dtype) + delta
        return tensor.to("cpu", dtype).contiguous()

    own = {n: p for n, p in policy.model.named_parameters() if ".lora_" not in n}
    return {n.replace(".base_layer.", "."): lambda n=n, p=p: made(n, p) for n, p in own.items()}


def _outline(source: Path) -> nn.Module:
    """The model of a folder's config.json, without storage."""
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, Qwen3VLForConditionalGeneration

    config = AutoConfig.from_pretrained(source)
    kind = Qwen3VLForConditionalGeneration if config.model_type == "qwen3_vl" else AutoModelForCausalLM
    with torch.device("meta"):
        model = kind._from_config(config) if hasattr(kind, "_from_config") else kind.from_config(config)
    if (source / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(source)
    return model


def _of_base(base: str | Path | None, names: Set[str], source: Path) -> dict[str, Callable[[], Tensor]]:
    """What reads these weights of the model that training began with, a tensor at a time where its files name them so.

    Raises ExportError where it is missing.
    """
    from safetensors import safe_open

    if not names:
        return {}
    needs = f"{source} was trained in part: {len(names)} tensors, such as {min(names)}, are those of the model that"
    if base is None:
        raise ExportError(f"{needs} it began with, and no config.yaml says which: give --base")

    def read(file: Path, name: str) -> Tensor:
        with safe_open(file, "pt") as f:
            return f.get_tensor(name)

    config, files = model_file(base, "config.json"), {}
    for file in sorted(config.parent.glob("*.safetensors")) if config else ():
        with safe_open(file, "pt") as f:
            files |= dict.fromkeys(f.keys(), file)
    if names <= files.keys():
        return {n: partial(read, files[n], n) for n in names}
    try:  # transformers knows older names
        own = dict(Policy.from_pretrained(base, stored_dtype(base)).model.named_parameters())
    except FileNotFoundError as error:
        raise ExportError(f"{needs} it began with: {error}. Say where it is now with --base") from error
    if missing := sorted(names - own.keys()):
        raise ExportError(f"{base} has no {missing[0]}: it is not the model that {source} began with. Give --base")
    return {n: own[n].detach for n in names}


def _refuse_nonfinite(name: str, tensor: Tensor, where: object) -> None:
    if not torch.isfinite(tensor).all():
        wrong = int((~torch.isfinite(tensor)).sum())
        raise ExportError(f"{name} of {where} holds {wrong} NaN or infinite numbers: export an earlier checkpoint")


def _names_in_every_layer(tensors: Mapping[str, Tensor]) -> list[str] | None:
    """Names of the adapted linear layers, if each is adapted in every layer that has an adapter at all."""
    modules = {name.rsplit(".lora_", 1)[0] for name in tensors}
    names = sorted({m.rsplit(".", 1)[1] for m in modules})
    layers = {m.split(".layers.")[1].split(".")[0] for m in modules if ".layers." in m}
    whole = {str(i) for i in range(len(layers))} == layers and len(modules) == len(names) * len(layers)
    return names if whole else None


# --- beside them ------------------------------------------------------------------------------------------------------


def _write_config(model, folder: Path, dtype: torch.dtype) -> None:
    config = copy.deepcopy(model.config)
    for section in (config, *(getattr(config, name, None) for name in ("text_config", "vision_config"))):
        if section is not None:
            section.dtype = dtype
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)


def _write_processors(codec: TransformersCodec, folder: Path, origins: Sequence[str | Path | None]) -> None:
    """Tokenizer with a chat template, and what AutoProcessor and vLLM want of a model that sees images."""
    codec.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    told = json.loads(file.read_text(encoding="utf-8"))
    told = {k: v for k, v in told.items() if k not in ("is_local", "local_files_only")}  # how it was loaded here
    if told.get("tokenizer_class") == "TokenizersBackend":
        told["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that transformers 4 knows too
    write_text(file, json.dumps(told, indent=2, ensure_ascii=False) + "\n")
    if codec.tokenizer.chat_template is None:
        write_text(folder / "chat_template.jinja", CHAT_TEMPLATE)
    if codec.image_processor is None:
        return
    file = folder / "preprocessor_config.json"
    images = json.loads(file.read_text(encoding="utf-8")) | {"processor_class": "Qwen3VLProcessor"}
    write_text(file, json.dumps(images, indent=2) + "\n")
    if there := next((found for o in origins if o and (found := model_file(o, _VIDEO))), None):
        shutil.copyfile(there, folder / _VIDEO)
        return
    same = ("patch_size", "temporal_patch_size", "merge_size", "image_mean", "image_std")
    videos = {"processor_class": "Qwen3VLProcessor", "video_processor_type": "Qwen3VLVideoProcessor"}
    videos |= {name: images[name] for name in same if name in images}
    write_text(folder / _VIDEO, json.dumps(videos, indent=2) + "\n")


def model_file(model: str | Path, name: str, *, fetch: bool = False) -> Path | None:
    """`name` of a model's folder, or of a hub id in the local cache, or with `fetch` on the hub; None where none is."""
    if Path(model).is_dir():
        return path if (path := Path(model) / name).is_file() else None
    import httpx
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(str(model), name)
        if found is None and fetch:
            found = hf_hub_download(str(model), name, etag_timeout=5)
    except (HFValidationError, httpx.HTTPError, OSError, ValueError):  # no such id, nobody to ask
        return None
    return Path(found) if isinstance(found, str) else None
