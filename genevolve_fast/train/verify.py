"""The shared pass against whole sequences one at a time, on the user's own model and first batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from genevolve_fast.batch.groups import TrainingRollout
from genevolve_fast.batch.packing import TrainingSequence, student_sequence, teacher_sequence
from genevolve_fast.ops import Objective
from genevolve_fast.ops.reference import grpo_sdl
from genevolve_fast.policy.model import Policy
from genevolve_fast.policy.weights import WeightSource
from genevolve_fast.train.update import accumulate_gradients

TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 5e-2}
_HEAD_ROWS = 1024


@dataclass(frozen=True)
class Deviation:
    """How far the shared pass is from independent passes.

    gradient: L2 distance over all trained parameters, relative to the independent gradient's norm; parameter: the one
    whose own relative distance, weighted by its share of the norm, is largest; logp: largest absolute distance of a
    sampled token's log-prob, in nats.
    """

    gradient: float
    parameter: str
    parameter_distance: float
    logp: float
    tokens: int
    rollouts: int
    tolerance: float

    @property
    def holds(self) -> bool:
        return self.gradient <= self.tolerance

    def __str__(self) -> str:
        return (
            f"{self.rollouts} rollouts, {self.tokens} sampled tokens\n"
            f"gradient         {self.gradient:.2e} relative to the independent passes (allowed {self.tolerance:.0e})\n"
            f"  worst parameter {self.parameter_distance:.2e} of the whole gradient's norm, in {self.parameter}\n"
            f"log-probs        {self.logp:.2e} nats at most\n"
            f"{'the shared pass gives the independent gradient' if self.holds else 'THE SHARED PASS DEVIATES'}"
        )


def verify(
    policy: Policy,
    rollouts: Sequence[TrainingRollout],
    images: Mapping[str, np.ndarray],
    objective: Objective,
    *,
    temperature: float,
    max_tokens: int,
    reference: WeightSource | None = None,
    teacher: WeightSource | None = None,
    workspace_mb: float | None = None,
) -> Deviation:
    """Make the step's gradient twice, shared and independent, and compare. The policy's gradients are dropped."""
    policy.zero_grad(set_to_none=True)
    _, traces = accumulate_gradients(
        policy, rollouts, images, objective, temperature=temperature, max_tokens=max_tokens, reference=reference,
        teacher=teacher, workspace_mb=workspace_mb,
    )  # fmt: skip
    named = {n: p for n, p in policy.model.named_parameters() if p.requires_grad}
    shared = {n: p.grad for n, p in named.items()}
    policy.zero_grad(set_to_none=True)
    logp = 0.0
    num_tokens = sum(r.trajectory.num_loss_tokens for r in rollouts)
    for r in tqdm(rollouts, desc="independent passes", unit="rollout", dynamic_ncols=True):
        logps = _independent(policy, r, images, objective, temperature, reference, teacher, len(rollouts), num_tokens)
        if r.trajectory.id in traces:
            seen = torch.from_numpy(traces[r.trajectory.id].logps).to(logps)
            logp = max(logp, float((seen - logps).abs().max()))
    zero = torch.zeros((), device=policy.device)
    squares, distances = {}, {}
    for name, p in named.items():
        a, b = (zero if g is None else g.double() for g in (shared.pop(name), p.grad))
        squares[name], distances[name] = float(b.square().sum()), float((a - b).square().sum())
    policy.zero_grad(set_to_none=True)
    norm = sum(squares.values()) ** 0.5
    worst = max(distances, key=distances.get)
    tolerance = TOLERANCES[policy.head_weight.dtype]
    return Deviation(
        gradient=sum(distances.values()) ** 0.5 / norm if norm else float("nan"),
        parameter=worst,
        parameter_distance=distances[worst] ** 0.5 / norm if norm else float("nan"),
        logp=logp,
        tokens=num_tokens,
        rollouts=len(rollouts),
        tolerance=tolerance,
    )


def _independent(
    policy, rollout, images, objective, temperature, reference, teacher, num_sequences, num_tokens
) -> Tensor:
    """Add one rollout's gradient by transformers' own forward and `ops.reference`; returns its log-probs."""
    t = rollout.trajectory
    student = student_sequence(t, images, policy.codec.image_grid)
    sampled_from = np.split(t.mask_ids, np.cumsum(t.mask_counts)[:-1]) if t.masked_tokens else None
    other = dict(ref_logps=None, teacher_logps=None, sdl_mask=None)
    if reference is not None:
        with reference.weights() as weights:
            other["ref_logps"] = sequence_logps(weights, student, temperature, sampled_from)
    if rollout.experience_ids:
        after = teacher_sequence(student, t.request_stop, rollout.experience_ids)
        with torch.no_grad():
            if teacher is None:
                other["teacher_logps"] = sequence_logps(policy, after, temperature, sampled_from)
            else:
                with teacher.weights() as weights:
                    other["teacher_logps"] = sequence_logps(weights, after, temperature, sampled_from)
        mask = t.decision_mask if objective.sdl_scope == "decision" else t.loss_mask
        other["sdl_mask"] = torch.from_numpy(mask[t.loss_mask]).to(policy.device)
    logps = sequence_logps(policy, student, temperature, sampled_from)
    loss, _ = grpo_sdl(
        logps,
        advantages=torch.tensor([rollout.advantage], device=logps.device),
        seq_ids=torch.zeros(len(logps), dtype=torch.int64, device=logps.device),
        rollout_logps=torch.from_numpy(t.rollout_logps[t.loss_mask]).to(logps.device),
        num_sequences=num_sequences,
        num_tokens=num_tokens,
        objective=objective,
        **other,
    )
    loss.backward()
    return logps.detach()


def sequence_logps(
    policy: Policy, sequence: TrainingSequence, temperature: float, sampled_from: Sequence[np.ndarray] | None = None
) -> Tensor:
    """[loss tokens] log-probs by transformers' own forward of the whole sequence, fp32 (fp64).

    sampled_from: the ids that each loss token was sampled from; without any, from the whole vocabulary.
    """
    ids = torch.from_numpy(sequence.ids).to(policy.device)[None]
    given = {}
    if policy.has_vision:
        given["mm_token_type_ids"] = (ids == policy.codec.image_pad_id).int()
    if sequence.images:
        patches, grids = zip(*(policy.codec.image_patches(p) for p in sequence.images), strict=True)
        given["pixel_values"] = torch.cat(patches).to(policy.device, policy.head_weight.dtype)
        given["image_grid_thw"] = torch.tensor(grids, device=policy.device)
    with policy.own_attention():
        hidden = policy.model.model(input_ids=ids, use_cache=False, **given).last_hidden_state[0]
        at = torch.from_numpy(np.flatnonzero(sequence.loss_mask)).to(policy.device)
    sets = sampled_from or [()] * len(at)
    made = []
    for first in range(0, len(at), _HEAD_ROWS):
        part = slice(first, first + _HEAD_ROWS)
        given = hidden[at[part] - 1], policy.head_weight, ids[0, at[part]], temperature, sets[part]
        made.append(checkpoint(_logps, *given, use_reentrant=False))
    return torch.cat(made)


def _logps(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, sets: Sequence[np.ndarray]) -> Tensor:
    wide = torch.promote_types(hidden.dtype, torch.float32)
    logits = torch.nn.functional.linear(hidden, weight).to(wide) / temperature
    if any(map(len, sets)):
        allowed = np.zeros(logits.shape, dtype=bool)
        for row, ids in zip(allowed, sets, strict=True):
            row[ids if len(ids) else slice(None)] = True
        logits = logits.masked_fill(~torch.from_numpy(allowed).to(logits.device), -torch.inf)
    return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
