"""The engine that a configuration names."""

from __future__ import annotations

import os
import shutil
import tempfile
from concurrent.futures import Executor
from dataclasses import replace
from pathlib import Path

import torch

from genevolve_fast.incidents import Incidents
from genevolve_fast.policy.model import Policy
from genevolve_fast.protocols import TrainedEngine
from genevolve_fast.rollout.serve import Command, command, vllm_installed
from genevolve_fast.rollout.server_processes import ServerProcesses, free_port
from genevolve_fast.rollout.transformers_engine import TransformersEngine
from genevolve_fast.train.config import ConfigError, EvolveConfig, RolloutConfig
from genevolve_fast.train.gpus import VISIBLE, check_share, shares

_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM's --max-lora-rank takes


def open_engine(
    config: EvolveConfig,
    policy: Policy,
    incidents: Incidents,
    executor: Executor | None = None,
    folder: Path | None = None,
) -> TrainedEngine:
    """Who samples for `policy`; failed attempts are counted in `incidents`. Raises ConfigError with what is missing.

    `executor` runs the embedded engine's batches; none: a thread of its own. `folder` is the run's, where servers that
    it starts have their logs and weights; none: a temporary one.
    """
    r = config.rollout
    if r.engine == "transformers":
        return TransformersEngine(policy, max_batch=r.max_batch, deterministic=r.deterministic, executor=executor)
    try:
        return _server(config, policy, incidents, folder) if r.engine == "server" else _vllm(config, policy, incidents)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"rollout.engine {config.rollout.engine!r}: {error}") from error


def check_engine(config: EvolveConfig) -> None:
    """Raise ConfigError, before anything is loaded, where the engine's package is missing."""
    if config.rollout.engine == "vllm" and not vllm_installed():
        raise ConfigError(
            "rollout.engine vllm: vllm is not installed: pip install 'genevolve-fast[vllm]', or let the policy itself "
            "sample with --set rollout.engine=transformers"
        )


def _server(config: EvolveConfig, policy: Policy, incidents: Incidents, folder: Path | None) -> TrainedEngine:
    from genevolve_fast.rollout.vllm_server import VllmServerEngine

    s = config.rollout.server
    check_share(config)
    key = os.environ.get(s.api_key_env) if s.api_key_env else None
    if s.api_key_env and not key:
        raise ConfigError(f"rollout.server.api_key_env: the environment has no {s.api_key_env}")
    urls, processes, sync_dir = s.urls, None, Path(s.sync_dir) if s.sync_dir else None
    if not urls:
        own = (folder or Path(tempfile.mkdtemp(prefix="genevolve-"))) / "servers"
        commands, urls = server_commands(config)
        processes = ServerProcesses(commands, urls, own, s.start_timeout_s)
        if s.sync == "disk" and sync_dir is None:
            sync_dir = own / "weights"
            shutil.rmtree(sync_dir, ignore_errors=True)  # what a run that was killed left
    return VllmServerEngine(
        policy,
        urls,
        incidents=incidents,
        sync=s.sync,
        sync_dir=sync_dir,
        merge_lora=s.merge_lora,
        dtype=getattr(torch, s.dtype) if s.dtype else None,
        patience_s=s.patience_s,
        timeout_s=s.timeout_s,
        verify_every=s.verify_every,
        api_key=key,
        processes=processes,
        overlaps=config.rollout.staleness > 0,
    )


def server_commands(config: EvolveConfig) -> tuple[list[Command], list[str]]:
    """(what to start, the addresses) of the servers that a configuration wants on rollout_gpus or the CPU."""
    s = config.rollout.server
    gpus = shares(config).servers if config.rollout_gpus else ((),) * s.cpu_servers
    backend = "transformers" if s.cpu_servers else s.backend
    if backend == "auto":
        backend = "vllm" if vllm_installed() and not config.policy.path.startswith("sandbox:") else "transformers"
    flags = ["--dtype", s.dtype or config.policy.dtype]
    if backend == "vllm" and config.policy.lora.rank and not s.merge_lora:
        rank = next((r for r in _LORA_RANKS if r >= config.policy.lora.rank), config.policy.lora.rank)
        flags += ["--enable-lora", "--max-lora-rank", str(rank)]
    if s.cpu_servers:
        flags += ["--threads", str(max(1, (os.cpu_count() or 1) // (s.cpu_servers + 1)))]
    made, urls = [], []
    for names in gpus:
        port = free_port()
        one = command(
            config.policy.path,
            backend=backend,
            port=port,
            tp=s.tensor_parallel_size,
            max_model_len=longest(config.rollout),
            gpu_memory_utilization=s.gpu_memory_utilization,
            training=True,
            api_key_env=s.api_key_env,
            extra=(*flags, *s.flags),
        )
        made.append(replace(one, environment={**one.environment, VISIBLE: ",".join(names)}))
        urls.append(f"http://127.0.0.1:{port}")
    return made, urls


def _vllm(config: EvolveConfig, policy: Policy, incidents: Incidents) -> TrainedEngine:
    from genevolve_fast.rollout.vllm_colocated import VllmEngine

    v = config.rollout.vllm
    return VllmEngine(
        policy,
        incidents=incidents,
        max_model_len=v.max_model_len or longest(config.rollout),
        tensor_parallel_size=v.tensor_parallel_size,
        gpu_memory_utilization=v.gpu_memory_utilization,
        max_num_seqs=v.max_num_seqs,
        enforce_eager=v.enforce_eager,
        merge_lora=v.merge_lora,
        sampling_mask=config.rollout.replay_sampling_mask,
        verify_every=v.verify_every,
        bucket_bytes=v.bucket_mb << 20,
        seed=config.seed,
    )


def longest(rollout: RolloutConfig) -> int:
    """Tokens that the longest rollout of these limits can have."""
    return rollout.max_prompt_length + rollout.max_response_length
