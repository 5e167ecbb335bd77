"""How long a run takes from SIGTERM to its end with a checkpoint of the last whole step.

`python -m benchmarks.preempt` starts evolve, by torchrun on two ranks where the strategy is not alone, waits until a
later step samples, judges or trains, sends SIGTERM to the launcher as a scheduler does, and takes the time until all
processes are gone. Each run must leave a checkpoint of every step that was whole and resume from it. Where it is lost
or the workers do not end with status 0, the time counts as infinite.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from genevolve_fast.evaluate.scoreboard import record
from genevolve_fast.rollout.server_processes import free_port

PHASES = ("rollout", "judge", "update_actor")
STRATEGIES = ("alone", "ddp", "zero2", "zero3", "fsdp2")
PATIENCE_S = 120.0


def command(strategy: str, folder: Path, steps: int) -> list[str]:
    """evolve of the sandbox in small steps, with a teacher, a reference and no checkpoint of its own."""
    settings = dict(
        name="run", steps=steps, threads=1, teacher="ema", pool_size=64,
    ) | {
        "rollout.prompts_per_step": 4, "rollout.num_generations": 3, "evaluate.requests": 0,
        "objective.kl_coef": 0.001, "policy.gradient_checkpointing": "true", "checkpoint.every": steps,
    }  # fmt: skip
    if strategy != "alone":
        settings["distributed.strategy"] = strategy
    launch = [sys.executable, "-m"]
    if strategy != "alone":
        launch += ["torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port()), "-m"]
    sets = [x for name, value in settings.items() for x in ("--set", f"{name}={value}")]
    return [*launch, "genevolve_fast.cli", "evolve", "--config", "demo", "--runs", str(folder), *sets]


def seconds_to_end(strategy: str, phase: str) -> float:
    """From the signal to the end of the last process; infinite where something was lost."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        run, log = Path(folder) / "run", Path(folder) / "log"
        with log.open("wb") as told:
            started = subprocess.Popen(
                command(strategy, Path(folder), 50), stdout=told, stderr=told, env=environment, start_new_session=True
            )
            try:
                step = _reached(run / "phases.jsonl", phase, started)
                begin = time.perf_counter()
                started.send_signal(signal.SIGTERM)
                started.wait(PATIENCE_S)
                while _alive(started.pid) and time.perf_counter() - begin < PATIENCE_S:
                    time.sleep(0.05)
                took = time.perf_counter() - begin
            finally:
                _kill(started.pid)
        if not any((run / "checkpoints" / f"step_{n:06d}" / "trainer.pt").exists() for n in (step, step + 1)):
            print(f"{strategy}, {phase}: no checkpoint of step {step}\n{log.read_text()[-2000:]}", file=sys.stderr)
            return math.inf
        done = max(json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines())
        again = subprocess.run(
            [*command(strategy, Path(folder), 50), "--resume", "--set", "minutes=0.001"],
            capture_output=True, text=True, env=environment, timeout=300,
        )  # fmt: skip
        if again.returncode or not (run / "policy" / "config.json").exists() or done < step:
            print(f"{strategy}, {phase}: does not resume\n{again.stderr[-2000:]}", file=sys.stderr)
            return math.inf
        return took


def _reached(phases: Path, phase: str, started: subprocess.Popen, after: int = 2) -> int:
    """Wait until a step of at least `after` is in a phase; the step."""
    deadline = time.time() + 300
    while time.time() < deadline:
        if started.poll() is not None:
            raise RuntimeError(f"the run ended with status {started.returncode} before it was asked to")
        lines = phases.read_text().splitlines() if phases.exists() else []
        last = json.loads(lines[-1]) if lines and lines[-1].endswith("}") else {}
        if last.get("phase") == phase and last["step"] >= after:
            return last["step"]
        time.sleep(0.005)
    raise RuntimeError(f"no step reached {phase}")


def _alive(session: int) -> bool:
    """Whether a process of the launcher's session is left."""
    return bool(subprocess.run(["pgrep", "-s", str(session)], capture_output=True).stdout)


def _kill(session: int) -> None:
    subprocess.run(["pkill", "-9", "-s", str(session)], check=False)


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--only", nargs="*", default=STRATEGIES, choices=STRATEGIES)
    p.add_argument("--phases", nargs="*", default=PHASES, choices=PHASES)
    p.add_argument("--record", action="store_true", help="write the longest time to the scoreboard")
    args = p.parse_args(argv)
    worst, count = 0.0, 0
    for strategy in args.only:
        for phase in args.phases:
            took = seconds_to_end(strategy, phase)
            worst, count = max(worst, took), count + 1
            print(f"{strategy}, in {phase}: {took:.2f} s", flush=True)
    print(f"scale/sigterm_seconds {worst:.2f} (n = {count})")
    if args.record:
        record("scale/sigterm_seconds", worst, n=count, command="python -m benchmarks.preempt --record")
    return 0 if worst <= 30 else 1


if __name__ == "__main__":
    raise SystemExit(main())
