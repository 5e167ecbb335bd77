"""A step's rollouts on several ranks: each samples groups of its own, or the first lets servers sample for all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from genevolve_fast import trajectory as trajectories
from genevolve_fast.policy.model import Policy
from genevolve_fast.train.collect import Rollouts
from genevolve_fast.train.pipelined import InTurn
from genevolve_fast.train.stopping import Stopping
from genevolve_fast.train.strategies import Strategy
from genevolve_fast.trajectory import Request


def rollouts_file(folder: Path, step: int, part: str = "") -> Path:
    """Where a run keeps a step's rollouts, and a rank its part of them until all are done."""
    return folder / "rollouts" / f"step_{step:06d}{part}.safetensors"


class Together:
    """A rank's sampler among others; one process alone uses it as it is.

    `sampler` is none on ranks that do not sample. `parts`: every rank samples its own groups.
    """

    def __init__(
        self, sampler: InTurn | None, folder: Path, policy: Policy, strategy: Strategy, stopping: Stopping, parts: bool
    ) -> None:
        self._sampler, self._folder, self._policy = sampler, folder, policy
        self._strategy, self._stopping = strategy, stopping
        self._ranks = strategy.ranks
        self.parts = parts and self._ranks.world > 1
        self._places: dict[str, int] = {}

    def mine(self, requests: Sequence[Request], step: int) -> tuple[Sequence[Request], Path]:
        """(this rank's requests of a step, the file of their rollouts)."""
        whole = rollouts_file(self._folder, step)
        if not self.parts or whole.exists():
            return requests, whole
        self._places = {r.id: i for i, r in enumerate(requests)}
        rank, world = self._ranks.rank, self._ranks.world
        return requests[rank::world], rollouts_file(self._folder, step, f".part_{rank}_of_{world}")

    def next(self, step: int) -> Rollouts:
        """The step's judged rollouts, the same on all ranks; pictures on the first."""
        whole, made = rollouts_file(self._folder, step), []
        known = self._ranks.from_first(whole.exists)
        sampling = self._sampler is not None and (self._ranks.first or (self.parts and not known))

        def collect() -> None:
            if sampling:
                made.append(self._sampler.next(step))

        with self._strategy.whole(self._policy):
            self._stopping.alone(collect, anytime=True)
        if self._ranks.world == 1:
            return made[0]
        pictures = self._ranks.to_first(dict(made[0].pictures) if made else {})
        if self.parts and not known:
            self._ranks.from_first(lambda: self._merge(step, whole))
        told, images = trajectories.load(whole)
        return Rollouts(told, images, {k: v for part in pictures for k, v in part.items()})

    def _merge(self, step: int, whole: Path) -> None:
        """All parts in one file, groups in their order."""
        world = self._ranks.world
        files = [rollouts_file(self._folder, step, f".part_{r}_of_{world}") for r in range(world)]
        told, images = [], {}
        for file in files:
            some, pixels = trajectories.load(file)
            told += some
            images |= pixels
        trajectories.save(whole, sorted(told, key=lambda t: self._places[t.request_id]), images)
        for stale in whole.parent.glob(f"{whole.stem}.part_*"):
            stale.unlink()

    def wait(self, step: int) -> None:
        """Until nothing is sampled. Raises Preempted."""
        self._stopping.alone(lambda: self._sampler and self._sampler.wait(step), anytime=True)

    def sync(self, version: int) -> None:
        """Give the engine the weights as they are after `version` updates."""

        def update() -> None:
            if self._sampler is not None:
                self._sampler.sync(version)

        with self._strategy.whole(self._policy):
            self._stopping.alone(update, anytime=False)

    def metrics(self) -> dict[str, float]:
        return self._ranks.from_first(lambda: self._sampler.metrics())
