"""The colocated vLLM against a stand-in that knows the released signatures; the record against a real one."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from genevolve_fast.incidents import Incidents
from genevolve_fast.policy.adapters import add_lora
from genevolve_fast.policy.model import Policy
from genevolve_fast.protocols import EngineError, Sampling, TrainedEngine
from genevolve_fast.rollout import vllm_colocated
from genevolve_fast.rollout.transformers_engine import TransformersEngine
from genevolve_fast.rollout.vllm_colocated import VllmEngine
from tests import vllm_stand_in
from tests.record_vllm_signatures import record
from tests.vllm_stand_in import RECORDED, AsyncLLM

pytestmark = pytest.mark.slow

SAMPLING = Sampling(temperature=1.0, top_p=0.9, max_tokens=12, stop_ids=())


@pytest.fixture
def folder(policy, tmp_path) -> Path:
    policy.save_pretrained(tmp_path / "start")
    return tmp_path / "start"


@pytest.fixture
def opened(folder, monkeypatch):
    """(policy, engine) with the policy's own copy of the start, and what opens it."""
    vllm_stand_in.install(monkeypatch)
    monkeypatch.setattr(vllm_colocated, "_refuse_without_vllm", lambda: None)  # the stand-in needs no GPU
    engines = []

    def open_(lora: int = 0, **more) -> tuple[Policy, VllmEngine]:
        own = Policy.from_pretrained(folder).eval()
        own.freeze_vision()
        if lora:
            add_lora(own, rank=lora)
        engines.append(VllmEngine(own, incidents=Incidents(), max_model_len=2048, bucket_bytes=64 << 10, **more))
        return own, engines[-1]

    yield open_
    for engine in engines:
        engine.shutdown()


def prompt(policy: Policy, pictures=()) -> list[int]:
    parts = ["<|im_start|>user\nDraw it."]
    for pixels in pictures:
        count = policy.codec.image_tokens(policy.codec.image_grid(pixels))
        parts.append(f"<|vision_start|>{'<|image_pad|>' * count}<|vision_end|>")
    return policy.codec.encode("".join(parts) + "<|im_end|>\n<|im_start|>assistant\n")


def ask(engine, policy: Policy, pictures=(), seed: int = 3, session: str = "a"):
    engine.open(session)
    return asyncio.run(engine.generate(session, prompt(policy, pictures), pictures, SAMPLING, seed))


def go_on(engine, policy: Policy, before, pictures=(), session: str = "a"):
    """The next turn of a session, whose first turn the engine has kept."""
    ids = [*prompt(policy, pictures), *before.ids, *policy.codec.encode("<|im_end|>\n<|im_start|>assistant\n")]
    engine.open(session)
    return asyncio.run(engine.generate(session, ids, pictures, SAMPLING, 4))


def expected(policy: Policy, pictures=(), seed: int = 3):
    return ask(TransformersEngine(policy, deterministic=False), policy, pictures, seed)


def same(one, other) -> bool:
    return one.ids == other.ids and np.allclose(one.logps, other.logps, atol=1e-5)


def train(policy: Policy) -> None:
    """Another policy, as after a step."""
    with torch.no_grad():
        for p in policy.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))


def names(calls) -> list[str]:
    short = {"update_weights": "load", "add_lora": "load", "collective_rpc": "load"}
    out = []
    for name, given in calls:
        name = f"{name} {given['tags'][0]}" if name == "wake_up" else short.get(name, name)
        if not out or out[-1] != name:  # buckets are one load
            out.append(name)
    return out


def test_rollouts_follow_the_policy_through_sleep_and_wake(opened, pictures):
    policy, engine = opened()
    assert isinstance(engine, TrainedEngine)
    engine.update_weights(0)
    first = ask(engine, policy, pictures[:2])
    assert same(first, expected(policy, pictures[:2]))
    engine.sleep()
    with pytest.raises(EngineError, match="asleep"):
        ask(engine, policy)
    train(policy)
    AsyncLLM.made.calls.clear()
    engine.update_weights(1)
    assert not AsyncLLM.made.calls  # nothing is pushed into memory that is asleep
    engine.wake()
    assert names(AsyncLLM.made.calls) == [
        "wake_up weights",
        "start_weight_update",
        "load",
        "finish_weight_update",
        "compute_weight_checksums",
        "update_weight_version",
        "wake_up kv_cache",
        "reset_prefix_cache",
    ]
    again = go_on(engine, policy, first, pictures[:2])
    assert same(again, go_on(TransformersEngine(policy, deterministic=False), policy, first, pictures[:2]))
    assert engine.mismatches == 0 and engine.verified > 0


def test_an_update_while_awake_pauses_drops_the_cache_and_resumes(opened):
    policy, engine = opened()
    engine.update_weights(0)
    before = ask(engine, policy)
    train(policy)
    AsyncLLM.made.calls.clear()
    engine.update_weights(1)
    order = names(AsyncLLM.made.calls)
    assert order[0] == "pause_generation" and order[-2:] == ["reset_prefix_cache", "resume_generation"]
    local = TransformersEngine(policy, deterministic=False)
    assert same(go_on(engine, policy, before), go_on(local, policy, before))


def test_without_the_reset_the_stand_in_reads_stale_prefixes(opened, monkeypatch):
    policy, engine = opened()
    engine.update_weights(0)
    before = ask(engine, policy)
    train(policy)
    monkeypatch.setattr(AsyncLLM.made, "forget", lambda: None)
    engine.update_weights(1)
    local = TransformersEngine(policy, deterministic=False)
    assert not same(go_on(engine, policy, before), go_on(local, policy, before))


def test_sleep_drains_and_wake_without_an_update_loads_what_was_discarded(opened):
    policy, engine = opened()
    engine.update_weights(0)
    engine.sleep()
    assert AsyncLLM.made.calls[-1] == ("sleep", {"level": 2, "mode": "wait"})
    engine.wake()
    assert same(ask(engine, policy), expected(policy))


def test_weights_come_in_buckets_of_bounded_size(opened):
    policy, engine = opened()
    engine.update_weights(0)
    sizes = [sum(g["request"].update_info["tensor_sizes"]) for n, g in AsyncLLM.made.calls if n == "update_weights"]
    largest = max(p.nbytes for p in policy.parameters())
    assert len(sizes) > 3 and max(sizes) <= (64 << 10) + largest
    assert sum(sizes) == sum(p.nbytes for p in policy.parameters())


def test_a_parameter_that_arrives_wrong_is_named(opened):
    policy, engine = opened()
    engine.update_weights(0)
    broken = "model.language_model.layers.0.self_attn.k_proj.weight"
    AsyncLLM.made.corrupt = lambda name, tensor: tensor + (name == broken)
    with pytest.raises(EngineError, match=r"1 of \d+ parameters.*layers\.0\.self_attn\.qkv_proj\.weight"):
        engine.update_weights(1)
    assert engine.mismatches == 1


def test_an_answer_of_other_weights_is_not_taken(opened):
    policy, engine = opened()
    engine.update_weights(4)
    AsyncLLM.made.version = "another run's"
    with pytest.raises(EngineError, match="another run's") as refused:
        ask(engine, policy)
    assert refused.value.kind == "stale_weights" and engine.incidents.take() == {"engine/stale_weights": 1}


def test_verification_can_be_rarer_or_off(opened):
    for every, expected_checks in ((0, 0), (2, 1)):
        _, engine = opened(verify_every=every)
        for version in range(3):
            engine.update_weights(version)
        assert names(AsyncLLM.made.calls).count("compute_weight_checksums") == expected_checks


def test_an_adapter_is_loaded_alone_under_a_new_number_each_time(opened, pictures):
    policy, engine = opened(lora=3)
    assert AsyncLLM.made.args.max_lora_rank == 8
    for version in range(2):
        train(policy)
        engine.update_weights(version)
        assert same(ask(engine, policy, pictures[:1]), expected(policy, pictures[:1]))
        engine.sleep()
        engine.wake()
    calls = AsyncLLM.made.calls
    assert [g["lora_request"].lora_int_id for n, g in calls if n == "add_lora"] == [1, 2]
    assert [g["lora_id"] for n, g in calls if n == "remove_lora"] == [1]
    assert {g.get("level") for n, g in calls if n == "sleep"} == {1}  # level 2 would lose the base
    assert not [n for n, _ in calls if n == "update_weights"]
    assert engine.mismatches == 0 and engine.verified > 0


def test_an_adapter_can_be_merged_and_more_gpus_take_files(opened):
    policy, engine = opened(lora=2, merge_lora=True)
    train(policy)
    engine.update_weights(0)
    assert not AsyncLLM.made.args.enable_lora and same(ask(engine, policy), expected(policy))
    policy, engine = opened(tensor_parallel_size=2)
    train(policy)
    engine.update_weights(0)
    assert [g["method"] for n, g in AsyncLLM.made.calls if n == "collective_rpc"] == ["reload_weights"]
    assert same(ask(engine, policy), expected(policy))


def test_an_image_that_expands_otherwise_is_refused_by_name(opened, pictures):
    policy, engine = opened()
    AsyncLLM.made.expand_by = 1
    with pytest.raises(EngineError, match=r"image 0 of 64 x 96 pixels has grid \(1, \d+, \d+\) here.*tokens in"):
        ask(engine, policy, pictures[:1])
    assert engine.incidents.take() == {"engine/bad_response": 1}


def test_a_trained_vision_tower_empties_the_encoders_caches(opened, pictures):
    policy, engine = opened()
    policy.requires_grad_(True)
    engine.update_weights(0)
    ask(engine, policy, pictures[:1])
    train(policy)
    engine.update_weights(1)
    assert names(AsyncLLM.made.calls).count("reset_encoder_cache") == 2
    assert same(ask(engine, policy, pictures[:1]), expected(policy, pictures[:1]))


def test_seeds_of_sessions_fit_into_an_int64(opened):
    policy, engine = opened()
    ask(engine, policy, seed=(1 << 72) + 5)
    assert [g["sampling_params"].seed for n, g in AsyncLLM.made.calls if n == "generate"] == [5]


def test_a_mask_engine_bounds_the_sets_that_it_asks_for(opened):
    policy, engine = opened(sampling_mask=True)
    ask(engine, policy)
    params = [g["sampling_params"] for n, g in AsyncLLM.made.calls if n == "generate"][-1]
    assert params.top_k == 1024
    assert AsyncLLM.made.args.logprobs_mode == "processed_logprobs"  # vLLM refuses masks without it


def test_the_ids_that_could_have_been_sampled_come_along_where_they_are_asked_for(opened):
    policy, engine = opened(sampling_mask=True)
    engine.open("a")
    wanted = replace(SAMPLING, sampling_mask=True)
    made = asyncio.run(engine.generate("a", prompt(policy), [], wanted, 3))
    assert len(made.sampling_mask) == len(made.ids) and max(map(len, made.sampling_mask)) > 1
    assert all(token in kept for token, kept in zip(made.ids, made.sampling_mask, strict=True))
    assert ask(engine, policy).sampling_mask is None


def test_the_stand_in_refuses_what_the_released_package_would(opened):
    _, engine = opened()
    llm = AsyncLLM.made
    for wrong in (
        lambda: llm.generate({}, None, "r", prefix="x"),
        lambda: llm.sleep(depth=2),
        lambda: vllm_stand_in.SamplingParams(stop_ids=[1]),
        lambda: vllm_stand_in.AsyncEngineArgs(sleep_mode=True),
        lambda: vllm_stand_in.TokensPrompt(token_ids=[1]),
    ):
        with pytest.raises(TypeError):
            wrong()


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vllm is installed here")
def test_without_vllm_or_a_gpu_it_says_what_to_do(policy, monkeypatch):
    with pytest.raises(ValueError, match=r"pip install 'genevolve-fast\[vllm\]'"):
        VllmEngine(policy, incidents=Incidents(), max_model_len=64)
    vllm_stand_in.install(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="needs a GPU"):
        VllmEngine(policy, incidents=Incidents(), max_model_len=64)
    assert "vllm" in sys.modules


def test_the_record_is_that_of_the_installed_release():
    found = importlib.util.find_spec("vllm")
    if found is None or not found.submodule_search_locations:
        pytest.skip("vllm is not installed: its sources were recorded from the released package")
    assert record(Path(found.submodule_search_locations[0])) == RECORDED


@pytest.mark.slow
def test_evolution_wakes_and_sleeps_it_around_the_rollouts(monkeypatch, tmp_path):
    from genevolve_fast.commands.opening import config_path, open_policy, open_world
    from genevolve_fast.train.config import EvolveConfig, load_config
    from genevolve_fast.train.evolve import evolve

    vllm_stand_in.install(monkeypatch)
    monkeypatch.setattr(vllm_colocated, "_refuse_without_vllm", lambda: None)  # the stand-in needs no GPU
    small = "steps=2 checkpoint.every=1 pool_size=40 rollout.prompts_per_step=2 rollout.num_generations=3 threads=1"
    masked = "rollout.engine=vllm rollout.top_p=0.95 rollout.replay_sampling_mask=true evaluate.requests=0"
    config = load_config(EvolveConfig, config_path("demo"), f"{small} {masked}".split())
    sandbox, world = open_world(config)
    pool = sandbox.requests("train", config.pool_size, seed=config.seed)
    evolve(config, open_policy(config.policy), world, pool, tmp_path / "run")
    order = [n for n in names(AsyncLLM.made.calls) if n.startswith(("wake", "sleep", "load", "generate", "reset_pre"))]
    step = ["wake_up weights", "load", "wake_up kv_cache", "reset_prefix_cache", "generate", "sleep"]
    assert order == ["sleep", *step, *step]
    versions = [g["new_version"].partition("-")[2] for n, g in AsyncLLM.made.calls if n == "update_weight_version"]
    assert versions == ["0.1", "1.2"]  # of the weights that sampled, which are those of the step
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [r["rollout_corr/masked_share"] > 0.5 for r in rows] == [True, True]
    assert max(r["rollout_corr/logp_difference_abs"] for r in rows) < 1e-4
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_000002")  # as if it had been killed in the last update
    evolve(config, open_policy(config.policy), world, pool, tmp_path / "run", resume=True)
    assert [n for n, _ in AsyncLLM.made.calls if n != "shutdown"] == ["sleep"]  # the rollouts are there: it never wakes
    (tmp_path / "run" / "rollouts" / "step_000001.safetensors").unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_000002")
    evolve(config, open_policy(config.policy), world, pool, tmp_path / "run", resume=True)
    versions = [g["new_version"].partition("-")[2] for n, g in AsyncLLM.made.calls if n == "update_weight_version"]
    assert versions == ["1.1"]
