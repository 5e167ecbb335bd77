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

from genevolve_fast.policy.adapters import has_adapters, load_adapter
from genevolve_fast.policy.model import Policy
from genevolve_fast.train.optim import Optimizer

_NAME = re.compile(r"step_(\d+)")


def save_checkpoint(
    folder: Path,
    step: int,
    policy: Policy,
    optimizer: Optimizer,
    extras: Callable[[Path], None] | None = None,
    keep_last: int = 2,
) -> Path:
    """Write `folder/step_N`: the policy (with LoRA its adapter only), optimizer, schedule and random states.

    Everything is written under a temporary name and renamed at the end, so a crash leaves the last checkpoint whole;
    `extras(path)` may add files. Older checkpoints beyond `keep_last` are removed afterwards.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step_{step:06d}"
    partial = folder / f".partial_{step:06d}_{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
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
    for old in checkpoints(folder)[:-keep_last]:
        shutil.rmtree(old)
    for stale in folder.glob(".partial_*"):
        shutil.rmtree(stale, ignore_errors=True)
    return final


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [(int(m[1]), p) for p in folder.glob("step_*") if (m := _NAME.fullmatch(p.name))]
    return [p for _, p in sorted(found)]


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
