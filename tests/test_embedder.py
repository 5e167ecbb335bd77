"""Qwen3-Embedding on a tiny random model, and memories that know who embedded them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from genevolve_fast.experience.config import EmbedderConfig, open_embedder
from genevolve_fast.experience.embedder import HashedNgramEmbedder
from genevolve_fast.experience.memory import ExperienceMemory
from genevolve_fast.experience.qwen_embedder import QwenEmbedder
from genevolve_fast.protocols import Experience

TEXTS = [
    "Draw the emblem of Bel Abo at the top.",
    "Draw the motto.",
    "Draw the emblem of Bel Abo at the top.",
    "Show two red stars in a row at the top and three blue circles in a row at the bottom on a white background.",
    "",
]


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    import transformers

    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, initializer_range=0.2,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("models") / "Tiny-Embedding"
    transformers.Qwen3Model(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def embedder(folder):
    return QwenEmbedder(str(folder), device="cpu", batch_size=8)


def test_equal_texts_have_cosine_one_and_others_less(embedder):
    vectors = embedder.embed(TEXTS)
    assert vectors.shape == (5, embedder.dimension) and vectors.dtype == np.float32
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    cosines = vectors @ vectors.T
    assert cosines[0, 2] == pytest.approx(1, abs=1e-6)
    assert all(cosines[0, i] < 0.999 for i in (1, 3, 4))


def test_neither_batch_nor_padding_matter(folder, embedder):
    together = embedder.embed(TEXTS)
    alone = np.concatenate([embedder.embed([t]) for t in TEXTS])
    pairs = QwenEmbedder(str(folder), device="cpu", batch_size=2).embed(TEXTS)
    assert np.abs(together - alone).max() < 1e-5 and np.abs(together - pairs).max() < 1e-5
    assert embedder.embed([]).shape == (0, embedder.dimension)


def test_it_is_the_last_tokens_hidden_state_of_the_instructed_text(folder, embedder):
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    text = f"Instruct: {embedder.name.partition(': ')[2]}\nQuery:{TEXTS[3]}"
    with torch.no_grad():
        hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0, -1]
    assert np.allclose(embedder.embed(TEXTS)[3], hidden / hidden.norm(), atol=1e-5)


def test_the_end_of_a_long_text_does_not_count(folder):
    short = QwenEmbedder(str(folder), device="cpu", max_tokens=64)
    beginning, end = "star " * 200, "circle " * 5
    a, b = short.embed([beginning, beginning + end])
    assert np.allclose(a, b, atol=1e-5)


def test_a_memory_retrieves_by_it(embedder):
    memory = ExperienceMemory(embedder, capacity=3)
    memory.insert(TEXTS[0], Experience("first"), gap=0.5, step=0)
    memory.insert(TEXTS[3], Experience("second"), gap=0.5, step=0)
    assert memory.retrieve(TEXTS[0]).search_strategy == "first"
    assert memory.retrieve(TEXTS[3]).search_strategy == "second"


def test_a_memory_of_another_embedder_is_refused_or_embedded_again_knowingly(embedder, tmp_path):
    memory = ExperienceMemory(embedder)
    memory.insert(TEXTS[0], Experience("first"), gap=0.5, step=0)
    memory.save(tmp_path / "memory")
    again = ExperienceMemory.load(tmp_path / "memory", embedder)
    assert again.retrieve(TEXTS[0]).search_strategy == "first"
    with pytest.raises(ValueError, match=r"written with the embedder 'Tiny-Embedding.*this is 'hashed n-grams"):
        ExperienceMemory.load(tmp_path / "memory", HashedNgramEmbedder())
    moved = ExperienceMemory.load(tmp_path / "memory", HashedNgramEmbedder(), reembed=True)
    assert moved.retrieve(TEXTS[0]).search_strategy == "first" and moved._vectors.shape == (1, 512)
    with pytest.raises(ValueError, match="512 bins.*64 bins"):
        moved.save(tmp_path / "moved")
        ExperienceMemory.load(tmp_path / "moved", HashedNgramEmbedder(64))


def test_a_memory_of_an_older_release_is_read(tmp_path):
    memory = ExperienceMemory(HashedNgramEmbedder())
    memory.insert(TEXTS[0], Experience("first"), gap=0.5, step=0)
    memory.save(tmp_path / "memory")
    data = json.loads((tmp_path / "memory.json").read_text())
    del data["embedder"]
    (tmp_path / "memory.json").write_text(json.dumps(data))
    assert ExperienceMemory.load(tmp_path / "memory", HashedNgramEmbedder()).retrieve(TEXTS[0])


def test_the_configuration_opens_it(folder, tmp_path):
    assert isinstance(open_embedder(EmbedderConfig()), HashedNgramEmbedder)
    opened = open_embedder(EmbedderConfig(kind="qwen", model=str(folder), device="cpu"))
    assert isinstance(opened, QwenEmbedder) and opened.dimension == 32
    with pytest.raises(ValueError, match="model with kind hashed would do nothing"):
        EmbedderConfig(model="x")
    with pytest.raises(ValueError, match="nowhere cannot be loaded"):
        open_embedder(EmbedderConfig(kind="qwen", model=str(tmp_path / "nowhere"), device="cpu"))
    with pytest.raises(ValueError, match="cannot be loaded"):
        open_embedder(EmbedderConfig(kind="qwen", model=str(folder), device="cuda:77"))
