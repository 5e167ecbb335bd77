"""Exact log-probabilities from hidden states, a few blocks of logits at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from genevolve_fast.ops.blocks import Gradients, Head, Workspace, accumulator
from genevolve_fast.ops.epilogues import Upstream
from genevolve_fast.ops.masks import Rows, masked, where
from genevolve_fast.ops.sampling_mask import RowSets, SamplingMask, check_sampling_mask
from genevolve_fast.ops.shards import group_name, summed, whole


class LogProbs(NamedTuple):
    """logps [rows] in nats; entropy [rows] and lse [rows] where asked for. Ignored rows are 0."""

    logps: Tensor
    entropy: Tensor | None
    lse: Tensor | None


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    sampling_mask: SamplingMask | None = None,
    ignore_index: int = -100,
    return_entropy: bool | Literal["detached"] = False,
    return_lse: bool = False,
    impl: str = "auto",
    workspace_mb: float | None = None,
    block_rows: int = 1024,
    check_targets: bool = False,
    process_group: ProcessGroup | None = None,
    vocab_start: int = 0,
) -> LogProbs:
    """log softmax(z)[target] of z = softcap·tanh(scale·(h·Wᵀ + b)/softcap) / temperature, differentiable.

    hidden [rows, H], weight [V, H], targets [rows] int64, bias [V], temperature a number or [rows] > 0 (constant).
    Logits are fp32 (fp64 for fp64 inputs), autocast or not, and every forward GEMM has exactly `block_rows` rows, so
    equal hidden rows give equal bits wherever they stand. Ignored rows may hold anything; on a CPU they enter no GEMM.

    With `sampling_mask` the softmax of a row is that of its set of ids alone, the target among them, and so are entropy
    and lse (top-p sampled from it); rows of count 0 are as without. Not with softcap.

    GEMMs of 2·rows·H·V: 1 without gradients; 2 where only `hidden` needs one (the gradient of each row's log-prob is
    made in the forward and scaled in the backward), 3 with a differentiable entropy; 4 where weight or bias need one
    (the backward recomputes the logits), dW accumulated in fp32. `return_entropy="detached"` saves the third GEMM.

    Peak bytes above inputs and results: the workspace (`workspace_mb`, or one block 4·V·block_rows on a CPU and four on
    a GPU, half as much again for a 16-bit frozen head with entropy) + 16·H·(its rows) + 40·rows + 32 MiB, + 4·V·H for
    dW, + without dW hidden's bytes (fp16: twice), again with entropy, + 4·V + 80·(ids of a visit) with `sampling_mask`.

    With `process_group`, weight and bias are this rank's rows of the vocabulary, from token `vocab_start` on (shards
    may be uneven); all ranks give the same hidden and targets and get the same results, dH summed over the group. An
    FSDP2 weight (DTensor) is gathered once; a ZeRO-3 weight must be gathered, as it is inside its module's forward.

    impl "torch" runs everywhere, "triton" on a GPU, "auto" takes the faster one that runs (`supported` says why not).
    Raises ValueError naming the argument of a wrong shape, dtype or value. Targets and NaN in `hidden` are checked
    where that costs no synchronisation, on a CPU, or with `check_targets`; else both give NaN for their rows.
    """
    weight, bias = whole(weight), whole(bias)
    sets = None if sampling_mask is None else RowSets(*sampling_mask)
    head = Head(weight, bias, temperature, softcap, logit_scale, group_name(process_group), vocab_start, sets)
    check_head(hidden, head, targets, block_rows)
    if return_entropy not in (True, False, "detached"):
        raise ValueError(f"return_entropy must be True, False or 'detached', got {return_entropy!r}")
    trains = torch.is_grad_enabled() and hidden.requires_grad
    trains_head = torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad))
    units = 0 if trains_head or not trains else 2 if return_entropy is True else 1
    logps, entropy, lse, *_ = _forward(
        hidden, *head.arguments(), targets, ignore_index, bool(return_entropy), units, check_targets, impl,
        workspace_mb, block_rows,
    )  # fmt: skip
    if return_entropy == "detached":
        entropy = entropy.detach()
    return LogProbs(logps, entropy if return_entropy else None, lse if return_lse else None)


def check_head(hidden: Tensor, head: Head, targets: Tensor, block_rows: int) -> None:
    """Raises ValueError naming the argument of a wrong shape, dtype, device or value; nothing is synchronised."""
    weight, bias, temperature = head.weight, head.bias, head.temperature
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden [rows, H] and weight [V, H] do not fit: {tuple(hidden.shape)}, {tuple(weight.shape)}")
    for name, x in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if x is not None and not x.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {x.dtype}")
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(f"targets must be int64 [{len(hidden)}], got {targets.dtype} {tuple(targets.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [{len(weight)}], got {tuple(bias.shape)}")
    by_row = temperature if isinstance(temperature, Tensor) else None
    check_devices(hidden, weight=weight, targets=targets, bias=bias, temperature=by_row)
    if isinstance(temperature, Tensor):
        if temperature.ndim and temperature.shape != targets.shape:
            raise ValueError(f"temperature must be a number or [{len(hidden)}], got {tuple(temperature.shape)}")
    elif not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if head.softcap is not None and not head.softcap > 0:
        raise ValueError(f"softcap must be positive, got {head.softcap}")
    if block_rows < 1:
        raise ValueError(f"block_rows must be at least 1, got {block_rows}")
    if head.sets is not None:
        check_sampling_mask(hidden, head.sets, head.softcap, head.scale)


def check_devices(hidden: Tensor, **others: Tensor | None) -> None:
    """Raises ValueError naming a tensor that is not where hidden is."""
    for name, x in others.items():
        if x is not None and x.device != hidden.device:
            raise ValueError(f"{name} is on {x.device}, hidden on {hidden.device}")


class NonFiniteError(ValueError):
    """A result is NaN; the message names what made it so."""


def check_values(hidden: Tensor, head: Head, targets: Tensor, ignore_index: int) -> None:
    """Raises ValueError naming the first target outside the vocabulary, or a temperature; synchronises a GPU."""
    if isinstance(head.temperature, Tensor) and not (head.temperature > 0).all():
        raise ValueError(f"temperature must be positive, got {float(head.temperature.min())}")
    kept = targets != ignore_index
    vocabulary = len(head.weight) if head.group is None else torch.iinfo(torch.int64).max
    if (wrong := kept & ((targets < 0) | (targets >= vocabulary))).any():
        row = int(wrong.nonzero()[0])
        raise ValueError(f"targets[{row}] is {int(targets[row])}: neither in [0, {vocabulary}) nor {ignore_index}")
    if head.sets is not None and ((ids := head.sets.ids) < 0).any() | (ids >= vocabulary).any():
        raise ValueError(f"sampling_mask.ids must lie in [0, {vocabulary}), got {int(ids.min())} to {int(ids.max())}")


def check_result(logps: Tensor, hidden: Tensor, head: Head, rows: Rows, targets: Tensor) -> None:
    """Raises NonFiniteError naming the argument that made some of the log-probs of `rows` NaN, ValueError for a target
    outside its row's ids; synchronises a GPU."""
    if not logps.isnan().any():
        return
    where = torch.arange(len(hidden), device=hidden.device)[rows][logps.isnan()]
    if (bad := ~hidden[where].isfinite().all(1)).any():
        raise NonFiniteError(f"hidden[{int(where[bad][0])}] holds NaN or infinity")
    row = int(where[0])
    if head.sets is not None and not head.sets.holds(row, target := int(targets[row])):
        raise ValueError(f"targets[{row}] is {target}, which is not among its row's ids in sampling_mask")
    for name, x in (("weight", head.weight), ("bias", head.bias), ("temperature", head.temperature)):
        if isinstance(x, Tensor) and not x.isfinite().all():
            raise NonFiniteError(f"{name} holds NaN or infinity")
    raise NonFiniteError(f"the log-prob of row {row} is NaN: its logits overflow, or no rank holds its target")


def full_precision(hidden: Tensor) -> contextlib.AbstractContextManager:
    """Without autocast: bf16 logits would be silently inexact."""
    kind = hidden.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else contextlib.nullcontext()


def entering_rows(targets: Tensor, ignore_index: int) -> tuple[Tensor | None, bool]:
    """(indices of the rows that enter the GEMMs or None for all of them, whether all that enter are known to count).

    Rows are left out where finding them costs no synchronisation.
    """
    if targets.device.type != "cpu":
        return None, False
    kept = targets != ignore_index
    return (None if bool(kept.all()) else kept.nonzero()[:, 0]), True


class _Visits:
    """The rows of a call as its visits read them: (places, hidden [n, H], targets [n], kept [n])."""

    def __init__(self, hidden: Tensor, targets: Tensor, ignore_index: int) -> None:
        self.hidden, self.targets, self.ignore_index = hidden, targets, ignore_index
        self.entering, self.all_kept = entering_rows(targets, ignore_index)
        self.count = len(hidden) if self.entering is None else len(self.entering)

    def through(self, work: Workspace) -> Iterator[tuple[Rows, Tensor, Tensor, Tensor]]:
        for visit in work.visits(self.count):
            rows = visit if self.entering is None else self.entering[visit]
            y = self.targets[rows]
            kept = y != self.ignore_index
            yield rows, masked(self.hidden[rows], kept, self.all_kept), where(kept, y), kept


# --- the operators ----------------------------------------------------------------------------------------------------


@torch.library.custom_op(
    "genevolve_fast::linear_logprob",
    mutates_args=(),
    schema=f"(Tensor hidden, {Head.SCHEMA}, Tensor targets, int ignore_index, bool entropy, int units, bool check, "
    f"{Workspace.SCHEMA}) -> (Tensor logps, Tensor entropy, Tensor lse, Tensor units, Tensor scales)",
)
def _forward(
    hidden, weight, bias, row_temperature, temperature, softcap, logit_scale, group, vocab_start, mask_ids, mask_counts,
    mask_owners, targets, ignore_index, entropy, units, check, impl, workspace_mb, block_rows,
):  # fmt: skip
    """`units` [0 to 2, rows, H]: gradients of logps (and of entropy) by hidden, kept for a frozen head's backward."""
    head = Head.of(
        weight, bias, row_temperature, temperature, softcap, logit_scale, group, vocab_start, mask_ids, mask_counts,
        mask_owners,
    )  # fmt: skip
    logps, entropies, lse, made, scales = _outputs(hidden, entropy, units)
    with full_precision(hidden):
        check = check or hidden.device.type == "cpu"
        if check:
            check_values(hidden, head, targets, ignore_index)
        visits = _Visits(hidden, targets, ignore_index)
        work = Workspace(visits.count, hidden, head, impl, workspace_mb, block_rows, two=units == 2)
        for rows, h, y, kept in visits.through(work):
            one = kept.to(work.kind)
            each = (Upstream(logps=one), Upstream(entropy=one))[:units]
            softmax, d_logits = work.softmax_and_d_logits(h, y, rows, entropy, *each)
            logps[rows] = where(kept, softmax.logps)
            lse[rows] = where(kept, softmax.lse)
            if entropy:
                entropies[rows] = where(kept, softmax.entropy)
            for i, d in enumerate(d_logits):
                made[i, rows], scales[i, rows] = _packed(work.d_hidden(d, wide=True), made.dtype)
            if check:
                check_result(where(kept, softmax.logps), hidden, head, rows, targets)
    return logps, entropies, lse, made, scales


def _outputs(hidden: Tensor, entropy: bool, units: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    kind, (rows, width) = accumulator(hidden), hidden.shape  # len() would fix the size of a symbolic shape
    each = [hidden.new_zeros(rows if wanted else 0, dtype=kind) for wanted in (True, entropy, True)]
    packed = torch.float16 if hidden.dtype == torch.bfloat16 else kind
    return *each, hidden.new_zeros(units, rows, width, dtype=packed), hidden.new_zeros(units, rows, dtype=kind)


def _packed(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x [n, H], which is lost, as (numbers in dtype, scale [n]). bf16 would be rounded twice, here and
    after scaling by the loss's gradient; scaled to [-1, 1], fp16 is as small and eight times finer."""
    if dtype == x.dtype:
        return x, x.new_ones(len(x))
    scale = torch.maximum(x.amax(1), -x.amin(1)).clamp(min=torch.finfo(x.dtype).tiny)
    return x.div_(scale[:, None]).to(dtype), scale


@_forward.register_fake
def _(hidden, *arguments):
    return _outputs(hidden, entropy=arguments[-6], units=arguments[-5])


def _save(ctx, inputs, output) -> None:
    hidden, weight, bias, row_temperature, *_ = inputs
    targets, ignore_index, _, units, _, *size = inputs[12:]
    logps, _, lse, made, scales = output
    ctx.set_materialize_grads(False)  # None, not zeros, for outputs that the loss does not use
    ctx.head, mask, ctx.ignore_index, ctx.size = inputs[4:9], inputs[9:12], ignore_index, size
    ctx.units, ctx.dtype = units, hidden.dtype
    kept = (logps, lse, made, scales) if units else (hidden,)
    ctx.save_for_backward(weight, bias, row_temperature, *mask, targets, *kept)


def _backward(ctx, g_logps, g_entropy, g_lse, *_):
    weight, bias, row_temperature, *mask, targets = ctx.saved_tensors[:7]
    head, kept = (weight, bias, row_temperature, *ctx.head, *mask), ctx.saved_tensors[7:]
    if ctx.units:
        half = ctx.dtype == torch.float16
        grads = (_scale_units(*kept, *head, targets, ctx.ignore_index, g_logps, g_entropy, g_lse, half), None, None)
    else:
        needs = [ctx.needs_input_grad[i] for i in range(3)]
        made = _recompute(*kept, *head, targets, ctx.ignore_index, g_logps, g_entropy, g_lse, *needs, *ctx.size)
        grads = [x if need else None for x, need in zip(made, needs, strict=True)]
    return (*grads, *[None] * 17)


_forward.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op(
    "genevolve_fast::linear_logprob_frozen_backward",
    mutates_args=(),
    schema=f"(Tensor logps, Tensor lse, Tensor units, Tensor scales, {Head.SCHEMA}, Tensor targets, "
    "int ignore_index, Tensor? g_logps, Tensor? g_entropy, Tensor? g_lse, bool half) -> Tensor",
)
def _scale_units(
    logps, lse, units, scales, weight, bias, row_temperature, temperature, softcap, logit_scale, group, vocab_start,
    mask_ids, mask_counts, mask_owners, targets, ignore_index, g_logps, g_entropy, g_lse, half,
):  # fmt: skip
    """Every gradient of a row is linear in its upstream numbers: scale what the forward kept."""
    head = Head.of(
        weight, bias, row_temperature, temperature, softcap, logit_scale, group, vocab_start, mask_ids, mask_counts,
        mask_owners,
    )  # fmt: skip
    d_hidden = _d_hidden_of(units, half)
    for first in range(0, len(logps), _ROWS_AT_ONCE):
        rows = slice(first, first + _ROWS_AT_ONCE)
        kept = targets[rows] != ignore_index
        up = Upstream(*(None if x is None else where(kept, x[rows])[:, None] for x in (g_logps, g_lse, g_entropy)))
        by_logp, *by_entropy = (units[i, rows] * scales[i, rows, None] for i in range(len(units)))
        total = torch.zeros_like(by_logp)
        if up.logps is not None:
            total += up.logps * by_logp
        if up.entropy is not None:
            total += up.entropy * by_entropy[0]
        if up.lse is not None:  # logp = z_y - lse, so the gradient of lse is that of z_y less the one kept for logp
            own = _target_gradient(head, (logps + lse)[rows], where(kept, targets[rows]), rows)
            total += up.lse * (own - by_logp)
        d_hidden[rows] = total
    return d_hidden


_ROWS_AT_ONCE = 1024  # of fp32 gradients between the 16-bit ones


def _d_hidden_of(units: Tensor, half: bool) -> Tensor:
    """[rows, H] in the dtype of the hidden states whose `_packed` gave units; `half`: they were fp16."""
    packed = torch.bfloat16 if units.dtype == torch.float16 else units.dtype
    return units.new_zeros(units.shape[1:], dtype=torch.float16 if half else packed)


@_scale_units.register_fake
def _(logps, lse, units, *arguments):
    return _d_hidden_of(units, arguments[-1])


def _target_gradient(head: Head, z: Tensor, targets: Tensor, rows: slice) -> Tensor:
    """dz/dh [n, H] of the targets' logits z [n]."""
    tau = head.tau(rows)
    z = z[:, None]
    slope = torch.full_like(z, head.scale) / tau
    if head.softcap is not None:
        slope = slope * (1 - (z * tau / head.softcap).square())
    own = head.at(targets)
    here = (own >= 0) & (own < len(head.weight))  # elsewhere another rank has it, or z is NaN
    return slope * summed(where(here[:, None], head.weight[where(here, own)].to(z.dtype)), head.group)


@torch.library.custom_op(
    "genevolve_fast::linear_logprob_backward",
    mutates_args=(),
    schema=f"(Tensor hidden, {Head.SCHEMA}, Tensor targets, int ignore_index, Tensor? g_logps, Tensor? g_entropy, "
    f"Tensor? g_lse, bool need_hidden, bool need_weight, bool need_bias, {Workspace.SCHEMA}) "
    "-> (Tensor d_hidden, Tensor d_weight, Tensor d_bias)",
)
def _recompute(
    hidden, weight, bias, row_temperature, temperature, softcap, logit_scale, group, vocab_start, mask_ids, mask_counts,
    mask_owners, targets, ignore_index, g_logps, g_entropy, g_lse, need_hidden, need_weight, need_bias, impl,
    workspace_mb, block_rows,
):  # fmt: skip
    head = Head.of(
        weight, bias, row_temperature, temperature, softcap, logit_scale, group, vocab_start, mask_ids, mask_counts,
        mask_owners,
    )  # fmt: skip
    with full_precision(hidden):
        visits = _Visits(hidden, targets, ignore_index)
        work = Workspace(visits.count, hidden, head, impl, workspace_mb, block_rows)
        grads = Gradients(work, hidden, (need_hidden, need_weight, need_bias))
        for rows, h, y, kept in visits.through(work):
            up = Upstream(*(None if x is None else where(kept, x[rows]) for x in (g_logps, g_lse, g_entropy)))
            _, (d,) = work.softmax_and_d_logits(h, y, rows, g_entropy is not None, up)
            grads.add(d, h, rows)
    return grads.results()


@_recompute.register_fake
def _(hidden, weight, bias, *arguments):
    return empty_gradients(hidden, weight, bias, arguments[-6:-3])


def empty_gradients(hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: Sequence[bool]) -> tuple[Tensor, ...]:
    """What `Gradients.results` looks like."""
    pairs = zip((hidden, weight, bias), needs, strict=True)
    return tuple(torch.empty_like(x) if need else hidden.new_empty(0) for x, need in pairs)
