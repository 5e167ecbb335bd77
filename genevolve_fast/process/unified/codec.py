"""Text and pictures to tokens for a unified model: a picture is a grid of latent patches, a placeholder each."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np

from genevolve_fast.files import write_text
from genevolve_fast.policy.codec import TransformersCodec
from genevolve_fast.policy.positions import ImageMismatchError

_SETTINGS = "latents.json"


class LatentCodec(TransformersCodec):
    """`size`: height and width of all pictures in pixels; `patch`: of a latent patch. Nothing is merged or resized."""

    def __init__(self, tokenizer, size: int, patch: int) -> None:
        super().__init__(tokenizer, None)
        self.size, self.patch = size, patch
        self.image_pad_id = tokenizer.convert_tokens_to_ids("<|image_pad|>")
        self.opens_image_id, self.closes_image_id = (
            tokenizer.convert_tokens_to_ids(f"<|vision_{t}|>") for t in ("start", "end")
        )

    @classmethod
    def from_pretrained(cls, path: str | Path) -> LatentCodec:
        from transformers import AutoTokenizer

        settings = json.loads((Path(path) / _SETTINGS).read_text(encoding="utf-8"))
        return cls(AutoTokenizer.from_pretrained(path), settings["size"], settings["patch"])

    def save_pretrained(self, path: str | Path) -> None:
        super().save_pretrained(path)
        write_text(Path(path) / _SETTINGS, json.dumps({"size": self.size, "patch": self.patch}))

    def image_grid(self, pixels: np.ndarray) -> tuple[int, int, int]:
        """Raises ImageMismatchError for another size."""
        if pixels.shape[:2] != (self.size, self.size):
            raise ImageMismatchError(f"pictures of this model are {self.size} x {self.size}, not {pixels.shape[:2]}")
        return 1, self.size // self.patch, self.size // self.patch

    def fingerprint(self) -> str:
        settings = f"latents {self.size} {self.patch}"
        return hashlib.sha256(super().fingerprint().encode() + settings.encode()).hexdigest()
