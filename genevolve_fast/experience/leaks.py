"""What an experience must not say: it names decisions, never what the right picture shows."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any

from genevolve_fast.protocols import SKILLS
from genevolve_fast.trajectory import Program, Request

TOOLS = ("search", "image_search", "query_knowledge")
_NUMBERS = """two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred thousand million dozen"""
_CRAFT = """a about above across after again against agent all alone already also although always an and angle another
answer any apart apply are around artist as ask aspect at attribute attributes avoid away background balance be because
become been before begin behind being below beside best better between bind binding blank body both bottom but by call
camera caption center centre check choose chosen clean clear clearly clutter color colors colour colours come compare
composition concrete confirm confuse confused consistency consult contain content contrast copy correct count counted
counting crisp cross decide decision depth describe described description design detail details did differ different do
does done down draw drawing drawn each either element elements else empty end enough entity every everything evidence
exact exactly explicit explicitly face fact facts fail failed failure few figure figures final find finish first fit
fits fitting fix focus follow for form format found frame framing from full further gave general generator generic get
give given gives go good got grounded group guess guessing guidance had hands happen has have here him his how i if
image images in include included instead instruction into is it item items its itself job just keep kind know knowledge
known label labels last later layout lead leave left legible less let letter letters light lighting like line list
literal locate long look looks made main make makes many match matched material materials may mean medium mention met
missed missing mix mixed model more most much must name named names near need needed neither never next no none nor not
note notes nothing number object objects of off official often on once one only onto open or order ordinal other others
otherwise out over own page part parts people person phrase phrases photo photograph pick picked picture pictures place
placed placement places plain plan point portrait pose position positions precise precisely prompt prompts proper put
quality query quote quoted quotes rather read readable real reference references rely repeat request requested requests
require required requires result results retrieve return right rollout row rows rule rules said same say scale scene
second see seen select selected selection sentence separate separately set shape shapes should show shown shows side
sign similar simple single site size skill skills skip small so some something source sources spatial specific specify
spell spelled spelling spelt stand stands state stated states step still string style subject subjects such surface
take tell term terms text texts texture than that the their them then there these they thing things this those though
through time title titled titles to together told too tool tools top total toward turn twice under unless unrelated
until up upon use used useful using vague verify version very view visible visual visually want was way well went were
what when where whether which while who whole whose why will with within without word wording words work works would
write written wrong yet you your json"""
_VOCABULARY = frozenset(_CRAFT.split()) | {part for name in (*TOOLS, *SKILLS) for part in (name, *name.split("_"))}
_NUMBER_WORDS = frozenset(_NUMBERS.split())

_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)?")
_LINKS = re.compile(r"https?:|www\.|\bIMG_?\s?\d+|\b[\w-]+\.(?:com|org|net|io|jpe?g|png|webp)\b|(?<!\S)/\w", re.I)
_QUOTES = re.compile(r"\"([^\"]+)\"|“([^”]+)”|«([^»]+)»|„([^“”]+)[“”]|`([^`]+)`|(?<!\w)[‘']([^’']+)[’'](?!\w)")
_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n+")
_LONGEST_QUOTE = 80  # characters; what looks longer is an apostrophe and the next one


class Secrets:
    """The words that only the rollouts and the ground truth know: what an experience of `request` must not say.

    Secret are, unless they stand in the request or belong to the craft: every word of both programs (prompt, titles
    and notes of the references) and of the text in Request.extra, which may describe the ground truth; and of
    `shown`, what else the comparer read, the names and quoted texts.
    """

    def __init__(self, request: Request, programs: Iterable[Program], shown: Iterable[str]) -> None:
        self._asked = {_folded(w) for w in _words(request.question)}
        self._asked_numbers = set(re.findall(r"\d+", request.question))
        self._question = _spaced(request.question)
        known = list(_strings(request.extra))
        for program in programs:
            known += [program.gen_prompt, *(text for r in program.reference_images for text in (r.title, r.note))]
        words = {_folded(w) for text in known for w in _words(text)}
        words |= {_folded(w) for text in shown for w in _marked(text)}
        self._secret = words - self._asked - _VOCABULARY

    def leak(self, text: str) -> str | None:
        """The first thing in `text` that an experience must not say, or None.

        Whether it is secret or invented: links, image ids, paths; quoted texts and numbers (as digits or words from
        two on) that are not in the request; words with a capital or of a script without capitals that are not in the
        request, except a plain one that begins a sentence.
        """
        text = _plain(text)
        if match := _LINKS.search(text):
            return match.group()
        for match in _QUOTES.finditer(text):
            quoted = next(filter(None, match.groups()))
            if _spaced(quoted) not in self._question and not self._harmless_words(quoted):
                return match.group()
        for number in re.findall(r"\d+", text):
            if number not in self._asked_numbers:
                return number
        for sentence in _SENTENCE.split(text):
            if word := self._name_in(sentence):
                return word
        return None

    def _harmless_words(self, text: str) -> bool:
        return all(_folded(w) in _VOCABULARY for w in _words(text))

    def _name_in(self, sentence: str) -> str | None:
        names = set(_names(sentence))
        for word in _words(sentence):
            folded = _folded(word)
            if folded in self._asked or folded in _VOCABULARY:
                continue
            if folded in self._secret or folded in _NUMBER_WORDS or word in names:
                return word
        return None


def _strings(value: Any) -> Iterable[str]:
    """Every text inside plain JSON."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _strings(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _strings(inner)


def _marked(text: str) -> Iterable[str]:
    """Names, and the words of quoted texts."""
    text = _plain(text)
    for sentence in _SENTENCE.split(text):
        yield from _names(sentence)
    for match in _QUOTES.finditer(text):
        quoted = next(filter(None, match.groups()))
        if len(quoted) <= _LONGEST_QUOTE:
            yield from _words(quoted)


def _names(sentence: str) -> Iterable[str]:
    """Words that look like names; the first only where more than its first letter says so, or the next one is one."""
    words = _words(sentence)
    for i, word in enumerate(words):
        plain = i == 0 and not (_is_name(word[1:]) or _possessive(word) or (len(words) > 1 and _is_name(words[1])))
        if _is_name(word) and not (plain and word[0].isupper()):
            yield word


def _words(text: str) -> list[str]:
    return _WORD.findall(_plain(text))


def _plain(text: str) -> str:
    """Compatibility forms as what they look like, nothing invisible."""
    return "".join(c for c in unicodedata.normalize("NFKC", text) if unicodedata.category(c) != "Cf")


def _is_name(word: str) -> bool:
    """It has a capital, or letters of a script that knows none."""
    return any(c.isupper() or c.istitle() or (c.isalpha() and not c.islower()) for c in word)


def _possessive(word: str) -> bool:
    return word.endswith(("'s", "’s"))


def _folded(word: str) -> str:
    """Without case, possessive and plural."""
    folded = word.casefold().removesuffix("'s").removesuffix("’s").strip("'’-")
    return folded.removesuffix("s") if len(folded) > 3 and folded not in _VOCABULARY else folded


def _spaced(text: str) -> str:
    return " ".join(text.casefold().split())
