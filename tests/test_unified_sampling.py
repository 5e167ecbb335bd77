"""A unified model draws with a cache what it would draw without one, and alone what it draws in company."""

from __future__ import annotations

import asyncio
from itertools import pairwise

import numpy as np
import pytest
import torch

from genevolve_fast.cli import main
from genevolve_fast.process.builders import Rejected
from genevolve_fast.process.rows import open_processes
from genevolve_fast.process.scene_graph import SceneGraph, SceneRequest
from genevolve_fast.process.trace import Cycle, Inspection, Plan, Process
from genevolve_fast.process.unified.latents import to_latents
from genevolve_fast.process.unified.reference import _decode
from genevolve_fast.process.unified.sampling import Drawing, Drawn, Sketcher, draw
from genevolve_fast.process.unified.traces import UnifiedSampler, attempts
from genevolve_fast.sandbox.strokes import requests
from genevolve_fast.sandbox.tiny_unified import tiny_codec
from genevolve_fast.trajectory import image_hash
from tests.reciting import always_a_black_cross, reciting

pytestmark = pytest.mark.slow

REQUESTS = ["a red circle", "a blue square and a green ring", "three rings"]
RNG = np.random.default_rng(0)
PICTURES = [np.kron(RNG.integers(0, 2, (2, 2, 3)) * 255, np.ones((8, 8, 1))).astype(np.uint8) for _ in range(4)]
PIXELS = {image_hash(p): p for p in PICTURES}


def process(n: int) -> Process:
    """n + 1 cycles for the n-th request."""
    cycles = [Cycle(Plan(f"add {k}", f"a scene of {k}"), sha, Inspection()) for k, sha in enumerate(PIXELS)]
    return Process(f"p{n}", REQUESTS[n], tuple(cycles[: n + 1]))


@pytest.fixture(scope="module")
def policy():
    processes = [process(n) for n in range(3)]
    texts = [t for p in processes for t in (p.request, *(f"{c.plan}{c.inspection}" for c in p.cycles))]
    return reciting(processes, PIXELS, tiny_codec(texts * 8, 16, 8)).double().eval()


def follow(policy, drawn):
    """(spans, latents, times) of the drafts in a reply."""
    ids = np.array(drawn.ids)
    starts = np.flatnonzero(ids == policy.codec.opens_image_id)[: len(drawn.drafts)] + 1
    patches = policy.flow.place.num_embeddings
    spans = [(int(s), int(s) + patches) for s in starts]
    latents = [to_latents([d], policy.codec.patch).double() for d in drawn.drafts]
    return spans, latents, [torch.zeros(patches, dtype=torch.float64) for _ in latents]


def test_a_trained_model_plans_draws_inspects_and_ends_by_itself(policy):
    for n, drawn in enumerate(draw(policy, REQUESTS, Drawing(steps=2))):
        cycles = process(n).cycles
        texts = [str(cycles[0].plan), *(f"{a.inspection}{b.plan}" for a, b in pairwise(cycles))]
        assert drawn.texts == [*texts, str(cycles[-1].inspection)] and drawn.ended
        assert len(drawn.drafts) == n + 1 and drawn.steps == 2 * (n + 1)


@torch.no_grad()
def test_texts_and_drafts_are_those_of_whole_sequences_without_a_cache(policy):
    out = draw(policy, REQUESTS, Drawing(steps=3, max_drafts=3, max_text=40))
    assert sum(len(o.drafts) for o in out) >= 3 and len({len(o.drafts) for o in out}) > 1
    for drawn in out:
        ids = torch.tensor(drawn.ids)
        spans, latents, times = follow(policy, drawn)
        best = (_decode(policy, ids, spans, latents, times) @ policy.head_weight.T).argmax(-1)
        prompt = len(policy.codec.encode("<|im_end|>\n<|im_start|>assistant\n"))
        begin = (
            next(n for n in range(len(ids)) if n > 5 and drawn.ids[:n].count(policy.codec.end_of_turn_id)) + prompt - 1
        )
        written = [n for n in range(begin, len(ids)) if drawn.ids[n] not in (policy.codec.image_pad_id,)]
        written = [n for n in written if drawn.ids[n] != policy.codec.closes_image_id]
        assert [int(best[n - 1]) for n in written] == [drawn.ids[n] for n in written]


def test_drafts_are_drawn_at_the_times_of_the_training_unless_told_otherwise(policy, tmp_path):
    def first(**told):
        return draw(policy, REQUESTS, Drawing(steps=3, max_drafts=1, max_text=40, **told))[0].drafts[0]

    plain, moved = first(), first(shift=3.0)
    policy.model.config.shift = 3.0
    try:
        assert (first() == moved).all() and (first(shift=1.0) == plain).all() and (plain != moved).any()
        policy.save_pretrained(tmp_path)
    finally:
        del policy.model.config.shift
    assert type(policy).from_pretrained(tmp_path).shift == 3.0 and policy.shift == 1.0
    with pytest.raises(ValueError, match="shift must be above 0"):
        Drawing(shift=0.0)


@torch.no_grad()
def test_euler_steps_follow_the_velocity_of_the_whole_sequence(policy):
    """The first draft of a request, integrated here without cache or batch."""
    from genevolve_fast.train.collect import stable_seed

    steps = 4
    drawn = draw(policy, REQUESTS, Drawing(steps=steps, max_drafts=1, max_text=40, seed=2))
    n = next(n for n, d in enumerate(drawn) if d.drafts)
    spans, _, _ = follow(policy, drawn[n])
    (start, stop) = spans[0]
    ids = torch.tensor(drawn[n].ids[:stop])
    generator = torch.Generator().manual_seed(stable_seed("draw", 2, n, REQUESTS[n]))
    z = torch.randn(stop - start, policy.flow.leave.out_features, generator=generator).double()
    for k in range(steps):
        t = torch.full((stop - start,), 1 - k / steps, dtype=torch.float64)
        hidden = _decode(policy, ids, spans[:1], [z], [t])[start:stop]
        z = z - policy.flow.velocity(hidden, z, t) / steps
    made = to_latents(drawn[n].drafts[:1], policy.codec.patch).double()
    assert (made - z.clamp(-1, 1)).abs().max() < 1 / 127
    assert drawn[n].steps == steps


def test_a_request_gets_the_same_alone_and_in_company_with_its_own_number_of_steps(policy):
    drawing = Drawing(steps=3, max_drafts=3, max_text=40, temperature=0.7)
    together = draw(policy, REQUESTS, drawing, steps=[2, 5, 3])
    apart = draw(policy, REQUESTS, drawing, steps=[2, 5, 3], batch=1)
    for a, b, steps in zip(together, apart, [2, 5, 3], strict=True):
        assert a.ids == b.ids and a.texts == b.texts and a.steps == steps * len(a.drafts)
        assert all((x == y).all() for x, y in zip(a.drafts, b.drafts, strict=True))
    again = draw(policy, REQUESTS, Drawing(steps=3, max_drafts=3, max_text=40, temperature=0.7, seed=1))
    other = [d for drawn in again for d in drawn.drafts], [d for drawn in together for d in drawn.drafts]
    assert len(other[0]) == len(other[1]) and any((x != y).any() for x, y in zip(*other, strict=True))


def test_a_reply_ends_by_its_own_marker_by_length_or_by_the_last_draft(policy):
    out = draw(policy, REQUESTS, Drawing(steps=1, max_drafts=2, max_text=23))
    for drawn in out:
        assert len(drawn.drafts) <= 2 and drawn.ended == (drawn.ids[-1] == policy.codec.end_of_turn_id)
        assert len(drawn.texts) >= len(drawn.drafts)
        assert drawn.result is None or (drawn.result == drawn.drafts[-1]).all()
    with pytest.raises(ValueError, match="temperature"):
        Drawing(temperature=-1)


def test_attempts_are_the_plans_with_the_drafts_that_followed_up_to_one_that_cannot_be_read():
    plans = [str(Plan(f"add {n}", f"a scene of {n}")) for n in range(3)]
    seen = str(Inspection(draft="it is green"))
    texts = [plans[0], f"{seen}<refine>mend it</refine>", f"{Inspection()}{plans[1]}", "", plans[2], "done"]
    made = attempts(Drawn([], texts, PICTURES[:3] + PICTURES[:2]))
    assert [a.plan.instruction for a in made] == ["add 0", "add 1"]
    assert (made[0].draft == PICTURES[0]).all() and (made[1].draft == PICTURES[2]).all()
    assert attempts(Drawn([], ["no plan"], PICTURES[:1])) == attempts(Drawn([])) == []


def test_a_trace_is_of_the_request_and_the_seed_whatever_was_asked_before(policy):
    asked = [SceneRequest(f"r{n}", text, "single_object", SceneGraph()) for n, text in enumerate(REQUESTS)]
    drawing = Drawing(steps=2, temperature=1.0, max_text=40)

    def traces(order, batch):
        sampler = UnifiedSampler(policy, drawing, asked, batch)
        out = {}
        for n in order:
            try:
                out[n] = asyncio.run(sampler.sample(asked[n], 0))
            except Rejected as rejected:
                out[n] = rejected.reason
        return out

    one, other = traces([0, 1, 2], 2), traces([2, 0, 2, 1], 64)
    told = lambda made: made if isinstance(made, str) else [(str(a.plan), a.draft.tobytes()) for a in made]  # noqa: E731
    assert {n: told(made) for n, made in one.items()} == {n: told(made) for n, made in other.items()}
    assert any(not isinstance(made, str) for made in one.values())


def test_the_command_mends_what_a_trained_model_gets_wrong(tmp_path, capsys):
    """A model that draws a black cross whatever is asked."""
    told = always_a_black_cross(tmp_path / "policy")
    data = ["process", "data", "--subset", "instruction_conflict", "--categories", "color_attr", "--count", "30"]
    flags = ["--sampler", str(tmp_path / "policy"), "--temperature", "0", "--steps", "4"]
    assert main([*data, "--out", str(tmp_path / "d"), *flags]) == 0
    rows = open_processes(tmp_path / "d")
    assert {p.extra["source"] for p in rows} == {"UnifiedSampler"}
    assert all(p.cycles[0].plan.description == told and p.cycles[0].inspection.plan for p in rows)
    assert main([*data, "--out", str(tmp_path / "d"), *flags[:-1], "5"]) == 2
    assert "settings" in capsys.readouterr().err
    assert main([*data, "--out", str(tmp_path / "e"), "--steps", "4"]) == 2
    assert "--steps would do nothing" in capsys.readouterr().err


def test_the_command_draws_traces_of_those_requests_alone_that_are_mended(tmp_path, monkeypatch):
    always_a_black_cross(tmp_path / "policy")
    drawn, draw_all = [], Sketcher.draw

    def noted(self, texts, *rest):
        drawn.extend(texts)
        return draw_all(self, texts, *rest)

    monkeypatch.setattr(Sketcher, "draw", noted)
    flags = ["--sampler", str(tmp_path / "policy"), "--temperature", "0", "--steps", "2", "--categories", "color_attr"]
    assert main(["process", "data", "--count", "8", "--out", str(tmp_path / "d"), *flags]) == 0
    asked = [request.text for request in requests("train", 0, 8, ("color_attr",))]
    assert drawn == [asked[1], asked[3], asked[5]]  # two conflicts, and of the two alignments the one that is wrong
