"""What a unified model learns: the next text token, and the velocity of noised drafts, in one pass."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from genevolve_fast.ops import linear_logprob
from genevolve_fast.policy.attention import Attend
from genevolve_fast.policy.model import ImageFeatures
from genevolve_fast.process.unified.attention import generalised_attention
from genevolve_fast.process.unified.model import Unified
from genevolve_fast.process.unified.sequences import Noise, UnifiedBatch


class Losses(NamedTuple):
    """Sums over a batch: nll of its text targets in nats, squared errors of all numbers of its noised drafts."""

    nll: Tensor
    squares: Tensor


def forward(policy: Unified, batch: UnifiedBatch, noise: Noise, attend: Attend | None = None) -> tuple[Tensor, Tensor]:
    """(last hidden states [clean rows, H], velocities [noised rows, numbers]); `attend`: not the one that suits."""
    flow, z, t = policy.flow, *mixed(batch, noise)
    clean = batch.latents.to(z.dtype)
    embeds = flow.embed(
        torch.cat([clean, z]),
        torch.cat([batch.places, batch.places[batch.copied]]),
        torch.cat([t.new_zeros(len(clean)), t]),
    )
    attend = attend or generalised_attention(batch.blocks, z.device, z.dtype)
    hidden = policy.hidden(batch.ids, batch.positions, attend, batch.image_rows, ImageFeatures(embeds, ()))[0]
    border = batch.clean.num_tokens
    return hidden[:border], flow.velocity(hidden[border:], z, t)


def mixed(batch: UnifiedBatch, noise: Noise) -> tuple[Tensor, Tensor]:
    """(z_t = t·z0 + (1 - t)·z1 [noised rows, numbers], t [noised rows]) with z0 the noise and z1 the drafts."""
    t = noise.times.repeat_interleave(batch.patches)
    z1 = batch.latents[batch.copied].to(noise.z0.dtype)
    return t[:, None] * noise.z0 + (1 - t[:, None]) * z1, t


def losses(policy: Unified, batch: UnifiedBatch, noise: Noise, attend: Attend | None = None) -> Losses:
    """The two sums of `L = ce_weight · CE + MSE`; only rows that predict a text target reach the text head."""
    hidden, velocity = forward(policy, batch, noise, attend)
    logps = linear_logprob(hidden[batch.clean.rows], policy.head_weight, batch.clean.targets).logps
    target = noise.z0 - batch.latents[batch.copied].to(noise.z0.dtype)
    return Losses(-logps.sum(), (velocity - target).square().sum())
