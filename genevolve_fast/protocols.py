"""What the rooms know of each other. No implementation lives here, and no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np

from genevolve_fast.incidents import Incidents
from genevolve_fast.trajectory import Diagnostic, Program, Request, Trajectory

# --- tokens -----------------------------------------------------------------------------------------------------------


class Codec(Protocol):
    """Text to ids and back, and how an image becomes placeholder ids. One per policy."""

    image_pad_id: int
    markers: Sequence[str]  # every text that encodes to one control id: chat markers, image markers, protocol tags

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; the special tokens written in it become their single ids, nothing is added."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, special tokens included."""
        ...

    def image_grid(self, pixels: np.ndarray) -> tuple[int, int, int]:
        """Patch grid (t, h, w) of a uint8 [height, width, 3] image before spatial merging."""
        ...

    def image_tokens(self, grid: tuple[int, int, int]) -> int:
        """Number of placeholder ids for a grid."""
        ...

    def fingerprint(self) -> str:
        """A hash of what ids and grids follow from: equal hashes, equal lengths."""
        ...


# --- engine -----------------------------------------------------------------------------------------------------------


class EngineError(RuntimeError):
    """The engine could not answer; the rollout ends as Failed(stage="engine"). `kind` is one of incidents.KINDS."""

    def __init__(self, message: str, kind: str = "other") -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class Sampling:
    """How a turn is sampled. temperature 0 is greedy; log-probs are reported after temperature and top-p.

    sampling_mask asks for the ids that top-p kept at every token; an engine that cannot tell them returns none.
    """

    temperature: float = 0.7
    top_p: float = 0.95
    max_tokens: int = 4096
    stop_ids: tuple[int, ...] = ()
    sampling_mask: bool = False


@dataclass(frozen=True)
class Generation:
    """Sampled ids (a stop id, when one ended the turn, is the last of them) and their log-probs in nats.

    sampling_mask: for each of them the ids that could have been sampled, itself among them; None: not returned.
    """

    ids: list[int]
    logps: list[float]
    finish_reason: str = "stop"  # "stop" | "length"
    sampling_mask: list[list[int]] | None = None


@runtime_checkable
class Engine(Protocol):
    """Token ids (and images) in, token ids and log-probs out.

    A session is one rollout: `open` before its first turn, `close` after its last. `ids` are all ids so far, so an
    engine may keep what it computed for the session's earlier turns. `images` are the pixels behind every
    placeholder run in `ids`, in order. The seed belongs to the request: equal (ids, seed) sample equal ids.
    """

    def open(self, session_id: str) -> None: ...

    def close(self, session_id: str) -> None: ...

    async def generate(
        self, session_id: str, ids: Sequence[int], images: Sequence[np.ndarray], sampling: Sampling, seed: int
    ) -> Generation:
        """Raises EngineError."""
        ...


@runtime_checkable
class TrainedEngine(Engine, Protocol):
    """An engine that follows a policy in training."""

    def wake(self) -> None:
        """Take the memory that sampling needs; called before the rollouts of a step."""
        ...

    def sleep(self) -> None:
        """Give it back; called when every session of the step is closed."""
        ...

    def update_weights(self, version: int) -> None:
        """Sample from the policy's weights as they are now, which are those after `version` optimizer steps.

        When it returns nothing computed with older weights is read again. Raises EngineError.
        """
        ...

    def shutdown(self) -> None:
        """Give back everything; the last call."""
        ...


# --- tools ------------------------------------------------------------------------------------------------------------


class ToolError(RuntimeError):
    """A tool could not answer; the policy reads why. `kind` is one of incidents.KINDS."""

    def __init__(self, message: str, kind: str = "other") -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class FoundImage:
    """One image search result; the session gives it its IMG_### id."""

    title: str
    pixels: np.ndarray | None = None  # uint8 [height, width, 3]
    url: str = ""
    local_path: str = ""
    page_url: str = ""


@dataclass(frozen=True)
class Observation:
    """What a tool answers: text, or images (image_search) that the session formats with their ids."""

    text: str = ""
    images: tuple[FoundImage, ...] = ()


class Tool(Protocol):
    name: str
    parameters: Mapping[str, Any]  # JSON schema of the arguments
    description: str

    async def __call__(self, arguments: Mapping[str, Any]) -> Observation:
        """Raises ToolError."""
        ...


# --- from program to score --------------------------------------------------------------------------------------------


SKILLS = (  # of generation: what the agent can ask guidance for, and what judges give a diagnostic on
    "spatial_layout",
    "aesthetic_drawing",
    "text_rendering",
    "creative_drawing",
    "anatomy_body_coherence",
    "attribute_binding",
    "physical_material_consistency",
    "quantity_counting",
)


class RenderError(RuntimeError):
    """The renderer failed (its fault, not the program's). `kind` is one of incidents.KINDS."""

    def __init__(self, message: str, kind: str = "other") -> None:
        super().__init__(message)
        self.kind = kind


class JudgeError(RuntimeError):
    """The judge failed to give a verdict. `kind` is one of incidents.KINDS."""

    def __init__(self, message: str, kind: str = "other") -> None:
        super().__init__(message)
        self.kind = kind


class Renderer(Protocol):
    name: str
    min_references: int
    max_references: int

    async def render(self, program: Program, references: Sequence[np.ndarray], seed: int) -> np.ndarray:
        """uint8 [height, width, 3]; `references` are the pixels of program.reference_images. Raises RenderError."""
        ...


@dataclass(frozen=True)
class ImageVerdict:
    faithfulness: float
    visual_correctness: float
    text_accuracy: float  # 0.5 when no text is required
    aesthetics: float
    text_required: bool
    diagnostics: tuple[Diagnostic, ...] = ()
    rationale: str = ""


@dataclass(frozen=True)
class ProgramVerdict:
    score: float
    diagnostics: tuple[Diagnostic, ...] = ()
    rationale: str = ""


class ImageJudge(Protocol):
    async def judge(self, request: Request, image: np.ndarray, truth: np.ndarray) -> ImageVerdict:
        """Sees picture, ground truth and request, never the program. Raises JudgeError."""
        ...


class ProgramJudge(Protocol):
    async def judge(self, request: Request, program: Program) -> ProgramVerdict:
        """Sees request and program, never the picture. Raises JudgeError."""
        ...


# --- experience -------------------------------------------------------------------------------------------------------

EXPERIENCE_SLOTS = (
    "search_strategy",
    "knowledge_activation",
    "reference_selection",
    "prompt_construction",
    "failure_avoidance",
)


@dataclass(frozen=True)
class Experience:
    """A best-worst bundle: what made the better rollout better, slot by slot. An empty slot has nothing to say."""

    search_strategy: str = ""
    knowledge_activation: str = ""
    reference_selection: str = ""
    prompt_construction: str = ""
    failure_avoidance: str = ""

    def slots(self) -> dict[str, str]:
        return {name: text for name in EXPERIENCE_SLOTS if (text := getattr(self, name))}


class Summarizer(Protocol):
    async def compare(self, request: Request, best: Trajectory, worst: Trajectory) -> Experience | None:
        """Name the decisions that made the difference, never quoting the ground truth; None when there are none."""
        ...


class Embedder(Protocol):
    name: str  # tells it from others: cosines of two embedders cannot be compared
    dimension: int

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [len(texts), dimension], unit length."""
        ...


# --- a world to act in ------------------------------------------------------------------------------------------------


class Rolling(Protocol):
    """Rollouts of another kind than the agent's; both return train.collect.Rollouts."""

    def sample(
        self,
        requests: Sequence[Request],
        num_generations: int,
        *,
        world: World,
        engine: Engine,
        codec: Codec,
        seed: int,
        step: int,
        policy_step: int | None,
        on_done: Callable[[], None] | None = None,
    ) -> Any:
        """`num_generations` rollouts of each request, not judged yet; `on_done` is called after each."""
        ...

    def judge(self, rollouts: Any, requests: Mapping[str, Request], world: World) -> Any:
        """Those without an outcome get one; `requests` by id."""
        ...


@dataclass(frozen=True)
class World:
    """Everything outside the policy, bundled so that train, evaluate and data are given one thing."""

    tools: Mapping[str, Tool]
    renderer: Renderer
    image_judge: ImageJudge
    program_judge: ProgramJudge
    summarizer: Summarizer
    embedder: Embedder
    system_prompt: str
    truth: Callable[[Request], np.ndarray]  # ground-truth pixels, uint8 [height, width, 3]
    incidents: Incidents = field(default_factory=Incidents)  # what engine and tools count their failures in
    rolling: Rolling | None = None  # how a rollout goes; None: an agent with tools, its program rendered and judged
