"""`report.html`: one self-contained file that shows what a run did."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from genevolve_fast.files import write_text
from genevolve_fast.report.processes import process_folders, read_strip
from genevolve_fast.report.records import StepRecord, read_step
from genevolve_fast.report.samples import Sample, read_samples, sampled_steps
from genevolve_fast.trajectory import Failed, Judged, Trajectory, json_text, load, safe_name

Decode = Callable[[Sequence[int]], str]
_GALLERY = 36  # requests in the before/after gallery
_GROUPS_PER_STEP = 2
_PROCESSES = 24
_SAMPLED = 36  # requests in the grid of samples
_COLUMNS = 12  # sampled steps in it


class ReportError(ValueError):
    """The run folder holds nothing to report; the message says what is missing."""


def build_report(folder: Path, decode: Decode) -> Path:
    """Write `folder/report.html` from what the run left behind; `decode` turns token ids to text."""
    metrics = read_metrics(folder)
    if not metrics and not (folder / "bench").exists() and not only_pictures(folder):
        if not (folder / "config.yaml").exists():
            raise ReportError(f"{folder} is not the folder of a run, nor of pictures that grew or were drawn")
        raise ReportError(f"{folder} has neither metrics.jsonl nor bench/: its run has made no step yet")
    store = ImageStore()
    data = {
        "name": folder.name,
        "config": (folder / "config.yaml").read_text(encoding="utf-8") if (folder / "config.yaml").exists() else "",
        "metrics": metrics,
        "summary": read_json(folder / "summary.json"),
        "gallery": gallery(folder, store),
        "benches": [read_json(p)["summary"] | {"name": read_json(p)["name"]} for p in bench_files(folder)],
        "steps": [viewer_step(folder, step, decode, store) for step in shown_steps(folder)],
        "experiences": experiences(folder),
        "processes": grown(folder, store),
        "samples": samples(folder, store),
    }
    data["images"] = store.uris
    path = folder / "report.html"
    write_text(path, filled("template.html", folder.name, _finite(data)))
    return path


def filled(template: str, title: str, data: Any) -> str:
    """The page `template` of this room over `data`; whatever a text says, it stays text."""
    page = (resources.files("genevolve_fast.report") / template).read_text(encoding="utf-8")
    payload = json_text(data).replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    return page.replace("__TITLE__", html.escape(title)).replace("__DATA__", payload)


def only_pictures(folder: Path) -> bool:
    """Whether the folder holds pictures that grew or were drawn, and no run."""
    return not (folder / "config.yaml").exists() and bool(process_folders(folder) or sampled_steps(folder))


def grown(folder: Path, store: ImageStore) -> list[dict[str, Any]]:
    """Pictures that grew in cycles: drafts, what was planned, what was found."""
    out = []
    for each in process_folders(folder)[:_PROCESSES]:
        strip = read_strip(each)
        cells = [asdict(c) | {"image": store.add_file(str(each / c.file)) if c.file else None} for c in strip.cells]
        out.append({"request": strip.request, "told": strip.line(), "writer": strip.writer, "cells": cells})
    return out


def samples(folder: Path, store: ImageStore) -> dict[str, Any]:
    """Steps, and of each request what was drawn at each of them: texts, drafts, whether the model ended it itself."""
    every = sampled_steps(folder)
    shown = [every[i] for i in sorted({*np.linspace(0, len(every) - 1, _COLUMNS).round().astype(int)})] if every else []
    columns = [read_samples(path) for _, path in shown]
    keys = list(dict.fromkeys(key for column in columns for key in column))

    def cell(sample: Sample | None) -> dict[str, Any] | None:
        drafts = [store.add_file(str(p)) for p in sample.drafts] if sample else []
        return sample and {"texts": sample.texts, "drafts": drafts, "ended": sample.ended}

    rows = [{"request": key[0], "cells": [cell(c.get(key)) for c in columns]} for key in keys[:_SAMPLED]]
    left_out = [len(keys) - len(rows), len(every) - len(shown)]
    return {"steps": [step for step, _ in shown], "rows": rows, "left_out": left_out}


class ImageStore:
    """PNG data URIs, each picture once."""

    def __init__(self) -> None:
        self.uris: list[str] = []
        self._index: dict[bytes, int] = {}

    def add(self, pixels: np.ndarray) -> int:
        key = pixels.tobytes()
        if key not in self._index:
            from PIL import Image

            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
            self._index[key] = len(self.uris)
            self.uris.append("data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode())
        return self._index[key]

    def add_file(self, path: str) -> int | None:
        from PIL import Image

        if not path or not Path(path).exists():
            return None
        try:
            with Image.open(path) as picture:
                return self.add(np.asarray(picture.convert("RGB")))
        except (OSError, Image.DecompressionBombError):  # broken: shown as missing
            return None


def _finite(value: Any) -> Any:
    """NaN and infinity are not JSON; a chart shows them as gaps."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if np.isfinite(value) else None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def read_metrics(folder: Path) -> list[dict[str, float]]:
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]  # not what a crash cut off


def bench_files(folder: Path) -> list[Path]:
    """bench.json of every bench of the run, `before` first and `after` last."""
    order = {"before": 0, "after": 2}
    return sorted((folder / "bench").glob("*/bench.json"), key=lambda p: (order.get(p.parent.name, 1), p.parent.name))


def gallery(folder: Path, store: ImageStore) -> list[dict[str, Any]]:
    """Requests with truth, picture before and picture after: the widest gains, the widest losses and an even sample."""
    sides = {}
    for side in ("before", "after"):
        path = folder / "bench" / side
        if not (path / "results.json").exists():
            return []
        scores = {r["id"]: r for r in read_json(path / "bench.json")["rows"]}
        sides[side] = {str(r["id"]): r | {"scores": scores.get(str(r["id"]))} for r in read_json(path / "results.json")}
    rows = []
    for rid, after in sides["after"].items():
        before = sides["before"].get(rid)
        if not before or not before["scores"] or not after["scores"]:
            continue
        gain = (after["scores"]["reward"] or 0) - (before["scores"]["reward"] or 0)
        rows.append((gain, rid, before, after))
    rows.sort(key=lambda r: (-r[0], r[1]))
    third = _GALLERY // 3
    spread = [rows[i] for i in np.linspace(0, len(rows) - 1, third).astype(int)] if rows else []
    picked = {"gains": rows[:third], "losses": rows[::-1][:third], "sample": spread}
    truth = folder / "bench" / "truth"
    out = []
    for kind, members in picked.items():
        for gain, rid, before, after in members:
            entry = {"kind": kind, "gain": gain, "id": rid, "request": after.get("question") or after["prompt"]}
            entry["truth"] = store.add_file(str(truth / f"{safe_name(rid)}.png"))
            for side, row in (("before", before), ("after", after)):
                picture = row.get("output_path", "")
                entry[side] = {
                    "image": store.add_file(str(folder / "bench" / side / picture) if picture else ""),
                    "prompt": row["gen_prompt"],
                    "reward": row["scores"]["reward"],
                }
            out.append(entry)
    return out


def shown_steps(folder: Path) -> list[int]:
    """First, middle and last step that left trajectories."""
    steps = sorted(int(p.stem.split("_")[1]) for p in (folder / "rollouts").glob("step_*.safetensors"))
    return sorted({steps[0], steps[len(steps) // 2], steps[-1]}) if steps else []


def viewer_step(folder: Path, step: int, decode: Decode, store: ImageStore) -> dict[str, Any]:
    """The trajectories of a few groups of one step: those with the widest spread of rewards."""
    rollouts, images = load(folder / "rollouts" / f"step_{step:06d}.safetensors")
    record = read_step(folder, step) or StepRecord({}, {}, {})
    groups: dict[str, list[Trajectory]] = {}
    for t in rollouts:
        groups.setdefault(t.group_id, []).append(t)
    spread = {g: np.ptp([t.reward or 0.0 for t in members]) for g, members in groups.items()}
    chosen = sorted(groups, key=lambda g: (-spread[g], g))[:_GROUPS_PER_STEP]
    return {
        "step": step,
        "groups": [
            {
                "id": g,
                "request": next(m.content for m in groups[g][0].messages if m.role == "user"),
                "experience": record.experiences.get(g, {}),
                "rollouts": [viewer_rollout(t, images, record, decode, store) for t in groups[g]],
            }
            for g in chosen
        ],
    }


def viewer_rollout(
    t: Trajectory, images: dict[str, np.ndarray], record: StepRecord, decode: Decode, store: ImageStore
) -> dict[str, Any]:
    logps, teacher, selected = record.traces.get(t.id, (None, None, None))
    at = {int(i): n for n, i in enumerate(np.flatnonzero(t.loss_mask))}
    turns = []
    for turn in t.turns:
        if turn.role == "assistant":
            tokens = []
            for i in range(turn.start, turn.stop):
                token: list[Any] = [decode([int(t.ids[i])])]
                if logps is not None and i in at:
                    n = at[i]
                    gap = float(teacher[n] - logps[n]) if np.isfinite(teacher[n]) else None
                    token += [float(logps[n]), gap, bool(selected[n])]
                tokens.append(token)
            turns.append({"role": "assistant", "tool": turn.tool, "tokens": tokens})
        else:
            shown = [im for im in t.images if turn.start <= im.start < turn.stop]
            turns.append(
                {
                    "role": turn.role,
                    "tool": turn.tool,
                    "text": turn_text(t, turn.start, turn.stop, decode),
                    "images": [[im.img_id, store.add(images[im.sha256])] for im in shown if im.sha256 in images],
                }
            )
    picture = record.pictures.get(t.id)
    outcome: dict[str, Any] = {"kind": type(t.outcome).__name__ if t.outcome else "unjudged"}
    if isinstance(t.outcome, Judged):
        outcome |= {k: getattr(t.outcome, k) for k in ("reward", "kscore", "program")}
    elif isinstance(t.outcome, Failed):
        outcome |= {"reason": f"{t.outcome.stage}: {t.outcome.reason}"}
    return {
        "id": t.id,
        "strip": stage_strip(t, images, store),
        "turns": turns,
        "outcome": outcome,
        "termination": t.termination,
        "error": t.error,
        "picture": None if picture is None else store.add(picture),
        "diagnostics": [
            [d.judge, d.skill, d.verdict, d.evidence] for d in t.diagnostics if d.verdict != "not applicable"
        ],
    }


def stage_strip(t: Trajectory, images: dict[str, np.ndarray], store: ImageStore) -> list[dict[str, Any]]:
    """The drafts of a process, each with what was written before and after it; empty for other rollouts."""
    written = iter(t.stage_texts())
    cells: list[dict[str, Any]] = []
    said = ""
    for stage in t.stages:
        if stage.drawn:
            sha = next((im.sha256 for im in t.images if stage.start <= im.start < stage.stop), "")
            shown = store.add(images[sha]) if sha in images else None
            cells.append({"cycle": stage.cycle, "stage": stage.name, "said": said, "found": "", "image": shown})
            cells[-1] |= {"score": stage.score, "sound": None}
            continue
        text = next(written)[1]
        if stage.name == "inspect" and cells:
            cells[-1]["found"] = text
        else:
            said = text
    return cells


def turn_text(t: Trajectory, start: int, stop: int, decode: Decode) -> str:
    """Text of an observation with image placeholders folded into one mark each."""
    parts, i = [], start
    for image in (im for im in t.images if start <= im.start < stop):
        parts += [decode(t.ids[i : image.start].tolist()), f"[{image.img_id}]"]
        i = image.stop
    parts.append(decode(t.ids[i:stop].tolist()))
    text = "".join(parts)
    for mark in ("<|vision_start|>", "<|vision_end|>", "<|im_end|>", "<|im_start|>assistant\n", "<|im_start|>user\n"):
        text = text.replace(mark, "")
    return text.replace("<|im_start|>system\n", "").strip()


def experiences(folder: Path) -> list[dict[str, Any]]:
    """What teachers read in the steps that left a record: newest first, each text once."""
    seen, out = set(), []
    for path in sorted((folder / "rollouts").glob("step_*.record.npz"), reverse=True):
        step = int(path.name.split("_")[1].split(".")[0])
        record = read_step(folder, step)
        for group, slots in (record.experiences if record else {}).items():
            key = json.dumps(slots, sort_keys=True)
            if key not in seen:
                seen.add(key)
                out.append({"step": step, "group": group, "slots": slots})
        if len(out) >= 24:
            break
    return out[:24]
