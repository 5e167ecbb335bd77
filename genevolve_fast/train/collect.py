"""From requests to judged trajectories: agent, engine, tools, renderer and judges meet here."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from genevolve_fast import event_loop
from genevolve_fast.agent.session import SessionSettings, run_session
from genevolve_fast.protocols import Codec, Engine, World
from genevolve_fast.reward.scoring import score
from genevolve_fast.trajectory import Failed, Request, Trajectory


@dataclass(frozen=True)
class Rollouts:
    """Trajectories in a fixed order, pixels of the images they saw by hash, rendered pictures by trajectory id."""

    trajectories: tuple[Trajectory, ...]
    images: Mapping[str, np.ndarray]
    pictures: Mapping[str, np.ndarray]


def stable_seed(*parts: object) -> int:
    """A 63-bit seed that depends on `parts` only, the same in every process."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1


def sample_rollouts(
    requests: Sequence[Request],
    num_generations: int,
    *,
    world: World,
    engine: Engine,
    codec: Codec,
    settings: SessionSettings,
    seed: int,
    step: int = 0,
    policy_step: int | None = None,
    on_done: Callable[[], None] | None = None,
) -> Rollouts:
    """Run `num_generations` sessions of every request concurrently; seeds depend on (seed, step, request, k).

    `policy_step`: updates that the engine's weights have seen; none: `step`.
    """
    plan = [
        (request, f"{step:06d}/{i:04d}-{request.id}", k)
        for i, request in enumerate(requests)
        for k in range(num_generations)
    ]
    ids = [f"{group}/{k}" for _, group, k in plan]
    for rollout_id in ids:
        engine.open(rollout_id)  # all of them first: a deterministic engine waits for every open session

    async def one(request: Request, group: str, k: int, rollout_id: str):
        result = await run_session(
            request,
            engine=engine,
            codec=codec,
            tools=world.tools,
            system_prompt=world.system_prompt,
            settings=settings,
            rollout_id=rollout_id,
            group_id=group,
            seed=stable_seed(seed, step, request.id, k),
            policy_step=step if policy_step is None else policy_step,
        )
        if on_done:
            on_done()
        return result

    async def main():
        return await asyncio.gather(*(one(*task, rid) for task, rid in zip(plan, ids, strict=True)))

    results = event_loop.run(main())
    images = {sha: pixels for r in results for sha, pixels in r.images.items()}
    return Rollouts(tuple(r.trajectory.validate() for r in results), images, {})


def judge_rollouts(rollouts: Rollouts, requests: Mapping[str, Request], world: World, render_seed: int = 0) -> Rollouts:
    """Render and judge every trajectory without an outcome; failures become typed outcomes, never zeros."""
    waiting = [t for t in rollouts.trajectories if t.outcome is None]
    truths = {id_: _truth(world, requests[id_]) for id_ in dict.fromkeys(t.request_id for t in waiting)}

    async def one(t: Trajectory) -> tuple[Trajectory, np.ndarray | None]:
        truth = truths[t.request_id]
        if isinstance(truth, Failed):
            world.incidents.note(truth.stage, truth.kind)
            return t.replace(outcome=truth), None
        return await score(
            requests[t.request_id],
            t,
            renderer=world.renderer,
            image_judge=world.image_judge,
            program_judge=world.program_judge,
            truth=truth,
            images=rollouts.images,
            seed=render_seed,
            incidents=world.incidents,
        )

    async def main():
        return await asyncio.gather(*map(one, waiting))

    scored = event_loop.run(main())
    done = {t.id: t for t, _ in scored}
    pictures = {**rollouts.pictures, **{t.id: picture for t, picture in scored if picture is not None}}
    return Rollouts(tuple(done.get(t.id, t) for t in rollouts.trajectories), rollouts.images, pictures)


def _truth(world: World, request: Request) -> np.ndarray | Failed:
    """The ground truth, or why there is none: a broken file leaves its own group unjudged, not the run undone."""
    try:
        return world.truth(request)
    except (OSError, ValueError) as error:
        return Failed("judge", f"no ground truth: {error}")
