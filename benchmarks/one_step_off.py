"""One step off against synchronous, at equal steps: `python -m benchmarks.one_step_off`.

`evolve` of the demo with an engine server that the run starts on the CPU and a judge on loopback that takes its time,
as hosted judges do. Synchronous, a step waits for sampling and judging and then trains; one step off, the next step's
rollouts are sampled and judged meanwhile. Compared are the seconds of all steps, without the start of the server: the
more equal the two parts are, the more there is to win, and never more than half.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from genevolve_fast.trajectory import load
from tests.loopback.judge import LoopbackJudge

COMMAND = "python -m benchmarks.one_step_off"
ROOT = Path(__file__).parent.parent
TIMEOUT_S = 900.0


@dataclass(frozen=True)
class Size:
    steps: int = 6
    prompts: int = 8
    generations: int = 6
    latency_ms: float = 3000.0


@dataclass(frozen=True)
class Pace:
    """Of a run, in seconds: its steps, its waits for rollouts, the updates with another step to come, and what was
    sampled and judged beside them; and for each step, how many updates its rollouts were behind."""

    steps_s: float
    waited_s: float
    updates_s: float
    overlap_s: float
    staleness: tuple[float, ...]


def evolve(runs: Path, staleness: int, size: Size, judge: str) -> Pace:
    """Raises RuntimeError where the run fails, or a rollout is not of the weights that it should be of."""
    name = f"staleness_{staleness}"
    fields = {
        "name": name,
        "steps": size.steps,
        "checkpoint.every": size.steps,
        "pool_size": 100,
        "threads": 1,
        "evaluate.requests": 0,
        "rollout.engine": "server",
        "rollout.server.cpu_servers": 1,
        "rollout.staleness": staleness,
        "rollout.prompts_per_step": size.prompts,
        "rollout.num_generations": size.generations,
        "objective.rollout_is": "token",
        "judge": json.dumps({"kind": "chat", "model": "rules", "base_url": judge, "concurrency": 64}),
    }
    command = [sys.executable, "-m", "genevolve_fast.cli", "evolve", "--config", "demo", "--runs", str(runs)]
    command += [part for field, value in fields.items() for part in ("--set", f"{field}={value}")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S)
    if done.returncode:
        raise RuntimeError(f"evolve ended with status {done.returncode}:\n{done.stderr[-4000:]}")
    folder = runs / name
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    ages = tuple(row["rollout/staleness/max"] for row in rows)
    for step in range(size.steps):
        sampled_by = {t.policy_step for t in load(folder / "rollouts" / f"step_{step:06d}.safetensors")[0]}
        if sampled_by != {max(0, step - staleness)}:
            raise RuntimeError(f"step {step} trained on rollouts of the weights after {sampled_by} updates")
    return Pace(
        sum(row["timing_s/step"] for row in rows),
        sum(row.get("timing_s/wait_rollout", 0) for row in rows),
        sum(row["timing_s/update_actor"] for row in rows[:-1]),
        sum(row.get("perf/overlap_seconds", 0) for row in rows),
        ages,
    )


def measure(runs: Path, size: Size) -> tuple[Pace, Pace]:
    """(synchronous, one step off), after each other on the same judge."""
    with LoopbackJudge(latency_ms=size.latency_ms, train=100) as judge:
        return evolve(runs, 0, size, judge.base_url), evolve(runs, 1, size, judge.base_url)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--steps", type=int, default=6, help="(default: %(default)s)")
    p.add_argument("--latency-ms", type=float, default=3000.0, help="of every judgement (default: %(default)s)")
    p.add_argument("--runs", type=Path, default=None, help="keep the runs in this folder")
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        before, after = measure(args.runs or Path(scratch), Size(steps=args.steps, latency_ms=args.latency_ms))
    print(f"synchronous   {before.steps_s:6.1f} s for {args.steps} steps")
    print(
        f"one step off  {after.steps_s:6.1f} s, of which {after.waited_s:.1f} s waiting for rollouts; "
        f"{after.overlap_s:.1f} s of sampling and judging beside updates"
    )
    print(
        f"{before.steps_s / after.steps_s:.2f} times as fast; updates that the rollouts were behind: {after.staleness}"
    )


if __name__ == "__main__":
    main()
