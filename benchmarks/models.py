"""Models of published dimensions with random weights, and rollouts as a multi-turn agent leaves them, in text."""

from __future__ import annotations

import types
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch

from genevolve_fast.batch.groups import TrainingRollout
from genevolve_fast.policy.adapters import add_lora
from genevolve_fast.policy.codec import NO_TOKEN
from genevolve_fast.policy.model import Policy
from genevolve_fast.profile.shapes import BUILT_IN, ModelShape, VisionShape
from genevolve_fast.trajectory import Trajectory, Turn

LOSS_SHARE = 0.3
TURN_TOKENS = 1200  # of a reply, from one sampled stretch to the next
UNEVEN = (0.55, 0.8, 0.95, 1.05, 1.2, 1.45)  # a group's replies over their mean
CLOSING = 5  # tokens of a prompt after the request: what closes its turn and opens the reply


@dataclass(frozen=True)
class Model:
    """A shape of Qwen3-VL; `lora` is the rank that it trains with, 0 for all weights; tokens are divided by `scale`."""

    shape: ModelShape
    dtype: torch.dtype
    lora: int
    scale: int = 1


TOY = ModelShape(64, 3, 4, 2, 16, 160, 1600, True, vision=VisionShape(2, 32, 64, 64, 36, 3, 16, 2, 2, 1))
MODELS = {
    "8b": Model(BUILT_IN["qwen3-vl-8b"], torch.bfloat16, 64),
    "2b": Model(BUILT_IN["qwen3-vl-2b"], torch.bfloat16, 0),
    "toy": Model(TOY, torch.float32, 4, scale=128),
}


def config_of(shape: ModelShape):
    """The Qwen3VLConfig of a shape."""
    from transformers import Qwen3VLConfig

    half, v = shape.head_dim // 2, shape.vision
    rope = dict(
        rope_type="default", rope_theta=5e6, mrope_section=[half - 2 * (half * 5 // 16), *[half * 5 // 16] * 2],
        mrope_interleaved=True,
    )  # fmt: skip
    text = dict(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim, max_position_embeddings=1 << 20, rope_parameters=rope, tie_word_embeddings=shape.tied,
    )  # fmt: skip
    vision = dict(
        depth=v.depth, hidden_size=v.hidden, intermediate_size=v.intermediate, num_heads=min(16, v.hidden // 16),
        patch_size=v.patch, temporal_patch_size=v.temporal_patch, spatial_merge_size=v.merge, in_channels=v.channels,
        out_hidden_size=v.out_hidden, num_position_embeddings=v.positions,
        deepstack_visual_indexes=[v.depth * (i + 1) // (v.deepstack + 1) for i in range(v.deepstack)],
    )  # fmt: skip
    ids = {name: shape.vocabulary - 1 - i for i, name in enumerate(
        ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"))}  # fmt: skip
    return Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=shape.tied, **ids)


def random_policy(
    model: Model, device: torch.device, *, lora: int | None = None, layers: int | None = None, codec=None
) -> Policy:
    """The model with random weights, made on `device`; the tower is frozen, layers are checkpointed.

    `lora`: another rank than the model's; adapters are random on both sides, so that every gradient is there.
    """
    from transformers import Qwen3VLForConditionalGeneration

    shape = model.shape if layers is None else replace(model.shape, layers=layers)
    torch.manual_seed(0)
    with torch.device(device), default_dtype(model.dtype):
        bare = Qwen3VLForConditionalGeneration(config_of(shape)).eval()
    policy = Policy(bare, codec or types.SimpleNamespace(image_pad_id=NO_TOKEN, merge_size=1, image_grid=None))
    policy.freeze_vision()
    rank = model.lora if lora is None else lora
    if rank:
        add_lora(policy, rank=rank)
        policy.to(device)
        for name, p in policy.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.01)
    policy.gradient_checkpointing = True
    return policy


@contextmanager
def default_dtype(dtype: torch.dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def shape_of(policy: Policy) -> ModelShape:
    return ModelShape.from_config(policy.model.config.to_dict())


def ready_gradients(policy: Policy) -> None:
    """Every trained weight's gradient exists and is 0: a peak measured from now on does not contain it."""
    for p in policy.parameters():
        if p.requires_grad:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad.zero_()


# --- rollouts ---------------------------------------------------------------------------------------------------------


def loss_mask(tokens: int, turn: int = TURN_TOKENS) -> np.ndarray:
    """[tokens] of a reply: sampled stretches with tools' answers between them; the first and last token are sampled."""
    sampled = max(1, round(LOSS_SHARE * tokens))
    stretches = min(sampled, max(2, round(tokens / turn)))
    if tokens < 3 or stretches < 2:
        return np.ones(tokens, dtype=bool)
    ends = np.linspace(0, sampled, stretches + 1).round().astype(int)
    gaps = np.linspace(0, tokens - sampled, stretches).round().astype(int)  # unsampled tokens before each stretch
    mask = np.zeros(tokens, dtype=bool)
    for i in range(stretches):
        mask[gaps[i] + ends[i] : gaps[i] + ends[i + 1]] = True
    return mask


def rollouts_of(
    prompt: int, replies: Sequence[int], patch: int, vocabulary: int, *, group: str = "0", turn: int = TURN_TOKENS
) -> list[TrainingRollout]:
    """One request's rollouts, all with an advantage; `patch` tokens of experience each (0: no teacher)."""
    random = np.random.default_rng(sum(map(ord, group)))
    top = vocabulary - 8  # the last ids stand for images
    shared, experience = random.integers(0, top, prompt), tuple(random.integers(0, top, patch).tolist())
    out = []
    for k, tokens in enumerate(replies):
        mask = np.concatenate([np.zeros(prompt, dtype=bool), loss_mask(tokens, turn)])
        logps = np.where(mask, -random.random(len(mask)), 0).astype(np.float32)
        ids = np.concatenate([shared, random.integers(0, top, tokens)])
        t = Trajectory(f"{group}-{k}", group, group, ids, mask, logps, max(1, prompt - CLOSING), turns_of(mask))
        out.append(TrainingRollout(t, (-1.0) ** k * (1 + 0.1 * k), experience))
    return out


def turns_of(mask: np.ndarray) -> tuple[Turn, ...]:
    """The request up to the first sampled token, then what was sampled and what tools answered."""
    borders = [0, *(np.flatnonzero(np.diff(mask)) + 1).tolist(), len(mask)]
    turns = [Turn("user", *borders[:2])]
    for start, stop in zip(borders[1:], borders[2:], strict=False):
        sampled = bool(mask[start])
        decision = (start + (stop - start) // 2, stop) if sampled else None
        turns.append(Turn("assistant" if sampled else "tool", start, stop, decision=decision))
    return tuple(turns)


def uneven_replies(mean: int) -> tuple[int, ...]:
    return tuple(max(1, round(f * mean)) for f in UNEVEN)
