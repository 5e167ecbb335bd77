"""What one rollout is, token by token. The ground floor: numpy and safetensors only."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from genevolve_fast.files import replacing

Role = Literal["system", "user", "assistant", "tool"]
Verdict = Literal["pass", "partial", "fail", "not applicable"]
StageName = Literal["plan", "sketch", "inspect", "refine"]
STAGES: tuple[StageName, ...] = ("plan", "sketch", "inspect", "refine")

FORMAT_VERSION = 1
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_IMAGE_ID = re.compile(r"IMG_\d+")
_URL = re.compile(r"https?://|www\.", re.IGNORECASE)
_ORDINAL = re.compile(r"\b(first|second|third|fourth) reference image\b", re.IGNORECASE)
_ORDINALS = {"first": 1, "second": 2, "third": 3, "fourth": 4}


class InvariantError(ValueError):
    """A trajectory or program breaks a rule; the message names the first one broken."""


def json_text(value: Any, indent: int | None = None) -> str:
    """JSON that UTF-8 can hold: readable, but escaped where a lone surrogate stands in it."""
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    return text if _LONE_SURROGATE.search(text) is None else json.dumps(value, indent=indent)


def safe_name(id: str) -> str:
    """A file name for an id that came from a file: the id itself if it is plain, else its plain part and its hash.

    Different ids get different names: the `~` before a hash is in no plain id.
    """
    if _PLAIN_NAME.fullmatch(id):
        return id
    digest = hashlib.blake2b(id.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
    return f"{re.sub('[^A-Za-z0-9_-]+', '_', id)[:60]}~{digest}"


@dataclass(frozen=True)
class Request:
    """One image request in the released JSONL format; every further field of its row is kept in `extra`."""

    id: str
    question: str
    gt_image: str = ""
    eval_type: str = ""
    category: str = ""
    difficulty: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Request:
        """Build from a row with `question` (or `prompt`). Raises InvariantError when neither holds text."""
        row = dict(row)
        question = str(row.pop("question", "") or row.get("prompt", "") or "").strip()
        if not question:
            raise InvariantError(f"request {row.get('id')!r} has neither a `question` nor a `prompt`")
        known = {k: str(row.pop(k, "")) for k in ("gt_image", "eval_type", "category", "difficulty")}
        return cls(id=str(row.pop("id", "")), question=question, extra=row, **known)

    def to_row(self) -> dict[str, Any]:
        row = {k: getattr(self, k) for k in ("id", "question", "gt_image", "eval_type", "category", "difficulty")}
        return row | dict(self.extra)


@dataclass(frozen=True)
class Reference:
    """A retrieved image that a program hands to the renderer. `sha256` names its pixels in the image store."""

    img_id: str
    note: str = ""
    local_path: str = ""
    url: str = ""
    title: str = ""
    page_url: str = ""
    sha256: str = ""


@dataclass(frozen=True)
class Program:
    """The prompt-reference program z = (gen_prompt, reference_images) that a generator renders."""

    gen_prompt: str
    reference_images: tuple[Reference, ...] = ()

    def validate(self, *, min_references: int = 1, max_references: int = 2) -> None:
        """Raise InvariantError naming the first broken rule of the released answer format."""
        refs = self.reference_images
        if not self.gen_prompt.strip():
            raise InvariantError("gen_prompt is empty")
        if not min_references <= len(refs) <= max_references:
            raise InvariantError(
                f"{len(refs)} reference images; this renderer takes {min_references} to {max_references}"
            )
        ids = [r.img_id for r in refs]
        if len(set(ids)) != len(ids):
            raise InvariantError(f"reference images repeat an id: {ids}")
        if ids != sorted(ids):
            raise InvariantError(f"reference images are not sorted by img_id: {ids}")
        if match := _IMAGE_ID.search(self.gen_prompt):
            raise InvariantError(f"gen_prompt contains the image id {match.group()}; use ordinals instead")
        if _URL.search(self.gen_prompt):
            raise InvariantError("gen_prompt contains a URL")
        used = {_ORDINALS[m.lower()] for m in _ORDINAL.findall(self.gen_prompt)}
        if used and max(used) > len(refs):
            raise InvariantError(f"gen_prompt names reference image {max(used)} but the program has {len(refs)}")


@dataclass(frozen=True)
class Turn:
    """Tokens [start, stop) written by one role. `tool` names the tool called (assistant) or answering (tool)."""

    role: Role
    start: int
    stop: int
    tool: str | None = None
    decision: tuple[int, int] | None = None  # tokens inside the tool call or answer of an assistant turn


@dataclass(frozen=True)
class ImageRecord:
    """An image the policy saw as tokens: the contract between rollout and trainer (DESIGN: images)."""

    img_id: str
    sha256: str
    grid: tuple[int, int, int]  # patches (t, h, w) before spatial merging
    start: int  # first placeholder token
    stop: int


@dataclass(frozen=True)
class Stage:
    """Tokens [start, stop) of one stage of a cycle in process-driven generation: its text, or (`drawn`) its draft.

    `score` is the image judge's of a draft, where it was asked for one.
    """

    name: StageName
    cycle: int
    start: int
    stop: int
    drawn: bool = False
    score: float | None = None


@dataclass(frozen=True)
class Message:
    role: str
    content: str


@dataclass(frozen=True)
class Diagnostic:
    """A judge's verdict on one skill, with one sentence of evidence."""

    judge: Literal["image", "program"]
    skill: str
    verdict: Verdict
    evidence: str


@dataclass(frozen=True)
class Judged:
    """Both judges answered. Image scores in {0, 0.5, 1}, program in {0, 0.25, 0.5, 0.75, 1}."""

    reward: float
    kscore: float
    program: float
    faithfulness: float = 0.0
    visual_correctness: float = 0.0
    text_accuracy: float = 0.5
    aesthetics: float = 0.0
    text_required: bool = False


@dataclass(frozen=True)
class Failed:
    """Infrastructure failed. Never a zero reward: the rollout leaves the group baseline and the loss."""

    stage: Literal["engine", "tool", "render", "judge"]
    reason: str
    kind: str = "other"  # one of incidents.KINDS


Outcome = Judged | Failed


@dataclass(frozen=True)
class Incident:
    """A failure that the policy saw and lived with: which tool failed in which model call, and how."""

    source: str
    kind: str  # one of incidents.KINDS
    round: int


def _no_ids() -> np.ndarray:
    return np.zeros(0, dtype=np.int32)


@dataclass(frozen=True, eq=False)
class Trajectory:
    """One rollout.

    ids [T] int64, loss_mask [T] bool (true exactly on sampled ids), rollout_logps [T] float32 in nats as the
    engine reported them after temperature and top-p (0 off the mask). Where the engine told which ids it sampled from:
    mask_counts [loss tokens] int32, how many for each (0: the whole vocabulary), and mask_ids int32, these ids one loss
    token after the other; both empty where it told none. `request_stop` is the index just after the
    request's last token, before its turn closes: the teacher's experience is spliced there.
    """

    id: str
    request_id: str
    group_id: str
    ids: np.ndarray
    loss_mask: np.ndarray
    rollout_logps: np.ndarray
    request_stop: int
    turns: tuple[Turn, ...]
    images: tuple[ImageRecord, ...] = ()
    stages: tuple[Stage, ...] = ()
    messages: tuple[Message, ...] = ()
    program: Program | None = None
    termination: str = ""
    error: str | None = None
    outcome: Outcome | None = None
    diagnostics: tuple[Diagnostic, ...] = ()
    incidents: tuple[Incident, ...] = ()
    rounds: int = 0
    seed: int = 0
    policy_step: int = 0
    mask_ids: np.ndarray = field(default_factory=_no_ids)
    mask_counts: np.ndarray = field(default_factory=_no_ids)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def num_loss_tokens(self) -> int:
        return int(self.loss_mask.sum())

    @property
    def reward(self) -> float | None:
        return self.outcome.reward if isinstance(self.outcome, Judged) else None

    @property
    def decision_mask(self) -> np.ndarray:
        """[T] bool: sampled tokens inside tool calls and answers."""
        mask = np.zeros(len(self.ids), dtype=bool)
        for turn in self.turns:
            if turn.decision:
                mask[slice(*turn.decision)] = True
        return mask & self.loss_mask

    @property
    def masked_tokens(self) -> int:
        """Loss tokens whose sampling mask is known."""
        return int((self.mask_counts > 0).sum())

    def stage_texts(self) -> list[tuple[Stage, str]]:
        """The written stages of a process with their texts; those are of its messages, "" where it has none."""
        written = iter([m.content for m in self.messages if m.role == "assistant" and m.content])
        return [(stage, next(written, "")) for stage in self.stages if not stage.drawn]

    def replace(self, **changes: Any) -> Trajectory:
        return dataclasses.replace(self, **changes)

    def validate(self) -> Trajectory:
        """Return self, or raise InvariantError naming the first broken invariant."""
        n = len(self.ids)

        def check(ok: bool, what: str) -> None:
            if not ok:
                raise InvariantError(f"trajectory {self.id!r}: {what}")

        check(self.ids.ndim == 1 and self.ids.dtype == np.int64, "ids must be a 1-D int64 array")
        check(n > 0, "ids are empty")
        check(bool((self.ids >= 0).all()), "ids contain a negative id")
        check(self.loss_mask.shape == (n,) and self.loss_mask.dtype == bool, f"loss_mask must be bool [{n}]")
        check(
            self.rollout_logps.shape == (n,) and self.rollout_logps.dtype == np.float32,
            f"rollout_logps must be float32 [{n}]",
        )
        check(bool(np.isfinite(self.rollout_logps).all()), "rollout_logps contain NaN or inf")
        check(bool((self.rollout_logps <= 0).all()), "rollout_logps contain a positive log-probability")
        check(not self.rollout_logps[~self.loss_mask].any(), "rollout_logps are non-zero off the loss mask")
        self._check_sampling_mask(check)
        check(0 < self.request_stop <= n, f"request_stop {self.request_stop} is outside 1..{n}")
        check(not self.loss_mask[: self.request_stop].any(), "the loss mask is true inside the request")
        position = 0
        assistant = np.zeros(n, dtype=bool)
        for i, turn in enumerate(self.turns):
            check(
                turn.start == position and turn.stop > turn.start, f"turn {i} does not start where turn {i - 1} stopped"
            )
            position = turn.stop
            if turn.role == "assistant":
                assistant[turn.start : turn.stop] = True
            if turn.decision:
                inside = turn.start <= turn.decision[0] <= turn.decision[1] <= turn.stop
                check(turn.role == "assistant" and inside, f"turn {i}: decision span {turn.decision} leaves its turn")
        check(position == n, f"turns cover {position} of {n} tokens")
        check(bool((self.loss_mask <= assistant).all()), "the loss mask is true outside assistant turns")
        last = 0
        for image in self.images:
            check(last <= image.start < image.stop <= n, f"{image.img_id}: placeholder span overlaps or leaves the ids")
            check(
                len(set(self.ids[image.start : image.stop].tolist())) == 1,
                f"{image.img_id}: span is not one placeholder",
            )
            check(not self.loss_mask[image.start : image.stop].any(), f"{image.img_id}: placeholder tokens carry loss")
            last = image.stop
        last = 0
        for stage in self.stages:
            check(stage.name in STAGES, f"unknown stage {stage.name!r}")
            check(
                last <= stage.start < stage.stop <= n, f"{stage.name} of cycle {stage.cycle} overlaps or leaves the ids"
            )
            check(
                bool(assistant[stage.start : stage.stop].all()) or stage.drawn, f"{stage.name} is not the policy's text"
            )
            last = stage.stop
        return self

    def _check_sampling_mask(self, check: Callable[[bool, str], None]) -> None:
        ids, counts = self.mask_ids, self.mask_counts
        check(ids.ndim == 1 and ids.dtype == np.int32, "mask_ids must be a 1-D int32 array")
        check(counts.ndim == 1 and counts.dtype == np.int32, "mask_counts must be a 1-D int32 array")
        check(len(counts) in (0, self.num_loss_tokens), f"mask_counts must have {self.num_loss_tokens} numbers or none")
        check(bool((counts >= 0).all()), "mask_counts contain a negative number")
        check(int(counts.sum()) == len(ids), f"mask_counts sum to {int(counts.sum())}, mask_ids hold {len(ids)}")
        check(bool((ids >= 0).all()), "mask_ids contain a negative id")
        if not len(counts):
            return
        token = np.repeat(np.arange(len(counts)), counts)
        sampled = self.ids[self.loss_mask]
        found = np.bincount(token[ids == sampled[token]], minlength=len(counts)) > 0
        lacking = np.flatnonzero((counts > 0) & ~found)
        check(not len(lacking), f"the sampling mask of loss token {lacking[:1]} lacks the id that was sampled")


def image_hash(pixels: np.ndarray) -> str:
    """SHA-256 of shape and pixels of a uint8 [height, width, 3] image."""
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise InvariantError(f"an image must be uint8 [height, width, 3], got {pixels.dtype} {pixels.shape}")
    digest = hashlib.sha256(str(pixels.shape).encode())
    digest.update(np.ascontiguousarray(pixels).tobytes())
    return digest.hexdigest()


def _to_json(t: Trajectory) -> dict[str, Any]:
    out = {f.name: getattr(t, f.name) for f in dataclasses.fields(t)}
    for name in ("ids", "loss_mask", "rollout_logps", "mask_ids", "mask_counts"):
        del out[name]
    out["outcome"] = None if t.outcome is None else {"type": type(t.outcome).__name__} | dataclasses.asdict(t.outcome)
    for name in ("turns", "images", "stages", "messages", "diagnostics", "incidents"):
        out[name] = [dataclasses.asdict(x) for x in out[name]]
    out["program"] = None if t.program is None else dataclasses.asdict(t.program)
    return out


def _from_json(row: dict[str, Any], arrays: Mapping[str, np.ndarray]) -> Trajectory:
    row = dict(row)

    def tupled(value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    def build(cls: type, items: Iterable[dict[str, Any]]) -> tuple[Any, ...]:
        return tuple(cls(**{k: tupled(v) for k, v in item.items()}) for item in items)

    row["turns"] = build(Turn, row["turns"])
    row["images"] = build(ImageRecord, row["images"])
    row["stages"] = build(Stage, row.get("stages", []))
    row["messages"] = build(Message, row["messages"])
    row["diagnostics"] = build(Diagnostic, row["diagnostics"])
    row["incidents"] = build(Incident, row.get("incidents", []))
    if row["program"] is not None:
        refs = build(Reference, row["program"]["reference_images"])
        row["program"] = Program(row["program"]["gen_prompt"], refs)
    if row["outcome"] is not None:
        kind = {"Judged": Judged, "Failed": Failed}[row["outcome"].pop("type")]
        row["outcome"] = kind(**row["outcome"])
    return Trajectory(**row, **arrays)


def save(path: str | Path, trajectories: Sequence[Trajectory], images: Mapping[str, np.ndarray] | None = None) -> None:
    """Write one rollout batch to one safetensors file, atomically; `images` maps pixel hash to uint8 [h, w, 3]."""
    from safetensors.numpy import save_file

    path = Path(path)
    lengths = np.array([len(t) for t in trajectories], dtype=np.int64)

    def joined(name: str, dtype: type) -> np.ndarray:
        parts = [getattr(t, name) for t in trajectories]
        return np.concatenate(parts).astype(dtype) if parts else np.zeros(0, dtype)

    tensors = {
        "lengths": lengths,
        "ids": joined("ids", np.int64),
        "loss_mask": joined("loss_mask", np.uint8),
        "rollout_logps": joined("rollout_logps", np.float32),
        "mask_lengths": np.array([len(t.mask_counts) for t in trajectories], dtype=np.int64),
        "mask_counts": joined("mask_counts", np.int32),
        "mask_ids": joined("mask_ids", np.int32),
    }
    for sha, pixels in (images or {}).items():
        tensors[f"image.{sha}"] = np.ascontiguousarray(pixels)
    meta = {"version": FORMAT_VERSION, "trajectories": [_to_json(t) for t in trajectories]}
    with replacing(path) as partial:
        save_file(tensors, partial, metadata={"genevolve_fast": json_text(meta)})


def load(path: str | Path) -> tuple[list[Trajectory], dict[str, np.ndarray]]:
    """Read a file written by `save`: (validated trajectories, images by pixel hash). Raises InvariantError."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="numpy") as f:
            meta = json.loads((f.metadata() or {})["genevolve_fast"])
            tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise InvariantError(f"{path} is not a trajectory file: {error}") from error
    if meta["version"] != FORMAT_VERSION:
        raise InvariantError(f"{path} has format version {meta['version']}; this release reads {FORMAT_VERSION}")
    ends = np.cumsum(tensors["lengths"])
    masks = _masks(tensors, len(ends))
    trajectories = []
    for row, stop, length, mask in zip(meta["trajectories"], ends, tensors["lengths"], masks, strict=True):
        part = slice(int(stop - length), int(stop))
        arrays = {
            "ids": tensors["ids"][part],
            "loss_mask": tensors["loss_mask"][part].astype(bool),
            "rollout_logps": tensors["rollout_logps"][part],
            **mask,
        }
        trajectories.append(_from_json(row, arrays).validate())
    images = {k.removeprefix("image."): v for k, v in tensors.items() if k.startswith("image.")}
    for sha, pixels in images.items():
        if image_hash(pixels) != sha:
            raise InvariantError(f"{path}: the pixels stored as {sha} have another hash")
    return trajectories, images


def _masks(tensors: Mapping[str, np.ndarray], trajectories: int) -> list[dict[str, np.ndarray]]:
    """mask_counts and mask_ids of each trajectory; files of older releases have none."""
    if "mask_lengths" not in tensors:
        return [{}] * trajectories
    counts = np.split(tensors["mask_counts"], np.cumsum(tensors["mask_lengths"])[:-1])
    ids = np.split(tensors["mask_ids"], np.cumsum([c.sum() for c in counts], dtype=np.int64)[:-1])
    return [{"mask_counts": c, "mask_ids": i} for c, i in zip(counts[:trajectories], ids, strict=False)]
