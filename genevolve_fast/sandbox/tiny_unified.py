"""The sandbox's unified model: Qwen3's decoder at under a million parameters, its tokenizer learnt from processes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from genevolve_fast.process.trace import TAGS, Process
from genevolve_fast.process.unified.codec import LatentCodec
from genevolve_fast.process.unified.config import UnifiedConfig
from genevolve_fast.process.unified.model import Unified, new_unified
from genevolve_fast.resumable import BatchError
from genevolve_fast.sandbox.tiny_policy import PIECES, SPECIAL_TOKENS, train_tokenizer

VOCABULARY = 600
# A cell and a verdict that finds nothing are one piece each: a model this small spends its depth on drawing.
_STROKES = r" ?row [0-9] column [0-9]|plan: none| draft: none|"


def tiny_codec(texts: Iterable[str], size: int, patch: int) -> LatentCodec:
    """A tokenizer of `texts` (requests and stages), for square pictures of `size` pixels in patches of `patch`."""
    return LatentCodec(train_tokenizer(texts, TAGS, VOCABULARY, _STROKES + PIECES), size, patch)


def tiny_config(codec: LatentCodec, hidden: int = 128, layers: int = 4, heads: int = 4, predicts: str = "picture"):
    """Qwen3Config of the tiny unified model for this codec."""
    from transformers import Qwen3Config

    ids = {t: codec.tokenizer.convert_tokens_to_ids(t) for t in SPECIAL_TOKENS}
    return Qwen3Config(
        vocab_size=len(codec.tokenizer),
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=32,
        max_position_embeddings=4096,
        rope_parameters=dict(rope_type="default", rope_theta=10000.0),
        tie_word_embeddings=True,
        eos_token_id=ids["<|im_end|>"],
        pad_token_id=ids["<|endoftext|>"],
        predicts=predicts,
    )


def texts_of(process: Process) -> Iterator[str]:
    """Everything that is written of a process."""
    yield process.request
    for cycle in process.cycles:
        yield f"{cycle.plan}{cycle.inspection}{cycle.correction or ''}"


def model_for(config: UnifiedConfig, processes: Sequence[Process], pixels: Mapping[str, np.ndarray]) -> Unified:
    """Random weights as the model section says; the tokenizer is learnt from the first rows."""
    m, first = config.model, processes[:4000]
    size = len(pixels[first[0].result])
    if size % m.patch_size:
        raise BatchError(f"model.patch_size {m.patch_size} does not divide pictures of {size} pixels")
    codec = tiny_codec((text for p in first for text in texts_of(p)), size, m.patch_size)
    shape = dict(hidden=m.hidden, layers=m.layers, heads=m.heads, predicts=m.predicts)
    return new_tiny(codec, config.seed, **shape)


def new_tiny(codec: LatentCodec, seed: int = 0, **shape) -> Unified:
    """A randomly initialised tiny unified model; the same seed gives the same weights."""
    return new_unified(codec, tiny_config(codec, **shape), seed)
