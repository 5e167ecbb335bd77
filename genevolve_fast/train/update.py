"""One optimizer step's gradients: packed student and teacher passes, loss rows only through the head."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from genevolve_fast.batch.packing import PackedBatch, pack, plan_microbatches, student_sequence, teacher_sequence
from genevolve_fast.ops import Objective, grpo_sdl, linear_logprob, select_sdl
from genevolve_fast.policy.attention import packed_causal
from genevolve_fast.policy.model import Policy
from genevolve_fast.trajectory import Trajectory


@dataclass(frozen=True)
class TrainingRollout:
    """A rollout that enters the loss, its advantage, and the ids its teacher reads after the request (or none)."""

    trajectory: Trajectory
    advantage: float
    experience_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class TokenTrace:
    """What a step saw of one rollout, per loss token: for the report. `teacher_logps` is NaN without a teacher."""

    logps: np.ndarray
    teacher_logps: np.ndarray
    selected: np.ndarray


OpenPhase = Callable[[str], AbstractContextManager]  # profile.meter.Meter.phase, or nothing


def score_rows(
    policy: Policy, batch: PackedBatch, temperature: float, entropy: bool = False, phase: OpenPhase = nullcontext
):
    """LogProbs of the batch's loss tokens under `policy`."""
    features = policy.image_features(batch.images)
    attend = packed_causal(batch.cu_seqlens)
    hidden = policy.hidden(batch.ids, batch.positions, attend, batch.image_rows, features)
    with phase("head"):
        return linear_logprob(
            hidden[0, batch.rows], policy.head_weight, batch.targets, temperature=temperature, return_entropy=entropy
        )


def accumulate_gradients(
    policy: Policy,
    rollouts: Sequence[TrainingRollout],
    images: Mapping[str, np.ndarray],
    objective: Objective,
    *,
    temperature: float,
    max_tokens: int,
    reference: Policy | None = None,
    phase: OpenPhase = nullcontext,
) -> tuple[dict[str, float], dict[str, TokenTrace]]:
    """Add the gradient of DESIGN §2's total loss to `policy`; returns (metrics, traces by trajectory id).

    `rollouts` are all rollouts of the optimizer step that have loss tokens and did not fail: they set the
    denominators. Those without advantage, experience and reference term have no gradient and are not forwarded.
    `phase(name)` is entered around the student's and the teacher's passes, the head and the backward.
    """
    num_sequences = len(rollouts)
    num_tokens = sum(r.trajectory.num_loss_tokens for r in rollouts)
    live = forwarded(rollouts, reference is not None)
    totals = Totals(policy.device)
    traces: dict[str, TokenTrace] = {}
    lengths = [len(r.trajectory) + len(r.experience_ids) for r in live]
    for group in plan_microbatches(lengths, max_tokens):
        members = [live[i] for i in group]
        rows = MicroBatch(policy, members, images)
        with phase("teacher"):
            teacher_logps = rows.teacher_logps(policy, temperature, phase)
        ref_logps = None
        if reference is not None:
            with torch.no_grad():
                ref_logps = score_rows(reference, rows.student, temperature).logps
        with phase("student"):
            scored = score_rows(policy, rows.student, temperature, entropy=True, phase=phase)
        sdl_mask = rows.sdl_mask(objective.sdl_scope)
        loss, stats = grpo_sdl(
            scored.logps,
            advantages=rows.advantages,
            seq_ids=rows.student.seq_ids,
            rollout_logps=rows.rollout_logps,
            ref_logps=ref_logps,
            teacher_logps=teacher_logps,
            sdl_mask=sdl_mask if teacher_logps is not None else None,
            num_sequences=num_sequences,
            num_tokens=num_tokens,
            objective=objective,
        )
        with phase("backward"):
            loss.backward()
        totals.add(loss, stats, scored, rows, sdl_mask)
        traces |= rows.traces(scored.logps.detach(), teacher_logps, sdl_mask, objective)
    metrics = totals.metrics()
    metrics["actor/trained_share"] = len(live) / max(1, num_sequences)
    metrics["actor/teacher_share"] = sum(bool(r.experience_ids) for r in rollouts) / max(1, num_sequences)
    return metrics, traces


def forwarded(rollouts: Sequence[TrainingRollout], reference: bool) -> list[TrainingRollout]:
    """Those that have a gradient."""
    return [r for r in rollouts if r.advantage or r.experience_ids or reference]


def largest_microbatch(rollouts: Sequence[TrainingRollout], max_tokens: int) -> int:
    """Student tokens of the largest micro-batch that `rollouts` are packed into; 0 without any."""
    lengths = [len(r.trajectory) + len(r.experience_ids) for r in rollouts]
    groups = plan_microbatches(lengths, max_tokens)
    return max((sum(len(rollouts[i].trajectory) for i in members) for members in groups), default=0)


class MicroBatch:
    """Packed student rows of some rollouts and, for those with experience, the teacher's rows of the same tokens."""

    def __init__(self, policy: Policy, members: Sequence[TrainingRollout], images: Mapping[str, np.ndarray]) -> None:
        codec, device = policy.codec, policy.device
        self.members = members
        students = [student_sequence(m.trajectory, images, codec.image_grid) for m in members]
        self.student = pack(students, codec.image_pad_id, codec.merge_size, device)
        teachers = [
            teacher_sequence(s, m.trajectory.request_stop, m.experience_ids)
            for s, m in zip(students, members, strict=True)
            if m.experience_ids
        ]
        self.teacher = pack(teachers, codec.image_pad_id, codec.merge_size, device) if teachers else None
        masks = [m.trajectory.loss_mask for m in members]
        tensor = lambda parts, dtype: torch.from_numpy(np.concatenate(parts)).to(device, dtype)  # noqa: E731
        self.rollout_logps = tensor(
            [m.trajectory.rollout_logps[mask] for m, mask in zip(members, masks, strict=True)], torch.float32
        )
        self.decision = tensor(
            [m.trajectory.decision_mask[mask] for m, mask in zip(members, masks, strict=True)], torch.bool
        )
        self.has_teacher = tensor(
            [np.full(int(mask.sum()), bool(m.experience_ids)) for m, mask in zip(members, masks, strict=True)],
            torch.bool,
        )
        self.advantages = torch.tensor([m.advantage for m in members], dtype=torch.float32, device=device)

    def teacher_logps(self, policy: Policy, temperature: float, phase: OpenPhase = nullcontext) -> Tensor | None:
        """[rows] the same weights' log-probs of the student's tokens after the experience; 0 without a teacher."""
        if self.teacher is None:
            return None
        with torch.no_grad():
            scored = score_rows(policy, self.teacher, temperature, phase=phase).logps
        return torch.zeros_like(self.has_teacher, dtype=scored.dtype).masked_scatter(self.has_teacher, scored)

    def sdl_mask(self, scope: str) -> Tensor:
        return self.has_teacher & self.decision if scope == "decision" else self.has_teacher

    def traces(
        self, logps: Tensor, teacher_logps: Tensor | None, sdl_mask: Tensor, objective: Objective
    ) -> dict[str, TokenTrace]:
        seq_ids = self.student.seq_ids
        if teacher_logps is None:
            teacher = torch.full_like(logps, torch.nan)
            selected = torch.zeros_like(self.has_teacher)
        else:
            teacher = torch.where(self.has_teacher, teacher_logps, torch.nan)
            selected = select_sdl(logps, teacher_logps, sdl_mask, seq_ids, objective)
        counts = [m.trajectory.num_loss_tokens for m in self.members]
        parts = zip(*(x.cpu().split(counts) for x in (logps, teacher, selected)), strict=True)
        return {
            m.trajectory.id: TokenTrace(*(x.numpy() for x in part)) for m, part in zip(self.members, parts, strict=True)
        }


class Totals:
    """Metrics of a step over its micro-batches, kept on the device until the step is over."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.sums: dict[str, Tensor] = {}
        self.weights: dict[str, Tensor] = {}
        self.maxima: dict[str, Tensor] = {}

    def _sum(self, name: str, value: Tensor) -> None:
        self.sums[name] = self.sums.get(name, torch.zeros((), device=self.device)) + value.detach()

    def _mean(self, name: str, value: Tensor, weight: Tensor) -> None:
        self._sum(name, value * weight)
        self.weights[name] = self.weights.get(name, torch.zeros((), device=self.device)) + weight

    def add(self, loss: Tensor, stats: Mapping[str, Tensor], scored, rows: MicroBatch, sdl_mask: Tensor) -> None:
        count = torch.tensor(float(len(scored.logps)), device=self.device)
        eligible = sdl_mask.sum().float()
        mismatch = scored.logps.detach() - rows.rollout_logps
        self._sum("loss", loss)
        for name in ("pg_loss", "kl_loss", "sdl_loss"):
            self._sum(f"actor/{name}", stats[name])
        for name in ("pg_clipfrac_low", "pg_clipfrac_high", "kl", "rollout_is_mean"):
            self._mean(f"actor/{name}", stats[name], count)
        for name in ("sdl_kl", "sdl_rho_saturated", "sdl_selected_fraction"):
            self._mean(f"actor/{name}", stats[name], eligible)
        self._mean("actor/entropy", scored.entropy.detach().mean(), count)
        self._mean("rollout_corr/logp_difference", mismatch.mean(), count)
        self._mean("rollout_corr/logp_difference_abs", mismatch.abs().mean(), count)
        largest = stats["ratio_max"].detach()
        self.maxima["actor/ratio_max"] = torch.maximum(self.maxima.get("actor/ratio_max", largest), largest)

    def metrics(self) -> dict[str, float]:
        means = {n: v / self.weights[n].clamp(min=1) if n in self.weights else v for n, v in self.sums.items()}
        return {name: float(value) for name, value in (means | self.maxima).items()}
