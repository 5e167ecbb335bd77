"""The LM head of a transformers model as the arguments of `linear_logprob`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from genevolve_fast.ops.shards import whole

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def head_options(config: PretrainedConfig) -> dict[str, float | None]:
    """softcap and logit_scale that the architecture applies to its logits, as its config names them.

    Cohere: logit_scale. Falcon-H1: lm_head_multiplier. Granite divides by logits_scaling, HyperCLOVA X multiplies.
    """
    text = config.get_text_config()
    scaling = getattr(text, "logits_scaling", None)
    if scaling is not None and not text.model_type.startswith("hyperclovax"):
        scaling = 1 / scaling
    named = [getattr(text, name, None) for name in ("logit_scale", "output_multiplier", "lm_head_multiplier")]
    scale = next((x for x in (*named, scaling) if x is not None), 1.0)
    return dict(softcap=getattr(text, "final_logit_softcapping", None), logit_scale=float(scale))


def check_head(model: PreTrainedModel) -> nn.Module:
    """The module that makes the logits. Raises ValueError saying why its log-probs cannot come from a weight matrix."""
    name = type(model).__name__
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(f"{name} has no output embeddings: there is no head to take log-probs from")
    if model.base_model is model:
        raise ValueError(f"{name} has no backbone (base_model_prefix {model.base_model_prefix!r}) to take hidden from")
    if hasattr(head, "base_layer"):
        raise ValueError(
            f"the head of {name} carries an adapter ({type(head).__name__}), which its weight does not show: "
            "leave lm_head out of target_modules, or train it whole with modules_to_save"
        )
    weight = head.weight
    if weight.ndim != 2 or not weight.is_floating_point():
        raise ValueError(
            f"the head of {name} is quantised ({weight.dtype} {list(weight.shape)}): keep lm_head unquantised"
        )
    return head


def head_tensors(
    head: nn.Module, hidden: Tensor, *, full_precision: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(hidden, weight, bias) in the dtype that the head would run in, gathered where FSDP2 shards them.

    Under autocast that is autocast's dtype, unless `full_precision` asks for fp32; the logits are fp32 in any case.
    """
    weight, bias = head.weight, getattr(head, "bias", None)
    weight, bias = whole(weight), whole(bias)
    hidden = hidden.to(weight.device)
    kind = hidden.device.type
    if full_precision:
        dtype = torch.float32
    elif torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    else:
        dtype = weight.dtype
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


@torch.no_grad()
def check_logits(model: PreTrainedModel) -> None:
    """Runs three tokens and raises ValueError where the model's logits are not what `head_options` makes of its head.

    Skipped where the weights are not there whole: on the meta device, or sharded.
    """
    head = check_head(model)
    weight, bias = head.weight, getattr(head, "bias", None)
    if isinstance(weight, DTensor) or weight.is_meta or not weight.numel():
        return
    seen = []
    hook = model.base_model.register_forward_hook(lambda _module, _inputs, out: seen.append(out.last_hidden_state))
    devices = [weight.device] if weight.is_cuda else []
    try:
        with torch.random.fork_rng(devices):  # a model with dropout would draw
            ids = torch.arange(3, device=model.device)[None]
            logits = model(input_ids=ids, use_cache=False).logits.float()
    finally:
        hook.remove()
    if not seen:
        raise ValueError(f"{type(model).__name__} makes its logits without its backbone {model.base_model_prefix!r}")
    options = head_options(model.config)
    z = nn.functional.linear(seen[0].to(weight.device).float(), weight.float(), None if bias is None else bias.float())
    z = options["logit_scale"] * z
    if options["softcap"] is not None:
        z = options["softcap"] * torch.tanh(z / options["softcap"])
    kind = weight.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    bound = max(8 * torch.finfo(dtype).eps, 1e-4) * logits.abs().max()
    error = (z - logits.to(z.device)).abs().max()
    if not error <= bound:
        raise ValueError(
            f"the logits of {type(model).__name__} are not those of its last hidden state and its head with "
            f"{options}: they differ by {error:.3g} where {bound:.3g} is rounding"
        )
