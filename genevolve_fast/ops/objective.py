"""Every coefficient and option of the training objective, in one place."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from typing import Literal, get_args

LossAggregation = Literal["seq-mean-token-sum", "seq-mean-token-mean", "token-mean", "seq-mean-token-sum-norm"]
RolloutIS = Literal["none", "token", "sequence"]
SdlGrad = Literal["reverse_kl", "k3"]
SdlScope = Literal["all", "decision"]
SdlSelect = Literal["sequence", "batch"]


@dataclass(frozen=True)
class Objective:
    """L = L_pg + kl_coef · KL + sdl_coef · L_sdl, aggregated by loss_agg_mode. Ratios and log-ratios are in nats."""

    clip_ratio_low: float = 0.20  # lower bound of the ratio is 1 - clip_ratio_low
    clip_ratio_high: float = 0.28  # upper bound is 1 + clip_ratio_high (DAPO, arXiv 2503.14476)
    dual_clip: float | None = None  # bound of -L_pg/A where A < 0; None: unbounded
    kl_coef: float = 1e-3  # k3 estimate of KL(policy ‖ reference); 0 drops the reference pass
    rollout_is: RolloutIS = "none"  # correction w = min(exp(old - rollout), rollout_is_cap)
    rollout_is_cap: float = 2.0  # bound of that correction
    sdl_coef: float = 2.0  # distillation towards the teacher that saw the experience
    sdl_rho_cap: float = 2.0  # cap of the importance weight exp(logp - old)
    sdl_clamp: float = 10.0  # bound of |logp - teacher_logp|
    sdl_grad: SdlGrad = "reverse_kl"  # or the slope of the clamped k3, for comparison
    sdl_scope: SdlScope = "all"  # or only tokens inside tool calls and answers
    sdl_select: SdlSelect = "sequence"  # the widest gaps of each rollout, or of the whole call
    sdl_permille: int = 100  # share of the eligible tokens that count
    loss_agg_mode: LossAggregation = "seq-mean-token-sum"  # how tokens and rollouts are averaged, under verl's names
    max_length: int | None = None  # L_max of seq-mean-token-sum-norm
    log_ratio_clamp: float = 20.0  # bound of every log-ratio that enters exp

    def __post_init__(self) -> None:
        choices = {
            "rollout_is": RolloutIS,
            "sdl_grad": SdlGrad,
            "sdl_scope": SdlScope,
            "sdl_select": SdlSelect,
            "loss_agg_mode": LossAggregation,
        }
        for name, kind in choices.items():
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"{name} must be one of {', '.join(get_args(kind))}, not {getattr(self, name)!r}")
        if not 0 <= self.clip_ratio_low < 1:
            raise ValueError(f"clip_ratio_low must lie in [0, 1), got {self.clip_ratio_low}")
        for name in ("clip_ratio_high", "kl_coef", "sdl_coef"):
            if not getattr(self, name) >= 0:  # so that NaN is refused too, here and below
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("rollout_is_cap", "sdl_rho_cap", "sdl_clamp", "log_ratio_clamp"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.dual_clip is not None and not self.dual_clip > 1:
            raise ValueError(f"dual_clip must exceed 1, got {self.dual_clip}")
        if not (0 < self.sdl_permille <= 1000 and self.sdl_permille == int(self.sdl_permille)):
            raise ValueError(f"sdl_permille must be a whole number in 1..1000, got {self.sdl_permille}")
        if self.max_length is not None and not self.max_length > 0:
            raise ValueError(f"max_length must be positive, got {self.max_length}")
        if (self.loss_agg_mode == "seq-mean-token-sum-norm") != (self.max_length is not None):
            raise ValueError("max_length belongs to loss_agg_mode seq-mean-token-sum-norm: set both or neither")
        object.__setattr__(self, "_encoded", json.dumps(vars(self), default=float))

    @property
    def encoded(self) -> str:
        """As a custom operator takes it."""
        return self._encoded

    @classmethod
    @functools.lru_cache(maxsize=64)
    def decode(cls, encoded: str) -> Objective:
        """The objective of an `encoded` string."""
        return cls(**json.loads(encoded))
