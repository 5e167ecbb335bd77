"""The memory of experiences: bounded, weighted by reward gap, searched by the request's embedding."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from genevolve_fast.files import write_text
from genevolve_fast.protocols import Embedder, Experience


class OtherEmbedder(ValueError):
    """A memory was written with another embedder than it is read with."""


@dataclass(frozen=True)
class Bundle:
    """One comparison: the request it came from, what it taught, the reward gap and the step."""

    question: str
    experience: Experience
    gap: float
    step: int


class ExperienceMemory:
    """At most `capacity` bundles, oldest first.

    Eviction is FIFO weighted by reward gap: of the oldest tenth the bundle with the smallest gap goes (ties: the
    oldest), so a lesson that made a large difference outlives its neighbours but not for ever.
    """

    def __init__(self, embedder: Embedder, capacity: int = 500, similarity: float = 0.84) -> None:
        self.embedder = embedder
        self.capacity = capacity
        self.similarity = similarity
        self.bundles: list[Bundle] = []
        self._vectors = np.zeros((0, embedder.dimension), dtype=np.float32)

    def __len__(self) -> int:
        return len(self.bundles)

    def copy(self) -> ExperienceMemory:
        """The same bundles; what either takes in later, the other does not."""
        other = ExperienceMemory(self.embedder, self.capacity, self.similarity)
        other.bundles, other._vectors = [*self.bundles], self._vectors
        return other

    def insert(self, question: str, experience: Experience, *, gap: float, step: int) -> None:
        """Add a bundle, evicting one when the memory is full."""
        if len(self.bundles) >= self.capacity:
            oldest = range(max(1, len(self.bundles) // 10))
            out = min(oldest, key=lambda i: (self.bundles[i].gap, i))
            del self.bundles[out]
            self._vectors = np.delete(self._vectors, out, axis=0)
        self.bundles.append(Bundle(question, experience, gap, step))
        self._vectors = np.concatenate([self._vectors, self.embedder.embed([question])])

    def retrieve(self, question: str) -> Experience | None:
        """The experience of the most similar request, if its cosine reaches the threshold; ties go to the newest."""
        if not self.bundles:
            return None
        cosines = np.round(self._vectors @ self.embedder.embed([question])[0], 5)  # equal texts, equal numbers
        best = len(cosines) - 1 - int(np.argmax(cosines[::-1]))
        return self.bundles[best].experience if cosines[best] >= self.similarity else None

    def save(self, path: Path) -> None:
        """Write `path`.json atomically; embeddings are computed again on load."""
        data = {
            "embedder": self.embedder.name,
            "capacity": self.capacity,
            "similarity": self.similarity,
            "bundles": [asdict(b) for b in self.bundles],
        }
        write_text(path.with_suffix(".json"), json.dumps(data, ensure_ascii=False))

    @classmethod
    def load(cls, path: Path, embedder: Embedder, *, reembed: bool = False) -> ExperienceMemory:
        """Read what `save` wrote. Raises OtherEmbedder, unless told to `reembed`."""
        data = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        saved = data.get("embedder", embedder.name)  # older releases did not say
        if saved != embedder.name and not reembed:
            raise OtherEmbedder(
                f"{path.with_suffix('.json')} was written with the embedder {saved!r}, this is {embedder.name!r}: "
                f"similarity {data['similarity']:g} would mean something else"
            )
        memory = cls(embedder, data["capacity"], data["similarity"])
        memory.bundles = [Bundle(**{**b, "experience": Experience(**b["experience"])}) for b in data["bundles"]]
        if memory.bundles:
            memory._vectors = embedder.embed([b.question for b in memory.bundles])
        return memory
