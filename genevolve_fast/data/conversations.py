"""The released SFT format (`messages`, `images`) to token sequences, with the turn boundaries of the live session."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from genevolve_fast.data.prefetch import default_threads
from genevolve_fast.data.published import IMAGE_PLACEHOLDER, LocalSet, PublishedSet, check_conversation, open_set
from genevolve_fast.data.rows import BadRow, BadRows, DataError, InlinePicture, read_picture
from genevolve_fast.data.sample_index import COUNTS, Counts, open_index
from genevolve_fast.data.tables import Span, open_tables
from genevolve_fast.protocols import Codec

PICTURE_BYTES = 256 << 20  # of decoded pictures that are kept for the next row that shows them


@dataclass(frozen=True)
class Conversation:
    """ids [T] int64, loss_mask [T] bool (assistant replies and the token that ends them), uint8 pixels in order."""

    ids: np.ndarray
    loss_mask: np.ndarray
    images: tuple[np.ndarray, ...]
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
    """uint8 [h, w, 3] pixels by path; those used last are kept, `max_bytes` of them. Threads may share it."""

    def __init__(self, max_bytes: int = PICTURE_BYTES) -> None:
        self.max_bytes = max_bytes
        self._pixels: OrderedDict[Path, np.ndarray] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def __call__(self, path: Path) -> np.ndarray:
        with self._lock:
            if path in self._pixels:
                self._pixels.move_to_end(path)
                return self._pixels[path]
        pixels = read_picture(path)
        with self._lock:
            if path not in self._pixels:
                self._pixels[path] = pixels
                self._bytes += pixels.nbytes
            while self._bytes > self.max_bytes:
                self._bytes -= self._pixels.popitem(last=False)[1].nbytes
        return pixels


class Conversations(Sequence[Conversation]):
    """The conversations of a set that have at most `cutoff` tokens, in its order; each is read when it is asked for.

    `tokens`, `loss_tokens` and `images` [len] int32 are known without reading any. Threads may share it.
    """

    def __init__(self, read: _Rows, counted: np.ndarray, cutoff: int) -> None:
        kept = counted["tokens"] <= cutoff
        self._read = read
        self._rows = counted[kept]
        self.dropped = int(len(kept) - kept.sum())

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def tokens(self) -> np.ndarray:
        return self._rows["tokens"]

    @property
    def loss_tokens(self) -> np.ndarray:
        return self._rows["loss_tokens"]

    @property
    def images(self) -> np.ndarray:
        return self._rows["images"]

    def __getitem__(self, index: int) -> Conversation:
        """Raises DataError where the row is not what it was when it was counted."""
        row = self._rows[index]
        conversation = self._read(int(row["table"]), int(row["number"]), tuple(row[["line", "at", "size"]].tolist()))
        if (found := count(conversation)) != (before := tuple(row[list(COUNTS)].tolist())):
            was, now = (", ".join(f"{n} {name}" for n, name in zip(x, COUNTS, strict=True)) for x in (before, found))
            raise DataError(
                f"{self._read.source.where}, line {row['number']}: {now}, but {was} when it was counted: row or "
                f"pictures have changed; put them back, or delete {self._read.index} and start another run"
            )
        return conversation


def count(conversation: Conversation) -> Counts:
    return len(conversation.ids), int(conversation.loss_mask.sum()), len(conversation.images)


class _Rows:
    """Rows of a set as conversations."""

    def __init__(self, source: PublishedSet, index: Path, codec: Codec, pictures: ImageFiles) -> None:
        self.source, self.index, self.codec, self.pictures = source, index, codec, pictures
        self.tables = open_tables(source, index.parent / "arrow")

    def __call__(self, table: int, number: int, span: Span) -> Conversation:
        """The row at `span` of a table, which messages call line `number`. Raises BadRow."""
        row = self.tables[table].read(span)
        if isinstance(row, BadRow):
            raise row
        messages, pictures = check_conversation(row, self.source.where, number)
        placed = any(IMAGE_PLACEHOLDER in m["content"] for m in messages if m["role"] != "assistant")
        try:
            images = tuple(self._picture(p) for p in pictures) if placed else ()
            ids, mask = encode_conversation(messages, images, self.codec)
        except BadRow:
            raise
        except DataError as error:
            raise BadRow(self.source.where, number, "images", str(error)) from None
        return Conversation(ids, mask, images, tuple(self.codec.image_grid(i) for i in images))

    def _picture(self, picture: str | InlinePicture) -> np.ndarray:
        return picture.pixels() if isinstance(picture, InlinePicture) else self.pictures(self.source.file(picture))


def open_conversations(
    path: Path,
    codec: Codec,
    cutoff: int,
    index: Path,
    *,
    bad: BadRows | None = None,
    threads: int | None = None,
    settled: bool = False,
    pictures: ImageFiles | None = None,
) -> Conversations:
    """The conversations of a file, a published folder or a hub id.

    `index` names a file of what was counted: where each row lies and how long it is. It is made when it is not there or
    is not of this data and codec, which reads everything once. With `settled`, data that changed since then is refused.

    Image paths are relative to the data's folder; a picture may also lie in its row. A published row lists its pictures
    and may place none of them: its observations are text, the pictures are what references point at, and none is fed to
    the policy. A row that places some must place all. `bad` says what becomes of bad rows (none: the first raises).
    """
    bad = bad or BadRows(strict=True)
    source = LocalSet(path, "sft") if path.is_file() else open_set(str(path), "sft")
    read = _Rows(source, index, codec, pictures or ImageFiles())
    counted = open_index(
        index,
        read.tables,
        lambda *row: count(read(*row)),
        codec.fingerprint(),
        bad,
        where=source.where,
        threads=threads or default_threads(),
        settled=settled,
    )
    found = Conversations(read, counted, cutoff)
    if not len(found):
        raise DataError(f"{path} holds no sample of at most {cutoff} tokens")
    return found
