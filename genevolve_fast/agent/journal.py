"""What a batch reads and what it has done: inputs, a journal on disk, results.json; all as the released runtime's."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from genevolve_fast.agent.results import AgentResult, write_results
from genevolve_fast.resumable import BatchError, Log, changes, parse_json

JOURNAL = "rollouts.jsonl"
RESULTS = "results.json"
_HEADER = "genevolve_fast_rollouts"


@dataclass(frozen=True, eq=False)
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
    """A rollout's result, the failure that ended it ("engine/timeout", None for none) and its sampled tokens.

    `shown` are the pictures that its searches brought, as results.picture_row tells of them.
    """

    result: AgentResult
    failure: str | None = None
    tokens: int | None = None
    shown: Sequence[Mapping[str, str]] | None = None


# --- input ------------------------------------------------------------------------------------------------------------


def read_samples(path: Path) -> list[Sample]:
    """Rows of a JSON list or of JSON lines with `prompt` or `question`. Raises BatchError naming the first bad row."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise BatchError(f"{path} is not UTF-8: {error.reason} at byte {error.start}") from None
    except OSError as error:
        raise BatchError(f"{path} cannot be read: {error.strerror}") from None
    if text.lstrip().startswith("["):
        rows = [(f"row {i + 1}", row) for i, row in enumerate(parse_json(text, str(path)))]
    else:
        lines = [(f"line {n}", line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
        rows = [(where, parse_json(line, f"{path}, {where}")) for where, line in lines]
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


# --- what is done -----------------------------------------------------------------------------------------------------


class Journal:
    """`rollouts.jsonl`: settings, then one line for each finished row, on disk before the next one starts.

    A row is done when its id and prompt stand at its position and it did not end in `error`. One process at a time
    holds the folder.
    """

    def __init__(self, folder: Path, samples: Sequence[Sample], settings: Mapping[str, Any], fresh: bool) -> None:
        self.folder = folder
        self.results: dict[int, AgentResult] = {}
        self.adopted = 0
        self._log = Log(folder / JOURNAL, _HEADER, "rollout")
        try:
            self._open(samples, dict(settings), fresh)
        except BaseException:
            self._log.close()
            raise

    def _open(self, samples: Sequence[Sample], settings: dict[str, Any], fresh: bool) -> None:
        if fresh:
            self._log.clear()
        header, lines = self._log.read()
        if header is None or len(lines) < header.get("adopted", 0):  # new, or ended while it adopted
            self._begin(settings, {} if fresh else self._adoptable(samples))
            return
        self._take(lines, samples)
        if changed := changes(header["settings"], settings):
            if self.done:
                raise BatchError(
                    f"{self.folder} holds rollouts of other settings ({changed}): choose another --output-dir, or "
                    "--fresh to start over"
                )
            self._begin(settings, {})

    @property
    def done(self) -> set[int]:
        """Positions that need no further rollout."""
        return {i for i, result in self.results.items() if result.termination != "error"}

    def add(self, sample: Sample, finished: Finished) -> None:
        """Keep a row for good."""
        self.results[sample.position] = finished.result
        line = {"position": sample.position, "id": sample.id, "failure": finished.failure, "tokens": finished.tokens}
        if finished.shown is not None:
            line["shown"] = [dict(picture) for picture in finished.shown]
        self._log.append(line | finished.result.to_dict())

    def write_results(self, samples: Sequence[Sample]) -> list[dict[str, Any]]:
        """results.json in input order; rows that never ran are absent."""
        rows = [self.results[s.position].to_row(s.fields) for s in samples if s.position in self.results]
        write_results(self.folder / RESULTS, rows)
        return rows

    def close(self) -> None:
        self._log.close()

    def _begin(self, settings: Mapping[str, Any], adopted: Mapping[Sample, AgentResult]) -> None:
        self.results = {}
        self._log.begin(settings=settings, adopted=len(adopted))
        for sample, result in adopted.items():
            self.add(sample, Finished(result))
        self.adopted = len(adopted)

    def _take(self, lines: Sequence[Mapping[str, Any]], samples: Sequence[Sample]) -> None:
        for line in lines:
            result, position = _result(line), line.get("position")
            if result is None or not isinstance(position, int):
                continue  # a damaged line: its row runs again
            sample = samples[position] if 0 <= position < len(samples) else None
            if reason := _another(sample, line.get("id"), result.prompt):
                raise BatchError(
                    f"{self.folder} holds rollouts of another input: row {position + 1} {reason}. Choose another "
                    "--output-dir, or --fresh to start over"
                )
            self.results[position] = result

    def _adoptable(self, samples: Sequence[Sample]) -> dict[Sample, AgentResult]:
        """Rows of a results.json without a journal, such as the released runtime's: same id and prompt, in order."""
        path = self.folder / RESULTS
        if not path.exists():
            return {}
        rows = parse_json(path.read_text(encoding="utf-8"), str(path))
        if not isinstance(rows, list):
            raise BatchError(f"{path} is not a list of rows: move it away, or --fresh")
        waiting: dict[str, list[Sample]] = {}
        for sample in samples:
            waiting.setdefault(_key(sample.id, sample.prompt), []).append(sample)
        adopted: dict[Sample, AgentResult] = {}
        for row in rows:
            result = _result(row)
            same = waiting.get(_key(row.get("id"), result.prompt)) if result else None
            if not same:
                raise BatchError(
                    f"{path} has a row that is not of this input (id {_id(row)!r}): choose another --output-dir, or "
                    "--fresh to start over"
                )
            adopted[same.pop(0)] = result
        return adopted


def _another(sample: Sample | None, id_: Any, prompt: str) -> str:
    """How `sample` differs from the row that ran; empty when it does not."""
    if sample is None:
        return "is not in it"
    if sample.id != id_:
        return f"had id {id_!r} and has {sample.id!r}"
    return "has another prompt" if sample.prompt != prompt else ""


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
