"""Optimizers, what becomes of updates that bf16 weights cannot hold, and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from genevolve_fast.policy.model import Policy
from genevolve_fast.policy.quantize import QuantizeError, load_bitsandbytes
from genevolve_fast.train.collect import stable_seed
from genevolve_fast.train.config import OptimConfig
from genevolve_fast.train.run import RunError
from genevolve_fast.train.strategies import Strategy

GRADIENTS_AT_ONCE = 1 << 30  # bytes of fp32 gradients that MasterWeights holds beside the parameters' own
_PAGED_ELEMENTS = 10**5  # bitsandbytes pages the moments of parameters that are at least this large

Groups = list[dict[str, Any]]


class Optimizer:
    """One or more optimizers that step, and are scheduled, saved and restored, together."""

    def __init__(self, parts: Sequence[Part], factor: Callable[[int], float], strategy: Strategy) -> None:
        self._parts = parts
        self._strategy = strategy
        self._factor = factor
        self._schedules = [torch.optim.lr_scheduler.LambdaLR(_stepping(part), factor) for part in parts]

    @property
    def shared(self) -> bool:
        """Whether each rank steps a part of the weights only."""
        return self._strategy.in_step

    @property
    def parts(self) -> Sequence[Part]:
        return self._parts

    def step(self) -> float | None:
        """Update the weights, advance the schedule and drop the gradients. The gradients' norm where only the step
        knows it: not finite, and then nothing was done."""
        norm = self._strategy.step(self._parts)
        if norm is None or math.isfinite(norm):
            for schedule in self._schedules:
                schedule.step()
        return norm

    def schedules_state(self) -> list[dict[str, Any]]:
        return [schedule.state_dict() for schedule in self._schedules]

    def load_schedules(self, states: Sequence[dict[str, Any]]) -> None:
        for part, schedule, saved in zip(self._parts, self._schedules, states, strict=True):
            own = {"base_lrs", "_last_lr"}  # one a group, and DeepSpeed knows no empty groups
            schedule.load_state_dict({k: v for k, v in saved.items() if k not in own})
            schedule._last_lr = [b * self._factor(schedule.last_epoch) for b in schedule.base_lrs]
            for group, lr in zip(_stepping(part).param_groups, schedule._last_lr, strict=True):
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(lr)
                else:
                    group["lr"] = lr

    @property
    def lr(self) -> float:
        """Learning rate of the next step."""
        return float(self._schedules[0].get_last_lr()[0])

    def state_dict(self) -> dict[str, Any]:
        return {
            "parts": [part.state_dict() for part in self._parts],
            "schedules": self.schedules_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for part, saved in zip(self._parts, state["parts"], strict=True):
            part.load_state_dict(saved)
            _page_again(_stepping(part))
        self.load_schedules(state["schedules"])


class MasterWeights:
    """fp32 copies of parameters on `device`, which `optimizer` steps; the parameters get them rounded to nearest.

    A parameter that is fp32 and on `device` already is its own copy. Gradients are widened a bucket of parameters at a
    time, at most GRADIENTS_AT_ONCE bytes or one parameter's, and gone after a step.
    """

    def __init__(
        self, groups: Groups, build: Callable[[Groups], torch.optim.Optimizer], device: torch.device | None = None
    ) -> None:
        copied = [group | {"params": [_wide_copy(p, device) for p in group["params"]]} for group in groups]
        whole, copies = ([p for group in each for p in group["params"]] for each in (groups, copied))
        self._pairs = list(zip(whole, copies, strict=True))
        self.optimizer = build(copied)

    @torch.no_grad()
    def step(self) -> None:
        for bucket in self._buckets():
            for p, copy in bucket:
                if copy is not p and p.grad is not None:
                    copy.grad, p.grad = p.grad.to(copy.device, copy.dtype), None
            self.optimizer.step()  # it skips what has no gradient: the other buckets
            for p, copy in bucket:
                if copy is not p and copy.grad is not None:
                    p.copy_(copy)
                copy.grad = None

    def zero_grad(self, set_to_none: bool = True) -> None:
        for p, _ in self._pairs:
            p.grad = None

    def _buckets(self) -> Iterator[list[tuple[Tensor, Tensor]]]:
        bucket, held = [(p, copy) for p, copy in self._pairs if copy is p], GRADIENTS_AT_ONCE
        for p, copy in self._pairs:
            if copy is p:
                continue
            if bucket and held + copy.nbytes > GRADIENTS_AT_ONCE:
                yield bucket
                bucket, held = [], 0
            bucket.append((p, copy))
            held += copy.nbytes
        if bucket:
            yield bucket

    @property
    def state(self) -> dict[Tensor, Any]:
        return self.optimizer.state

    def copy_of(self, p: Tensor) -> Tensor | None:
        return next((copy for q, copy in self._pairs if q is p), None)

    @property
    def nbytes(self) -> int:
        """Of the copies."""
        return sum(copy.nbytes for p, copy in self._pairs if copy is not p)

    def state_dict(self) -> dict[str, Any]:
        copies = [None if copy is p else copy.detach() for p, copy in self._pairs]
        return {"copies": copies, "optimizer": self.optimizer.state_dict()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        for (_, copy), saved in zip(self._pairs, state["copies"], strict=True):
            if saved is not None:
                copy.copy_(saved)
        self.optimizer.load_state_dict(state["optimizer"])


class StochasticRounding:
    """An optimizer that rounds bf16 weights at random, with draws that depend on `name` and the step alone.

    So a resumed run rounds as an uninterrupted one, ranks that hold the same weight round it alike, and no other random
    number of the run moves.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, name: int) -> None:
        self.optimizer = optimizer
        self._name = name
        self._steps = 0

    def step(self) -> None:
        gpus = {p.device for group in self.optimizer.param_groups for p in group["params"] if p.is_cuda}
        with torch.random.fork_rng(devices=gpus):
            torch.manual_seed(stable_seed("bf16", self._name, self._steps))
            self.optimizer.step()
        self._steps += 1

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    @property
    def state(self) -> dict[Tensor, Any]:
        return self.optimizer.state

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self._steps, "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._steps = state["steps"]
        self.optimizer.load_state_dict(state["optimizer"])


Part = torch.optim.Optimizer | MasterWeights | StochasticRounding


def check_optimizer(config: OptimConfig, device: torch.device) -> None:
    """Raise RunError, before anything is loaded, where the device or an absent package rules the optimizer out."""
    if config.implementation == "paged_8bit" and device.type != "cuda":
        raise RunError(
            f"optim.implementation paged_8bit moves moments between GPU and host, the policy is on {device.type}: "
            "set it to 8bit"
        )
    adamw_class(config)


def adamw_class(config: OptimConfig, *, sharded: bool = False) -> Callable[..., torch.optim.Optimizer]:
    """What makes the AdamW that a configuration names of parameter groups; lr, betas and weight_decay are keywords.

    `8bit` is bitsandbytes', of parameters that FSDP2 shards (`sharded`) torchao's, which knows them. fp32 copies are
    not made here: MasterWeights, or DeepSpeed, has them. Raises RunError with what to install.
    """
    stochastic = config.bf16 == "stochastic"
    if sharded and config.implementation in ("paged_8bit", "cpu"):
        raise RunError(
            f"optim.implementation {config.implementation} does not know what FSDP2 shards: fused and 8bit do"
        )
    if config.implementation == "8bit" and (stochastic or sharded):
        return partial(_torchao().AdamW8bit, bf16_stochastic_round=stochastic)
    if stochastic:
        return partial(_torchao()._AdamW, bf16_stochastic_round=True)
    if config.implementation in ("8bit", "paged_8bit"):
        try:
            bnb = load_bitsandbytes(f"optim.implementation {config.implementation}")
        except QuantizeError as error:
            raise RunError(str(error)) from error
        return bnb.optim.AdamW8bit if config.implementation == "8bit" else bnb.optim.PagedAdamW8bit
    if config.implementation == "cpu":
        return _deepspeed()
    return partial(torch.optim.AdamW, fused=True)


def adamw(groups: Groups, config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW of parameter groups as a configuration says; a group may hold a weight_decay of its own."""
    from torch.distributed.tensor import DTensor

    kind = adamw_class(config, sharded=any(isinstance(p, DTensor) for group in groups for p in group["params"]))
    return kind(groups, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay)


def decayed(parameters: Iterable[nn.Parameter], weight_decay: float) -> Groups:
    """Two parameter groups: matrices, and vectors, which do not decay."""
    parameters = list(parameters)
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def build_optimizer(
    policy: Policy, config: OptimConfig, total_steps: int, strategy: Strategy | None = None
) -> Optimizer:
    """AdamW (no decay on vectors), or Muon for the layers' matrices with AdamW for the rest; warm-up, then schedule.

    With release_gradients every weight of a layer has an AdamW of its own, which steps when its gradient is there.
    With `strategy` it is of this rank's part. Raises RunError for what this device or installation cannot do.
    """
    strategy = strategy or Strategy()
    if config.release_gradients and strategy.ranks.world > 1:
        raise RunError(
            f"optim.release_gradients steps a layer before the {strategy.ranks.world} ranks have summed its gradient: "
            "train on one, or set distributed.strategy fsdp2, which shares gradients and states instead"
        )
    named = [(n, p) for n, p in policy.named_parameters() if p.requires_grad]
    if not named:
        raise RunError("nothing to train: all parameters are frozen")
    check_optimizer(config, named[0][1].device)
    matrices = [p for n, p in named if config.name == "muon" and p.ndim == 2 and ".layers." in n]
    taken = {id(p) for p in matrices}
    parts: list[Part] = []

    def add(params: Iterable[nn.Parameter]) -> None:
        mine = [p for p in params if p.requires_grad and id(p) not in taken]
        taken.update(map(id, mine))
        groups = decayed(mine, config.weight_decay)
        if strategy.keeps_precise:
            parts.append(adamw([g for g in groups if g["params"]], config))
        else:
            parts.append(_kept_precise(groups, partial(adamw, config=config), config, len(parts)))

    if config.release_gradients:
        for weight in (p for visit in policy.visits for p in visit.trained):
            add([weight])
            weight.register_post_accumulate_grad_hook(partial(_step_and_release, parts[-1]))
    add(p for _, p in named)
    if matrices:
        muon = partial(torch.optim.Muon, lr=config.lr, adjust_lr_fn="match_rms_adamw")  # arXiv 2502.16982
        groups = [{"params": matrices, "weight_decay": config.weight_decay}]
        parts.append(_kept_precise(groups, muon, config, len(parts)))
    warmup = max(1, math.ceil(config.warmup_ratio * total_steps))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        if config.schedule == "constant":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total_steps - warmup)))

    strategy.prepare(policy, parts)
    return Optimizer(parts, factor, strategy)


def _kept_precise(groups: Groups, build: Callable[[Groups], torch.optim.Optimizer], config: OptimConfig, name: int):
    """The optimizer of these groups with what optim.bf16 and an optimizer on the host put around it."""
    if config.implementation == "cpu":
        return MasterWeights(groups, build, torch.device("cpu"))
    if config.bf16 == "master":
        return MasterWeights(groups, build)
    if config.bf16 == "stochastic":
        return StochasticRounding(build(groups), name)
    return build(groups)


def _step_and_release(part: Part, _: Tensor) -> None:
    part.step()
    part.zero_grad(set_to_none=True)


def _stepping(part: Part) -> torch.optim.Optimizer:
    return part if isinstance(part, torch.optim.Optimizer) else part.optimizer


def _wide_copy(p: nn.Parameter, device: torch.device | None) -> nn.Parameter:
    wide, device = torch.promote_types(p.dtype, torch.float32), device or p.device
    return p if (p.dtype, p.device) == (wide, device) else nn.Parameter(p.detach().to(device, wide, copy=True))


def _page_again(optimizer: torch.optim.Optimizer) -> None:
    """Put restored moments of a paged optimizer back into paged memory: bitsandbytes loads them to the GPU for good."""
    if not getattr(optimizer, "is_paged", False):
        return
    for p, state in optimizer.state.items():
        for name in ("state1", "state2"):
            if name in state and p.numel() >= _PAGED_ELEMENTS and not getattr(state[name], "is_paged", False):
                paged = optimizer.get_state_buffer(p, dtype=state[name].dtype)
                state[name] = paged.copy_(state[name])


def _torchao() -> Any:
    try:
        import torchao.optim
    except ImportError as error:
        raise RunError(
            f"stochastic rounding needs torchao, which does not import ({error}): "
            "pip install 'genevolve-fast[quantized]'"
        ) from error
    return torchao.optim


@cache
def _ask_cpuinfo_once() -> None:
    """DeepSpeedCPUAdam asks at every construction and only for the vendor: a second for each weight of a layer."""
    import cpuinfo

    cpuinfo.get_cpu_info = cache(cpuinfo.get_cpu_info)


def _deepspeed() -> Callable[..., torch.optim.Optimizer]:
    """DeepSpeed's AdamW for parameters in host memory; it is compiled when it is first made, in a minute or two."""
    try:
        from deepspeed.ops.adam import DeepSpeedCPUAdam
    except ImportError as error:
        raise RunError(
            f"optim.implementation cpu needs deepspeed, which does not import ({error}): "
            "pip install 'genevolve-fast[deepspeed]'"
        ) from error
    _ask_cpuinfo_once()

    def build(groups: Groups, **options: Any) -> torch.optim.Optimizer:
        try:
            return DeepSpeedCPUAdam(groups, **options)
        except RuntimeError as error:
            raise RunError(
                f"optim.implementation cpu: DeepSpeed cannot compile its Adam ({error.__cause__ or error}): it needs a "
                "C++ compiler and ninja on the PATH"
            ) from error

    return build
