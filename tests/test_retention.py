"""Which checkpoints stay, and which is the best: decided from what was logged, the same after a crash."""

from __future__ import annotations

import json
import math
import random

import pytest

from genevolve_fast.train.config import CheckpointConfig, ConfigError, EvolveConfig, parse_config
from genevolve_fast.train.retention import MARKER, Retention, check_metric, kept, logged, ranked, read_marker, score
from genevolve_fast.train.run import RunError


def log(folder, values, name="reward"):
    folder.mkdir(exist_ok=True, parents=True)
    rows = [json.dumps({"step": i, name: v}) for i, v in enumerate(values, 1)]
    (folder / "metrics.jsonl").write_text("\n".join(rows) + "\n")


def test_the_newest_and_beside_them_the_best_stay():
    scores = {10: 0.5, 20: 0.9, 30: 0.7, 40: 0.1, 50: 0.2}
    assert kept(scores, scores, 2, 0) == {40, 50} and kept(scores, scores, 1, 2) == {20, 30, 50}
    assert kept(scores, scores, 5, 3) == set(scores) and kept([], {}, 2, 1) == set()
    assert kept([10, 20, 30], scores, 2, 1) == {20, 30}  # one may be both


def test_of_equal_scores_the_newer_stays_and_no_score_is_never_the_best():
    assert kept([1, 2, 3, 4], {1: 0.5, 2: 0.5, 3: math.nan}, 1, 1) == {2, 4}
    assert ranked([1, 2, 3], {3: math.nan}) == []


def test_no_order_of_arrival_keeps_less_than_was_asked():
    for seed in range(50):
        rng = random.Random(seed)
        last, best = rng.randint(1, 4), rng.randint(0, 4)
        scores = {s: rng.choice([0.1, 0.2, math.nan, rng.random()]) for s in range(1, 30)}
        there: set[int] = set()
        for step in scores:
            there = kept(there | {step}, scores, last, best)
        seen = sorted(scores)
        assert there == kept(seen, scores, last, best)  # whoever went early is among the best of nothing later


def test_a_score_is_the_mean_since_the_checkpoint_before():
    rows = [{"step": i, "reward": float(i)} for i in range(1, 11)]
    rows[6]["reward"] = math.nan  # a skipped step
    del rows[7]["reward"]
    assert score(rows, "reward", 5, 10) == (6 + 9 + 10) / 3
    assert score(rows, "-reward", 0, 2) == -1.5 and math.isnan(score(rows, "loss", 0, 10))


def test_a_removed_checkpoint_still_ends_the_next_ones_window(tmp_path):
    """One checkpoint a step pair: of 1, 1, 9, 1 the second window is the best though its first step was a bad one."""
    log(tmp_path, [1, 1, 2, 8, 3, 3, 4, 4])
    folder = tmp_path / "checkpoints"
    config = CheckpointConfig(keep_last=1, keep_best=1, metric="reward")
    there: set[int] = set()
    for step in (2, 4, 6, 8):
        folder.mkdir(exist_ok=True)
        there = Retention(folder, config).kept(there | {step})
        Retention(folder, config).mark(there)
    assert there == {4, 8}
    assert read_marker(folder) == (4, {2: 1, 4: 5, 6: 3, 8: 4})


def test_a_run_that_went_back_scores_again_what_it_does_again(tmp_path):
    log(tmp_path, [1, 9])
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    config = CheckpointConfig(keep_last=1, keep_best=1, metric="reward")
    Retention(folder, config).mark([1, 2])
    assert read_marker(folder)[0] == 2
    log(tmp_path, [1, 0])  # resumed at 1: another second step
    Retention(folder, config).mark([1, 2])
    assert read_marker(folder) == (1, {1: 1, 2: 0})


def test_nothing_is_written_where_nothing_is_best(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    Retention(tmp_path / "checkpoints", CheckpointConfig()).mark([1, 2])
    assert not (tmp_path / "checkpoints" / MARKER).exists() and read_marker(tmp_path / "checkpoints") == (None, {})


def test_a_line_cut_by_a_crash_is_no_row(tmp_path):
    log(tmp_path, [1, 2])
    with (tmp_path / "metrics.jsonl").open("a") as f:
        f.write('{"step": 3, "rew')
    assert [row["step"] for row in logged(tmp_path / "metrics.jsonl")] == [1, 2]


def test_an_unknown_metric_is_refused_with_the_known_ones():
    row = {"step": 1, "reward": 0.5, "actor/kl": 0.0, "timing_s/judge": 1.0}
    check_metric("reward", row), check_metric("-actor/kl", row), check_metric(None, row)
    with pytest.raises(RunError, match=r"'rewards' is no metric .* one of actor/kl, reward, step "):
        check_metric("rewards", row)


@pytest.mark.parametrize(
    ("section", "reason"),
    [({"keep_best": 1}, "keep_best needs metric"), ({"metric": "reward"}, "metric without keep_best would do nothing")],
)
def test_half_a_wish_is_refused(section, reason):
    with pytest.raises(ConfigError, match=reason):
        parse_config(EvolveConfig, {"checkpoint": section})
