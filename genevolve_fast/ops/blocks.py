"""Logits a few blocks at a time: the workspace, its GEMMs and the softmax epilogue in plain PyTorch.

Forward GEMMs always run on `block_rows` rows, so that equal hidden rows give equal bits wherever they stand; gradient
GEMMs run on all blocks of a visit at once and on the true row count.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

_STRIP_BYTES = 2 << 20  # elementwise work on this much at a time stays in a core's cache
_CAST_COLUMNS = 4096  # vocabulary rows of the head cast at a time where a GEMM cannot mix dtypes
_DEFAULT_BLOCKS = {"cpu": 1, "cuda": 4}  # of a visit: a GPU's gradient GEMMs want more rows, a CPU's do not


def accumulator(x: Tensor) -> torch.dtype:
    """Dtype of logits and weight gradients: fp32, fp64 for fp64 inputs."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Head:
    """z = softcap·tanh(scale·(h·Wᵀ + b)/softcap) / temperature; temperature a number or [rows]."""

    weight: Tensor
    bias: Tensor | None
    temperature: float | Tensor
    softcap: float | None
    scale: float

    @classmethod
    def of(cls, weight, bias, temperature, softcap, scale) -> Head:
        """Without the graphs that its tensors may belong to."""
        bare = lambda x: x.detach() if isinstance(x, Tensor) else x  # noqa: E731
        return cls(bare(weight), bare(bias), bare(temperature), softcap, scale)

    def rows(self, part: Tensor) -> Head:
        """The head of some rows."""
        t = self.temperature
        return replace(self, temperature=t[part]) if isinstance(t, Tensor) and t.ndim else self

    def tau(self, rows: slice | Tensor) -> float | Tensor:
        """The temperature of some rows: a number, or [rows, 1]."""
        t = self.temperature
        return t[rows][:, None] if isinstance(t, Tensor) and t.ndim else t


@dataclass(frozen=True)
class Softmax:
    """What the epilogue keeps of each row [rows]; the workspace then holds z - maximum."""

    logps: Tensor
    maximum: Tensor
    log_sum: Tensor
    entropy: Tensor | None

    @property
    def lse(self) -> Tensor:
        return self.maximum + self.log_sum


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


class Upstream(NamedTuple):
    """Gradients [n] of the loss with respect to logps, lse and entropy; None: the loss does not use it."""

    logps: Tensor | None = None
    lse: Tensor | None = None
    entropy: Tensor | None = None


class Workspace:
    """fp32 (fp64) logits [rows of a visit, V], allocated once and reused by every visit.

    `two`: room for two gradients of the logits at once; half-precision ones share the rows of the logits.
    """

    def __init__(
        self,
        rows: int,
        hidden: Tensor,
        head: Head,
        workspace_mb: float | None,
        block_rows: int,
        two: bool = False,
    ) -> None:
        self.kind = accumulator(hidden)
        self.block_rows = block_rows
        vocabulary = len(head.weight)
        apart = two and hidden.dtype == self.kind
        bytes_each = self.kind.itemsize * (2 if apart else 1)
        self.per_visit = rows_per_visit(rows, vocabulary, block_rows, workspace_mb, bytes_each, hidden.device.type)
        self.logits = torch.empty(self.per_visit, vocabulary, dtype=self.kind, device=hidden.device)
        self.second = torch.empty_like(self.logits) if apart else None
        self.strip = max(1, _STRIP_BYTES // max(1, vocabulary * self.kind.itemsize))

    def visits(self, rows: int) -> Iterator[slice]:
        """Row ranges of the visits, in order."""
        for first in range(0, rows, self.per_visit):
            yield slice(first, min(first + self.per_visit, rows))

    def softmax(self, hidden: Tensor, targets: Tensor, head: Head, rows: slice | Tensor, entropy: bool) -> Softmax:
        """Fill the workspace with z - max of `hidden` [n, H] and reduce each row; `targets` [n] in [0, V)."""
        n = len(hidden)
        for first in range(0, n, self.block_rows):
            block = hidden[first : first + self.block_rows]
            if len(block) < self.block_rows:
                block = torch.cat([block, block.new_zeros(self.block_rows - len(block), block.shape[1])])
            mm_logits(block, head.weight, self.logits[first : first + self.block_rows])
        out = torch.empty(4 if entropy else 3, n, dtype=self.kind, device=hidden.device)
        tau = head.tau(rows)
        for s in self._strips(n):
            z = self.logits[s]
            to_logits(z, head, tau[s] if isinstance(tau, Tensor) and tau.ndim else tau)
            maximum = z.amax(1, keepdim=True)
            z.sub_(maximum)
            e = z.exp()
            total = e.sum(1)
            log_sum = total.log()
            out[0, s] = z.gather(1, targets[s, None])[:, 0] - log_sum
            out[1, s] = maximum[:, 0]
            out[2, s] = log_sum
            if entropy:
                out[3, s] = log_sum - e.mul_(z).sum(1) / total
        return Softmax(out[0], out[1], out[2], out[3] if entropy else None)

    def d_logits(
        self,
        softmax: Softmax,
        targets: Tensor,
        head: Head,
        rows: slice | Tensor,
        dtype: torch.dtype,
        *upstream: Upstream,
    ) -> list[Tensor]:
        """For each upstream gradient [n, V] `dtype`: that of h·Wᵀ + b. The logits are overwritten.

        Half-precision results overlay the fp32 logits, the first in the left half of each row and a second in the
        right half; a strip is read whole before it is written.
        """
        n, vocabulary = len(targets), self.logits.shape[1]
        overlay = self.logits.view(dtype)
        out = [overlay[:n, :vocabulary], overlay[:n, vocabulary:]] if dtype != self.kind else [self.logits[:n]]
        if len(upstream) > len(out):
            out.append(self.second[:n])
        tau = head.tau(rows)
        for s in self._strips(n):
            log_p = self.logits[s].sub_(softmax.log_sum[s, None])
            slope = self._slope(log_p, softmax, s, head, tau[s] if isinstance(tau, Tensor) and tau.ndim else tau)
            p = log_p.exp()
            made = [self._strip_gradient(g, p, log_p, softmax, targets, s) for g in upstream]
            for into, d in zip(out, made, strict=False):
                into[s] = d.mul_(slope)
        return out[: len(upstream)]

    def _strip_gradient(self, g: Upstream, p: Tensor, log_p: Tensor, softmax: Softmax, targets: Tensor, s: slice):
        """d/dz of logps·logp + lse·lse + entropy·H for one strip [strip, V]."""
        zero = torch.zeros((), dtype=self.kind, device=p.device)
        g_logp = zero.expand(len(targets))[s] if g.logps is None else g.logps[s].to(self.kind)
        share = -g_logp if g.lse is None else g.lse[s].to(self.kind) - g_logp
        if g.entropy is None:
            d = p * share[:, None]
        else:
            d = (log_p + softmax.entropy[s, None]).mul_(-g.entropy[s, None].to(self.kind)).add_(share[:, None]).mul_(p)
        if g.logps is not None:
            d.scatter_add_(1, targets[s, None], g_logp[:, None])
        return d

    def _slope(self, log_p: Tensor, softmax: Softmax, s: slice, head: Head, tau) -> Tensor | float:
        """dz / d(h·Wᵀ + b); tanh' = 1 - (z·tau/softcap)²."""
        if head.softcap is None:
            return head.scale / tau
        z = log_p + (softmax.log_sum[s] + softmax.maximum[s])[:, None]
        return z.mul_(tau / head.softcap).square_().neg_().add_(1).mul_(head.scale).div_(tau)

    def _strips(self, n: int) -> Iterator[slice]:
        for first in range(0, n, self.strip):
            yield slice(first, min(first + self.strip, n))


def to_logits(z: Tensor, head: Head, tau) -> None:
    """h·Wᵀ to z, in place."""
    if head.bias is not None:
        z += head.bias.to(z.dtype)
    if head.scale != 1:
        z *= head.scale
    if head.softcap is not None:
        z.div_(head.softcap).tanh_().mul_(head.softcap)
    if isinstance(tau, Tensor) or tau != 1:
        z /= tau


def target_slope(z: Tensor, head: Head, rows: slice) -> Tensor:
    """dz/d(h·Wᵀ + b) [n] at logits z [n]."""
    tau = head.temperature[rows] if isinstance(head.temperature, Tensor) and head.temperature.ndim else head.temperature
    slope = torch.full_like(z, head.scale) / tau
    return slope if head.softcap is None else slope * (1 - (z * tau / head.softcap).square())


# --- GEMMs ------------------------------------------------------------------------------------------------------------


def mm_logits(hidden: Tensor, weight: Tensor, out: Tensor) -> None:
    """out [rows, V] fp32 = hidden · weightᵀ with fp32 products and sums, whatever the inputs' dtypes."""
    if hidden.dtype == weight.dtype == out.dtype:
        torch.mm(hidden, weight.T, out=out)
    elif hidden.is_cuda and hidden.dtype == weight.dtype:
        torch.mm(hidden, weight.T, out_dtype=out.dtype, out=out)
    else:
        wide = hidden.to(out.dtype)
        for part in weight_tiles(weight):
            torch.mm(wide, weight[part].to(out.dtype).T, out=out[:, part])


def mm_hidden(d_logits: Tensor, weight: Tensor) -> Tensor:
    """[rows, H] = d_logits [rows, V] · weight [V, H], in d_logits' dtype."""
    if weight.dtype == d_logits.dtype:
        return torch.mm(d_logits, weight)
    out = d_logits.new_zeros(len(d_logits), weight.shape[1])
    for part in weight_tiles(weight):
        out.addmm_(d_logits[:, part], weight[part].to(out.dtype))
    return out


def add_weight_gradient(d_weight: Tensor, d_logits: Tensor, hidden: Tensor) -> None:
    """d_weight [V, H] fp32 += d_logitsᵀ [V, rows] · hidden [rows, H]."""
    if d_logits.dtype == hidden.dtype == d_weight.dtype:
        d_weight.addmm_(d_logits.T, hidden)
    elif hidden.is_cuda and d_logits.dtype == hidden.dtype:
        torch.addmm(d_weight, d_logits.T, hidden, out_dtype=d_weight.dtype, out=d_weight)
    else:
        wide = hidden.to(d_weight.dtype)
        for part in weight_tiles(d_weight):
            d_weight[part].addmm_(d_logits[:, part].to(d_weight.dtype).T, wide)


def weight_tiles(weight: Tensor) -> Iterator[slice]:
    for first in range(0, len(weight), _CAST_COLUMNS):
        yield slice(first, min(first + _CAST_COLUMNS, len(weight)))
