"""A unified model's own cycles for requests, right or wrong: what process.builders mends and the model then reads."""

from __future__ import annotations

from collections.abc import Sequence

from genevolve_fast.process.builders import Attempt, Rejected
from genevolve_fast.process.scene_graph import SceneRequest
from genevolve_fast.process.trace import Plan, StageError
from genevolve_fast.process.unified.model import Unified
from genevolve_fast.process.unified.sampling import Drawing, Drawn, Sketcher
from genevolve_fast.train.collect import stable_seed


def attempts(drawn: Drawn) -> list[Attempt]:
    """The plans in their order, each with the draft that followed; up to the first plan that cannot be read.

    A corrected draft is no attempt of a plan: it is drawn for a correction.
    """
    made = []
    for text, draft in zip(drawn.texts, drawn.drafts, strict=False):
        if "<refine>" in text:
            continue
        try:
            made.append(Attempt(Plan.parse(text[max(0, text.find("<ins>")) :]), draft))
        except StageError:
            break
    return made


class UnifiedSampler:
    """process.builders.TraceSampler over a unified model, which draws `batch` of the requests at a time.

    `requests`: all that may be asked for, in the order in which they will be. A request's trace is of drawing.seed and
    its id, not of the others.
    """

    def __init__(self, policy: Unified, drawing: Drawing, requests: Sequence[SceneRequest], batch: int = 64) -> None:
        self._sketcher = Sketcher(policy, drawing)
        self._requests, self._batch = list(requests), batch
        self._at = {r.id: n for n, r in enumerate(self._requests)}
        self._made: dict[str, Drawn] = {}

    async def sample(self, request: SceneRequest, seed: int) -> list[Attempt]:
        """Raises Rejected for a trace without a plan that can be read."""
        if request.id not in self._made:
            self._draw_from(self._at[request.id])
        made = attempts(self._made.pop(request.id))
        if not made:
            raise Rejected("unreadable plan", request.text)
        return made

    def _draw_from(self, first: int) -> None:
        part = self._requests[first : first + self._batch]
        seeds = [stable_seed("trace", self._sketcher.drawing.seed, r.id) for r in part]
        drawn = self._sketcher.draw([r.text for r in part], seeds)
        self._made = {r.id: d for r, d in zip(part, drawn, strict=True)}
