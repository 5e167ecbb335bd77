"""The client of vLLM servers against a real server process: tokens, images, weights in step, failures survived."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections import Counter
from dataclasses import replace
from urllib.parse import parse_qs, urlsplit

import httpx
import numpy as np
import pytest
import torch

from genevolve_fast.incidents import Incidents
from genevolve_fast.policy.adapters import add_lora
from genevolve_fast.policy.model import Policy
from genevolve_fast.protocols import EngineError, Sampling
from genevolve_fast.rollout.transformers_engine import TransformersEngine
from genevolve_fast.rollout.vllm_server import VllmServerEngine
from genevolve_fast.sandbox.tiny_policy import start_path
from tests.loopback.engine import LoopbackEngine
from tests.vllm_stand_in import RECORDED

pytestmark = pytest.mark.slow
SAMPLING = Sampling(temperature=1.0, top_p=0.9, max_tokens=12, stop_ids=(2,))


@pytest.fixture(scope="module")
def server():
    with LoopbackEngine() as running:
        yield running


@pytest.fixture
def own() -> Policy:
    policy = Policy.from_pretrained(start_path()).eval()
    policy.freeze_vision()
    return policy


@pytest.fixture
def connected(tmp_path):
    """Opens clients with short patience, and closes them."""
    engines = []

    def connect(policy: Policy, *servers: LoopbackEngine, **more) -> VllmServerEngine:
        settings = {"sync_dir": tmp_path / "weights", "patience_s": 60.0, "timeout_s": 60.0} | more
        engines.append(VllmServerEngine(policy, [s.url for s in servers], incidents=Incidents(), **settings))
        return engines[-1]

    yield connect
    for engine in engines:
        engine.shutdown()


def prompt(policy: Policy, pictures=(), text: str = "Draw it.") -> list[int]:
    parts = [f"<|im_start|>user\n{text}"]
    for pixels in pictures:
        count = policy.codec.image_tokens(policy.codec.image_grid(pixels))
        parts.append(f"<|vision_start|>{'<|image_pad|>' * count}<|vision_end|>")
    return policy.codec.encode("".join(parts) + "<|im_end|>\n<|im_start|>assistant\n")


def ask(engine, policy: Policy, pictures=(), seed: int = 3, session: str = "a", sampling: Sampling = SAMPLING):
    engine.open(session)
    return asyncio.run(engine.generate(session, prompt(policy, pictures), list(pictures), sampling, seed))


def go_on(engine, policy: Policy, before, pictures=(), session: str = "a"):
    """The next turn of a session, whose first turn the engine may have kept."""
    ids = [*prompt(policy, pictures), *before.ids, *policy.codec.encode("<|im_end|>\n<|im_start|>assistant\n")]
    engine.open(session)
    return asyncio.run(engine.generate(session, ids, list(pictures), SAMPLING, 4))


def expected(policy: Policy, pictures=(), seed: int = 3):
    return ask(TransformersEngine(policy, deterministic=False), policy, pictures, seed)


def same(one, other) -> bool:
    return one.ids == other.ids and np.allclose(one.logps, other.logps, atol=1e-4)


def train(policy: Policy, scale: float = 0.02) -> None:
    """Another policy, as after a step."""
    with torch.no_grad():
        for p in policy.parameters():
            if p.requires_grad:
                p.add_(scale * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))


def test_it_samples_what_the_policy_would_and_follows_it(server, own, connected, pictures):
    engine = connected(own, server)
    engine.update_weights(0)
    seen = [pictures[0], pictures[2]]
    first = ask(engine, own, seen)
    assert same(first, expected(own, seen))
    for version in (1, 2):
        train(own)
        engine.update_weights(version)
        again = go_on(engine, own, first, seen)  # the same session: the server had computed its prefix
        assert same(again, go_on(TransformersEngine(own, deterministic=False), own, first, seen))
    assert engine.mismatches == 0 and engine.verified == 3 * len(list(own.model.parameters()))
    assert len(list(engine.sync_dir.iterdir())) == 1  # the last weights, for a server that comes back
    assert engine.incidents.take() == {}


def test_greedy_turns_and_turns_that_are_cut_off(server, own, connected):
    engine = connected(own, server)
    engine.update_weights(0)
    greedy = Sampling(temperature=0, top_p=1.0, max_tokens=5, stop_ids=())
    made = ask(engine, own, sampling=greedy)
    assert (len(made.ids), made.finish_reason, made.logps) == (5, "length", [0.0] * 5)
    local = TransformersEngine(own, deterministic=False)
    assert made.ids == ask(local, own, sampling=greedy).ids


def test_an_adapter_goes_alone_and_the_old_one_leaves(server, own, connected, pictures):
    connected(own, server).update_weights(0)  # the base, which other tests have replaced
    add_lora(own, rank=2)
    engine = connected(own, server)
    for version in range(3):
        train(own, 0.05)
        engine.update_weights(version)
        assert same(ask(engine, own, pictures[:1]), expected(own, pictures[:1]))
    models = httpx.get(f"{server.url}/v1/models", trust_env=False).json()["data"]
    adapters = [m["id"] for m in models if m["id"].startswith(engine._run_id)]
    assert adapters == [engine._label]
    folder = engine.sync_dir / engine._label
    assert {p.name for p in folder.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    assert engine.mismatches == 0 and engine.verified > 0


def test_a_lost_adapter_and_a_version_that_another_run_set_are_mended(server, own, connected):
    connected(own, server).update_weights(0)
    add_lora(own, rank=2)
    train(own, 0.05)
    engine = connected(own, server)
    engine.update_weights(1)
    unload = {"lora_name": engine._label}
    assert httpx.post(f"{server.url}/v1/unload_lora_adapter", json=unload, trust_env=False).status_code == 200
    assert same(ask(engine, own), expected(own))
    assert engine.incidents.take() == {"engine/stale_weights": 1}
    changed = {"new_version": "another's"}
    assert httpx.post(f"{server.url}/update_weight_version", json=changed, trust_env=False).status_code == 200
    assert same(ask(engine, own, session="b"), expected(own))  # the adapter is there already
    assert engine.incidents.take() == {"engine/stale_weights": 1}


def test_an_adapter_can_be_merged(server, own, connected):
    add_lora(own, rank=2)
    train(own, 0.05)
    engine = connected(own, server, merge_lora=True)
    engine.update_weights(0)
    assert same(ask(engine, own), expected(own))


def test_weights_that_arrive_wrong_are_named(server, own, connected, monkeypatch):
    from genevolve_fast.rollout import vllm_server

    honest = vllm_server.write_folder
    broken = "model.language_model.layers.1.mlp.up_proj.weight"

    def write(folder, weights, dtype):
        honest(folder, weights | {broken: weights[broken] + 1}, dtype)

    monkeypatch.setattr(vllm_server, "write_folder", write)
    engine = connected(own, server)
    with pytest.raises(EngineError, match=r"1 of \d+ parameters.*layers\.1\.mlp\.up_proj\.weight"):
        engine.update_weights(0)
    assert engine.mismatches == 1


def test_every_route_and_field_is_one_of_the_released_package(server, own, connected, pictures):
    asked: list[httpx.Request] = []
    own.requires_grad_(True)  # a trained vision tower asks for more resets
    for adapter in (False, True):
        if adapter:
            add_lora(own, rank=2)
        engine = connected(own, server)

        async def note(request):
            asked.append(request)

        engine._http.client.event_hooks["request"].append(note)
        for version in range(2):
            engine.update_weights(version)
            ask(engine, own, pictures[:1])
    routes = Counter()
    for request in asked:
        parts = urlsplit(str(request.url))
        route = f"{request.method} {parts.path}"
        routes[route] += 1
        recorded = RECORDED["routes"][route]
        assert set(parse_qs(parts.query)) <= set(recorded["query"])
        body = json.loads(request.content) if request.content else {}
        allowed = RECORDED["fields"][recorded["model"]] if recorded["model"] else recorded["body"]
        assert set(body) <= set(allowed), route
        if route == "POST /inference/v1/generate":
            assert set(body["sampling_params"]) <= set(RECORDED["fields"]["SamplingParams"])
            assert request.headers["X-Session-ID"]
    assert routes["POST /inference/v1/generate"] >= 4
    wanted = "pause resume collective_rpc weight_checker reset_prefix_cache reset_mm_cache reset_encoder_cache"
    assert {f"POST /{name}" for name in wanted.split()} <= set(routes)
    assert routes["POST /v1/load_lora_adapter"] == 2 and routes["POST /v1/unload_lora_adapter"] == 1


def test_an_adapter_on_another_base_is_refused(server, own, connected):
    other = Policy.from_pretrained(start_path()).eval()
    train(other)
    connected(other, server).update_weights(0)
    add_lora(own, rank=2)
    with pytest.raises(EngineError, match="serve the base that the adapter belongs to"):
        connected(own, server).update_weights(0)


def test_a_paused_server_is_waited_for(server, own, connected):
    engine = connected(own, server)
    engine.update_weights(0)
    httpx.post(f"{server.url}/pause?mode=wait", trust_env=False)
    resume = threading.Timer(0.6, lambda: httpx.post(f"{server.url}/resume", trust_env=False))
    resume.start()
    assert same(ask(engine, own), expected(own))
    resume.join()
    assert set(engine.incidents.take()) == {"engine/server_error"}


def test_another_trainers_weights_are_noticed_and_replaced(server, own, connected):
    engine = connected(own, server)
    engine.update_weights(5)
    other = Policy.from_pretrained(start_path()).eval()
    train(other, 0.1)
    intruder = connected(other, server)
    intruder.update_weights(5)  # the same step of another run
    assert same(ask(engine, own), expected(own))
    assert engine.incidents.take() == {"engine/stale_weights": 1}


def test_a_server_killed_while_it_samples_loses_nothing(own, connected):
    with LoopbackEngine() as victim:
        engine = connected(own, victim)
        train(own)
        engine.update_weights(1)
        long = Sampling(temperature=1.0, top_p=1.0, max_tokens=200, stop_ids=())

        def crash() -> None:
            time.sleep(0.15)  # six times 200 tokens may take less than half a second
            victim.kill()
            victim.start(wait=False)

        async def many():
            return await asyncio.gather(*(engine.generate(s, prompt(own), [], long, i) for i, s in enumerate("abcdef")))

        for session in "abcdef":
            engine.open(session)
        crasher = threading.Thread(target=crash)
        crasher.start()
        made = asyncio.run(many())
        crasher.join()
        local = TransformersEngine(own, deterministic=False)
        for i, one in enumerate(made):
            local.open(str(i))
            again = asyncio.run(local.generate(str(i), prompt(own), [], long, i))
            assert np.allclose(one.logps, again.logps, atol=1e-4) and one.ids == again.ids
        incidents = engine.incidents.take()
        assert incidents["engine/connect"] >= 1 and incidents["engine/stale_weights"] >= 1


def test_a_session_keeps_its_server_and_moves_when_that_one_dies(own, connected):
    with LoopbackEngine() as one, LoopbackEngine() as other:
        engine = connected(own, one, other)
        engine.update_weights(0)
        homes = {s: engine._server_of(s).url for s in map(str, range(40))}
        assert set(homes.values()) == {one.url, other.url}
        assert homes == {s: engine._server_of(s).url for s in homes}
        moving = next(s for s, url in homes.items() if url == one.url)
        one.kill()
        train(own)
        engine.update_weights(1)  # the living one is enough
        assert same(ask(engine, own, session=moving), expected(own))
        one.start()
        time.sleep(2.5)
        assert engine._server_of(moving).url == one.url
        assert same(ask(engine, own, session=moving), expected(own))  # it was given the weights that it missed
        assert engine.incidents.take()["engine/connect"] >= 1


def test_while_the_policy_trains_a_server_that_comes_back_is_given_the_weights_before_the_update(own, connected):
    with LoopbackEngine() as victim:
        engine = connected(own, victim, overlaps=True)
        engine.update_weights(0)
        first, wanted = ask(engine, own), expected(own)
        train(own)  # the optimizer's step, while turns are still sampled with the weights before it
        victim.restart()
        again = ask(engine, own)
        assert same(first, wanted) and same(again, wanted) and not same(again, expected(own))
        assert engine.incidents.take()["engine/stale_weights"] == 1 and engine.mismatches == 0
        victim.restart()
        engine.overlaps = False  # what is on the disk is not what the policy has
        with pytest.raises(EngineError, match="differ from the policy's"):
            ask(engine, own)


def test_weights_do_not_change_under_a_turn(server, own, connected):
    engine = connected(own, server)
    engine.update_weights(0)
    long = Sampling(temperature=1.0, top_p=1.0, max_tokens=400, stop_ids=())
    asking = threading.Thread(target=ask, args=(engine, own), kwargs={"sampling": long})
    asking.start()
    while not engine._asking:
        time.sleep(0.001)
    with pytest.raises(RuntimeError, match="update_weights while 1 turns are being sampled"):
        engine.update_weights(1)
    asking.join()
    engine.update_weights(1)


def test_an_image_processor_that_differs_is_named(own, connected, tmp_path, pictures):
    own.save_pretrained(tmp_path / "other")
    file = tmp_path / "other" / "preprocessor_config.json"
    settings = json.loads(file.read_text())
    settings["size"] = {"shortest_edge": 128 * 128, "longest_edge": 256 * 256}
    file.write_text(json.dumps(settings))
    with LoopbackEngine(model=tmp_path / "other") as odd:
        engine = connected(own, odd)
        with pytest.raises(EngineError, match=r"image 0 of 64 x 96 pixels has grid \(1, \d+, \d+\) here, \d+ tokens"):
            ask(engine, own, pictures[:1])


def test_stale_prefixes_are_dropped_by_the_client_itself(own, connected, monkeypatch, pictures):
    """A server that would read them again, as one with an external KV store does."""
    with LoopbackEngine("--keep-caches-over-updates") as keeping:
        engine = connected(own, keeping)
        engine.update_weights(0)
        before = ask(engine, own, pictures[:1])
        train(own, 0.05)
        engine.update_weights(1)
        local = TransformersEngine(own, deterministic=False)
        assert same(go_on(engine, own, before, pictures[:1]), go_on(local, own, before, pictures[:1]))

        honest = engine._http.command

        async def forgets_nothing(server, path, body=None):
            if path == "/reset_prefix_cache":
                return {"success": True}
            return await honest(server, path.replace("mode=wait", "mode=wait&clear_cache=false"), body)

        before = ask(engine, own, pictures[:1], session="b")
        train(own, 0.05)
        monkeypatch.setattr(engine._http, "command", forgets_nothing)
        engine.update_weights(2)
        stale = go_on(engine, own, before, pictures[:1], session="b")
        local.update_weights(2)
        assert not same(stale, go_on(local, own, before, pictures[:1], session="b"))


def test_the_ids_that_could_have_been_sampled_come_along_where_they_are_asked_for(own, connected):
    with LoopbackEngine("--return-sampling-mask") as masking:
        engine = connected(own, masking)
        engine.update_weights(0)
        made = ask(engine, own, sampling=replace(SAMPLING, sampling_mask=True))
        local = ask(TransformersEngine(own, deterministic=False), own, sampling=replace(SAMPLING, sampling_mask=True))
        assert [sorted(kept) for kept in made.sampling_mask] == [sorted(kept) for kept in local.sampling_mask]
        assert max(map(len, made.sampling_mask)) > 1 and ask(engine, own).sampling_mask is None


def test_a_key_is_sent_and_never_said(own, connected):
    key = "k-not-to-be-seen"
    with LoopbackEngine("--api-key-env", "ENGINE_KEY", env={"ENGINE_KEY": key}) as guarded:
        engine = connected(own, guarded, api_key=key)
        engine.update_weights(0)
        assert same(ask(engine, own), expected(own))
        wrong = connected(own, guarded, api_key=key[:-1])
        with pytest.raises(EngineError) as refused:
            wrong.update_weights(0)
        assert refused.value.kind == "client_error" and key[:-1] not in str(refused.value)
