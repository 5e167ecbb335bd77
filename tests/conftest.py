"""Shared pieces: a randomly initialised tiny policy and pictures. Two threads, so that timings mean something."""

from __future__ import annotations

import numpy as np
import pytest
import torch

torch.set_num_threads(2)


@pytest.fixture(scope="session")
def tokenizer():
    from genevolve_fast.sandbox.tiny_policy import train_tokenizer

    text = 'Draw the emblem of Bel Tor at the top left. {"name": "search", "arguments": {"queries": ["Bel Tor field"]}}\n'
    return train_tokenizer([text, text.lower()] * 20)


@pytest.fixture
def policy(tokenizer):
    from genevolve_fast.sandbox.tiny_policy import new_policy

    return new_policy(tokenizer, seed=1).eval()


@pytest.fixture(scope="session")
def pictures():
    random = np.random.default_rng(0)
    return [random.integers(0, 255, (96, 96, 3), dtype=np.uint8) for _ in range(4)]
