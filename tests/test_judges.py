"""Judges against the truth of broken scenes; the demonstrator's habits, one by one; what the comparer names."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from defects import DEFECTS, cases
from rollouts import demonstrated

from genevolve_fast.protocols import Experience, JudgeError
from genevolve_fast.sandbox.canvas import draw_program, draw_reference, draw_scene
from genevolve_fast.sandbox.comparer import PHRASES, RuleComparer, experience_for, habits_in
from genevolve_fast.sandbox.demonstrator import OBEDIENCE, Demonstrator, PerfectDemonstrator
from genevolve_fast.sandbox.habits import FITTING_SKILL, HABITS, applicable, observed
from genevolve_fast.sandbox.judges import SandboxImageJudge, SandboxProgramJudge, judge_picture, judge_program
from genevolve_fast.sandbox.scene import Item, Scene
from genevolve_fast.sandbox.world import MOTTOS, SandboxWorld, open_world
from genevolve_fast.train.collect import Rollouts, judge_rollouts
from genevolve_fast.trajectory import Program, Reference, Request

WORLD = SandboxWorld()


@pytest.mark.slow
def test_image_judge_agrees_with_the_truth():
    made = cases(96, seed=5)
    assert {c.defect for c in made} == set(DEFECTS)
    for name in made[0].truth:
        wrong = [c.defect for c in made if getattr(verdict(c), name) != c.truth[name]]
        assert len(wrong) <= 0.03 * len(made), (name, wrong)


def verdict(case):
    return judge_picture(case.scene, case.picture, draw_scene(case.scene))


def test_perfect_pictures_and_programs_get_full_marks():
    for request in WORLD.requests("bench", 40):
        scene = Scene.from_json(request.extra["checklist"])
        seen = judge_picture(scene, draw_scene(scene), draw_scene(scene))
        assert (seen.faithfulness, seen.visual_correctness, seen.aesthetics) == (1, 1, 1)
        assert seen.text_accuracy == (1 if scene.texts else 0.5) and seen.text_required == bool(scene.texts)
        assert all(d.verdict in ("pass", "not applicable") for d in seen.diagnostics)


SCENE = Scene("white", (Item("object", "circle", "top left", "red"), Item("object", "star", "center", "blue")))
PROGRAMS = {
    "Background white. A red circle at the top left. A blue star at the center.": 1.0,
    "A red circle at the top left. A blue star at the center.": 0.75,
    "Background white. A red circle at the top left and a blue star at the center.": 1.0,
    "Background white. A red circle at the top left.": 0.5,
    "Background white. A red circle at the center. A blue star at the top left.": 0.5,
    "Background white. A red circle at the top left. A blue star at the center. A green ring at the top right.": 0.75,
    "Something else entirely.": 0.0,
}


@pytest.mark.parametrize("prompt", PROGRAMS)
def test_program_judge_counts_stated_facts(prompt):
    assert judge_program(SCENE, Program(prompt), "").score == PROGRAMS[prompt]


def test_program_judge_understands_rows_and_relations():
    row = Scene("white", tuple(Item("object", "star", f"top {c}", "red") for c in ("left", "center", "right")))
    assert judge_program(row, Program("Background white. Three red stars at the top."), "").score == 1
    assert judge_program(row, Program("Background white. Two red stars at the top."), "").score < 1
    sides = Scene(
        "blue", (Item("object", "star", "middle left", "red"), Item("object", "ring", "middle right", "black"))
    )
    assert judge_program(sides, Program("Background blue. A red star left of a black ring."), "").score == 1


def test_program_judge_wants_the_right_emblem_bound():
    scene = Scene("white", (Item("emblem", "key", "center", "red"),))
    bound = "Background white. The emblem of the first reference image at the center."
    right, wrong = (Reference("IMG_001", title=t) for t in ("emblem of Bel Abo", "map of Bel Abo"))
    assert judge_program(scene, Program(bound, (right,)), "Bel Abo").score == 1
    assert judge_program(scene, Program(bound, (wrong,)), "Bel Abo").score == 0
    assert (
        judge_program(scene, Program(bound.replace("first reference image", "place"), (right,)), "Bel Abo").score == 0
    )


def test_judges_need_a_checklist_and_a_picture_of_the_right_size():
    bare = Request("a", "draw")
    with pytest.raises(JudgeError, match="checklist"):
        asyncio.run(SandboxImageJudge().judge(bare, draw_scene(SCENE), draw_scene(SCENE)))
    with pytest.raises(JudgeError, match="checklist"):
        asyncio.run(SandboxProgramJudge().judge(bare, Program("a")))
    with pytest.raises(JudgeError, match="96"):
        judge_picture(SCENE, np.zeros((8, 8, 3), np.uint8), draw_scene(SCENE))


# --- demonstrator and comparer ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def codec(tokenizer):
    from genevolve_fast.policy.codec import TransformersCodec
    from genevolve_fast.sandbox.tiny_policy import image_processor

    return TransformersCodec(tokenizer, image_processor())


def judged(codec, requests, demonstrator, seed=0):
    trajectories, images = demonstrated(WORLD, codec, requests, demonstrator, seed)
    rollouts = Rollouts(tuple(trajectories), images, {})
    return judge_rollouts(rollouts, {r.id: r for r in requests}, open_world(WORLD))


@pytest.mark.parametrize("split", ["train", "bench"])
def test_every_habit_right_is_the_best_possible(codec, split):
    requests = WORLD.requests(split, 25)
    rollouts = judged(codec, requests, PerfectDemonstrator())
    for request, t in zip(requests, rollouts.trajectories, strict=True):
        assert np.array_equal(rollouts.pictures[t.id], WORLD.truth(request))
        assert t.outcome.reward == pytest.approx(1.0 if t.outcome.text_required else 0.9)
        assert all(observed(request, t.messages, t.program).values())


@pytest.mark.slow
def test_one_wrong_habit_is_seen_and_costs(codec):
    requests = WORLD.requests("train", 50)
    best = judged(codec, requests, PerfectDemonstrator())
    for habit in HABITS:
        wrong = judged(codec, requests, Demonstrator(dict.fromkeys(HABITS, 1.0) | {habit: 0.0}))
        costs = []
        for request, good, bad in zip(requests, best.trajectories, wrong.trajectories, strict=True):
            seen = observed(request, bad.messages, bad.program)
            missing = {h for h, done in seen.items() if not done}
            expected = {habit} & set(applicable(request))
            if expected == {"fitting_skill"}:
                expected |= {"apply_rule"}  # without the guidance there is no rule to apply
            assert missing == expected, (habit, request.category)
            if expected:
                costs.append(good.reward - bad.reward)
                named = asyncio.run(RuleComparer().compare(request, good, bad))
                assert habits_in(named) == expected
        assert np.mean(costs) > 0.05, habit


def test_coins_are_independent_and_fair():
    demonstrator = Demonstrator()
    drawn = [demonstrator.decisions(r, seed) for seed in range(20) for r in WORLD.requests("train", 50)]
    for habit, probability in HABITS.items():
        coins = [d[habit] for d in drawn if habit in d]
        assert abs(np.mean(coins) - probability) < 0.06, habit
    both = [(d["search_fact"], d["ordinal_binding"]) for d in drawn if "search_fact" in d]
    assert abs(np.corrcoef(np.array(both).T)[0, 1]) < 0.12


def test_experience_is_obeyed_in_what_it_names():
    stubborn = Demonstrator(dict.fromkeys(HABITS, 0.0))
    obeyed = []
    for request in WORLD.requests("train", 20):
        for habit in applicable(request):
            lesson = experience_for([habit], request)
            assert habits_in(lesson) == {habit}
            decisions = [stubborn.decisions(request, seed, lesson) for seed in range(20)]
            assert not any(right for d in decisions for name, right in d.items() if name != habit)
            obeyed += [d[habit] for d in decisions]
    assert abs(np.mean(obeyed) - OBEDIENCE) < 0.03


def test_experience_never_quotes_a_fact():
    text = " ".join(sentence for _, sentence in PHRASES.values()) + " ".join(FITTING_SKILL.values())
    assert not [m for m in MOTTOS if m in text] and not [e.name for e in WORLD.all_entities if e.name in text]
    assert habits_in(Experience()) == set()


@pytest.mark.slow
def test_the_demonstrator_is_as_good_as_its_habits(codec):
    reward = np.mean([t.reward for t in judged(codec, WORLD.requests("bench", 60), Demonstrator()).trajectories])
    assert 0.45 < reward < 0.68


def test_wrong_references_are_drawn_as_they_are():
    emblem = draw_reference("key", "red")
    prompt = "Background white. The emblem of the first reference image at the center."
    truth = Scene("white", (Item("emblem", "key", "center", "red"),))
    assert judge_picture(truth, draw_program(prompt, [emblem], 0), draw_scene(truth)).visual_correctness == 1
    other = judge_picture(truth, draw_program(prompt, [draw_reference("crown", "red")], 0), draw_scene(truth))
    assert other.visual_correctness == 0.5 and other.faithfulness == 0
