"""What a strategy divides among the GPUs of a run, and what every GPU holds whole."""

from __future__ import annotations

from typing import Literal

Strategy = Literal["none", "ddp", "zero1", "zero2", "zero3", "fsdp2"]
What = Literal["weights", "gradients", "state"]

DIVIDED: dict[Strategy, frozenset[What]] = {
    "none": frozenset(),
    "ddp": frozenset(),
    "zero1": frozenset({"state"}),
    "zero2": frozenset({"state", "gradients"}),
    "zero3": frozenset({"state", "gradients", "weights"}),
    "fsdp2": frozenset({"state", "gradients", "weights"}),
}
DEEPSPEED = ("zero1", "zero2", "zero3")
GATHERED_LAYERS = 2  # in use and on its way
NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)  # a weight; its block's absmax in 8 bits; fp32 for 256 of those
ZERO_BUCKET = 16 << 20  # gradients that ZeRO gathers before it reduces them: what the trainer sets
DDP_BUCKET = 64 << 20  # bytes of gradients that are summed over ranks at once, and one weight's that crosses its end


def refusal(
    world: int,
    strategy: Strategy,
    offload_optimizer: bool,
    offload_params: bool,
    optimizer: str,
    implementation: str,
    bf16: str,
    quantize: str,
    freeze_vision: bool,
) -> str | None:
    """Why this combination cannot work; None where it can."""
    divided = DIVIDED[strategy]
    if strategy == "none" and world > 1:
        return f"strategy none trains on one GPU, not on {world}: choose ddp, zero1, zero2, zero3 or fsdp2"
    if strategy == "fsdp2" and offload_optimizer:
        return "fsdp2 offloads weights, gradients and optimizer state together: offload_params is its switch"
    if offload_optimizer and not divided:
        return f"offload_optimizer belongs to zero1, zero2 and zero3: strategy {strategy} steps on the GPU"
    if offload_params and "weights" not in divided:
        return f"offload_params belongs to zero3 and fsdp2: strategy {strategy} keeps the weights on every GPU"
    if not divided:
        return None
    if optimizer == "muon":
        return f"muon orthogonalises whole matrices: strategy {strategy} gives each GPU a part of them"
    if implementation in ("8bit", "paged_8bit"):
        return f"implementation {implementation} has moments of whole weights: strategy {strategy} divides them"
    if implementation == "cpu" and not offload_optimizer:
        return f"implementation cpu steps what offload_optimizer keeps on the host: give it with strategy {strategy}"
    if bf16 == "stochastic":
        return f"bf16 stochastic rounds whole weights: strategy {strategy} divides fp32 copies, bf16 master"
    if quantize != "none" and "weights" in divided:
        return f"quantize {quantize} packs a layer's weights into one block, which strategy {strategy} cannot divide"
    if not freeze_vision:
        return f"a trained vision tower sees other pictures on every GPU: strategy {strategy} would wait; take ddp"
    return None
