"""The sandbox's offline web: text search, image search and short skill guidance, behind the Tool protocol."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from genevolve_fast.protocols import FoundImage, Observation, ToolError

MAX_TEXT_RESULTS = 2
MAX_IMAGE_RESULTS = 3

SKILL_GUIDANCE = {
    "spatial_layout": "Name a place of the frame for each object. Never place one object beside another.",
    "aesthetic_drawing": "Name light and mood in one sentence. Change no object, colour or place.",
    "text_rendering": "Write one sentence for each text, each with its own place. Quote the letters exactly.",
    "creative_drawing": "Name the style in one sentence. Keep every object, colour and place of the request.",
    "anatomy_body_coherence": "Describe each figure from head to feet in its own sentence.",
    "attribute_binding": "Write one sentence for each object with its own colour. Never join two objects.",
    "physical_material_consistency": "Say what each object rests on. Keep light and shadow on one side.",
    "quantity_counting": "Write one sentence for each single object, each with its own place. Never write a number.",
}


@dataclass(frozen=True)
class Document:
    title: str
    text: str


@dataclass(frozen=True)
class Picture:
    title: str
    pixels: np.ndarray


class Index:
    """BM25 over short texts (bm25s); ties keep the order in which the texts were given."""

    def __init__(self, texts: Sequence[str]) -> None:
        import bm25s

        self._size = len(texts)
        self._index = bm25s.BM25()
        self._index.index([_words(t) for t in texts], show_progress=False)

    def best(self, query: str, k: int) -> list[int]:
        """At most k indices with a positive score, best first."""
        vocabulary = self._index.vocab_dict
        words = [w for w in _words(query) if w in vocabulary]
        if not words:
            return []
        scores = self._index.get_scores(words)
        order = np.argsort(-scores, kind="stable")[:k]
        return [int(i) for i in order if scores[i] > 0]


def _words(text: str) -> list[str]:
    bare = ("".join(c for c in word if c.isalnum()) for word in text.lower().split())
    return [word for word in bare if word]  # free-standing punctuation leaves nothing, and bm25s refuses ""


def _text_argument(arguments: Mapping[str, Any], name: str) -> str:
    value = arguments.get(name)
    if not isinstance(value, str) or not value.strip():
        raise ToolError(f"`{name}` must be a non-empty string", kind="bad_arguments")
    return value.strip()


class SandboxSearch:
    name = "search"
    description = "Text search. Supply an array of queries."
    parameters = {
        "type": "object",
        "properties": {"queries": {"type": "array", "items": {"type": "string"}}, "top_k": {"type": "integer"}},
        "required": ["queries"],
    }

    def __init__(self, documents: Sequence[Document]) -> None:
        self._documents = documents
        self._index = Index([f"{d.title} {d.text}" for d in documents])

    async def __call__(self, arguments: Mapping[str, Any]) -> Observation:
        """Result blocks in the released runtime's format. Raises ToolError for arguments of the wrong form."""
        queries = arguments.get("queries")
        queries = [queries] if isinstance(queries, str) else queries
        if not isinstance(queries, list) or not queries or not all(isinstance(q, str) and q.strip() for q in queries):
            raise ToolError("`queries` must be a non-empty array of strings", kind="bad_arguments")
        return Observation("\n".join(self._block(q.strip()) for q in queries[:4]))

    def _block(self, query: str) -> str:
        lines = [f"--- search result for [{query}] ---"]
        for rank, i in enumerate(self._index.best(query, MAX_TEXT_RESULTS), 1):
            lines += [f"{rank}. title: {self._documents[i].title}", f"  snippet: {self._documents[i].text}"]
        return "\n".join([*lines, "--- end of search result ---"])


class SandboxImageSearch:
    name = "image_search"
    description = "Text-to-image search. Returns pictures with titles and ids."
    parameters = {
        "type": "object",
        "properties": {"query": {"type": "string"}, "top_k": {"type": "integer"}},
        "required": ["query"],
    }

    def __init__(self, pictures: Sequence[Picture], seed: int) -> None:
        self._pictures = pictures
        self._index = Index([p.title for p in pictures])
        self._seed = seed

    async def __call__(self, arguments: Mapping[str, Any]) -> Observation:
        """At most three pictures in an order that tells nothing. Raises ToolError for a missing query."""
        query = _text_argument(arguments, "query")
        found = self._index.best(query, MAX_IMAGE_RESULTS)
        shuffled = sorted(found, key=lambda i: hashlib.blake2b(f"{self._seed}/{query}/{i}".encode()).digest())
        return Observation(
            images=tuple(FoundImage(self._pictures[i].title, self._pictures[i].pixels) for i in shuffled)
        )


class SandboxKnowledge:
    name = "query_knowledge"
    description = "Guidance for one generation skill."
    parameters = {
        "type": "object",
        "properties": {"skill_name": {"type": "string", "enum": list(SKILL_GUIDANCE)}},
        "required": ["skill_name"],
    }

    async def __call__(self, arguments: Mapping[str, Any]) -> Observation:
        """The skill's guidance. Raises ToolError for an unknown skill."""
        skill = _text_argument(arguments, "skill_name")
        if skill not in SKILL_GUIDANCE:
            raise ToolError(
                f"unknown skill {skill[:40]!r}; the skills are {', '.join(SKILL_GUIDANCE)}", kind="bad_arguments"
            )
        return Observation(f"{skill}: {SKILL_GUIDANCE[skill]}")
