"""One optimizer step's gradients: each prompt once, replies streamed against it, the teacher in the same visits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from genevolve_fast.batch.balance import assign
from genevolve_fast.batch.groups import (
    Bundle,
    MicroBatch,
    PlannedBundle,
    PushedTokens,
    TrainingRollout,
    bundles,
    idle_prefix,
    idle_reply,
    pushed_tokens,
)
from genevolve_fast.ops import Objective, linear_grpo_sdl, linear_logprob, select_sdl
from genevolve_fast.policy.model import ImageFeatures, Policy
from genevolve_fast.policy.passes import Prefix, normed, predicting, reading, through_layers
from genevolve_fast.policy.weights import WeightSource
from genevolve_fast.profile.flops import GroupLengths, group_cost
from genevolve_fast.profile.shapes import ModelShape
from genevolve_fast.train.metrics import engine_mismatch
from genevolve_fast.train.ranks import Ranks
from genevolve_fast.train.strategies import Strategy

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
    strategy: Strategy | None = None,
    pause: Callable[[], None] = lambda: None,
) -> tuple[dict[str, float], dict[str, TokenTrace]]:
    """Add the gradient of DESIGN §2's total loss to `policy`; returns (metrics, traces by trajectory id).

    `rollouts` are all rollouts of the optimizer step that have loss tokens and did not fail: they set the
    denominators. Those without advantage, experience and reference term have no gradient and are not forwarded.
    The teacher has the policy's weights and rides its layer visits; with other weights (`teacher`) it is a pass of its
    own, as the reference is. workspace_mb: of `linear_grpo_sdl`. `phase(name)` is entered around prefix, student, head,
    backward, teacher and reference.

    With the ranks of a `strategy`, each takes its share of the groups, balanced by FLOPs; all are given the same
    rollouts and return the same metrics and traces. `pause` is called before every micro-batch, at the same one on
    all ranks: what it raises leaves the weights as they were.
    """
    strategy = strategy or Strategy()
    step = _Step(policy, rollouts, objective, temperature, reference, teacher, workspace_mb, phase, strategy, pause)
    live = forwarded(rollouts, reference is not None)
    planned = bundles(
        share_of(live, strategy.ranks, policy), images, policy.codec, policy.device, max_tokens=max_tokens,
        sdl_scope=objective.sdl_scope,
    )  # fmt: skip
    for bundle, slots, taught in _schedule(planned, strategy.ranks):
        step.add(bundle and bundle(), slots, taught)
    strategy.finish(policy)
    metrics, traces = step.results()
    metrics["actor/trained_share"] = len(live) / max(1, len(rollouts))
    metrics["actor/teacher_share"] = sum(bool(r.experience_ids) for r in rollouts) / max(1, len(rollouts))
    metrics |= engine_mismatch([r.trajectory for r in rollouts], {name: t.logps for name, t in traces.items()})
    return metrics, traces


def forwarded(rollouts: Sequence[TrainingRollout], reference: bool) -> list[TrainingRollout]:
    """Those that have a gradient."""
    return [r for r in rollouts if r.advantage or r.experience_ids or reference]


def share_of(rollouts: Sequence[TrainingRollout], ranks: Ranks, policy: Policy) -> list[TrainingRollout]:
    """This rank's rollouts: whole groups, whose prefix passes once, balanced by FLOPs."""
    if ranks.world == 1:
        return list(rollouts)
    groups: dict[str, list[TrainingRollout]] = {}
    for r in rollouts:
        groups.setdefault(r.trajectory.group_id, []).append(r)
    shape = ModelShape.from_config(policy.model.config.to_dict())
    shares = assign([group_cost(shape, _lengths(g)) for g in groups.values()], ranks.world)
    members = list(groups.values())
    return [r for i in shares[ranks.rank] for r in members[i]]


def _lengths(group: Sequence[TrainingRollout]) -> GroupLengths:
    trajectories = [r.trajectory for r in group]
    prefix = min(int(np.flatnonzero(t.loss_mask)[0]) for t in trajectories)
    return GroupLengths(
        prefix,
        tuple(len(t) - prefix for t in trajectories),
        tuple(len(r.experience_ids) for r in group),
        min(prefix, min(t.request_stop for t in trajectories)),
        tuple(t.num_loss_tokens for t in trajectories),
    )


def _schedule(planned: Sequence[PlannedBundle], ranks: Ranks) -> Iterator[tuple[PlannedBundle | None, int, bool]]:
    """(own bundle or none, micro-batches, whether any is taught) as the rank that has most: ranks stay in step."""
    (most,) = ranks.most([len(planned)])
    own = [*planned, *[None] * (most - len(planned))]
    numbers = [n for b in own for n in ((b.microbatches, int(b.taught)) if b else (0, 0))]
    everybodys = ranks.most(numbers) if numbers else []
    return zip(own, everybodys[::2], map(bool, everybodys[1::2]), strict=True)


class _Step:
    """An optimizer step in the making: gradients in the policy, metrics and traces on the device."""

    def __init__(
        self, policy, rollouts, objective, temperature, reference, teacher, workspace_mb, phase, strategy, pause
    ) -> None:
        self.policy, self.objective, self.temperature, self.workspace_mb = policy, objective, temperature, workspace_mb
        self.reference, self.teacher, self.phase = reference, teacher, phase
        self.strategy, self.pause = strategy, pause
        self.counts = dict(num_sequences=len(rollouts), num_tokens=sum(r.trajectory.num_loss_tokens for r in rollouts))
        self.totals = Totals(policy.device)
        self.pushed = PushedTokens()
        self.separate = 0  # rows of passes with other weights
        self.largest = 0  # student rows of a micro-batch
        self.seen: list[Seen] = []

    def add(self, bundle: Bundle | None, slots: int, taught: bool) -> None:
        """Prefix forward, every reply forward and backward, prefix backward, images backward.

        `slots` micro-batches on every rank: what this one lacks is an idle row where units are called in step.
        """
        policy, phase, in_step = self.policy, self.phase, self.strategy.in_step
        self.pause()
        if bundle is None and not in_step:
            for _ in range(slots):
                self.pause()
            return
        bundle = bundle or idle_bundle(policy.device)
        idle = [None] * (slots - len(bundle.microbatches))
        micros = [*bundle.microbatches, *idle]
        pushed = pushed_tokens(bundle)
        ref_logps = teacher_logps = [None] * len(micros)
        if self.reference is not None:
            with phase("reference"):
                ref_logps = score(self.reference, bundle, micros, self.temperature, teacher=False, in_step=in_step)
            self.separate += pushed.prefix + pushed.student
        if self.teacher is not None and (taught if in_step else pushed.teacher):
            with phase("teacher"):
                teacher_logps = score(self.teacher, bundle, micros, self.temperature, teacher=True, in_step=in_step)
            self.separate += pushed.prefix
        self.pushed += pushed
        features = policy.image_features(bundle.images)
        leaves = features and features.leaves()
        with policy.frame():
            with phase("prefix"):
                prefix = Prefix(policy, bundle.prefix, bundle.layout, bundle.last_rows, leaves)
            for micro, ref, other in zip(micros, ref_logps, teacher_logps, strict=True):
                self.pause()
                with policy.frame():
                    if micro is not None:
                        self.reply(micro, prefix, leaves, ref, other)
                    elif in_step:
                        self.idle(prefix)
            with phase("prefix"):
                prefix.backward(self.strategy.backward)
        if leaves is not None:
            leaves.hand_back(features)

    def idle(self, prefix: Prefix) -> None:
        """One row through everything that a micro-batch calls, with a gradient of zeros."""
        x = idle_states(self.policy, prefix)
        self.strategy.backward(self.policy.exit(partial(nothing, self.policy), x))

    def reply(self, micro: MicroBatch, prefix: Prefix, features: ImageFeatures | None, ref_logps, teacher_logps):
        """Forward and backward of some replies; the teacher rides along where its weights are the student's."""
        policy = self.policy
        self.largest = max(self.largest, len(micro.student))
        rides = micro.teacher if self.teacher is None else None
        with self.phase("student"):
            x, teacher_x = through_layers(
                policy,
                features,
                student_rows(policy, micro, prefix, self.strategy.in_step),
                reading(policy, rides, micro.teacher_layout, prefix, phase=partial(self.phase, "teacher")),
            )
        with self.phase("head"):
            states = predicting(prefix, x, micro.rows)
            taught = [] if teacher_x is None else [teacher_x[micro.teacher_rows]]
            del x, teacher_x  # the head needs none of their other rows
            loss, stats, logps = policy.exit(partial(self.head, micro, ref_logps, taught, teacher_logps), states)
            del states
        with self.phase("backward"):
            self.strategy.backward(loss)
        self.totals.add(loss.detach() / self.strategy.loss_scale, stats, logps.student, micro)
        self.seen.append(Seen(micro.members, micro.cu_seqlens, micro.eligible, *logps))

    def head(self, micro: MicroBatch, ref_logps, taught: list[Tensor], teacher_logps, states: Tensor):
        """The objective of states [M, H]; `taught` is emptied."""
        return linear_grpo_sdl(
            normed(self.policy, states),
            self.policy.head_weight,
            micro.targets,
            advantages=micro.advantages,
            cu_seqlens=micro.cu_seqlens,
            rollout_logps=micro.rollout_logps,
            ref_logps=ref_logps,
            **teacher_terms(self.policy, micro, taught, teacher_logps),
            sampling_mask=micro.sampling_mask,
            temperature=self.temperature,
            objective=self.objective,
            loss_scale=self.strategy.loss_scale,
            workspace_mb=self.workspace_mb,
            return_logps=True,
            **self.counts,
        )

    def results(self) -> tuple[dict[str, float], dict[str, TokenTrace]]:
        """Metrics and traces of all ranks."""
        traces = {name: t for seen in self.seen for name, t in trace(seen, self.objective).items()}
        everybodys = self.strategy.ranks.gather(
            (self.totals.numbers(), self.pushed, self.separate, self.largest, traces)
        )
        numbers, pushed, separate, largest, parts = zip(*everybodys, strict=True)
        pushed = sum(pushed, PushedTokens())
        tokens = {f"tokens/{part}": float(getattr(pushed, part)) for part in ("prefix", "student", "teacher")}
        tokens |= {"tokens/separate_passes": float(sum(separate)), "tokens/largest_microbatch": float(max(largest))}
        return combined(numbers) | tokens, {name: t for part in parts for name, t in part.items()}


def idle_bundle(device: torch.device) -> Bundle:
    """One row as prompt, no replies: what a rank without work passes through the layers."""
    return Bundle(*idle_prefix(device), (), ())


def idle_states(policy: Policy, prefix: Prefix) -> Tensor:
    """[1, H] the last layer's outputs of an idle row."""
    rows, layout = idle_reply(prefix.layout, policy.device)
    return through_layers(policy, None, reading(policy, rows, layout, prefix))[0]


def nothing(policy: Policy, states: Tensor) -> Tensor:
    """0, of which the head and everything before it gets a gradient of zeros."""
    targets = torch.zeros(len(states), dtype=torch.int64, device=states.device)
    return linear_logprob(normed(policy, states), policy.head_weight, targets).logps.sum() * 0


def student_rows(policy: Policy, micro: MicroBatch, prefix: Prefix, in_step: bool):
    """The rows of some replies; where ranks are in step an idle one, if all have one token only."""
    if in_step and not len(micro.student):
        rows, layout = idle_reply(prefix.layout, policy.device)
        return reading(policy, rows, layout, prefix)
    return reading(policy, micro.student, micro.student_layout, prefix)


@torch.no_grad()
def teacher_terms(policy: Policy, micro: MicroBatch, taught: list[Tensor], logps: Tensor | None) -> dict:
    """The teacher's part of `linear_grpo_sdl`: states that rode the visits, or log-probs of a pass apart."""
    if taught:
        return dict(teacher_hidden=normed(policy, taught.pop()), teacher_index=micro.teacher_index)
    if logps is not None:
        return dict(teacher_logps=logps, sdl_mask=micro.eligible)
    return {}


@torch.no_grad()
def score(
    source: WeightSource,
    bundle: Bundle,
    micros: Sequence[MicroBatch | None],
    temperature: float,
    *,
    teacher: bool,
    in_step: bool = False,
) -> list[Tensor | None]:
    """Log-probs [M] of each micro-batch's loss tokens under other weights: the student's rows, or the teacher's.

    A pass of its own with a prefix of its own. Rows without a teacher hold 0. in_step: an idle row takes the place of
    what has nothing to score.
    """
    with source.weights() as policy:
        features = policy.image_features(bundle.images)
        prefix = Prefix(policy, bundle.prefix, bundle.layout, bundle.last_rows, features)
        return [_score(policy, micro, prefix, features, temperature, teacher, in_step) for micro in micros]


def _score(
    policy: Policy,
    micro: MicroBatch | None,
    prefix: Prefix,
    features: ImageFeatures | None,
    temperature: float,
    teacher: bool,
    in_step: bool,
) -> Tensor | None:
    if micro is None or (teacher and micro.teacher is None):
        if in_step:
            policy.exit(partial(nothing, policy), idle_states(policy, prefix))
        return None if micro is None else torch.zeros_like(micro.rollout_logps)
    mask = micro.sampling_mask
    if not teacher:
        x, _ = through_layers(policy, features, student_rows(policy, micro, prefix, in_step))
        states = predicting(prefix, x, micro.rows)
        return policy.exit(partial(_logps, policy, micro.targets, temperature, mask), states)
    x, _ = through_layers(policy, features, reading(policy, micro.teacher, micro.teacher_layout, prefix))
    mask = mask and mask.of(micro.eligible)
    head = partial(_logps, policy, micro.targets[micro.eligible], temperature, mask)
    scored = policy.exit(head, x[micro.teacher_rows])
    return torch.zeros_like(micro.rollout_logps, dtype=scored.dtype).masked_scatter(micro.eligible, scored)


def _logps(policy: Policy, targets: Tensor, temperature: float, mask, states: Tensor) -> Tensor:
    hidden = normed(policy, states)
    return linear_logprob(hidden, policy.head_weight, targets, temperature=temperature, sampling_mask=mask).logps


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

    def numbers(self) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
        """Sums, weights of those that are means, and maxima, on the host."""
        return tuple({n: float(x) for n, x in part.items()} for part in (self.sums, self.weights, self.maxima))


def combined(parts: Sequence[tuple[Mapping[str, float], Mapping[str, float], Mapping[str, float]]]) -> dict[str, float]:
    """The metrics of several ranks' totals."""
    sums, weights = ({n: sum(p[i].get(n, 0.0) for p in parts) for p in parts for n in p[i]} for i in (0, 1))
    maxima = {n: max(p[2][n] for p in parts if n in p[2]) for p in parts for n in p[2]}
    return {n: v / max(1.0, weights[n]) if n in weights else v for n, v in sums.items()} | maxima
