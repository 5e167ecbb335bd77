"""The sandbox's comparer: names the decisions that made the best rollout better than the worst."""

from __future__ import annotations

from genevolve_fast.protocols import EXPERIENCE_SLOTS, Experience
from genevolve_fast.sandbox.habits import FITTING_SKILL, observed
from genevolve_fast.trajectory import Request, Trajectory

PHRASES: dict[str, tuple[str, str]] = {  # habit -> (slot, sentence)
    "search_fact": ("search_strategy", "Search the fact before the answer."),
    "right_reference": ("reference_selection", "Pick the picture titled emblem of the place."),
    "fitting_skill": ("knowledge_activation", "Call {skill}."),
    "ordinal_binding": ("prompt_construction", "Bind the emblem to the first reference image."),
    "one_line_per_text": ("prompt_construction", "One sentence for each text."),
    "apply_rule": ("failure_avoidance", "Never skip the rule of the guidance."),
}
_WATCHED_SKILLS = {  # the judges' diagnostics that tell whether a habit was missing in both rollouts
    "search_fact": ("attribute_binding", "text_rendering"),
    "right_reference": ("attribute_binding",),
    "fitting_skill": ("quantity_counting", "spatial_layout", "text_rendering"),
    "ordinal_binding": ("attribute_binding",),
    "one_line_per_text": ("text_rendering",),
    "apply_rule": ("quantity_counting", "spatial_layout", "text_rendering"),
}


def experience_for(habits: list[str], request: Request) -> Experience:
    """The phrases of `habits`, slot by slot; a slot with two joins them."""
    slots: dict[str, list[str]] = {name: [] for name in EXPERIENCE_SLOTS}
    for habit in PHRASES:
        if habit in habits:
            slot, sentence = PHRASES[habit]
            slots[slot].append(sentence.format(skill=FITTING_SKILL.get(request.category, "")))
    return Experience(**{name: " ".join(sentences) for name, sentences in slots.items()})


def habits_in(experience: Experience) -> set[str]:
    """The habits that an experience asks for."""
    text = " ".join(experience.slots().values())
    return {habit for habit, (_, sentence) in PHRASES.items() if sentence.split("{")[0].rstrip() in text}


class RuleComparer:
    """protocols.Summarizer by rules: tool calls, programs and diagnostics, never the ground truth."""

    async def compare(self, request: Request, best: Trajectory, worst: Trajectory) -> Experience | None:
        """A habit is named where the best had it and the worst had not, or where the best failed for want of it."""
        good = observed(request, best.messages, best.program)
        bad = observed(request, worst.messages, worst.program)
        named = [h for h in good if (good[h] and not bad[h]) or (not good[h] and self._missed(best, h))]
        return experience_for(named, request) if named else None

    @staticmethod
    def _missed(trajectory: Trajectory, habit: str) -> bool:
        failed = {d.skill for d in trajectory.diagnostics if d.verdict in ("fail", "partial")}
        return bool(failed & set(_WATCHED_SKILLS[habit]))
