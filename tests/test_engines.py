"""Which engine a configuration opens, and what it refuses."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
import torch

from genevolve_fast.incidents import Incidents
from genevolve_fast.profile.plan import Settings
from genevolve_fast.protocols import EngineError, Sampling, TrainedEngine
from genevolve_fast.rollout import serve
from genevolve_fast.rollout.exchange import check_prompt, checked_generation, collapsed
from genevolve_fast.rollout.transformers_engine import TransformersEngine
from genevolve_fast.rollout.vllm_server import VllmServerEngine
from genevolve_fast.train import engines
from genevolve_fast.train.config import ConfigError, EvolveConfig, RolloutConfig, parse_config
from genevolve_fast.train.engines import open_engine, server_commands
from genevolve_fast.train.fits import settings_of
from tests.loopback.engine import free_port
from tests.vllm_stand_in import RECORDED

SERVER = {"urls": ["http://127.0.0.1:9"], "sync_dir": "weights"}


def parsed(rollout: dict, **more) -> EvolveConfig:
    return parse_config(EvolveConfig, {"rollout": rollout, **more})


@pytest.mark.parametrize(
    ("rollout", "more", "message"),
    [
        ({"server": SERVER}, {}, "server belongs to engine 'server'"),
        ({"engine": "server"}, {}, "needs server.urls.*or rollout_gpus"),
        ({"engine": "server", "server": {"urls": ["127.0.0.1:8000"], "sync_dir": "w"}}, {}, "does not begin with"),
        ({"engine": "server", "server": {"urls": ["http://h:1"]}}, {}, "needs sync_dir"),
        ({"engine": "server", "server": SERVER | {"sync": "nccl"}}, {}, "sync_dir with sync 'nccl' would do nothing"),
        ({"engine": "server", "server": SERVER, "max_batch": 8}, {}, "max_batch belongs to engine 'transformers'"),
        ({"engine": "server", "server": SERVER, "vllm": {"enforce_eager": True}}, {}, "vllm belongs to engine 'vllm'"),
        ({"vllm": {"bucket_mb": 64}}, {}, "vllm belongs to engine 'vllm'"),
        ({"engine": "vllm", "server": SERVER}, {}, "server belongs to engine 'server'"),
        ({"engine": "server", "server": SERVER | {"merge_lora": True}}, {}, "there is no adapter to merge"),
        ({"engine": "vllm", "vllm": {"max_model_len": 36143}}, {}, "max_model_len 36143 does not hold.* 36144 tokens"),
        (
            {"engine": "server", "server": {"urls": ["http://h:1"], "sync": "nccl"}},
            {"policy": {"lora": {"rank": 4}}},
            "an adapter needs sync 'disk'",
        ),
    ],
)
def test_sections_that_would_do_nothing_are_refused(rollout, more, message):
    with pytest.raises(ConfigError, match=message):
        parsed(rollout, **more)


def test_an_engine_elsewhere_needs_no_kv_here():
    device = torch.device("cpu")
    assert settings_of(parsed({}), device).rollout
    assert not settings_of(parsed({"engine": "server", "server": SERVER}), device).rollout
    assert not settings_of(parsed({"engine": "vllm"}), device).rollout
    assert Settings(tokens=10, prefix=5).rollout


def test_the_configured_engine_is_opened(policy, tmp_path, monkeypatch):
    incidents = Incidents()
    assert isinstance(open_engine(parsed({}), policy, incidents), TransformersEngine)
    server = SERVER | {"sync_dir": str(tmp_path), "api_key_env": "ENGINE_KEY", "dtype": "bfloat16", "verify_every": 3}
    config = parsed({"engine": "server", "server": server})
    monkeypatch.delenv("ENGINE_KEY", raising=False)
    with pytest.raises(ConfigError, match="the environment has no ENGINE_KEY"):
        open_engine(config, policy, incidents)
    monkeypatch.setenv("ENGINE_KEY", "not-to-be-seen")
    engine = open_engine(config, policy, incidents)
    try:
        assert isinstance(engine, VllmServerEngine) and isinstance(engine, TrainedEngine)
        assert (engine.dtype, engine.verify_every, engine.adapter_only) == (torch.bfloat16, 3, False)
        assert "not-to-be-seen" not in repr(vars(config.rollout.server))
    finally:
        engine.shutdown()


def test_servers_of_a_run_get_their_gpus_and_what_training_needs(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4")
    for module in (engines, serve):
        monkeypatch.setattr(module, "vllm_installed", lambda: True)
    config = parsed(
        {"engine": "server", "server": {"tensor_parallel_size": 2, "flags": ["--enforce-eager"]}},
        rollout_gpus=[1, 2, 3, 4],
        policy={"path": "org/model", "dtype": "bfloat16", "lora": {"rank": 24}},
    )
    made, urls = server_commands(config)
    assert [c.environment["CUDA_VISIBLE_DEVICES"] for c in made] == ["1,2", "3,4"] and len(set(urls)) == 2
    flags = [part for part in made[0].arguments if part.startswith("--")]
    assert set(flags) <= set(RECORDED["flags"]) and len(flags) == len(set(flags))
    said = " ".join(made[0].arguments)
    for part in ("--tensor-parallel-size 2", "--dtype bfloat16", "--max-model-len 36144", "--max-lora-rank 32"):
        assert part in said
    assert {"--enable-lora", "--logprobs-mode", "--enforce-eager"} <= set(flags) and urls[0].rpartition(":")[2] in said
    ours, _ = server_commands(parsed({"engine": "server", "server": {"cpu_servers": 3}}))
    assert [c.environment["CUDA_VISIBLE_DEVICES"] for c in ours] == [""] * 3
    assert all("genevolve_fast.rollout.server" in c.arguments and "--threads" in c.arguments for c in ours)


def test_what_this_machine_lacks_is_named(policy, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = parsed({"engine": "server", "server": {"urls": ["http://h:1"], "sync": "nccl"}})
    with pytest.raises(ConfigError, match="this machine has none: use 'disk'"):
        open_engine(config, policy, Incidents())


def test_sections_survive_being_written_and_read_again():
    config = parsed({"engine": "server", "server": SERVER, "deterministic": False})
    assert RolloutConfig(**config.rollout.model_dump()) == config.rollout


@pytest.fixture
def client(policy, tmp_path):
    engines = []

    def connect(url: str, answers=None) -> VllmServerEngine:
        engine = VllmServerEngine(policy, [url], incidents=Incidents(), sync_dir=tmp_path / "w", patience_s=0.5)
        if answers:
            engine._http.client = httpx.AsyncClient(transport=httpx.MockTransport(answers))
        engine.open("a")
        engines.append(engine)
        return engine

    yield connect
    for engine in engines:
        engine.shutdown()


def test_nobody_there_is_said_when_patience_is_over(client):
    engine = client(f"http://127.0.0.1:{free_port()}")
    began = time.monotonic()
    with pytest.raises(EngineError, match=r"update_weights: .*gave up after 0.5 s") as failure:
        engine.update_weights(0)
    assert failure.value.kind == "connect" and time.monotonic() - began < 15
    assert engine.incidents.take()["engine/connect"] >= 2


def answers(mode: str | None = None, logprob: float = 0.0, masks: bool = False, asked: list | None = None):
    """vLLM's answers in modes that no server here has: log-probs of the whole vocabulary, bounded sampling masks."""
    model = {"logprobs_mode": mode, "return_sampling_mask": masks}

    def answer(request: httpx.Request) -> httpx.Response:
        path = urlsplit(str(request.url)).path
        if path == "/server_info" and mode:
            return httpx.Response(200, json={"vllm_config": {"model_config": model}})
        if path != "/inference/v1/generate":
            return httpx.Response(404, json={"detail": "Not Found"})
        body = json.loads(request.content)
        if asked is not None:
            asked.append(body["sampling_params"])
        if (
            masks and "top_k" not in body["sampling_params"]
        ):  # AsyncLLM.generate wraps the ValueError, and its text goes
            error = {"message": "", "type": "InternalServerError", "param": None, "code": 500}
            return httpx.Response(500, json={"error": error})
        content = [{"token_id": 7, "logprob": logprob, "rank": 1}] * 8
        choice = {"token_ids": [7] * 8, "logprobs": {"content": content}, "finish_reason": "length"}
        return httpx.Response(200, json={"choices": [choice], "prompt_token_ids": body["token_ids"]})

    return answer


def eight(engine: VllmServerEngine, seed: int = 1):
    sampling = Sampling(temperature=1.0, top_p=0.9, max_tokens=8, stop_ids=(2,))
    return asyncio.run(engine.generate("a", [8, 9], [], sampling, seed))


@pytest.mark.parametrize(("mode", "logprob"), [("raw_logprobs", 0.0), (None, -1.2)])
def test_a_server_that_reports_raw_log_probs_is_refused(client, mode, logprob):
    with pytest.raises(EngineError, match="--logprobs-mode processed_logprobs"):
        eight(client("http://raw", answers(mode, logprob)))


def test_a_server_with_masks_is_given_the_bound_that_it_wants(client):
    asked: list[dict] = []
    engine = client("http://masks", answers("processed_logprobs", masks=True, asked=asked))
    assert eight(engine).ids == eight(engine).ids == [7] * 8
    assert [a.get("top_k") for a in asked] == [1024, 1024]
    assert engine.incidents.take() == {}


def test_seeds_of_sessions_fit_into_an_int64(client):
    asked: list[dict] = []
    eight(client("http://seeds", answers("processed_logprobs", asked=asked)), seed=(1 << 72) + 5)
    assert asked[0]["seed"] == 5


class Loading:
    """A server that takes weights and says which ones sampled; `happens` to it before it answers a path, once."""

    def __init__(self, happens: dict[str, Callable[[Loading], object]]) -> None:
        self.happens, self.paths = dict(happens), []
        self.restart()

    def restart(self) -> None:
        self.loaded, self.version = "the base", "default"

    def __call__(self, request: httpx.Request) -> httpx.Response:
        path = urlsplit(str(request.url)).path
        self.paths.append(path)
        body = json.loads(request.content) if request.content else {}
        answer = self.happens.pop(path)(self) if path in self.happens else None
        if path == "/collective_rpc":
            self.loaded = Path(body["kwargs"]["weights_path"]).name
        elif path == "/update_weight_version":
            self.version = body["new_version"]
        elif path == "/weight_info":
            answer = {"weight_version": self.version}
        elif path == "/server_info":
            answer = {"vllm_config": {"model_config": {"logprobs_mode": "processed_logprobs"}}}
        elif path == "/inference/v1/generate":
            answer = {"choices": [answer or self.choice()], "prompt_token_ids": body["token_ids"]}
        return httpx.Response(200, json=answer or {"success": True})

    def choice(self) -> dict:
        content = [{"token_id": 7, "logprob": 0.0, "rank": 1}] * 8
        spans = [{"version": self.version, "start": 0, "end": 8}]
        made = {"token_ids": [7] * 8, "logprobs": {"content": content}, "finish_reason": "length"}
        return made | {"weight_versions": spans}


@pytest.mark.parametrize("path", ["/collective_rpc", "/reset_prefix_cache", "/weight_info"])
def test_a_server_that_restarts_during_an_update_is_not_taken_for_updated(client, path):
    server = Loading({path: Loading.restart})
    engine = client("http://restarts", server)
    engine.verify_every, engine.patience_s = 0, 5.0
    engine.update_weights(1)
    assert server.loaded == server.version == engine._label
    assert engine.incidents.take() == {"engine/server_error": 1}


def test_the_cache_is_reset_and_the_version_set_before_the_server_goes_on(client):
    server = Loading({})
    engine = client("http://updates", server)
    engine.verify_every = 0
    engine.update_weights(1)
    version = "/update_weight_version"
    resets = ["/reset_prefix_cache", "/reset_mm_cache", "/reset_encoder_cache"]
    assert server.paths == ["/pause", version, "/collective_rpc", *resets, "/weight_info", version, "/resume"]


def test_the_same_step_has_another_name_each_time(client):
    server = Loading({})
    engine = client("http://again", server)
    engine.verify_every = 0
    names = []
    for _ in range(3):
        engine.update_weights(1)
        names.append(server.loaded)
    assert len(set(names)) == 3


def test_a_call_that_the_server_cuts_off_before_its_first_token_is_asked_again(client):
    aborted = {"token_ids": [], "logprobs": {"content": []}, "finish_reason": "abort", "weight_versions": []}
    server = Loading({"/inference/v1/generate": lambda _: aborted})
    engine = client("http://aborts", server)
    engine.verify_every, engine.patience_s = 0, 5.0
    engine.update_weights(1)
    assert eight(engine).ids == [7] * 8
    assert engine.incidents.take() == {"engine/server_error": 1}


def test_a_server_that_comes_back_during_an_update_by_nccl_waits_for_the_next(policy, tmp_path):
    """A broadcast sends what the policy has now, which other weights than the running rollouts' may be."""
    here, there = Loading({}), Loading({})
    engine = VllmServerEngine(
        policy,
        ["http://here", "http://there"],
        incidents=Incidents(),
        sync_dir=tmp_path,
        patience_s=30.0,
        overlaps=True,
    )
    answers = {"here": here, "there": there}
    engine._http.client = httpx.AsyncClient(transport=httpx.MockTransport(lambda r: answers[r.url.host](r)))
    engine._senders, engine._label = {}, "mine"
    there.version = engine._servers[1].label = "mine"  # the other one has lost its own
    try:
        for session in map(str, range(8)):
            engine.open(session)
            sampling = Sampling(temperature=1.0, top_p=0.9, max_tokens=8, stop_ids=(2,))
            assert asyncio.run(engine.generate(session, [8, 9], [], sampling, 1)).ids == [7] * 8
        assert not here.paths and engine.incidents.take()["engine/server_error"] >= 1
    finally:
        engine._senders = None
        engine.shutdown()


# --- what goes out and what may come back -----------------------------------------------------------------------------

TURN = Sampling(temperature=1.0, top_p=0.9, max_tokens=3, stop_ids=(2,))


def with_images(policy, pictures, spare: int = 0) -> list[int]:
    codec = policy.codec
    ids = [8]
    for pixels in pictures:
        count = codec.image_tokens(codec.image_grid(pixels)) + spare
        ids += [*codec.encode("<|vision_start|>"), *[codec.image_pad_id] * count, *codec.encode("<|vision_end|>")]
    return [*ids, 9]


def test_each_image_goes_out_as_one_placeholder(policy, pictures):
    pad = policy.codec.image_pad_id
    sent = collapsed(with_images(policy, pictures[:3]), pictures[:3], policy.codec)
    assert sent.count(pad) == 3 and sent[0] == 8 and sent[-1] == 9
    assert collapsed([8, 9], [], policy.codec) == [8, 9]
    for ids, images, message in (
        (with_images(policy, pictures[:1]), pictures[:2], "2 images, but the ids hold placeholders for 1"),
        (with_images(policy, pictures[:2]), pictures[:1], "more placeholders than the 1 images need"),
        (with_images(policy, pictures[:1], -1), pictures[:1], "image 0 of grid .* needs"),
    ):
        with pytest.raises(EngineError, match=message) as refused:
            collapsed(ids, images, policy.codec)
        assert refused.value.kind == "bad_arguments"


def test_the_prompt_that_was_read_is_the_one_that_was_meant(policy, pictures):
    ids = with_images(policy, pictures[:2])
    check_prompt(ids, tuple(ids), pictures[:2], policy.codec)
    pad = policy.codec.image_pad_id
    second = len(ids) - 1 - ids[::-1].index(pad)
    for read, message in (
        (None, "ignores return_token_ids"),
        ([*ids[:second], pad, *ids[second:]], r"image 1 of .*tokens, but \d+ tokens in the engine"),
        ([7, *ids[1:]], "they differ at 0"),
        (ids[:-1], f"read {len(ids) - 1} prompt ids instead of {len(ids)}"),
    ):
        with pytest.raises(EngineError, match=message):
            check_prompt(ids, read, pictures[:2], policy.codec)


@pytest.mark.parametrize(
    ("ids", "logps", "finish", "message"),
    [
        ([7, 2], [-0.1, -0.2], "stop", None),
        ([7, 8, 9], [-0.1, 1e-6, -0.2], "length", None),
        ([], [], "stop", "0 sampled ids"),
        ([7, 8], [-0.1], "length", "2 sampled ids with 1 log-probs"),
        ([7, 8, 9, 7], [-0.1] * 4, "length", "max_tokens is 3"),
        (["pad", 2], [-0.1, -0.1], "stop", "image placeholder"),
        ([7, 2], [-0.1, -0.2], "abort", "ended by 'abort'"),
        ([7, 8], [-0.1, -0.2], "stop", "stopped by 8, which is none of"),
        ([7, 2], [-0.1, -9999.0], "stop", "could not compute"),
        ([7, 2], [-0.1, float("nan")], "stop", "could not compute"),
        ([7, 2], [-0.1, 0.5], "stop", "could not compute"),
    ],
)
def test_an_answer_is_what_was_asked_for_or_an_error(policy, ids, logps, finish, message):
    ids = [policy.codec.image_pad_id if token == "pad" else token for token in ids]
    if message is None:
        made = checked_generation(ids, logps, finish, None, TURN, policy.codec)
        assert (made.ids, made.finish_reason) == (ids, finish) and max(made.logps) <= 0
        return
    with pytest.raises(EngineError, match=message) as refused:
        checked_generation(ids, logps, finish, None, TURN, policy.codec)
    assert refused.value.kind == "bad_response"
