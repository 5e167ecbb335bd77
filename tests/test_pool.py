"""The prompt pool: closed recipes that nobody but the pool sees, no repetitions, stratified disjoint splits."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from contextlib import closing

import numpy as np
import pytest
from data_folders import chat_server, copied, made
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from genevolve_fast.cli import main
from genevolve_fast.data.pool import Item, Seen, drop_repetitions, pool_requests, shingles, write_pool
from genevolve_fast.data.recipes import Recipe, coverage, draw_recipes, given_away, split_recipes
from genevolve_fast.data.review import read_verdict
from genevolve_fast.data.rows import read_jsonl
from genevolve_fast.data.steps import MANIFEST, StepError, finished, open_step
from genevolve_fast.data.trajectories import samples_of
from genevolve_fast.net.replies import ReplyError, read_object
from genevolve_fast.resumable import BatchError, Ledger
from genevolve_fast.sandbox.recipes import sandbox_items
from genevolve_fast.sandbox.world import SandboxWorld
from genevolve_fast.trajectory import Request

ITEMS = sandbox_items(SandboxWorld(), 120, seed=3)


def recipe(id_="r1", **changes) -> Recipe:
    fields = {
        "family": "landmark_scene",
        "evidence": "appearance_missing",
        "anchor": "place_anchor",
        "requirement": "spatial_layout",
        "difficulty": "hard",
    }
    return Recipe(id=id_, **(fields | changes))


def test_recipes_are_closed_and_drawn_over_all_cells():
    with pytest.raises(ValidationError):
        recipe(family="something_else")
    with pytest.raises(ValidationError):
        recipe(mood="gloomy")
    drawn = draw_recipes(500, seed=1)
    cells = Counter(r.cell for r in drawn)
    assert len({r.id for r in drawn}) == 500 and max(cells.values()) - min(cells.values()) <= 1 and len(cells) > 60
    assert drawn == draw_recipes(500, seed=1) != draw_recipes(500, seed=2)
    assert all((r.evidence == "nothing_missing") == (r.eval_type == "Quality-Anchored") for r in drawn)


def test_a_request_that_tells_its_recipe_is_dropped():
    r = recipe(withheld=("The tower is painted brown.",), notes="Keep it foggy")
    assert given_away(r, "The Eiffel Tower at dusk, seen from the river.") == ""
    for told in ("The tower is  painted BROWN!", "test my spatial_layout", "Please keep it foggy.", "a landmark_scene"):
        assert given_away(r, f"A picture. {told}"), told


def test_repetitions_go_whatever_their_case_and_punctuation():
    questions = {
        "a": "A red tower by the river at dusk with three boats in front of it and a kite above",
        "b": "a RED tower, by the river; at dusk with three boats in front of it and a kite above!",
        "c": "A red tower by the river at dusk with three boats in front of it and a kite below",
        "d": "A red tower by the river at dawn with nobody near it",
    }
    items = [Item(recipe(id_), Request(id_, question)) for id_, question in questions.items()]
    kept, dropped = drop_repetitions(items, near=0.85)
    assert [i.request.id for i in kept] == ["a", "d"]
    assert dropped["b"] == "the same words as a" and dropped["c"].startswith("0.8")


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from("abcd"), min_size=1, max_size=9).map(" ".join), max_size=14), st.floats(0.3, 1)
)
def test_the_index_finds_what_comparing_all_pairs_finds(questions, near):
    seen, earlier = Seen(questions, near), []
    for i, question in enumerate(questions):
        asked = shingles(question)
        alike = [id_ for id_, other in earlier if len(asked & other) / len(asked | other) >= near]
        found = seen.repeats(question)
        assert (found is None) == (not alike) and (found is None or found[0] in alike)
        if found is None:
            seen.add(str(i), question)
            earlier.append((str(i), asked))


def test_splits_are_stratified_seeded_disjoint_and_whole_by_subject():
    recipes = [i.recipe for i in ITEMS]
    shares = {"train": 0.6, "eval": 0.2, "bench": 0.2}
    of = split_recipes(recipes, shares, seed=0)
    assert of == split_recipes(recipes, shares, seed=0) != split_recipes(recipes, shares, seed=1)
    assert set(of) == {r.id for r in recipes}
    subjects = {name: {r.subject for r in recipes if of[r.id] == name} - {""} for name in shares}
    assert not subjects["train"] & subjects["bench"] and not subjects["train"] & subjects["eval"]
    for cell, total in Counter(r.cell for r in recipes).items():
        for name, share in shares.items():
            got = sum(of[r.id] == name for r in recipes if r.cell == cell)
            assert abs(got - share * total) <= 2.5, (cell, name, got, total)  # subjects of two or three go together
    sizes = Counter(of.values())
    assert all(abs(sizes[name] - share * len(recipes)) <= 4 for name, share in shares.items()), sizes


def test_coverage_counts_every_recipe_once():
    rows = coverage(i.recipe for i in ITEMS)
    assert sum(row["total"] for row in rows) == len(ITEMS)
    assert all(row["easy"] + row["medium"] + row["hard"] == row["total"] for row in rows)
    text = (made("pool") / "coverage.txt").read_text()
    saved = json.loads((made("pool") / "coverage.json").read_text())
    assert text.splitlines()[-1].split()[-1] == str(sum(row["total"] for row in saved["all"]))
    assert sum(row["total"] for s in ("train", "eval", "bench") for row in saved[s]) == int(text.split()[-1])


# --- who sees recipes -------------------------------------------------------------------------------------------------


def secrets_of(folder) -> dict[str, list[str]]:
    """Everything that stands in recipes and nowhere else, by request id: vocabulary words and withheld facts."""
    out = {}
    for row in read_jsonl(folder / "recipes.jsonl"):
        out[row["id"]] = [row[n] for n in ("family", "evidence", "anchor", "requirement")] + row["withheld"]
    return out


def test_no_recipe_stands_in_a_row_of_the_pool():
    """Rows become the published sets; what a request was built from is told there, its recipe is not."""
    plain = {"eval_type", "category", "difficulty", "meta"}  # published fields, which say what they say
    for recipe_row in read_jsonl(made("pool") / "recipes.jsonl"):
        rows = {r["id"]: r for r in read_jsonl(made("pool") / f"{recipe_row['split']}.jsonl")}
        told = json.dumps({n: v for n, v in rows[recipe_row["id"]].items() if n not in plain})
        fields = {"evidence", "requirement", "withheld", "family", "recipe"}
        assert not [name for name in fields if f'"{name}"' in told]
        assert not [v for v in (recipe_row["evidence"], recipe_row["anchor"]) if f'"{v}"' in told]


def test_no_recipe_stands_in_a_request_or_in_what_a_session_sends(policy):
    import dataclasses

    from genevolve_fast.agent.session import run_session
    from genevolve_fast.data.demonstrations import ScriptedEngine
    from genevolve_fast.sandbox.bootstrap import SETTINGS

    pool = open_step(made("pool"), "pool")
    secrets, sent = secrets_of(made("pool")), {}

    class Listening(ScriptedEngine):
        async def generate(self, session_id, ids, images, sampling, seed):
            sent.setdefault(session_id, self._codec.decode(ids))  # the first call: system prompt and request
            return await super().generate(session_id, ids, images, sampling, seed)

    requests = [r for _, r in pool_requests(pool)][:30]
    answer = '<answer>{"gen_prompt": "x", "reference_images": []}</answer>'
    engine = Listening(lambda *_: answer, policy.codec, {r.id: r for r in requests})
    roomy = dataclasses.replace(SETTINGS, max_prompt_tokens=10**6, max_tokens_per_turn=10**6)

    async def run():
        for r in requests:
            await run_session(
                r, engine=engine, codec=policy.codec, tools={}, system_prompt="Write programs.", settings=roomy,
                rollout_id=r.id, group_id=r.id, seed=0,
            )  # fmt: skip

    asyncio.run(run())
    assert len(sent) == 30
    for r in requests:
        assert r.question in sent[r.id]
        for secret in (*secrets[r.id], r.id):
            assert secret not in r.question and secret not in sent[r.id], secret
    told = json.dumps([dict(sample.fields) for sample in samples_of(pool)])
    facts = [fact for found in secrets.values() for fact in found if fact.endswith(".")]
    assert facts and not any(fact in told for fact in facts)
    assert "emblem_design" not in told and "identity_anchor" not in told


def test_a_pool_is_made_once_and_never_of_two_minds(tmp_path, capsys):
    folder = copied("pool", tmp_path / "pool")
    command = ["data", "pool", "--output-dir", str(folder), "--count", "48", "--shares", "0.6,0.2,0.2"]
    before = (folder / MANIFEST).stat().st_mtime_ns
    assert main(command) == 0 and "is complete" in capsys.readouterr().out
    assert (folder / MANIFEST).stat().st_mtime_ns == before
    assert main([*command, "--seed", "4"]) == 2 and "other settings (seed)" in capsys.readouterr().err
    for wrong in ("1,2", "a,b,c", "-1,1,1", "0,1,1", "nan,1,1"):
        assert main(["data", "pool", "--output-dir", str(tmp_path / "x"), f"--shares={wrong}"]) == 2
    assert "three numbers such as" in capsys.readouterr().err and not (tmp_path / "x").exists()
    assert main(["data", "pool", "--output-dir", str(tmp_path / "x"), "--model", "m"]) == 2
    assert "--model would do nothing without --writer chat" in capsys.readouterr().err


def test_a_pool_in_which_nothing_is_left_is_refused(tmp_path):
    from genevolve_fast.data.rows import DataError

    with pytest.raises(DataError, match="no request is left of 1"):
        told = Item(recipe(withheld=("a b",)), Request("r1", "say a b"))
        write_pool(tmp_path, [told], {}, shares={"train": 1.0}, near=0.9, seed=0, settings={})


# --- a chat model writes ----------------------------------------------------------------------------------------------


@pytest.fixture
def server():
    return chat_server()


def written(number: int, **changes) -> dict:
    place = "the old bridge of Avignon", "a lighthouse in Brittany", "Mount Fuji from a train", "the Alhambra's court"
    question = f"Paint {place[number % 4]} for a calendar of the year {1950 + number}, wide and calm."
    body = {"question": question, "subject": place[number % 4], "category": "Travel poster", "withheld": ["It is old."]}
    return {"text": json.dumps(body | changes)}


def pool_command(server, folder, *flags) -> list[str]:
    command = ["data", "pool", "--output-dir", str(folder), "--writer", "chat", "--model", "m", "--parallel", "1"]
    return [*command, "--base-url", server.url, "--shares", "2,1,1", "--patience", "0", *flags]


@pytest.mark.slow
def test_a_chat_model_writes_the_pool_and_a_second_run_asks_only_for_what_is_missing(server, tmp_path, capsys):
    recipes = tmp_path / "recipes.jsonl"
    rows = [recipe(f"own-{i}", subject="", difficulty="easy").model_dump() for i in range(6)]
    recipes.write_text("".join(json.dumps(row) + "\n" for row in rows))
    broken = {"status": 400, "message": "no KEY"}
    leak = written(3, question="A landmark_scene of the Alhambra, please, with its lions.")
    fenced = {"text": f"Here it is:\n```json\n{written(2)['text']}\n```"}
    server.faults(written(0), broken, fenced, leak, written(4, withheld=[]), {"text": "I would rather not."})
    command = pool_command(server, tmp_path / "pool", "--recipes", str(recipes))
    assert main(command) == 1  # one recipe is unanswered
    counts = json.loads((tmp_path / "pool" / MANIFEST).read_text())["counts"]
    assert counts["unanswered"] == 1 and counts["dropped: unusable"] == 2
    assert counts["dropped: gives its recipe away"] == 1 and counts["train"] + counts["eval"] + counts["bench"] == 2
    plan = json.loads(server.seen()[0]["body"]["messages"][1]["content"])
    assert plan["family"] == "landmark_scene" and "id" not in plan
    reasons = {row["id"]: row["reason"] for row in read_jsonl(tmp_path / "pool" / "dropped.jsonl")}
    assert (
        "withheld" in reasons["own-4"] and "unusable reply" in reasons["own-5"] and "client_error" in reasons["own-1"]
    )
    server.faults(written(5))
    assert main(command) == 0 and len(server.seen()) == 1  # only the unanswered one is asked again
    counts = json.loads((tmp_path / "pool" / MANIFEST).read_text())["counts"]
    assert counts["unanswered"] == 0 and counts["train"] + counts["eval"] + counts["bench"] == 3
    rows = [row for s in ("train", "eval", "bench") for row in read_jsonl(tmp_path / "pool" / f"{s}.jsonl")]
    assert {row["category"] for row in rows} == {"travel_poster"} and all(row["meta"]["primary_skills"] for row in rows)
    server.faults()
    assert main(command) == 0 and not server.seen()


def test_a_chat_writer_needs_a_model_and_own_recipes_a_chat_writer(tmp_path, capsys):
    assert main(["data", "pool", "--output-dir", str(tmp_path / "p"), "--writer", "chat"]) == 2
    assert "--writer chat needs --model" in capsys.readouterr().err
    (tmp_path / "r.jsonl").write_text('{"id": "a", "family": "x"}\n')
    own = ["--recipes", str(tmp_path / "r.jsonl")]
    assert main(["data", "pool", "--output-dir", str(tmp_path / "p"), *own]) == 2
    assert "--recipes would do nothing" in capsys.readouterr().err
    assert main(["data", "pool", "--output-dir", str(tmp_path / "p"), *own, "--writer", "chat", "--model", "m"]) == 2
    assert "r.jsonl, line 1: family: Input should be" in capsys.readouterr().err


REPLIES = {
    '{"pass": true, "reason": "fine"}': True,
    'Sure!\n```json\n{"pass": false, "reason": "two towers"}\n```': False,
    "{'pass': True, 'reason': 'fine',}": True,
    '<think>{"pass": false, "reason": "at first"}</think>{"pass": true, "reason": "after all"}': True,
    '{"pass": "yes", "reason": "fine"}': None,
    '{"pass": 1, "reason": "fine"}': None,
    '{"pass": true, "rea': None,
    '{"pass": true}': None,
    '{"pass": true, "reason": ""}': None,
    '{"pass": true, "reason": "a"} or rather {"pass": false, "reason": "b"}': None,
    '{"draft": {"pass": true, "reason": "x"}, "final": {"pass": false, "rea': None,
    "{'pass': True, 'reason': 'a'} no: {'pass': False, 'reason': 'b'}": None,
    "I pass it.": None,
    "": None,
    "[" * 5000: None,
}


@pytest.mark.parametrize("text", REPLIES, ids=lambda t: t[:30])
def test_a_reply_is_a_verdict_or_none_at_all(text):
    if REPLIES[text] is None:
        with pytest.raises(ReplyError):
            read_verdict(read_object(text, ("pass", "reason"), ("pass",)))
    else:
        verdict = read_verdict(read_object(text, ("pass", "reason"), ("pass",)))
        assert (verdict.decision == "pass") is REPLIES[text]


# --- folders ----------------------------------------------------------------------------------------------------------


def test_a_ledger_loses_at_most_the_line_that_was_cut(tmp_path):
    path = tmp_path / "done.jsonl"
    with closing(Ledger(path, {"seed": 1}, "request")) as ledger:
        ledger.add("a", {"x": 1})
        ledger.add("b", {"x": 2})
        with pytest.raises(BatchError, match="written by another process"):
            Ledger(path, {"seed": 1}, "request")
    path.write_bytes(path.read_bytes()[:-4])
    with closing(Ledger(path, {"seed": 1}, "request")) as ledger:
        assert ledger.done == {"a": {"x": 1}}
        ledger.add("c", {"x": 3})
    with pytest.raises(BatchError, match="other settings .seed 1 then, 2 now.: choose another --output-dir$"):
        Ledger(path, {"seed": 2}, "request")
    with closing(Ledger(path, {"seed": 1}, "request")) as ledger:
        assert set(ledger.done) == {"a", "c"}


def test_a_step_refuses_a_folder_that_is_not_its_own(tmp_path, capsys):
    pool = made("pool")
    with pytest.raises(StepError, match="was written by `data pool`, this step reads what .*data truth"):
        open_step(pool, "truth")
    with pytest.raises(StepError, match="it has no manifest.json"):
        open_step(tmp_path, "pool")
    (tmp_path / MANIFEST).write_text('{"step": "pool"}')
    with pytest.raises(StepError, match="is not the manifest"):
        open_step(tmp_path, "pool")
    with pytest.raises(StepError, match="holds what `data pool` wrote"):
        finished(pool, "filter", None, {})
    for step in ("trajectories", "filter", "truth", "sft-view", "feedback-view", "bench-view"):
        given = made("filter") if step == "trajectories" else pool
        more = ["--teacher", "demonstrator"] if step == "trajectories" else []
        command = ["data", step, "--input", str(given), "--output-dir", str(tmp_path / step), *more]
        assert main(command) == 2, step
        assert "this step reads what" in capsys.readouterr().err
    assert np.all([not (tmp_path / s).exists() for s in ("filter", "truth")])


def test_every_step_explains_itself(capsys):
    for step in ("pool", "trajectories", "filter", "truth", "sft-view", "feedback-view", "bench-view", "check"):
        with pytest.raises(SystemExit) as stop:
            main(["data", step, "--help"])
        assert stop.value.code == 0 and f"example:\n  genevolve-fast data {step}" in capsys.readouterr().out
