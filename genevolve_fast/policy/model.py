"""The policy: hidden states without logits, layer by layer in our own loop."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from genevolve_fast.policy.adapters import adapter_base, has_adapters, merge_saved, merged_state_dict, save_adapter
from genevolve_fast.policy.attention import Attend, register
from genevolve_fast.policy.codec import TransformersCodec
from genevolve_fast.policy.offload import ActivationOffload
from genevolve_fast.policy.positions import ImageMismatchError
from genevolve_fast.policy.shards import export_first, in_shards
from genevolve_fast.policy.visits import Packed, Visit
from genevolve_fast.trajectory import image_hash

KEPT_FEATURES = 1 << 30  # bytes of image features that a policy keeps for the next time an image is seen
ARCHITECTURES = ("qwen3_vl_text", "qwen3", "qwen2", "llama")  # text models whose layers our loop knows


@dataclass(frozen=True)
class ImageFeatures:
    """Image tokens of several images in order: `embeds` [tokens, H]; `deepstack` one [tokens, H] per tapped layer."""

    embeds: Tensor
    deepstack: tuple[Tensor, ...]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.embeds, *self.deepstack

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.tensors)

    def copied(self) -> ImageFeatures:
        """The same features in memory of their own: not views of all images that passed the tower with this one."""
        return ImageFeatures(self.embeds.clone(), tuple(x.clone() for x in self.deepstack))

    def leaves(self) -> ImageFeatures:
        """The same features as leaves that gather gradients of their own where the tower is trained."""
        parts = [x.detach().requires_grad_(x.requires_grad) for x in self.tensors]
        return ImageFeatures(parts[0], tuple(parts[1:]))

    def hand_back(self, features: ImageFeatures) -> None:
        """Send the gradients of these leaves through the tower that made `features`."""
        pairs = zip(features.tensors, self.tensors, strict=True)
        if reached := [(x, leaf.grad) for x, leaf in pairs if leaf.grad is not None]:
            torch.autograd.backward(*zip(*reached, strict=True))


class _Entrance(torch.autograd.Function):
    """Rows that require gradients and drop them: a leaf would be kept alive to gather its own."""

    @staticmethod
    def forward(ctx, x, anchor):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        return None, None


def _entering(x: Tensor) -> Tensor:
    """x that takes gradients, which end here where nothing before it does."""
    if x.requires_grad or not torch.is_grad_enabled():
        return x
    return _Entrance.apply(x, torch.empty(0, device=x.device, requires_grad=True))


class Unit(nn.Module):
    """Modules whose weights are gathered together: `forward` runs a function while they are whole.

    What shards weights (FSDP2, ZeRO-3) hooks a module's forward; functions of several modules need one to call.
    """

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()
        self.members = nn.ModuleList(modules)
        for i, weight in enumerate(dict.fromkeys(p for m in modules for p in m.parameters())):
            self.register_parameter(f"weight_{i}", weight)  # ZeRO-3 gathers what a module itself owns

    def forward(self, function: Callable, *inputs):
        return function(*inputs)


def no_policy(path: str | Path) -> FileNotFoundError:
    """What to tell a user whose policy is nowhere."""
    return FileNotFoundError(f"no policy {str(path)!r}: no folder with a config.json, not cached, not on the hub")


class Policy(nn.Module):
    """A Qwen3-VL model, or a plain Qwen3 or Llama, whose layers run one after another under our control.

    transformers' own forward builds masks, drops caches under checkpointing and is silently wrong on packed input for
    most call forms; the loop here needs none of that (DESIGN: the layer loop is ours per architecture).
    """

    def __init__(self, model: nn.Module, codec: TransformersCodec) -> None:
        super().__init__()
        text = model.config.get_text_config()
        if text.model_type not in ARCHITECTURES or getattr(text, "sliding_window", None):
            known = ", ".join(ARCHITECTURES)
            raise ValueError(
                f"the layers of {text.model_type!r} (sliding_window {getattr(text, 'sliding_window', None)}) are not "
                f"known to the training pass; it knows full attention in {known}"
            )
        rope = (getattr(text, "rope_parameters", None) or {}).get("rope_type", "default")
        if rope in ("dynamic", "longrope"):
            raise ValueError(
                f"rope_type {rope!r} turns by the longest position of a call: a prompt and its replies would disagree; "
                "the training pass knows rotations that do not change, such as default, linear, yarn and llama3"
            )
        self.has_vision = text is not model.config
        self.model = model
        self._route_attention(register())
        self.codec = codec
        self.offload: ActivationOffload | None = None
        self.computes_on: torch.device | None = None
        self._kept_features: OrderedDict[str, ImageFeatures] = OrderedDict()  # the last used at the end
        self._kept_bytes = 0
        rotate = sys.modules[type(self.decoder).__module__].apply_rotary_pos_emb
        # a plain list: the layers are registered in `model` already
        self.__dict__["visits"] = [Visit(layer, i, rotate) for i, layer in enumerate(self.decoder.layers)]
        head = (self.decoder.norm, self.model.lm_head)
        tied = self.head_weight is self.decoder.embed_tokens.weight
        # a weight belongs to one unit only
        self.__dict__["entrance"] = Unit(self.decoder.embed_tokens, *(head if tied else ()))
        self.__dict__["exit"] = self.entrance if tied else Unit(*head)
        self.gradient_checkpointing = False

    @property
    def units(self) -> list[nn.Module]:
        """What the training pass calls one after another; between two calls a unit's weights need not be whole."""
        return [self.entrance, *self.visits, *([] if self.exit is self.entrance else [self.exit])]

    @classmethod
    def from_pretrained(cls, path: str | Path, dtype: torch.dtype = torch.float32) -> Policy:
        """Load weights, tokenizer and image processor from a folder or hub name; a saved adapter is merged."""
        from safetensors import SafetensorError
        from transformers import AutoConfig, AutoModelForCausalLM, Qwen3VLForConditionalGeneration

        base = adapter_base(path)
        whole = base or path
        if Path(whole).is_dir() and not (Path(whole) / "config.json").exists():
            raise no_policy(whole)
        if in_shards(whole):
            raise FileNotFoundError(export_first(whole))
        try:
            vision = AutoConfig.from_pretrained(whole).model_type == "qwen3_vl"
        except OSError as error:
            raise no_policy(whole) from error
        kind = Qwen3VLForConditionalGeneration if vision else AutoModelForCausalLM
        try:
            model = kind.from_pretrained(whole, dtype=dtype)
        except (OSError, SafetensorError) as error:
            told = str(error).splitlines()[0]
            raise FileNotFoundError(f"the weights of {str(whole)!r} cannot be loaded: {told}") from error
        if base is not None:
            model = merge_saved(model, path)
        codec = TransformersCodec.from_pretrained(path)
        if vision and codec.image_processor is None:
            raise FileNotFoundError(f"{path} has a vision tower but no preprocessor_config.json to prepare images with")
        return cls(model, codec)

    def save_pretrained(self, path: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write a transformers folder, an adapter merged, 4-bit weights plain; `dtype` rounds what is written, not what
        is in memory."""
        weights = merged_state_dict(self.model)
        if dtype is not None:
            weights = {k: v.to(dtype) for k, v in weights.items()}
        self.model.save_pretrained(path, state_dict=weights)
        self.codec.save_pretrained(path)

    def save_outline(self, path: str | Path) -> None:
        """Write what a transformers folder holds beside the weights, where these lie in shards (`policy.shards`)."""
        self.model.config.save_pretrained(path)
        if self.model.can_generate():
            self.model.generation_config.save_pretrained(path)
        self.codec.save_pretrained(path)

    def save_trainable(self, path: str | Path) -> None:
        """Write what training changes: the adapter in peft's format, or the whole model without one; and the codec."""
        if has_adapters(self):
            save_adapter(self, path)
            self.codec.save_pretrained(path)
        else:
            self.save_pretrained(path)

    def _route_attention(self, name: str) -> None:
        parts = {"text_config": name, "vision_config": "sdpa"}
        self.model.set_attn_implementation(parts if self.has_vision else name)

    @contextmanager
    def own_attention(self) -> Iterator[None]:
        """Where transformers' own forward of the language model works; elsewhere its attention is ours."""
        self._route_attention("sdpa")
        try:
            yield
        finally:
            self._route_attention(register())

    @property
    def head_weight(self) -> Tensor:
        """[V, H]; the embedding itself where they are tied."""
        return self.model.lm_head.weight

    @property
    def text_config(self):
        return self.model.config.get_text_config()

    @property
    def decoder(self) -> nn.Module:
        """Embedding, layers and norm of the language model."""
        return self.model.model.language_model if self.has_vision else self.model.model

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether the layers are run again in the backward instead of kept."""
        return self.visits[0].checkpoint

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, on: bool) -> None:
        for visit in self.visits:
            visit.checkpoint = on

    @property
    def tile_tokens(self) -> int:
        """Rows of the projections and of the MLP that a checkpointed layer has in memory at once."""
        return self.visits[0].tile_rows

    @tile_tokens.setter
    def tile_tokens(self, rows: int) -> None:
        for visit in self.visits:
            visit.tile_rows = rows

    def frame(self) -> AbstractContextManager:
        """Around a forward and its backward: layer inputs that are offloaded live until its end."""
        return self.offload.frame() if self.offload else nullcontext()

    @property
    def device(self) -> torch.device:
        """Where the passes run; between visits the weights may lie elsewhere."""
        return self.computes_on or self.head_weight.device

    @property
    def vision_frozen(self) -> bool:
        return not self.has_vision or not any(p.requires_grad for p in self.model.model.visual.parameters())

    def freeze_vision(self) -> None:
        if self.has_vision:
            self.model.model.visual.requires_grad_(False)

    def forget_images(self) -> None:
        """Drop cached features; needed after the vision tower's weights changed."""
        self._kept_features.clear()
        self._kept_bytes = 0

    def image_features(self, images: Sequence[np.ndarray]) -> ImageFeatures | None:
        """Features of `images` in order. Repeated images pass the tower once; of a frozen tower KEPT_FEATURES bytes are
        kept for the next call, those used last."""
        if not images:
            return None
        if not self.has_vision:
            raise ImageMismatchError(f"{type(self.model).__name__} sees no images, but the rollouts hold {len(images)}")
        keys = [image_hash(pixels) for pixels in images]
        unique = dict(zip(keys, images, strict=True))
        if self.vision_frozen or not torch.is_grad_enabled():
            by_key = {k: self._kept_features[k] for k in unique if k in self._kept_features}
            if missing := {k: v for k, v in unique.items() if k not in by_key}:
                with torch.no_grad():
                    by_key |= {k: f.copied() for k, f in self._vision(missing).items()}
            self._keep(by_key)
        else:
            by_key = self._vision(unique)
        parts = [by_key[k] for k in keys]
        deepstack = tuple(torch.cat(level) for level in zip(*(p.deepstack for p in parts), strict=True))
        return ImageFeatures(torch.cat([p.embeds for p in parts]), deepstack)

    def _keep(self, features: dict[str, ImageFeatures]) -> None:
        """Take these in as the last used; the ones unused for longest go."""
        for key, f in features.items():
            self._kept_bytes += 0 if key in self._kept_features else f.nbytes
            self._kept_features[key] = f
            self._kept_features.move_to_end(key)
        while self._kept_bytes > KEPT_FEATURES:
            self._kept_bytes -= self._kept_features.popitem(last=False)[1].nbytes

    def _vision(self, images: dict[str, np.ndarray]) -> dict[str, ImageFeatures]:
        patches, grids = zip(*(self.codec.image_patches(p) for p in images.values()), strict=True)
        visual = self.model.model.visual
        pixel_values = torch.cat(patches).to(self.device, visual.dtype)
        out = visual(pixel_values, grid_thw=torch.tensor(grids, device=self.device), return_dict=True)
        sizes = [self.codec.image_tokens(g) for g in grids]
        levels = [level.split(sizes) for level in out.deepstack_features]
        embeds = out.pooler_output.split(sizes)
        return {k: ImageFeatures(embeds[i], tuple(lv[i] for lv in levels)) for i, k in enumerate(images)}

    def hidden(
        self,
        ids: Tensor,
        positions: Tensor,
        attend: Attend,
        image_rows: Tensor | None = None,
        features: ImageFeatures | None = None,
    ) -> Tensor:
        """Last hidden states [batch, tokens, H].

        ids [batch, tokens] int64; positions [3, batch, tokens]; `attend` supplies attention; `image_rows` index the
        flattened ids, one row per image token of `features`.
        """
        x = self._embed(ids, image_rows, features and features.embeds)
        rotary = self.decoder.rotary_emb(x, self._axes(positions))
        for index, layer in enumerate(self.decoder.layers):
            x = layer(x, position_embeddings=rotary, attention_mask=None, attend=attend)
            if features is not None and index < len(features.deepstack):
                flat = x.reshape(-1, x.shape[-1])
                x = flat.index_add(0, image_rows, features.deepstack[index].to(x.dtype)).view(x.shape)
        return self.decoder.norm.forward(x)

    def _axes(self, positions: Tensor) -> Tensor:
        """positions [3, batch, n] as the rotary embedding takes them: one axis where the model has no other."""
        return positions if self.has_vision else positions[0]

    def _embed(self, ids: Tensor, image_rows: Tensor | None, image_embeds: Tensor | None) -> Tensor:
        x = self.decoder.embed_tokens.forward(ids)  # no hooks: see Unit
        if image_embeds is None:
            return x
        return x.reshape(-1, x.shape[-1]).index_copy(0, image_rows, image_embeds.to(x.dtype)).view(x.shape)

    def rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos, sin [n, d] of positions [3, n], in the dtype of the weights."""
        like = torch.empty(0, dtype=self.head_weight.dtype, device=self.device)
        cos, sin = self.decoder.rotary_emb(like, self._axes(positions[:, None]))
        return cos[0], sin[0]

    def embed(self, *both: Packed | None, features: ImageFeatures | None) -> tuple[Tensor | None, Tensor | None]:
        """[n, H] what enters the first layer of the student's and the teacher's rows; the teacher's has no graph."""
        x, teacher_x = self.entrance(self._embed_both, *both, features)
        # beyond the unit: what shards weights would gather a frozen embedding again for the backward
        return None if x is None else _entering(x), teacher_x

    def _embed_both(self, student: Packed | None, teacher: Packed | None, features: ImageFeatures | None):
        x = None if student is None else self._embed_packed(student, features)
        with torch.no_grad():
            return x, None if teacher is None else self._embed_packed(teacher, features)

    def _embed_packed(self, rows: Packed, features: ImageFeatures | None) -> Tensor:
        image = features is not None and len(rows.image_rows) > 0
        return self._embed(rows.ids, rows.image_rows, features.embeds[rows.feature_rows] if image else None)

    def add_deepstack(self, x: Tensor, layer: int, rows: Packed, features: ImageFeatures | None) -> Tensor:
        """x after `layer` with the vision tower's features of that depth added at its image rows."""
        if features is None or layer >= len(features.deepstack) or not len(rows.image_rows):
            return x
        return x.index_add(0, rows.image_rows, features.deepstack[layer][rows.feature_rows].to(x.dtype))
