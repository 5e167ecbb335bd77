"""`verify` measures a true deviation, and sees a wrong one."""

from __future__ import annotations

import pytest
import torch
from grouped import mixed_batch, text_policy

from genevolve_fast.ops import Objective
from genevolve_fast.policy import passes
from genevolve_fast.policy.weights import FrozenCopy
from genevolve_fast.train.verify import verify


def deviation(policy, rollouts, images, **rest):
    options = {name: rest.pop(name) for name in ("rollout_is", "sdl_scope") if name in rest}
    objective = Objective(kl_coef=0.3 if rest.get("reference") else 0.0, sdl_permille=300, **options)
    return verify(policy, rollouts, images, objective, temperature=0.7, max_tokens=90, **rest)


@pytest.mark.parametrize("kind", ["Qwen3VL", "Qwen3"])
def test_the_shared_pass_holds(kind, policy, pictures):
    policy = policy if kind == "Qwen3VL" else text_policy(kind)
    rollouts, images = mixed_batch(policy.codec, pictures if policy.has_vision else [])
    seen = deviation(policy, rollouts, images)
    assert seen.holds and 0 < seen.gradient < 1e-5 and 0 < seen.logp < 1e-4 and "independent gradient" in str(seen)
    assert all(p.grad is None for p in policy.parameters())


def test_other_weights_are_compared_too(policy, pictures):
    rollouts, images = mixed_batch(policy.codec, pictures)
    other = FrozenCopy(policy)
    with torch.no_grad():
        for p in policy.decoder.layers.parameters():
            p.mul_(1.05)
    assert deviation(policy, rollouts, images, reference=other, teacher=other).holds


@pytest.mark.parametrize("options", [dict(rollout_is="token"), dict(sdl_scope="decision")], ids=str)
def test_weights_and_scope_of_each_token_are_compared(policy, pictures, options):
    rollouts, images = mixed_batch(policy.codec, pictures)
    seen = deviation(policy, rollouts, images, **options)
    assert seen.holds and 0 < seen.gradient < 1e-5


def test_a_lost_first_token_is_seen(policy, pictures, monkeypatch):
    """What NeMo Automodel's prefix sharing did: the prediction of the first reply token had no gradient."""
    rollouts, images = mixed_batch(policy.codec, pictures)

    def forgetful(prefix, x, rows):
        lost = torch.where((rows < len(prefix.last))[:, None], torch.zeros(()), torch.ones(()))
        h = real(prefix, x, rows)
        return h * lost + (h * (1 - lost)).detach()

    real = passes.predicting
    monkeypatch.setattr("genevolve_fast.train.update.predicting", forgetful)
    seen = deviation(policy, rollouts, images)
    assert not seen.holds and "DEVIATES" in str(seen)
