"""The unified model: Qwen3's decoder with a text head, and a flow head over the latent patches of pictures."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from genevolve_fast.policy.model import Policy, no_policy
from genevolve_fast.process.unified.codec import LatentCodec

_FREQUENCIES = 64  # of the time embedding: as many sines as cosines
_EARLIEST = 0.05  # time below which a predicted picture is not divided by less


class Flow(nn.Module):
    """Latent patches into the decoder and velocities out of it.

    Time t runs from 0, the picture, to 1, noise: z_t = t·z0 + (1 - t)·z1 with z0 the noise and z1 the picture, as in
    arXiv 2604.04746 and BAGEL, whose velocity is dz/dt = z0 - z1. A picture that is read enters at t = 0.
    """

    def __init__(self, hidden: int, patches: int, numbers: int, predicts: str) -> None:
        """`patches` of a picture, `numbers` of a patch."""
        super().__init__()
        self.enter = nn.Linear(numbers, hidden)
        self.place = nn.Embedding(patches, hidden)
        self.time = nn.Sequential(nn.Linear(2 * _FREQUENCIES, hidden), nn.SiLU(), nn.Linear(hidden, hidden))
        self.leave = nn.Linear(hidden, numbers)
        self.predicts = predicts

    def embed(self, z: Tensor, places: Tensor, t: Tensor) -> Tensor:
        """Rows [n, H] of latents z [n, numbers] at times t [n]; places [n] int64 within their pictures."""
        return self.enter(z) + self.place(places) + self.time(_waves(t))

    def velocity(self, hidden: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """z0 - z1 [n, numbers] as the rows' last hidden states [n, H] predict it.

        With `predicts` "picture" the head gives z1 and the velocity follows, (z_t - z1) / t: patches of flat shapes
        have few dimensions, noise has them all (arXiv 2511.13720).
        """
        head = self.leave(hidden)
        return head if self.predicts == "velocity" else (z - head) / t.clamp(min=_EARLIEST)[:, None]


def _waves(t: Tensor) -> Tensor:
    """[n, 2 · _FREQUENCIES] of times [n] in 0..1."""
    steps = torch.arange(_FREQUENCIES, device=t.device, dtype=t.dtype)
    angles = 1000 * t[:, None] * torch.exp(-math.log(10000) / _FREQUENCIES * steps)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class UnifiedModel(Qwen3ForCausalLM):
    """`config` is Qwen3's and picture_size, patch_size (pixels), predicts ("picture" or "velocity") and shift."""

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__(config)
        side = config.picture_size // config.patch_size
        self.flow = Flow(config.hidden_size, side * side, 3 * config.patch_size**2, config.predicts)
        self.post_init()


class Unified(Policy):
    """A UnifiedModel in the library's own layer loop: `hidden` for the rows, `flow` for what enters and leaves."""

    model: UnifiedModel
    codec: LatentCodec

    @property
    def flow(self) -> Flow:
        return self.model.flow

    @property
    def shift(self) -> float:
        """Of the times that it was trained at, as `flow.shift` was."""
        return getattr(self.model.config, "shift", 1.0)

    @classmethod
    def from_pretrained(cls, path: str | Path, dtype: torch.dtype = torch.float32) -> Unified:
        if not (Path(path) / "config.json").exists():
            raise no_policy(path)
        return cls(UnifiedModel.from_pretrained(path, dtype=dtype), LatentCodec.from_pretrained(path))


def new_unified(codec: LatentCodec, config: Qwen3Config, seed: int) -> Unified:
    """Random weights for this tokenizer; the same seed gives the same."""
    config.picture_size, config.patch_size = codec.size, codec.patch
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = UnifiedModel(config)
        flow = model.flow
        nn.init.zeros_(flow.leave.weight)
        # as large as a noisy patch: where a row stands and how noisy it is must not drown in it
        nn.init.normal_(flow.place.weight, std=0.2)
        nn.init.normal_(flow.time[0].weight, std=config.hidden_size**-0.5)
        nn.init.normal_(flow.time[2].weight, std=0.05)
    return Unified(model.float(), codec)
