"""Malformed model replies: structured damage to valid ones, run through parser and live session."""

from __future__ import annotations

import json
import random

from hypothesis import strategies as st

from genevolve_fast import event_loop
from genevolve_fast.agent.protocol import Answer, FormatError, ToolCall, parse_reply
from genevolve_fast.agent.session import SessionSettings, run_session
from genevolve_fast.protocols import Generation
from genevolve_fast.sandbox.world import SYSTEM_PROMPT, SandboxWorld

CALL = (
    '<think>\nx\n</think>\n<tool_call>\n{"name": "search", "arguments": {"queries": ["Bel Abo field"]}}\n</tool_call>'
)
SEARCH = '<think>a</think><tool_call>{"name": "image_search", "arguments": {"query": "emblem"}}</tool_call>'
ANSWER = (
    '<think>a</think><answer>{"gen_prompt": "Background blue. The emblem of the first reference image at the center.", '
    '"reference_images": [{"img_id": "IMG_001", "note": "n"}]}</answer>'
)
PIECES = (
    "<tool_call>",
    "</tool_call>",
    "<answer>",
    "</answer>",
    "<think>",
    '{"',
    '"}',
    "[",
    "]",
    "null",
    "1e999",
    "\\u0000",
)
VALUES = (
    None,
    3,
    -1e308,
    "x" * 300,
    [],
    {},
    [None],
    {"a": {"b": []}},
    True,
    "IMG_999",
    "<|im_end|>",
    "ß\u202e\U0001f600",
)


class _Random:
    """random.Random's calls drawn from hypothesis, so that failures shrink."""

    def __init__(self, draw) -> None:
        self._draw = draw

    def randrange(self, n: int) -> int:
        return self._draw(st.integers(0, n - 1))


def damage(rng) -> str:
    """One malformed reply; `rng` has randrange."""
    text = (CALL, SEARCH, ANSWER)[rng.randrange(3)]
    for _ in range(1 + rng.randrange(3)):
        text = _DAMAGES[rng.randrange(len(_DAMAGES))](text, rng)
    return text


def _cut(text, rng):
    return text[: rng.randrange(len(text) + 1)]


def _behead(text, rng):
    return text[rng.randrange(len(text) + 1) :]


def _double(text, rng):
    return text + text


def _insert(text, rng):
    at = rng.randrange(len(text) + 1)
    return text[:at] + PIECES[rng.randrange(len(PIECES))] + text[at:]


def _delete(text, rng):
    at = rng.randrange(len(text) + 1)
    return text[:at] + text[at + 1 + rng.randrange(4) :]


def _value(text, rng):
    body = {"name": "search", "arguments": {"queries": ["q"]}, "gen_prompt": "p", "reference_images": []}
    body[list(body)[rng.randrange(len(body))]] = VALUES[rng.randrange(len(VALUES))]
    tag = ("tool_call", "answer")[rng.randrange(2)]
    return f"<think>x</think><{tag}>{json.dumps(body)}</{tag}>"


def _argument(text, rng):
    tool = ("search", "image_search", "query_knowledge", "nothing", "")[rng.randrange(5)]
    name = ("queries", "query", "skill_name")[rng.randrange(3)]
    call = {"name": tool, "arguments": {name: VALUES[rng.randrange(len(VALUES))], "top_k": VALUES[rng.randrange(12)]}}
    return f"<tool_call>{json.dumps(call)}</tool_call>"


def _nest(text, rng):
    depth = (10, 1000, 100_000)[rng.randrange(3)]
    return f"<tool_call>{'[' * depth}{']' * depth}</tool_call>"


def _repeat(text, rng):
    return PIECES[rng.randrange(len(PIECES))] * (1, 50, 5000)[rng.randrange(3)]


_DAMAGES = (_cut, _behead, _double, _insert, _delete, _value, _argument, _nest, _repeat)


@st.composite
def replies(draw) -> str:
    """A hypothesis strategy over `damage`."""
    return damage(_Random(draw))


class TextCodec:
    """A reversible codec of one id per character; enough for sessions without a policy."""

    image_pad_id = 0x10FFFF + 3
    _SPECIAL = ("<|im_start|>", "<|im_end|>", "<|image_pad|>", "<|vision_start|>", "<|vision_end|>")
    markers = _SPECIAL

    def encode(self, text: str) -> list[int]:
        out, i = [], 0
        while i < len(text):
            mark = next((s for s in self._SPECIAL if text.startswith(s, i)), None) if text[i] == "<" else None
            out.append(0x10FFFF + 1 + self._SPECIAL.index(mark) if mark else ord(text[i]))
            i += len(mark) if mark else 1
        return out

    def decode(self, ids) -> str:
        return "".join(self._SPECIAL[i - 0x110000] if i > 0x10FFFF else chr(i) for i in ids)

    def image_grid(self, pixels):
        return (1, 6, 6)

    def image_tokens(self, grid):
        return 9


class Reciter:
    """An engine that says the given replies in turn, the last one for ever."""

    def __init__(self, replies_, codec, ends: bool = True) -> None:
        self._replies, self._codec, self._ends, self._turn = list(replies_), codec, ends, {}

    def open(self, session_id):
        self._turn[session_id] = 0

    def close(self, session_id):
        del self._turn[session_id]

    async def generate(self, session_id, ids, images, sampling, seed):
        text = self._replies[min(self._turn[session_id], len(self._replies) - 1)]
        self._turn[session_id] += 1
        out = self._codec.encode(text.replace("<|im_end|>", ""))
        if self._ends:
            out += self._codec.encode("<|im_end|>")
        out = out[: sampling.max_tokens]
        return Generation(out, [-0.1] * len(out), "stop" if out[-1] in sampling.stop_ids else "length")


WORLD = SandboxWorld()
TOOLS = WORLD.tools()
REQUEST = WORLD.requests("train", 1)[0]
TERMINATIONS = {"answer", "no_answer", "max_response_length", "error"}


def run(replies_, **changes):
    """The session result of an engine that says `replies_`."""
    codec = TextCodec()
    settings = SessionSettings(
        **{"min_references": 0, "observe_images": "tokens", "max_prompt_tokens": 10**5} | changes
    )
    return event_loop.run(
        run_session(
            REQUEST,
            engine=Reciter(replies_, codec, changes.pop("ends", True)),
            codec=codec,
            tools=TOOLS,
            system_prompt=SYSTEM_PROMPT,
            settings=settings,
            rollout_id="r",
            group_id="g",
            seed=1,
        )
    )


def survives(reply: str) -> None:
    """Parser and session take the reply without an exception and end in a typed, valid trajectory."""
    assert isinstance(parse_reply(reply), ToolCall | Answer | FormatError)
    result = run([reply, ANSWER], max_model_calls=3)
    assert result.trajectory.validate().termination in TERMINATIONS
    assert result.trajectory.program is not None or result.trajectory.error


def fuzz(count: int, seed: int) -> list[str]:
    """Replies among `count` malformed ones that broke parser or session."""
    rng, failures = random.Random(seed), []
    for _ in range(count):
        reply = damage(rng)
        try:
            survives(reply)
        except Exception as error:
            failures.append(f"{type(error).__name__}: {error}: {reply[:200]!r}")
    return failures
