"""`bench`: a policy on held-out requests."""

from __future__ import annotations

import argparse
from pathlib import Path

from genevolve_fast.commands.opening import RUNS, AddCommand, load, open_policy, open_world, set_threads


def add(command: AddCommand) -> None:
    """Add the parsers of this module."""
    p = command(
        "bench",
        run_bench_command,
        "Judge a policy on held-out sandbox requests; the same seeds for every policy.",
        "genevolve-fast bench --policy runs/demo/policy --name after --out runs/demo/bench/after",
    )
    p.add_argument("--policy", default="sandbox:start", help="folder of a policy (default: %(default)s)")
    p.add_argument("--name", default=None, help="how the table names it (default: the policy)")
    p.add_argument("--requests", type=int, default=200, help="held-out requests (default: %(default)s)")
    p.add_argument("--out", type=Path, default=None, help="folder for bench.json, results.json and pictures")
    p.add_argument("--config", default="demo", help="configuration whose rollout and evaluate sections are used")
    p.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="override one field, repeatable")


def run_bench_command(args: argparse.Namespace) -> int:
    from genevolve_fast.evaluate.bench import table
    from genevolve_fast.train.config import EvolveConfig

    overrides = [f"evaluate.requests={args.requests}", f"policy.path={args.policy}", *args.set]
    args.set = overrides
    config = load(args, EvolveConfig)
    set_threads(config.threads)
    sandbox, world = open_world(config)
    name = args.name or args.policy
    folder = args.out or RUNS / "bench" / name.replace("/", "_").replace(":", "_")
    bench = bench_once(folder, name, open_policy(config.policy), sandbox, world, config)
    print(f"{table([bench])}\nwritten to {folder}")
    return 0


def bench_once(folder: Path, name: str, policy, sandbox, world, config):
    """The bench of `policy`, or the one already in `folder`."""
    from tqdm import tqdm

    from genevolve_fast.evaluate.bench import load_bench, run_bench, save_bench, save_truth
    from genevolve_fast.rollout.transformers_engine import TransformersEngine
    from genevolve_fast.train.evolve import session_settings

    if (folder / "bench.json").exists():
        return load_bench(folder)
    requests = sandbox.requests("bench", config.evaluate.requests)
    settings = session_settings(config.rollout, world, config.evaluate.temperature, config.evaluate.top_p)
    with tqdm(total=len(requests), desc=f"bench {name}", unit="request", dynamic_ncols=True) as bar:
        bench = run_bench(
            name,
            requests,
            world=world,
            engine=TransformersEngine(policy, max_batch=config.rollout.max_batch),
            codec=policy.codec,
            settings=settings,
            on_done=lambda: bar.update(1),
        )
    save_truth(requests, world, folder.parent / "truth")
    save_bench(bench, requests, folder)
    return bench
