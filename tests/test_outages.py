"""The paper's configuration on loopback servers, each killed in the middle of the run: nothing is lost."""

from __future__ import annotations

import json

import pytest

from benchmarks.outages import NAME, Size, sample_through, score_through
from genevolve_fast.trajectory import load

SMALL = Size(steps=5, prompts=4, generations=3)  # of four requests a step some look for pictures


def metrics(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / NAME / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_evolve_survives_the_death_of_all_that_rollouts_need(tmp_path):
    survived = sample_through(tmp_path, SMALL)
    assert survived.rollouts == 60 and not survived.lost
    assert survived.failures["failures/engine/connect"] > 0 and survived.failures["failures/search/connect"] > 0
    assert survived.failures["failures/image_download/connect"] > 0
    assert [m["step"] for m in metrics(tmp_path)] == [1, 2, 3, 4, 5]
    # the engine answers with the trainer's weights, also after it came back with those of its start
    assert all(m["rollout_corr/logp_difference_abs"] < 1e-4 for m in metrics(tmp_path))
    rollouts, images = load(tmp_path / NAME / "rollouts" / "step_000004.safetensors")
    assert {t.policy_step for t in rollouts} == {4} and all(t.reward is not None for t in rollouts)


@pytest.mark.slow
def test_evolve_survives_the_death_of_all_that_scores_and_repeats_it_from_its_caches(tmp_path):
    survived = score_through(tmp_path, SMALL)
    assert survived.rollouts == 60 and not survived.lost
    assert survived.failures["failures/render/connect"] > 0
    assert any(survived.failures.get(f"failures/{judge}/connect", 0) > 0 for judge in ("image_judge", "program_judge"))
    first, again = metrics(tmp_path), metrics(tmp_path / "again")
    for name in ("reward", "rewards/kscore/mean", "actor/pg_loss", "actor/sdl_loss"):
        assert [m[name] for m in first] == [m[name] for m in again]  # to the bit
    assert not any(name.startswith("failures/") for m in again for name in m)
