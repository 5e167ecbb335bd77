"""The objective in plain PyTorch: the specification that every kernel is tested against. Works in float64."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from genevolve_fast.ops.masks import mean, where
from genevolve_fast.ops.objective import Objective
from genevolve_fast.ops.sampling_mask import SamplingMask

Stats = dict[str, Tensor]
STATS = (
    "pg_loss", "kl_loss", "sdl_loss", "pg_clipfrac_low", "pg_clipfrac_high", "kl", "sdl_kl", "sdl_rho_saturated",
    "sdl_selected_fraction", "ratio_max", "rollout_is_mean",
)  # fmt: skip


def logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    sampling_mask: SamplingMask | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(logp [rows], entropy [rows], lse [rows]) of z = softcap·tanh(scale·(h·Wᵀ + b)/softcap) / temperature.

    With `sampling_mask`, of z restricted to each row's set of ids.
    """
    z = hidden @ weight.T
    z = logit_scale * (z if bias is None else z + bias)
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    z = z / (temperature[:, None] if isinstance(temperature, Tensor) and temperature.ndim else temperature)
    if sampling_mask is not None:
        z = where(allowed(sampling_mask, z.shape[1]), z, -torch.inf)
    lse = torch.logsumexp(z, -1)
    log_p = z - lse[:, None]
    entropy = -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0)).sum(-1)  # 0·inf where a logit is -inf
    return log_p.gather(1, targets[:, None])[:, 0], entropy, lse


def allowed(mask: SamplingMask, vocabulary: int) -> Tensor:
    """bool [rows, V]: the ids of each row's set; all of them where it has none."""
    counts = mask.counts.to(mask.ids.device)
    inside = (counts == 0)[:, None].repeat(1, vocabulary)
    inside[torch.repeat_interleave(counts), mask.ids.long()] = True
    return inside


def select_sdl(logps: Tensor, teacher_logps: Tensor, eligible: Tensor, seq_ids: Tensor, objective: Objective) -> Tensor:
    """bool [rows]: of each sequence's n eligible rows the max(1, ceil(n·permille/1000)) with the widest |gap|.

    The gap is unclamped, ties go to the smaller position. `sdl_select = "batch"` treats the call as one sequence.
    """
    groups = torch.zeros_like(seq_ids) if objective.sdl_select == "batch" else seq_ids
    gap = (logps.detach() - teacher_logps).abs()
    gap = where(eligible, gap, -torch.inf)
    order = torch.sort(gap, descending=True, stable=True).indices
    order = order[torch.sort(groups[order], stable=True).indices]  # by group, widest gap first, then position
    sorted_groups = groups[order]
    rank = torch.arange(len(order), device=order.device) - torch.searchsorted(sorted_groups, sorted_groups)
    n = sequence_sums(eligible.long(), groups)
    keep = where(n > 0, torch.clamp(-(-n * objective.sdl_permille // 1000), min=1))
    selected = torch.zeros_like(eligible)
    selected[order] = rank < keep[order]
    return selected & eligible


def sequence_sums(values: Tensor, seq_ids: Tensor) -> Tensor:
    """[rows] the sum of `values` [rows] over each row's sequence, in int64 or fp64; nothing is synchronised."""
    order = torch.sort(seq_ids, stable=True).indices
    ids = seq_ids[order]
    first = torch.searchsorted(ids, ids)  # a sequence is named by its first place in the order
    kind = torch.float64 if values.is_floating_point() else torch.int64
    sums = torch.zeros(len(ids), dtype=kind, device=ids.device).index_add(0, first, values[order].to(kind))
    return torch.empty_like(sums).scatter(0, order, sums[first])


def grpo_sdl(
    logps: Tensor,
    *,
    advantages: Tensor,
    seq_ids: Tensor,
    old_logps: Tensor | None = None,
    rollout_logps: Tensor | None = None,
    ref_logps: Tensor | None = None,
    teacher_logps: Tensor | None = None,
    sdl_mask: Tensor | None = None,
    loss_mask: Tensor | None = None,
    num_sequences: int | None = None,
    num_tokens: int | None = None,
    objective: Objective | None = None,
) -> tuple[Tensor, Stats]:
    """Loss and statistics of DESIGN's total objective over loss-token rows; differentiable in `logps` [rows].

    advantages [sequences] or [rows]; seq_ids [rows] the sequence of each row; sdl_mask [rows] rows with a teacher that
    may be selected; loss_mask [rows] rows that count (default all). num_sequences and num_tokens are host numbers of
    the whole optimizer step over all ranks (default: this call). Policy loss: PPO's clip with its upper bound raised
    (arXiv 2402.03300, 2503.14476); KL: Schulman's k3; distillation: sampled-token reverse KL with the k3 value.
    Everything but `logps` is a constant, and rows outside loss_mask may hold anything. Raises ValueError naming the
    argument of a wrong shape, or the one that the objective needs and did not get.
    """
    o = objective or Objective()
    c = constants(
        logps, advantages=advantages, seq_ids=seq_ids, old_logps=old_logps, rollout_logps=rollout_logps,
        ref_logps=ref_logps, teacher_logps=teacher_logps, sdl_mask=sdl_mask, loss_mask=loss_mask,
        num_sequences=num_sequences, num_tokens=num_tokens, objective=o,
    )  # fmt: skip
    return total(where(c.keep, logps), c, o)


@dataclass(frozen=True)
class Constants:
    """What a call knows beside the policy's log-probs, each [rows]; masked rows hold 0, whatever was given."""

    keep: Tensor
    seq_ids: Tensor
    advantages: Tensor
    denominator: Tensor
    old: Tensor | None
    rollout: Tensor | None
    ref: Tensor | None
    teacher: Tensor | None
    eligible: Tensor
    sequence_weight: Tensor | None

    def rows(self, part: slice | Tensor) -> Constants:
        """The constants of some rows."""
        return Constants(*(None if x is None else x[part] for x in (getattr(self, f.name) for f in fields(self))))


def constants(
    logps: Tensor,
    *,
    advantages: Tensor,
    seq_ids: Tensor,
    old_logps: Tensor | None,
    rollout_logps: Tensor | None,
    ref_logps: Tensor | None,
    teacher_logps: Tensor | None,
    sdl_mask: Tensor | None,
    loss_mask: Tensor | None,
    num_sequences: int | None,
    num_tokens: int | None,
    objective: Objective,
) -> Constants:
    """Check and clean the arguments of `grpo_sdl`; of `logps` only shape, dtype and device matter."""
    o = objective
    _check(logps, advantages, seq_ids, old_logps, rollout_logps, ref_logps, teacher_logps, sdl_mask, loss_mask)
    if o.rollout_is != "none" and rollout_logps is None:
        raise ValueError(f"rollout_is {o.rollout_is!r} needs rollout_logps")
    if o.rollout_is == "sequence" and old_logps is None:
        raise ValueError("rollout_is 'sequence' needs old_logps: on policy the correction is per token")
    if o.kl_coef and ref_logps is None:
        raise ValueError(f"kl_coef {o.kl_coef} needs ref_logps; set kl_coef=0 to drop the term")
    keep = torch.ones_like(seq_ids, dtype=torch.bool) if loss_mask is None else loss_mask

    def clean(x: Tensor | None) -> Tensor | None:
        return None if x is None else where(keep, x.detach().to(logps.dtype))

    old, rollout, ref, teacher = map(clean, (old_logps, rollout_logps, ref_logps, teacher_logps))
    per_row = advantages if advantages.shape == logps.shape else advantages[seq_ids]
    denominator = _denominator(seq_ids, keep, num_sequences, num_tokens, o).to(logps.dtype).expand(logps.shape)
    by_sequence = _sequence_weight(old, rollout, seq_ids, o) if o.rollout_is == "sequence" else None
    eligible = _eligible(sdl_mask, teacher, keep)
    return Constants(keep, seq_ids, clean(per_row), denominator, old, rollout, ref, teacher, eligible, by_sequence)


def total(logps: Tensor, c: Constants, o: Objective) -> tuple[Tensor, Stats]:
    """(loss, stats) of rows whose masked log-probs are finite."""
    pg, kl, ratio, w = policy_losses(logps, c, o)
    sdl, gap, selected, rho = distillation(logps, c, w, o)
    terms = {
        "pg_loss": (pg / c.denominator).sum(),
        "kl_loss": (kl / c.denominator).sum() * o.kl_coef,
        "sdl_loss": (sdl / c.denominator).sum() * o.sdl_coef,
    }
    a, keep = c.advantages, c.keep
    stats = {name: value.detach() for name, value in terms.items()}
    stats |= {
        "pg_clipfrac_low": mean((ratio < 1 - o.clip_ratio_low) & (a < 0), keep),
        "pg_clipfrac_high": mean((ratio > 1 + o.clip_ratio_high) & (a > 0), keep),
        "kl": mean(kl.detach(), keep),
        "sdl_kl": mean(gap.detach(), c.eligible),
        "sdl_rho_saturated": mean(rho >= o.sdl_rho_cap, c.eligible),
        "sdl_selected_fraction": mean(selected, c.eligible),
        "ratio_max": where(keep, ratio.detach()).amax() if len(ratio) else terms["pg_loss"].detach(),
        "rollout_is_mean": mean(w, keep),
    }
    return terms["pg_loss"] + terms["kl_loss"] + terms["sdl_loss"], stats


def policy_losses(logps: Tensor, c: Constants, o: Objective) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Per row: (L_pg, KL without its coefficient, ratio, rollout weight); each row depends on itself only."""
    now = logps.detach()
    old = now if c.old is None else c.old
    w = rollout_weight(old, c, o)
    ratio = where(c.keep, logps - old).clamp(-o.log_ratio_clamp, o.log_ratio_clamp).exp()
    clipped = ratio.clamp(1 - o.clip_ratio_low, 1 + o.clip_ratio_high)
    surrogate = torch.minimum(ratio * c.advantages, clipped * c.advantages)
    if o.dual_clip is not None:
        surrogate = torch.where(c.advantages < 0, torch.maximum(surrogate, o.dual_clip * c.advantages), surrogate)
    pg = where(c.keep, -w * surrogate)
    if c.ref is None:
        return pg, torch.zeros_like(pg), ratio, w
    d = where(c.keep, c.ref - logps).clamp(-o.log_ratio_clamp, o.log_ratio_clamp)
    return pg, where(c.keep, d.exp() - 1 - d), ratio, w


def policy_slope(logps: Tensor, c: Constants, o: Objective) -> tuple[Tensor, Tensor]:
    """(d/d logp of L_pg + kl_coef · KL, rollout weight) [rows] in closed form, for a pass that makes d logits."""
    old = logps if c.old is None else c.old
    w = rollout_weight(old, c, o)
    difference = logps - old
    ratio = difference.clamp(-o.log_ratio_clamp, o.log_ratio_clamp).exp()
    surrogate, bound = ratio * c.advantages, ratio.clamp(1 - o.clip_ratio_low, 1 + o.clip_ratio_high) * c.advantages
    moves = (surrogate <= bound) & (difference.abs() <= o.log_ratio_clamp)
    if o.dual_clip is not None:
        moves &= (c.advantages >= 0) | (surrogate >= o.dual_clip * c.advantages)
    slope = where(moves & c.keep, -w * surrogate)
    if c.ref is not None:
        d = c.ref - logps
        slope += where(c.keep & (d.abs() <= o.log_ratio_clamp), o.kl_coef * (1 - d.exp()))
    return slope, w


def distillation_slope(logps: Tensor, c: Constants, w: Tensor, o: Objective) -> tuple[Tensor, Tensor]:
    """(d/d logp of sdl_coef · L_sdl, selected) [rows] in closed form; rows of whole sequences only."""
    _, gap, selected, rho = distillation(logps, c, w, o)
    slope = gap
    if o.sdl_grad == "k3":
        slope = where((logps - c.teacher).abs() <= o.sdl_clamp, 1 - torch.exp(-gap))
    return where(selected, o.sdl_coef * w * rho * slope), selected


def _check(logps, advantages, seq_ids, old, rollout, ref, teacher, sdl_mask, loss_mask) -> None:
    rows = tuple(logps.shape)
    if logps.ndim != 1:
        raise ValueError(f"logps must be [rows], got {rows}")
    if tuple(seq_ids.shape) != rows or seq_ids.dtype != torch.int64:
        raise ValueError(f"seq_ids must be int64 {list(rows)}, got {seq_ids.dtype} {list(seq_ids.shape)}")
    if advantages.ndim != 1:
        raise ValueError(f"advantages must be [sequences] or [rows], got {list(advantages.shape)}")
    per_row = {"old_logps": old, "rollout_logps": rollout, "ref_logps": ref, "teacher_logps": teacher}
    for name, value in (per_row | {"sdl_mask": sdl_mask, "loss_mask": loss_mask}).items():
        if value is not None and tuple(value.shape) != rows:
            raise ValueError(f"{name} must be {list(rows)} as logps, got {list(value.shape)}")
    for name, mask in (("sdl_mask", sdl_mask), ("loss_mask", loss_mask)):
        if mask is not None and mask.dtype != torch.bool:
            raise ValueError(f"{name} must be bool, got {mask.dtype}")


def rollout_weight(old: Tensor, c: Constants, o: Objective) -> Tensor:
    """Constant importance weight of the sampling engine's mismatch, truncated at rollout_is_cap."""
    if o.rollout_is == "none":
        return torch.ones_like(old)
    if c.sequence_weight is not None:
        return c.sequence_weight
    return _truncated(where(c.keep, old - c.rollout), o)


def _sequence_weight(old: Tensor, rollout: Tensor, seq_ids: Tensor, o: Objective) -> Tensor:
    return _truncated(sequence_sums(old - rollout, seq_ids).to(old.dtype), o)


def _truncated(difference: Tensor, o: Objective) -> Tensor:
    return difference.clamp(-o.log_ratio_clamp, o.log_ratio_clamp).exp().clamp(max=o.rollout_is_cap)


def _eligible(sdl_mask: Tensor | None, teacher_logps: Tensor | None, keep: Tensor) -> Tensor:
    if teacher_logps is None:
        return torch.zeros_like(keep)
    return keep if sdl_mask is None else keep & sdl_mask


def distillation(logps: Tensor, c: Constants, w: Tensor, o: Objective) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Per row: (loss carrying k3's value and the chosen slope, without its coefficient; gap; selected; ρ)."""
    now = logps.detach()
    if c.teacher is None:
        nothing = torch.zeros_like(now)
        return nothing, nothing, torch.zeros_like(c.keep), torch.ones_like(now)
    old = now if c.old is None else c.old
    teacher = torch.where(c.eligible, c.teacher, now)
    selected = select_sdl(now, teacher, c.eligible, c.seq_ids, o)
    ratio = where(c.eligible, now - old).clamp(-o.log_ratio_clamp, o.log_ratio_clamp)
    rho = ratio.exp().clamp(max=o.sdl_rho_cap)
    gap = (logps - teacher).clamp(-o.sdl_clamp, o.sdl_clamp)
    k3 = torch.exp(-gap) - 1 + gap
    if o.sdl_grad == "k3":
        loss = w * rho * k3
    else:
        slope = (w * rho * gap).detach()
        loss = (w * rho * k3).detach() + slope * (logps - now)
    return where(selected, loss), gap, selected, rho


def _denominator(
    seq_ids: Tensor, keep: Tensor, num_sequences: int | None, num_tokens: int | None, o: Objective
) -> Tensor:
    """What every row is divided by: a number, or [rows] for seq-mean-token-mean."""
    one = torch.ones((), dtype=torch.float64, device=seq_ids.device)
    if o.loss_agg_mode == "token-mean":
        return one * (num_tokens if num_tokens is not None else keep.sum().clamp(min=1))
    counts = sequence_sums(keep.long(), seq_ids).clamp(min=1)
    # every loss row of a sequence of n holds 1/n of it, so that the sum counts the sequences
    n = num_sequences if num_sequences is not None else (keep / counts.double()).sum().round().clamp(min=1)
    if o.loss_agg_mode == "seq-mean-token-mean":
        return one * n * counts
    if o.loss_agg_mode == "seq-mean-token-sum-norm":
        return one * n * o.max_length
    return one * n
