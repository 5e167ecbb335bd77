"""Heads whose vocabulary lies on several ranks: softmax and dH merged over a group, sharded weights gathered."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from genevolve_fast.ops.epilogues import Softmax
from genevolve_fast.ops.masks import where


def group_name(group: dist.ProcessGroup | None) -> str | None:
    """A process group as a custom operator takes it."""
    return None if group is None else group.group_name


def merge(own: Softmax, here: Tensor, group: str) -> Softmax:
    """The softmax over all shards from each rank's own (with entropy); `here` [n]: the target is in this shard.

    Two reductions: the maximum, then sum, first moment, target and the count of shards that hold it. A target that no
    shard holds gives NaN.
    """
    ranks = _resolve(group)
    maximum = own.maximum.clone()
    dist.all_reduce(maximum, dist.ReduceOp.MAX, ranks)
    shift = own.maximum - maximum
    log_sum = own.log_sum + shift
    total = log_sum.exp()
    moment = where(total > 0, total * (log_sum - own.entropy))  # 0·inf in a shard whose tokens are all banned
    target = where(here, own.logps + log_sum)  # z_y - maximum
    parts = torch.stack([total, moment, target, here.to(total.dtype)])
    dist.all_reduce(parts, dist.ReduceOp.SUM, ranks)
    total, moment, target, holders = parts
    log_sum = total.log()
    logps = where(holders == 1, (target - log_sum).clamp(max=0), torch.nan)
    return replace(own, logps=logps, maximum=maximum, log_sum=log_sum, entropy=log_sum - moment / total)


def summed(x: Tensor, group: str | None) -> Tensor:
    """x summed over the group, in place; x itself without a group."""
    if group is not None:
        dist.all_reduce(x, dist.ReduceOp.SUM, _resolve(group))
    return x


def whole(x: Tensor | None) -> Tensor | None:
    """The whole of a weight or bias sharded by FSDP2 (a DTensor), gathered once; its gradient is averaged over the mesh
    and comes back sharded, as `fully_shard` does it. Any other tensor as it is.

    Raises ValueError for a ZeRO-3 parameter that is not gathered.
    """
    if x is not None and getattr(x, "ds_id", None) is not None and x.numel() == 0:
        raise ValueError(
            "weight is partitioned by ZeRO-3: read it inside its module's forward, or call inside "
            "deepspeed.zero.GatheredParameters([weight])"
        )
    if not dist.is_available():
        return x
    from torch.distributed.tensor import DTensor, Partial

    if not isinstance(x, DTensor):
        return x
    gathered = x.full_tensor(grad_placements=[Partial()] * x.device_mesh.ndim)
    if gathered.requires_grad:
        ranks = x.device_mesh.size()
        gathered.register_hook(lambda g: None if g is None else g / ranks)  # gloo knows sums, no averages
    return gathered


def _resolve(name: str) -> dist.ProcessGroup:
    return dist.distributed_c10d._resolve_process_group(name)
