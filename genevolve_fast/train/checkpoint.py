"""Checkpoints: atomic, complete, and only as many as asked for."""

from __future__ import annotations

import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from genevolve_fast.files import out_of_space, replacing_folder
from genevolve_fast.policy.adapters import has_adapters, load_adapter
from genevolve_fast.policy.model import Policy
from genevolve_fast.policy.shards import FOLDER
from genevolve_fast.policy.weights import Average
from genevolve_fast.train.config import CheckpointConfig
from genevolve_fast.train.optim import Optimizer
from genevolve_fast.train.ranks import Ranks
from genevolve_fast.train.retention import Retention
from genevolve_fast.train.sharded import (
    load_sharded,
    load_sharded_average,
    load_whole_average,
    save_sharded,
    trained,
    whole_tensors,
)
from genevolve_fast.train.space import check_room, checkpoint_bytes, make_room, no_room, writing
from genevolve_fast.train.strategies import Strategy

_NAME = re.compile(r"step_(\d+)")


TEACHER = "teacher.safetensors"  # the teacher's running average, where one process holds it whole


def save_checkpoint(
    folder: Path,
    step: int,
    policy: Policy,
    optimizer: Optimizer,
    extras: Callable[[Path], None] | None = None,
    keep: CheckpointConfig | None = None,
    strategy: Strategy | None = None,
    average: Average | None = None,
) -> Path:
    """Write `folder/step_N`: the policy (with LoRA its adapter only), optimizer, schedule, average and random states.

    Everything is written under a temporary name and renamed at the end, so a crash leaves the last checkpoint whole;
    `extras(path)` may add files, on the first rank. Checkpoints that `keep` lets go are removed afterwards, or before
    where the disk has no room for both. All ranks of `strategy` together; where they share the state it is written in
    shards (`train.sharded`), which replace the policy's weights and the optimizer's. Raises RunError for a full disk,
    which leaves the others as they were.
    """
    strategy, keep = strategy or Strategy(), keep or CheckpointConfig()
    ranks, final = strategy.ranks, folder / f"step_{step:06d}"
    needed = checkpoint_bytes(policy, optimizer, average.nbytes if average else 0)
    partial = ranks.from_first(lambda: _begin(folder, step, needed, keep))
    try:
        if strategy.in_step:
            save_sharded(partial / FOLDER, policy, optimizer, strategy, average)
        with strategy.whole(policy):
            ranks.from_first(lambda: _save_rest(partial, step, policy, optimizer, extras, strategy, average))
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if out_of_space(error):
            raise no_room(folder, needed) from error
        raise
    ranks.from_first(lambda: _take_place(partial, final, folder, keep, step))
    return final


def _begin(folder: Path, step: int, needed: int, keep: CheckpointConfig) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob(".partial_*"):  # of a process that was killed
        shutil.rmtree(stale, ignore_errors=True)
    make_room(folder, needed, outdated(folder, keep, step))
    partial = folder / f".partial_{step:06d}_{os.getpid()}"
    partial.mkdir()
    return partial


def _save_rest(
    partial: Path, step: int, policy: Policy, optimizer: Optimizer, extras, strategy: Strategy, average: Average | None
) -> None:
    """What one process writes: the policy, unless its weights lie in shards, and what is not a tensor of a weight."""
    if strategy.in_step and not has_adapters(policy):
        policy.save_outline(partial / "policy")
    else:
        policy.save_trainable(partial / "policy")
    state = {"schedules": optimizer.schedules_state()} if strategy.in_step else optimizer.state_dict()
    torch.save(
        {
            "step": step,
            "optimizer": state,
            "torch_rng": torch.get_rng_state(),
            "numpy_rng": np.random.get_state(),
            "python_rng": random.getstate(),
        },
        partial / "trainer.pt",
    )
    if average and not strategy.in_step:
        average.save(partial / TEACHER)
    if extras is not None:
        extras(partial)


def _take_place(partial: Path, final: Path, folder: Path, keep: CheckpointConfig, step: int) -> None:
    for file in partial.rglob("*"):
        if file.is_file():
            with file.open("rb") as f:
                os.fsync(f.fileno())
    shutil.rmtree(final, ignore_errors=True)
    os.replace(partial, final)
    Retention(folder, keep).mark(map(step_of, checkpoints(folder)))
    for old in outdated(folder, keep, step):
        shutil.rmtree(old)


def save_final(
    folder: Path, policy: Policy, dtype: torch.dtype | None = None, strategy: Strategy | None = None
) -> None:
    """Write the whole policy to `folder`, an adapter merged; it appears when it is complete. Raises RunError."""
    strategy = strategy or Strategy()

    def write() -> None:
        with replacing_folder(folder) as partial:
            needed = sum(p.numel() * (dtype or p.dtype).itemsize for p in policy.parameters())
            check_room(folder.parent, needed)
            with writing(partial, needed):
                policy.save_pretrained(partial, dtype)

    with strategy.whole(policy):
        strategy.ranks.from_first(write)


def outdated(folder: Path, keep: CheckpointConfig, step: int) -> list[Path]:
    """Checkpoints that go once there is one of `step`, oldest first."""
    found = [p for p in checkpoints(folder) if step_of(p) != step]
    stay = Retention(folder, keep).kept([*map(step_of, found), step])
    return [p for p in found if step_of(p) not in stay]


def refuse_full_disk(
    folder: Path,
    step: int,
    policy: Policy,
    optimizer: Optimizer,
    keep: CheckpointConfig,
    average: Average | None = None,
    ranks: Ranks | None = None,
) -> None:
    """Raise RunError, before anything is trained, where a checkpoint of a later step than `step` has no room."""

    def look() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        needed = checkpoint_bytes(policy, optimizer, average.nbytes if average else 0)
        check_room(folder, needed, outdated(folder, keep, step + 1))

    (ranks or Ranks()).from_first(look)


def step_of(checkpoint: Path) -> int:
    return int(_NAME.fullmatch(checkpoint.name)[1])


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted((p for p in folder.glob("step_*") if _NAME.fullmatch(p.name)), key=step_of)


def load_checkpoint(
    path: Path,
    policy: Policy,
    optimizer: Optimizer,
    strategy: Strategy | None = None,
    average: Average | None = None,
) -> int:
    """Restore everything `save_checkpoint` wrote, whatever ranks and strategy wrote it; returns the step."""
    strategy = strategy or Strategy()
    saved = torch.load(path / "trainer.pt", weights_only=False, map_location="cpu")
    if (path / FOLDER).exists():
        load_sharded(path / FOLDER, policy, optimizer, strategy)
        optimizer.load_schedules(saved["optimizer"]["schedules"])
        if average:
            load_sharded_average(path / FOLDER, policy, average, strategy)
    elif strategy.in_step:
        read, weights = whole_tensors(path / "policy", saved["optimizer"], policy), trained(policy)
        for name, (weight, state) in read.items():
            strategy.put(weights[name], weight, state, optimizer.parts)
        optimizer.load_schedules(saved["optimizer"]["schedules"])
        if average:
            load_whole_average(path / TEACHER, policy, average, strategy)
    else:
        _load_whole(path, saved, policy, optimizer)
        if average:
            average.load(path / TEACHER)
    if strategy.ranks.first:  # one process's draws: the others keep their own
        torch.set_rng_state(saved["torch_rng"])
        np.random.set_state(saved["numpy_rng"])
        random.setstate(saved["python_rng"])
    return saved["step"]


def _load_whole(path: Path, saved, policy: Policy, optimizer: Optimizer) -> None:
    from safetensors.torch import load_model

    if has_adapters(policy):
        load_adapter(policy, path / "policy")
    else:
        load_model(policy.model, path / "policy" / "model.safetensors")
    optimizer.load_state_dict(saved["optimizer"])
