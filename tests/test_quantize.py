"""QLoRA: 4-bit matrices under an adapter, everywhere a policy goes: update, reference, engine, checkpoint, folder."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from loopback.engine import LoopbackEngine
from safetensors.torch import load_file
from test_memory_discipline import one_loss
from test_weights import SMALL, adapted, bits, logits, rollouts, same, text_policy, train_on, trainable  # noqa: F401

from genevolve_fast.commands.opening import open_policy, open_world
from genevolve_fast.incidents import Incidents
from genevolve_fast.policy.adapters import has_adapters, merged_state_dict
from genevolve_fast.policy.model import Policy
from genevolve_fast.policy.quantize import QuantizeError, dequantized, plain_state_dict, quantize, quantized_layers
from genevolve_fast.policy.weights import AdapterOff, Average, base_weights
from genevolve_fast.protocols import EngineError, Sampling
from genevolve_fast.rollout.transformers_engine import TransformersEngine
from genevolve_fast.rollout.weights import HeadShape, differing, digest, full_weights
from genevolve_fast.sandbox.tiny_policy import start_path
from genevolve_fast.train.checkpoint import load_checkpoint, save_checkpoint
from genevolve_fast.train.config import ConfigError, EvolveConfig, SftConfig, load_config, parse_config
from genevolve_fast.train.evolve import evolve
from genevolve_fast.train.optim import build_optimizer
from genevolve_fast.train.prepare import prepare

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
NF4 = {"quantize": "nf4", "lora": {"rank": 4}}


def start(dtype: torch.dtype = torch.float32) -> Policy:
    policy = Policy.from_pretrained(start_path(), dtype).eval()
    policy.freeze_vision()
    return policy


def plain_of(policy: Policy, **adapter) -> Policy:
    """The same policy, its 4-bit matrices replaced by plain ones of the same values; with `adapter`, the same on it."""
    other = start(policy.head_weight.dtype)
    values = plain_state_dict(policy.model).items()
    other.model.load_state_dict({n.replace(".base_layer.", "."): t for n, t in values if ".lora_" not in n})
    return adapted(other, **adapter) if adapter else other


def pair(dtype: torch.dtype = torch.float32) -> tuple[Policy, Policy]:
    """(a quantized policy with an adapter, the same without 4-bit weights)."""
    policy = start(dtype)
    quantize(policy)
    plain = plain_of(policy)
    return adapted(policy), adapted(plain)


# --- the weights ------------------------------------------------------------------------------------------------------


def test_the_decoders_matrices_take_half_a_byte_and_the_rest_stays():
    policy, before = start(), start()
    wide = {n: p for n, p in before.named_parameters()}
    quantize(policy)
    layers = quantized_layers(policy.model)
    assert len(layers) == 7 * policy.text_config.num_hidden_layers
    assert {n.split(".")[-2] for n in layers} == {"self_attn", "mlp"} and all(
        ".language_model.layers." in n for n in layers
    )
    for name, layer in layers.items():
        assert layer.weight.quant_type == "nf4" and layer.weight.quant_state.nested
        assert 2 * layer.weight.nbytes == wide[f"model.{name}.weight"].numel()
        error = (dequantized(layer) - wide[f"model.{name}.weight"]).norm() / wide[f"model.{name}.weight"].norm()
        assert 0.01 < error < 0.15
    small = {n.removesuffix(".weight") for n in wide} - {f"model.{n}" for n in layers}
    rest = {n: p for n, p in policy.named_parameters() if n.removesuffix(".weight") in small}
    assert len(rest) == len(wide) - len(layers) and all(torch.equal(p, wide[n]) for n, p in rest.items())


def test_the_same_folder_gives_the_same_bits():
    a, b = start(), start()
    quantize(a)
    quantize(b)
    assert same(bits(a), bits(b)) and same(plain_state_dict(a.model), plain_state_dict(b.model))
    assert not same(plain_state_dict(a.model), start().model.state_dict())


def test_wide_weights_are_let_go_one_by_one(monkeypatch):
    """So a GPU never holds all of them: each goes there by itself and only four bits stay."""
    from bitsandbytes import functional

    policy = start()
    layers = [m for m in policy.decoder.layers.modules() if isinstance(m, torch.nn.Linear)]
    wide = [weakref.ref(m.weight) for m in layers]
    alive, devices, real = [], set(), functional.quantize_4bit

    def count(w, **options):
        alive.append(sum(ref() is not None for ref in wide))
        devices.add(w.device)
        return real(w, **options)

    del layers
    monkeypatch.setattr(functional, "quantize_4bit", count)
    quantize(policy, "nf4", torch.device("cpu"))
    assert alive[0] == len(wide) and alive[-1] == 1 and alive == sorted(alive, reverse=True)
    assert devices == {torch.device("cpu")}


@pytest.mark.parametrize("kind", ["Qwen3", pytest.param("Llama", marks=pytest.mark.slow)])
def test_text_only_decoders(policy, kind):
    text = text_policy(kind, policy.codec)
    quantize(text)
    values = plain_state_dict(text.model)
    adapted(text)
    plain = text_policy(kind, policy.codec)
    plain.model.load_state_dict(values)
    assert len(quantized_layers(text.model)) == 2 * 7 and torch.equal(logits(text), logits(adapted(plain)))


def test_what_cannot_be_quantized_is_refused(policy, monkeypatch):
    with pytest.raises(QuantizeError, match="'int3' is not known"):
        quantize(policy, "int3")
    adapted(policy)
    with pytest.raises(QuantizeError, match="before add_lora"):
        quantize(policy)
    other = start()
    quantize(other)
    with pytest.raises(QuantizeError, match="already"):
        quantize(other)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(
        QuantizeError, match=r"policy.quantize nf4 needs bitsandbytes.*pip install 'genevolve-fast\[quan"
    ):
        quantize(start())


# --- what runs through them -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_those_of_the_dequantized_policy(dtype):
    policy, plain = pair(dtype)
    assert torch.equal(logits(policy), logits(plain))
    with AdapterOff(policy).weights() as off:
        base = logits(off)
    assert torch.equal(base, logits(plain_of(policy))) and not torch.equal(base, logits(policy))


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [True, False])
def test_a_loss_through_the_visits_has_the_same_gradient(checkpointing):
    gradients = []
    for policy in pair():
        policy.gradient_checkpointing = checkpointing
        policy.tile_tokens = 16
        one_loss(policy).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in trainable(policy).values()]))
    assert gradients[1].norm() > 0 and (gradients[0] - gradients[1]).norm() <= 1e-5 * gradients[1].norm()


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [True, False])
def test_the_adapters_gradient_is_that_on_the_dequantized_policy(rollouts, checkpointing):  # noqa: F811
    """Prompt, replies in tiles, teacher in the same visits, reference: all through the 4-bit layers."""
    gradients, traces = [], []
    for policy in pair():
        policy.gradient_checkpointing = checkpointing
        policy.tile_tokens = 64
        metrics, seen = train_on(policy, rollouts, reference=base_weights(policy))
        assert metrics["actor/kl"] > 0
        with_gradient = {n: p.grad for n, p in policy.named_parameters() if p.grad is not None}
        assert with_gradient.keys() == trainable(policy).keys() and all(
            g.dtype == torch.float32 for g in with_gradient.values()
        )
        gradients.append(torch.cat([g.flatten() for g in with_gradient.values()]))
        traces.append(seen)
    assert gradients[1].norm() > 0 and (gradients[0] - gradients[1]).norm() <= 1e-5 * gradients[1].norm()
    for name, theirs in traces[1].items():
        assert abs(traces[0][name].logps - theirs.logps).max() < 1e-5
        assert abs(traces[0][name].teacher_logps - theirs.teacher_logps).max() < 1e-5


def test_reference_is_the_adapter_off_and_the_average_is_of_a_and_b():
    policy, _ = pair()
    reference, average = base_weights(policy), Average(policy, 0.5)
    assert isinstance(reference, AdapterOff) and reference.nbytes == 0
    assert average.nbytes == 4 * sum(p.numel() for p in trainable(policy).values())
    held, student = bits(policy), logits(policy)
    for p in trainable(policy).values():
        p.data.mul_(0.5)
    with average.weights() as teacher:
        assert torch.equal(logits(teacher), student)
    assert not same(bits(policy), held) and not torch.equal(logits(policy), student)


@pytest.mark.slow
def test_the_embedded_engine_samples_from_them(pictures):
    policy, plain = pair()
    ids = [*policy.codec.encode("<|im_start|>user\nDraw a red square.<|im_end|>\n<|im_start|>assistant\n")]
    sampling = Sampling(temperature=1.0, top_p=0.9, max_tokens=12, stop_ids=())
    made = []
    for each in (policy, plain):
        engine = TransformersEngine(each)
        engine.open("a")
        made.append(asyncio.run(engine.generate("a", ids, (), sampling, 3)))
    assert made[0].ids == made[1].ids and made[0].logps == pytest.approx(made[1].logps, abs=1e-5)


# --- what is written --------------------------------------------------------------------------------------------------


def test_a_saved_policy_is_an_ordinary_folder(tmp_path):
    policy, _ = pair()
    before = bits(policy)
    policy.save_pretrained(tmp_path)
    assert same(bits(policy), before) and "quantization_config" not in json.loads(
        (tmp_path / "config.json").read_text()
    )
    names = set(load_file(tmp_path / "model.safetensors"))
    assert names <= set(start().model.state_dict()) and not any("quant" in n or "absmax" in n for n in names)
    loaded = Policy.from_pretrained(tmp_path).eval()
    want = logits(policy)
    assert not quantized_layers(loaded.model) and not has_adapters(loaded)
    assert (logits(loaded) - want).abs().max() < 1e-5 * want.abs().max()


def test_without_an_adapter_the_folder_holds_the_values_computed_with(tmp_path):
    policy = start()
    quantize(policy)
    policy.save_pretrained(tmp_path)
    assert torch.equal(logits(Policy.from_pretrained(tmp_path).eval()), logits(policy))


def test_a_checkpoint_holds_the_adapter_alone_and_comes_back_to_the_bit(tmp_path):
    config = parse_config(EvolveConfig, {"policy": {**NF4, "path": str(start_path())}})

    def opened() -> tuple:
        policy = open_policy(config.policy)
        prepare(policy.eval(), config.policy, 0)
        return policy, build_optimizer(policy, config.optim, 4)

    def step(policy, optimizer, seed: int) -> None:
        random = torch.Generator().manual_seed(seed)
        for p in trainable(policy).values():
            p.grad = torch.randn(p.shape, generator=random)
        optimizer.step()

    policy, optimizer = opened()
    step(policy, optimizer, 0)
    saved = save_checkpoint(tmp_path, 1, policy, optimizer)
    assert not (saved / "policy" / "model.safetensors").exists()
    assert sum(f.stat().st_size for f in (saved / "policy").glob("*.safetensors")) < 400_000
    told = json.loads((saved / "policy" / "adapter_config.json").read_text())
    assert told["base_model_name_or_path"] == str(start_path())
    again, other = opened()
    assert not same(bits(again), bits(policy)) and load_checkpoint(saved, again, other) == 1
    for each in ((policy, optimizer), (again, other)):
        step(*each, 1)
    assert same(bits(again), bits(policy)) and torch.equal(logits(again), logits(policy))


@pytest.mark.slow
@pytest.mark.parametrize("merged", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_engines_are_given_the_values_computed_with(merged):
    policy, plain = pair()
    weights = full_weights(policy, merged=merged)
    assert weights.keys() == {n for n, _ in start().model.named_parameters()}
    want = merged_state_dict(plain.model) if merged else plain_state_dict(plain_of(policy).model)
    assert all(torch.equal(t, want[n]) for n, t in weights.items())
    heads = HeadShape.of(policy.model.config)
    for served, wrong in ((want, 0), (start().model.state_dict(), 35)):
        reported = {f"dp0:pp0:pcp0:tp0:{n}": digest(served[n]) for n in weights}
        assert len(differing(reported, weights, heads, torch.float32)) == wrong


@pytest.mark.slow
def test_a_server_takes_the_adapter_alone_where_it_serves_the_four_bit_values(tmp_path):
    """And refuses it on the folder's own weights; merged it takes both."""
    from test_vllm_server import ask, expected
    from test_vllm_server import same as alike

    from genevolve_fast.rollout.vllm_server import VllmServerEngine

    policy = start()
    quantize(policy)
    policy.save_pretrained(tmp_path / "values")
    adapted(policy)

    def connect(server: LoopbackEngine, **more) -> VllmServerEngine:
        return VllmServerEngine(
            policy, [server.url], incidents=Incidents(), sync_dir=tmp_path / "sync", patience_s=60.0, **more
        )

    with LoopbackEngine(model=tmp_path / "values") as server:
        engine = connect(server)
        engine.update_weights(0)
        assert engine.verified > 0 and engine.mismatches == 0
        assert alike(ask(engine, policy), expected(policy))
        engine.shutdown()
    with LoopbackEngine() as server:
        engine = connect(server)
        with pytest.raises(EngineError, match="serve the base that the adapter belongs to"):
            engine.update_weights(0)
        engine.shutdown()
        engine = connect(server, merge_lora=True)
        engine.update_weights(0)
        assert engine.mismatches == 0 and alike(ask(engine, policy), expected(policy))
        engine.shutdown()


# --- configuration and whole runs -------------------------------------------------------------------------------------

SERVER = {"urls": ["http://127.0.0.1:9"], "sync_dir": "weights"}
REFUSED = {
    "needs lora.rank > 0: 4-bit weights cannot train": {"policy": {"quantize": "nf4"}},
    "quantize": {"policy": {"quantize": "int8", "lora": {"rank": 4}}},
    "needs rollout.vllm.merge_lora": {"policy": NF4, "rollout": {"engine": "vllm"}},
    "needs rollout.server.verify_every > 0": {
        "policy": NF4, "rollout": {"engine": "server", "server": SERVER | {"verify_every": 0}}
    },
}  # fmt: skip


@pytest.mark.parametrize("reason", REFUSED)
def test_configurations_that_cannot_work_are_refused(reason):
    with pytest.raises(ConfigError, match=reason):
        parse_config(EvolveConfig, REFUSED[reason])


def test_configurations_that_work():
    parse_config(EvolveConfig, {"policy": NF4, "rollout": {"engine": "server", "server": SERVER}})
    parse_config(EvolveConfig, {"policy": NF4, "rollout": {"engine": "vllm", "vllm": {"merge_lora": True}}})
    config = parse_config(SftConfig, {"policy": NF4, "data": {"path": "x"}})
    policy = start()
    prepare(policy, config.policy, 0)  # also of a policy that nobody has quantized on its way
    assert quantized_layers(policy.model) and has_adapters(policy)


@pytest.mark.slow
def test_a_run_resumes_as_if_uninterrupted(tmp_path):
    def run(folder: Path, steps: int, resume: bool = False) -> list[dict]:
        sets = [s for s in SMALL if not s.startswith("steps=")]
        config = load_config(EvolveConfig, ROOT / "configs" / "demo.yaml", [*sets, "steps=3", "policy.quantize=nf4"])
        sandbox, world = open_world(config)
        pool = sandbox.requests("train", config.pool_size, seed=config.seed)
        stop = pytest.MonkeyPatch()
        if steps < 3:
            real, seen = Average.update, iter(range(9))

            def update(self):
                real(self)
                if next(seen) + 1 > steps:
                    raise KeyboardInterrupt

            stop.setattr(Average, "update", update)
        try:
            evolve(config, open_policy(config.policy), world, pool, folder, resume=resume)
        except KeyboardInterrupt:
            assert steps < 3
        finally:
            stop.undo()
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [{k: v for k, v in r.items() if not k.startswith(("timing", "memory", "perf"))} for r in rows]

    whole = run(tmp_path / "whole", 3)
    assert len(run(tmp_path / "cut", 2)) == 2
    assert run(tmp_path / "cut", 3, resume=True) == whole and len(whole) == 3
    ends = [load_file(tmp_path / n / "policy" / "model.safetensors") for n in ("cut", "whole")]
    assert same(*ends) and not quantized_layers(Policy.from_pretrained(tmp_path / "whole" / "policy").model)


@pytest.mark.slow
def test_verify_holds_and_nothing_is_said_of_kernels_that_nobody_uses(tmp_path):
    sets = ["rollout.prompts_per_step=2", "policy.quantize=nf4", "policy.lora.rank=4"]
    command = [sys.executable, "-m", "genevolve_fast.cli", "verify", "--config", "demo"]
    command += [part for s in sets for part in ("--set", s)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "the shared pass gives the independent gradient" in done.stdout
    assert "Failed to load" not in done.stderr and "Enum subclass" not in done.stderr
