"""The engine that a configuration names."""

from __future__ import annotations

import os
from concurrent.futures import Executor
from pathlib import Path

import torch

from genevolve_fast.incidents import Incidents
from genevolve_fast.policy.model import Policy
from genevolve_fast.protocols import TrainedEngine
from genevolve_fast.rollout.serve import vllm_installed
from genevolve_fast.rollout.transformers_engine import TransformersEngine
from genevolve_fast.train.config import ConfigError, EvolveConfig, RolloutConfig


def open_engine(
    config: EvolveConfig, policy: Policy, incidents: Incidents, executor: Executor | None = None
) -> TrainedEngine:
    """Who samples for `policy`; failed attempts are counted in `incidents`. Raises ConfigError with what is missing.

    `executor` runs the embedded engine's batches; none: a thread of its own.
    """
    r = config.rollout
    if r.engine == "transformers":
        return TransformersEngine(policy, max_batch=r.max_batch, deterministic=r.deterministic, executor=executor)
    open_other = _server if r.engine == "server" else _vllm
    try:
        return open_other(config, policy, incidents)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"rollout.engine {config.rollout.engine!r}: {error}") from error


def check_engine(config: EvolveConfig) -> None:
    """Raise ConfigError, before anything is loaded, where the engine's package is missing."""
    if config.rollout.engine == "vllm" and not vllm_installed():
        raise ConfigError(
            "rollout.engine vllm: vllm is not installed: pip install 'genevolve-fast[vllm]', or let the policy itself "
            "sample with --set rollout.engine=transformers"
        )


def _server(config: EvolveConfig, policy: Policy, incidents: Incidents) -> TrainedEngine:
    from genevolve_fast.rollout.vllm_server import VllmServerEngine

    s = config.rollout.server
    key = os.environ.get(s.api_key_env) if s.api_key_env else None
    if s.api_key_env and not key:
        raise ConfigError(f"rollout.server.api_key_env: the environment has no {s.api_key_env}")
    return VllmServerEngine(
        policy,
        s.urls,
        incidents=incidents,
        sync=s.sync,
        sync_dir=Path(s.sync_dir) if s.sync_dir else None,
        merge_lora=s.merge_lora,
        dtype=getattr(torch, s.dtype) if s.dtype else None,
        patience_s=s.patience_s,
        timeout_s=s.timeout_s,
        verify_every=s.verify_every,
        api_key=key,
    )


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
