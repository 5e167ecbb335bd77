"""Hand-made groups of rollouts: a common prompt, replies with tool tokens and pictures, tokens after the last loss."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from genevolve_fast.batch.groups import TrainingRollout
from genevolve_fast.policy.model import Policy
from genevolve_fast.trajectory import ImageRecord, Trajectory, Turn, image_hash

Part = int | np.ndarray  # so many text tokens, or a picture


class Draft:
    def __init__(self, codec, seed: int) -> None:
        self.codec, self.random = codec, np.random.default_rng(seed)
        self.ids: list[int] = []
        self.mask: list[bool] = []
        self.images: list[ImageRecord] = []
        self.pixels: dict[str, np.ndarray] = {}
        self.turns: list[Turn] = []

    def add(self, role: str, parts: Sequence[Part], sampled: bool = False) -> None:
        start = len(self.ids)
        for part in parts:
            at = len(self.ids)
            if isinstance(part, int):
                self.ids += self.random.integers(40, 300, part).tolist()
            else:
                grid, sha = self.codec.image_grid(part), image_hash(part)
                self.ids += [self.codec.image_pad_id] * self.codec.image_tokens(grid)
                self.images.append(ImageRecord(f"IMG_{len(self.images):03d}", sha, grid, at, len(self.ids)))
                self.pixels[sha] = part
        self.mask += [sampled] * (len(self.ids) - start)
        if len(self.ids) > start:
            decision = (start + (len(self.ids) - start) // 2, len(self.ids)) if sampled else None
            self.turns.append(Turn(role, start, len(self.ids), decision=decision))


def group(
    codec, prompt: Sequence[Part], replies: Sequence[Sequence[tuple[str, Sequence[Part]]]], seed: int
) -> tuple[list[Trajectory], dict[str, np.ndarray]]:
    """Rollouts of one prompt. A reply is its turns: ("assistant", parts) is sampled, ("tool", parts) is not."""
    out, pixels = [], {}
    for k, turns in enumerate(replies):
        draft = Draft(codec, seed)
        draft.add("system", [3])
        draft.add("user", prompt)
        stop = len(draft.ids)
        draft.add("tool", [2])  # what closes the request and opens the reply
        draft.random = np.random.default_rng((seed, k))
        for role, parts in turns:
            draft.add(role, parts, sampled=role == "assistant")
        mask = np.array(draft.mask)
        logps = np.where(mask, -draft.random.random(len(mask)), 0).astype(np.float32)
        trajectory = Trajectory(
            f"{seed}-{k}", str(seed), str(seed), np.array(draft.ids), mask, logps, stop, tuple(draft.turns),
            tuple(draft.images),
        )  # fmt: skip
        out.append(trajectory.validate())
        pixels |= draft.pixels
    return out, pixels


def mixed_batch(
    codec, pictures: Sequence[np.ndarray], *, experience: bool = True
) -> tuple[list[TrainingRollout], dict[str, np.ndarray]]:
    """Three groups (K = 3, 1 and 2; the last has a rollout without a teacher): long, short and one-token replies."""
    see = list(pictures) or [5, 3]
    replies = [
        [
            [("assistant", [9]), ("tool", [4, see[0]]), ("assistant", [21]), ("tool", [6])],
            [("assistant", [1])],
            [("assistant", [5]), ("tool", [3, see[1], 2]), ("assistant", [1])],
        ],
        [[("assistant", [12]), ("tool", [2, see[0], 1, see[1]])]],
        [[("assistant", [1])], [("assistant", [17]), ("tool", [1])]],
    ]
    prompts = [[4, see[1], 7], [30], [6, see[0], 2, see[0]]]
    patches = [[(41, 50, 60, 42), (41, 42), (41, 50, 42)], [(44, 45)], [(), (41, 46, 47, 42)]]
    advantages = [[1.0, -0.625, 0.0], [0.375], [-1.125, 0.8125]]
    rollouts, pixels = [], {}
    for g, prompt in enumerate(prompts):
        trajectories, seen = group(codec, prompt, replies[g], seed=g + 1)
        pixels |= seen
        for t, a, patch in zip(trajectories, advantages[g], patches[g], strict=True):
            rollouts.append(TrainingRollout(t, a, patch if experience else ()))
    return rollouts, pixels


def text_policy(kind: str, **shape) -> Policy:
    """A tiny random Qwen3 or Llama in eval mode with the sandbox's tokenizer; `shape` changes its configuration."""
    import transformers

    from genevolve_fast.policy.codec import TransformersCodec
    from genevolve_fast.sandbox.tiny_policy import start_path

    tokenizer = transformers.AutoTokenizer.from_pretrained(start_path())

    usual = dict(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=4096,
    )  # fmt: skip
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**usual | shape))
    return Policy(model.eval(), TransformersCodec(tokenizer, None))
