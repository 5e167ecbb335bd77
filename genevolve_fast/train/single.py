"""One step's batch outside a run: what `profile` measures and `verify` compares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np

from genevolve_fast.batch.groups import TrainingRollout
from genevolve_fast.experience.memory import ExperienceMemory
from genevolve_fast.policy.model import Policy
from genevolve_fast.protocols import TrainedEngine, World
from genevolve_fast.train.config import EvolveConfig
from genevolve_fast.train.evolve import (
    group_by_request,
    judge,
    learn_from,
    requests_of_step,
    sample,
    training_rollouts,
)
from genevolve_fast.train.run import RunError
from genevolve_fast.train.update import forwarded
from genevolve_fast.trajectory import Request


def sample_step(
    config: EvolveConfig,
    policy: Policy,
    world: World,
    pool: Sequence[Request],
    engine: TrainedEngine,
    memory: ExperienceMemory,
    step: int,
    sampling: AbstractContextManager | None = None,
) -> tuple[list[TrainingRollout], Mapping[str, np.ndarray]]:
    """(rollouts, images by hash) that evolve would train on in `step`; `sampling` is entered around the engine's part.

    Raises RunError where none of them has a gradient.
    """
    requests = {r.id: r for r in requests_of_step(pool, config, step)}
    with sampling or nullcontext():
        rollouts = sample(config, policy, world, engine, requests, step)
    rollouts = judge(rollouts, requests, world)
    groups = group_by_request(rollouts.trajectories)
    experiences, _ = learn_from(groups, requests, world, memory, config, step)
    batch = training_rollouts(groups, experiences, policy, config)
    if not forwarded(batch, config.objective.kl_coef > 0):
        raise RunError(
            f"step {step}: every group's rewards are equal and there is no experience, so no rollout has a gradient; "
            "take another --set seed=N, or more rollout.prompts_per_step"
        )
    return batch, rollouts.images
