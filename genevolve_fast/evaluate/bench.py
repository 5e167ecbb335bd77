"""The held-out bench: every request once, the same seeds for every policy, paired differences with an interval."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from genevolve_fast.agent.results import to_row, write_results
from genevolve_fast.agent.session import SessionSettings
from genevolve_fast.files import write_text
from genevolve_fast.protocols import Codec, Engine, World
from genevolve_fast.train.collect import Rollouts, judge_rollouts, sample_rollouts
from genevolve_fast.trajectory import Judged, Request, Trajectory, safe_name

DIMENSIONS = ("faithfulness", "visual_correctness", "text_accuracy", "aesthetics")
BENCH_SEED = 20_260_521


@dataclass(frozen=True)
class BenchRow:
    """One request's scores; `reward` is None when judge or renderer failed."""

    id: str
    category: str
    difficulty: str
    reward: float | None
    kscore: float
    program: float
    faithfulness: float
    visual_correctness: float
    text_accuracy: float
    aesthetics: float
    text_required: bool
    valid: bool
    tokens: int
    rounds: int
    end: str = ""  # why the rollout ended


@dataclass(frozen=True)
class Bench:
    """All rows of one policy, and its rollouts."""

    name: str
    rows: tuple[BenchRow, ...]
    rollouts: Rollouts

    def summary(self) -> dict[str, float]:
        """Means over judged rows (text_accuracy over rows that need text), share of valid programs, count."""
        judged = [r for r in self.rows if r.reward is not None]
        text = [r.text_accuracy for r in judged if r.text_required]
        out = {"n": float(len(self.rows)), "failed": float(len(self.rows) - len(judged))}
        for name in ("reward", "kscore", "program", *DIMENSIONS, "tokens", "rounds"):
            values = text if name == "text_accuracy" else [getattr(r, name) for r in judged]
            out[name] = float(np.mean(values)) if values else float("nan")
        out["valid"] = float(np.mean([r.valid for r in self.rows]))
        return out

    def by_category(self) -> dict[str, float]:
        """Mean reward of each category."""
        names = sorted({r.category for r in self.rows})
        return {
            c: float(np.mean([r.reward for r in self.rows if r.category == c and r.reward is not None])) for c in names
        }


def run_bench(
    name: str,
    requests: Sequence[Request],
    *,
    world: World,
    engine: Engine,
    codec: Codec,
    settings: SessionSettings,
    seed: int = BENCH_SEED,
    wave: int = 64,
    on_done: Callable[[], None] | None = None,
) -> Bench:
    """One rollout of each request; `wave` requests at a time. Equal requests and seed give paired results.

    `settings` are the agent's; rollouts of another kind (World.rolling) have their own.
    """
    trajectories: list[Trajectory] = []
    images: dict[str, np.ndarray] = {}
    pictures: dict[str, np.ndarray] = {}
    for first in range(0, len(requests), wave):
        part = requests[first : first + wave]
        told = dict(world=world, engine=engine, codec=codec, seed=seed, on_done=on_done)
        by_id = {r.id: r for r in part}
        if world.rolling is None:
            rollouts = judge_rollouts(sample_rollouts(part, 1, settings=settings, **told), by_id, world)
        else:
            rollouts = world.rolling.sample(part, 1, step=0, policy_step=None, **told)
            rollouts = world.rolling.judge(rollouts, by_id, world)
        trajectories += rollouts.trajectories
        images |= rollouts.images
        pictures |= rollouts.pictures
    rows = tuple(bench_row(r, t) for r, t in zip(requests, trajectories, strict=True))
    return Bench(name, rows, Rollouts(tuple(trajectories), images, pictures))


def bench_row(request: Request, t: Trajectory) -> BenchRow:
    scores = t.outcome if isinstance(t.outcome, Judged) else Judged(0.0, 0.0, 0.0)
    return BenchRow(
        id=request.id,
        category=request.category,
        difficulty=request.difficulty,
        reward=t.reward,
        kscore=scores.kscore,
        program=scores.program,
        **{name: getattr(scores, name) for name in DIMENSIONS},
        text_required=scores.text_required,
        valid=t.program is not None and not t.error,
        tokens=t.num_loss_tokens,
        rounds=t.rounds,
        end=t.termination,
    )


@dataclass(frozen=True)
class Gain:
    """Mean paired difference with a 95 % bootstrap interval over requests."""

    mean: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}] (n = {self.n})"


def paired_gain(before: Bench, after: Bench, samples: int = 10_000, seed: int = 0) -> Gain:
    """Difference in reward of the same requests, failed ones left out on both sides (percentile bootstrap)."""
    old = {r.id: r.reward for r in before.rows}
    pairs = [(old[r.id], r.reward) for r in after.rows if r.reward is not None and old.get(r.id) is not None]
    if not pairs:
        raise ValueError(f"{before.name} and {after.name} share no judged request")
    return bootstrap([b - a for a, b in pairs], samples, seed)


def bootstrap(values: Sequence[float], samples: int = 10_000, seed: int = 0) -> Gain:
    """Mean of `values` with the 2.5 and 97.5 percentiles of resampled means."""
    x = np.asarray(values, dtype=np.float64)
    draws = np.random.default_rng(seed).integers(0, len(x), (samples, len(x)))
    low, high = np.percentile(x[draws].mean(1), [2.5, 97.5])
    return Gain(float(x.mean()), float(low), float(high), len(x))


def table(benches: Sequence[Bench]) -> str:
    """The bench as text: one line a policy."""
    columns = ("reward", "kscore", "program", *DIMENSIONS, "valid", "tokens", "rounds")
    width = max(len(b.name) for b in benches)
    head = " ".join(f"{c.replace('_', ' ')[:9]:>9}" for c in columns)
    lines = [f"{'':{width}} {head}"]
    for b in benches:
        s = b.summary()
        lines.append(
            f"{b.name:{width}} " + " ".join(f"{s[c]:9.{1 if c in ('tokens', 'rounds') else 3}f}" for c in columns)
        )
    return "\n".join(lines)


def ends(bench: Bench, end: str = "done") -> str:
    """How many rollouts ended why, and the share that ended by `end`, with its 95 % interval (Wilson's)."""
    counted = Counter(r.end for r in bench.rows)
    low, high = share_interval(counted[end], len(bench.rows))
    counts = ", ".join(f"{name} {n}" for name, n in counted.most_common())
    return f"ended: {counts}; {end} {counted[end] / len(bench.rows):.3f} [{low:.3f}, {high:.3f}]"


def share_interval(k: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval of k of n: also where all or none are counted, which resampling takes for certain."""
    share, spread = k / n, z * z / n
    middle, half = share + spread / 2, z * math.sqrt(share * (1 - share) / n + spread / n / 4)
    return max(0.0, (middle - half) / (1 + spread)), min(1.0, (middle + half) / (1 + spread))


def save_bench(bench: Bench, requests: Sequence[Request], folder: Path) -> None:
    """Write `bench.json` (rows and summary), `results.json` in the released format, and every picture as PNG."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    names: dict[str, str] = {}
    for kind, pixels in (("images", bench.rollouts.images), ("pictures", bench.rollouts.pictures)):
        (folder / kind).mkdir(exist_ok=True)
        for key, array in pixels.items():
            names[key] = f"{kind}/{safe_name(key)}.png"  # relative, so that the folder can move
            Image.fromarray(array).save(folder / names[key])
    rows = []
    for request, t in zip(requests, bench.rollouts.trajectories, strict=True):
        row = to_row(request, t)
        if t.program is not None:
            for shown, reference in zip(row["reference_images"], t.program.reference_images, strict=True):
                shown["local_path"] = names.get(reference.sha256, shown["local_path"])
        row |= {"output_path": names.get(t.id, ""), "success": t.id in names}
        rows.append(row)
    write_results(folder / "results.json", rows)
    data = {"name": bench.name, "summary": bench.summary(), "rows": [asdict(r) for r in bench.rows]}
    write_text(folder / "bench.json", json.dumps(data, indent=1))


def save_truth(requests: Sequence[Request], world: World, folder: Path) -> None:
    """The ground-truth picture of every request as PNG, once."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    for request in requests:
        Image.fromarray(world.truth(request)).save(folder / f"{safe_name(request.id)}.png")


def load_bench(folder: Path) -> Bench:
    """Rows of a saved bench; its rollouts are not read back."""
    data: Mapping = json.loads((folder / "bench.json").read_text(encoding="utf-8"))
    return Bench(data["name"], tuple(BenchRow(**r) for r in data["rows"]), Rollouts((), {}, {}))
