"""Weights of a served policy: replaced in place from a safetensors folder, digested, cleared."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from genevolve_fast.policy.model import Policy

RANK = "dp0:pp0:pcp0:tp0:"  # what vLLM puts before the names of a worker that is alone


class WeightsError(ValueError):
    """A folder whose tensors are not those of the served policy; nothing was changed."""


def base_parameters(policy: Policy) -> dict[str, Tensor]:
    """Parameters by the names of a saved folder, tied ones once, adapters left out."""
    named = policy.model.named_parameters()
    return {n.replace(".base_layer.", "."): p for n, p in named if ".lora_" not in n}


def digests(policy: Policy) -> dict[str, str]:
    """sha256 of every parameter's bytes, under vLLM's names for one worker."""
    return {RANK + name: _digest(p) for name, p in base_parameters(policy).items()}


def _digest(tensor: Tensor) -> str:
    flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy()).hexdigest()


@torch.no_grad()
def clear(policy: Policy) -> None:
    for p in base_parameters(policy).values():
        p.zero_()


def reload(policy: Policy, folder: str | Path) -> None:
    """Copy the tensors of `folder` into the policy's, one at a time. Raises WeightsError before a byte is changed."""
    from safetensors import safe_open

    files = _files_of(Path(folder))
    _check(policy, files)
    targets = _targets(policy)
    with torch.no_grad():
        for file, names in files.items():
            with safe_open(file, "pt") as shard:
                for name in names:
                    targets[name].copy_(shard.get_tensor(name))


def _targets(policy: Policy) -> dict[str, Tensor]:
    """Parameters by every name a folder may call them: a tied one has several."""
    named = policy.model.named_parameters(remove_duplicate=False)
    return {n.replace(".base_layer.", "."): p for n, p in named if ".lora_" not in n}


def _files_of(folder: Path) -> dict[Path, list[str]]:
    """Names of the tensors in each shard; an index and its shards must agree."""
    from safetensors import SafetensorError, safe_open

    index = folder / "model.safetensors.index.json"
    try:
        if index.exists():
            weight_map: Mapping[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            shards = [folder / name for name in sorted(set(weight_map.values()))]
        else:
            weight_map, shards = {}, sorted(folder.glob("*.safetensors"))
        if not shards:
            raise WeightsError(f"weights_path {folder} holds no .safetensors file")
        files = {}
        for shard in shards:
            with safe_open(shard, "pt") as opened:
                files[shard] = list(opened.keys())
    except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
        if isinstance(error, WeightsError):
            raise
        raise WeightsError(f"weights_path {folder} cannot be read: {type(error).__name__}: {error}") from error
    held = [name for names in files.values() for name in names]
    if len(held) != len(set(held)) or (weight_map and set(held) != set(weight_map)):
        raise WeightsError(f"weights_path {folder}: the shards are not those of the index")
    return files


def _check(policy: Policy, files: Mapping[Path, list[str]]) -> None:
    """Raises WeightsError naming the first tensor that is missing, unknown, of another shape or not floating."""
    from safetensors import safe_open

    targets = _targets(policy)
    tied: dict[int, Tensor] = {}
    aliases = _aliases(targets)
    for file, names in files.items():
        with safe_open(file, "pt") as shard:
            for name in names:
                if name not in targets:
                    raise WeightsError(f"{file.name}: the served policy has no parameter {name}")
                part = shard.get_slice(name)
                if tuple(part.get_shape()) != tuple(targets[name].shape):
                    raise WeightsError(
                        f"{file.name}: {name} is {part.get_shape()}, the policy's {list(targets[name].shape)}"
                    )
                if not part.get_dtype().startswith(("F", "BF")):
                    raise WeightsError(f"{file.name}: {name} has dtype {part.get_dtype()}, which is not floating")
                key = id(targets[name])
                if len(aliases[key]) > 1:
                    value = shard.get_tensor(name)
                    if key in tied and not torch.equal(tied[key], value):
                        raise WeightsError(f"{' and '.join(aliases[key])} are tied, but differ in the folder")
                    tied[key] = value
    held = {name for names in files.values() for name in names}
    if missing := [names[0] for names in aliases.values() if held.isdisjoint(names)]:
        raise WeightsError(f"{len(missing)} parameters are missing, the first is {missing[0]}")


def _aliases(targets: Mapping[str, Tensor]) -> dict[int, list[str]]:
    names: dict[int, list[str]] = {}
    for name, tensor in targets.items():
        names.setdefault(id(tensor), []).append(name)
    return names
