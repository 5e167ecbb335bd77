"""What stands between the head's GEMMs: products h·Wᵀ to log-probs, and to the gradient of the logits in place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from genevolve_fast.ops.masks import where

_NOTHING = -1e30  # exp of it is 0, and 0 times it too
_UNDERFLOW = {torch.float32: -104.0, torch.float64: -746.0}  # exp of it, and of anything below, is 0
_STRIP_BYTES = 2 << 20  # elementwise work on this much at a time stays in a core's cache
IMPLEMENTATIONS = ("torch", "triton", "cuda")


@dataclass(frozen=True)
class Softmax:
    """What the epilogue keeps of each row [rows]; `origin` is what the workspace's rows were lowered by, or None."""

    logps: Tensor
    maximum: Tensor
    log_sum: Tensor
    entropy: Tensor | None
    origin: Tensor | None = None

    @property
    def lse(self) -> Tensor:
        return self.maximum + self.log_sum


class Upstream(NamedTuple):
    """Gradients [n] of the loss with respect to logps, lse and entropy; None: the loss does not use it."""

    logps: Tensor | None = None
    lse: Tensor | None = None
    entropy: Tensor | None = None


def supported(impl: str, hidden: Tensor) -> str | None:
    """Why `impl` cannot run on hidden's device and dtype; None where it can."""
    if impl in ("auto", "torch"):
        return None
    if impl not in IMPLEMENTATIONS:
        return f"impl must be one of auto, {', '.join(IMPLEMENTATIONS)}, not {impl!r}"
    if impl == "cuda":
        from genevolve_fast.ops import csrc

        return csrc.reason(hidden)
    if hidden.dtype == torch.float64:
        return f"{impl} computes in fp32, not fp64"
    try:
        import triton
    except ImportError:
        return "triton is not installed"
    if not hidden.is_cuda and not triton.knobs.runtime.interpret:
        return f"triton needs a GPU, hidden is on {hidden.device}"
    return None


def choose(impl: str, hidden: Tensor) -> str:
    """The implementation that runs. Raises ValueError with the reason where it cannot.

    auto is triton on a GPU: cuda has not been measured against it yet.
    """
    if impl == "auto":
        return "triton" if hidden.is_cuda and supported("triton", hidden) is None else "torch"
    if reason := supported(impl, hidden):
        raise ValueError(f"impl {impl!r}: {reason}")
    return impl


class TorchEpilogue:
    """Strips of a few rows stay in a core's cache; the logits become z - maximum."""

    @staticmethod
    def softmax(logits: Tensor, targets: Tensor, head, tau, entropy: bool) -> Softmax:
        out = logits.new_empty(4 if entropy else 3, len(logits))
        for s in _strips(logits):
            z = logits[s]
            _to_logits(z, head, _part(tau, s))
            if head.bias is not None:
                z.clamp_(min=_NOTHING)  # a bias of -inf bans a token: 0·inf would reach entropy and gradient
            maximum = z.amax(1, keepdim=True)
            target = z.gather(1, targets[s, None].clamp(0, z.shape[1] - 1)).double()
            z.sub_(maximum)
            e = _exp(z, head)
            total = _row_sums(e)
            log_sum = total.double().log()  # once a row in fp64, so that logp is rounded once
            out[0, s] = (target - maximum)[:, 0] - log_sum
            out[1, s] = maximum[:, 0]
            out[2, s] = log_sum
            if entropy:
                out[3, s] = log_sum - _row_sums(e.mul_(z)) / total
        return Softmax(*out[:3], out[3] if entropy else None, origin=out[1])

    @staticmethod
    def d_logits(
        logits: Tensor, out: list[Tensor], softmax: Softmax, targets: Tensor, head, tau, upstream: Sequence[Upstream]
    ) -> None:
        shift = (softmax.maximum - softmax.origin) + softmax.log_sum
        for s in _strips(logits):  # a strip is read whole before half-width results overlay it
            log_p = logits[s].sub_(shift[s, None])
            slope = _slope(log_p, softmax, s, head, _part(tau, s))
            p = _exp(log_p, head)
            made = [_strip_gradient(g, p, log_p, softmax, targets, s) for g in upstream]
            for into, d in zip(out, made, strict=True):
                into[s] = d.mul_(slope)


class TritonEpilogue:
    """kernels/logprob_epilogue.py: one read of the products for the softmax, one in-place pass for the gradient."""

    @staticmethod
    def _options(head, tau) -> dict:
        tau = tau[:, 0] if isinstance(tau, Tensor) and tau.ndim else tau
        return dict(bias=head.bias, temperature=tau, softcap=head.softcap, logit_scale=head.scale)

    @classmethod
    def softmax(cls, logits: Tensor, targets: Tensor, head, tau, entropy: bool) -> Softmax:
        from genevolve_fast.kernels.logprob_epilogue import softmax_epilogue

        return Softmax(*softmax_epilogue(logits, targets, **cls._options(head, tau)))

    @classmethod
    def d_logits(cls, logits, out: list[Tensor], softmax: Softmax, targets: Tensor, head, tau, upstream) -> None:
        from genevolve_fast.kernels.logprob_epilogue import d_logits_epilogue

        for into, g in reversed(list(zip(out, upstream, strict=True))):  # the first overwrites what the second reads
            d_logits_epilogue(logits, into, targets, softmax, **g._asdict(), **cls._options(head, tau))


def epilogue(impl: str):
    """The class behind an implementation's name."""
    if impl == "cuda":
        from genevolve_fast.ops.csrc import CudaEpilogue

        return CudaEpilogue
    return {"torch": TorchEpilogue, "triton": TritonEpilogue}[impl]


# --- torch, strip by strip --------------------------------------------------------------------------------------------


def _strips(logits: Tensor) -> Iterator[slice]:
    rows = max(1, _STRIP_BYTES // max(1, logits.shape[1] * logits.element_size()))
    for first in range(0, len(logits), rows):
        yield slice(first, min(first + rows, len(logits)))


def _row_sums(x: Tensor) -> Tensor:
    """[n] the sums of the rows. A row alone is summed as two are: torch splits a sum with one result over threads."""
    return x.sum(1) if len(x) > 1 else x.expand(2, -1).sum(1)[: len(x)]


def _exp(z: Tensor, head) -> Tensor:
    """The same bits as exp's; banned logits by the thousand would take a CPU twelve times as long."""
    if head.sets is None:
        return z.exp()
    lowest = _UNDERFLOW[z.dtype]
    e = torch.nn.functional.threshold(z, lowest, 0).exp_()
    return torch.where(z <= lowest, z.new_zeros(()), e, out=e)


def _part(tau, s: slice):
    return tau[s] if isinstance(tau, Tensor) and tau.ndim else tau


def _to_logits(z: Tensor, head, tau) -> None:
    """h·Wᵀ to z, in place."""
    if head.bias is not None:
        z += head.bias.to(z.dtype)
    if head.scale != 1:
        z *= head.scale
    if head.softcap is not None:
        z.div_(head.softcap).tanh_().mul_(head.softcap)
    if isinstance(tau, Tensor) or tau != 1:
        z /= tau


def _strip_gradient(g: Upstream, p: Tensor, log_p: Tensor, softmax: Softmax, targets: Tensor, s: slice) -> Tensor:
    """d/dz of logps·logp + lse·lse + entropy·H for one strip [strip, V]."""
    g_logp = p.new_zeros(len(p)) if g.logps is None else g.logps[s].to(p.dtype)
    share = -g_logp if g.lse is None else g.lse[s].to(p.dtype) - g_logp
    if g.entropy is None:
        d = p * share[:, None]
    else:
        d = (log_p + softmax.entropy[s, None]).mul_(-g.entropy[s, None].to(p.dtype)).add_(share[:, None]).mul_(p)
    if g.logps is not None:
        here = (targets[s] >= 0) & (targets[s] < p.shape[1])  # another rank's shard may hold the target
        d.scatter_add_(1, where(here, targets[s])[:, None], where(here, g_logp)[:, None])
    return d


def _slope(log_p: Tensor, softmax: Softmax, s: slice, head, tau) -> Tensor | float:
    """dz / d(h·Wᵀ + b); tanh' = 1 - (z·tau/softcap)²."""
    if head.softcap is None:
        return head.scale / tau
    z = log_p + softmax.lse[s, None]
    return z.mul_(tau / head.softcap).square_().neg_().add_(1).mul_(head.scale).div_(tau)
