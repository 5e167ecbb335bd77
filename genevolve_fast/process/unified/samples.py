"""What a unified model draws, on disk; and what it draws of the same few requests as it trains."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from genevolve_fast.files import replacing_folder, write_bytes, write_text
from genevolve_fast.net.pictures import png_bytes
from genevolve_fast.process.trace import Process
from genevolve_fast.process.unified.config import UnifiedConfig
from genevolve_fast.process.unified.model import Unified
from genevolve_fast.process.unified.sampling import Drawing, Drawn, draw
from genevolve_fast.train.collect import stable_seed
from genevolve_fast.trajectory import json_text

DRAWN = "drawn.jsonl"
SAMPLES = "samples"


def write_drawn(folder: Path, requests: Sequence[str], drawn: Sequence[Drawn]) -> None:
    """The k-th draft of the n-th request as `NNN_draft_K.png`, then DRAWN: a line a request with what was written."""
    lines = []
    for n, (request, d) in enumerate(zip(requests, drawn, strict=True)):
        for k, draft in enumerate(d.drafts):
            write_bytes(folder / f"{n:03d}_draft_{k}.png", png_bytes(draft))
        told = {"texts": d.texts, "drafts": len(d.drafts), "steps": d.steps, "ended": d.ended}
        lines.append(json_text({"request": request} | told) + "\n")
    write_text(folder / DRAWN, "".join(lines))


class Samples:
    """The same requests, drawn every so many steps and after the last, into `run/samples/step_N`.

    What is drawn follows from weights and configuration. Nothing is left changed: the noise has generators of its own,
    and the policy goes back to the mode it was in.
    """

    def __init__(self, config: UnifiedConfig, processes: Sequence[Process], run: Path) -> None:
        self._every, self._last = config.samples.every, config.steps
        self._drawing = Drawing(steps=config.samples.steps, seed=config.seed)
        self._folder = run / SAMPLES
        self.requests: tuple[str, ...] = ()
        if self._every:
            own = config.samples.requests
            self.requests = tuple(own or chosen_requests(processes, config.samples.count, config.seed))

    def due(self, step: int) -> bool:
        """Whether `step` steps are a number to draw after."""
        return bool(self._every) and (step % self._every == 0 or step == self._last)

    def draw(self, policy: Unified, step: int) -> None:
        training = policy.training
        policy.eval()
        try:
            drawn = draw(policy, self.requests, self._drawing)
        finally:
            policy.train(training)
        with replacing_folder(self._folder / f"step_{step:06d}") as partial:
            write_drawn(partial, self.requests, drawn)


def chosen_requests(processes: Sequence[Process], count: int, seed: int) -> list[str]:
    """Requests of at most `count` rows, each once, of as many categories as there are."""
    order = np.random.default_rng(stable_seed("samples", seed)).permutation(len(processes))
    rows = list({processes[i].request: processes[i] for i in order}.values())
    met: set[str] = set()
    first, others = [], []
    for row in rows:
        category = str(row.extra.get("category", ""))
        (others if category in met else first).append(row.request)
        met.add(category)
    return [*first, *others][:count]
