"""The policy: hidden states without logits, layer by layer in our own loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from genevolve_fast.policy.adapters import adapter_base, has_adapters, merge_saved, merged_state_dict, save_adapter
from genevolve_fast.policy.attention import Attend, register
from genevolve_fast.policy.codec import TransformersCodec
from genevolve_fast.trajectory import image_hash


@dataclass(frozen=True)
class ImageFeatures:
    """Image tokens of several images in order: `embeds` [tokens, H]; `deepstack` one [tokens, H] per tapped layer."""

    embeds: Tensor
    deepstack: tuple[Tensor, ...]


class Policy(nn.Module):
    """A Qwen3-VL model whose layers run one after another under our control.

    transformers' own forward builds masks, drops caches under checkpointing and is silently wrong on packed input for
    most call forms; the loop here needs none of that (DESIGN: the layer loop is ours per architecture).
    """

    def __init__(self, model: nn.Module, codec: TransformersCodec) -> None:
        super().__init__()
        model.set_attn_implementation({"text_config": register(), "vision_config": "sdpa"})
        self.model = model
        self.codec = codec
        self.gradient_checkpointing = False
        self._frozen_features: dict[str, ImageFeatures] = {}

    @classmethod
    def from_pretrained(cls, path: str | Path, dtype: torch.dtype = torch.float32) -> Policy:
        """Load weights, tokenizer and image processor from a folder or hub name; a saved adapter is merged."""
        from transformers import Qwen3VLForConditionalGeneration

        base = adapter_base(path)
        model = Qwen3VLForConditionalGeneration.from_pretrained(base or path, dtype=dtype)
        if base is not None:
            model = merge_saved(model, path)
        return cls(model, TransformersCodec.from_pretrained(path))

    def save_pretrained(self, path: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write a transformers folder, an adapter merged; `dtype` rounds what is written, not what is in memory."""
        weights = merged_state_dict(self.model) if has_adapters(self) else None
        if dtype is not None:
            weights = {k: v.to(dtype) for k, v in (weights or self.model.state_dict()).items()}
        self.model.save_pretrained(path, state_dict=weights)
        self.codec.save_pretrained(path)

    def save_trainable(self, path: str | Path) -> None:
        """Write what training changes: the adapter in peft's format, or the whole model without one; and the codec."""
        if has_adapters(self):
            save_adapter(self, path)
            self.codec.save_pretrained(path)
        else:
            self.save_pretrained(path)

    @property
    def head_weight(self) -> Tensor:
        """[V, H]; the embedding itself where they are tied."""
        return self.model.lm_head.weight

    @property
    def text_config(self):
        return self.model.config.text_config

    @property
    def device(self) -> torch.device:
        return self.head_weight.device

    @property
    def vision_frozen(self) -> bool:
        return not any(p.requires_grad for p in self.model.model.visual.parameters())

    def freeze_vision(self) -> None:
        self.model.model.visual.requires_grad_(False)

    def forget_images(self) -> None:
        """Drop cached features; needed after the vision tower's weights changed."""
        self._frozen_features.clear()

    def image_features(self, images: Sequence[np.ndarray]) -> ImageFeatures | None:
        """Features of `images` in order. Repeated images pass the tower once; a frozen tower's features are kept."""
        if not images:
            return None
        keys = [image_hash(pixels) for pixels in images]
        unique = dict(zip(keys, images, strict=True))
        if self.vision_frozen or not torch.is_grad_enabled():
            missing = {k: v for k, v in unique.items() if k not in self._frozen_features}
            if missing:
                with torch.no_grad():
                    self._frozen_features.update(self._vision(missing))
            by_key = self._frozen_features
        else:
            by_key = self._vision(unique)
        parts = [by_key[k] for k in keys]
        deepstack = tuple(torch.cat(level) for level in zip(*(p.deepstack for p in parts), strict=True))
        return ImageFeatures(torch.cat([p.embeds for p in parts]), deepstack)

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
        decoder = self.model.model.language_model
        x = decoder.embed_tokens(ids)
        shape = x.shape
        if features is not None:
            x = x.reshape(-1, shape[-1]).index_copy(0, image_rows, features.embeds.to(x.dtype)).view(shape)
        rotary = decoder.rotary_emb(x, positions)
        for index, layer in enumerate(decoder.layers):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = torch.utils.checkpoint.checkpoint(_layer, layer, x, rotary, attend, use_reentrant=False)
            else:
                x = _layer(layer, x, rotary, attend)
            if features is not None and index < len(features.deepstack):
                flat = x.reshape(-1, shape[-1])
                x = flat.index_add(0, image_rows, features.deepstack[index].to(x.dtype)).view(shape)
        return decoder.norm(x)


def _layer(layer: nn.Module, x: Tensor, rotary: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
    return layer(x, position_embeddings=rotary, attention_mask=None, attend=attend)
