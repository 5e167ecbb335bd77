"""Step metrics under the names that TRL and verl use."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from genevolve_fast.trajectory import Failed, Judged, Trajectory

_LOG_RATIO_CLAMP = 20.0  # of what enters exp, as in the objective
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


def engine_mismatch(rollouts: Sequence[Trajectory], logps: Mapping[str, np.ndarray]) -> dict[str, float]:
    """How far the trainer's log-probs [loss tokens] by trajectory id are from the engine's, by model call.

    d = trainer - engine over the tokens that the r-th assistant turn sampled; kl is the mean of exp(d) - 1 - d, which
    estimates KL(engine ‖ trainer) on the engine's samples. masked_share: loss tokens whose sampling mask is known.
    """
    by_round: dict[int, list[np.ndarray]] = {}
    for t in rollouts:
        if t.id in logps:
            gap = np.zeros(len(t), dtype=np.float64)
            gap[t.loss_mask] = logps[t.id] - t.rollout_logps[t.loss_mask]
            for r, turn in enumerate((x for x in t.turns if x.role == "assistant"), 1):
                span = slice(turn.start, turn.stop)
                by_round.setdefault(r, []).append(gap[span][t.loss_mask[span]])
    tokens = sum(t.num_loss_tokens for t in rollouts)
    out = {"rollout_corr/masked_share": sum(t.masked_tokens for t in rollouts) / max(1, tokens)}
    gaps = {r: d for r, parts in sorted(by_round.items()) if len(d := np.concatenate(parts))}
    if gaps:
        out["rollout_corr/kl"] = _k3(np.concatenate([*gaps.values()]))
    for r, d in gaps.items():
        out[f"rollout_corr/logp_difference_abs/round_{r:02d}"] = float(np.abs(d).mean())
        out[f"rollout_corr/kl/round_{r:02d}"] = _k3(d)
    return out


def _k3(d: np.ndarray) -> float:
    d = d.clip(-_LOG_RATIO_CLAMP, _LOG_RATIO_CLAMP)
    return float((np.expm1(d) - d).mean())
