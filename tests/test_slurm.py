"""The SLURM job of docs/slurm, with stand-ins for srun and scontrol: torchrun, ranks and checkpoints are real."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from loopback.web import free_port

ROOT = Path(__file__).parents[1]
STAND_INS = {
    "srun": 'exec "$@"',
    "scontrol": 'if [ "$1" = show ]; then echo localhost; else echo "$@" >> "$REQUEUED"; fi',
    "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"',
}
pytestmark = pytest.mark.slow


class Job:
    """One start of the job on this machine, as a node of two GPUs; `ended` waits for it."""

    def __init__(self, folder: Path, *flags: str) -> None:
        self.requeued = folder / "requeued"
        bin_ = folder / "bin"
        bin_.mkdir(exist_ok=True)
        for name, body in STAND_INS.items():
            (bin_ / name).write_text(f"#!/bin/bash\n{body}\n")
            (bin_ / name).chmod(0o755)
        self.environment = os.environ | {
            "PATH": f"{bin_}:{os.environ['PATH']}", "REQUEUED": str(self.requeued), "CONFIG": "demo",
            "RUN": str(folder / "runs" / "job"), "PORT": str(free_port()), "OMP_NUM_THREADS": "1",
            "SLURM_JOB_ID": "7", "SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "n1", "SLURM_GPUS_ON_NODE": "2",
        }  # fmt: skip
        few = {"rollout.prompts_per_step": 2, "rollout.num_generations": 3, "evaluate.requests": 0, "threads": 1}
        sets = [x for name, value in few.items() for x in ("--set", f"{name}={value}")]
        command = ["bash", "docs/slurm/evolve.sbatch", *sets, *flags]
        self._log = (folder / "log").open("ab")
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=self.environment, stdout=self._log, stderr=self._log, start_new_session=True
        )

    def ended(self) -> list[str]:
        """What was asked of scontrol besides host names."""
        self.process.wait(300)
        self._log.close()
        return self.requeued.read_text().splitlines() if self.requeued.exists() else []


def children(pid: int) -> list[int]:
    found = [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [*found, *(c for p in found for c in children(p))]


def test_a_job_that_is_asked_to_end_is_queued_again_and_goes_on_and_one_that_fails_is_not(tmp_path):
    run = tmp_path / "runs" / "job"
    steps = ["--set", "checkpoint.every=3", "--set", "distributed.strategy=zero2"]
    job = Job(tmp_path, "--set", "steps=3", *steps)
    deadline = time.time() + 240
    while not (run / "metrics.jsonl").exists() or not (run / "metrics.jsonl").read_text():
        assert job.process.poll() is None and time.time() < deadline, (tmp_path / "log").read_text()[-3000:]
        time.sleep(0.05)
    for pid in children(job.process.pid):  # SLURM signals every process of the step, and not the batch script
        os.kill(pid, signal.SIGTERM)
    assert job.ended() == ["requeue 7"], (tmp_path / "log").read_text()[-3000:]
    assert list((run / "checkpoints").glob("step_*")) and not (run / "policy").exists()
    assert Job(tmp_path, "--set", "steps=3", *steps).ended() == ["requeue 7"], "done: nothing more was asked"
    assert (run / "policy" / "model.safetensors").exists()
    (run / "policy").rename(tmp_path / "policy")
    assert Job(tmp_path, "--set", "steps=1").ended() == ["requeue 7"], "another configuration is refused, for good"
