"""The demo's table: the evolved policy beside what it must beat. `python -m benchmarks.loop --run runs/demo`.

One-shot prompt without tools, the demonstrator, the demonstrator with every habit right, the SFT start, the evolved
policy, and the start with SFT continued for the wall time that evolution took; the same requests and seeds for all.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path

import torch

from genevolve_fast.commands.bench import bench_once
from genevolve_fast.commands.opening import open_policy, open_world
from genevolve_fast.data.demonstrations import ScriptedEngine
from genevolve_fast.evaluate.bench import Bench, load_bench, paired_gain, run_bench, save_bench, table
from genevolve_fast.evaluate.scoreboard import record
from genevolve_fast.files import write_text
from genevolve_fast.sandbox.bootstrap import SETTINGS, write_demonstrations
from genevolve_fast.sandbox.demonstrator import Demonstrator, PerfectDemonstrator
from genevolve_fast.train.config import EvolveConfig, PolicyConfig, SftConfig, load_config
from genevolve_fast.train.sft import sft

COMMAND = "python -m benchmarks.loop --run {}"


def one_shot(request, messages, seed, experience) -> str:
    """The request itself as the prompt: what a generator gets from somebody without an agent."""
    answer = json.dumps({"gen_prompt": request.question, "reference_images": []})
    return f"<answer>\n{answer}\n</answer>"


def scripted(folder: Path, name: str, next_turn, policy, sandbox, world, config) -> Bench:
    """The bench of a text script, or the one already in `folder`."""
    if (folder / "bench.json").exists():
        return load_bench(folder)
    requests = sandbox.requests("bench", config.evaluate.requests)
    engine = ScriptedEngine(
        next_turn, policy.codec, {f"000000/{i % 64:04d}-{r.id}/0": r for i, r in enumerate(requests)}
    )
    settings = replace(SETTINGS, max_tokens_per_turn=10_000, max_response_tokens=100_000)
    bench = run_bench(name, requests, world=world, engine=engine, codec=policy.codec, settings=settings)
    save_bench(bench, requests, folder)
    return bench


def more_sft(run: Path, config: EvolveConfig, sandbox, minutes: float):
    """The start, trained on fresh demonstrations without experience blocks for `minutes`."""
    folder = run / "more_sft"
    if not (folder / "policy" / "model.safetensors").exists():
        data = write_demonstrations(sandbox, folder / "data", count=6000, experience_share=0.0, seed=9_000_000)
        settings = SftConfig(
            name="more_sft",
            epochs=100,
            minutes=minutes,
            batch_size=16,
            max_tokens_per_microbatch=8192,
            policy=PolicyConfig(path=config.policy.path),
            optim={"name": "muon", "lr": 3e-4, "warmup_ratio": 0.0001, "schedule": "constant", "weight_decay": 0.01},
        )
        sft(settings, open_policy(config.policy), data, folder)
    return open_policy(PolicyConfig(path=str(folder / "policy")))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--run", type=Path, default=Path("runs/demo"), help="a finished demo (default: %(default)s)")
    args = p.parse_args()
    config = load_config(EvolveConfig, args.run / "config.yaml")
    sandbox, world = open_world(config)
    start = open_policy(config.policy)
    benches = args.run / "bench"
    seconds = sum(json.loads(line)["timing_s/step"] for line in (args.run / "metrics.jsonl").read_text().splitlines())
    torch.set_num_threads(config.threads or torch.get_num_threads())

    rows = {
        "one-shot": scripted(benches / "one_shot", "one-shot prompt", one_shot, start, sandbox, world, config),
        "demonstrator": scripted(
            benches / "demonstrator", "demonstrator", Demonstrator().next_turn, start, sandbox, world, config
        ),
        "perfect": scripted(
            benches / "perfect", "every habit right", PerfectDemonstrator().next_turn, start, sandbox, world, config
        ),
        "start": bench_once(benches / "before", "SFT start", start, sandbox, world, config),
    }
    longer = more_sft(args.run, config, sandbox, seconds / 60)
    rows["more SFT"] = bench_once(benches / "more_sft", "SFT continued", longer, sandbox, world, config)
    evolved = open_policy(PolicyConfig(path=str(args.run / "policy")))
    rows["evolved"] = bench_once(benches / "after", "evolved", evolved, sandbox, world, config)
    print(table(list(rows.values())))

    command, n = COMMAND.format(args.run), config.evaluate.requests
    gain = paired_gain(rows["start"], rows["evolved"])
    over = paired_gain(rows["more SFT"], rows["evolved"])
    record("loop/reward_gain", gain.mean, n=n, command=command, interval=(gain.low, gain.high))
    record("loop/reward_gain_low", gain.low, n=n, command=command)
    record("loop/gain_over_more_sft", over.mean, n=n, command=command, interval=(over.low, over.high))
    record("loop/start_valid", rows["start"].summary()["valid"], n=n, command=command)
    fair = rows["start"].summary()["reward"] - rows["demonstrator"].summary()["reward"]
    print(f"start - demonstrator: {fair:+.3f} (a fair start lies within 0.05: {math.fabs(fair) <= 0.05})")
    table_file = Path("benchmarks/results/loop.json")
    data = {b.name: b.summary() | {"by_category": b.by_category()} for b in rows.values()}
    write_text(table_file, json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
