"""Optimizers: what each implementation does to weights and memory, drift of bf16 weights, checkpoints to the bit."""

from __future__ import annotations

import sys

import pytest
import torch
from test_head import Gemms
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from warm_ranks import on_two_ranks

from benchmarks.memory import body_of
from genevolve_fast.policy.adapters import add_lora
from genevolve_fast.profile.plan import Settings, plan
from genevolve_fast.profile.shapes import ModelShape
from genevolve_fast.train import optim
from genevolve_fast.train.checkpoint import load_checkpoint, save_checkpoint
from genevolve_fast.train.config import ConfigError, EvolveConfig, OptimConfig, SftConfig, parse_config
from genevolve_fast.train.optim import MasterWeights, adamw, build_optimizer, check_optimizer, decayed
from genevolve_fast.train.run import RunError

CPU = torch.device("cpu")
slow = pytest.mark.slow


class Weights(nn.Module):
    """A matrix and a vector around one, in bf16 a distance of 2^-7 apart from the next number."""

    def __init__(self, dtype: torch.dtype, rows: int = 64) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(0)
        self.matrix = nn.Parameter((1 + 0.9 * torch.rand(rows, 128, generator=random)).bfloat16().to(dtype))
        self.vector = nn.Parameter((1 + 0.9 * torch.rand(64, generator=random)).bfloat16().to(dtype))


def trained(
    config: OptimConfig, dtype: torch.dtype, steps: int, seed: int = 0, weights: Weights | None = None
) -> Weights:
    """`steps` steps on gradients that do not depend on the weights."""
    weights = weights or Weights(dtype)
    optimizer = build_optimizer(weights, config, steps)
    for step in range(steps):
        fill(weights, seed + step)
        optimizer.step()
    return weights


def fill(module: nn.Module, seed: int) -> None:
    """Gradients, the same for the same seed, in the parameters' dtype."""
    random = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        if p.requires_grad:
            p.grad = (0.1 + torch.rand(p.shape, generator=random)).to(p.dtype)


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def config(**fields) -> OptimConfig:
    return OptimConfig(**({"lr": 1e-3, "weight_decay": 0.0} | fields))


# --- drift ------------------------------------------------------------------------------------------------------------

STEPS, LR = 40, 5e-6  # every update is an 800th of the distance between two bf16 numbers


def moved(weights: Weights) -> torch.Tensor:
    """How far each element went, and where it should have gone."""
    return weights.matrix.double() - Weights(torch.float32).matrix.double()


def test_bf16_rounded_to_nearest_stands_still_and_fp32_copies_follow_fp32_to_rounding():
    exact = trained(config(lr=LR), torch.float32, STEPS)
    assert moved(exact).mean().item() == pytest.approx(-0.9 * STEPS * LR, rel=0.05)  # mean / rms of the gradients
    stalled = trained(config(lr=LR), torch.bfloat16, STEPS)
    assert same(stalled, Weights(torch.bfloat16))
    weights = Weights(torch.bfloat16)
    optimizer = build_optimizer(weights, config(lr=LR, bf16="master"), STEPS)
    reference = Weights(torch.float32)
    plain = build_optimizer(reference, config(lr=LR), STEPS)
    for step in range(STEPS):
        fill(weights, step)
        for p, q in zip(weights.parameters(), reference.parameters(), strict=True):
            q.grad = p.grad.float()
        optimizer.step()
        plain.step()
        assert all(
            torch.equal(p, q.bfloat16()) for p, q in zip(weights.parameters(), reference.parameters(), strict=True)
        )
    (master,) = optimizer._parts
    assert all(torch.equal(copy, q) for (_, copy), q in zip(master._pairs, reference.parameters(), strict=True))
    assert not same(trained(config(lr=100 * LR, bf16="master"), torch.bfloat16, STEPS), Weights(torch.bfloat16))


@slow
@pytest.mark.parametrize("implementation", ["fused", "8bit"])
def test_stochastic_rounding_follows_fp32_in_expectation(implementation):
    exact = moved(trained(config(lr=LR), torch.float32, STEPS))
    got = moved(trained(config(lr=LR, bf16="stochastic", implementation=implementation), torch.bfloat16, STEPS))
    still = (got == 0).double().mean()
    assert 0.9 < still < 1  # few elements go, each a whole bf16 number
    deviation = (got.var() / got.numel()).sqrt()
    assert abs(got.mean() - exact.mean()) < 5 * deviation and deviation < 0.2 * abs(exact.mean())


@slow
def test_stochastic_rounding_draws_by_the_step_alone():
    """So ranks with the same weights stay in step, a resumed run draws the same, and nobody else's draws move."""
    fields = config(lr=1e-4, bf16="stochastic")
    a = trained(fields, torch.bfloat16, 3)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    b = trained(fields, torch.bfloat16, 3)
    assert same(a, b) and torch.equal(torch.get_rng_state(), before)
    weights = Weights(torch.bfloat16)
    optimizer = build_optimizer(weights, fields, 3)
    changed = []
    for _ in range(2):
        start = weights.matrix.detach().clone()
        for p in weights.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        changed.append(weights.matrix.detach() != start)
    assert not torch.equal(*changed)


# --- implementations --------------------------------------------------------------------------------------------------


def test_eight_bit_moments_follow_full_ones():
    """Random gradients of one sign: an update is near lr, whatever the moments' rounding."""
    full, eight = (trained(config(implementation=i), torch.float32, 20) for i in ("fused", "8bit"))
    assert (full.vector - eight.vector).abs().max() < 1e-6  # below 4096 elements moments stay whole
    a, b = moved(full), moved(eight)
    assert not torch.equal(a, b) and (a - b).norm() < 0.02 * a.norm()


def test_groups_decay_apart_and_lr_and_betas_reach_each_implementation():
    weights = Weights(torch.float32)
    for implementation in ("fused", "8bit"):
        c = config(lr=0.5, betas=(0.8, 0.9), weight_decay=0.1, implementation=implementation)
        made = adamw(decayed(weights.parameters(), c.weight_decay), c)
        assert [(g["lr"], tuple(g["betas"]), g["weight_decay"]) for g in made.param_groups] == [
            (0.5, (0.8, 0.9), 0.1),
            (0.5, (0.8, 0.9), 0.0),
        ]
        assert [len(g["params"]) for g in made.param_groups] == [1, 1]


@pytest.mark.parametrize("implementation", ["fused", "8bit", pytest.param("cpu", marks=slow)])
def test_fp32_copies_in_buckets_are_those_of_one_step(implementation, monkeypatch):
    fields = config(bf16="master", implementation=implementation, weight_decay=0.1)
    whole = trained(fields, torch.bfloat16, 4)
    monkeypatch.setattr(optim, "GRADIENTS_AT_ONCE", 1)
    held = []
    real = MasterWeights.step

    def step(master):
        counted = master.optimizer.step

        def one(*args, **kwargs):
            held.append(sum(copy.grad is not None for _, copy in master._pairs))
            return counted(*args, **kwargs)

        master.optimizer.step = one
        real(master)
        master.optimizer.step = counted

    monkeypatch.setattr(MasterWeights, "step", step)
    assert same(trained(fields, torch.bfloat16, 4), whole) and held == [1] * 8


def test_parameters_that_need_no_copy_are_stepped_once(monkeypatch):
    """Whatever the number of buckets."""
    mixed, plain = Weights(torch.bfloat16), Weights(torch.float32)
    mixed.vector.data = plain.vector.data.clone()
    monkeypatch.setattr(optim, "GRADIENTS_AT_ONCE", 1)
    for step in range(3):
        for weights, c in ((mixed, config(bf16="master")), (plain, config())):
            if not step:
                weights.optimizer = build_optimizer(weights, c, 3)
            fill(weights, step)
            weights.optimizer.step()
    assert torch.equal(mixed.vector, plain.vector) and mixed.optimizer._parts[0].nbytes == mixed.matrix.numel() * 4
    assert all(p.grad is None for p in mixed.parameters())


@slow
def test_the_optimizer_on_the_host_is_adamw():
    """fp32 weights in host memory are stepped in place, bf16 ones through fp32 copies."""
    host, fused = (trained(config(implementation=i, weight_decay=0.1), torch.float32, 5) for i in ("cpu", "fused"))
    assert all((p - q).abs().max() < 1e-6 for p, q in zip(host.parameters(), fused.parameters(), strict=True))
    optimizer = build_optimizer(Weights(torch.float32), config(implementation="cpu"), 1)
    assert optimizer._parts[0].nbytes == 0
    weights = Weights(torch.bfloat16)
    optimizer = build_optimizer(weights, config(implementation="cpu", bf16="master"), 1)
    assert optimizer._parts[0].nbytes == 4 * sum(p.numel() for p in weights.parameters())
    narrow = trained(config(implementation="cpu", bf16="master"), torch.bfloat16, 5)
    assert same(narrow, trained(config(bf16="master"), torch.bfloat16, 5))


@pytest.mark.parametrize(
    "fields", [{"implementation": "8bit"}, {"bf16": "master"}, pytest.param({"implementation": "cpu"}, marks=slow)]
)
def test_released_gradients_step_each_layer_with_any_of_them(policy, tokenizer, fields):
    from test_memory_discipline import one_loss

    from genevolve_fast.sandbox.tiny_policy import new_policy

    both = policy, new_policy(tokenizer, seed=1).eval()
    for p, release in zip(both, (False, True), strict=True):
        if "bf16" in fields:
            p.bfloat16()
        p.freeze_vision()
        p.gradient_checkpointing = True
        optimizer = build_optimizer(p, config(lr=1e-2, max_grad_norm=None, release_gradients=release, **fields), 2)
        for step in range(2):
            one_loss(p, step).backward()
            optimizer.step()
    assert same(*both) and not same(policy, new_policy(tokenizer, seed=1).to(policy.head_weight.dtype))


def sharded(rank: int, fields: dict) -> None:
    """On each of two ranks: a step of FSDP2's shards is that of the whole."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import distribute_tensor

    chosen = config(weight_decay=0.1, **fields)
    whole, shards = Weights(torch.bfloat16), Weights(torch.bfloat16)
    fully_shard(shards)
    optimizer = build_optimizer(shards, chosen, 4)
    for step in range(3):
        fill(whole, step)
        for p, q in zip(shards.parameters(), whole.parameters(), strict=True):
            p.grad = distribute_tensor(q.grad, p.device_mesh, p.placements)
        optimizer.step()
    if chosen.bf16 == "stochastic":  # each shard draws its own numbers
        exact = moved(trained(config(weight_decay=0.1), torch.float32, 3)).mean()
        got = shards.matrix.full_tensor().double() - Weights(torch.float32).matrix.double()
        assert abs(got.mean() - exact) < 5 * (got.var() / got.numel()).sqrt() < 0.2 * abs(exact)
        return
    want = trained(chosen, torch.bfloat16, 3)
    assert all(torch.equal(p.full_tensor(), q) for p, q in zip(shards.parameters(), want.parameters(), strict=True))


@slow
@pytest.mark.parametrize("fields", [{"bf16": "master"}, {"bf16": "stochastic"}, {}])
def test_shards_of_fsdp2_are_stepped_as_the_whole(tmp_path, fields):
    on_two_ranks(tmp_path, sharded, fields)


def sharded_eight_bit(rank: int) -> None:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import distribute_tensor

    whole, shards = Weights(torch.float32, rows=128), Weights(torch.float32, rows=128)
    fully_shard(shards)
    optimizer = build_optimizer(shards, config(implementation="8bit"), 4)
    for step in range(3):
        fill(whole, step)
        for p, q in zip(shards.parameters(), whole.parameters(), strict=True):
            p.grad = distribute_tensor(q.grad, p.device_mesh, p.placements)
        optimizer.step()
    (part,) = optimizer._parts
    assert hasattr(part.state[shards.matrix]["exp_avg"].to_local(), "codes")
    want = trained(config(), torch.float32, 3, weights=Weights(torch.float32, rows=128)).matrix
    start = Weights(torch.float32, rows=128).matrix
    assert (shards.matrix.full_tensor() - want).norm() < 0.02 * (want - start).norm()
    for implementation in ("paged_8bit", "cpu"):
        with pytest.raises(RunError, match="does not know what FSDP2 shards"):
            adamw(decayed(shards.parameters(), 0.0), config(implementation=implementation))


@slow
def test_eight_bit_moments_of_shards(tmp_path):
    on_two_ranks(tmp_path, sharded_eight_bit)


# --- checkpoints ------------------------------------------------------------------------------------------------------

KINDS = {
    "fused": ({}, torch.float32),
    "fused bf16": ({}, torch.bfloat16),
    "8bit": ({"implementation": "8bit"}, torch.bfloat16),
    "master": ({"bf16": "master"}, torch.bfloat16),
    "8bit master": ({"implementation": "8bit", "bf16": "master"}, torch.bfloat16),
    "muon master": ({"name": "muon", "bf16": "master"}, torch.bfloat16),
    "stochastic": ({"bf16": "stochastic"}, torch.bfloat16),
    "8bit stochastic": ({"implementation": "8bit", "bf16": "stochastic"}, torch.bfloat16),
    "cpu": ({"implementation": "cpu"}, torch.float32),
    "cpu master": ({"implementation": "cpu", "bf16": "master"}, torch.bfloat16),
}
QUICK = ("8bit", "master")


@pytest.mark.parametrize("kind", [k if k in QUICK else pytest.param(k, marks=slow) for k in KINDS])
def test_a_checkpoint_goes_on_to_the_bit(policy, tokenizer, tmp_path, kind):
    from genevolve_fast.sandbox.tiny_policy import new_policy

    fields, dtype = KINDS[kind]
    chosen = config(schedule="cosine", warmup_ratio=0.25, weight_decay=0.1, **fields)

    def opened(p):
        p.to(dtype)
        p.requires_grad_(False)
        trained = [p.decoder.layers[0].mlp.up_proj, p.decoder.layers[1].self_attn.q_proj, p.decoder.norm]
        for module in trained:  # few shapes, because torchao compiles one after the other
            module.requires_grad_(True)
        return p, build_optimizer(p, chosen, 8)

    whole, optimizer = opened(policy)
    for step in range(4):
        fill(whole, step)
        optimizer.step()
    saved = save_checkpoint(tmp_path, 4, whole, optimizer)
    again, other = opened(new_policy(tokenizer, seed=2))
    assert load_checkpoint(saved, again, other) == 4 and same(again, whole)
    assert other.lr == optimizer.lr != chosen.lr
    for step in range(4, 7):
        for p, o in ((whole, optimizer), (again, other)):
            fill(p, step)
            o.step()
        assert same(again, whole), step
    assert not same(again, new_policy(tokenizer, seed=2).to(dtype))


# --- memory -----------------------------------------------------------------------------------------------------------

SIZES = {
    "fused": ({}, 4.0, 0),
    "8bit": ({"implementation": "8bit"}, 2 * (1 + 4 / 256), 0),
    "master": ({"bf16": "master"}, 8.0, 4),
    "8bit master": ({"implementation": "8bit", "bf16": "master"}, 2 * (1 + 4 / 256), 4),
    "stochastic": ({"bf16": "stochastic"}, 4.0, 0),
    "8bit stochastic": ({"implementation": "8bit", "bf16": "stochastic"}, 2 * (1 + 4 / 256), 0),
}


@pytest.mark.parametrize("kind", [k if "stochastic" not in k else pytest.param(k, marks=slow) for k in SIZES])
def test_bytes_of_a_parameter_are_what_the_planner_says(kind, tmp_path, policy):
    fields, state, copies = SIZES[kind]
    weights = Weights(torch.bfloat16, rows=512)
    weights.vector.requires_grad_(False)
    optimizer = build_optimizer(weights, config(**fields), 1)
    fill(weights, 0)
    optimizer.step()
    (part,) = optimizer._parts
    held = sum(
        _nbytes(x) for s in part.state.values() for n, x in s.items() if n != "step" and not n.startswith("qmap")
    )
    assert held == pytest.approx(state * weights.matrix.numel(), rel=0.01)
    assert getattr(part, "nbytes", 0) == copies * weights.matrix.numel()

    policy.save_pretrained(tmp_path)
    shape = ModelShape.from_config(tmp_path)
    made = plan(shape, Settings(tokens=900, **{"implementation": "fused"} | fields))
    terms = {t.name: t.bytes for t in made.held}
    learns = sum(p.numel() for p in policy.parameters()) - shape.parameters["vision"]
    assert terms["optimizer state"] == pytest.approx(state * learns, rel=1e-3)
    assert terms.get("fp32 weights", 0) == copies * learns


def _nbytes(x) -> int:
    """Of a tensor, or of one that torchao keeps as codes and scales."""
    if not isinstance(x, torch.Tensor):
        return 0
    if hasattr(x, "codes"):
        return x.codes.nbytes + x.scale.nbytes
    return x.nbytes


def test_what_leaves_the_gpu_is_counted_in_host_memory(tmp_path, policy):
    policy.save_pretrained(tmp_path)
    shape = ModelShape.from_config(tmp_path)
    learns = sum(p.numel() for p in policy.parameters()) - shape.parameters["vision"]
    for fields, host in (
        ({"implementation": "cpu", "bf16": "master"}, 12.0),
        ({"implementation": "paged_8bit"}, 2 * (1 + 4 / 256)),
        ({"implementation": "paged_8bit", "bf16": "master"}, 2 * (1 + 4 / 256)),
    ):
        made = plan(shape, Settings(tokens=900, **fields))
        names = {t.name for t in made.held}
        moved = sum(t.bytes for t in made.host if t.name in ("optimizer state", "fp32 weights"))
        assert moved == pytest.approx(host * learns, rel=1e-3) and "optimizer state" not in names
        assert ("fp32 weights" in names) == (fields == {"implementation": "paged_8bit", "bf16": "master"})


# --- refusals ---------------------------------------------------------------------------------------------------------

BF16, LORA = {"policy": {"dtype": "bfloat16"}}, {"policy": {"dtype": "bfloat16", "lora": {"rank": 4}}}
REFUSED = {
    "optim.bf16 'master' would do nothing: policy.dtype is float32": {"optim": {"bf16": "master"}},
    "optim.bf16 'stochastic' would do nothing: LoRA's factors are float32": LORA | {"optim": {"bf16": "stochastic"}},
    "needs name adamw and implementation fused or 8bit": BF16 | {"optim": {"bf16": "stochastic", "name": "muon"}},
    "implementation fused or 8bit": BF16 | {"optim": {"bf16": "stochastic", "implementation": "paged_8bit"}},
    "keeps fp32 weights in host memory: say so": BF16 | {"optim": {"implementation": "cpu"}},
    "AdamW by DeepSpeed on the host": {"optim": {"implementation": "cpu", "name": "muon"}},
    "optim.implementation": {"optim": {"implementation": "apex"}},
}


@pytest.mark.parametrize("reason", REFUSED)
@pytest.mark.parametrize("kind", [EvolveConfig, SftConfig])
def test_what_would_do_nothing_or_cannot_work_is_refused(kind, reason):
    with pytest.raises(ConfigError, match=reason):
        parse_config(kind, REFUSED[reason] | ({"data": {"path": "x"}} if kind is SftConfig else {}))


def test_what_works_is_accepted():
    for fields in (
        {"bf16": "stochastic"},
        {"bf16": "master", "implementation": "cpu"},
        {"implementation": "paged_8bit"},
    ):
        parse_config(EvolveConfig, BF16 | {"optim": fields})
    parse_config(EvolveConfig, LORA | {"optim": {"implementation": "cpu"}})


def test_pages_without_a_gpu_are_refused_not_ignored(policy):
    with pytest.raises(RunError, match="between GPU and host, the policy is on cpu"):
        build_optimizer(policy, config(implementation="paged_8bit"), 1)
    with pytest.raises(RunError, match="on cpu"):
        check_optimizer(config(implementation="paged_8bit"), CPU)


@pytest.mark.parametrize(
    ("package", "fields", "extra"),
    [
        ("bitsandbytes", {"implementation": "8bit"}, "quantized"),
        ("torchao.optim", {"bf16": "stochastic"}, "quantized"),
        ("deepspeed.ops.adam", {"implementation": "cpu"}, "deepspeed"),
    ],
)
def test_a_missing_package_is_told_before_anything_is_loaded(package, fields, extra, monkeypatch, policy):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(RunError, match=rf"does not import.*pip install 'genevolve-fast\[{extra}\]'"):
        check_optimizer(config(**fields), CPU)


def test_nothing_to_train_is_told(policy):
    with pytest.raises(RunError, match="all parameters are frozen"):
        build_optimizer(policy.requires_grad_(False), config(), 1)


# --- a frozen head ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [True, False])
def test_under_an_adapter_the_head_is_frozen_and_costs_two_products(policy, lora):
    """Without a dW: one product for the logits and one for the hidden rows' gradient, against three."""
    from genevolve_fast.ops import Objective, linear_grpo_sdl

    if lora:
        add_lora(policy, rank=2)
    weight, rows = policy.head_weight, 16
    assert weight.requires_grad != lora
    hidden = torch.randn(rows, weight.shape[1], requires_grad=True)
    with Gemms(hidden, weight) as gemms, Shapes() as made:
        loss, *_ = linear_grpo_sdl(
            hidden,
            weight,
            torch.arange(rows) + 40,
            advantages=torch.tensor([1.0]),
            cu_seqlens=(0, rows),
            objective=Objective(kl_coef=0.0, sdl_coef=0.0),
            block_rows=rows,
            num_sequences=1,
            num_tokens=rows,
        )
        loss.backward()
    assert gemms.count == (2 if lora else 3)
    assert hidden.grad.norm() > 0 and (weight.grad is None) == lora
    assert (tuple(weight.shape) in made.shapes) != lora  # nothing as large as dW is ever made


class Shapes(TorchDispatchMode):
    """Of the tensors that operations make, views left out."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if body := body_of(func):
            with self:
                return body(*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor) and not func.is_view:
                self.shapes.add(tuple(x.shape))
        return out
