"""How a run's ranks hold weights, gradients and optimizer state: alone, DDP, FSDP2, or ZeRO by DeepSpeed.

Every rank computes the gradient of its own rollouts with the denominators of the whole step, so gradients are summed
over ranks, never averaged.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from genevolve_fast.policy.model import Policy
from genevolve_fast.train.ranks import Ranks

_BUCKET = 16 << 20  # elements of gradients that are summed over ranks at once


class Strategy:
    """One process, or several with whole weights each (DDP): what the trainer asks of a way to distribute.

    in_step: all ranks must call the policy's units equally often, because a unit's call is an exchange.
    """

    name = "ddp"
    in_step = False
    sharded_weights = False
    keeps_precise = False  # has fp32 copies of bf16 weights of its own
    loss_scale = 1.0  # of the gradients that `backward` is to make

    def __init__(self, ranks: Ranks | None = None) -> None:
        self.ranks = ranks or Ranks()

    def shard(self, policy: Policy) -> None:
        """Take the policy's weights; the first rank's are everybody's."""
        if self.ranks.world > 1:
            for p in policy.model.parameters():
                dist.broadcast(p.data, 0)

    def prepare(self, policy: Policy, parts: list[torch.optim.Optimizer]) -> None:
        """Take the optimizers, before their first step."""

    def backward(self, loss: Tensor) -> None:
        """Add the loss's gradients to the weights'."""
        loss.backward()

    def finish(self, policy: Policy) -> None:
        """After the last backward of a step: sum what the ranks have."""
        if self.ranks.world == 1:
            return
        trained = [p for p in policy.parameters() if p.requires_grad]
        for p in trained:
            if p.grad is None:  # a rank without work
                p.grad = torch.zeros_like(p)
        for bucket in _buckets([p.grad for p in trained]):
            flat = torch.cat([g.flatten() for g in bucket])
            dist.all_reduce(flat)
            for g, summed in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                g.copy_(summed.view_as(g))

    def norm(self, policy: Policy, limit: float | None) -> float:
        """Global norm of the step's gradients, which are scaled down to `limit` where they exceed it."""
        trained = [p for p in policy.parameters() if p.requires_grad]
        return float(torch.nn.utils.clip_grad_norm_(trained, math.inf if limit is None else limit))

    def step(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        """Update the weights and drop the gradients."""
        for part in parts:
            part.step()
            part.zero_grad(set_to_none=True)

    @contextmanager
    def whole(self, policy: Policy) -> Iterator[None]:
        """Every weight whole on every rank, to be read: what samples, sends weights or writes them needs it."""
        yield

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def weight(self, p: nn.Parameter) -> Tensor:
        """A trained weight at full precision, as a checkpoint writes it: whole, or this rank's part as a DTensor."""
        return p.detach()

    def state(self, p: nn.Parameter, parts: Sequence[torch.optim.Optimizer]) -> dict[str, Tensor]:
        """The optimizer's tensors of a weight, whole or as DTensors."""
        held = next((part.state[p] for part in parts if p in part.state), {})
        return {k: v for k, v in held.items() if isinstance(v, Tensor)}

    def restore(self, p: nn.Parameter, weight: Tensor, state: Mapping[str, Tensor], parts) -> None:
        """Put whole tensors back where `weight` and `state` took them from."""
        with torch.no_grad():
            p.copy_(_like(weight, p))
        owner = next(part for part in parts if any(p is q for g in part.param_groups for q in g["params"]))
        if state:
            owner.state[p] = {k: _like(v, p) if v.shape == p.shape else v.clone() for k, v in state.items()}


class Fsdp2(Strategy):
    """torch's fully_shard, a unit of the policy at a time; a frozen vision tower stays whole on every rank."""

    name = "fsdp2"
    in_step = True
    sharded_weights = True

    def __init__(self, ranks: Ranks, *, offload: bool = False, compute: torch.dtype | None = None) -> None:
        super().__init__(ranks)
        self._offload = offload
        self._compute = compute

    def shard(self, policy: Policy) -> None:
        from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

        where = "cuda" if dist.get_backend() == "nccl" else "cpu"
        mesh = dist.init_device_mesh(where, (self.ranks.world,))
        narrow = MixedPrecisionPolicy()
        if self._compute is not None:
            narrow = MixedPrecisionPolicy(self._compute, torch.float32, cast_forward_inputs=False)
        settings = dict(
            mesh=mesh, mp_policy=narrow, reshard_after_forward=True,
            offload_policy=CPUOffloadPolicy() if self._offload else OffloadPolicy(),
        )  # fmt: skip
        root = _Root(policy)
        for unit in policy.units:
            fully_shard(unit, **settings)
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)  # gloo knows no weighted sums
        fully_shard(root, **settings)
        root()  # the units learn that they have one root: they share streams, and prefetch in the backward
        if policy.has_vision and where == "cuda":
            policy.model.model.visual.to("cuda")

    def norm(self, policy: Policy, limit: float | None) -> float:
        # torch's clip_grad_norm_ flattens DTensors, which uneven shards refuse
        parts = [p.grad.to_local() for p in policy.parameters() if p.grad is not None]
        square = torch.stack([g.float().square().sum() for g in parts]).sum()
        dist.all_reduce(square)
        norm = float(square.sqrt())
        if limit is not None:
            torch._foreach_mul_(parts, min(1.0, limit / (norm + 1e-6)))
        return norm

    def finish(self, policy: Policy) -> None:
        pass  # every backward has summed its own

    @contextmanager
    def whole(self, policy: Policy) -> Iterator[None]:
        for unit in policy.units:
            unit.unshard()
        try:
            yield
        finally:
            for unit in policy.units:
                unit.reshard()


class Zero(Strategy):
    """DeepSpeed's ZeRO: stage 1 shards optimizer state, 2 also gradients, 3 also weights."""

    in_step = True
    keeps_precise = True

    def __init__(self, ranks: Ranks, stage: int, *, offload_optimizer: bool, offload_params: bool) -> None:
        super().__init__(ranks)
        self.name = f"zero{stage}"
        self.stage = stage
        self.sharded_weights = stage == 3
        self._offload = {
            "offload_optimizer": offload_optimizer,
            "offload_param": offload_params,
        }
        self.loss_scale = float(ranks.world)  # DeepSpeed averages over ranks
        self._limit: float | None = None

    def prepare(self, policy: Policy, parts: list[torch.optim.Optimizer]) -> None:
        deepspeed = _deepspeed(policy.device)
        (base,) = parts
        rates = [group["lr"] for group in base.param_groups]
        for group in base.param_groups:
            group["lr"] = 0.0  # DeepSpeed makes the state by a step
        if self.stage == 3:
            deepspeed.utils.set_z3_leaf_modules(policy_root := _Root(policy), [type(v) for v in policy.visits[:1]])
        else:
            policy_root = _Root(policy)
        self.engine, *_ = deepspeed.initialize(
            model=policy_root, optimizer=base, config=self._config(policy), dist_init_required=False
        )
        for group, rate in zip(base.param_groups, rates, strict=False):
            group["lr"] = rate
        self._base = base
        self._count(0)

    def _config(self, policy: Policy) -> dict[str, Any]:
        # stage 1 has no buffers outside a backward, and its gradients are summed after the last one
        zero = dict(stage=self.stage, overlap_comm=False, contiguous_gradients=self.stage > 1)
        zero |= dict(reduce_bucket_size=_BUCKET, allgather_bucket_size=_BUCKET)  # elements
        zero |= {name: {"device": "cpu", "pin_memory": True} for name, on in self._offload.items() if on}
        if self.stage == 3:
            # weights come with a visit and go with it
            zero |= dict(
                stage3_param_persistence_threshold=0, stage3_max_live_parameters=0, stage3_max_reuse_distance=0
            )
        return dict(
            train_micro_batch_size_per_gpu=1,
            gradient_accumulation_steps=1,
            managed_gradient_accumulation=False,  # a step has as many backwards as it has micro-batches
            zero_optimization=zero,
            zero_allow_untested_optimizer=True,
            zero_force_ds_cpu_optimizer=False,
            bf16=dict(enabled=policy.head_weight.dtype == torch.bfloat16),
            data_types=dict(grad_accum_dtype="fp32"),
            steps_per_print=10**9,
        )

    def _count(self, steps: int) -> None:
        for state in self._base.state.values():
            if isinstance(state.get("step"), Tensor):
                state["step"].fill_(steps)
            elif "step" in state:
                state["step"] = steps

    def backward(self, loss: Tensor) -> None:
        self.engine()  # DeepSpeed counts micro-batches by forwards
        self.engine.backward(loss, scale_wrt_gas=False)

    def finish(self, policy: Policy) -> None:
        pass

    def norm(self, policy: Policy, limit: float | None) -> float:
        self._limit = limit
        return math.nan  # known after the step

    def step(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        self.engine.optimizer.clip_grad = self._limit or 0.0
        self.engine.step()

    @property
    def last_norm(self) -> float:
        """Global norm of the gradients of the last step, before clipping."""
        return float(self.engine.get_global_grad_norm())

    @contextmanager
    def whole(self, policy: Policy) -> Iterator[None]:
        if self.stage < 3:
            yield
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters([p for u in policy.units for p in u.parameters()]):
            yield


def open_strategy(
    name: str, ranks: Ranks, *, offload_optimizer: bool = False, offload_params: bool = False,
    compute: torch.dtype | None = None,
) -> Strategy:  # fmt: skip
    """The strategy that a configuration names."""
    if name == "fsdp2":
        return Fsdp2(ranks, offload=offload_params, compute=compute)
    if name.startswith("zero"):
        return Zero(ranks, int(name[-1]), offload_optimizer=offload_optimizer, offload_params=offload_params)
    return Strategy(ranks)


class _Root(nn.Module):
    """The units under one module, for engines that want a model."""

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.units = nn.ModuleList(policy.units)

    def forward(self) -> None:
        return None


def _deepspeed(device: torch.device):
    """DeepSpeed, quiet; on a CPU without its shared-memory kernel, which takes a minute to compile."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_RANK", "0")
    import deepspeed
    from deepspeed.comm import torch as backend

    if device.type == "cpu":
        backend.build_shm_op = lambda: None
    deepspeed.utils.logger.setLevel("ERROR")
    return deepspeed


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one dtype, about _BUCKET elements each time."""
    for dtype in dict.fromkeys(t.dtype for t in tensors):
        bucket: list[Tensor] = []
        for t in (t for t in tensors if t.dtype == dtype):
            bucket.append(t)
            if sum(x.numel() for x in bucket) >= _BUCKET:
                yield bucket
                bucket = []
        if bucket:
            yield bucket


def _like(x: Tensor, p: Tensor) -> Tensor:
    """x as p lies on its devices: a DTensor of the same placement, or as it is."""
    if hasattr(p, "placements"):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(x.to(p.device), p.device_mesh, p.placements, src_data_rank=None)
    return x.to(p.device)
