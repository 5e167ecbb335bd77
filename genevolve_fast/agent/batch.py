"""Batches of rollouts: several at a time, every finished one on disk, an end that says how to continue."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from genevolve_fast.agent.inference import Agent, result_of
from genevolve_fast.agent.journal import Finished, Journal, Sample
from genevolve_fast.agent.results import AgentResult, picture_row, with_files
from genevolve_fast.agent.session import SessionSettings, run_session
from genevolve_fast.protocols import Codec, Engine, Tool
from genevolve_fast.resumable import Tally, work_off
from genevolve_fast.trajectory import Request

Runner = Callable[[Sample], Awaitable[Finished]]


@dataclass
class Batch(Tally):
    """Counts of one `run_batch`; `ends` are over all rows with a result: answer, or how it failed."""

    good = "answer"
    hopeless = ("engine/connect", "engine/client_error")

    tokens: int | None = None

    def line(self) -> str:
        """One line: n answered, n failed by type, seconds, tokens a second."""
        speed = "" if self.tokens is None else f", {self.tokens / max(self.seconds, 1e-9):.0f} tokens/s"
        return f"{self.succeeded} answered, {self.failures()}, {self.seconds:.1f} s{speed}"


async def run_batch(
    samples: Sequence[Sample],
    journal: Journal,
    runner: Runner,
    *,
    parallel: int,
    progress: Callable[[Batch], None] = lambda batch: None,
) -> Batch:
    """Run what is not done yet, `parallel` at a time. SIGINT and SIGTERM end it with every finished row written.

    It also ends when row after row is refused, or the server cannot be reached.
    """
    done = journal.done
    batch = Batch(Counter(journal.results[s.position].termination for s in samples if s.position in done))

    async def run(sample: Sample) -> tuple[str, str]:
        finished = await _guarded(runner, sample)
        journal.add(sample, finished)
        if finished.tokens is not None:
            batch.tokens = (batch.tokens or 0) + finished.tokens
        return finished.failure or finished.result.termination, finished.result.error or ""

    todo = [s for s in samples if s.position not in done]
    return await work_off(
        todo, run, batch, parallel=parallel, progress=progress, write=lambda: journal.write_results(samples)
    )


async def _guarded(runner: Runner, sample: Sample) -> Finished:
    try:
        return await runner(sample)
    except Exception as error:  # one row's bug must not end the others
        return Finished(AgentResult.failed(sample.prompt, f"{type(error).__name__}: {error}"), "rollout/other")


# --- one row ----------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def chat_runner(agent: Agent, pictures: Path) -> AsyncIterator[Runner]:
    """Rows answered by a chat server; `pictures` is where results.Filed keeps them."""

    async def run(sample: Sample) -> Finished:
        seed = None if agent.seed is None else agent.seed + sample.position
        session, talk = await agent.rollout(sample.prompt, seed)
        result = result_of(sample.prompt, session, pictures)
        failure = _failure(result, talk.failure.kind if talk.failure else "other")
        shown = [picture_row(seen, pictures) for seen in session.image_ids.shown()]
        return Finished(result, failure, talk.sampled_tokens, shown)

    async with agent:
        yield run


@asynccontextmanager
async def policy_runner(
    engine: Engine,
    codec: Codec,
    tools: Mapping[str, Tool],
    system_prompt: str,
    settings: SessionSettings,
    seed: int,
    pictures: Path,
) -> AsyncIterator[Runner]:
    """Rows answered token by token by an engine in this process."""

    async def run(sample: Sample) -> Finished:
        name = f"{sample.position:06d}"
        done = await run_session(
            Request(name, sample.prompt),
            engine=engine,
            codec=codec,
            tools=tools,
            system_prompt=system_prompt,
            settings=settings,
            rollout_id=name,
            group_id=name,
            seed=seed + sample.position,
        )
        t = done.trajectory
        program = with_files(t.program, pictures)
        result = AgentResult.of(sample.prompt, program, t.messages, t.termination, t.rounds, t.error)
        shown = [picture_row(seen, pictures) for seen in done.shown]
        return Finished(result, _failure(result, "other"), t.num_loss_tokens, shown)

    yield run


def _failure(result: AgentResult, kind: str) -> str | None:
    if result.termination != "error":
        return None
    return f"engine/{kind}" if (result.error or "").startswith("llm_call_failed") else "prompt_too_long"
