"""Hostile replies of judges through the real endpoint: `python -m benchmarks.judge_faults`.

Every reply of tests/hostile_judge_replies.py is what a judge's server on loopback answers, for as long as it is asked.
Counted are rollouts that got a reward though the judge gave no verdict, or another one than it gave, and crashes.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from genevolve_fast.evaluate.scoreboard import DEFAULT_FILE, record
from genevolve_fast.incidents import Incidents
from genevolve_fast.protocols import ImageJudge, ImageVerdict, ProgramJudge, ProgramVerdict
from genevolve_fast.reward.config import JudgeConfig, open_judges
from genevolve_fast.reward.kscore import judged
from genevolve_fast.reward.scoring import score
from genevolve_fast.trajectory import Failed, Judged, Program, Request, Trajectory, Turn

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from hostile_judge_replies import IMAGE, PROGRAM, Reply, replies  # noqa: E402
from loopback.judge import LoopbackJudge  # noqa: E402

COMMAND = "python -m benchmarks.judge_faults"
RIGHT = judged(
    ImageVerdict(
        **{k: IMAGE[k] for k in ("faithfulness", "visual_correctness", "text_accuracy", "aesthetics")},
        text_required=True,
    ),
    ProgramVerdict(PROGRAM["score"]),
)


class _Fixed:
    """The judge that is not under test, and the renderer."""

    name, min_references, max_references = "fixed", 0, 2

    def __init__(self, answer: object) -> None:
        self._answer = answer

    async def judge(self, *_: object):
        return self._answer

    async def render(self, *_: object):
        return self._answer


@dataclass(frozen=True)
class Outcomes:
    """wrong: what should not have happened, by reply; read: replies that gave their verdict; kinds of failures."""

    wrong: dict[str, str]
    read: int
    kinds: Counter[str]


def run(chosen: Sequence[Reply]) -> Outcomes:
    with LoopbackJudge(train=1) as server:
        return asyncio.run(_run(chosen, server))


async def _run(chosen: Sequence[Reply], server: LoopbackJudge) -> Outcomes:
    config = JudgeConfig(kind="chat", model="hostile", base_url=server.base_url, attempts=1, patience_s=0, reasks=1)
    judges = open_judges(config, Incidents())
    wrong, read, kinds = {}, 0, Counter()
    for reply in chosen:
        body = base64.b64encode(reply.body or b"").decode()
        server.fault(f"raw:{body}" if reply.body is not None else f"text:{reply.text}")
        try:
            outcome = await _scored(*judges, reply.of)
        except Exception as error:  # a crash is what is looked for
            wrong[f"{reply.of}: {reply.name}"] = f"raised {type(error).__name__}: {error}"
            continue
        if isinstance(outcome, Failed):
            kinds[f"{outcome.stage}/{outcome.kind}"] += 1
            if reply.read:
                wrong[f"{reply.of}: {reply.name}"] = f"not read: {outcome.reason}"
        elif outcome != RIGHT or not (reply.read or reply.may_read):
            wrong[f"{reply.of}: {reply.name}"] = f"counted as {outcome}"
        else:
            read += 1
    return Outcomes(wrong, read, kinds)


async def _scored(image: ImageJudge, program: ProgramJudge, of: str) -> Judged | Failed:
    verdict = ImageVerdict(RIGHT.faithfulness, RIGHT.visual_correctness, RIGHT.text_accuracy, RIGHT.aesthetics, True)
    picture = np.zeros((96, 96, 3), np.uint8)
    scored, _ = await score(
        Request("q", "A star and the word OPEN."),
        _rollout(),
        renderer=_Fixed(picture),
        image_judge=image if of == "image" else _Fixed(verdict),
        program_judge=program if of == "program" else _Fixed(ProgramVerdict(PROGRAM["score"])),
        truth=picture,
        images={},
        seed=0,
    )
    return scored.outcome


def _rollout() -> Trajectory:
    mask = np.array([False, False, True])
    return Trajectory(
        id="r",
        request_id="q",
        group_id="g",
        ids=np.arange(3),
        loss_mask=mask,
        rollout_logps=np.zeros(3, np.float32),
        request_stop=1,
        turns=(Turn("user", 0, 2), Turn("assistant", 2, 3)),
        program=Program("Background white."),
        termination="answer",
    )


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", default="", help="replies whose name contains this; nothing is recorded")
    p.add_argument("--file", type=Path, default=DEFAULT_FILE, help="scoreboard (default: %(default)s)")
    args = p.parse_args()
    chosen = [reply for reply in replies() if args.only in reply.name]
    started = time.monotonic()
    out = run(chosen)
    print("\n".join(f"{name}: {what}" for name, what in out.wrong.items()))
    failed = ", ".join(f"{kind} {n}" for kind, n in sorted(out.kinds.items()))
    seconds = time.monotonic() - started
    print(f"{len(chosen)} replies: {out.read} read, failed: {failed}; {len(out.wrong)} wrong, {seconds:.0f} s")
    if not args.only:
        record("judge/unjudged_counted_as_zero", len(out.wrong), n=len(chosen), command=COMMAND, file=args.file)


if __name__ == "__main__":
    main()
