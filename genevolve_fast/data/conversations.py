"""The released SFT format (`messages`, `images`) to token sequences, with the turn boundaries of the live session."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from genevolve_fast.data.published import IMAGE_PLACEHOLDER, LocalSet, check_conversation, open_set
from genevolve_fast.data.rows import BadRow, BadRows, DataError, read_picture
from genevolve_fast.protocols import Codec


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


class ImageFiles:
    """uint8 [h, w, 3] pixels by path, read once."""

    def __init__(self) -> None:
        self._pixels: dict[Path, np.ndarray] = {}

    def __call__(self, path: Path) -> np.ndarray:
        if path not in self._pixels:
            self._pixels[path] = read_picture(path)
        return self._pixels[path]


def load_conversations(
    path: Path, codec: Codec, pixels: ImageFiles, cutoff: int, bad: BadRows | None = None
) -> tuple[list[Conversation], int]:
    """(conversations of at most `cutoff` tokens, number dropped) of a file, a published folder or a hub id.

    Image paths are relative to the file's folder. A published row lists its pictures and may place none of them: its
    observations are text, the pictures are what references point at, and none is fed to the policy. A row that places
    some must place all. `bad` says what becomes of bad rows (none: the first raises).
    """
    bad = bad or BadRows(strict=True)
    source = open_set(str(path), "sft") if not path.is_file() else LocalSet(path, "sft")
    kept, dropped = [], 0
    for number, row in source.rows():
        try:
            if isinstance(row, BadRow):
                raise row
            files, (ids, mask) = _encoded(row, source, number, codec, pixels)
        except BadRow as error:
            bad.add(error)
            continue
        if len(ids) > cutoff:
            dropped += 1
            continue
        kept.append(Conversation(ids, mask, files, tuple(codec.image_grid(pixels(f)) for f in files)))
    if not kept:
        raise DataError(f"{path} holds no sample of at most {cutoff} tokens")
    return kept, dropped


def _encoded(row: Mapping[str, Any], source, number: int, codec: Codec, pixels: ImageFiles):
    """(files of the pictures that are fed, (ids, loss_mask)). Raises BadRow."""
    messages, names = check_conversation(row, source.where, number)
    try:
        placed = sum(m["content"].count(IMAGE_PLACEHOLDER) for m in messages if m["role"] != "assistant")
        files = tuple(source.file(name) for name in names) if placed else ()
        return files, encode_conversation(messages, [pixels(file) for file in files], codec)
    except BadRow:
        raise
    except DataError as error:
        raise BadRow(source.where, number, "images", str(error)) from None
