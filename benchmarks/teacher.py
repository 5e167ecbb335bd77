"""What there is to distil: reward with and without the experience in the context: `python -m benchmarks.teacher`.

Training requests are rolled out and compared as in evolution. Groups that yield an experience are rolled out again
three times with fresh seeds: as they are, with their own experience after the request (what the teacher reads), and
with that of the next group. The difference to the first is what a student would gain that became its teacher.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.ablation import RESULTS as ABLATION
from genevolve_fast.commands.opening import config_path, open_policy, open_world, set_threads
from genevolve_fast.experience.context import render
from genevolve_fast.files import write_text
from genevolve_fast.rollout.transformers_engine import TransformersEngine
from genevolve_fast.train.collect import judge_rollouts, sample_rollouts
from genevolve_fast.train.config import EvolveConfig, PolicyConfig, load_config
from genevolve_fast.train.evolve import group_by_request, learn_from, new_memory, session_settings
from genevolve_fast.trajectory import Request

RESULTS = ABLATION.with_name("teacher.json")


class Roller:
    """Judged rollouts of one policy in the sandbox, with the demo's settings."""

    def __init__(self, policy, sandbox, world, config: EvolveConfig) -> None:
        self.policy, self.sandbox, self.world, self.config = policy, sandbox, world, config
        self.engine = TransformersEngine(policy, max_batch=config.rollout.max_batch)

    def __call__(self, requests: list[Request], seed: int):
        rollouts = sample_rollouts(
            requests, self.config.rollout.num_generations, world=self.world, engine=self.engine,
            codec=self.policy.codec, settings=session_settings(self.config.rollout, self.world), seed=seed,
        )  # fmt: skip
        return judge_rollouts(rollouts, {r.id: r for r in requests}, self.world)

    def reward(self, requests: list[Request], seed: int) -> np.ndarray:
        """Mean reward [requests]."""
        groups = group_by_request(self(requests, seed).trajectories)
        return np.array([np.mean([t.reward for t in members if t.reward is not None]) for members in groups.values()])


def measure(name: str, roll: Roller, count: int) -> dict:
    """Rewards of the groups that have an experience: plain, with their own, with the next one's."""
    requests = roll.sandbox.requests("train", count, seed=1)
    groups = group_by_request(roll(requests, seed=0).trajectories)
    memory = new_memory(roll.config, roll.world)
    everything = roll.config.experience.model_copy(update={"max_comparisons": count})
    config = roll.config.model_copy(update={"experience": everything})
    found, _ = learn_from(groups, {r.id: r for r in requests}, roll.world, memory, config, 0)
    by_id = {r.id: r for r in requests}
    told = [by_id[groups[g][0].request_id] for g in found]
    blocks = [render(e) for e in found.values()]
    shown = lambda which: [replace(r, question=r.question + b) for r, b in zip(told, which, strict=True)]  # noqa: E731
    plain = roll.reward(told, seed=1)
    contexts = {"own experience": blocks, "another request's": blocks[1:] + blocks[:1]}
    out = {"policy": name, "groups": len(told), "plain": float(plain.mean())}
    for label, which in contexts.items():
        difference = roll.reward(shown(which), seed=1) - plain
        draws = np.random.default_rng(0).choice(difference, (10_000, len(difference))).mean(1)
        low, high = np.percentile(draws, [2.5, 97.5])
        out[label] = {"difference": float(difference.mean()), "interval": [float(low), float(high)]}
        told_by = f"{name}: {len(told)} groups, plain {plain.mean():.3f}, {label}"
        print(f"{told_by} {difference.mean():+.3f} [{low:+.3f}, {high:+.3f}]", flush=True)
    return out


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--requests", type=int, default=60, help="to look for experience in (default: %(default)s)")
    p.add_argument("--run", type=Path, default=Path("runs/demo"), help="a finished demo (default: %(default)s)")
    args = p.parse_args()
    config = load_config(EvolveConfig, config_path("demo"), [])
    set_threads(config.threads)
    sandbox, world = open_world(config)
    policies = {"start": config.policy, "evolved": PolicyConfig(path=str(args.run / "policy"))}
    rows = [measure(n, Roller(open_policy(c), sandbox, world, config), args.requests) for n, c in policies.items()]
    write_text(RESULTS, json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
