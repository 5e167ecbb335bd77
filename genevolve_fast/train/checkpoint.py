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

from genevolve_fast.files import replacing_folder
from genevolve_fast.policy.adapters import has_adapters, load_adapter
from genevolve_fast.policy.model import Policy
from genevolve_fast.train.config import CheckpointConfig
from genevolve_fast.train.optim import Optimizer
from genevolve_fast.train.retention import Retention
from genevolve_fast.train.space import check_room, checkpoint_bytes, make_room, writing

_NAME = re.compile(r"step_(\d+)")


def save_checkpoint(
    folder: Path,
    step: int,
    policy: Policy,
    optimizer: Optimizer,
    extras: Callable[[Path], None] | None = None,
    keep: CheckpointConfig | None = None,
    beside: int = 0,
) -> Path:
    """Write `folder/step_N`: the policy (with LoRA its adapter only), optimizer, schedule and random states.

    Everything is written under a temporary name and renamed at the end, so a crash leaves the last checkpoint whole;
    `extras(path)` may add files of `beside` bytes. Checkpoints that `keep` lets go are removed afterwards, or before
    where the disk has no room for both. Raises RunError for a full disk, which leaves the others
    as they were.
    """
    folder.mkdir(parents=True, exist_ok=True)
    keep = keep or CheckpointConfig()
    final = folder / f"step_{step:06d}"
    for stale in folder.glob(".partial_*"):  # of a process that was killed
        shutil.rmtree(stale, ignore_errors=True)
    needed = checkpoint_bytes(policy, optimizer, beside)
    make_room(folder, needed, outdated(folder, keep, step))
    partial = folder / f".partial_{step:06d}_{os.getpid()}"
    partial.mkdir()
    with writing(partial, needed):
        policy.save_trainable(partial / "policy")
        torch.save(
            {
                "step": step,
                "optimizer": optimizer.state_dict(),
                "torch_rng": torch.get_rng_state(),
                "numpy_rng": np.random.get_state(),
                "python_rng": random.getstate(),
            },
            partial / "trainer.pt",
        )
        if extras is not None:
            extras(partial)
        for file in partial.rglob("*"):
            if file.is_file():
                with file.open("rb") as f:
                    os.fsync(f.fileno())
    shutil.rmtree(final, ignore_errors=True)
    os.replace(partial, final)
    Retention(folder, keep).mark(map(step_of, checkpoints(folder)))
    for old in outdated(folder, keep, step):
        shutil.rmtree(old)
    return final


def save_final(folder: Path, policy: Policy, dtype: torch.dtype | None = None) -> None:
    """Write the whole policy to `folder`, an adapter merged; it appears when it is complete. Raises RunError."""
    with replacing_folder(folder) as partial:
        needed = sum(p.numel() * (dtype or p.dtype).itemsize for p in policy.parameters())
        check_room(folder.parent, needed)
        with writing(partial, needed):
            policy.save_pretrained(partial, dtype)


def outdated(folder: Path, keep: CheckpointConfig, step: int) -> list[Path]:
    """Checkpoints that go once there is one of `step`, oldest first."""
    found = [p for p in checkpoints(folder) if step_of(p) != step]
    stay = Retention(folder, keep).kept([*map(step_of, found), step])
    return [p for p in found if step_of(p) not in stay]


def refuse_full_disk(
    folder: Path, step: int, policy: Policy, optimizer: Optimizer, keep: CheckpointConfig, beside: int = 0
) -> None:
    """Raise RunError, before anything is trained, where a checkpoint of a later step than `step` has no room."""
    folder.mkdir(parents=True, exist_ok=True)
    check_room(folder, checkpoint_bytes(policy, optimizer, beside), outdated(folder, keep, step + 1))


def step_of(checkpoint: Path) -> int:
    return int(_NAME.fullmatch(checkpoint.name)[1])


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted((p for p in folder.glob("step_*") if _NAME.fullmatch(p.name)), key=step_of)


def load_checkpoint(path: Path, policy: Policy, optimizer: Optimizer) -> int:
    """Restore everything `save_checkpoint` wrote; returns the step."""
    from safetensors.torch import load_model

    saved = torch.load(path / "trainer.pt", weights_only=False, map_location="cpu")
    if has_adapters(policy):
        load_adapter(policy, path / "policy")
    else:
        load_model(policy.model, path / "policy" / "model.safetensors")
    optimizer.load_state_dict(saved["optimizer"])
    torch.set_rng_state(saved["torch_rng"])
    np.random.set_state(saved["numpy_rng"])
    random.setstate(saved["python_rng"])
    return saved["step"]
