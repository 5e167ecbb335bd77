"""Trained weights and optimizer state as a sharded checkpoint: torch's distributed checkpoint, tensors by their names.

`weight/NAME` is a trained weight at full precision, `state/NAME/KEY` a tensor of its optimizer's state, both of the
weight's whole shape whoever wrote them: FSDP2 writes its shards, ZeRO's are gathered one weight at a time and written
by one rank each. So any number of ranks reads what any other number wrote, under any strategy.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from genevolve_fast.policy.model import Policy
from genevolve_fast.train.optim import Optimizer
from genevolve_fast.train.run import RunError
from genevolve_fast.train.strategies import Strategy

FOLDER = "state"  # in a checkpoint


def save_sharded(folder: Path, policy: Policy, optimizer: Optimizer, strategy: Strategy) -> None:
    """Write `folder`, all ranks together."""
    import torch.distributed.checkpoint as dcp

    tensors: dict[str, Tensor] = {}
    for i, (name, p) in enumerate(trained(policy).items()):
        weight, state = strategy.take(p, optimizer.parts)
        if strategy.gathers_to_save and i % strategy.ranks.world != strategy.ranks.rank:
            continue  # another rank writes it
        tensors[f"weight/{name}"] = _kept(weight, strategy)
        tensors |= {f"state/{name}/{key}": _kept(x, strategy) for key, x in state.items()}
    dcp.save(tensors, checkpoint_id=folder, process_group=strategy.ranks.group)


def load_sharded(folder: Path, policy: Policy, optimizer: Optimizer, strategy: Strategy) -> None:
    """Restore what `save_sharded` wrote, by however many ranks. Raises RunError where a weight is missing."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import FileSystemReader

    held = FileSystemReader(folder).read_metadata().state_dict_metadata
    for name, p in trained(policy).items():
        if f"weight/{name}" not in held:
            raise RunError(f"{folder} holds no {name}: it is a checkpoint of another policy")
        keys = [f"weight/{name}", *(k for k in held if k.startswith(f"state/{name}/"))]
        read = {k: strategy.like(p, held[k].size, held[k].properties.dtype) for k in keys}
        dcp.load(read, checkpoint_id=folder, no_dist=True)
        weight = read.pop(f"weight/{name}")
        strategy.put(p, weight, {k.rsplit("/", 1)[1]: x for k, x in read.items()}, optimizer.parts)


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All trained weights of a sharded checkpoint, whole, by name."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import FileSystemReader

    held = FileSystemReader(folder).read_metadata().state_dict_metadata
    read = {k: torch.empty(m.size, dtype=m.properties.dtype) for k, m in held.items() if k.startswith("weight/")}
    dcp.load(read, checkpoint_id=folder, no_dist=True)
    return {k.removeprefix("weight/"): x for k, x in read.items()}


def trained(policy: Policy) -> dict[str, nn.Parameter]:
    """Trained weights by their names in the model."""
    return {n: p for n, p in policy.model.named_parameters() if p.requires_grad}


def _kept(x: Tensor, strategy: Strategy) -> Tensor:
    return x.detach().cpu() if strategy.gathers_to_save else x
