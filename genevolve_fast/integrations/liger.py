"""Liger's `LigerFusedLinearGRPOLoss`, by this library's fused objective: the same call, plus a teacher."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from genevolve_fast.ops import Objective, linear_grpo_sdl, linear_logprob

_AGGREGATIONS = {
    "grpo": "seq-mean-token-mean",
    "bnpo": "token-mean",
    "dapo": "token-mean",
    "dr_grpo": "seq-mean-token-sum-norm",
}
_IGNORED = -100


class FusedLinearGRPOLoss(nn.Module):
    """Drop-in for liger_kernel.chunked_loss.LigerFusedLinearGRPOLoss (0.8).

    `compiled` and `chunk_size` steer Liger's own implementation and have no counterpart; `workspace_mb` bounds the
    logits instead. With `sdl_coef` > 0 and `teacher_per_token_logps` in the call, the distillation is added.
    Raises ValueError for a loss or option that this objective does not have.
    """

    def __init__(
        self,
        beta: float = 0.04,
        compiled: bool = True,
        use_ref_model: bool = True,
        chunk_size: int = 1,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.2,
        loss_type: str = "dapo",
        max_completion_length: int | None = None,
        importance_sampling_level: str = "token",
        temperature: float = 1.0,
        delta: float | None = None,
        use_bias_correction_kl: bool = False,
        *,
        sdl_coef: float = 0.0,
        sdl_permille: int = 100,
        workspace_mb: float | None = None,
    ) -> None:
        super().__init__()
        if loss_type not in _AGGREGATIONS:
            raise ValueError(f"loss_type must be one of {', '.join(_AGGREGATIONS)}, not {loss_type!r}")
        if importance_sampling_level != "token":
            raise ValueError("importance_sampling_level must be 'token': this objective has one ratio a token")
        if use_bias_correction_kl:
            raise ValueError("use_bias_correction_kl is not part of this objective")
        if delta is not None and delta <= 1 + epsilon_high:
            raise ValueError(f"delta must exceed 1 + epsilon_high {1 + epsilon_high}, got {delta}")
        if loss_type == "dr_grpo" and max_completion_length is None:
            raise ValueError("loss_type 'dr_grpo' needs max_completion_length")
        self.loss_type, self.temperature, self.workspace_mb = loss_type, temperature, workspace_mb
        self.use_ref_model = use_ref_model
        self.objective = Objective(
            clip_ratio_low=epsilon_low,
            clip_ratio_high=epsilon_high,
            dual_clip=delta,
            kl_coef=beta,
            sdl_coef=sdl_coef,
            sdl_permille=sdl_permille,
            loss_agg_mode=_AGGREGATIONS[loss_type],
            max_length=max_completion_length if loss_type == "dr_grpo" else None,
        )

    def forward(
        self,
        _input: Tensor,
        lin_weight: Tensor,
        selected_token_ids: Tensor,
        attention_mask: Tensor,
        advantages: Tensor,
        bias: Tensor | None = None,
        ref_per_token_logps: Tensor | None = None,
        old_per_token_logps: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        vllm_is_ratio: Tensor | None = None,
        num_items_in_batch: Tensor | float | None = None,
        teacher_per_token_logps: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(loss, (KL where beta is not 0, clipped share)) of _input [B, T, H], ids and mask [B, T], advantages [B]."""
        if vllm_is_ratio is not None:
            raise ValueError("vllm_is_ratio: give linear_grpo_sdl the engine's rollout_logps instead")
        sequences, length = selected_token_ids.shape
        targets = torch.where(attention_mask.bool(), selected_token_ids, _IGNORED).reshape(-1)
        ref = ref_per_token_logps
        if ref is None and self.objective.kl_coef and self.use_ref_model and ref_input is not None:
            with torch.no_grad():
                ref = linear_logprob(
                    ref_input.reshape(-1, ref_input.shape[-1]),
                    lin_weight if ref_weight is None else ref_weight,
                    targets,
                    bias=ref_bias,
                    temperature=self.temperature,
                    workspace_mb=self.workspace_mb,
                ).logps
        if self.objective.kl_coef and ref is None:
            raise ValueError(f"beta {self.objective.kl_coef} needs ref_per_token_logps or ref_input")
        flat = lambda x: None if x is None else x.reshape(-1)  # noqa: E731
        loss, stats = linear_grpo_sdl(
            _input.reshape(-1, _input.shape[-1]),
            lin_weight,
            targets,
            bias=bias,
            temperature=self.temperature,
            advantages=advantages,
            seq_ids=torch.arange(sequences, device=targets.device).repeat_interleave(length),
            old_logps=flat(old_per_token_logps),
            ref_logps=flat(ref),
            teacher_logps=flat(teacher_per_token_logps),
            num_sequences=sequences,
            num_tokens=_tokens(num_items_in_batch) if self.loss_type == "dapo" else None,
            objective=self.objective,
            workspace_mb=self.workspace_mb,
        )
        clipped = stats["pg_clipfrac_low"] + stats["pg_clipfrac_high"]
        return loss, ((stats["kl"], clipped) if self.objective.kl_coef else (clipped,))


def _tokens(num_items: Tensor | float | None) -> Tensor | float | None:
    """Loss tokens of the step per process, as Liger and TRL count them."""
    if num_items is None or not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return num_items
    return num_items / torch.distributed.get_world_size()
