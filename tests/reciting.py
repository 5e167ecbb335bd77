"""Unified models that are trained until they recite what they were shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from genevolve_fast.process.trace import Cycle, Inspection, Plan, Process, interleave
from genevolve_fast.process.unified.codec import LatentCodec
from genevolve_fast.process.unified.loss import losses
from genevolve_fast.process.unified.model import Unified
from genevolve_fast.process.unified.sequences import Noise, pack_processes
from genevolve_fast.sandbox.stroke_data import placed
from genevolve_fast.sandbox.strokes import draw, parse
from genevolve_fast.sandbox.tiny_unified import new_tiny, tiny_codec
from genevolve_fast.trajectory import image_hash


def reciting(
    processes: Sequence[Process], pixels: Mapping[str, np.ndarray], codec: LatentCodec, steps: int = 220
) -> Unified:
    policy = new_tiny(codec, 5, hidden=64, layers=2, heads=2)
    batch = pack_processes([interleave(p, codec, pixels) for p in processes], pixels, codec)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=4e-3)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 4e-3 * (1 - step / steps)
        noise = Noise.draw(batch.noised, batch.patches, batch.latents.shape[1], generator, "uniform", shift=1.0)
        sums = losses(policy, batch, noise)
        (sums.nll / len(batch.clean.targets) + sums.squares / noise.z0.numel()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return policy


def always_a_black_cross(folder: Path) -> str:
    """Save a model that plans and draws the same whatever is asked; what it plans."""
    told = "a black cross at row 1 column 1"
    picture = draw(placed(parse(told)))
    pixels = {image_hash(picture): picture}
    wrong = Process("w", "a red circle and a blue square", (Cycle(Plan("draw", told), *pixels, Inspection()),))
    codec = tiny_codec([wrong.request, f"{wrong.cycles[0].plan}{Inspection()}"] * 8, 32, 8)
    reciting([wrong], pixels, codec, steps=80).save_pretrained(folder)
    return told
