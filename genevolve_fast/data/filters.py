"""Which teacher trajectories are worth learning from: programmatic filters, each named, each with its reason."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from genevolve_fast.agent.protocol import Answer, FormatError, ToolCall, parse_reply
from genevolve_fast.data.rows import DataError, read_picture
from genevolve_fast.data.steps import Step
from genevolve_fast.data.trajectories import Teaching
from genevolve_fast.net.harmless import harmless

_SHOWN = re.compile(r"^(IMG_\d+): title: ", re.MULTILINE)
_ID = re.compile(r"\bIMG_\d+\b|\bIMG\s?#?\d+\b", re.IGNORECASE)
_ADDRESS = re.compile(
    r"\b(?:https?|ftp|file|data):\S|\bwww\.\w|\b[\w-]+(?:\.[\w-]+)*\.(?:com|org|net|io|gov|edu)\b", re.IGNORECASE
)
_FILE = re.compile(r"\b[\w-]+\.(?:png|jpe?g|webp|gif|bmp|svg)\b|(?:^|\s)(?:/[\w.-]+){2,}", re.IGNORECASE)
_NUMBERS = {"first": 1, "second": 2, "third": 3, "fourth": 4, "fifth": 5, "sixth": 6, "1st": 1, "2nd": 2, "3rd": 3}
_ORDINAL = "|".join(_NUMBERS)
_BOUND = re.compile(
    rf"\b((?:{_ORDINAL})(?:(?:\s*,\s*|\s+)(?:(?:and|or)\s+)?(?:the\s+)?(?:{_ORDINAL}))*)\s+reference\s+images?\b",
    re.IGNORECASE,
)
_COUNTED = re.compile(r"\breference\s+image\s+#?(\d+)\b", re.IGNORECASE)
_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)?")
_QUOTED = re.compile(r"\"([^\"\n]{1,60})\"|“([^”\n]{1,60})”|(?<!\w)'([^'\n]{1,60})'(?!\w)")
_NAME = re.compile(r"(?<![.!?:]\s)(?<!^)\b[A-Z][\w'’-]*(?:\s+(?:of|the|de|la|and)?\s*[A-Z][\w'’-]*)*")
_RUN = 5  # words of a run that should not come again and again


class FilterConfig(BaseModel):
    """Limits of the filters."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    min_references: int = Field(0, ge=0, description="Reference images a program must carry")
    max_references: int = Field(2, ge=1, description="Reference images a program may carry")
    min_length: float = Field(0.5, ge=0, description="Words of the prompt, as a multiple of the request's")
    max_length: float = Field(20.0, gt=0, description="The same, at most")
    max_words: int = Field(800, ge=1, description="Words of the prompt at most")
    names_kept: float = Field(0.5, ge=0, le=1, description="Share of the request's names and quoted words kept")
    max_repeated: float = Field(0.3, ge=0, le=1, description="Share of five-word runs of the prompt that repeat one")


@dataclass(frozen=True)
class Filter:
    """`check` says why a trajectory does not pass, or nothing."""

    name: str
    check: Callable[[Teaching, FilterConfig, Step], str]


# --- the tool loop ----------------------------------------------------------------------------------------------------


def tool_loop_complete(t: Teaching, config: FilterConfig, step: Step) -> str:
    """System, request, then calls that are all answered, and an answer at the end that is a valid program."""
    if t.termination != "answer":
        return f"ended in {t.termination}: {t.error or 'no answer'}"
    if [m.role for m in t.messages[:2]] != ["system", "user"]:
        return "does not begin with system prompt and request"
    if t.messages[1].content.split() != harmless(t.request.question).split():
        return "the first turn is not the request"
    turns = t.messages[2:]
    for i, message in enumerate(turns):
        if message.role != ("assistant" if i % 2 == 0 else "user"):
            return f"turn {i + 1} is the {message.role}'s, out of order"
        if i % 2:
            if not message.content.startswith("<tool_response>"):
                return f"turn {i + 1} answers no call"
            continue
        reply = parse_reply(message.content)
        if isinstance(reply, FormatError):
            return f"turn {i + 1} cannot be read: {reply.reason}"
        if isinstance(reply, Answer) != (i == len(turns) - 1):
            return f"turn {i + 1}: {'an answer before the end' if isinstance(reply, Answer) else 'a call unanswered'}"
    if t.program is None:
        return "holds no program"
    return ""


def calls_repeated(t: Teaching, config: FilterConfig, step: Step) -> str:
    """No call is made twice."""
    calls = Counter(
        f"{reply.name} {sorted(reply.arguments.items(), key=str)}"
        for m in t.messages
        if m.role == "assistant" and isinstance(reply := parse_reply(m.content), ToolCall)
    )
    call, count = calls.most_common(1)[0] if calls else ("", 0)
    return f"{count} times {call[:80]}" if count > 1 else ""


# --- references -------------------------------------------------------------------------------------------------------


def references_valid(t: Teaching, config: FilterConfig, step: Step) -> str:
    """Every reference was shown before, has a file that decodes, and stands once; their number is allowed."""
    answer = parse_reply(t.messages[-1].content) if t.messages else None
    if not isinstance(answer, Answer) or t.program is None:
        return "there is no answer to take references from"
    ids = [img_id for img_id, _ in answer.reference_images]
    if not config.min_references <= len(ids) <= config.max_references:
        return f"{len(ids)} references, allowed are {config.min_references} to {config.max_references}"
    if len(set(ids)) < len(ids):
        return f"the same id twice: {', '.join(ids)}"
    if ids != sorted(ids):
        return f"not sorted by id: {', '.join(ids)}"
    shown = {img_id for m in t.messages[2:-1] if m.role != "assistant" for img_id in _SHOWN.findall(m.content)}
    files: dict[str, str] = {}
    for img_id in ids:
        image = t.image(img_id)
        if img_id not in shown or image is None:
            return f"{img_id} was never shown"
        if not image["file"]:
            return f"{img_id} has no file"
        try:
            read_picture(step.picture(image["file"], image["sha256"]))
        except DataError as error:
            return f"{img_id}: {error}"
        if other := files.get(image["sha256"]):
            return f"{other} and {img_id} are the same picture"
        files[image["sha256"]] = img_id
    return ""


def ordinals_right(t: Teaching, config: FilterConfig, step: Step) -> str:
    """Every reference is bound by an ordinal phrase of the prompt, and none is named that is not there."""
    if t.program is None:
        return "there is no program"
    prompt, count = t.program.gen_prompt, len(t.program.reference_images)
    used = {_NUMBERS[word.lower()] for phrase in _BOUND.findall(prompt) for word in re.findall(_ORDINAL, phrase, re.I)}
    used |= {int(number) for number in _COUNTED.findall(prompt)}
    if beyond := sorted(n for n in used if n > count or n < 1):
        return f"names reference image {beyond[0]} of {count}"
    if unbound := sorted(set(range(1, count + 1)) - used):
        return f"no ordinal binds reference image {unbound[0]} of {count}"
    return ""


# --- the prompt -------------------------------------------------------------------------------------------------------


def nothing_leaked(t: Teaching, config: FilterConfig, step: Step) -> str:
    """No address, image id, file name or request id in the prompt."""
    prompt = t.program.gen_prompt if t.program else ""
    for what, pattern in (("an image id", _ID), ("an address", _ADDRESS), ("a file", _FILE)):
        if match := pattern.search(prompt):
            return f"holds {what}: {match.group().strip()[:60]}"
    if len(t.id) > 5 and re.search(rf"\b{re.escape(t.id)}\b", prompt):
        return "holds the request's id"
    return ""


def enough_detail(t: Teaching, config: FilterConfig, step: Step) -> str:
    """As long as the request needs, and with its names and quoted words, or a reference that stands for them."""
    if t.program is None:
        return "there is no program"
    asked, said = len(_WORD.findall(t.request.question)), len(_WORD.findall(t.program.gen_prompt))
    if said < config.min_length * asked:
        return f"{said} words for a request of {asked}"
    if said > min(config.max_words, max(config.max_length * asked, 40)):
        return f"{said} words, too many for a request of {asked}"
    names = names_of(t.request.question)
    told = [t.program.gen_prompt, *(f"{r.title} {r.note}" for r in t.program.reference_images)]
    words = {word.casefold() for text in told for word in _WORD.findall(text)}
    lost = [name for name in names if not {w.casefold() for w in _WORD.findall(name)} <= words]
    if names and 1 - len(lost) / len(names) < config.names_kept:
        return f"lost of the request: {', '.join(lost[:4])}"
    return ""


def names_of(question: str) -> list[str]:
    """Proper names (capitals inside a sentence) and quoted words of a request, each once."""
    quoted = [next(filter(None, groups)) for groups in _QUOTED.findall(question)]
    bare = _QUOTED.sub(" ", question)
    found = [re.sub(r"['’]s$", "", name.strip()) for name in _NAME.findall(bare)]
    return list(dict.fromkeys([*quoted, *(name for name in found if len(name) > 1)]))


def text_repeated(t: Teaching, config: FilterConfig, step: Step) -> str:
    """The prompt does not say the same again and again."""
    prompt = t.program.gen_prompt if t.program else ""
    sentences = [" ".join(s.split()).casefold() for s in re.split(r"[.!?\n]+", prompt) if len(s.split()) > 3]
    sentence, times = Counter(sentences).most_common(1)[0] if sentences else ("", 0)
    if times > 1:
        return f"{times} times {sentence[:60]!r}"
    words = [w.casefold() for w in _WORD.findall(prompt)]
    runs = Counter(tuple(words[i : i + _RUN]) for i in range(len(words) - _RUN + 1))
    share = sum(n - 1 for n in runs.values()) / max(1, runs.total())
    return f"{share:.2f} of its five-word runs repeat another" if share > config.max_repeated else ""


FILTERS = (
    Filter("tool_loop_complete", tool_loop_complete),
    Filter("calls_repeated", calls_repeated),
    Filter("references_valid", references_valid),
    Filter("nothing_leaked", nothing_leaked),
    Filter("ordinals_right", ordinals_right),
    Filter("enough_detail", enough_detail),
    Filter("text_repeated", text_repeated),
)


# --- all of them ------------------------------------------------------------------------------------------------------


@dataclass
class Sifted:
    """What passed every filter, what did not with its reasons {filter: reason}, and counts by filter.

    `failed` counts a trajectory at every filter it fails, `only` where it fails no other.
    """

    kept: list[Teaching] = field(default_factory=list)
    dropped: list[tuple[Teaching, dict[str, str]]] = field(default_factory=list)
    failed: Counter[str] = field(default_factory=Counter)
    only: Counter[str] = field(default_factory=Counter)


def sift(
    trajectories: Iterable[Teaching],
    config: FilterConfig,
    step: Step,
    filters: Sequence[Filter] = FILTERS,
    progress: Callable[[], None] = lambda: None,
) -> Sifted:
    """Run every filter on every trajectory. `step` is the folder that holds the pictures."""
    out = Sifted()
    for t in trajectories:
        reasons = {f.name: reason for f in filters if (reason := f.check(t, config, step))}
        progress()
        if not reasons:
            out.kept.append(t)
            continue
        out.dropped.append((t, reasons))
        out.failed.update(reasons.keys())
        if len(reasons) == 1:
            out.only.update(reasons.keys())
    return out


def dropped_row(t: Teaching, reasons: Mapping[str, str]) -> dict[str, Any]:
    return {"id": t.id, "split": t.split, "reasons": dict(reasons)}
