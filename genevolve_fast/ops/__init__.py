"""Differentiable operations for anyone's trainer: torch is all they need."""

from genevolve_fast.ops.epilogues import supported
from genevolve_fast.ops.fused import linear_grpo_sdl
from genevolve_fast.ops.head import LogProbs, linear_logprob
from genevolve_fast.ops.objective import Objective
from genevolve_fast.ops.reference import grpo_sdl, select_sdl

__all__ = ["LogProbs", "Objective", "grpo_sdl", "linear_grpo_sdl", "linear_logprob", "select_sdl", "supported"]
