"""IMG_### ids: unique in a trajectory, stable for a repeated image."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from genevolve_fast.protocols import FoundImage
from genevolve_fast.trajectory import Reference, image_hash


@dataclass(frozen=True)
class SeenImage:
    img_id: str
    found: FoundImage
    sha256: str  # of the pixels, empty when the tool returned none


class ImageIds:
    """The images one rollout has retrieved, by id."""

    def __init__(self) -> None:
        self._by_key: dict[str, SeenImage] = {}
        self._by_id: dict[str, SeenImage] = {}

    def register(self, found: FoundImage) -> SeenImage:
        """The id of an image: the one it already has, or the next. Equal pixels are the same image."""
        sha = image_hash(found.pixels) if found.pixels is not None else ""
        key = sha or found.local_path or found.url or f"title:{found.title}"
        if key not in self._by_key:
            seen = SeenImage(f"IMG_{len(self._by_key) + 1:03d}", found, sha)
            self._by_key[key] = self._by_id[seen.img_id] = seen
        return self._by_key[key]

    def shown(self) -> tuple[SeenImage, ...]:
        """Every image, in the order of its id."""
        return tuple(self._by_id.values())

    def pixels(self, references: Iterable[Reference]) -> dict[str, np.ndarray]:
        """Pixels by hash of the images that `references` name and a tool returned."""
        found = {r.sha256: self._by_id[r.img_id].found.pixels for r in references}
        return {sha: pixels for sha, pixels in found.items() if pixels is not None}

    def reference(self, img_id: str, note: str) -> Reference | None:
        """The reference an answer names, or None for an id never shown."""
        seen = self._by_id.get(img_id)
        if seen is None:
            return None
        f = seen.found
        return Reference(img_id, note, f.local_path, f.url, f.title, f.page_url, seen.sha256)
