"""Refuses a run that cannot fit, before anything of it is loaded."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace

import psutil
import torch

from genevolve_fast.profile.plan import CUDA_CONTEXT, Plan, Settings, gib, plan, savings
from genevolve_fast.profile.shapes import ModelShape
from genevolve_fast.train.config import EvolveConfig
from genevolve_fast.train.gpus import processes_here
from genevolve_fast.train.run import RunError

EXPERIENCE_TOKENS = 600  # of the block that a teacher reads: the length that the study of a step assumes


def settings_of(config: EvolveConfig, device: torch.device, **known) -> Settings:
    """What the planner needs of a configuration: its longest rollouts, which one micro-batch must hold.

    `known` fields of Settings replace what the configuration can only bound. The engine's open rollouts are counted at
    half their longest reply: never are all of them that long at once.
    """
    r = config.rollout
    distils = config.experience.enabled and config.objective.sdl_coef > 0
    settings = Settings(
        tokens=r.max_prompt_length + r.max_response_length,
        prefix=r.max_prompt_length,
        prompts_per_step=r.prompts_per_step,
        num_generations=r.num_generations,
        max_tokens_per_microbatch=config.max_tokens_per_microbatch,
        max_batch=r.max_batch,
        mean_tokens=r.max_prompt_length + -(-r.max_response_length // 2),
        patch=EXPERIENCE_TOKENS,
        loss_share=min(1.0, r.max_rounds * r.max_tokens_per_turn / r.max_response_length),
        dtype=config.policy.dtype,
        optimizer=config.optim.name,
        implementation=config.optim.implementation,
        bf16=config.optim.bf16,
        quantize=config.policy.quantize,
        lora=config.policy.lora.rank,
        freeze_vision=config.policy.freeze_vision,
        freeze_head=config.policy.freeze_head,
        workspace_mb=config.head_workspace_mb,
        teacher=config.teacher if distils else "off",
        reference=config.objective.kl_coef > 0,
        gradient_checkpointing=config.policy.gradient_checkpointing,
        tile_tokens=config.policy.tile_tokens,
        offload_gib=config.policy.offload_gib,
        rollout=r.engine == "transformers",  # another engine's KV is not in this process
        device=device.type,
        strategy=config.distributed.strategy,
        offload_optimizer=config.distributed.offload_optimizer,
        offload_params=config.distributed.offload_params,
        **launched_gpus(),
    )
    return replace(settings, **known)


def launched_gpus(environment: Mapping[str, str] = os.environ) -> dict[str, int]:
    """Nodes and GPUs of each, as the launcher of this process counts them; one of one without a launcher."""
    world, here = int(environment.get("WORLD_SIZE", "1")), processes_here(environment)
    return dict(nodes=max(1, world // here), gpus_per_node=here)


def beside_engine(config: EvolveConfig, total: int) -> dict[str, int]:
    """Fields of Settings for a vLLM that samples on the policy's own GPU of `total` bytes; none for another engine."""
    if config.rollout.engine != "vllm":
        return {}
    v = config.rollout.vllm
    return dict(engine_bytes=int(v.gpu_memory_utilization * total), engine_gpus=v.tensor_parallel_size)


def available_memory(device: torch.device) -> int:
    """Bytes that this process may still take on `device`."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + CUDA_CONTEXT  # the question itself made the context
    return psutil.virtual_memory().available


def check_fits(config: EvolveConfig, shape: ModelShape, device: torch.device) -> Plan:
    """The plan of a run that fits `device` and the host. Raises RunError naming the term that limits."""
    settings = settings_of(config, device)
    if device.type == "cuda":
        settings = replace(settings, **beside_engine(config, torch.cuda.mem_get_info(device)[1]))
    made, limit = plan(shape, settings), available_memory(device)
    if made.total > limit:
        t = made.limiting
        helps = [name for name, _, other in savings(shape, settings) if other.total <= limit][:3]
        raise RunError(
            f"this run cannot fit: phase {made.peak_phase} would need {gib(made.total)} of the {gib(limit)} that "
            f"{device} has left. Limited by {t.name}: {gib(t.bytes)} = {t.formula}. "
            + (f"It would fit with {', or '.join(helps)}. " if helps else "No single switch is enough. ")
            + "`genevolve-fast plan --config` shows every term"
        )
    if made.host_bytes and made.host_bytes > (host := available_memory(torch.device("cpu"))):
        raise RunError(
            f"{', '.join(t.name for t in made.host)} would take {gib(made.host_bytes)} of host memory, "
            f"{gib(host)} are left: lower policy.offload_gib, or offload less"
        )
    return made
