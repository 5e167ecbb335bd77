"""What a run trains, an adapter or all weights, and which other weights it needs beside them."""

from __future__ import annotations

import torch
from torch import nn

from genevolve_fast.policy.adapters import add_lora
from genevolve_fast.policy.model import Policy
from genevolve_fast.policy.offload import ActivationOffload
from genevolve_fast.policy.quantize import quantize, quantized_layers
from genevolve_fast.policy.weights import Average, WeightSource, base_weights
from genevolve_fast.train.config import EvolveConfig, PolicyConfig
from genevolve_fast.train.fits import available_memory
from genevolve_fast.train.run import RunError


def prepare(policy: Policy, config: PolicyConfig, seed: int) -> None:
    """Freeze, quantize, adapt, checkpoint and offload `policy` as its section says; the adapter is drawn with `seed`.

    Raises RunError for what this device cannot do.
    """
    if dropout := getattr(policy.text_config, "attention_dropout", 0):
        raise RunError(
            f"the training pass drops no attention weights: set attention_dropout={dropout} to 0 in the policy's "
            "config.json"
        )
    if config.freeze_vision:
        policy.freeze_vision()
    if config.freeze_head:
        policy.head_weight.requires_grad_(False)
    policy.gradient_checkpointing = config.gradient_checkpointing
    policy.tile_tokens = config.tile_tokens
    if config.liger:
        use_liger(policy)
    if config.offload_gib:
        policy.offload = pinned_buffer(config.offload_gib, policy.device)
    if config.quantize != "none" and not quantized_layers(policy.model):
        quantize(policy, config.quantize)
    if config.lora.rank:
        add_lora(policy, **config.lora.model_dump(), seed=seed)


def use_liger(policy: Policy) -> None:
    """Replace the norms and MLPs of the language model by liger-kernel's."""
    if policy.device.type != "cuda":
        raise RunError(f"policy.liger needs a GPU, the policy is on {policy.device.type}: set policy.liger=false")
    try:
        from liger_kernel.transformers import monkey_patch
    except ImportError as error:
        raise RunError("policy.liger needs liger-kernel: pip install liger-kernel") from error
    patch = getattr(monkey_patch, f"apply_liger_kernel_to_{policy.text_config.model_type.removesuffix('_text')}")
    # its rotary embedding takes another layout, and its loss is not ours
    patch(rope=False, fused_linear_cross_entropy=False, rms_norm=True, swiglu=True, model=policy.model)


def pinned_buffer(gib: float, device: torch.device) -> ActivationOffload:
    """Host memory for layer inputs, allocated now or refused. Raises RunError."""
    if device.type != "cuda":
        raise RunError(
            f"policy.offload_gib moves layer inputs from a GPU to the host, the policy is on {device.type}: set it to 0"
        )
    needed, free = int(gib * 2**30), available_memory(torch.device("cpu"))
    print(f"offload: {gib:g} GiB of pinned host memory for layer inputs, {free / 2**30:.1f} GiB available", flush=True)
    if needed > free:
        raise RunError(
            f"policy.offload_gib {gib:g} exceeds the host's available memory of {free / 2**30:.1f} GiB: set it below"
        )
    try:
        return ActivationOffload(needed, device)
    except RuntimeError as error:
        raise RunError(f"policy.offload_gib {gib:g}: {error}") from error


def refuse_dropout(policy: Policy) -> None:
    """Raises RunError for a model that drops at random in training: its log-probs would not be repeatable."""
    text = policy.model.config.get_text_config()
    dropping = [f"{n}={p}" for n, p in text.to_dict().items() if "dropout" in n and isinstance(p, float) and p > 0]
    dropping += [f"{n} (p={m.p})" for n, m in policy.model.named_modules() if isinstance(m, nn.Dropout) and m.p > 0]
    if dropping:
        raise RunError(
            f"evolve needs repeatable log-probs: set to 0 in the policy's config.json: {', '.join(dropping)}"
        )


def other_weights(config: EvolveConfig, policy: Policy) -> tuple[WeightSource | None, WeightSource | None]:
    """(reference, teacher) of a run that starts at `policy`; prints what each costs.

    None: no KL term, and a teacher with the student's weights. Base teacher and reference are one source.
    """
    base = base_weights(policy) if config.objective.kl_coef or config.teacher == "base" else None
    reference = base if config.objective.kl_coef else None
    teacher = (
        Average(policy, config.ema_rate) if config.teacher == "ema" else base if config.teacher == "base" else None
    )
    if reference:
        print(f"reference: {reference.describe()}; +1 forward of every rollout", flush=True)
    if teacher:
        same = " (the reference's)" if teacher is reference else ""
        cost = "a separate pass that does not ride the student's, +1 forward of every rollout with experience"
        print(f"teacher: {teacher.describe()}{same}; {cost}", flush=True)
    return reference, teacher
