"""The whole objective from hidden states: logits, log-probs, losses and gradients in one sweep over the head."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from genevolve_fast.ops import reference
from genevolve_fast.ops.blocks import Head, Upstream, Workspace, accumulator, add_weight_gradient, mm_hidden
from genevolve_fast.ops.head import check_head, check_target_range, linear_logprob
from genevolve_fast.ops.objective import Objective
from genevolve_fast.ops.reference import Constants


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
    num_sequences: int | None = None,
    num_tokens: int | None = None,
    loss_scale: float = 1.0,
    main_grad: Tensor | None = None,
    objective: Objective | None = None,
    impl: str = "auto",
    workspace_mb: float | None = None,
    block_rows: int = 1024,
    check_targets: bool = False,
) -> tuple[Tensor, reference.Stats]:
    """(loss, stats) of GRPO + KL + distillation (`grpo_sdl`) straight from hidden [rows, H] and the head [V, H].

    targets [rows] int64. Rows lie sequence by sequence: `cu_seqlens` [sequences + 1], or `seq_ids` [rows]. advantages
    [sequences] or [rows].
    The teacher's log-probs come as `teacher_logps` [rows], or from `teacher_hidden` [teacher rows, H] through the same
    head: row i of the student is row `teacher_index[i]` of the teacher, -1 where there is none. num_sequences and
    num_tokens are host numbers of the whole optimizer step over all ranks (default: this call).

    Gradients are made in the forward and multiplied by `loss_scale`; the backward only hands them out, so call it with
    an upstream gradient of 1 (another one gives NaN for hidden, without a synchronisation). With `main_grad` [V, H]
    fp32, dW is added to it in the forward and `weight` gets no gradient of its own.

    GEMMs of 2·rows·H·V: 3 (2 with a frozen head), + 1 over the teacher's rows, + 3 (2) over the rows that the
    distillation selects (ceil(permille) of them), none of it where the objective selects all. Under no_grad 1.
    Rows that are known to have no gradient on a CPU (ignored, or without advantage, KL and teacher) enter no GEMM.
    stats: pg_loss, kl_loss, sdl_loss, clip fractions, kl, sdl_kl (mean clamped gap), sdl_rho_saturated,
    sdl_selected_fraction, ratio_max, rollout_is_mean, entropy; tensors, nothing is synchronised.
    Peak bytes above inputs and returned gradients: as `linear_logprob`. Raises ValueError naming the argument.
    """
    o = objective or Objective()
    head = Head.of(weight, bias, temperature, softcap, logit_scale)
    check_head(hidden, head, targets, block_rows)
    if targets.device.type == "cpu" or check_targets:
        check_target_range(targets, len(weight), ignore_index)
    if main_grad is not None and (main_grad.shape != weight.shape or main_grad.dtype != accumulator(hidden)):
        raise ValueError(f"main_grad must be {accumulator(hidden)} {list(weight.shape)}, got {main_grad.dtype}")
    if main_grad is not None and not weight.requires_grad:
        raise ValueError("main_grad is given, but weight requires no gradient")
    needs = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, weight, bias)]
    size = (impl, workspace_mb, block_rows)
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        if teacher_hidden is not None:
            if teacher_logps is not None or teacher_index is None:
                raise ValueError("teacher_hidden needs teacher_index, and excludes teacher_logps")
            teacher_logps, has = _teacher(teacher_hidden, teacher_index, targets, head, ignore_index, size)
            sdl_mask = has if sdl_mask is None else has & sdl_mask
        elif teacher_index is not None:
            raise ValueError("teacher_index belongs to teacher_hidden")
        c = reference.constants(
            torch.empty(targets.shape, dtype=accumulator(hidden), device=hidden.device),
            advantages=advantages,
            seq_ids=_sequence_of_rows(cu_seqlens, seq_ids, targets),
            old_logps=old_logps,
            rollout_logps=rollout_logps,
            ref_logps=ref_logps,
            teacher_logps=teacher_logps,
            sdl_mask=sdl_mask,
            loss_mask=targets != ignore_index,
            num_sequences=num_sequences,
            num_tokens=num_tokens,
            objective=o,
        )
        sequences = len(targets) if advantages.shape == targets.shape else len(advantages)
        sweep = _Sweep(hidden.detach(), targets, head, c, sequences, o, size, needs, loss_scale, main_grad)
        loss, stats = sweep.run()
    if any(needs):
        loss = _HandOut.apply(loss, hidden, weight, bias, sweep.d_hidden, sweep.weight_gradient(), sweep.d_bias)
    return loss, stats


def _sequence_of_rows(cu_seqlens: Tensor | Sequence[int] | None, seq_ids: Tensor | None, targets: Tensor) -> Tensor:
    if (cu_seqlens is None) == (seq_ids is None):
        raise ValueError("give cu_seqlens or seq_ids, one of them")
    if seq_ids is not None:
        return seq_ids
    borders = torch.as_tensor(cu_seqlens, device=targets.device)
    rows = torch.arange(len(targets), device=targets.device)
    return torch.searchsorted(borders[1:].contiguous(), rows, right=True)


def _teacher(hidden, index, targets, head: Head, ignore_index: int, size) -> tuple[Tensor, Tensor]:
    """(the teacher's log-probs of the student's targets [rows], which rows have one), from one GEMM over its rows."""
    if hidden.ndim != 2 or hidden.shape[1] != head.weight.shape[1]:
        raise ValueError(f"teacher_hidden must be [rows, {head.weight.shape[1]}], got {list(hidden.shape)}")
    if index.shape != targets.shape or index.dtype != torch.int64:
        raise ValueError(f"teacher_index must be int64 {list(targets.shape)}, got {index.dtype} {list(index.shape)}")
    has = (index >= 0) & (targets != ignore_index)
    slot = torch.where(has, index, len(hidden))  # rows without a teacher go to one slot behind the last

    def by_teacher_row(x: Tensor, fill) -> Tensor:
        return torch.full((len(hidden) + 1,), fill, dtype=x.dtype, device=x.device).scatter(0, slot, x)[:-1]

    tau = head.temperature
    if isinstance(tau, Tensor) and tau.ndim:
        tau = by_teacher_row(tau, 1.0)
    logps = linear_logprob(
        hidden.detach(), head.weight, by_teacher_row(targets, ignore_index), bias=head.bias, temperature=tau,
        softcap=head.softcap, logit_scale=head.scale, ignore_index=ignore_index, impl=size[0], workspace_mb=size[1],
        block_rows=size[2],
    ).logps  # fmt: skip
    return torch.cat([logps, logps.new_zeros(1)])[slot], has


class _Sweep:
    """One call's pass over the head: log-probs of all rows, and the gradients of those that need one."""

    def __init__(
        self, hidden, targets, head: Head, c: Constants, sequences: int, o: Objective, size, needs, scale, main_grad
    ) -> None:
        self.hidden, self.head, self.sequences, self.o, self.scale = hidden, head, sequences, o, scale
        self.need_hidden, self.need_weight, self.need_bias = needs
        self.live, self.kept = _live_rows(c), c.keep.sum()
        self.c = c if self.live is None else c.rows(self.live)
        self.rows = len(self.c.keep)
        self.targets = torch.where(self.c.keep, targets if self.live is None else targets[self.live], 0)
        self.work = Workspace(self.rows, hidden, head, *size)
        kind, device = self.work.kind, hidden.device
        self.d_hidden = torch.zeros_like(hidden) if self.need_hidden else None
        self.main_grad = main_grad
        self.d_weight = main_grad
        if self.need_weight and main_grad is None:
            self.d_weight = torch.zeros(head.weight.shape, dtype=kind, device=device)
        self.d_bias = torch.zeros(len(head.weight), dtype=kind, device=device) if self.need_bias else None
        self.logps, self.entropy = torch.zeros(2, self.rows, dtype=kind, device=device)

    def run(self) -> tuple[Tensor, reference.Stats]:
        with_gradient = self.need_hidden or self.need_weight or self.need_bias
        distils = self.c.teacher is not None and self.o.sdl_coef > 0
        at_once = distils and self.o.sdl_permille == 1000  # nothing to select: the row alone decides
        for visit in self.work.visits(self.rows):
            softmax = self._softmax(visit, entropy=True)
            self.logps[visit], self.entropy[visit] = softmax.logps, softmax.entropy
            if with_gradient:
                self._add(visit, softmax, self._slope(visit, distil=at_once))
        if with_gradient and distils and not at_once:
            slope, selected = self._distillation_slope()
            chosen = self._chosen_rows(selected)
            for part in self.work.visits(len(chosen)):
                self._add(chosen[part], self._softmax(chosen[part]), slope[chosen[part]])
        loss, stats = reference.total(self.logps, self.c, self.o)
        stats["entropy"] = reference.mean(self.entropy, self.c.keep)
        for name in ("pg_clipfrac_low", "pg_clipfrac_high"):  # rows left out are not clipped, but they count
            stats[name] = stats[name] * (self.c.keep.sum() / self.kept.clamp(min=1))
        return loss * self.scale, stats

    def weight_gradient(self) -> Tensor | None:
        """dW for `weight`'s own gradient; None where it went into main_grad."""
        return None if self.main_grad is not None or not self.need_weight else self.d_weight.to(self.head.weight.dtype)

    def _place(self, rows: slice | Tensor) -> slice | Tensor:
        """Where some live rows stand among the caller's rows."""
        return rows if self.live is None else self.live[rows]

    def _softmax(self, rows: slice | Tensor, entropy: bool = False):
        kept = self.c.keep[rows][:, None]
        self.block = torch.where(kept, self.hidden[self._place(rows)], 0)  # 0 · NaN would reach every gradient
        return self.work.softmax(self.block, self.targets[rows], self.head, self._place(rows), entropy)

    def _slope(self, rows: slice, distil: bool) -> Tensor:
        """d loss / d logp [n] of everything that a row decides alone."""
        c = self.c.rows(rows)
        with torch.enable_grad():
            logps = self.logps[rows].clone().requires_grad_()
            pg, kl, _, w = reference.policy_losses(logps, c, self.o)
            loss = pg + self.o.kl_coef * kl
            if distil:
                loss = loss + self.o.sdl_coef * reference.distillation(logps, c, w, self.o)[0]
            (slope,) = torch.autograd.grad((loss / c.denominator).sum() * self.scale, logps)
        return slope

    def _distillation_slope(self) -> tuple[Tensor, Tensor]:
        """(d loss / d logp of the distillation, selected) of all rows."""
        with torch.enable_grad():
            logps = self.logps.clone().requires_grad_()
            w = reference.policy_losses(logps, self.c, self.o)[3]
            loss, _, selected, _ = reference.distillation(logps, self.c, w, self.o)
            loss = (self.o.sdl_coef * loss / self.c.denominator).sum() * self.scale
            (slope,) = torch.autograd.grad(loss, logps)
        return slope, selected

    def _chosen_rows(self, selected: Tensor) -> Tensor:
        """Indices of the selected rows; on a GPU as many as can be selected, the rest with slope 0."""
        if selected.device.type == "cpu":
            return selected.nonzero()[:, 0]
        bound = -(-self.rows * self.o.sdl_permille // 1000) + self.sequences
        return torch.sort(selected.byte(), descending=True, stable=True).indices[: min(self.rows, bound)]

    def _add(self, rows: slice | Tensor, softmax, slope: Tensor) -> None:
        (d,) = self.work.d_logits(softmax, self.targets[rows], self.head, self._place(rows), Upstream(logps=slope))
        if self.need_hidden:
            made, place = mm_hidden(d, self.head.weight), self._place(rows)
            if isinstance(rows, slice):
                self.d_hidden[place] = made
            else:
                self.d_hidden[place] = (self.d_hidden[place].to(self.work.kind) + made).to(made.dtype)
        if self.need_weight:
            add_weight_gradient(self.d_weight, d, self.block)
        if self.need_bias:
            self.d_bias += d.sum(0, dtype=self.work.kind)


def _live_rows(c: Constants) -> Tensor | None:
    """Rows that can have a gradient, where finding out costs no synchronisation; None: all of them."""
    if c.keep.device.type != "cpu":
        return None
    live = c.keep if c.ref is not None else c.keep & ((c.advantages != 0) | c.eligible)
    return None if bool(live.all()) else live.nonzero()[:, 0]


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
            d_hidden = d_hidden * torch.where(upstream == 1, 1.0, torch.nan).to(d_hidden.dtype)
        return None, d_hidden, d_weight, d_bias, None, None, None
