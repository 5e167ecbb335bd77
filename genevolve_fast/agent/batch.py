"""Batches of rollouts that survive a crash: inputs and results.json as the released runtime reads and writes them."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from genevolve_fast.agent.inference import Agent, result_of
from genevolve_fast.agent.results import AgentResult, json_bytes, with_files, write_results
from genevolve_fast.agent.session import SessionSettings, run_session
from genevolve_fast.protocols import Codec, Engine, Tool
from genevolve_fast.trajectory import Request

JOURNAL = "rollouts.jsonl"
RESULTS = "results.json"
_HEADER = "genevolve_fast_rollouts"
_SAVE_EVERY_S = 5.0
_SAVE_SHARE = 20  # results.json is written anew at most this share of the time
_GIVE_UP_AFTER = 3  # rows in a row that the engine refused or never heard of
_HOPELESS = ("engine/connect", "engine/client_error")


class BatchError(ValueError):
    """The batch cannot start; the message names the row or setting and says what to do."""


@dataclass(frozen=True)
class Sample:
    """One input row: `fields` has every field of its line, `prompt` stripped, and an `id`."""

    position: int
    fields: Mapping[str, Any]

    @property
    def id(self) -> Any:
        return self.fields["id"]

    @property
    def prompt(self) -> str:
        return self.fields["prompt"]


@dataclass(frozen=True)
class Finished:
    """A rollout's result, the failure that ended it ("engine/timeout", None for none) and its sampled tokens."""

    result: AgentResult
    failure: str | None = None
    tokens: int | None = None


Runner = Callable[[Sample], Awaitable[Finished]]


# --- input ------------------------------------------------------------------------------------------------------------


def read_samples(path: Path) -> list[Sample]:
    """Rows of a JSON list or of JSON lines with `prompt` or `question`. Raises BatchError naming the first bad row."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise BatchError(f"{path} is not UTF-8: {error.reason} at byte {error.start}") from None
    if text.lstrip().startswith("["):
        rows = [(f"row {i + 1}", row) for i, row in enumerate(_parsed(text, str(path)))]
    else:
        lines = [(f"line {n}", line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
        rows = [(where, _parsed(line, f"{path}, {where}")) for where, line in lines]
    if not rows:
        raise BatchError(f"{path} holds no rows")
    return [sample_of(i, row, f"{path}, {where}") for i, (where, row) in enumerate(rows)]


def sample_of(position: int, row: Any, where: str) -> Sample:
    """One row; `prompt` goes before `question`, and a row without an id gets its number, as in the released runtime."""
    if not isinstance(row, dict):
        raise BatchError(f"{where}: a row must be a JSON object, not {type(row).__name__}")
    prompt = row.get("prompt") or row.get("question")
    if not isinstance(prompt, str) or not prompt.strip():
        raise BatchError(f"{where}: neither `prompt` nor `question` holds text")
    return Sample(position, row | {"prompt": prompt.strip(), "id": row.get("id") if "id" in row else position})


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BatchError(f"{where} is not JSON: {error}") from None


# --- what is done -----------------------------------------------------------------------------------------------------


class Journal:
    """`rollouts.jsonl`: settings, then one line for each finished row, on disk before the next one starts.

    A row is done when its id and prompt stand at its position and it did not end in `error`. One process at a time
    holds the folder.
    """

    def __init__(self, folder: Path, samples: Sequence[Sample], settings: Mapping[str, Any], fresh: bool) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.results: dict[int, AgentResult] = {}
        self.adopted = 0
        self._file = (folder / JOURNAL).open("a+b")
        try:
            self._open(samples, dict(settings), fresh)
        except BaseException:
            self._file.close()
            raise

    def _open(self, samples: Sequence[Sample], settings: dict[str, Any], fresh: bool) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise BatchError(f"{self.folder} is being written by another rollout") from None
        if fresh:
            self._file.truncate(0)
        header, lines = self._read()
        if header is None:
            self._begin(settings)
            if not fresh:
                self._adopt(samples)
            return
        self._take(lines, samples)
        if changed := _changes(header, settings):
            if self.done:
                raise BatchError(
                    f"{self.folder} holds rollouts of other settings ({changed}): choose another --output-dir, or "
                    "--fresh to start over"
                )
            self._begin(settings)

    @property
    def done(self) -> set[int]:
        """Positions that need no further rollout."""
        return {i for i, result in self.results.items() if result.termination != "error"}

    def add(self, sample: Sample, finished: Finished) -> None:
        """Keep a row for good."""
        self.results[sample.position] = finished.result
        line = {"position": sample.position, "id": sample.id, "failure": finished.failure, "tokens": finished.tokens}
        self._append(line | finished.result.to_dict())

    def write_results(self, samples: Sequence[Sample]) -> list[dict[str, Any]]:
        """results.json in input order; rows that never ran are absent."""
        rows = [self.results[s.position].to_row(s.fields) for s in samples if s.position in self.results]
        write_results(self.folder / RESULTS, rows)
        return rows

    def close(self) -> None:
        self._file.close()

    def _begin(self, settings: Mapping[str, Any]) -> None:
        self._file.truncate(0)
        self.results = {}
        self._append({_HEADER: 1, "settings": settings})

    def _append(self, value: Any) -> None:
        self._file.write(json_bytes(value) + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def _read(self) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
        """(settings, rows); what a crash cut off is dropped."""
        self._file.seek(0)
        data = self._file.read()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            self._file.truncate(len(whole))
        first, *rest = whole.splitlines() or [b""]
        if not first:
            return None, []
        header = _object(first)
        if header is None or header.get(_HEADER) != 1 or not isinstance(header.get("settings"), dict):
            raise BatchError(f"{self.folder / JOURNAL} is not a journal of rollouts: move it away, or --fresh")
        return header["settings"], [row for line in rest if (row := _object(line)) is not None]

    def _take(self, lines: Sequence[Mapping[str, Any]], samples: Sequence[Sample]) -> None:
        for line in lines:
            result, position = _result(line), line.get("position")
            if result is None or not isinstance(position, int):
                continue  # a damaged line: its row runs again
            sample = samples[position] if 0 <= position < len(samples) else None
            if sample is None or (sample.id, sample.prompt) != (line.get("id"), result.prompt):
                there = f"is id {sample.id!r}" if sample else "does not exist"
                raise BatchError(
                    f"{self.folder} holds rollouts of another input: row {position + 1}, id {line.get('id')!r} then, "
                    f"{there} now or has another prompt. Choose another --output-dir, or --fresh to start over"
                )
            self.results[position] = result

    def _adopt(self, samples: Sequence[Sample]) -> None:
        """Rows of a results.json without a journal, such as the released runtime's: same id and prompt, in order."""
        path = self.folder / RESULTS
        if not path.exists():
            return
        rows = _parsed(path.read_text(encoding="utf-8"), str(path))
        if not isinstance(rows, list):
            raise BatchError(f"{path} is not a list of rows: move it away, or --fresh")
        waiting: dict[str, list[Sample]] = {}
        for sample in samples:
            waiting.setdefault(_key(sample.id, sample.prompt), []).append(sample)
        for row in rows:
            result = _result(row)
            same = waiting.get(_key(row.get("id"), result.prompt)) if result else None
            if not same:
                raise BatchError(
                    f"{path} has a row that is not of this input (id {_id(row)!r}): choose another --output-dir, or "
                    "--fresh to start over"
                )
            self.add(same.pop(0), Finished(result))
        self.adopted = len(self.results)


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


_TYPES = {
    "prompt": str,
    "gen_prompt": str,
    "reference_images": list,
    "messages": list,
    "termination": str,
    "rounds": int,
    "error": (str, type(None)),
}


def _result(row: Any) -> AgentResult | None:
    """The result that a row holds; None where a released field is missing or of another type."""
    if not isinstance(row, dict) or any(not isinstance(row.get(name, row), kind) for name, kind in _TYPES.items()):
        return None
    return AgentResult(**{name: row[name] for name in _TYPES})


def _key(id_: Any, prompt: str) -> str:
    return json.dumps([id_, prompt], sort_keys=True)


def _id(row: Any) -> Any:
    return row.get("id") if isinstance(row, dict) else None


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    names = sorted({*before, *now})
    return ", ".join(f"{n} {before.get(n)} then, {now.get(n)} now" for n in names if before.get(n) != now.get(n))


# --- running ----------------------------------------------------------------------------------------------------------


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
            if len(refused) >= max(_GIVE_UP_AFTER, parallel):
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
