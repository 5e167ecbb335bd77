"""Scores, advantages and typed outcomes; comparison, memory and retrieval."""

from __future__ import annotations

import asyncio
import math
import subprocess
import sys

import numpy as np
import pytest

from genevolve_fast.experience.bundle import best_and_worst
from genevolve_fast.experience.context import render
from genevolve_fast.experience.embedder import HashedNgramEmbedder
from genevolve_fast.experience.memory import ExperienceMemory
from genevolve_fast.protocols import Experience, ImageVerdict, JudgeError, ProgramVerdict, RenderError
from genevolve_fast.reward.advantages import advantages
from genevolve_fast.reward.kscore import judged
from genevolve_fast.reward.scoring import score
from genevolve_fast.trajectory import Failed, Judged, Message, Program, Request, Trajectory, Turn


def test_kscore_weights_and_the_not_applicable_rule():
    full = judged(ImageVerdict(1, 0.5, 1, 0.5, True), ProgramVerdict(0.75))
    assert full.kscore == pytest.approx(0.1 + 0.2 + 0.4 + 0.05) and full.reward == pytest.approx((0.75 + 0.75) / 2)
    no_text = judged(ImageVerdict(1, 1, 1, 1, False), ProgramVerdict(1.0))
    assert no_text.kscore == pytest.approx(0.8) and no_text.text_accuracy == 0.5
    for image, program in ((ImageVerdict(0.7, 1, 1, 1, True), 1.0), (ImageVerdict(1, 1, 1, 1, True), 0.6)):
        with pytest.raises(JudgeError):
            judged(image, ProgramVerdict(program))


def test_advantages_by_hand():
    rewards = [0.2, None, 0.8, 0.5]
    values = np.array([0.2, 0.8, 0.5])
    got = advantages(rewards)
    assert got[1] == 0 and np.allclose(got[[0, 2, 3]], (values - 0.5) / (0.3 + 1e-6), atol=1e-12)
    assert np.allclose(advantages(rewards, "dr_grpo")[[0, 2, 3]], values - 0.5)
    assert np.allclose(advantages(rewards, "rloo")[0], 0.2 - (0.8 + 0.5) / 2)
    assert got.dtype == np.float64


@pytest.mark.parametrize("rewards", [[0.4], [None, 0.4], [0.4, 0.4 + 5e-7, 0.4], [None, None], []])
def test_no_spread_gives_exactly_zero(rewards):
    assert not advantages(rewards).any()


def test_wrong_advantage_arguments():
    with pytest.raises(ValueError, match="finite"):
        advantages([0.1, math.nan])
    with pytest.raises(ValueError, match="estimator"):
        advantages([0.1, 0.2], "mean")


def rollout(i: int, reward: float | None = None, **changes) -> Trajectory:
    mask = np.array([False, False, True])
    t = Trajectory(
        id=f"r{i}",
        request_id="q",
        group_id="g",
        ids=np.arange(3),
        loss_mask=mask,
        rollout_logps=np.zeros(3, np.float32),
        request_stop=1,
        turns=(Turn("user", 0, 2), Turn("assistant", 2, 3)),
        program=Program("a"),
        termination="answer",
        outcome=None if reward is None else Judged(reward, reward, reward),
    )
    return t.replace(**changes)


class Renderer:
    name, min_references, max_references = "r", 0, 2

    def __init__(self, act):
        self.act = act

    async def render(self, program, references, seed):
        return await self.act()


class Judge:
    def __init__(self, verdict):
        self.verdict = verdict

    async def judge(self, *_):
        if isinstance(self.verdict, Exception):
            raise self.verdict
        return self.verdict


PICTURE = np.zeros((2, 2, 3), np.uint8)


async def paints():
    return PICTURE


async def breaks():
    raise RenderError("GPU lost")


async def hangs():
    await asyncio.sleep(30)


def outcome(t, act=paints, image=ImageVerdict(1, 1, 1, 1, True), program=ProgramVerdict(1.0), timeout_s=5.0):  # noqa: B008
    scored, picture = asyncio.run(
        score(
            Request("q", "draw"),
            t,
            renderer=Renderer(act),
            image_judge=Judge(image),
            program_judge=Judge(program),
            truth=PICTURE,
            images={},
            seed=0,
            timeout_s=timeout_s,
        )
    )
    return scored.outcome, picture


def test_failures_are_typed_and_never_zero():
    assert outcome(rollout(0)) == (Judged(1.0, 1.0, 1.0, 1, 1, 1, 1, True), PICTURE)
    assert outcome(rollout(0), breaks)[0] == Failed("render", "GPU lost")
    assert outcome(rollout(0), hangs, timeout_s=0.05)[0] == Failed("render", "no picture within 0.05 s", "timeout")
    assert outcome(rollout(0), image=JudgeError("429"))[0] == Failed("judge", "429")
    assert outcome(rollout(0), program=ProgramVerdict(0.3))[0].stage == "judge"
    assert outcome(rollout(0, outcome=Failed("engine", "x")))[0] == Failed("engine", "x")


def test_the_policys_own_faults_are_zero():
    for t in (rollout(0, program=None), rollout(0, error="invalid program: no")):
        got, picture = outcome(t, breaks)
        assert isinstance(got, Judged) and got.reward == 0 and picture is None


def test_best_and_worst_need_a_gap():
    group = [rollout(0, 0.5), rollout(1, 0.9), rollout(2, None), rollout(3, 0.4), rollout(4, 0.9)]
    best, worst = best_and_worst(group)
    assert (best.id, worst.id) == ("r1", "r3")
    assert best_and_worst([rollout(0, 0.5), rollout(1, 0.69)]) is None
    assert best_and_worst([rollout(0, 0.5), rollout(1, 0.7)]) is not None
    assert best_and_worst([rollout(0, 0.5), rollout(1, None)]) is None


def lesson(text: str) -> Experience:
    return Experience(search_strategy=text)


def test_memory_keeps_wide_gaps_longer_and_stays_bounded():
    memory = ExperienceMemory(HashedNgramEmbedder(), capacity=20)
    for i in range(20):
        memory.insert(f"request number {i}", lesson(str(i)), gap=0.9 if i == 0 else 0.3, step=i)
    memory.insert("one more", lesson("new"), gap=0.5, step=20)
    kept = [b.experience.search_strategy for b in memory.bundles]
    assert len(kept) == 20 and kept[0] == "0" and "1" not in kept and kept[-1] == "new"


def test_retrieval_takes_the_nearest_above_the_threshold():
    memory = ExperienceMemory(HashedNgramEmbedder(), similarity=0.84)
    memory.insert("Draw three red circles in a row at the top on a white background.", lesson("count"), gap=0.4, step=0)
    memory.insert("Paint the emblem of Bel Abo on its field colour.", lesson("search"), gap=0.4, step=0)
    near = memory.retrieve("Draw three red circles in a row at the top on a yellow background.")
    assert near == lesson("count") and memory.retrieve("a violin at dawn") is None
    memory.insert("Paint the emblem of Bel Abo on its field colour.", lesson("newer"), gap=0.2, step=1)
    assert memory.retrieve("Paint the emblem of Bel Abo on its field colour.") == lesson("newer")


def test_memory_survives_a_save(tmp_path):
    memory = ExperienceMemory(HashedNgramEmbedder(), capacity=7, similarity=0.5)
    memory.insert("a red circle", lesson("x"), gap=0.4, step=3)
    memory.save(tmp_path / "memory")
    back = ExperienceMemory.load(tmp_path / "memory", HashedNgramEmbedder())
    assert back.bundles == memory.bundles and back.retrieve("a red circle") == lesson("x")
    assert (back.capacity, back.similarity) == (7, 0.5)


def test_embeddings_are_stable_unit_vectors():
    e = HashedNgramEmbedder()
    v = e.embed(["Draw a Circle", "draw  a circle", "", "something else"])
    assert np.allclose(np.linalg.norm(v, axis=1), [1, 1, 0, 1]) and v[0] @ v[1] > 0.999 and v[0] @ v[3] < 0.3
    child = "from genevolve_fast.experience.embedder import HashedNgramEmbedder as E\n"
    child += "print(E().embed(['abc']).tobytes().hex())"
    other = subprocess.run([sys.executable, "-c", child], capture_output=True, text=True, check=True).stdout.strip()
    assert other == e.embed(["abc"]).tobytes().hex()


def test_experience_block_lists_its_slots():
    text = render(Experience(search_strategy="a", failure_avoidance="b"))
    assert text == "<experience>\n- a\n- b\n</experience>"
    assert Message("user", "draw" + text).content.startswith("draw<experience>")
