"""What a step leaves for the report, beside its trajectories: one small file a step."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from genevolve_fast.files import replacing
from genevolve_fast.protocols import Experience
from genevolve_fast.trajectory import Trajectory


@dataclass(frozen=True)
class StepRecord:
    """Pictures by trajectory id, (logps, teacher_logps, selected) per loss token, experience slots by group."""

    pictures: Mapping[str, np.ndarray]
    traces: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]]
    experiences: Mapping[str, Mapping[str, str]]


def record_path(folder: Path, step: int) -> Path:
    return folder / "rollouts" / f"step_{step:06d}.record.npz"


def write_step(
    folder: Path,
    step: int,
    trajectories: Sequence[Trajectory],
    pictures: Mapping[str, np.ndarray],
    traces: Mapping[str, object],
    experiences: Mapping[str, Experience],
) -> None:
    """Write the record of `step` atomically; `traces` have logps, teacher_logps and selected per loss token."""
    arrays: dict[str, np.ndarray] = {}
    for i, t in enumerate(trajectories):
        if t.id in pictures:
            arrays[f"picture/{i}"] = pictures[t.id]
        if trace := traces.get(t.id):
            arrays[f"logps/{i}"] = trace.logps.astype(np.float32)
            arrays[f"teacher/{i}"] = trace.teacher_logps.astype(np.float32)
            arrays[f"selected/{i}"] = trace.selected
    index = {"ids": [t.id for t in trajectories], "experiences": {g: e.slots() for g, e in experiences.items()}}
    arrays["index"] = np.array(json.dumps(index))
    with replacing(record_path(folder, step)) as partial, partial.open("wb") as f:
        np.savez_compressed(f, **arrays)


def read_step(folder: Path, step: int) -> StepRecord | None:
    """The record of `step`, or None where none was written."""
    path = record_path(folder, step)
    if not path.exists():
        return None
    with np.load(path, allow_pickle=False) as data:
        index = json.loads(str(data["index"]))
        name = {i: tid for i, tid in enumerate(index["ids"])}
        pictures = {name[i]: data[f"picture/{i}"] for i in name if f"picture/{i}" in data}
        traces = {
            name[i]: (data[f"logps/{i}"], data[f"teacher/{i}"], data[f"selected/{i}"])
            for i in name
            if f"logps/{i}" in data
        }
    return StepRecord(pictures, traces, index["experiences"])
