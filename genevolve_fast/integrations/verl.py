"""verl's fused-forward backend and a policy loss with distillation, on this library's operations."""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from verl.models.transformers import monkey_patch
from verl.models.transformers.dense_common import CausalLMOutputForPPO
from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY, register_policy_loss
from verl.workers.utils.losses import ppo_loss
from verl.workers.utils.padding import no_padding_2_padding

from genevolve_fast.integrations.lm_head import check_head, head_options, head_tensors
from genevolve_fast.ops import Objective, grpo_sdl, linear_logprob

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BACKEND = "genevolve"
POLICY_LOSS = "genevolve_sdl"
_teacher: ContextVar[Tensor | None] = ContextVar("teacher_log_probs", default=None)


def register_verl(*, impl: str = "auto", workspace_mb: float | None = None, **distillation) -> None:
    """Teach this process's verl the fused-kernel backend "genevolve" and the policy loss "genevolve_sdl".

    Call it where verl imports it in every worker: a module named in VERL_USE_EXTERNAL_MODULES or model.external_lib.
    Then set model.use_fused_kernels=True, model.fused_kernel_options.impl_backend=genevolve and, for the loss,
    actor.policy_loss.loss_mode=genevolve_sdl. `distillation` are the sdl_ fields of `Objective`; verl's configuration
    says the rest. A later call replaces an earlier one. Raises ValueError for any other option.
    """
    if wrong := [name for name in distillation if not name.startswith("sdl_")]:
        raise ValueError(f"{wrong[0]} is verl's configuration to say: only sdl_ options are given here")
    if distillation.get("sdl_scope", "all") != "all":
        raise ValueError("sdl_scope: verl does not say which tokens decide; use 'all'")
    Objective(**distillation)  # a wrong value is refused here, not in a worker's first step
    register_policy_loss(POLICY_LOSS)(_policy_loss(distillation))
    theirs = getattr(monkey_patch.patch_forward_with_backends, "theirs", monkey_patch.patch_forward_with_backends)

    def patch_forward_with_backends(
        model: PreTrainedModel, use_fused_kernels: bool = False, fused_kernels_backend: str | None = None
    ) -> None:
        if use_fused_kernels and fused_kernels_backend == BACKEND:
            patch_forward(model, impl=impl, workspace_mb=workspace_mb)
        else:
            theirs(model, use_fused_kernels, fused_kernels_backend)

    patch_forward_with_backends.theirs = theirs
    monkey_patch.patch_forward_with_backends = patch_forward_with_backends


def unregister_verl() -> None:
    """Undo `register_verl`; models that were patched stay patched."""
    patched = monkey_patch.patch_forward_with_backends
    monkey_patch.patch_forward_with_backends = getattr(patched, "theirs", patched)
    POLICY_LOSS_REGISTRY.pop(POLICY_LOSS, None)


# --- the forward ------------------------------------------------------------------------------------------------------


def patch_forward(model: PreTrainedModel, *, impl: str = "auto", workspace_mb: float | None = None) -> None:
    """Let `model`'s forward return CausalLMOutputForPPO(log_probs, entropy) [B, T], fp32, without logits.

    What verl's own backends leave out is kept: bias, softcap and logit scale of the architecture, fp32 logits whatever
    the dtype, any vocabulary, and a temperature per sequence [B]. A label of -100 gets no row (verl's engine labels
    every token, prompts included). Raises ValueError for a head whose weight does not make the logits.
    """
    check_head(model)
    options = dict(**head_options(model.config), impl=impl, workspace_mb=workspace_mb)

    def forward(self, input_ids=None, labels=None, shift_labels=None, temperature=1.0, return_dict=True, **inputs):
        if not return_dict:
            raise ValueError("the genevolve backend returns CausalLMOutputForPPO: call it with return_dict=True")
        inputs.pop("logits_to_keep", None)
        backbone = self.base_model(input_ids=input_ids, **inputs)
        if shift_labels is None:
            if labels is None and input_ids is None:
                raise ValueError("the genevolve backend needs labels or input_ids to score")
            shift_labels = torch.roll(input_ids if labels is None else labels, shifts=-1, dims=-1)
        hidden, weight, bias = head_tensors(check_head(self), backbone[0])
        if isinstance(temperature, Tensor) and temperature.ndim:
            temperature = temperature[:, None].expand_as(shift_labels).flatten()
        out = linear_logprob(
            hidden.flatten(0, 1),
            weight,
            shift_labels.flatten().long(),
            bias=bias,
            temperature=temperature,
            return_entropy=True,
            **options,
        )
        return CausalLMOutputForPPO(
            log_probs=out.logps.view(shift_labels.shape),
            entropy=out.entropy.view(shift_labels.shape),
            past_key_values=backbone.past_key_values,
            hidden_states=backbone.hidden_states,
            attentions=backbone.attentions,
        )

    model.forward = types.MethodType(forward, model)


# --- the loss ---------------------------------------------------------------------------------------------------------


@contextmanager
def teacher_log_probs(log_probs: Tensor) -> Iterator[None]:
    """Within, the policy loss "genevolve_sdl" distils towards `log_probs` [B, T] of the response tokens.

    NaN: no teacher for that token. A policy loss gets a fixed list of tensors from verl (`rollout_is_weights` is the
    only optional one) and the reference's log-probs never reach it, so the teacher's come around the call, not
    through it: visible where the loss is called, local to that thread, and impossible to mistake for something else.
    """
    token = _teacher.set(log_probs)
    try:
        yield
    finally:
        _teacher.reset(token)


def sdl_ppo_loss(config: Any, model_output: dict, data: Any, dp_group: Any = None) -> tuple[Tensor, dict[str, Any]]:
    """verl's `ppo_loss` (its policy loss, entropy and KL terms) with a teacher, for `worker.set_loss_fn`.

    The micro-batch carries the teacher's log-probs as verl's own distillation does: `teacher_logprobs`, nested
    [B, tokens, 1] or [B, tokens], shifted like `log_probs`; NaN where a sample has no teacher. verl's teacher servers
    score the student's prompt; privileged ones are for the caller to score and to put there.
    """
    if "teacher_logprobs" not in data:
        raise ValueError("the micro-batch has no teacher_logprobs: put them there, or use verl's ppo_loss")
    teacher = no_padding_2_padding(data["teacher_logprobs"], data)
    with teacher_log_probs(teacher.squeeze(-1) if teacher.ndim == 3 else teacher):
        return ppo_loss(config, model_output, data, dp_group)


def _policy_loss(distillation: dict[str, Any]):
    """verl's PolicyLossFn of PPO's clip, dual clip and distillation: `grpo_sdl` with verl's configuration."""

    def policy_loss(
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        o = _objective(config, loss_agg_mode, response_mask, rollout_is_weights, distillation)
        batch = config.global_batch_info
        dp_size, num_tokens, num_sequences = (
            batch.get(name) for name in ("dp_size", "batch_num_tokens", "global_batch_size")
        )
        if (dp_size or 1) > 1 and (num_tokens if loss_agg_mode == "token-mean" else num_sequences) is None:
            raise ValueError("with dp_size > 1, batch_num_tokens and global_batch_size of the whole step are needed")
        keep = response_mask.bool()
        teacher = _teacher.get() if o.sdl_coef else None
        if o.sdl_coef and teacher is None:
            raise ValueError(
                "genevolve_sdl distils, but no teacher is there: call it within teacher_log_probs(...), "
                "use sdl_ppo_loss, or register_verl(sdl_coef=0)"
            )
        if teacher is not None and teacher.shape != log_prob.shape:
            raise ValueError(f"teacher_log_probs must be {list(log_prob.shape)}, got {list(teacher.shape)}")
        rollout = None if rollout_is_weights is None else old_log_prob - rollout_is_weights.expand_as(log_prob).log()
        flat = lambda x: None if x is None else x.expand_as(log_prob).flatten()  # noqa: E731
        loss, stats = grpo_sdl(
            log_prob.flatten(),
            advantages=flat(advantages),
            seq_ids=torch.arange(len(log_prob), device=log_prob.device).repeat_interleave(log_prob.shape[1]),
            old_logps=flat(old_log_prob),
            rollout_logps=flat(rollout),
            teacher_logps=None if teacher is None else flat(teacher.nan_to_num(0.0)),
            sdl_mask=None if teacher is None else flat(~teacher.isnan()),
            loss_mask=keep.flatten(),
            num_sequences=num_sequences,
            num_tokens=num_tokens,
            objective=o,
        )
        return loss * (dp_size or 1), _metrics(stats, old_log_prob, log_prob, advantages, keep, o)

    return policy_loss


def _objective(
    config: Any, loss_agg_mode: str, mask: Tensor, weights: Tensor | None, distillation: dict[str, Any]
) -> Objective:
    if loss_agg_mode == "token-sum":
        raise ValueError("loss_agg_mode 'token-sum' is not part of this objective: take one of the means")
    low, high = (config.clip_ratio if x is None else x for x in (config.clip_ratio_low, config.clip_ratio_high))
    normed = loss_agg_mode == "seq-mean-token-sum-norm"
    return Objective(
        clip_ratio_low=low,
        clip_ratio_high=high,
        dual_clip=config.get("clip_ratio_c", 3.0),
        kl_coef=0.0,  # verl adds its own
        rollout_is="none" if weights is None else "token",
        rollout_is_cap=float("inf"),  # verl has capped its weights
        loss_agg_mode=loss_agg_mode,
        max_length=(config.global_batch_info.get("loss_scale_factor") or mask.shape[1]) if normed else None,
        **distillation,
    )


@torch.no_grad()
def _metrics(
    stats: dict[str, Tensor], old: Tensor, now: Tensor, advantages: Tensor, keep: Tensor, o: Objective
) -> dict[str, float]:
    """verl's names where verl has one, read in one synchronisation."""
    count = keep.sum().clamp(min=1)
    log_ratio = torch.where(keep, now - old, 0).clamp(-o.log_ratio_clamp, o.log_ratio_clamp)
    values = {
        "actor/pg_clipfrac": stats["pg_clipfrac_low"] + stats["pg_clipfrac_high"],
        "actor/ppo_kl": -log_ratio.sum() / count,
        "actor/pg_clipfrac_lower": ((log_ratio.exp() > o.dual_clip) & (advantages < 0) & keep).sum() / count,
    }
    if o.sdl_coef:
        values |= {f"actor/{name}": stats[name] for name in ("sdl_loss", "sdl_kl", "sdl_selected_fraction")}
    return dict(zip(values, torch.stack([x.float() for x in values.values()]).tolist(), strict=True))
