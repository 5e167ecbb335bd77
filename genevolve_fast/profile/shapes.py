"""A model's dimensions and parameter counts from its config.json alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class ShapeError(ValueError):
    """A config.json cannot be read as a decoder this library trains; the message names the field."""


@dataclass(frozen=True)
class VisionShape:
    """Qwen3-VL's tower: its widths, and where its features go."""

    depth: int
    hidden: int
    intermediate: int
    out_hidden: int
    positions: int
    channels: int
    patch: int
    temporal_patch: int
    merge: int
    deepstack: int  # decoder layers that receive features of their own

    @property
    def parameters(self) -> int:
        h, i, wide = self.hidden, self.intermediate, self.merge**2 * self.hidden
        embed = self.channels * self.temporal_patch * self.patch**2 * h + h + self.positions * h
        block = 4 * h + (3 * h * h + 3 * h) + (h * h + h) + (h * i + i) + (i * h + h)
        merger = (wide * wide + wide) + (wide * self.out_hidden + self.out_hidden)
        norms = 2 * h + self.deepstack * 2 * wide  # a deepstack merger normalises after merging
        return embed + self.depth * block + (1 + self.deepstack) * merger + norms


@dataclass(frozen=True)
class ModelShape:
    """A decoder with grouped-query attention and a gated MLP, and the tower before it if there is one."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    tied: bool = False
    qk_norm: bool = True
    attention_bias: bool = False  # of q, k, v and o
    mlp_bias: bool = False
    vision: VisionShape | None = None

    @classmethod
    def from_config(cls, source: str | Path | Mapping[str, Any]) -> ModelShape:
        """From a config.json: its content, the file, its folder, a hub id in the local cache, or a built-in name.

        Raises ShapeError naming the field that is absent or the model type that is not a dense decoder of this kind,
        FileNotFoundError where there is no such file.
        """
        if isinstance(source, Mapping):
            return _parse(source)
        if str(source) in BUILT_IN:
            return BUILT_IN[str(source)]
        path = _config_file(source)
        try:
            return _parse(json.loads(path.read_text(encoding="utf-8")))
        except json.JSONDecodeError as error:
            raise ShapeError(f"{path} is not JSON: {error}") from error

    @property
    def q(self) -> int:
        """Width of the queries."""
        return self.heads * self.head_dim

    @property
    def kv(self) -> int:
        """Width of the keys, and of the values."""
        return self.kv_heads * self.head_dim

    @property
    def matrices(self) -> tuple[tuple[int, int], ...]:
        """(in, out) of one layer's linear maps: q, k, v, o, gate, up, down."""
        h, i = self.hidden, self.intermediate
        return (h, self.q), (h, self.kv), (h, self.kv), (self.q, h), (h, i), (h, i), (i, h)

    @property
    def linear_parameters(self) -> int:
        """Weights of all layers' linear maps: what a token is multiplied with on its way through the decoder."""
        return self.layers * sum(a * b for a, b in self.matrices)

    @property
    def parameters(self) -> dict[str, int]:
        """Counts of embedding, head (0 where tied), layers, norms and vision; their sum is the model's."""
        biases = self.attention_bias * (self.q + 2 * self.kv + self.hidden)
        biases += self.mlp_bias * (2 * self.intermediate + self.hidden)
        norms = self.layers * (2 * self.hidden + self.qk_norm * 2 * self.head_dim) + self.hidden
        return {
            "embedding": self.vocabulary * self.hidden,
            "head": 0 if self.tied else self.vocabulary * self.hidden,
            "layers": self.linear_parameters + self.layers * biases,
            "norms": norms,
            "vision": self.vision.parameters if self.vision else 0,
        }

    @property
    def total_parameters(self) -> int:
        return sum(self.parameters.values())

    def lora_parameters(self, rank: int) -> int:
        """Of rank-`rank` adapters on every linear map of the decoder layers."""
        return self.layers * rank * sum(a + b for a, b in self.matrices)


def _qwen3_vl(hidden: int, intermediate: int, layers: int, heads: int, tied: bool, large_tower: bool) -> ModelShape:
    depth, width, inner = (27, 1152, 4304) if large_tower else (24, 1024, 4096)
    tower = VisionShape(depth, width, inner, hidden, 2304, 3, 16, 2, 2, 3)
    return ModelShape(hidden, layers, heads, 8, 128, intermediate, 151_936, tied, vision=tower)


# The published config.json of Qwen/Qwen3-VL-{2B,4B,8B,32B}-Instruct. 2B and 8B as torchtitan's experiments/qwen3_vl
# repeats them, 4B as DiffSynth's encoder does, 8B also as nvidia/Cosmos-Reason2-8B inherits it.
BUILT_IN = {
    "qwen3-vl-2b": _qwen3_vl(2048, 6144, 28, 16, tied=True, large_tower=False),
    "qwen3-vl-4b": _qwen3_vl(2560, 9728, 36, 32, tied=True, large_tower=False),
    "qwen3-vl-8b": _qwen3_vl(4096, 12288, 36, 32, tied=False, large_tower=True),
    "qwen3-vl-32b": _qwen3_vl(5120, 25600, 64, 64, tied=False, large_tower=True),
}

_QK_NORM = {"qwen3": True, "qwen3_vl": True, "qwen3_vl_text": True, "llama": False, "mistral": False}


def _config_file(source: str | Path) -> Path:
    path = Path(source)
    if path.is_dir():
        path = path / "config.json"
    if path.is_file():
        return path
    if isinstance(source, str) and source.count("/") == 1 and not source.startswith((".", "/")):
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(source, "config.json")
        if isinstance(cached, str):
            return Path(cached)
        raise FileNotFoundError(f"no config.json of {source!r}: neither a folder nor in the local hub cache")
    raise FileNotFoundError(f"no config.json at {source!r}; built-in names are {', '.join(BUILT_IN)}")


def _parse(config: Mapping[str, Any]) -> ModelShape:
    kind = config.get("model_type")
    if kind not in _QK_NORM:
        raise ShapeError(f"model_type {kind!r} is not one of {', '.join(sorted(_QK_NORM))}: no formula for it")
    text = config.get("text_config", config)
    hidden, heads = _number(text, "hidden_size"), _number(text, "num_attention_heads")
    return ModelShape(
        hidden=hidden,
        layers=_number(text, "num_hidden_layers"),
        heads=heads,
        kv_heads=text.get("num_key_value_heads") or heads,
        head_dim=text.get("head_dim") or hidden // heads,
        intermediate=_number(text, "intermediate_size"),
        vocabulary=_number(text, "vocab_size"),
        tied=bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
        qk_norm=_QK_NORM[kind],
        attention_bias=bool(text.get("attention_bias", False)),
        mlp_bias=bool(text.get("mlp_bias", False)),
        vision=_vision(config["vision_config"]) if "vision_config" in config else None,
    )


def _vision(config: Mapping[str, Any]) -> VisionShape:
    return VisionShape(
        depth=_number(config, "depth"),
        hidden=_number(config, "hidden_size"),
        intermediate=_number(config, "intermediate_size"),
        out_hidden=_number(config, "out_hidden_size"),
        positions=config.get("num_position_embeddings", 2304),
        channels=config.get("in_channels", 3),
        patch=config.get("patch_size", 16),
        temporal_patch=config.get("temporal_patch_size", 2),
        merge=config.get("spatial_merge_size", 2),
        deepstack=len(config.get("deepstack_visual_indexes", ())),
    )


def _number(config: Mapping[str, Any], name: str) -> int:
    value = config.get(name)
    if not isinstance(value, int) or value < 1:
        raise ShapeError(f"config.json: {name} must be a positive whole number, got {value!r}")
    return value
