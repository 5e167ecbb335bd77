"""Train tool-using image-generation agents on few GPUs. Public names load on first use."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "Agent": "genevolve_fast.agent.inference",
    "Trajectory": "genevolve_fast.trajectory",
    "Program": "genevolve_fast.trajectory",
    "Request": "genevolve_fast.trajectory",
    "Objective": "genevolve_fast.ops",
    "SamplingMask": "genevolve_fast.ops",
    "linear_logprob": "genevolve_fast.ops",
    "linear_grpo_sdl": "genevolve_fast.ops",
    "grpo_sdl": "genevolve_fast.ops",
}
__all__ = [*_PUBLIC]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
