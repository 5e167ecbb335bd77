"""The whole objective from hidden states: logits, log-probs, losses and gradients in one sweep over the head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from genevolve_fast.ops import reference
from genevolve_fast.ops.blocks import Gradients, Head, Workspace, accumulator
from genevolve_fast.ops.epilogues import Softmax, Upstream
from genevolve_fast.ops.head import (
    check_devices,
    check_head,
    check_result,
    check_values,
    empty_gradients,
    full_precision,
)
from genevolve_fast.ops.masks import Rows, masked, mean, where
from genevolve_fast.ops.objective import Objective
from genevolve_fast.ops.reference import Constants
from genevolve_fast.ops.sampling_mask import RowSets, SamplingMask
from genevolve_fast.ops.shards import group_name, whole

STATS = (*reference.STATS, "entropy")
_DEFAULT = Objective()
_NO_LOGP = 1.0  # of a probability above 1: inside the operator, whose results are compared, NaN would not equal itself


class RowLogProbs(NamedTuple):
    """Log-probs [rows] that a call made, detached; NaN where a row entered no GEMM or has no teacher."""

    student: Tensor
    teacher: Tensor


def linear_grpo_sdl(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    advantages: Tensor,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    seq_ids: Tensor | None = None,
    old_logps: Tensor | None = None,
    rollout_logps: Tensor | None = None,
    ref_logps: Tensor | None = None,
    teacher_logps: Tensor | None = None,
    teacher_hidden: Tensor | None = None,
    teacher_index: Tensor | None = None,
    sdl_mask: Tensor | None = None,
    sampling_mask: SamplingMask | None = None,
    ignore_index: int = -100,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    num_sequences: float | Tensor | None = None,
    num_tokens: float | Tensor | None = None,
    loss_scale: float | Tensor = 1.0,
    main_grad: Tensor | None = None,
    objective: Objective | None = None,
    impl: str = "auto",
    workspace_mb: float | None = None,
    block_rows: int = 1024,
    check_targets: bool = False,
    process_group: ProcessGroup | None = None,
    vocab_start: int = 0,
    return_logps: bool = False,
) -> tuple[Tensor, reference.Stats] | tuple[Tensor, reference.Stats, RowLogProbs]:
    """(loss, stats) of GRPO + KL + distillation (`grpo_sdl`) straight from hidden [rows, H] and the head [V, H].

    targets [rows] int64. Rows lie sequence by sequence: `cu_seqlens` [sequences + 1], or `seq_ids` [rows] in any
    order. advantages [sequences] or [rows]; where both are the same number they are read by sequence with cu_seqlens,
    by row with seq_ids.
    The teacher's log-probs come as `teacher_logps` [rows], or from `teacher_hidden` [teacher rows, H] through the same
    head: row i of the student is row `teacher_index[i]` of the teacher, which no other row names, -1 where there is
    none. `sampling_mask` restricts the student's rows as in `linear_logprob`, and each teacher row as the student's row
    that it serves; log-probs that are given should be of the same sets. num_sequences and num_tokens are numbers of the
    whole optimizer step over all ranks (default: this call).
    Under torch.compile give cu_seqlens, counts and loss_scale that change from step to step as tensors.

    Gradients are made in the forward and multiplied by `loss_scale`; the backward only hands them out, so call it with
    an upstream gradient of 1 (another one gives NaN for hidden, without a synchronisation). With `main_grad` [V, H]
    fp32, dW (of a sharded weight: this rank's own, whole and not reduced) is added to it in the forward and `weight`
    gets no gradient of its own.

    GEMMs of 2·rows·H·V: 3 (2 with a frozen head), + 1 over the teacher's rows. The distillation of sequences whose rows
    are all in the workspace at once adds none; of others the selected rows (ceil(permille) of them) pass once more.
    Where sequences end must be known to the host for that: give cu_seqlens as a list or a CPU tensor. (On a GPU, with
    seq_ids and advantages by row, nobody knows how many sequences there are, and all rows pass again.) Under no_grad 1.
    Rows known to the host to have no gradient enter no GEMM: ignored ones on a CPU, and those of sequences whose
    advantage is 0, without KL and teacher, on a CPU or with cu_seqlens and advantages [sequences] on the host.
    stats: pg_loss, kl_loss, sdl_loss, clip fractions, kl, sdl_kl (mean clamped gap), sdl_rho_saturated,
    sdl_selected_fraction, ratio_max, rollout_is_mean, entropy; tensors, nothing is synchronised. Rows that enter no
    GEMM count as not clipped; entropy and ratio_max are of the others. return_logps adds `RowLogProbs`.
    Peak bytes above inputs and returned gradients: as `linear_logprob` + 160·rows. `process_group`, `vocab_start`,
    FSDP2 weights, `impl` and `check_targets`: as there. Raises ValueError naming the argument.
    """
    o = objective or _DEFAULT
    sets = None if sampling_mask is None else RowSets(*sampling_mask)
    head = Head(
        whole(weight), whole(bias), temperature, softcap, logit_scale, group_name(process_group), vocab_start, sets
    )  # fmt: skip
    check_head(hidden, head, targets, block_rows)
    _check_main_grad(hidden, head, main_grad, weight.requires_grad)
    _check_teacher(hidden, targets, teacher_logps, teacher_hidden, teacher_index, sdl_mask)
    if (cu_seqlens is None) == (seq_ids is None):
        raise ValueError("give cu_seqlens or seq_ids, one of them")
    if cu_seqlens is not None and not isinstance(cu_seqlens, Tensor):
        cu_seqlens = torch.tensor(list(cu_seqlens), dtype=torch.int64)  # stays on the host, which reads it
    rows = dict(
        seq_ids=seq_ids, old_logps=old_logps, rollout_logps=rollout_logps, ref_logps=ref_logps,
        teacher_logps=teacher_logps, teacher_hidden=teacher_hidden, teacher_index=teacher_index, sdl_mask=sdl_mask,
    )  # fmt: skip
    check_devices(hidden, **rows, main_grad=main_grad)
    count = "num_tokens" if o.loss_agg_mode == "token-mean" else "num_sequences"
    counted = _number(count, num_tokens if count == "num_tokens" else num_sequences, hidden)
    scale = _number("loss_scale", loss_scale, hidden)
    needs = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, head.weight, head.bias)]
    bare = lambda x: None if x is None else x.detach()  # noqa: E731
    with torch.no_grad():
        loss, d_hidden, d_weight, d_bias, stats, logps = _sweep(
            hidden.detach(), *map(bare, head.arguments()[:2]), *head.arguments()[2:], targets, ignore_index,
            advantages.detach(), cu_seqlens, *map(bare, rows.values()), counted, scale, main_grad, o.encoded, *needs,
            check_targets, impl, workspace_mb, block_rows,
        )  # fmt: skip
    if any(needs):
        grads = [x if need else None for x, need in zip((d_hidden, d_weight, d_bias), needs, strict=True)]
        own = head.weight
        if main_grad is not None:
            own = grads[1] = None
        loss = _HandOut.apply(loss, hidden, own, head.bias, *grads)
    stats = dict(zip(STATS, stats.unbind(), strict=True))
    if not return_logps:
        return loss, stats
    return loss, stats, RowLogProbs(*logps.masked_fill(logps == _NO_LOGP, torch.nan).unbind())


def _number(name: str, x: float | Tensor | None, hidden: Tensor) -> Tensor | None:
    """A positive number as a tensor []: numbers that change between calls then compile once."""
    if x is None or isinstance(x, Tensor):
        return x
    if not x > 0:
        raise ValueError(f"{name} must be positive, got {x}")
    return torch.full((), float(x), dtype=torch.float64, device=hidden.device)


def _check_main_grad(hidden: Tensor, head: Head, main_grad: Tensor | None, trains: bool) -> None:
    if main_grad is None:
        return
    kind, shape = accumulator(hidden), head.weight.shape
    if type(main_grad) is not Tensor or main_grad.shape != shape or main_grad.dtype != kind:
        got = f"{type(main_grad).__name__} {main_grad.dtype} {list(main_grad.shape)}"
        raise ValueError(f"main_grad must be a plain tensor {kind} {list(shape)}, got {got}")
    if not trains:
        raise ValueError("main_grad is given, but weight requires no gradient")


def _check_teacher(
    hidden: Tensor, targets: Tensor, logps, states: Tensor | None, index: Tensor | None, sdl_mask: Tensor | None
) -> None:
    if sdl_mask is not None and (sdl_mask.shape != targets.shape or sdl_mask.dtype != torch.bool):
        raise ValueError(f"sdl_mask must be bool {list(targets.shape)}, got {sdl_mask.dtype} {list(sdl_mask.shape)}")
    if sdl_mask is not None and logps is None and states is None:
        raise ValueError("sdl_mask says which rows have a teacher: give teacher_logps or teacher_hidden too")
    if states is None:
        if index is not None:
            raise ValueError("teacher_index belongs to teacher_hidden")
        return
    if logps is not None or index is None:
        raise ValueError("teacher_hidden needs teacher_index, and excludes teacher_logps")
    if states.ndim != 2 or states.shape[1] != hidden.shape[1] or states.dtype != hidden.dtype:
        raise ValueError(
            f"teacher_hidden must be {hidden.dtype} [rows, {hidden.shape[1]}], got {states.dtype} {list(states.shape)}"
        )
    if index.shape != targets.shape or index.dtype != torch.int64:
        raise ValueError(f"teacher_index must be int64 {list(targets.shape)}, got {index.dtype} {list(index.shape)}")


# --- what the host knows ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Sequences:
    """Which sequence each row belongs to, and how many there are at most; borders where the host knows them."""

    ids: Tensor
    count: int
    borders: list[int] | None

    @classmethod
    def of(cls, targets: Tensor, cu_seqlens: Tensor | None, seq_ids: Tensor | None, advantages: Tensor) -> _Sequences:
        """Raises ValueError naming the argument."""
        rows, device = len(targets), targets.device
        if cu_seqlens is None:
            return cls(seq_ids, len(advantages), None)
        if cu_seqlens.device.type != "cpu":
            return cls(ids_of(cu_seqlens, rows), len(cu_seqlens) - 1, None)
        borders = cu_seqlens.tolist()
        if not borders or borders[0] != 0 or borders[-1] != rows or any(a > b for a, b in pairwise(borders)):
            raise ValueError(f"cu_seqlens must rise from 0 to the number of rows {rows}, got {_shortened(borders)}")
        ids = torch.empty(rows, dtype=torch.int64, device=device)
        for i, (a, b) in enumerate(pairwise(borders)):
            ids[a:b] = i  # a copy of the list to a GPU would synchronise
        return cls(ids, len(borders) - 1, borders)

    def by_row(self, advantages: Tensor, by_sequence: bool, check: bool) -> Tensor:
        """advantages [sequences] or [rows] as [rows] on the device. Raises ValueError naming the argument."""
        rows, device = len(self.ids), self.ids.device
        if advantages.device != device:
            advantages = advantages.pin_memory().to(device, non_blocking=True)
        if not by_sequence:
            return advantages
        if check and ((self.ids < 0) | (self.ids >= len(advantages))).any():
            raise ValueError(f"seq_ids must lie in [0, {len(advantages)}), the number of advantages, or give [{rows}]")
        return advantages[self.ids]


def ids_of(cu_seqlens: Tensor, rows: int) -> Tensor:
    """[rows] the sequence of each row, from borders on the device."""
    places = torch.arange(rows, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), places, right=True)


def _is_by_sequence(advantages: Tensor, targets: Tensor, cu_seqlens: Tensor | None) -> bool:
    """Whether advantages are [sequences], not [rows]; by row if both are the same number and only seq_ids are known."""
    if advantages.ndim != 1:
        raise ValueError(f"advantages must be [sequences] or [rows], got {list(advantages.shape)}")
    if cu_seqlens is None:
        return advantages.shape != targets.shape
    if len(advantages) == len(cu_seqlens) - 1:
        return True
    if advantages.shape != targets.shape:
        raise ValueError(
            f"advantages must be [{len(cu_seqlens) - 1}] for the sequences of cu_seqlens, or [{len(targets)}] for the "
            f"rows, got {list(advantages.shape)}"
        )
    return False


def _dropped(advantages: Tensor, by_sequence: bool, borders: list[int] | None, c_ref, teacher) -> list[int]:
    """Sequences that the host knows to have no gradient."""
    if borders is None or not by_sequence or advantages.device.type != "cpu" or not (c_ref is None and teacher is None):
        return []
    return [i for i, a in enumerate(advantages.tolist()) if a == 0]


def _shortened(numbers: list[int]) -> str:
    return str(numbers) if len(numbers) <= 8 else f"[{', '.join(map(str, numbers[:4]))}, … {numbers[-1]}]"


def _without(borders: list[int], dropped: list[int], device: torch.device) -> tuple[Tensor, list[int]]:
    """(rows of the other sequences, their borders among themselves)."""
    gone, kept, after = set(dropped), [], [0]
    for i, (a, b) in enumerate(pairwise(borders)):
        if i not in gone:
            kept.append(torch.arange(a, b, device=device))
        after.append(after[-1] + (0 if i in gone else b - a))
    return torch.cat(kept) if kept else torch.empty(0, dtype=torch.int64, device=device), after


def _live_rows(c: Constants) -> tuple[Tensor | None, bool]:
    """(indices of the rows that can have a gradient or None for all, whether all of these are known to count).

    Rows are left out where finding them costs no synchronisation.
    """
    if c.keep.device.type != "cpu":
        return None, False
    live = c.keep if c.ref is not None else c.keep & ((c.advantages != 0) | c.eligible)
    return (None if bool(live.all()) else live.nonzero()[:, 0]), True


# --- the sweep --------------------------------------------------------------------------------------------------------


@torch.library.custom_op(
    "genevolve_fast::linear_grpo_sdl",
    mutates_args=("main_grad",),
    schema=f"(Tensor hidden, {Head.SCHEMA}, Tensor targets, int ignore_index, Tensor advantages, Tensor? cu_seqlens, "
    "Tensor? seq_ids, Tensor? old_logps, Tensor? rollout_logps, Tensor? ref_logps, Tensor? teacher_logps, "
    "Tensor? teacher_hidden, Tensor? teacher_index, Tensor? sdl_mask, Tensor? count, Tensor? loss_scale, "
    "Tensor(a!)? main_grad, str objective, "
    f"bool need_hidden, bool need_weight, bool need_bias, bool check, {Workspace.SCHEMA}) "
    "-> (Tensor loss, Tensor d_hidden, Tensor d_weight, Tensor d_bias, Tensor stats, Tensor logps)",
)
def _sweep(
    hidden, weight, bias, row_temperature, temperature, softcap, logit_scale, group, vocab_start, mask_ids, mask_counts,
    mask_owners, targets, ignore_index, advantages, cu_seqlens, seq_ids, old_logps, rollout_logps, ref_logps,
    teacher_logps, teacher_hidden, teacher_index, sdl_mask, count, loss_scale, main_grad, objective, need_hidden,
    need_weight, need_bias, check, impl, workspace_mb, block_rows,
):  # fmt: skip
    head = Head.of(
        weight, bias, row_temperature, temperature, softcap, logit_scale, group, vocab_start, mask_ids, mask_counts,
        mask_owners,
    )  # fmt: skip
    o, size = Objective.decode(objective), (impl, workspace_mb, block_rows)
    check = check or hidden.device.type == "cpu"
    with full_precision(hidden):
        if check:
            check_values(hidden, head, targets, ignore_index)
        by_sequence = _is_by_sequence(advantages, targets, cu_seqlens)
        sequences = _Sequences.of(targets, cu_seqlens, seq_ids, advantages)
        if teacher_hidden is not None:
            teacher_logps, has = _teacher(teacher_hidden, teacher_index, targets, head, ignore_index, check, size)
            sdl_mask = has if sdl_mask is None else has & sdl_mask
        c = reference.constants(
            torch.empty(targets.shape, dtype=accumulator(hidden), device=hidden.device),
            advantages=sequences.by_row(advantages, by_sequence, check),
            seq_ids=sequences.ids,
            old_logps=old_logps,
            rollout_logps=rollout_logps,
            ref_logps=ref_logps,
            teacher_logps=teacher_logps,
            sdl_mask=sdl_mask,
            loss_mask=targets != ignore_index,
            num_sequences=count,
            num_tokens=count,
            objective=o,
        )
        (live, all_kept), borders = _live_rows(c), sequences.borders
        if live is not None and borders is not None:
            borders = torch.searchsorted(live, torch.tensor(borders)).tolist()
        elif dropped := _dropped(advantages, by_sequence, borders, ref_logps, teacher_logps):
            live, borders = _without(borders, dropped, hidden.device)
        needs = (need_hidden, need_weight, need_bias)
        rows = _Rows(c, live, all_kept, borders, sequences.count)
        sweep = _Sweep(hidden, targets, head, rows, o, size, needs, loss_scale, main_grad)
        sweep.run(check)
        loss, stats = sweep.total()
        return loss, *sweep.grads.results(), stats, sweep.row_logps()


@_sweep.register_fake
def _(hidden, weight, bias, *arguments):
    main_grad, (need_hidden, need_weight, need_bias) = arguments[-9], arguments[-7:-4]
    grads = empty_gradients(hidden, weight, bias, (need_hidden, need_weight and main_grad is None, need_bias))
    kind = accumulator(hidden)
    stats, logps = hidden.new_empty(len(STATS), dtype=kind), hidden.new_empty(2, len(hidden), dtype=kind)
    return hidden.new_empty((), dtype=kind), *grads, stats, logps


def _teacher(hidden, index, targets, head: Head, ignore_index: int, check: bool, size) -> tuple[Tensor, Tensor]:
    """(the teacher's log-probs of the student's targets [rows], which rows have one), from one GEMM over its rows.

    A row of the teacher serves one row of the student: an index out of range or given twice is an error, or NaN.
    """
    rows = len(hidden)
    has = (index >= 0) & (targets != ignore_index)
    slot = where(has & (index < rows), index, rows)  # rows without a teacher go to one slot behind the last
    times = torch.zeros(rows + 1, dtype=torch.int64, device=index.device).scatter_add(0, slot, torch.ones_like(slot))
    wrong = has & ((index >= rows) | (times[slot] > 1))
    if check and wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"teacher_index[{row}] is {int(index[row])}: neither -1 nor a row of teacher_hidden [{rows}] that no other "
            "row names; give a shared row once for each"
        )

    def by_teacher_row(x: Tensor, fill) -> Tensor:
        return torch.full((rows + 1,), fill, dtype=x.dtype, device=x.device).scatter(0, slot, x)[:-1]

    tau = head.temperature
    if isinstance(tau, Tensor) and tau.ndim:
        tau = by_teacher_row(tau, 1.0)
    sets = head.sets
    if sets is not None:
        sets = replace(sets, owners=by_teacher_row(sets.owners_of(slice(None)), len(sets.counts)))
    logps = torch.ops.genevolve_fast.linear_logprob(
        hidden, *replace(head, temperature=tau, sets=sets).arguments(), by_teacher_row(targets, ignore_index),
        ignore_index, False, 0, False, *size,
    )[0]  # fmt: skip
    return where(~wrong, torch.cat([logps, logps.new_zeros(1)])[slot], torch.nan), has


@dataclass(frozen=True)
class _Rows:
    """What is known of a call's rows: constants of all, which are live, their borders, how many sequences at most."""

    constants: Constants
    live: Tensor | None
    all_kept: bool
    borders: list[int] | None
    sequences: int


class _Sweep:
    """One call's pass over the head: log-probs of all live rows, and the gradients of those that need one."""

    def __init__(self, hidden, targets, head, rows: _Rows, o: Objective, size, needs, scale, main_grad) -> None:
        self.hidden, self.o, self.scale = hidden, o, scale
        self.live, self.all, self.all_kept, self.sequences = rows.live, rows.constants, rows.all_kept, rows.sequences
        c, live, borders = rows.constants, rows.live, rows.borders
        self.c = c if live is None else c.rows(live)
        self.rows = len(self.c.keep)
        self.given = targets
        self.targets = where(self.c.keep, targets if live is None else targets[live])
        # selecting over the call is selecting within one sequence that holds all of it
        self.borders = [0, self.rows] if o.sdl_select == "batch" else borders
        self.work = Workspace(self.rows, hidden, head, *size)
        self.needs = any(needs)
        self.grads = Gradients(self.work, hidden, needs, main_grad)
        self.logps, self.entropy = torch.zeros(2, self.rows, dtype=self.work.kind, device=hidden.device)

    def run(self, check: bool) -> None:
        """Visit the rows block by block, then once more the selected rows of sequences that no visit held whole."""
        distils = self.c.teacher is not None and self.o.sdl_coef > 0
        cut: list[slice] = []
        for visit in self.work.visits(self.rows):
            softmax, block = self._softmax(visit, entropy=True)
            self.logps[visit], self.entropy[visit] = softmax.logps, softmax.entropy
            if check:
                kept = where(self.c.keep[visit], softmax.logps)
                check_result(kept, self.hidden, self.work.head, self._place(visit), self.given)
            if not self.needs:
                del softmax, block  # before the next visit makes its own
                continue
            slope, w = reference.policy_slope(self.logps[visit], self.c.rows(visit), self.o)
            if distils:
                inner, rest = self._whole_sequences(visit)
                cut += rest
            if distils and inner.start < inner.stop:
                part = slice(inner.start - visit.start, inner.stop - visit.start)
                slope[part] += reference.distillation_slope(self.logps[inner], self.c.rows(inner), w[part], self.o)[0]
            self._add(visit, softmax, block, slope / self.c.denominator[visit])
            del softmax, block
        if cut:
            self._distil(cut)

    def total(self) -> tuple[Tensor, Tensor]:
        """(loss, its statistics [STATS])."""
        loss, stats = reference.total(self.logps, self.c, self.o)
        stats["entropy"] = mean(self.entropy, self.c.keep)
        for name in ("pg_clipfrac_low", "pg_clipfrac_high"):  # rows left out are not clipped, but they count
            stats[name] = stats[name] * (self.c.keep.sum() / self.all.keep.sum().clamp(min=1))
        if self.all.old is not None:
            stats["rollout_is_mean"] = mean(reference.rollout_weight(self.all.old, self.all, self.o), self.all.keep)
        return self._scaled(loss), torch.stack([stats[name].to(loss.dtype) for name in STATS])

    def row_logps(self) -> Tensor:
        """[2, rows] log-probs of the student and of the teacher, _NO_LOGP where there is none."""
        out = torch.full((2, len(self.all.keep)), _NO_LOGP, dtype=self.logps.dtype, device=self.logps.device)
        logps = where(self.c.keep, self.logps, _NO_LOGP)
        if self.live is None:
            out[0] = logps
        else:
            out[0, self.live] = logps
        if self.all.teacher is not None:
            out[1] = where(self.all.eligible, self.all.teacher.to(out.dtype), _NO_LOGP)
        return out

    def _scaled(self, x: Tensor) -> Tensor:
        """Times loss_scale, in x's dtype."""
        return x if self.scale is None else (x * self.scale).to(x.dtype)

    def _place(self, rows: Rows) -> Rows:
        """Where some live rows stand among the caller's rows."""
        return rows if self.live is None else self.live[rows]

    def _softmax(self, rows: Rows, entropy: bool = False) -> tuple[Softmax, Tensor]:
        place = self._place(rows)
        block = masked(self.hidden[place], self.c.keep[rows], self.all_kept)
        return self.work.softmax(block, self.targets[rows], place, entropy), block

    def _add(self, rows: Rows, softmax: Softmax, block: Tensor, slope: Tensor, again: bool = False) -> None:
        place = self._place(rows)
        (d,) = self.work.d_logits(softmax, self.targets[rows], place, Upstream(logps=self._scaled(slope)))
        self.grads.add(d, block, place, again)

    def _whole_sequences(self, visit: slice) -> tuple[slice, list[slice]]:
        """(rows of the sequences that lie wholly in the visit, its other rows); selecting all needs no whole ones."""
        if self.o.sdl_permille == 1000:
            return visit, []
        if self.borders is None:
            return slice(visit.start, visit.start), [visit]
        inside = [b for b in self.borders if visit.start <= b <= visit.stop] or [visit.start]
        whole = slice(inside[0], inside[-1])
        rest = (slice(visit.start, whole.start), slice(whole.stop, visit.stop))
        return whole, [r for r in rest if r.start < r.stop]

    def _distil(self, cut: list[slice]) -> None:
        """Add the distillation of the sequences that the visits cut: d logits is linear in the slope."""
        rows = torch.cat([torch.arange(r.start, r.stop, device=self.hidden.device) for r in cut])
        c, logps = self.c.rows(rows), self.logps[rows]
        w = reference.policy_slope(logps, c, self.o)[1]
        slope, selected = reference.distillation_slope(logps, c, w, self.o)
        slope = slope / c.denominator
        chosen = self._chosen(selected, len(cut))
        for part in self.work.visits(len(chosen)):
            again = rows[chosen[part]]
            self._add(again, *self._softmax(again), slope[chosen[part]], again=True)

    def _chosen(self, selected: Tensor, pieces: int) -> Tensor:
        """Indices of the selected rows; on a GPU as many as can be selected, the rest with slope 0."""
        if selected.device.type == "cpu":
            return selected.nonzero()[:, 0]
        sequences = pieces if self.borders is not None else self.sequences
        bound = -(-len(selected) * self.o.sdl_permille // 1000) + sequences
        return torch.sort(selected.byte(), descending=True, stable=True).indices[: min(len(selected), bound)]


class _HandOut(torch.autograd.Function):
    """A loss whose gradients are already there."""

    @staticmethod
    def forward(ctx, loss, hidden, weight, bias, *grads):
        ctx.save_for_backward(*grads)
        return loss.clone()

    @staticmethod
    def backward(ctx, upstream):
        d_hidden, d_weight, d_bias = ctx.saved_tensors
        if d_hidden is None:  # the head's gradients have gone nowhere yet: any upstream gradient will do
            scaled = (None if x is None else x * upstream.to(x.dtype) for x in (d_weight, d_bias))
            return None, None, *scaled, None, None, None
        # an upstream gradient other than 1 would have needed main_grad scaled too: say so, without a sync
        poison = where(upstream == 1, torch.ones_like(upstream), torch.nan).to(d_hidden.dtype)
        with torch.autograd._unsafe_preserve_version_counter(d_hidden):  # a copy would double dH
            d_hidden.mul_(poison)
        return None, d_hidden, d_weight, d_bias, None, None, None
