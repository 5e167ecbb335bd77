"""What fails in a long run: a full disk, numbers that are none, judges that are gone. No more than a step is lost."""

from __future__ import annotations

import functools
import json
import math
import os
import shutil
import subprocess
import sys
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from genevolve_fast.cli import main
from genevolve_fast.policy.model import Policy
from genevolve_fast.sandbox.tiny_policy import start_path
from genevolve_fast.train import space
from genevolve_fast.train.checkpoint import checkpoints, load_checkpoint, refuse_full_disk, save_checkpoint, save_final
from genevolve_fast.train.config import CheckpointConfig, ConfigError, OptimConfig, SftConfig, parse_config
from genevolve_fast.train.finite import FiniteSteps
from genevolve_fast.train.optim import build_optimizer
from genevolve_fast.train.retention import read_marker
from genevolve_fast.train.run import RunError
from genevolve_fast.train.strategies import Strategy
from genevolve_fast.trajectory import Judged, load

ROOT = Path(__file__).parents[1]
NAME = "model.safetensors"
SMALL_DISK_MIB = 44  # two checkpoints of the tiny policy and half of a third


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    from genevolve_fast.sandbox.bootstrap import write_demonstrations
    from genevolve_fast.sandbox.world import SandboxWorld

    return write_demonstrations(SandboxWorld(), tmp_path_factory.mktemp("d"), count=16, experience_share=0.3, seed=0)


def config(data, **changes) -> SftConfig:
    fields = {
        "name": "t",
        "epochs": 1,
        "batch_size": 4,
        "max_tokens_per_microbatch": 4096,
        "policy": {"path": "sandbox:start"},
        "data": {"path": str(data)},
        "checkpoint": {"every": 1},
    }
    return parse_config(SftConfig, fields | changes)


def start() -> Policy:
    policy = Policy.from_pretrained(start_path())
    policy.freeze_vision()
    return policy


def trained():
    """(policy, optimizer) with states after a step."""
    policy = start()
    optimizer = build_optimizer(policy, OptimConfig(lr=1e-3), 10)
    step(policy, optimizer)
    return policy, optimizer


def gradients(policy) -> float:
    """Of a loss, which is returned."""
    with policy.own_attention():
        loss = policy.model(input_ids=torch.arange(12)[None], use_cache=False).logits.logsumexp(-1).sum()
    loss.backward()
    return float(loss.detach())


def step(policy, optimizer) -> None:
    gradients(policy)
    optimizer.step()


def bits(policy) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in policy.model.named_parameters()}


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


# --- a full disk ------------------------------------------------------------------------------------------------------


@pytest.fixture
def longest_file():
    """Limits the size of files that this process writes, in bytes: a write beyond it fails as on a full disk."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda n: resource.setrlimit(resource.RLIMIT_FSIZE, (n, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("fits", [3 << 20, 7 << 20, 1 << 40])
def test_a_write_that_fails_leaves_the_older_checkpoints_and_nothing_else(tmp_path, longest_file, fits):
    """Weights, optimizer states and what lies beside them (a device that is always full) fail in their own ways."""
    policy, optimizer = trained()
    save_checkpoint(tmp_path, 1, policy, optimizer)
    before = bits(policy)
    step(policy, optimizer)
    if fits < 1 << 40:
        longest_file(fits)
    with pytest.raises(RunError, match=r"no room to save in \S+: 18\.\d MB are needed, .*B are free\. .*--resume"):
        save_checkpoint(tmp_path, 2, policy, optimizer, extras=lambda _: Path("/dev/full").write_bytes(bytes(1 << 20)))
    assert [p.name for p in tmp_path.iterdir()] == ["step_000001"]
    assert load_checkpoint(tmp_path / "step_000001", policy, optimizer) == 1 and same(bits(policy), before)


def test_other_errors_are_not_called_a_full_disk(tmp_path):
    policy, optimizer = trained()

    def extras(_):
        raise RuntimeError("the memory is broken")

    with pytest.raises(RuntimeError, match="the memory is broken"):
        save_checkpoint(tmp_path, 1, policy, optimizer, extras=extras)
    assert not list(tmp_path.iterdir())


def test_the_bytes_of_a_checkpoint_are_known_before(tmp_path):
    policy = start()
    optimizer = build_optimizer(policy, OptimConfig(lr=1e-3), 10)
    first = space.checkpoint_bytes(policy, optimizer)
    step(policy, optimizer)
    after = space.checkpoint_bytes(policy, optimizer, 1000)
    folder = save_checkpoint(tmp_path, 1, policy, optimizer)
    written = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    for told in (first, after):
        assert written <= told <= written + space.BESIDE + 0.02 * written


def test_room_is_looked_for_before_anything_is_written_or_trained(tmp_path, monkeypatch):
    policy, optimizer = trained()
    for n in (1, 2):
        save_checkpoint(tmp_path, n, policy, optimizer)
    needed = space.checkpoint_bytes(policy, optimizer)
    usage = shutil.disk_usage(tmp_path)
    size = sum(f.stat().st_size for f in (tmp_path / "step_000001").rglob("*") if f.is_file())

    def free(_):
        """Of a disk that lacks a byte for a third checkpoint."""
        gone = size * (2 - len(checkpoints(tmp_path)))
        return usage._replace(free=needed - 1 + gone)

    monkeypatch.setattr(space.shutil, "disk_usage", free)
    keep = CheckpointConfig(keep_last=3)
    for refused in (
        lambda: save_checkpoint(tmp_path, 3, policy, optimizer, keep=keep),
        lambda: refuse_full_disk(tmp_path, 2, policy, optimizer, keep),
    ):
        with pytest.raises(RunError, match="no room to save in"):
            refused()
        assert [p.name for p in checkpoints(tmp_path)] == ["step_000001", "step_000002"]
    refuse_full_disk(tmp_path, 2, policy, optimizer, CheckpointConfig())
    assert len(checkpoints(tmp_path)) == 2
    save_checkpoint(tmp_path, 3, policy, optimizer)  # in place of the first, which would go afterwards anyway
    assert [p.name for p in checkpoints(tmp_path)] == ["step_000002", "step_000003"]


def small_disk(folder: Path, script: str, **variables: object) -> subprocess.CompletedProcess:
    """Run `script` in a mount namespace of its own, where `folder` is a disk of SMALL_DISK_MIB."""
    folder.mkdir()
    mount = f"mount -t tmpfs -o size={SMALL_DISK_MIB}m small {folder}"
    inside = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    if shutil.which("unshare") is None or subprocess.run([*inside, mount], capture_output=True).returncode:
        pytest.skip("this system lets nobody mount a small disk in a namespace of its own")
    environment = os.environ | {k: str(v) for k, v in variables.items()} | {"OMP_NUM_THREADS": "1", "DISK": str(folder)}
    command = [*inside, f"set -e; {mount}; {script}"]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=400)


@pytest.mark.slow
def test_a_run_on_a_full_disk_stops_in_one_line_and_goes_on_when_there_is_room(data, tmp_path):
    whole = sft_command(config(data, checkpoint={"every": 1, "keep_last": 3}), tmp_path / "whole.yaml")
    script = """
    if $RUN --runs $DISK; then echo it ended; exit 1; else echo status $?; fi
    ls -A $DISK/t/checkpoints > $OUT/left
    mount -o remount,size=200m $DISK
    $RUN --runs $DISK --resume
    cp $DISK/t/metrics.jsonl $OUT/
    ls -A $DISK/t/checkpoints > $OUT/at_the_end
    """
    done = small_disk(tmp_path / "disk", script, RUN=whole, OUT=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "status 2" in done.stdout and "Traceback" not in done.stderr
    (told,) = [line for line in done.stderr.splitlines() if line.startswith("genevolve-fast sft:")]
    assert "no room to save in" in told and str(tmp_path / "disk" / "t" / "checkpoints") in told
    assert (tmp_path / "left").read_text().split() == ["step_000001", "step_000002"]
    assert (tmp_path / "at_the_end").read_text().split() == ["step_000002", "step_000003", "step_000004"]
    subprocess.run([*whole.split(), "--runs", str(tmp_path)], cwd=ROOT, check=True, capture_output=True)
    assert measured(tmp_path / "metrics.jsonl") == measured(tmp_path / "t" / "metrics.jsonl")


@pytest.mark.slow
def test_checkpoints_that_go_anyway_make_room_first(data, tmp_path):
    script = "$RUN --runs $DISK; ls -A $DISK/t/checkpoints > $OUT/left"
    done = small_disk(tmp_path / "disk", script, RUN=sft_command(config(data), tmp_path / "c.yaml"), OUT=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "left").read_text().split() == ["step_000003", "step_000004"]


def sft_command(config: SftConfig, file: Path) -> str:
    file.write_text(config.model_dump_json())
    return f"{sys.executable} -m genevolve_fast.cli sft --config {file}"


def measured(file: Path) -> list[dict]:
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return [{k: v for k, v in r.items() if not k.startswith(("timing", "memory", "perf"))} for r in rows]


@pytest.mark.parametrize("full", ["bytes", "tensors"])
def test_a_disk_that_fills_while_something_else_is_written_is_told_in_one_line(
    tmp_path, monkeypatch, capsys, longest_file, full
):
    def writes(args):
        if full == "bytes":
            Path("/dev/full").write_bytes(bytes(1 << 20))
        longest_file(1 << 16)
        save_file({"x": torch.zeros(1 << 20)}, tmp_path / "x")

    monkeypatch.setattr("genevolve_fast.cli.run_evolve", writes)
    assert main(["evolve", "--config", "demo"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("genevolve-fast evolve: the disk is full: ") and said.endswith("again with --resume\n")


def test_the_final_policy_is_whole_or_the_old_one(tmp_path, longest_file):
    policy, _ = trained()
    save_final(tmp_path / "policy", policy)
    before = bits(policy)
    policy.decoder.norm.weight.data += 1
    longest_file(1 << 20)
    with pytest.raises(RunError, match="no room to save in"):
        save_final(tmp_path / "policy", policy)
    assert [p.name for p in tmp_path.iterdir()] == ["policy"]
    assert same(bits(Policy.from_pretrained(tmp_path / "policy")), before)


# --- numbers that are none --------------------------------------------------------------------------------------------


def spoilt(policy, bad: set[int], per_step: int = 1) -> ExitStack:
    """Makes the last hidden rows of the forwards of these steps NaN, as an overflow in a layer does."""
    calls, norm = iter(range(10**6)), policy.decoder.norm
    plain = norm.forward
    norm.forward = lambda x: plain(x) * (math.nan if next(calls) // per_step in bad else 1)
    undo = ExitStack()
    undo.callback(norm.__dict__.pop, "forward")
    return undo


def test_a_step_that_is_not_finite_is_not_taken_and_named(policy):
    guard = FiniteSteps(policy, skip=1)
    before, loss = bits(policy), gradients(policy)
    policy.decoder.layers[3].mlp.up_proj.weight.grad[0, 0] = math.inf
    norm = Strategy().norm(policy, 1.0)
    assert not guard.may_step(7, norm, {"loss": loss}) and all(p.grad is None for p in policy.parameters())
    loss = gradients(policy)
    assert guard.may_step(8, Strategy().norm(policy, 1.0), {"loss": loss})  # one good step: the count starts again
    policy.zero_grad(set_to_none=True)
    loss = gradients(policy)
    policy.decoder.layers[3].mlp.up_proj.weight.grad[0, 0] = math.inf
    assert not guard.may_step(9, Strategy().norm(policy, 1.0), {"loss": loss})
    with spoilt(policy, {0}):
        loss = gradients(policy)
    with pytest.raises(
        RunError, match=r"step 10: loss nan, gradient norm nan; first bad gradient .*embed.*2 such steps"
    ):
        guard.may_step(10, Strategy().norm(policy, 1.0), {"loss": loss})
    assert same(bits(policy), before)
    gradients(policy)
    policy.decoder.layers[3].mlp.up_proj.weight.grad[0, 0] = math.nan
    named = r"step 1: gradient norm nan; first bad gradient model.language_model.layers.3.mlp.up_proj.weight. Nothing"
    with pytest.raises(RunError, match=named):
        FiniteSteps(policy, 0).may_step(1, Strategy().norm(policy, 1.0), {"loss": 0.5})
    policy.decoder.layers[2].mlp.up_proj.weight.data[0, 0] = math.nan
    with pytest.raises(RunError, match="first bad weight .*layers.2.mlp.up_proj.weight, which was so before"):
        FiniteSteps(policy, 0).may_step(1, math.nan, {})


def test_gradients_are_clipped_as_torch_does(policy):
    for p in policy.parameters():
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    policy.freeze_vision()
    grads = [p.grad.clone() for p in policy.parameters()]
    norm = Strategy().norm(policy, None)
    assert all(torch.equal(p.grad, g) for p, g in zip(policy.parameters(), grads, strict=True))
    assert Strategy().norm(policy, 0.5) == norm
    ours = [p.grad.clone() for p in policy.parameters()]
    for p, g in zip(policy.parameters(), grads, strict=True):
        p.grad = g
    assert float(torch.nn.utils.clip_grad_norm_([p for p in policy.parameters() if p.requires_grad], 0.5)) == norm
    assert all(torch.equal(p.grad, g) for p, g in zip(policy.parameters(), ours, strict=True))


def run_sft(config, folder, bad=frozenset(), resume=False) -> Policy:
    from genevolve_fast.train.sft import sft

    policy = start()
    spoilt(policy, set(bad))
    sft(config, policy, Path(config.data.path), folder, resume=resume)
    return policy


@pytest.mark.slow
def test_sft_stops_at_a_loss_that_is_nan_and_loses_that_step_only(data, tmp_path, capsys):
    run_sft(config(data), tmp_path / "whole")
    with pytest.raises(
        RunError, match="step 2: loss nan; hidden.0. holds NaN or infinity. Nothing was stepped.*--resume"
    ):
        run_sft(config(data), tmp_path / "cut", bad={2})
    assert [p.name for p in checkpoints(tmp_path / "cut" / "checkpoints")] == ["step_000001", "step_000002"]
    run_sft(config(data), tmp_path / "cut", resume=True)
    assert measured(tmp_path / "cut" / "metrics.jsonl") == measured(tmp_path / "whole" / "metrics.jsonl")

    skipping = config(data, optim={"lr": 1e-5, "skip_nonfinite": 1})
    run_sft(skipping, tmp_path / "skipped", bad={1, 3})
    rows = measured(tmp_path / "skipped" / "metrics.jsonl")
    assert [r["skipped_steps"] for r in rows] == [0, 1, 0, 1] and math.isnan(rows[1]["loss"])
    assert "skipped, 1 of optim.skip_nonfinite 1 in a row" in capsys.readouterr().out
    with pytest.raises(RunError, match="2 such steps in a row are no accident"):
        run_sft(skipping, tmp_path / "stopped", bad={1, 2})
    with pytest.raises(ConfigError, match="optim.release_gradients needs optim.skip_nonfinite 0"):
        released = {"release_gradients": True, "max_grad_norm": None, "skip_nonfinite": 1}
        config(data, batch_size=1, optim=released, policy={"path": "sandbox:start", "gradient_checkpointing": True})


# --- judges that are gone ---------------------------------------------------------------------------------------------


def evolve(runs: Path, **fields: object) -> int:
    plain = {
        "name": "t",
        "steps": 1,
        "checkpoint.every": 1,
        "pool_size": 40,
        "rollout.prompts_per_step": 3,
        "rollout.num_generations": 3,
        "threads": 1,
    }
    sets = [part for name, value in (plain | fields).items() for part in ("--set", f"{name}={value}")]
    return main(["evolve", "--config", "demo", "--runs", str(runs), "--resume", *sets])


def judge_section(server, patience_s: float) -> str:
    fields = {"kind": "chat", "model": "rules", "base_url": server.base_url, "attempts": 1, "patience_s": patience_s}
    return json.dumps(fields)


@pytest.mark.slow
def test_judges_away_for_longer_than_patience_cost_no_rollout_and_no_verdict(tmp_path, capsys):
    """Patience of a second and an outage of several stand for five minutes and ten."""
    from loopback.judge import LoopbackJudge

    file = tmp_path / "t" / "rollouts" / "step_000000.safetensors"

    def stopped(server) -> dict[str, object]:
        """Outcomes by rollout of a run that had to stop."""
        assert evolve(tmp_path, judge=judge_section(server, 1)) == 2
        said = capsys.readouterr().err.splitlines()[-1]
        assert "rollouts failed, more than max_failed_share 0.5; the first: judge: " in said and "--resume" in said
        assert server.base_url in said and "cannot be reached" in said
        return {t.id: (t.outcome, t.ids.tobytes()) for t in load(file)[0]}

    with LoopbackJudge(train=40) as server:
        server.fault("hangup", share=0.4)
        first = stopped(server)
        unjudged = [i for i, (outcome, _) in first.items() if outcome is None]
        assert 4 < len(unjudged) < 9 and not (tmp_path / "t" / "metrics.jsonl").exists()
        server.kill()
        assert stopped(server) == first
        threading.Timer(4, server.start).start()  # back within the patience of the run that goes on
        assert evolve(tmp_path, judge=judge_section(server, 120)) == 0
        assert server.seen()["image"] == len(unjudged)
    last = {t.id: (t.outcome, t.ids.tobytes()) for t in load(file)[0]}
    assert {i: ids for i, (_, ids) in last.items()} == {i: ids for i, (_, ids) in first.items()}
    assert all(isinstance(outcome, Judged) for outcome, _ in last.values())
    assert all(last[i] == first[i] for i in first.keys() - set(unjudged))
    (row,) = measured(tmp_path / "t" / "metrics.jsonl")
    assert row["rollouts/failed"] == 0 and row["failures/image_judge/connect"] > 0


@pytest.mark.slow
def test_evolve_stops_or_skips_where_the_policy_gives_no_numbers(tmp_path, monkeypatch):
    from genevolve_fast.commands.opening import open_pool
    from genevolve_fast.train import evolve as module
    from genevolve_fast.train.config import EvolveConfig, load_config

    real, steps = module.accumulate_gradients, []

    def overflows(policy, batch, *given, **named):
        """In the second step, as in a layer whose activations overflow; the engine samples with the same weights."""
        steps.append(len(batch))
        if len(steps) != 2:
            return real(policy, batch, *given, **named)
        with spoilt(policy, {0}, per_step=10**6):
            return real(policy, batch, *given, **named)

    monkeypatch.setattr(module, "accumulate_gradients", overflows)
    fields = ["steps=3", "checkpoint.every=1", "pool_size=40", "rollout.prompts_per_step=4", "threads=1"]
    fields += ["rollout.num_generations=3", "checkpoint.keep_best=1", "checkpoint.metric=reward"]
    read = functools.partial(load_config, EvolveConfig, ROOT / "configs" / "demo.yaml")
    config = read(fields)
    pool, world = open_pool(config)
    with pytest.raises(
        RunError, match=r"step 1: actor/pg_loss nan; hidden\[0\] holds NaN.*--resume goes on.*skip_nonfinite=1"
    ):
        module.evolve(config, Policy.from_pretrained(start_path()), world, pool, tmp_path / "t")
    assert [p.name for p in checkpoints(tmp_path / "t" / "checkpoints")] == ["step_000001"]
    steps.clear()
    steps.append(0)  # the step that could not be is made again, and cannot be again
    allowed = read([*fields, "optim.skip_nonfinite=1"])  # a resumed run may allow it
    module.evolve(allowed, Policy.from_pretrained(start_path()), world, pool, tmp_path / "t", resume=True)
    rows = measured(tmp_path / "t" / "metrics.jsonl")
    assert [r["actor/skipped_steps"] for r in rows] == [0, 1, 0]
    first, second = (load_file(tmp_path / "t" / "checkpoints" / f"step_00000{n}" / "policy" / NAME) for n in (2, 3))
    assert not same(first, second)
    best, scores = read_marker(tmp_path / "t" / "checkpoints")
    assert scores == {r["step"]: r["reward"] for r in rows} and best == max(scores, key=scores.get)
