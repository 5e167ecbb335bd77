"""The whole objective from hidden states: logits, log-probs, losses and gradients in one sweep over the head."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from genevolve_fast.ops import reference
from genevolve_fast.ops.blocks import Gradients, Head, Workspace, accumulator
from genevolve_fast.ops.epilogues import Softmax, Upstream
from genevolve_fast.ops.head import (
    check_head,
    check_result,
    check_values,
    empty_gradients,
    full_precision,
)
from genevolve_fast.ops.masks import Rows, mean, where
from genevolve_fast.ops.objective import Objective
from genevolve_fast.ops.reference import Constants
from genevolve_fast.ops.shards import group_name, whole_weight

STATS = (*reference.STATS, "entropy")
_DEFAULT = Objective()


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
    ignore_index: int = -100,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    num_sequences: float | Tensor | None = None,
    num_tokens: float | Tensor | None = None,
    loss_scale: float = 1.0,
    main_grad: Tensor | None = None,
    objective: Objective | None = None,
    impl: str = "auto",
    workspace_mb: float | None = None,
    block_rows: int = 1024,
    check_targets: bool = False,
    process_group: ProcessGroup | None = None,
    vocab_start: int = 0,
) -> tuple[Tensor, reference.Stats]:
    """(loss, stats) of GRPO + KL + distillation (`grpo_sdl`) straight from hidden [rows, H] and the head [V, H].

    targets [rows] int64. Rows lie sequence by sequence: `cu_seqlens` [sequences + 1], or `seq_ids` [rows] in any
    order. advantages [sequences] or [rows]; where both are the same number they are read by row.
    The teacher's log-probs come as `teacher_logps` [rows], or from `teacher_hidden` [teacher rows, H] through the same
    head: row i of the student is row `teacher_index[i]` of the teacher, -1 where there is none. num_sequences and
    num_tokens are host numbers of the whole optimizer step over all ranks (default: this call).

    Gradients are made in the forward and multiplied by `loss_scale`; the backward only hands them out, so call it with
    an upstream gradient of 1 (another one gives NaN for hidden, without a synchronisation). With `main_grad` [V, H]
    fp32, dW is added to it in the forward and `weight` gets no gradient of its own.

    GEMMs of 2·rows·H·V: 3 (2 with a frozen head), + 1 over the teacher's rows. The distillation of sequences whose rows
    are all in the workspace at once adds none; of others the selected rows (ceil(permille) of them) pass once more.
    Where sequences end must be known to the host for that: give cu_seqlens as a list or a CPU tensor. Under no_grad 1.
    Rows known to the host to have no gradient enter no GEMM: ignored ones on a CPU, and those of sequences whose
    advantage is 0, without KL and teacher, on a CPU or with cu_seqlens and advantages [sequences] on the host.
    stats: pg_loss, kl_loss, sdl_loss, clip fractions, kl, sdl_kl (mean clamped gap), sdl_rho_saturated,
    sdl_selected_fraction, ratio_max, rollout_is_mean, entropy; tensors, nothing is synchronised. Rows that enter no
    GEMM count as not clipped and are left out of the other means.
    Peak bytes above inputs and returned gradients: as `linear_logprob` + 100·rows. `process_group`, `vocab_start`,
    FSDP2 weights, `impl` and `check_targets`: as there. Raises ValueError naming the argument.
    """
    o = objective or _DEFAULT
    weight = whole_weight(weight)
    head = Head(weight, bias, temperature, softcap, logit_scale, group_name(process_group), vocab_start)
    check_head(hidden, head, targets, block_rows)
    _check_gradients(hidden, weight, main_grad)
    _check_teacher(hidden, targets, teacher_logps, teacher_hidden, teacher_index)
    if (cu_seqlens is None) == (seq_ids is None):
        raise ValueError("give cu_seqlens or seq_ids, one of them")
    needs = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, weight, bias)]
    borders, cu_seqlens = _host_borders(cu_seqlens, hidden.device)
    dropped, advantages = _host_zeros(advantages, borders, o, ref_logps, teacher_logps, teacher_hidden, hidden.device)
    with torch.no_grad():
        count = num_tokens if o.loss_agg_mode == "token-mean" else num_sequences
        by_tensor, by_host = (
            (count, None) if isinstance(count, Tensor) else (None, None if count is None else float(count))
        )
        bare = [None if x is None else x.detach() for x in head.arguments()[:2]]
        optional = (
            cu_seqlens, seq_ids, old_logps, rollout_logps, ref_logps, teacher_logps, teacher_hidden, teacher_index,
            sdl_mask,
        )  # fmt: skip
        loss, d_hidden, d_weight, d_bias, stats = _sweep(
            hidden.detach(), *bare, *head.arguments()[2:], targets, ignore_index, advantages.detach(),
            *(None if x is None else x.detach() for x in optional), borders, dropped, by_tensor, by_host,
            float(loss_scale), main_grad, o.encoded, *needs, check_targets, impl, workspace_mb, block_rows,
        )  # fmt: skip
    if any(needs):
        grads = [x if need else None for x, need in zip((d_hidden, d_weight, d_bias), needs, strict=True)]
        if main_grad is not None:
            grads[1] = None
        loss = _HandOut.apply(loss, hidden, weight, bias, *grads)
    return loss, dict(zip(STATS, stats.unbind(), strict=True))


def _check_gradients(hidden: Tensor, weight: Tensor, main_grad: Tensor | None) -> None:
    if main_grad is None:
        return
    kind = accumulator(hidden)
    if main_grad.shape != weight.shape or main_grad.dtype != kind:
        raise ValueError(
            f"main_grad must be {kind} {list(weight.shape)}, got {main_grad.dtype} {list(main_grad.shape)}"
        )
    if not weight.requires_grad:
        raise ValueError("main_grad is given, but weight requires no gradient")


def _check_teacher(hidden: Tensor, targets: Tensor, logps, states: Tensor | None, index: Tensor | None) -> None:
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


def _host_borders(
    cu_seqlens: Tensor | Sequence[int] | None, device: torch.device
) -> tuple[list[int] | None, Tensor | None]:
    """cu_seqlens as (numbers of the host, None), or (None, a tensor of the device)."""
    if cu_seqlens is None:
        return None, None
    if not isinstance(cu_seqlens, Tensor):
        return list(cu_seqlens), None
    if cu_seqlens.device == device:
        return None, cu_seqlens
    return cu_seqlens.tolist(), None


def _host_zeros(
    advantages: Tensor, borders: list[int] | None, o: Objective, ref, teacher, states, device: torch.device
) -> tuple[list[int] | None, Tensor]:
    """(sequences that the host knows to have no gradient, advantages on the device)."""
    if advantages.device == device:
        return None, advantages
    if advantages.device.type != "cpu":
        raise ValueError(f"advantages is on {advantages.device}, hidden on {device}")
    dropped = None
    if (
        borders is not None
        and len(advantages) == len(borders) - 1
        and ref is None
        and teacher is None
        and states is None
    ):
        dropped = [i for i, a in enumerate(advantages.tolist()) if a == 0]
    return dropped, advantages.pin_memory().to(device, non_blocking=True)


def _sequence_of_rows(
    targets: Tensor, cu_seqlens: Tensor | None, seq_ids: Tensor | None, borders: list[int] | None
) -> tuple[Tensor, list[int] | None]:
    """(seq_ids [rows], borders where the host knows them). Raises ValueError naming the argument."""
    rows, device = len(targets), targets.device
    if seq_ids is not None:
        return seq_ids, None
    if cu_seqlens is not None and device.type == "cpu":
        borders = cu_seqlens.tolist()
    if borders is None:
        places = torch.arange(rows, device=device)
        return torch.searchsorted(cu_seqlens[1:].contiguous(), places, right=True), None
    if not borders or borders[0] != 0 or borders[-1] != rows or any(a > b for a, b in pairwise(borders)):
        raise ValueError(f"cu_seqlens must rise from 0 to the number of rows {rows}, got {_shortened(borders)}")
    seq_ids = torch.empty(rows, dtype=torch.int64, device=device)
    for i, (a, b) in enumerate(pairwise(borders)):
        seq_ids[a:b] = i  # a copy of the list to a GPU would synchronise
    return seq_ids, borders


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


def _live_rows(c: Constants) -> Tensor | None:
    """Rows that can have a gradient, where finding out costs no synchronisation; None: all of them."""
    if c.keep.device.type != "cpu":
        return None
    live = c.keep if c.ref is not None else c.keep & ((c.advantages != 0) | c.eligible)
    return None if bool(live.all()) else live.nonzero()[:, 0]


# --- the sweep --------------------------------------------------------------------------------------------------------


@torch.library.custom_op(
    "genevolve_fast::linear_grpo_sdl",
    mutates_args=("main_grad",),
    schema=f"(Tensor hidden, {Head.SCHEMA}, Tensor targets, int ignore_index, Tensor advantages, Tensor? cu_seqlens, "
    "Tensor? seq_ids, Tensor? old_logps, Tensor? rollout_logps, Tensor? ref_logps, Tensor? teacher_logps, "
    "Tensor? teacher_hidden, Tensor? teacher_index, Tensor? sdl_mask, int[]? borders, int[]? dropped, "
    "Tensor? device_count, float? host_count, float loss_scale, Tensor(a!)? main_grad, str objective, "
    f"bool need_hidden, bool need_weight, bool need_bias, bool check, {Workspace.SCHEMA}) "
    "-> (Tensor loss, Tensor d_hidden, Tensor d_weight, Tensor d_bias, Tensor stats)",
)
def _sweep(
    hidden, weight, bias, row_temperature, temperature, softcap, logit_scale, group, vocab_start, targets,
    ignore_index, advantages, cu_seqlens, seq_ids, old_logps, rollout_logps, ref_logps, teacher_logps, teacher_hidden,
    teacher_index, sdl_mask, borders, dropped, device_count, host_count, loss_scale, main_grad, objective, need_hidden,
    need_weight, need_bias, check, impl, workspace_mb, block_rows,
):  # fmt: skip
    head = Head.of(weight, bias, row_temperature, temperature, softcap, logit_scale, group, vocab_start)
    o, size = Objective.decode(objective), (impl, workspace_mb, block_rows)
    check = check or hidden.device.type == "cpu"
    with full_precision(hidden):
        if check:
            check_values(hidden, head, targets, ignore_index)
        seq_ids, borders = _sequence_of_rows(targets, cu_seqlens, seq_ids, borders)
        _check_sequences(advantages, targets, seq_ids, borders, check)
        if teacher_hidden is not None:
            teacher_logps, has = _teacher(teacher_hidden, teacher_index, targets, head, ignore_index, size)
            sdl_mask = has if sdl_mask is None else has & sdl_mask
        count = host_count if device_count is None else device_count
        c = reference.constants(
            torch.empty(targets.shape, dtype=accumulator(hidden), device=hidden.device),
            advantages=advantages,
            seq_ids=seq_ids,
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
        live = _live_rows(c)
        if live is not None and borders is not None:
            borders = torch.searchsorted(live, torch.tensor(borders)).tolist()
        elif dropped:
            live, borders = _without(borders, dropped, hidden.device)
        needs = (need_hidden, need_weight, need_bias)
        sequences = len(targets) if advantages.shape == targets.shape else len(advantages)
        sweep = _Sweep(hidden, targets, head, c, live, borders, sequences, o, size, needs, loss_scale, main_grad)
        sweep.run(check)
        loss, stats = sweep.total()
        return loss, *sweep.grads.results(), stats


@_sweep.register_fake
def _(hidden, weight, bias, *arguments):
    main_grad, (need_hidden, need_weight, need_bias) = arguments[-9], arguments[-7:-4]
    grads = empty_gradients(hidden, weight, bias, (need_hidden, need_weight and main_grad is None, need_bias))
    kind = accumulator(hidden)
    return hidden.new_empty((), dtype=kind), *grads, hidden.new_empty(len(STATS), dtype=kind)


def _check_sequences(advantages: Tensor, targets: Tensor, seq_ids: Tensor, borders: list[int] | None, check: bool):
    if advantages.shape == targets.shape or advantages.ndim != 1:
        return
    if borders is not None and len(advantages) != len(borders) - 1:
        raise ValueError(
            f"advantages must be [{len(borders) - 1}] for the sequences of cu_seqlens, or [{len(targets)}] for the "
            f"rows, got {list(advantages.shape)}"
        )
    if check and ((seq_ids < 0) | (seq_ids >= len(advantages))).any():
        raise ValueError(f"seq_ids must lie in [0, {len(advantages)}), the number of advantages")


def _teacher(hidden, index, targets, head: Head, ignore_index: int, size) -> tuple[Tensor, Tensor]:
    """(the teacher's log-probs of the student's targets [rows], which rows have one), from one GEMM over its rows."""
    has = (index >= 0) & (targets != ignore_index)
    slot = where(has, index, len(hidden))  # rows without a teacher go to one slot behind the last

    def by_teacher_row(x: Tensor, fill) -> Tensor:
        return torch.full((len(hidden) + 1,), fill, dtype=x.dtype, device=x.device).scatter(0, slot, x)[:-1]

    tau = head.temperature
    if isinstance(tau, Tensor) and tau.ndim:
        tau = by_teacher_row(tau, 1.0)
    impl, workspace_mb, block_rows = size
    logps = torch.ops.genevolve_fast.linear_logprob(
        hidden, *Head(head.weight, head.bias, tau, head.softcap, head.scale, head.group, head.first).arguments(),
        by_teacher_row(targets, ignore_index), ignore_index, False, 0, False, impl, workspace_mb, block_rows,
    )[0]  # fmt: skip
    return torch.cat([logps, logps.new_zeros(1)])[slot], has


class _Sweep:
    """One call's pass over the head: log-probs of all live rows, and the gradients of those that need one."""

    def __init__(
        self, hidden, targets, head, c: Constants, live, borders, sequences, o: Objective, size, needs, scale, main_grad
    ) -> None:
        self.hidden, self.sequences, self.o, self.scale = hidden, sequences, o, scale
        self.live, self.kept = live, c.keep.sum()
        self.c = c if live is None else c.rows(live)
        self.rows = len(self.c.keep)
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
                check_result(where(self.c.keep[visit], softmax.logps), self.hidden, self.work.head, self._place(visit))
            if not self.needs:
                continue
            slope, w = reference.policy_slope(self.logps[visit], self.c.rows(visit), self.o)
            if distils:
                whole, rest = self._whole_sequences(visit)
                cut += rest
            if distils and whole.start < whole.stop:
                part = slice(whole.start - visit.start, whole.stop - visit.start)
                slope[part] += reference.distillation_slope(self.logps[whole], self.c.rows(whole), w[part], self.o)[0]
            self._add(visit, softmax, block, slope / self.c.denominator[visit])
        if cut:
            self._distil(cut)

    def total(self) -> tuple[Tensor, Tensor]:
        """(loss, its statistics [STATS])."""
        loss, stats = reference.total(self.logps, self.c, self.o)
        stats["entropy"] = mean(self.entropy, self.c.keep)
        for name in ("pg_clipfrac_low", "pg_clipfrac_high"):  # rows left out are not clipped, but they count
            stats[name] = stats[name] * (self.c.keep.sum() / self.kept.clamp(min=1))
        return loss * self.scale, torch.stack([stats[name].to(loss.dtype) for name in STATS])

    def _place(self, rows: Rows) -> Rows:
        """Where some live rows stand among the caller's rows."""
        return rows if self.live is None else self.live[rows]

    def _softmax(self, rows: Rows, entropy: bool = False) -> tuple[Softmax, Tensor]:
        place = self._place(rows)
        block = where(self.c.keep[rows][:, None], self.hidden[place])
        return self.work.softmax(block, self.targets[rows], place, entropy), block

    def _add(self, rows: Rows, softmax: Softmax, block: Tensor, slope: Tensor, again: bool = False) -> None:
        place = self._place(rows)
        (d,) = self.work.d_logits(softmax, self.targets[rows], place, Upstream(logps=slope * self.scale))
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
        if d_hidden is not None:  # an upstream gradient other than 1 would need dW scaled too: say so, without a sync
            d_hidden = d_hidden * where(upstream == 1, torch.ones_like(upstream), torch.nan).to(d_hidden.dtype)
        return None, d_hidden, d_weight, d_bias, None, None, None
