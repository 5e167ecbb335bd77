"""LoRA on the decoder's linear layers, by peft: modules change in place, the names of the model stay reachable."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genevolve_fast.policy.quantize import plain_state_dict

if TYPE_CHECKING:
    from genevolve_fast.policy.model import Policy

_NAME = "default"
_PEFT_PREFIX = "base_model.model."  # what PeftModel puts before the names of the model it wraps
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class AdapterError(ValueError):
    """The adapter cannot be added, found or loaded; the message says why."""


class _Factor(nn.Linear):
    """A or B of an adapter: an fp32 weight whose product runs in the dtype of the activations.

    peft would run the product in the weight's dtype: bf16 weights lose small updates, fp32 products are slow.
    """

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


def add_lora(
    policy: Policy,
    *,
    rank: int,
    alpha: float | None = None,
    targets: Sequence[str] | Literal["all"] = "all",
    dropout: float = 0.0,
    rslora: bool = False,
    seed: int = 0,
) -> None:
    """Freeze `policy` and add a trainable adapter W + scale·B·A (arXiv 2106.09685) to linear layers of its decoder.

    A [rank, in] is drawn with `seed`, B [out, rank] is zero; both are fp32 where the weights are narrower. `targets`
    are names such as q_proj, the same in every layer; "all": every linear layer of attention and MLP. The vision tower
    and the head are never adapted. scale is alpha / rank, with `rslora` alpha / sqrt(rank) (arXiv 2312.03732); alpha
    defaults to 2·rank. Raises AdapterError for unknown targets and for a policy that has an adapter.
    """
    from peft import LoraConfig, inject_adapter_in_model

    if has_adapters(policy):
        raise AdapterError("the policy already has an adapter: save it merged and start from that folder")
    decoder = _decoder_name(policy.model)
    known = _linear_names(policy.model.get_submodule(f"{decoder}.layers"))
    names = known if targets == "all" else list(dict.fromkeys(targets))
    if unknown := [n for n in names if n not in known]:
        raise AdapterError(f"policy.lora.targets {unknown} are no linear layers of the decoder: {', '.join(known)}")
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,
        lora_dropout=dropout,
        use_rslora=rslora,
        target_modules=rf"{re.escape(decoder)}\.layers\.\d+\.(?:self_attn|mlp)\.(?:.*\.)?(?:{'|'.join(names)})",
        base_model_name_or_path=policy.model.config.name_or_path or None,
    )
    policy.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, policy.model, _NAME)
    for layer in _adapted(policy.model).values():
        layer.cast_input_dtype_enabled = False
        for factor in (layer.lora_A[_NAME], layer.lora_B[_NAME]):
            factor.__class__ = _Factor
            factor.to(torch.promote_types(factor.weight.dtype, torch.float32)).requires_grad_(True)


def has_adapters(policy: Policy) -> bool:
    return bool(_adapted(policy.model))


def adapter_rank(policy: Policy) -> int:
    """Rows of A, the same in every layer."""
    return policy.model.peft_config[_NAME].r


@contextmanager
def adapters_off(policy: Policy) -> Iterator[Policy]:
    """`policy` without its adapter: the base weights, bit for bit. Raises AdapterError where there is no adapter."""
    layers = _adapted(policy.model).values()
    if not layers:
        raise AdapterError("the policy has no adapter to switch off: set policy.lora.rank, or use a FrozenCopy")
    before = [layer._disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True  # peft's enable_adapters also flips requires_grad, which FSDP watches
        yield policy
    finally:
        for layer, was in zip(layers, before, strict=True):
            layer._disable_adapters = was


def save_adapter(policy: Policy, folder: str | Path) -> None:
    """Write peft's folder: adapter_config.json and adapter_model.safetensors, at full precision."""
    from safetensors.torch import save_file

    if not has_adapters(policy):
        raise AdapterError("the policy has no adapter to save")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = copy.copy(policy.model.peft_config[_NAME])
    config.inference_mode = True
    config.save_pretrained(folder)
    tensors = {_PEFT_PREFIX + n: p.detach().cpu().contiguous() for n, p in _factors(policy.model).items()}
    save_file(tensors, folder / _WEIGHTS, metadata={"format": "pt"})


def load_adapter(policy: Policy, folder: str | Path) -> None:
    """Restore what `save_adapter` wrote, to the bit. Raises AdapterError where names or shapes differ."""
    from safetensors.torch import load_file

    own = _factors(policy.model)
    if not (Path(folder) / _WEIGHTS).exists():
        raise AdapterError(f"{folder} holds no {_WEIGHTS}")
    saved = {name.removeprefix(_PEFT_PREFIX): t for name, t in load_file(Path(folder) / _WEIGHTS).items()}
    copy_named(saved, own, f"the adapter in {folder}")


def copy_named(saved: dict[str, Tensor], own: dict[str, Tensor], what: str) -> None:
    """Copy tensors of equal names and shapes. Raises AdapterError naming the first difference."""
    if wrong := sorted(n for n in saved.keys() | own.keys() if n not in saved or n not in own):
        raise AdapterError(
            f"{what} belongs to another policy: {wrong[0]} is only on one side ({len(wrong)} such names)"
        )
    for name, tensor in own.items():
        if tensor.shape != saved[name].shape:
            raise AdapterError(f"{what}: {name} is {list(saved[name].shape)}, the policy's {list(tensor.shape)}")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(saved[name])


class SavedAdapters:
    """Frozen adapters from peft's folders side by side on one policy, of which `active` chooses one or none."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._layers: list[nn.Module] = []
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several are what this is for

    def add(self, name: str, folder: str | Path) -> None:
        """Raises AdapterError where the folder is no LoRA adapter of this policy; then nothing of it stays."""
        from peft import LoraConfig, PeftConfig, inject_adapter_in_model
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            config = PeftConfig.from_pretrained(str(folder))
            saved = {n.removeprefix(_PEFT_PREFIX): t for n, t in load_file(Path(folder) / _WEIGHTS).items()}
        except (OSError, TypeError, ValueError, SafetensorError) as error:
            raise AdapterError(f"{folder} is no saved adapter: {type(error).__name__}: {error}") from error
        if not isinstance(config, LoraConfig) or config.use_dora or config.bias != "none" or config.modules_to_save:
            raise AdapterError(f"{folder}: only plain LoRA is served, without DoRA, biases and modules_to_save")
        try:
            inject_adapter_in_model(config, self._policy.model, name)
            self._freeze(name)
            copy_named(saved, _factors(self._policy.model, name), f"the adapter in {folder}")
        except ValueError as error:  # peft's for targets that the policy does not have, our own for other shapes
            self.remove(name)
            raise AdapterError(f"{folder}: {error}") from error

    def remove(self, name: str) -> None:
        for layer in _adapted(self._policy.model).values():
            if name in layer.lora_A:
                layer.delete_adapter(name)
        self._layers = list(_adapted(self._policy.model).values())

    @contextmanager
    def active(self, name: str | None) -> Iterator[None]:
        for layer in self._layers:
            layer._disable_adapters = name not in layer.lora_A
            layer._active_adapter = [name]
        yield

    def _freeze(self, name: str) -> None:
        self._layers = list(_adapted(self._policy.model).values())
        for layer in self._layers:
            layer.cast_input_dtype_enabled = False
            if name in layer.lora_A:
                for factor in (layer.lora_A[name], layer.lora_B[name]):
                    factor.__class__ = _Factor
                    factor.to(torch.promote_types(factor.weight.dtype, torch.float32)).requires_grad_(False)


def merged_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of the model without adapters, their products added; adapted weights are new tensors on the host.

    W + scale·B·A is summed at the adapter's precision and rounded once; a W of 4 bits is what the layer computes with.
    The model itself is not changed.
    """
    adapted = _adapted(model)
    out = {}
    for name, tensor in plain_state_dict(model).items():
        if ".lora_" in name:
            continue
        layer = adapted.get(name.removesuffix(".base_layer.weight"))
        if layer is not None:
            delta = layer.get_delta_weight(_NAME).detach()
            tensor = (tensor.to(delta.device, delta.dtype) + delta).to(tensor.dtype).cpu()
        out[name.replace(".base_layer.", ".")] = tensor
    return out


def adapter_base(path: str | Path) -> str | None:
    """The model that an adapter folder belongs to; None where `path` is no adapter folder."""
    if not (Path(path) / _CONFIG).exists():
        return None
    from peft import PeftConfig

    base = PeftConfig.from_pretrained(str(path)).base_model_name_or_path
    if not base:
        raise AdapterError(f"{Path(path) / _CONFIG} names no base_model_name_or_path: write the base's folder there")
    return base


def merge_saved(model: nn.Module, folder: str | Path) -> nn.Module:
    """`model` with the adapter in `folder` merged into its weights."""
    from peft import PeftModel

    return PeftModel.from_pretrained(model, str(folder)).merge_and_unload()


def _adapted(model: nn.Module) -> dict[str, nn.Module]:
    """Adapted linear layers by the name that they had before."""
    return {n: m for n, m in model.named_modules() if hasattr(m, "lora_A") and hasattr(m, "base_layer")}


def _factors(model: nn.Module, adapter: str = _NAME) -> dict[str, Tensor]:
    """A and B of every layer under the names of peft's file, which leave out the adapter's name."""
    return {
        f"{name}.{kind}.weight": getattr(layer, kind)[adapter].weight
        for name, layer in _adapted(model).items()
        for kind in ("lora_A", "lora_B")
        if adapter in getattr(layer, kind)
    }


def _decoder_name(model: nn.Module) -> str:
    for name in ("model.language_model", "model"):  # Qwen3-VL; Qwen3 and Llama
        try:
            model.get_submodule(f"{name}.layers")
            return name
        except AttributeError:
            continue
    raise AdapterError(f"{type(model).__name__} has its layers neither in model.language_model nor in model")


def _linear_names(layers: nn.Module) -> list[str]:
    parts = ("self_attn", "mlp")
    linear = (n for n, m in layers.named_modules() if isinstance(m, nn.Linear) and n.split(".")[1] in parts)
    return list(dict.fromkeys(n.rsplit(".", 1)[-1] for n in linear))
