"""The released SFT format (`messages`, `images`) to token sequences, with the turn boundaries of the live session."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from genevolve_fast.protocols import Codec

IMAGE_PLACEHOLDER = "<image>"


class DataError(ValueError):
    """A row of the data cannot be used; the message names file, line and reason."""


@dataclass(frozen=True)
class Conversation:
    """ids [T] int64, loss_mask [T] bool (assistant replies and the token that ends them), image paths in order."""

    ids: np.ndarray
    loss_mask: np.ndarray
    images: tuple[Path, ...]
    grids: tuple[tuple[int, int, int], ...]


def encode_conversation(
    messages: Sequence[Mapping[str, str]], images: Sequence[np.ndarray], codec: Codec
) -> tuple[np.ndarray, np.ndarray]:
    """(ids, loss_mask) of a conversation, tokenised piece by piece exactly as a live session appends its turns."""
    ids: list[int] = []
    mask: list[bool] = []

    def add(text: str, loss: bool = False) -> None:
        piece = codec.encode(text)
        ids.extend(piece)
        mask.extend([loss] * len(piece))

    remaining = iter(images)
    template = ""
    for message in messages:
        role, content = message["role"], message["content"]
        if role == "assistant":
            add(f"{template}<|im_start|>assistant\n")
            add(f"{content}<|im_end|>", loss=True)
            template = "\n"
            continue
        parts = content.split(IMAGE_PLACEHOLDER)
        text = f"{template}<|im_start|>{role}\n{parts[0]}"
        for part in parts[1:]:
            pixels = next(remaining, None)
            if pixels is None:
                raise DataError(f"{content.count(IMAGE_PLACEHOLDER)} image placeholders but too few images")
            run = "<|image_pad|>" * codec.image_tokens(codec.image_grid(pixels))
            text += f"<|vision_start|>{run}<|vision_end|>{part}"
        add(f"{text}<|im_end|>")
        template = "\n"
    if next(remaining, None) is not None:
        raise DataError("more images than placeholders")
    return np.array(ids, dtype=np.int64), np.array(mask, dtype=bool)


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a JSONL (or JSON list) file. Raises DataError naming the line."""
    text = path.read_text(encoding="utf-8")
    if text.lstrip().startswith("["):
        yield from json.loads(text)
        return
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{path}:{number} is not JSON: {error}") from error


class ImageFiles:
    """uint8 [h, w, 3] pixels by path, read once."""

    def __init__(self) -> None:
        self._pixels: dict[Path, np.ndarray] = {}

    def __call__(self, path: Path) -> np.ndarray:
        if path not in self._pixels:
            from PIL import Image, UnidentifiedImageError

            try:
                with Image.open(path) as picture:
                    self._pixels[path] = np.asarray(picture.convert("RGB"))
            except (OSError, UnidentifiedImageError) as error:
                raise DataError(f"cannot read image {path}: {error}") from error
        return self._pixels[path]


def load_conversations(path: Path, codec: Codec, pixels: ImageFiles, cutoff: int) -> tuple[list[Conversation], int]:
    """(conversations of at most `cutoff` tokens, number dropped). Image paths are relative to the file's folder."""
    kept, dropped = [], 0
    for number, row in enumerate(read_jsonl(path), 1):
        try:
            files = tuple(path.parent / name for name in row.get("images") or ())
            images = [pixels(file) for file in files]
            ids, mask = encode_conversation(row["messages"], images, codec)
        except (DataError, KeyError, TypeError) as error:
            raise DataError(f"{path}, sample {number}: {error}") from error
        if len(ids) > cutoff:
            dropped += 1
            continue
        kept.append(Conversation(ids, mask, files, tuple(codec.image_grid(p) for p in images)))
    if not kept:
        raise DataError(f"{path} holds no sample of at most {cutoff} tokens")
    return kept, dropped
