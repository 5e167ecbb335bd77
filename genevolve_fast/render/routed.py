"""Programs with references to one renderer, programs without to another."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from genevolve_fast.protocols import Renderer
from genevolve_fast.trajectory import Program


class RoutedRenderer:
    """Edit models need a picture to edit: what has none is drawn by `text_to_image` (protocols.Renderer)."""

    min_references = 0

    def __init__(self, edit: Renderer, text_to_image: Renderer) -> None:
        if text_to_image.min_references > 0:
            raise ValueError(f"{text_to_image.name} needs references: it cannot draw programs without one")
        self.edit, self.text_to_image = edit, text_to_image
        self.name = f"{edit.name}, {text_to_image.name} without references"
        self.max_references = edit.max_references

    async def render(self, program: Program, references: Sequence[np.ndarray], seed: int) -> np.ndarray:
        """uint8 [height, width, 3]. Raises RenderError."""
        renderer = self.edit if program.reference_images else self.text_to_image
        return await renderer.render(program, references, seed)


class FixedSeed:
    """Every picture with the same seed, whichever is asked for (protocols.Renderer)."""

    def __init__(self, renderer: Renderer, seed: int) -> None:
        self._renderer, self._seed = renderer, seed
        self.name = renderer.name
        self.min_references, self.max_references = renderer.min_references, renderer.max_references

    async def render(self, program: Program, references: Sequence[np.ndarray], seed: int) -> np.ndarray:
        """uint8 [height, width, 3]. Raises RenderError."""
        return await self._renderer.render(program, references, self._seed)
