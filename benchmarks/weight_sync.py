"""Is a server's policy the trainer's after every update? `python -m benchmarks.weight_sync`.

The tiny policy trains on rollouts that a server process samples, with whole weights and with an adapter, pictures in
the prompts. After each update are counted: parameters whose bytes differ; sampled tokens whose log-prob differs from
the trainer's by more than 1e-4; and the same for turns of sessions that began before the update, whose kept prefix
would be stale.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch

from genevolve_fast import event_loop
from genevolve_fast.commands.opening import config_path, open_policy, open_world
from genevolve_fast.evaluate.scoreboard import commit, device, record
from genevolve_fast.files import write_text
from genevolve_fast.incidents import Incidents
from genevolve_fast.protocols import EngineError, Sampling
from genevolve_fast.rollout.transformers_engine import TransformersEngine
from genevolve_fast.rollout.vllm_server import VllmServerEngine
from genevolve_fast.train.config import EvolveConfig, load_config
from genevolve_fast.train.evolve import new_memory
from genevolve_fast.train.optim import build_optimizer
from genevolve_fast.train.prepare import prepare
from genevolve_fast.train.single import sample_step
from genevolve_fast.train.strategies import Strategy
from genevolve_fast.train.update import accumulate_gradients

RESULTS = Path(__file__).parent / "results" / "weight_sync.json"
TOLERANCE = 1e-4  # nats
SESSIONS = 4  # that go on over an update
SMALL = ("rollout.prompts_per_step=4", "rollout.num_generations=4", "rollout.top_p=1.0", "pool_size=400")


@dataclass
class Counts:
    """What was compared, and what differed."""

    mode: str
    updates: int = 0
    parameters: int = 0
    parameters_differing: int = 0
    tokens: int = 0
    tokens_differing: int = 0
    largest_difference: float = 0.0
    resumed_tokens: int = 0
    stale_tokens: int = 0
    largest_stale_difference: float = 0.0
    images: int = 0
    sync_seconds: list[float] = field(default_factory=list)

    @property
    def differing(self) -> int:
        return self.parameters_differing + self.tokens_differing + self.stale_tokens

    @property
    def compared(self) -> int:
        return self.parameters + self.tokens + self.resumed_tokens


def measure(mode: str, steps: int, url: str, folder: Path) -> Counts:
    """Train `steps` steps with a server that samples; mode: weights, merged or adapter."""
    adapter = [] if mode == "weights" else ["policy.lora.rank=4", "optim.lr=0.01"]
    config = load_config(EvolveConfig, config_path("demo"), [*SMALL, *adapter])
    sandbox, world = open_world(config)
    policy = open_policy(config.policy).eval()
    prepare(policy, config.policy, config.seed)
    optimizer = build_optimizer(policy, config.optim, steps)
    memory = new_memory(config, world)
    pool = sandbox.requests("train", config.pool_size, seed=config.seed)
    engine = VllmServerEngine(
        policy, [url], incidents=Incidents(), sync_dir=folder / mode, merge_lora=mode == "merged", verify_every=1
    )
    counts = Counts(mode)
    _update(engine, 0, counts)
    for step in range(steps):
        batch, images = sample_step(config, policy, world, pool, engine, memory, step)
        settings = {"temperature": config.rollout.temperature, "max_tokens": config.max_tokens_per_microbatch}
        _, traces = accumulate_gradients(policy, batch, images, config.objective, **settings)
        for r in batch:
            if r.trajectory.id in traces:
                sampled = r.trajectory.rollout_logps[r.trajectory.loss_mask]
                gaps = np.abs(traces[r.trajectory.id].logps - sampled)
                counts.tokens += len(gaps)
                counts.tokens_differing += int((gaps > TOLERANCE).sum())
                counts.largest_difference = max(counts.largest_difference, float(gaps.max()))
        begun = _begin(engine, policy, batch, images, counts)
        Strategy().norm(policy, config.optim.max_grad_norm)
        optimizer.step()
        _update(engine, step + 1, counts)
        _go_on(engine, policy, begun, counts)
    engine.shutdown()
    if counts.updates != steps + 1 or not (counts.tokens and counts.resumed_tokens and counts.images):
        raise SystemExit(f"{mode}: too little was compared: {counts}")
    return counts


def _update(engine: VllmServerEngine, version: int, counts: Counts) -> None:
    begin, verified, mismatches = time.perf_counter(), engine.verified, engine.mismatches
    try:
        engine.update_weights(version)
    except EngineError as error:
        if engine.mismatches == mismatches:
            raise
        print(f"{counts.mode}, update {version}: {error}")
    counts.sync_seconds.append(time.perf_counter() - begin)
    counts.updates += 1
    counts.parameters += engine.verified - verified
    counts.parameters_differing += engine.mismatches - mismatches


def _begin(engine, policy, batch, images, counts: Counts) -> list[tuple[str, list[int], list[np.ndarray], int]]:
    """First turns of sessions, on prompts with pictures where there are some: (session, all ids, pictures, seed)."""
    with_images = sorted(batch, key=lambda r: -len(r.trajectory.images))[:SESSIONS]
    begun = []
    for i, r in enumerate(with_images):
        t = r.trajectory
        stop = [turn.start for turn in t.turns if turn.role == "assistant"][-1]
        ids = t.ids[:stop].tolist()
        seen = [images[record.sha256] for record in t.images if record.stop <= stop]
        counts.images += len(seen)
        session, seed = f"{counts.mode}/{counts.updates}/{i}", 7 * i + counts.updates
        engine.open(session)
        made = event_loop.run(engine.generate(session, ids, seen, _sampling(policy), seed))
        ids += [*made.ids, *policy.codec.encode("<|im_end|>\n<|im_start|>assistant\n")]
        begun.append((session, ids, seen, seed))
    return begun


def _go_on(engine, policy, begun, counts: Counts) -> None:
    """Second turns, after the update, against those of an engine that has kept nothing."""
    fresh = TransformersEngine(policy, deterministic=False)
    for session, ids, seen, seed in begun:
        fresh.open(session)
        made = event_loop.run(engine.generate(session, ids, seen, _sampling(policy), seed))
        again = event_loop.run(fresh.generate(session, ids, seen, _sampling(policy), seed))
        engine.close(session)
        counts.resumed_tokens += len(again.ids)
        if made.ids != again.ids:
            at = next((i for i, (a, b) in enumerate(zip(made.ids, again.ids, strict=False)) if a != b), 0)
            counts.stale_tokens += len(again.ids) - at
            counts.largest_stale_difference = float("inf")
            continue
        gaps = np.abs(np.subtract(made.logps, again.logps))
        counts.stale_tokens += int((gaps > TOLERANCE).sum())
        counts.largest_stale_difference = max(counts.largest_stale_difference, float(gaps.max()))


def _sampling(policy) -> Sampling:
    return Sampling(temperature=1.0, top_p=0.9, max_tokens=24, stop_ids=(policy.codec.end_of_turn_id,))


def main() -> None:
    from tests.loopback.engine import LoopbackEngine

    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--steps", type=int, default=8, help="optimizer steps of each mode (default: %(default)s)")
    args = p.parse_args()
    torch.set_num_threads(1)
    found = []
    for mode in ("weights", "merged", "adapter"):
        with tempfile.TemporaryDirectory() as folder, LoopbackEngine() as server:  # an adapter wants its own base
            found.append(measure(mode, args.steps, server.url, Path(folder)))
    for c in found:
        print(
            f"{c.mode}: {c.updates} updates; {c.parameters_differing} of {c.parameters} parameters, "
            f"{c.tokens_differing} of {c.tokens} log-probs (at most {c.largest_difference:.1e} nats) and "
            f"{c.stale_tokens} of {c.resumed_tokens} tokens after a kept prefix differ; "
            f"an update takes {np.median(c.sync_seconds):.3f} s"
        )
    rows = {"device": device(), "commit": commit(), "steps": args.steps, "modes": [asdict(c) for c in found]}
    write_text(RESULTS, json.dumps(rows, indent=1) + "\n")
    record(
        "serve/weight_sync_mismatch",
        sum(c.differing for c in found),
        n=sum(c.compared for c in found),
        command=f"python -m benchmarks.weight_sync --steps {args.steps}",
    )


if __name__ == "__main__":
    main()
