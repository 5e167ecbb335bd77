"""Differentiable operations for anyone's trainer: torch is all they need."""

from genevolve_fast.ops.epilogues import supported
from genevolve_fast.ops.fused import RowLogProbs, linear_grpo_sdl
from genevolve_fast.ops.head import LogProbs, linear_logprob
from genevolve_fast.ops.objective import Objective
from genevolve_fast.ops.prefix_attention import (
    Layout,
    attention_backward,
    attention_forward,
    attention_supported,
    prefix_attention,
)
from genevolve_fast.ops.reference import grpo_sdl, select_sdl
from genevolve_fast.ops.sampling_mask import SamplingMask

__all__ = [
    "Layout",
    "LogProbs",
    "Objective",
    "RowLogProbs",
    "SamplingMask",
    "attention_backward",
    "attention_forward",
    "attention_supported",
    "grpo_sdl",
    "linear_grpo_sdl",
    "linear_logprob",
    "prefix_attention",
    "select_sdl",
    "supported",
]
