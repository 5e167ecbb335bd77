"""Batches of rollouts: several at a time, every finished one on disk, an end that says how to continue."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from genevolve_fast.agent.inference import Agent, result_of
from genevolve_fast.agent.journal import Finished, Journal, Sample
from genevolve_fast.agent.results import AgentResult, with_files
from genevolve_fast.agent.session import SessionSettings, run_session
from genevolve_fast.protocols import Codec, Engine, Tool
from genevolve_fast.trajectory import Request

_SAVE_EVERY_S = 5.0
_SAVE_SHARE = 20  # results.json is written anew at most this share of the time
_GIVE_UP_AFTER = 3  # rows in a row that ended with the same refusal
_HOPELESS = ("engine/connect", "engine/client_error")

Runner = Callable[[Sample], Awaitable[Finished]]


@dataclass
class Batch:
    """Counts of one `run_batch`; `stopped` says why it ended early."""

    seconds: float = 0.0
    tokens: int = 0
    tokens_known: bool = False
    ran: int = 0
    stopped: str = ""
    signal: int | None = None
    ends: Counter[str] = field(default_factory=Counter)  # over all rows with a result: answer, or how it failed

    @property
    def answered(self) -> int:
        return self.ends["answer"]

    def line(self) -> str:
        """One line: n answered, n failed by type, seconds, tokens a second."""
        failed = {end: n for end, n in sorted(self.ends.items()) if end != "answer"}
        kinds = ", ".join(f"{end} {n}" for end, n in failed.items())
        speed = f", {self.tokens / max(self.seconds, 1e-9):.0f} tokens/s" if self.tokens_known else ""
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

    It also ends when row after row is refused or the server cannot be reached: waiting would not help.
    """
    batch = Batch()
    known = {s.position: journal.results[s.position].termination for s in samples if s.position in journal.results}
    batch.ends.update(end for position, end in known.items() if position in journal.done)
    progress(batch.ends)
    todo = iter([s for s in samples if s.position not in journal.done])
    started, saved, pause = time.monotonic(), time.monotonic(), _SAVE_EVERY_S
    refused: list[str] = []

    async def worker() -> None:
        nonlocal saved, pause
        for sample in todo:
            if batch.stopped:
                return
            finished = await _guarded(runner, sample)
            journal.add(sample, finished)
            _count(batch, finished)
            progress(batch.ends)
            error = finished.result.error or ""
            refused[:] = [*(e for e in refused if e == error), error] if finished.failure in _HOPELESS else []
            if len(refused) >= max(_GIVE_UP_AFTER, parallel) and not batch.stopped:
                batch.stopped = f"the last {len(refused)} rows failed alike: {error}"
            if (now := time.monotonic()) - saved > pause:
                journal.write_results(samples)
                saved = time.monotonic()
                pause = max(_SAVE_EVERY_S, _SAVE_SHARE * (saved - now))

    tasks = [asyncio.create_task(worker()) for _ in range(parallel)]
    with _signals(batch, tasks):
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


def _count(batch: Batch, finished: Finished) -> None:
    batch.ran += 1
    batch.ends[finished.failure or finished.result.termination] += 1
    if finished.tokens is not None:
        batch.tokens, batch.tokens_known = batch.tokens + finished.tokens, True


@contextlib.contextmanager
def _signals(batch: Batch, tasks: Sequence[asyncio.Task]):
    """SIGINT and SIGTERM cancel the running rollouts, once; outside the main thread signals stay as they are."""
    loop = asyncio.get_running_loop()

    def end(number: int) -> None:
        batch.signal, batch.stopped = number, signal.Signals(number).name
        for task in tasks:
            task.cancel()

    taken = []
    with contextlib.suppress(ValueError, RuntimeError, NotImplementedError):
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, end, number)
            taken.append(number)
    try:
        yield
    finally:
        for number in taken:
            loop.remove_signal_handler(number)


# --- one row ----------------------------------------------------------------------------------------------------------


def chat_runner(agent: Agent, pictures: Path) -> Runner:
    """Rows answered by a chat server; `pictures` is where `filed` tools keep theirs."""

    async def run(sample: Sample) -> Finished:
        seed = None if agent.seed is None else agent.seed + sample.position
        session, talk = await agent.rollout(sample.prompt, seed)
        result = result_of(sample.prompt, session, pictures)
        return Finished(result, _failure(result, talk.failure.kind if talk.failure else "other"), talk.sampled_tokens)

    return run


def policy_runner(
    engine: Engine,
    codec: Codec,
    tools: Mapping[str, Tool],
    system_prompt: str,
    settings: SessionSettings,
    seed: int,
    pictures: Path,
) -> Runner:
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
        return Finished(result, _failure(result, "other"), t.num_loss_tokens)

    return run


def _failure(result: AgentResult, kind: str) -> str | None:
    if result.termination != "error":
        return None
    return f"engine/{kind}" if (result.error or "").startswith("llm_call_failed") else "prompt_too_long"
