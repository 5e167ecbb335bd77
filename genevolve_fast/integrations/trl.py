"""TRL's GRPO on this library's head: log-probs of the loss rows only, and a trainer whose samples have a teacher."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

import torch
import trl
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import pad

from genevolve_fast.integrations.lm_head import check_head, check_logits, head_options, head_tensors
from genevolve_fast.ops import Objective, linear_grpo_sdl, linear_logprob

try:
    from trl.trainer.utils import FusedCausalLMOutput
except ImportError as error:
    raise ImportError(f"trl {trl.__version__} has no fused LM head to replace: install trl 1.16") from error

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.utils import ModelOutput

_IGNORED = -100
_ROUTER = "output_router_logits"
_AGGREGATIONS = {
    "grpo": "seq-mean-token-mean",
    "bnpo": "token-mean",
    "dapo": "token-mean",
    "dr_grpo": "seq-mean-token-sum-norm",
}


def patch_trl(trainer: GRPOTrainer, *, impl: str = "auto", workspace_mb: float | None = None) -> None:
    """Let `trainer` take old, reference and policy log-probs, and its entropies, from `linear_logprob`.

    Call it once, after building the trainer and before `train()`. The loss stays TRL's. Prompts, padding and tool
    outputs get no row in the head; their log-probs and entropies are 0, as TRL's are where it scores nothing.
    `impl` and `workspace_mb` are those of `linear_logprob`. Raises ValueError saying what cannot work.
    """
    if not isinstance(trainer, GRPOTrainer):
        raise TypeError(f"patch_trl patches a trl.GRPOTrainer, not a {type(trainer).__name__}")
    plugin = trainer.accelerator.state.deepspeed_plugin
    if plugin is not None and plugin.zero_stage == 3:
        raise ValueError("DeepSpeed ZeRO-3 frees the head between forward and backward: use DDP or FSDP2")
    models = [trainer.model, trainer.ref_model]
    bases = [_base_model(trainer, model) for model in models if model is not None]
    with trainer.accelerator.autocast():
        for base in bases:
            check_logits(base)
    how = _HeadOptions(
        temperature=trainer.temperature,
        full_precision=trainer.args.cast_lm_head_to_fp32,
        kernel=dict(impl=impl, workspace_mb=workspace_mb),
    )
    for base in bases:
        _score_in_forward(base, how)
    if not isinstance(trainer, _LossRows):
        kind = type(trainer)
        trainer.__class__ = type(kind.__name__, (_LossRows, kind), {"__module__": kind.__module__})


def _base_model(trainer: GRPOTrainer, model: torch.nn.Module) -> PreTrainedModel:
    model = trainer.accelerator.unwrap_model(model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


# --- the model's side -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _HeadOptions:
    temperature: float
    full_precision: bool
    kernel: dict[str, Any]


@dataclass(frozen=True)
class _Rows:
    """Hidden rows that predict a label, and the head: `linear_logprob`'s arguments. `index` [rows] into [B · L]."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    options: dict[str, Any]
    index: Tensor
    shape: tuple[int, int]

    def spread(self, values: Tensor) -> Tensor:
        """[B, L - 1] of values [rows], 0 elsewhere; connected to the model even where there are no rows."""
        everywhere = values.new_zeros(self.shape).flatten().index_put((self.index,), values)
        return everywhere.view(self.shape)[:, :-1]


@dataclass(frozen=True)
class _LogProbs:
    """What TRL asks of its model: log-probs, and entropies where needed ("detached": their value only)."""

    entropy: bool | Literal["detached"] = True

    def __call__(self, rows: _Rows) -> FusedCausalLMOutput:
        out = linear_logprob(
            rows.hidden, rows.weight, rows.targets, return_entropy=self.entropy, ignore_index=_IGNORED, **rows.options
        )
        entropy = None if out.entropy is None else rows.spread(out.entropy)
        return FusedCausalLMOutput(log_probs=rows.spread(out.logps), entropy=entropy)


def _score_in_forward(model: PreTrainedModel, how: _HeadOptions) -> None:
    """Rebind model.forward: `fused_lm_head=True` gives `_LogProbs`, a callable of `_Rows` what it makes of them.

    In the forward, because FSDP and DDP hook it, and the head's weights are whole only there.
    """
    if getattr(model.forward, "scores_in_forward", False):
        raise ValueError(f"this {type(model).__name__} is patched already")
    check_head(model)
    theirs = model.forward
    options = head_options(model.config)

    @functools.wraps(type(model).forward)
    def forward(self, *args, fused_lm_head=False, labels=None, **kwargs):
        if fused_lm_head is False:
            return theirs(*args, labels=labels, **kwargs)
        router = kwargs.get(_ROUTER) or getattr(self.config.get_text_config(), _ROUTER, False)
        if router:
            kwargs[_ROUTER] = True
        backbone = self.base_model(*args, **(kwargs | {"use_cache": False}))
        hidden, weight, bias = head_tensors(
            self.get_output_embeddings(), backbone.last_hidden_state, full_precision=how.full_precision
        )
        labels = torch.nn.functional.pad(labels[:, 1:].to(hidden.device), (0, 1), value=_IGNORED)  # of each row's next
        index = (labels.flatten() != _IGNORED).nonzero()[:, 0]
        rows = _Rows(
            hidden.flatten(0, 1)[index],
            weight,
            labels.flatten()[index],
            dict(bias=bias, temperature=how.temperature, **options, **how.kernel),
            index,
            tuple(labels.shape),
        )
        out = (_LogProbs() if fused_lm_head is True else fused_lm_head)(rows)
        if router:
            out.aux_loss = _balance(self, backbone, kwargs.get("attention_mask"))
        return out

    # accelerate unwinds `__wrapped__` when it unwraps a model: it must stop here, `generate` only needs the signature
    del forward.__wrapped__
    forward.__signature__ = inspect.signature(type(model).forward)
    forward.scores_in_forward = True
    model.forward = types.MethodType(forward, model)


def _balance(model: PreTrainedModel, backbone: ModelOutput, attention_mask: Tensor | None) -> Tensor:
    """The load-balancing loss of a mixture of experts."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    config = model.config.get_text_config()
    return load_balancing_loss_func(
        backbone.router_logits, config.num_experts, config.num_experts_per_tok, attention_mask
    )


# --- the trainer's side -----------------------------------------------------------------------------------------------


@dataclass
class _Scorer:
    """Stands for the model in TRL's method: the same call, asking for no more than the trainer uses."""

    model: torch.nn.Module
    job: _LogProbs
    tool_mask: Tensor | None
    scored: int = 0

    def __call__(self, input_ids: Tensor, labels: Tensor, fused_lm_head: bool, **inputs) -> ModelOutput:
        if self.tool_mask is not None:
            mask = self.tool_mask[self.scored : self.scored + len(input_ids)].to(labels.device)
            labels[:, -mask.shape[1] :].masked_fill_(mask == 0, _IGNORED)
        self.scored += len(input_ids)
        return self.model(input_ids=input_ids, labels=labels, fused_lm_head=self.job, **inputs)


class _LossRows:
    """What `patch_trl` changes of a GRPOTrainer: it knows the tool mask wherever log-probs are taken."""

    _tool_mask: Tensor | None = None

    @contextmanager
    def _loss_rows(self, tool_mask: Tensor | None) -> Iterator[None]:
        """Within, tokens where tool_mask [B, T] is 0 are not scored."""
        self._tool_mask = tool_mask
        try:
            yield
        finally:
            self._tool_mask = None

    def _generate_and_score_completions(self, inputs):
        with self._loss_rows(None):
            return super()._generate_and_score_completions(inputs)

    def _generate(self, prompts):
        generated = super()._generate(prompts)
        if (masks := generated[2]) is not None:
            masks = [torch.tensor(mask) for mask in masks]
            self._tool_mask = pad(
                masks, padding_value=1, padding_side="right", pad_to_multiple_of=self.pad_to_multiple_of
            )
        return generated

    def _compute_loss(self, model, inputs):
        with self._loss_rows(inputs.get("tool_mask")):
            return super()._compute_loss(model, inputs)

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, compute_entropy=False, **inputs
    ):
        entropy = compute_entropy and (True if self._entropy_bonus_enabled else "detached")
        scorer = _Scorer(model, _LogProbs(entropy), self._tool_mask)
        return super()._get_per_token_logps_and_entropies(
            scorer, input_ids, attention_mask, logits_to_keep, batch_size, compute_entropy, **inputs
        )


# --- the trainer with a teacher ---------------------------------------------------------------------------------------


def objective_of(config: GRPOConfig, **distillation) -> Objective:
    """The Objective that a GRPOConfig describes, plus `distillation`: sdl_coef, sdl_permille and the other sdl_ fields.

    Raises ValueError for a loss or option of TRL's that the objective does not have.
    """
    if wrong := [name for name in distillation if not name.startswith("sdl_")]:
        raise ValueError(f"{wrong[0]} is GRPOConfig's to say: only sdl_ options are given here")
    if config.loss_type not in _AGGREGATIONS:
        raise ValueError(f"loss_type must be one of {', '.join(_AGGREGATIONS)}, not {config.loss_type!r}")
    absent = dict(
        importance_sampling_level="token",
        use_bias_correction_kl=False if config.beta else config.use_bias_correction_kl,
        off_policy_mask_threshold=None,
        top_entropy_quantile=1.0,
        entropy_coef=0.0,
        use_adaptive_entropy=False,
    )
    for name, neutral in absent.items():
        if getattr(config, name) != neutral:
            raise ValueError(f"{name} {getattr(config, name)!r} is not part of this objective: leave it at {neutral!r}")
    high = config.epsilon if config.epsilon_high is None else config.epsilon_high
    if config.delta is not None and config.delta <= 1 + high:
        raise ValueError(f"delta must exceed 1 + epsilon_high {1 + high}, got {config.delta}")
    return Objective(
        clip_ratio_low=config.epsilon,
        clip_ratio_high=high,
        dual_clip=config.delta,
        kl_coef=config.beta,
        loss_agg_mode=_AGGREGATIONS[config.loss_type],
        max_length=config.max_completion_length if config.loss_type == "dr_grpo" else None,
        **_rollout_correction(config),
        **distillation,
    )


def _rollout_correction(config: GRPOConfig) -> dict[str, Any]:
    if not (config.use_vllm and config.vllm_importance_sampling_correction):
        return {}
    mode, low, high = (getattr(config, f"vllm_importance_sampling_{name}") for name in ("mode", "clip_min", "clip_max"))
    if mode not in ("token_truncate", "sequence_truncate") or low is not None:
        raise ValueError(
            f"vllm_importance_sampling_mode {mode!r} with clip_min {low}: the objective truncates from above, it does "
            "not mask; use 'token_truncate' or 'sequence_truncate' without clip_min"
        )
    return dict(rollout_is=mode.split("_")[0], rollout_is_cap=high)


@dataclass
class _LossOutput(FusedCausalLMOutput):
    stats: dict[str, Tensor] | None = None


@dataclass(frozen=True)
class _ObjectiveOfRows:
    """GRPO + distillation of one micro-batch from its loss rows. `columns` are [B, T], None where there is none."""

    objective: Objective
    advantages: Tensor
    length: int
    scale: float
    num_tokens: int | None
    columns: dict[str, Tensor | None]

    def __call__(self, rows: _Rows) -> _LossOutput:
        sequence, token = rows.index // rows.shape[1], rows.index % rows.shape[1] - (rows.shape[1] - 1 - self.length)
        pick = lambda x: None if x is None else x[sequence, token]  # noqa: E731
        advantages = self.advantages
        if advantages.ndim == 1 and len(advantages) == len(sequence):  # as many rows as sequences: say which is meant
            advantages = advantages[sequence]
        loss, stats = linear_grpo_sdl(
            rows.hidden,
            rows.weight,
            rows.targets,
            advantages=advantages if advantages.ndim == 1 else pick(advantages),
            seq_ids=sequence,
            num_sequences=rows.shape[0],
            num_tokens=self.num_tokens,
            loss_scale=self.scale,
            objective=self.objective,
            **{name: pick(x) for name, x in self.columns.items()},
            **rows.options,
        )
        return _LossOutput(loss=loss, stats=stats | {"rows": rows.targets.new_tensor(len(rows.targets))})


class GenEvolveGRPOTrainer(_LossRows, GRPOTrainer):
    """TRL's GRPOTrainer with on-policy self-distillation, loss and gradients made by `linear_grpo_sdl`.

    Each sample may have a teacher: the dataset's column `teacher_column` (or an extra field of `rollout_func`) holds
    the privileged prompt, chat or text like `prompt`: the prompt and, say, the experience of the best rollout; None
    where there is none. The student's own completion is scored under it by the same weights, without gradient, in
    every loss step. `objective` says what the distillation weighs (`objective_of(config, sdl_coef=...)`); its policy
    and KL terms must be the config's. With sdl_coef 0 the loss is TRL's.

    Raises ValueError for what the objective, or an exact gradient made in the forward, cannot do.
    """

    _tag_names = ["trl", "grpo", "genevolve"]

    def __init__(
        self,
        *args,
        objective: Objective | None = None,
        teacher_column: str = "teacher_prompt",
        impl: str = "auto",
        workspace_mb: float | None = None,
        **kwargs,
    ) -> None:
        self.teacher_column = teacher_column
        super().__init__(*args, **kwargs)
        described = objective_of(self.args)
        self.objective = described if objective is None else objective
        self._check(described)
        patch_trl(self, impl=impl, workspace_mb=workspace_mb)

    def _check(self, described: Objective) -> None:
        o = self.objective
        for name in (f.name for f in fields(Objective) if not f.name.startswith("sdl_")):
            if getattr(o, name) != getattr(described, name):
                raise ValueError(
                    f"objective.{name} is {getattr(o, name)!r}, the GRPOConfig says {getattr(described, name)!r}: "
                    "build it with objective_of(config, sdl_coef=...)"
                )
        if o.sdl_scope != "all":
            raise ValueError(f"sdl_scope {o.sdl_scope!r}: TRL does not say which tokens decide; use 'all'")
        if o.sdl_select == "batch" and self.args.gradient_accumulation_steps > 1:
            raise ValueError("sdl_select 'batch' would select per micro-batch: use 'sequence' with accumulation")
        if self.accelerator.scaler is not None or self.is_deepspeed_enabled:
            raise ValueError("fp16 loss scaling and DeepSpeed multiply the loss after its gradient is made: use bf16")
        if o.sdl_coef and self._is_vlm:
            raise ValueError("teacher prompts are text: distillation does not take a vision-language processor yet")
        if o.sdl_coef and any(c.is_prompt_learning for c in getattr(self.model, "peft_config", {}).values()):
            raise ValueError("distillation with prompt-learning adapters: the teacher would see their tokens too")

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        if self.teacher_column not in self._signature_columns:
            self._signature_columns = [*self._signature_columns, self.teacher_column]

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        if not self.objective.sdl_coef:
            return output
        if self.teacher_column not in inputs[0]:
            raise ValueError(
                f"no column {self.teacher_column!r} in the dataset, nor in rollout_func's fields: give one, with None "
                "for samples without a teacher, or set sdl_coef=0"
            )
        prompts = [x[self.teacher_column] for x in inputs]
        has = [bool(p) for p in prompts]
        own = [x.get("prompt", [{"role": "user", "content": ""}]) for x in inputs]
        ids, *_ = self._tokenize_prompts([t if h else p for t, h, p in zip(prompts, has, own, strict=True)])
        ids = [torch.tensor(x) for x in ids]
        side = dict(padding_side="left", pad_to_multiple_of=self.pad_to_multiple_of)
        device = self.accelerator.device
        output["teacher_prompt_ids"] = pad(ids, padding_value=self._tokenizer.pad_token_id, **side).to(device)
        output["teacher_prompt_mask"] = pad([torch.ones_like(x) for x in ids], padding_value=0, **side).to(device)
        output["has_teacher"] = torch.tensor(has, device=device)
        return output

    def _compute_loss(self, model, inputs):
        mode = "train" if self.model.training else "eval"
        completion, mask = inputs["completion_ids"], inputs["completion_mask"].bool()
        if "tool_mask" in inputs:
            mask = mask & inputs["tool_mask"].bool()
        old, sampled = inputs.get("old_per_token_logps"), None
        if self.objective.rollout_is != "none":
            sampled = inputs["sampling_per_token_logps"]
            sampled = torch.where(sampled.isnan(), old, sampled)  # unscored by the engine: no correction
        columns = dict(old_logps=old, rollout_logps=sampled, ref_logps=inputs.get("ref_per_token_logps"))
        if self.objective.sdl_coef:
            columns |= dict(
                teacher_logps=self._teacher_logps(model, inputs),
                sdl_mask=inputs["has_teacher"][:, None].expand_as(mask),
            )
        prompt_labels = torch.full_like(inputs["prompt_ids"], _IGNORED)
        more = {_ROUTER: True} if self.aux_loss_enabled else {}
        scale, num_tokens = self._normalizer(inputs, mode)
        job = _ObjectiveOfRows(self.objective, inputs["advantages"], mask.shape[1], scale, num_tokens, columns)
        with self.accelerator.autocast():
            out = model(
                input_ids=torch.cat([inputs["prompt_ids"], completion], 1),
                attention_mask=torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1),
                labels=torch.cat([prompt_labels, completion.masked_fill(~mask, _IGNORED)], 1),
                fused_lm_head=job,
                **more,
            )
        self._log_objective(out.stats, mode)
        if not self.aux_loss_enabled:
            return out.loss
        self._metrics[mode]["aux_loss"].append(self.accelerator.gather_for_metrics(out.aux_loss).mean().item())
        steps = self.current_gradient_accumulation_steps if mode == "train" else 1
        return out.loss + self.router_aux_loss_coef * out.aux_loss / steps

    def _normalizer(self, inputs: dict[str, Any], mode: str) -> tuple[float, int | None]:
        """(factor of the loss, num_tokens): what TRL divides its sums by."""
        steps = self.current_gradient_accumulation_steps if mode == "train" else 1
        if self.loss_type != "dapo":
            return 1 / steps, None
        items = max(float(inputs["num_items_in_batch"]), 1.0) / self.accelerator.num_processes
        return 1 / (items * steps / self.args.steps_per_generation if mode == "train" else items), 1

    def _teacher_logps(self, model, inputs: dict[str, Any]) -> Tensor:
        """[B, T] the completions' log-probs after the teacher's prompts; a sample without one is scored for nothing."""
        completion = inputs["completion_ids"]
        with (
            torch.no_grad(),
            disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs),
            self._loss_rows(inputs.get("tool_mask")),
        ):
            return self._get_per_token_logps_and_entropies(
                model,
                torch.cat([inputs["teacher_prompt_ids"], completion], 1),
                torch.cat([inputs["teacher_prompt_mask"], inputs["completion_mask"]], 1),
                completion.shape[1],
            )[0]

    def _log_objective(self, stats: dict[str, Tensor], mode: str) -> None:
        """TRL's names where TRL has one; means over the loss tokens of all processes."""
        names = {
            "entropy": "entropy",
            "clip_ratio/low_mean": "pg_clipfrac_low",
            "clip_ratio/high_mean": "pg_clipfrac_high",
        }
        if self.beta:
            names["kl"] = "kl"
        if self.objective.sdl_coef:
            names |= {f"sdl/{name}": f"sdl_{name}" for name in ("kl", "rho_saturated", "selected_fraction")}
        rows = stats["rows"].float()
        totals = torch.stack([rows, *(stats[name].float() * rows for name in names.values())])
        count, *sums = self.accelerator.reduce(totals, reduction="sum").tolist()
        for name, total in zip(names, sums, strict=True):
            self._metrics[mode][name].append(total / max(count, 1))
        log = self._metrics[mode]
        log["clip_ratio/region_mean"].append(log["clip_ratio/low_mean"][-1] + log["clip_ratio/high_mean"][-1])
