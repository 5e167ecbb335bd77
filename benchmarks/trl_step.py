"""TRL's step for the same loss: its GRPOTrainer's log-probs and loss, padded batches, a teacher forward of its own.

`loss_type="luspo"` with token-level importance weights sums each sequence's tokens and means over sequences, which is
this library's default aggregation. The distillation TRL's GRPO does not have is added to the log-probs it took. Memory:
gradient checkpointing, its chunked head, and liger-kernel's norms and MLP where they can be applied.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from genevolve_fast.batch.groups import TrainingRollout
from genevolve_fast.ops import Objective, grpo_sdl
from genevolve_fast.policy.model import Policy


class Unavailable(Exception):
    """TRL cannot run here; the message says why."""


class TrlStep:
    """The step of one model; `run` adds the gradient of `rollouts` in batches of `batch` to the model."""

    def __init__(self, policy: Policy, objective: Objective, temperature: float) -> None:
        if objective.loss_agg_mode != "seq-mean-token-sum" or objective.kl_coef:
            raise ValueError("the loss that both can do is seq-mean-token-sum with kl_coef 0")
        self.policy, self.objective, self.temperature = policy, objective, temperature
        on_gpu = policy.device.type == "cuda"
        self.liger, self.why_no_liger = on_gpu, "" if on_gpu else "its kernels need a GPU"
        policy.model.set_attn_implementation("sdpa")
        try:
            self.trainer = self._build()
        except ImportError as e:
            raise Unavailable(f"trl: {e}") from e
        self.model = self.trainer.model
        self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.model.train()  # transformers checkpoints in training mode only; nothing here drops

    def _build(self):
        if self.liger:
            self.why_no_liger = self._apply_liger()
            self.liger = not self.why_no_liger
        os.environ.setdefault("CI", "1")  # TRL sends no telemetry
        from datasets import Dataset
        from trl import GRPOConfig

        o = self.objective
        config = GRPOConfig(
            output_dir=tempfile.mkdtemp(), per_device_train_batch_size=2, num_generations=2, loss_type="luspo",
            importance_sampling_level="token", epsilon=o.clip_ratio_low, epsilon_high=o.clip_ratio_high, beta=0.0,
            temperature=self.temperature, bf16=False, use_cpu=self.policy.device.type == "cpu", report_to="none",
            save_strategy="no", disable_tqdm=True, max_completion_length=1, gradient_checkpointing=False,
        )  # fmt: skip
        return _trainer_class()(
            model=self.policy.model,
            args=config,
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            processing_class=_tokenizer(),
            train_dataset=Dataset.from_list([{"prompt": "a"}] * 2),
        )

    def _apply_liger(self) -> str:
        """Why liger-kernel's layers were not applied; empty where they were."""
        if not importlib.util.find_spec("liger_kernel"):
            return "liger-kernel is not installed"
        from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance
        from transformers.models.qwen3_vl import modeling_qwen3_vl as module

        before = dict(vars(module))
        options = dict(rope=False, rms_norm=True, swiglu=True, fused_linear_cross_entropy=False)
        try:
            _apply_liger_kernel_to_instance(model=self.policy.model, **options)
        except Exception as e:
            return f"{type(e).__name__}: {e}"
        finally:
            vars(module).update(before)  # models that are built later keep transformers' own layers
        return ""

    def run(self, rollouts: Sequence[TrainingRollout], batch: int) -> None:
        trainer, parts = self.trainer, [rollouts[i : i + batch] for i in range(0, len(rollouts), batch)]
        for part in parts:
            inputs = self._inputs(part)
            # its loss means over the batch: the weight of this one in the step
            trainer.current_gradient_accumulation_steps = len(rollouts) / len(part)
            taught = any(r.experience_ids for r in part)
            teacher_logps = self._teacher(part) if taught else None
            loss = trainer.compute_loss(self.model, inputs)
            if taught:
                loss = loss + self._distillation(part, trainer.taken, teacher_logps, len(rollouts))
            loss.backward()
            trainer.taken = None

    def _inputs(self, part: Sequence[TrainingRollout]) -> dict[str, Tensor]:
        prompts, replies = zip(*(_split(r) for r in part), strict=True)
        masks = [r.trajectory.loss_mask[-len(reply) :].tolist() for r, reply in zip(part, replies, strict=True)]
        prompt_ids, prompt_mask = self._padded(prompts, left=True)
        completion_ids, completion_mask = self._padded(replies)
        return dict(
            prompt_ids=prompt_ids, prompt_mask=prompt_mask, completion_ids=completion_ids,
            completion_mask=completion_mask, tool_mask=self._padded(masks)[0],
            advantages=torch.tensor([r.advantage for r in part], dtype=torch.float32, device=self.policy.device),
        )  # fmt: skip

    def _padded(self, rows: Sequence[Sequence[int]], left: bool = False) -> tuple[Tensor, Tensor]:
        """(values, mask) [rows, longest]."""
        longest = max(map(len, rows))
        sides = [(longest - len(r), 0) if left else (0, longest - len(r)) for r in rows]
        values = [F.pad(torch.as_tensor(r, dtype=torch.int64), side) for r, side in zip(rows, sides, strict=True)]
        mask = [F.pad(torch.ones(len(r), dtype=torch.int64), side) for r, side in zip(rows, sides, strict=True)]
        return torch.stack(values).to(self.policy.device), torch.stack(mask).to(self.policy.device)

    @torch.no_grad()
    def _teacher(self, part: Sequence[TrainingRollout]) -> Tensor:
        """[batch, longest reply] the same weights' log-probs after the experience."""
        whole = []
        for r in part:
            prompt, reply = _split(r)
            cut = r.trajectory.request_stop
            whole.append(([*prompt[:cut], *r.experience_ids, *prompt[cut:]], reply))
        prompt_ids, prompt_mask = self._padded([w[0] for w in whole], left=True)
        completion_ids, completion_mask = self._padded([w[1] for w in whole])
        ids, mask = torch.cat([prompt_ids, completion_ids], 1), torch.cat([prompt_mask, completion_mask], 1)
        return self.trainer._get_per_token_logps_and_entropies(self.model, ids, mask, completion_ids.shape[1])[0]

    def _distillation(self, part, logps: Tensor, teacher_logps: Tensor, sequences: int) -> Tensor:
        """The objective's distillation of the log-probs that TRL's loss took."""
        counts = [int(r.trajectory.loss_mask.sum()) for r in part]
        masks = [r.trajectory.loss_mask[r.trajectory.loss_mask.argmax() :] for r in part]
        taken = [torch.from_numpy(mask).to(logps.device) for mask in masks]
        rows = [torch.cat([x[i, : len(m)][m] for i, m in enumerate(taken)]) for x in (logps, teacher_logps)]
        seq_ids = torch.arange(len(part)).repeat_interleave(torch.tensor(counts)).to(logps.device)
        loss, _ = grpo_sdl(
            rows[0], advantages=torch.zeros(len(part), device=logps.device), seq_ids=seq_ids, teacher_logps=rows[1],
            num_sequences=sequences, num_tokens=sum(counts), objective=self.objective,
        )  # fmt: skip
        return loss


def _split(rollout: TrainingRollout) -> tuple[list[int], list[int]]:
    """Prompt and reply: the reply begins with the first sampled token."""
    t = rollout.trajectory
    start = int(t.loss_mask.argmax())
    return t.ids[:start].tolist(), t.ids[start:].tolist()


def _trainer_class():
    from trl import GRPOTrainer

    class Trainer(GRPOTrainer):
        taken: Tensor | None = None  # log-probs of the last scored batch

        def _get_per_token_logps_and_entropies(self, *args, **kwargs):
            out = super()._get_per_token_logps_and_entropies(*args, **kwargs)
            self.taken = out[0]
            return out

    return Trainer


def _tokenizer():
    """A tokenizer, because the trainer wants one: nothing is tokenized."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = Tokenizer(models.WordLevel({"<pad>": 0, "<end>": 1, "a": 2}, unk_token="a"))
    return PreTrainedTokenizerFast(tokenizer_object=vocabulary, pad_token="<pad>", eos_token="<end>")
