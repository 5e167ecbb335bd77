"""What the agent did, read from the rows of a results.json: tools, references, skills, programs, rounds, cost."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from genevolve_fast.agent.protocol import Answer, ToolCall, parse_reply
from genevolve_fast.evaluate.score_files import Row, existing_file, picture_path, prompt_of, rendered
from genevolve_fast.net.pictures import decode_image
from genevolve_fast.net.web import FetchError

PRICES = ("million_tokens", "search", "image_search", "picture", "judgement")  # what `--price NAME=DOLLARS` may name
_FAILED = ("[tool error]", "Format error:", "RESPONSE TOO LONG")
_RESPONSE = re.compile(r"<tool_response>\n?(.*?)\n?</tool_response>", re.DOTALL)
_SHOWN = re.compile(r"^(IMG_\d+): title:", re.MULTILINE)
_MAX_PIXELS = 100_000_000

_QUOTES = re.compile(r'"([^"\n]{1,120})"|“([^”\n]{1,120})”|«([^»\n]{1,120})»|(?<!\w)\'([^\'\n]{1,120})\'(?!\w)')
_NUMBER = re.compile(r"\d+(?:[.,:]\d+)*")
_CAPITAL = r"[A-ZÀ-Þ][\w’'-]*"
_NAME = re.compile(rf"{_CAPITAL}(?:\s+(?:(?:of(?:\s+the)?|de|del|la|le|du|von|van|der|&)\s+)?{_CAPITAL})*")
_GENITIVE = re.compile(r"['’]s?\Z")
_SENTENCE_START = re.compile(r"(?:\A|[.!?:;]\s+|\n\s*|[\"“«(]\s*)\Z")
_WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]


# --- one trajectory ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """A tool call of a trajectory, and whether the world answered it."""

    tool: str
    arguments: Mapping[str, Any]
    succeeded: bool


def tool_calls(row: Row) -> list[Call]:
    """Every call in order. One that was not answered (the trajectory ended with it) did not succeed."""
    calls, messages = [], _messages(row)
    for i, (role, content) in enumerate(messages):
        reply = parse_reply(content) if role == "assistant" else None
        if isinstance(reply, ToolCall):
            following = messages[i + 1] if i + 1 < len(messages) else ("", "")
            calls.append(Call(reply.name, reply.arguments, following[0] != "assistant" and _answered(following[1])))
    return calls


def _answered(content: str) -> bool:
    found = _RESPONSE.search(content)
    text = (found[1] if found else content).strip()
    all_queries_failed = text.startswith("--- search error") and "--- search result" not in text
    return bool(text) and not text.startswith(_FAILED) and not all_queries_failed


def shown_images(row: Row) -> set[str]:
    """Ids of the pictures that image searches returned."""
    return {i for role, content in _messages(row) if role in ("user", "tool") for i in _SHOWN.findall(content)}


def named_images(row: Row) -> list[str]:
    """Ids that the answer names, as written; references that the runtime dropped are among them."""
    for role, content in reversed(_messages(row)):
        if role == "assistant" and isinstance(answer := parse_reply(content), Answer):
            return [img_id for img_id, _ in answer.reference_images]
    return [str(r.get("img_id", "")) for r in _references(row)]


def _messages(row: Row) -> list[tuple[str, str]]:
    messages = row["messages"] if isinstance(row.get("messages"), list) else []
    return [(str(m.get("role")), str(m.get("content") or "")) for m in messages if isinstance(m, dict)]


def _references(row: Row) -> list[Row]:
    found = row["reference_images"] if isinstance(row.get("reference_images"), list) else []
    return [r for r in found if isinstance(r, dict)]


# --- what a request asks to keep --------------------------------------------------------------------------------------


def demands(request: str) -> dict[str, list[str]]:
    """Quoted texts, numbers and names of a request; a name is a run of capitalised words without a sentence's first."""
    texts = [next(filter(None, groups)).strip() for groups in _QUOTES.findall(request)]
    bare = _QUOTES.sub(lambda m: " " * len(m[0]), request)
    numbers = [*_NUMBER.findall(bare), *(w for w in re.findall(r"[a-z]+", bare.lower()) if w in _WORDS[2:])]
    names = [_GENITIVE.sub("", _name(bare, m)) for m in _NAME.finditer(bare)]
    return {
        "texts": _once(t for t in texts if t),
        "numbers": _once(numbers),
        "names": _once(n for n in names if len(n) > 1),
    }


def _name(text: str, match: re.Match[str]) -> str:
    if _SENTENCE_START.search(text[: match.start()]) is None:
        return match[0]
    rest = match[0].split(maxsplit=1)[1:]  # what begins a sentence is capitalised anyway
    found = _NAME.search(rest[0]) if rest else None
    return found[0] if found else ""


def kept(demand: str, kind: str, program: str) -> bool:
    """Whether a program keeps a text or name (case and blanks aside) or a number (in digits or in words)."""
    if kind != "numbers":
        return _plain(demand) in _plain(program)
    forms = {demand}
    if demand.isdigit() and int(demand) < len(_WORDS):
        forms.add(_WORDS[int(demand)])
    elif demand in _WORDS:
        forms.add(str(_WORDS.index(demand)))
    return any(re.search(rf"(?<![\w.]){re.escape(form)}(?!\w|[.,:]\d)", program, re.IGNORECASE) for form in forms)


def _plain(text: str) -> str:
    return " ".join(text.casefold().replace("’", "'").split())


def _once(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))


# --- annotated skills -------------------------------------------------------------------------------------------------


def annotated_skills(row: Row) -> tuple[set[str], set[str]] | None:
    """(primary, secondary) skills of a bench row, from `meta`, `extra_info` or the row itself; None without any."""
    places = [row.get("meta"), row.get("extra_info"), row]
    for place in places:
        if isinstance(place, dict) and ("primary_skills" in place or "secondary_skills" in place):
            return _skills(place.get("primary_skills")), _skills(place.get("secondary_skills"))
    return None


def _skills(value: Any) -> set[str]:
    if isinstance(value, str):
        return {s.strip() for s in value.split(",") if s.strip()}
    return {s for s in value if isinstance(s, str)} if isinstance(value, list | tuple) else set()


# --- all rows ---------------------------------------------------------------------------------------------------------


def diagnose(
    rows: Sequence[Row],
    *,
    roots: Sequence[Path] = (),
    sampled_tokens: int | None = None,
    seconds: Mapping[str, float] | None = None,
    program_scores: Sequence[float] = (),
    judged: int = 0,
    prices: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Everything of one results.json. A share of nothing is None; a cost is told only for what has a price."""
    calls = [(i, call) for i, row in enumerate(rows) for call in tool_calls(row)]
    pictures = sum(rendered(row, roots) and picture_path(row, roots) is not None for row in rows)
    out: dict[str, Any] = {
        "rows": len(rows),
        "programs": sum(bool(row.get("gen_prompt")) for row in rows),
        "terminations": dict(sorted(Counter(str(row.get("termination") or "unknown") for row in rows).items())),
        "rounds_mean": _share(sum(int(row.get("rounds") or 0) for row in rows), len(rows)),
        "tools": _tools([call for _, call in calls], len(rows)),
        "references": _reference_counts(rows, roots),
        "skills": _routing(rows, calls),
        "faithfulness": _faithfulness(rows),
        "program_score_mean": _share(sum(program_scores), len(program_scores)),
        "sampled_tokens": sampled_tokens,
        "seconds": dict(seconds or {}),
    }
    counts = {
        "million_tokens": None if sampled_tokens is None else sampled_tokens / 1e6,
        "search": sum(_queries(c) for _, c in calls if c.tool == "search"),
        "image_search": sum(c.tool == "image_search" for _, c in calls),
        "picture": pictures,
        "judgement": judged + len(program_scores),
    }
    return out | {"cost": _cost(counts, prices or {}, len(rows))}


def _tools(calls: Sequence[Call], rows: int) -> dict[str, dict[str, Any]]:
    out = {}
    for tool in sorted({c.tool for c in calls}):
        mine = [c for c in calls if c.tool == tool]
        out[tool] = {
            "calls": len(mine),
            "calls_per_row": _share(len(mine), rows),
            "succeeded": _share(sum(c.succeeded for c in mine), len(mine)),
        }
        if tool == "search":
            out[tool]["queries_per_call"] = _share(sum(map(_queries, mine)), len(mine))
    return out


def _queries(call: Call) -> int:
    queries = call.arguments.get("queries", call.arguments.get("query"))
    return len(queries) if isinstance(queries, list) else int(isinstance(queries, str))


def _reference_counts(rows: Sequence[Row], roots: Sequence[Path]) -> dict[str, Any]:
    """Named ids that were shown before; of the program's references those with a file and a picture in it; repeats."""
    named = shown = references = files = decodable = repeated = 0
    usable = lru_cache(maxsize=None)(_decodable)
    for row in rows:
        before, ids = shown_images(row), named_images(row)
        named, shown = named + len(ids), shown + sum(i in before for i in ids)
        seen: set[str] = set()
        for reference in _references(row):
            references += 1
            path = existing_file(reference.get("local_path"), roots or [Path()])
            if path is not None:
                files, decodable = files + 1, decodable + usable(path)
            name = str(path or reference.get("url") or reference.get("img_id"))
            repeated += name in seen
            seen.add(name)
        repeated += len(ids) - len(set(ids))
    return {
        "per_program": _share(references, sum(bool(row.get("gen_prompt")) for row in rows)),
        "named": named,
        "shown_before": _share(shown, named),
        "in_programs": references,
        "file_exists": _share(files, references),
        "decodable": _share(decodable, references),
        "duplicates": repeated,
    }


def _decodable(path: Path) -> bool:
    try:
        decode_image(path.read_bytes(), _MAX_PIXELS, 64)
    except (FetchError, OSError):
        return False
    return True


def _routing(rows: Sequence[Row], calls: Sequence[tuple[int, Call]]) -> dict[str, Any] | None:
    """Skills asked for against the annotated ones (primary and secondary together), over rows that have any."""
    asked: dict[int, set[str]] = {}
    for i, call in calls:
        if call.tool == "query_knowledge" and call.succeeded:
            asked.setdefault(i, set()).add(str(call.arguments.get("skill_name")))
    right, extra, missed, primary, primary_hit = Counter(), Counter(), Counter(), 0, 0
    annotated = {i: skills for i, row in enumerate(rows) if (skills := annotated_skills(row)) is not None}
    if not annotated:
        return None
    for i, (first, second) in annotated.items():
        mine, wanted = asked.get(i, set()), first | second
        right.update(mine & wanted)
        extra.update(mine - wanted)
        missed.update(wanted - mine)
        primary, primary_hit = primary + len(first), primary_hit + len(first & mine)
    skills = sorted({*right, *extra, *missed})
    return {
        "rows": len(annotated),
        **_scores(right.total(), extra.total(), missed.total()),
        "primary_recall": _share(primary_hit, primary),
        "per_skill": {s: {"annotated": right[s] + missed[s], **_scores(right[s], extra[s], missed[s])} for s in skills},
    }


def _scores(right: int, extra: int, missed: int) -> dict[str, float | None]:
    f1 = _share(2 * right, 2 * right + extra + missed)
    return {"precision": _share(right, right + extra), "recall": _share(right, right + missed), "f1": f1}


def _faithfulness(rows: Sequence[Row]) -> dict[str, Any]:
    """Of the texts, numbers and names in requests the share that their programs keep; rows without program left out."""
    asked, held = Counter(), Counter()
    for row in rows:
        program = row.get("gen_prompt")
        if not isinstance(program, str) or not program.strip():
            continue
        for kind, values in demands(prompt_of(row)).items():
            asked[kind] += len(values)
            held[kind] += sum(kept(value, kind, program) for value in values)
    out = {
        kind: {"asked": asked[kind], "kept": _share(held[kind], asked[kind])} for kind in ("texts", "numbers", "names")
    }
    return out | {"all": {"asked": asked.total(), "kept": _share(held.total(), asked.total())}}


def _cost(counts: Mapping[str, float | None], prices: Mapping[str, float], rows: int) -> dict[str, Any] | None:
    parts = {name: counts[name] * price for name, price in prices.items() if counts[name] is not None}
    if not parts:
        return None
    total = sum(parts.values())
    return {"dollars": total, "dollars_per_row": _share(total, rows), "parts": parts}


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None


# --- as text ----------------------------------------------------------------------------------------------------------


def table(made: Mapping[str, Any]) -> str:
    """`diagnose` as text."""
    ends = ", ".join(f"{end} {n}" for end, n in made["terminations"].items())
    lines = [
        f"{made['rows']} rows, {made['programs']} programs; ended: {ends}; {_number(made['rounds_mean'])} rounds each"
    ]
    for tool, t in made["tools"].items():
        queries = f", {_number(t['queries_per_call'])} queries a call" if "queries_per_call" in t else ""
        lines.append(
            f"{tool}: {t['calls']} calls, {_number(t['calls_per_row'])} a row, "
            f"{_percent(t['succeeded'])} answered{queries}"
        )
    r = made["references"]
    lines.append(
        f"references: {_number(r['per_program'])} a program; of {r['named']} named {_percent(r['shown_before'])} were "
        f"shown before; of {r['in_programs']} kept {_percent(r['file_exists'])} have a file, "
        f"{_percent(r['decodable'])} a picture in it; {r['duplicates']} duplicates"
    )
    if skills := made["skills"]:
        lines.append(
            f"skills against the annotation of {skills['rows']} rows: precision {_number(skills['precision'])}, recall "
            f"{_number(skills['recall'])} (primary {_number(skills['primary_recall'])}), F1 {_number(skills['f1'])}"
        )
        width = max(map(len, skills["per_skill"]), default=0)
        for name, s in skills["per_skill"].items():
            numbers = ", ".join(f"{n} {_number(s[n])}" for n in ("precision", "recall", "f1"))
            lines.append(f"  {name:{width}} annotated {s['annotated']:4d}, {numbers}")
    parts = ", ".join(f"{kind} {_percent(f['kept'])} of {f['asked']}" for kind, f in made["faithfulness"].items())
    lines.append(f"programs keep of their requests: {parts}")
    if made["program_score_mean"] is not None:
        lines.append(f"program judge: {_number(made['program_score_mean'])}")
    if made["sampled_tokens"] is not None:
        lines.append(f"sampled tokens: {made['sampled_tokens']}")
    if made["seconds"]:
        lines.append("seconds: " + ", ".join(f"{stage} {s:.1f}" for stage, s in made["seconds"].items()))
    if cost := made["cost"]:
        parts = ", ".join(f"{name} {dollars:.4g}" for name, dollars in cost["parts"].items())
        lines.append(f"cost: ${cost['dollars']:.4g}, ${cost['dollars_per_row']:.4g} a row ({parts})")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"
