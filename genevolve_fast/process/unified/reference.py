"""The loss of one process in plain torch, with whole masks and one sequence a draft: what the packed pass equals."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from genevolve_fast.process.unified.latents import to_latents
from genevolve_fast.process.unified.loss import Losses
from genevolve_fast.process.unified.model import Unified
from genevolve_fast.process.unified.sequences import Noise, drawn_images
from genevolve_fast.trajectory import Trajectory


def reference_losses(
    policy: Unified, trajectory: Trajectory, pictures: list[np.ndarray], noise: Noise, dtype: torch.dtype
) -> Losses:
    """`pictures` of all its images in order; `noise` of those that are drawn, in order.

    Each noised copy is a sequence of its own: what stands before it, and the noised image as its last rows.
    """
    numbers = policy.flow.leave.out_features
    latents = [to_latents([p], policy.codec.patch).to(dtype) for p in pictures]
    zeros = [torch.zeros(len(z), dtype=dtype) for z in latents]
    ids = torch.from_numpy(trajectory.ids)
    spans = [(i.start, i.stop) for i in trajectory.images]
    hidden = _decode(policy, ids, spans, latents, zeros)
    targets = np.flatnonzero(trajectory.loss_mask)
    logits = hidden[targets - 1] @ policy.head_weight.T
    nll = -logits.log_softmax(-1)[torch.arange(len(targets)), ids[targets]].sum()
    squares = torch.zeros((), dtype=dtype)
    z0s = noise.z0.to(dtype).view(len(noise.times), -1, numbers)
    drawn = drawn_images(trajectory)
    copies = len(noise.times) // len(drawn)
    noised = [image for image in drawn for _ in range(copies)]
    for image, t, z0 in zip(noised, noise.times.to(dtype), z0s, strict=True):
        index = trajectory.images.index(image)
        z1 = latents[index]
        z = t * z0 + (1 - t) * z1
        times = t.expand(len(z))
        own = [*latents[:index], z], [*zeros[:index], times]
        state = _decode(policy, ids[: image.stop], spans[: index + 1], *own)[image.start :]
        squares = squares + (policy.flow.velocity(state, z, times) - (z0 - z1)).square().sum()
    return Losses(nll, squares)


def _decode(
    policy: Unified, ids: Tensor, spans: list[tuple[int, int]], latents: list[Tensor], times: list[Tensor]
) -> Tensor:
    """Last hidden states [n, H] of one sequence; image i is the rows spans[i]."""
    n, config, decoder = len(ids), policy.text_config, policy.decoder
    sees = torch.ones(n, n).tril().bool()
    positions, at, last = torch.arange(n), 0, 0
    side = policy.codec.size // policy.codec.patch
    x = decoder.embed_tokens(ids)
    for (start, stop), z, t in zip(spans, latents, times, strict=True):
        sees[start:stop, start:stop] = True
        positions[last:start] = torch.arange(at, at + start - last)
        at += start - last
        positions[start:stop] = at
        at, last = at + side, stop
        x = torch.cat([x[:start], policy.flow.embed(z, torch.arange(stop - start), t), x[stop:]])
    positions[last:] = torch.arange(at, at + n - last)
    cos, sin = _turns(config, positions, x.dtype)
    for layer in decoder.layers:
        a = layer.self_attn
        y = layer.input_layernorm(x)
        q = a.q_norm(a.q_proj(y).view(n, -1, a.head_dim)).transpose(0, 1)
        k = a.k_norm(a.k_proj(y).view(n, -1, a.head_dim)).transpose(0, 1)
        v = a.v_proj(y).view(n, -1, a.head_dim).transpose(0, 1)
        k, v = (u.repeat_interleave(len(q) // len(u), dim=0) for u in (k, v))
        q, k = (u * cos + _half_turned(u) * sin for u in (q, k))
        scores = (q @ k.transpose(1, 2) * a.head_dim**-0.5).masked_fill(~sees, float("-inf"))
        x = x + a.o_proj((scores.softmax(-1) @ v).transpose(0, 1).reshape(n, -1))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return decoder.norm(x)


def _turns(config, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos, sin [n, d] in fp32, as transformers keeps rotations whatever the model's dtype."""
    d, theta = config.head_dim, config.rope_parameters["rope_theta"]
    rates = 1.0 / theta ** (torch.arange(0, d, 2).float() / d)
    angles = positions[:, None].float() * rates
    angles = torch.cat([angles, angles], dim=1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _half_turned(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)
