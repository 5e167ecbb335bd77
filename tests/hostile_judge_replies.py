"""Replies of judges that are cut, wrapped, off the scale, in prose or no text at all, and what may be read in them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

from genevolve_fast.protocols import SKILLS

_NOTED = [{"skill": s, "verdict": "partial", "evidence": 'Some of it, {not all}: "half".'} for s in SKILLS[:2]]
IMAGE = {
    "rationale": 'Constraints: a star, a word. The star is there; the word reads "OPEN", {so far}.',
    "faithfulness": 0.5,
    "visual_correctness": 0.5,
    "text_accuracy": 0.5,
    "aesthetics": 0.5,
    "text_accuracy_na": False,
    "diagnostics": _NOTED,
}
PROGRAM = {"rationale": "The star is told, its place is not.", "score": 0.75, "diagnostics": _NOTED}
GOOD = {"image": IMAGE, "program": PROGRAM}


@dataclass(frozen=True)
class Reply:
    """`body` is the whole HTTP answer, else `text` is the model's reply. `read`: it must give GOOD's scores.

    `may_read`: GOOD's scores or a failure; otherwise nothing was judged and nothing may be read.
    """

    name: str
    of: str  # image or program
    text: str = ""
    body: bytes | None = None
    read: bool = False
    may_read: bool = False


def replies() -> list[Reply]:
    return [
        reply for of in GOOD for make in (_cut, _wrapped, _broken, _off_scale, _several, _bodies) for reply in make(of)
    ]


def _cut(of: str) -> Iterator[Reply]:
    whole = json.dumps(GOOD[of])
    for n in range(len(whole)):
        yield Reply(f"cut at {n}", of, whole[:n], may_read=True)
    indented = "```json\n" + json.dumps(GOOD[of], indent=2)
    for n in range(8, len(indented), 3):
        yield Reply(f"fenced, cut at {n}", of, indented[:n], may_read=True)


def _wrapped(of: str) -> Iterator[Reply]:
    whole = json.dumps(GOOD[of])
    wrapped = {
        "plain": whole,
        "indented": json.dumps(GOOD[of], indent=4),
        "fenced": f"```json\n{whole}\n```",
        "fence without language": f"```\n{whole}\n```",
        "prose around": f"Let me look. The scale is {{0, 0.5, 1}}.\n{whole}\nThat is all.",
        "after a thought": f'<think>\nfaithfulness: 1? No {{"faithfulness": 1}}.\n</think>\n{whole}',
        "after a thought without opening": f"Hm, {{1}}.\n</think>\n{whole}",
        "trailing comma": whole[:-1] + ",}",
        "line break in a string": whole.replace("Constraints: ", "Constraints:\n"),
        "the same twice": f"{whole}\n\nAgain:\n{whole}",
        "byte order mark": "\ufeff" + whole,
        "exponents": whole.replace("0.5,", "5e-1,"),
        "closing bracket missing": whole[:-1],
    }
    for name, text in wrapped.items():
        yield Reply(name, of, text, read=True)
    single = whole.replace('\\"', "").replace('"', "'").replace("false", "False")
    yield Reply("single quotes", of, single, may_read=True)
    yield Reply("keys without quotes", of, whole.replace('"faithfulness"', "faithfulness"), may_read=True)
    yield Reply("a comment", of, whole.replace("0.5,", "0.5, // half\n"), may_read=True)


def _broken(of: str) -> Iterator[Reply]:
    whole = json.dumps(GOOD[of])
    key = "faithfulness" if of == "image" else "score"
    good = json.dumps(GOOD[of][key])
    for spelt in (
        "0,5",
        "0 .5",
        "0. 5",
        "1 0.5",
        "0.5.5",
        "1/2",
        "50%",
        "0.5abc",
        "½",
        "zero",
        "O.5",
        "0x1",
        "1 or 0",
        "~1",
    ):
        yield Reply(f"{key} is {spelt}", of, whole.replace(f'"{key}": {good}', f'"{key}": {spelt}'))
        yield Reply(f"{key} is {spelt}, cut", of, whole.replace(f'"{key}": {good}', f'"{key}": {spelt}')[:-1])
    yield Reply("empty", of, "")
    yield Reply("blank", of, " \n\t ")
    yield Reply("prose", of, "Faithfulness: 1. Visual correctness: 1. Text: 1. Aesthetics: 1. Score: 1.")
    yield Reply("prose with keys", of, "faithfulness: 1\nvisual_correctness: 1\naesthetics: 1\nscore: 1")
    yield Reply("a table", of, "| faithfulness | 1 |\n| score | 1 |\n")
    yield Reply("yaml", of, "".join(f"{k}: {json.dumps(v)}\n" for k, v in GOOD[of].items()))
    yield Reply("refusal", of, "I'm sorry, I can't grade pictures of people.")
    yield Reply("only a thought", of, f"<think>\n{whole}")
    yield Reply("number", of, "1")
    yield Reply("null", of, "null")
    yield Reply("string", of, json.dumps(whole))
    yield Reply("empty object", of, "{}")
    yield Reply("nested", of, json.dumps({"verdict": {k: v for k, v in GOOD[of].items() if k != "rationale"}}))
    yield Reply("keys in capitals", of, json.dumps({k.upper(): v for k, v in GOOD[of].items()}))
    yield Reply("the schema", of, json.dumps(dict.fromkeys(GOOD[of], {"type": "number"})))
    yield Reply("the template", of, json.dumps(dict.fromkeys(GOOD[of], "...")))
    yield Reply("huge", of, "a" * 300_000 + whole)
    yield Reply("many brackets", of, "{" * 50_000)
    yield Reply("many brackets and keys", of, '{"rationale":' * 5_000)
    yield Reply("deep", of, '{"rationale":' + "[" * 50_000 + "]" * 50_000 + "}")
    yield Reply("lone surrogate", of, '{"rationale": "\ud800", ')
    yield Reply("control characters", of, "\x00\x01\x02{\x03")


def _off_scale(of: str) -> Iterator[Reply]:
    for key, value in GOOD[of].items():
        if key == "diagnostics":
            continue
        yield Reply(f"{key} is missing", of, json.dumps({k: v for k, v in GOOD[of].items() if k != key}))
        wrong = [
            None,
            [1],
            {"value": 1},
            0.7,
            -1,
            5,
            100,
            0.501,
            1e-3,
            10**400,
            float("nan"),
            float("inf"),
            -float("inf"),
        ]
        wrong += ["0.5", "1", "high", "true", "", True]
        if isinstance(value, bool):
            wrong = [None, 0, 1, 0.5, "true", "false", "no", [], {}]
        elif isinstance(value, str):
            wrong = [None, 1, True, [], {}]
        for other in wrong:
            text = json.dumps(GOOD[of] | {key: other})
            yield Reply(f"{key} is {str(other)[:12]}", of, text)
            yield Reply(f"{key} is {str(other)[:12]}, with a comma too many", of, text[:-1] + ",}")
    if of == "image":
        for score in (0, 1):
            yield Reply(
                f"not applicable, but {score}",
                of,
                json.dumps(IMAGE | {"text_accuracy_na": True, "text_accuracy": score}),
            )


def _several(of: str) -> Iterator[Reply]:
    whole = json.dumps(GOOD[of])
    key = "faithfulness" if of == "image" else "score"
    zero = json.dumps(GOOD[of] | {key: 0})
    yield Reply("two verdicts", of, f"{zero}\n{whole}")
    yield Reply("a list of two", of, f"[{zero}, {whole}]")
    yield Reply("two keys", of, whole.replace(f'"{key}":', f'"{key}": 0, "{key}":'))
    yield Reply("two keys and a comma too many", of, whole.replace(f'"{key}":', f'"{key}": 0, "{key}":')[:-1] + ",}")
    yield Reply("lines of verdicts", of, f"{zero}\n{zero.replace('0.5', '1')}\n{whole}\n")
    for n in range(len(whole) // 2, len(whole) - 1, 7):
        yield Reply(f"an example, then the verdict cut at {n}", of, f"Form: {zero}\nVerdict: {whole[:n]}")


def _bodies(of: str) -> Iterator[Reply]:
    whole = json.dumps(GOOD[of])

    def answer(message: object, **changes) -> bytes:
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        return json.dumps(
            {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]} | changes
        ).encode()

    bodies = {
        "not UTF-8": answer({"role": "assistant", "content": "?"}).replace(b"?", b"\xff\xfe\xc3("),
        "not JSON": b"<html><body>502 Bad Gateway</body></html>",
        "half JSON": answer({"role": "assistant", "content": whole})[:-40],
        "nothing": b"",
        "null": b"null",
        "a list": b"[]",
        "no choices": answer({}, choices=[]),
        "no message": answer(None),
        "content is null": answer({"role": "assistant", "content": None}),
        "content is a number": answer({"role": "assistant", "content": 1}),
        "content is the object": answer({"role": "assistant", "content": GOOD[of]}),
        "an error inside": json.dumps({"error": {"message": "overloaded", "code": 529}}).encode(),
        "gzip that is none": b"\x1f\x8b\x08garbage",
    }
    for name, body in bodies.items():
        yield Reply(f"body: {name}", of, body=body)
