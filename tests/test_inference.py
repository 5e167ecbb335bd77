"""Agent and ChatConversation against a real chat server process: protocol, budgets, failures, keys."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np
import pytest
from loopback.chat import ROOT, LoopbackChat

from genevolve_fast import Agent
from genevolve_fast.agent.chat import ChatConversation
from genevolve_fast.agent.session import Session, SessionSettings
from genevolve_fast.net.chat import ChatEndpoint, _retry_after
from genevolve_fast.net.pictures import data_url
from genevolve_fast.protocols import EngineError, Sampling
from genevolve_fast.sandbox.world import SYSTEM_PROMPT, SandboxWorld

WORLD = SandboxWorld()
EMBLEM = next(r for r in WORLD.requests("train", 60) if r.category == "emblem_motto")
KEY = "sk-very-secret-key"
FIELDS = ["prompt", "gen_prompt", "reference_images", "messages", "termination", "rounds", "error"]


@pytest.fixture(scope="module")
def process():
    server = LoopbackChat().start()
    yield server
    server.kill()


@pytest.fixture
def server(process):
    process.faults()
    return process


def agent(server, **changes) -> Agent:
    options = {"tools": WORLD.tools(), "system_prompt": SYSTEM_PROMPT} | changes
    return Agent("tiny", server.url, options.pop("api_key", None), **options)


def test_run_returns_the_released_result_and_sends_the_released_messages(server):
    result = agent(server).run(EMBLEM.question)
    assert (result.termination, result.rounds, result.error) == ("answer", 4, None)
    assert list(result.to_dict()) == FIELDS and result.to_dict()["messages"] == result.messages
    assert list(result.reference_images[0]) == ["img_id", "note", "local_path", "url", "title", "page_url"]
    assert [m["role"] for m in result.messages] == ["system", "user"] + ["assistant", "user"] * 3 + ["assistant"]
    assert all(m["content"].startswith("<tool_response>\n") for m in result.messages[3::2])
    calls = server.seen()
    assert [c["body"]["messages"] for c in calls] == [result.messages[:n] for n in (2, 4, 6, 8)]
    first = calls[0]["body"]
    assert {k: v for k, v in first.items() if k != "messages"} == {
        "model": "tiny",
        "max_tokens": 4096,
        "temperature": 0.6,
        "top_p": 0.9,
    }
    assert calls[0]["key"] == "Bearer EMPTY"


def test_prompts_run_concurrently_and_run_refuses_a_running_loop(server):
    async def both():
        async with agent(server, seed=5) as a:
            with pytest.raises(RuntimeError, match="arun"):
                a.run(EMBLEM.question)
            return await asyncio.gather(*(a.arun(r.question) for r in WORLD.requests("train", 8)))

    assert [r.termination for r in asyncio.run(both())] == ["answer"] * 8
    assert {c["body"]["seed"] for c in server.seen()} == {5000, 5001, 5002, 5003}


def test_one_agent_runs_again_and_in_another_loop(server):
    a = agent(server)
    ends = [a.run(EMBLEM.question).termination, a.run(EMBLEM.question).termination]
    assert [*ends, asyncio.run(a.arun(EMBLEM.question)).termination, a.run(EMBLEM.question).termination] == [
        "answer"
    ] * 4


def test_one_agent_runs_in_several_threads(server):
    a = agent(server, attempts=1)
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(a.run, [r.question for r in WORLD.requests("train", 24)]))
    assert {r.error for r in found} == {None} and a.incidents.take() == {}


def test_address_and_key_come_from_the_environment(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    a = Agent(base_url=None, tools=WORLD.tools(), system_prompt=SYSTEM_PROMPT)
    assert a.run(EMBLEM.question).termination == "answer"
    assert server.seen()[0]["key"] == f"Bearer {KEY}" and server.seen()[0]["body"]["model"] == "GenEvolve"
    assert agent(server, api_key="other").run(EMBLEM.question).error is None
    assert server.seen()[-1]["key"] == "Bearer other"


TOO_LONG = {"status": 400, "message": "This model's maximum context length is 64 tokens"}


@pytest.mark.parametrize(
    ("faults", "counted", "error"),
    [
        ([{"status": 500, "retry_after": 0}, {"status": 503, "retry_after": 0}], {"engine/server_error": 2}, None),
        ([{"status": 429, "retry_after": 0}], {"engine/rate_limited": 1}, None),
        ([{"status": 500, "retry_after": 0}] * 3, {"engine/server_error": 3}, "Error code: 500"),
        ([{"status": 404, "message": "no such model"}], {"engine/client_error": 1}, "no such model"),
        ([{"status": 422, "raw": ""}], {"engine/client_error": 1}, "Error code: 422"),
        ([{"raw": "}{"}], {"engine/bad_response": 1}, "did not answer in the chat protocol"),
        ([{"raw": '{"choices": []}'}], {"engine/bad_response": 1}, "did not answer in the chat protocol"),
        ([{"raw": "[" * 100_000}], {"engine/bad_response": 1}, "did not answer in the chat protocol"),
        ([TOO_LONG], {"engine/client_error": 1}, "lower max_response_length"),
    ],
)
def test_failures_have_kinds_and_are_counted(server, faults, counted, error):
    a = agent(server)
    server.faults(*faults)
    result = a.run(EMBLEM.question)
    assert a.incidents.take() == counted
    assert (result.termination == "error") == (error is not None)
    assert result.error is None or (result.error.startswith("llm_call_failed: ") and error in result.error)


@pytest.mark.slow
def test_a_server_that_asks_for_time_gets_it(server):
    server.faults({"status": 429, "retry_after": 2})
    assert agent(server).run(EMBLEM.question).error is None
    first, second = (call["at"] for call in server.seen()[:2])
    assert second - first >= 2  # a second without being asked


def test_a_slow_answer_is_a_timeout(server):
    a = agent(server, request_timeout=0.2, attempts=1)
    server.faults({"delay_s": 5})
    assert "no answer within 0.2 s" in a.run(EMBLEM.question).error
    assert a.incidents.take() == {"engine/timeout": 1}


def test_an_answer_that_never_ends_is_a_timeout():
    async def drip(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n")
        with suppress(OSError):
            for _ in range(60):  # each read finds a byte within the client's own timeout
                writer.write(b" ")
                await writer.drain()
                await asyncio.sleep(0.05)
        writer.close()

    async def main() -> str:
        slow = await asyncio.start_server(drip, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{slow.sockets[0].getsockname()[1]}/v1"
        async with Agent("m", url, tools={}, attempts=1, request_timeout=0.3) as endless:
            result = await endless.arun("x")
        slow.close()
        return result.error

    assert "gave no answer within 0.3 s" in asyncio.run(main())


def test_keys_never_come_out(server, caplog):
    caplog.set_level("DEBUG")
    for fault in ({"status": 401, "message": "bad key KEY"}, {"status": 500, "message": "KEY", "retry_after": 0}):
        server.faults(*[fault] * 3)
        result = agent(server, api_key=KEY).run(EMBLEM.question)
        assert "***" in result.error and KEY not in str(result)
    for url in (f"http://user:{KEY}@127.0.0.1:9/v1", f"http://127.0.0.1:9/v1?key={KEY}", f"ftp://{KEY}@host"):
        try:
            said = str(Agent("m", url, KEY, tools={}, attempts=1).run("x"))
        except ValueError as error:
            said = str(error)
        assert KEY not in said
    assert KEY not in caplog.text and KEY not in repr(agent(server, api_key=KEY))

    async def raised() -> str:
        endpoint = ChatEndpoint("m", server.url, KEY, attempts=1)
        server.faults({"status": 401, "message": "KEY"})
        with pytest.raises(EngineError) as caught:
            await endpoint.complete([{"role": "user", "content": "x"}] * 2, Sampling())
        await endpoint.close()
        return f"{caught.value!r} {caught.value.__cause__} {caught.value.__dict__}"

    assert KEY not in asyncio.run(raised())


def test_a_login_in_the_address_reaches_the_server_and_nothing_else(server, caplog):
    caplog.set_level("DEBUG")
    login, address = base64.b64encode(f"user:user/{KEY}".encode()).decode(), server.url.partition("://")[2]
    endpoint = f"http://user:user%2F{KEY}@{address}"
    server.faults({"status": 401, "message": f"KEY and user/{KEY}"})
    result = Agent("tiny", endpoint, "other-key", tools={}, attempts=1).run("x")
    assert server.seen()[-1]["key"] == f"Basic {login}" and "Basic *** and ***" in result.error
    assert not any(secret in f"{result}{caplog.text}" for secret in (KEY, login))


def test_a_key_read_from_a_file_may_end_with_its_newline(server):
    assert agent(server, api_key=f"{KEY}\r\n").run(EMBLEM.question).error is None
    assert server.seen()[-1]["key"] == f"Bearer {KEY}"


@pytest.mark.parametrize("key", [f"{KEY}\nX: y", f"ключ{KEY}", f"{KEY}\x00"])
def test_a_key_that_no_header_can_hold_is_refused_and_not_told(server, key):
    with pytest.raises(ValueError, match="api_key") as refused:
        agent(server, api_key=key)
    assert KEY not in str(refused.value)


@pytest.mark.parametrize(
    "after", ["Fri, 31 Dec 99999999999999999999 23:59:59 GMT", "Fri, 31 Dec 2027 0:0:0 +9999999999"]
)
def test_a_retry_after_that_no_clock_holds_is_none(after):
    assert _retry_after({"retry-after": after}) is None


@pytest.mark.slow
def test_a_restart_is_waited_for(server):
    a = agent(server, patience=30)
    server.faults({}, {"delay_s": 3.0})  # the second call is under way when the server dies
    restart = threading.Thread(target=lambda: (time.sleep(0.3), server.kill(), server.start()))
    restart.start()
    result = a.run(EMBLEM.question)
    restart.join()
    assert result.termination == "answer" and a.incidents.take()["engine/connect"] >= 1


def talk_with(server, *faults, **changes) -> tuple[Session, ChatConversation]:
    server.faults(*faults)

    async def run():
        endpoint = ChatEndpoint("tiny", server.url)
        talk = ChatConversation(endpoint)
        session = Session(EMBLEM, talk, WORLD.tools(), SessionSettings(min_references=0, **changes))
        await session.run(SYSTEM_PROMPT)
        await endpoint.close()
        return session, talk

    return asyncio.run(run())


def test_budgets_are_the_servers_usage(server):
    session, talk = talk_with(server)
    sizes = [sum(len(m["content"]) for m in c["body"]["messages"]) // 4 for c in server.seen()]
    last = len(session.messages[-1].content) // 4
    assert talk.prompt_tokens == sizes[0] and talk.response_tokens == sizes[-1] + last - sizes[0]
    assert talk.sampled_tokens == sum(len(m.content) // 4 for m in session.messages if m.role == "assistant")


def test_budgets_are_estimated_where_no_usage_comes(server):
    session, talk = talk_with(server, *[{"no_usage": True}] * 9)
    after = sum(len(m.content) for m in session.messages[2:])
    assert talk.response_tokens == -(-after // 4) and talk.sampled_tokens is None
    assert session.termination == "answer"


def test_limits_end_a_rollout(server):
    short, _ = talk_with(server, max_response_tokens=120, max_tokens_per_turn=100)
    assert short.termination in ("no_answer", "max_response_length") and short.model_calls <= 3
    assert server.seen()[0]["body"]["max_tokens"] == 100 > server.seen()[1]["body"]["max_tokens"] > 0
    forced, _ = talk_with(server, max_model_calls=2)
    assert (forced.termination, forced.model_calls) == ("no_answer", 2)
    assert "FINAL STEP" in forced.messages[-2].content
    searching = {"text": '<tool_call>{"name": "search", "arguments": {"queries": ["Dor Abo field"]}}</tool_call>'}
    limits = {"max_response_tokens": 1600, "max_tokens_per_turn": 400, "max_model_calls": 30}
    spent, _ = talk_with(server, *[searching] * 30, **limits)
    assert (spent.termination, spent.model_calls) == ("no_answer", sum(m.role == "assistant" for m in spent.messages))
    assert "FINAL STEP" in spent.messages[-2].content and spent.model_calls < 30
    refused, _ = talk_with(server, max_prompt_tokens=10)
    assert "exceeds max_prompt_tokens 10" in refused.error and server.seen() == []


def test_a_cut_off_reply_is_told(server):
    session, _ = talk_with(server, {"finish_reason": "length", "text": "<think>" + "x" * 99})
    assert "RESPONSE TOO LONG" in session.messages[3].content and session.termination == "answer"


def test_pictures_travel_as_image_parts(server):
    from PIL import Image

    result = agent(server, observe_images="tokens").run(EMBLEM.question)
    assert result.termination == "answer" and all(isinstance(m["content"], str) for m in result.messages)
    parts = next(m["content"] for m in server.seen()[-1]["body"]["messages"] if isinstance(m["content"], list))
    pictures = [p["image_url"]["url"] for p in parts if p["type"] == "image_url"]
    assert len(pictures) == 3 and "".join(p.get("text", "<image>") for p in parts) in [
        m["content"] for m in result.messages
    ]
    sent = Image.open(io.BytesIO(base64.b64decode(pictures[0].partition(",")[2])))
    assert any(np.array_equal(np.asarray(sent), p.pixels) for p in WORLD.pictures)
    assert data_url(np.zeros((9, 2000, 3), np.uint8)).startswith("data:image/jpeg")


def test_thought_and_calls_that_a_server_took_out_are_put_back(server):
    whole, _ = talk_with(server)
    again, _ = talk_with(server, *[{"split": True}] * 9)
    assert again.messages == whole.messages and again.program == whole.program


def test_half_a_character_does_not_end_a_rollout(server):
    session, _ = talk_with(server, {"raw": ANSWER_OF_HALF_A_CHARACTER})
    assert session.termination == "answer" and session.messages[2].content == "a ?"


ANSWER_OF_HALF_A_CHARACTER = (
    '{"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [{"index": 0, "finish_reason": '
    '"stop", "message": {"role": "assistant", "content": "a \\ud83d"}}]}'
)


def test_what_cannot_be_is_refused_by_name(server, monkeypatch):
    for name, value in {"max_rounds": 0, "top_p": 0, "temperature": -1, "observe_images": "png"}.items():
        with pytest.raises(ValueError, match=name):
            agent(server, **{name: value})
    with pytest.raises(ValueError, match="base_url"):
        Agent(base_url="localhost:8000", tools={})
    with pytest.raises(ValueError, match="what follows"):
        Agent(base_url="http://localhost:8000/v1?api-version=1", tools={})
    monkeypatch.delenv("SERPER_API_KEY", raising=False)
    with pytest.raises(ValueError, match="SERPER_API_KEY is not set"):
        Agent()
    with pytest.raises(ValueError, match="prompt is empty"):
        agent(server).run("  ")


TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{{ '<|im_start|>assistant\n' }}"
)


def save_text_policy(folder) -> None:
    """The sandbox's start without its eyes, as a Qwen3 that any server loads: without pictures the two are the same."""
    import transformers
    from safetensors.torch import load_file

    from genevolve_fast.sandbox.tiny_policy import start_path

    start = start_path()
    sizes = json.loads((start / "config.json").read_text())["text_config"]
    del sizes["model_type"]
    rope = {"rope_type": "default", "rope_theta": sizes.pop("rope_parameters")["rope_theta"]}
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**sizes, rope_parameters=rope))
    weights = load_file(start / "model.safetensors").items()
    model.load_state_dict({k.replace("language_model.", ""): v for k, v in weights if "visual" not in k})
    model.save_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(start)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def transformers_serve(tmp_path_factory):
    """(model, base_url) of transformers' own server with the sandbox's policy."""
    import httpx

    folder = tmp_path_factory.mktemp("serve")
    save_text_policy(folder / "m")
    port = LoopbackChat().port
    program = "from transformers.cli.transformers import main; main()"
    command = [sys.executable, "-c", program, "serve", str(folder / "m")]
    with (folder / "log").open("w") as log:
        options = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
        alone = os.environ | {"OMP_NUM_THREADS": "1"}
        running = subprocess.Popen([*command, *options], stdout=log, stderr=log, cwd=ROOT, env=alone)
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            try:
                httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False).raise_for_status()
                break
            except httpx.HTTPError:
                assert running.poll() is None, (folder / "log").read_text()[-3000:]
                time.sleep(0.25)
        yield str(folder / "m"), f"http://127.0.0.1:{port}/v1"
    finally:
        running.terminate()
        running.wait()


@pytest.mark.slow
def test_a_policy_behind_transformers_serve_answers(transformers_serve):
    model, url = transformers_serve
    options = {"tools": WORLD.tools(), "system_prompt": SYSTEM_PROMPT, "max_tokens_per_round": 400}
    a = Agent(model, url, **options)
    results = [a.run(r.question) for r in WORLD.requests("train", 5)]
    assert a.incidents.take() == {}
    assert [r.termination for r in results].count("answer") >= 4, [r.error for r in results]
    assert any("<tool_response>\n--- search result" in m["content"] for r in results for m in r.messages)
    assert all("<think>" in m["content"] for r in results for m in r.messages if m["role"] == "assistant")


@pytest.mark.slow
def test_a_policy_behind_our_own_server_sees_pictures():
    loopback = pytest.importorskip("loopback.engine", reason="rollout/server.py is not here")
    with loopback.LoopbackEngine("--served-model-name", "tiny") as engine:
        told = {"tools": WORLD.tools(), "system_prompt": SYSTEM_PROMPT, "observe_images": "tokens", "seed": 1}
        a = Agent("tiny", f"{engine.url}/v1", **told)
        results = [a.run(r.question) for r in WORLD.requests("train", 5)]
    assert a.incidents.take() == {} and [r.termination for r in results] == ["answer"] * 5
    assert sum(len(r.reference_images) for r in results) >= 1
