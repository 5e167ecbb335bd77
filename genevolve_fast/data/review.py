"""Second opinions on a trajectory or its picture, by a vision-language model or a rule; silence is no verdict."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from genevolve_fast.agent.protocol import ToolCall, parse_reply
from genevolve_fast.data.rows import read_picture
from genevolve_fast.data.steps import Step
from genevolve_fast.data.trajectories import Teaching
from genevolve_fast.net.asking import ask_once
from genevolve_fast.net.chat import ChatEndpoint
from genevolve_fast.net.pictures import data_url
from genevolve_fast.net.replies import ReplyError, boolean, string
from genevolve_fast.protocols import EngineError, ImageJudge, JudgeError, ProgramJudge, Sampling
from genevolve_fast.trajectory import Request

Decision = Literal["pass", "fail", "undecided"]


@dataclass(frozen=True)
class Review:
    """`kind` (one of incidents.KINDS) says how an undecided one failed."""

    decision: Decision
    reason: str
    kind: str = ""

    def to_row(self) -> dict[str, str]:
        return {"decision": self.decision, "reason": self.reason}


class TrajectoryReviewer(Protocol):
    name: str

    async def review(self, t: Teaching, step: Step) -> Review:
        """Never raises for what the service behind it does. `step` holds the pictures."""
        ...


class PictureReviewer(Protocol):
    name: str

    async def review(self, t: Teaching, picture: np.ndarray, step: Step) -> Review: ...


# --- a vision-language model ------------------------------------------------------------------------------------------

_KEYS = ("pass", "reason")
_FORM = """\
Reply with one JSON object and nothing else: {"pass": true or false, "reason": one sentence naming what decided}."""

_TRAJECTORY_TASK = f"""\
You check demonstrations for an agent that turns requests into programs for a reference-conditioned image generator. You
see a request, the calls that were made, and the program: a prompt and its reference pictures in order. Pass it only if
all of this holds:
- every wish of the request is in the prompt, and nothing contradicts the request;
- what had to be looked up was looked up, and the prompt states what was found rather than a guess;
- each reference picture shows clearly what its note and the prompt take from it, and is the right thing;
- the prompt tells what to copy from each reference, and could be drawn by somebody who sees only it and them.
{_FORM}"""

_PICTURE_TASK = f"""\
You check pictures that shall serve as ground truth for a request. You see the request, the reference pictures that its
maker was given, and the picture. Pass it only if all of this holds:
- everything the request asks for is there, in the number, place and form it asks for, and nothing disturbs it;
- written words are exact, letter by letter;
- what the references stand for can be recognised;
- the picture is clean: no smears, no broken anatomy, no stray writing.
{_FORM}"""


def read_verdict(values: Mapping[str, Any]) -> Review:
    """Raises ReplyError."""
    passed, reason = boolean(values, "pass"), " ".join(string(values, "reason").split())
    if not reason:
        raise ReplyError("reason is empty")
    return Review("pass" if passed else "fail", reason)


class _Chat:
    """Asks a chat model for a verdict; whatever else comes is undecided, with its reason."""

    name = "chat"

    def __init__(self, endpoint: ChatEndpoint, *, max_tokens: int = 1024) -> None:
        self._endpoint = endpoint
        self._sampling = Sampling(temperature=0.0, top_p=1.0, max_tokens=max_tokens)

    async def _ask(self, task: str, parts: list[dict[str, Any]]) -> Review:
        messages = [{"role": "system", "content": task}, {"role": "user", "content": parts}]
        try:
            return read_verdict(await ask_once(self._endpoint, messages, self._sampling, _KEYS, _KEYS[:1]))
        except EngineError as error:
            return Review("undecided", str(error), error.kind)
        except ReplyError as error:
            return Review("undecided", f"no verdict in the reply: {error}", "bad_response")


class ChatTrajectoryReviewer(_Chat):
    async def review(self, t: Teaching, step: Step) -> Review:
        calls = [r for m in t.messages if m.role == "assistant" and isinstance(r := parse_reply(m.content), ToolCall)]
        told = "\n".join(f"- {call.name} {call.arguments}" for call in calls)
        text = f"Request:\n{t.request.question}\n\nCalls:\n{told or '- none'}\n\nPrompt:\n{t.program.gen_prompt}"
        return await self._ask(_TRAJECTORY_TASK, [_text(text), *_references(t, step)])


class ChatPictureReviewer(_Chat):
    async def review(self, t: Teaching, picture: np.ndarray, step: Step) -> Review:
        parts = [_text(f"Request:\n{t.request.question}"), *_references(t, step)]
        return await self._ask(_PICTURE_TASK, [*parts, _text("The picture:"), _picture(picture)])


def _references(t: Teaching, step: Step) -> list[dict[str, Any]]:
    parts = []
    for i, reference in enumerate(t.program.reference_images if t.program else (), 1):
        parts.append(_text(f"Reference image {i}, {reference.note or 'without a note'}:"))
        parts.append(_picture(read_picture(step.picture(reference.local_path, reference.sha256))))
    return parts


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _picture(pixels: np.ndarray) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(pixels)}}


# --- rules ------------------------------------------------------------------------------------------------------------


class JudgedProgram:
    """A program judge as reviewer: passes from `min_score` on."""

    name = "rule"

    def __init__(self, judge: ProgramJudge, min_score: float = 1.0) -> None:
        self._judge, self._min = judge, min_score

    async def review(self, t: Teaching, step: Step) -> Review:
        try:
            verdict = await self._judge.judge(t.request, t.program)
        except JudgeError as error:
            return Review("undecided", str(error), error.kind)
        failed = [f"{d.skill}: {d.evidence}" for d in verdict.diagnostics if d.verdict in ("fail", "partial")]
        told = "; ".join(failed) or verdict.rationale
        return Review(
            "pass" if verdict.score >= self._min else "fail", f"program {verdict.score:g}; {told}".rstrip("; ")
        )


class JudgedPicture:
    """An image judge as reviewer: passes where all that was asked for is right and the picture is not untidy.

    `known` draws what the request describes; only a world that made its requests itself can.
    """

    name = "rule"

    def __init__(self, judge: ImageJudge, known: Callable[[Request], np.ndarray]) -> None:
        self._judge, self._known = judge, known

    async def review(self, t: Teaching, picture: np.ndarray, step: Step) -> Review:
        try:
            v = await self._judge.judge(t.request, picture, self._known(t.request))
        except JudgeError as error:
            return Review("undecided", str(error), error.kind)
        scores = {"faithfulness": v.faithfulness, "visual correctness": v.visual_correctness}
        scores |= {"text accuracy": v.text_accuracy} if v.text_required else {}
        low = [f"{name} {score:g}" for name, score in scores.items() if score < 1]
        low += [f"aesthetics {v.aesthetics:g}"] if v.aesthetics < 0.5 else []
        return Review("fail" if low else "pass", ", ".join(low) or "all that was asked for is right")
