"""Does distillation help? GRPO, GRPO+SDL, GRPO+SDL with another request's experience: `python -m benchmarks.ablation`.

Three seeds each, the same minutes of evolution at a constant learning rate, the same held-out bench. Runs resume and
finished ones are kept. `--jobs 2` runs two at a time on half of the cores each, and gives the same table sooner.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from genevolve_fast.commands.bench import bench_once
from genevolve_fast.commands.opening import config_path, open_policy, open_world, set_threads
from genevolve_fast.evaluate.bench import Bench, Gain
from genevolve_fast.evaluate.scoreboard import record
from genevolve_fast.files import write_text
from genevolve_fast.train.config import EvolveConfig, load_config
from genevolve_fast.train.evolve import evolve

VARIANTS = {
    "grpo": ["objective.sdl_coef=0", "experience.enabled=false"],
    "grpo_sdl": [],
    "grpo_sdl_shuffled": ["experience.source=shuffled"],
}
RESULTS = Path("benchmarks/results/ablation.json")


def run_variant(name: str, seed: int, minutes: float, runs: Path, extra: list[str]) -> tuple[Bench, list[dict]]:
    """(held-out bench, metrics) of one variant and seed."""
    run = f"ablation/{name}_{seed}"
    overrides = [f"seed={seed}", f"minutes={minutes}", "steps=10000", "optim.schedule=constant", f"name={run}"]
    overrides += [*extra, *VARIANTS[name]]
    config = load_config(EvolveConfig, config_path("demo"), overrides)
    set_threads(config.threads)
    sandbox, world = open_world(config)
    folder = runs / run
    policy = open_policy(config.policy)
    if not (folder / "policy").exists():
        pool = sandbox.requests("train", config.pool_size, seed=seed)
        evolve(config, policy, world, pool, folder, resume=folder.exists())
    else:
        policy = open_policy(config.policy.model_copy(update={"path": str(folder / "policy")}))
    bench = bench_once(folder / "bench" / "after", f"{name} {seed}", policy, sandbox, world, config)
    return bench, [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def run_all(seeds: list[int], jobs: int, forwarded: list[str]) -> None:
    """Every variant of every seed in a process of its own, `jobs` at a time; what they made is read back later."""
    threads = max(1, (os.cpu_count() or 1) // jobs)

    def one(seed: int, name: str) -> None:
        command = [sys.executable, "-m", "benchmarks.ablation", "--one", name, "--seeds", str(seed), *forwarded]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        subprocess.run([*command, "--set", f"threads={threads}"], check=True, env=environment)

    with ThreadPoolExecutor(jobs) as pool:
        for done in [pool.submit(one, seed, name) for seed in seeds for name in VARIANTS]:
            done.result()


def paired(a: list[Bench], b: list[Bench], samples: int = 10_000) -> Gain:
    """Mean difference b - a over seeds and requests; the 95 % interval resamples seeds, then requests of each."""
    differences = np.array(
        [[y.reward - x.reward for x, y in zip(p.rows, q.rows, strict=True)] for p, q in zip(a, b, strict=True)]
    )
    seeds, requests = differences.shape
    random = np.random.default_rng(0)
    drawn = differences[
        random.integers(seeds, size=(samples, seeds, 1)), random.integers(requests, size=(samples, seeds, requests))
    ]
    low, high = np.percentile(drawn.mean((1, 2)), [2.5, 97.5])
    return Gain(float(differences.mean()), float(low), float(high), differences.size)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--minutes", type=float, default=6.0, help="of evolution a run (default: %(default)s)")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--runs", type=Path, default=Path("runs"))
    p.add_argument("--jobs", type=int, default=1, help="runs at a time (default: %(default)s)")
    p.add_argument("--one", choices=VARIANTS, help="only run this variant; no table")
    p.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE")
    args = p.parse_args()
    if args.one:
        for seed in args.seeds:
            run_variant(args.one, seed, args.minutes, args.runs, args.set)
        return
    if args.jobs > 1:
        forwarded = ["--minutes", str(args.minutes), "--runs", str(args.runs)]
        run_all(args.seeds, args.jobs, forwarded + [f"--set={field}" for field in args.set])
    benches: dict[str, list[Bench]] = {name: [] for name in VARIANTS}
    curves: dict[str, dict[str, list]] = {}
    for seed in args.seeds:
        for name in VARIANTS:
            bench, metrics = run_variant(name, seed, args.minutes, args.runs, args.set)
            benches[name].append(bench)
            keys = ("reward", "actor/sdl_kl", "actor/entropy", "rewards/kscore/mean", "rewards/program/mean")
            curves[f"{name}_{seed}"] = {k: [round(m[k], 4) for m in metrics] for k in keys if k in metrics[0]}
            print(f"{name} seed {seed}: {bench.summary()['reward']:.3f} after {len(metrics)} steps", flush=True)
    gain = paired(benches["grpo"], benches["grpo_sdl"])
    over = paired(benches["grpo_sdl_shuffled"], benches["grpo_sdl"])
    command = f"python -m benchmarks.ablation --minutes {args.minutes:g} --jobs {args.jobs}"
    record("loop/sdl_gain", gain.mean, n=gain.n, command=command, interval=(gain.low, gain.high))
    record("loop/sdl_gain_over_shuffled", over.mean, n=over.n, command=command, interval=(over.low, over.high))
    rewards = {name: [b.summary()["reward"] for b in bs] for name, bs in benches.items()}
    data = {"minutes": args.minutes, "seeds": args.seeds, "held_out_reward": rewards, "curves": curves}
    write_text(RESULTS, json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
