"""The three subsets of process data, built over protocols and verified draft by draft (arXiv 2604.04746, its data)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from genevolve_fast.process.scene_graph import GraphError, SceneGraph, SceneRequest
from genevolve_fast.process.states import (
    Vocabulary,
    Where,
    carried,
    contradictions,
    corruptions,
    increment_units,
    increments,
    mended,
    missing,
    part,
    placed_before,
    renamed,
    rewrites,
    settled,
    without_places,
)
from genevolve_fast.process.trace import MAX_CYCLES, Correction, Cycle, Inspection, Plan, Process, Subset
from genevolve_fast.process.verdict import Verdict
from genevolve_fast.trajectory import StageName, image_hash

SUBSETS = ("multi_turn", "instruction_conflict", "image_alignment")
_REWRITTEN = 0.45  # of the multi_turn rows edit a draft


# --- protocols --------------------------------------------------------------------------------------------------------


class Author(Protocol):
    """Knows graphs and writes their texts. Raises process.builders.Rejected, or what its service fails with."""

    async def plan(self, request: str, before: SceneGraph, after: SceneGraph) -> Plan: ...

    async def reason(self, graph: SceneGraph, verdict: Verdict) -> str:
        """Why the picture is right: what it shows of the graph."""
        ...

    async def correction(self, graph: SceneGraph, wrong: SceneGraph, faults: Sequence[str]) -> Correction:
        """From what is wrong to `graph`."""
        ...


class Reader(Protocol):
    async def read(self, text: str) -> SceneGraph:
        """The graph that a description tells. Raises GraphError where it tells none."""
        ...


class Painter(Protocol):
    async def layout(self, graph: SceneGraph, seed: int) -> SceneGraph:
        """The same objects with what is open chosen, where this painter chooses before it paints. Raises GraphError."""
        ...

    async def paint(self, graph: SceneGraph, text: str, before: np.ndarray | None, seed: int) -> np.ndarray:
        """uint8 [height, width, 3] of a state; `text`: what was said to do, `before`: the draft to start from."""
        ...


class DraftJudge(Protocol):
    async def judge(self, graph: SceneGraph, pixels: np.ndarray) -> Verdict: ...


@dataclass(frozen=True)
class Attempt:
    """A cycle that a model sampled: its plan, and its draft where it drew one."""

    plan: Plan
    draft: np.ndarray | None = None


class TraceSampler(Protocol):
    async def sample(self, request: SceneRequest, seed: int) -> Sequence[Attempt]:
        """A model's own cycles for a request, right or wrong. Raises Rejected for a trace that is none."""
        ...


@dataclass(frozen=True)
class Workshop:
    """All that builders need. `where`: boxes of places, `allowed`: graphs that may be told at all."""

    author: Author
    reader: Reader
    painter: Painter
    judge: DraftJudge
    words: Vocabulary
    where: Where | None = None
    allowed: Callable[[SceneGraph], bool] = lambda graph: True
    tell_places: bool = True


class Rejected(Exception):
    """A row that is not kept. `reason`: in two or three words, the same for all of its kind; the message says more."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


@dataclass(frozen=True)
class Built:
    """A verified row and the pixels of its drafts, uint8 [height, width, 3] by pixel hash."""

    process: Process
    pixels: dict[str, np.ndarray]


# --- the subsets ------------------------------------------------------------------------------------------------------


async def multi_turn(request: SceneRequest, shop: Workshop, seed: int, rewritten: bool | None = None) -> Built:
    """The request's graph grown in increments, in some rows changed at last by a modification, swap or removal.

    A rewritten row's request says both: the scene, and what is then done to it. Raises Rejected.
    """
    random, row = _open(request, shop, seed, "multi_turn")
    laid = await row.layout(request.graph)
    change = None
    if random.random() < _REWRITTEN if rewritten is None else rewritten:
        change = await _rewrite(row, laid, random)
    if change is None:
        for state in increments(laid, random, MAX_CYCLES):
            await row.grow(state, request.graph)
        return await row.finish(request.graph)
    kind, base, asked, told, final = change
    row.request = told
    for state in increments(base, random, MAX_CYCLES - 1):
        await row.grow(state, asked)
    await row.grow(final, request.graph)
    return await row.finish(request.graph, rewrite=kind, base=asked.to_json())


async def instruction_conflict(request: SceneRequest, shop: Workshop, seed: int, sampler: TraceSampler) -> Built:
    """A sampled trace up to its first plan that contradicts the request: found, corrected, drawn anew, completed.

    The wrong plan and its sketch are read, never learned. Drafts that contradict their plan are drawn anew.
    Raises Rejected, also for a trace without conflict.
    """
    random, row = _open(request, shop, seed, "instruction_conflict")
    for attempt in (await sampler.sample(request, seed))[:MAX_CYCLES]:
        told = await row.read(attempt.plan)
        faults = contradictions(told, request.graph, shop.where)
        if not faults:
            await row.take(attempt, told)
            continue
        draft = await row.drawn(attempt, told)
        shown = settled(told, await row.judge_plan(told, draft))
        full, right = await row.mended(shown)
        if not right.objects:
            raise Rejected("nothing of the plan is right", told.text())
        correction = await shop.author.correction(row.told(right), told, faults)
        await row.mend(attempt.plan, told, draft, Inspection(plan="; ".join(faults)), correction, right)
        await row.complete(full, random)
        return await row.finish(request.graph, source=type(sampler).__name__)
    raise Rejected("no conflict in the trace")


async def image_alignment(
    request: SceneRequest, shop: Workshop, seed: int, negative: bool, sampler: TraceSampler | None = None
) -> Built:
    """Drafts held against their plans: right ones with a reason, in a negative row one that is wrong and is mended.

    sampler: the wrong draft is a model's own, else it is drawn from a corrupted graph. Raises Rejected.
    """
    random, row = _open(request, shop, seed, "image_alignment")
    row.reasons = True
    if sampler is not None and negative:
        return await _own_draft(request, row, random, await sampler.sample(request, seed), type(sampler).__name__)
    states = increments(await row.layout(request.graph), random, MAX_CYCLES)
    wrong_one = int(random.integers(len(states))) if negative else None
    for n, state in enumerate(states):
        if n != wrong_one:
            await row.grow(state, request.graph)
            continue
        plan = await row.plan(state)
        for change in corruptions(state, random, shop.words, lacking=True):
            spoilt = placed_before(change, state)
            if not shop.allowed(spoilt):
                continue
            try:
                spoilt = await row.layout(spoilt)
            except Rejected:
                continue
            draft = await shop.painter.paint(spoilt, spoilt.text(), row.before, row.seed)
            if await row.mend_draft(plan, state, draft):
                row.extra["fault"] = change.kind
                break
        else:
            raise Rejected("nothing to corrupt", state.text())
    return await row.finish(request.graph, source="corrupted graph" if negative else "painter")


async def _own_draft(request, row: _Row, random, attempts: Sequence[Attempt], source: str) -> Built:
    for attempt in attempts[:MAX_CYCLES]:
        told = await row.read(attempt.plan)
        if faults := contradictions(told, request.graph, row.shop.where):
            raise Rejected("plan contradicts request", faults[0])
        if attempt.draft is not None and not (await row.shop.judge.judge(told, attempt.draft)).correct:
            full, right = await row.mended(carried(told, row.state))
            await row.mend_draft(attempt.plan, right, attempt.draft, told)
            await row.complete(full, random)
            return await row.finish(request.graph, source=source)
        await row.take(attempt, told)
    raise Rejected("no wrong draft in the trace")


async def _rewrite(row: _Row, laid: SceneGraph, random: np.random.Generator):
    """(kind, base with places, base as asked, text of both, final with places), None where nothing can be rewritten."""
    shop, asked = row.shop, row.graph
    for change in rewrites(asked, random, shop.words):
        try:
            base = await shop.painter.layout(placed_before(change, laid), row.seed)
        except GraphError:
            continue
        if shop.allowed(base) and not contradictions(laid, asked, shop.where):
            step = await shop.author.plan("", without_places(base), without_places(laid))
            if change.moved:
                a, b = (without_places(base)[id].text(True) for id in change.moved)
                doing = f"swap {a} and {b}"
            else:
                doing = step.instruction
            if doing:
                return change.kind, base, change.graph, f"{change.graph.text()}, then {doing}", laid
    return None


# --- a row in the making ----------------------------------------------------------------------------------------------


def _open(request: SceneRequest, shop: Workshop, seed: int, subset: Subset) -> tuple[np.random.Generator, _Row]:
    digest = hashlib.blake2b(f"{subset}/{request.id}/{seed}".encode(), digest_size=8).digest()
    number = int.from_bytes(digest, "big")
    return np.random.default_rng(number), _Row(request, shop, subset, number % 2**31)


@dataclass
class _Row:
    """Cycles as they are built; every draft is judged against its plan when it is added."""

    source: SceneRequest
    shop: Workshop
    subset: Subset
    seed: int
    reasons: bool = False
    request: str = ""
    cycles: list[Cycle] = field(default_factory=list)
    graphs: list[dict[str, Any]] = field(default_factory=list)
    pixels: dict[str, np.ndarray] = field(default_factory=dict)
    state: SceneGraph = field(default_factory=SceneGraph)  # with places
    extra: dict[str, Any] = field(default_factory=dict)
    judged: int = 0

    def __post_init__(self) -> None:
        self.request = self.source.text

    @property
    def graph(self) -> SceneGraph:
        return self.source.graph

    @property
    def before(self) -> np.ndarray | None:
        """The picture that the next draft starts from."""
        return self.pixels[self.cycles[-1].result] if self.cycles else None

    def told(self, graph: SceneGraph) -> SceneGraph:
        return graph if self.shop.tell_places else without_places(graph)

    async def layout(self, graph: SceneGraph) -> SceneGraph:
        try:
            laid = await self.shop.painter.layout(graph, self.seed)
        except GraphError as error:
            raise Rejected("no layout", str(error)) from None
        if not self.shop.allowed(laid):
            raise Rejected("held-out composition", laid.text())
        return laid

    async def plan(self, state: SceneGraph) -> Plan:
        """Written, and read back: it must describe this state and nothing else."""
        plan = await self.shop.author.plan(self.request, self.told(self.state), self.told(state))
        told, said = self.told(state), await self.read(plan)
        if faults := (*contradictions(said, told, self.shop.where), *(f"{m} is missing" for m in missing(said, told))):
            raise Rejected("plan says something else", faults[0])
        return plan

    async def read(self, plan: Plan) -> SceneGraph:
        """What a plan describes, under the ids of the request."""
        try:
            told = renamed(await self.shop.reader.read(plan.description), self.graph)
        except GraphError as error:
            raise Rejected("unreadable plan", str(error)) from None
        if not self.shop.allowed(told):
            raise Rejected("held-out composition", told.text())
        return told

    async def grow(self, state: SceneGraph, asked: SceneGraph) -> None:
        """A sound cycle to `state`, which must be part of what is `asked` at that time."""
        if faults := contradictions(state, asked, self.shop.where):
            raise Rejected("plan contradicts request", faults[0])
        plan = await self.plan(state)
        draft = await self.shop.painter.paint(state, self._text(plan), self.before, self.seed)
        await self._sound(plan, self.told(state), draft, state)

    async def take(self, attempt: Attempt, told: SceneGraph) -> None:
        """A sampled cycle whose plan is right; its draft is drawn anew where it contradicts the plan."""
        draft = await self.drawn(attempt, told)
        await self._sound(attempt.plan, told, draft, settled(told, await self.judge_plan(told, draft)))

    async def drawn(self, attempt: Attempt, told: SceneGraph) -> np.ndarray:
        if attempt.draft is not None and (await self._judge(told, attempt.draft)).correct:
            return attempt.draft
        try:
            laid = await self.layout(carried(told, self.state))
        except Rejected:  # what stands already leaves no room for it
            laid = await self.layout(told)
        return await self.shop.painter.paint(laid, self._text(attempt.plan), self.before, self.seed)

    async def judge_plan(self, told: SceneGraph, draft: np.ndarray) -> Verdict:
        """Raises Rejected for a draft that contradicts its plan."""
        verdict = await self._judge(told, draft)
        if not verdict.correct:
            raise Rejected("draft contradicts plan", verdict.faults[0])
        return verdict

    async def _sound(self, plan: Plan, told: SceneGraph, draft: np.ndarray, state: SceneGraph) -> None:
        verdict = await self.judge_plan(told, draft)
        reason = await self.shop.author.reason(told, verdict) if self.reasons else ""
        self._add(Cycle(plan, self._keep(draft), Inspection(reason=reason)), told, None, state)

    async def mend(
        self, plan, told: SceneGraph, draft, inspection: Inspection, correction: Correction, right: SceneGraph
    ):
        """A cycle that went wrong: what is learned of it is to see the fault and to mend it."""
        corrected = await self.shop.painter.paint(right, correction.text, draft, self.seed)
        after = await self._judge(self.told(right), corrected)
        if not after.correct:
            raise Rejected("correction does not mend", after.faults[0])
        learned: tuple[StageName, ...] = ("inspect", "refine") if inspection.plan else ("plan", "inspect", "refine")
        cycle = Cycle(plan, self._keep(draft), inspection, correction, self._keep(corrected), learned)
        self._add(cycle, told, self.told(right), right)

    async def mend_draft(
        self, plan: Plan, state: SceneGraph, draft: np.ndarray, told: SceneGraph | None = None
    ) -> bool:
        """A cycle whose draft contradicts its plan; False where it does not."""
        from genevolve_fast.process.author import seen

        told = told or self.told(state)
        verdict = await self._judge(told, draft)
        if verdict.correct:
            return False
        shown = await self.shop.author.reason(told, verdict) if self.reasons and verdict.matched else ""
        correction = await self.shop.author.correction(told, seen(told, verdict), verdict.faults)
        inspection = Inspection(draft="; ".join(verdict.faults), reason=shown)
        await self.mend(plan, told, draft, inspection, correction, state)
        return True

    async def mended(self, told: SceneGraph) -> tuple[SceneGraph, SceneGraph]:
        """(the whole request laid out with as much of a told state as is right, the right part of that state)."""
        open_ones, counts = mended(told, self.graph, self.shop.where)
        try:
            full = await self.layout(open_ones)
        except Rejected:  # what stands already leaves no room for the rest
            full = await self.layout(without_places(open_ones))
        return full, part(full, counts)

    async def complete(self, full: SceneGraph, random: np.random.Generator) -> None:
        """Add what the state lacks of the whole."""
        lacking = {n.id: n.count - (self.state[n.id].count if n.id in self.state else 0) for n in full.objects}
        if not any(lacking.values()):
            return
        have = {n.id: n.count for n in self.state.objects}
        rest = [list(units) for units in increment_units(full, lacking, random, MAX_CYCLES - len(self.cycles))]
        for units in rest:
            for id, count in units:
                have[id] = have.get(id, 0) + count
            await self.grow(part(full, have), self.graph)

    async def finish(self, asked: SceneGraph, **extra: Any) -> Built:
        """The row, if its result is what was asked for."""
        process = Process(
            id=f"{self.subset}-{self.source.id}",
            request=self.request,
            cycles=tuple(self.cycles),
            subset=self.subset,
            checks={},
            extra={},
        )
        if not process.cycles:
            raise Rejected("no cycle")
        if len(process.cycles) > MAX_CYCLES:
            raise Rejected("too many cycles", f"{len(process.cycles)}")
        verdict = await self._judge(asked, self.pixels[process.result])
        if not verdict.correct:
            raise Rejected("result contradicts request", verdict.faults[0])
        checks = {"drafts_judged": self.judged, "plans_read": len(self.cycles), "result": "as requested"}
        known = {"category": self.source.category, "graph": asked.to_json(), "graphs": self.graphs}
        used = set(process.drafts)
        process = replace(process, checks=checks, extra=known | self.extra | extra).validate()
        return Built(process, {sha: p for sha, p in self.pixels.items() if sha in used})

    async def _judge(self, graph: SceneGraph, pixels: np.ndarray) -> Verdict:
        self.judged += 1
        return await self.shop.judge.judge(graph, pixels)

    def _add(self, cycle: Cycle, told: SceneGraph, corrected: SceneGraph | None, state: SceneGraph) -> None:
        self.cycles.append(cycle)
        self.graphs.append({"plan": told.to_json()} | ({"corrected": corrected.to_json()} if corrected else {}))
        self.state = state

    def _keep(self, pixels: np.ndarray) -> str:
        sha = image_hash(pixels)
        self.pixels[sha] = pixels
        return sha

    def _text(self, plan: Plan) -> str:
        return f"{plan.instruction}\nThe scene so far: {plan.description}"


# --- wrong traces without a model -------------------------------------------------------------------------------------


class Corrupter:
    """TraceSampler by rule: grows the request's graph and in one plan tells a corrupted state."""

    def __init__(self, shop: Workshop) -> None:
        self._shop = shop

    async def sample(self, request: SceneRequest, seed: int) -> list[Attempt]:
        """Raises Rejected where no corruption contradicts the request."""
        random, row = _open(request, self._shop, seed, "rollout")
        states = increments(await row.layout(request.graph), random, MAX_CYCLES - 1)
        at = int(random.integers(len(states)))
        wrong = await self._wrong(states[at], request, row, random)
        told = [row.told(s) for s in (*states[:at], wrong)]
        before, attempts = SceneGraph(), []
        for state in told:
            attempts.append(Attempt(await self._shop.author.plan(request.text, before, state)))
            before = state
        return attempts

    async def _wrong(self, state: SceneGraph, request: SceneRequest, row: _Row, random) -> SceneGraph:
        for change in corruptions(state, random, self._shop.words):
            spoilt = placed_before(change, state)
            try:
                laid = await row.layout(spoilt)
            except Rejected:
                continue
            if contradictions(row.told(laid), request.graph, self._shop.where):
                return laid
        raise Rejected("nothing to corrupt", state.text())


class ModelSampler:
    """TraceSampler over a callable (request text, seed) -> the cycles of a sampled trace."""

    def __init__(self, sample: Callable[[str, int], Sequence[Attempt]]) -> None:
        self._sample = sample

    async def sample(self, request: SceneRequest, seed: int) -> Sequence[Attempt]:
        return self._sample(request.text, seed)


class Immediate:
    """DraftJudge over a judge that answers at once (process.verdict.GraphJudge)."""

    def __init__(self, judge) -> None:
        self._judge = judge

    async def judge(self, graph: SceneGraph, pixels: np.ndarray) -> Verdict:
        return self._judge.judge(graph, pixels)
