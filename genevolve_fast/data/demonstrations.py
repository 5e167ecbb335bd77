"""Teacher trajectories: a demonstrator's conversations through the real tool loop, in the released SFT format."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from genevolve_fast import event_loop
from genevolve_fast.agent.session import SessionSettings, run_session
from genevolve_fast.experience.context import render as render_experience
from genevolve_fast.files import replacing
from genevolve_fast.protocols import Codec, Experience, Generation, Sampling, Tool
from genevolve_fast.trajectory import Message, Request

# (request, messages so far, coin seed, experience or None) -> text of the next assistant turn
NextTurn = Callable[[Request, Sequence[Message], int, "Experience | None"], str]


class ScriptedEngine:
    """A text policy behind the Engine protocol: reads the conversation from the ids, answers with ids.

    Log-probabilities are 0: a script is certain of what it writes.
    """

    def __init__(self, next_turn: NextTurn, codec: Codec, requests: Mapping[str, Request]) -> None:
        self._next_turn = next_turn
        self._codec = codec
        self._requests = requests  # by session id
        self._experience: dict[str, Experience] = {}
        self._seeds: dict[str, int] = {}

    def tell(self, session_id: str, seed: int, experience: Experience | None = None) -> None:
        """Fix the coins of a session, and the experience that it obeys."""
        self._seeds[session_id] = seed
        if experience:
            self._experience[session_id] = experience

    def open(self, session_id: str) -> None:
        pass

    def close(self, session_id: str) -> None:
        pass

    async def generate(
        self, session_id: str, ids: Sequence[int], images: Sequence[np.ndarray], sampling: Sampling, seed: int
    ) -> Generation:
        messages = conversation(self._codec.decode(ids))
        request = self._requests[session_id]
        coins = self._seeds.setdefault(session_id, seed)
        text = self._next_turn(request, messages, coins, self._experience.get(session_id))
        out = self._codec.encode(f"{text}<|im_end|>")[: sampling.max_tokens]
        return Generation(out, [0.0] * len(out), "stop" if out[-1] in sampling.stop_ids else "length")


def conversation(text: str) -> list[Message]:
    """Messages of a chat in Qwen's format; the last, still empty, assistant turn is left out."""
    out = []
    for block in text.split("<|im_start|>")[1:]:
        role, _, content = block.partition("\n")
        content = content.split("<|im_end|>")[0]
        if content or role != "assistant":
            out.append(Message(role, content))
    return out


@dataclass(frozen=True)
class Demonstration:
    """One conversation; `images` are pixels by hash, in the order of its `<image>` placeholders."""

    messages: tuple[Message, ...]
    image_hashes: tuple[str, ...]
    images: Mapping[str, np.ndarray]
    request: Request


def demonstrate(
    requests: Sequence[Request],
    next_turn: NextTurn,
    *,
    tools: Mapping[str, Tool],
    system_prompt: str,
    codec: Codec,
    settings: SessionSettings,
    seed: int,
    experience_for: Callable[[Request, int], Experience | None] = lambda request, seed: None,
    wave: int = 256,
) -> list[Demonstration]:
    """Run the script on every request; where `experience_for` gives one, it is obeyed and stands after the request."""
    out: list[Demonstration] = []
    for first in range(0, len(requests), wave):
        part = requests[first : first + wave]
        names = [f"demo/{first + i}" for i in range(len(part))]
        engine = ScriptedEngine(next_turn, codec, dict(zip(names, part, strict=True)))
        told = [experience_for(r, seed + first + i) for i, r in enumerate(part)]
        for i, (name, experience) in enumerate(zip(names, told, strict=True)):
            engine.tell(name, seed + first + i, experience)

        async def run(part=part, names=names, engine=engine):
            return await asyncio.gather(
                *(
                    run_session(
                        r,
                        engine=engine,
                        codec=codec,
                        tools=tools,
                        system_prompt=system_prompt,
                        settings=settings,
                        rollout_id=name,
                        group_id=name,
                        seed=0,
                    )
                    for r, name in zip(part, names, strict=True)
                )
            )

        for request, experience, result in zip(part, told, event_loop.run(run()), strict=True):
            t = result.trajectory
            messages = list(t.messages)
            if experience:
                shown = f"{messages[1].content}{render_experience(experience)}"
                messages[1] = Message("user", shown)
            hashes = tuple(record.sha256 for record in t.images)
            out.append(Demonstration(tuple(messages), hashes, result.images, request))
    return out


def write_sft(demonstrations: Sequence[Demonstration], folder: Path, name: str = "sft.jsonl") -> Path:
    """Write `{messages, images}` rows and their pictures (PNG, once each) under `folder`; returns the JSONL."""
    from PIL import Image

    (folder / "images").mkdir(parents=True, exist_ok=True)
    written: set[str] = set()
    path = folder / name
    with replacing(path) as partial, partial.open("w", encoding="utf-8") as f:
        for d in demonstrations:
            for sha in d.image_hashes:
                if sha not in written:
                    Image.fromarray(d.images[sha]).save(folder / "images" / f"{sha[:16]}.png")
                    written.add(sha)
            row = {
                "messages": [{"role": m.role, "content": m.content} for m in d.messages],
                "images": [f"images/{sha[:16]}.png" for sha in d.image_hashes],
            }
            f.write(json.dumps(row, ensure_ascii=False) + "\n")
    return path
