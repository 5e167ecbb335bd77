"""One optimizer step's gradients: each prompt once, replies streamed against it, the teacher in the same visits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from genevolve_fast.batch.groups import Bundle, MicroBatch, PushedTokens, TrainingRollout, bundles, pushed_tokens
from genevolve_fast.ops import Objective, linear_grpo_sdl, linear_logprob, select_sdl
from genevolve_fast.policy.model import ImageFeatures, Policy
from genevolve_fast.policy.passes import Prefix, head_input, normed, reading, through_layers
from genevolve_fast.policy.weights import WeightSource
from genevolve_fast.train.metrics import engine_mismatch

Phase = Callable[[str], AbstractContextManager]


@dataclass(frozen=True)
class TokenTrace:
    """What a step saw of one rollout, per loss token: for the report. `teacher_logps` is NaN without a teacher."""

    logps: np.ndarray
    teacher_logps: np.ndarray
    selected: np.ndarray


class Seen(NamedTuple):
    """What a micro-batch leaves behind until the step is over: loss rows [M], none of its other rows."""

    members: tuple[TrainingRollout, ...]
    cu_seqlens: tuple[int, ...]
    eligible: Tensor
    logps: Tensor
    teacher_logps: Tensor


def accumulate_gradients(
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
    phase: Phase = nullcontext,
) -> tuple[dict[str, float], dict[str, TokenTrace]]:
    """Add the gradient of DESIGN §2's total loss to `policy`; returns (metrics, traces by trajectory id).

    `rollouts` are all rollouts of the optimizer step that have loss tokens and did not fail: they set the
    denominators. Those without advantage, experience and reference term have no gradient and are not forwarded.
    The teacher has the policy's weights and rides its layer visits; with other weights (`teacher`) it is a pass of its
    own, as the reference is. workspace_mb: of `linear_grpo_sdl`. `phase(name)` is entered around prefix, student, head,
    backward, teacher and reference.
    """
    step = _Step(policy, rollouts, objective, temperature, reference, teacher, workspace_mb, phase)
    live = forwarded(rollouts, reference is not None)
    for bundle in bundles(
        live, images, policy.codec, policy.device, max_tokens=max_tokens, sdl_scope=objective.sdl_scope
    ):
        step.add(bundle())
    metrics = step.metrics()
    metrics["actor/trained_share"] = len(live) / max(1, len(rollouts))
    metrics["actor/teacher_share"] = sum(bool(r.experience_ids) for r in rollouts) / max(1, len(rollouts))
    traces = step.traces()
    metrics |= engine_mismatch([r.trajectory for r in rollouts], {name: t.logps for name, t in traces.items()})
    return metrics, traces


def forwarded(rollouts: Sequence[TrainingRollout], reference: bool) -> list[TrainingRollout]:
    """Those that have a gradient."""
    return [r for r in rollouts if r.advantage or r.experience_ids or reference]


class _Step:
    """An optimizer step in the making: gradients in the policy, metrics and traces on the device."""

    def __init__(self, policy, rollouts, objective, temperature, reference, teacher, workspace_mb, phase) -> None:
        self.policy, self.objective, self.temperature, self.workspace_mb = policy, objective, temperature, workspace_mb
        self.reference, self.teacher, self.phase = reference, teacher, phase
        self.counts = dict(num_sequences=len(rollouts), num_tokens=sum(r.trajectory.num_loss_tokens for r in rollouts))
        self.totals = Totals(policy.device)
        self.pushed = PushedTokens()
        self.separate = 0  # rows of passes with other weights
        self.largest = 0  # student rows of a micro-batch
        self.seen: list[Seen] = []

    def add(self, bundle: Bundle) -> None:
        """Prefix forward, every reply forward and backward, prefix backward, images backward."""
        policy, phase = self.policy, self.phase
        pushed = pushed_tokens(bundle)
        ref_logps = teacher_logps = [None] * len(bundle.microbatches)
        if self.reference is not None:
            with phase("reference"):
                ref_logps = score(self.reference, bundle, self.temperature, teacher=False)
            self.separate += pushed.prefix + pushed.student
        if self.teacher is not None and pushed.teacher:
            with phase("teacher"):
                teacher_logps = score(self.teacher, bundle, self.temperature, teacher=True)
            self.separate += pushed.prefix
        self.pushed += pushed
        features = policy.image_features(bundle.images)
        leaves = features and features.leaves()
        with policy.frame():
            with phase("prefix"):
                prefix = Prefix(policy, bundle.prefix, bundle.layout, bundle.last_rows, leaves)
            for micro, ref, other in zip(bundle.microbatches, ref_logps, teacher_logps, strict=True):
                with policy.frame():
                    self.reply(micro, prefix, leaves, ref, other)
            with phase("prefix"):
                prefix.backward()
        if leaves is not None:
            leaves.hand_back(features)

    def reply(self, micro: MicroBatch, prefix: Prefix, features: ImageFeatures | None, ref_logps, teacher_logps):
        """Forward and backward of some replies; the teacher rides along where its weights are the student's."""
        policy = self.policy
        self.largest = max(self.largest, len(micro.student))
        rides = micro.teacher if self.teacher is None else None
        with self.phase("student"):
            x, teacher_x = through_layers(
                policy,
                features,
                reading(policy, micro.student, micro.student_layout, prefix),
                reading(policy, rides, micro.teacher_layout, prefix, phase=partial(self.phase, "teacher")),
            )
        with self.phase("head"):
            hidden = head_input(policy, prefix, x, micro.rows)
            distilled = teacher_terms(policy, micro, teacher_x, teacher_logps)
            del x, teacher_x  # the head needs none of their other rows
            loss, stats, logps = linear_grpo_sdl(
                hidden,
                policy.head_weight,
                micro.targets,
                advantages=micro.advantages,
                cu_seqlens=micro.cu_seqlens,
                rollout_logps=micro.rollout_logps,
                ref_logps=ref_logps,
                **distilled,
                sampling_mask=micro.sampling_mask,
                temperature=self.temperature,
                objective=self.objective,
                workspace_mb=self.workspace_mb,
                return_logps=True,
                **self.counts,
            )
            del hidden, distilled
        with self.phase("backward"):
            loss.backward()
        self.totals.add(loss, stats, logps.student, micro)
        self.seen.append(Seen(micro.members, micro.cu_seqlens, micro.eligible, *logps))

    def metrics(self) -> dict[str, float]:
        tokens = {f"tokens/{part}": float(getattr(self.pushed, part)) for part in ("prefix", "student", "teacher")}
        tokens |= {"tokens/separate_passes": float(self.separate), "tokens/largest_microbatch": float(self.largest)}
        return self.totals.metrics() | tokens

    def traces(self) -> dict[str, TokenTrace]:
        return {name: t for seen in self.seen for name, t in trace(seen, self.objective).items()}


@torch.no_grad()
def teacher_terms(policy: Policy, micro: MicroBatch, states: Tensor | None, logps: Tensor | None) -> dict:
    """The teacher's part of `linear_grpo_sdl`: hidden states that rode the visits, or log-probs of a pass apart."""
    if states is not None:
        hidden = normed(policy, states[micro.teacher_rows])
        return dict(teacher_hidden=hidden, teacher_index=micro.teacher_index)
    if logps is not None:
        return dict(teacher_logps=logps, sdl_mask=micro.eligible)
    return {}


@torch.no_grad()
def score(source: WeightSource, bundle: Bundle, temperature: float, *, teacher: bool) -> list[Tensor]:
    """Log-probs [M] of each micro-batch's loss tokens under other weights: the student's rows, or the teacher's.

    A pass of its own with a prefix of its own. Rows without a teacher hold 0.
    """
    with source.weights() as policy:
        features = policy.image_features(bundle.images)
        prefix = Prefix(policy, bundle.prefix, bundle.layout, bundle.last_rows, features)
        return [_score(policy, micro, prefix, features, temperature, teacher) for micro in bundle.microbatches]


def _score(
    policy: Policy,
    micro: MicroBatch,
    prefix: Prefix,
    features: ImageFeatures | None,
    temperature: float,
    teacher: bool,
) -> Tensor:
    mask = micro.sampling_mask
    if not teacher:
        x, _ = through_layers(policy, features, reading(policy, micro.student, micro.student_layout, prefix))
        hidden = head_input(policy, prefix, x, micro.rows)
        return linear_logprob(
            hidden, policy.head_weight, micro.targets, temperature=temperature, sampling_mask=mask
        ).logps
    out = torch.zeros_like(micro.rollout_logps)
    if micro.teacher is None:
        return out
    x, _ = through_layers(policy, features, reading(policy, micro.teacher, micro.teacher_layout, prefix))
    hidden, targets = normed(policy, x[micro.teacher_rows]), micro.targets[micro.eligible]
    mask = mask and mask.of(micro.eligible)
    scored = linear_logprob(hidden, policy.head_weight, targets, temperature=temperature, sampling_mask=mask).logps
    return out.to(scored.dtype).masked_scatter(micro.eligible, scored)


def trace(seen: Seen, objective: Objective) -> dict[str, TokenTrace]:
    """Each rollout's tokens as the step saw them, by trajectory id."""
    rows, device = len(seen.logps), seen.logps.device
    counts = [b - a for a, b in pairwise(seen.cu_seqlens)]
    seq_ids = torch.repeat_interleave(torch.tensor(counts), output_size=rows).to(device)
    selected = select_sdl(seen.logps, seen.teacher_logps, seen.eligible, seq_ids, objective)
    parts = zip(*(x.cpu().split(counts) for x in (seen.logps, seen.teacher_logps, selected)), strict=True)
    return {
        m.trajectory.id: TokenTrace(*(x.numpy() for x in part)) for m, part in zip(seen.members, parts, strict=True)
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

    def add(self, loss: Tensor, stats: Mapping[str, Tensor], logps: Tensor, micro: MicroBatch) -> None:
        count = torch.full((), float(len(logps)), device=self.device)  # torch.tensor would wait for the device
        eligible = micro.eligible.sum().float()
        mismatch = logps - micro.rollout_logps
        self._sum("loss", loss)
        for name in ("pg_loss", "kl_loss", "sdl_loss"):
            self._sum(f"actor/{name}", stats[name])
        for name in ("pg_clipfrac_low", "pg_clipfrac_high", "kl", "rollout_is_mean", "entropy"):
            self._mean(f"actor/{name}", stats[name], count)
        for name in ("sdl_kl", "sdl_rho_saturated", "sdl_selected_fraction"):
            self._mean(f"actor/{name}", stats[name], eligible)
        self._mean("rollout_corr/logp_difference", mismatch.mean(), count)
        self._mean("rollout_corr/logp_difference_abs", mismatch.abs().mean(), count)
        largest = stats["ratio_max"].detach()
        self.maxima["actor/ratio_max"] = torch.maximum(self.maxima.get("actor/ratio_max", largest), largest)

    def metrics(self) -> dict[str, float]:
        means = {n: v / self.weights[n].clamp(min=1) if n in self.weights else v for n, v in self.sums.items()}
        return {name: float(value) for name, value in (means | self.maxima).items()}
