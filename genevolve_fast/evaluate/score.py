"""Judging an existing results.json: in parallel, resumable, a failed judgement never a zero."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from genevolve_fast.data.published import request_of
from genevolve_fast.evaluate.judging import Judging, file_digest, key_of, outcome, read_pixels
from genevolve_fast.evaluate.score_files import (
    FIELDS,
    NOT_EVALUATED,
    failed_row,
    is_judged,
    judged_row,
    picture_path,
    prompt_of,
    read_rows,
    rendered,
    row_id,
    scores_of,
    truth_path,
    write_score_files,
)
from genevolve_fast.protocols import ImageJudge, ProgramJudge
from genevolve_fast.resumable import Ledger, work_off
from genevolve_fast.trajectory import Program, Reference, Request

LEDGER = "scores.jsonl"
_MAX_SIDE = 4096
_OF_THE_RESULT = {  # what the agent and the renderer made of the request: no judge of pictures may read it
    *("gen_prompt", "reference_images", "messages", "termination", "rounds", "error"),
    *("output_path", "image_path", "success", "image_status", "render_error", "eval_success", "scores"),
}


@dataclass(frozen=True)
class Item:
    """One judgement that is wanted: of the picture of a row, or of its program."""

    position: int
    kind: str  # "image" | "program"
    key: str  # of everything that the judge is shown
    request: Request
    picture: Path | None = None
    truth: Path | None = None
    program: Program | None = None


class Scoring:
    """The rows of a results.json and what the ledger beside the score files knows of them.

    `program_judge` is asked as well where `programs`. Judged rows of a results_eval.json that the ledger does not know,
    such as the released evaluator's, are kept (`adopted` counts them).
    """

    def __init__(
        self,
        rows: Sequence[Mapping[str, Any]],
        folder: Path,
        settings: Mapping[str, Any],
        *,
        roots: Sequence[Path],
        programs: bool = False,
        fresh: bool = False,
    ) -> None:
        self.rows, self.folder, self.roots = rows, folder, roots
        self.errors: dict[int, str] = {}
        self.without_truth: list[int] = []  # positions of rows that cannot be judged for want of it alone
        self.items = [item for i, row in enumerate(rows) for item in self._items(i, row, programs)]
        self.ledger = Ledger(folder / LEDGER, settings, "judgement", fresh)
        if fresh:  # or a run that is killed before it writes would take them for the released evaluator's
            (folder / "results_eval.json").unlink(missing_ok=True)
        self.adopted = self._adopt()

    def todo(self) -> list[Item]:
        """Judgements that are wanted and not in the ledger; equal ones once."""
        return list({i.key: i for i in self.items if i.key not in self.ledger.done}.values())

    async def run(
        self,
        image_judge: ImageJudge,
        program_judge: ProgramJudge | None = None,
        *,
        parallel: int,
        progress: Callable[[Judging], None] = lambda counts: None,
    ) -> Judging:
        """Judge what is left. Failed judgements stay out of the ledger, so that the next run asks again."""

        async def judge(item: Item) -> None:
            line = await _verdict(item, image_judge, program_judge)
            self.ledger.add(item.key, {"position": item.position, "kind": item.kind} | line)

        async def one(item: Item) -> tuple[str, str]:
            end, why = await outcome(judge(item))
            if why and item.kind == "image":
                self.errors[item.position] = why
            return end, why

        return await work_off(self.todo(), one, Judging(), parallel=parallel, progress=progress)

    def verdicts(self, kind: str) -> dict[int, dict[str, Any]]:
        """Ledger lines ("scores" or "program_score", and "diagnostics") of judged rows by position."""
        done = self.ledger.done
        return {i.position: done[i.key] for i in self.items if i.kind == kind and i.key in done}

    def evaluated_rows(self) -> list[dict[str, Any]]:
        """All rows with eval_success, scores and error."""
        judged = self.verdicts("image")
        return [
            judged_row(row, judged[i]["scores"]) if i in judged else failed_row(row, self.errors.get(i, NOT_EVALUATED))
            for i, row in enumerate(self.rows)
        ]

    def write(self, total_cases: int = 0) -> dict[str, Any]:
        """Write the three score files; returns what summary.json holds."""
        return write_score_files(self.folder, self.evaluated_rows(), total_cases, self.roots)

    def close(self) -> None:
        self.ledger.close()

    def _items(self, position: int, row: Mapping[str, Any], programs: bool) -> list[Item]:
        prompt = prompt_of(row)
        kept = {name: value for name, value in row.items() if name not in _OF_THE_RESULT}
        if not prompt:
            self.errors[position] = "empty_prompt"
            return []
        request = request_of(kept | {"question": prompt, "id": row_id(row, position)})
        out = []
        picture, truth = picture_path(row, self.roots), truth_path(row, self.roots)
        drawn = rendered(row, self.roots) and picture
        if drawn and truth is None:
            self.without_truth.append(position)
        if drawn and truth:
            key = key_of("image", request.id, prompt, file_digest(picture), file_digest(truth))
            out.append(Item(position, "image", key, request, picture, truth))
        if programs and isinstance(row.get("gen_prompt"), str) and row["gen_prompt"].strip():
            program = _program(row)
            key = key_of("program", request.id, prompt, repr(program))
            out.append(Item(position, "program", key, request, program=program))
        return out

    def _adopt(self) -> int:
        """Take over judged rows of an earlier results_eval.json of the same id, prompt and picture."""
        path = self.folder / "results_eval.json"
        if not path.exists():
            return 0
        known = {line["position"] for line in self.ledger.done.values() if line.get("kind") == "image"}
        earlier: dict[tuple, dict[str, Any]] = {}
        for i, row in enumerate(read_rows(path)):
            if is_judged(row) and all(isinstance(row["scores"].get(name), int | float) for name in FIELDS):
                earlier[_same(row, i)] = row["scores"]
        adopted = 0
        for item in self.items:
            scores = earlier.get(_same(self.rows[item.position], item.position))
            if item.kind != "image" or item.position in known or scores is None or item.key in self.ledger.done:
                continue
            self.ledger.add(item.key, {"position": item.position, "kind": "image", "scores": scores, "diagnostics": []})
            adopted += 1
        return adopted


async def _verdict(item: Item, image_judge: ImageJudge, program_judge: ProgramJudge | None) -> dict[str, Any]:
    if item.kind == "program":
        verdict = await program_judge.judge(item.request, item.program)
        out = {"program_score": verdict.score, "rationale": verdict.rationale}
    else:
        verdict = await image_judge.judge(
            item.request, *(read_pixels(p, _MAX_SIDE) for p in (item.picture, item.truth))
        )
        out = {"scores": scores_of(verdict)}
    return out | {"diagnostics": [asdict(d) for d in verdict.diagnostics]}


def _program(row: Mapping[str, Any]) -> Program:
    names = ("img_id", "note", "local_path", "url", "title", "page_url")
    found = row["reference_images"] if isinstance(row.get("reference_images"), list) else []
    shown = [{n: str(r.get(n) or "") for n in names} for r in found if isinstance(r, dict)]
    return Program(row["gen_prompt"], tuple(Reference(**r) for r in shown))


def _same(row: Mapping[str, Any], position: int) -> tuple:
    return row_id(row, position), prompt_of(row), row.get("output_path") or row.get("image_path")
