"""Text from outside, made unable to act: it is data, whatever it says."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from functools import lru_cache

_TAGS = "tool_call|tool_response|answer|think|experience|image|video"  # the last two: placeholders of the SFT format
_PROTOCOL = re.compile(rf"(?<=<)\||\|(?=>)|<(?=[\s/]*(?:{_TAGS})\b)")
_LOOK_ALIKES = {"|": "¦", "<": "‹"}  # neither is a compatibility form of what it replaces
_INVISIBLE = {"Mn", "Me", "Cf"}
_FILLERS = "\u115f\u1160\u3164\uffa0"
_BREAKERS = "·¦•∙"


def harmless(text: str, markers: Sequence[str] = ()) -> str:
    """`text` with everything broken up that could steer the policy, and still readable.

    `markers` are the texts that a codec encodes to one control id (Codec.markers). None of them is left in the result,
    nor anything like `<|...|>`, nor a tag of the protocol; neither in compatibility forms (fullwidth letters), nor
    with invisible characters in between, nor in another case. A marker of blanks only is text and stays.
    """
    text = _replaced(readable(text), _PROTOCOL, _LOOK_ALIKES.__getitem__)
    pattern, breaker = _markers(tuple(markers))
    while pattern and (broken := _broken(text, pattern, breaker)) != text:
        text = broken
    return text


def readable(text: str) -> str:
    """NFC without control characters (but newline and tab); a lone surrogate becomes U+FFFD."""
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    text = re.sub(r"\r\n?", "\n", text)
    return unicodedata.normalize("NFC", re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "", text))


def one_line(text: str, limit: int) -> str:
    """`text` readable, on one line, of at most `limit` characters."""
    line = " ".join(readable(text[: 8 * limit]).split())  # a megabyte is not worth reading
    return line if len(line) <= limit else line[: limit - 1] + "…"


@lru_cache(maxsize=1 << 14)
def _folded(character: str) -> str:
    """What a reader takes a character for: compatibility form, lower case, without accents; "" when invisible."""
    plain = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", character).casefold())
    return "".join(c for c in plain if unicodedata.category(c) not in _INVISIBLE and c not in _FILLERS)


def _fold(text: Iterable[str]) -> str:
    return "".join(map(_folded, text))


def _view(text: str) -> tuple[str, Sequence[int]]:
    """The folded text, and for each of its characters the index in `text` that it comes from."""
    if text.isascii():
        return text.lower(), range(len(text))
    parts = [_folded(c) for c in text]
    return "".join(parts), [i for i, part in enumerate(parts) for _ in part]


def _replaced(text: str, pattern: re.Pattern[str], put) -> str:
    """`text` with `put(matched)` for every character whose folded form begins a match."""
    view, origin = _view(text)
    out = list(text)
    for match in pattern.finditer(view):
        out[origin[match.start()]] = put(match.group())
    return "".join(out)


@lru_cache(maxsize=16)
def _markers(markers: tuple[str, ...]) -> tuple[re.Pattern[str] | None, str]:
    """A pattern for the folded markers, and a character that none of them contains."""
    folded = {f for m in markers if (f := _fold(m)).strip()}
    if not folded:
        return None, ""
    everything = "".join(folded)
    breaker = next(c for c in (*_BREAKERS, *map(chr, range(0x2500, 0x2600))) if c not in everything)
    return re.compile("|".join(re.escape(m) for m in sorted(folded, key=len, reverse=True))), breaker


def _broken(text: str, pattern: re.Pattern[str], breaker: str) -> str:
    """`text` with `breaker` after the first character of every match, or in its place where it is the whole match."""
    view, origin = _view(text)
    out = list(text)
    for match in pattern.finditer(view):
        first, last = origin[match.start()], origin[match.end() - 1]
        out[first] = breaker if first == last else text[first] + breaker
    return "".join(out)
