"""The paper's configuration on loopback servers, each killed in the middle of the run: nothing is lost."""

from __future__ import annotations

import json

import pytest

from benchmarks.outages import NAME, evolve_through
from genevolve_fast.trajectory import load


@pytest.mark.slow
def test_evolve_survives_the_death_of_every_server(tmp_path):
    # four requests a step: of those of steps 2 and 3, some look for pictures
    survived = evolve_through(tmp_path, steps=5, prompts=4, generations=3)
    assert survived.rollouts == 60 and not survived.lost
    assert survived.failures["failures/engine/connect"] > 0 and survived.failures["failures/search/connect"] > 0
    assert survived.failures["failures/image_download/connect"] > 0
    metrics = [json.loads(line) for line in (tmp_path / NAME / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in metrics] == [1, 2, 3, 4, 5]
    # the engine answers with the trainer's weights, also after it came back with those of its start
    assert all(m["rollout_corr/logp_difference_abs"] < 1e-4 for m in metrics)
    rollouts, images = load(tmp_path / NAME / "rollouts" / "step_000004.safetensors")
    assert {t.policy_step for t in rollouts} == {4} and all(t.reward is not None for t in rollouts)
