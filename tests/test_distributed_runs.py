"""`evolve` and `sft` of two processes that torchrun starts: the same run, its files, and how it ends and goes on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from test_failures import small_disk

from genevolve_fast.policy.model import Policy
from genevolve_fast.policy.shards import FOLDER, in_shards
from genevolve_fast.train.checkpoint import checkpoints, step_of
from genevolve_fast.train.sharded import weight_readers
from genevolve_fast.trajectory import load

ROOT = Path(__file__).parents[1]
EVOLVE = {
    "name": "t",
    "steps": 3,
    "threads": 1,
    "pool_size": 40,
    "rollout.prompts_per_step": 3,
    "rollout.num_generations": 3,
    "rollout.temperature": 1.0,
    "experience.min_gap": 0.1,
    "objective.kl_coef": 0.001,
    "optim.lr": 1e-4,
    "evaluate.requests": 0,
    "checkpoint.every": 1,
    "checkpoint.keep_last": 3,
}
SFT = {
    "name": "t",
    "threads": 1,
    "epochs": 1,
    "batch_size": 4,
    "max_tokens_per_microbatch": 2048,
    "policy.path": "sandbox:start",
    "policy.freeze_vision": "true",
    "save_dtype": "null",
    "data.recitations": 0,
    "optim.name": "adamw",
    "optim.lr": 1e-4,
    "checkpoint.every": 100,
}
ENDS_WITHIN_S = 30.0


def command_line(command: str, fields: dict, ranks: int) -> list[str]:
    config = {"evolve": "demo", "sft": "sandbox_sft"}[command]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    argv = [sys.executable, *launcher, "-m", "genevolve_fast.cli", command, "--config", config]
    return argv + [part for name, value in fields.items() for part in ("--set", f"{name}={value}")]


@contextmanager
def started(runs: Path, command: str, fields: dict, *, ranks: int = 2, resume: bool = False) -> Iterator:
    """A launcher of `ranks` processes, or one process without; nothing of it is left behind."""
    mark = f"RUN_OF_THE_TEST={runs}-{time.time_ns()}"
    environment = os.environ | dict([mark.split("=")])
    environment |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONWARNINGS": "ignore"}
    argv = [*command_line(command, fields, ranks), "--runs", str(runs), *(["--resume"] if resume else [])]
    with (runs / "log").open("a") as log:
        process = subprocess.Popen(argv, cwd=ROOT, env=environment, stdout=log, stderr=log)
    try:
        yield process
        process.wait(120)
        until = time.time() + 10
        while (left := alive(mark)) and time.time() < until:
            time.sleep(0.1)
        assert not left, f"processes stayed behind\n{said(runs)}"
    finally:
        for pid in alive(mark):
            os.kill(pid, signal.SIGKILL)
        process.wait()


def alive(mark: str) -> list[int]:
    """Processes with this in their environment; the launcher gives each rank a session of its own."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):
            if mark.encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                found.append(int(pid))
    return found


def run(runs: Path, command: str, fields: dict, **how) -> None:
    runs.mkdir(exist_ok=True)
    with started(runs, command, fields, **how) as process:
        assert process.wait(400) == 0, said(runs)


def said(runs: Path) -> str:
    return (runs / "log").read_text()[-9000:]


def workers(launcher: subprocess.Popen) -> dict[int, int]:
    """Process ids by rank."""
    found = {}
    for pid in map(int, Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()):
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        found |= {int(v[5:]): pid for v in variables if v.startswith(b"RANK=")}
    return found


def wait_for(runs: Path, process: subprocess.Popen, phase: str, step: int, after: int = 0) -> None:
    """Until a phase of a step begins, beyond the first `after` bytes of phases.jsonl."""
    log, until = runs / "t" / "phases.jsonl", time.time() + 240
    while time.time() < until and process.poll() is None:
        lines = log.read_bytes()[after:].decode().splitlines() if log.exists() else []
        begun = [json.loads(line) for line in lines if line.endswith("}")]
        if any(b["phase"] == phase and b["step"] == step for b in begun):
            return
        time.sleep(0.002)
    raise AssertionError(f"{phase} of step {step} never began\n{said(runs)}")


def measured(runs: Path) -> list[dict]:
    """What two runs have in common: no times, memory, or what is per rank."""
    file = runs / "t" / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    apart = ("timing", "memory", "perf", "tokens/largest")
    return [{k: v for k, v in r.items() if not k.startswith(apart)} for r in rows]


def same_metrics(ours: list[dict], theirs: list[dict], tolerance: float) -> bool:
    return len(ours) == len(theirs) and all(
        a == pytest.approx(b, abs=tolerance) for a, b in zip(ours, theirs, strict=True)
    )


def sampled(runs: Path) -> list[list[tuple[str, bytes]]]:
    """(request, tokens) of every step's rollouts."""
    files = sorted((runs / "t" / "rollouts").glob("*.safetensors"))
    return [[(t.request_id, t.ids.tobytes()) for t in load(file)[0]] for file in files]


@pytest.fixture(scope="module")
def alone(once):
    """One process."""
    return once("evolve_alone", lambda runs: run(runs, "evolve", EVOLVE, ranks=1))


@pytest.fixture(scope="module")
def two(once):
    """Two ranks under FSDP2."""
    return once("evolve_fsdp2", lambda runs: run(runs, "evolve", EVOLVE | {"distributed.strategy": "fsdp2"}))


def check_files(runs: Path, steps: int) -> None:
    folder = runs / "t"
    assert [r["step"] for r in measured(runs)] == list(range(1, steps + 1))
    begun = [json.loads(line) for line in (folder / "phases.jsonl").read_text().splitlines()]
    assert [b["step"] for b in begun if b["phase"] == "update_actor"] == list(range(steps))  # one rank writes
    left = {p.name for p in folder.rglob("*") if "part" in p.name or p.name.endswith(".tmp")}
    assert not left, left
    policy = Policy.from_pretrained(folder / "policy")
    held = dict(policy.model.named_parameters())
    final = checkpoints(folder / "checkpoints")[-1]
    assert step_of(final) == steps
    if in_shards(final / "policy"):
        kept = {n: read() for n, read in weight_readers(final / FOLDER).items()}
    else:
        kept = dict(Policy.from_pretrained(final / "policy").model.named_parameters())
    assert len(kept) > 10 and all(torch.equal(held[n], w.to(held[n].dtype)) for n, w in kept.items())


# --- the same run -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_ranks_evolve_as_one_process(alone, two):
    assert sampled(two) == sampled(alone) and same_metrics(measured(two), measured(alone), 1e-4)
    check_files(two, EVOLVE["steps"])


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
def test_strategies_evolve_as_one_process(alone, tmp_path, strategy):
    run(tmp_path, "evolve", EVOLVE | {"distributed.strategy": strategy})
    assert sampled(tmp_path) == sampled(alone) and same_metrics(measured(tmp_path), measured(alone), 1e-4)
    check_files(tmp_path, EVOLVE["steps"])


@pytest.mark.slow
def test_one_process_goes_on_where_two_ranks_stopped(alone, two, tmp_path):
    folder = Path(shutil.copytree(two / "t", tmp_path / "t"))
    shutil.rmtree(folder / "policy")
    shutil.rmtree(folder / "checkpoints" / "step_000003")
    for file in (folder / "rollouts").glob("step_000002.*"):  # of the last step
        file.unlink()
    run(tmp_path, "evolve", EVOLVE, ranks=1, resume=True)
    assert sampled(tmp_path) == sampled(alone) and same_metrics(measured(tmp_path), measured(alone), 1e-4)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    from genevolve_fast.sandbox.bootstrap import write_demonstrations
    from genevolve_fast.sandbox.world import SandboxWorld

    folder = tmp_path_factory.mktemp("d")
    return {"data.path": write_demonstrations(SandboxWorld(), folder, count=18, experience_share=0.3, seed=0)}


@pytest.fixture(scope="module")
def sft_alone(data, once):
    return once("sft_alone", lambda runs: run(runs, "sft", SFT | data, ranks=1))


@pytest.mark.slow
def test_two_ranks_fine_tune_as_one_process(sft_alone, data, tmp_path):
    """18 samples in batches of four: the last step has two."""
    run(tmp_path, "sft", SFT | data | {"distributed.strategy": "zero2"})
    assert same_metrics(measured(tmp_path), measured(sft_alone), 1e-4)
    check_files(tmp_path, 5)


# --- asked to end -----------------------------------------------------------------------------------------------------

Ask = Callable[[subprocess.Popen], None]


def ask_launcher(process: subprocess.Popen) -> None:
    process.terminate()


def ask_last_rank(process: subprocess.Popen) -> None:
    os.kill(workers(process)[1], signal.SIGTERM)


def stop(
    runs: Path, command: str, fields: dict, phase: str, step: int, ask: Ask, ranks: int = 2, late: int = 0
) -> None:
    """Start or go on, ask to end in a phase of a step, and see that the last whole step is kept.

    `late` steps at most may pass before the launcher has told its ranks.
    """
    log = runs / "t" / "phases.jsonl"
    before = log.stat().st_size if log.exists() else 0
    with started(runs, command, fields, ranks=ranks, resume=log.exists()) as process:
        wait_for(runs, process, phase, step, before)
        asked = time.time()
        ask(process)
        code = process.wait(4 * ENDS_WITHIN_S)
        assert time.time() - asked <= ENDS_WITHIN_S
    # torchrun calls itself failed where it was asked itself
    assert code == 0 or (ranks > 1 and ask is ask_launcher), said(runs)
    whole = len(measured(runs))
    assert step <= whole <= step + late
    assert [*map(step_of, checkpoints(runs / "t" / "checkpoints"))][-1:] == [whole][:whole]
    assert not (runs / "t" / "policy").exists() and not list((runs / "t" / "checkpoints").glob(".partial*"))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 1])
def test_a_run_that_is_asked_to_end_keeps_the_last_step_and_goes_on(request, tmp_path, ranks):
    """In each phase, by the launcher or by one rank; the run that went on three times is the run that never stopped."""
    fields = EVOLVE | {"checkpoint.every": 3, "distributed.strategy": "fsdp2" if ranks == 2 else "ddp"}
    whole = request.getfixturevalue("two" if ranks == 2 else "alone")
    last = ask_last_rank if ranks == 2 else ask_launcher
    stop(tmp_path, "evolve", fields, "rollout", 1, ask_launcher, ranks)
    stop(tmp_path, "evolve", fields, "judge", 1, last, ranks)
    stop(tmp_path, "evolve", fields, "update_actor", 2, last, ranks)
    run(tmp_path, "evolve", fields, ranks=ranks, resume=True)
    assert measured(tmp_path) == measured(whole) and sampled(tmp_path) == sampled(whole)


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "ranks"), [("zero2", 2), ("ddp", 1)])
def test_fine_tuning_that_is_asked_to_end_goes_on_at_the_next_sample(sft_alone, data, tmp_path, strategy, ranks):
    fields = SFT | data | {"distributed.strategy": strategy}
    stop(tmp_path, "sft", fields, "update_actor", 2, ask_launcher, ranks, late=2)
    run(tmp_path, "sft", fields, ranks=ranks, resume=True)
    assert same_metrics(measured(tmp_path), measured(sft_alone), 1e-4)


# --- a rank that dies -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_killed_rank_ends_the_run_which_loses_no_more_than_its_step(two, tmp_path):
    """Another rank in the midst of an update, then the one that writes in the midst of a checkpoint."""
    fields = EVOLVE | {"distributed.strategy": "fsdp2"}
    kill(tmp_path, fields, "update_actor", 1, rank=1)
    assert len(measured(tmp_path)) == 1
    kill(tmp_path, fields, "checkpoint", 3, rank=0)
    assert len(measured(tmp_path)) == 3  # its row is there, its checkpoint perhaps
    run(tmp_path, "evolve", fields, resume=True)
    assert measured(tmp_path) == measured(two) and sampled(tmp_path) == sampled(two)
    assert not list((tmp_path / "t" / "checkpoints").glob(".partial*"))


def kill(runs: Path, fields: dict, phase: str, step: int, rank: int) -> None:
    log = runs / "t" / "phases.jsonl"
    before = log.stat().st_size if log.exists() else 0
    with started(runs, "evolve", fields, resume=log.exists()) as process:
        wait_for(runs, process, phase, step, before)
        os.kill(workers(process)[rank], signal.SIGKILL)
        assert process.wait(60) != 0, said(runs)
    kept = [*map(step_of, checkpoints(runs / "t" / "checkpoints"))]
    assert kept and step - 1 <= kept[-1] <= step
    for checkpoint in checkpoints(runs / "t" / "checkpoints"):
        assert len(weight_readers(checkpoint / FOLDER)) > 10 and (checkpoint / "trainer.pt").exists()


# --- a full disk ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_ranks_on_a_full_disk_stop_in_one_line_and_go_on_when_there_is_room(sft_alone, data, tmp_path):
    """Of the five sharded checkpoints the disk holds two or three."""
    fields = SFT | data | {"distributed.strategy": "fsdp2", "checkpoint.every": 1, "checkpoint.keep_last": 5}
    script = """
    if $RUN --runs $DISK; then echo it ended; exit 1; else echo status $?; fi
    ls -A $DISK/t/checkpoints > $OUT/left
    mount -o remount,size=200m $DISK
    $RUN --runs $DISK --resume
    mkdir $OUT/t && cp $DISK/t/metrics.jsonl $OUT/t/
    ls -A $DISK/t/checkpoints > $OUT/at_the_end
    """
    of_two = " ".join(command_line("sft", fields, 2))
    done = small_disk(tmp_path / "disk", script, RUN=of_two, OUT=tmp_path, DS_ACCELERATOR="cpu")
    assert done.returncode == 0, done.stderr[-5000:]
    told = {line for line in done.stderr.splitlines() if line.startswith("genevolve-fast sft:")}
    assert len(told) == 1 and "no room to save in" in told.pop() and "[rank" not in done.stderr
    five = [f"step_00000{n}" for n in range(1, 6)]
    left = (tmp_path / "left").read_text().split()
    assert 0 < len(left) < 5 and left == five[: len(left)]
    assert (tmp_path / "at_the_end").read_text().split() == five
    assert same_metrics(measured(tmp_path), measured(sft_alone), 1e-4)
