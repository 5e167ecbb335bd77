"""Group-relative advantages on the host, in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

Estimator = Literal["grpo", "dr_grpo", "rloo"]
MIN_SPREAD = 1e-6


def advantages(rewards: Sequence[float | None], estimator: Estimator = "grpo") -> np.ndarray:
    """float64 [len(rewards)] of one group. None marks a failed rollout: it leaves the baseline and gets 0.

    grpo: (R - mean) / (std + 1e-6), sample standard deviation (arXiv 2402.03300); dr_grpo: R - mean (arXiv 2503.20783);
    rloo: R minus the mean of the others (arXiv 2402.14740). Fewer than two judged rollouts or a spread below 1e-6 give
    exactly 0.
    """
    if estimator not in ("grpo", "dr_grpo", "rloo"):
        raise ValueError(f"estimator must be grpo, dr_grpo or rloo, not {estimator!r}")
    judged = np.array([r is not None for r in rewards], dtype=bool)
    values = np.array([r for r in rewards if r is not None], dtype=np.float64)
    if not np.isfinite(values).all():
        raise ValueError(f"rewards must be finite, got {rewards}")
    out = np.zeros(len(rewards))
    if len(values) < 2 or np.ptp(values) < MIN_SPREAD:
        return out
    centred = values - values.mean()
    if estimator == "grpo":
        centred = centred / (values.std(ddof=1) + 1e-6)
    elif estimator == "rloo":
        centred = centred * len(values) / (len(values) - 1)
    out[judged] = centred
    return out
