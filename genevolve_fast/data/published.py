"""GenEvolve-Data-SFT, -RL and -Bench as published, from a folder or the hub: streamed, checked, row by row.

A repository holds `GenEvolve-Data-SFT/`, `GenEvolve-Data-RL/` and `GenEvolve-Bench/`, each with JSONL or parquet tables
and the pictures that their rows name by relative path.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal, Protocol

import numpy as np

from genevolve_fast.agent.protocol import Answer, parse_reply
from genevolve_fast.data.rows import (
    BadRow,
    BadRows,
    DataError,
    InlinePicture,
    read_picture,
    read_rows,
    relative_problem,
    safe_file,
)
from genevolve_fast.trajectory import Request

Which = Literal["sft", "rl", "bench"]

EVAL_TYPES = ("Knowledge-Anchored", "Quality-Anchored")
ROLES = ("system", "user", "assistant", "tool")
IMAGE_PLACEHOLDER = "<image>"
CONSTRUCTION = "construction"  # in extra_info: what a request was built from, for judges only
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Layout:
    """Folder and tables of a published set; the first split is the one that is read unless another is named."""

    folder: str
    splits: tuple[str, ...]


LAYOUTS: dict[Which, Layout] = {
    "sft": Layout("GenEvolve-Data-SFT", ("train", "eval")),
    "rl": Layout("GenEvolve-Data-RL", ("train",)),
    "bench": Layout("GenEvolve-Bench", ("test",)),
}


class PublishedSet(Protocol):
    """One split of one set."""

    where: str  # what messages call it

    def rows(self) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
        """(line or row number from 1, row), streamed."""
        ...

    def file(self, name: Any) -> Path:
        """The local file that a row names. Raises DataError for a path that leaves the set, or is absent."""
        ...


class LocalSet:
    """A table on disk: JSONL, JSON list or parquet, in one file or in shards."""

    def __init__(self, tables: Path | list[Path], which: Which, folder: Path | None = None) -> None:
        self.tables = [tables] if isinstance(tables, Path) else tables
        self.which = which
        self.folder = folder or self.tables[0].parent
        self.where = str(self.tables[0])

    def rows(self) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
        before = 0
        for table in self.tables:
            number = 0
            for number, row in read_rows(table):
                yield before + number, row
            before += number

    def file(self, name: Any) -> Path:
        return safe_file(self.folder, name)


class HubSet:
    """A split of a repository on the hub, streamed by `datasets`; pictures are downloaded when they are asked for."""

    def __init__(self, repository: str, which: Which, split: str) -> None:
        self.repository, self.which, self.split = repository, which, split
        self.where = f"{repository}/{LAYOUTS[which].folder}/{split}"
        self._files: dict[str, Path] = {}  # the hub is asked once for each

    def rows(self) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
        try:
            from datasets import Features, Image, List, load_dataset
        except ImportError as error:
            raise DataError(f"{self.where}: the hub needs `pip install 'genevolve-fast[data]'`") from error
        try:
            stream = load_dataset(self.repository, self.which, split=self.split, streaming=True)
            for name, kind in (stream.features or Features()).items():  # rows name files, pixels come later
                if isinstance(kind, Image):
                    stream = stream.cast_column(name, Image(decode=False))
                elif isinstance(getattr(kind, "feature", None), Image):
                    stream = stream.cast_column(name, List(Image(decode=False)))
            yield from enumerate(map(dict, stream), 1)
        except DataError:
            raise
        except Exception as error:  # datasets raises what its file systems and parsers raise
            told = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise DataError(f"{self.where} cannot be read from the hub: {told}") from None

    def file(self, name: Any) -> Path:
        if problem := relative_problem(name):
            raise DataError(problem)
        if name in self._files:
            return self._files[name]
        from huggingface_hub import hf_hub_download

        inside = f"{LAYOUTS[self.which].folder}/{name}"
        try:
            self._files[name] = Path(hf_hub_download(self.repository, inside, repo_type="dataset"))
            return self._files[name]
        except Exception as error:  # the hub's own errors, and those of its transport
            told = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise DataError(f"cannot get {inside} of {self.repository}: {told}") from None


def open_set(path: str, which: Which, split: str | None = None) -> PublishedSet:
    """A split (none: the set's first) of the set at `path`: its repository, its own folder, a table, or a hub id."""
    layout = LAYOUTS[which]
    split = split or layout.splits[0]
    if split not in layout.splits:
        raise DataError(f"{layout.folder} has no split {split!r}: {', '.join(layout.splits)}")
    local = Path(path)
    if local.is_file():
        return LocalSet(local, which)
    if local.is_dir():
        folder = find_set(local, which)
        if folder is None:
            raise DataError(f"{local} holds no {layout.folder}: neither that folder nor its {split} table")
        tables = find_tables(folder, split)
        if not tables:
            raise DataError(f"{folder} holds no {split}.jsonl and no {split}.parquet")
        return LocalSet(tables, which, folder)
    if not _HUB_ID.fullmatch(path) or path.startswith("."):
        raise DataError(f"{path}: no such file or folder, and no hub id such as MeiGen-AI/GenEvolve-Data-Bench")
    return HubSet(path, which, split)


def find_set(path: Path, which: Which) -> Path | None:
    """The folder of a set in a repository, or `path` itself where it is that set's."""
    layout = LAYOUTS[which]
    if (path / layout.folder).is_dir():
        return path / layout.folder
    others = {LAYOUTS[w].folder for w in LAYOUTS if w != which}
    if path.resolve().name in others:
        return None
    return path if any(find_tables(path, split) for split in layout.splits) else None


def find_tables(folder: Path, split: str) -> list[Path]:
    """The files of a split: JSONL where there is one, since it can be read without anything else, else parquet."""
    for place in (folder, folder / "data"):
        if (place / f"{split}.jsonl").is_file():
            return [place / f"{split}.jsonl"]
        if (place / f"{split}.parquet").is_file():
            return [place / f"{split}.parquet"]
        for ending in ("jsonl", "parquet"):
            if shards := sorted(place.glob(f"{split}-*.{ending}")):
                return shards
    return []


# --- requests ---------------------------------------------------------------------------------------------------------


def check_request(row: Mapping[str, Any], where: str, line: int) -> Request:
    """The request of a published RL or bench row. Raises BadRow naming the first field that is wrong.

    What `extra_info.construction` holds becomes fields of Request.extra, where judges look for it.
    """

    def bad(name: str, reason: str) -> BadRow:
        return BadRow(where, line, name, reason)

    row = {name: value for name, value in row.items() if value is not None}
    id_ = row.get("id")
    if isinstance(id_, bool) or not isinstance(id_, (int, str)) or not str(id_).strip():
        raise bad("id", f"must be a number or a text, not {_shown(id_)}")
    question = row.get("question")
    if not isinstance(question, str) or not question.strip():
        raise bad("question", f"must be a text, not {_shown(question)}")
    if problem := relative_problem(row.get("gt_image")):
        raise bad("gt_image", problem)
    for name in ("category", "difficulty", "eval_type"):
        if not isinstance(row.get(name, ""), str):
            raise bad(name, f"must be a text, not {_shown(row[name])}")
    if row.get("eval_type", "") not in ("", *EVAL_TYPES):
        raise bad("eval_type", f"must be one of {', '.join(EVAL_TYPES)}, not {_shown(row['eval_type'])}")
    for name in ("meta", "extra_info"):
        if name in row:
            row[name] = _mapping(row[name], lambda reason, name=name: bad(name, reason))
    built = row.get("extra_info", {}).get(CONSTRUCTION) or {}
    if not isinstance(built, dict):
        raise bad(f"extra_info.{CONSTRUCTION}", f"must be an object, not {_shown(built)}")
    if clash := sorted({"id", "question", "prompt", "gt_image", "eval_type", "category", "difficulty"} & set(built)):
        raise bad(f"extra_info.{CONSTRUCTION}", f"may not hold {', '.join(clash)}")
    return request_of(row)


def request_of(row: Mapping[str, Any]) -> Request:
    """The request of a row; what `extra_info.construction` holds is put into `extra`, where judges look for it."""
    info = row.get("extra_info")
    built = info.get(CONSTRUCTION) if isinstance(info, Mapping) else None
    built = {k: v for k, v in built.items() if v is not None} if isinstance(built, Mapping) else {}
    return Request.from_row({**built, **row})


def _mapping(value: Any, bad: Callable[[str], BadRow]) -> dict[str, Any]:
    """An object, or the JSON text of one, as tables with a fixed schema keep it."""
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else {}
        except (ValueError, RecursionError) as error:
            raise bad(f"is a text that is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise bad(f"must be an object, not {_shown(value)}")
    return value


def _shown(value: Any) -> str:
    text = repr(value)
    return "absent" if value is None else text if len(text) <= 60 else f"{text[:60]}..."


def read_requests(source: PublishedSet, bad: BadRows) -> Iterator[Request]:
    """The requests of an RL or bench split, streamed; ids are unique, `bad` decides about rows that are not sound.

    The ground truth of a local set must be there; of one on the hub it is asked for when it is needed.
    """
    seen: dict[str, int] = {}
    for line, row in source.rows():
        try:
            if isinstance(row, BadRow):
                raise row
            request = check_request(row, source.where, line)
            if (first := seen.setdefault(request.id, line)) != line:
                raise BadRow(source.where, line, "id", f"{request.id!r} is also the id of line {first}")
            if isinstance(source, LocalSet) and (problem := _picture_problem(source, request.gt_image, decode=False)):
                raise BadRow(source.where, line, "gt_image", problem)
        except BadRow as error:
            bad.add(error)
            continue
        yield request


class TruthFiles:
    """Ground-truth pixels of requests (protocols.World.truth), by safe relative path inside their set."""

    def __init__(self, source: PublishedSet) -> None:
        self._source = source

    def __call__(self, request: Request) -> np.ndarray:
        """uint8 [height, width, 3]. Raises DataError naming the request."""
        try:
            return read_picture(self._source.file(request.gt_image))
        except DataError as error:
            raise DataError(f"{self._source.where}, id {request.id}: gt_image: {error}") from None


# --- conversations ----------------------------------------------------------------------------------------------------


def check_conversation(
    row: Mapping[str, Any], where: str, line: int
) -> tuple[list[dict[str, str]], list[str | InlinePicture]]:
    """(messages, relative paths of pictures, or pictures that lie in the row) of an SFT row.

    Raises BadRow naming the first field that is wrong.
    """

    def bad(name: str, reason: str) -> BadRow:
        return BadRow(where, line, name, reason)

    messages = row.get("messages")
    if not isinstance(messages, (list, tuple)) or not messages:
        raise bad("messages", f"must be a list of messages, not {_shown(messages)}")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise bad(f"messages[{i}]", f"must be an object, not {_shown(message)}")
        if message.get("role") not in ROLES:
            raise bad(f"messages[{i}].role", f"must be one of {', '.join(ROLES)}, not {_shown(message.get('role'))}")
        if not isinstance(message.get("content"), str):
            raise bad(f"messages[{i}].content", f"must be a text, not {_shown(message.get('content'))}")
    images = row.get("images")
    images = [] if images is None else images
    if not isinstance(images, (list, tuple)):
        raise bad("images", f"must be a list of paths, not {_shown(images)}")
    names = []
    for i, image in enumerate(images):
        try:
            names.append(_picture_of(image))
        except DataError as error:
            raise bad(f"images[{i}]", str(error)) from None
    placed = sum(m["content"].count(IMAGE_PLACEHOLDER) for m in messages if m["role"] != "assistant")
    if placed > len(names):
        raise bad("images", f"{placed} image placeholders but too few images: {len(names)}")
    if 0 < placed < len(names):
        raise bad("images", f"more images than placeholders: {len(names)} and {placed}")
    if not any(m["role"] == "assistant" for m in messages):
        raise bad("messages", "no message of the assistant: there is nothing to learn")
    return [{"role": m["role"], "content": m["content"]} for m in messages], names


def _picture_of(image: Any) -> str | InlinePicture:
    """A relative path, or the picture of a data URL or of an Image feature's {bytes, path}. Raises DataError."""
    if isinstance(image, Mapping):
        path, data = image.get("path"), image.get("bytes")
        if isinstance(data, bytes):
            return InlinePicture(path if isinstance(path, str) else "", data)
        image = path
    if isinstance(image, str) and image.startswith("data:image/"):
        return InlinePicture.from_url(image)
    if problem := relative_problem(image):
        raise DataError(problem)
    return image


def check_references(messages: list[dict[str, str]], names: list[str | InlinePicture], where: str, line: int) -> None:
    """Raise BadRow where the answer names an image id that no listed picture carries."""
    answer = parse_reply(messages[-1]["content"])
    if not isinstance(answer, Answer):
        raise BadRow(where, line, "messages", "does not end in an answer")
    carried = {PurePosixPath(n.name if isinstance(n, InlinePicture) else n).stem for n in names}
    if names and not any(stem.startswith("IMG_") for stem in carried):
        return  # pictures under other names: nothing to compare
    if lost := [img_id for img_id, _ in answer.reference_images if img_id not in carried]:
        raise BadRow(where, line, "images", f"the answer names {', '.join(lost)}, which no listed picture carries")


# --- what a folder holds ----------------------------------------------------------------------------------------------


@dataclass
class Contents:
    """One split of one set: rows by kind, and the rows that are bad."""

    which: Which
    split: str
    where: str
    rows: int = 0
    pictures: int = 0
    counts: dict[str, Counter[str]] = field(default_factory=dict)
    bad: BadRows = field(default_factory=lambda: BadRows(strict=False))

    def note(self, name: str, value: str) -> None:
        self.counts.setdefault(name, Counter())[value or "(none)"] += 1

    def text(self) -> str:
        lines = [f"{self.where}: {self.rows} rows, {self.pictures} pictures, {self.bad.count} bad rows"]
        for name, counter in self.counts.items():
            shown = ", ".join(f"{value} {n}" for value, n in counter.most_common(12))
            lines.append(f"  {name}: {shown}{', ...' if len(counter) > 12 else ''}")
        lines += [f"  bad: {reason}" for reason in self.bad.first]
        if self.bad.count > len(self.bad.first):
            lines.append(f"  ... and {self.bad.count - len(self.bad.first)} more")
        return "\n".join(lines)


def inspect(
    source: PublishedSet, which: Which, split: str, progress: Callable[[], None] = lambda: None, decode: bool = True
) -> Contents:
    """Read every row, and decode every picture that one names."""
    found = Contents(which, split, source.where)
    pictures: dict[str, str] = {}  # name -> problem
    ids: dict[str, int] = {}

    def check_pictures(names: list[str | InlinePicture], line: int, name: str) -> None:
        for picture in names:
            if isinstance(picture, InlinePicture):
                progress()
                try:
                    if decode:
                        picture.pixels()
                except DataError as error:
                    raise BadRow(source.where, line, name, str(error)) from None
                found.pictures += 1
                continue
            if picture not in pictures:
                pictures[picture] = _picture_problem(source, picture, decode)
                progress()
            if pictures[picture]:
                raise BadRow(source.where, line, name, pictures[picture])

    for line, row in source.rows():
        found.rows += 1
        progress()
        try:
            if isinstance(row, BadRow):
                raise row
            if which == "sft":
                messages, names = check_conversation(row, source.where, line)
                check_references(messages, names, source.where, line)
                check_pictures(names, line, "images")
                found.note("rounds", str(sum(m["role"] == "assistant" for m in messages)))
                found.note("pictures a row", str(len(names)))
                continue
            request = check_request(row, source.where, line)
            if (first := ids.setdefault(request.id, line)) != line:
                raise BadRow(source.where, line, "id", f"{request.id!r} is also the id of line {first}")
            check_pictures([request.gt_image], line, "gt_image")
            for name in ("eval_type", "category", "difficulty"):
                found.note(name, getattr(request, name))
        except BadRow as error:
            found.bad.add(error)
    found.pictures += sum(not problem for problem in pictures.values())
    return found


def _picture_problem(source: PublishedSet, name: str, decode: bool) -> str:
    try:
        file = source.file(name)
        if decode:
            read_picture(file)
        elif not file.is_file():
            return f"no file {name}"
    except DataError as error:
        return str(error)
    return ""
