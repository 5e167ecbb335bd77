"""Views in the published formats: what SFT learns from, what evolution is judged by, what the bench asks."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from genevolve_fast.data.pool import Seen
from genevolve_fast.data.published import IMAGE_PLACEHOLDER, LAYOUTS, Which, open_set, read_requests
from genevolve_fast.data.rows import MAX_SIDE, BadRows, DataError, read_picture
from genevolve_fast.data.steps import Step, close_step, finished, link_picture, write_bytes, write_rows
from genevolve_fast.data.trajectories import TABLE as TRAJECTORIES
from genevolve_fast.data.trajectories import Teaching, read_trajectories
from genevolve_fast.data.truth import TABLE as TRUTH
from genevolve_fast.trajectory import image_hash, json_text

STEPS: dict[Which, str] = {"sft": "sft-view", "rl": "feedback-view", "bench": "bench-view"}
_CARD = """\
---
configs:
{configs}
{features}---
# GenEvolve data

Sets in the format of GenEvolve-Data-Bench. Paths inside a set are relative to its folder.

```python
from datasets import load_dataset

load_dataset("PATH OF THIS FOLDER", "{first}")
```
"""
_SFT_FEATURES = """\
dataset_info:
- config_name: sft
  features:
  - name: messages
    list:
    - name: role
      dtype: string
    - name: content
      dtype: string
  - name: images
    list: string
"""  # a split whose lists are all empty tells no type


class ViewError(DataError):
    """A view would break a promise; the message names row and promise."""


@dataclass(frozen=True)
class Truthful:
    """A trajectory and its ground truth: file relative to its step, SHA-256 of its bytes."""

    teaching: Teaching
    gt_file: str
    gt_sha256: str


def read_truth(step: Step) -> list[Truthful]:
    rows = list(step.rows(TRUTH))
    pairs = zip(read_trajectories(step, TRUTH), rows, strict=True)
    return [Truthful(t, row["gt_file"], row["gt_sha256"]) for t, row in pairs]


# --- SFT --------------------------------------------------------------------------------------------------------------


def write_sft_view(
    root: Path,
    source: Step,
    settings: Mapping[str, Any],
    *,
    bench: str = "",
    near: float = 0.85,
    progress: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """`root/GenEvolve-Data-SFT` of the train and eval trajectories of a truth or filter step; returns its manifest.

    No ground truth is in it: neither a path nor a picture that equals one. Raises ViewError otherwise. Requests that
    repeat one of the bench (as in `write_feedback_view`) are left out and counted.
    """
    truths = read_truth(source) if source.name == "truth" else []
    table = TRUTH if source.name == "truth" else TRAJECTORIES
    read = list(read_trajectories(source, table))
    own = {t.id: t.request.question for t in read if t.split == "bench"}
    seen = held_out(own, bench, [t.request.question for t in read], near)
    sides = [t for t in read if t.split in ("train", "eval")]
    teachings = [t for t in sides if not seen.repeats(t.request.question)]
    if not any(t.split == "train" for t in teachings):
        raise ViewError(f"{source.folder} holds no trajectory of the train split")
    secret = _Secret(source, truths)

    def fill(folder: Path) -> tuple[list[str], dict[str, Any]]:
        rows: dict[str, list[dict[str, Any]]] = {"train": [], "eval": []}
        pictures = set()
        for number, t in enumerate(teachings):
            row, files = sft_row(t, f"traj_{number:05d}")
            for name, image in files.items():
                path = source.picture(image["file"], image["sha256"])
                secret.check(t, path, image["sha256"])
                link_picture(path, folder / name)
                pictures.add(image["sha256"])
            secret.check_text(t, row)
            rows[t.split].append(row)
            progress()
        for split, of in rows.items():
            write_rows(folder / f"{split}.jsonl", of)
        left_out = {"repeats the bench": len(sides) - len(teachings)}
        counts = {split: len(of) for split, of in rows.items()} | {"pictures": len(pictures)} | left_out
        return ["train.jsonl", "eval.jsonl"], counts

    return _write_view(root, "sft", source, settings, fill)


def sft_row(t: Teaching, folder: str) -> tuple[dict[str, Any], dict[str, Mapping[str, str]]]:
    """({messages, images}, the picture behind each path): images are images/FOLDER/IMG_###.

    Where observations place pictures, `images` follows their placeholders; where they are text, it lists every picture
    that has a file, and the file names in the text become the listed ones.
    """
    names = {i["img_id"]: f"images/{folder}/{i['img_id']}{Path(i['file']).suffix}" for i in t.images if i["file"]}
    placed = t.placed()
    if lost := sorted(set(placed) - set(names)):
        raise ViewError(f"{t.id}: the pictures of {', '.join(lost)} have no file")
    messages = [{"role": m.role, "content": m.content} for m in t.messages]
    for image in t.images:
        if image["local_path"] and image["img_id"] in names:
            for message in messages:
                message["content"] = message["content"].replace(image["local_path"], names[image["img_id"]])
    images = [names[img_id] for img_id in placed] if placed else list(names.values())
    count = sum(m["content"].count(IMAGE_PLACEHOLDER) for m in messages if m["role"] != "assistant")
    if count not in (0, len(images)):
        raise ViewError(f"{t.id}: {count} image placeholders for {len(images)} pictures")
    listed = set(images)
    files = {names[i["img_id"]]: i for i in t.images if names.get(i["img_id"]) in listed}
    return {"messages": messages, "images": images}, files


class _Secret:
    """The ground truth that an SFT view must not hold: by bytes, by pixels and by name."""

    def __init__(self, source: Step, truths: Sequence[Truthful]) -> None:
        self._bytes = {t.gt_sha256 for t in truths}
        self._pixels: set[str] = set()
        self._sizes: set[tuple[int, int]] = set()
        for t in truths:
            pixels = read_picture(source.picture(t.gt_file, t.gt_sha256))
            self._pixels.add(image_hash(pixels))
            self._sizes.add((min(pixels.shape[:2]), max(pixels.shape[:2])))
        self._names = {t.gt_file for t in truths}
        self._known: dict[str, bool] = {}

    def check(self, t: Teaching, path: Path, sha: str) -> None:
        if sha not in self._known:
            self._known[sha] = sha in self._bytes or self._same_pixels(path)
        if self._known[sha]:
            raise ViewError(f"{t.id}: one of its pictures is a ground truth, which an SFT view must not hold")

    def _same_pixels(self, path: Path) -> bool:
        """Decodes only what has the size of a ground truth, or would be scaled down."""
        from PIL import Image

        try:
            with Image.open(path) as picture:
                size = min(picture.size), max(picture.size)
            if size not in self._sizes and size[1] <= MAX_SIDE:
                return False
        except (OSError, Image.DecompressionBombError):
            pass  # read_picture says what is wrong with it
        return image_hash(read_picture(path)) in self._pixels

    def check_text(self, t: Teaching, row: Mapping[str, Any]) -> None:
        text = json_text(dict(row))
        if set(row) != {"messages", "images"} or any(name in text for name in self._names):
            raise ViewError(f"{t.id}: its messages name a ground truth, which an SFT view must not hold")


# --- visual feedback and bench ----------------------------------------------------------------------------------------


def write_feedback_view(
    root: Path, source: Step, settings: Mapping[str, Any], *, bench: str, near: float
) -> dict[str, Any]:
    """`root/GenEvolve-Data-RL` of the train requests that have a ground truth.

    None repeats a request of the bench split, nor of the published set at `bench` where one is named: such requests
    are left out and counted.
    """
    truths = read_truth(source)
    own = {t.teaching.id: t.teaching.request.question for t in truths if t.teaching.split == "bench"}
    seen = held_out(own, bench, [t.teaching.request.question for t in truths], near)
    train = [t for t in truths if t.teaching.split == "train"]
    chosen = [t for t in train if not seen.repeats(t.teaching.request.question)]
    return _write_requests(root, "rl", source, settings, chosen, {"repeats the bench": len(train) - len(chosen)})


def held_out(own: Mapping[str, str], bench: str, questions: Sequence[str], near: float) -> Seen:
    """The bench requests that `questions` are compared with: the pool's own, and a published bench's where named."""
    other = {}
    if bench:
        published = open_set(bench, "bench")
        other = {f"{published.where}/{r.id}": r.question for r in read_requests(published, BadRows())}
    asked = {**own, **other}
    seen = Seen([*asked.values(), *questions], near)
    for id_, question in asked.items():
        seen.add(id_, question)
    return seen


def write_bench_view(root: Path, source: Step, settings: Mapping[str, Any]) -> dict[str, Any]:
    """`root/GenEvolve-Bench` of the bench requests that have a ground truth."""
    chosen = [t for t in read_truth(source) if t.teaching.split == "bench"]
    return _write_requests(root, "bench", source, settings, chosen, {})


def _write_requests(
    root: Path,
    which: Which,
    source: Step,
    settings: Mapping[str, Any],
    chosen: Sequence[Truthful],
    left_out: Mapping[str, int],
) -> dict[str, Any]:
    (split,) = LAYOUTS[which].splits
    if not chosen:
        raise ViewError(f"{source.folder} holds no request with a ground truth for {LAYOUTS[which].folder}")

    def fill(folder: Path) -> tuple[list[str], dict[str, Any]]:
        rows = []
        for number, t in enumerate(chosen):
            name = f"images/case_{number:05d}.png"
            link_picture(source.picture(t.gt_file, t.gt_sha256), folder / name)
            rows.append(request_row(number, t.teaching, name))
        write_rows(folder / f"{split}.jsonl", rows)
        return [f"{split}.jsonl"], {split: len(rows), **left_out}

    return _write_view(root, which, source, settings, fill)


def request_row(number: int, t: Teaching, gt_image: str) -> dict[str, Any]:
    """A row of the RL or bench set. What judges need of a request stands in extra_info.construction."""
    request = t.request
    built = {name: value for name, value in request.extra.items() if name != "meta"}
    extra_info: dict[str, Any] = {"pool_id": request.id}
    return {
        "id": number,
        "question": request.question,
        "gt_image": gt_image,
        "eval_type": request.eval_type,
        "category": request.category,
        "difficulty": request.difficulty,
        "prompt_pool_index": number,
        "meta": dict(request.extra.get("meta") or {}),
        "extra_info": extra_info | ({"construction": built} if built else {}),
    }


# --- a set's folder ---------------------------------------------------------------------------------------------------


def _write_view(
    root: Path,
    which: Which,
    source: Step,
    settings: Mapping[str, Any],
    fill: Callable[[Path], tuple[list[str], dict[str, Any]]],
) -> dict[str, Any]:
    """Fill a folder beside the set's, then rename it: a set is there whole or not at all."""
    target = root / LAYOUTS[which].folder
    if done := finished(target, STEPS[which], source, settings):
        return done
    if target.exists() and any(target.iterdir()):
        raise ViewError(f"{target} holds something else: choose another --output-dir")
    partial = root / f".{target.name}.{os.getpid()}.tmp"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        tables, counts = fill(partial)
        manifest = close_step(partial, STEPS[which], source=source, settings=settings, tables=tables, counts=counts)
        if target.exists():
            target.rmdir()
        os.replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    _write_card(root)
    return manifest


def _write_card(root: Path) -> None:
    """README.md with the `configs` that load_dataset reads, unless somebody wrote another."""
    path = root / "README.md"
    if path.exists() and "# GenEvolve data\n" not in path.read_text(encoding="utf-8"):
        return
    configs, first = [], ""
    for which, layout in LAYOUTS.items():
        there = [split for split in layout.splits if (root / layout.folder / f"{split}.jsonl").exists()]
        if not there:
            continue
        first = first or which
        configs += [f"- config_name: {which}", "  data_files:"]
        configs += [f"  - {{split: {split}, path: {layout.folder}/{split}.jsonl}}" for split in there]
    features = _SFT_FEATURES if first == "sft" else ""
    write_bytes(path, _CARD.format(configs="\n".join(configs), features=features, first=first).encode())
