"""WISE: pictures of a thousand prompts that name their subject by what one has to know about it.

Two protocols, as published: `original` (consistency, realism, aesthetic quality, each 0 to 2, weighed to a WiScore) and
`verified` (one 0 or 1). The rubrics are worded here; ranges, weights, file names and fields are theirs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from genevolve_fast.evaluate.judging import Judging, file_digest, key_of, outcome, read_pixels
from genevolve_fast.evaluate.published import PublishedRow, beside
from genevolve_fast.files import write_text
from genevolve_fast.incidents import Incidents
from genevolve_fast.net.asking import JsonChat, Lane, NoAnswer, Question
from genevolve_fast.net.chat import ChatEndpoint
from genevolve_fast.net.pictures import data_url
from genevolve_fast.net.replies import ReplyError
from genevolve_fast.protocols import JudgeError, Sampling
from genevolve_fast.resumable import BatchError, Ledger, read_objects, work_off
from genevolve_fast.trajectory import image_hash, json_text

LEDGER = "wise.jsonl"
_SAMPLING = Sampling(temperature=0.0, top_p=1.0, max_tokens=2048)
_MAX_SIDE = 1024
_THOUGHT = re.compile(r"\A.*</think>", re.DOTALL)

_SYSTEM = (
    "You grade pictures that an image generator made for a knowledge benchmark. You go by what can be seen, and where "
    "you are unsure between two grades you give the lower one."
)
_TASK = """\
The generator was only shown the request. It names its subject through something one has to know; the explanation says
what a right picture shows. The generator never saw the explanation.

Request: {prompt}
Explanation: {explanation}

"""
_ORIGINAL = """\
Grade the picture on three scales.

consistency: does it show what request and explanation ask for?
  0: the subject or another essential part is missing or contradicts them.
  1: the subject can be recognised, but something asked for is missing, wrong or only hinted at.
  2: everything asked for is there, right and unmistakable. Rare.
realism: could the scene exist?
  0: it breaks the laws of nature where nobody asked for it, or is visibly artificial throughout.
  1: believable at first sight, with flaws in light, matter, anatomy or space.
  2: a photograph could look like this down to the details. Rare.
aesthetic_quality: is it a good picture?
  0: poorly composed, unpleasant or broken.
  1: sound composition and colour, nothing special.
  2: a masterly picture. Rare.

Answer with one JSON object and nothing else:
{{"consistency": 0, 1 or 2, "realism": 0, 1 or 2, "aesthetic_quality": 0, 1 or 2}}"""
_VERIFIED = """\
Give one grade.

1: the picture shows what the explanation describes (subject, state, place, time, relations), and clearly enough that a
   person could check it. A plain style or modest beauty does not matter.
0: anything that the explanation requires is missing, wrong or contradicted; the picture follows the words of the
   request but not what they mean; or it is too ambiguous or broken to check.

Answer with one JSON object and nothing else: {{"score": 0 or 1}}"""


@dataclass(frozen=True)
class Category:
    name: str
    first: int  # prompt_id
    last: int
    weight: float  # in the overall score


@dataclass(frozen=True)
class Protocol:
    """How pictures are graded: `grades` are the fields of a score line, each in 0..`top`, weighed to a WiScore."""

    name: str
    categories: tuple[Category, ...]
    grades: tuple[str, ...]
    weights: tuple[float, ...]
    top: int
    rubric: str
    table: str  # of published.TABLES

    def wiscore(self, scores: Mapping[str, float]) -> float:
        """In [0, 1]."""
        return sum(w * scores[n] for n, w in zip(self.grades, self.weights, strict=True)) / self.top

    def category(self, prompt_id: int) -> Category | None:
        return next((c for c in self.categories if c.first <= prompt_id <= c.last), None)


PROTOCOLS = {
    "original": Protocol(
        "original",
        (
            Category("CULTURE", 1, 400, 0.4),
            Category("TIME", 401, 567, 0.167),
            Category("SPACE", 568, 700, 0.133),
            Category("BIOLOGY", 701, 800, 0.1),
            Category("PHYSICS", 801, 900, 0.1),
            Category("CHEMISTRY", 901, 1000, 0.1),
        ),
        ("consistency", "realism", "aesthetic_quality"),
        (0.7, 0.2, 0.1),
        2,
        _TASK + _ORIGINAL,
        "wise",
    ),
    "verified": Protocol(
        "verified",
        (
            Category("CULTURE", 1, 400, 0.4),
            Category("TIME", 401, 520, 0.12),
            Category("SPACE", 521, 640, 0.12),
            Category("BIOLOGY", 641, 760, 0.12),
            Category("PHYSICS", 761, 880, 0.12),
            Category("CHEMISTRY", 881, 1000, 0.12),
        ),
        ("score",),
        (1.0,),
        1,
        _TASK + _VERIFIED,
        "wise_verified",
    ),
}


# --- prompts ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WisePrompt:
    prompt_id: int
    prompt: str
    explanation: str
    subcategory: str
    file: str  # name of its data file, without .json and _verified


def read_prompts(path: Path, protocol: str | None = None) -> tuple[Protocol, list[WisePrompt]]:
    """(protocol, prompts by id) of a data folder or file as published. Raises BatchError naming the bad row.

    A folder's *_rewrite.json and merge.json repeat its other files and are left out. Without `protocol`, files named
    *_verified.json are graded by the verified one.
    """
    if path.is_dir():
        files = [f for f in sorted(path.glob("*.json")) if not f.stem.endswith("_rewrite") and f.stem != "merge"]
    else:
        files = [path]
    if not files:
        raise BatchError(f"{path} holds no WISE data: cultural_common_sense.json and the others of its data folder")
    verified = any(f.stem.endswith("_verified") for f in files)
    chosen = PROTOCOLS[protocol or ("verified" if verified else "original")]
    prompts: dict[int, WisePrompt] = {}
    for file in files:
        for n, row in enumerate(read_objects(file), 1):
            made = _prompt(row, file, f"{file}, row {n}", chosen)
            if made.prompt_id in prompts:
                raise BatchError(
                    f"{file}, row {n}: prompt_id {made.prompt_id} is taken by {prompts[made.prompt_id].file}"
                )
            prompts[made.prompt_id] = made
    return chosen, [prompts[i] for i in sorted(prompts)]


def _prompt(row: Mapping[str, Any], file: Path, where: str, protocol: Protocol) -> WisePrompt:
    number = row.get("prompt_id")
    if not isinstance(number, int) or protocol.category(number) is None:
        raise BatchError(f"{where}: prompt_id {number!r} is of no category")
    for name in ("Prompt", "Explanation"):
        if not isinstance(row.get(name), str) or not row[name].strip():
            raise BatchError(f"{where} has no {name}")
    stem = file.stem.removesuffix("_verified")
    return WisePrompt(number, row["Prompt"].strip(), row["Explanation"].strip(), str(row.get("Subcategory", "")), stem)


# --- the judge --------------------------------------------------------------------------------------------------------


class WiseJudge:
    """Grades by a model; a reply that holds no grades is asked for again, saying what was wrong with it."""

    def __init__(self, chat: JsonChat, protocol: Protocol) -> None:
        self._chat, self._protocol = chat, protocol

    async def judge(self, prompt: WisePrompt, pixels: np.ndarray) -> tuple[dict[str, float], str]:
        """(grades, the reply) for uint8 [h, w, 3]. Raises JudgeError."""
        protocol = self._protocol
        text = protocol.rubric.format(prompt=prompt.prompt, explanation=prompt.explanation)

        def messages() -> list[dict[str, Any]]:
            picture = {"type": "image_url", "image_url": {"url": data_url(pixels)}}
            shown = [{"type": "text", "text": text}, picture]
            return [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": shown}]

        question = Question(
            identity={"text": text, "picture": image_hash(pixels)},
            messages=messages,
            name="grades",
            schema={},
            keys=protocol.grades,
            spelt=protocol.grades,
            check=lambda values, final: dict(values),
            read=lambda reply: {"grades": read_grades(reply, protocol), "reply": reply},
        )
        try:
            said = await self._chat.ask(question)
        except NoAnswer as error:
            raise JudgeError(str(error), error.kind) from None
        return said["grades"], said["reply"]


def open_wise_chat(model: str, base_url: str, api_key: str, parallel: int, incidents: Incidents) -> JsonChat:
    """A judge for WiseJudge; failures are counted as "wise_judge/<kind>"."""

    def endpoint(limiter: AbstractAsyncContextManager | None) -> ChatEndpoint:
        options = {"patience_s": 120.0, "incidents": incidents, "source": "wise_judge", "limiter": limiter}
        return ChatEndpoint(model, base_url, api_key, **options)

    lane = Lane(parallel)
    return JsonChat(model, endpoint, lane, incidents, source="wise_judge", sampling=_SAMPLING, json_schema=False)


def read_grades(reply: str, protocol: Protocol) -> dict[str, float]:
    """The grades of a reply: a JSON object, or a line `Name: grade` each. Raises ReplyError."""
    text = _THOUGHT.sub("", reply)
    found = _object(text) if "{" in text else _lines(text, protocol)
    if found is None:
        raise ReplyError("there is no JSON object in it")
    grades = {}
    for name in protocol.grades:
        value = found.get(name)
        if isinstance(value, str) and re.fullmatch(r"\d(\.0)?", value.strip()):
            value = float(value)
        if isinstance(value, bool) or not isinstance(value, int | float) or value not in range(protocol.top + 1):
            raise ReplyError(f"{name} must be a whole number from 0 to {protocol.top}")
        grades[name] = float(value)
    return grades


def _object(text: str) -> dict[str, Any] | None:
    import json_repair

    start, end = text.find("{"), text.rfind("}") + 1
    found = json_repair.loads(text[start : end if end > start else None])
    if not isinstance(found, dict):
        return None
    return {str(name).strip().lower().replace(" ", "_"): value for name, value in found.items()}


def _lines(text: str, protocol: Protocol) -> dict[str, Any] | None:
    """Grades a line each; a grade that is told twice counts as none."""
    out: dict[str, Any] = {}
    for name in protocol.grades:
        label = name.replace("_", "[ _]")
        said = re.findall(rf"(?im)^\W*{label}\W*[:=]\W*(\d+(?:\.\d+)?)\W*$", text)
        if len(said) == 1:
            out[name] = float(said[0])
    return out or None


# --- judging a folder -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Graded:
    """A judged picture."""

    prompt: WisePrompt
    picture: Path
    scores: Mapping[str, float]
    reply: str


class WiseScoring:
    """The pictures of prompts and what the ledger in `folder` knows of them."""

    def __init__(
        self,
        protocol: Protocol,
        prompts: Sequence[WisePrompt],
        pictures: Mapping[int, Path],
        folder: Path,
        judge: str,
        fresh: bool = False,
    ) -> None:
        """`pictures` by prompt_id; `judge` names who grades: one ledger has one."""
        self.protocol, self.prompts, self.folder = protocol, prompts, folder
        self.pictures = {p.prompt_id: pictures[p.prompt_id] for p in prompts if p.prompt_id in pictures}
        self._keys = {p.prompt_id: self._key(p) for p in prompts if p.prompt_id in self.pictures}
        self.ledger = Ledger(folder / LEDGER, {"judge": judge, "protocol": protocol.name}, "judgement", fresh)

    def todo(self) -> list[WisePrompt]:
        """Prompts with a picture and no grades yet."""
        return [
            p for p in self.prompts if p.prompt_id in self._keys and self._keys[p.prompt_id] not in self.ledger.done
        ]

    async def run(
        self, judge: WiseJudge, *, parallel: int, progress: Callable[[Judging], None] = lambda counts: None
    ) -> Judging:
        """Judge what is left; what fails is asked again by the next run, and is never a 0."""

        async def grade(prompt: WisePrompt) -> None:
            pixels = read_pixels(self.pictures[prompt.prompt_id], _MAX_SIDE)
            scores, reply = await judge.judge(prompt, pixels)
            line = {"prompt_id": prompt.prompt_id, "scores": scores, "evaluation": reply}
            self.ledger.add(self._keys[prompt.prompt_id], line)

        return await work_off(self.todo(), lambda p: outcome(grade(p)), Judging(), parallel=parallel, progress=progress)

    def graded(self) -> list[Graded]:
        out = []
        for p in self.prompts:
            if (line := self.ledger.done.get(self._keys.get(p.prompt_id, ""))) is not None:
                out.append(Graded(p, self.pictures[p.prompt_id], line["scores"], line["evaluation"]))
        return out

    def write(self) -> list[Path]:
        """Write `*_scores_results.jsonl` and `*_full_results.json` of each data file; returns the former."""
        graded, written = self.graded(), []
        for stem in sorted({p.file for p in self.prompts}):
            mine = [g for g in graded if g.prompt.file == stem]
            lines = [{"prompt_id": g.prompt.prompt_id, "Subcategory": g.prompt.subcategory, **g.scores} for g in mine]
            full = [
                {
                    "prompt_id": g.prompt.prompt_id,
                    "prompt": g.prompt.prompt,
                    "key": g.prompt.explanation,
                    "image_path": str(g.picture),
                    "evaluation": g.reply,
                }
                for g in mine
            ]
            written.append(self.folder / f"{stem}_scores_results.jsonl")
            write_text(written[-1], "".join(json_text(line) + "\n" for line in lines))
            write_text(self.folder / f"{stem}_full_results.json", json_text(full, indent=2))
        return written

    def close(self) -> None:
        self.ledger.close()

    def _key(self, p: WisePrompt) -> str:
        picture = file_digest(self.pictures[p.prompt_id])
        return key_of(self.protocol.name, str(p.prompt_id), p.prompt, p.explanation, picture)


def pictures_in(folder: Path, prompts: Sequence[WisePrompt]) -> dict[int, Path]:
    """`folder/{prompt_id}.png` of every prompt that has one."""
    named = {p.prompt_id: folder / f"{p.prompt_id}.png" for p in prompts}
    return {i: path for i, path in named.items() if path.is_file()}


def read_scores(files: Sequence[Path], protocol: Protocol) -> dict[int, dict[str, float]]:
    """Grades by prompt_id of score files, ours or the published ones. Raises BatchError naming the bad line."""
    out: dict[int, dict[str, float]] = {}
    for file in files:
        try:
            lines = file.read_text(encoding="utf-8").split("\n")  # a text may hold other line ends
        except OSError as error:
            raise BatchError(f"{file} cannot be read: {error.strerror}") from None
        for n, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError:
                raise BatchError(f"{file}, line {n} is not JSON") from None
            number = row.get("prompt_id") if isinstance(row, dict) else None
            if not isinstance(number, int) or protocol.category(number) is None:
                raise BatchError(f"{file}, line {n}: prompt_id {number!r} is of no category")
            scores = {name: row.get(name) for name in protocol.grades}
            for name, value in scores.items():
                if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= protocol.top:
                    raise BatchError(f"{file}, line {n}: {name} {value!r} is not from 0 to {protocol.top}")
            if number in out:
                raise BatchError(f"{file}, line {n}: prompt_id {number} is scored twice")
            out[number] = scores
    return out


# --- the table --------------------------------------------------------------------------------------------------------


def summary(protocol: Protocol, scores: Mapping[int, Mapping[str, float]]) -> dict[str, Any]:
    """Mean WiScore, judged and expected prompts of each category; `overall` is None until every category is judged."""
    out: dict[str, Any] = {"protocol": protocol.name, "categories": {}}
    for c in protocol.categories:
        mine = [protocol.wiscore(s) for i, s in scores.items() if c.first <= i <= c.last]
        mean = sum(mine) / len(mine) if mine else None
        out["categories"][c.name] = {"wiscore": mean, "judged": len(mine), "expected": c.last - c.first + 1}
    means = [out["categories"][c.name]["wiscore"] for c in protocol.categories]
    out["overall"] = (
        None if None in means else sum(c.weight * m for c, m in zip(protocol.categories, means, strict=True))
    )
    found = out["categories"].values()
    return out | {"judged": sum(c["judged"] for c in found), "expected": sum(c["expected"] for c in found)}


def table(name: str, made: Mapping[str, Any]) -> str:
    """`summary` beside the published rows of its protocol."""
    protocol = PROTOCOLS[made["protocol"]]
    values = {n: c["wiscore"] for n, c in made["categories"].items()} | {"overall": made["overall"]}
    text = beside(protocol.table, [PublishedRow(name, values)] if made["judged"] else [], 4 if protocol.top == 1 else 2)
    short = [
        f"{n} {c['judged']} of {c['expected']}" for n, c in made["categories"].items() if c["judged"] < c["expected"]
    ]
    judged = f"{made['judged']} of {made['expected']} prompts judged"
    return f"{text}\n{judged}" + (f"; means over what is there: {', '.join(short)}" if short else "")
