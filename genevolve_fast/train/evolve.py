"""Self-evolution on one screen: sample, render, judge, compare, retrieve, pack, forward, loss, step, sync."""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path

import numpy as np

from genevolve_fast import event_loop
from genevolve_fast import trajectory as trajectories
from genevolve_fast.agent.session import SessionSettings
from genevolve_fast.experience.bundle import best_and_worst
from genevolve_fast.experience.context import render as render_experience
from genevolve_fast.experience.memory import ExperienceMemory
from genevolve_fast.ops.head import NonFiniteError
from genevolve_fast.policy.model import Policy
from genevolve_fast.policy.weights import Average
from genevolve_fast.profile.meter import PeakBytes
from genevolve_fast.protocols import Experience, TrainedEngine, World
from genevolve_fast.reward.advantages import advantages
from genevolve_fast.train.checkpoint import (
    checkpoints,
    load_checkpoint,
    refuse_full_disk,
    save_checkpoint,
    save_final,
    step_of,
)
from genevolve_fast.train.collect import Rollouts, judge_rollouts, sample_rollouts
from genevolve_fast.train.config import EvolveConfig, RolloutConfig
from genevolve_fast.train.engines import open_engine
from genevolve_fast.train.finite import FiniteSteps
from genevolve_fast.train.metrics import rollout_metrics
from genevolve_fast.train.optim import build_optimizer
from genevolve_fast.train.pipelined import Phase, open_sampler
from genevolve_fast.train.prepare import other_weights, prepare, refuse_dropout
from genevolve_fast.train.retention import check_metric
from genevolve_fast.train.run import Run, RunError, claimed, peak_memory_gb
from genevolve_fast.train.stopping import Preempted, Stopping
from genevolve_fast.train.strategies import Strategy
from genevolve_fast.train.together import Together, rollouts_file
from genevolve_fast.train.update import TrainingRollout, accumulate_gradients
from genevolve_fast.trajectory import Failed, Request, Trajectory


def evolve(
    config: EvolveConfig,
    policy: Policy,
    world: World,
    pool: Sequence[Request],
    folder: Path,
    *,
    resume: bool = False,
    strategy: Strategy | None = None,
) -> Path:
    """Evolve `policy` on the requests of `pool`; returns the folder of the evolved policy (`folder/policy`).

    On SIGTERM the last whole step is saved and Preempted raised, an exit with status 0.
    """
    strategy = strategy or Strategy()
    stopping = Stopping(strategy.ranks)
    claim = claimed(folder, config, resume, strategy.ranks)
    with stopping.listening(), claim, ExitStack() as ends:  # of engine and sampler, also where a step raises
        return _evolve(config, policy, world, pool, folder, resume, strategy, stopping, ends)


def _evolve(config, policy, world, pool, folder: Path, resume: bool, strategy: Strategy, stopping, ends) -> Path:
    ranks = strategy.ranks
    refuse_dropout(policy)
    prepare(policy.eval(), config.policy, config.seed)
    strategy.shard(policy)
    parts = config.rollout.engine != "server"  # each rank samples its own; servers sample for all
    engine = None
    if parts or ranks.first:
        engine = open_engine(config, policy, world.incidents, folder=folder)
        ends.callback(engine.shutdown)
        engine.sleep()  # a run resumed in its update trains before anything is sampled
    optimizer = build_optimizer(policy, config.optim, config.steps, strategy)
    reference, teacher = other_weights(config, policy, strategy.in_step)
    average = teacher if isinstance(teacher, Average) else None
    memory = new_memory(config, world)
    run = Run(folder, config, device=policy.device, total=config.steps, resume=resume, ranks=ranks)
    kept, step = folder / "checkpoints", 0
    if resume and (saved := ranks.from_first(lambda: checkpoints(kept))):
        step = load_checkpoint(saved[-1], policy, optimizer, strategy, average)
        memory = ExperienceMemory.load(saved[-1] / "memory", world.embedder)
    settled = memory  # as the last whole step left it

    def judged(step: int, version: int, phase: Phase) -> Rollouts:
        requests, file = sampler.mine(requests_of_step(pool, config, step), step)
        rollouts = collect(file, config, policy, world, engine, {r.id: r for r in requests}, step, version, phase)
        if not sampler.parts:
            refuse_failed(rollouts, file, config, step)
        return rollouts

    def save() -> None:
        with run.phase("checkpoint", step):
            beside = lambda path: settled.save(path / "memory")  # noqa: E731
            save_checkpoint(kept, step, policy, optimizer, beside, config.checkpoint, strategy, average)

    def tell(metrics: Mapping[str, float]) -> dict[str, float]:
        failures = summed(ranks.gather(world.incidents.take()))
        return run.log(
            step, {**metrics, **{f"failures/{f}": float(n) for f, n in failures.items()}, **sampler.metrics()}
        )

    own = open_sampler(config.rollout.staleness, run, engine, judged, config.steps) if engine else None
    sampler = Together(own, folder, policy, strategy, stopping, parts)
    if own:
        ends.callback(own.close)
    sampler.sync(step)
    run.begin(step)
    finite = FiniteSteps(policy, config.optim.skip_nonfinite)
    refuse_full_disk(kept, step, policy, optimizer, config.checkpoint, average, ranks)
    started = time.time()

    def goes_on() -> bool:
        late = config.minutes is not None and time.time() - started >= 60 * config.minutes
        return step < config.steps and not ranks.any(late)

    try:
        while goes_on():
            rollouts = sampler.next(step)
            if sampler.parts:  # a rank's own may all have failed where the others' have not
                whole = rollouts_file(folder, step)
                ranks.from_first(lambda: refuse_failed(rollouts, whole, config, step))  # noqa: B023
            with run.phase("experience", step):
                groups, memory = group_by_request(rollouts.trajectories), settled.copy()
                requests = {r.id: r for r in requests_of_step(pool, config, step)}
                with stopping.anytime() if ranks.world == 1 else nullcontext():
                    experiences, compared = ranks.from_first(
                        lambda: learn_from(groups, requests, world, memory, config, step)  # noqa: B023
                    )
            with run.phase("update_actor", step):
                begin = time.perf_counter()
                batch = training_rollouts(groups, experiences, policy, config)
                memory_peak = PeakBytes(policy.device)
                try:
                    metrics, traces = accumulate_gradients(
                        policy,
                        batch,
                        rollouts.images,
                        config.objective,
                        temperature=config.rollout.temperature,
                        max_tokens=config.max_tokens_per_microbatch,
                        reference=reference,
                        teacher=teacher,
                        workspace_mb=config.head_workspace_mb,
                        strategy=strategy,
                        pause=stopping.pause,
                    )
                except NonFiniteError as error:
                    if ranks.world > 1:  # the others have a gradient of this step already
                        raise RunError(f"step {step}: {error}") from error
                    metrics, traces = {"actor/pg_loss": math.nan}, {}
                    finite.note(error)
                metrics["actor/teacher_skipped"] = teacher_skipped(batch, experiences)
                losses = {name: value for name, value in metrics.items() if name.endswith("_loss")}
                norm, taken = finite.step(step, optimizer, strategy, config.optim.max_grad_norm, losses, traces)
                if taken and average:
                    average.update()
                metrics |= {"actor/grad_norm": norm, "actor/skipped_steps": float(not taken)}
                if (peak := memory_peak.read()) is not None:
                    largest = max(1.0, metrics.get("tokens/largest_microbatch", 0.0))
                    metrics["perf/peak_bytes_per_token"] = max(ranks.gather(peak)) / largest
                metrics["perf/train_seconds"] = time.perf_counter() - begin
            ranks.from_first(lambda: keep_for_report(folder, step, rollouts, traces, experiences))  # noqa: B023
            step, settled = step + 1, memory
            metrics |= rollout_metrics(rollouts.trajectories, groups) | {
                "experience/compared": compared,
                "experience/memory": len(memory),
                "experience/used": len(experiences),
                "actor/lr": optimizer.lr,
                "perf/max_memory_allocated_gb": max(ranks.gather(peak_memory_gb(policy.device))),
            }
            metrics["perf/throughput"] = sum(map(len, rollouts.trajectories)) / metrics["perf/train_seconds"]
            try:
                sampler.wait(step)
            except Preempted:  # of this step everything but its row is there
                tell(metrics)
                raise
            with run.phase("sync", step):
                sampler.sync(step)
            row = tell(metrics)
            if step == 1:
                check_metric(config.checkpoint.metric, row)
            if step % config.checkpoint.every == 0 or step == config.steps:
                save()
    except Preempted:
        policy.zero_grad(set_to_none=True)
        if step and not ranks.from_first(lambda: step in map(step_of, checkpoints(kept))):
            save()
        run.close()
        raise
    run.close()
    policy.eval()
    save_final(folder / "policy", policy, strategy=strategy)
    stopping.pause()  # whoever called may have more to do, which nobody waits for now
    return folder / "policy"


def session_settings(r: RolloutConfig, world: World, temperature: float | None = None, top_p: float | None = None):
    """The agent's settings of a rollout section; the renderer says how many references a program may carry."""
    return SessionSettings(
        max_tool_calls=r.max_tool_calls,
        max_model_calls=r.max_rounds,
        max_tokens_per_turn=r.max_tokens_per_turn,
        max_response_tokens=r.max_response_length,
        max_prompt_tokens=r.max_prompt_length,
        temperature=r.temperature if temperature is None else temperature,
        top_p=r.top_p if top_p is None else top_p,
        min_references=world.renderer.min_references,
        max_references=world.renderer.max_references,
        sampling_mask=r.replay_sampling_mask and top_p is None,  # the bench trains nothing
        observe_images=r.observe_images,
        tool_timeout_s=r.tool_timeout_s,
    )


def summed(counts: Sequence[Mapping[str, int]]) -> Counter[str]:
    """Counts of all ranks."""
    return sum(map(Counter, counts), Counter())


def new_memory(config: EvolveConfig, world: World) -> ExperienceMemory:
    e = config.experience
    return ExperienceMemory(world.embedder, capacity=e.capacity, similarity=e.similarity)


def requests_of_step(pool: Sequence[Request], config: EvolveConfig, step: int) -> list[Request]:
    """The step's requests: every epoch is a fresh shuffle that depends on the seed only."""
    n = config.rollout.prompts_per_step
    if len(pool) < n:
        raise RunError(f"the pool holds {len(pool)} requests, fewer than rollout.prompts_per_step {n}")
    epoch, within = divmod(step, len(pool) // n)
    order = np.random.default_rng((config.seed, epoch)).permutation(len(pool))
    return [pool[i] for i in order[within * n : (within + 1) * n]]


def sample(
    config: EvolveConfig,
    policy: Policy,
    world: World,
    engine: TrainedEngine,
    requests: Mapping[str, Request],
    step: int,
    version: int | None = None,
) -> Rollouts:
    """The rollouts of a step, not judged yet; the engine has its memory for no longer than that.

    `version`: updates that its weights have seen; none: `step`.
    """
    engine.wake()
    asked = list(requests.values()), config.rollout.num_generations
    told = dict(world=world, engine=engine, codec=policy.codec, seed=config.seed, step=step, policy_step=version)
    try:
        if world.rolling is not None:
            return world.rolling.sample(*asked, **told)
        return sample_rollouts(*asked, settings=session_settings(config.rollout, world), **told)
    finally:
        engine.sleep()


def judge(rollouts: Rollouts, requests: Mapping[str, Request], world: World) -> Rollouts:
    """The rollouts with outcomes; `requests` by id."""
    return (world.rolling.judge if world.rolling is not None else judge_rollouts)(rollouts, requests, world)


def collect(
    path: Path,
    config: EvolveConfig,
    policy: Policy,
    world: World,
    engine: TrainedEngine,
    requests: Mapping[str, Request],
    step: int,
    version: int | None,
    phase: Phase,
) -> Rollouts:
    """Judged rollouts of the step; finished ones that a crash left untrained in `path` are read back, not sampled.

    `version` as for `sample`; `phase` is entered around sampling and judging.
    """
    if path.exists():
        rollouts = Rollouts(*trajectories.load(path), {})
    else:
        with phase("rollout", step):
            rollouts = sample(config, policy, world, engine, requests, step, version)
            trajectories.save(path, rollouts.trajectories, rollouts.images)
    if any(t.outcome is None for t in rollouts.trajectories):
        with phase("judge", step):
            rollouts = judge(rollouts, requests, world)
            trajectories.save(path, rollouts.trajectories, rollouts.images)
    return rollouts


def refuse_failed(rollouts: Rollouts, path: Path, config: EvolveConfig, step: int) -> None:
    """Raise RunError where more rollouts of a step failed than it may train without; `path` then keeps what is good."""
    failed = [t.outcome for t in rollouts.trajectories if isinstance(t.outcome, Failed)]
    most = config.max_failed_share * len(rollouts.trajectories)
    if len(failed) > most:
        unscored = [t.replace(outcome=None) if scoring_failed(t) else t for t in rollouts.trajectories]
        if sum(isinstance(t.outcome, Failed) for t in unscored) > most:
            path.unlink()
        else:  # they are sampled well: the next start only draws and judges them again
            trajectories.save(path, unscored, rollouts.images)
        raise RunError(
            f"step {step}: {len(failed)} of {len(rollouts.trajectories)} rollouts failed, more than max_failed_share "
            f"{config.max_failed_share}; the first: {failed[0].stage}: {failed[0].reason}. "
            "Mend it and run again with --resume"
        )


def scoring_failed(t: Trajectory) -> bool:
    """Whether renderer or judge failed, and not what sampled the rollout."""
    return isinstance(t.outcome, Failed) and t.outcome.stage in ("render", "judge")


def group_by_request(rollouts: Sequence[Trajectory]) -> dict[str, list[Trajectory]]:
    groups: dict[str, list[Trajectory]] = {}
    for t in rollouts:
        groups.setdefault(t.group_id, []).append(t)
    return groups


def learn_from(
    groups: Mapping[str, Sequence[Trajectory]],
    requests: Mapping[str, Request],
    world: World,
    memory: ExperienceMemory,
    config: EvolveConfig,
    step: int,
) -> tuple[dict[str, Experience], int]:
    """Compare, insert, retrieve: the experience that each group's teacher reads, and how many were compared."""
    if not config.experience.enabled:
        return {}, 0
    pairs = {g: pair for g, members in groups.items() if (pair := best_and_worst(members, config.experience.min_gap))}
    widest = sorted(pairs, key=lambda g: (pairs[g][1].reward - pairs[g][0].reward, g))[
        : config.experience.max_comparisons
    ]

    async def compare_all():
        return await asyncio.gather(
            *(world.summarizer.compare(requests[pairs[g][0].request_id], *pairs[g]) for g in widest)
        )

    fresh = {g: e for g, e in zip(widest, event_loop.run(compare_all()), strict=True) if e is not None and e.slots()}
    for group, experience in fresh.items():
        best, worst = pairs[group]
        memory.insert(requests[best.request_id].question, experience, gap=best.reward - worst.reward, step=step)
    found = {}
    for group, members in groups.items():
        experience = fresh.get(group) or memory.retrieve(requests[members[0].request_id].question)
        if experience is not None:
            found[group] = experience
    if config.experience.source == "shuffled":  # the ablation: everybody reads the experience of the next group
        names = list(found)
        found = {g: found[names[(i + 1) % len(names)]] for i, g in enumerate(names)} if len(names) > 1 else {}
    return found, len(widest)


def training_rollouts(
    groups: Mapping[str, Sequence[Trajectory]],
    experiences: Mapping[str, Experience],
    policy: Policy,
    config: EvolveConfig,
) -> list[TrainingRollout]:
    """Every judged rollout with loss tokens, its advantage and the tokens its teacher reads, if the gate lets it."""
    out = []
    for group, members in groups.items():
        block = experiences.get(group)
        patch = tuple(policy.codec.encode(render_experience(block, policy.codec.markers))) if block else ()
        rewards = [t.reward for t in members]
        scores = advantages(rewards, config.adv_estimator)
        for t, a, taught in zip(members, scores, worth_teaching(rewards, scores, config.teacher_gate), strict=True):
            if t.reward is not None and t.num_loss_tokens and math.isfinite(a):
                out.append(TrainingRollout(t, float(a), patch if taught else ()))
    if not out:
        raise RunError("no rollout of this step can be trained on: all failed or none sampled a token")
    return out


def worth_teaching(rewards: Sequence[float | None], scores: Sequence[float], gate: str) -> list[bool]:
    """Which rollouts of a group the teacher reads; `below_best` leaves out every rollout that ties with the best."""
    if gate == "below_mean":
        return [a < 0 for a in scores]
    best = max((r for r in rewards if r is not None), default=None)
    return [r is not None and (gate == "all" or r < best) for r in rewards]


def teacher_skipped(batch: Sequence[TrainingRollout], experiences: Mapping[str, Experience]) -> float:
    """Share of the rollouts with experience that the gate kept from the teacher."""
    had = [r for r in batch if r.trajectory.group_id in experiences]
    return sum(not r.experience_ids for r in had) / max(1, len(had))


def keep_for_report(folder, step, rollouts: Rollouts, traces, experiences: Mapping[str, Experience]) -> None:
    """Token traces, pictures and experiences of a step, for `genevolve-fast report`."""
    from genevolve_fast.report.records import write_step

    write_step(folder, step, rollouts.trajectories, rollouts.pictures, traces, experiences)
