"""What a process is: cycles of four stages as interleaved texts and drafts, their written form and their tokens."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from genevolve_fast.protocols import Codec
from genevolve_fast.trajectory import (
    STAGES,
    ImageRecord,
    InvariantError,
    Stage,
    StageName,
    Trajectory,
    Turn,
)

MAX_CYCLES = 5
TAGS = ("<ins>", "</ins>", "<des>", "</des>", "<inspect>", "</inspect>", "<refine>", "</refine>")
SOUND = "none"  # what an inspection writes where it finds no fault
Subset = Literal["multi_turn", "instruction_conflict", "image_alignment", "rollout"]

_PLAN = re.compile(r"\s*<ins>(.*?)</ins>\s*<des>(.*?)</des>\s*", re.DOTALL)
_INSPECT = re.compile(r"\s*<inspect>(.*?)\bplan:(.*?)\bdraft:(.*?)</inspect>\s*", re.DOTALL)
_LABEL = re.compile(r"\b(plan|draft):")
_TAG = re.compile(r"</?(ins|des|inspect|refine)>")
_REFINE = re.compile(r"\s*<refine>(.*?)</refine>\s*", re.DOTALL)


class StageError(ValueError):
    """A stage's text is not in its written form; the message says what is missing."""


# --- the texts of the stages ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """`instruction`: what to add or change now; `description`: the whole scene as it should be so far."""

    instruction: str
    description: str

    def __str__(self) -> str:
        return f"<ins>{_plain(self.instruction)}</ins><des>{_plain(self.description)}</des>"

    @classmethod
    def parse(cls, text: str) -> Plan:
        """Raises StageError."""
        match = _PLAN.fullmatch(text)
        if not match or not match[1].strip() or not match[2].strip():
            raise StageError(f"a plan is <ins>what to do now</ins><des>the scene so far</des>, got {text[:200]!r}")
        return cls(match[1].strip(), match[2].strip())


@dataclass(frozen=True)
class Inspection:
    """Faults found: `plan` where the plan contradicts the request, `draft` where the draft contradicts the plan.

    Empty: none. What is not yet painted is no fault of a draft. `reason`: what the picture shows, or nothing.
    """

    plan: str = ""
    draft: str = ""
    reason: str = ""

    @property
    def sound(self) -> bool:
        return not self.plan and not self.draft

    def __str__(self) -> str:
        reason, plan, draft = (_LABEL.sub(r"\1", _plain(text)) for text in (self.reason, self.plan, self.draft))
        return f"<inspect>{reason}{' ' if reason else ''}plan: {plan or SOUND} draft: {draft or SOUND}</inspect>"

    @classmethod
    def parse(cls, text: str) -> Inspection:
        """Raises StageError."""
        match = _INSPECT.fullmatch(text)
        if not match:
            raise StageError(f"an inspection is <inspect>plan: ... draft: ...</inspect>, got {text[:200]!r}")
        reason, plan, draft = (found.strip() for found in match.groups())
        if not plan or not draft:
            raise StageError(f"an inspection says {SOUND!r} where it finds no fault, got {text[:200]!r}")
        return cls(*("" if fault.rstrip(".").lower() == SOUND else fault for fault in (plan, draft)), reason)


@dataclass(frozen=True)
class Correction:
    """What to mend in the draft before the next cycle."""

    text: str

    def __str__(self) -> str:
        return f"<refine>{_plain(self.text)}</refine>"

    @classmethod
    def parse(cls, text: str) -> Correction:
        """Raises StageError."""
        match = _REFINE.fullmatch(text)
        if not match or not match[1].strip():
            raise StageError(f"a correction is <refine>what to mend</refine>, got {text[:200]!r}")
        return cls(match[1].strip())


def _plain(text: str) -> str:
    """Text that cannot close or open a tag of its own."""
    text = " ".join(text.split())
    while (bare := _TAG.sub(r"\1", text)) != text:  # what is left may have closed up to a tag
        text = bare
    return text


# --- a whole process --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cycle:
    """One round. `draft` and `corrected` are pixel hashes (trajectory.image_hash), empty where nothing was drawn.

    `trained` names the stages to learn from: a plan that was wrong on purpose is read, never imitated.
    """

    plan: Plan
    draft: str
    inspection: Inspection
    correction: Correction | None = None
    corrected: str = ""
    trained: tuple[StageName, ...] = STAGES

    @property
    def result(self) -> str:
        """The draft that the next cycle starts from."""
        return self.corrected or self.draft


@dataclass(frozen=True)
class Process:
    """A request and the cycles that answer it; `checks`: what was verified of them, `extra`: what a builder knows."""

    id: str
    request: str
    cycles: tuple[Cycle, ...]
    subset: Subset = "multi_turn"
    checks: Mapping[str, Any] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def drafts(self) -> tuple[str, ...]:
        """Pixel hashes in the order of drawing."""
        return tuple(sha for c in self.cycles for sha in (c.draft, c.corrected) if sha)

    @property
    def result(self) -> str:
        return self.cycles[-1].result if self.cycles else ""

    def validate(self) -> Process:
        """Return self, or raise InvariantError naming the first broken rule."""

        def check(ok: bool, what: str) -> None:
            if not ok:
                raise InvariantError(f"process {self.id!r}: {what}")

        check(bool(self.request.strip()), "the request is empty")
        check(1 <= len(self.cycles) <= MAX_CYCLES, f"{len(self.cycles)} cycles; a process has 1 to {MAX_CYCLES}")
        for n, cycle in enumerate(self.cycles):
            check(bool(cycle.draft), f"cycle {n} has no draft")
            check(
                (cycle.correction is None) == (not cycle.corrected),
                f"cycle {n} has a correction without a corrected draft, or the reverse",
            )
            check(
                cycle.inspection.sound == (cycle.correction is None),
                f"cycle {n}: what an inspection finds is corrected, and nothing else is",
            )
            check(set(cycle.trained) <= set(STAGES), f"cycle {n} trains {cycle.trained}; stages are {STAGES}")
        return self

    def to_row(self) -> dict[str, Any]:
        """The row of a JSONL file."""
        row = {"id": self.id, "subset": self.subset, "request": self.request, "cycles": []}
        for c in self.cycles:
            cycle = {
                "plan": dataclasses.asdict(c.plan),
                "draft": c.draft,
                "inspection": dataclasses.asdict(c.inspection),
            }
            if c.correction is not None:
                cycle |= {"correction": c.correction.text, "corrected": c.corrected}
            row["cycles"].append(cycle | {"trained": list(c.trained)})
        return row | {"checks": dict(self.checks), "extra": dict(self.extra)}

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Process:
        """Raises InvariantError for a row that is no process."""
        try:
            cycles = tuple(
                Cycle(
                    Plan(**c["plan"]), c["draft"], Inspection(**c["inspection"]),
                    Correction(c["correction"]) if "correction" in c else None, c.get("corrected", ""),
                    tuple(c.get("trained", STAGES)),
                )
                for c in row["cycles"]
            )  # fmt: skip
            given = {k: row[k] for k in ("subset", "checks", "extra") if k in row}
            return cls(str(row["id"]), str(row["request"]), cycles, **given).validate()
        except (KeyError, TypeError) as error:
            raise InvariantError(f"process {row.get('id')!r}: {type(error).__name__} {error}") from error


# --- tokens -----------------------------------------------------------------------------------------------------------


class Interleaved:
    """Tokens of a process as they are sampled or read: stage texts and drafts behind one another in one reply.

    The reply ends by closing its turn where it could have opened another image. Texts and the two image markers carry
    loss where their stage is trained, an image's placeholders never do.
    """

    def __init__(self, codec: Codec, request: str) -> None:
        self._codec = codec
        self.ids: list[int] = codec.encode(f"<|im_start|>user\n{request}")
        self.request_stop = len(self.ids)
        self._mask: list[bool] = []
        self._add("<|im_end|>\n<|im_start|>assistant\n", loss=False)
        self.begins = len(self.ids)
        self.stages: list[Stage] = []
        self.images: list[ImageRecord] = []

    def text(self, stage: StageName, cycle: int, text: str, *, loss: bool = True) -> None:
        start = len(self.ids)
        self._add(text, loss)
        self.stages.append(Stage(stage, cycle, start, len(self.ids)))

    def draft(
        self, stage: StageName, cycle: int, sha256: str, grid: tuple[int, int, int], *, loss: bool = True
    ) -> None:
        start = len(self.ids)
        self._add("<|vision_start|>", loss)
        placed = len(self.ids)
        self._add_ids([self._codec.image_pad_id] * self._codec.image_tokens(grid), loss=False)
        self.images.append(ImageRecord(f"DRAFT_{len(self.images) + 1:03d}", sha256, grid, placed, len(self.ids)))
        self._add("<|vision_end|>", loss)
        self.stages.append(Stage(stage, cycle, start, len(self.ids), drawn=True))

    def end(self) -> None:
        self._add("<|im_end|>", loss=True)

    def trajectory(self, id: str) -> Trajectory:
        ids = np.array(self.ids, dtype=np.int64)
        mask = np.array([False] * self.request_stop + self._mask)
        stop = len(ids)
        turns = (Turn("user", 0, self.begins), Turn("assistant", self.begins, stop))
        return Trajectory(
            id=id,
            request_id=id,
            group_id=id,
            ids=ids,
            loss_mask=mask,
            rollout_logps=np.zeros(stop, dtype=np.float32),
            request_stop=self.request_stop,
            turns=turns,
            images=tuple(self.images),
            stages=tuple(self.stages),
        ).validate()

    def _add(self, text: str, loss: bool) -> None:
        self._add_ids(self._codec.encode(text), loss)

    def _add_ids(self, ids: Sequence[int], loss: bool) -> None:
        self.ids.extend(ids)
        self._mask.extend([loss] * len(ids))


def interleave(
    process: Process, codec: Codec, pixels: Mapping[str, np.ndarray], kept: Collection[StageName] = STAGES
) -> Trajectory:
    """The process as one trajectory to learn from: drafts lie within the reply, untrained stages carry no loss.

    `kept`: stages that it has at all (`reduced`). `pixels` maps pixel hash to uint8 [h, w, 3]. Raises InvariantError
    where a draft's pixels are missing.
    """
    process.validate()
    if missing := [sha[:12] for sha in process.drafts if sha not in pixels]:
        raise InvariantError(f"process {process.id!r}: pixels of drafts {missing} are missing")
    out = Interleaved(codec, process.request)
    for n, cycle in enumerate(reduced(process, kept)):
        learn = set(cycle.trained)
        if "plan" in kept:
            out.text("plan", n, str(cycle.plan), loss="plan" in learn)
        out.draft("sketch", n, cycle.draft, codec.image_grid(pixels[cycle.draft]), loss="sketch" in learn)
        if "inspect" in kept:
            out.text("inspect", n, str(cycle.inspection), loss="inspect" in learn)
        if cycle.correction is not None:
            out.text("refine", n, str(cycle.correction), loss="refine" in learn)
            out.draft("refine", n, cycle.corrected, codec.image_grid(pixels[cycle.corrected]), loss="refine" in learn)
    out.end()
    return out.trajectory(process.id)


def reduced(process: Process, kept: Collection[StageName]) -> tuple[Cycle, ...]:
    """The cycles that are left without some stages: what an ablation learns from.

    Without inspect and refine a cycle goes straight to the draft it ended with, and one whose plan was wrong on purpose
    is left out. Without plan the last cycle is left, which draws all that is asked for at once. Raises ValueError for
    stages that make no process: sketch is always one of them, inspect and refine go together.
    """
    if set(kept) - {"plan"} not in ({"sketch"}, {"sketch", "inspect", "refine"}):
        raise ValueError(f"a process has no form of {', '.join(kept) or 'no stage'} alone")
    cycles = process.cycles if "plan" in kept else process.cycles[-1:]
    if "inspect" in kept:
        return cycles
    if "plan" in kept:
        cycles = tuple(c for c in cycles if "plan" in c.trained)
    straight = ("plan", "sketch")
    return tuple(
        dataclasses.replace(c, draft=c.result, correction=None, corrected="", trained=straight) for c in cycles
    )


def stage_mask(trajectory: Trajectory, stages: Collection[StageName], *, switches: bool = True) -> np.ndarray:
    """[T] bool: loss tokens of the texts of `stages`; `switches`: and those that open, close or forgo an image."""
    if unknown := set(stages) - set(STAGES):
        raise ValueError(f"unknown stages {sorted(unknown)}; stages are {', '.join(STAGES)}")
    mask = np.zeros(len(trajectory), dtype=bool)
    switching = np.ones(len(trajectory), dtype=bool)
    for stage in trajectory.stages:
        span = slice(stage.start, stage.stop)
        if not stage.drawn:
            mask[span] = stage.name in stages
            switching[span] = False
    return (mask | switching & switches) & trajectory.loss_mask


def supervised(trajectories: Iterable[Trajectory], stages: Collection[StageName], *, switches: bool = True):
    """The trajectories with loss on these stages only."""
    for t in trajectories:
        mask = stage_mask(t, stages, switches=switches)
        yield t.replace(loss_mask=mask, rollout_logps=np.where(mask, t.rollout_logps, 0).astype(np.float32))
