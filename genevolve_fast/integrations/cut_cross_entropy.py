"""cut-cross-entropy's `linear_cross_entropy`, exact: nothing is filtered."""

from __future__ import annotations

from torch import Tensor

from genevolve_fast.ops import linear_logprob


def linear_cross_entropy(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    ignore_index: int = -100,
    softcap: float | None = None,
    reduction: str = "mean",
    shift: bool | int = False,
    filter_eps: str | None = "high",
    *,
    bias: Tensor | None = None,
    workspace_mb: float | None = None,
) -> Tensor:
    """Cross-entropy of e [..., H] · c [V, H]ᵀ at targets [...], as cut_cross_entropy.linear_cross_entropy gives it.

    `shift`: predict the token that many places later (True: 1); the result then has that many places fewer.
    `filter_eps` may keep its names ("auto", "high", None), but no gradient is left out whatever it says; a number is
    refused, because it would ask for exactly that. Raises ValueError naming the argument.
    """
    if filter_eps not in ("auto", "high", None):
        raise ValueError(f"filter_eps {filter_eps}: this implementation is exact and filters nothing")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be mean, sum or none, not {reduction!r}")
    if places := int(shift):
        e, targets = e[..., :-places, :], targets[..., places:]
    nll = -linear_logprob(
        e.reshape(-1, e.shape[-1]),
        c,
        targets.reshape(-1),
        bias=bias,
        softcap=softcap,
        ignore_index=ignore_index,
        workspace_mb=workspace_mb,
    ).logps
    if reduction == "none":
        return nll.reshape(targets.shape)
    return nll.sum() if reduction == "sum" else nll.sum() / (targets != ignore_index).sum()
