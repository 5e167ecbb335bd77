"""Trained weights and optimizer state as a sharded checkpoint: torch's distributed checkpoint, tensors by their names.

`weight/NAME` is a trained weight at full precision, `state/NAME/KEY` a tensor of its optimizer's state, both of the
weight's whole shape whoever wrote them: FSDP2 writes its shards, ZeRO's are gathered one weight at a time and written
by one rank each. So any number of ranks reads what any other number wrote, under any strategy.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from genevolve_fast.policy.model import Policy
from genevolve_fast.policy.weights import Average
from genevolve_fast.train.optim import Optimizer
from genevolve_fast.train.run import RunError
from genevolve_fast.train.strategies import Strategy


def save_sharded(
    folder: Path, policy: Policy, optimizer: Optimizer, strategy: Strategy, average: Average | None = None
) -> None:
    """Write `folder`, all ranks together; `average/NAME` is the teacher's."""
    import torch.distributed.checkpoint as dcp

    tensors: dict[str, Tensor] = {}
    for i, (name, p) in enumerate(trained(policy).items()):
        weight, state = strategy.take(p, optimizer.parts)
        mean = average and strategy.joined(p, average.part(name))
        if strategy.gathers_to_save and i % strategy.ranks.world != strategy.ranks.rank:
            continue  # another rank writes it
        tensors[f"weight/{name}"] = _kept(weight, strategy)
        tensors |= {f"state/{name}/{key}": _kept(x, strategy) for key, x in state.items()}
        if average:
            tensors[f"average/{name}"] = _kept(mean, strategy)
    with _as_exceptions():
        dcp.save(tensors, checkpoint_id=folder, process_group=strategy.ranks.group)


def load_sharded(folder: Path, policy: Policy, optimizer: Optimizer, strategy: Strategy) -> None:
    """Restore what `save_sharded` wrote, by however many ranks. Raises RunError where a weight is missing."""
    held = _held(folder)
    for name, p in trained(policy).items():
        if f"weight/{name}" not in held:
            raise RunError(f"{folder} holds no {name}: it is a checkpoint of another policy")
        keys = [f"weight/{name}", *(k for k in held if k.startswith(f"state/{name}/"))]
        read = {k: strategy.like(p, held[k].size, held[k].properties.dtype) for k in keys}
        _read(folder, read)
        weight = read.pop(f"weight/{name}")
        strategy.put(p, weight, {k.rsplit("/", 1)[1]: x for k, x in read.items()}, optimizer.parts)


def load_sharded_average(folder: Path, policy: Policy, average: Average, strategy: Strategy) -> None:
    """Restore the teacher's average. Raises RunError where the checkpoint has none."""
    held = _held(folder)
    for name, p in trained(policy).items():
        key = f"average/{name}"
        if key not in held:
            raise RunError(f"{folder} holds no {key}: the checkpoint was written without teacher: ema")
        read = {key: strategy.like(p, held[key].size, held[key].properties.dtype)}
        _read(folder, read)
        with torch.no_grad():
            strategy.cut(p, read[key], average.part(name))


def weight_readers(folder: Path) -> dict[str, Callable[[], Tensor]]:
    """What reads each trained weight of a sharded checkpoint, whole and at full precision, by name."""
    held = _held(folder)

    def read(key: str) -> Tensor:
        into = {key: torch.empty(held[key].size, dtype=held[key].properties.dtype)}
        _read(folder, into)
        return into[key]

    return {k.removeprefix("weight/"): partial(read, k) for k in held if k.startswith("weight/")}


def _held(folder: Path) -> Mapping[str, Any]:
    """Sizes and dtypes of the tensors in a sharded checkpoint, by key."""
    from torch.distributed.checkpoint import FileSystemReader

    return FileSystemReader(folder).read_metadata().state_dict_metadata


def _read(folder: Path, into: dict[str, Tensor]) -> None:
    """Fill these tensors, or this rank's parts of them."""
    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings(), _as_exceptions():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # in one process that is no news
        dcp.load(into, checkpoint_id=folder, no_dist=True)


def whole_tensors(
    folder: Path, optimizer: Mapping[str, Any], policy: Policy
) -> dict[str, tuple[Tensor, dict[str, Tensor]]]:
    """(weight at full precision, its optimizer's tensors) by name, of a checkpoint that one process wrote.

    folder: of its policy; optimizer: the saved state of one AdamW, whose parameters are matrices first, then vectors.
    """
    weights = {n: t for file in sorted(folder.glob("*.safetensors")) for n, t in load_file(file).items()}
    weights = {_named(n): t for n, t in weights.items()}
    rank = lambda p: len(getattr(p, "ds_shape", p.shape))  # noqa: E731
    own = trained(policy)
    order = [*(n for n, p in own.items() if rank(p) >= 2), *(n for n, p in own.items() if rank(p) < 2)]
    (part,) = optimizer["parts"]
    while "optimizer" in part:  # what rounds or keeps fp32 copies wraps the optimizer
        for name, copy in zip(order, part.get("copies", ()), strict=False):
            weights[name] = weights[name] if copy is None else copy
        part = part["optimizer"]
    states = part["state"]
    # DeepSpeed's Adam counts its steps without a tensor
    tensors = lambda i: {k: torch.as_tensor(v) for k, v in states.get(i, {}).items()}  # noqa: E731
    return {name: (weights[name], tensors(i)) for i, name in enumerate(order)}


def load_whole_average(file: Path, policy: Policy, average: Average, strategy: Strategy) -> None:
    """Restore an average that one process wrote."""
    saved = load_file(file)
    with torch.no_grad():
        for name, p in trained(policy).items():
            strategy.cut(p, saved[name], average.part(name))


def _named(saved: str) -> str:
    """A weight's name in the model: peft leaves out the adapter's, and puts a prefix before all."""
    name = saved.removeprefix("base_model.model.")
    return re.sub(r"\.lora_([AB])\.weight$", r".lora_\1.default.weight", name)


def trained(policy: Policy) -> dict[str, nn.Parameter]:
    """Trained weights by their names in the model."""
    return {n: p for n, p in policy.model.named_parameters() if p.requires_grad}


@contextmanager
def _as_exceptions() -> Iterator[None]:
    """Raise what failed, on whichever rank: torch wraps it in something that is no Exception."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except CheckpointException as wrapped:
        error, _ = next(iter(wrapped.failures.values()))
        raise error from wrapped


def _kept(x: Tensor, strategy: Strategy) -> Tensor:
    return x.detach().cpu() if strategy.gathers_to_save else x
