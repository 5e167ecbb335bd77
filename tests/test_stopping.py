"""SIGTERM: told to all ranks, never in the midst of a step, and no trace of a step that was not taken."""

from __future__ import annotations

import json
import os
import pickle
import signal
import sys
import threading
import time

import pytest

from genevolve_fast.commands.opening import config_path, open_policy, open_pool
from genevolve_fast.policy.model import Policy
from genevolve_fast.sandbox.tiny_policy import start_path
from genevolve_fast.train import evolve as evolving
from genevolve_fast.train import sft as tuning
from genevolve_fast.train.config import EvolveConfig, SftConfig, load_config, parse_config
from genevolve_fast.train.ranks import Ranks, sendable
from genevolve_fast.train.stopping import Preempted, Stopping
from genevolve_fast.train.strategies import Strategy
from genevolve_fast.train.together import Together

SETTINGS = (
    "steps=4",
    "threads=1",
    "pool_size=20",
    "rollout.prompts_per_step=2",
    "rollout.num_generations=4",
    "rollout.temperature=1.2",
    "experience.min_gap=0.05",
    "evaluate.requests=0",
    "checkpoint.every=4",
)


def ask() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_rank_that_is_asked_can_tell_the_others():
    told = pickle.loads(pickle.dumps(Preempted()))
    assert isinstance(told, Preempted) and isinstance(sendable(Preempted()), Preempted)
    with pytest.raises(SystemExit) as ended:
        raise told
    assert not ended.value.code  # a clean end


class Unsendable(Exception):
    def __init__(self, what, why):
        super().__init__(f"{what}: {why}")


def test_an_exception_that_cannot_be_made_again_is_told_by_its_text():
    told = sendable(Unsendable("judge", "gone"))
    assert type(told) is RuntimeError and str(told) == "Unsendable: judge: gone"
    held = OSError("no lock can be pickled")
    held.lock = threading.Lock()
    assert str(sendable(held)) == "OSError: no lock can be pickled"


def test_a_signal_in_the_midst_of_a_print_waits_like_any_other(monkeypatch):
    class Busy:
        def write(self, _):
            raise RuntimeError("reentrant call inside <_io.BufferedWriter name='<stdout>'>")

    stopping = Stopping(Ranks())
    with stopping.listening():
        monkeypatch.setattr(sys, "stdout", Busy())
        ask()
        with pytest.raises(Preempted):
            stopping.pause()


class Ahead:
    """A sampler whose next rollouts are under way."""

    def wait(self, step: int) -> None:
        time.sleep(20)


def test_who_waits_for_the_rollouts_of_the_next_step_is_interrupted(tmp_path):
    stopping = Stopping(Ranks())
    together = Together(Ahead(), tmp_path, None, Strategy(), stopping, parts=False)
    begin = time.monotonic()
    with stopping.listening():
        threading.Timer(0.3, ask).start()
        with pytest.raises(Preempted):
            together.wait(1)
    assert time.monotonic() - begin < 15


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    from genevolve_fast.sandbox.bootstrap import write_demonstrations
    from genevolve_fast.sandbox.world import SandboxWorld

    return write_demonstrations(SandboxWorld(), tmp_path_factory.mktemp("d"), count=4, experience_share=0.3, seed=0)


@pytest.mark.slow
def test_a_signal_while_the_final_policy_is_written_ends_what_would_come_after_it(data, tmp_path, monkeypatch):
    write = tuning.save_final

    def slowly(*what):
        ask()
        write(*what)

    monkeypatch.setattr(tuning, "save_final", slowly)
    fields = {"name": "t", "epochs": 1, "batch_size": 4, "policy": {"path": "sandbox:start"}}
    config = parse_config(SftConfig, fields | {"data": {"path": str(data)}})
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Preempted):
        tuning.sft(config, Policy.from_pretrained(start_path()), data, tmp_path / "t")
    assert (tmp_path / "t" / "policy" / "model.safetensors").exists()
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.slow
def test_a_step_that_is_interrupted_leaves_nothing_in_the_memory(tmp_path, monkeypatch):
    config = load_config(EvolveConfig, config_path("demo"), SETTINGS)
    pool, world = open_pool(config)
    update, steps = evolving.accumulate_gradients, iter(range(4))

    def interrupted(*what, **options):
        if next(steps) == 2:
            ask()
        return update(*what, **options)

    monkeypatch.setattr(evolving, "accumulate_gradients", interrupted)
    with pytest.raises(Preempted):
        evolving.evolve(config, open_policy(config.policy), world, pool, tmp_path)
    saved = json.loads((tmp_path / "checkpoints" / "step_000002" / "memory.json").read_text())
    assert {b["step"] for b in saved["bundles"]} == {0, 1}
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [1, 2]
