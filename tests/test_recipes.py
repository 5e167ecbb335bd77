"""Recipes: each fits its GPU by the planner, differs from the paper's run where it says, and is told as it is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from benchmarks.recipes import RECIPES
from genevolve_fast.commands.opening import config_path
from genevolve_fast.profile.rates import FILE, Rates
from genevolve_fast.train.config import EvolveConfig, load_config
from genevolve_fast.train.fits import launched_gpus

ROOT = Path(__file__).parents[1]
DIFFERENT = {  # file -> fields that are not configs/genevolve_8b.yaml's, besides its name
    "qlora_24gb": {
        "max_tokens_per_microbatch", "head_workspace_mb", "policy.offload_gib", "policy.quantize", "policy.lora.rank",
        "rollout.engine", "rollout.max_batch", "rollout.prompts_per_step", "rollout.max_response_length", "optim.lr",
    },
    "qlora_2x24gb": {
        "max_tokens_per_microbatch", "head_workspace_mb", "policy.offload_gib", "policy.quantize", "policy.lora.rank",
        "rollout.engine", "rollout.server.gpu_memory_utilization", "rollout.server.merge_lora", "rollout_gpus",
        "optim.lr",
    },
    "lora_40gb": {"policy.offload_gib", "policy.lora.rank", "rollout.vllm.gpu_memory_utilization", "optim.lr"},
    "lora_48gb": {"policy.offload_gib", "policy.lora.rank", "rollout.vllm.gpu_memory_utilization", "optim.lr"},
    "full_141gb": {"optim.bf16"},
    "full_8x80gb": {"optim.bf16", "distributed.strategy"},
}  # fmt: skip


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def fields(data: dict, before: str = "") -> dict[str, object]:
    out: dict[str, object] = {}
    for name, value in data.items():
        out |= fields(value, f"{before}{name}.") if isinstance(value, dict) else {before + name: value}
    return out


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: " ".join((r.file, *r.flags)))
def test_a_recipe_fits_by_its_own_plan(recipe):
    made = recipe.plan()
    assert made["fits"] and made["limit"] - made["total"] >= 0.9 * 2**30, "what is assumed may be that much too small"


def test_every_recipe_is_a_configuration_of_its_own():
    listed = {p.stem.removeprefix("genevolve_8b_") for p in (ROOT / "configs").glob("genevolve_8b_*.yaml")}
    assert listed == {r.file for r in RECIPES} == set(DIFFERENT)


@pytest.mark.parametrize("name", DIFFERENT)
def test_a_recipe_differs_from_the_papers_run_only_where_it_says(name):
    base = fields(yaml.safe_load((ROOT / "configs/genevolve_8b.yaml").read_text()))
    mine = fields(yaml.safe_load((ROOT / f"configs/genevolve_8b_{name}.yaml").read_text()))
    changed = {f for f in base.keys() | mine.keys() if base.get(f) != mine.get(f)}
    assert changed == DIFFERENT[name] | {"name"}
    config = load_config(EvolveConfig, config_path(f"genevolve_8b_{name}"))
    assert config.name == f"genevolve_8b_{name}" and config.objective.sdl_coef == 2.0


def test_a_plan_counts_the_gpus_of_its_launcher():
    assert launched_gpus({}) == dict(nodes=1, gpus_per_node=1)
    assert launched_gpus({"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}) == dict(nodes=2, gpus_per_node=8)
    assert launched_gpus({"WORLD_SIZE": "16", "LOCAL_SIZE": "8"}) == dict(nodes=2, gpus_per_node=8), "deepspeed"
    assert launched_gpus({"WORLD_SIZE": "4"}) == dict(nodes=1, gpus_per_node=4)


def test_the_readme_has_the_rows_that_the_planner_gives():
    told = (ROOT / "README.md").read_text().splitlines()
    rows = [line for line in told if "(configs/genevolve_8b_" in line]
    assert rows == [recipe.row() for recipe in RECIPES]


def test_the_page_has_what_the_planner_prints():
    page = (ROOT / "docs/memory.md").read_text()
    for recipe in RECIPES:
        assert recipe.verdict() in page + "\n", recipe.file


def test_the_page_has_the_plan_of_the_demo_by_the_recorded_rates(monkeypatch, capsys):
    """Asked for on the machine that measured them; the numbers follow from the file alone."""
    import shlex

    import torch

    from genevolve_fast.cli import main
    from genevolve_fast.evaluate import scoreboard

    (device,) = Rates.read(FILE).devices
    monkeypatch.setattr(scoreboard, "processor", lambda: device.removesuffix(", 1 thread"))
    page, threads = (ROOT / "docs/memory.md").read_text(), torch.get_num_threads()
    (command, block) = re.search(
        r"\$ (genevolve-fast plan --config demo .*)\n…\n(time of a step\n(?:.*\n)+?)…\n", page
    ).groups()
    try:
        main(shlex.split(command)[1:])
    finally:
        torch.set_num_threads(threads)
    told = capsys.readouterr().out
    assert block in told and "measured on" in block and "training: estimated" in block


def test_what_was_recorded_was_measured_by_code_that_git_knows():
    rates = Rates.read(FILE)
    assert rates.runs and not [
        r for r in (*rates.rates, *rates.runs) if r.commit in ("", "unknown") or "dirty" in r.commit
    ]
