"""The prompt pool: requests written from recipes, without repetitions, in stratified splits."""

from __future__ import annotations

import asyncio
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict, ValidationError

from genevolve_fast.data.recipes import Recipe, coverage, coverage_table, given_away, split_recipes
from genevolve_fast.data.rows import BadRow, DataError, read_rows
from genevolve_fast.data.steps import Step, close_step, finished, write_rows
from genevolve_fast.fields import wrong_fields
from genevolve_fast.files import write_text
from genevolve_fast.net.asking import ask_once
from genevolve_fast.net.chat import ChatEndpoint
from genevolve_fast.net.harmless import readable
from genevolve_fast.net.replies import ReplyError
from genevolve_fast.protocols import EngineError, Sampling
from genevolve_fast.resumable import Ledger
from genevolve_fast.trajectory import Request, json_text

SPLITS = ("train", "eval", "bench")
_WORDS = re.compile(r"[^\W_]+(?:'\w+)?")
_SHINGLE = 3


@dataclass(frozen=True)
class Item:
    """A request and the recipe it was written from; they share their id."""

    recipe: Recipe
    request: Request


class Writer(Protocol):
    async def write(self, recipe: Recipe) -> Item:
        """Raises ReplyError (the recipe yields no usable request) or EngineError (nobody answered)."""
        ...


# --- a chat model writes ----------------------------------------------------------------------------------------------

_TASK = """\
You write requests that people might send to an image-making assistant. You are given a plan for one request. Write the
request so that a good picture needs exactly what the plan says, in the voice of a person who wants a picture: one to
six sentences, concrete, no headings, no lists of keywords.

What the plan's fields mean
family: the kind of picture. difficulty: easy is one subject and one wish; medium two or three that must fit together;
hard many, of which some depend on each other.
evidence: what you must leave out so that it has to be looked up. fact_missing: a checkable fact (a year, a colour, a
name, a wording) is asked for by description only. appearance_missing: somebody or something real is named whose looks
must be found in pictures. Choose real, lasting, well documented subjects; nobody private.
anchor: what must be recognisable in the result.
requirement: the skill on which the picture stands or falls; make it decisive without naming it.

Never mention the plan, its fields or their values, never give a withheld fact away, name no file, address or image id.
Reply with one JSON object and nothing else:
{"question": the request, "subject": the real subject it is about or "", "category": two or three words,
 "withheld": [the facts left out, a short sentence each; empty if nothing is missing]}"""


class _Written(BaseModel):
    model_config = ConfigDict(extra="ignore")

    question: str
    subject: str = ""
    category: str = ""
    withheld: list[str] = []


class ChatWriter:
    """Requests by a chat model; the seed of a recipe is its place, so that a second run asks the same."""

    def __init__(self, endpoint: ChatEndpoint, *, temperature: float = 1.0, max_tokens: int = 1024) -> None:
        self._endpoint = endpoint
        self._sampling = Sampling(temperature=temperature, top_p=1.0, max_tokens=max_tokens)

    async def write(self, recipe: Recipe) -> Item:
        plan = recipe.model_dump(exclude={"id"} if recipe.subject else {"id", "subject"})
        messages = [
            {"role": "system", "content": _TASK},
            {"role": "user", "content": json_text({k: v for k, v in plan.items() if v}, indent=1)},
        ]
        seed = int.from_bytes(recipe.id.encode()[-4:], "big") % 2**31
        said = await ask_once(self._endpoint, messages, self._sampling, tuple(_Written.model_fields), seed=seed)
        try:
            written = _Written.model_validate(said, strict=True)
        except ValidationError as error:
            raise ReplyError(wrong_fields(error)[0]) from None
        question = " ".join(readable(written.question).split())
        if not question:
            raise ReplyError("question: empty")
        withheld = (*recipe.withheld, *(w.strip() for w in written.withheld if w.strip()))
        if recipe.evidence != "nothing_missing" and not withheld:
            raise ReplyError("withheld: nothing is left out, though the plan says that something is")
        told = recipe.model_copy(update={"subject": recipe.subject or written.subject.strip(), "withheld": withheld})
        category = "_".join(_WORDS.findall(written.category.lower()))[:60] or recipe.family
        return Item(told, Request(recipe.id, question, "", recipe.eval_type, category, recipe.difficulty))


async def write_requests(
    recipes: Sequence[Recipe],
    writer: Writer,
    ledger: Ledger,
    *,
    parallel: int = 8,
    progress: Callable[[], None] = lambda: None,
) -> tuple[list[Item], dict[str, str]]:
    """(items, why the others have none by id); what the ledger holds is not written again."""
    slots = asyncio.Semaphore(parallel)
    unanswered: dict[str, str] = {}

    async def one(recipe: Recipe) -> None:
        async with slots:
            if recipe.id not in ledger.done:
                try:
                    item = await writer.write(recipe)
                    value: dict[str, Any] = {"recipe": item.recipe.model_dump(), "request": item.request.to_row()}
                    ledger.add(recipe.id, value)
                except ReplyError as error:
                    ledger.add(recipe.id, {"dropped": f"unusable reply: {error}"})
                except EngineError as error:
                    unanswered[recipe.id] = f"{error.kind}: {error}"
            progress()

    await asyncio.gather(*map(one, recipes))
    items, dropped = [], dict(unanswered)
    for recipe in recipes:
        value = ledger.done.get(recipe.id)
        if value is None:
            continue
        if "dropped" in value:
            dropped[recipe.id] = value["dropped"]
        else:
            items.append(Item(Recipe(**value["recipe"]), Request.from_row(value["request"])))
    return items, dropped


# --- repetitions ------------------------------------------------------------------------------------------------------


def shingles(question: str) -> frozenset[tuple[str, ...]]:
    """Runs of three words, case and punctuation aside."""
    words = [word.lower() for word in _WORDS.findall(question)]
    return frozenset(tuple(words[i : i + _SHINGLE]) for i in range(max(1, len(words) - _SHINGLE + 1)))


class Seen:
    """Requests so far, to tell which one a new one repeats: by words, or by a share `near` of common shingles.

    Exact: two sets of which one is `near` as large as both share one of their rarest shingles, so only those few are
    looked up (prefix filtering, Bayardo et al. 2007).
    """

    def __init__(self, questions: Sequence[str], near: float) -> None:
        if not 0 < near <= 1:
            raise DataError(f"the share of common shingles must be in (0, 1], not {near:g}")
        self._near = near
        self._frequency = Counter(s for q in questions for s in shingles(q))
        self._sets: list[tuple[str, frozenset]] = []
        self._index: dict[tuple[str, ...], list[int]] = {}

    def repeats(self, question: str) -> tuple[str, float] | None:
        """(id, common share) of the earlier request that this one repeats."""
        asked = shingles(question)
        for i in sorted({i for s in self._prefix(asked) for i in self._index.get(s, ())}):
            id_, other = self._sets[i]
            share = len(asked & other) / len(asked | other)
            if share >= self._near:
                return id_, share
        return None

    def add(self, id_: str, question: str) -> None:
        found = shingles(question)
        for s in self._prefix(found):
            self._index.setdefault(s, []).append(len(self._sets))
        self._sets.append((id_, found))

    def _prefix(self, found: frozenset) -> list[tuple[str, ...]]:
        rare_first = sorted(found, key=lambda s: (self._frequency[s], s))
        return rare_first[: len(found) - math.ceil(self._near * len(found) - 1e-9) + 1]


def drop_repetitions(items: Sequence[Item], near: float) -> tuple[list[Item], dict[str, str]]:
    """(items kept, why the others are not): the first of equal or nearly equal requests stays."""
    seen = Seen([i.request.question for i in items], near)
    kept, dropped = [], {}
    for item in items:
        if again := seen.repeats(item.request.question):
            how = "the same words as" if again[1] == 1 else f"{again[1]:.2f} of its shingles are those of"
            dropped[item.recipe.id] = f"{how} {again[0]}"
            continue
        seen.add(item.recipe.id, item.request.question)
        kept.append(item)
    return kept, dropped


def drop_given_away(items: Sequence[Item]) -> tuple[list[Item], dict[str, str]]:
    """(items kept, why the others are not): a request that tells its recipe is of no use."""
    told = {item.recipe.id: why for item in items if (why := given_away(item.recipe, item.request.question))}
    return [item for item in items if item.recipe.id not in told], {id_: f"gives away: {w}" for id_, w in told.items()}


# --- the folder -------------------------------------------------------------------------------------------------------


def read_recipes(path: Path) -> list[Recipe]:
    """Recipes of a JSONL. Raises BadRow naming line and field."""
    out: dict[str, Recipe] = {}
    for line, row in read_rows(path):
        if isinstance(row, BadRow):
            raise row
        try:
            recipe = Recipe(**row)
        except (ValidationError, TypeError) as error:
            first = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error)}
            raise BadRow(path, line, ".".join(map(str, first["loc"])), first["msg"]) from None
        if recipe.id in out:
            raise BadRow(path, line, "id", f"{recipe.id!r} occurs twice")
        out[recipe.id] = recipe
    if not out:
        raise DataError(f"{path} holds no recipe")
    return list(out.values())


def pool_row(request: Request, recipe: Recipe) -> dict[str, Any]:
    """A pool row in the published form: what the request is made of stands in extra_info, its skill in meta."""
    return {
        "id": request.id,
        "question": request.question,
        "gt_image": "",
        "eval_type": recipe.eval_type,
        "category": request.category,
        "difficulty": recipe.difficulty,
        "meta": skill_tags(recipe),
        "extra_info": {"construction": dict(request.extra)} if request.extra else {},
    }


def skill_tags(recipe: Recipe) -> dict[str, Any]:
    """The published skill tags of a request."""
    return {
        "primary_skills": [recipe.requirement],
        "secondary_skills": [],
        "skill_bundle": [recipe.requirement],
        "skill_challenge": recipe.requirement,
    }


def write_pool(
    folder: Path,
    items: Sequence[Item],
    dropped: Mapping[str, str],
    *,
    shares: Mapping[str, float],
    near: float,
    seed: int,
    settings: Mapping[str, Any],
    unanswered: int = 0,
) -> dict[str, Any]:
    """Drop what repeats or tells too much, split the rest, write the folder; returns its manifest.

    `recipes.jsonl` is the only place where recipes stand; requests carry what judges need and what is published.
    """
    kept, told = drop_given_away(items)
    kept, again = drop_repetitions(kept, near)
    if not kept:
        raise DataError(f"no request is left of {len(items) + len(dropped)}: {next(iter(dropped.values()), '')}")
    of = split_recipes([i.recipe for i in kept], shares, seed)
    reasons = {**dropped, **told, **again}
    for split in SPLITS:
        rows = [pool_row(i.request, i.recipe) for i in kept if of[i.recipe.id] == split]
        write_rows(folder / f"{split}.jsonl", rows)
    write_rows(folder / "recipes.jsonl", ({"split": of[i.recipe.id], **i.recipe.model_dump()} for i in kept))
    write_rows(folder / "dropped.jsonl", ({"id": id_, "reason": why} for id_, why in reasons.items()))
    table = coverage(i.recipe for i in kept)
    parts = {s: coverage(i.recipe for i in kept if of[i.recipe.id] == s) for s in SPLITS}
    write_text(folder / "coverage.json", json_text({"all": table, **parts}, indent=1) + "\n")
    write_text(folder / "coverage.txt", coverage_table(table) + "\n")
    counts = {
        **{split: sum(s == split for s in of.values()) for split in SPLITS},
        "dropped: unusable": len(dropped) - unanswered,
        "dropped: gives its recipe away": len(told),
        "dropped: repeats another": len(again),
        "unanswered": unanswered,
    }
    tables = [*(f"{split}.jsonl" for split in SPLITS), "recipes.jsonl", "dropped.jsonl", "coverage.json"]
    return close_step(folder, "pool", source=None, settings=settings, tables=tables, counts=counts)


def finished_pool(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """The manifest of a pool that is complete with these settings; one with unanswered recipes is not."""
    manifest = finished(folder, "pool", None, settings)
    return manifest if manifest and not manifest["counts"]["unanswered"] else None


def pool_requests(step: Step) -> list[tuple[str, Request]]:
    """(split, request) of every row of a pool, in the order train, eval, bench; construction stands in `extra`."""
    return [(split, pool_request(row)) for split in SPLITS for row in step.rows(f"{split}.jsonl")]


def pool_request(row: Mapping[str, Any]) -> Request:
    """The request of a pool row: `extra` holds its construction and its meta."""
    built = row["extra_info"].get("construction") or {}
    names = ("id", "question", "gt_image", "eval_type", "category", "difficulty", "meta")
    return Request.from_row({**built, **{name: row[name] for name in names}})
