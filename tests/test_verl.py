"""The verl drop-ins against the real verl on CPU: its monkey patch, its torch backend, its policy losses."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

INSTALL = 'verl pins other versions than this project: pip install --no-deps "verl==0.9.1", then ".[verl]"'
pytest.importorskip("verl", reason=INSTALL)

from tensordict import TensorDict  # noqa: E402
from verl.models.transformers import monkey_patch  # noqa: E402
from verl.models.transformers.dense_common import CausalLMOutputForPPO  # noqa: E402
from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY, get_policy_loss_fn  # noqa: E402
from verl.workers.config import ActorConfig  # noqa: E402
from verl.workers.utils.losses import ppo_loss  # noqa: E402

from genevolve_fast.integrations.verl import (  # noqa: E402
    patch_forward,
    register_verl,
    sdl_ppo_loss,
    teacher_log_probs,
    unregister_verl,
)

V = 997  # neither a multiple of 1024 nor of 8


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setattr(monkey_patch, "is_trl_available", lambda: False)  # verl 0.9 wants a value head that trl dropped
    register_verl()
    yield
    unregister_verl()


def tiny(config_class=transformers.Qwen3Config, dtype=torch.float32, **more):
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=V)
    config = config_class(**sizes, num_key_value_heads=2, head_dim=8, **more)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p) if p.ndim > 1 else 0.1 * torch.randn_like(p))
    return model.to(dtype)


def patched(model, backend: str):
    """A copy of `model` through verl's own entry, with verl's class-wide patch kept off other copies."""
    model = copy.deepcopy(model)
    model.__class__ = type(type(model).__name__, (type(model),), {"__module__": type(model).__module__})
    monkey_patch.apply_monkey_patch(
        model, use_remove_padding=False, use_fused_kernels=True, fused_kernels_backend=backend
    )
    return model


def scored(model, ids, weights, **inputs):
    """(log-probs, entropy, gradients) of a loss that uses both."""
    out = model(input_ids=ids, use_cache=False, return_dict=True, **inputs)
    assert isinstance(out, CausalLMOutputForPPO) and out.logits is None
    (out.log_probs * weights[0] + out.entropy * weights[1]).sum().backward()
    grads = torch.cat([p.grad.float().flatten() for p in model.parameters()])
    return out.log_probs, out.entropy, grads


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_backend_is_verls_torch_backend(temperature):
    model = tiny()
    ids, weights = torch.randint(V, (2, 11)), torch.randn(2, 2, 11)
    inputs = dict(temperature=temperature, attention_mask=torch.ones_like(ids))
    mine, theirs = (scored(patched(model, name), ids, weights, **inputs) for name in ("genevolve", "torch"))
    for a, b in zip(mine, theirs, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= 1e-5 * b.abs().max().clamp(min=1)


def test_rolled_labels_of_the_engine():
    """shift_labels are taken as they are; -100 gets no row and a log-prob of 0."""
    model = patched(tiny(), "genevolve")
    ids = torch.randint(V, (1, 9))
    rolled = torch.roll(ids, -1, 1)
    whole = model(input_ids=ids, return_dict=True).log_probs
    assert torch.equal(whole, model(input_ids=ids, shift_labels=rolled, return_dict=True).log_probs)
    rolled[0, :5] = -100
    part = model(input_ids=ids, shift_labels=rolled, return_dict=True).log_probs
    assert torch.equal(part[0, :5], torch.zeros(5)) and (part[0, 5:] - whole[0, 5:]).abs().max() <= 1e-6


def test_bf16_log_probs_are_not_rounded():
    """verl's trap: logits and entropies in the model's dtype. The truth is float64 on the same bf16 hidden states."""
    model = tiny(dtype=torch.bfloat16)
    ids, weights = torch.randint(V, (2, 40)), torch.ones(2, 2, 40)
    mine, theirs = (scored(patched(model, name), ids, weights) for name in ("genevolve", "torch"))
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    log_p = (hidden.double() @ model.lm_head.weight.double().T).log_softmax(-1)
    logps = log_p.gather(-1, torch.roll(ids, -1, 1)[..., None])[..., 0]
    entropy = -(log_p.exp() * log_p).sum(-1)
    assert mine[0].dtype == mine[1].dtype == torch.float32
    errors = [((out[0] - logps).abs().max(), (out[1] - entropy).abs().max()) for out in (mine, theirs)]
    assert max(errors[0]) <= 1e-4
    assert errors[1][0] > 1e-3 and errors[1][1] > 1e-3


def test_no_phantom_vocabulary():
    """Centred far below 0, a padded column of zeros would dominate: verl's Triton kernel had that (#2656)."""
    model = tiny()
    model.lm_head.weight.data[:, 0] = -300.0
    model.model.norm.weight.data[0], model.model.embed_tokens.weight.data[:, 0] = 1.0, 5.0
    ids = torch.randint(V, (1, 16))
    logits = model(input_ids=ids, use_cache=False).logits
    assert logits.mean() < -14
    want = logits.double().log_softmax(-1).gather(-1, torch.roll(ids, -1, 1)[..., None])[..., 0]
    got = patched(model, "genevolve")(input_ids=ids, return_dict=True).log_probs
    assert (got - want).abs().max() <= 1e-4 * want.abs().max()


def test_softcap_and_a_temperature_per_sequence():
    """verl's own backends know neither."""
    model = tiny(transformers.Gemma2Config, final_logit_softcapping=2.0)
    ids, temperature = torch.randint(V, (3, 7)), torch.tensor([0.5, 1.0, 2.0])
    logits = model(input_ids=ids, use_cache=False).logits / temperature[:, None, None]
    want = logits.log_softmax(-1).gather(-1, torch.roll(ids, -1, 1)[..., None])[..., 0]
    got = patched(model, "genevolve")(input_ids=ids, temperature=temperature, return_dict=True)
    assert (got.log_probs - want).abs().max() <= 1e-5
    theirs = patched(model, "torch")(input_ids=ids, temperature=1.0, return_dict=True)
    assert (theirs.log_probs[1] - want[1]).abs().max() > 1e-2


def test_other_backends_stay_verls(capsys):
    model = patched(tiny(), "torch")
    assert type(model).forward.__module__ == "verl.models.transformers.dense_common"
    patched(tiny(), "nothing of that name")
    assert "Skipping monkey patch" in capsys.readouterr().out
    unregister_verl()
    patched(tiny(), "genevolve")
    assert "Skipping monkey patch" in capsys.readouterr().out


def test_a_head_that_makes_no_logits_alone_is_refused():
    model = tiny()
    model.lm_head.base_layer = model.lm_head.weight  # as an adapter's wrapper has
    with pytest.raises(ValueError, match="carries an adapter"):
        patch_forward(model)


# --- the loss ---------------------------------------------------------------------------------------------------------

B, T = 4, 9


def config(**more) -> ActorConfig:
    return ActorConfig(
        strategy="fsdp",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        clip_ratio_low=0.1,
        clip_ratio_high=0.3,
        clip_ratio_c=1.5,
        **more,
    )


def batch(seed: int = 0):
    torch.manual_seed(seed)
    mask = torch.rand(B, T) < 0.7
    mask[2] = False
    old = -3 * torch.rand(B, T)
    now = (old + 0.6 * torch.randn(B, T)).requires_grad_()
    advantages = torch.randn(B, 1).expand(B, T) * mask
    return dict(old_log_prob=old, log_prob=now, advantages=advantages, response_mask=mask)


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("info", [{}, dict(dp_size=2, batch_num_tokens=77, global_batch_size=9, loss_scale_factor=30)])
def test_without_a_teacher_the_loss_is_verls(mode, weighted, info):
    register_verl(sdl_coef=0.0)
    inputs, actor = batch(), config()
    actor.global_batch_info.update(info)
    weights = 2 * torch.rand(B, T) if weighted else None
    results = []
    for name in ("genevolve_sdl", "vanilla"):
        loss, metrics = get_policy_loss_fn(name)(**inputs, loss_agg_mode=mode, config=actor, rollout_is_weights=weights)
        results.append((loss.item(), torch.autograd.grad(loss, inputs["log_prob"])[0], metrics))
    assert results[1][2]["actor/pg_clipfrac_lower"] > 0
    (mine, my_grad, my_metrics), (theirs, their_grad, their_metrics) = results
    assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-6)
    assert their_grad.abs().max() > 0 and (my_grad - their_grad).abs().max() <= 1e-5 * their_grad.abs().max()
    assert my_metrics == pytest.approx(their_metrics, abs=1e-6)


def test_the_distilled_loss_is_the_formula():
    """On policy, everything selected, nothing capped: value mean of k3, slope the gap itself; NaN has no teacher."""
    register_verl(sdl_coef=0.5, sdl_permille=1000)
    inputs, actor = batch(), config()
    now, mask = inputs["log_prob"], inputs["response_mask"]
    inputs["old_log_prob"] = now.detach().clone()
    teacher = now.detach() + 0.5 * torch.randn(B, T)
    teacher[1] = torch.nan
    plain = get_policy_loss_fn("vanilla")(**inputs, loss_agg_mode="token-mean", config=actor)[0]
    with teacher_log_probs(teacher):
        loss, metrics = get_policy_loss_fn("genevolve_sdl")(**inputs, loss_agg_mode="token-mean", config=actor)
    has = mask & ~teacher.isnan()
    gap = torch.where(has, now.detach() - teacher, 0.0)
    want = 0.5 * (torch.exp(-gap) - 1 + gap).sum() / mask.sum()
    assert (loss - plain).item() == pytest.approx(float(want), rel=1e-5)
    slope = torch.autograd.grad(loss - plain, now)[0]
    assert (slope - 0.5 * gap / mask.sum()).abs().max() <= 1e-7
    assert metrics["actor/sdl_loss"] == pytest.approx(float(want), rel=1e-5)


def test_a_missing_teacher_is_an_error():
    inputs, actor = batch(), config()
    loss = get_policy_loss_fn("genevolve_sdl")
    with pytest.raises(ValueError, match="no teacher is there"):
        loss(**inputs, config=actor)
    with teacher_log_probs(torch.zeros(B, T + 1)), pytest.raises(ValueError, match="must be"):
        loss(**inputs, config=actor)
    with teacher_log_probs(torch.zeros(B, T)), pytest.raises(ValueError, match="token-sum"):
        loss(**inputs, loss_agg_mode="token-sum", config=actor)
    with pytest.raises(ValueError, match="clip_ratio_low"):
        register_verl(clip_ratio_low=0.1)
    with pytest.raises(ValueError, match="sdl_permille"):
        register_verl(sdl_permille=0)
    unregister_verl()
    assert "genevolve_sdl" not in POLICY_LOSS_REGISTRY


def test_the_whole_loss_from_a_micro_batch_of_the_engine():
    """verl's ppo_loss on its unpadded TensorDict: uneven prompts, KL and entropy terms on, a teacher beside."""
    torch.manual_seed(0)
    prompts = [torch.randint(V, (n,)) for n in (2, 5, 3)]
    responses = [torch.randint(V, (n,)) for n in (4, 1, 6)]
    nested = lambda parts: torch.nested.as_nested_tensor(list(parts), layout=torch.jagged)  # noqa: E731
    sequences = [torch.cat(pair) for pair in zip(prompts, responses, strict=True)]
    model = patched(tiny(), "genevolve")
    made = [model(input_ids=s[None], temperature=0.9, return_dict=True) for s in sequences]
    with torch.no_grad():
        teacher = [
            tiny()(input_ids=s[None] * 0 + 7, use_cache=False).logits[0].log_softmax(-1)[:, 3] for s in sequences
        ]
    teacher[1] = torch.full_like(teacher[1], torch.nan)
    model_output = dict(
        log_probs=nested(out.log_probs[0] for out in made), entropy=nested(out.entropy[0] for out in made)
    )
    noise = lambda: nested(-2 - torch.rand(len(r)) for r in responses)  # noqa: E731
    data = TensorDict(
        dict(
            prompts=nested(prompts),
            responses=nested(responses),
            response_mask=nested(torch.ones(len(r), dtype=torch.bool) for r in responses),
            old_log_probs=noise(),
            ref_log_prob=noise(),
            advantages=nested(torch.randn(1).expand(len(r)).clone() for r in responses),
            teacher_logprobs=nested(t[:, None] for t in teacher),
        ),
        batch_size=3,
    )
    for name, value in dict(dp_size=1, batch_num_tokens=11, global_batch_size=3).items():
        data.set_non_tensor(name, value)
    actor = config(use_kl_loss=True, entropy_coeff=0.01, policy_loss=dict_policy("genevolve_sdl"))
    vanilla = config(use_kl_loss=True, entropy_coeff=0.01, policy_loss=dict_policy("vanilla"))
    plain, _ = ppo_loss(vanilla, model_output, data)
    register_verl(sdl_coef=0.0)
    assert ppo_loss(actor, model_output, data)[0].item() == pytest.approx(plain.item(), rel=1e-5)
    register_verl(sdl_coef=1.0, sdl_permille=1000)
    loss, metrics = sdl_ppo_loss(actor, model_output, data)
    gaps, weights = [], []
    for out, t, p, r, old in zip(made, teacher, prompts, responses, data["old_log_probs"].unbind(), strict=True):
        now = out.log_probs[0, len(p) - 1 : -1].detach()
        gaps.append((now - t[len(p) - 1 : -1]).nan_to_num(0.0).clamp(-10, 10))
        weights.append((now - old).exp().clamp(max=2.0))
        assert len(gaps[-1]) == len(r)
    gap, rho = torch.cat(gaps), torch.cat(weights)
    want = (rho * (torch.exp(-gap) - 1 + gap)).sum() / 11
    assert (loss - plain).item() == pytest.approx(float(want), rel=1e-4)
    loss.backward()
    assert model.lm_head.weight.grad.abs().max() > 0
    assert metrics["actor/sdl_loss"].aggregate() == pytest.approx(float(want), rel=1e-4)
    with pytest.raises(ValueError, match="teacher_logprobs"):
        sdl_ppo_loss(actor, model_output, data.exclude("teacher_logprobs"))


def dict_policy(loss_mode: str):
    from verl.workers.config import PolicyLossConfig

    return PolicyLossConfig(loss_mode=loss_mode)
