"""The packed step against the naive one: tool tokens, images, empty selection, zero spread, one-token replies."""

from __future__ import annotations

import dataclasses
import gc
import weakref

import numpy as np
import pytest
import torch
from naive import gradient, naive_loss
from rollouts import demonstrated

from genevolve_fast.ops import Objective
from genevolve_fast.sandbox.world import SandboxWorld
from genevolve_fast.train.update import TrainingRollout, accumulate_gradients

TEMPERATURE = 0.7


@pytest.fixture(scope="module")
def rollouts(tokenizer):
    from genevolve_fast.policy.codec import TransformersCodec
    from genevolve_fast.sandbox.tiny_policy import image_processor

    world, codec = SandboxWorld(), TransformersCodec(tokenizer, image_processor())
    return demonstrated(world, codec, world.requests("train", 5))


def one_token(t):
    """The same rollout with only its very last sampled token left to learn from."""
    keep = np.zeros(len(t), dtype=bool)
    keep[np.flatnonzero(t.loss_mask)[-1]] = True
    return t.replace(loss_mask=keep)


CASES = {
    "images and tool tokens": lambda ts: [
        TrainingRollout(t, a) for t, a in zip(ts, (1.0, -0.5, 0.3, -1.2), strict=False)
    ],
    "with experience": lambda ts: [
        TrainingRollout(t, a, (41, 50, 60, 42)) for t, a in zip(ts, (1.0, -0.5, 0.3, 0.0), strict=False)
    ],
    "experience in part of the batch": lambda ts: [
        TrainingRollout(ts[0], 0.7, (41, 50)),
        TrainingRollout(ts[1], -0.7),
        TrainingRollout(ts[2], 0.0, (44,)),
    ],
    "zero spread": lambda ts: [TrainingRollout(ts[0], 0.0), TrainingRollout(ts[1], 0.0), TrainingRollout(ts[2], 0.4)],
    "one-token replies": lambda ts: [
        TrainingRollout(one_token(ts[0]), 0.9, (41, 42)),
        TrainingRollout(one_token(ts[2]), -0.9),
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("scope", ["all", pytest.param("decision", marks=pytest.mark.slow)])
@pytest.mark.parametrize("budget", [700, pytest.param(10**6, marks=pytest.mark.slow)])
def test_packed_gradient_equals_the_naive_one(policy, rollouts, case, scope, budget):
    trajectories, images = rollouts
    batch = CASES[case](trajectories)
    objective = Objective(kl_coef=0.0, sdl_scope=scope)
    policy.double()
    naive_loss(policy, batch, images, objective, TEMPERATURE).backward()
    want = gradient(policy)
    policy.zero_grad()
    metrics, traces = accumulate_gradients(policy, batch, images, objective, temperature=TEMPERATURE, max_tokens=budget)
    got = gradient(policy)
    assert want.norm() > 0
    assert (got - want).norm() <= 1e-5 * want.norm()
    selected = sum(int(tr.selected.sum()) for tr in traces.values())
    assert (selected > 0) == any(r.experience_ids for r in batch if scope == "all" or r.trajectory.decision_mask.any())


def test_nothing_is_selected_without_decision_tokens(policy, rollouts):
    trajectories, images = rollouts
    bare = trajectories[0].replace(turns=tuple(dataclasses.replace(t, decision=None) for t in trajectories[0].turns))
    batch = [TrainingRollout(bare, 0.5, (41, 42)), TrainingRollout(trajectories[1], -0.5)]
    metrics, traces = accumulate_gradients(
        policy, batch, images, Objective(kl_coef=0.0, sdl_scope="decision"), temperature=1.0, max_tokens=10**6
    )
    assert not traces[bare.id].selected.any() and metrics["actor/sdl_loss"] == 0
    assert torch.isfinite(gradient(policy)).all()


def test_reference_term_reaches_rollouts_without_advantage(policy, rollouts):
    from genevolve_fast.policy.weights import FrozenCopy

    trajectories, images = rollouts
    reference = FrozenCopy(policy)
    with torch.no_grad():
        for p in policy.model.model.language_model.layers.parameters():
            p.add_(0.02 * torch.randn_like(p))
    batch = [TrainingRollout(t, 0.0) for t in trajectories[:2]]
    metrics, _ = accumulate_gradients(
        policy, batch, images, Objective(kl_coef=0.5), temperature=1.0, max_tokens=10**6, reference=reference
    )
    assert metrics["actor/kl"] > 0 and gradient(policy).norm() > 0


def test_changed_image_is_refused(policy, rollouts):
    from genevolve_fast.policy.positions import ImageMismatchError

    trajectories, images = rollouts
    seen = next(t for t in trajectories if t.images)
    with pytest.raises(ImageMismatchError, match="missing"):
        accumulate_gradients(
            policy, [TrainingRollout(seen, 1.0)], {}, Objective(kl_coef=0.0), temperature=1.0, max_tokens=10**6
        )
    wrong = seen.replace(images=tuple(dataclasses.replace(r, grid=(1, 4, 6)) for r in seen.images))
    with pytest.raises(ImageMismatchError, match="grid"):
        accumulate_gradients(
            policy, [TrainingRollout(wrong, 1.0)], images, Objective(kl_coef=0.0), temperature=1.0, max_tokens=10**6
        )


def test_a_step_keeps_no_rows_of_its_micro_batches(policy, rollouts, monkeypatch):
    from genevolve_fast.train import update

    trajectories, images = rollouts
    packed = []
    real = update._Step.reply

    def reply(step, micro, *rest):
        packed.extend(weakref.ref(x) for x in (micro.student.ids, micro.student.positions, micro.rows))
        real(step, micro, *rest)

    def results(step):
        gc.collect()
        assert len(packed) > 3 and all(x() is None for x in packed)
        return {}, {}

    monkeypatch.setattr(update._Step, "reply", reply)
    monkeypatch.setattr(update._Step, "results", results)
    batch = [TrainingRollout(t, a, (41, 50)) for t, a in zip(trajectories, (1.0, -0.5, 0.3, -1.2), strict=False)]
    accumulate_gradients(policy, batch, images, Objective(kl_coef=0.0), temperature=TEMPERATURE, max_tokens=700)
