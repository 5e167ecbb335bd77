"""The eight generation skills and the tool that hands them out."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from importlib import resources
from typing import Any

from genevolve_fast.protocols import SKILLS, Observation, ToolError


@lru_cache(maxsize=len(SKILLS))
def guidance(skill: str) -> str:
    """The guidance text of a skill. Raises KeyError for an unknown one."""
    if skill not in SKILLS:
        raise KeyError(skill)
    return (resources.files("genevolve_fast.agent") / "skills" / f"{skill}.md").read_text(encoding="utf-8")


def triggers(skill: str) -> tuple[str, str]:
    """When to call a skill and when not to, as its guidance states it."""
    lines = guidance(skill).splitlines()
    when = next(line for line in lines if line.startswith("**Trigger when**"))
    not_when = next(line for line in lines if line.startswith("**Do not trigger when**"))
    return when.replace("**", ""), not_when.replace("**", "")


class QueryKnowledge:
    """protocols.Tool: the full guidance of one skill."""

    name = "query_knowledge"
    description = "Expert guidance for one generation skill, to be applied in the final prompt."
    parameters = {
        "type": "object",
        "properties": {"skill_name": {"type": "string", "enum": list(SKILLS), "description": "Which skill."}},
        "required": ["skill_name"],
    }

    async def __call__(self, arguments: Mapping[str, Any]) -> Observation:
        skill = arguments.get("skill_name")
        if skill not in SKILLS:
            raise ToolError(f"unknown skill {str(skill)[:40]!r}; the skills are {', '.join(SKILLS)}", "bad_arguments")
        return Observation(guidance(skill))
