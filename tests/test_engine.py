"""The embedded engine: its log-probs are the trainer's, its randomness is the request's, its cache is invisible."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
import torch
from rollouts import recomputed_logps

from genevolve_fast.policy.model import Policy
from genevolve_fast.protocols import EngineError, Sampling, TrainedEngine
from genevolve_fast.rollout import transformers_engine
from genevolve_fast.rollout.rows import Forwards
from genevolve_fast.rollout.sampling import sample
from genevolve_fast.rollout.transformers_engine import TransformersEngine
from genevolve_fast.sandbox.tiny_policy import start_path

PROMPT = np.random.default_rng(5).integers(40, 300, 60).tolist()


def turn(engine, sessions):
    """sessions: {id: (ids, images, sampling, seed)} answered in one round."""

    async def main():
        return await asyncio.gather(*(engine.generate(sid, *call) for sid, call in sessions.items()))

    for sid in sessions:
        engine.open(sid)
    return dict(zip(sessions, asyncio.run(main()), strict=True))


def test_is_an_engine(policy):
    assert isinstance(TransformersEngine(policy), TrainedEngine)


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
    engine.update_weights(1)
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


# --- continuous batching ----------------------------------------------------------------------------------------------


def continuous(policy, **settings):
    return TransformersEngine(policy, deterministic=False, **settings)


def ask(engine, session_id, ids, sampling, seed=0, images=()):
    engine.open(session_id)
    return asyncio.create_task(engine.generate(session_id, ids, images, sampling, seed))


async def until(condition):
    for _ in range(20_000):
        if condition():
            return
        await asyncio.sleep(0.001)
    raise AssertionError("it did not come to that")


async def flying(engine, rows):
    await until(lambda: len(engine._flights) == rows)


LONG = Sampling(temperature=1.0, top_p=1.0, max_tokens=200)
SHORT = Sampling(temperature=1.0, top_p=1.0, max_tokens=5)


@pytest.mark.slow
def test_rows_enter_and_leave_between_steps(policy):
    async def main():
        engine, order = continuous(policy), []
        slow = ask(engine, "long", PROMPT[:20], LONG)
        slow.add_done_callback(lambda _: order.append("long"))
        for i in range(3):
            await flying(engine, 1)
            out = await ask(engine, f"short{i}", PROMPT[: 10 + i], SHORT, i)
            assert len(out.ids) == 5
            order.append(i)
        await slow
        return order

    assert asyncio.run(main()) == [0, 1, 2, "long"]


@pytest.mark.slow
def test_tokens_do_not_depend_on_who_comes_and_goes(pictures):
    policy = Policy.from_pretrained(start_path()).eval()  # random weights would draw between near-ties
    image = [policy.codec.image_pad_id] * policy.codec.image_tokens(policy.codec.image_grid(pictures[0]))
    nucleus = Sampling(temperature=0.7, top_p=0.95, max_tokens=40)

    async def talk(engine, name, seed, delay):
        """Three turns, the second with a picture."""
        ids, images, said = PROMPT[: 12 + seed], [], []
        engine.open(name)
        for turn_ in range(3):
            await asyncio.sleep(delay * turn_)
            ids, images = ([*ids, *image], [pictures[0]]) if turn_ == 1 else (ids, images)
            out = await engine.generate(name, ids, images, nucleus, 10 * seed + turn_)
            ids = [*ids, *out.ids, 50]
            said.append(out)
        engine.close(name)
        return said

    async def crowd():
        engine = continuous(policy, max_batch=4)
        return await asyncio.gather(*(talk(engine, f"s{i}", i, 0.003 * (i % 3)) for i in range(7)))

    async def alone(i):
        return await talk(continuous(policy), f"s{i}", i, 0)

    together = asyncio.run(crowd())
    for i in (0, 3, 6):
        for one, same in zip(asyncio.run(alone(i)), together[i], strict=True):
            assert one.ids == same.ids
            assert np.allclose(one.logps, same.logps, atol=2e-5)


def test_at_most_max_batch_rows_are_in_flight(policy, monkeypatch):
    seen, decode = [], Forwards.decode
    monkeypatch.setattr(
        Forwards, "decode", lambda self, rows, cache: seen.append(len(rows)) or decode(self, rows, cache)
    )

    async def main():
        engine = continuous(policy, max_batch=3)
        out = await asyncio.gather(*(ask(engine, f"s{i}", PROMPT[: 9 + i], SHORT, i) for i in range(8)))
        assert engine.sampled_tokens == sum(len(o.ids) for o in out) == 40

    asyncio.run(main())
    assert max(seen) == 3


def test_newcomers_are_computed_in_portions(policy, monkeypatch):
    monkeypatch.setattr(transformers_engine, "_PREFILL_TOKENS", 50)
    seen, prefill = [], Forwards.prefill

    def counted(self, rows, new, cache):
        seen.append([len(fresh.ids) for fresh in new])
        return prefill(self, rows, new, cache)

    monkeypatch.setattr(Forwards, "prefill", counted)

    async def main():
        engine = continuous(policy)
        lengths = (60, 10, 20, 20, 12)
        await asyncio.gather(*(ask(engine, f"s{i}", PROMPT[:n], SHORT, i) for i, n in enumerate(lengths)))

    asyncio.run(main())
    assert seen == [[60], [10, 20], [20, 12]]


def test_cancelled_closed_and_aborted_calls_leave_the_batch(policy):
    async def main():
        engine = continuous(policy)
        gone, closed, cut = (ask(engine, name, PROMPT[:20], LONG) for name in ("gone", "closed", "cut"))
        await flying(engine, 3)
        gone.cancel()
        engine.close("closed")
        assert engine.abort(["cut"]) == 1
        out = await cut
        assert out.finish_reason == "abort" and 1 <= len(out.ids) < 200
        with pytest.raises(EngineError, match="was closed"):
            await closed
        assert len((await ask(engine, "after", PROMPT[:20], SHORT)).ids) == 5
        await flying(engine, 0)
        assert gone.cancelled()

    asyncio.run(main())


def test_a_row_that_cannot_be_computed_fails_alone(policy):
    async def main():
        engine = continuous(policy)
        fine = ask(engine, "fine", PROMPT[:20], SHORT)
        no_image = ask(engine, "no image", [50, policy.codec.image_pad_id, 51], SHORT)
        no_id = ask(engine, "no id", [50, 10**9], SHORT)
        with pytest.raises(EngineError, match="placeholder"):
            await no_image
        with pytest.raises(EngineError, match="ids must be"):
            await no_id
        assert len((await fine).ids) == 5

    asyncio.run(main())


@pytest.mark.parametrize("deterministic", [True, False])
def test_an_error_of_the_batch_fails_its_calls_and_the_session_recovers(policy, monkeypatch, deterministic):
    async def main():
        engine = TransformersEngine(policy, deterministic=deterministic)
        first = await ask(engine, "s", PROMPT[:20], SHORT, 1)
        ids = [*PROMPT[:20], *first.ids, 60]
        with monkeypatch.context() as broken:
            broken.setattr(Forwards, "decode", lambda *_: 1 / 0)
            with pytest.raises(EngineError, match="ZeroDivisionError"):
                await ask(engine, "s", ids, SHORT, 2)
        return ids, await ask(engine, "s", ids, SHORT, 2)

    ids, out = asyncio.run(main())
    fresh = turn(TransformersEngine(policy), {"s": (ids, [], SHORT, 2)})["s"]
    assert out.ids == fresh.ids and np.allclose(out.logps, fresh.logps, atol=5e-6)


def test_rows_in_flight_go_on_with_new_weights(policy):
    start = PROMPT[:20]

    async def main():
        engine = continuous(policy)
        slow = ask(engine, "s", start, LONG, 3)
        await flying(engine, 1)
        await asyncio.sleep(0.05)

        def change():
            with torch.no_grad():
                for p in policy.model.model.language_model.layers.parameters():
                    p.mul_(1.3)
            engine.update_weights(7)

        await engine.exclusively(change)
        return await slow

    out = asyncio.run(main())
    (old, zero), (new, at) = out.versions
    assert (old, zero, new) == (0, 0, 7) and 0 < at < 200
    want = recomputed_logps(policy, [*start, *out.ids], [], len(start) + at, 1.0)
    assert np.abs(want - np.array(out.logps[at:])).max() < 5e-6


def test_rows_that_cannot_start_over_with_new_weights_fail(policy, monkeypatch):
    async def main():
        engine = continuous(policy)
        slow = ask(engine, "s", PROMPT[:20], LONG)
        await flying(engine, 1)
        with monkeypatch.context() as broken:
            broken.setattr(Forwards, "prefill", lambda *_: 1 / 0)
            await engine.exclusively(lambda: engine.update_weights(1))
            with pytest.raises(EngineError, match="ZeroDivisionError"):
                await asyncio.wait_for(slow, 5)
        assert len((await ask(engine, "s", PROMPT[:20], SHORT)).ids) == 5

    asyncio.run(main())


def test_a_held_engine_stands_still(policy):
    async def main():
        engine = continuous(policy)
        slow = ask(engine, "s", PROMPT[:20], LONG)
        await flying(engine, 1)
        engine.hold()
        await asyncio.sleep(0.05)
        before = len(engine._flights.rows[0].out_ids)
        await asyncio.sleep(0.1)
        assert len(engine._flights.rows[0].out_ids) == before < 200
        engine.release()
        assert len((await slow).ids) == 200

    asyncio.run(main())
