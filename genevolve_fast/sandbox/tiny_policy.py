"""The sandbox's policy: Qwen3-VL's architecture at 1.25 million parameters, with its own tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path

import torch

from genevolve_fast.policy.codec import TransformersCodec
from genevolve_fast.policy.model import Policy
from genevolve_fast.sandbox.scene import CELL_SIZE, IMAGE_SIZE

VOCABULARY = 1500
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
TAG_TOKENS = (
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<answer>",
    "</answer>",
    "<tool_response>",
    "</tool_response>",
    "<experience>",
    "</experience>",
)
_PATCH, _MERGE = 16, 2
# A JSON skeleton such as `": {"` becomes one piece: punctuation may run across single spaces, words keep their space.
PIECES = r"[^A-Za-z0-9 ]+(?: [^A-Za-z0-9 ]+)*| ?[A-Za-z]+| ?[0-9]+| +"


def train_tokenizer(
    texts: Iterable[str], tags: Sequence[str] = TAG_TOKENS, vocabulary: int = VOCABULARY, pieces: str = PIECES
):
    """A byte-level BPE of about `vocabulary` entries trained on `texts`; `tags` and chat markers are single ids.

    No entry reaches beyond what `pieces`, a regular expression, matches at once.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pieces), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in tags])
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(tags),
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        min_frequency=4,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in tags])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def image_processor():
    """Qwen2-VL's image processor on PIL, fixed to the sandbox's pictures: 96 x 96 pixels, nine image tokens."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    assert CELL_SIZE == _PATCH * _MERGE, "one image token must see exactly one cell"
    pixels = IMAGE_SIZE * IMAGE_SIZE
    return Qwen2VLImageProcessorPil(
        patch_size=_PATCH,
        merge_size=_MERGE,
        temporal_patch_size=2,
        size={"shortest_edge": pixels, "longest_edge": pixels},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )


def tiny_config(tokenizer):
    """Qwen3VLConfig of the tiny policy for this tokenizer."""
    from transformers import Qwen3VLConfig

    ids = {t: tokenizer.convert_tokens_to_ids(t) for t in SPECIAL_TOKENS}
    return Qwen3VLConfig(
        text_config=dict(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=5,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=4096,
            rope_parameters=dict(
                rope_type="default", rope_theta=5000000.0, mrope_section=[8, 4, 4], mrope_interleaved=True
            ),
            tie_word_embeddings=True,
            eos_token_id=ids["<|im_end|>"],
            pad_token_id=ids["<|endoftext|>"],
        ),
        vision_config=dict(
            depth=2,
            hidden_size=32,
            intermediate_size=64,
            num_heads=2,
            patch_size=_PATCH,
            temporal_patch_size=2,
            spatial_merge_size=_MERGE,
            in_channels=3,
            out_hidden_size=128,
            num_position_embeddings=(IMAGE_SIZE // _PATCH) ** 2,
            deepstack_visual_indexes=[0],
        ),
        image_token_id=ids["<|image_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )


def new_policy(tokenizer, seed: int = 0) -> Policy:
    """A randomly initialised tiny policy; the same seed gives the same weights."""
    from transformers import Qwen3VLForConditionalGeneration

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3VLForConditionalGeneration(tiny_config(tokenizer))
    return Policy(model.float(), TransformersCodec(tokenizer, image_processor()))


def start_path() -> Path:
    """Folder of the shipped SFT start (made by `genevolve-fast sft --config configs/sandbox_sft.yaml`)."""
    return Path(str(resources.files("genevolve_fast.sandbox") / "start"))
