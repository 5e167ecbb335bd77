"""The layout of BAGEL-style checkpoints: which tensors one holds, of which shapes, and which part of our model each is.

BAGEL (arXiv 2505.14683) is Qwen2's decoder with two sets of weights in every layer, one for text and ViT rows and one
(`_moe_gen`) for the rows of VAE latents; both attend to each other. Rows of latents enter by `vae2llm`, with
`time_embedder` and the fixed `latent_pos_embed` added, and leave by `llm2vae` as velocities (noise - picture, t = 1 is
noise): `Flow.enter`, `time`, `place` and `leave` here. An image's rows share one rotary position.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from genevolve_fast.resumable import BatchError

WEIGHTS = "ema.safetensors"  # what is published; `model.safetensors` beside it where training goes on
_FREQUENCIES = 256  # numbers of a time before its two layers
_SIDE = "_moe_gen"
OURS = {  # their names -> ours, of what lies outside the decoder's layers
    "vae2llm": "flow.enter",
    "time_embedder.mlp.0": "flow.time.0",
    "time_embedder.mlp.2": "flow.time.2",
    "latent_pos_embed.pos_embed": "flow.place.weight",
    "llm2vae": "flow.leave",
    "language_model.model.embed_tokens.weight": "model.embed_tokens.weight",
    "language_model.lm_head.weight": "lm_head.weight",
}
VISION = ("vit_model.", "connector.", "vit_pos_embed.")  # how pictures are understood: a tower of its own


@dataclass(frozen=True)
class BagelShape:
    """Sizes of a checkpoint, from its llm_config.json and config.json. Defaults: BAGEL-7B-MoT."""

    hidden: int = 3584
    layers: int = 28
    heads: int = 28
    kv_heads: int = 4
    intermediate: int = 18_944
    vocabulary: int = 152_064
    latent_patch: int = 2  # side of a row's patch, in latent pixels
    latent_channels: int = 16
    latent_side: int = 64  # rows of the largest picture's side

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def numbers(self) -> int:
        """Of the latents of one row."""
        return self.latent_patch**2 * self.latent_channels

    @classmethod
    def from_folder(cls, folder: Path) -> BagelShape:
        """Raises BatchError naming file and field."""
        llm, whole = (_read(folder / name) for name in ("llm_config.json", "config.json"))
        try:
            return cls(
                llm["hidden_size"], llm["num_hidden_layers"], llm["num_attention_heads"], llm["num_key_value_heads"],
                llm["intermediate_size"], llm["vocab_size"], whole["latent_patch_size"],
                whole["vae_config"]["z_channels"], whole["max_latent_size"],
            )  # fmt: skip
        except (KeyError, TypeError) as error:
            raise BatchError(f"{folder} is no BAGEL-style checkpoint: its configuration lacks {error}") from None


def layout(shape: BagelShape) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors but those of VISION."""
    s, made = shape, {}
    q, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim
    lm = "language_model.model"
    for i in range(s.layers):
        for side in ("", _SIDE):
            attention, layer = f"{lm}.layers.{i}.self_attn", f"{lm}.layers.{i}"
            for name, out in (("q_proj", q), ("k_proj", kv), ("v_proj", kv)):
                made[f"{attention}.{name}{side}.weight"] = (out, s.hidden)
                made[f"{attention}.{name}{side}.bias"] = (out,)
            made[f"{attention}.o_proj{side}.weight"] = (s.hidden, q)
            for name in ("q_norm", "k_norm"):
                made[f"{attention}.{name}{side}.weight"] = (s.head_dim,)
            for name in ("gate_proj", "up_proj"):
                made[f"{layer}.mlp{side}.{name}.weight"] = (s.intermediate, s.hidden)
            made[f"{layer}.mlp{side}.down_proj.weight"] = (s.hidden, s.intermediate)
            for name in ("input_layernorm", "post_attention_layernorm"):
                made[f"{layer}.{name}{side}.weight"] = (s.hidden,)
    for side in ("", _SIDE):
        made[f"{lm}.norm{side}.weight"] = (s.hidden,)
    made[f"{lm}.embed_tokens.weight"] = made["language_model.lm_head.weight"] = (s.vocabulary, s.hidden)
    for name, sizes in (
        ("vae2llm", (s.hidden, s.numbers)),
        ("llm2vae", (s.numbers, s.hidden)),
        ("time_embedder.mlp.0", (s.hidden, _FREQUENCIES)),
        ("time_embedder.mlp.2", (s.hidden, s.hidden)),
    ):
        made[f"{name}.weight"], made[f"{name}.bias"] = sizes, sizes[:1]
    made["latent_pos_embed.pos_embed"] = (s.latent_side**2, s.hidden)
    return made


def shapes_in(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what a checkpoint holds, from its header alone. Raises BatchError."""
    from safetensors import SafetensorError, safe_open

    path = folder / WEIGHTS
    try:
        with safe_open(str(path), framework="numpy") as f:
            return {name: tuple(f.get_slice(name).get_shape()) for name in f.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError) as error:
        raise BatchError(f"{path} cannot be read: {error}") from None


def deviations(held: Mapping[str, tuple[int, ...]], shape: BagelShape) -> Iterator[str]:
    """What a checkpoint lacks, has in another shape or has beside the layout, a sentence each."""
    wanted = layout(shape)
    for name, sizes in wanted.items():
        if name not in held:
            yield f"{name} {list(sizes)} is missing"
        elif held[name] != sizes:
            yield f"{name} is {list(held[name])}, not {list(sizes)}"
    for name in held:
        if name not in wanted and not name.startswith(VISION):
            yield f"{name} {list(held[name])} is in no BAGEL layout"


def our_name(name: str) -> str | None:
    """The parameter of a UnifiedModel that a tensor outside the layers would be; None for one of the layers or vision.

    The layers have two sides and biases, and ours has one side without: there is nothing to load them into.
    """
    for theirs, ours in OURS.items():
        if name == theirs or name.startswith(f"{theirs}."):
            return ours + name[len(theirs) :]
    return None


def _read(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BatchError(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise BatchError(f"{path} is no object")
    return value
