"""R = 0.5 · KScore + 0.5 · program sufficiency."""

from __future__ import annotations

from genevolve_fast.protocols import ImageVerdict, JudgeError, ProgramVerdict
from genevolve_fast.trajectory import Judged

WEIGHTS = {"faithfulness": 0.1, "visual_correctness": 0.4, "text_accuracy": 0.4, "aesthetics": 0.1}
IMAGE_WEIGHT = 0.5
IMAGE_SCORES = (0.0, 0.5, 1.0)
PROGRAM_SCORES = (0.0, 0.25, 0.5, 0.75, 1.0)


def kscore(verdict: ImageVerdict) -> float:
    """Weighted image score in [0, 1]; where no text is required, text_accuracy counts as 0.5."""
    scores = {name: getattr(verdict, name) for name in WEIGHTS}
    for name, value in scores.items():
        if value not in IMAGE_SCORES:
            raise JudgeError(f"{name} must be one of {IMAGE_SCORES}, the judge said {value}", "bad_response")
    if not verdict.text_required:
        scores["text_accuracy"] = 0.5
    return sum(WEIGHTS[name] * value for name, value in scores.items())


def judged(image: ImageVerdict, program: ProgramVerdict) -> Judged:
    """Both verdicts as one outcome. Raises JudgeError for a score off its scale."""
    if program.score not in PROGRAM_SCORES:
        message = f"the program score must be one of {PROGRAM_SCORES}, the judge said {program.score}"
        raise JudgeError(message, "bad_response")
    score = kscore(image)
    return Judged(
        reward=IMAGE_WEIGHT * score + (1 - IMAGE_WEIGHT) * program.score,
        kscore=score,
        program=program.score,
        faithfulness=image.faithfulness,
        visual_correctness=image.visual_correctness,
        text_accuracy=image.text_accuracy if image.text_required else 0.5,
        aesthetics=image.aesthetics,
        text_required=image.text_required,
    )


def worthless() -> Judged:
    """The outcome of a rollout that gave no valid program: the policy's own fault, so a true zero."""
    return Judged(reward=0.0, kscore=0.0, program=0.0, text_accuracy=0.0)
