"""A rollout's record: every invariant breaks loudly, and a saved batch comes back bit for bit."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from genevolve_fast.trajectory import (
    Diagnostic,
    Failed,
    ImageRecord,
    InvariantError,
    Judged,
    Message,
    Program,
    Reference,
    Request,
    Trajectory,
    Turn,
    image_hash,
    load,
    save,
)

PIXELS = np.arange(96 * 96 * 3, dtype=np.uint32).astype(np.uint8).reshape(96, 96, 3)


def make(**changes) -> Trajectory:
    ids = np.arange(100, 120, dtype=np.int64)
    ids[4:7] = 7
    mask = np.zeros(20, dtype=bool)
    mask[10:15] = True
    good = Trajectory(
        id="r/0",
        request_id="q",
        group_id="g",
        ids=ids,
        loss_mask=mask,
        rollout_logps=np.where(mask, -0.5, 0).astype(np.float32),
        request_stop=8,
        turns=(
            Turn("system", 0, 3),
            Turn("user", 3, 10),
            Turn("assistant", 10, 16, "search", (11, 15)),
            Turn("tool", 16, 20),
        ),
        images=(ImageRecord("IMG_001", image_hash(PIXELS), (1, 6, 6), 4, 7),),
        messages=(Message("user", "draw"),),
        program=Program("the first reference image", (Reference("IMG_001", sha256=image_hash(PIXELS)),)),
        outcome=Judged(0.5, 0.4, 0.6, text_required=True),
        diagnostics=(Diagnostic("image", "spatial_layout", "fail", "0 of 2."),),
    )
    return good.replace(**changes)


def broken(array, index, value):
    out = array.copy()
    out[index] = value
    return out


GOOD = make()
BREAKS = {
    "int64": {"ids": GOOD.ids.astype(np.int32)},
    "negative id": {"ids": broken(GOOD.ids, 2, -1)},
    "loss_mask must be": {"loss_mask": GOOD.loss_mask[:-1]},
    "rollout_logps must be": {"rollout_logps": GOOD.rollout_logps.astype(np.float64)},
    "NaN": {"rollout_logps": broken(GOOD.rollout_logps, 11, np.nan)},
    "positive": {"rollout_logps": broken(GOOD.rollout_logps, 11, 0.1)},
    "off the loss mask": {"rollout_logps": broken(GOOD.rollout_logps, 2, -1)},
    "request_stop": {"request_stop": 0},
    "inside the request": {"request_stop": 12},
    "does not start": {"turns": (Turn("system", 0, 3), Turn("assistant", 4, 20))},
    "turns cover": {"turns": GOOD.turns[:-1]},
    "outside assistant": {"turns": (Turn("system", 0, 11), Turn("assistant", 11, 20))},
    "decision span": {"turns": (*GOOD.turns[:2], Turn("assistant", 10, 16, None, (9, 12)), GOOD.turns[3])},
    "overlaps or leaves": {"images": (ImageRecord("IMG_001", "x", (1, 6, 6), 4, 21),)},
    "not one placeholder": {"images": (ImageRecord("IMG_001", "x", (1, 6, 6), 3, 6),)},
    "empty": {"ids": GOOD.ids[:0]},
}


@pytest.mark.parametrize("message", BREAKS)
def test_each_broken_invariant_is_named(message):
    with pytest.raises(InvariantError, match=message):
        make(**BREAKS[message]).validate()


def test_round_trip_keeps_everything(tmp_path):
    batch = [
        GOOD,
        make(id="r/1", outcome=Failed("judge", "late"), program=None, images=(), error="x", termination="error"),
        make(id="r/2", outcome=None, turns=(Turn("user", 0, 10), Turn("assistant", 10, 20))),
    ]
    save(tmp_path / "batch.safetensors", batch, {image_hash(PIXELS): PIXELS})
    back, images = load(tmp_path / "batch.safetensors")
    for a, b in zip(batch, back, strict=True):
        for field in dataclasses.fields(Trajectory):
            x, y = getattr(a, field.name), getattr(b, field.name)
            assert np.array_equal(x, y) if isinstance(x, np.ndarray) else x == y, field.name
    assert np.array_equal(images[image_hash(PIXELS)], PIXELS)
    assert [p.name for p in tmp_path.iterdir()] == ["batch.safetensors"]


def test_an_empty_batch_can_be_saved(tmp_path):
    save(tmp_path / "none", [])
    assert load(tmp_path / "none") == ([], {})


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "batch.safetensors"
    save(path, [GOOD], {"0" * 64: PIXELS})
    with pytest.raises(InvariantError, match="another hash"):
        load(path)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(InvariantError, match="not a trajectory file"):
        load(path)


def test_decision_mask_covers_sampled_decision_tokens_only():
    assert np.flatnonzero(GOOD.decision_mask).tolist() == [11, 12, 13, 14]


REFERENCES = tuple(Reference(f"IMG_00{i}") for i in (1, 2, 3))
PROGRAMS = {
    "gen_prompt is empty": Program(" ", REFERENCES[:1]),
    "0 reference images": Program("a picture"),
    "3 reference images": Program("a picture", REFERENCES),
    "not sorted": Program("a picture", REFERENCES[1::-1]),
    "repeat": Program("a picture", (REFERENCES[0], REFERENCES[0])),
    "image id IMG_001": Program("like IMG_001", REFERENCES[:1]),
    "URL": Program("see https://x.org", REFERENCES[:1]),
    "reference image 2": Program("the second reference image", REFERENCES[:1]),
}


@pytest.mark.parametrize("rule", PROGRAMS)
def test_program_names_the_broken_rule(rule):
    with pytest.raises(InvariantError, match=rule):
        PROGRAMS[rule].validate()


def test_good_programs_pass():
    Program("the first reference image beside the second reference image", REFERENCES[:2]).validate()
    Program("a red circle").validate(min_references=0)


def test_request_keeps_every_field():
    row = {"id": 3, "question": " draw ", "gt_image": "a.png", "difficulty": "hard", "mine": [1]}
    request = Request.from_row(row)
    assert request.question == "draw" and request.to_row()["mine"] == [1] and request.to_row()["id"] == "3"
    assert Request.from_row({"id": "a", "prompt": "draw"}).question == "draw"
    with pytest.raises(InvariantError, match="neither"):
        Request.from_row({"id": "a"})
