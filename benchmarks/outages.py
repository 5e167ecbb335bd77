"""Evolution through outages: every server is killed in the middle of a run. `python -m benchmarks.outages`.

`evolve` of configs/genevolve_8b.yaml with the tiny policy, against processes on loopback: an engine server that speaks
vLLM's protocols, a search server and an image host. Each is killed without a goodbye while rollouts need it, the engine
once more while the trainer trains, and comes back with what it had at its start. Counted are the rollouts that got no
reward or are not there.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from genevolve_fast import trajectory
from genevolve_fast.evaluate.scoreboard import DEFAULT_FILE, record
from genevolve_fast.trajectory import Failed, Judged
from tests.loopback.engine import LoopbackEngine
from tests.loopback.web import LoopbackWeb

COMMAND = "python -m benchmarks.outages"
ROOT = Path(__file__).parent.parent
NAME = "outages"


@dataclass(frozen=True)
class Outage:
    """`server` dies `after` seconds into `phase` of `step` and is gone for `seconds`."""

    server: str
    step: int
    phase: str
    after: float = 0.5
    seconds: float = 2.0


OUTAGES = (
    Outage("engine", 1, "rollout"),
    Outage("images", 2, "rollout", after=0.1),
    Outage("search", 3, "rollout", after=0.1),  # last of the two: without search nobody finds a picture
    Outage("engine", 3, "update_actor", after=0.0, seconds=6.0),  # the new weights find nobody
)


@dataclass(frozen=True)
class Survived:
    """What a run through outages left."""

    rollouts: int  # that there had to be
    lost: Mapping[str, int]  # those without a reward, by reason
    failures: Mapping[str, float]  # failed attempts of the run, by who and how

    @property
    def num_lost(self) -> int:
        return sum(self.lost.values())


def evolve_through(
    runs: Path,
    *,
    steps: int = 5,
    prompts: int = 8,
    generations: int = 6,
    outages: Sequence[Outage] = OUTAGES,
    timeout: float = 900,
) -> Survived:
    """Run evolve in a process of its own while servers die. Raises RuntimeError where it fails or nothing was hit."""
    folder = runs / NAME
    runs.mkdir(parents=True, exist_ok=True)
    with (
        LoopbackEngine("--return-sampling-mask") as engine,
        LoopbackWeb() as images,
        LoopbackWeb(image_host=images.url) as search,
    ):
        command = evolve_command(runs, engine.url, search.url, steps, prompts, generations)
        servers = {"engine": engine, "search": search, "images": images}
        _run(command, servers, outages, folder, runs / "evolve.log", timeout)
    return count(folder, steps, prompts * generations, outages)


def evolve_command(runs: Path, engine: str, search: str, steps: int, prompts: int, generations: int) -> list[str]:
    """The paper's configuration with the model swapped for the tiny policy and the services for loopback."""
    fields = {
        "name": NAME,
        "steps": steps,
        "checkpoint.every": 1,
        "policy.path": "sandbox:start",
        "policy.dtype": "float32",
        "optim.lr": 5e-5,  # the weights must move, or stale ones would not show
        "world.system_prompt": "short",
        "rollout.engine": "server",
        "rollout.server.urls": json.dumps([engine]),
        "rollout.server.sync_dir": str(runs / "weights"),
        "rollout.prompts_per_step": prompts,
        "rollout.num_generations": generations,
        "rollout.max_tokens_per_turn": 160,
        "tools.base_url": search,
        "tools.allow_hosts": json.dumps(["127.0.0.1"]),
        "tools.image_dir": str(runs / "images"),
    }
    config = ROOT / "configs" / "genevolve_8b.yaml"
    command = [sys.executable, "-m", "genevolve_fast.cli", "evolve", "--config", str(config), "--runs", str(runs)]
    return command + [part for name, value in fields.items() for part in ("--set", f"{name}={value}")]


def _run(command, servers, outages: Sequence[Outage], folder: Path, log: Path, timeout: float) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "SERPER_API_KEY": "loopback", "OMP_NUM_THREADS": "1"}
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment, cwd=ROOT)
    phases = folder / "phases.jsonl"
    breakers = [threading.Thread(target=_break, args=(phases, o, servers[o.server], process)) for o in outages]
    for breaker in breakers:
        breaker.start()
    try:
        status = process.wait(timeout)
    finally:
        process.kill()
        for breaker in breakers:
            breaker.join()
    if status:
        raise RuntimeError(f"evolve ended with status {status}:\n{log.read_text()[-4000:]}")


def _break(phases: Path, outage: Outage, server, process: subprocess.Popen) -> None:
    """Wait for the outage's phase, let the server die and come back."""
    while not _began(phases, outage):
        if process.poll() is not None:
            return
        time.sleep(0.02)
    time.sleep(outage.after)
    server.kill()
    time.sleep(outage.seconds)
    server.start()


def _began(phases: Path, outage: Outage) -> bool:
    if not phases.exists():
        return False
    rows = [json.loads(line) for line in phases.read_text().splitlines() if line.endswith("}")]
    return any((row["step"], row["phase"]) == (outage.step, outage.phase) for row in rows)


def count(folder: Path, steps: int, per_step: int, outages: Sequence[Outage]) -> Survived:
    """What the run left in `folder`. Raises RuntimeError where an outage left no trace: it would prove nothing."""
    lost: Counter[str] = Counter()
    for step in range(steps):
        rollouts, _ = trajectory.load(folder / "rollouts" / f"step_{step:06d}.safetensors")
        lost["missing"] += per_step - len(rollouts)
        failed = [t.outcome for t in rollouts if not isinstance(t.outcome, Judged)]
        lost.update(f"{o.stage}: {o.reason}" if isinstance(o, Failed) else "not judged" for o in failed)
    failures: Counter[str] = Counter()
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        failures.update({k: v for k, v in json.loads(line).items() if k.startswith(("failures/", "tool_errors/"))})
    sources = {"engine": "engine", "search": "search", "images": "image_download"}
    for outage in outages:
        if not any(what.startswith(f"failures/{sources[outage.server]}/") for what in failures):
            raise RuntimeError(f"{outage} hit nothing: {dict(failures)}")
    return Survived(steps * per_step, +lost, dict(sorted(failures.items())))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--steps", type=int, default=5, help="(default: %(default)s)")
    p.add_argument("--runs", type=Path, default=None, help="keep the run in this folder")
    p.add_argument("--file", type=Path, default=DEFAULT_FILE, help="scoreboard (default: %(default)s)")
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        survived = evolve_through(args.runs or Path(scratch), steps=args.steps)
    for what, times in {**survived.failures, **{f"lost: {k}": v for k, v in survived.lost.items()}}.items():
        print(f"{what:44} {times:g}")
    record("serve/lost_rollouts", survived.num_lost, n=survived.rollouts, command=COMMAND, file=args.file)


if __name__ == "__main__":
    main()
