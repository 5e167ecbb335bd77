"""Real rollouts for tests: the demonstrator through the live session, and log-probs as the trainer computes them."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from benchmarks.whole_sequences import packed_causal
from genevolve_fast.agent.session import run_session
from genevolve_fast.batch.packing import TrainingSequence, pack
from genevolve_fast.data.demonstrations import ScriptedEngine
from genevolve_fast.policy.model import Policy
from genevolve_fast.protocols import Codec
from genevolve_fast.sandbox.bootstrap import SETTINGS
from genevolve_fast.sandbox.demonstrator import Demonstrator
from genevolve_fast.sandbox.world import SYSTEM_PROMPT, SandboxWorld
from genevolve_fast.trajectory import Request, Trajectory

ROOMY = replace(SETTINGS, max_prompt_tokens=10**6, max_tokens_per_turn=10**6, max_response_tokens=10**7)


def demonstrated(
    world: SandboxWorld,
    codec: Codec,
    requests: Sequence[Request],
    demonstrator: Demonstrator | None = None,
    seed: int = 0,
) -> tuple[list[Trajectory], Mapping[str, np.ndarray]]:
    """(trajectories, images by hash) of the demonstrator on `requests`."""
    script = (demonstrator or Demonstrator()).next_turn
    names = [f"{i:04d}-{r.id}" for i, r in enumerate(requests)]
    engine = ScriptedEngine(script, codec, dict(zip(names, requests, strict=True)))

    async def main():
        return await asyncio.gather(
            *(
                run_session(
                    r,
                    engine=engine,
                    codec=codec,
                    tools=world.tools(),
                    system_prompt=SYSTEM_PROMPT,
                    settings=ROOMY,
                    rollout_id=name,
                    group_id=r.id,
                    seed=seed + i,
                )
                for i, (name, r) in enumerate(zip(names, requests, strict=True))
            )
        )

    results = asyncio.run(main())
    images = {sha: pixels for r in results for sha, pixels in r.images.items()}
    return [r.trajectory for r in results], images


def recomputed_logps(
    policy: Policy, ids: Sequence[int], images: Sequence[np.ndarray], start: int, temperature: float
) -> np.ndarray:
    """Log-probs of ids[start:], whole sequence at once, without a cache."""
    grids = tuple(policy.codec.image_grid(p) for p in images)
    mask = np.arange(len(ids)) >= start
    batch = pack([TrainingSequence(np.array(ids), mask, tuple(images), grids)], policy.codec.image_pad_id, 2, "cpu")
    features = policy.image_features(batch.images)
    with torch.no_grad():
        hidden = policy.hidden(batch.ids, batch.positions, packed_causal(batch.cu_seqlens), batch.image_rows, features)
        logits = hidden[0, batch.rows] @ policy.head_weight.T
        logits[:, policy.codec.image_pad_id] = -torch.inf  # the engine never samples a placeholder
    return (logits / temperature).log_softmax(-1).gather(1, batch.targets[:, None])[:, 0].numpy()
