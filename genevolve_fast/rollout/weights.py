"""The policy's tensors as an inference engine holds them: names, fused layers, shards, digests, files."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from genevolve_fast.policy.adapters import has_adapters, merged_state_dict
from genevolve_fast.policy.model import Policy
from genevolve_fast.policy.quantize import dequantized, quantized_layers

VOCABULARY_PADDING = 64  # rows that vLLM pads the vocabulary to a multiple of, before it splits it
SHARD_BYTES = 2 << 30
_PREFIXES = (  # vLLM's names of a Qwen3-VL
    ("model.visual.", "visual."),
    ("lm_head.", "language_model.lm_head."),
    ("model.language_model.", "language_model.model."),
)
_FUSED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"}
_FUSED |= {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}
_PARTS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
_RANK = re.compile(r"(dp\d+):pp(\d+):pcp(\d+):tp(\d+):(.*)", re.DOTALL)

Make = Callable[[], Tensor]


class LayoutError(ValueError):
    """The engine's parameters cannot be told from the policy's; the message says why."""


@dataclass(frozen=True)
class HeadShape:
    """What decides how attention is split over tensor-parallel ranks."""

    kv_heads: int
    head_dim: int
    vision_heads: int = 0

    @classmethod
    def of(cls, config) -> HeadShape:
        """Of a transformers config."""
        text = config.get_text_config()
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        vision = getattr(config, "vision_config", None)
        return cls(text.num_key_value_heads, head_dim, vision.num_heads if vision is not None else 0)


def full_weights(policy: Policy, *, merged: bool = True) -> dict[str, Tensor]:
    """Every parameter once under its checkpoint name; an adapter merged into copies on the host, or left out.

    4-bit weights are plain matrices, copies too. A tied head is the embedding and has no name of its own.
    """
    own = {n.replace(".base_layer.", "."): p.detach() for n, p in policy.model.named_parameters() if ".lora_" not in n}
    if merged and has_adapters(policy):
        merged_weights = merged_state_dict(policy.model)
        return {name: merged_weights[name] for name in own}
    quantized = quantized_layers(policy.model).items()
    return own | {f"{n.removesuffix('.base_layer')}.weight": dequantized(m).cpu() for n, m in quantized}


def write_folder(folder: Path, weights: Mapping[str, Tensor], dtype: torch.dtype, shard_bytes: int = SHARD_BYTES):
    """Safetensors shards and their index, in a temporary folder that is renamed when it is complete.

    At most `shard_bytes` (or one larger tensor) are copied at once.
    """
    from safetensors.torch import save_file

    size = torch.empty((), dtype=dtype).element_size()
    shards: list[list[str]] = [[]]
    held = 0
    for name, tensor in weights.items():
        if shards[-1] and held + tensor.numel() * size > shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += tensor.numel() * size

    def write(partial: Path) -> None:
        where = {}
        for i, names in enumerate(shards, 1):
            file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
            where |= dict.fromkeys(names, file)
            save_file(
                {n: weights[n].detach().to("cpu", dtype).contiguous() for n in names},
                partial / file,
                metadata={"format": "pt"},
            )
        total = sum(t.numel() * size for t in weights.values())
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (partial / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")

    write_whole(folder, write)


def folder_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder that `write_folder` wrote, mapped into memory and not read yet."""
    from safetensors.torch import load_file

    return {name: tensor for shard in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(shard).items()}


def write_whole(folder: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary folder beside `folder`, then rename it: no reader sees half of it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        write(partial)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes in row-major order, as vLLM's weight checker takes it."""
    flat = tensor.detach().to("cpu", copy=True).contiguous().view(-1)  # numpy would fix storage that FSDP2 frees
    return hashlib.sha256(memoryview(flat.view(torch.uint8).numpy())).hexdigest()


def differing(reported: Mapping[str, str], weights: Mapping[str, Tensor], heads: HeadShape, dtype: torch.dtype):
    """Names of the engine's parameters whose bytes are not the policy's, missing and unknown ones among them.

    `reported` is what a weight checker answers, {"dp0:pp0:pcp0:tp1:name": sha256}; the engine's layout (checkpoint
    names, or vLLM's fused and sharded ones) follows from its names. Raises LayoutError for pipeline parallelism.
    """
    ranks = _by_rank(reported)
    tp_size = 1 + max((tp for _, tp in ranks), default=0)
    wrong = []
    for tp in range(tp_size):
        copies = {dp: found for (dp, rank), found in ranks.items() if rank == tp}
        names = set().union(*copies.values()) if copies else set()
        expected = dict(expected_weights(weights, heads, tp, tp_size, names))
        seen: dict[str, set[str]] = {}
        for name, ways in expected.items():
            seen[name] = {digest(way().to(dtype)) for way in ways} if name in names else set()
        for dp, found in copies.items():
            for name in expected.keys() | found.keys():
                if found.get(name) not in seen.get(name, ()):
                    wrong.append(f"{dp}:tp{tp}:{name}" if len(ranks) > 1 else name)
    return sorted(wrong) if ranks else sorted(weights)


def _by_rank(reported: Mapping[str, str]) -> dict[tuple[str, int], dict[str, str]]:
    """Digests by (data-parallel index, tensor-parallel rank), names as a checkpoint of the base has them."""
    ranks: dict[tuple[str, int], dict[str, str]] = {}
    for key, value in reported.items():
        match = _RANK.fullmatch(key)
        dp, pp, pcp, tp, name = match.groups() if match else ("dp0", "0", "0", "0", key)
        if int(pp) or int(pcp):
            raise LayoutError(
                "the engine splits its layers over pipeline or prefill-context ranks, and only tensor and data "
                "parallelism are known here: start it with --tp and --dp, or set verify_every to 0"
            )
        ranks.setdefault((dp, int(tp)), {})[name.replace(".base_layer.", ".")] = value
    return ranks


def expected_weights(
    weights: Mapping[str, Tensor], heads: HeadShape, tp_rank: int, tp_size: int, names: Iterable[str] = ()
) -> Iterator[tuple[str, tuple[Make, ...]]]:
    """(the engine's name, the ways it may hold it) of every parameter on one rank; nothing is computed yet.

    Where `names` are the checkpoint's, so is the layout. Otherwise vLLM's: q, k, v and gate, up fused; column-parallel
    layers split in rows, row-parallel ones in columns, key and value heads repeated where there are fewer than ranks,
    the vocabulary padded and split. A vision tower may be whole on every rank (`mm_encoder_tp_mode="data"`).
    """
    if set(names) == set(weights):
        for name, tensor in weights.items():
            yield name, (lambda tensor=tensor: tensor,)
        return
    vision = any(n.startswith("model.visual.") for n in weights)
    done = set()
    for name in weights:
        *path, layer, kind = name.split(".")
        if fused := _FUSED.get(layer):
            parts = [".".join([*path, part, kind]) for part in _PARTS[fused]]
            target = ".".join([*path, fused, kind])
            if target in done:
                continue
            done.add(target)
            split = [_split(n, weights[n], heads, tp_rank, tp_size) for n in parts]
            yield _renamed(target, vision), (lambda split=split: torch.cat([make() for make in split]),)
            continue
        ways = [_split(name, weights[name], heads, tp_rank, tp_size)]
        if name.startswith("model.visual.") and tp_size > 1:
            ways.append(lambda tensor=weights[name]: tensor)
        yield _renamed(name, vision), tuple(ways)


def _renamed(name: str, vision: bool) -> str:
    if vision:
        for old, new in _PREFIXES:
            if name.startswith(old):
                return new + name.removeprefix(old)
    return name


def _split(name: str, tensor: Tensor, heads: HeadShape, tp_rank: int, tp_size: int) -> Make:
    """One rank's part of a checkpoint tensor."""
    layer, kind = name.split(".")[-2:]
    if layer in ("embed_tokens", "lm_head"):
        return lambda: _padded_rows(tensor, tp_rank, tp_size)
    if tp_size == 1:
        return lambda: tensor
    if name.startswith("model.visual."):
        return _split_vision(layer, kind, tensor, heads, tp_rank, tp_size)
    if layer in ("k_proj", "v_proj"):
        return lambda: _kv_rows(tensor, heads, tp_rank, tp_size)
    if layer in ("q_proj", "gate_proj", "up_proj"):
        return lambda: _piece(name, tensor, 0, tp_rank, tp_size)
    if layer in ("o_proj", "down_proj") and kind == "weight":
        return lambda: _piece(name, tensor, 1, tp_rank, tp_size)
    return lambda: tensor


def _split_vision(layer: str, kind: str, tensor: Tensor, heads: HeadShape, tp_rank: int, tp_size: int) -> Make:
    if layer == "qkv" and heads.vision_heads % tp_size == 0:
        return lambda: torch.cat([_piece(layer, part, 0, tp_rank, tp_size) for part in tensor.chunk(3)])
    if layer == "linear_fc1":
        return lambda: _piece(layer, tensor, 0, tp_rank, tp_size)
    if kind == "weight" and (layer == "linear_fc2" or layer == "proj" and tensor.ndim == 2):
        return lambda: _piece(layer, tensor, 1, tp_rank, tp_size)
    return lambda: tensor


def _piece(name: str, tensor: Tensor, dim: int, tp_rank: int, tp_size: int) -> Tensor:
    if tensor.shape[dim] % tp_size:
        raise LayoutError(f"{name} of shape {list(tensor.shape)} does not split over {tp_size} tensor-parallel ranks")
    size = tensor.shape[dim] // tp_size
    return tensor.narrow(dim, tp_rank * size, size)


def _kv_rows(tensor: Tensor, heads: HeadShape, tp_rank: int, tp_size: int) -> Tensor:
    """Key or value rows of one rank: its share of the heads, or its copy of the one it has in common with others."""
    if tp_size > heads.kv_heads:
        size, index = heads.head_dim, tp_rank // (tp_size // heads.kv_heads)
    else:
        size, index = heads.kv_heads // tp_size * heads.head_dim, tp_rank
    return tensor.narrow(0, index * size, size)


def _padded_rows(tensor: Tensor, tp_rank: int, tp_size: int) -> Tensor:
    """One rank's rows of the vocabulary, zero where it is padding."""
    rows = -(-len(tensor) // VOCABULARY_PADDING) * VOCABULARY_PADDING // tp_size
    own = tensor[tp_rank * rows : (tp_rank + 1) * rows]
    return own if len(own) == rows else torch.cat([own, own.new_zeros(rows - len(own), *own.shape[1:])])
