"""Processes as rollouts: the policy's texts are sampled and trained, the renderer's drafts are what it sees."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from genevolve_fast import event_loop
from genevolve_fast.agent.conversation import TokenConversation
from genevolve_fast.incidents import Incidents
from genevolve_fast.process.growing import Growth, GrowthSettings, Ungrown
from genevolve_fast.process.record import Record, Step
from genevolve_fast.process.renderer import drawing
from genevolve_fast.protocols import Codec, Engine, ImageJudge, JudgeError, Renderer, RenderError, World
from genevolve_fast.reward.kscore import kscore
from genevolve_fast.reward.scoring import score
from genevolve_fast.train.collect import Rollouts, stable_seed
from genevolve_fast.trajectory import Failed, ImageRecord, Program, Request, Stage, Trajectory, Turn


@dataclass(frozen=True)
class ProcessResult:
    """The rollout, the pixels it saw by hash, and its picture (None where nothing was drawn)."""

    trajectory: Trajectory
    images: Mapping[str, np.ndarray]
    picture: np.ndarray | None


async def run_process(
    request: Request,
    *,
    engine: Engine,
    codec: Codec,
    renderer: Renderer,
    settings: GrowthSettings,
    rollout_id: str,
    group_id: str,
    seed: int,
    render_seed: int = 0,
    policy_step: int = 0,
    program: Program | None = None,
    references: Sequence[np.ndarray] = (),
    incidents: Incidents | None = None,
) -> ProcessResult:
    """Let the policy behind `engine` grow a picture of `request`, or of a `program` for it with its references' pixels.

    Every text stage is a turn of the policy, every draft an image that it reads in the turn after. Never raises for
    what policy, engine or renderer do: a policy that writes no plan has no program; an engine that fails before the
    first draft is Failed("engine"), a renderer that does Failed("tool"), for such a rollout has to be sampled anew.
    """
    program = program or Program(request.question)
    talk = TokenConversation(engine, codec, rollout_id)
    draw, record = drawing(renderer, program, references), Record()

    async def draft(prompt: str, last: np.ndarray | None, _: int) -> np.ndarray:
        return await draw(prompt, last, render_seed)

    growth = Growth(program.gen_prompt, talk, draft, settings, record, seed, incidents)
    failure: Failed | None = None
    error: str | None = None
    engine.open(rollout_id)
    try:
        await growth.run(len(references))
    except Ungrown as reason:
        error = str(reason)
        failure = Failed("engine", error, reason.kind) if reason.source == "engine" else None
    except RenderError as reason:
        error = str(reason)
        failure = Failed("tool", f"the renderer failed: {error}", reason.kind)  # of a rollout, which cannot go on
    finally:
        engine.close(rollout_id)
    turns, stages = _stages(talk.turns, talk.ids, talk.end_of_turn, talk.records, record.steps)
    trajectory = Trajectory(
        id=rollout_id,
        request_id=request.id,
        group_id=group_id,
        request_stop=talk.request_stop,
        turns=turns,
        images=tuple(talk.records),
        stages=stages,
        messages=tuple(growth.messages),
        program=Program(growth.prompt, program.reference_images) if growth.picture is not None else None,
        termination=growth.end or "error",
        error=error,
        outcome=failure,
        rounds=sum(s.what == "text" for s in record.steps),
        seed=seed,
        policy_step=policy_step,
        **talk.arrays(),
    )
    given = {r.sha256: pixels for r, pixels in zip(program.reference_images, references, strict=True)}
    return ProcessResult(trajectory.validate(), talk.images_by_hash | given, growth.picture)


def _stages(
    turns: Sequence[Turn],
    ids: Sequence[int],
    end_of_turn: Sequence[int],
    images: Sequence[ImageRecord],
    steps: Sequence[Step],
) -> tuple[tuple[Turn, ...], tuple[Stage, ...]]:
    """(turns whose decisions are the readable stages, stages): texts are the replies in order, drafts the images.

    The text that ends the process is no stage: it stands in place of one. An image's stage has its two markers.
    """
    written = iter([s for s in steps if s.what == "text"])
    drawn = iter([s for s in steps if s.what == "draft" and s.sha256])
    decided, stages = [], []
    for turn in turns:
        if turn.role == "assistant":
            step, stop = next(written), turn.stop - (ids[turn.stop - 1] in end_of_turn)
            if stop > turn.start and not step.ended:
                stages.append(Stage(step.stage, step.cycle, turn.start, stop))
            readable = (step.read or step.ended) and stop > turn.start
            turn = replace(turn, decision=(turn.start, stop)) if readable else turn
        decided.append(turn)
    for image in images:
        step = next(drawn)
        stages.append(Stage(step.stage, step.cycle, image.start - 1, image.stop + 1, drawn=True))
    return tuple(decided), tuple(sorted(stages, key=lambda s: s.start))


# --- a step of rollouts -----------------------------------------------------------------------------------------------


def sample_processes(
    requests: Sequence[Request],
    num_generations: int,
    *,
    world: World,
    engine: Engine,
    codec: Codec,
    settings: GrowthSettings,
    seed: int,
    step: int = 0,
    policy_step: int | None = None,
    render_seed: int = 0,
    on_done: Callable[[], None] | None = None,
) -> Rollouts:
    """`num_generations` processes of every request at once, as train.collect.sample_rollouts; with their pictures.

    Raises ValueError for a renderer that draws nothing without references.
    """
    if world.renderer.min_references:
        raise ValueError(f"{world.renderer.name} needs references, and a request has none to give")
    plan = [
        (request, f"{step:06d}/{i:04d}-{request.id}", k)
        for i, request in enumerate(requests)
        for k in range(num_generations)
    ]
    for _, group, k in plan:
        engine.open(f"{group}/{k}")  # all of them first: a deterministic engine waits for every open session

    async def one(request: Request, group: str, k: int) -> ProcessResult:
        result = await run_process(
            request,
            engine=engine,
            codec=codec,
            renderer=world.renderer,
            settings=settings,
            rollout_id=f"{group}/{k}",
            group_id=group,
            seed=stable_seed(seed, step, request.id, k),
            render_seed=render_seed,
            policy_step=step if policy_step is None else policy_step,
            incidents=world.incidents,
        )
        if on_done:
            on_done()
        return result

    async def main() -> list[ProcessResult]:
        return await asyncio.gather(*(one(*task) for task in plan))

    results = event_loop.run(main())
    images = {sha: pixels for r in results for sha, pixels in r.images.items()}
    pictures = {r.trajectory.id: r.picture for r in results if r.picture is not None}
    return Rollouts(tuple(r.trajectory for r in results), images, pictures)


def judge_processes(
    rollouts: Rollouts, requests: Mapping[str, Request], world: World, *, drafts: bool = True
) -> Rollouts:
    """Judge the pictures that were grown, and the programs they ended with; `drafts`: score every draft as well.

    A draft's score is the image judge's KScore of it against the whole request; a judge that fails on one leaves it
    without and is counted as "judge/<kind>".
    """

    grown = {t.id: rollouts.images[t.images[-1].sha256] for t in rollouts.trajectories if t.program is not None}

    async def one(t: Trajectory) -> Trajectory:
        if t.outcome is not None:
            return t
        request = requests[t.request_id]
        try:
            truth = world.truth(request)
        except (OSError, ValueError) as error:
            world.incidents.note("judge", "other")
            return t.replace(outcome=Failed("judge", f"no ground truth: {error}"))
        judged, _ = await score(
            request,
            t,
            renderer=_AsGrown(grown.get(t.id)),
            image_judge=world.image_judge,
            program_judge=world.program_judge,
            truth=truth,
            images=rollouts.images,
            seed=0,
            incidents=world.incidents,
        )
        return await score_drafts(judged, request, rollouts.images, truth, world) if drafts else judged

    async def main() -> list[Trajectory]:
        return await asyncio.gather(*map(one, rollouts.trajectories))

    return Rollouts(tuple(event_loop.run(main())), rollouts.images, grown)


@dataclass(frozen=True)
class ProcessRolling:
    """protocols.Rolling: every rollout of a training step grows a picture."""

    settings: GrowthSettings
    score_drafts: bool = True

    def sample(self, requests: Sequence[Request], num_generations: int, **told: Any) -> Rollouts:
        return sample_processes(requests, num_generations, settings=self.settings, **told)

    def judge(self, rollouts: Rollouts, requests: Mapping[str, Request], world: World) -> Rollouts:
        return judge_processes(rollouts, requests, world, drafts=self.score_drafts)


class _AsGrown:
    """protocols.Renderer of a picture that is there already."""

    name = "as grown"
    min_references = max_references = 0

    def __init__(self, picture: np.ndarray | None) -> None:
        self._picture = picture

    async def render(self, program: Program, references: Sequence[np.ndarray], seed: int) -> np.ndarray:
        if self._picture is None:
            raise RenderError("the process left no picture")
        return self._picture


async def score_drafts(
    t: Trajectory, request: Request, images: Mapping[str, np.ndarray], truth: np.ndarray, world: World
) -> Trajectory:
    """The trajectory with the image judge's score at every drawn stage."""
    shown = {image.start - 1: image.sha256 for image in t.images}

    async def scored(stage: Stage) -> Stage:
        if not stage.drawn:
            return stage
        return replace(stage, score=await _score(request, images[shown[stage.start]], truth, world))

    return t.replace(stages=tuple([await scored(stage) for stage in t.stages]))


async def _score(request: Request, draft: np.ndarray, truth: np.ndarray, world: World) -> float | None:
    judge: ImageJudge = world.image_judge
    try:
        return kscore(await judge.judge(request, draft, truth))
    except JudgeError as error:
        world.incidents.note("judge", error.kind)
        return None
