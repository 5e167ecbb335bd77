"""The demonstrator of processes: a script with stated bad habits that shows the tiny policy the four stages."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from genevolve_fast import event_loop
from genevolve_fast.data.demonstrations import Demonstration, write_sft
from genevolve_fast.experience.context import render as render_experience
from genevolve_fast.process.growing import Growth, GrowthSettings
from genevolve_fast.process.record import Record
from genevolve_fast.process.renderer import drawing
from genevolve_fast.process.stagewise import Difference, Finding, What, stage_experience
from genevolve_fast.process.trace import Correction
from genevolve_fast.protocols import Experience
from genevolve_fast.sandbox.canvas import CanvasRenderer
from genevolve_fast.sandbox.demonstrator import OBEDIENCE, coin, paired, plurals
from genevolve_fast.sandbox.habits import FITTING_SKILL
from genevolve_fast.sandbox.process_writer import Meant, SymbolicWriter, object_meant, prompt_of, text_meant
from genevolve_fast.sandbox.scene import CELLS, Item, Scene
from genevolve_fast.sandbox.world import SandboxWorld
from genevolve_fast.trajectory import Program, Request, StageName, image_hash

HABITS: dict[What, float] = {  # how often the script does the right thing: what a comparer finds where it does not
    "draft against plan": 0.5,  # plans each thing in a sentence of its own, with its place
    "inspection missed a fault": 0.5,  # says what the draft shows wrong
    "refinement made it worse": 0.65,  # keeps in a correction what was right
    "plan against request": 0.75,  # ends when everything is planned, not one thing before
}
_STAGES: dict[What, StageName] = {
    "draft against plan": "sketch",
    "inspection missed a fault": "inspect",
    "refinement made it worse": "refine",
    "plan against request": "plan",
    "stage not in its form": "plan",
}
Part = list[tuple[str, list[Meant]]]  # sentences of one cycle, with what each means


class ProcessDemonstrator(SymbolicWriter):
    """A process.record.Talk that knows the scene of its request; `right`: which of HABITS it has in this process."""

    def __init__(self, request: Request, right: Mapping[What, bool]) -> None:
        super().__init__()
        self._request, self._right = request, right
        self._known: dict[str, list[Meant]] = {}
        self._added: list[Meant] = []  # of the cycle at hand

    def _intend(self, question: str) -> None:
        parts = parts_of(self._request, self._right["draft against plan"])
        if not self._right["plan against request"] and len(parts) > 1:
            parts = parts[:-1]
        self._known = {sentence: means for part in parts for sentence, means in part}
        self._groups = [[sentence for sentence, _ in part] for part in parts]

    def _means(self, sentence: str) -> list[Meant]:
        return self._known[sentence]

    def _plan(self) -> str:
        before = len(self._meant)
        text = super()._plan()
        self._added = self._meant[before:]
        return text

    def _faults(self) -> list[str]:
        return super()._faults() if self._right["inspection missed a fault"] else []

    def _refine(self) -> str:
        text = super()._refine()
        if self._right["refinement made it worse"]:
            return text
        return str(Correction(prompt_of([m.sentence for m in self._added if m.item])))


def parts_of(request: Request, placed: bool) -> list[Part]:
    """What each cycle adds: a row, a pair, a text or an object; `placed`: a sentence for each thing, with its place.

    Raises ValueError for a request whose scene has to be searched.
    """
    scene = Scene.from_json(request.extra["checklist"])
    if any(i.kind == "emblem" for i in scene.items):
        raise ValueError(f"{request.id}: a process calls no tools, and an emblem has to be searched")
    parts: list[Part] = []
    for things, loose in _things(request, scene):
        means = [_meant(item) for item in things]
        parts.append([(m.sentence, [m]) for m in means] if placed or loose is None else [(loose, means)])
    if placed and scene.texts:  # a cycle for each text
        parts = [[pair] for part in parts for pair in part]
    ground = f"Background {scene.background}"
    return [[(ground, [Meant(ground, ground=scene.background)]), *parts[0]], *parts[1:]]


def _things(request: Request, scene: Scene) -> list[tuple[list[Item], str | None]]:
    """(items of one sentence of the request, that sentence where it leaves places open or entangles them)."""
    items = list(scene.items)
    match request.category:
        case "count_row":
            rows: dict[tuple[str, str, int], list[Item]] = {}
            for i in items:
                rows.setdefault((i.colour, i.value, CELLS[i.cell][0]), []).append(i)
            return [(row, plurals(row)[0].rstrip(".")) for row in rows.values()]
        case "relation":
            return [(items[:2], paired(request, items[:2]).rstrip(".")), *(([i], None) for i in items[2:])]
        case _:
            texts, objects = list(scene.texts), [i for i in items if i.kind == "object"]
            joined = " and ".join(f"'{t.value}' at the {t.cell}" for t in texts)
            loose = f"The texts {joined}" if len(texts) > 1 else f"The text '{texts[0].value}'"
            return [(texts, loose), *(([i], None) for i in objects)]


def _meant(item: Item) -> Meant:
    if item.kind == "text":
        return text_meant(item.value, item.cell)
    return object_meant(item.colour, item.value, item.cell)


# --- the set ----------------------------------------------------------------------------------------------------------


def decisions(request: Request, seed: int, told: What | None = None) -> dict[What, bool]:
    """Right or wrong for every habit; what was told is obeyed, with a slip now and then."""
    return {
        what: coin(seed, request.id, what) < (max(OBEDIENCE, share) if what == told else share)
        for what, share in HABITS.items()
    }


def lesson(request: Request, seed: int, share: float) -> tuple[What | None, Experience | None]:
    """What `share` of the processes are told, and in which words: one thing that the script would have done wrong.

    The words are those of the comparer, over cycles and skills drawn by lot.
    """
    if coin(seed, "told") >= share:
        return None, None
    wrong = [what for what in HABITS if coin(seed, "lesson", what) >= HABITS[what]]
    what = wrong[int(coin(seed, "which") * len(wrong))] if wrong else "stage not in its form"
    late = what == "plan against request"  # it shows at the end only
    cycle = int(coin(seed, "cycle") * 2) or int(late)
    skills = [FITTING_SKILL[request.category], "attribute_binding"]
    named = tuple(s for s in skills if coin(seed, "skill", s) < 0.5)
    last = late or coin(seed, "last") < 0.5
    return what, stage_experience(Difference(Finding(cycle, _STAGES[what], what, named), last))


def demonstrate_processes(requests: Sequence[Request], *, experience_share: float, seed: int) -> list[Demonstration]:
    """A process of every request over the canvas, as a live process with this script has it."""

    async def main() -> list[Demonstration]:
        return await asyncio.gather(
            *(_demonstrated(request, seed + i, experience_share) for i, request in enumerate(requests))
        )

    return event_loop.run(main())


async def _demonstrated(request: Request, seed: int, share: float) -> Demonstration:
    what, experience = lesson(request, seed, share)
    writer, record = ProcessDemonstrator(request, decisions(request, seed, what)), Record()
    draw, images = drawing(CanvasRenderer(), Program(request.question), ()), {}

    async def draft(prompt: str, last: np.ndarray | None, _: int) -> np.ndarray:
        pixels = await draw(prompt, last, 0)
        images[image_hash(pixels)] = pixels
        return pixels

    growth = Growth(request.question, writer, draft, GrowthSettings(), record, seed=0)
    await growth.run()
    if growth.end != "done":
        raise ValueError(f"{request.id}: the process ended by {growth.end}, which is nothing to learn from")
    messages = growth.messages
    if experience:
        messages[1] = replace(messages[1], content=f"{messages[1].content}{render_experience(experience)}")
    return Demonstration(tuple(messages), tuple(s.sha256 for s in record.steps if s.sha256), images, request)


def write_processes(world: SandboxWorld, folder: Path, *, count: int, experience_share: float, seed: int) -> Path:
    """`folder/sft.jsonl` and its images: `count` processes of the demonstrator on train requests, turn by turn."""
    requests = world.requests("train", count, seed=seed + 1)
    return write_sft(demonstrate_processes(requests, experience_share=experience_share, seed=seed), folder)
