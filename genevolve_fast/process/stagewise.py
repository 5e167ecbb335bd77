"""Where a process went wrong: which cycle and stage first set the worse of two apart, from texts, scores and verdicts.

Nothing here reads or repeats what a picture should show: findings name stages and skills, never their content.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from genevolve_fast.process.trace import Correction, Inspection, Plan, StageError
from genevolve_fast.protocols import EXPERIENCE_SLOTS, Experience
from genevolve_fast.trajectory import StageName, Trajectory

What = Literal[
    "plan against request",
    "draft against plan",
    "inspection missed a fault",
    "refinement made it worse",
    "fault left as it was",
    "stage not in its form",
]
_READ = {"plan": Plan.parse, "inspect": Inspection.parse, "refine": Correction.parse}
_EPSILON = 1e-6

PHRASES: dict[What, tuple[str, str]] = {  # -> (slot, what to do)
    "plan against request": ("prompt_construction", "plan everything that the request asks for, and nothing else."),
    "draft against plan": ("prompt_construction", "plan each thing in a sentence of its own, with its place."),
    "inspection missed a fault": ("failure_avoidance", "look at every part of the draft before you say none."),
    "refinement made it worse": ("failure_avoidance", "refine only what was found and keep the rest word for word."),
    "fault left as it was": ("failure_avoidance", "refine a fault that was found before you go on or end."),
    "stage not in its form": ("failure_avoidance", "write the stage in its form and nothing else."),
}


@dataclass
class CycleView:
    """What one cycle wrote, and what its drafts were worth to the image judge (None: not scored)."""

    cycle: int
    plan: Plan | None = None
    inspection: Inspection | None = None
    correction: Correction | None = None
    draft: float | None = None
    corrected: float | None = None
    mended: bool = False  # a corrected draft was drawn
    unreadable: list[StageName] = field(default_factory=list)

    @property
    def result(self) -> float | None:
        return self.corrected if self.mended else self.draft


@dataclass(frozen=True)
class Finding:
    """A stage that went wrong. `mended`: its own cycle saw to it. `skills`: the judges' names for what suffered."""

    cycle: int
    stage: StageName
    what: What
    skills: tuple[str, ...] = ()
    mended: bool = False


@dataclass(frozen=True)
class Difference:
    """The first thing that the worse process got wrong and the better one did not."""

    finding: Finding
    last: bool  # it was in the worse one's last cycle


def cycles_of(t: Trajectory) -> list[CycleView]:
    """The cycles of a process, in order."""
    views: dict[int, CycleView] = {}
    for stage, text in t.stage_texts():
        view = views.setdefault(stage.cycle, CycleView(stage.cycle))
        try:
            read = _READ[stage.name](text.rpartition("</think>")[2])
        except (StageError, KeyError):
            view.unreadable.append(stage.name)
            continue
        match read:
            case Plan():
                view.plan = read
            case Inspection():
                view.inspection = read
            case Correction():
                view.correction = read
    for stage in t.stages:
        if not stage.drawn:
            continue
        view = views.setdefault(stage.cycle, CycleView(stage.cycle))
        if stage.name == "refine":
            view.corrected, view.mended = stage.score, True
        else:
            view.draft = stage.score
    return [views[n] for n in sorted(views)]


def findings(t: Trajectory) -> tuple[Finding, ...]:
    """Everything that went wrong, in the order in which it happened."""
    out: list[Finding] = []
    cycles = cycles_of(t)
    before: float | None = None
    for view in cycles:
        last = view is cycles[-1]
        out += [
            Finding(view.cycle, stage, "stage not in its form", (), _read(view, stage)) for stage in view.unreadable
        ]
        out += _of_cycle(view, before, _failing(t, "program") if last else (), _unseen(t) if last else ())
        before = view.result if view.result is not None else before
    return tuple(out)


def _of_cycle(view: CycleView, before: float | None, planned: Sequence[str], unseen: Sequence[str]) -> list[Finding]:
    """`planned`: skills that the program judge missed in the end; `unseen`: those that only the picture fails."""
    found = view.inspection
    worse = view.mended and _less(view.corrected, view.draft)
    repaired = view.mended and not worse
    out = []
    lacking = () if worse else tuple(planned)  # what the refinement took away the plan may well have had
    if (found and found.plan) or lacking:
        out.append(Finding(view.cycle, "plan", "plan against request", lacking, repaired and not lacking))
    if found and found.draft:
        out.append(Finding(view.cycle, "sketch", "draft against plan", (), view.mended))
    if found and found.sound and (_less(view.draft, before) or unseen):
        out.append(Finding(view.cycle, "inspect", "inspection missed a fault", tuple(unseen)))
    if worse:
        out.append(Finding(view.cycle, "refine", "refinement made it worse", tuple(planned)))
    if found and not found.sound and not view.mended:
        out.append(Finding(view.cycle, "refine", "fault left as it was"))
    return out


def first_difference(best: Trajectory, worst: Trajectory) -> Difference | None:
    """The first finding of `worst` that was not mended and that `best` has not in the same cycle; else None.

    What both got wrong at one place cannot be what set them apart.
    """
    shared = {(f.cycle, f.what) for f in findings(best) if not f.mended}
    cycles = cycles_of(worst)
    for finding in findings(worst):
        if not finding.mended and (finding.cycle, finding.what) not in shared:
            return Difference(finding, finding.cycle == cycles[-1].cycle)
    return None


def stage_experience(difference: Difference | None) -> Experience | None:
    """The difference as an experience: what to do in that stage, and which skill to watch."""
    if difference is None:
        return None
    finding = difference.finding
    slot, advice = PHRASES[finding.what]
    when = "In the first cycle" if finding.cycle == 0 else "In the last cycle" if difference.last else "In later cycles"
    slots = dict.fromkeys(EXPERIENCE_SLOTS, "")
    slots[slot] = f"{when}, {advice}"
    if finding.skills:
        verb = finding.stage
        slots["knowledge_activation"] = f"Watch {' and '.join(finding.skills)} when you {verb}."
    return Experience(**slots)


def _read(view: CycleView, stage: StageName) -> bool:
    """Whether a later try of the stage could be read."""
    return {"plan": view.plan, "inspect": view.inspection, "refine": view.correction}.get(stage) is not None


def _less(a: float | None, b: float | None) -> bool:
    return a is not None and b is not None and a < b - _EPSILON


def _failing(t: Trajectory, judge: str) -> tuple[str, ...]:
    return tuple(d.skill for d in t.diagnostics if d.judge == judge and d.verdict in ("fail", "partial"))


def _unseen(t: Trajectory) -> tuple[str, ...]:
    """Skills that the picture fails and the program does not: an inspection could have seen it."""
    planned = _failing(t, "program")
    return tuple(skill for skill in _failing(t, "image") if skill not in planned)
