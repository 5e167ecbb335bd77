"""From a finished rollout to its typed outcome."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import numpy as np

from genevolve_fast.protocols import ImageJudge, JudgeError, ProgramJudge, Renderer, RenderError
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
    timeout_s: float = 600.0,
) -> tuple[Trajectory, np.ndarray | None]:
    """(the trajectory with outcome and diagnostics, its picture or None). Never raises for renderer or judge.

    No program, or one that breaks a rule, is worth 0; a renderer or judge that fails or is late gives Failed.
    """
    if isinstance(trajectory.outcome, Failed):
        return trajectory, None
    if trajectory.program is None or (trajectory.error or "").startswith(INVALID_PROGRAM):
        return trajectory.replace(outcome=worthless()), None
    try:
        picture = await asyncio.wait_for(_render(renderer, trajectory.program, images, seed), timeout_s)
    except asyncio.TimeoutError:
        return _failed(trajectory, "render", f"no picture within {timeout_s:g} s"), None
    except RenderError as error:
        return _failed(trajectory, "render", str(error)), None
    try:
        verdicts = asyncio.gather(
            image_judge.judge(request, picture, truth), program_judge.judge(request, trajectory.program)
        )
        image, program = await asyncio.wait_for(verdicts, timeout_s)
        outcome = judged(image, program)
    except asyncio.TimeoutError:
        return _failed(trajectory, "judge", f"no verdict within {timeout_s:g} s"), picture
    except JudgeError as error:
        return _failed(trajectory, "judge", str(error)), picture
    return trajectory.replace(outcome=outcome, diagnostics=image.diagnostics + program.diagnostics), picture


async def _render(renderer: Renderer, program: Program, images: Mapping[str, np.ndarray], seed: int) -> np.ndarray:
    missing = [r.img_id for r in program.reference_images if r.sha256 not in images]
    if missing:
        raise RenderError(f"the pixels of {', '.join(missing)} are missing")
    return await renderer.render(program, [images[r.sha256] for r in program.reference_images], seed)


def _failed(trajectory: Trajectory, stage: str, reason: str) -> Trajectory:
    return trajectory.replace(outcome=Failed(stage, reason))
