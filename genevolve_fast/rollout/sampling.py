"""Sampling whose randomness belongs to the request: equal (logits, seed, position) give equal tokens in any batch."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


class RequestRandom:
    """Counter-based uniforms of one request: the n-th draw depends on the seed and n only (Philox)."""

    def __init__(self, seed: int) -> None:
        self._generator = np.random.Generator(np.random.Philox(key=seed % (1 << 64)))

    def uniform(self) -> float:
        return float(self._generator.random())


def sample(logits: Tensor, temperature: float, top_p: float, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Draw one token per row by inverting the cumulative distribution.

    logits [rows, V]; uniforms [rows] in [0, 1). Returns (ids [rows], logps [rows] in nats of the distribution sampled
    from: after temperature and nucleus truncation, fp32). temperature 0 takes the argmax with log-probability 0.
    """
    if temperature == 0:
        return logits.argmax(-1), torch.zeros(len(logits), dtype=torch.float32, device=logits.device)
    logps = torch.log_softmax(logits.float() / temperature, -1)
    ordered, order = logps.sort(dim=-1, descending=True, stable=True)
    probs = ordered.exp()
    before = probs.cumsum(-1) - probs
    kept = probs.masked_fill(before >= top_p, 0.0) if top_p < 1 else probs  # the first token is always kept
    cumulative = kept.cumsum(-1)
    total = cumulative[:, -1:]
    choice = torch.searchsorted(cumulative, uniforms[:, None].to(cumulative) * total, right=True)
    choice = torch.minimum(choice, (kept > 0).sum(-1, keepdim=True) - 1)  # rounding may step past the last kept token
    ids = order.gather(1, choice)[:, 0]
    chosen = ordered.gather(1, choice)[:, 0] - total[:, 0].log()
    return ids, chosen.clamp(max=0.0)
