"""The sandbox's comparer of processes: which stage first set the worse one apart; rules for all other rollouts."""

from __future__ import annotations

from dataclasses import replace

from genevolve_fast.experience.leaks import Secrets
from genevolve_fast.process.stagewise import first_difference, stage_experience
from genevolve_fast.protocols import Experience
from genevolve_fast.sandbox.comparer import RuleComparer
from genevolve_fast.trajectory import Request, Trajectory


class StageComparer:
    """protocols.Summarizer: processes by their stages, other rollouts by `RuleComparer`."""

    def __init__(self) -> None:
        self._rules = RuleComparer()

    async def compare(self, request: Request, best: Trajectory, worst: Trajectory) -> Experience | None:
        if not (best.stages and worst.stages):
            return await self._rules.compare(request, best, worst)
        experience = stage_experience(first_difference(best, worst))
        if experience is None:
            return None
        secrets = Secrets(request, [t.program for t in (best, worst) if t.program], ())
        told = {slot: text for slot, text in experience.slots().items() if secrets.leak(text)}
        kept = replace(experience, **dict.fromkeys(told, ""))
        return kept if kept.slots() else None
