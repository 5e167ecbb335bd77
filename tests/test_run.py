"""A run's folder: one trainer at a time, and runs of older releases go on."""

from __future__ import annotations

import pytest
import yaml

from genevolve_fast.cli import main
from genevolve_fast.resumable import BatchError, held
from genevolve_fast.train.config import EvolveConfig, SftConfig, parse_config
from genevolve_fast.train.evolve import evolve
from genevolve_fast.train.run import RunError, claimed, refuse_another_run
from genevolve_fast.train.sft import sft

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


@pytest.mark.parametrize(
    "train",
    [
        lambda folder: evolve(parse_config(EvolveConfig, {}), None, None, [], folder, resume=True),
        lambda folder: sft(parse_config(SftConfig, {}), None, folder / "data", folder, resume=True),
    ],
    ids=["evolve", "sft"],
)
def test_a_second_trainer_of_a_run_is_refused_before_it_opens_anything(train, tmp_path):
    with (
        held(tmp_path / ".lock"),
        pytest.raises(RunError, match="another process: wait for its end; --set"),
    ):
        train(tmp_path)
    with pytest.raises(AttributeError):  # it is let in, and finds no policy
        train(tmp_path)


def test_a_run_that_was_refused_before_it_wrote_anything_leaves_no_folder(tmp_path):
    config = parse_config(EvolveConfig, {})
    for written in (False, True):
        with pytest.raises(KeyError), claimed(tmp_path / "runs" / "r", config, resume=False):
            if written:
                (tmp_path / "runs" / "r" / "kept").touch()
            raise KeyError
        assert (tmp_path / "runs" / "r").exists() == written


def test_a_run_that_failed_leaves_its_folder_to_the_next_one(tmp_path):
    config = parse_config(EvolveConfig, {})
    with pytest.raises(KeyError) as failed, claimed(tmp_path, config, resume=False):
        raise KeyError
    with claimed(tmp_path, config, resume=True):
        assert failed.value is not None


def test_a_claim_within_a_claim_ends_with_the_outer_one(tmp_path):
    config = parse_config(EvolveConfig, {})
    with claimed(tmp_path, config, resume=True):
        with claimed(tmp_path, config, resume=True):
            pass
        with pytest.raises(BatchError, match="another process"):
            held(tmp_path / ".lock")
    held(tmp_path / ".lock").close()


def test_a_refused_sft_leaves_the_data_of_the_run_alone(tmp_path, capsys):
    command = ["sft", "--config", "sandbox_sft", "--set", "name=mine", "--runs", str(tmp_path)]
    with held(tmp_path / "mine" / ".lock"):
        assert main(command) == 2
    assert "is being written by another process" in capsys.readouterr().err
    (tmp_path / "mine" / "config.yaml").touch()
    assert main(command) == 2
    assert "already holds a run" in capsys.readouterr().err and not (tmp_path / "mine" / "data").exists()
