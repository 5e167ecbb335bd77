"""The step without sharing: packed whole sequences, a teacher forward of its own. What sharing is measured against.

`unshared` runs on this library's checkpointed visits, attention and fused head; `former` is the pass that trained the
demo before prompts were shared: transformers' layers, log-probs, then the objective.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from genevolve_fast.batch.groups import TrainingRollout
from genevolve_fast.batch.packing import PackedBatch, pack, plan_microbatches, student_sequence, teacher_sequence
from genevolve_fast.ops import Objective, grpo_sdl, linear_grpo_sdl, linear_logprob
from genevolve_fast.policy.attention import Attend, repeat_kv
from genevolve_fast.policy.model import Policy
from genevolve_fast.policy.passes import normed, through_layers
from genevolve_fast.policy.visits import Stream


class MicroBatch:
    """Some rollouts as whole sequences, and as the teacher reads those that have experience; rows by loss token."""

    def __init__(self, policy: Policy, members: Sequence[TrainingRollout], images: Mapping[str, np.ndarray]) -> None:
        codec, device = policy.codec, policy.device
        students = [student_sequence(m.trajectory, images, codec.image_grid) for m in members]
        teachers = [
            teacher_sequence(s, m.trajectory.request_stop, m.experience_ids)
            for s, m in zip(students, members, strict=True)
            if m.experience_ids
        ]
        packed = [pack(s, codec.image_pad_id, codec.merge_size, device) if s else None for s in (students, teachers)]
        self.student, self.teacher = packed
        masks = [m.trajectory.loss_mask for m in members]
        self.cu_seqlens = [0, *accumulate(int(mask.sum()) for mask in masks)]
        join = lambda parts: torch.from_numpy(np.concatenate(parts)).to(device)  # noqa: E731
        pairs = list(zip(members, masks, strict=True))
        self.rollout_logps = join([m.trajectory.rollout_logps[mask] for m, mask in pairs])
        self.has_teacher = join([np.full(int(mask.sum()), bool(m.experience_ids)) for m, mask in pairs])
        self.decision = join([m.trajectory.decision_mask[mask] for m, mask in pairs])
        self.seq_ids = join([np.full(int(mask.sum()), i) for i, mask in enumerate(masks)])
        self.advantages = torch.tensor([m.advantage for m in members], dtype=torch.float32)

    def teacher_terms(self, logps: Tensor | None, scope: str) -> dict[str, Tensor]:
        """The distillation's arguments of `linear_grpo_sdl` and `grpo_sdl`."""
        if logps is None:
            return {}
        full = torch.zeros_like(self.rollout_logps, dtype=logps.dtype).masked_scatter(self.has_teacher, logps)
        return dict(
            teacher_logps=full, sdl_mask=self.has_teacher & self.decision if scope == "decision" else self.has_teacher
        )


def unshared(
    policy: Policy,
    rollouts: Sequence[TrainingRollout],
    images: Mapping[str, np.ndarray],
    objective: Objective,
    *,
    temperature: float,
    max_tokens: int,
) -> None:
    """Add the step's gradient to `policy`: the same loss, rows and kernels as the shared pass, nothing shared."""
    counts = counts_of(rollouts)
    for micro in microbatches(policy, rollouts, images, max_tokens):
        teacher_logps = None
        if micro.teacher is not None:
            with torch.no_grad():
                hidden = normed(policy, visited(policy, micro.teacher)[micro.teacher.rows])
                teacher_logps = linear_logprob(
                    hidden, policy.head_weight, micro.teacher.targets, temperature=temperature
                ).logps
                del hidden
        with policy.frame():
            x = visited(policy, micro.student)
            loss, _ = linear_grpo_sdl(
                normed(policy, x[micro.student.rows]),
                policy.head_weight,
                micro.student.targets,
                advantages=micro.advantages,
                cu_seqlens=micro.cu_seqlens,
                rollout_logps=micro.rollout_logps,
                **micro.teacher_terms(teacher_logps, objective.sdl_scope),
                temperature=temperature,
                objective=objective,
                **counts,
            )
            del x
            loss.backward()


def visited(policy: Policy, batch: PackedBatch) -> Tensor:
    """Last layer's outputs [tokens, H] by checkpointed visits that neither read nor fill a prefix."""
    features = policy.image_features(batch.images)
    rows = batch.stretch
    return through_layers(policy, features, (rows, Stream(policy.rotary(rows.positions), batch.layout)))[0]


def former(
    policy: Policy,
    rollouts: Sequence[TrainingRollout],
    images: Mapping[str, np.ndarray],
    objective: Objective,
    *,
    temperature: float,
    max_tokens: int,
) -> None:
    """Add the step's gradient to `policy` as it was made before."""
    counts = counts_of(rollouts)
    for micro in microbatches(policy, rollouts, images, max_tokens):
        teacher_logps = None
        if micro.teacher is not None:
            with torch.no_grad():
                teacher_logps = scored(policy, micro.teacher, temperature).logps
        student = scored(policy, micro.student, temperature, entropy=True)
        loss, _ = grpo_sdl(
            student.logps,
            advantages=micro.advantages.to(policy.device),
            seq_ids=micro.seq_ids,
            rollout_logps=micro.rollout_logps,
            **micro.teacher_terms(teacher_logps, objective.sdl_scope),
            objective=objective,
            **counts,
        )
        loss.backward()


def scored(policy: Policy, batch: PackedBatch, temperature: float, entropy: bool = False):
    """Log-probs of the batch's loss tokens by transformers' layers."""
    features = policy.image_features(batch.images)
    attend = packed_causal(batch.cu_seqlens)
    hidden = policy.hidden(batch.ids, batch.positions, attend, batch.image_rows, features)
    return linear_logprob(
        hidden[0, batch.rows], policy.head_weight, batch.targets, temperature=temperature, return_entropy=entropy
    )


def microbatches(
    policy: Policy, rollouts: Sequence[TrainingRollout], images: Mapping[str, np.ndarray], max_tokens: int
) -> Iterator[MicroBatch]:
    live = [r for r in rollouts if r.advantage or r.experience_ids]
    lengths = [len(r.trajectory) + len(r.experience_ids) for r in live]
    for chosen in plan_microbatches(lengths, max_tokens):
        yield MicroBatch(policy, [live[i] for i in chosen], images)


def counts_of(rollouts: Sequence[TrainingRollout]) -> dict[str, int]:
    return dict(num_sequences=len(rollouts), num_tokens=sum(r.trajectory.num_loss_tokens for r in rollouts))


def packed_causal(cu_seqlens: Sequence[int]) -> Attend:
    """Causal attention inside each packed sequence [cu[i], cu[i+1]); no mask and no padding is ever built."""
    lengths = [b - a for a, b in zip(cu_seqlens, cu_seqlens[1:], strict=False)]

    def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, layer: int) -> Tensor:
        groups = q.shape[1] // k.shape[1]
        k, v = repeat_kv(k, groups), repeat_kv(v, groups)
        parts = zip(q.split(lengths, 2), k.split(lengths, 2), v.split(lengths, 2), strict=True)
        return torch.cat([F.scaled_dot_product_attention(*p, is_causal=True, scale=scale) for p in parts], 2)

    return attend
