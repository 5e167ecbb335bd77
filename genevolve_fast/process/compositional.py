"""GenEval-style scores of pictures against the graphs of requests, and what a process keeps from draft to draft."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from genevolve_fast.process.scene_graph import PLACE, Node, SceneGraph, SceneRequest, places
from genevolve_fast.process.trace import Process
from genevolve_fast.process.verdict import GraphJudge, Verdict, has

CATEGORIES = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
_SAMPLES = 10_000
Where = Callable[[str], tuple[float, float, float, float]]


# --- scores -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Score:
    """One picture judged."""

    id: str
    category: str
    verdict: Verdict

    @property
    def correct(self) -> bool:
        return self.verdict.correct


@dataclass(frozen=True)
class Share:
    """A mean over `n` requests with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}], n {self.n}"


def score(requests: Sequence[SceneRequest], pictures: Mapping[str, np.ndarray], judge: GraphJudge) -> list[Score]:
    """Judge the picture of every request, `pictures` by request id. Raises ValueError where one is missing."""
    if missing := [r.id for r in requests if r.id not in pictures]:
        raise ValueError(f"{len(missing)} of {len(requests)} requests have no picture, the first is {missing[0]}")
    return [Score(r.id, r.category, judge.judge(r.graph, pictures[r.id])) for r in requests]


def by_category(scores: Sequence[Score], seed: int = 0) -> dict[str, Share]:
    """Share of correct pictures by category, and "overall": the mean of the categories, as GenEval has it."""
    grouped: dict[str, list[float]] = {}
    for s in scores:
        grouped.setdefault(s.category, []).append(float(s.correct))
    return _shares(grouped, seed)


def paired_differences(before: Sequence[Score], after: Sequence[Score], seed: int = 0) -> dict[str, Share]:
    """after − before on the same requests by category, and "overall"; the interval is over requests.

    A request may come several times on both sides, once a training seed: its differences are averaged first, so that
    the interval counts requests, not pictures. Raises ValueError where the sides do not have the same requests.
    """
    first, second = _correct_by_request(before), _correct_by_request(after)
    if first.keys() != second.keys() or any(len(first[k]) != len(second[k]) for k in first):
        raise ValueError("both sides must have the same requests, each as often")
    if not first:
        raise ValueError("there are no scores to compare")
    grouped: dict[str, list[float]] = {}
    for (category, id), values in first.items():
        grouped.setdefault(category, []).append(float(np.mean(second[category, id]) - np.mean(values)))
    return _shares(grouped, seed)


def difference_of(differences: Sequence[float], seed: int = 0) -> Share:
    """Mean of paired differences with its interval."""
    return _shares({"one": list(differences)}, seed)["one"]


def parts(scores: Sequence[Score]) -> dict[str, float]:
    """Shares of what was asked for that is right: objects there, counts, attributes, relations; and clean pictures."""
    verdicts = [s.verdict for s in scores]
    all_parts = {
        "objects": [ok for v in verdicts for ok in v.present.values()],
        "counts": [ok for v in verdicts for ok in v.counts.values()],
        "attributes": [ok for v in verdicts for ok in v.attributes.values()],
        "relations": [ok for v in verdicts for ok in v.relations],
        "clean": [v.clean for v in verdicts],
        "nothing surplus": [not v.surplus for v in verdicts],
    }
    return {name: float(np.mean(values)) for name, values in all_parts.items() if values}


def score_table(columns: Mapping[str, Mapping[str, Share]]) -> str:
    """Categories as rows, one column a name, in markdown."""
    names = [*dict.fromkeys(c for shares in columns.values() for c in shares if c != "overall"), "overall"]
    lines = [f"| category | {' | '.join(columns)} |", f"|---|{'---:|' * len(columns)}"]
    for name in names:
        cells = [str(shares[name]) if name in shares else "" for shares in columns.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _correct_by_request(scores: Sequence[Score]) -> dict[tuple[str, str], list[float]]:
    out: dict[tuple[str, str], list[float]] = {}
    for s in scores:
        out.setdefault((s.category, s.id), []).append(float(s.correct))
    return out


def _shares(grouped: Mapping[str, Sequence[float]], seed: int) -> dict[str, Share]:
    random = np.random.default_rng(seed)
    out, drawn_means = {}, []
    order = [c for c in CATEGORIES if c in grouped] + sorted(set(grouped) - set(CATEGORIES))
    for category in order:
        values = np.asarray(grouped[category], dtype=np.float64)
        drawn = values[random.integers(0, len(values), (_SAMPLES, len(values)))].mean(1)
        drawn_means.append(drawn)
        out[category] = Share(float(values.mean()), *_interval(drawn), len(values))
    if out:
        overall = float(np.mean([s.value for s in out.values()]))
        out["overall"] = Share(overall, *_interval(np.mean(drawn_means, axis=0)), sum(s.n for s in out.values()))
    return out


def _interval(drawn: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(drawn, (2.5, 97.5))
    return float(low), float(high)


# --- from draft to draft ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """A draft and what its plan says: the graph of the whole scene so far."""

    graph: SceneGraph
    pixels: np.ndarray


@dataclass(frozen=True)
class Kept:
    """What a draft kept of the one before. `changed_outside`: share of the pixels outside the planned region that
    changed. `at_stake`: objects that were right and are still asked for; `forgotten`: those of them that are wrong now,
    in words."""

    changed_outside: float
    at_stake: int
    forgotten: tuple[str, ...]


@dataclass(frozen=True)
class Consistency:
    """Over all steps from a draft to the next; None where there was nothing to count."""

    changed_outside: float | None
    forgotten: float | None
    steps: int
    at_stake: int


def consistency(
    processes: Sequence[Sequence[Step]], judge: GraphJudge, *, where: Where | None = None, margin: int = 1
) -> Consistency:
    """Mean share of pixels changed outside the planned region, and the share of right objects that became wrong."""
    kept = [k for steps in processes for k in kept_along(steps, judge, where=where, margin=margin)]
    stake = sum(k.at_stake for k in kept)
    return Consistency(
        float(np.mean([k.changed_outside for k in kept])) if kept else None,
        sum(len(k.forgotten) for k in kept) / stake if stake else None,
        len(kept),
        stake,
    )


def kept_along(steps: Sequence[Step], judge: GraphJudge, *, where: Where | None = None, margin: int = 1) -> list[Kept]:
    """For every draft but the first what it kept of the one before it."""
    judged = [(s.graph, judge.judge(s.graph, s.pixels), s.pixels) for s in steps]
    out = []
    for (before, seen_before, old), (after, seen_after, new) in itertools.pairwise(judged):
        region = planned_region(before, seen_before, after, seen_after, new.shape[:2], where=where, margin=margin)
        out.append(Kept(changed_outside(old, new, region), *_forgotten(before, seen_before, after, seen_after)))
    return out


def planned_region(
    before: SceneGraph,
    seen_before: Verdict,
    after: SceneGraph,
    seen_after: Verdict,
    size: tuple[int, int],
    *,
    where: Where | None = None,
    margin: int = 1,
) -> np.ndarray:
    """bool [height, width]: the boxes, `margin` pixels wider, of what the later plan adds, alters or takes away.

    Their boxes are where both pictures show them and, with `where`, where the plans put them.
    """
    unchanged = {n.signature for n in before.objects} & {n.signature for n in after.objects}
    boxes: list[tuple[float, float, float, float]] = []
    for node in before.objects:
        if node.signature not in unchanged and not any(n.count > node.count for n in _alike(node, after)):
            boxes += _boxes(node, seen_before, where)
    for node in after.objects:
        if node.signature not in unchanged:
            stay = [n for n in _alike(node, before) if n.count < node.count]  # of a group that grows
            here = {tuple(f.centre) for n in stay for f in seen_before.matched.get(n.id, ())}
            boxes += _boxes(node, seen_after, where, here, {spot for n in stay for spot in _spots(n)})
    region = np.zeros(size, dtype=bool)
    for left, top, right, bottom in boxes:
        rows = slice(max(0, int(top) - margin), int(np.ceil(bottom)) + margin)
        region[rows, max(0, int(left) - margin) : int(np.ceil(right)) + margin] = True
    return region


def changed_outside(before: np.ndarray, after: np.ndarray, region: np.ndarray, tolerance: int = 48) -> float:
    """Share of the pixels outside `region` whose channels differ by more than `tolerance` in sum; 0 where none are."""
    if before.shape != after.shape:
        raise ValueError(f"the drafts have different sizes: {before.shape[:2]} and {after.shape[:2]}")
    changed = np.abs(before.astype(np.int32) - after.astype(np.int32)).sum(-1) > tolerance
    outside = ~region
    return float(changed[outside].mean()) if outside.any() else 0.0


def _boxes(node: Node, seen: Verdict, where: Where | None, here=frozenset(), spots=frozenset()):
    """Where an object is seen and planned, without what stood within two pixels of `here` or is planned at `spots`."""
    found = [f.box for f in seen.matched.get(node.id, ()) if all(math.dist(f.centre, c) > 2 for c in here)]
    return found + ([where(s) for s in _spots(node) if s not in spots] if where is not None else [])


def _spots(node: Node) -> tuple[str, ...]:
    return places(node.attributes[PLACE]) if PLACE in node.attributes else ()


def _alike(node: Node, graph: SceneGraph) -> list[Node]:
    return [n for n in graph.objects if _kind(n) == _kind(node)]


def _forgotten(
    before: SceneGraph, seen_before: Verdict, after: SceneGraph, seen_after: Verdict
) -> tuple[int, tuple[str, ...]]:
    at_stake, lost = 0, []
    for node in before.objects:
        later = next(iter(_alike(node, after)), None)
        if later is None or later.count < node.count or not seen_before.right(node.id):
            continue
        at_stake += 1
        kept = [f for f in seen_after.matched.get(later.id, ()) if has(later, f)]
        stay = set(_spots(node)) & set(_spots(later))
        still = {f.attributes.get(PLACE) for f in kept}
        if len(kept) < node.count or not stay <= still:
            lost.append(node.text())
    return at_stake, tuple(lost)


def _kind(node: Node) -> tuple:
    """An object whatever its id, place and number."""
    return replace(node, attributes={k: v for k, v in node.attributes.items() if k != PLACE}, count=1).signature


def steps_of(process: Process, pixels: Mapping[str, np.ndarray]) -> list[Step]:
    """The steps of a built row: every draft, and after it the corrected one, with the graphs that the row tells.

    Raises KeyError where the row does not tell its graphs.
    """
    steps = []
    for cycle, graphs in zip(process.cycles, process.extra["graphs"], strict=True):
        steps.append(Step(SceneGraph.from_json(graphs["plan"]), pixels[cycle.draft]))
        if cycle.corrected:
            corrected = graphs.get("corrected", graphs["plan"])
            steps.append(Step(SceneGraph.from_json(corrected), pixels[cycle.corrected]))
    return steps
