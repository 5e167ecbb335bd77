"""Weights of 4 bits under an adapter (QLoRA, arXiv 2305.14314): the decoder's matrices as bitsandbytes keeps them."""

from __future__ import annotations

import logging
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from genevolve_fast.policy.model import Policy

# what bitsandbytes and torchao log when anybody imports them, as peft and transformers do: kernels that training does
# not use are absent, and torchao calls a function of torch that will change
_NOISE = {
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
    "torchao": "Failed to load ",
    "torch.utils._pytree": "is an Enum subclass and is now natively supported",
}
for _logger, _noise in _NOISE.items():
    logging.getLogger(_logger).addFilter(lambda record, noise=_noise: noise not in str(record.msg))


class QuantizeError(ValueError):
    """The policy cannot be quantized; the message says why."""


def load_bitsandbytes(asked: str) -> ModuleType:
    """The package. Raises QuantizeError with what to install for what was `asked`."""
    try:
        import bitsandbytes
    except (ImportError, OSError, RuntimeError) as error:
        raise QuantizeError(
            f"{asked} needs bitsandbytes, which does not import ({error}): pip install 'genevolve-fast[quantized]'"
        ) from error
    return bitsandbytes


def quantize(policy: Policy, kind: str = "nf4", device: torch.device | None = None) -> None:
    """Keep the linear layers of the decoder's attention and MLP as 4-bit NormalFloat with quantized scales.

    Each matrix goes to `device` (none: stays) by itself and is quantized there, so a policy in host memory never has
    all its wide weights on a GPU; the rest of the policy stays where it is. Products run in the policy's dtype. The
    same weights give the same bits on the same device. Vision tower, embedding, norms and head are left as they are.
    Raises QuantizeError for another kind, for a policy that is quantized or has an adapter, and without bitsandbytes.
    """
    if kind != "nf4":
        raise QuantizeError(f"quantize {kind!r} is not known: nf4")
    if quantized_layers(policy.model):
        raise QuantizeError("the policy is quantized already")
    if any(hasattr(m, "lora_A") for m in policy.model.modules()):
        raise QuantizeError("the policy has an adapter: quantize it before add_lora")
    bnb = load_bitsandbytes(f"policy.quantize {kind}")
    for layer in policy.decoder.layers:
        for part in (layer.self_attn, layer.mlp):
            for name in [n for n, m in part.named_modules() if isinstance(m, nn.Linear)]:
                parent, _, last = name.rpartition(".")
                setattr(part.get_submodule(parent), last, _four_bits(bnb, part.get_submodule(name), device))
    policy.model.is_loaded_in_4bit = True  # peft reads it


def _four_bits(bnb: ModuleType, linear: nn.Linear, device: torch.device | None) -> nn.Linear:
    weight, bias = linear.weight.detach(), linear.bias
    device = device or weight.device
    new = bnb.nn.Linear4bit(
        linear.in_features, linear.out_features, bias is not None, weight.dtype, quant_type="nf4", device="meta"
    )
    new.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", module=new).to(device)
    if bias is not None:
        new.bias = nn.Parameter(bias.detach().to(device), requires_grad=bias.requires_grad)
    # in eval mode it would repack the weights on some CPUs for a product in bf16 that has no gradient
    new.support_avx512bf16_for_cpu = False
    return new.train(linear.training)


def quantized_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Layers with 4-bit weights by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and hasattr(m.weight, "quant_state")}


def dequantized(layer: nn.Linear) -> Tensor:
    """[out, in] the values that the layer computes with, in the dtype it was quantized from."""
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(layer.weight.data, layer.weight.quant_state)


def plain_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with quantized weights as matrices again, new tensors on the host."""
    layers = quantized_layers(model)
    out = {}
    for name, tensor in model.state_dict().items():
        owner, weight, rest = name.rpartition(".weight.")
        if owner in layers:
            continue  # scales and tables of its 4-bit weight
        layer = layers.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        out[name] = tensor if layer is None else dequantized(layer).cpu()
    return out
