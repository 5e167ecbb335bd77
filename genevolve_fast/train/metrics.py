"""Step metrics under the names that TRL and verl use."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from genevolve_fast.trajectory import Failed, Judged, Trajectory

DIMENSIONS = ("faithfulness", "visual_correctness", "text_accuracy", "aesthetics")


def rollout_metrics(rollouts: Sequence[Trajectory], groups: Mapping[str, Sequence[Trajectory]]) -> dict[str, float]:
    """Rewards, lengths, tools and failures of one step's rollouts."""
    judged = [t for t in rollouts if isinstance(t.outcome, Judged)]
    failed = [t for t in rollouts if isinstance(t.outcome, Failed)]
    spreads = [np.ptp([t.reward for t in g if t.reward is not None] or [0.0]) for g in groups.values()]
    stds = [np.std([t.reward for t in g if t.reward is not None] or [0.0]) for g in groups.values()]
    lengths = [t.num_loss_tokens for t in rollouts]
    calls = Counter(turn.tool for t in rollouts for turn in t.turns if turn.role == "assistant" and turn.tool)
    out = {
        "reward_std": float(np.mean(stds)),
        "frac_reward_zero_std": float(np.mean([s < 1e-6 for s in spreads])),
        "rollouts/failed": float(len(failed)),
        "rollouts/valid_program": float(np.mean([t.program is not None and not t.error for t in rollouts])),
        "completions/mean_length": float(np.mean(lengths)),
        "completions/min_length": float(np.min(lengths)),
        "completions/max_length": float(np.max(lengths)),
        "num_turns/mean": float(np.mean([t.rounds for t in rollouts])),
        "num_tokens": float(sum(map(len, rollouts))),
    }
    if judged:
        out["reward"] = float(np.mean([t.outcome.reward for t in judged]))
        out["rewards/kscore/mean"] = float(np.mean([t.outcome.kscore for t in judged]))
        out["rewards/program/mean"] = float(np.mean([t.outcome.program for t in judged]))
    for name in DIMENSIONS:
        scored = [t for t in judged if name != "text_accuracy" or t.outcome.text_required]
        if scored:  # no row needed text: no number, rather than a wrong one
            out[f"rewards/{name}/mean"] = float(np.mean([getattr(t.outcome, name) for t in scored]))
    for tool, count in calls.items():
        out[f"tool_call_counts/{tool}/mean"] = count / len(rollouts)
    for stage, count in Counter(t.outcome.stage for t in failed).items():
        out[f"rollouts/failed/{stage}"] = float(count)
    for (source, kind), count in Counter((i.source, i.kind) for t in rollouts for i in t.incidents).items():
        out[f"tool_errors/{source}/{kind}"] = float(count)
    return out
