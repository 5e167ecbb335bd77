"""Rollouts one step ahead of the update: whose weights sampled them, what corrects it, and when weights may change."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch

from benchmarks.one_step_off import Size, measure
from genevolve_fast import event_loop
from genevolve_fast.batch.groups import TrainingRollout
from genevolve_fast.ops import Objective
from genevolve_fast.train import gpus
from genevolve_fast.train.collect import Rollouts
from genevolve_fast.train.config import ConfigError, EvolveConfig, parse_config
from genevolve_fast.train.pipelined import OneStepAhead, open_sampler
from genevolve_fast.train.run import Run, RunError
from genevolve_fast.train.update import accumulate_gradients
from genevolve_fast.trajectory import Trajectory, Turn, load
from tests.loopback.engine import LoopbackEngine

ROOT = Path(__file__).parents[1]

# --- the correction, by exact enumeration -----------------------------------------------------------------------------

TEMPERATURE = 0.9
CORRECTED = Objective(kl_coef=0.0, sdl_coef=0.0, rollout_is="token")
UNCORRECTED = replace(CORRECTED, rollout_is="none")


@torch.no_grad()
def next_logps(policy, ids: Sequence[int], kept: Sequence[int] | None = None) -> np.ndarray:
    """[V] log-probs of the token after `ids`, over the ids in `kept`."""
    given = torch.tensor([list(ids)])
    with policy.own_attention():
        logits = policy.model(input_ids=given, mm_token_type_ids=torch.zeros_like(given).int()).logits[0, -1].double()
    logits = logits / TEMPERATURE
    if kept is not None:
        outside = torch.ones_like(logits, dtype=torch.bool)
        outside[list(kept)] = False
        logits = logits.masked_fill(outside, -torch.inf)
    return logits.log_softmax(-1).numpy()


class Replies:
    """All replies to one prompt: what the old policy gives each token, out of which ids."""

    def __init__(self, prompt: list[int], replies: Sequence[Sequence[int]], sets: dict[tuple, Sequence[int]]) -> None:
        self.prompt, self.replies, self.sets = prompt, [tuple(r) for r in replies], sets

    def token_logps(self, policy, masked: bool = True) -> np.ndarray:
        """[replies, tokens]."""
        prefixes = {r[:i] for r in self.replies for i in range(len(r))}
        known = {p: next_logps(policy, [*self.prompt, *p], self.sets.get(p) if masked else None) for p in prefixes}
        return np.array([[known[r[:i]][token] for i, token in enumerate(r)] for r in self.replies])

    def gradient(self, policy, objective, weights, sampled, rewards, replay: bool = True) -> torch.Tensor:
        """Σ over replies of weights · the update's gradient for it, by the training pass; one advantage a reply."""
        made = []
        n, start = len(self.replies), len(self.prompt)
        for i, reply in enumerate(self.replies):
            ids = np.array([*self.prompt, *reply])
            mask = np.arange(len(ids)) >= start
            logps = np.zeros(len(ids), np.float32)
            logps[mask] = sampled[i]
            sets = [self.sets[reply[:k]] for k in range(len(reply))] if replay and self.sets else []
            t = Trajectory(
                id=str(i),
                request_id="r",
                group_id="g",
                ids=ids,
                loss_mask=mask,
                rollout_logps=logps,
                request_stop=start - 1,
                turns=(Turn("user", 0, start), Turn("assistant", start, len(ids))),
                mask_ids=np.array([id_ for kept in sets for id_ in kept], np.int32),
                mask_counts=np.array([len(kept) for kept in sets], np.int32),
            ).validate()
            made.append(TrainingRollout(t, float(weights[i] * rewards[i] * n), ()))
        policy.zero_grad()
        accumulate_gradients(policy, made, {}, objective, temperature=TEMPERATURE, max_tokens=1024)
        return torch.cat([p.grad.double().flatten() for p in policy.parameters() if p.grad is not None])


def moved(policy, size: float = 0.005):
    """The policy after an update: its weights, changed a little."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in policy.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator) * size)
    return policy


def off(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.fixture
def asked(policy):
    policy.freeze_vision()
    prompt = policy.codec.encode("<|im_start|>user\nDraw the harbour of Dor Abo.<|im_end|>\n<|im_start|>assistant\n")
    return policy, prompt


def test_the_corrected_gradient_over_the_old_policys_samples_is_the_on_policy_gradient(asked):
    """Every one-token reply there is, each with the old policy's probability: an expectation without noise."""
    policy, prompt = asked
    vocabulary = [(y,) for y in range(policy.head_weight.shape[0]) if y != policy.codec.image_pad_id]
    every = Replies(prompt, vocabulary, {})
    rewards = np.random.default_rng(0).normal(size=len(vocabulary))
    old = every.token_logps(policy)
    moved(policy)
    new = every.token_logps(policy)
    assert 1.2 < np.exp(new - old).max() < CORRECTED.rollout_is_cap  # it moved, and no weight meets the cap
    wanted = every.gradient(policy, UNCORRECTED, np.exp(new[:, 0]), new, rewards)
    samples = np.exp(old[:, 0])
    assert off(every.gradient(policy, CORRECTED, samples, old, rewards), wanted) < 1e-5
    assert off(every.gradient(policy, UNCORRECTED, samples, old, rewards), wanted) > 0.05


def nucleus(policy, prompt, size: int, length: int) -> Replies:
    """All replies out of the `size` likeliest ids after each prefix, which is what a top-p keeps."""
    sets: dict[tuple, list[int]] = {}
    replies: list[tuple] = [()]
    for _ in range(length):
        for prefix in replies:
            logps = next_logps(policy, [*prompt, *prefix])
            logps[policy.codec.image_pad_id] = -np.inf
            sets[prefix] = np.argsort(-logps)[:size].tolist()
        replies = [(*prefix, y) for prefix in replies for y in sets[prefix]]
    return Replies(prompt, replies, sets)


def test_with_top_p_the_correction_is_exact_over_the_ids_that_were_kept_and_wrong_without_them(asked):
    policy, prompt = asked
    some = nucleus(policy, prompt, size=40, length=1)
    rewards = np.random.default_rng(1).normal(size=40)
    old = some.token_logps(policy)
    moved(policy)
    new = some.token_logps(policy)
    wanted = some.gradient(policy, UNCORRECTED, np.exp(new[:, 0]), new, rewards)
    samples = np.exp(old[:, 0])
    assert off(some.gradient(policy, CORRECTED, samples, old, rewards), wanted) < 1e-5
    assert off(some.gradient(policy, UNCORRECTED, samples, old, rewards), wanted) > 0.05
    assert off(some.gradient(policy, CORRECTED, samples, old, rewards, replay=False), wanted) > 0.5


def test_of_longer_replies_the_correction_leaves_what_the_text_around_a_token_adds(asked):
    """A token's weight makes the token right, given the text before it, and leaves that text the old policy's."""
    policy, prompt = asked
    pairs = nucleus(policy, prompt, size=8, length=2)
    rewards = np.random.default_rng(2).normal(size=64)
    old = pairs.token_logps(policy)
    moved(policy)
    new = pairs.token_logps(policy)
    wanted = pairs.gradient(policy, UNCORRECTED, np.exp(new.sum(1)), new, rewards)
    samples = np.exp(old.sum(1))
    left = off(pairs.gradient(policy, CORRECTED, samples, old, rewards), wanted)
    without = off(pairs.gradient(policy, UNCORRECTED, samples, old, rewards), wanted)
    assert 0 < left < without


# --- when it samples and when weights change --------------------------------------------------------------------------


class Weights:
    """Of an engine: which the trainer gave it last."""

    def __init__(self) -> None:
        self.given: list[int] = []

    def update_weights(self, version: int) -> None:
        self.given.append(version)


def rollouts(step: int, version: int) -> Rollouts:
    return Rollouts((SimpleNamespace(id=f"{step}", policy_step=version),), {}, {})


@pytest.fixture
def run(tmp_path):
    run = Run(tmp_path / "r", parse_config(EvolveConfig, {}), device=torch.device("cpu"), total=4, resume=False)
    run.begin(0)
    yield run
    run.close()


@pytest.fixture
def sampler(run):
    """Opens samplers and closes them."""
    opened = []

    def open_(staleness: int, collect, steps: int = 4):
        opened.append(open_sampler(staleness, run, Weights(), collect, steps))
        return opened[-1]

    yield open_
    for each in opened:
        each.close()


def steps_of(sampler, steps: int = 4, first: int = 0) -> list[tuple[int, int]]:
    """(step, updates of the weights that sampled it) of a run's steps."""
    sampler.sync(first)
    seen = []
    for step in range(first, steps):
        (t,) = sampler.next(step).trajectories
        seen.append((int(t.id), t.policy_step))
        sampler.wait(step + 1)
        sampler.sync(step + 1)
    return seen


def test_in_turn_every_rollout_is_of_the_weights_that_it_trains(sampler):
    made = sampler(0, lambda step, version, phase: rollouts(step, version))
    assert steps_of(made) == [(0, 0), (1, 1), (2, 2), (3, 3)] and made.engine.given == [0, 1, 2, 3, 4]
    assert made.metrics() == {"rollout/staleness/mean": 0.0, "rollout/staleness/max": 0.0}


def test_one_step_ahead_every_rollout_but_the_first_is_one_update_old(sampler):
    asked = []

    def collect(step, version, phase):
        asked.append((step, version))
        return rollouts(step, version)

    made = sampler(1, collect)
    assert steps_of(made) == [(0, 0), (1, 0), (2, 1), (3, 2)]
    assert made.metrics()["rollout/staleness/max"] == 1.0
    assert asked == [(0, 0), (1, 0), (2, 1), (3, 2)]  # nothing beyond the last step
    assert steps_of(sampler(1, collect), first=2) == [
        (2, 2),
        (3, 2),
    ]  # resumed without a file: the first is sampled now


def test_the_next_step_is_sampled_while_this_one_trains_and_no_weights_change_meanwhile(sampler, run):
    goes_on = threading.Event()

    def collect(step, version, phase):
        with phase("rollout", step):
            assert step == 0 or goes_on.wait(20)
        return rollouts(step, version)

    made = sampler(1, collect)
    made.sync(0)
    made.next(0)
    assert made._ahead.step == 1 and not made._ahead.future.done()  # `next` came back: step 0 trains now
    with pytest.raises(RuntimeError, match="step 1 are being sampled"):
        made.sync(1)
    assert made.engine.given == [0]
    threading.Timer(0.2, goes_on.set).start()
    made.wait(1)
    made.sync(1)
    numbers = made.metrics()
    assert 0 <= numbers["perf/overlap_seconds"] <= numbers["ahead_s/rollout"] and numbers["ahead_s/rollout"] > 0.1
    row = run.log(1, {"reward": 0.0})
    assert row["timing_s/wait_rollout"] > 0.1 and "timing_s/rollout" not in row
    marks = [json.loads(line) for line in (run.folder / "phases.jsonl").read_text().splitlines()]
    assert {m["phase"] for m in marks if m["step"] == 1} == {"rollout", "wait_rollout"}  # either thread may be first


@pytest.mark.parametrize(("staleness", "age"), [(0, 1), (1, 2), (1, -1)])
def test_rollouts_older_than_the_bound_or_of_the_future_are_refused(sampler, staleness, age):
    made = sampler(staleness, lambda step, version, phase: rollouts(step, step - age))
    made.sync(3)
    with pytest.raises(RunError, match=rf"weights {age} updates old.*staleness is {staleness}.*step_000003"):
        made.next(3)


def test_what_fails_ahead_is_raised_when_its_step_asks_for_it(sampler):
    def collect(step, version, phase):
        if step == 1:
            raise RunError("all of them failed")
        return rollouts(step, version)

    made = sampler(1, collect)
    made.sync(0)
    made.next(0)
    made.wait(1)
    made.sync(1)  # step 0 is trained and can be kept
    with pytest.raises(RunError, match="all of them failed"):
        made.next(1)


def test_a_run_that_ends_cancels_what_is_sampled_ahead(run):
    sampling, cancelled = threading.Event(), threading.Event()

    async def for_ever():
        sampling.set()
        try:
            await asyncio.sleep(1000)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    def collect(step, version, phase):
        with phase("rollout", step):
            event_loop.run(asyncio.sleep(0) if step == 0 else for_ever())
        return rollouts(step, version)

    made = OneStepAhead(run, Weights(), collect, 4)
    made.sync(0)
    made.next(0)
    assert sampling.wait(20)
    made.close()
    assert cancelled.is_set()


def test_each_thread_has_a_loop_of_its_own_that_stays():
    async def own():
        return asyncio.get_running_loop()

    found = []
    threads = [
        threading.Thread(target=lambda: found.append((event_loop.run(own()), event_loop.run(own())))) for _ in "ab"
    ]
    for thread in threads:
        thread.start()
        thread.join()
    (a, again), (b, _) = found
    assert a is again and a is not b and event_loop.run(own()) not in (a, b)
    a.close(), b.close()


# --- configurations ---------------------------------------------------------------------------------------------------

SERVED = {"engine": "server", "server": {"cpu_servers": 1}, "top_p": 1.0}
ON_GPUS = {"rollout": {"engine": "server"}}


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"rollout": {"staleness": 1}}, "engine 'transformers': one set of weights"),
        ({"rollout": {"staleness": 1, "engine": "vllm"}}, "engine 'vllm': vLLM sleeps meanwhile"),
        ({"rollout": {"staleness": 2}}, "staleness"),
        ({"rollout": SERVED | {"staleness": 1}}, "without objective.rollout_is token"),
        (
            {"rollout": SERVED | {"staleness": 1, "top_p": 0.9}, "objective": {"rollout_is": "token"}},
            "needs rollout.replay_sampling_mask",
        ),
        (ON_GPUS | {"trainer_gpus": [0, 1], "rollout_gpus": [1, 2]}, "share GPU 1"),
        (ON_GPUS | {"rollout_gpus": [1, 1]}, "rollout_gpus names a GPU twice"),
        (ON_GPUS | {"rollout_gpus": [-1]}, "rollout_gpus"),
        ({"rollout_gpus": [1]}, "rollout_gpus with rollout.engine 'transformers': it samples where the policy trains"),
        ({"trainer_gpus": [1], "rollout": {"engine": "vllm"}}, "trainer_gpus with rollout.engine 'vllm'"),
        ({"rollout": SERVED, "rollout_gpus": [1]}, "rollout_gpus with rollout.server.cpu_servers"),
        (
            {"rollout": {"engine": "server", "server": {"urls": ["http://h:1"], "sync_dir": "w"}}, "rollout_gpus": [1]},
            "rollout_gpus with rollout.server.urls",
        ),
        (
            {"rollout": {"engine": "server", "server": {"tensor_parallel_size": 2}}, "rollout_gpus": [1, 2, 3]},
            "names 3 GPUs, and rollout.server.tensor_parallel_size 2",
        ),
        (
            {"rollout": {"engine": "server", "server": {"cpu_servers": 1, "backend": "vllm"}}},
            "backend with cpu_servers",
        ),
        ({"rollout": {"engine": "server", "server": {"cpu_servers": 1, "sync": "nccl"}}}, "cpu_servers have none"),
        (
            {"rollout": {"engine": "server", "server": {"urls": ["http://h:1"], "sync_dir": "w", "flags": ["--x"]}}},
            "flags with urls would do nothing",
        ),
    ],
)
def test_what_cannot_be_kept_apart_is_refused(fields, reason):
    with pytest.raises(ConfigError, match=reason):
        parse_config(EvolveConfig, fields)


def on_gpus(**fields) -> EvolveConfig:
    tp = fields.pop("tp", 1)
    return parse_config(
        EvolveConfig, {"rollout": {"engine": "server", "server": {"tensor_parallel_size": tp}}} | fields
    )


def test_gpus_are_counted_among_the_visible_ones():
    seen = {"CUDA_VISIBLE_DEVICES": "4,5,GPU-a6,7"}
    both = gpus.shares(on_gpus(trainer_gpus=[1], rollout_gpus=[2, 3]), seen)
    assert both == gpus.Shares(("5",), (("GPU-a6",), ("7",)))
    assert gpus.shares(on_gpus(rollout_gpus=[3, 2], tp=2), seen) == gpus.Shares(("4", "5"), (("7", "GPU-a6"),))
    taken = {"CUDA_VISIBLE_DEVICES": "5", "GENEVOLVE_VISIBLE_GPUS": "4,5,GPU-a6,7"}  # as take_share leaves it
    assert gpus.shares(on_gpus(trainer_gpus=[1], rollout_gpus=[2, 3]), taken) == both


@pytest.mark.parametrize(
    ("fields", "environment", "reason"),
    [
        ({"rollout_gpus": [4]}, {}, "rollout_gpus names GPU 4, and this process sees 4 GPUs, 0 to 3"),
        ({"trainer_gpus": [0], "rollout_gpus": [1]}, {"CUDA_VISIBLE_DEVICES": ""}, "this process sees no GPU"),
        ({"rollout_gpus": [0, 1, 2, 3]}, {}, "takes all 4 GPUs: none is left to train on"),
        ({"trainer_gpus": [0, 1], "rollout_gpus": [2]}, {}, "2 GPUs for 1 trainer processes.*torchrun"),
        ({"rollout_gpus": [1, 2, 3]}, {"LOCAL_WORLD_SIZE": "2"}, "leaves 1 GPUs to 2 trainer processes"),
    ],
)
def test_gpus_that_are_not_there_or_not_enough_are_refused(fields, environment, reason):
    with pytest.raises(ConfigError, match=reason):
        gpus.shares(on_gpus(**fields), {"CUDA_VISIBLE_DEVICES": "0,1,2,3"} | environment)


def test_the_trainer_sees_its_own_gpus_only(monkeypatch):
    config = on_gpus(rollout_gpus=[1, 3])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    monkeypatch.setenv("GENEVOLVE_VISIBLE_GPUS", "0,1,2,3")  # so that it is taken away again after the test
    with pytest.raises(ConfigError, match="call train.gpus.take_share first"):
        gpus.check_share(config)
    for _ in "ab":  # the second time changes nothing
        gpus.take_share(config)

        assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,2"
    gpus.check_share(config)


# --- whole runs on real servers ---------------------------------------------------------------------------------------

SMALL = {
    "steps": 4,
    "checkpoint.every": 2,
    "pool_size": 40,
    "rollout.prompts_per_step": 3,
    "rollout.num_generations": 3,
    "rollout.temperature": 1.0,
    "rollout.engine": "server",
    "experience.min_gap": 0.1,
    "objective.rollout_is": "token",
    "threads": 1,
    "evaluate.requests": 0,
}


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def sampled(folder: Path, steps: int = 4) -> list[list[Trajectory]]:
    return [load(folder / "rollouts" / f"step_{step:06d}.safetensors")[0] for step in range(steps)]


@pytest.mark.slow
def test_where_no_update_changes_the_weights_both_ways_are_one_run(tmp_path):
    """Requests, seeds, rewards and what the memory holds when a step reads it do not depend on when it was sampled."""
    from genevolve_fast.commands.opening import config_path, open_policy, open_world
    from genevolve_fast.train.config import load_config
    from genevolve_fast.train.evolve import evolve

    with LoopbackEngine() as engine:
        for staleness in (0, 1):
            fields = SMALL | {
                "optim.lr": 1e-30,
                "rollout.staleness": staleness,
                "rollout.server.urls": json.dumps([engine.url]),
                "rollout.server.sync_dir": str(tmp_path / "weights"),
            }
            config = load_config(EvolveConfig, config_path("demo"), [f"{k}={v}" for k, v in fields.items()])
            sandbox, world = open_world(config)
            pool = sandbox.requests("train", config.pool_size, seed=config.seed)
            evolve(config, open_policy(config.policy), world, pool, tmp_path / str(staleness))
    one, other = (rows(tmp_path / name) for name in "01")
    assert one[-1]["experience/memory"] > one[0]["experience/memory"] > 0
    for name in ("reward", "experience/compared", "experience/used", "experience/memory", "num_tokens"):
        assert [r[name] for r in one] == [r[name] for r in other], name
    # the engine's log-probs differ in their last bits with what else is in its batch
    assert [r["actor/grad_norm"] for r in one] == pytest.approx([r["actor/grad_norm"] for r in other], rel=1e-3)
    for step, (a, b) in enumerate(zip(sampled(tmp_path / "0"), sampled(tmp_path / "1"), strict=True)):
        assert [t.ids.tolist() for t in a] == [t.ids.tolist() for t in b]
        assert {t.policy_step for t in a} == {step} and {t.policy_step for t in b} == {max(0, step - 1)}
    kept = [(tmp_path / name / "checkpoints" / "step_000004" / "memory.json").read_text() for name in "01"]
    assert kept[0] == kept[1]


def command(runs: Path, *extra: str) -> list[str]:
    fields = SMALL | {"name": "t", "optim.lr": 2e-4, "rollout.server.cpu_servers": 1, "rollout.staleness": 1}
    sets = [part for name, value in fields.items() for part in ("--set", f"{name}={value}")]
    return [
        sys.executable,
        "-m",
        "genevolve_fast.cli",
        "evolve",
        "--config",
        "demo",
        "--runs",
        str(runs),
        *sets,
        *extra,
    ]


def server_pids(runs: Path) -> list[int]:
    """Of the servers that the run has started so far, the last one last."""
    log = runs / "t" / "servers" / "server_0.log"
    lines = log.read_text().splitlines() if log.exists() else []
    return [json.loads(line)["pid"] for line in lines if line.startswith('{"ready"')]


def until_phase(runs: Path, step: int, phase: str, process: subprocess.Popen) -> None:
    log = runs / "t" / "phases.jsonl"
    stop = time.monotonic() + 240
    while time.monotonic() < stop and process.poll() is None:
        lines = log.read_text().splitlines() if log.exists() else []
        made = [json.loads(line) for line in lines if line.endswith("}")]
        if any((m["step"], m["phase"]) == (step, phase) for m in made):
            return
        time.sleep(0.002)
    raise AssertionError(f"it never came to {phase} of step {step}")


@pytest.mark.slow
def test_a_server_that_dies_while_the_policy_trains_comes_back_with_the_weights_before_the_update(tmp_path):
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command(tmp_path), cwd=ROOT, stdout=log, stderr=log)
    until_phase(tmp_path, 2, "rollout", process)  # beside the update of step 1
    os.kill(server_pids(tmp_path)[-1], signal.SIGKILL)
    assert process.wait(240) == 0, (tmp_path / "log").read_text()[-3000:]
    started = server_pids(tmp_path)
    assert len(started) == 2 and not any(psutil.pid_exists(pid) for pid in started)
    made = rows(tmp_path / "t")
    assert sum(r.get("failures/engine/connect", 0) for r in made) > 0 and not any(r["rollouts/failed"] for r in made)
    assert [r["rollout/staleness/max"] for r in made] == [0, 1, 1, 1]
    assert [{t.policy_step for t in step} for step in sampled(tmp_path / "t")] == [{0}, {0}, {1}, {2}]
    # on policy they agree; one update later they cannot, and the difference is what the correction divides by
    apart = [r["rollout_corr/logp_difference_abs"] for r in made]
    assert apart[0] < 1e-4 < min(apart[1:]) and max(apart) < 0.5
    assert made[2]["actor/rollout_is_mean"] == pytest.approx(1, abs=0.2) and made[2]["actor/rollout_is_mean"] != 1
    assert not list((tmp_path / "t" / "servers" / "weights").iterdir())


@pytest.mark.slow
def test_a_trainer_that_is_killed_leaves_no_server_and_goes_on_with_the_rollouts_that_were_sampled_ahead(tmp_path):
    process = subprocess.Popen(command(tmp_path), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until_phase(tmp_path, 3, "rollout", process)  # step 2 trains on what was sampled beside step 1
    process.kill()
    process.wait()
    pids = server_pids(tmp_path)
    stop = time.monotonic() + 30
    while any(psutil.pid_exists(pid) for pid in pids):
        assert time.monotonic() < stop, "the server outlived its trainer"
        time.sleep(0.05)
    before = sampled(tmp_path / "t", 3)
    done = subprocess.run(command(tmp_path, "--resume"), cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    after = sampled(tmp_path / "t")
    assert [[t.ids.tolist() for t in step] for step in after[:3]] == [[t.ids.tolist() for t in step] for step in before]
    assert [{t.policy_step for t in step} for step in after] == [{0}, {0}, {1}, {2}]
    assert [r["step"] for r in rows(tmp_path / "t")] == [1, 2, 3, 4]
    assert not any(psutil.pid_exists(pid) for pid in server_pids(tmp_path))


@pytest.mark.slow
def test_updates_cost_no_time_of_their_own_where_judges_take_theirs(tmp_path):
    before, after = measure(tmp_path, Size(steps=3, prompts=3, generations=3, latency_ms=3000))
    print(f"synchronous {before.steps_s:.1f} s, one step off {after.steps_s:.1f} s")
    assert before.staleness == (0, 0, 0) and after.staleness == (0, 1, 1) and before.overlap_s == 0
    assert after.overlap_s > 0.9 * after.updates_s  # it samples and judges from the beginning of an update to its end
