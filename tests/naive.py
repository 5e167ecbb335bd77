"""The training step told naively: one sequence at a time, transformers' own forward, full logits, plain autograd."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from genevolve_fast.batch.groups import TrainingRollout
from genevolve_fast.ops import Objective
from genevolve_fast.policy.model import Policy


def sequence_logps(
    policy: Policy,
    ids: Sequence[int],
    images: Sequence[np.ndarray],
    at: Sequence[int],
    temperature: float,
    sampled_from: Sequence[Sequence[int]] | None = None,
):
    """Log-probs of ids[i] for i in `at`, from the full logits of transformers' forward.

    sampled_from: for each of them the ids it was sampled from, none for the whole vocabulary.
    """
    tokens = torch.tensor([list(ids)])
    dtype = policy.head_weight.dtype
    extra = {}
    if policy.has_vision:
        extra["mm_token_type_ids"] = (tokens == policy.codec.image_pad_id).int()
    if images:
        patches, grids = zip(*(policy.codec.image_patches(p) for p in images), strict=True)
        extra |= {"pixel_values": torch.cat(patches).to(dtype), "image_grid_thw": torch.tensor(grids)}
    with policy.own_attention():
        out = policy.model(input_ids=tokens, use_cache=False, **extra)
    logits = out.logits[0] / temperature
    if sampled_from is not None:
        parts = []
        for i, ids in zip(at, sampled_from, strict=True):
            z, y = logits[i - 1], tokens[0, i]
            parts.append(z[y] - torch.logsumexp(z[list(ids)] if len(ids) else z, 0))
        return torch.stack(parts)
    logps = logits.log_softmax(-1)
    at = torch.tensor(list(at))
    return logps[at - 1, tokens[0, at]]


def sets_of(t) -> list[list[int]] | None:
    """The ids that each loss token of a trajectory was sampled from."""
    if not len(t.mask_counts):
        return None
    left = iter(t.mask_ids.tolist())
    return [[next(left) for _ in range(n)] for n in t.mask_counts.tolist()]


def top_gaps(gaps: Sequence[float], permille: int) -> set[int]:
    count = max(1, math.ceil(len(gaps) * permille / 1000)) if gaps else 0
    return set(sorted(range(len(gaps)), key=lambda i: (-gaps[i], i))[:count])


def naive_loss(
    policy: Policy,
    rollouts: Sequence[TrainingRollout],
    images: Mapping[str, np.ndarray],
    o: Objective,
    temperature: float,
) -> Tensor:
    """On-policy GRPO + distillation of whole rollouts, written from the formulas and from nothing else here."""
    total = torch.zeros((), dtype=policy.head_weight.dtype)
    for r in rollouts:
        t = r.trajectory
        at = np.flatnonzero(t.loss_mask).tolist()
        pixels = [images[record.sha256] for record in t.images]
        logps = sequence_logps(policy, t.ids.tolist(), pixels, at, temperature, sets_of(t))
        ratio = torch.exp(logps - logps.detach())
        low, high = 1 - o.clip_ratio_low, 1 + o.clip_ratio_high
        total = total - torch.minimum(ratio * r.advantage, ratio.clamp(low, high) * r.advantage).sum()
        if not r.experience_ids:
            continue
        cut, patch = t.request_stop, list(r.experience_ids)
        with torch.no_grad():
            ids = [*t.ids[:cut].tolist(), *patch, *t.ids[cut:].tolist()]
            teacher = sequence_logps(policy, ids, pixels, [i + len(patch) for i in at], temperature, sets_of(t))
        allowed = [k for k, i in enumerate(at) if o.sdl_scope == "all" or t.decision_mask[i]]
        gaps = (logps.detach() - teacher).abs()
        for k in {allowed[j] for j in top_gaps([float(gaps[k]) for k in allowed], o.sdl_permille)}:
            gap = float((logps[k].detach() - teacher[k]).clamp(-o.sdl_clamp, o.sdl_clamp))
            total = total + o.sdl_coef * gap * logps[k]  # on policy the importance weight is 1
    return total / len(rollouts)


def gradient(policy: Policy) -> Tensor:
    """All parameter gradients in one vector; absent ones are zero."""
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in policy.parameters()])
