"""Teacher trajectories: a pool's requests through the real tool loop, with every picture the teacher saw."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from genevolve_fast.agent.journal import JOURNAL, Sample
from genevolve_fast.data.pool import pool_requests
from genevolve_fast.data.published import IMAGE_PLACEHOLDER
from genevolve_fast.data.steps import Step, StepError, close_step, keep_picture, write_rows
from genevolve_fast.files import file_hash
from genevolve_fast.trajectory import Message, Program, Reference, Request

TABLE = "trajectories.jsonl"
_IMAGE_LINE = re.compile(r"(IMG_\d+): title: ")


@dataclass(frozen=True)
class Teaching:
    """One teacher trajectory: its request, its conversation, its program, and the pictures it saw.

    `images` are {img_id, title, file, sha256, url, page_url, local_path} of every picture a tool showed, by id;
    `file` is relative to the step's folder, "" where the tool kept none. `local_path` is how the messages name it.
    """

    request: Request
    split: str
    messages: tuple[Message, ...]
    program: Program | None
    images: tuple[Mapping[str, str], ...]
    termination: str
    rounds: int
    error: str | None = None

    @property
    def id(self) -> str:
        return self.request.id

    def image(self, img_id: str) -> Mapping[str, str] | None:
        return next((image for image in self.images if image["img_id"] == img_id), None)

    def placed(self) -> list[str]:
        """Ids of the pictures behind the placeholders of the observations, in order."""
        ids = []
        for message in self.messages[2:]:
            if message.role == "assistant":
                continue
            last = ""
            for line in message.content.splitlines():
                if match := _IMAGE_LINE.match(line):
                    last = match[1]
                elif line == IMAGE_PLACEHOLDER:
                    ids.append(last)
        return ids

    def to_row(self) -> dict[str, Any]:
        p = self.program
        return {
            "request": self.request.to_row(),
            "split": self.split,
            "messages": [{"role": m.role, "content": m.content} for m in self.messages],
            "gen_prompt": p.gen_prompt if p else None,
            "references": [{"img_id": r.img_id, "note": r.note} for r in p.reference_images] if p else [],
            "images": [dict(image) for image in self.images],
            "termination": self.termination,
            "rounds": self.rounds,
            "error": self.error,
        }

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Teaching:
        images = {image["img_id"]: image for image in row["images"]}

        def reference(r: Mapping[str, str]) -> Reference:
            seen = images.get(r["img_id"], {})
            told = {name: seen.get(name, "") for name in ("url", "title", "page_url", "sha256")}
            return Reference(r["img_id"], r["note"], seen.get("file", ""), **told)

        program = row["gen_prompt"] and Program(row["gen_prompt"], tuple(map(reference, row["references"])))
        return cls(
            Request.from_row(row["request"]),
            row["split"],
            tuple(Message(m["role"], m["content"]) for m in row["messages"]),
            program or None,
            tuple(row["images"]),
            row["termination"],
            row["rounds"],
            row["error"],
        )


def samples_of(pool: Step) -> list[Sample]:
    """A pool's requests as rows of a batch; only `prompt` reaches the agent."""
    return [
        Sample(i, {"id": request.id, "prompt": request.question, "split": split, **_told(request)})
        for i, (split, request) in enumerate(pool_requests(pool))
    ]


def _told(request: Request) -> dict[str, Any]:
    return {name: getattr(request, name) for name in ("eval_type", "category", "difficulty")}


def read_trajectories(step: Step, table: str = TABLE) -> Iterator[Teaching]:
    """Raises StepError naming a row that this release cannot read."""
    for number, row in enumerate(step.rows(table), 1):
        try:
            yield Teaching.from_row(row)
        except (KeyError, TypeError, ValueError) as error:
            told = f"{type(error).__name__}: {error}"
            raise StepError(f"{step.folder / table}, line {number} is no trajectory: {told}") from None


def write_trajectories(folder: Path, pool: Step, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The journal of a batch as `trajectories.jsonl`, every picture in `images/` by content; returns the manifest.

    Rows that ended in an error of engine or server are left out and counted as failed: the same command runs them
    again.
    """
    lines = _journal(folder)
    requests = pool_requests(pool)
    kept: list[Teaching] = []
    ends: dict[str, int] = {}
    files = _Files(folder)
    for position, (split, request) in enumerate(requests):
        line = lines.get(position)
        if line is None or line["termination"] == "error":
            continue
        ends[line["termination"]] = ends.get(line["termination"], 0) + 1
        told = "\n".join(m["content"] for m in line["messages"])
        images = tuple(files(picture, told) for picture in line.get("shown") or ())
        program = None
        if line["gen_prompt"]:
            references = [Reference(r["img_id"], r["note"]) for r in line["reference_images"]]
            program = Program(line["gen_prompt"], tuple(references))
        messages = tuple(Message(m["role"], m["content"]) for m in line["messages"])
        ended = line["termination"], line["rounds"], line["error"]
        kept.append(Teaching(request, split, messages, program, images, *ended))
    write_rows(folder / TABLE, (t.to_row() for t in kept))
    counts = {
        "trajectories": len(kept),
        **{f"ended: {end}": n for end, n in sorted(ends.items())},
        "pictures without a file": files.missing,
        "failed": len(requests) - len(kept),
    }
    return close_step(folder, "trajectories", source=pool, settings=settings, tables=[TABLE], counts=counts)


def _journal(folder: Path) -> dict[int, dict[str, Any]]:
    """The last line of every position; a journal writes one for each finished row."""
    lines: dict[int, dict[str, Any]] = {}
    for text in (folder / JOURNAL).read_bytes().splitlines()[1:]:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("position"), int):
            lines[line["position"]] = line
    return lines


class _Files:
    """The pictures of a batch as files of its folder; what lies elsewhere is copied.

    Tools decode what they show before they show it, so nothing is decoded again here.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder.resolve()
        self._known: dict[str, tuple[str, str]] = {}
        self.missing = 0

    def __call__(self, picture: Mapping[str, str], told: str) -> dict[str, str]:
        """`picture` with its file; its `local_path` stays where the messages name it."""
        path = picture["local_path"]
        if path not in self._known:
            self._known[path] = self._kept(Path(path)) if path else ("", "")
        file, sha = self._known[path]
        self.missing += not file
        return {**picture, "local_path": path if path and path in told else "", "file": file, "sha256": sha}

    def _kept(self, path: Path) -> tuple[str, str]:
        own = self._folder / "images" / path.name
        path = own if own.exists() else path  # the folder may have moved since
        if not path.is_file():
            return "", ""
        if path.resolve().is_relative_to(self._folder):
            return path.resolve().relative_to(self._folder).as_posix(), file_hash(path)
        return keep_picture(path, self._folder)
