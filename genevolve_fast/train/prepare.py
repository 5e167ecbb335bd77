"""What a run trains, an adapter or all weights, and which other weights it needs beside them."""

from __future__ import annotations

from torch import nn

from genevolve_fast.policy.adapters import add_lora
from genevolve_fast.policy.model import Policy
from genevolve_fast.policy.weights import Average, WeightSource, base_weights
from genevolve_fast.train.config import EvolveConfig, PolicyConfig
from genevolve_fast.train.run import RunError


def prepare(policy: Policy, config: PolicyConfig, seed: int) -> None:
    """Freeze, adapt and checkpoint `policy` as its section says; the adapter is drawn with `seed`."""
    if config.freeze_vision:
        policy.freeze_vision()
    policy.gradient_checkpointing = config.gradient_checkpointing
    if config.lora.rank:
        add_lora(policy, **config.lora.model_dump(), seed=seed)


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
