"""Our server against its protocol: a real process, asked over HTTP; its answers against the policy recomputed here."""

from __future__ import annotations

import asyncio
import base64
import concurrent.futures
import io
import socket
import threading
import time

import httpx
import numpy as np
import pytest
import torch
from loopback.engine import LoopbackEngine
from PIL import Image
from rollouts import recomputed_logps

from genevolve_fast.policy.adapters import add_lora, save_adapter
from genevolve_fast.policy.model import Policy
from genevolve_fast.protocols import Sampling
from genevolve_fast.rollout.server import main
from genevolve_fast.rollout.server_policy import ServedPolicy
from genevolve_fast.rollout.server_weights import digests
from genevolve_fast.sandbox.tiny_policy import start_path

pytestmark = pytest.mark.slow  # a server process with its own weights

KEY = "key-of-the-tests"
PROMPT = np.random.default_rng(5).integers(40, 300, 60).tolist()
FREE = {"temperature": 0.8, "max_tokens": 8, "seed": 11, "logprobs": 0, "ignore_eos": True}
SLOW = {**FREE, "max_tokens": 3000}


def client_of(server: LoopbackEngine, timeout: float = 30) -> httpx.Client:
    return httpx.Client(base_url=server.url, timeout=timeout, headers={"Authorization": f"Bearer {KEY}"})


@pytest.fixture(scope="module")
def server():
    arguments = ("--served-model-name", "tiny", "--api-key-env", "TEST_KEY", "--max-request-mb", "1")
    arguments = (*arguments, "--return-sampling-mask")
    with LoopbackEngine(*arguments, env={"TEST_KEY": KEY}) as running:
        yield running
        log = running.log_tail(10**6)
        assert KEY not in log and "Traceback" not in log


@pytest.fixture
def ask(server):
    """The server as it started: its own weights, awake, no adapters."""
    with client_of(server) as client:
        yield client
        client.post("/resume").raise_for_status()
        reload(client, start_path())
        client.post("/update_weight_version", json={"new_version": "default"}).raise_for_status()


@pytest.fixture(scope="module")
def local():
    return Policy.from_pretrained(start_path()).eval()


def generate(client, ids, *, session=None, params=FREE, **fields):
    headers = {"X-Session-ID": session} if session else {}
    body = {"token_ids": ids, "sampling_params": params, **fields}
    return client.post("/inference/v1/generate", json=body, headers=headers)


def answer(client, ids, **rest):
    """(ids, log-probs, the whole body) of a call that must succeed."""
    response = generate(client, ids, **rest)
    assert response.status_code == 200, response.text
    body = response.json()
    choice = body["choices"][0]
    content = choice["logprobs"]["content"]
    assert [c["token_id"] for c in content] == choice["token_ids"]
    return choice["token_ids"], np.array([c["logprob"] for c in content]), body


def reload(client, folder):
    body = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
    return client.post("/collective_rpc", json=body)


def png(pixels) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


@pytest.fixture
def in_background():
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        yield threads.submit


def until(condition, seconds=20.0):
    stop = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < stop, "it did not come to that"
        time.sleep(0.01)


# --- tokens in, tokens out --------------------------------------------------------------------------------------------


def test_tokens_and_logprobs_are_the_policys(ask, local):
    ids, logps, body = answer(ask, PROMPT, request_id="mine", return_token_ids=True)
    assert np.abs(recomputed_logps(local, [*PROMPT, *ids], [], len(PROMPT), 0.8) - logps).max() < 5e-6
    choice = body["choices"][0]
    assert body["request_id"] == "generate-tokens-mine" and body["model"] == "tiny"
    assert body["prompt_token_ids"] == PROMPT and body["mm_placeholders"] is None
    assert body["usage"]["prompt_tokens"] == 60 and body["usage"]["completion_tokens"] == 8
    assert choice["finish_reason"] == "length" and choice["stop_reason"] is None
    assert choice["weight_versions"] == [{"version": "default", "start": 0, "end": 8}]
    assert answer(ask, PROMPT)[0] == ids  # the seed belongs to the request
    assert answer(ask, PROMPT, params={**FREE, "seed": 12})[0] != ids


def test_stop_ids(ask):
    ids, _, _ = answer(ask, PROMPT)
    stopped, _, body = answer(ask, PROMPT, params={**FREE, "stop_token_ids": [ids[3]]})
    assert stopped == ids[: ids.index(ids[3]) + 1]
    assert body["choices"][0]["finish_reason"] == "stop" and body["choices"][0]["stop_reason"] == ids[3]


def test_the_sampling_mask_is_what_top_p_kept(ask):
    ids, _, body = answer(ask, PROMPT, params={**FREE, "top_p": 0.9})
    mask = body["choices"][0]["sampling_mask"]
    assert len(mask) == len(ids) and all(token in kept for token, kept in zip(ids, mask, strict=True))
    assert max(map(len, mask)) > 1
    assert answer(ask, PROMPT)[2]["choices"][0]["sampling_mask"] is None  # top_p 1 keeps everything


def test_images_are_expanded_and_seen(ask, local, pictures):
    codec = local.codec
    shown = [p[:96, :96] if p.shape[0] == 96 else np.zeros((96, 96, 3), np.uint8) for p in pictures[:2]]
    ids = [*PROMPT[:10], codec.image_pad_id, *PROMPT[10:20], codec.image_pad_id, 41]
    parts = [{"type": "image_url", "url": png(p)} for p in shown]
    out, logps, body = answer(ask, ids, content_parts=parts, return_token_ids=True)
    lengths = [codec.image_tokens(codec.image_grid(p)) for p in shown]
    expanded = body["prompt_token_ids"]
    assert body["mm_placeholders"] == {
        "image": [{"offset": 10, "length": lengths[0]}, {"offset": 20 + lengths[0], "length": lengths[1]}]
    }
    assert len(expanded) == 21 + sum(lengths)
    want = recomputed_logps(local, [*expanded, *out], shown, len(expanded), 0.8)
    assert np.abs(want - logps).max() < 5e-6
    refused = generate(ask, ids, content_parts=parts[:1])
    assert refused.status_code == 400 and "2 <|image_pad|> for 1 images" in refused.json()["error"]["message"]


def test_a_session_keeps_its_cache_and_changed_history_does_not_use_it(ask, local):
    first, _, _ = answer(ask, PROMPT[:30], session="talk")
    ids = [*PROMPT[:30], *first, 50]
    second, logps, body = answer(ask, ids, session="talk")
    assert body["usage"]["prompt_tokens_details"]["cached_tokens"] == len(ids) - 2
    assert np.abs(recomputed_logps(local, [*ids, *second], [], len(ids), 0.8) - logps).max() < 5e-6
    for call in ({"session": "other"}, {"session": "talk", "cache_salt": "salt"}, {}):
        assert answer(ask, ids, **call)[2]["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


@pytest.mark.parametrize(
    ("change", "status", "says"),
    [
        ({"sampling_params": {"top_k": 5}}, 400, "top_k=5 is not supported"),
        ({"sampling_params": {"n": 2}}, 400, "n=2 is not supported"),
        ({"sampling_params": {"repetition_penalty": 0}}, 400, "repetition_penalty=0 is not supported"),
        ({"sampling_params": {"logprobs": 5}}, 400, "logprobs"),
        ({"sampling_params": {"tempreature": 1}}, 400, "tempreature: unknown parameter"),
        ({"sampling_params": {"temperature": -1}}, 400, "temperature"),
        ({"sampling_params": {"top_p": 0}}, 400, "top_p"),
        ({"token_ids": []}, 400, "token_ids"),
        ({"token_ids": [10**6]}, 400, "ids must be some of 0 to 1016"),
        ({"token_ids": [-1]}, 400, "ids must be some of 0 to 1016"),
        ({"token_ids": [50] * 5000}, 400, "maximum context length is 4096"),
        ({"stream": True}, 400, "stream=True is not supported"),
        ({"features": {"mm_hashes": {}}}, 400, "features"),
        ({"model": "another"}, 404, "`another` does not exist"),
        ({"content_parts": [{"type": "image_url", "url": "http://127.0.0.1/x.png"}]}, 400, "fetches no URLs"),
        ({"content_parts": [{"type": "image_url", "url": "data:image/png;base64,AAAA"}]}, 400, "not an image"),
        ({"content_parts": [{"type": "video_url", "url": "x"}]}, 400, "content_parts[0]"),
    ],
)
def test_what_is_not_implemented_is_refused(ask, change, status, says):
    response = ask.post("/inference/v1/generate", json={"token_ids": PROMPT, "sampling_params": {}, **change})
    error = response.json()["error"]
    assert response.status_code == error["code"] == status
    assert says in error["message"] and set(error) == {"message", "type", "param", "code"}


def test_neutral_parameters_are_taken(ask):
    neutral = {"n": 1, "top_k": 0, "min_p": 0.0, "presence_penalty": 0.0, "repetition_penalty": 1.0, "stop": [],
               "detokenize": False, "skip_special_tokens": False, "output_kind": 2, "min_tokens": 0}  # fmt: skip
    assert answer(ask, PROMPT, params={**FREE, **neutral})[0] == answer(ask, PROMPT)[0]


def test_key_and_size_are_checked_first(server, ask):
    assert httpx.get(f"{server.url}/health").status_code == 200
    without = httpx.post(f"{server.url}/inference/v1/generate", json={})
    assert without.status_code == 401 and without.json()["error"]["type"] == "AuthenticationError"
    large = ask.post("/inference/v1/generate", content=b"x" * (2 << 20))
    assert large.status_code == 413
    chunks = ask.post("/inference/v1/generate", content=(b"x" * 65536 for _ in range(32)))
    assert chunks.status_code == 413
    assert ask.post("/inference/v1/generate", content=b"{").status_code == 400


def test_loopback_only_without_a_key(capsys, monkeypatch):
    assert main(["--model", "sandbox:start", "--host", "0.0.0.0"]) == 2
    assert "--api-key-env" in capsys.readouterr().err
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    assert main(["--model", "sandbox:start", "--api-key-env", "NO_SUCH_KEY"]) == 2


def test_a_taken_port_and_a_missing_model_are_said_in_one_line(capsys, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["--model", "sandbox:start", "--port", port]) == 2
    assert f"--port {port}: Address already in use" in capsys.readouterr().err
    assert main(["--model", str(tmp_path), "--port", "0"]) == 2
    assert "--model: no policy" in capsys.readouterr().err


# --- text -------------------------------------------------------------------------------------------------------------


def test_chat_through_the_openai_package(server, ask, pictures):
    from openai import BadRequestError, NotFoundError, OpenAI

    client = OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)
    assert [m.id for m in client.models.list().data] == ["tiny"]
    messages = [{"role": "system", "content": "Help."}, {"role": "user", "content": "Draw the field of Bel Abo."}]
    said = client.chat.completions.create(
        model="tiny", messages=messages, temperature=0.6, top_p=0.9, max_tokens=60, seed=1
    )
    choice = said.choices[0]
    assert choice.finish_reason == "stop" and "<|im_end|>" not in choice.message.content
    prompt = "<|im_start|>system\nHelp.<|im_end|>\n<|im_start|>user\nDraw the field of Bel Abo.<|im_end|>\n"
    tokens = ask.post("/tokenize", json={"prompt": prompt + "<|im_start|>assistant\n"}).json()["tokens"]
    assert ask.post("/tokenize", json={"messages": messages}).json()["tokens"] == tokens
    assert said.usage.prompt_tokens == len(tokens)
    part = {"type": "image_url", "image_url": {"url": png(pictures[3])}}
    seen = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": [{"type": "text", "text": "See"}, part]}], max_tokens=4
    )
    assert seen.usage.completion_tokens <= 4 and seen.usage.prompt_tokens > 9
    plain = client.completions.create(model="tiny", prompt=prompt + "<|im_start|>assistant\n", max_tokens=60, seed=1,
                                      temperature=0.6, top_p=0.9, logprobs=0)  # fmt: skip
    assert plain.choices[0].text == choice.message.content
    assert "".join(plain.choices[0].logprobs.tokens).startswith(choice.message.content)
    with pytest.raises(NotFoundError, match="does not exist"):
        client.chat.completions.create(model="gpt", messages=messages)
    with pytest.raises(BadRequestError, match="stream"):
        client.chat.completions.create(model="tiny", messages=messages, stream=True)
    with pytest.raises(BadRequestError, match="tools"):
        client.chat.completions.create(model="tiny", messages=messages, tools=[{"type": "function", "function": {}}])


# --- weights ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Another policy and its folder."""
    policy = Policy.from_pretrained(start_path()).eval()
    with torch.no_grad():
        for p in policy.model.model.language_model.layers.parameters():
            p.mul_(1.1)
    folder = tmp_path_factory.mktemp("weights") / "trained"
    policy.model.save_pretrained(folder, max_shard_size="2MB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return policy, folder


def test_reloaded_weights_are_these_and_no_older_cache_is_read(ask, local, trained):
    policy, folder = trained
    ids = PROMPT[:40]
    first, _, _ = answer(ask, ids, session="s")
    longer = [*ids, *first, 50]
    answer(ask, longer, session="s")
    assert ask.post("/weight_checker", json={"action": "checksum"}).json()["checksums"] == digests(local)
    assert ask.post("/pause?mode=wait").json() == {"status": "paused"}
    assert generate(ask, ids).status_code == 503
    assert reload(ask, folder).json() == {"results": [None]}
    assert ask.post("/weight_checker", json={"action": "compare", "baseline": digests(policy)}).json()["match"]
    ask.post("/update_weight_version", json={"new_version": "1"})
    assert ask.post("/reset_prefix_cache").json() == {"success": True}
    assert ask.get("/is_paused").json() == {"is_paused": True}
    ask.post("/resume")
    longest = [*longer, 51]
    out, logps, body = answer(ask, longest, session="s")
    assert body["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert body["choices"][0]["weight_versions"] == [{"version": "1", "start": 0, "end": 8}]
    assert np.abs(recomputed_logps(policy, [*longest, *out], [], len(longest), 0.8) - logps).max() < 5e-6
    assert ask.get("/weight_info").json() == {"weight_version": "1"}


def test_the_same_prompt_before_and_after_a_reload(ask, local, trained):
    policy, folder = trained
    for served in (local, policy):
        out, logps, _ = answer(ask, PROMPT, session="same")
        assert np.abs(recomputed_logps(served, [*PROMPT, *out], [], len(PROMPT), 0.8) - logps).max() < 5e-6
        reload(ask, folder).raise_for_status()


def test_a_folder_that_does_not_fit_changes_nothing(ask, local, trained, tmp_path):
    from safetensors.torch import save_file

    good = {n: p.detach().clone() for n, p in trained[0].model.named_parameters()}
    name = "model.language_model.layers.0.mlp.down_proj.weight"
    wrong = {
        "missing": {n: p for n, p in good.items() if n != name},
        "no parameter": {**good, "model.extra.weight": torch.zeros(2)},
        "the policy's": {**good, name: good[name][:-1].contiguous()},
        "not floating": {**good, name: good[name].to(torch.int8)},
        "are tied": {**good, "lm_head.weight": good["model.language_model.embed_tokens.weight"] + 1},
    }
    for says, tensors in wrong.items():
        folder = tmp_path / says.replace(" ", "_")
        folder.mkdir()
        save_file(tensors, folder / "model.safetensors")
        refused = reload(ask, folder)
        assert refused.status_code == 400 and says in refused.json()["error"]["message"], says
    assert reload(ask, tmp_path / "nowhere").status_code == 400
    assert ask.post("/weight_checker", json={"action": "checksum"}).json()["checksums"] == digests(local)


def test_requests_in_flight_finish_with_the_new_weights(ask, trained, in_background):
    policy, folder = trained
    running = in_background(answer, ask, PROMPT, params={**FREE, "max_tokens": 300})
    until(lambda: not ask.post("/reset_prefix_cache").json()["success"])
    reload(ask, folder).raise_for_status()
    ask.post("/update_weight_version", json={"new_version": "next"})
    ids, logps, body = running.result(60)
    spans = body["choices"][0]["weight_versions"]
    assert spans[0]["version"] == "default" and spans[-1] == {**spans[-1], "version": "next", "end": 300}
    at = spans[-1]["start"]
    want = recomputed_logps(policy, [*PROMPT, *ids], [], len(PROMPT) + at, 0.8)
    assert 0 < at < 300 and np.abs(want - logps[at:]).max() < 5e-5


def test_adapters_are_chosen_by_name(ask, local, tmp_path, in_background):
    adapted = {}
    for i, name in enumerate(("one/v1", "two")):
        policy = Policy.from_pretrained(start_path()).eval()
        add_lora(policy, rank=4, targets=["q_proj", "down_proj"] if i else "all", seed=i)
        with torch.no_grad():
            for n, p in policy.model.named_parameters():
                if "lora_B" in n:
                    p.normal_(0, 0.05, generator=torch.Generator().manual_seed(i))
        save_adapter(policy, tmp_path / str(i))
        adapted[name] = policy
        body = {"lora_name": name, "lora_path": str(tmp_path / str(i))}
        assert ask.post("/v1/load_lora_adapter", json=body).status_code == 200
    assert [m["id"] for m in ask.get("/v1/models").json()["data"]] == ["tiny", "one/v1", "two"]
    calls = {name: in_background(answer, ask, PROMPT, model=name, session="s") for name in ("one/v1", "tiny", "two")}
    for name, call in calls.items():
        ids, logps, body = call.result(30)
        want = recomputed_logps(adapted.get(name, local), [*PROMPT, *ids], [], len(PROMPT), 0.8)
        assert body["model"] == name and np.abs(want - logps).max() < 5e-6
    assert ask.post("/weight_checker", json={"action": "checksum"}).json()["checksums"] == digests(local)
    replaced = {"lora_name": "two", "lora_path": str(tmp_path / "0")}
    assert ask.post("/v1/load_lora_adapter", json=replaced).status_code == 400
    assert ask.post("/v1/load_lora_adapter", json={**replaced, "load_inplace": True}).status_code == 200
    ids, logps, body = answer(ask, PROMPT, model="two", session="s")
    assert body["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    want = recomputed_logps(adapted["one/v1"], [*PROMPT, *ids], [], len(PROMPT), 0.8)
    assert np.abs(want - logps).max() < 5e-6
    assert ask.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": "/no"}).status_code == 404
    for name in ("one/v1", "two"):
        assert ask.post("/v1/unload_lora_adapter", json={"lora_name": name}).status_code == 200
        assert generate(ask, PROMPT, model=name).status_code == 404
    assert ask.post("/v1/unload_lora_adapter", json={"lora_name": "two"}).status_code == 404
    assert np.array_equal(answer(ask, PROMPT)[0], calls["tiny"].result()[0])


# --- pause, sleep, people who hang up ---------------------------------------------------------------------------------


def busy(client):
    return not client.post("/reset_prefix_cache").json()["success"]


def test_pause_modes(ask, in_background):
    cut = in_background(answer, ask, PROMPT, params=SLOW)
    until(lambda: busy(ask))
    ask.post("/pause").raise_for_status()  # abort, as vLLM does without a mode
    ids, _, body = cut.result(10)
    assert body["choices"][0]["finish_reason"] == "abort" and len(ids) < 3000
    assert generate(ask, PROMPT).status_code == 503
    ask.post("/resume")
    params = {**FREE, "max_tokens": 100}
    still = in_background(answer, ask, PROMPT, params=params)
    until(lambda: busy(ask))
    ask.post("/pause?mode=keep").raise_for_status()
    queued = in_background(answer, ask, PROMPT[:20])
    time.sleep(0.1)
    assert not queued.done() and busy(ask)
    ask.post("/resume")
    assert still.result(20)[0] == answer(ask, PROMPT, params=params)[0] and len(queued.result(20)[0]) == 8
    ask.post("/pause?mode=keep").raise_for_status()
    never = in_background(answer, ask, PROMPT)
    time.sleep(0.1)
    ask.post("/pause?mode=abort").raise_for_status()
    assert never.result(10)[2]["choices"][0] | {"weight_versions": None} == {
        **dict.fromkeys(("stop_reason", "routed_experts", "sampling_mask", "weight_versions")),
        **{"index": 0, "token_ids": [], "logprobs": {"content": []}, "finish_reason": "abort"},
    }
    assert ask.post("/pause?mode=later").status_code == 400


def test_sleep_and_wake(ask, local, in_background):
    assert ask.post("/sleep?level=2&mode=wait").json() == {"status": "sleeping", "level": 2}
    assert ask.post("/sleep?level=2&mode=wait").json() == {"status": "sleeping", "level": 2}  # nothing more to drop
    assert ask.get("/is_sleeping").json() == {"is_sleeping": True}
    waiting = in_background(answer, ask, PROMPT)
    assert reload(ask, start_path()).status_code == 409
    assert ask.post("/wake_up?tags=weights").json() == {"status": "sleeping", "tags": ["weights"]}
    assert reload(ask, start_path()).status_code == 200
    assert not waiting.done()
    assert ask.post("/wake_up?tags=kv_cache").json() == {"status": "awake", "tags": ["kv_cache"]}
    ids, logps, _ = waiting.result(20)
    assert np.abs(recomputed_logps(local, [*PROMPT, *ids], [], len(PROMPT), 0.8) - logps).max() < 5e-6
    assert ask.get("/is_sleeping").json() == {"is_sleeping": False}


def test_a_client_that_hangs_up_frees_its_place(server, ask):
    with client_of(server, timeout=0.3) as impatient, pytest.raises(httpx.ReadTimeout):
        generate(impatient, PROMPT, params=SLOW)
    until(lambda: not busy(ask), 5)


def test_requests_are_aborted_by_name(ask, in_background):
    named = in_background(answer, ask, PROMPT, params=SLOW, request_id="cut me")
    until(lambda: busy(ask))
    assert ask.post("/abort_requests", json={"request_ids": ["cut me", "nobody"]}).json()["aborted"] == 1
    assert named.result(10)[2]["choices"][0]["finish_reason"] == "abort"


@pytest.mark.parametrize(("limits", "cached"), [({"max_sessions": 2}, [7, 0]), ({"cache_bytes": 1}, [0, 0])])
def test_the_sessions_used_longest_ago_are_forgotten(limits, cached):
    served = ServedPolicy(Policy.from_pretrained(start_path()).eval(), "tiny", **limits)

    async def main():
        async def turn(session, length):
            return await served.generate(None, session, PROMPT[:length], [], Sampling(max_tokens=1), 1)

        for session, length in (("a", 6), ("b", 6), ("a", 7), ("c", 6)):
            await turn(session, length)
        return [(await turn(session, 20)).cached for session in ("a", "b")]

    assert asyncio.run(main()) == cached


# --- processes that end -----------------------------------------------------------------------------------------------


def test_a_killed_server_is_a_connection_error_and_a_restarted_one_answers():
    with LoopbackEngine("--served-model-name", "tiny") as server:
        port, before = server.port, answer(client_of(server), PROMPT)[0]
        threading.Timer(0.3, server.kill).start()
        with pytest.raises(httpx.TransportError):
            generate(client_of(server), PROMPT, params=SLOW)
        with pytest.raises(httpx.ConnectError):
            generate(client_of(server), PROMPT)
        server.restart()
        assert server.port == port and answer(client_of(server), PROMPT)[0] == before
        assert server.terminate() == 0


def test_sessions_are_bounded_and_stale_caches_can_be_shown(trained):
    policy, folder = trained
    arguments = ("--served-model-name", "tiny", "--max-sessions", "2", "--keep-caches-over-updates")
    with LoopbackEngine(*arguments) as server, client_of(server) as ask:
        talks = {}
        for name in ("a", "b", "c"):
            talks[name] = [*PROMPT[:30], *answer(ask, PROMPT[:30], session=name)[0], 50]
        cached = {n: answer(ask, ids, session=n)[2]["usage"]["prompt_tokens_details"] for n, ids in talks.items()}
        assert [cached[n]["cached_tokens"] for n in ("a", "b", "c")] == [0, 0, 0]  # each call evicts the one it needs
        ids = talks["c"]
        out, _, _ = answer(ask, ids, session="c")
        reload(ask, folder)
        longer = [*ids, *out, 51]
        stale, logps, _ = answer(ask, longer, session="c")
        want = recomputed_logps(policy, [*longer, *stale], [], len(longer), 0.8)
        assert np.abs(want - logps).max() > 1e-3
        assert ask.post("/reset_prefix_cache").json()["success"]
        fresh, logps, _ = answer(ask, longer, session="c")
        want = recomputed_logps(policy, [*longer, *fresh], [], len(longer), 0.8)
        assert np.abs(want - logps).max() < 1e-5  # fp32 over other shapes; stale ones are off by more than 1e-3
