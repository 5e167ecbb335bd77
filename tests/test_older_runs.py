"""Runs of older releases go on: a configuration without the fields that came later."""

from __future__ import annotations

import pytest
import yaml

from genevolve_fast.train.config import EvolveConfig, parse_config
from genevolve_fast.train.run import RunError, refuse_another_run

LATER = ("distributed", "trainer_gpus", "rollout_gpus")
LATER_IN = {"optim": ("implementation", "bf16"), "rollout": ("staleness",), "policy": ("quantize",)}


@pytest.fixture
def older(tmp_path):
    """A run's folder whose configuration knows none of the later fields."""
    fields = parse_config(EvolveConfig, {"optim": {"lr": 1e-5}}).model_dump(mode="json")
    for name in LATER:
        del fields[name]
    for section, names in LATER_IN.items():
        for name in names:
            del fields[section][name]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(fields))
    return tmp_path


def test_a_run_of_an_older_release_goes_on_with_the_defaults_of_what_came_later(older):
    refuse_another_run(older, parse_config(EvolveConfig, {"optim": {"lr": 1e-5}}), resume=True)


def test_a_later_field_that_is_set_is_a_change(older):
    config = parse_config(EvolveConfig, {"optim": {"lr": 1e-5, "bf16": "master"}, "policy": {"dtype": "bfloat16"}})
    with pytest.raises(RunError, match=r"another configuration \(optim.bf16, policy.dtype\)"):
        refuse_another_run(older, config, resume=True)
