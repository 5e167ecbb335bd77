"""How the tiny policy comes to be: demonstrations, a tokenizer, random weights, word lists to learn copying from."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from genevolve_fast.agent.protocol import APPLY_GUIDANCE, FINAL_STEP, TOO_LONG, format_error
from genevolve_fast.agent.session import SessionSettings
from genevolve_fast.data.demonstrations import demonstrate, write_sft
from genevolve_fast.data.rows import read_jsonl
from genevolve_fast.files import replacing
from genevolve_fast.policy.codec import TransformersCodec
from genevolve_fast.policy.model import Policy
from genevolve_fast.protocols import Codec, Experience
from genevolve_fast.sandbox.comparer import experience_for
from genevolve_fast.sandbox.demonstrator import Demonstrator, coin
from genevolve_fast.sandbox.habits import HABITS, applicable
from genevolve_fast.sandbox.process_demonstrator import write_processes
from genevolve_fast.sandbox.scene import CELLS, PALETTE, SHAPES
from genevolve_fast.sandbox.search import SKILL_GUIDANCE
from genevolve_fast.sandbox.tiny_policy import image_processor, new_policy, train_tokenizer
from genevolve_fast.sandbox.world import (
    FIRST_NAMES,
    MOTTOS,
    SECOND_NAMES,
    SIGNS,
    SYSTEM_PROMPT,
    SandboxWorld,
    vocabulary_texts,
)
from genevolve_fast.train.config import SftConfig
from genevolve_fast.trajectory import Request

_WORDS = (
    *PALETTE,
    *SHAPES,
    *(f"{shape}s" for shape in SHAPES),
    *CELLS,
    *MOTTOS,
    *SIGNS,
    *FIRST_NAMES,
    *SECOND_NAMES,
    *("Draw", "Paint", "Show", "background", "emblem", "with", "and", "the", "on", "at"),
)
SETTINGS = SessionSettings(
    max_tool_calls=6,
    max_model_calls=7,
    max_tokens_per_turn=160,
    max_response_tokens=1200,
    max_prompt_tokens=400,
    min_references=0,
    observe_images="tokens",
)


def bootstrap_codec(world: SandboxWorld) -> Codec:
    """A codec that can write anything; demonstrations are made as text with it before the real one is trained."""
    return TransformersCodec(train_tokenizer(vocabulary_texts(world)), image_processor())


def told_experience(share: float):
    """A function (request, seed) -> the experience that `share` of the demonstrations carry and obey.

    It names what a demonstrator with these habits would have done wrong, as the comparer names it.
    """

    def pick(request: Request, seed: int) -> Experience | None:
        if coin(seed, "told") >= share:
            return None
        wrong = [h for h in applicable(request) if coin(seed, "lesson", h) >= HABITS[h]]
        return experience_for(wrong, request) if wrong else None

    return pick


def write_demonstrations(world: SandboxWorld, folder: Path, *, count: int, experience_share: float, seed: int) -> Path:
    """`folder/sft.jsonl` and its images: `count` conversations of the demonstrator on train requests."""
    demonstrations = demonstrate(
        world.requests("train", count, seed=seed + 1),
        Demonstrator().next_turn,
        tools=world.tools(),
        system_prompt=SYSTEM_PROMPT,
        codec=bootstrap_codec(world),
        settings=replace(SETTINGS, max_prompt_tokens=10**6, max_tokens_per_turn=10**6, max_response_tokens=10**7),
        seed=seed,
        experience_for=told_experience(experience_share),
    )
    return write_sft(demonstrations, folder)


def write_recitations(folder: Path, *, count: int, seed: int) -> Path:
    """`folder/recitations.jsonl`: `count` lists of 8 to 50 of the world's words, each to be repeated.

    Copying from the context (Olsson et al., arXiv 2209.11895) is what a large model brings along. Demonstrations have
    too few copied words to teach it to a random one; here every word of the reply is copied.
    """
    random = np.random.default_rng((seed, 2))
    path = folder / "recitations.jsonl"
    with replacing(path) as partial, partial.open("w", encoding="utf-8") as f:
        for _ in range(count):
            chosen = random.permutation(len(_WORDS))[: int(random.integers(8, 51))]
            text = f"Repeat: {' '.join(_WORDS[i] for i in chosen)}."
            messages = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
            f.write(json.dumps({"messages": messages}) + "\n")
    return path


def scripted_set(config: SftConfig, world: SandboxWorld, folder: Path) -> Path:
    """The conversations of data.path, written into `folder`; those already there are reused."""
    data = folder / "sft.jsonl"
    if data.exists():
        return data
    write = write_processes if config.data.path == "sandbox:processes" else write_demonstrations
    d = config.data
    return write(world, folder, count=d.demonstrations, experience_share=d.experience_share, seed=config.seed)


def new_start(config: SftConfig, world: SandboxWorld, folder: Path) -> tuple[Policy, Path, Path | None]:
    """(random tiny policy with its tokenizer, conversations to train it on, recitations to begin with)."""
    data = scripted_set(config, world, folder)
    count = config.data.recitations
    recitations = write_recitations(folder, count=count, seed=config.seed) if count else None
    return new_policy(tokenizer_from(data, world), config.seed), data, recitations


def tokenizer_from(path: Path, world: SandboxWorld):
    """The tiny policy's tokenizer, trained on the conversations at `path` and the world's documents."""
    texts = list(vocabulary_texts(world)) + [f"at the {cell}" for cell in CELLS]
    texts += [
        FINAL_STEP,
        TOO_LONG,
        APPLY_GUIDANCE,
        format_error("the tool call has no name"),
        *SKILL_GUIDANCE.values(),
    ] * 8
    for row in read_jsonl(path):
        texts += [m["content"] for m in row["messages"]]
    return train_tokenizer(texts)
