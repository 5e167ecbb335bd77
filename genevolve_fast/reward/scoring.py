"""From a finished rollout to its typed outcome."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Mapping

import numpy as np

from genevolve_fast.incidents import Incidents
from genevolve_fast.protocols import (
    ImageJudge,
    ImageVerdict,
    JudgeError,
    ProgramJudge,
    ProgramVerdict,
    Renderer,
    RenderError,
)
from genevolve_fast.reward.kscore import judged, worthless
from genevolve_fast.trajectory import Failed, Program, Request, Trajectory

INVALID_PROGRAM = "invalid program"


async def score(
    request: Request,
    trajectory: Trajectory,
    *,
    renderer: Renderer,
    image_judge: ImageJudge,
    program_judge: ProgramJudge,
    truth: np.ndarray,
    images: Mapping[str, np.ndarray],
    seed: int,
    timeout_s: float | None = None,
    incidents: Incidents | None = None,
) -> tuple[Trajectory, np.ndarray | None]:
    """(the trajectory with outcome and diagnostics, its picture or None). Never raises for renderer or judge.

    No program, or one that breaks a rule, is worth 0; a renderer or judge that fails gives Failed, counted in
    `incidents` as "render/<kind>" or "judge/<kind>". `timeout_s` is for those that do not end their own calls: a judge
    behind a rate limit may rightly wait for longer than it takes.
    """

    def failed(stage: str, kind: str, reason: str) -> Trajectory:
        if incidents is not None:
            incidents.note(stage, kind)
        return trajectory.replace(outcome=Failed(stage, reason, kind))

    if isinstance(trajectory.outcome, Failed):
        return trajectory, None
    if trajectory.program is None or (trajectory.error or "").startswith(INVALID_PROGRAM):
        return trajectory.replace(outcome=worthless()), None
    try:
        picture = await asyncio.wait_for(_render(renderer, trajectory.program, images, seed), timeout_s)
    except asyncio.TimeoutError:
        return failed("render", "timeout", f"no picture within {timeout_s:g} s"), None
    except RenderError as error:
        return failed("render", error.kind, str(error)), None
    try:
        verdicts = _both(image_judge.judge(request, picture, truth), program_judge.judge(request, trajectory.program))
        image, program = await asyncio.wait_for(verdicts, timeout_s)
        outcome = judged(image, program)
    except asyncio.TimeoutError:
        return failed("judge", "timeout", f"no verdict within {timeout_s:g} s"), picture
    except JudgeError as error:
        return failed("judge", error.kind, str(error)), picture
    return trajectory.replace(outcome=outcome, diagnostics=image.diagnostics + program.diagnostics), picture


async def _render(renderer: Renderer, program: Program, images: Mapping[str, np.ndarray], seed: int) -> np.ndarray:
    missing = [r.img_id for r in program.reference_images if r.sha256 not in images]
    if missing:
        raise RenderError(f"the pixels of {', '.join(missing)} are missing")
    return await renderer.render(program, [images[r.sha256] for r in program.reference_images], seed)


async def _both(image: Awaitable[ImageVerdict], program: Awaitable[ProgramVerdict]) -> tuple:
    """Both verdicts, or the first error once both have ended: nothing is left running, a good verdict is kept."""
    verdicts = await asyncio.gather(image, program, return_exceptions=True)
    for verdict in verdicts:
        if isinstance(verdict, BaseException):
            raise verdict
    return tuple(verdicts)
