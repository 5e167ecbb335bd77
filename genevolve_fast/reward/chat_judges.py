"""Judges behind an OpenAI-compatible chat endpoint. What was not judged is a JudgeError, never a score."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from genevolve_fast.net.asking import JsonChat, NoAnswer, Question
from genevolve_fast.net.harmless import one_line
from genevolve_fast.net.pictures import judged_url
from genevolve_fast.net.replies import ReplyError, boolean, number_on, string
from genevolve_fast.protocols import SKILLS, ImageVerdict, JudgeError, ProgramVerdict
from genevolve_fast.reward import rubric
from genevolve_fast.reward.kscore import IMAGE_SCORES, PROGRAM_SCORES
from genevolve_fast.trajectory import Diagnostic, Program, Request, image_hash

MAX_RATIONALE = 1000  # characters, as the released evaluator keeps
MAX_EVIDENCE = 300


class ChatImageJudge:
    """protocols.ImageJudge: KScore by a model that sees request, generated picture and ground truth, in this order."""

    def __init__(self, chat: JsonChat) -> None:
        self._chat = chat

    async def judge(self, request: Request, image: np.ndarray, truth: np.ndarray) -> ImageVerdict:
        """Raises JudgeError."""
        text = rubric.request_text(request)

        def messages() -> list[dict[str, Any]]:
            parts = [_text(text), _text("Image 1, the generated picture:"), _picture(image)]
            parts += [_text("Image 2, the ground truth:"), _picture(truth), _text("Grade Image 1. JSON only.")]
            return _conversation(rubric.IMAGE_RUBRIC, parts)

        question = Question(
            identity=_identity(rubric.IMAGE_RUBRIC, text, image, truth),
            messages=messages,
            name="image_verdict",
            schema=rubric.IMAGE_SCHEMA,
            keys=("rationale", *rubric.IMAGE_SCORED),
            spelt=rubric.IMAGE_SCORED,
            check=check_image_reply,
        )
        said = await _ask(self._chat, question)
        text_required = not said.pop("text_accuracy_na")
        diagnostics = _diagnostics("image", said.pop("diagnostics"))
        return ImageVerdict(**said, text_required=text_required, diagnostics=diagnostics)


class ChatProgramJudge:
    """protocols.ProgramJudge by a model that sees request and program, and the ground truth where `truth` is given."""

    def __init__(self, chat: JsonChat, truth: Callable[[Request], np.ndarray] | None = None) -> None:
        self._chat = chat
        self._truth = truth

    async def judge(self, request: Request, program: Program) -> ProgramVerdict:
        """Raises JudgeError."""
        text = rubric.program_text(request, program)
        pictures = [self._truth(request)] if self._truth else []

        def messages() -> list[dict[str, Any]]:
            shown = [part for picture in pictures for part in (_text(rubric.TRUTH_SHOWN), _picture(picture))]
            return _conversation(rubric.PROGRAM_RUBRIC, [_text(text), *shown, _text("Grade the program. JSON only.")])

        question = Question(
            identity=_identity(rubric.PROGRAM_RUBRIC, text, *pictures),
            messages=messages,
            name="program_verdict",
            schema=rubric.PROGRAM_SCHEMA,
            keys=("rationale", *rubric.PROGRAM_SCORED),
            spelt=rubric.PROGRAM_SCORED,
            check=check_program_reply,
        )
        said = await _ask(self._chat, question)
        return ProgramVerdict(said["score"], _diagnostics("program", said["diagnostics"]), said["rationale"])


async def _ask(chat: JsonChat, question: Question) -> dict[str, Any]:
    try:
        return await chat.ask(question)
    except NoAnswer as error:
        raise JudgeError(str(error), error.kind) from None


# --- what is asked ----------------------------------------------------------------------------------------------------


def _identity(system: str, text: str, *pictures: np.ndarray) -> dict[str, Any]:
    told = f"{rubric.VERSION}/{hashlib.sha256(system.encode()).hexdigest()[:16]}"
    return {"rubric": told, "text": text, "pictures": [image_hash(p) for p in pictures]}


def _conversation(system: str, parts: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    if not any(part["type"] == "image_url" for part in parts):  # a plain string, for servers of text models
        return [_message("system", system), _message("user", "\n\n".join(part["text"] for part in parts))]
    return [_message("system", system), _message("user", list(parts))]


def _message(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _picture(pixels: np.ndarray) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": judged_url(pixels)}}


# --- what is answered -------------------------------------------------------------------------------------------------


def check_image_reply(values: Mapping[str, Any], final: bool = True) -> dict[str, Any]:
    """The image judge's object with its scores on the scale. Raises ReplyError.

    Where no text is required, text_accuracy is 0.5 by the rubric: null says the same, another score contradicts it.
    """
    scored = ("faithfulness", "visual_correctness", "aesthetics")
    out: dict[str, Any] = {key: number_on(IMAGE_SCORES, values, key) for key in scored}
    out["text_accuracy_na"] = boolean(values, "text_accuracy_na")
    if out["text_accuracy_na"] and values.get("text_accuracy", "missing") is None:
        out["text_accuracy"] = 0.5
    else:
        out["text_accuracy"] = number_on(IMAGE_SCORES, values, "text_accuracy")
    if out["text_accuracy_na"] and out["text_accuracy"] != 0.5:
        raise ReplyError("text_accuracy_na is true, so text_accuracy must be 0.5; or text is required and it is false")
    return out | _explained(values)


def check_program_reply(values: Mapping[str, Any], final: bool = True) -> dict[str, Any]:
    """The program judge's object with its score on the scale. Raises ReplyError."""
    return {"score": number_on(PROGRAM_SCORES, values, "score"), **_explained(values)}


def _explained(values: Mapping[str, Any]) -> dict[str, Any]:
    """Rationale, which must be there, and of the diagnostics those that can be read: no reward depends on them."""
    rows, skills = values.get("diagnostics"), set()
    kept = []
    for row in rows if isinstance(rows, list) else []:
        skill, verdict, evidence = (
            (str(row.get(k) or "") for k in ("skill", "verdict", "evidence")) if isinstance(row, dict) else ("", "", "")
        )
        verdict = verdict.strip().lower().replace("_", " ")
        if skill in SKILLS and skill not in skills and verdict in rubric.VERDICTS and evidence.strip():
            skills.add(skill)
            kept.append({"skill": skill, "verdict": verdict, "evidence": one_line(evidence, MAX_EVIDENCE)})
    return {"rationale": one_line(string(values, "rationale"), MAX_RATIONALE), "diagnostics": kept}


def _diagnostics(judge: str, rows: Sequence[Mapping[str, str]]) -> tuple[Diagnostic, ...]:
    return tuple(Diagnostic(judge, **row) for row in rows)
