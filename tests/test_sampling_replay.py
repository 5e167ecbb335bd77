"""Training on the distribution that was sampled from: engine, trajectory, batch, update, verify, metrics."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from grouped import mixed_batch
from naive import gradient, naive_loss
from safetensors.numpy import load_file, save_file
from test_engine import PROMPT, turn
from test_trajectory import GOOD, make

from genevolve_fast.agent.conversation import TokenConversation
from genevolve_fast.ops import Objective
from genevolve_fast.policy.model import Policy
from genevolve_fast.policy.weights import FrozenCopy
from genevolve_fast.protocols import Generation, Sampling
from genevolve_fast.rollout.sampling import sample
from genevolve_fast.rollout.transformers_engine import TransformersEngine
from genevolve_fast.sandbox.tiny_policy import start_path
from genevolve_fast.sandbox.world import SandboxWorld, open_world
from genevolve_fast.train.collect import sample_rollouts
from genevolve_fast.train.config import ConfigError, EvolveConfig, parse_config
from genevolve_fast.train.evolve import session_settings
from genevolve_fast.train.metrics import engine_mismatch
from genevolve_fast.train.update import TrainingRollout, accumulate_gradients
from genevolve_fast.train.verify import verify
from genevolve_fast.trajectory import InvariantError, load, save

NUCLEUS = {"temperature": 0.7, "top_p": 0.9, "replay_sampling_mask": True, "max_tokens_per_turn": 60, "max_rounds": 3}


def masked(t, seed=0, share=0.8):
    """The same rollout, most of its tokens sampled from a few ids."""
    random, ids, counts = np.random.default_rng((seed, len(t))), [], []
    for y in t.ids[t.loss_mask]:
        own = np.unique([y, *random.integers(40, 300, 6)]) if random.random() < share else []
        ids += random.permutation(own).tolist()
        counts.append(len(own))
    return t.replace(mask_ids=np.array(ids, np.int32), mask_counts=np.array(counts, np.int32)).validate()


def masked_batch(policy, pictures):
    """mixed_batch; the first rollout of the last group was sampled by an engine that told no sets."""
    rollouts, images = mixed_batch(policy.codec, pictures)
    bare = rollouts[-2]
    return [r if r is bare else dataclasses.replace(r, trajectory=masked(r.trajectory)) for r in rollouts], images


# --- sampled, recorded, saved -----------------------------------------------------------------------------------------


def test_kept_ids_are_the_nucleus():
    torch.manual_seed(0)
    logits = 3 * torch.randn(50, 40)
    ids, logps, kept = sample(logits, 0.7, 0.8, torch.rand(50, dtype=torch.float64), return_kept=True)
    for row, (y, own) in enumerate(zip(ids.tolist(), kept, strict=True)):
        p = torch.softmax(logits[row] / 0.7, 0)
        assert y in own and len(set(own)) == len(own)
        assert p[own].sum() >= 0.8 - 1e-6 and p[own].sum() - p[own].min() < 0.8 + 1e-6
        assert p[own].min() >= p.sort(descending=True).values[len(own) - 1]
        assert math.isclose(float(logps[row]), math.log(p[y] / p[own].sum()), abs_tol=1e-5)
    for temperature, top_p in ((0.0, 0.8), (0.7, 1.0)):
        assert sample(logits, temperature, top_p, torch.rand(50).double(), return_kept=True).kept is None


def test_the_engine_tells_the_sets_to_those_who_ask(policy):
    asks = Sampling(0.7, 0.8, 6, sampling_mask=True)
    calls = {
        "asks": asks,
        "does not": dataclasses.replace(asks, sampling_mask=False),
        "everything": dataclasses.replace(asks, top_p=1.0),
        "greedy": dataclasses.replace(asks, temperature=0.0),
    }
    out = turn(TransformersEngine(policy), {name: (PROMPT[:30], [], s, 1) for name, s in calls.items()})
    told = out["asks"].sampling_mask
    assert len(told) == 6 and all(y in own for y, own in zip(out["asks"].ids, told, strict=True))
    assert out["asks"].ids == out["does not"].ids
    assert [out[name].sampling_mask for name in ("does not", "everything", "greedy")] == [None] * 3


SETS = dict(mask_ids=np.array([110, 5, 9, 112, 113, 7], np.int32), mask_counts=np.array([3, 0, 1, 2, 0], np.int32))


def test_a_trajectory_keeps_its_sets(tmp_path):
    batch = [make(id="r/1", **SETS), GOOD, make(id="r/2", **SETS)]
    save(tmp_path / "batch", batch)
    back, _ = load(tmp_path / "batch")
    for a, b in zip(batch, back, strict=True):
        assert np.array_equal(a.mask_ids, b.mask_ids) and np.array_equal(a.mask_counts, b.mask_counts)
    assert [t.masked_tokens for t in back] == [3, 0, 3]


def test_files_of_releases_without_sets_are_read(tmp_path):
    save(tmp_path / "new", [GOOD, GOOD])
    from safetensors import safe_open

    with safe_open(str(tmp_path / "new"), framework="numpy") as f:
        meta = f.metadata()
    tensors = {name: x for name, x in load_file(tmp_path / "new").items() if not name.startswith("mask_")}
    save_file(tensors, tmp_path / "old", metadata=meta)
    back, _ = load(tmp_path / "old")
    assert len(back) == 2 and not len(back[1].mask_counts) and "mask_ids" not in json.dumps(meta)


BREAKS = {
    "mask_ids must be": {"mask_ids": SETS["mask_ids"].astype(np.int64)},
    "mask_counts must be": {"mask_counts": SETS["mask_counts"].astype(np.int64)},
    "mask_counts must have 5": {"mask_counts": SETS["mask_counts"][:-1]},
    "contain a negative number": {"mask_counts": np.array([3, 0, 1, 3, -1], np.int32)},
    "mask_counts sum to 7": {"mask_counts": np.array([3, 0, 1, 2, 1], np.int32)},
    "contain a negative id": {"mask_ids": np.array([110, 5, -9, 112, 113, 7], np.int32)},
    r"loss token \[2\] lacks": {"mask_ids": np.array([110, 5, 9, 111, 113, 7], np.int32)},
}


@pytest.mark.parametrize("message", BREAKS)
def test_each_broken_set_is_named(message):
    with pytest.raises(InvariantError, match=message):
        make(**(SETS | BREAKS[message])).validate()


def test_a_turn_without_sets_keeps_the_others_in_place(policy):
    """As where one of two servers returns none."""
    turns = [
        Generation([41, 42], [-0.1, -0.1], "length", [[41, 7], [42]]),
        Generation([43], [-0.1], "length"),
        Generation([44], [-0.1], "length", [[8, 9, 44]]),
    ]

    class Answers:
        async def generate(self, *_):
            return turns.pop(0)

    talk = TokenConversation(Answers(), policy.codec, "s")
    talk.begin("system", "question")
    for _ in range(3):
        talk.keep(asyncio.run(talk.ask(Sampling(), 1)), None)
        talk.observe("go on")
    kept = talk.arrays()
    assert kept["ids"][kept["loss_mask"]].tolist() == [41, 42, 43, 44]
    assert kept["mask_counts"].tolist() == [2, 1, 0, 3] and kept["mask_ids"].tolist() == [41, 7, 42, 8, 9, 44]


# --- trained on -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sampled():
    """(policy, sampled trajectories, images) of the shipped start at temperature 0.7, top-p 0.9."""
    policy = Policy.from_pretrained(start_path()).eval()
    config = parse_config(EvolveConfig, {"rollout": NUCLEUS, "objective": {"kl_coef": 0.0}})
    sandbox = SandboxWorld()
    world = open_world(sandbox)
    rollouts = sample_rollouts(
        sandbox.requests("train", 3), 2, world=world, engine=TransformersEngine(policy), codec=policy.codec,
        settings=session_settings(config.rollout, world), seed=3,
    )  # fmt: skip
    return policy, [t.validate() for t in rollouts.trajectories], rollouts.images


def without_sets(t):
    return t.replace(mask_ids=t.mask_ids[:0], mask_counts=t.mask_counts[:0])


def test_on_policy_the_trainer_has_the_engines_log_probs(sampled):
    policy, trajectories, images = sampled
    gaps = {}
    for name, change in (("replayed", lambda t: t), ("whole vocabulary", without_sets)):
        batch = [TrainingRollout(change(t), 1.0) for t in trajectories]
        metrics, traces = accumulate_gradients(
            policy, batch, images, Objective(kl_coef=0), temperature=0.7, max_tokens=4096
        )
        gaps[name] = max(float(np.abs(traces[t.id].logps - t.rollout_logps[t.loss_mask]).max()) for t in trajectories)
        whole = name != "replayed"
        assert metrics["rollout_corr/masked_share"] == (0.0 if whole else 1.0)
        assert (metrics["rollout_corr/kl"] < 1e-8) != whole
        rounds = max(sum(turn.role == "assistant" for turn in t.turns) for t in trajectories)
        assert rounds > 1 and f"rollout_corr/kl/round_{rounds:02d}" in metrics
        assert f"rollout_corr/kl/round_{rounds + 1:02d}" not in metrics
        assert (metrics["rollout_corr/logp_difference_abs/round_01"] < 1e-5) != whole
    assert gaps["replayed"] < 1e-4 and gaps["whole vocabulary"] > 1e-2
    policy.zero_grad(set_to_none=True)


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["all", pytest.param("decision", marks=pytest.mark.slow)])
def test_packed_gradient_equals_the_naive_one(policy, pictures, scope):
    batch, images = masked_batch(policy.double(), pictures)
    objective = Objective(kl_coef=0.0, sdl_scope=scope, sdl_permille=300)
    naive_loss(policy, batch, images, objective, 0.7).backward()
    want = gradient(policy)
    policy.zero_grad()
    accumulate_gradients(policy, batch, images, objective, temperature=0.7, max_tokens=90)
    got = gradient(policy)
    assert (got - want).norm() <= 1e-6 * want.norm()  # norms are taken in fp32
    policy.zero_grad()
    bare = [dataclasses.replace(r, trajectory=without_sets(r.trajectory)) for r in batch]
    accumulate_gradients(policy, bare, images, objective, temperature=0.7, max_tokens=90)
    assert (gradient(policy) - want).norm() > 0.1 * want.norm()


@pytest.mark.slow
@pytest.mark.parametrize("other", [False, True])
def test_verify_replays_the_sets_too(policy, pictures, other):
    batch, images = masked_batch(policy, pictures)
    weights = {}
    if other:
        weights = dict(reference=FrozenCopy(policy), teacher=FrozenCopy(policy))
        with torch.no_grad():
            for p in policy.decoder.layers.parameters():
                p.mul_(1.05)
    objective = Objective(kl_coef=0.3 if other else 0.0, sdl_permille=300, sdl_scope="decision", rollout_is="token")
    seen = verify(policy, batch, images, objective, temperature=0.7, max_tokens=90, **weights)
    assert seen.holds and 0 < seen.gradient < 1e-5 and 0 < seen.logp < 1e-4


def test_mismatch_by_round():
    t = make(turns=(*GOOD.turns[:2], *_turns((10, 12), (12, 16)), GOOD.turns[3]))
    lonely = make(id="unseen")
    engine = t.rollout_logps[t.loss_mask]
    found = engine_mismatch([t, lonely], {t.id: engine + np.array([0.5, -0.5, 0.1, 0.1, -30.0])})
    k3 = [math.exp(d) - 1 - d for d in (0.5, -0.5, 0.1, 0.1, -20.0)]
    assert math.isclose(found["rollout_corr/kl/round_01"], sum(k3[:2]) / 2, rel_tol=1e-6)
    assert math.isclose(found["rollout_corr/kl/round_02"], sum(k3[2:]) / 3, rel_tol=1e-6)
    assert math.isclose(found["rollout_corr/kl"], sum(k3) / 5, rel_tol=1e-6)
    assert math.isclose(found["rollout_corr/logp_difference_abs/round_02"], 30.2 / 3, rel_tol=1e-6)
    assert found["rollout_corr/masked_share"] == 0
    assert engine_mismatch([make(**SETS), lonely], {}) == {"rollout_corr/masked_share": 3 / 10}


def _turns(*spans):
    return [dataclasses.replace(GOOD.turns[2], start=a, stop=b, decision=None) for a, b in spans]


def test_replay_without_a_nucleus_is_refused():
    with pytest.raises(ConfigError, match="replay_sampling_mask with rollout.top_p 1 would do nothing"):
        parse_config(EvolveConfig, {"rollout": {"top_p": 1.0, "replay_sampling_mask": True}})
    config = parse_config(EvolveConfig, {"rollout": NUCLEUS})
    world = open_world(SandboxWorld())
    assert session_settings(config.rollout, world).sampling_mask
    assert not session_settings(config.rollout, world, 0.6, 0.9).sampling_mask  # the bench trains nothing
