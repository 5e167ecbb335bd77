"""Rates: what is measured is found again, merged by condition, and predicts a real step within a factor of two."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from loopback.web import free_port

from benchmarks import rate_cases, rates
from benchmarks.models import MODELS, Model
from genevolve_fast.profile.rates import Rates
from genevolve_fast.profile.shapes import ModelShape

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
pytestmark = pytest.mark.slow


def entry(value: float, **at) -> dict:
    return dict(name="head_score", value=value, unit="FLOP/s", n=3, at=at)


def test_an_entry_replaces_the_one_of_the_same_condition_only(tmp_path, capsys):
    file = tmp_path / "rates.json"
    for device, value, rows in (("a", 1.0, 10), ("a", 2.0, 20), ("b", 3.0, 10), ("a", 4.0, 10)):
        rates.merge(file, device, [entry(value, rows=rows)], command="c", at="abc")
    found = Rates.read(file)
    assert {(r.device, r.at["rows"]): r.value for r in found.rates} == {("a", 20): 2.0, ("b", 10): 3.0, ("a", 10): 4.0}
    assert found.devices == ("a", "b") and {r.commit for r in found.rates} == {"abc"}
    versions = json.loads(file.read_text())["devices"]["b"]["versions"]
    assert versions["torch"] == torch.__version__


def test_a_time_that_cannot_be_told_gives_no_rate():
    with pytest.raises(ArithmeticError, match="too short"):
        rate_cases.found("layer_forward", 1.0, -1e-6, "FLOP/s", 3)


def test_a_layers_rate_is_its_products_over_its_time_without_attention():
    """A run that takes a known time: the rate follows from it."""
    device = rate_cases.Device(CPU, 1, (64,), (32,))
    seconds = {"forward": 3.0, "both": 10.0, "attention_forward": 1.0, "attention_backward": 2.0}
    known = type("Known", (rate_cases.Device,), {"medians": lambda self, **runs: {n: seconds[n] for n in runs}})
    toy = MODELS["toy"]
    for lora, share in ((0, 3), (4, 2)):
        model = Model(toy.shape, toy.dtype, lora)
        policy = rate_cases.policy_of(model, device)
        made = rate_cases.layers(policy, model, known(CPU, 1, (64,), (32,)))
        found = {(r["name"], r["at"].get("checkpointing")): r["value"] for r in made}
        product = 2.0 * toy.shape.linear_parameters / toy.shape.layers * 64
        assert found["layer_forward", None] == pytest.approx(product / 2, rel=1e-3)
        assert found["layer_backward", True] == pytest.approx(share * product / 4, rel=1e-3)
        assert found["layer_backward", False] == pytest.approx((share - 1) * product / 5, rel=1e-3)


def test_two_ranks_measure_what_goes_between_them(tmp_path):
    file = tmp_path / "rates.json"
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    command = [*start, "benchmarks.collectives", "--file", str(file), "--bytes", "1048576", "--repeats", "3"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=300)
    found = Rates.read(file).rates
    assert [r.name for r in found] == ["all_gather", "reduce_scatter", "all_reduce"]
    for r in found:
        assert r.at == dict(spans="node", ranks=2, nodes=1, backend="gloo", bytes=1 << 20) and 1e4 < r.value < 1e12


def test_servers_are_measured_as_a_run_asks_them(tmp_path):
    file, port = tmp_path / "rates.json", free_port()
    serve = [sys.executable, "-m", "genevolve_fast.cli", "serve", "--model", "sandbox:start", "--backend"]
    serve += ["transformers", "--training", "--port", str(port)]
    server = subprocess.Popen(serve, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        url = f"http://127.0.0.1:{port}"
        answers(url, server)
        only = ["--only", "sampling", "--servers", url, "--repeats", "1", "--file", str(file)]
        assert rates.main(only) == 0
    finally:
        server.terminate()
        server.wait(30)
    found = Rates.read(file).rates
    assert [r.at["open"] for r in found] == [48, 12] and {r.at["engine"] for r in found} == {"server"}
    assert all(100 < r.at["context"] < 1000 and r.value > 1 for r in found)


def answers(url: str, server: subprocess.Popen) -> None:
    import httpx

    for _ in range(600):
        assert server.poll() is None, "the server ended"
        try:
            httpx.get(f"{url}/health", timeout=5).raise_for_status()
            return
        except httpx.HTTPError:
            time.sleep(0.2)
    raise TimeoutError(url)


def test_collectives_need_somebody_to_talk_to(capsys, monkeypatch):
    from benchmarks import collectives

    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(SystemExit):
        collectives.main([])
    assert "torchrun" in capsys.readouterr().err


@pytest.fixture(scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def demo_step(one_thread):
    """The demo's first step with one thread: (rollouts that are trained on, its settings, seconds by part)."""
    from benchmarks.step_cases import demo_batch
    from genevolve_fast.commands.opening import config_path
    from genevolve_fast.train.config import EvolveConfig, load_config
    from genevolve_fast.train.fits import settings_of
    from genevolve_fast.train.update import accumulate_gradients, forwarded

    policy, rollouts, images, objective, options = demo_batch(False)
    config = load_config(EvolveConfig, config_path("demo"))
    took = []
    for _ in range(4):
        begin = time.process_time()  # one thread's own seconds: neighbours do not count
        accumulate_gradients(policy, rollouts, images, objective, **options)
        took.append(time.process_time() - begin)
    return forwarded(rollouts, False), settings_of(config, CPU), min(took[1:])


@pytest.fixture(scope="module")
def measured(one_thread, tmp_path_factory) -> Path:
    """The rates of this machine, measured now, by the command itself."""
    file = tmp_path_factory.mktemp("rates") / "rates.json"
    sections = ["--only", "attention", "head", "layers", "optimizer", "sampling"]
    small = ["--rows", "256", "1024", "--lengths", "64", "256", "--repeats", "2"]
    assert rates.main(["--threads", "1", *small, "--file", str(file), *sections]) == 0
    return file


@pytest.mark.alone
def test_the_predicted_training_step_is_the_measured_one_within_a_factor_of_two(demo_step, measured):
    from genevolve_fast.profile.step_time import step_time
    from genevolve_fast.sandbox.tiny_policy import start_path
    from genevolve_fast.train.profiled import group_lengths

    live, settings, seconds = demo_step
    found = Rates.read(measured)
    made = step_time(
        ModelShape.from_config(start_path()), settings, found, found.devices[0], groups=group_lengths(live)
    )
    parts = {line.name: line.seconds for line in made.lines}
    predicted = sum(parts[name] for name in ("prefix", "student", "teacher", "head", "backward"))
    print(f"predicted {predicted:.2f} s, measured {seconds:.2f} s: {predicted / seconds:.2f}")
    assert 0.5 < predicted / seconds < 2
    assert made.missing == [] and made.step[0] > predicted


@pytest.mark.alone  # for the rates that the others measure
def test_the_plan_tells_which_rates_it_stands_on(measured, capsys):
    from genevolve_fast.cli import main

    lengths = ["--tokens", "450", "--prefix", "190", "--mean-tokens", "300", "--loss-share", "0.75"]
    assert main(["plan", "--config", "demo", "--set", "threads=1", *lengths, "--rates", str(measured)]) == 0
    told = capsys.readouterr().out
    assert "no rate checkpoint_write" in told and "training: estimated" in told and "step: estimated" in told
    assert "sampling" in told and "1 thread" in told


def test_a_real_run_is_recorded_with_the_plan_that_it_is_compared_with(tmp_path, capsys):
    import shlex

    from genevolve_fast.cli import main

    file = tmp_path / "rates.json"
    few = ["rollout.prompts_per_step=2", "rollout.num_generations=3"]
    sets = [part for one in few for part in ("--set", one)]
    only = ["--only", "run", "--steps", "1", "--threads", "1", *sets]
    assert rates.main([*only, "--file", str(file)]) == 0
    (device,) = json.loads(file.read_text())["devices"].values()
    (run,) = device["runs"]
    assert run["seconds"]["step"] >= run["seconds"]["rollout"] + run["seconds"]["training"] > 0
    assert 100 < run["settings"]["prefix"] < run["settings"]["mean_tokens"] <= run["settings"]["tokens"]
    capsys.readouterr()
    main([*shlex.split(run["plan"])[1:], "--rates", str(file)])
    told = capsys.readouterr().out
    assert "measured on" in told and f"rollout {run['seconds']['rollout']:.3g}" in told
    main([*shlex.split(run["plan"])[1:], "--rates", str(file), "--mean-tokens", str(run["settings"]["prefix"] + 1)])
    assert "measured on" not in capsys.readouterr().out, "another step than the one that was run"


@pytest.mark.alone
@pytest.mark.parametrize("strategy", ["fsdp2"])
def test_two_ranks_train_as_fast_as_the_plan_says_within_a_factor_of_two(strategy, measured, tmp_path):
    from genevolve_fast.profile.plan import Settings
    from genevolve_fast.profile.step_time import step_time
    from genevolve_fast.sandbox.tiny_policy import start_path

    file = Path(shutil.copy(measured, tmp_path / "rates.json"))
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    command = [*start, "benchmarks.collectives", "--file", str(file), "--repeats", "3"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=300)
    sets = ["--set", "rollout.prompts_per_step=4", "--set", f"distributed.strategy={strategy}"]
    only = ["--only", "run", "--run-ranks", "2", "--threads", "1", "--steps", "3", *sets]
    assert rates.main([*only, "--file", str(file)]) == 0
    found = Rates.read(file)
    (run,) = found.runs
    settings = Settings(**{k: v for k, v in run.settings.items() if k in Settings.__dataclass_fields__})
    assert settings.world == 2 and settings.strategy == strategy
    made = step_time(ModelShape.from_config(start_path()), settings, found, found.devices[0])
    hidden, exposed = made.training
    print(f"{strategy}: predicted {hidden:.2f} to {exposed:.2f} s, measured {run.seconds['training']:.2f} s")
    assert exposed / run.seconds["training"] > 0.5 and hidden / run.seconds["training"] < 2
