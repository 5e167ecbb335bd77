"""The embedded engine: its log-probs are the trainer's, its randomness is the request's, its cache is invisible."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
import torch

from benchmarks.whole_sequences import packed_causal
from genevolve_fast.batch.packing import TrainingSequence, pack
from genevolve_fast.protocols import Engine, EngineError, Sampling
from genevolve_fast.rollout.sampling import sample
from genevolve_fast.rollout.transformers_engine import TransformersEngine

PROMPT = np.random.default_rng(5).integers(40, 300, 60).tolist()


def turn(engine, sessions):
    """sessions: {id: (ids, images, sampling, seed)} answered in one round."""

    async def main():
        return await asyncio.gather(*(engine.generate(sid, *call) for sid, call in sessions.items()))

    for sid in sessions:
        engine.open(sid)
    return dict(zip(sessions, asyncio.run(main()), strict=True))


def recomputed_logps(policy, ids, images, start, temperature):
    grids = tuple(policy.codec.image_grid(p) for p in images)
    mask = np.arange(len(ids)) >= start
    batch = pack([TrainingSequence(np.array(ids), mask, tuple(images), grids)], policy.codec.image_pad_id, 2, "cpu")
    features = policy.image_features(batch.images)
    with torch.no_grad():
        hidden = policy.hidden(batch.ids, batch.positions, packed_causal(batch.cu_seqlens), batch.image_rows, features)
        logits = hidden[0, batch.rows] @ policy.head_weight.T
        logits[:, policy.codec.image_pad_id] = -torch.inf  # the engine never samples a placeholder
    return (logits / temperature).log_softmax(-1).gather(1, batch.targets[:, None])[:, 0].numpy()


def test_is_an_engine(policy):
    assert isinstance(TransformersEngine(policy), Engine)


def test_reported_logps_are_the_trainers_over_several_turns_with_images(policy, pictures):
    engine = TransformersEngine(policy)
    sampling = Sampling(temperature=0.8, top_p=1.0, max_tokens=7)
    codec, ids, images, sampled = policy.codec, PROMPT[:20], [], []
    image = [codec.image_pad_id]
    for step in range(3):
        images = [*images, pictures[step]]
        ids = [*ids, *image * codec.image_tokens(codec.image_grid(pictures[step])), 41, 42 + step]
        others = {f"other{i}": (PROMPT[: 10 + 7 * i], [], sampling, i) for i in range(3)} if step == 1 else {}
        out = turn(engine, {"s": (ids, images, sampling, step), **others})["s"]
        for sid in others:
            engine.close(sid)
        sampled.append((len(ids), out))
        ids = ids + out.ids
    for start, out in sampled:
        upto = start + len(out.ids)
        seen = sum(1 for i in range(1, len(ids[:upto])) if ids[i] == image[0] and ids[i - 1] != image[0])
        want = recomputed_logps(policy, ids[:upto], images[:seen], start, 0.8)
        assert np.abs(want - np.array(out.logps)).max() < 5e-6


def test_randomness_belongs_to_the_request(policy):
    sampling = Sampling(temperature=1.0, top_p=0.9, max_tokens=12)
    alone = turn(TransformersEngine(policy), {"a": (PROMPT[:30], [], sampling, 123)})["a"]
    crowd = {f"z{i}": (PROMPT[: 11 + i], [], sampling, i) for i in range(9)}
    together = turn(TransformersEngine(policy), {"a": (PROMPT[:30], [], sampling, 123), **crowd})["a"]
    other_seed = turn(TransformersEngine(policy), {"a": (PROMPT[:30], [], sampling, 124)})["a"]
    assert alone.ids == together.ids and alone.ids != other_seed.ids
    assert np.allclose(alone.logps, together.logps, atol=5e-6)


def test_stop_ids_lengths_and_compaction(policy):
    engine = TransformersEngine(policy)
    free = Sampling(temperature=1.0, top_p=1.0, max_tokens=30)
    calls = {f"s{i}": (PROMPT[: 20 + i], [], free, i) for i in range(8)}
    first = turn(engine, calls)
    stop = first["s3"].ids[4]
    again = TransformersEngine(policy)
    limited = {f"s{i}": (PROMPT[: 20 + i], [], Sampling(1.0, 1.0, 3 if i % 2 else 30, (stop,)), i) for i in range(8)}
    second = turn(again, limited)
    for sid, out in second.items():
        assert out.ids == first[sid].ids[: len(out.ids)]
        assert np.allclose(out.logps, first[sid].logps[: len(out.ids)], atol=5e-6)
        assert (out.finish_reason == "stop") == (out.ids[-1] == stop)
        assert out.finish_reason == "stop" or len(out.ids) == limited[sid][2].max_tokens


def test_changed_history_is_not_served_from_the_cache(policy):
    engine, sampling = TransformersEngine(policy), Sampling(1.0, 1.0, 6)
    turn(engine, {"a": (PROMPT[:30], [], sampling, 1)})
    changed = [*PROMPT[:10], 77, *PROMPT[11:30]]
    cached = turn(engine, {"a": (changed, [], sampling, 2)})["a"]
    fresh = turn(TransformersEngine(policy), {"a": (changed, [], sampling, 2)})["a"]
    assert cached == fresh


def test_weight_update_forgets_the_cache(policy):
    engine, sampling = TransformersEngine(policy), Sampling(1.0, 1.0, 6)
    out = turn(engine, {"a": (PROMPT[:30], [], sampling, 1)})["a"]
    with torch.no_grad():
        for p in policy.model.model.language_model.layers.parameters():
            p.mul_(1.3)
    engine.weights_updated()
    ids = PROMPT[:30] + out.ids + [50]
    assert turn(engine, {"a": (ids, [], sampling, 2)}) == turn(
        TransformersEngine(policy), {"a": (ids, [], sampling, 2)}
    )


def test_deterministic_batches_do_not_depend_on_who_asks_first(policy):
    sampling = Sampling(1.0, 0.9, 5)

    async def main(delays):
        engine = TransformersEngine(policy)
        for i in range(4):
            engine.open(f"s{i}")

        async def session(i):
            ids = PROMPT[: 15 + i]
            logps = []
            for r in range(3):
                await asyncio.sleep(delays[i] * (r + 1))
                out = await engine.generate(f"s{i}", ids, [], sampling, 10 * i + r)
                ids = [*ids, *out.ids, 60]
                logps += out.logps
            engine.close(f"s{i}")
            return ids, logps

        return await asyncio.gather(*(session(i) for i in range(4)))

    assert asyncio.run(main([0, 0.01, 0.03, 0.0])) == asyncio.run(main([0.03, 0, 0.0, 0.02]))


def test_errors_reach_the_caller_and_the_engine_lives_on(policy):
    engine, sampling = TransformersEngine(policy), Sampling(1.0, 1.0, 4)
    with pytest.raises(EngineError, match="not open"):
        asyncio.run(engine.generate("nobody", PROMPT[:5], [], sampling, 0))
    with pytest.raises(EngineError, match="placeholder"):
        turn(engine, {"a": ([50, policy.codec.image_pad_id, 51], [], sampling, 0)})
    engine.close("a")
    assert len(turn(engine, {"b": (PROMPT[:5], [], sampling, 0)})["b"].ids) == 4


def test_sampling_follows_the_truncated_distribution():
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))[None].repeat(20000, 1)
    uniforms = torch.rand(20000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ids, logps, _ = sample(logits, 1.0, 0.9, uniforms)
    share = torch.bincount(ids, minlength=4) / 20000
    want = torch.tensor([0.5, 0.3, 0.15, 0.0]) / 0.95
    assert (share - want).abs().max() < 0.015 and share[3] == 0
    assert torch.allclose(logps, want.log()[ids], atol=1e-5)
    assert sample(logits[:1], 0.0, 1.0, uniforms[:1])[0].item() == 0
    tiny = sample(logits[:1], 1.0, 1e-6, torch.tensor([0.999999], dtype=torch.float64))
    assert tiny.ids.item() == 0
