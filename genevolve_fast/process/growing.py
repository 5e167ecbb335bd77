"""A picture grown over cycles of plan, sketch, inspect and refine: the policy writes, a renderer draws."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from typing import TypeVar

import numpy as np

from genevolve_fast.agent.conversation import IMAGE_MARK, Reply
from genevolve_fast.agent.images import SeenImage
from genevolve_fast.incidents import Incidents
from genevolve_fast.net.harmless import harmless, one_line
from genevolve_fast.process.prompts import Prompts, instruction, is_end, next_stage, not_drawn, unreadable
from genevolve_fast.process.record import Record, Talk
from genevolve_fast.process.trace import MAX_CYCLES, Correction, Inspection, Plan, StageError
from genevolve_fast.protocols import EngineError, FoundImage, Sampling
from genevolve_fast.trajectory import Message, StageName, image_hash

_THOUGHT = re.compile(r"\s*<think>.*?</think>", re.DOTALL)
T = TypeVar("T", Plan, Inspection, Correction)

# (prompt, the last draft or None, seed) -> uint8 [height, width, 3]; raises RenderError
Draw = Callable[[str, "np.ndarray | None", int], Awaitable[np.ndarray]]


@dataclass(frozen=True)
class GrowthSettings:
    """Budgets and sampling. `attempts`: times a stage's text is asked for until it can be read."""

    max_cycles: int = MAX_CYCLES
    max_renders: int = 2 * MAX_CYCLES
    max_prompt_tokens: int | None = None  # of instruction and request; none: no limit of its own
    max_tokens: int = 8192  # after the request, what the policy reads included
    max_tokens_per_stage: int = 512
    attempts: int = 3
    temperature: float = 0.7
    top_p: float = 0.95
    sampling_mask: bool = False  # record the ids that top-p kept, where the engine tells them
    prompts: Prompts = "scene"


class Ungrown(RuntimeError):
    """There is no draft, by the engine's or the policy's fault; `kind` is one of incidents.KINDS."""

    def __init__(self, message: str, kind: str, source: str) -> None:
        super().__init__(message)
        self.kind = kind
        self.source = source  # "engine": it failed; "policy": it wrote no plan


class Growth:
    """One process. `run` ends with a picture, or raises Ungrown or, for the first draft, RenderError.

    `end`: "done" (the policy's decision), "cycles", "renders", "tokens" (budgets), "format" (a stage that could not be
    read, `attempts` times), "engine/<kind>". A draft that fails later, and what ends early, keeps the last draft.
    """

    def __init__(
        self,
        request: str,
        talk: Talk,
        draw: Draw,
        settings: GrowthSettings,
        record: Record,
        seed: int,
        incidents: Incidents | None = None,
    ) -> None:
        self.request, self.talk, self.settings, self.record, self.seed = request, talk, settings, record, seed
        self._draw_with = draw
        self._incidents = incidents or Incidents()
        self.messages: list[Message] = []
        self.picture: np.ndarray | None = None
        self.prompt = ""  # what the picture was drawn from
        self.end = ""
        self._drafts = self._asked = 0
        self._unread: list[str] = []
        self._unseen: list[SeenImage] = []

    async def run(self, references: int = 0) -> np.ndarray:
        """uint8 [height, width, 3]: the last good draft; `references`: pictures the renderer is given besides."""
        s = self.settings
        system = instruction(s.prompts, s.max_cycles, references)
        question = harmless(self.request, self.talk.markers)
        self.talk.begin(system, question)
        self.messages += [Message("system", system), Message("user", question)]
        asked, limit = self.talk.prompt_tokens, s.max_prompt_tokens
        if limit is not None and asked > limit:
            raise Ungrown(f"prompt of {asked} tokens exceeds {limit}", "bad_arguments", "engine")
        cycle = 0
        while not self.end:
            await self._cycle(cycle)
            cycle += 1
        self._hand_over()
        if self.picture is None:
            raise Ungrown(f"no plan could be drawn: {self._last_fault()}", "bad_response", "policy")
        return self.picture

    async def _cycle(self, n: int) -> None:
        """One round; sets `end` where there is no further one."""
        plan = await self._stage("plan", n, Plan.parse, ends=n > 0)
        if plan is None:
            return
        last = n + 1 == self.settings.max_cycles
        if not await self._draft("sketch", n, self._prompt(plan, plan.instruction), last):
            return
        found = await self._stage("inspect", n, Inspection.parse)
        if found is None:
            return
        self.record.note(verdict=_verdict(found))
        if found.sound:
            self._onward(last)
            return
        if self._renders_left() < 1:
            self.end = "renders"
            return
        self._observe(next_stage("refine"))
        correction = await self._stage("refine", n, Correction.parse)
        if correction is not None:
            prompt = self._prompt(plan, correction.text) if self.settings.prompts == "edit" else correction.text
            await self._draft("refine", n, prompt, last)

    def _prompt(self, plan: Plan, change: str) -> str:
        return f"{change} {plan.description}" if self.settings.prompts == "edit" else plan.description

    def _onward(self, last: bool) -> None:
        """Ask for the next plan, if there may be one."""
        if last:
            self.end = "cycles"
        elif self._renders_left() < 1:
            self.end = "renders"
        else:
            self._observe(next_stage("plan", ends=True))

    # --- the policy's turn --------------------------------------------------------------------------------------------

    async def _stage(self, stage: StageName, n: int, read: Callable[[str], T], ends: bool = False) -> T | None:
        """What the policy wrote, asked again while it cannot be read; None where the process ends here."""
        for left in range(self.settings.attempts - 1, -1, -1):
            reply = await self._ask(stage, n)
            if reply is None:
                return None
            text = _THOUGHT.sub("", reply.text, count=1)
            if ends and is_end(text):
                self.record.note(ended=True)
                self.end = "done"
                return None
            try:
                said = read(text)
                self.record.note(read=asdict(said))
                return said
            except StageError as error:
                fault = str(error) if reply.ended else "it was cut off before its end"
            self.record.note(fault=one_line(fault, 300), kind="bad_response")
            if self.record.fresh:
                self._incidents.note("process", "bad_response")
            if left:
                self._observe(unreadable(harmless(one_line(fault, 160), self.talk.markers), stage, ends))
        self.end = "format"
        return None

    async def _ask(self, stage: StageName, n: int) -> Reply | None:
        self._hand_over()
        s = self.settings
        budget = min(s.max_tokens_per_stage, s.max_tokens - self.talk.response_tokens)
        if budget < 1:
            self.end = "tokens"
            return None
        sampling = Sampling(s.temperature, s.top_p, budget, sampling_mask=s.sampling_mask)
        try:
            reply = await self.record.ask(self.talk, sampling, stage, n, self.seed * 1000 + self._asked)
        except EngineError as error:
            self._incidents.note("process", error.kind)
            if self.picture is None:
                raise Ungrown(str(error), error.kind, "engine") from error
            self.end = f"engine/{error.kind}"
            return None
        self._asked += 1
        self.talk.keep(reply, None)
        self.messages.append(Message("assistant", reply.text))
        return reply

    # --- the renderer's turn ------------------------------------------------------------------------------------------

    async def _draft(self, stage: StageName, n: int, prompt: str, last: bool) -> bool:
        """Draw and show it; asks for what comes next. False where it failed, and the last draft stays."""
        self._drafts += 1
        first = self.picture is None

        async def draw() -> np.ndarray:
            return await self._draw_with(prompt, self.picture, self.seed)

        pixels = await self.record.draft(draw, stage, n, self.seed, prompt, needed=first)
        if pixels is None:
            step = self.record.steps[-1]
            if self.record.fresh:
                self._incidents.note("draft", step.kind)
            self._observe(not_drawn(harmless(step.kind, self.talk.markers)))
            self._onward(last)
            return False
        self.picture, self.prompt = pixels, prompt
        self._show(pixels)
        if stage == "refine":
            self._onward(last)
        else:
            self._observe(next_stage("inspect"))
        return True

    def _renders_left(self) -> int:
        return self.settings.max_renders - self._drafts

    def _show(self, pixels: np.ndarray) -> None:
        name = f"DRAFT_{self._drafts:03d}"
        seen = SeenImage(name, FoundImage(name, pixels), image_hash(pixels))
        self._observe(f"{name}\n{IMAGE_MARK}", seen)

    def _observe(self, text: str, *images: SeenImage) -> None:
        """What the policy reads before it writes next."""
        self._unread.append(text)
        self._unseen += images

    def _hand_over(self) -> None:
        if not self._unread:
            return
        body = "\n".join(["<tool_response>", *self._unread, "</tool_response>"])
        self.talk.observe(body, self._unseen)
        self.messages.append(Message("user", body.replace(IMAGE_MARK, "<image>")))
        self._unread, self._unseen = [], []

    def _last_fault(self) -> str:
        faults = [s.fault for s in self.record.steps if s.fault]
        return faults[-1] if faults else f"the budget of {self.end} is used up"


def _verdict(found: Inspection) -> str:
    faults = {"plan": found.plan, "draft": found.draft}
    return "; ".join(f"{what}: {fault}" for what, fault in faults.items() if fault) or "sound"
