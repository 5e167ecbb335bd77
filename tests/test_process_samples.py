"""What a unified model draws while it trains, and that drawing changes nothing of the training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from genevolve_fast.cli import main
from genevolve_fast.process.trace import Cycle, Inspection, Plan, Process
from genevolve_fast.process.unified import train
from genevolve_fast.process.unified.config import UnifiedConfig
from genevolve_fast.process.unified.model import Unified
from genevolve_fast.process.unified.samples import Samples, chosen_requests, write_drawn
from genevolve_fast.process.unified.sampling import Drawing, draw
from genevolve_fast.process.unified.train import train_unified
from genevolve_fast.report.build import build_report
from genevolve_fast.sandbox.tiny_unified import model_for
from genevolve_fast.train.config import ConfigError, parse_config
from genevolve_fast.trajectory import image_hash
from tests.pages import data_of

RNG = np.random.default_rng(0)
PICTURES = [RNG.integers(0, 256, (8, 8, 3), dtype=np.uint8) for _ in range(3)]
PIXELS = {image_hash(p): p for p in PICTURES}
SHAS = list(PIXELS)


def process(n: int, category: str = "single_object") -> Process:
    cycle = Cycle(Plan(f"add {n}", f"a scene of {n}"), SHAS[n % 3], Inspection())
    return Process(f"p{n}", f"request {n}", (cycle,), extra={"category": category})


PROCESSES = [process(n) for n in range(4)]


def config(**changes) -> UnifiedConfig:
    """Learns within 24 steps to draw one picture and to end."""
    model = dict(hidden=32, layers=1, heads=2, patch_size=8, predicts="velocity")
    small = dict(steps=24, batch_size=4, target="one_pass", model=model, checkpoint=dict(every=8, keep_last=9))
    return parse_config(UnifiedConfig, small | dict(optim=dict(lr=2e-2), flow=dict(ce_weight=8.0)) | changes)


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def run(folder: Path, c: UnifiedConfig, **more) -> Path:
    torch.manual_seed(0)
    np.random.seed(0)
    train_unified(c, model_for(c, PROCESSES, PIXELS), PROCESSES, PIXELS, folder, **more)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run with samples."""
    return run(tmp_path_factory.mktemp("runs") / "sampled", config(samples=dict(every=10, count=2, steps=3)))


def test_a_run_draws_the_same_requests_at_every_sampled_step_and_at_its_end(trained):
    steps = sorted(p.name for p in (trained / "samples").iterdir())
    assert steps == ["step_000010", "step_000020", "step_000024"]
    told = [[json.loads(line) for line in (trained / "samples" / s / "drawn.jsonl").open()] for s in steps]
    requests = chosen_requests(PROCESSES, 2, seed=0)
    assert [[row["request"] for row in rows] for rows in told] == [requests] * 3
    assert all(row["drafts"] == 1 and row["steps"] == 3 and row["ended"] for row in told[-1])  # it has learnt to
    policy = Unified.from_pretrained(trained / "policy").eval()
    write_drawn(trained.parent / "again", requests, draw(policy, requests, Drawing(steps=3)))
    assert files(trained.parent / "again") == files(trained / "samples" / steps[-1])
    timed = [json.loads(line)["step"] for line in (trained / "metrics.jsonl").open() if "timing_s/samples" in line]
    assert timed == [10, 20, 24]


def test_with_and_without_samples_a_run_ends_in_the_same_bits(trained, tmp_path):
    plain = run(tmp_path / "plain", config(samples=dict(every=0)))
    assert not (plain / "samples").exists()
    weights = [(folder / "policy" / "model.safetensors").read_bytes() for folder in (plain, trained)]
    assert weights[0] == weights[1]
    for step in ("step_000016", "step_000024"):  # both behind a drawing
        kept = [torch.load(f / "checkpoints" / step / "trainer.pt", weights_only=False) for f in (plain, trained)]
        assert torch.equal(*(k["torch_rng"] for k in kept))
        assert all(np.array_equal(*pair) for pair in zip(*(k["numpy_rng"][1:3] for k in kept), strict=True))


def test_drawing_leaves_mode_and_random_states_as_they_were(tmp_path):
    c = config(samples=dict(every=1))
    policy = model_for(c, PROCESSES, PIXELS)
    for training in (True, False):
        policy.train(training)
        before = torch.get_rng_state()
        Samples(c, PROCESSES, tmp_path).draw(policy, 1)
        assert policy.training is training and policy.flow.training is training
        assert torch.equal(torch.get_rng_state(), before)


def test_an_interrupted_run_has_the_samples_of_an_uninterrupted_one(trained, tmp_path, monkeypatch):
    c, real = config(samples=dict(every=10, count=2, steps=3)), train.accumulate

    def crash(config, policy, processes, pixels, step, finite):
        if step == 22:
            raise KeyboardInterrupt
        return real(config, policy, processes, pixels, step, finite)

    monkeypatch.setattr(train, "accumulate", crash)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", c)
    monkeypatch.setattr(train, "accumulate", real)
    parts = run(tmp_path / "parts", c, resume=True)
    assert files(parts / "samples") == files(trained / "samples")


def test_what_is_drawn_may_change_when_a_run_goes_on(trained, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "on")
    shutil.rmtree(folder / "checkpoints" / "step_000024")
    run(folder, config(samples=dict(every=10, requests=["a request of mine"], steps=3)), resume=True)
    columns = {p.parent.name: p.read_text().count("\n") for p in (folder / "samples").glob("*/drawn.jsonl")}
    assert columns == {"step_000010": 2, "step_000020": 1, "step_000024": 1}
    data = data_of(build_report(folder, str))
    assert [r["request"] for r in data["samples"]["rows"]][-1] == "a request of mine"
    assert [c is None for c in data["samples"]["rows"][-1]["cells"]] == [True, False, False]


def test_requests_are_of_as_many_categories_as_there_are_and_each_comes_once():
    rows = [process(n, "counting" if n == 7 else "position") for n in range(9)] + [process(0), process(0)]
    chosen = chosen_requests(rows, 3, seed=0)
    assert "request 7" in chosen[:3] and "request 0" in chosen_requests(rows, 99, 1)
    assert len(chosen) == 3 and sorted(chosen_requests(rows, 99, 1)) == [f"request {n}" for n in range(9)]
    assert chosen == chosen_requests(rows, 3, seed=0) and chosen_requests(rows, 99, 1) != chosen_requests(rows, 99, 0)


@pytest.mark.parametrize(
    ("samples", "told"),
    [
        (dict(every=0, count=2), "count with every 0 would do nothing"),
        (dict(every=0, requests=["a"]), "requests with every 0"),
        (dict(requests=["a"], count=2), "count with requests would do nothing"),
        (dict(requests=["a", " "]), "an empty one"),
        (dict(requests=["a", "a"]), "twice"),
        (dict(count=0), "count"),
    ],
)
def test_samples_that_would_do_nothing_are_refused(samples, told):
    with pytest.raises(ConfigError, match=told):
        config(samples=samples)


def test_the_report_of_a_run_has_its_losses_and_its_samples(trained, capsys):
    assert main(["report", str(trained)]) == 0
    data = data_of(trained / "report.html")
    assert len(data["metrics"]) == 24 and {"loss/text", "loss/flow", "grad_norm", "lr"} <= set(data["metrics"][0])
    samples = data["samples"]
    assert samples["steps"] == [10, 20, 24] and samples["left_out"] == [0, 0] and len(samples["rows"]) == 2
    for row in samples["rows"]:
        last = row["cells"][-1]
        assert len(last["drafts"]) == 1 and len(last["texts"]) == 2 and last["ended"]
        assert data["images"][last["drafts"][0]].startswith("data:image/png;base64,")
