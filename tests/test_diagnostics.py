"""Diagnostics: what the rows of a results.json tell of tools, references, skills, programs and cost."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from genevolve_fast.evaluate.diagnostics import annotated_skills, demands, diagnose, kept, table, tool_calls


def call(name: str, **arguments) -> str:
    return f"<think>\nso\n</think>\n<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def answer(*ids: str) -> str:
    named = [{"img_id": i, "note": ""} for i in ids]
    return f"<answer>\n{json.dumps({'gen_prompt': 'A picture.', 'reference_images': named})}\n</answer>"


def response(text: str) -> str:
    return f"<tool_response>\n{text}\n</tool_response>"


def found(*ids: str) -> str:
    lines = "\n".join(f"{i}: title: something\n  local_path: /x" for i in ids)
    return response(f"--- image search result for [q] ---\n{lines}\n--- end of image search result ---")


def row(*turns: str, prompt="Draw it.", program="A picture.", references=(), **more) -> dict:
    roles = ["assistant", "user"] * len(turns)
    messages = [{"role": "system", "content": "IMG_009: title: an example"}, {"role": "user", "content": prompt}]
    messages += [{"role": r, "content": t} for r, t in zip(roles, turns, strict=False)]
    base = {"prompt": prompt, "gen_prompt": program, "reference_images": list(references), "messages": messages}
    return base | {"termination": "answer", "rounds": (len(turns) + 1) // 2} | more


def test_calls_are_counted_and_failed_ones_told_apart():
    rows = [
        row(
            call("search", queries=["a", "b", "c"]), response("--- search result for [a] ---\n1"),
            call("search", queries=["d"]), response("--- search error for [d]: HTTP 500 ---"),
            call("image_search", query="e"), response("[tool error] image_search: no answer within 60 s"),
            call("query_knowledge", skill_name="text_rendering"), response("Write texts in quotes."),
            answer(),
        ),
        row(call("search", queries=["f"]), response("--- search error for [f]: x ---\n--- search result for [g] ---")),
        row(
            call("teleport", to="x"), response("[tool error] teleport: unknown tool"),
            "two <answer>", response("Format error: x"),
        ),
        row(call("search", queries=["the trajectory ends here"])),
    ]  # fmt: skip
    unanswered = row(call("search", queries=["a"]))
    unanswered["messages"].append({"role": "assistant", "content": answer()})
    assert [c.succeeded for c in tool_calls(unanswered)] == [False]
    assert [(c.tool, c.succeeded) for c in tool_calls(rows[0])] == [
        ("search", True), ("search", False), ("image_search", False), ("query_knowledge", True),
    ]  # fmt: skip
    made = diagnose(rows)
    assert made["tools"]["search"] == {
        "calls": 4, "calls_per_row": 1.0, "succeeded": 0.5, "queries_per_call": pytest.approx(1.5),
    }  # fmt: skip
    assert made["tools"]["teleport"]["succeeded"] == 0.0 and made["tools"]["query_knowledge"]["succeeded"] == 1.0
    assert made["rounds_mean"] == (5 + 1 + 2 + 1) / 4 and made["terminations"] == {"answer": 4}


def test_references_are_checked_against_what_was_shown_and_what_is_there(tmp_path):
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no picture")
    reference = {"img_id": "IMG_001", "local_path": "a.png", "url": "u"}
    rows = [
        row(
            call("image_search", query="q"), found("IMG_001", "IMG_002"), answer("IMG_001", "IMG_009"),
            references=[reference],
        ),
        row(
            call("image_search", query="q"), found("IMG_001", "IMG_002"), answer("IMG_001", "IMG_002", "IMG_002"),
            references=[reference, reference | {"img_id": "IMG_002"}, {"img_id": "IMG_003", "local_path": "b.png"}],
        ),
        row(answer(), references=[{"img_id": "IMG_004", "local_path": "", "url": "https://x"}]),
    ]  # fmt: skip
    made = diagnose(rows, roots=[tmp_path])["references"]
    assert made["named"] == 5 and made["shown_before"] == 0.8  # IMG_009 stood in the system prompt only
    assert made["in_programs"] == 5 and made["file_exists"] == 0.8 and made["decodable"] == 0.6
    assert made["duplicates"] == 2  # one file under two ids, one id named twice
    assert made["per_program"] == pytest.approx(5 / 3)


def annotated(primary: str, *secondary: str) -> dict:
    return {"primary_skills": [primary], "secondary_skills": list(secondary)}


def test_skills_are_compared_with_the_annotation():
    ask = {s: [call("query_knowledge", skill_name=s), response("how")] for s in ("text_rendering", "spatial_layout")}
    failed = [call("query_knowledge", skill_name="quantity_counting"), response("[tool error] query_knowledge: no")]
    rows = [
        row(*ask["text_rendering"], *ask["spatial_layout"], answer(), meta=annotated("text_rendering")),
        row(*failed, answer(), extra_info=annotated("quantity_counting", "text_rendering")),
        row(*ask["text_rendering"], answer()),
    ]  # fmt: skip
    assert annotated_skills(rows[2]) is None and annotated_skills(rows[1])[0] == {"quantity_counting"}
    made = diagnose(rows)["skills"]
    assert (made["rows"], made["precision"], made["recall"], made["f1"]) == (2, 0.5, pytest.approx(1 / 3), 0.4)
    assert made["primary_recall"] == 0.5
    assert made["per_skill"]["text_rendering"] == {
        "annotated": 2, "precision": 1.0, "recall": 0.5, "f1": pytest.approx(2 / 3),
    }  # fmt: skip
    assert made["per_skill"]["quantity_counting"]["precision"] is None
    assert diagnose(rows[2:])["skills"] is None


@pytest.mark.parametrize(
    ("request_", "asked"),
    [
        ("A poster with the title \"PARIS 1900\" and 'Ville' below.", (["PARIS 1900", "Ville"], [], [])),
        (
            "Draw the Svalbard Global Seed Vault with three lamps at 21:30.",
            ([], ["21:30", "three"], ["Svalbard Global Seed Vault"]),
        ),
        (
            "Sydney Opera House's roof. Show the emblem of Dor Abo, and the Bay of Fundy.",
            ([], [], ["Opera House", "Dor Abo", "Bay of Fundy"]),
        ),
        ("It's the 2023 World Snooker Champion's flag, don't forget.", ([], ["2023"], ["World Snooker Champion"])),
        ("draw a red circle", ([], [], [])),
        ("", ([], [], [])),
    ],
)
def test_texts_numbers_and_names_of_a_request_are_found(request_, asked):
    assert tuple(demands(request_).values()) == asked


def test_programs_keep_numbers_in_digits_or_words_and_texts_whatever_their_case():
    assert (
        kept("three", "numbers", "3 lamps") and kept("3", "numbers", "Three lamps") and kept("12", "numbers", "twelve")
    )
    assert (
        not kept("3", "numbers", "13 lamps")
        and not kept("3", "numbers", "3.5 m")
        and not kept("13", "numbers", "three")
    )
    assert kept("Dor  Abo", "names", "the emblem of DOR ABO") and not kept("NOVA", "texts", "NOV")
    rows = [
        row(prompt="Write 'NOVA' with two stars for Dor Abo.", program="The text 'NOVA' and 2 stars."),
        row(prompt="Write 'LUX'.", program=""),  # no program: nothing to compare
    ]
    made = diagnose(rows)["faithfulness"]
    assert made["texts"] == {"asked": 1, "kept": 1.0} and made["numbers"]["kept"] == 1.0
    assert made["names"] == {"asked": 1, "kept": 0.0} and made["all"]["kept"] == pytest.approx(2 / 3)


def test_a_cost_is_told_for_what_has_a_price_and_a_count(tmp_path):
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "a.png")
    rows = [row(call("search", queries=["a", "b"]), response("x"), answer(), output_path="a.png", success=True)]
    prices = {"million_tokens": 10.0, "search": 0.5, "picture": 3.0, "judgement": 1.0}
    made = diagnose(rows, roots=[tmp_path], sampled_tokens=100_000, judged=2, program_scores=[0.5], prices=prices)
    assert made["cost"]["parts"] == {"million_tokens": 1.0, "search": 1.0, "picture": 3.0, "judgement": 3.0}
    assert made["cost"]["dollars"] == made["cost"]["dollars_per_row"] == 8.0 and made["program_score_mean"] == 0.5
    unknown = diagnose(rows, prices={"million_tokens": 10.0})
    assert unknown["cost"] is None and unknown["sampled_tokens"] is None and unknown["program_score_mean"] is None


def test_rows_that_hold_nonsense_are_counted_and_break_nothing():
    rows = [
        {},
        {"prompt": None, "messages": "none", "reference_images": {"a": 1}, "meta": [], "rounds": None},
        {"messages": [1, {"role": "assistant"}, {"role": "assistant", "content": "<tool_call>{</tool_call>"}]},
        row(call("search", queries="one"), response("x"), call("query_knowledge", skill_name=["x"]), response("y")),
        row(references=[{"local_path": "\0"}, "no"], meta={"primary_skills": None, "secondary_skills": 3}),
    ]
    made = diagnose(rows)
    assert made["rows"] == 5 and made["references"]["in_programs"] == 1
    assert "5 rows" in table(made) and "nan" not in table(made)
    json.dumps(made, allow_nan=False)
    assert "0 rows, 0 programs" in table(diagnose([]))
