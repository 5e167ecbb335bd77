"""A prompt embedding that needs no model: hashed character n-grams."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np


class HashedNgramEmbedder:
    """Character 3- to 5-grams counted in hashed bins with hashed signs (Weinberger et al. 2009), unit length.

    The same in every process. Texts without letters give the zero vector, which is similar to nothing.
    """

    def __init__(self, dimension: int = 512) -> None:
        self.dimension = dimension
        self.name = f"hashed n-grams, {dimension} bins"

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [len(texts), dimension]."""
        out = np.zeros((len(texts), self.dimension), dtype=np.float32)
        for row, text in zip(out, texts, strict=True):
            padded = f" {' '.join(text.lower().split())} "
            for n in (3, 4, 5):
                for i in range(len(padded) - n + 1):
                    bin_, sign = _bin(padded[i : i + n], self.dimension)
                    row[bin_] += sign
        norms = np.linalg.norm(out, axis=1, keepdims=True)
        return out / np.where(norms > 0, norms, 1)


@lru_cache(maxsize=65536)
def _bin(gram: str, dimension: int) -> tuple[int, int]:
    value = int.from_bytes(hashlib.blake2b(gram.encode(), digest_size=8).digest(), "big")
    return (value >> 1) % dimension, 1 if value & 1 else -1
