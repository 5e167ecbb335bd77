"""Pictures kept by what they were drawn from: the same program, references and seed are drawn once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from genevolve_fast.net.cache import AnswerCache
from genevolve_fast.net.pictures import decode_image, png_bytes
from genevolve_fast.net.web import FetchError
from genevolve_fast.protocols import Renderer, RenderError
from genevolve_fast.render.endpoints import MAX_SIDE, SOURCE, off_loop
from genevolve_fast.trajectory import Program, image_hash


class CachedRenderer:
    """A renderer that draws nothing twice (protocols.Renderer).

    `identity` is everything about the renderer that changes its pictures. Kept are pictures, as PNG, bit for bit;
    failures are not.
    """

    def __init__(self, renderer: Renderer, identity: Mapping[str, Any], cache: AnswerCache) -> None:
        self._renderer, self._identity, self._cache = renderer, dict(identity), cache
        self.name = renderer.name
        self.min_references, self.max_references = renderer.min_references, renderer.max_references

    async def render(self, program: Program, references: Sequence[np.ndarray], seed: int) -> np.ndarray:
        """uint8 [height, width, 3]. Raises RenderError; when replaying `not_recorded` for what was never drawn."""
        asked = {
            "renderer": self._identity,
            "gen_prompt": program.gen_prompt,
            "references": await off_loop(lambda: [image_hash(pixels) for pixels in references]),
            "seed": seed,
        }

        async def draw() -> bytes:
            try:
                pixels = await self._renderer.render(program, references, seed)
            except RenderError as error:
                raise FetchError(str(error), error.kind) from error
            return await off_loop(png_bytes, pixels)

        try:
            data = await self._cache.get(SOURCE, asked, draw)
        except FetchError as error:
            raise RenderError(str(error), error.kind) from None
        try:
            return (await off_loop(decode_image, data, MAX_SIDE**2, MAX_SIDE)).pixels
        except FetchError as error:  # its hash is right: something else wrote it
            raise RenderError(f"the cache holds no picture: {error}", "bad_response") from None
