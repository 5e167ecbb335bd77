"""Evolution through outages: every server is killed in the middle of a run. `python -m benchmarks.outages`.

`evolve` of configs/genevolve_8b.yaml with the tiny policy, against processes on loopback. `sampling`: an engine server
that speaks vLLM's protocols, a search server and an image host. `scoring`: a render service, an image API, and a chat
server that judges and compares. Each is killed without a goodbye while rollouts need it, the engine once more while the
trainer trains, and comes back with what it had at its start. Counted are the rollouts that got no reward or are not
there. At last the scored run is made again from its caches alone, with nobody to ask.
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
from tests.loopback.canvas_service import LoopbackCanvas
from tests.loopback.engine import LoopbackEngine
from tests.loopback.judge import LoopbackJudge
from tests.loopback.render_service import LoopbackRenderService, faulty
from tests.loopback.web import LoopbackWeb

COMMAND = "python -m benchmarks.outages"
ROOT = Path(__file__).parent.parent
NAME = "outages"
KEY = "LOOPBACK_KEY"
TIMEOUT_S = 900.0


@dataclass(frozen=True)
class Outage:
    """`server` dies `after` seconds into `phase` of `step` and is gone for `seconds`."""

    server: str
    step: int
    phase: str
    after: float = 0.5
    seconds: float = 2.0


SAMPLING = (
    Outage("engine", 1, "rollout"),
    Outage("images", 2, "rollout", after=0.1),
    Outage("search", 3, "rollout", after=0.1),  # last of the two: without search nobody finds a picture
    Outage("engine", 3, "update_actor", after=0.0, seconds=6.0),  # the new weights find nobody
)
SCORING = (  # steps apart: renderer and image API are counted alike, and each must have been hit itself
    Outage("renderer", 0, "judge", after=0.0),
    Outage("judge", 1, "experience", after=0.0),  # while it compares
    Outage("image_api", 2, "judge", after=0.0),
    Outage("judge", 3, "judge", after=0.0),
)
SOURCES = {  # who counts the failures of a server
    "engine": ("engine",),
    "search": ("search",),
    "images": ("image_download",),
    "renderer": ("render",),
    "image_api": ("render",),
    "judge": ("image_judge", "program_judge", "summarizer"),
}


@dataclass(frozen=True)
class Survived:
    """What a run through outages left."""

    rollouts: int  # that there had to be
    lost: Mapping[str, int]  # those without a reward, by reason
    failures: Mapping[str, float]  # failed attempts of the run, by who and how

    @property
    def num_lost(self) -> int:
        return sum(self.lost.values())


@dataclass(frozen=True)
class Size:
    steps: int = 5
    prompts: int = 8
    generations: int = 6


def sample_through(runs: Path, size: Size = Size(), *, outages: Sequence[Outage] = SAMPLING) -> Survived:
    """Evolve while engine, search and image host die. Raises RuntimeError where it fails or nothing was hit."""
    runs.mkdir(parents=True, exist_ok=True)
    with (
        LoopbackEngine("--return-sampling-mask") as engine,
        LoopbackWeb() as images,
        LoopbackWeb(image_host=images.url) as search,
    ):
        fields = SCORED_HERE | {
            "rollout.engine": "server",
            "rollout.server.urls": json.dumps([engine.url]),
            "rollout.server.sync_dir": str(runs / "weights"),
            "tools.base_url": search.url,
            "tools.allow_hosts": json.dumps(["127.0.0.1"]),
            "tools.image_dir": str(runs / "images"),
        }
        servers = {"engine": engine, "search": search, "images": images}
        evolve(runs, fields, size, servers, outages)
    return count(runs / NAME, size, outages)


def score_through(runs: Path, size: Size = Size(), *, outages: Sequence[Outage] = SCORING) -> Survived:
    """Evolve while render service, image API and judge die; then again from the caches, with all of them gone.

    Raises RuntimeError where it fails, nothing was hit, or the second run differs in a bit.
    """
    runs.mkdir(parents=True, exist_ok=True)
    with (
        LoopbackRenderService(*faulty(seconds=0.1)) as renderer,  # slow enough to be killed at work
        LoopbackCanvas() as image_api,
        LoopbackJudge(latency_ms=200, seed=SEED, train=POOL) as judge,
    ):
        fields = SAMPLED_HERE | scored_by(renderer.url, image_api.gemini, judge.base_url, runs / "cache", "record")
        servers = {"renderer": renderer, "image_api": image_api, "judge": judge}
        evolve(runs, fields, size, servers, outages)
        nobody = scored_by(renderer.url, image_api.gemini, judge.base_url, runs / "cache", "replay")
    again = runs / "again"
    evolve(again, SAMPLED_HERE | nobody, size, {}, ())
    same = [_outcomes(folder / NAME, size.steps) for folder in (runs, again)]
    if same[0] != same[1]:
        raise RuntimeError("the run from the caches alone has other outcomes than the one that filled them")
    return count(runs / NAME, size, outages)


SEED, POOL = 42, 400
SCORED_HERE = {"data.path": "sandbox", "renderer": "{}", "judge": "{}", "summarizer": "{}", "embedder": "{}"}
SAMPLED_HERE = {
    "rollout.observe_images": "tokens",  # as the shipped policy learnt it: without pictures it names no reference
    "data.path": "sandbox",
    "pool_size": POOL,
    "seed": SEED,
    "embedder": "{}",
    "rollout.engine": "transformers",
    "rollout.replay_sampling_mask": "false",
    "rollout.top_p": 1.0,
    "tools.kind": "sandbox",
}


def scored_by(renderer: str, image_api: str, judge: str, cache: Path, mode: str) -> dict[str, object]:
    """Fields of a run whose programs are drawn and judged by servers."""

    def section(name: str, **fields: object) -> dict[str, str]:
        return {name: json.dumps(fields | {"cache": str(cache / name), "cache_mode": mode})}

    without_references = {"kind": "nano-banana", "base_url": image_api, "api_key_env": KEY}
    chat = {"kind": "chat", "model": "rules", "base_url": judge}
    return {
        **section("renderer", kind="qwen-service", urls=[renderer], text_to_image=without_references),
        **section("judge", **chat),
        **section("summarizer", **chat),
    }


def evolve(runs: Path, fields: Mapping[str, object], size: Size, servers: Mapping, outages: Sequence[Outage]) -> None:
    """The paper's configuration with the model swapped for the tiny policy, in a process of its own."""
    fields = {
        "name": NAME,
        "steps": size.steps,
        "checkpoint.every": 1,
        "policy.path": "sandbox:start",
        "policy.dtype": "float32",
        "optim.lr": 5e-5,  # the weights must move, or stale ones would not show
        "world.system_prompt": "short",
        "rollout.prompts_per_step": size.prompts,
        "rollout.num_generations": size.generations,
        "rollout.max_tokens_per_turn": 160,
        **fields,
    }
    config = ROOT / "configs" / "genevolve_8b.yaml"
    command = [sys.executable, "-m", "genevolve_fast.cli", "evolve", "--config", str(config), "--runs", str(runs)]
    command += [part for name, value in fields.items() for part in ("--set", f"{name}={value}")]
    runs.mkdir(parents=True, exist_ok=True)
    _run(command, servers, outages, runs / NAME, runs / "evolve.log", TIMEOUT_S)


def _run(command, servers, outages: Sequence[Outage], folder: Path, log: Path, timeout: float) -> None:
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "SERPER_API_KEY": "loopback",
        KEY: "loopback",
        "OMP_NUM_THREADS": "1",
    }
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


def count(folder: Path, size: Size, outages: Sequence[Outage]) -> Survived:
    """What the run left in `folder`. Raises RuntimeError where an outage left no trace: it would prove nothing."""
    per_step = size.prompts * size.generations
    lost: Counter[str] = Counter()
    for outcomes in _outcomes(folder, size.steps):
        lost["missing"] += per_step - len(outcomes)
        failed = [o for o in outcomes if not isinstance(o, Judged)]
        lost.update(f"{o.stage}: {o.reason}" if isinstance(o, Failed) else "not judged" for o in failed)
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    failures = [
        {k: v for k, v in step.items() if k.startswith(("failures/", "tool_errors/"))}
        for step in sorted(steps, key=lambda row: row["step"])
    ]
    for outage in outages:
        seen = [failures[outage.step], *failures[outage.step + 1 : outage.step + 2]]  # an update's go to the next step
        told = tuple(f"failures/{source}/" for source in SOURCES[outage.server])
        if not any(what.startswith(told) for step in seen for what in step):
            raise RuntimeError(f"{outage} hit nothing: {failures}")
    together: Counter[str] = Counter()
    for step in failures:
        together.update(step)
    return Survived(size.steps * per_step, +lost, dict(sorted(together.items())))


def _outcomes(folder: Path, steps: int) -> list[list]:
    """The outcomes of every step's rollouts, in their order."""
    files = (folder / "rollouts" / f"step_{step:06d}.safetensors" for step in range(steps))
    return [[t.outcome for t in trajectory.load(file)[0]] for file in files]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", choices=["sampling", "scoring"], help="one of the two; nothing is recorded")
    p.add_argument("--steps", type=int, default=5, help="(default: %(default)s)")
    p.add_argument("--runs", type=Path, default=None, help="keep the runs in this folder")
    p.add_argument("--file", type=Path, default=DEFAULT_FILE, help="scoreboard (default: %(default)s)")
    args = p.parse_args()
    parts = {"sampling": sample_through, "scoring": score_through}
    survived = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in [args.only] if args.only else parts:
            survived[name] = parts[name]((args.runs or Path(scratch)) / name, Size(steps=args.steps))
            lost = {f"lost: {k}": v for k, v in survived[name].lost.items()}
            for what, times in {**survived[name].failures, **lost}.items():
                print(f"{name:10} {what:44} {times:g}")
    lost, rollouts = (sum(getattr(s, n) for s in survived.values()) for n in ("num_lost", "rollouts"))
    print(f"{lost} of {rollouts} rollouts lost")
    if not args.only:
        record("serve/lost_rollouts", lost, n=rollouts, command=COMMAND, file=args.file)


if __name__ == "__main__":
    main()
