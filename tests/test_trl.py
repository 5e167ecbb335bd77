"""The TRL drop-ins inside the real GRPOTrainer on CPU: a tiny random model, three optimizer steps, no network."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import transformers

from genevolve_fast.ops import Objective, grpo_sdl

trl = pytest.importorskip("trl", reason="trl is in the dev extra")

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: E402
from trl import GRPOConfig, GRPOTrainer  # noqa: E402

from genevolve_fast.integrations import trl as ours  # noqa: E402
from genevolve_fast.integrations.trl import GenEvolveGRPOTrainer, objective_of, patch_trl  # noqa: E402

pytestmark = pytest.mark.slow

LONGEST = 9
PROMPTS = ["draw a red fox", "a sign that reads NOVA in blue letters", "two cups"]
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}<assistant>"


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("CI", "1")  # TRL sends no telemetry
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="module")
def tokens():
    plain = Tokenizer(models.BPE())
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    special = ["<pad>", "<end>", "<user>", "<assistant>", "<system>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    plain.train_from_iterator(PROMPTS * 4, trainer)
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", eos_token="<end>")
    made.chat_template = TEMPLATE
    return made


SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
KINDS = {
    "qwen3": (transformers.Qwen3Config, dict(num_key_value_heads=2, head_dim=8)),
    "tied": (transformers.LlamaConfig, dict(num_key_value_heads=2, tie_word_embeddings=True)),
    "softcap": (transformers.Gemma2Config, dict(num_key_value_heads=2, head_dim=8, final_logit_softcapping=2.0)),
    "scaled": (transformers.GraniteConfig, dict(num_key_value_heads=2, logits_scaling=2.0)),
    "bias": (transformers.PhiConfig, dict(num_key_value_heads=4)),
    "experts": (
        transformers.Qwen3MoeConfig,
        dict(num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
             output_router_logits=True, router_aux_loss_coef=0.1),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def saved(tokens, tmp_path_factory):
    """kind -> folder of a tiny random model; TRL loads its reference from there."""
    folders = {}

    def folder(kind: str):
        if kind not in folders:
            config_class, more = KINDS[kind]
            torch.manual_seed(0)
            config = config_class(vocab_size=len(tokens), **SIZES, **more)
            model = transformers.AutoModelForCausalLM.from_config(config)
            with torch.no_grad():
                for p in model.parameters():  # far from flat, so that clips and gaps differ
                    p.add_(0.3 * torch.randn_like(p) if p.ndim > 1 else 0.1 * torch.randn_like(p))
            folders[kind] = tmp_path_factory.mktemp(kind)
            model.save_pretrained(folders[kind])
            tokens.save_pretrained(folders[kind])
        return folders[kind]

    return folder


def rollouts(prompts, trainer, **more):
    """Completions of uneven length, the same for the same step, some cut off before their end token."""
    draw = random.Random(trainer.state.global_step * 101 + len(prompts))
    ids, *_ = trainer._tokenize_prompts(prompts)
    ends = trainer.processing_class.eos_token_id
    made = []
    for _ in prompts:
        words = [draw.randrange(5, 290) for _ in range(draw.randint(1, LONGEST - 1))]
        made.append(words + ([ends] if draw.random() < 0.7 else [draw.randrange(5, 290)]))
    return dict(prompt_ids=ids, completion_ids=made, logprobs=[[-1.0] * len(c) for c in made], **more)


def rollouts_with_tools(prompts, trainer):
    out = rollouts(prompts, trainer)
    out["env_mask"] = [[int(i % 3 != 1) for i in range(len(c))] for c in out["completion_ids"]]
    return out


def reward(completion_ids, **_):
    return [(sum(ids) % 11) / 5 for ids in completion_ids]


class Recorded:
    """Keeps each micro-batch's loss and gradient; on request also those of `naive`."""

    naive = None

    def training_step(self, model, inputs, num_items_in_batch):
        before = gradients(self.model)
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.losses.append(float(loss))
        self.gradients.append(gradients(self.model) - before)
        return loss

    def compute_loss(self, model, inputs, **more):
        if self.naive is not None:
            loss = self.naive(self, inputs)
            names = [p for p in self.model.parameters() if p.requires_grad]
            made = torch.autograd.grad(loss, names, allow_unused=True)
            self.expected.append(
                (float(loss), torch.cat([torch.zeros(p.numel()) if g is None else g.flatten()
                                         for p, g in zip(names, made, strict=True)]))
            )  # fmt: skip
        self.inputs.append(inputs)
        return super().compute_loss(model, inputs, **more)


def gradients(model) -> torch.Tensor:
    trainable = [p for p in model.parameters() if p.requires_grad]
    return torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in trainable]).clone()


class Plain(Recorded, GRPOTrainer):
    pass


class Taught(Recorded, GenEvolveGRPOTrainer):
    pass


def build(kind, folder, tokens, tmp_path, *, rows=None, model=None, rollout_func=rollouts, more=None, **options):
    """A trainer of class `kind` for three steps on the model in `folder`."""
    from datasets import Dataset

    settings = dict(
        per_device_train_batch_size=4, num_generations=2, max_steps=3, learning_rate=0.05, optim="sgd",
        lr_scheduler_type="constant", max_completion_length=LONGEST, bf16=False, use_cpu=True, report_to="none",
        save_strategy="no", logging_steps=1, disable_tqdm=True, seed=3, max_grad_norm=0.0,
        use_bias_correction_kl=False,
    )  # fmt: skip
    config = GRPOConfig(output_dir=str(tmp_path), **(settings | options))
    if model is None:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    trainer = kind(
        model=model,
        args=config,
        reward_funcs=reward,
        processing_class=tokens,
        rollout_func=rollout_func,
        train_dataset=Dataset.from_list(rows or [{"prompt": p} for p in PROMPTS * 4]),
        **({"objective": more(config)} if callable(more) else more or {}),
    )
    trainer.losses, trainer.gradients, trainer.expected, trainer.inputs = [], [], [], []
    return trainer


def run(*trainers) -> None:
    """Each from the same seed: TRL shuffles and samples with the global generator."""
    for trainer in trainers:
        transformers.set_seed(5)
        trainer.train()


def weights(trainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def assert_same(mine, theirs, start):
    """Losses and the weights that three steps made of them to 1e-5; gradients, after steps that amplify it, to 5e-5."""
    assert len(mine.losses) == len(theirs.losses) > 0
    assert mine.losses == pytest.approx(theirs.losses, rel=1e-5, abs=1e-5)
    for a, b in zip(mine.gradients, theirs.gradients, strict=True):
        assert (a - b).abs().max() <= 5e-5 * b.abs().max().clamp(min=1)
        assert float(a.norm()) == pytest.approx(float(b.norm()), rel=5e-5, abs=1e-6)
    moved = weights(theirs) - start
    assert moved.abs().max() > 1e-4
    assert (weights(mine) - weights(theirs)).abs().max() <= 1e-5


class HeadCalls:
    """Counts what reaches the head: calls of lm_head (which makes logits) and rows of `linear_logprob`."""

    def __init__(self, trainer, monkeypatch):
        self.calls, self.rows = 0, []
        for model in filter(None, (trainer.model, trainer.ref_model)):
            model.get_output_embeddings().register_forward_hook(self._called)
        for name in ("linear_logprob", "linear_grpo_sdl"):
            monkeypatch.setattr(ours, name, self._counted(getattr(ours, name)))

    def _called(self, *_):
        self.calls += 1

    def _counted(self, op):
        def run(hidden, weight, targets, **options):
            self.rows.append(len(hidden))
            return op(hidden, weight, targets, **options)

        return run


def loss_rows(inputs) -> int:
    mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
    return int(mask.sum())


BOTH = {
    "dapo": dict(),
    "grpo": dict(loss_type="grpo", beta=0.1, num_iterations=2, gradient_accumulation_steps=2),
    "bnpo": dict(loss_type="bnpo", gradient_accumulation_steps=2, epsilon_high=0.3, temperature=0.7),
    "dr_grpo": dict(loss_type="dr_grpo", beta=0.04, delta=1.5, num_iterations=3),
    "off policy": dict(loss_type="dapo", steps_per_generation=4, gradient_accumulation_steps=2, beta=0.05),
    "truncated": dict(loss_type="grpo", mask_truncated_completions=True, gradient_accumulation_steps=3),
}
SLOW = pytest.mark.slow
PATCHED = {
    "cispo": dict(loss_type="cispo", num_iterations=2, epsilon_high=2.0),
    "sapo": dict(loss_type="sapo", num_iterations=2),
    "luspo": dict(loss_type="luspo", importance_sampling_level="sequence", num_iterations=2),
    "vespo": dict(loss_type="vespo", num_iterations=2),
    "entropy bonus": dict(entropy_coef=0.05, temperature=1.3),
    "high entropy": dict(top_entropy_quantile=0.4, loss_type="grpo"),
    "KL, bias-corrected": dict(beta=0.1, use_bias_correction_kl=True, num_iterations=2),
    "off-policy mask": dict(off_policy_mask_threshold=0.01, num_iterations=2),
}


def cases(table: dict, quick: tuple[str, ...]) -> list:
    """The rows of a table as parameters; all but `quick` run in `make test` only."""
    rows = {name: row if isinstance(row, tuple) else (row,) for name, row in table.items()}
    return [pytest.param(*row, id=name, marks=() if name in quick else SLOW) for name, row in rows.items()]


@pytest.mark.parametrize("options", cases(BOTH, ("grpo", "off policy", "truncated")))
def test_without_distillation_the_loss_is_trls(options, saved, tokens, tmp_path, monkeypatch):
    theirs = build(Plain, saved("qwen3"), tokens, tmp_path, **options)
    start = weights(theirs)
    run(theirs)
    patched = build(Plain, saved("qwen3"), tokens, tmp_path, **options)
    patch_trl(patched)
    fused = build(Taught, saved("qwen3"), tokens, tmp_path, more=lambda c: objective_of(c, sdl_coef=0.0), **options)
    for mine in (patched, fused):
        with monkeypatch.context() as patch:
            head = HeadCalls(mine, patch)
            run(mine)
        assert head.calls == 0
        assert_same(mine, theirs, start)
        names = ["loss", "kl", "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean"]
        if mine is patched or all((x["advantages"] != 0).all() for x in mine.inputs):
            names.append("entropy")  # the fused pass leaves rows without gradient out on a CPU, also of this mean
        for name in names:
            logged = [[x[name] for x in t.state.log_history if name in x] for t in (mine, theirs)]
            assert logged[0] == pytest.approx(logged[1], rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize("options", cases(PATCHED, ("entropy bonus",)))
def test_any_loss_of_trl_takes_the_patched_log_probs(options, saved, tokens, tmp_path):
    theirs, mine = (build(Plain, saved("qwen3"), tokens, tmp_path, **options) for _ in range(2))
    patch_trl(mine)
    start = weights(theirs)
    run(theirs, mine)
    assert_same(mine, theirs, start)


@pytest.mark.parametrize("kind", cases({kind: kind for kind in KINDS}, ("softcap", "experts")))
def test_heads_of_other_architectures(kind, saved, tokens, tmp_path):
    options = dict(beta=0.05, temperature=0.8, num_iterations=2, learning_rate=0.005)
    theirs = build(Plain, saved(kind), tokens, tmp_path, **options)
    start = weights(theirs)
    run(theirs)
    mine = build(Plain, saved(kind), tokens, tmp_path, **options)
    patch_trl(mine)
    fused = build(Taught, saved(kind), tokens, tmp_path, more=lambda c: objective_of(c, sdl_coef=0.0), **options)
    for trainer in (mine, fused):
        run(trainer)
        assert_same(trainer, theirs, start)
    if kind == "experts":
        logged = [[x["aux_loss"] for x in t.state.log_history if "aux_loss" in x] for t in (fused, theirs)]
        assert len(logged[0]) == 3 and logged[0] == pytest.approx(logged[1], rel=1e-4)


@pytest.mark.parametrize("kind", [Plain, Taught])
def test_only_loss_rows_reach_the_head(kind, saved, tokens, tmp_path, monkeypatch):
    """Old, reference and policy log-probs: prompts, padding and tool outputs are not scored, three passes of them."""
    options = dict(beta=0.1, num_iterations=2, rollout_func=rollouts_with_tools)
    theirs = build(Plain, saved("qwen3"), tokens, tmp_path, **options)
    start = weights(theirs)
    run(theirs)
    more = (lambda c: objective_of(c, sdl_coef=0.0)) if kind is Taught else None
    mine = build(kind, saved("qwen3"), tokens, tmp_path, more=more, **options)
    if kind is Plain:
        patch_trl(mine)
    head = HeadCalls(mine, monkeypatch)
    run(mine)
    assert head.calls == 0
    assert_same(mine, theirs, start)
    policy = [loss_rows(x) for x in mine.inputs]
    assert all(x["tool_mask"].min() == 0 for x in mine.inputs)
    rounds = policy[::2]  # old and reference once for two updates
    assert sorted(head.rows) == sorted([*policy, *rounds, *rounds])


def test_generation_is_untouched(saved, tokens, tmp_path):
    """Without rollout_func TRL generates with the patched model; evaluation runs too."""
    options = dict(rollout_func=None, max_completion_length=6, temperature=0.9, num_iterations=2)
    theirs, mine = (build(Plain, saved("qwen3"), tokens, tmp_path, **options) for _ in range(2))
    patch_trl(mine)
    start = weights(theirs)
    run(theirs, mine)
    assert [x["completion_ids"].tolist() for x in mine.inputs] == [x["completion_ids"].tolist() for x in theirs.inputs]
    assert_same(mine, theirs, start)
    held_out = mine.train_dataset.select(range(4))
    losses = []
    for trainer in (mine, theirs):
        torch.manual_seed(0)
        losses.append(trainer.evaluate(held_out)["eval_loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_mixed_precision(saved, tokens, tmp_path):
    """bf16 autocast: fp32 logits of bf16 products; the loss stays within bf16's rounding of TRL's."""
    options = dict(bf16=True, beta=0.1, num_iterations=2, max_steps=2)
    theirs = build(Plain, saved("qwen3"), tokens, tmp_path, **options)
    run(theirs)
    patched = build(Plain, saved("qwen3"), tokens, tmp_path, **options)
    patch_trl(patched)
    fused = build(Taught, saved("qwen3"), tokens, tmp_path, more=lambda c: objective_of(c, sdl_coef=0.0), **options)
    for mine in (patched, fused):
        run(mine)
        assert mine.losses == pytest.approx(theirs.losses, abs=0.03)
        for a, b in zip(mine.gradients, theirs.gradients, strict=True):
            assert (a - b).norm() <= 0.1 * b.norm()
        bare = mine.accelerator.unwrap_model(mine.model, keep_fp32_wrapper=False)
        assert bare.forward.scores_in_forward  # accelerate takes off its own wrapper, not ours


def test_bf16_log_probs_are_not_rounded(saved, tokens, tmp_path):
    """TRL's tiles have the model's dtype. The truth is float64 on the same bf16 hidden states."""
    ids, errors = torch.randint(5, 290, (2, 30)), []
    for patch in (False, True):
        model = transformers.AutoModelForCausalLM.from_pretrained(saved("qwen3"), dtype=torch.bfloat16)
        trainer = build(Plain, None, tokens, tmp_path, model=model)
        if patch:
            patch_trl(trainer)
        with torch.no_grad():
            logps, entropy, _ = trainer._get_per_token_logps_and_entropies(
                model, ids, torch.ones_like(ids), 20, batch_size=1, compute_entropy=True
            )
            hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, 9:-1]
        assert logps.dtype == entropy.dtype == torch.float32
        log_p = (hidden.double() @ model.lm_head.weight.double().T).log_softmax(-1)
        want = log_p.gather(-1, ids[:, 10:, None])[..., 0]
        errors.append(((logps - want).abs().max(), (entropy + (log_p.exp() * log_p).sum(-1)).abs().max()))
    assert min(errors[0]) > 1e-3
    assert max(errors[1]) <= 1e-4


def test_a_head_in_full_precision(saved, tokens, tmp_path):
    """cast_lm_head_to_fp32: under autocast only the head leaves it. One gradient agrees as in fp32; later ones stand on
    steps through a bf16 backbone, whose rounding differs by processor: ours is no farther from fp32 than TRL's."""
    options = dict(beta=0.1, num_iterations=2)
    halves = dict(bf16=True, cast_lm_head_to_fp32=True)
    theirs, mine = (build(Plain, saved("qwen3"), tokens, tmp_path, **options, **halves) for _ in range(2))
    exact = build(Plain, saved("qwen3"), tokens, tmp_path, **options)
    patch_trl(mine)
    run(theirs, mine, exact)
    assert mine.losses == pytest.approx(theirs.losses, abs=1e-5)
    assert (mine.gradients[0] - theirs.gradients[0]).norm() <= 1e-5 * theirs.gradients[0].norm()
    for a, b, c in zip(mine.gradients, theirs.gradients, exact.gradients, strict=True):
        assert (a - c).norm() <= 1.1 * (b - c).norm()
    assert (weights(mine) - weights(exact)).norm() <= 1.1 * (weights(theirs) - weights(exact)).norm()


def test_images_reach_the_backbone(tokens, tmp_path):
    """A tiny Qwen3-VL, two samples with one picture each: log-probs of old policy (in chunks) and loss as TRL's."""
    vision = dict(depth=2, hidden_size=16, intermediate_size=32, num_heads=2, patch_size=4, temporal_patch_size=2,
                  out_hidden_size=32, num_position_embeddings=16, deepstack_visual_indexes=[0])  # fmt: skip
    rope = dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 1, 1], mrope_interleaved=True)
    text = dict(vocab_size=len(tokens), num_key_value_heads=2, head_dim=8, rope_parameters=rope, **SIZES)
    picture = len(tokens) - 1
    config = transformers.Qwen3VLConfig(
        text_config=text, vision_config=vision, image_token_id=picture, vision_start_token_id=7, vision_end_token_id=8
    )
    torch.manual_seed(0)
    prompt = torch.tensor([[0, 7, *[picture] * 4, 8, 11, 12], [9, 7, *[picture] * 4, 8, 13, 14]])
    completion = torch.randint(20, 200, (2, 5))
    mask = torch.ones(2, 5, dtype=torch.long)
    mask[1, 3:] = 0
    inputs = dict(
        prompt_ids=prompt, prompt_mask=(prompt != 0).long(), completion_ids=completion, completion_mask=mask,
        advantages=torch.tensor([1.0, -0.5]), num_items_in_batch=mask.sum(), num_images=[1, 1],
        pixel_values=torch.randn(32, 3 * 2 * 4 * 4), image_grid_thw=torch.tensor([[1, 4, 4], [1, 4, 4]]),
        mm_token_type_ids=torch.cat([(prompt == picture).long(), torch.zeros_like(completion)], 1),
    )  # fmt: skip
    made = []
    for patch in (False, True):
        torch.manual_seed(0)
        model = transformers.Qwen3VLForConditionalGeneration(config)
        trainer = build(Plain, None, tokens, tmp_path, model=model, temperature=0.8)
        trainer.current_gradient_accumulation_steps = 1
        if patch:
            patch_trl(trainer)
        given = {k: inputs[k] for k in ("pixel_values", "image_grid_thw", "num_images", "mm_token_type_ids")}
        ids, seen = (torch.cat([inputs[f"prompt_{x}"], inputs[f"completion_{x}"]], 1) for x in ("ids", "mask"))
        with torch.no_grad():
            old, *_ = trainer._get_per_token_logps_and_entropies(model, ids, seen, 5, batch_size=1, **given)
            blind, *_ = trainer._get_per_token_logps_and_entropies(
                model, ids, seen, 5, **given | dict(pixel_values=inputs["pixel_values"] * 0)
            )
        assert (old - blind).abs().max() > 1e-5
        trainer._compute_loss(model, inputs | dict(old_per_token_logps=old - 0.3)).backward()
        made.append((old, gradients(model)))
    for mine, theirs in zip(*reversed(made), strict=True):
        assert (mine - theirs).abs().max() <= 1e-5 * theirs.abs().max().clamp(min=1)


# --- adapters ---------------------------------------------------------------------------------------------------------


ADAPTERS = ["lora", "head trained whole", "prompt tuning", "prefix tuning"]


def adapted(kind, folder, tokens, tmp_path, peft_config, **options):
    torch.manual_seed(1)
    from peft import get_peft_model

    model = get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(folder), peft_config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:  # a fresh adapter is the identity and would prove little
                p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))))
    return build(kind, None, tokens, tmp_path, model=model, **options)


@pytest.mark.parametrize("adapter", ["lora", *(pytest.param(x, marks=SLOW) for x in ADAPTERS[1:])])
def test_adapters(adapter, saved, tokens, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is in the dev extra")
    config = {
        "lora": lambda: peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"]),
        "head trained whole": lambda: peft.LoraConfig(r=4, target_modules=["v_proj"], modules_to_save=["lm_head"]),
        "prompt tuning": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        "prefix tuning": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    }[adapter]
    beta = 0.0 if "tuning" in adapter else 0.1
    options = dict(beta=beta, num_iterations=2, gradient_checkpointing=adapter == "lora")
    theirs, mine = (adapted(Plain, saved("qwen3"), tokens, tmp_path, config(), **options) for _ in range(2))
    patch_trl(mine)
    start = weights(theirs)
    run(theirs, mine)
    assert_same(mine, theirs, start)
    if "tuning" not in adapter:
        more = lambda c: objective_of(c, sdl_coef=0.0)  # noqa: E731
        fused = adapted(Taught, saved("qwen3"), tokens, tmp_path, config(), more=more, **options)
        run(fused)
        assert_same(fused, theirs, start)


# --- with a teacher ---------------------------------------------------------------------------------------------------

CHAT = [{"role": "user", "content": p} for p in PROMPTS]
TEXT_ROWS = [
    {"prompt": p, "teacher_prompt": None if i % 4 == 3 else f"{p} - last time the fox was too small"}
    for i, p in enumerate(PROMPTS * 4)
]
CHAT_ROWS = [
    {"prompt": [m], "teacher_prompt": [{"role": "system", "content": "make it big"}, m]} for m in CHAT * 4
]  # fmt: skip


def full_log_probs(trainer, prompt_ids, prompt_mask, inputs):
    """Log-probs of the completions from transformers' own forward and its full logits."""
    completion = inputs["completion_ids"]
    ids = torch.cat([prompt_ids, completion], 1)
    mask = torch.cat([prompt_mask, inputs["completion_mask"]], 1)
    model = trainer.model
    forward = type(model).forward if not hasattr(model, "get_base_model") else None
    logits = forward(model, input_ids=ids, attention_mask=mask, use_cache=False).logits / trainer.temperature
    length = completion.shape[1]
    return logits[:, -length - 1 : -1].log_softmax(-1).gather(-1, completion[..., None])[..., 0]


def naive_loss(trainer, inputs):
    """TRL's loss plus the distillation, from full logits and the specification in ops/reference.py."""
    mask = (inputs["completion_mask"] * inputs.get("tool_mask", 1)).bool()
    now = full_log_probs(trainer, inputs["prompt_ids"], inputs["prompt_mask"], inputs)
    with torch.no_grad():
        teacher = full_log_probs(trainer, inputs["teacher_prompt_ids"], inputs["teacher_prompt_mask"], inputs)
    sequences, length = mask.shape
    steps = trainer.current_gradient_accumulation_steps
    tokens = inputs["num_items_in_batch"] * steps / trainer.args.steps_per_generation
    flat = lambda x: None if x is None else x.flatten()  # noqa: E731
    loss, stats = grpo_sdl(
        now.flatten(),
        advantages=inputs["advantages"].repeat_interleave(length),
        seq_ids=torch.arange(sequences).repeat_interleave(length),
        old_logps=flat(inputs.get("old_per_token_logps")),
        ref_logps=flat(inputs.get("ref_per_token_logps")),
        teacher_logps=teacher.flatten(),
        sdl_mask=inputs["has_teacher"].repeat_interleave(length),
        loss_mask=mask.flatten(),
        num_sequences=sequences * steps,
        num_tokens=float(tokens) if trainer.loss_type == "dapo" else None,
        objective=trainer.objective,
    )
    trainer.distilled.append(float(stats["sdl_loss"]))
    return loss / steps if trainer.loss_type == "bnpo" else loss


TEACHER = {
    "dapo": (dict(), dict(sdl_coef=2.0)),
    "grpo, everything selected": (dict(loss_type="grpo", beta=0.1, num_iterations=2), dict(sdl_permille=1000)),
    "bnpo, accumulated": (dict(loss_type="bnpo", gradient_accumulation_steps=2), dict(sdl_permille=300)),
    "dr_grpo, k3": (
        dict(loss_type="dr_grpo", num_iterations=2, temperature=0.8, learning_rate=1e-4),
        dict(sdl_grad="k3"),
    ),
    "off policy": (dict(steps_per_generation=4, gradient_accumulation_steps=2), dict(sdl_coef=0.5, sdl_clamp=0.1)),
}


@pytest.mark.parametrize(("options", "distillation"), cases(TEACHER, ("dapo", "bnpo, accumulated")))
@pytest.mark.parametrize("rows", [TEXT_ROWS, pytest.param(CHAT_ROWS, marks=SLOW)], ids=["text", "chat"])
def test_the_distilled_loss_is_the_reference(rows, options, distillation, saved, tokens, tmp_path, monkeypatch):
    trainer = build(
        Taught, saved("qwen3"), tokens, tmp_path, rows=rows, rollout_func=rollouts_with_tools,
        more=lambda c: objective_of(c, **distillation), **options,
    )  # fmt: skip
    trainer.naive, trainer.distilled = naive_loss, []
    run(trainer)
    assert len(trainer.losses) == len(trainer.expected) >= 3
    for loss, made, (expected, gradient) in zip(trainer.losses, trainer.gradients, trainer.expected, strict=True):
        assert loss == pytest.approx(expected, rel=1e-5, abs=1e-5)
        assert gradient.abs().max() > 1e-4
        assert (made - gradient).abs().max() <= 1e-5 * gradient.abs().max().clamp(min=1)
    assert any(x > 1e-4 for x in trainer.distilled)


def test_the_teacher_column_changes_the_loss(saved, tokens, tmp_path):
    def first_loss(teacher, kind=Taught, **more):
        rows = [{"prompt": p, **({} if kind is Plain else {"teacher_prompt": teacher(p)})} for p in PROMPTS * 4]
        trainer = build(kind, saved("qwen3"), tokens, tmp_path, rows=rows, max_steps=1, **more)
        run(trainer)
        return trainer

    own, other, none = (
        first_loss(t, more=lambda c: objective_of(c)) for t in (lambda p: p, lambda p: f"red! {p}", lambda p: None)
    )
    plain = first_loss(None, kind=Plain)
    assert none.losses == pytest.approx(plain.losses, abs=1e-6)
    assert own.losses == pytest.approx(plain.losses, abs=1e-6)  # a teacher that sees the same says the same
    assert other.losses[0] > plain.losses[0] + 1e-4
    assert (other.gradients[0] - plain.gradients[0]).norm() > 1e-3
    logged = [x for x in other.state.log_history if "sdl/kl" in x]
    assert len(logged) == 1 and logged[0]["sdl/selected_fraction"] > 0
    assert [x["sdl/selected_fraction"] for x in none.state.log_history if "sdl/kl" in x] == [0.0]


def test_the_rollout_may_bring_its_teacher(saved, tokens, tmp_path):
    """Experience that arises in the step itself: a field of rollout_func instead of a column."""
    taught = lambda prompts, t: rollouts(prompts, t, teacher_prompt=[f"seen: {p}" for p in prompts])  # noqa: E731
    trainer = build(
        Taught, saved("qwen3"), tokens, tmp_path, rollout_func=taught, max_steps=1, more=lambda c: objective_of(c)
    )
    run(trainer)
    assert trainer.inputs[0]["has_teacher"].all()
    read = tokens.batch_decode(trainer.inputs[0]["teacher_prompt_ids"], skip_special_tokens=True)
    assert all(text.startswith("seen: ") for text in read)


def test_the_head_only_meets_loss_rows_with_a_teacher(saved, tokens, tmp_path, monkeypatch):
    trainer = build(
        Taught, saved("qwen3"), tokens, tmp_path, rows=TEXT_ROWS, rollout_func=rollouts_with_tools,
        more=lambda c: objective_of(c),
    )  # fmt: skip
    head = HeadCalls(trainer, monkeypatch)
    run(trainer)
    assert head.calls == 0
    rows = [loss_rows(x) for x in trainer.inputs]
    assert sorted(head.rows) == sorted(rows + rows)  # teacher and student


def test_rollout_correction(saved, tokens, tmp_path):
    """vLLM's mismatch, truncated: the same loss as TRL's where the engine's log-probs differ (fed in, no vLLM here)."""
    options = dict(num_iterations=2, max_steps=2)
    plain = build(Plain, saved("qwen3"), tokens, tmp_path, **options)
    run(plain)
    inputs = next(x for x in plain.inputs if "old_per_token_logps" in x)
    sampled = inputs["old_per_token_logps"] + 0.7 * torch.randn_like(inputs["old_per_token_logps"])
    sampled[0, 0] = torch.nan
    mask = inputs["completion_mask"]
    difference = torch.nan_to_num((inputs["old_per_token_logps"] - sampled) * mask, nan=0.0)
    for mode in ("token", "sequence"):
        total = difference if mode == "token" else difference.sum(-1, keepdim=True)
        given = inputs | dict(importance_sampling_ratio=total.exp().clamp(max=1.5), sampling_per_token_logps=sampled)
        losses = []
        for kind in (Plain, Taught):
            trainer = build(kind, saved("qwen3"), tokens, tmp_path, more=None if kind is Plain else
                            (lambda c: objective_of(c, sdl_coef=0.0)), **options)  # fmt: skip
            trainer.current_gradient_accumulation_steps = 1
            for where in (trainer, trainer.args):
                where.use_vllm, where.vllm_importance_sampling_correction = True, True
                where.vllm_importance_sampling_mode = f"{mode}_truncate"
                where.vllm_importance_sampling_clip_max = 1.5
            if kind is Taught:
                trainer.objective = objective_of(trainer.args, sdl_coef=0.0)
                assert trainer.objective.rollout_is == mode
            losses.append(float(trainer._compute_loss(trainer.model, given)))
        assert losses[1] == pytest.approx(losses[0], abs=1e-5)
        assert losses[0] != pytest.approx(float(plain._compute_loss(plain.model, inputs)), abs=1e-4)


@pytest.fixture(scope="module")
def two_processes(once, saved) -> list[dict]:
    """What tests/trl_two_processes.py saw on each process, by loss type and "fsdp2"."""

    def launch(folder: Path) -> None:
        script = Path(__file__).with_name("trl_two_processes.py")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
        here = os.pathsep.join([str(script.parent.parent), *sys.path])
        subprocess.run(
            [*command, str(saved("qwen3")), str(folder / "result")],
            check=True,
            env=os.environ | {"PYTHONPATH": here, "OMP_NUM_THREADS": "1"},
            timeout=500,
        )

    folder = once("trl_two_processes", launch)
    return [torch.load(folder / f"result.{rank}") for rank in range(2)]


@SLOW
@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
def test_ddp(loss_type, two_processes):
    """Other rollouts on each process: the same losses and weights as TRL's, and equal weights everywhere."""
    ranks = [seen[loss_type] for seen in two_processes]
    for mine in ("patched", "fused"):
        for seen in ranks:
            assert seen[mine]["losses"] == pytest.approx(seen["theirs"]["losses"], rel=1e-5, abs=1e-5)
            assert seen[mine]["entropy"] == pytest.approx(seen["theirs"]["entropy"], rel=1e-5)
            assert (seen[mine]["weights"] - seen["theirs"]["weights"]).abs().max() <= 1e-5
    assert ranks[0]["theirs"]["losses"] != pytest.approx(ranks[1]["theirs"]["losses"], abs=1e-4)
    for name in ranks[0]:
        assert torch.equal(ranks[0][name]["weights"], ranks[1][name]["weights"])
    assert (ranks[0]["taught"]["weights"] - ranks[0]["theirs"]["weights"]).abs().max() > 1e-4


@SLOW
def test_fsdp2(two_processes):
    """A sharded head is gathered in the forward; its gradient comes back averaged."""
    for seen in (of["fsdp2"] for of in two_processes):
        for mine in ("patched", "fused"):
            assert seen[mine]["losses"] == pytest.approx(seen["theirs"]["losses"], abs=1e-5)
            want = seen["theirs"]["gradient"]
            assert (seen[mine]["gradient"] - want).abs().max() <= 1e-5 * want.abs().max()


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        dict(loss_type="cispo"),
        dict(importance_sampling_level="sequence"),
        dict(beta=0.1, use_bias_correction_kl=True),
        dict(off_policy_mask_threshold=0.5),
        dict(top_entropy_quantile=0.2),
        dict(entropy_coef=0.1),
        dict(delta=1.1),
        dict(use_vllm=True, vllm_importance_sampling_mode="token_mask"),
    ],
    ids=lambda x: next(reversed(x)),
)
def test_losses_that_the_objective_lacks(wrong, tmp_path):
    config = GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **wrong)
    with pytest.raises(ValueError, match=next(reversed(wrong))):
        objective_of(config)


def test_two_sources_of_one_number_are_refused(saved, tokens, tmp_path):
    with pytest.raises(ValueError, match=r"objective\.clip_ratio_high"):
        build(Taught, saved("qwen3"), tokens, tmp_path, more=lambda c: Objective(kl_coef=0.0))
    with pytest.raises(ValueError, match="epsilon"):
        objective_of(GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False), epsilon=0.1)
    with pytest.raises(ValueError, match="sdl_scope"):
        build(Taught, saved("qwen3"), tokens, tmp_path, more=lambda c: objective_of(c, sdl_scope="decision"))
    with pytest.raises(ValueError, match="sdl_select"):
        build(Taught, saved("qwen3"), tokens, tmp_path, gradient_accumulation_steps=2,
              more=lambda c: objective_of(c, sdl_select="batch"))  # fmt: skip


def test_what_multiplies_or_hides_the_loss_is_refused(saved, tokens, tmp_path):
    """States that a CPU cannot reach are set by hand; the check reads nothing else."""
    trainer = build(Taught, saved("qwen3"), tokens, tmp_path, more=lambda c: objective_of(c))
    described = objective_of(trainer.args)
    trainer.accelerator.scaler = object()
    with pytest.raises(ValueError, match="fp16"):
        trainer._check(described)
    trainer.accelerator.scaler, trainer._is_vlm = None, True
    with pytest.raises(ValueError, match="vision-language"):
        trainer._check(described)
    peft = pytest.importorskip("peft", reason="peft is in the dev extra")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(ValueError, match="prompt-learning"):
        adapted(Taught, saved("qwen3"), tokens, tmp_path, config, more=lambda c: objective_of(c))


def test_a_missing_teacher_column_is_named(saved, tokens, tmp_path):
    trainer = build(Taught, saved("qwen3"), tokens, tmp_path, more=lambda c: objective_of(c))
    with pytest.raises(ValueError, match="teacher_prompt"):
        run(trainer)


def test_heads_that_cannot_be_patched(saved, tokens, tmp_path):
    trainer = build(Plain, saved("qwen3"), tokens, tmp_path)
    patch_trl(trainer)
    with pytest.raises(ValueError, match="patched already"):
        patch_trl(trainer)
    with pytest.raises(TypeError, match="GRPOTrainer"):
        patch_trl(object())

    trainer = build(Plain, saved("scaled"), tokens, tmp_path)
    trainer.model.config.logits_scaling = 1.0  # what the config says is then not what the model does ...
    trainer.model.lm_head.register_forward_hook(lambda m, i, out: out * 3.0)  # ... nor is its head a plain product
    with pytest.raises(ValueError, match="are not those of its last hidden state"):
        patch_trl(trainer)

    trainer = build(Plain, saved("qwen3"), tokens, tmp_path)
    trainer.model.get_output_embeddings = lambda: None
    with pytest.raises(ValueError, match="no output embeddings"):
        patch_trl(trainer)


def test_an_adapter_on_the_head_is_refused(saved, tokens, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is in the dev extra")
    trainer = build(Plain, saved("qwen3"), tokens, tmp_path)
    trainer.model = peft.get_peft_model(trainer.model, peft.LoraConfig(r=2, target_modules=["lm_head"]))
    with pytest.raises(ValueError, match="carries an adapter"):
        patch_trl(trainer)


def test_ligers_layers_leave_the_head_alone(saved, tokens, tmp_path):
    """use_liger_kernel: TRL applies its layer kernels only (they need a GPU), the forward stays ours."""
    liger = pytest.importorskip("liger_kernel.transformers", reason="liger-kernel is in the dev extra")
    trainer = build(Plain, saved("qwen3"), tokens, tmp_path)
    patch_trl(trainer)
    forward = trainer.model.forward
    module = sys.modules[type(trainer.model).__module__]
    before = dict(vars(module))
    try:
        liger._apply_liger_kernel_to_instance(model=trainer.model, fused_linear_cross_entropy=False)
    finally:
        vars(module).update(before)  # liger rebinds the module's classes for the whole process
    assert trainer.model.model.norm.forward.__func__.__module__.startswith("liger_kernel")
    assert trainer.model.forward == forward
