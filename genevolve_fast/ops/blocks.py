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

    `two`: room for two gradients of the logits at once. The first one overlays the logits.
    """

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
        self.dtype = hidden.dtype
        self.block_rows = block_rows
        vocabulary = len(head.weight)
        bytes_each = self.kind.itemsize + (self.dtype.itemsize if two else 0)
        self.per_visit = rows_per_visit(rows, vocabulary, block_rows, workspace_mb, bytes_each, hidden.device.type)
        self.logits = torch.empty(self.per_visit, vocabulary, dtype=self.kind, device=hidden.device)
        self.second = torch.empty_like(self.logits, dtype=self.dtype) if two else None
        self.epilogue = _EPILOGUES[choose(impl, hidden)]

    def visits(self, rows: int) -> Iterator[slice]:
        """Row ranges of the visits, in order."""
        for first in range(0, rows, self.per_visit):
            yield slice(first, min(first + self.per_visit, rows))

    def softmax(self, hidden: Tensor, targets: Tensor, head: Head, rows: slice | Tensor, entropy: bool) -> Softmax:
        """Logits of `hidden` [n, H] into the workspace, each row reduced; `targets` [n] in [0, V)."""
        n = len(hidden)
        for first in range(0, n, self.block_rows):
            block = hidden[first : first + self.block_rows]
            if len(block) < self.block_rows:
                block = torch.cat([block, block.new_zeros(self.block_rows - len(block), block.shape[1])])
            mm_logits(block, head.weight, self.logits[first : first + self.block_rows])
        return self.epilogue.softmax(self.logits[:n], targets, head, head.tau(rows), entropy)

    def d_logits(
        self, softmax: Softmax, targets: Tensor, head: Head, rows: slice | Tensor, *upstream: Upstream
    ) -> list[Tensor]:
        """For each upstream gradient (one or two) that of h·Wᵀ + b, [n, V] in hidden's dtype; logits are lost."""
        n, vocabulary = len(targets), self.logits.shape[1]
        out = [self.logits.view(self.dtype)[:n, :vocabulary]]
        if len(upstream) == 2:
            out.append(self.second[:n])
        self.epilogue.d_logits(self.logits[:n], out, softmax, targets, head, head.tau(rows), upstream)
        return out


# --- epilogues --------------------------------------------------------------------------------------------------------


def supported(impl: str, hidden: Tensor) -> str | None:
    """Why `impl` ("torch" or "triton") cannot run on hidden's device and dtype; None where it can."""
    if impl == "torch":
        return None
    if impl != "triton":
        return f"impl must be auto, torch or triton, not {impl!r}"
    if hidden.dtype == torch.float64:
        return "triton computes in fp32, not fp64"
    try:
        import triton
    except ImportError:
        return "triton is not installed"
    if not hidden.is_cuda and not triton.knobs.runtime.interpret:
        return f"triton needs a GPU, hidden is on {hidden.device}"
    return None


def choose(impl: str, hidden: Tensor) -> str:
    """The implementation that runs; auto is triton on a GPU. Raises ValueError with the reason where it cannot."""
    if impl == "auto":
        return "triton" if hidden.is_cuda and supported("triton", hidden) is None else "torch"
    if reason := supported(impl, hidden):
        raise ValueError(f"impl {impl!r}: {reason}")
    return impl


class _TorchEpilogue:
    """Strips of a few rows stay in a core's cache; the logits become z - maximum."""

    @staticmethod
    def softmax(logits: Tensor, targets: Tensor, head: Head, tau, entropy: bool) -> Softmax:
        out = logits.new_empty(4 if entropy else 3, len(logits))
        for s in _strips(logits):
            z = logits[s]
            to_logits(z, head, _part(tau, s))
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
        return Softmax(*out, *([] if entropy else [None]))

    @staticmethod
    def d_logits(
        logits: Tensor, out: list[Tensor], softmax: Softmax, targets: Tensor, head: Head, tau, upstream
    ) -> None:
        for s in _strips(logits):  # a strip is read whole before half-width results overlay it
            log_p = logits[s].sub_(softmax.log_sum[s, None])
            slope = _slope(log_p, softmax, s, head, _part(tau, s))
            p = log_p.exp()
            made = [_strip_gradient(g, p, log_p, softmax, targets, s) for g in upstream]
            for into, d in zip(out, made, strict=True):
                into[s] = d.mul_(slope)


class _TritonEpilogue:
    """kernels/logprob_epilogue.py: one read of the products for the softmax, one in-place pass for the gradient."""

    @staticmethod
    def _options(head: Head, tau) -> dict:
        tau = tau[:, 0] if isinstance(tau, Tensor) and tau.ndim else tau
        return dict(bias=head.bias, temperature=tau, softcap=head.softcap, logit_scale=head.scale)

    @classmethod
    def softmax(cls, logits: Tensor, targets: Tensor, head: Head, tau, entropy: bool) -> Softmax:
        from genevolve_fast.kernels.logprob_epilogue import softmax_epilogue

        return Softmax(*softmax_epilogue(logits, targets, **cls._options(head, tau)))

    @classmethod
    def d_logits(cls, logits, out: list[Tensor], softmax: Softmax, targets: Tensor, head: Head, tau, upstream) -> None:
        from genevolve_fast.kernels.logprob_epilogue import d_logits_epilogue

        for into, g in reversed(list(zip(out, upstream, strict=True))):  # the first overwrites what the second reads
            d_logits_epilogue(logits, into, targets, softmax, **g._asdict(), **cls._options(head, tau))


_EPILOGUES = {"torch": _TorchEpilogue, "triton": _TritonEpilogue}


def _strips(logits: Tensor) -> Iterator[slice]:
    rows = max(1, _STRIP_BYTES // max(1, logits.shape[1] * logits.element_size()))
    for first in range(0, len(logits), rows):
        yield slice(first, min(first + rows, len(logits)))


def _part(tau, s: slice):
    return tau[s] if isinstance(tau, Tensor) and tau.ndim else tau


def _strip_gradient(g: Upstream, p: Tensor, log_p: Tensor, softmax: Softmax, targets: Tensor, s: slice) -> Tensor:
    """d/dz of logps·logp + lse·lse + entropy·H for one strip [strip, V]."""
    zero = torch.zeros((), dtype=p.dtype, device=p.device)
    g_logp = zero.expand(len(targets))[s] if g.logps is None else g.logps[s].to(p.dtype)
    share = -g_logp if g.lse is None else g.lse[s].to(p.dtype) - g_logp
    if g.entropy is None:
        d = p * share[:, None]
    else:
        d = (log_p + softmax.entropy[s, None]).mul_(-g.entropy[s, None].to(p.dtype)).add_(share[:, None]).mul_(p)
    if g.logps is not None:
        d.scatter_add_(1, targets[s, None], g_logp[:, None])
    return d


def _slope(log_p: Tensor, softmax: Softmax, s: slice, head: Head, tau) -> Tensor | float:
    """dz / d(h·Wᵀ + b); tanh' = 1 - (z·tau/softcap)²."""
    if head.softcap is None:
        return head.scale / tau
    z = log_p + (softmax.log_sum[s] + softmax.maximum[s])[:, None]
    return z.mul_(tau / head.softcap).square_().neg_().add_(1).mul_(head.scale).div_(tau)


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
