"""Which server to start for a model, and how: vLLM where it is installed, else our own."""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from genevolve_fast.policy.shards import export_first, in_shards

LOOPBACK = ("127.0.0.1", "::1", "localhost")
Backend = Literal["auto", "vllm", "transformers"]


class ServeError(ValueError):
    """The server cannot be started like that; the message names the flag and says why."""


@dataclass(frozen=True)
class Command:
    """A process to become: its arguments, and what is added to the environment.

    `secrets` name variables whose values are copied from others and never shown, {"VLLM_API_KEY": "MY_KEY"}.
    """

    arguments: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    secrets: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """As one would type it in a shell."""
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        variables += [f'{name}="${source}"' for name, source in self.secrets.items()]
        return " ".join([*variables, shlex.join(self.arguments)])

    def become(self) -> None:
        """Replace this process, so that signals reach the server itself. Does not return."""
        secrets = {name: os.environ[source] for name, source in self.secrets.items()}
        sys.stdout.flush()
        os.execvpe(self.arguments[0], self.arguments, {**os.environ, **self.environment, **secrets})


def command(
    model: str,
    *,
    backend: Backend = "auto",
    host: str = "127.0.0.1",
    port: int = 8000,
    tp: int = 1,
    dp: int = 1,
    served_model_name: str = "GenEvolve",
    max_model_len: int | None = None,
    gpu_memory_utilization: float | None = None,
    training: bool = False,
    api_key_env: str | None = None,
    insecure: bool = False,
    extra: Sequence[str] = (),
    for_elsewhere: bool = False,
) -> Command:
    """The server for `model` (a folder, hub name or sandbox:start). Raises ServeError.

    `training` turns on what update_weights needs: the weight endpoints, log-probs after temperature and top-p, the
    sampling mask, adapters loaded while it runs. `extra` goes to the server as it is.
    `for_elsewhere`: the command is only read here, so vLLM need not be installed.
    """
    if api_key_env and not os.environ.get(api_key_env):
        raise ServeError(f"--api-key-env {api_key_env}: the environment has no such variable, or it is empty")
    if host not in LOOPBACK and not (api_key_env or insecure):
        raise ServeError(f"--host {host} is reachable from elsewhere: set --api-key-env, or say --insecure")
    if in_shards(model):
        raise ServeError(f"--model {export_first(model)}")
    if backend == "auto":
        backend = "vllm" if vllm_installed() and not model.startswith("sandbox:") else "transformers"
    address = ("--host", host, "--port", str(port), "--served-model-name", served_model_name)
    if backend == "transformers":
        limits = tp, dp, max_model_len, gpu_memory_utilization
        return _ours(model, address, limits, training, api_key_env, insecure, extra)
    if model.startswith("sandbox:"):
        raise ServeError(f"--model {model} is a tiny policy of ours: it needs --backend transformers")
    if not vllm_installed() and not for_elsewhere:
        raise ServeError("--backend vllm: vllm is not installed: pip install 'genevolve-fast[vllm]'")
    if training and host not in LOOPBACK and not insecure:
        raise ServeError(
            f"--training on {host}: vLLM's key does not guard the endpoints that change weights; listen on 127.0.0.1, "
            "or say --insecure where only the trainer can reach this address"
        )
    parallel = ("--tensor-parallel-size", str(tp), "--data-parallel-size", str(dp))
    limits = ("--max-model-len", str(max_model_len or 65536))
    limits += ("--gpu-memory-utilization", str(gpu_memory_utilization or 0.85))
    arguments = (*_vllm_program(for_elsewhere), "serve", model, *address, *parallel, *limits)
    environment = {}
    if training:
        arguments += ("--enable-scale-out", "--logprobs-mode", "processed_logprobs", "--return-sampling-mask")
        arguments += (
            "--enable-prompt-tokens-details",
            "--enable-sleep-mode",
            "--api-server-count",  # adapters are known to the process that loaded them; vLLM refuses more with --dp
            "1",
            "--weight-transfer-config",
            '{"backend": "nccl"}',
        )
        environment = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    secrets = {"VLLM_API_KEY": api_key_env} if api_key_env else {}
    return Command((*arguments, *extra), environment, secrets)


def _ours(model, address, limits, training, api_key_env, insecure, extra) -> Command:
    tp, dp, max_model_len, gpu_memory_utilization = limits
    for flag, value in (("--tp", tp), ("--dp", dp)):
        if value != 1:
            raise ServeError(
                f"{flag} {value} needs vLLM: the transformers backend runs the model on one device "
                "(--backend vllm --dry-run prints the command for a machine that has it)"
            )
    if gpu_memory_utilization is not None:
        raise ServeError("--gpu-memory-utilization needs vLLM: the transformers backend takes memory as rollouts grow")
    arguments = (sys.executable, "-m", "genevolve_fast.rollout.server", "--model", model, *address)
    arguments += ("--max-model-len", str(max_model_len)) if max_model_len else ()
    arguments += ("--return-sampling-mask",) if training else ()
    arguments += ("--api-key-env", api_key_env) if api_key_env else ()
    arguments += ("--insecure",) if insecure else ()
    return Command((*arguments, *extra))


def vllm_installed() -> bool:
    return importlib.util.find_spec("vllm") is not None


def _vllm_program(for_elsewhere: bool) -> tuple[str, ...]:
    if for_elsewhere and not vllm_installed():
        return ("vllm",)
    beside = os.path.join(os.path.dirname(sys.executable), "vllm")
    found = beside if os.path.exists(beside) else shutil.which("vllm")
    return (found,) if found else (sys.executable, "-m", "vllm.entrypoints.cli.main")
