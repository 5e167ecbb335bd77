"""`genevolve-fast serve`: the command it becomes, what it refuses, and a server that really runs."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from genevolve_fast.cli import main
from genevolve_fast.rollout import serve
from genevolve_fast.rollout.serve import ServeError, command
from tests.loopback.engine import free_port

RECORDED = json.loads(Path(__file__).with_name("vllm_signatures.json").read_text(encoding="utf-8"))


@pytest.fixture
def with_vllm(monkeypatch):
    monkeypatch.setattr(serve, "vllm_installed", lambda: True)


def test_every_flag_and_variable_is_one_that_vllm_knows(with_vllm, monkeypatch):
    monkeypatch.setenv("MY_KEY", "not-to-be-seen")
    made = command("org/model", tp=2, dp=4, training=True, api_key_env="MY_KEY", extra=["--enable-lora"])
    flags = [part for part in made.arguments if part.startswith("--")]
    assert set(flags) <= set(RECORDED["flags"]) and len(flags) == len(set(flags))
    assert set(made.environment) <= set(RECORDED["environment"])
    values = dict(zip(made.arguments, made.arguments[1:], strict=False))
    assert (values["serve"], values["--tensor-parallel-size"], values["--data-parallel-size"]) == (
        "org/model",
        "2",
        "4",
    )
    assert values["--logprobs-mode"] == "processed_logprobs" and values["--max-model-len"] == "65536"
    assert values["--api-server-count"] == "1"  # as many as --dp would be refused where adapters are loaded at run time
    assert {"--enable-scale-out", "--return-sampling-mask", "--enable-lora"} <= set(flags)
    text = str(made)
    assert text.startswith('VLLM_SERVER_DEV_MODE=1 VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 VLLM_API_KEY="$MY_KEY" ')
    assert "not-to-be-seen" not in text and "not-to-be-seen" not in repr(made)


def test_plain_serving_opens_no_training_endpoint(with_vllm):
    made = command("org/model", host="0.0.0.0", insecure=True)
    assert not made.environment and "--enable-scale-out" not in made.arguments


def test_a_sandbox_policy_and_a_machine_without_vllm_get_our_server(with_vllm, monkeypatch):
    ours = "genevolve_fast.rollout.server"
    assert ours in command("sandbox:start").arguments
    assert ours not in command("org/model").arguments
    monkeypatch.setattr(serve, "vllm_installed", lambda: False)
    assert ours in command("org/model", training=True).arguments


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"tp": 2, "backend": "transformers"}, "--tp 2 needs vLLM"),
        ({"dp": 2, "backend": "transformers"}, "--dp 2 needs vLLM"),
        ({"gpu_memory_utilization": 0.5, "backend": "transformers"}, "--gpu-memory-utilization needs vLLM"),
        ({"host": "0.0.0.0"}, "set --api-key-env"),
        ({"api_key_env": "NO_SUCH_KEY"}, "no such variable"),
        ({"model": "sandbox:start", "backend": "vllm"}, "needs --backend transformers"),
        ({"host": "10.0.0.1", "api_key_env": "HOME", "training": True}, "does not guard the endpoints"),
    ],
)
def test_what_cannot_work_is_refused(with_vllm, flags, message):
    with pytest.raises(ServeError, match=message):
        command(flags.pop("model", "org/model"), **flags)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vllm is installed here")
def test_vllm_is_asked_for_by_name_where_it_is_not_installed(capsys):
    assert main(["serve", "--model", "org/model", "--backend", "vllm"]) == 2
    assert "pip install 'genevolve-fast[vllm]'" in capsys.readouterr().err


def test_dry_run_prints_what_the_shell_would_need(capsys):
    assert main(["serve", "--model", "a folder", "--backend", "transformers", "--dry-run", "--", "--threads", "1"]) == 0
    printed = capsys.readouterr().out.strip()
    assert printed.endswith("--model 'a folder' --host 127.0.0.1 --port 8000 --served-model-name GenEvolve --threads 1")


def test_the_command_for_a_machine_with_vllm_is_printed_without_it(monkeypatch, capsys):
    monkeypatch.setattr(serve, "vllm_installed", lambda: False)
    assert main(["serve", "--model", "org/model", "--tp", "2"]) == 2
    assert "--backend vllm --dry-run" in capsys.readouterr().err
    assert main(["serve", "--model", "org/model", "--tp", "2", "--backend", "vllm", "--dry-run"]) == 0
    assert capsys.readouterr().out.startswith("vllm serve org/model ")


@pytest.mark.slow
def test_serve_becomes_a_server_that_answers_and_ends_by_sigterm():
    port = free_port()
    arguments = ["serve", "--model", "sandbox:start", "--port", str(port), "--training", "--", "--threads", "1"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "genevolve_fast.cli", *arguments], env=environment, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline().split()[1:3] == ["-m", "genevolve_fast.rollout.server"]
        models, until = None, time.monotonic() + 60
        while models is None and time.monotonic() < until and process.poll() is None:
            try:
                models = httpx.get(f"http://127.0.0.1:{port}/v1/models", timeout=5, trust_env=False).json()
            except httpx.HTTPError:
                time.sleep(0.1)
        assert models and models["data"][0]["id"] == "GenEvolve"
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) in (0, -signal.SIGTERM)
    finally:
        process.kill()
        process.stdout.close()
