"""Processes as rollouts: trajectories with drafts in tool turns, trained by the same step, compared by stage."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace

import numpy as np
import pytest
from naive import gradient, naive_loss
from written import Blind, Forgetful, Spoiler, WritingEngine

from genevolve_fast.batch.groups import TrainingRollout
from genevolve_fast.experience.leaks import Secrets
from genevolve_fast.experience.summarizer import INSTRUCTION, STAGES, comparison_text
from genevolve_fast.ops import Objective
from genevolve_fast.process.growing import GrowthSettings
from genevolve_fast.process.rollouts import judge_processes, run_process, sample_processes
from genevolve_fast.process.stagewise import PHRASES, cycles_of, findings, first_difference, stage_experience
from genevolve_fast.process.trace import Inspection, Plan, stage_mask, supervised
from genevolve_fast.protocols import RenderError
from genevolve_fast.sandbox.canvas import CanvasRenderer
from genevolve_fast.sandbox.process_comparer import StageComparer
from genevolve_fast.sandbox.process_writer import SymbolicWriter
from genevolve_fast.sandbox.scene import Item, Scene
from genevolve_fast.sandbox.world import SandboxWorld, open_world
from genevolve_fast.train.update import accumulate_gradients
from genevolve_fast.trajectory import STAGES as ALL
from genevolve_fast.trajectory import Failed, Judged, Request, load, save

CHECKLIST = Scene(
    "white", (Item("object", "ring", "middle left", "red"), Item("object", "star", "middle right", "blue"))
)
REQUEST = Request(
    "r1", "Background white. A red ring left of a blue star.", category="relation",
    extra={"checklist": CHECKLIST.to_json(), "entity": ""},
)  # fmt: skip
ROOMY = GrowthSettings(max_tokens=100_000, max_tokens_per_stage=4000)


@pytest.fixture(scope="module")
def codec(tokenizer):
    from genevolve_fast.policy.codec import TransformersCodec
    from genevolve_fast.sandbox.tiny_policy import image_processor

    return TransformersCodec(tokenizer, image_processor())


@pytest.fixture(scope="module")
def world():
    return open_world(SandboxWorld())


def sampled(codec, world, *scripts, settings=ROOMY):
    """A judged group of REQUEST, one rollout a script."""
    engine = WritingEngine(codec, lambda session: scripts[int(session.rpartition("/")[2])]())
    rollouts = sample_processes(
        [REQUEST], len(scripts), world=world, engine=engine, codec=codec, settings=settings, seed=0
    )
    return judge_processes(rollouts, {REQUEST.id: REQUEST}, world)


@pytest.fixture(scope="module")
def group(codec, world):
    return sampled(codec, world, SymbolicWriter, Blind, Spoiler, Forgetful)


# --- trajectories -----------------------------------------------------------------------------------------------------


def test_a_process_is_a_trajectory_whose_drafts_are_images_in_tool_turns(codec, group, tmp_path):
    t = group.trajectories[0]
    assert [(s.name, s.cycle, s.drawn) for s in t.stages] == [
        ("plan", 0, False), ("sketch", 0, True), ("inspect", 0, False), ("refine", 0, False), ("refine", 0, True),
    ]  # fmt: skip
    role = {turn.role for s in t.stages if s.drawn for turn in t.turns if turn.start <= s.start < turn.stop}
    assert role == {"tool"} and t.termination == "done"
    for s in t.stages:
        if s.drawn:
            assert codec.decode(t.ids[[s.start, s.stop - 1]].tolist()) == "<|vision_start|><|vision_end|>"
    texts = {s.name: text for s, text in t.stage_texts()}
    for s, text in t.stage_texts():
        assert codec.decode(t.ids[s.start : s.stop].tolist()) == text
    assert Plan.parse(texts["plan"]).description == "Background white. A red ring left of a blue star."
    assert t.program.gen_prompt == "Background white. A red ring at the middle left. A blue star at the middle right."
    assert isinstance(t.outcome, Judged) and t.outcome.kscore == pytest.approx(0.8) and t.outcome.program == 1
    assert np.array_equal(group.pictures[t.id], group.images[t.images[-1].sha256])
    save(tmp_path / "t.safetensors", [t], group.images)
    (again,), _ = load(tmp_path / "t.safetensors")
    assert again.stages == t.stages and again.stages[-1].score == pytest.approx(t.outcome.kscore)


def test_masks_select_the_stages_they_name(codec, group):
    t = group.trajectories[0]

    def read(mask) -> str:
        return codec.decode(t.ids[mask].tolist())

    texts = [text for _, text in t.stage_texts()]
    assert read(stage_mask(t, ["plan"], switches=False)) == texts[0]
    assert read(stage_mask(t, ["inspect", "refine"], switches=False)) == texts[1] + texts[2]
    assert read(stage_mask(t, [])) == "<|im_end|>" * 3 + "done<|im_end|>"  # what opens or forgoes a draft
    assert read(t.decision_mask) == "".join(texts) + "done"
    assert (stage_mask(t, ALL) == t.loss_mask).all()


def test_the_policys_noise_is_asked_again_and_is_worth_nothing(policy, world):
    from genevolve_fast.rollout.transformers_engine import TransformersEngine

    settings = GrowthSettings(max_tokens_per_stage=16, attempts=3, top_p=1.0)
    engine = TransformersEngine(policy)
    rollouts = sample_processes([REQUEST], 2, world=world, engine=engine, codec=policy.codec, settings=settings, seed=1)
    judged = judge_processes(rollouts, {REQUEST.id: REQUEST}, world)
    engine.shutdown()
    for t in judged.trajectories:
        assert t.rounds == 3 and t.program is None and t.termination == "format" and t.reward == 0
        assert [s.name for s in t.stages] == ["plan"] * 3 and not t.decision_mask.any()
        assert t.num_loss_tokens >= 3 and (t.rollout_logps[t.loss_mask] < 0).all()
        assert stage_mask(t, ["plan"], switches=False).sum() >= t.num_loss_tokens - 3
    assert world.incidents.take() == {"process/bad_response": 6}
    metrics, _ = accumulate_gradients(
        policy,
        [TrainingRollout(t, a) for t, a in zip(judged.trajectories, (1.0, -1.0), strict=True)],
        judged.images, Objective(kl_coef=0.0), temperature=0.7, max_tokens=10**6,
    )  # fmt: skip
    assert metrics["rollout_corr/logp_difference_abs"] < 2e-3 and gradient(policy).norm() > 0


def test_failures_of_engine_and_renderer_are_typed(codec, world):
    class Broken(CanvasRenderer):
        async def render(self, program, references, seed):
            raise RenderError("away", "connect")

    class Dead(WritingEngine):
        async def generate(self, *arguments):
            from genevolve_fast.protocols import EngineError

            raise EngineError("gone", "server_error")

    def outcome(renderer, engine):
        done = asyncio.run(
            run_process(
                REQUEST,
                engine=engine,
                codec=codec,
                renderer=renderer,
                settings=ROOMY,
                rollout_id="a",
                group_id="a",
                seed=0,
            )  # fmt: skip
        )
        return done.trajectory.outcome

    assert outcome(Broken(), WritingEngine(codec)) == Failed("tool", "the renderer failed: away", "connect")
    assert outcome(CanvasRenderer(), Dead(codec)) == Failed("engine", "gone", "server_error")
    tight = asyncio.run(
        run_process(
            REQUEST, engine=WritingEngine(codec), codec=codec, renderer=CanvasRenderer(), rollout_id="a", group_id="a",
            seed=0, settings=replace(ROOMY, max_prompt_tokens=20),
        )
    ).trajectory  # fmt: skip
    assert tight.outcome.kind == "bad_arguments" and not tight.loss_mask.any()
    needy = CanvasRenderer()
    needy.min_references = 1
    with pytest.raises(ValueError, match="needs references"):
        sample_processes(
            [REQUEST], 1, world=replace(world, renderer=needy), engine=WritingEngine(codec), codec=codec,
            settings=ROOMY, seed=0,
        )  # fmt: skip


# --- the same objective -----------------------------------------------------------------------------------------------


def step(policy, batch, images, objective):
    policy.zero_grad()
    accumulate_gradients(policy, batch, images, objective, temperature=0.7, max_tokens=10**6)
    return gradient(policy)


def test_stages_change_nothing_of_the_gradient(policy, group):
    """What trains a process is ids and mask: without its stages the same rollout has the same gradient, bit for bit."""
    objective = Objective(kl_coef=0.0)
    ts = [t.replace(rollout_logps=t.rollout_logps) for t in group.trajectories[:2]]
    whole = step(policy, [TrainingRollout(t, a) for t, a in zip(ts, (1.0, -0.5), strict=True)], group.images, objective)
    bare = [t.replace(stages=(), messages=()) for t in ts]
    plain = step(
        policy, [TrainingRollout(t, a) for t, a in zip(bare, (1.0, -0.5), strict=True)], group.images, objective
    )
    assert whole.norm() > 0 and (whole == plain).all()
    (only,) = supervised(ts[:1], ["plan"], switches=False)
    part = step(policy, [TrainingRollout(only, 1.0)], group.images, objective)
    assert part.norm() > 0 and (part - whole).norm() > 1e-3 * whole.norm()


@pytest.mark.slow
@pytest.mark.parametrize("stages", [ALL, ("plan",), ("inspect", "refine")])
@pytest.mark.parametrize("taught", [False, True])
def test_a_process_rollouts_gradient_equals_the_plain_path(policy, group, stages, taught):
    """Against transformers' own forward over the same ids, one sequence at a time, in float64."""
    ts = list(supervised(group.trajectories[:3], stages, switches=stages == ALL))
    patch = (41, 50, 60) if taught else ()
    batch = [TrainingRollout(t, a, patch) for t, a in zip(ts, (1.0, -0.5, 0.3), strict=True)]
    objective = Objective(kl_coef=0.0, sdl_scope="decision")
    policy.double()
    naive_loss(policy, batch, group.images, objective, 0.7).backward()
    want = gradient(policy)
    got = step(policy, batch, group.images, objective)
    assert want.norm() > 0 and (got - want).norm() <= 1e-5 * want.norm()


PROCESS = {
    "process.enabled": True, "process.max_cycles": 2, "rollout.max_tokens_per_turn": 400,
    "world.categories": "[relation]",
}  # fmt: skip
STEP = {
    "name": "p", "steps": 2, "checkpoint.every": 2, "pool_size": 20, "rollout.prompts_per_step": 2,
    "rollout.num_generations": 2, "experience.min_gap": 0.1, "threads": 1, "policy.dtype": "float32",
}  # fmt: skip


def configured(**fields):
    from genevolve_fast.train.config import EvolveConfig, load_config

    told = STEP | PROCESS | fields
    return load_config(EvolveConfig, None, [f"{name}={value}" for name, value in told.items()])


@pytest.mark.slow
def test_an_evolve_step_trains_on_processes_and_teaches_by_stages(policy, tmp_path, monkeypatch):
    """The whole loop, with scripts in the engine's place: a good one and one that inspects blindly, in every group."""
    from genevolve_fast.commands.opening import open_pool
    from genevolve_fast.report.build import build_report
    from genevolve_fast.train import evolve as module

    class Scripts(WritingEngine):
        def nothing(self, *_: object) -> None: ...

        wake = sleep = update_weights = shutdown = nothing

    def script(session: str) -> SymbolicWriter:
        return Blind() if session.endswith("1") else SymbolicWriter()

    monkeypatch.setattr(module, "open_engine", lambda *a, **k: Scripts(policy.codec, script))
    config = configured()
    pool, world = open_pool(config)
    before = gradient(policy).shape, policy.head_weight.detach().clone()
    module.evolve(config, policy, world, pool, tmp_path)
    ts, images = load(tmp_path / "rollouts" / "step_000000.safetensors")
    assert len(ts) == 4 and all({s.name for s in t.stages} >= {"plan", "sketch", "inspect"} for t in ts)
    assert all(s.score is not None for t in ts for s in t.stages if s.drawn)
    assert ts[0].reward > ts[1].reward
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and rows[0]["experience/used"] == 2 and rows[0]["actor/sdl_selected_fraction"] > 0
    assert rows[0]["actor/grad_norm"] > 0 and not (policy.head_weight == before[1]).all()
    html = build_report(tmp_path, policy.codec.decode).read_text()
    assert '"stage": "sketch"' in html and "look at every part of the draft" in html


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rollout.max_rounds": 3}, "rollout.max_rounds with process.enabled would do nothing"),
        ({"renderer.kind": "process"}, "the policy grows the picture"),
        ({"process.enabled": False}, "max_cycles without enabled would do nothing"),
        ({"process.max_renders": 4}, "2 cycles draw no more"),
        ({"world.categories": "[]"}, "what emblem_field and emblem_motto ask for has to be searched"),
        ({"world.categories": "[relation, emblem_field]"}, "process.enabled needs world.categories of count_row"),
    ],
)
def test_training_on_processes_refuses_what_would_do_nothing(fields, message):
    from genevolve_fast.train.config import ConfigError

    with pytest.raises(ConfigError, match=message):
        configured(**fields)


def test_a_renderer_that_needs_references_begins_no_process():
    from genevolve_fast.commands.opening import open_pool
    from genevolve_fast.train.config import ConfigError

    with pytest.raises(ConfigError, match="draws nothing without references"):
        open_pool(configured(**{"renderer.kind": "qwen-service", "renderer.urls": "[http://127.0.0.1:9]"}))
    with pytest.raises(ConfigError, match="edits no drafts"):
        open_pool(configured(**{"process.prompts": "edit"}))


# --- which stage went wrong -------------------------------------------------------------------------------------------


def test_drafts_are_scored_and_findings_name_cycle_and_stage(group):
    good, blind, spoiler, forgetful = group.trajectories
    (view,) = [v for v in cycles_of(good) if v.plan]
    assert view.draft < view.corrected and view.inspection.draft and view.mended
    assert [(f.what, f.mended) for f in findings(good)] == [("draft against plan", True)]
    (missed,) = findings(blind)
    assert (missed.stage, missed.what, missed.cycle) == ("inspect", "inspection missed a fault", 0)
    assert missed.skills == ("spatial_layout", "attribute_binding")
    assert ("refinement made it worse", "refine", 0) in [(f.what, f.stage, f.cycle) for f in findings(spoiler)]
    assert findings(forgetful)[0].what == "plan against request" and findings(forgetful)[0].skills


@pytest.mark.parametrize(
    ("worst", "what", "slot"),
    [
        (1, "inspection missed a fault", "failure_avoidance"),
        (2, "refinement made it worse", "failure_avoidance"),
        (3, "plan against request", "prompt_construction"),
    ],
)
def test_the_first_unmended_difference_becomes_experience_that_gives_nothing_away(group, worst, what, slot):
    best, other = group.trajectories[0], group.trajectories[worst]
    assert best.reward > other.reward
    difference = first_difference(best, other)
    assert difference.finding.what == what and PHRASES[what][0] == slot
    experience = asyncio.run(StageComparer().compare(REQUEST, best, other))
    assert experience == stage_experience(difference) and PHRASES[what][1] in getattr(experience, slot)
    secrets = Secrets(REQUEST, [best.program, other.program], ())
    assert not any(secrets.leak(text) for text in experience.slots().values())
    assert first_difference(best, best) is None


def test_no_phrase_gives_anything_away_and_each_names_its_slot(group):
    from genevolve_fast.process.stagewise import Difference, Finding

    secrets = Secrets(REQUEST, [group.trajectories[0].program], ())
    for what, (slot, _) in PHRASES.items():
        for cycle, last in ((0, False), (1, False), (2, True)):
            told = stage_experience(Difference(Finding(cycle, "plan", what, ("spatial_layout",)), last)).slots()
            assert set(told) == {slot, "knowledge_activation"}
            assert not any(secrets.leak(text) for text in told.values()), told


def test_ending_with_a_fault_that_was_found_is_a_finding(codec, world):
    (t,) = sampled(codec, world, SymbolicWriter, settings=replace(ROOMY, max_renders=1)).trajectories
    assert t.termination == "renders"
    assert ("fault left as it was", "refine") in [(f.what, f.stage) for f in findings(t)]


def test_the_chat_comparer_reads_stages_and_scores_and_is_told_about_them(group):
    from genevolve_fast.experience.summarizer import ChatSummarizer
    from genevolve_fast.incidents import Incidents

    best, worst = group.trajectories[:2]
    text = comparison_text(REQUEST, best, worst)
    assert '"draft_score": 0.8' in text and str(Inspection(reason="Everything is planned.")) in text
    asked = []

    class Asked:
        async def ask(self, question):
            asked.append(question)
            return question.check({slot: "Say red." if "prompt" in slot else "" for slot in question.keys}, True)

    plain = [t.replace(stages=()) for t in (best, worst)]
    for pair in ((best, worst), plain):
        asyncio.run(ChatSummarizer(Asked(), Incidents()).compare(replace(REQUEST, question="Draw it."), *pair))
    systems = [q.messages()[0]["content"] for q in asked]
    assert systems == [INSTRUCTION + STAGES, INSTRUCTION]
    assert asked[0].identity["instruction"] != asked[1].identity["instruction"]
    assert '"stages"' not in asked[1].messages()[1]["content"]


def test_rollouts_without_stages_are_compared_by_the_rules(group):
    from genevolve_fast.sandbox.comparer import RuleComparer

    best, worst = (group.trajectories[i].replace(stages=()) for i in (0, 1))
    want = asyncio.run(RuleComparer().compare(REQUEST, best, worst))
    assert want is not None and asyncio.run(StageComparer().compare(REQUEST, best, worst)) == want


def test_the_report_shows_the_drafts_of_a_rollout_with_their_scores(group):
    from genevolve_fast.report.build import ImageStore, stage_strip

    t = group.trajectories[0]
    cells = stage_strip(t, group.images, ImageStore())
    assert [(c["stage"], c["image"], c["score"]) for c in cells] == [
        ("sketch", 0, t.stages[1].score), ("refine", 1, t.stages[-1].score)
    ]  # fmt: skip
    assert cells[0]["said"].startswith("<ins>") and "draft:" in cells[0]["found"]
    assert cells[1]["said"].startswith("<refine>")
