"""How an experience is shown to the teacher: a block that follows the request's last word."""

from __future__ import annotations

from collections.abc import Sequence

from genevolve_fast.net.harmless import harmless
from genevolve_fast.protocols import Experience


def render(experience: Experience, markers: Sequence[str] = ()) -> str:
    """The block, one line a slot. It begins with its own tag, so the request's tokens before it stay what they were.

    `markers` are the texts of the codec's control ids (Codec.markers): a model wrote the slots.
    """
    lines = "".join(f"- {harmless(text, markers)}\n" for text in experience.slots().values())
    return f"<experience>\n{lines}</experience>"
