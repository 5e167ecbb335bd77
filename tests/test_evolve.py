"""Evolution end to end on the shipped start: phases, refusals, and a SIGKILL in each of them."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from genevolve_fast.cli import main
from genevolve_fast.fields import describe
from genevolve_fast.report.build import build_report
from genevolve_fast.report.records import read_step
from genevolve_fast.train import engines
from genevolve_fast.train.config import ConfigError, EvolveConfig, SftConfig, load_config, parse_config
from genevolve_fast.trajectory import load

ROOT = Path(__file__).parents[1]
SMALL = {
    "name": "t",
    "steps": 3,
    "checkpoint.every": 2,
    "pool_size": 40,
    "rollout.prompts_per_step": 3,
    "rollout.num_generations": 3,
    "rollout.temperature": 1.0,
    "experience.min_gap": 0.1,
    "objective.kl_coef": 0.001,
    "threads": 1,
    "evaluate.requests": 0,
}


def command(runs: Path, *extra: str) -> list[str]:
    sets = [part for name, value in SMALL.items() for part in ("--set", f"{name}={value}")]
    config = str(ROOT / "configs" / "demo.yaml")
    return [
        sys.executable,
        "-m",
        "genevolve_fast.cli",
        "evolve",
        "--config",
        config,
        "--runs",
        str(runs),
        *sets,
        *extra,
    ]


def run(runs: Path, *extra: str) -> None:
    done = subprocess.run(command(runs, *extra), capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def measured(runs: Path) -> list[dict]:
    rows = [json.loads(line) for line in (runs / "t" / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if not k.startswith(("timing", "memory", "perf"))} for r in rows]


@pytest.fixture(scope="module")
def uninterrupted(once):
    return once("evolve_uninterrupted", run)


@pytest.mark.slow
def test_a_run_leaves_what_it_promises(uninterrupted):
    folder, rows = uninterrupted / "t", measured(uninterrupted)
    assert [r["step"] for r in rows] == [1, 2, 3]
    names = {
        "reward",
        "reward_std",
        "frac_reward_zero_std",
        "rewards/kscore/mean",
        "actor/pg_loss",
        "actor/sdl_kl",
        "actor/kl",
        "actor/entropy",
        "actor/grad_norm",
        "actor/lr",
        "num_turns/mean",
        "rollout_corr/logp_difference_abs",
    }
    assert names <= set(rows[0]) and all(r["actor/ratio_max"] == 1 for r in rows)
    assert rows[0]["rollout_corr/logp_difference_abs"] < 1e-4  # the engine's log-probs are the trainer's
    trajectories, images = load(folder / "rollouts" / "step_000000.safetensors")
    assert len(trajectories) == 9 and all(t.outcome is not None for t in trajectories) and images
    record = read_step(folder, 0)
    assert record.traces and len(next(iter(record.traces.values()))[0]) == trajectories[0].num_loss_tokens
    assert (folder / "policy" / "model.safetensors").exists() and list((folder / "tensorboard").iterdir())
    assert [p.name for p in sorted((folder / "checkpoints").iterdir())] == ["step_000002", "step_000003"]


@pytest.mark.slow
def test_the_report_is_one_file(uninterrupted, policy):
    page = build_report(uninterrupted / "t", lambda ids: "x" * len(ids)).read_text()
    data = json.loads(page.split('type="application/json">')[1].split("</script>")[0].replace("<\\/", "</"))
    assert len(data["metrics"]) == 3 and data["steps"][0]["groups"][0]["rollouts"][0]["turns"]
    assert "http://" not in page.replace("http://www.w3.org/2000/svg", "") and "https://" not in page


@pytest.mark.slow
def test_killed_in_each_phase_and_resumed_equals_uninterrupted(uninterrupted, tmp_path):
    log = tmp_path / "t" / "phases.jsonl"
    for step, phase in ((1, "rollout"), (1, "judge"), (1, "update_actor"), (2, "checkpoint")):
        before = log.stat().st_size if log.exists() else 0
        line = command(tmp_path) + ["--resume"] * (before > 0)
        process = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        at, until = {"step": step, "phase": phase}, time.time() + 240
        while time.time() < until and process.poll() is None:
            lines = log.read_bytes()[before:].decode().splitlines() if log.exists() else []
            if any({k: json.loads(line)[k] for k in at} == at for line in lines if line.endswith("}")):
                break
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
        assert len(measured(tmp_path)) < 3 if (tmp_path / "t" / "metrics.jsonl").exists() else True
    run(tmp_path, "--resume")
    assert measured(tmp_path) == measured(uninterrupted)
    assert not list((tmp_path / "t" / "checkpoints").glob(".partial*"))


REFUSED = {
    "num_generations": {"rollout": {"num_generations": 1}},
    "temperature is 0": {"rollout": {"temperature": 0}},
    "sdl_coef > 0 needs": {"experience": {"enabled": False}},
    "compares rollouts for nothing": {"objective": {"sdl_coef": 0.0}},
    "'sequence' needs old": {"objective": {"rollout_is": "sequence"}},
    "'batch' selects": {"objective": {"sdl_select": "batch"}},
    "leaves no turn": {"rollout": {"max_rounds": 1}},
    "is random": {"policy": {"path": "sandbox:new"}},
    "nothing to resume": {"steps": 5, "checkpoint": {"every": 10}},
    "nonsense": {"nonsense": 1},
    "steps": {"steps": 0},
    "clip_ratio_low": {"objective": {"clip_ratio_low": 2.0}},
    "no_such": {"objective": {"no_such": 2.0}},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_configurations_that_cannot_work_are_refused(reason):
    with pytest.raises(ConfigError, match=reason):
        parse_config(EvolveConfig, REFUSED[reason])


def test_overrides_and_fields(tmp_path):
    config = load_config(EvolveConfig, ROOT / "configs" / "demo.yaml", ["optim.lr=0.5", "objective.sdl_coef=1"])
    assert config.optim.lr == 0.5 and config.objective.sdl_coef == 1
    with pytest.raises(ConfigError, match="--set takes FIELD=VALUE, not .steps."):
        load_config(EvolveConfig, None, ["steps"])
    with pytest.raises(ConfigError, match="--set tools: its value is not YAML"):
        load_config(EvolveConfig, None, ["tools={kind: serper"])
    with pytest.raises(ConfigError, match="cannot read"):
        load_config(EvolveConfig, tmp_path / "none.yaml")
    for kind in (EvolveConfig, SftConfig):
        rows = describe(kind)
        assert all(text for _, _, text in rows), [r for r in rows if not r[2]]
    assert ("objective.sdl_permille", 100) in [row[:2] for row in describe(EvolveConfig)]


@pytest.mark.slow
def test_what_stands_in_the_way_is_said_in_one_line(uninterrupted, tmp_path, capsys, monkeypatch):
    """--fields needs no configuration; a missing policy, package or run is named; a run without checkpoints reports."""
    monkeypatch.setattr(engines, "vllm_installed", lambda: False)
    assert main(["evolve", "--fields"]) == 0
    assert "objective.sdl_coef" in capsys.readouterr().out
    folder = uninterrupted / "t"
    early = shutil.copytree(folder, tmp_path / "t", ignore=shutil.ignore_patterns("policy", "checkpoints"))
    assert main(["report", str(early)]) == 0 and (early / "report.html").exists()
    half = shutil.copytree(folder / "policy", tmp_path / "half", ignore=shutil.ignore_patterns("*.safetensors"))
    for asked, said in [
        (["evolve", "--config", "genevolve_8b"], "rollout.engine vllm: vllm is not installed"),
        (["evolve", "--config", "demo", "--set", "stepz=1"], "stepz: there is no such field"),
        (["bench", "--policy", "./no/policy", "--out", str(tmp_path)], "no policy './no/policy'"),
        (["bench", "--policy", str(half), "--out", str(tmp_path)], "cannot be loaded"),
        (["report", str(tmp_path)], "is not the folder of a run"),
        (["scoreboard", "--file", str(tmp_path / "none.json")], "none.json"),
    ]:
        assert main(asked) == 2
        told = capsys.readouterr().err
        assert said in told and "Traceback" not in told and "Value error" not in told


@pytest.mark.parametrize(
    "name", ["demo", "genevolve_8b", "sandbox_sft", "sandbox_process_sft", "sandbox_process_evolve"]
)
def test_shipped_configurations_are_valid(name):
    load_config(SftConfig if name.endswith("_sft") else EvolveConfig, ROOT / "configs" / f"{name}.yaml")
