"""A process as text, as a row of JSONL and as one trajectory with drafts inside its reply."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from genevolve_fast.batch.packing import pack, student_sequence
from genevolve_fast.process.trace import (
    Correction,
    Cycle,
    Inspection,
    Plan,
    Process,
    StageError,
    interleave,
    reduced,
    stage_mask,
    supervised,
)
from genevolve_fast.sandbox.scene import IMAGE_SIZE
from genevolve_fast.sandbox.tiny_policy import start_path
from genevolve_fast.trajectory import STAGES, InvariantError, Stage, image_hash, load, save

PICTURES = [np.full((IMAGE_SIZE, IMAGE_SIZE, 3), shade, np.uint8) for shade in (10, 20, 30)]
FIRST, WRONG, MENDED = map(image_hash, PICTURES)
PIXELS = {image_hash(p): p for p in PICTURES}


@pytest.fixture(scope="module")
def codec():
    from genevolve_fast.policy.codec import TransformersCodec

    return TransformersCodec.from_pretrained(start_path())


def process(trained=STAGES) -> Process:
    return Process(
        "p1",
        "a red circle left of a blue square",
        (
            Cycle(Plan("Add a red circle.", "A red circle at the left."), FIRST, Inspection()),
            Cycle(
                Plan("Add a blue square.", "A red circle left of a blue square."),
                WRONG,
                Inspection(draft="the square is green"),
                Correction("Paint the square blue."),
                MENDED,
                trained,
            ),
        ),
    )


TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=40)


@given(TEXT, TEXT, TEXT)
def test_stages_read_back_what_they_wrote_whatever_it_is(a, b, c):
    """Nothing that a model writes inside a stage opens or closes a tag."""
    a, b, c = (f"x{t}<ins>draft: plan:</des>" for t in (a, b, c))
    plan, inspection, correction = Plan(a, b), Inspection(a, b, c), Correction(c)
    for stage in (plan, inspection, correction):
        again = type(stage).parse(str(stage))
        assert type(stage).parse(str(again)) == again and str(again) == str(stage)
    assert Plan.parse(str(plan)).instruction.startswith("x") and not Inspection.parse(str(inspection)).sound


@pytest.mark.parametrize("text", ["</</ins>>", "<</ins>>", "</</<des>des>>", "<</refine></ins>>"])
def test_no_tag_is_left_where_one_was_taken_out_of_another(text):
    written = str(Plan(f"a{text}b", "c"))
    assert written.count("<ins>") == written.count("</ins>") == written.count("<des>") == written.count("</des>") == 1


def test_an_inspection_that_finds_nothing_is_sound():
    assert str(Inspection()) == "<inspect>plan: none draft: none</inspect>"
    assert Inspection.parse("<inspect>plan: None. draft: none</inspect>").sound
    found = Inspection.parse("<inspect>A red ring. plan: none draft: it is no circle</inspect>")
    assert found == Inspection("", "it is no circle", "A red ring.") and not found.sound


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (Plan, "<ins>add</ins>"),
        (Plan, "<ins></ins><des>a</des>"),
        (Plan, "I will <ins>a</ins><des>b</des>"),
        (Inspection, "<inspect>fine</inspect>"),
        (Inspection, "<inspect>plan: draft: none</inspect>"),
        (Correction, "<refine> </refine>"),
    ],
)
def test_a_stage_that_is_not_in_its_form_is_refused(kind, text):
    with pytest.raises(StageError, match="<"):
        kind.parse(text)


def test_rows_hold_the_whole_process():
    row = json.loads(json.dumps(process(("inspect", "refine")).to_row()))
    assert Process.from_row(row) == process(("inspect", "refine"))
    assert process().drafts == (FIRST, WRONG, MENDED) and process().result == MENDED
    del row["cycles"][0]["plan"]
    with pytest.raises(InvariantError, match="p1.*plan"):
        Process.from_row(row)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(correction=None), "correction without a corrected draft"),
        (dict(inspection=Inspection()), "what an inspection finds is corrected"),
        (dict(draft=""), "has no draft"),
        (dict(trained=("paint",)), "stages are"),
    ],
)
def test_a_process_that_breaks_a_rule_is_named(change, message):
    import dataclasses

    first, second = process().cycles
    with pytest.raises(InvariantError, match=message):
        dataclasses.replace(process(), cycles=(first, dataclasses.replace(second, **change))).validate()
    with pytest.raises(InvariantError, match="1 to 5"):
        dataclasses.replace(process(), cycles=()).validate()


def test_drafts_lie_in_the_reply_and_only_texts_and_markers_carry_loss(codec):
    t = interleave(process(), codec, PIXELS)
    assert [(s.name, s.cycle, s.drawn) for s in t.stages] == [
        ("plan", 0, False), ("sketch", 0, True), ("inspect", 0, False), ("plan", 1, False), ("sketch", 1, True),
        ("inspect", 1, False), ("refine", 1, False), ("refine", 1, True),
    ]  # fmt: skip
    assert not t.loss_mask[t.ids == codec.image_pad_id].any()
    reply = t.turns[1]
    assert t.loss_mask[reply.start : reply.stop].sum() == reply.stop - reply.start - 3 * 9  # nine tokens a picture
    assert codec.decode(t.ids[reply.start : reply.stop].tolist()).replace("<|image_pad|>", "") == (
        f"{process().cycles[0].plan}<|vision_start|><|vision_end|>{Inspection()}"
        f"{process().cycles[1].plan}<|vision_start|><|vision_end|>{process().cycles[1].inspection}"
        f"{process().cycles[1].correction}<|vision_start|><|vision_end|><|im_end|>"
    )
    with pytest.raises(InvariantError, match="pixels of drafts.*are missing"):
        interleave(process(), codec, {FIRST: PICTURES[0]})


def test_masks_choose_stages_and_switches(codec):
    t = interleave(process(("inspect", "refine")), codec, PIXELS)

    def read(mask) -> str:
        return codec.decode(t.ids[mask].tolist())

    last = process().cycles[1]
    assert read(stage_mask(t, ["plan"], switches=False)) == str(process().cycles[0].plan)  # the other was not trained
    assert read(stage_mask(t, ["inspect"], switches=False)) == str(Inspection()) + str(last.inspection)
    assert read(stage_mask(t, ["refine"], switches=False)) == str(last.correction)
    assert read(stage_mask(t, [])) == "<|vision_start|><|vision_end|>" * 2 + "<|im_end|>"
    assert (stage_mask(t, STAGES) == t.loss_mask).all()
    (only,) = supervised([t], ["inspect"], switches=False)
    assert only.validate().num_loss_tokens == stage_mask(t, ["inspect"], switches=False).sum()
    with pytest.raises(ValueError, match="unknown stages"):
        stage_mask(t, ["paint"])


def test_files_keep_stages_and_the_trainers_packing_takes_them(codec, tmp_path):
    t = interleave(process(), codec, PIXELS)
    save(tmp_path / "t.safetensors", [t], PIXELS)
    (again,), pixels = load(tmp_path / "t.safetensors")
    assert again.stages == t.stages and again.images == t.images
    packed = pack([student_sequence(again, pixels, codec.image_grid)], codec.image_pad_id, codec.merge_size, "cpu")
    assert packed.targets.tolist() == t.ids[t.loss_mask].tolist() and len(packed.images) == 3
    with pytest.raises(InvariantError, match="overlaps"):
        t.replace(stages=(t.stages[0], t.stages[0])).validate()
    with pytest.raises(InvariantError, match="not the policy's text"):
        t.replace(stages=(Stage("plan", 0, 0, 2),)).validate()


def test_ablations_leave_stages_out(codec):
    def written(kept, trained=STAGES):
        t = interleave(process(trained), codec, PIXELS, kept)
        told = codec.decode(t.ids[t.turns[1].start :].tolist()).replace("<|image_pad|>", "")
        return told.replace("<|vision_start|><|vision_end|>", "#"), [i.sha256 for i in t.images], t

    first, last = process().cycles
    told, drafts, t = written(("plan", "sketch"))
    assert told == f"{first.plan}#{last.plan}#<|im_end|>" and drafts == [FIRST, MENDED]
    assert t.loss_mask[t.images[1].start - 1]  # what the cycle ended with is drawn, though it was a correction
    told, drafts, _ = written(("sketch", "inspect", "refine"))
    assert told == f"#{last.inspection}{last.correction}#<|im_end|>" and drafts == [WRONG, MENDED]
    told, drafts, _ = written(("sketch",))
    assert told == "#<|im_end|>" and drafts == [MENDED]
    told, drafts, _ = written(("plan", "sketch"), trained=("inspect", "refine"))
    assert told == f"{first.plan}#<|im_end|>" and drafts == [FIRST]  # a plan that was wrong on purpose is left out
    for kept in ((), ("plan",), ("sketch", "inspect")):
        with pytest.raises(ValueError, match="no form"):
            reduced(process(), kept)
