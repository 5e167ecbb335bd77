"""Which of this machine's GPUs train and which sample, where a configuration keeps them apart."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from genevolve_fast.train.config import ConfigError, EvolveConfig

VISIBLE = "CUDA_VISIBLE_DEVICES"
BEFORE = "GENEVOLVE_VISIBLE_GPUS"  # what this process saw before it took the trainer's share


@dataclass(frozen=True)
class Shares:
    """Names of GPUs as CUDA_VISIBLE_DEVICES takes them: the trainer's, and those of each server."""

    trainer: tuple[str, ...]
    servers: tuple[tuple[str, ...], ...]


def shares(config: EvolveConfig, environment: Mapping[str, str] = os.environ) -> Shares:
    """Indices of `trainer_gpus` and `rollout_gpus` count the GPUs that are visible. Raises ConfigError."""
    names = _visible(environment)
    for field in ("trainer_gpus", "rollout_gpus"):
        if missing := [i for i in getattr(config, field) if i >= len(names)]:
            have = f"{len(names)} GPUs, 0 to {len(names) - 1}" if names else "no GPU"
            raise ConfigError(f"{field} names GPU {missing[0]}, and this process sees {have}")
    free = [i for i in range(len(names)) if i not in config.rollout_gpus]
    if not free:
        raise ConfigError(f"rollout_gpus takes all {len(names)} GPUs: none is left to train on")
    processes = processes_here(environment)
    if config.trainer_gpus and len(config.trainer_gpus) != processes:
        raise ConfigError(
            f"trainer_gpus names {len(config.trainer_gpus)} GPUs for {processes} trainer processes on this machine: "
            "one process trains on one GPU, and torchrun --nproc-per-node starts several"
        )
    if len(free) < processes:
        raise ConfigError(f"rollout_gpus leaves {len(free)} GPUs to {processes} trainer processes on this machine")
    tp = config.rollout.server.tensor_parallel_size
    sampling = [names[i] for i in config.rollout_gpus]
    groups = tuple(tuple(sampling[i : i + tp]) for i in range(0, len(sampling), tp))
    return Shares(tuple(names[i] for i in config.trainer_gpus or free), groups)


def processes_here(environment: Mapping[str, str] = os.environ) -> int:
    """Processes that the launcher started on this machine: torchrun and deepspeed have each a name for it."""
    names = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "WORLD_SIZE")
    return int(next((environment[n] for n in names if n in environment), "1"))


def take_share(config: EvolveConfig) -> None:
    """Let this process see the trainer's GPUs only. Before anything touches CUDA; raises ConfigError."""
    if not (config.trainer_gpus or config.rollout_gpus):
        return
    import torch

    if torch.cuda.is_initialized():
        raise ConfigError("trainer_gpus and rollout_gpus must be divided before this process uses a GPU")
    seen = ",".join(_visible(os.environ))
    os.environ[VISIBLE] = ",".join(shares(config).trainer)
    os.environ[BEFORE] = seen


def check_share(config: EvolveConfig) -> None:
    """Raise ConfigError where this process trains on GPUs that are not the trainer's."""
    if (config.trainer_gpus or config.rollout_gpus) and os.environ.get(VISIBLE) != ",".join(shares(config).trainer):
        raise ConfigError("trainer_gpus and rollout_gpus are set: call train.gpus.take_share first")


def _visible(environment: Mapping[str, str]) -> list[str]:
    """Names of the GPUs that this process saw at first."""
    listed = environment.get(BEFORE, environment.get(VISIBLE))
    if listed is not None:
        return [name.strip() for name in listed.split(",") if name.strip()]
    import torch

    return [str(i) for i in range(torch.cuda.device_count())]  # by NVML: CUDA reads the variable later
