"""Optimizers and 4-bit weights where pages, host copies and compiled rounding are real.

What needs no GPU also runs on a CPU, so that the checks are known to work.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from test_step_gpu import DEVICE, GPU, OBJECTIVE, TEMPERATURE, gpu_only, gradient, qwen3, two_groups  # noqa: E402

from genevolve_fast.policy.adapters import add_lora  # noqa: E402
from genevolve_fast.policy.quantize import plain_state_dict, quantize, quantized_layers  # noqa: E402
from genevolve_fast.train.config import OptimConfig  # noqa: E402
from genevolve_fast.train.optim import build_optimizer  # noqa: E402
from genevolve_fast.train.update import accumulate_gradients  # noqa: E402


def adapted(policy):
    add_lora(policy, rank=4)
    random = torch.Generator().manual_seed(0)
    for name, p in policy.named_parameters():
        if "lora_B" in name:
            p.data.copy_(0.05 * torch.randn(p.shape, generator=random))
    return policy.to(DEVICE)


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)])
def test_the_adapters_gradient_is_that_on_the_dequantized_policy(dtype, allowed):
    """fp32 on a GPU: its 4-bit products of few rows add in another order than those of matrices."""
    policy = qwen3(dtype, torch.device("cpu"))
    quantize(policy, "nf4", DEVICE)
    plain = qwen3(dtype, torch.device("cpu"))
    plain.model.load_state_dict(plain_state_dict(policy.model))
    gradients = []
    for each in (policy, plain):
        accumulate_gradients(adapted(each), two_groups(), {}, OBJECTIVE, temperature=TEMPERATURE, max_tokens=10**6)
        gradients.append(gradient(each))
    assert gradients[1].norm() > 0
    assert (gradients[0] - gradients[1]).norm() <= allowed * gradients[1].norm()


@gpu_only
def test_the_gpu_never_holds_the_wide_weights():
    policy = qwen3(torch.bfloat16, torch.device("cpu"), layers=48)
    matrices = [p for n, p in policy.named_parameters() if p.ndim == 2 and ".layers." in n]
    wide, widest = sum(p.nbytes for p in matrices), max(p.nbytes for p in matrices)
    rest = sum(p.nbytes for p in policy.parameters()) - wide
    del matrices
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    quantize(policy, "nf4", DEVICE)
    policy.to(DEVICE)
    assert len(quantized_layers(policy.model)) == 7 * 48 and policy.device.type == "cuda"
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < 0.35 * wide + 3 * widest + rest


class Weights(nn.Module):
    def __init__(self, dtype: torch.dtype, rows: int = 1024) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(0)
        self.matrix = nn.Parameter((1 + 0.9 * torch.rand(rows, 256, generator=random)).bfloat16().to(DEVICE, dtype))
        self.vector = nn.Parameter(torch.ones(256, device=DEVICE, dtype=dtype))


def stepped(weights: Weights, optimizer, first: int, last: int) -> Weights:
    for step in range(first, last):
        random = torch.Generator().manual_seed(step)
        for p in weights.parameters():
            p.grad = (0.1 + torch.rand(p.shape, generator=random)).to(p.device, p.dtype)
        optimizer.step()
    return weights


def opened(**fields):
    weights = Weights(torch.bfloat16)
    return weights, build_optimizer(weights, OptimConfig(**({"lr": 1e-3, "weight_decay": 0.1} | fields)), 6)


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


KINDS = [
    {"implementation": "8bit"},
    {"bf16": "master"},
    {"implementation": "8bit", "bf16": "master"},
    pytest.param({"implementation": "paged_8bit"}, marks=gpu_only),
    pytest.param({"implementation": "paged_8bit", "bf16": "master"}, marks=gpu_only),
    pytest.param({"bf16": "stochastic"}, marks=gpu_only),
    pytest.param({"implementation": "8bit", "bf16": "stochastic"}, marks=gpu_only),
    pytest.param({"implementation": "cpu", "bf16": "master"}, marks=gpu_only),
]


@pytest.mark.parametrize("fields", KINDS)
def test_restored_from_a_file_it_goes_on_to_the_bit(fields, tmp_path):
    """Also what was paged is so again."""
    weights, optimizer = opened(**fields)
    stepped(weights, optimizer, 0, 3)
    torch.save({"weights": weights.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "saved.pt")
    saved = torch.load(tmp_path / "saved.pt", map_location="cpu", weights_only=False)
    again, other = opened(**fields)
    again.load_state_dict(saved["weights"])
    other.load_state_dict(saved["optimizer"])
    if GPU:
        torch.manual_seed(9)  # draws of its own depend on the step alone
    assert same(stepped(again, other, 3, 6), stepped(weights, optimizer, 3, 6))
    if fields.get("implementation") == "paged_8bit":
        for each in (optimizer, other):
            moments = [s["state1"] for p, s in each._parts[0].state.items() if p.numel() >= 10**5]
            assert moments and all(getattr(m, "is_paged", False) for m in moments)


@gpu_only
def test_weights_stepped_in_host_memory_are_those_stepped_on_the_gpu():
    host, on_host = opened(implementation="cpu", bf16="master")
    gpu, on_gpu = opened(bf16="master")
    before = torch.cuda.memory_allocated()
    stepped(host, on_host, 0, 4)
    held = torch.cuda.memory_allocated() - before
    stepped(gpu, on_gpu, 0, 4)
    assert held < host.matrix.nbytes and all(
        s["exp_avg"].device.type == "cpu" for s in on_host._parts[0].state.values()
    )
    worst = max((p - q).abs().max() for p, q in zip(host.parameters(), gpu.parameters(), strict=True))
    assert worst <= 2**-7  # fp32 sums in another order may round to the neighbour
    assert not same(host, Weights(torch.bfloat16))
