"""Text from outside, made unable to act: it is data, whatever it says."""

from __future__ import annotations

_MARKS = ("<|im_start|>", "<|im_end|>", "<|image_pad|>", "<|vision_start|>", "<|vision_end|>", "<|endoftext|>")


def harmless(text: str) -> str:
    """Text from outside with chat and image markers broken up, so that a web page cannot open a turn of its own."""
    for mark in _MARKS:
        text = text.replace(mark, mark.replace("|", "¦"))
    return text
