"""Judges behind a chat endpoint, against a server process that judges by the sandbox's rules or misbehaves."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import io
import json
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hostile_judge_replies import GOOD, replies
from loopback.engine import LoopbackEngine
from loopback.judge import LoopbackJudge
from PIL import Image

from benchmarks import judge_faults
from genevolve_fast.incidents import Incidents
from genevolve_fast.net.pictures import judged_url
from genevolve_fast.net.replies import ReplyError, read_object
from genevolve_fast.protocols import SKILLS, ImageVerdict, JudgeError, ProgramVerdict
from genevolve_fast.reward.advantages import advantages
from genevolve_fast.reward.chat_judges import check_image_reply
from genevolve_fast.reward.config import JudgeConfig, open_judges
from genevolve_fast.reward.kscore import judged, kscore
from genevolve_fast.reward.scoring import score
from genevolve_fast.sandbox.canvas import CanvasRenderer, draw_program
from genevolve_fast.sandbox.judges import SandboxImageJudge, SandboxProgramJudge
from genevolve_fast.sandbox.scene import Scene
from genevolve_fast.sandbox.world import SandboxWorld
from genevolve_fast.trajectory import Failed, Program, Reference, Request, Trajectory, Turn

pytestmark = pytest.mark.slow

WORLD = SandboxWorld()
REQUESTS = WORLD.requests("train", 50)
SIMPLE = REQUESTS[3]
PROGRAMS = (
    Program("Background white. A red circle at the top left. A blue star at the center."),
    Program("Background blue. The text 'OPEN' at the top center. The text 'SHOP' at the bottom center."),
    Program("Background white. The emblem of the first reference image at the center."),
    Program("Two red stars in a row at the top. Background green."),
)


@pytest.fixture(scope="module")
def server():
    with LoopbackJudge(train=50) as judge:
        yield judge


@pytest.fixture(autouse=True)
def well(server):
    server.fault("")


def config(server, **changes) -> JudgeConfig:
    plain = dict(kind="chat", model="rules", base_url=server.base_url, attempts=1, patience_s=0, reasks=0)
    return JudgeConfig(**plain | changes)


def ask(server, *calls, incidents: Incidents | None = None, **changes) -> list:
    """What the judges say to `calls`, all at once: (request, picture) or (request, program)."""
    image, program = open_judges(config(server, **changes), incidents or Incidents(), WORLD.truth)

    async def one(request, shown):
        try:
            if isinstance(shown, Program):
                return await program.judge(request, shown)
            return await image.judge(request, shown, WORLD.truth(request))
        except JudgeError as error:
            return error

    async def main():
        return await asyncio.gather(*(one(*call) for call in calls))

    return asyncio.run(main())


def stating(request: Request) -> Program:
    """A program that says what the ground truth shows."""
    scene = Scene.from_json(request.extra["checklist"])
    said = [
        f"The text '{i.value}' at the {i.cell}." if i.kind == "text" else f"A {i.colour} {i.value} at the {i.cell}."
        for i in scene.items
    ]
    return Program(" ".join([f"Background {scene.background}.", *said]))


def mixed_pictures(n: int):
    """Right pictures, wrong ones, and what half a program draws."""
    for i, request in enumerate(REQUESTS[:n]):
        other = REQUESTS[(i + 7) % len(REQUESTS)]
        drawn = draw_program(PROGRAMS[i % 2].gen_prompt, [], i)
        yield request, (WORLD.truth(request), WORLD.truth(other), drawn)[i % 3]


# --- what they say ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [9, pytest.param(50, marks=pytest.mark.slow)])
def test_pictures_are_judged_as_by_the_rules_behind_the_endpoint(server, n):
    calls = list(mixed_pictures(n))
    said = ask(server, *calls)
    told = [asyncio.run(SandboxImageJudge().judge(r, p, WORLD.truth(r))) for r, p in calls]
    assert [dataclasses.replace(v, rationale="") for v in said] == told
    assert len({kscore(v) for v in said}) > 2 and all(v.rationale for v in said)


def test_programs_are_judged_as_by_the_rules_behind_the_endpoint(server):
    emblem = next(r for r in REQUESTS if r.category == "emblem_field")
    right = Reference("IMG_001", "its emblem", title=f"emblem of {emblem.extra['entity']}")
    calls = [(r, p) for r in REQUESTS[:4] for p in (*PROGRAMS, stating(r))]
    calls.append((emblem, Program(PROGRAMS[2].gen_prompt, (right,))))
    said = ask(server, *calls)
    told = [asyncio.run(SandboxProgramJudge().judge(*call)) for call in calls]
    assert [dataclasses.replace(v, rationale="") for v in said] == told and len({v.score for v in said}) > 2


def test_the_released_evaluators_numbers():
    """scores: what scripts/evaluate_images.py made of a chat server's fixed `reply`."""
    rows = json.loads((Path(__file__).parent / "fixtures/released/judged.json").read_text())
    for row in rows:
        values = check_image_reply(read_object(json.dumps(row["reply"]), list(row["reply"]), []))
        verdict = ImageVerdict(
            **{k: values[k] for k in ("faithfulness", "visual_correctness", "text_accuracy", "aesthetics")},
            text_required=not values["text_accuracy_na"],
        )
        outcome = judged(verdict, ProgramVerdict(1.0))
        ours = {k: getattr(outcome, k) for k in ("faithfulness", "visual_correctness", "text_accuracy", "aesthetics")}
        assert ours | {"overall": round(outcome.kscore, 2)} == {k: row["scores"][k] for k in (*ours, "overall")}
        assert outcome.text_required != row["scores"].get("text_accuracy_na", False)
        assert values["rationale"] == row["scores"]["rationale"]
    assert len(rows) == 8


def test_what_a_judge_is_shown(server):
    picture = WORLD.truth(REQUESTS[1])
    ask(server, (SIMPLE, picture))
    ask(server, (SIMPLE, PROGRAMS[0]))
    ask(server, (SIMPLE, PROGRAMS[0]), program_sees_truth=True)
    of_image, of_program, with_truth = server.log()["last"][-3:]
    texts = [p.get("text", "picture") for p in of_image["messages"][1]["content"]]
    shown = [decoded(p) for p in of_image["messages"][1]["content"] if p["type"] == "image_url"]
    assert texts.index("Image 1, the generated picture:") < texts.index("Image 2, the ground truth:")
    assert np.array_equal(shown[0], picture) and np.array_equal(shown[1], WORLD.truth(SIMPLE))
    assert of_image["temperature"] == 0 and all(s in of_image["messages"][0]["content"] for s in SKILLS)
    assert "emblem" not in str(of_image["messages"][1]) and "checklist" not in str(of_image)
    assert isinstance(of_program["messages"][1]["content"], str)
    shown = [decoded(p) for p in with_truth["messages"][1]["content"] if p["type"] == "image_url"]
    assert len(shown) == 1 and np.array_equal(shown[0], WORLD.truth(SIMPLE))


def decoded(part: dict) -> np.ndarray:
    data = base64.b64decode(part["image_url"]["url"].partition(",")[2])
    return np.asarray(Image.open(io.BytesIO(data)))


def test_pictures_are_encoded_as_the_released_evaluator_does():
    random = np.random.default_rng(0)
    small, middle, large = (random.integers(0, 255, (s, t, 3), np.uint8) for s, t in ((256, 8), (257, 8), (5000, 70)))
    assert judged_url(small).startswith("data:image/png") and np.array_equal(decoded(part(small)), small)
    out = io.BytesIO()
    Image.fromarray(middle).save(out, format="JPEG", quality=100, optimize=True)
    assert judged_url(middle) == f"data:image/jpeg;base64,{base64.b64encode(out.getvalue()).decode()}"
    assert decoded(part(large)).shape == (4096, int(70 * 4096 / 5000), 3)


def part(pixels: np.ndarray) -> dict:
    return {"image_url": {"url": judged_url(pixels)}}


# --- what they do not say ---------------------------------------------------------------------------------------------

UNJUDGED = {
    "cut:150": "bad_response",
    "empty": "bad_response",
    "text:The picture is a clear 1.": "bad_response",
    "twice": "bad_response",
    "off_scale:0.7": "bad_response",
    "off_scale:100": "bad_response",
    "missing:rationale": "bad_response",
    "nan": "bad_response",
    "raw:e30=": "bad_response",
    "raw:/w==": "bad_response",
    "status:400": "client_error",
    "status:401": "client_error",
    "status:429": "rate_limited",
    "status:503": "server_error",
    "hangup": "connect",
    "delay:30": "timeout",
}
OF_PICTURES = {"missing:text_accuracy_na", "missing:aesthetics", "string_boolean", "contradiction"}


@pytest.mark.parametrize("fault", [*UNJUDGED, *sorted(OF_PICTURES)])
def test_a_failure_is_typed_and_counted(server, fault):
    server.fault(fault)
    incidents, kind = Incidents(), UNJUDGED.get(fault, "bad_response")
    timeout = {"timeout_s": 0.3} if kind == "timeout" else {}
    calls = [(SIMPLE, WORLD.truth(SIMPLE))]
    if fault in UNJUDGED and fault != "cut:150":  # where a program's score is whole already
        calls.append((SIMPLE, PROGRAMS[0]))
    said = ask(server, *calls, incidents=incidents, json_schema=False, **timeout)
    assert [type(e) for e in said] == [JudgeError] * len(calls) and {e.kind for e in said} == {kind}
    counted = incidents.take()
    assert counted.pop(f"image_judge/{kind}") == 1 and set(counted) <= {f"program_judge/{kind}"}


@pytest.mark.parametrize("fault", ["fenced", "prose", "thought", "trailing", "cut:330"])
def test_a_verdict_is_found_in_what_stands_around_it(server, fault):
    calls = (REQUESTS[0], WORLD.truth(REQUESTS[1])), (SIMPLE, PROGRAMS[0])
    plain = ask(server, *calls)
    server.fault(fault, of=None if fault != "cut:330" else "image")
    said = ask(server, *calls)
    assert [dataclasses.replace(v, diagnostics=()) for v in said] == [
        dataclasses.replace(v, diagnostics=()) for v in plain
    ]


@pytest.mark.slow
def test_hostile_replies_give_no_reward(server):
    out = judge_faults.run(replies())
    assert not out.wrong and out.read > 500 and out.kinds["judge/bad_response"] > 500


@pytest.mark.slow
def test_some_hostile_replies_give_no_reward():
    chosen = [r for r in replies() if not r.name.startswith(("cut at", "fenced, cut", "an example"))][::7]
    out = judge_faults.run(chosen)
    assert not out.wrong and out.read and len(chosen) > 40


@pytest.mark.parametrize("of", ["image", "program"])
def test_a_reply_cut_anywhere_is_read_right_or_not_at_all(of):
    keys = [k for k in GOOD[of] if k != "diagnostics"]
    whole, read = json.dumps(GOOD[of]), 0
    for n in range(len(whole)):
        try:
            values = read_object(whole[:n], keys, keys[1:])
        except ReplyError:
            continue
        read += 1
        assert {k: values.get(k) for k in keys[1:]} == {k: GOOD[of][k] for k in keys[1:]}, n
    assert read > len(json.dumps(GOOD[of]["diagnostics"])) * 0.9  # scores are whole once the diagnostics begin


def test_a_complaint_heals_a_slip(server):
    server.fault("off_scale:0.7", times=1)
    incidents = Incidents()
    (said,) = ask(server, (SIMPLE, WORLD.truth(SIMPLE)), incidents=incidents, reasks=1)
    assert said.faithfulness == 1 and incidents.take() == {"image_judge/bad_response": 1}
    *_, reply, complaint = server.log()["last"][-1]["messages"]
    assert json.loads(reply["content"])["faithfulness"] == 0.7
    assert "faithfulness must be one of the numbers 0, 0.5, 1, not 0.7" in complaint["content"]


def test_a_server_that_refuses_the_schema_is_asked_without(server):
    server.fault("status:422", times=1)
    said = ask(server, *[(r, PROGRAMS[0]) for r in REQUESTS[:3]], concurrency=1)
    assert all(isinstance(v, ProgramVerdict) for v in said)
    assert ["response_format" in body for body in server.log()["last"][-4:]] == [True, False, False, False]


# --- failures and advantages ------------------------------------------------------------------------------------------


def rollout(i: int, program: Program) -> Trajectory:
    return Trajectory(
        id=f"r{i}",
        request_id=SIMPLE.id,
        group_id="g",
        ids=np.arange(3),
        loss_mask=np.array([False, False, True]),
        rollout_logps=np.zeros(3, np.float32),
        request_stop=1,
        turns=(Turn("user", 0, 2), Turn("assistant", 2, 3)),
        program=program,
        termination="answer",
    )


def scored(image_judge, program_judge, rollouts, incidents=None) -> list[Trajectory]:
    async def main():
        return await asyncio.gather(
            *(
                score(
                    SIMPLE,
                    t,
                    renderer=CanvasRenderer(),
                    image_judge=image_judge,
                    program_judge=program_judge,
                    truth=WORLD.truth(SIMPLE),
                    images={},
                    seed=0,
                    incidents=incidents,
                )
                for t in rollouts
            )
        )

    return [t for t, _ in asyncio.run(main())]


def test_failing_calls_change_no_advantage_of_the_judged(server):
    words = ("circle", "star", "ring", "square", "triangle", "cross", "heart", "diamond")
    prompts = [f"Background {g}. A red {w} at the center." for g in ("white", "blue") for w in words]
    group = [rollout(i, Program(p)) for i, p in enumerate(prompts)]
    alone = {t.id: t.reward for t in scored(SandboxImageJudge(), SandboxProgramJudge(), group)}
    server.fault("status:500", share=0.3)
    incidents = Incidents()
    seen = scored(*open_judges(config(server), incidents), group, incidents)
    failed = [t for t in seen if isinstance(t.outcome, Failed)]
    assert 0 < len(failed) < len(group) - 2 and {t.outcome.kind for t in failed} == {"server_error"}
    assert incidents.take()["judge/server_error"] == len(failed)
    assert all(t.reward == alone[t.id] for t in seen if t.reward is not None)
    everybody = advantages([t.reward for t in seen])
    judged_alone = advantages([alone[t.id] for t in seen if t.reward is not None])
    assert np.array_equal(everybody[[t.reward is not None for t in seen]], judged_alone) and judged_alone.any()
    assert not everybody[[t.reward is None for t in seen]].any()


def test_one_failed_judge_gives_no_reward_and_leaves_nothing_running(server):
    server.fault("off_scale", of="image")
    incidents, before = Incidents(), server.seen().get("program", 0)
    (t,) = scored(*open_judges(config(server), incidents), [rollout(0, PROGRAMS[0])], incidents)
    assert t.reward is None and (t.outcome.stage, t.outcome.kind) == ("judge", "bad_response")
    assert incidents.take() == {"image_judge/bad_response": 1, "judge/bad_response": 1}
    assert server.seen()["program"] == before + 1


# --- cache, limits, outages -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_second_run_judges_nothing(server, tmp_path):
    calls = [*mixed_pictures(4), *((r, PROGRAMS[0]) for r in REQUESTS[:4])]
    kept = {"cache": tmp_path, "cache_mode": "record"}
    server.fault("off_scale", times=1)
    first = ask(server, *calls, **kept)
    assert sum(isinstance(v, JudgeError) for v in first) == 1
    before = sum(server.seen().values())
    second = ask(server, *calls, **kept)
    assert sum(server.seen().values()) == before + 1  # only the verdict that was none is asked for again
    assert [v for v in second if v in first] == [v for v in first if not isinstance(v, JudgeError)]
    nobody = dict(base_url="http://127.0.0.1:9/v1", api_key_env="NO_SUCH_KEY", cache=tmp_path, cache_mode="replay")
    image, program = open_judges(config(server, **nobody), incidents := Incidents())

    async def again():
        of_images = [await image.judge(r, p, WORLD.truth(r)) for r, p in calls[:4]]
        return of_images + [await program.judge(*call) for call in calls[4:]]

    assert asyncio.run(again()) == second and incidents.take() == {}
    with pytest.raises(JudgeError) as unknown:
        asyncio.run(program.judge(SIMPLE, Program("something new")))
    assert unknown.value.kind == "not_recorded" and incidents.take() == {"program_judge/not_recorded": 1}


def test_a_verdict_belongs_to_its_pixels_model_and_text(server, tmp_path):
    kept = {"cache": tmp_path, "cache_mode": "record"}
    picture = WORLD.truth(SIMPLE)
    touched = picture.copy()
    touched[0, 0] ^= 1
    before = server.seen().get("image", 0)
    ask(server, (SIMPLE, picture), (SIMPLE, picture), **kept)
    ask(server, (SIMPLE, touched), (Request("x", SIMPLE.question, extra=SIMPLE.extra), picture), **kept)
    ask(server, (SIMPLE, picture), model="another", **kept)
    assert server.seen()["image"] == before + 3  # the id of a request is nothing that a judge sees


@pytest.mark.slow
def test_one_rate_limit_for_both_judges_and_every_attempt(server):
    server.fault("status:429,0", times=2)  # asked again at once, but for the limit
    calls = [(r, PROGRAMS[0]) for r in REQUESTS[:3]] + [(r, WORLD.truth(r)) for r in REQUESTS[:3]]
    ask(server, *calls, requests_per_minute=300, attempts=2)
    times = server.log()["times"][-8:]
    assert times[-1] - times[0] > 1.1  # seven pauses of a fifth of a second


@pytest.mark.slow
def test_questions_under_way_are_bounded(server):
    with LoopbackJudge(train=50, latency_ms=100) as slow:
        ask(slow, *((r, PROGRAMS[0]) for r in REQUESTS[:12]), concurrency=3)
        assert slow.log()["peak"] == 3


@pytest.mark.slow
def test_a_restart_is_waited_for(server):
    with LoopbackJudge(train=50, latency_ms=300) as slow:
        restart = threading.Thread(target=lambda: (time.sleep(0.15), slow.kill(), time.sleep(0.5), slow.start()))
        restart.start()
        incidents = Incidents()
        said = ask(slow, *((r, PROGRAMS[0]) for r in REQUESTS[:4]), patience_s=60, incidents=incidents)
        restart.join()
        assert all(isinstance(v, ProgramVerdict) for v in said) and incidents.take()["program_judge/connect"] >= 1


@pytest.mark.slow
def test_a_local_policy_that_talks_nonsense_is_a_typed_failure(server):
    with LoopbackEngine("--served-model-name", "tiny") as tiny:
        address = dict(base_url=f"{tiny.url}/v1", model="tiny", max_tokens=64)
        said = ask(server, (SIMPLE, WORLD.truth(SIMPLE)), (SIMPLE, PROGRAMS[0]), **address)
    assert [type(e) for e in said] == [JudgeError] * 2 and {e.kind for e in said} == {"bad_response"}


# --- configuration ----------------------------------------------------------------------------------------------------

WRONG = [
    ({"model": "m"}, "model with kind rules would do nothing"),
    ({"kind": "chat", "model": "m"}, "needs model and base_url"),
    ({"kind": "chat", "model": "m", "base_url": "localhost:1"}, "base_url must be a URL"),
    ({"program_base_url": "http://a/v1"}, "program_base_url needs program_model"),
    ({"program_model": "p", "program_api_key_env": "K"}, "would do nothing"),
    ({"cache_mode": "record"}, "cache and cache_mode go together"),
    ({"cache": "x"}, "cache and cache_mode go together"),
    ({"requests_per_minute": 0}, "greater than 0"),
    ({"speed": 1}, "speed"),
]


@pytest.mark.parametrize(("fields", "reason"), WRONG)
def test_what_cannot_work_is_refused(fields, reason):
    known = {} if "kind" in fields or fields == {"model": "m"} else dict(kind="chat", model="m", base_url="http://a/v1")
    with pytest.raises(ValueError, match=reason):
        JudgeConfig(**known | fields)


def test_opening_names_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    plain = dict(kind="chat", model="m", base_url="http://a/v1")
    with pytest.raises(ValueError, match="the sandbox brings its own judges"):
        open_judges(JudgeConfig(), Incidents())
    with pytest.raises(ValueError, match="judge.api_key_env: JUDGE_KEY is not set"):
        open_judges(JudgeConfig(**plain, api_key_env="JUDGE_KEY"), Incidents())
    with pytest.raises(ValueError, match="judge.program_sees_truth"):
        open_judges(JudgeConfig(**plain, program_sees_truth=True), Incidents())
    with pytest.raises(ValueError, match="judge.cache: nothing is recorded"):
        open_judges(JudgeConfig(**plain, cache=tmp_path, cache_mode="replay"), Incidents())


def test_each_model_gets_its_own_key_and_no_error_tells_it(server, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "key-of-the-first")
    monkeypatch.setenv("PROGRAM_KEY", "key-of-the-second")
    fields = dict(api_key_env="JUDGE_KEY", program_base_url=server.base_url, program_api_key_env="PROGRAM_KEY")
    fields |= dict(program_model="second")
    server.fault("text:key-of-the-first key-of-the-second")
    said = ask(server, (SIMPLE, WORLD.truth(SIMPLE)), (SIMPLE, PROGRAMS[0]), **fields)
    log = server.log()
    by_model = dict(zip((b["model"] for b in log["last"][-2:]), log["keys"][-2:], strict=True))
    assert by_model == {"rules": "Bearer key-of-the-first", "second": "Bearer key-of-the-second"}
    assert not any("key-of" in str(error) for error in said)
