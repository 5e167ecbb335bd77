"""How an experience is shown to the teacher: a block that follows the request's last word."""

from __future__ import annotations

from genevolve_fast.protocols import Experience


def render(experience: Experience) -> str:
    """The block, one line a slot. It begins with its own tag, so the request's tokens before it stay what they were."""
    lines = "".join(f"- {text}\n" for text in experience.slots().values())
    return f"<experience>\n{lines}</experience>"
