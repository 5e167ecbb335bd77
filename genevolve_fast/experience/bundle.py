"""Best against worst: which rollouts of a group are worth comparing."""

from __future__ import annotations

from collections.abc import Sequence

from genevolve_fast.trajectory import Trajectory


def best_and_worst(group: Sequence[Trajectory], min_gap: float = 0.2) -> tuple[Trajectory, Trajectory] | None:
    """The judged rollouts of highest and lowest reward (ties: smaller id), or None where the gap is below `min_gap`."""
    judged = sorted((t for t in group if t.reward is not None), key=lambda t: (-t.reward, t.id))
    if len(judged) < 2:
        return None
    best = judged[0]
    worst = min(judged, key=lambda t: (t.reward, t.id))
    return (best, worst) if best.reward - worst.reward >= min_gap - 1e-9 and best is not worst else None
