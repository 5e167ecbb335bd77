"""Where vLLM is installed, with or without a GPU: its own models read what we send and what our server answers."""

from __future__ import annotations

import importlib.util

import httpx
import numpy as np
import pytest
from pydantic import TypeAdapter

from genevolve_fast.incidents import Incidents
from genevolve_fast.policy.model import Policy
from genevolve_fast.protocols import Sampling
from genevolve_fast.rollout.vllm_server import VllmServerEngine
from genevolve_fast.rollout.weights import expected_weights
from genevolve_fast.sandbox.tiny_policy import start_path

if importlib.util.find_spec("vllm") is None:
    pytest.skip(
        "vllm is not installed: its signatures were recorded from the released package", allow_module_level=True
    )


@pytest.fixture(scope="module")
def policy():
    return Policy.from_pretrained(start_path())


@pytest.fixture
def question(policy, tmp_path):
    codec = policy.codec
    text = f"<|im_start|>user\n<|vision_start|>{'<|image_pad|>' * 9}<|vision_end|>hello"
    sampling = Sampling(0.7, 0.95, 33, (codec.end_of_turn_id,), sampling_mask=True)
    engine = VllmServerEngine(policy, ["http://nowhere"], incidents=Incidents(), sync_dir=tmp_path)
    yield engine._question(codec.encode(text), [np.zeros((96, 96, 3), np.uint8)], sampling, 2**70 + 5)
    engine.shutdown()


def test_vllm_reads_our_question(question, policy):
    from vllm.entrypoints.scale_out.token_in_token_out.protocol import GenerateRequest

    read = GenerateRequest.model_validate(question)
    params = read.sampling_params
    assert (params.temperature, params.top_p, params.max_tokens, params.logprobs, params.seed) == (0.7, 0.95, 33, 0, 5)
    assert params.stop_token_ids == [policy.codec.end_of_turn_id] and params.ignore_eos and not params.detokenize
    assert read.token_ids.count(policy.codec.image_pad_id) == 1 and len(read.content_parts) == 1


@pytest.mark.slow
def test_vllm_reads_our_servers_answer(question):
    from vllm.entrypoints.scale_out.token_in_token_out.protocol import GenerateResponse

    from tests.loopback.engine import LoopbackEngine

    with LoopbackEngine("--return-sampling-mask") as server:
        answer = httpx.post(f"{server.url}/inference/v1/generate", json=question, timeout=60).raise_for_status().json()
    choice = TypeAdapter(GenerateResponse).validate_python(answer).choices[0]
    assert [c.token_id for c in choice.logprobs.content] == choice.token_ids
    assert all(token in kept for token, kept in zip(choice.token_ids, choice.sampling_mask, strict=True))
    assert [(s.start, s.end) for s in choice.weight_versions] == [(0, len(choice.token_ids))]


def test_vllm_names_a_policys_weights_as_we_do(policy):
    try:
        from vllm.model_executor.models.qwen3_vl import Qwen3VLForConditionalGeneration as Served
    except ImportError as error:
        pytest.skip(f"vllm's Qwen3-VL needs {error.name}")
    ours = {n: p.detach() for n, p in policy.model.named_parameters()}
    renamed = Served.hf_to_vllm_mapper.apply_list(list(ours))
    for fused, parts in Served.packed_modules_mapping.items():
        for part in parts:
            renamed = [n.replace(f".{part}.", f".{fused}.") for n in renamed]
    shape = type("Shape", (), {"kv_heads": 2, "head_dim": 32, "vision_heads": 2})
    assert {name for name, _ in expected_weights(ours, shape, 0, 1)} == set(renamed)


def test_vllm_reads_an_exported_adapter(tmp_path):
    import json

    from vllm.lora.peft_helper import PEFTHelper

    from genevolve_fast.policy.adapters import add_lora
    from genevolve_fast.policy.export import export_adapter

    adapted = Policy.from_pretrained(start_path())
    add_lora(adapted, rank=8, alpha=24)
    adapted.save_trainable(tmp_path / "saved")
    (tmp_path / "out").mkdir()
    export_adapter(tmp_path / "saved", tmp_path / "out")
    read = PEFTHelper.from_dict(json.loads((tmp_path / "out" / "adapter_config.json").read_text()))
    assert (read.r, read.lora_alpha, read.vllm_lora_scaling_factor) == (8, 24, 3.0) and "q_proj" in read.target_modules
