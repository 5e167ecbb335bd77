"""Batches of rollouts: several at a time, every finished one on disk, an end that says how to continue."""

from __future__ import annotations

import asyncio
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from genevolve_fast.agent.inference import Agent, result_of
from genevolve_fast.agent.journal import Finished, Journal, Sample
from genevolve_fast.agent.results import AgentResult, picture_row, with_files
from genevolve_fast.agent.session import SessionSettings, run_session
from genevolve_fast.protocols import Codec, Engine, Tool
from genevolve_fast.resumable import ended_by_signals, now_and_then
from genevolve_fast.trajectory import Request

_GIVE_UP_AFTER = 3  # rows, or as many as run at a time
_HOPELESS = ("engine/connect", "engine/client_error")

Runner = Callable[[Sample], Awaitable[Finished]]


@dataclass
class Batch:
    """Counts of one `run_batch`: `ends` over all rows with a result (answer, or how it failed); `stopped` why early."""

    ends: Counter[str] = field(default_factory=Counter)
    tokens: int | None = None
    seconds: float = 0.0
    stopped: str = ""
    signal: int | None = None
    refusals: list[str] = field(default_factory=list)  # the same one, row after row
    reasons: dict[str, str] = field(default_factory=dict)  # of `ends`: the first error of each

    @property
    def answered(self) -> int:
        return self.ends["answer"]

    def add(self, finished: Finished, parallel: int) -> None:
        """Count a row; too many of the same refusal stop the batch, because waiting would not help."""
        end = finished.failure or finished.result.termination
        self.ends[end] += 1
        if finished.tokens is not None:
            self.tokens = (self.tokens or 0) + finished.tokens
        error = finished.result.error or ""
        if end != "answer":
            self.reasons.setdefault(end, error)
        if finished.failure not in _HOPELESS:
            self.refusals = []
        elif self.refusals[:1] == [error]:
            self.refusals.append(error)
        else:
            self.refusals = [error]
        if len(self.refusals) == max(_GIVE_UP_AFTER, parallel):
            self.stopped = f"the last {len(self.refusals)} rows failed alike: {error}"

    def line(self) -> str:
        """One line: n answered, n failed by type, seconds, tokens a second."""
        failed = {end: n for end, n in sorted(self.ends.items()) if end != "answer"}
        kinds = ", ".join(f"{end} {n}" for end, n in failed.items())
        speed = "" if self.tokens is None else f", {self.tokens / max(self.seconds, 1e-9):.0f} tokens/s"
        failures = f"{sum(failed.values())} failed{f' ({kinds})' if kinds else ''}"
        return f"{self.answered} answered, {failures}, {self.seconds:.1f} s{speed}"


async def run_batch(
    samples: Sequence[Sample],
    journal: Journal,
    runner: Runner,
    *,
    parallel: int,
    progress: Callable[[Counter[str]], None] = lambda ends: None,
) -> Batch:
    """Run what is not done yet, `parallel` at a time. SIGINT and SIGTERM end it with every finished row written.

    It also ends when row after row is refused, or the server cannot be reached.
    """
    done = journal.done
    batch = Batch(Counter(journal.results[s.position].termination for s in samples if s.position in done))
    progress(batch.ends)
    todo = iter([s for s in samples if s.position not in done])
    save = now_and_then(lambda: journal.write_results(samples))
    started = time.monotonic()

    async def worker() -> None:
        for sample in todo:
            if batch.stopped:
                return
            finished = await _guarded(runner, sample)
            journal.add(sample, finished)
            batch.add(finished, parallel)
            progress(batch.ends)
            save()

    def end(number: int) -> None:
        batch.signal, batch.stopped = number, signal.Signals(number).name

    tasks = [asyncio.create_task(worker()) for _ in range(parallel)]
    with ended_by_signals(tasks, end):
        try:
            await asyncio.gather(*tasks)
        except asyncio.CancelledError:
            if batch.signal is None:
                raise
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            journal.write_results(samples)
    batch.seconds = time.monotonic() - started
    return batch


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
