"""Weights beside the student's: LoRA, its base, frozen copies, running averages, and which rollouts are taught."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from shutil import copytree, rmtree

import pytest
import torch
from rollouts import demonstrated
from safetensors.torch import load_file
from warm_ranks import on_two_ranks

from genevolve_fast.commands.opening import open_world
from genevolve_fast.ops import Objective
from genevolve_fast.policy.adapters import (
    AdapterError,
    adapters_off,
    add_lora,
    has_adapters,
    load_adapter,
    merged_state_dict,
    save_adapter,
)
from genevolve_fast.policy.model import Policy
from genevolve_fast.policy.weights import AdapterOff, Average, FrozenCopy, base_weights
from genevolve_fast.protocols import Experience
from genevolve_fast.sandbox.bootstrap import write_demonstrations
from genevolve_fast.sandbox.tiny_policy import start_path
from genevolve_fast.sandbox.world import SandboxWorld
from genevolve_fast.train.config import ConfigError, EvolveConfig, SftConfig, load_config, parse_config
from genevolve_fast.train.evolve import evolve, teacher_skipped, training_rollouts, worth_teaching
from genevolve_fast.train.prepare import refuse_dropout
from genevolve_fast.train.run import RunError
from genevolve_fast.train.sft import sft
from genevolve_fast.train.update import TrainingRollout, accumulate_gradients
from genevolve_fast.trajectory import Judged

WEIGHTS = "adapter_model.safetensors"
ROOT = Path(__file__).parents[1]
IDS = torch.arange(40, 70)[None]


def logits(policy) -> torch.Tensor:
    """[1, 30, V] by transformers' own forward."""
    policy.model.set_attn_implementation("sdpa")
    with torch.no_grad():
        return policy.model(input_ids=IDS, use_cache=False).logits


def adapted(policy, rank: int = 4, seed: int = 3, **fields):
    """`policy` with an adapter whose B is not zero."""
    add_lora(policy, rank=rank, seed=seed, **fields)
    random = torch.Generator().manual_seed(seed)
    for name, p in policy.named_parameters():
        if "lora_B" in name:
            p.data.normal_(0, 0.05, generator=random)
    return policy


def trainable(policy) -> dict[str, torch.Tensor]:
    return {n: p for n, p in policy.named_parameters() if p.requires_grad}


def bits(policy) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in policy.named_parameters()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def text_policy(kind: str, codec) -> Policy:
    """A tiny random Qwen3 or Llama."""
    import transformers

    sizes = dict(vocab_size=1500, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
    config = getattr(transformers, f"{kind}Config")(**sizes, num_key_value_heads=2, head_dim=16)
    torch.manual_seed(0)
    return Policy(getattr(transformers, f"{kind}ForCausalLM")(config), codec).eval()


@pytest.fixture(scope="module")
def rollouts(tokenizer):
    from genevolve_fast.policy.codec import TransformersCodec
    from genevolve_fast.sandbox.tiny_policy import image_processor

    world = SandboxWorld()
    return demonstrated(world, TransformersCodec(tokenizer, image_processor()), world.requests("train", 4))


def train_on(policy, rollouts, **sources):
    trajectories, images = rollouts
    batch = [TrainingRollout(t, a, (41, 50, 60)) for t, a in zip(trajectories, (1.0, -0.6, 0.4, -1.1), strict=True)]
    objective = Objective(kl_coef=0.1 if "reference" in sources else 0.0)
    return accumulate_gradients(policy, batch, images, objective, temperature=0.9, max_tokens=2000, **sources)


# --- the adapter ------------------------------------------------------------------------------------------------------


def test_the_adapter_gets_all_of_the_gradient(policy, rollouts):
    adapted(policy)
    train_on(policy, rollouts)
    layers = policy.text_config.num_hidden_layers
    with_gradient = {n for n, p in policy.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert with_gradient == set(trainable(policy)) and len(with_gradient) == 2 * 7 * layers
    assert all(".language_model.layers." in n and ".lora_" in n for n in with_gradient)


@pytest.mark.slow
def test_the_adapters_gradient_is_the_weights(policy, rollouts):
    """dB = scale·dW·Aᵀ and dA = scale·Bᵀ·dW, with dW of the same policy merged."""
    policy.double()
    adapted(policy)
    plain = Policy(type(policy.model)(policy.model.config).double(), policy.codec).eval()
    plain.model.load_state_dict(merged_state_dict(policy.model))
    for p in (policy, plain):
        train_on(p, rollouts)
    name = "language_model.layers.1.mlp.down_proj"
    layer, whole = policy.model.model.get_submodule(name), plain.model.model.get_submodule(name).weight.grad
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    for got, want in ((b.grad, 2 * whole @ a.T), (a.grad, 2 * b.T @ whole)):  # alpha is twice the rank
        assert want.norm() > 0 and (got - want).norm() < 1e-9 * want.norm()


def test_only_the_named_targets_are_adapted(policy):
    add_lora(policy, rank=2, targets=["q_proj", "down_proj"], alpha=3, rslora=True)
    assert {n.split(".lora_")[0].rsplit(".", 1)[-1] for n in trainable(policy)} == {"q_proj", "down_proj"}
    layer = policy.model.model.language_model.layers[0].self_attn.q_proj
    assert layer.scaling["default"] == pytest.approx(3 / 2**0.5)
    with pytest.raises(AdapterError, match="already has an adapter"):
        add_lora(policy, rank=2)


def test_unknown_targets_are_refused_with_the_known(policy):
    with pytest.raises(AdapterError, match=r"\['qkv'\].*q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj"):
        add_lora(policy, rank=2, targets=["q_proj", "qkv"])  # qkv is the vision tower's
    assert not has_adapters(policy)


def test_the_seed_decides_the_adapter_and_nothing_else_draws(tokenizer):
    from genevolve_fast.sandbox.tiny_policy import new_policy

    torch.manual_seed(0)
    before = torch.get_rng_state()
    drawn = []
    for seed in (1, 1, 2):
        policy = new_policy(tokenizer)
        add_lora(policy, rank=2, seed=seed)
        drawn.append({n: p for n, p in trainable(policy).items() if "lora_A" in n})
    assert torch.equal(before, torch.get_rng_state())
    assert same(drawn[0], drawn[1]) and not same(drawn[0], drawn[2])


def test_adapter_off_is_the_base_bit_for_bit(policy):
    base = logits(policy)
    add_lora(policy, rank=4)
    assert torch.equal(logits(policy), base)  # B is zero
    for p in trainable(policy).values():
        p.data.normal_(0, 0.05)
    on = logits(policy)
    assert (on - base).abs().max() > 0.1
    with pytest.raises(RuntimeError, match="stop"), adapters_off(policy) as off:
        assert torch.equal(logits(off), base)
        raise RuntimeError("stop")
    assert torch.equal(logits(policy), on) and all(p.requires_grad for n, p in policy.named_parameters() if "lora" in n)
    with adapters_off(policy), adapters_off(policy):
        pass
    assert torch.equal(logits(policy), on)


def test_a_narrow_base_keeps_a_wide_adapter(policy):
    adapted(policy.bfloat16())
    assert {p.dtype for p in trainable(policy).values()} == {torch.float32}
    assert logits(policy).dtype == torch.bfloat16
    hidden = policy.model(input_ids=IDS, use_cache=False).logits
    hidden.float().square().mean().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.abs().max() > 0 for p in trainable(policy).values())
    for n, w in merged_state_dict(policy.model).items():
        assert w.dtype == torch.bfloat16, n


@pytest.mark.parametrize("rslora", [False, True])
def test_merged_weights_are_a_plain_folder(policy, tmp_path, rslora):
    adapted(policy, rslora=rslora)
    before = bits(policy)
    policy.save_pretrained(tmp_path)
    assert same(bits(policy), before) and not (tmp_path / "adapter_config.json").exists()
    loaded = Policy.from_pretrained(tmp_path).eval()
    want = logits(policy)
    assert not has_adapters(loaded) and (logits(loaded) - want).abs().max() < 1e-5 * want.abs().max()
    with adapters_off(policy):
        assert (logits(policy) - want).abs().max() > 0.1


def test_peft_loads_the_adapter_folder(policy, tmp_path):
    from peft import PeftModel
    from safetensors import safe_open

    policy.save_pretrained(tmp_path / "base")
    start = Policy.from_pretrained(tmp_path / "base").eval()
    adapted(start).save_trainable(tmp_path / "adapter")
    with safe_open(tmp_path / "adapter" / WEIGHTS, "pt") as file:
        assert len(file.keys()) == len(trainable(start))
    theirs = PeftModel.from_pretrained(
        Policy.from_pretrained(tmp_path / "base").model, str(tmp_path / "adapter")
    ).eval()
    theirs.base_model.model.set_attn_implementation("sdpa")
    want = logits(start)
    with torch.no_grad():
        got = theirs(input_ids=IDS, use_cache=False).logits
    assert torch.equal(got, want)
    merged = Policy.from_pretrained(tmp_path / "adapter").eval()
    assert not has_adapters(merged) and (logits(merged) - want).abs().max() < 1e-5 * want.abs().max()


def test_a_saved_adapter_comes_back_to_the_bit(policy, tokenizer, tmp_path):
    from genevolve_fast.sandbox.tiny_policy import new_policy

    save_adapter(adapted(policy, seed=3), tmp_path)
    other = adapted(new_policy(tokenizer, seed=1), seed=4)
    assert not same(trainable(policy), trainable(other))
    load_adapter(other, tmp_path)
    assert same(trainable(policy), trainable(other))
    with pytest.raises(AdapterError, match=r"lora_A.weight is \[4, .*the policy's \[5, "):
        load_adapter(adapted(new_policy(tokenizer), rank=5), tmp_path)
    with pytest.raises(AdapterError, match="only on one side"):
        load_adapter(adapted(new_policy(tokenizer), targets=["q_proj"]), tmp_path)
    with pytest.raises(AdapterError, match="holds no"):
        load_adapter(other, tmp_path / "none")


@pytest.mark.parametrize("kind", ["Qwen3", "Llama"])
def test_text_only_decoders(policy, kind, tmp_path):
    text = text_policy(kind, policy.codec)
    base = logits(text)
    adapted(text)
    assert len(trainable(text)) == 2 * 7 * 2
    want = logits(text)
    assert (want - base).abs().max() > 1e-3
    with AdapterOff(text).weights() as off:
        assert torch.equal(logits(off), base)
    plain = text_policy(kind, policy.codec)
    plain.model.load_state_dict(merged_state_dict(text.model))
    assert (logits(plain) - want).abs().max() < 1e-5 * want.abs().max()
    save_adapter(text, tmp_path)
    again = adapted(text_policy(kind, policy.codec), seed=9)
    load_adapter(again, tmp_path)
    assert torch.equal(logits(again), want)


# --- sources ----------------------------------------------------------------------------------------------------------


def test_a_frozen_copy_shares_what_is_frozen(policy):
    policy.freeze_vision()
    base = logits(policy)
    source = base_weights(policy)
    trained = sum(p.numel() * 4 for p in trainable(policy).values())
    assert isinstance(source, FrozenCopy) and source.nbytes == trained
    for p in trainable(policy).values():
        p.data.add_(0.05)
    with source.weights() as frozen:
        assert torch.equal(logits(frozen), base) and not trainable(frozen)
        assert frozen.model.model.visual.patch_embed.proj.weight is policy.model.model.visual.patch_embed.proj.weight
    assert source.describe() == f"a frozen copy, {trained / 1e6:.1f} MB"


def test_base_of_a_lora_policy_is_the_adapter_off(policy):
    with pytest.raises(AdapterError, match="FrozenCopy"):
        AdapterOff(policy)
    base = logits(policy)
    source = base_weights(adapted(policy))
    assert isinstance(source, AdapterOff) and source.nbytes == 0 and source.describe() == "adapter off"
    policy.train()
    with source.weights() as off:
        assert not any(m.training for m in off.modules()) and not torch.is_grad_enabled()
        assert torch.equal(logits(off), base)
    assert all(m.training for m in policy.modules())


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_average_follows_its_formula(policy, lora, dtype):
    policy.to(dtype)
    if lora:
        adapted(policy)
    average = Average(policy, 0.3)
    assert len(average._average) == len(trainable(policy))
    want = {n: p.double().clone() for n, p in policy.model.named_parameters() if p.requires_grad}
    for step in range(3):
        torch.manual_seed(step)
        for p in trainable(policy).values():
            p.data.add_(0.1 * torch.randn_like(p))
        average.update()
        want = {n: 0.7 * w + 0.3 * dict(policy.model.named_parameters())[n].double() for n, w in want.items()}
    for name, w in want.items():
        got = average._average[name]
        assert got.dtype == torch.float32 and (got - w).abs().max() < 1e-6 * w.abs().max()
    with average.weights() as teacher:
        inside = dict(teacher.model.named_parameters())
        for name, average_ in average._average.items():
            if inside[name].dtype != average_.dtype:
                assert torch.equal(inside[name], average_.to(inside[name].dtype))
            else:  # they changed places
                assert (inside[name] - want[name]).abs().max() < 1e-6 * want[name].abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_student_comes_back_bit_for_bit(policy, dtype):
    policy.to(dtype)
    average = Average(policy, 0.5)
    teacher = logits(policy)
    for p in trainable(policy).values():
        p.data.add_(0.05 * torch.randn_like(p))
    student, held, out = bits(policy), {n: t.clone() for n, t in average._average.items()}, logits(policy)
    policy.train()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="stop"), average.weights() as swapped:
            assert swapped is policy and not any(m.training for m in policy.modules())
            assert torch.equal(logits(swapped), teacher) and not torch.equal(teacher, out)
            raise RuntimeError("stop")
    assert same(bits(policy), student) and same(average._average, held)
    assert all(m.training for m in policy.modules())
    with average.weights():
        pass
    assert torch.equal(logits(policy.eval()), out)


def test_a_graph_of_the_student_survives_a_teacher_pass(policy):
    average = Average(adapted(policy), 0.5)
    for p in trainable(policy).values():
        p.data.add_(0.05 * torch.randn_like(p))

    def gradient(between) -> list[torch.Tensor]:
        policy.zero_grad()
        loss = policy.model(input_ids=IDS, use_cache=False).logits.square().mean()
        between()
        loss.backward()
        return [p.grad.clone() for p in trainable(policy).values()]

    def teacher_pass() -> None:
        with average.weights() as teacher:
            assert not teacher.model(input_ids=IDS, use_cache=False).logits.requires_grad

    policy.model.set_attn_implementation("sdpa")
    undisturbed = gradient(lambda: None)
    assert all(map(torch.equal, undisturbed, gradient(teacher_pass)))


def test_features_of_a_trained_vision_tower_are_the_sources_own(policy, pictures):
    def features() -> torch.Tensor:
        with torch.no_grad():
            return policy.image_features(pictures[:1]).embeds

    average = Average(policy, 0.5)
    before = features()
    for p in policy.model.model.visual.parameters():
        p.data.add_(0.05 * torch.randn_like(p))
    policy.forget_images()
    after = features()
    with average.weights():
        assert torch.equal(features(), before) and not torch.equal(before, after)
    assert torch.equal(features(), after)


def test_an_average_is_saved_to_the_bit(policy, tmp_path):
    average = Average(adapted(policy), 0.25)
    for p in trainable(policy).values():
        p.data.add_(0.1 * torch.randn_like(p))
    average.update()
    average.save(tmp_path / "teacher.safetensors")
    again = Average(policy, 0.25)
    assert not same(again._average, average._average)
    again.load(tmp_path / "teacher.safetensors")
    assert same(again._average, average._average)
    assert average.describe().startswith("EMA of LoRA weights, rate 0.25, fp32, ")
    with pytest.raises(AdapterError, match="missing"):
        again.load(tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="rate must lie"):
        Average(policy, 1.0)


@pytest.mark.slow
def test_reference_and_teacher_passes_use_their_weights(policy, rollouts):
    """The step's traces hold the log-probs of the source, not the student's."""
    adapted(policy)
    live = train_on(policy, rollouts)[1]
    average = Average(policy, 0.5)
    equal = train_on(policy, rollouts, teacher=average)[1]
    base = train_on(policy, rollouts, teacher=AdapterOff(policy))[1]
    for p in trainable(policy).values():
        p.data.zero_()  # a student without adapter: its live teacher is the base
    off = train_on(policy, rollouts)[1]
    for name in live:
        assert (live[name].teacher_logps == equal[name].teacher_logps).all()
        assert (base[name].teacher_logps == off[name].teacher_logps).all()
        assert (live[name].teacher_logps != base[name].teacher_logps).any()
    metrics, _ = train_on(policy, rollouts, reference=AdapterOff(policy))
    assert metrics["actor/kl"] == 0
    metrics, _ = train_on(policy, rollouts, reference=average)
    assert metrics["actor/kl"] > 0


def sharded(rank: int, lora: bool, dtype: torch.dtype) -> None:
    """On each of two ranks: FSDP2 computes with the source's weights, then with the student's own again."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    policy = text_policy("Llama", None).to(dtype)
    if lora:
        adapted(policy)
    start = logits(policy)
    with adapters_off(policy) if lora else nullcontext():
        base = logits(policy)
    for layer in policy.model.model.layers:
        fully_shard(layer)
    fully_shard(policy.model)
    assert all(isinstance(p, DTensor) for p in trainable(policy).values())
    average = Average(policy, 0.5)
    with torch.no_grad():
        for p in trainable(policy).values():
            p.mul_(1.5)

    def gradient(between) -> list[torch.Tensor]:
        policy.zero_grad()
        loss = policy.model(input_ids=IDS, use_cache=False).logits.float().square().mean()
        between()
        loss.backward()
        return [p.grad.full_tensor() for p in trainable(policy).values()]

    def passes() -> None:
        with average.weights() as teacher:
            assert torch.equal(logits(teacher), start)
        if lora:
            with AdapterOff(policy).weights() as off:
                assert torch.equal(logits(off), base)

    moved = logits(policy)
    assert not torch.equal(moved, start)
    undisturbed = gradient(lambda: None)
    assert all(map(torch.equal, undisturbed, gradient(passes))) and torch.equal(logits(policy), moved)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sources_under_fsdp2(tmp_path, lora, dtype):
    on_two_ranks(tmp_path, sharded, lora, dtype)


# --- which rollouts are taught ----------------------------------------------------------------------------------------

GATED = {
    "all": [True, True, True, False, True],
    "below_best": [False, True, False, False, True],
    "below_mean": [False, False, False, False, True],
}


@pytest.mark.parametrize("gate", GATED)
def test_gates(policy, rollouts, gate):
    rewards = [1.0, 0.75, 1.0, None, 0.25]
    scores = [0.25, 0.0, 0.25, 0.0, -0.5]
    assert worth_teaching(rewards, scores, gate) == GATED[gate]
    assert worth_teaching([0.5, 0.5], [0.0, 0.0], gate) == [gate == "all"] * 2
    assert worth_teaching([None, None], [0.0, 0.0], gate) == [False, False]


def judged(t, name: str, group: str, reward: float):
    return t.replace(id=name, group_id=group, outcome=Judged(reward, kscore=reward, program=reward))


def test_a_gated_rollout_has_no_teacher_and_is_counted(policy, rollouts):
    trajectories, _ = rollouts
    rewards = {"a": [1.0, 1.0, 0.5, 0.0], "b": [0.2, 0.4]}
    groups = {
        g: [judged(t, f"{g}{i}", g, r) for i, (t, r) in enumerate(zip(trajectories, rs, strict=False))]
        for g, rs in rewards.items()
    }
    experiences = {"a": Experience(prompt_construction="Name every colour.")}
    shares = {"all": 0.0, "below_best": 0.5, "below_mean": 0.5}
    for gate, share in shares.items():
        config = parse_config(EvolveConfig, {"teacher_gate": gate})
        batch = training_rollouts(groups, experiences, policy, config)
        taught = [r.trajectory.id for r in batch if r.experience_ids]
        assert taught == (["a0", "a1", "a2", "a3"] if gate == "all" else ["a2", "a3"])
        assert len(batch) == 6 and teacher_skipped(batch, experiences) == share
    assert teacher_skipped(batch, {}) == 0


# --- configuration ----------------------------------------------------------------------------------------------------

OFF = {"experience": {"enabled": False}, "objective": {"sdl_coef": 0.0}}
REFUSED = {
    "teacher without experience.enabled": OFF | {"teacher": "ema"},
    "teacher, teacher_gate without": OFF | {"teacher": "base", "teacher_gate": "below_best"},
    "ema_rate belongs to teacher 'ema'": {"ema_rate": 0.1},
    "ema_rate": {"teacher": "ema", "ema_rate": 1.5},
    "teacher_gate": {"teacher_gate": "some"},
    "alpha, targets without a rank": {"policy": {"lora": {"alpha": 8, "targets": ["q_proj"]}}},
    "rslora without a rank": {"policy": {"lora": {"rslora": True}}},
    "dropout must be 0 in evolve": {"policy": {"lora": {"rank": 4, "dropout": 0.1}}},
    "targets is empty": {"policy": {"lora": {"rank": 4, "targets": []}}},
    "trains no vision tower": {"policy": {"freeze_vision": False, "lora": {"rank": 4}}},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_configurations_that_cannot_work_are_refused(reason):
    with pytest.raises(ConfigError, match=reason):
        parse_config(EvolveConfig, REFUSED[reason])


def test_defaults_and_sft():
    assert parse_config(EvolveConfig, {"teacher": "ema"}).ema_rate == 0.05
    assert parse_config(EvolveConfig, {"teacher": "base"}).ema_rate is None
    assert parse_config(SftConfig, {"policy": {"lora": {"rank": 4, "dropout": 0.1}}, "data": {"path": "x"}})
    with pytest.raises(ConfigError, match="leave the random weights"):
        parse_config(SftConfig, {"policy": {"path": "sandbox:new", "lora": {"rank": 4}}})
    config = parse_config(EvolveConfig, {"teacher": "ema", "policy": {"lora": {"rank": 4}}})
    assert parse_config(EvolveConfig, json.loads(config.model_dump_json())) == config


def test_a_model_with_dropout_is_refused(policy):
    refuse_dropout(policy)
    policy.model.config.text_config.attention_dropout = 0.1
    with pytest.raises(RunError, match="attention_dropout=0.1"):
        refuse_dropout(policy)


# --- whole runs -------------------------------------------------------------------------------------------------------

SMALL = [
    "steps=3", "checkpoint.every=2", "pool_size=40", "rollout.prompts_per_step=3", "rollout.num_generations=3",
    "rollout.temperature=1.0", "experience.min_gap=0.1", "objective.kl_coef=0.001", "evaluate.requests=0",
    "optim.lr=0.001", "teacher=ema", "ema_rate=0.3", "teacher_gate=below_best", "policy.lora.rank=4",
]  # fmt: skip


def run(folder: Path, *, resume: bool = False, lose: int | None = None, **changes) -> list[dict]:
    """Metrics of a run; with `lose`, the process dies after that optimizer step."""
    config = load_config(
        EvolveConfig, ROOT / "configs" / "demo.yaml", [*SMALL, *(f"{k}={v}" for k, v in changes.items())]
    )
    sandbox, world = open_world(config)
    pool = sandbox.requests("train", config.pool_size, seed=config.seed)
    with pytest.MonkeyPatch.context() as patch:
        if lose:
            real, seen = Average.update, iter(range(100))

            def update(self):
                real(self)
                if next(seen) + 1 == lose:
                    raise KeyboardInterrupt

            patch.setattr(Average, "update", update)
        try:
            evolve(config, Policy.from_pretrained(start_path()), world, pool, folder, resume=resume)
        except KeyboardInterrupt:
            assert lose
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if not k.startswith(("timing", "memory", "perf"))} for r in rows]


@pytest.mark.slow
def test_resumed_with_an_averaged_teacher_equals_uninterrupted(tmp_path, capsys):
    whole = run(tmp_path / "whole")
    said = capsys.readouterr().out
    assert "reference: adapter off; +1 forward" in said and "teacher: EMA of LoRA weights, rate 0.3, fp32" in said
    assert "a separate pass" in said
    assert {"actor/teacher_skipped", "actor/kl", "actor/sdl_kl"} <= set(whole[0])
    assert any(0 < r["actor/teacher_skipped"] < 1 for r in whole)
    assert len(run(tmp_path / "cut", lose=3)) == 2
    saved = tmp_path / "cut" / "checkpoints" / "step_000002"
    assert not (saved / "policy" / "model.safetensors").exists() and (saved / "teacher.safetensors").exists()
    assert run(tmp_path / "cut", resume=True) == whole and whole[2]["actor/teacher_share"] > 0
    ends = [load_file(tmp_path / n / "checkpoints" / "step_000003" / "teacher.safetensors") for n in ("cut", "whole")]
    assert same(*ends)
    assert not has_adapters(Policy.from_pretrained(tmp_path / "whole" / "policy"))
    last = tmp_path / "whole" / "checkpoints" / "step_000003"
    student = {n.removeprefix("base_model.model."): t for n, t in load_file(last / "policy" / WEIGHTS).items()}
    for name, average in load_file(last / "teacher.safetensors").items():
        if "lora_B" in name:  # zero at the start, so behind the student since
            assert 0 < average.norm() < student[name.replace(".default", "")].norm()
    live = run(tmp_path / "live", teacher="live", ema_rate="null")
    apart = {"tokens/separate_passes"}  # a live teacher rides; until the first update both score the same
    assert {k: v for k, v in live[0].items() if k not in apart} == {k: v for k, v in whole[0].items() if k not in apart}
    assert live[0]["tokens/separate_passes"] < whole[0]["tokens/separate_passes"]
    assert live[1]["actor/sdl_kl"] != whole[1]["actor/sdl_kl"]
    assert Policy.from_pretrained(saved / "policy").codec.encode("a")


@pytest.mark.slow
def test_sft_of_an_adapter_with_dropout_resumes(tmp_path):
    data = write_demonstrations(SandboxWorld(), tmp_path / "data", count=16, experience_share=0.0, seed=0)
    fields = {
        "epochs": 3,
        "batch_size": 8,
        "policy": {"path": "sandbox:start", "lora": {"rank": 4, "dropout": 0.2}},
        "data": {"path": str(data)},
        "optim": {"lr": 2e-3},
        "checkpoint": {"every": 2},
    }

    def train(name: str, **options) -> tuple[Policy, list[float]]:
        policy = Policy.from_pretrained(start_path())
        sft(parse_config(SftConfig, fields), policy, data, tmp_path / name, **options)
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        return policy, [r["loss"] for r in rows]

    torch.manual_seed(0)
    whole, losses = train("whole")
    assert len(losses) == 6 and losses[-1] < losses[0] - 1e-3
    torch.manual_seed(1)
    copytree(tmp_path / "whole", tmp_path / "cut")
    for folder in sorted((tmp_path / "cut" / "checkpoints").iterdir())[1:]:
        rmtree(folder)
    again, resumed = train("cut", resume=True)
    assert resumed == losses and same(bits(again), bits(whole))
    start = Policy.from_pretrained(start_path())
    final = Policy.from_pretrained(tmp_path / "cut" / "policy")
    pairs = zip(final.named_parameters(), start.parameters(), strict=True)
    changed = {n for (n, p), q in pairs if not torch.equal(p, q)}
    assert changed == {n.split(".lora_")[0] + ".weight" for n in trainable(again)}


@pytest.mark.slow
def test_the_average_of_all_weights_in_a_run(tmp_path):
    rows = run(tmp_path, **{"policy.lora.rank": 0, "steps": 2})
    assert len(rows) == 2 and all(r["actor/ratio_max"] == 1 for r in rows)
