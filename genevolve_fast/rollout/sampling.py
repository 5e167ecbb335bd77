"""Sampling whose randomness belongs to the request: equal (logits, seed, position) give equal tokens in any batch."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class RequestRandom:
    """Counter-based uniforms of one request: the n-th draw depends on the seed and n only (Philox)."""

    def __init__(self, seed: int) -> None:
        self._generator = np.random.Generator(np.random.Philox(key=seed % (1 << 64)))

    def uniform(self) -> float:
        return float(self._generator.random())


class Sampled(NamedTuple):
    """ids [rows]; logps [rows] in nats of the distribution sampled from, fp32; kept: each row's ids of the nucleus."""

    ids: Tensor
    logps: Tensor
    kept: list[list[int]] | None = None


def sample(logits: Tensor, temperature: float, top_p: float, uniforms: Tensor, return_kept: bool = False) -> Sampled:
    """Draw one token per row by inverting the cumulative distribution after temperature and nucleus truncation.

    logits [rows, V]; uniforms [rows] in [0, 1). temperature 0 takes the argmax with log-probability 0. `return_kept`
    gives the ids that could have been drawn, where top_p is below 1 and the temperature above 0.
    """
    if temperature == 0:
        return Sampled(logits.argmax(-1), torch.zeros(len(logits), dtype=torch.float32, device=logits.device))
    logps = torch.log_softmax(logits.float() / temperature, -1)
    ordered, order = logps.sort(dim=-1, descending=True, stable=True)
    probs = ordered.exp()
    before = probs.cumsum(-1) - probs
    kept = probs.masked_fill(before >= top_p, 0.0) if top_p < 1 else probs  # the first token is always kept
    cumulative = kept.cumsum(-1)
    total = cumulative[:, -1:]
    choice = torch.searchsorted(cumulative, uniforms[:, None].to(cumulative) * total, right=True)
    size = (kept > 0).sum(-1, keepdim=True)
    choice = torch.minimum(choice, size - 1)  # rounding may step past the last kept token
    ids = order.gather(1, choice)[:, 0]
    chosen = ordered.gather(1, choice)[:, 0] - total[:, 0].log()
    sets = None
    if return_kept and top_p < 1:
        sets = [row.tolist() for row in order[kept > 0].split(size[:, 0].tolist())]
    return Sampled(ids, chosen.clamp(max=0.0), sets)
