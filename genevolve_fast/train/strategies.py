"""How a run's ranks hold weights, gradients and optimizer state: alone, DDP, FSDP2, or ZeRO by DeepSpeed.

Every rank computes the gradient of its own rollouts with the denominators of the whole step, so gradients are summed
over ranks, never averaged.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from genevolve_fast.policy.model import Policy
from genevolve_fast.policy.visits import Visit
from genevolve_fast.policy.weights import held_part
from genevolve_fast.train.ranks import Ranks, RanksError, local_device

_BUCKET = 16 << 20  # elements of gradients that are summed over ranks at once


class Strategy:
    """One process, or several with whole weights each (DDP): what the trainer asks of a way to distribute.

    in_step: all ranks must call the policy's units equally often, because a unit's call is an exchange.
    """

    in_step = False
    sharded_weights = False
    gathers_to_save = False  # `take` makes whole tensors, of which each rank writes some
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
        if self.ranks.world == 1 or self.in_step:  # in step every backward has summed its own
            return
        every = [p for p in policy.parameters() if p.requires_grad]
        somewhere = self.ranks.most([int(p.grad is not None) for p in every])
        trained = [p for p, reached in zip(every, somewhere, strict=True) if reached]  # AdamW passes over the others
        for p in trained:
            if p.grad is None:  # a rank without work
                p.grad = torch.zeros_like(p)
        for bucket in _buckets([p.grad for p in trained]):
            flat = torch.cat([g.flatten() for g in bucket])
            dist.all_reduce(flat)
            for g, summed in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                g.copy_(summed.view_as(g))

    def norm(self, policy: Policy, limit: float | None) -> float | None:
        """Global norm of the step's gradients, which are scaled down to `limit` where they exceed it; not where it is
        not finite: the scale would spread one bad gradient over all. None where only `step` knows it."""
        trained = [p for p in policy.parameters() if p.requires_grad]
        norm = torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
        if limit is not None and torch.isfinite(norm):
            torch.nn.utils.clip_grads_with_norm_(trained, limit, norm)
        return float(norm)

    def step(self, parts: Sequence[Any]) -> float | None:
        """Update the weights and drop the gradients. The gradients' norm where `norm` did not know it: not finite, and
        nothing was stepped, or before clipping."""
        for part in parts:
            part.step()
            part.zero_grad(set_to_none=True)
        return None

    @contextmanager
    def whole(self, policy: Policy) -> Iterator[None]:
        """Every weight whole on every rank, to be read: what samples, sends weights or writes them needs it."""
        yield

    # --- sharded checkpoints ------------------------------------------------------------------------------------------

    def take(self, p: nn.Parameter, parts: Sequence[Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """(a trained weight at full precision, its optimizer's tensors), whole or as DTensors."""
        held, optimizer = _slot(p, parts)
        return held.detach(), {k: v for k, v in optimizer.state.get(held, {}).items() if isinstance(v, Tensor)}

    def joined(self, p: nn.Parameter, part: Tensor) -> Tensor:
        """What a rank holds of something of a weight's shape, as a checkpoint writes it: whole, or as a DTensor."""
        return part

    def cut(self, p: nn.Parameter, whole: Tensor, part: Tensor) -> None:
        """Fill `part` from what `joined` made of it, or from a whole tensor."""
        part.copy_(_placed(whole, part))

    def like(self, p: nn.Parameter, size: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Room to read a tensor of a weight into."""
        if hasattr(p, "placements") and tuple(size) == tuple(p.shape):
            return torch.empty_like(p, dtype=dtype, requires_grad=False)
        return torch.empty(size, dtype=dtype)

    @torch.no_grad()
    def put(self, p: nn.Parameter, weight: Tensor, state: Mapping[str, Tensor], parts: Sequence[Any]) -> None:
        """Put back what `take` took, whole or as `like` of it."""
        held, optimizer = _slot(p, parts)
        held.copy_(_placed(weight, held))
        if held is not p:
            p.copy_(held)
        if state:
            optimizer.state[held] = {
                k: _placed(v, held) if v.shape == held.shape else _counted(v, optimizer, held) for k, v in state.items()
            }


class Fsdp2(Strategy):
    """torch's fully_shard, a unit of the policy at a time; a frozen vision tower stays whole on every rank."""

    in_step = True
    sharded_weights = True

    def __init__(self, ranks: Ranks, *, offload: bool = False) -> None:
        super().__init__(ranks)
        self._offload = offload

    def shard(self, policy: Policy) -> None:
        from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

        where = local_device()
        if self._offload and where.type == "cpu":
            raise RanksError("distributed.offload_params moves weights from a GPU to the host, and this one has no GPU")
        mesh = dist.init_device_mesh(where.type, (self.ranks.world,))
        _move_rest(policy, where)
        narrow = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
        settings = dict(
            mesh=mesh, mp_policy=narrow, reshard_after_forward=True,
            offload_policy=CPUOffloadPolicy() if self._offload else OffloadPolicy(),
        )  # fmt: skip
        root = _Root(policy)
        for unit in policy.units:
            fully_shard(unit, **settings)
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)  # gloo knows no weighted sums
        self._order_backward(policy)
        fully_shard(root, **settings)
        root()  # the units learn that they have one root: they share streams, and prefetch in the backward

    @staticmethod
    def _order_backward(policy: Policy) -> None:
        """Gather the unit before beside a unit's backward. torch goes by the last forwards: it would gather the
        prefix's last layer at the end of the first reply's backward, drop it, and none ahead in the prefix's own."""
        policy.entrance.set_modules_to_backward_prefetch([policy.entrance])  # itself: nothing
        for before, unit in pairwise(policy.units):
            trained = any(p.requires_grad for p in before.parameters())
            unit.set_modules_to_backward_prefetch([before if trained else unit])

    def norm(self, policy: Policy, limit: float | None) -> float | None:
        # torch's clip_grad_norm_ flattens DTensors, which uneven shards refuse
        parts = [p.grad.to_local() for p in policy.parameters() if p.grad is not None]
        norms = [torch.linalg.vector_norm(g, dtype=torch.float32) for g in parts] or [torch.zeros(())]
        square = torch.stack(norms).square().sum().to(policy.device)  # NCCL sums nothing on the host
        dist.all_reduce(square)
        norm = float(square.sqrt())
        if limit is not None and parts and math.isfinite(norm):
            torch._foreach_mul_(parts, min(1.0, limit / (norm + 1e-6)))
        return norm

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
    gathers_to_save = True
    keeps_precise = True

    def __init__(self, ranks: Ranks, stage: int, *, offload_optimizer: bool, offload_params: bool) -> None:
        super().__init__(ranks)
        self.stage = stage
        self.sharded_weights = stage == 3
        self._offload = {"offload_optimizer": offload_optimizer, "offload_param": offload_params}
        self.loss_scale = float(ranks.world)  # DeepSpeed averages over ranks
        self._has_gradients = False

    def prepare(self, policy: Policy, parts: list[torch.optim.Optimizer]) -> None:
        where = local_device()
        deepspeed = _deepspeed(where)
        _move_rest(policy, where)
        (base,) = parts
        root = _Root(policy)
        if self.stage == 3:
            deepspeed.utils.set_z3_leaf_modules(root, [Visit])  # a visit is gathered whole, not linear by linear
        with redirect_stdout(io.StringIO()):  # it prints what memory it finds
            self.engine, *_ = deepspeed.initialize(
                model=root, optimizer=base, config=self._config(policy), dist_init_required=False
            )
        self._base = base

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
        narrow = policy.head_weight.dtype == torch.bfloat16
        # in fp32 bf16 weights under stage 1 get another optimizer, which counts a gradient twice after two backwards
        sums = "bf16" if narrow and self.stage == 1 else "fp32"
        return dict(
            train_micro_batch_size_per_gpu=1,
            gradient_accumulation_steps=1,
            managed_gradient_accumulation=False,  # a step has as many backwards as it has micro-batches
            zero_optimization=zero,
            zero_allow_untested_optimizer=True,
            zero_force_ds_cpu_optimizer=False,
            bf16=dict(enabled=narrow, check_grad_overflow=True),
            data_types=dict(grad_accum_dtype=sums),
            steps_per_print=10**9,
        )

    def _count(self, steps: float) -> None:
        for state in self._base.state.values():
            if isinstance(state.get("step"), Tensor):
                state["step"].fill_(steps)
            elif "step" in state:
                state["step"] = int(steps)

    def backward(self, loss: Tensor) -> None:
        self.engine()  # DeepSpeed counts micro-batches by forwards
        self.engine.backward(loss, scale_wrt_gas=False)
        self._has_gradients = True

    def norm(self, policy: Policy, limit: float | None) -> float | None:
        self.engine.optimizer.clip_grad = limit or 0.0
        return None  # DeepSpeed knows it in the step

    def step(self, parts: Sequence[Any]) -> float:
        if not self._has_gradients:  # no rank has any, and DeepSpeed asks for some
            return 0.0
        self._has_gradients = False
        self.engine.step()
        norm = float(self.engine.get_global_grad_norm())
        return norm if self.engine.was_step_applied() else math.inf

    def take(self, p: nn.Parameter, parts: Sequence[Any]) -> tuple[Tensor, dict[str, Tensor]]:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        self._link()
        state = {k: safe_get_full_optimizer_state(p, k) for k in self._state_keys()}
        steps = torch.tensor(float(self._steps()))
        return safe_get_full_fp32_param(p), state | {"step": steps}

    @torch.no_grad()
    def put(self, p: nn.Parameter, weight: Tensor, state: Mapping[str, Tensor], parts: Sequence[Any]) -> None:
        from deepspeed import utils

        self._make_state()
        self._link()
        # stage 3 sets its own part: the whole ones do not pad where ranks do not divide a weight
        kind, made = ("local", self._part) if self.stage == 3 else ("full", lambda _, x: x)
        set_weight = getattr(utils, f"safe_set_{kind}_fp32_param")
        set_state = getattr(utils, f"safe_set_{kind}_optimizer_state")
        where = self.engine.device
        set_weight(p, made(p, weight).to(where))
        for key in self._state_keys():
            if key in state:
                set_state(p, made(p, state[key]).to(where), key)
        if "step" in state:
            self._count(float(state["step"]))
        self.cut(p, weight, held_part(p))

    def joined(self, p: nn.Parameter, part: Tensor) -> Tensor:
        if self.stage < 3:
            return part
        parts = [torch.empty_like(part) for _ in range(self.ranks.world)]
        dist.all_gather(parts, part.contiguous())
        return torch.cat(parts)[: p.ds_numel].view(p.ds_shape)

    def cut(self, p: nn.Parameter, whole: Tensor, part: Tensor) -> None:
        part.copy_(self._part(p, whole) if self.stage == 3 else whole)

    def _part(self, p: nn.Parameter, whole: Tensor) -> Tensor:
        """This rank's part [n] of something of a weight's shape, zeros where the ranks have more room than it."""
        count = p.ds_tensor.numel()
        padded = torch.nn.functional.pad(whole.flatten(), (0, count * self.ranks.world - whole.numel()))
        return padded[count * self.ranks.rank :][:count]

    @property
    def _flats(self) -> list[Tensor]:
        """The fp32 weights of this rank, flattened, one a group."""
        zero = self.engine.optimizer
        return zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups

    def _make_state(self) -> None:
        """Moments of zeros to restore into: DeepSpeed makes them in the first step."""
        if self._base.state or "betas" not in self._base.defaults:
            return
        for flat in self._flats:
            moments = {k: torch.zeros_like(flat) for k in ("exp_avg", "exp_avg_sq")}
            self._base.state[flat] = {"step": _counted(torch.zeros(()), self._base, flat)} | moments

    def _link(self) -> None:
        """Let DeepSpeed find each weight's moments: it looks once, after the first group's first step."""
        if self.stage < 3 and self._base.state:
            self.engine.optimizer._hp_optimizer_states_linked = False
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _state_keys(self) -> list[str]:
        held = next(iter(self._base.state.values()), {})
        return [k for k, v in held.items() if isinstance(v, Tensor) and v.ndim]

    def _steps(self) -> float:
        return max((float(s["step"]) for s in self._base.state.values() if "step" in s), default=0.0)

    @contextmanager
    def whole(self, policy: Policy) -> Iterator[None]:
        if self.stage < 3:
            yield
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters([p for u in policy.units for p in u.parameters()]):
            yield


def open_strategy(
    name: str, ranks: Ranks, *, offload_optimizer: bool = False, offload_params: bool = False
) -> Strategy:
    """The strategy of a name; offload_params of fsdp2 moves the optimizer's state too.

    Raises RanksError where ranks are to share and no launcher made any.
    """
    if name != "ddp" and not dist.is_initialized():
        raise RanksError(
            f"distributed.strategy {name!r} shares weights or state between ranks: launch with "
            "torchrun --nproc-per-node GPUS -m genevolve_fast.cli ..., also for one GPU with offload"
        )
    if name == "fsdp2":
        return Fsdp2(ranks, offload=offload_params)
    if name.startswith("zero"):
        return Zero(ranks, int(name[-1]), offload_optimizer=offload_optimizer, offload_params=offload_params)
    return Strategy(ranks)


def _move_rest(policy: Policy, where: torch.device) -> None:
    """What no unit holds, and so nobody else moves, to where the passes run."""
    policy.computes_on = where
    policy.decoder.rotary_emb.to(where)
    if policy.has_vision:
        policy.model.model.visual.to(where)


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


def _placed(x: Tensor, p: Tensor) -> Tensor:
    """x where p is, and sharded as it is."""
    if not hasattr(p, "placements") or hasattr(x, "placements"):
        return x.to(p.device)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(x.to(p.device), p.device_mesh, p.placements, src_data_rank=None)


def _slot(p: nn.Parameter, parts: Sequence[Any]) -> tuple[Tensor, torch.optim.Optimizer]:
    """(what an optimizer steps for a weight: itself or its fp32 copy; that optimizer)."""
    for part in parts:
        optimizer = getattr(part, "optimizer", part)
        held = part.copy_of(p) if hasattr(part, "copy_of") else p
        if held is not None and any(held is q for group in optimizer.param_groups for q in group["params"]):
            return held, optimizer
    raise KeyError("no optimizer steps this weight")


def _counted(steps: Tensor, optimizer: torch.optim.Optimizer, held: Tensor) -> Tensor | int:
    """How many steps a weight has seen, as its optimizer counts: beside the weight, or DeepSpeed's without a tensor."""
    if type(optimizer).__module__.startswith("deepspeed"):
        return int(steps)
    return steps.to(held.device, copy=True)
