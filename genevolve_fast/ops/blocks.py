"""Logits a few blocks at a time: the workspace and the head's GEMMs.

Forward GEMMs always run on `block_rows` rows, so that equal hidden rows give equal bits wherever they stand; gradient
GEMMs run on all blocks of a visit at once and on the true row count.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from genevolve_fast.ops.epilogues import Softmax, Upstream, choose, epilogue
from genevolve_fast.ops.masks import Rows, where
from genevolve_fast.ops.sampling_mask import BANNED, UNREACHABLE, RowSets
from genevolve_fast.ops.shards import merge, summed

_CAST_BYTES = 8 << 20
_DEFAULT_BLOCKS = {"cpu": 1, "cuda": 4}  # of a visit: a GPU's gradient GEMMs want more rows, a CPU's do not


def accumulator(x: Tensor) -> torch.dtype:
    """Dtype of logits and weight gradients: fp32, fp64 for fp64 inputs."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Head:
    """z = softcap·tanh(scale·(h·Wᵀ + b)/softcap) / temperature; temperature a number or [rows].

    With `group`, the name of a process group, weight and bias are this rank's rows of the vocabulary, from `first` on.
    `sets` restrict the rows' softmax.
    """

    weight: Tensor
    bias: Tensor | None
    temperature: float | Tensor
    softcap: float | None
    scale: float
    group: str | None = None
    first: int = 0
    sets: RowSets | None = None

    # Head.arguments as a custom operator's schema spells them
    SCHEMA = (
        "Tensor weight, Tensor? bias, Tensor? row_temperature, float temperature, float? softcap, float logit_scale, "
        "str? group, int vocab_start, Tensor? mask_ids, Tensor? mask_counts, Tensor? mask_owners"
    )

    @classmethod
    def of(
        cls, weight, bias, row_temperature, temperature, softcap, scale, group, first, mask_ids, mask_counts,
        mask_owners,
    ) -> Head:  # fmt: skip
        """From a custom operator's arguments."""
        t = temperature if row_temperature is None else row_temperature.to(accumulator(weight))
        sets = None if mask_ids is None else RowSets(mask_ids, mask_counts, mask_owners)
        return cls(weight, bias, t, softcap, scale, group, first, sets)

    def arguments(self) -> tuple:
        """For a custom operator; without the graphs that the tensors may belong to, except weight's and bias'."""
        t = self.temperature
        by_row, number = (t.detach(), 1.0) if isinstance(t, Tensor) else (None, float(t))
        softcap = None if self.softcap is None else float(self.softcap)
        sets = (None, None, None) if self.sets is None else (self.sets.ids, self.sets.counts, self.sets.owners)
        return (self.weight, self.bias, by_row, number, softcap, float(self.scale), self.group, self.first, *sets)

    def tau(self, rows: Rows) -> float | Tensor:
        """The temperature of some rows: a number, or [rows, 1]."""
        t = self.temperature
        return t[rows][:, None] if isinstance(t, Tensor) and t.ndim else t

    def at(self, targets: Tensor) -> Tensor:
        """Targets as row numbers of `weight`; -1 where another rank has them."""
        if self.group is None:
            return targets
        own = targets - self.first
        return where((own >= 0) & (own < len(self.weight)), own, -1)


def rows_per_visit(
    rows: int, vocabulary: int, block_rows: int, workspace_mb: float | None, itemsize: int, device: str
) -> int:
    """Rows whose logits exist at once, a multiple of block_rows. Raises ValueError where not one block fits."""
    block = block_rows * vocabulary * itemsize
    if workspace_mb is None:
        blocks = _DEFAULT_BLOCKS.get(device, 4)
    else:
        blocks = int(workspace_mb * 2**20) // block
        if blocks < 1:
            needed = -(-block // 2**20)
            raise ValueError(
                f"workspace_mb {workspace_mb} does not hold one block of {block_rows} x {vocabulary} logits: "
                f"give at least {needed}, or smaller block_rows"
            )
    return block_rows * min(blocks, max(1, -(-rows // block_rows)))


class Workspace:
    """fp32 (fp64) logits [rows of a visit, V], allocated once and reused by every visit.

    `two`: room for two gradients of the logits at once. The first one overlays the logits. Where rows have sets, one
    more row takes what belongs to none of them.
    """

    # Workspace.__init__'s last arguments as a custom operator's schema spells them
    SCHEMA = "str impl, float? workspace_mb, int block_rows"

    def __init__(
        self,
        rows: int,
        hidden: Tensor,
        head: Head,
        impl: str,
        workspace_mb: float | None,
        block_rows: int,
        two: bool = False,
    ) -> None:
        self.kind = accumulator(hidden)
        self.dtype = hidden.dtype if hidden.dtype == head.weight.dtype else self.kind  # of d logits
        self.head, self.block_rows = head, block_rows
        vocabulary = len(head.weight)
        bytes_each = self.kind.itemsize + (self.dtype.itemsize if two else 0)
        self.per_visit = rows_per_visit(rows, vocabulary, block_rows, workspace_mb, bytes_each, hidden.device.type)
        spare = head.sets is not None
        self.logits = torch.empty(self.per_visit + spare, vocabulary, dtype=self.kind, device=hidden.device)
        self.second = torch.empty_like(self.logits, dtype=self.dtype) if two else None
        self.epilogue = epilogue(choose(impl, hidden))

    def visits(self, rows: int) -> Iterator[slice]:
        """Row ranges of the visits, in order."""
        for first in range(0, rows, self.per_visit):
            yield slice(first, min(first + self.per_visit, rows))

    def softmax(self, hidden: Tensor, targets: Tensor, rows: Rows, entropy: bool) -> Softmax:
        """Logits of `hidden` [n, H], which are the call's `rows`, into the workspace, each row reduced.

        A target outside the vocabulary, or its row's set, gives NaN.
        """
        logits, targets = self._restricted(self._products(hidden), targets, rows)
        own = self.head.at(targets)
        entropy = entropy or self.head.group is not None  # the shards' merge is one message either way
        made = self.epilogue.softmax(logits, own, self.head, self.head.tau(rows), entropy)
        here = (own >= 0) & (own < logits.shape[1])
        if self.head.group is not None:
            return merge(made, here, self.head.group)
        return replace(made, logps=where(here, made.logps, torch.nan))

    def d_logits(self, softmax: Softmax, targets: Tensor, rows: Rows, *upstream: Upstream) -> list[Tensor]:
        """For each upstream gradient (one or two) that of h·Wᵀ + b, [n, V] in `dtype`; logits are lost."""
        logits, head, out = self.logits[: len(targets)], self.head, self._gradients(len(targets), len(upstream))
        self.epilogue.d_logits(logits, out, softmax, head.at(targets), head, head.tau(rows), upstream)
        return out

    def softmax_and_d_logits(
        self, hidden: Tensor, targets: Tensor, rows: Rows, entropy: bool, *upstream: Upstream
    ) -> tuple[Softmax, list[Tensor]]:
        """Both, for upstream gradients that are known before the log-probs are."""
        together = getattr(self.epilogue, "softmax_d_logits", None)
        if together and upstream and self.head.group is None:
            logits, targets = self._restricted(self._products(hidden), targets, rows)
            head, out = self.head, self._gradients(len(targets), len(upstream))
            made = together(logits, out, targets, head, head.tau(rows), upstream)
            here = (targets >= 0) & (targets < logits.shape[1])
            return replace(made, logps=where(here, made.logps, torch.nan)), out
        softmax = self.softmax(hidden, targets, rows, entropy or any(g.entropy is not None for g in upstream))
        return softmax, self.d_logits(softmax, targets, rows, *upstream) if upstream else []

    def _products(self, hidden: Tensor) -> Tensor:
        """hidden [n, H] · Wᵀ in the workspace [n, V], block by block."""
        for first in range(0, len(hidden), self.block_rows):
            block = hidden[first : first + self.block_rows]
            if len(block) < self.block_rows:
                block = torch.cat([block, block.new_zeros(self.block_rows - len(block), block.shape[1])])
            mm_logits(block, self.head.weight, self.logits[first : first + self.block_rows])
        return self.logits[: len(hidden)]

    def _restricted(self, logits: Tensor, targets: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """(the products [n, V] of the call's `rows`, in place only of the ids in their sets; the targets in them)."""
        head, n = self.head, len(targets)
        if head.sets is None:
            return logits, targets
        has, row, ids = head.sets.entries(rows)
        column = ids - head.first
        here = (row < n) & (column >= 0) & (column < logits.shape[1])  # another rank's shard may hold the id
        cells = where(here, row, self.per_visit), where(here, column)
        kept = self.logits[cells]
        places = torch.arange(n, device=logits.device)
        self.logits.index_fill_(0, where(has, places, self.per_visit), BANNED)
        self.logits[cells] = kept
        hit = (row < n) & (ids == targets[row.clamp(max=n - 1)])
        found = torch.zeros(n + 1, dtype=torch.int32, device=logits.device).index_add(0, row, hit.int())[:n] > 0
        return logits, where(found | ~has, targets, UNREACHABLE)

    def _gradients(self, rows: int, count: int) -> list[Tensor]:
        """Where one or two gradients of the logits [rows, V] go; the first overlays the logits."""
        first = self.logits.view(self.dtype)[:rows, : self.logits.shape[1]]
        return [first] if count == 1 else [first, self.second[:rows]]

    def d_hidden(self, d_logits: Tensor, wide: bool = False) -> Tensor:
        """[n, H] of d_logits [n, V], all shards of the vocabulary together; `wide`: in fp32 (fp64)."""
        return summed(mm_hidden(d_logits, self.head.weight, wide or self.head.group is not None), self.head.group)


class Gradients:
    """dH [rows, H] in hidden's dtype, dW [V, H] and dbias [V] in fp32 (fp64), from d logits a visit at a time."""

    def __init__(
        self, work: Workspace, hidden: Tensor, needs: tuple[bool, bool, bool], main_grad: Tensor | None = None
    ) -> None:
        need_hidden, need_weight, need_bias = needs
        self.work, self.dtype, head, kind = work, hidden.dtype, work.head, work.kind
        self.hidden = torch.zeros_like(hidden) if need_hidden else None
        self.main_grad = main_grad
        self.weight = torch.zeros_like(head.weight, dtype=kind) if need_weight and main_grad is None else main_grad
        self.bias = torch.zeros_like(head.bias, dtype=kind) if need_bias else None

    def add(self, d_logits: Tensor, block: Tensor, rows: Rows, again: bool = False) -> None:
        """The d logits [n, V] of the call's `rows`, whose hidden states are `block` [n, H]; `again`: a second time."""
        if self.hidden is not None:
            made = self.work.d_hidden(d_logits)
            if again:
                made = made.to(self.work.kind) + self.hidden[rows]
            self.hidden[rows] = made.to(self.hidden.dtype)
        if self.weight is not None:
            add_weight_gradient(self.weight, d_logits, block)
        if self.bias is not None:
            self.bias += d_logits.sum(0, dtype=self.work.kind)

    def results(self) -> tuple[Tensor, Tensor, Tensor]:
        """(dH, dW, dbias) in the arguments' dtypes; empty where not needed: a custom operator must return tensors."""
        head, weight = self.work.head, None if self.main_grad is not None else self.weight
        pairs = ((self.hidden, self.hidden), (weight, head.weight), (self.bias, head.bias))
        none = (self.work.logits.new_empty(0, dtype=self.dtype) for _ in pairs)
        return tuple(next(none) if x is None else x.to(like.dtype) for x, like in pairs)


# --- GEMMs ------------------------------------------------------------------------------------------------------------


def mm_logits(hidden: Tensor, weight: Tensor, out: Tensor) -> None:
    """out [rows, V] fp32 = hidden · weightᵀ with fp32 products and sums, whatever the inputs' dtypes."""
    if hidden.dtype == weight.dtype == out.dtype:
        torch.mm(hidden, weight.T, out=out)
    elif hidden.is_cuda and hidden.dtype == weight.dtype:
        torch.mm(hidden, weight.T, out_dtype=out.dtype, out=out)
    else:
        wide = hidden.to(out.dtype)
        for part in weight_tiles(weight, hidden):
            torch.mm(wide, weight[part].to(out.dtype).T, out=out[:, part])


def mm_hidden(d_logits: Tensor, weight: Tensor, wide: bool = False) -> Tensor:
    """[rows, H] = d_logits [rows, V] · weight [V, H], in d_logits' dtype, or with `wide` in fp32 (fp64)."""
    kind = accumulator(d_logits) if wide else d_logits.dtype
    if weight.dtype == d_logits.dtype == kind and (d_logits.is_cuda or _fast_on_cpu(d_logits)):
        return torch.mm(d_logits, weight)
    if weight.dtype == d_logits.dtype and d_logits.is_cuda:
        return torch.mm(d_logits, weight, out_dtype=kind)
    out = d_logits.new_zeros(len(d_logits), weight.shape[1], dtype=accumulator(d_logits))
    for part in weight_tiles(weight, d_logits):
        out.addmm_(d_logits[:, part].to(out.dtype), weight[part].to(out.dtype))
    return out.to(kind)


def _fast_on_cpu(d_logits: Tensor) -> bool:
    """Whether a product of d_logits [rows, V] in its own dtype is worth it, and right, on a CPU."""
    if d_logits.dtype == torch.float16:
        return False  # torch has no fast one
    # with AMX, oneDNN reads 16-bit columns in pairs: behind an odd width stands another number, which may be NaN
    return d_logits.dtype != torch.bfloat16 or d_logits.shape[1] % 2 == 0 or d_logits.is_contiguous()


def add_weight_gradient(d_weight: Tensor, d_logits: Tensor, hidden: Tensor) -> None:
    """d_weight [V, H] fp32 += d_logitsᵀ [V, rows] · hidden [rows, H]."""
    if d_logits.dtype == hidden.dtype == d_weight.dtype:
        d_weight.addmm_(d_logits.T, hidden)
    elif hidden.is_cuda and d_logits.dtype == hidden.dtype:
        torch.addmm(d_weight, d_logits.T, hidden, out_dtype=d_weight.dtype, out=d_weight)
    else:
        wide = hidden.to(d_weight.dtype)
        for part in weight_tiles(d_weight, hidden):
            d_weight[part].addmm_(d_logits[:, part].to(d_weight.dtype).T, wide)


def weight_tiles(weight: Tensor, block: Tensor) -> Iterator[slice]:
    """Ranges of the vocabulary that are cast at a time, of the head and for `block`, where a GEMM cannot mix dtypes."""
    rows = max(256, _CAST_BYTES // (4 * max(weight.shape[1], len(block))))
    for first in range(0, len(weight), rows):
        yield slice(first, min(first + rows, len(weight)))
