"""Shared pieces: a randomly initialised tiny policy, its tokenizer and pictures."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read once, when huggingface_hub is first imported


def pytest_collection_finish() -> None:
    """What the tests import need not be looked at by every garbage collection of theirs."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def once(tmp_path_factory) -> Callable[[str, Callable[[Path], object]], Path]:
    """once(name, make): a folder that make(folder) filled, once for all test processes. To be read only."""
    mine = tmp_path_factory.getbasetemp()
    shared = mine.parent if "PYTEST_XDIST_WORKER" in os.environ else mine

    def made(name: str, make: Callable[[Path], object]) -> Path:
        folder, whole = shared / name, shared / f"{name}.whole"
        with FileLock(shared / f"{name}.lock"):
            if not whole.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                make(folder)
                whole.touch()
        return folder

    return made


@pytest.fixture(scope="session")
def tokenizer():
    from genevolve_fast.agent.protocol import APPLY_GUIDANCE
    from genevolve_fast.sandbox.search import SKILL_GUIDANCE
    from genevolve_fast.sandbox.tiny_policy import train_tokenizer
    from genevolve_fast.sandbox.world import SYSTEM_PROMPT, SandboxWorld, vocabulary_texts

    world = SandboxWorld()
    call = '<think>\nFind it.\n</think>\n<tool_call>\n{"name": "search", "arguments": {"queries": ["Bel field"]}}\n'
    answer = (
        '{"gen_prompt": "Background blue. The text \'NOVA\'.", "reference_images": [{"img_id": "IMG_001", "note": ""}]}'
    )
    texts = [*vocabulary_texts(world), *SKILL_GUIDANCE.values(), SYSTEM_PROMPT, APPLY_GUIDANCE, call, answer]
    return train_tokenizer([*texts, *(r.question for r in world.requests("train", 200))] * 4)


@pytest.fixture
def policy(tokenizer):
    from genevolve_fast.sandbox.tiny_policy import new_policy

    return new_policy(tokenizer, seed=1).eval()


@pytest.fixture(scope="session")
def pictures():
    random = np.random.default_rng(0)
    shapes = (96, 64), (64, 96), (64, 128), (96, 96)  # tall, wide, wider, square: positions go on by the longer side
    return [random.integers(0, 255, (*shape, 3), dtype=np.uint8) for shape in shapes]
