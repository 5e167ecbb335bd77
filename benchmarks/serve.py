"""How the embedded engine serves sessions that wait for tools. `python -m benchmarks.serve`.

latency: 64 sessions of the sandbox run at any time, one begins when another ends; tools answer at once or 200 ms late.
Everything else is the same: policy, engine, requests, seeds. Tokens/s are those of the time with 64 sessions running.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch

from genevolve_fast.agent.session import run_session
from genevolve_fast.evaluate.scoreboard import commit, device, record, write_json
from genevolve_fast.policy.model import Policy
from genevolve_fast.protocols import Observation, Tool
from genevolve_fast.rollout.transformers_engine import TransformersEngine
from genevolve_fast.sandbox.bootstrap import SETTINGS
from genevolve_fast.sandbox.tiny_policy import start_path
from genevolve_fast.sandbox.world import SYSTEM_PROMPT, SandboxWorld
from genevolve_fast.train.collect import stable_seed

RESULTS = Path("benchmarks/results/serve.json")


class LateTool:
    """A tool whose answer comes `seconds` later, while others may run."""

    def __init__(self, tool: Tool, seconds: float) -> None:
        self.tool, self.seconds = tool, seconds
        self.name, self.parameters, self.description = tool.name, tool.parameters, tool.description

    async def __call__(self, arguments: Mapping) -> Observation:
        await asyncio.sleep(self.seconds)
        return await self.tool(arguments)


@dataclass
class Served:
    """One run: tokens/s while all sessions were running, and of the whole run, tail included."""

    tool_ms: float
    tokens_per_second: float
    whole_run_tokens_per_second: float
    tokens: int
    seconds: float
    tool_calls: int
    failed: int


def serve(policy: Policy, world: SandboxWorld, args: argparse.Namespace, tool_ms: float, sessions: int) -> Served:
    engine = TransformersEngine(policy, max_batch=args.max_batch, deterministic=False)
    tools = {name: LateTool(tool, tool_ms / 1e3) for name, tool in world.tools().items()}
    ahead = deque(enumerate(world.requests("train", sessions)))
    full: tuple[float, int] = 0.0, 0
    done = []

    async def worker() -> None:
        nonlocal full
        while ahead:
            i, request = ahead.popleft()
            if not ahead:  # from now on fewer sessions run
                full = time.perf_counter() - begin, engine.sampled_tokens
            result = await run_session(
                request,
                engine=engine,
                codec=policy.codec,
                tools=tools,
                system_prompt=SYSTEM_PROMPT,
                settings=SETTINGS,
                rollout_id=f"{i:05d}",
                group_id=request.id,
                seed=stable_seed(args.seed, request.id, i),
            )
            done.append(result.trajectory)

    async def workers() -> None:
        await asyncio.gather(*(worker() for _ in range(args.concurrent)))

    begin = time.perf_counter()
    asyncio.run(workers())
    seconds = time.perf_counter() - begin
    return Served(
        tool_ms=tool_ms,
        tokens_per_second=full[1] / full[0],
        whole_run_tokens_per_second=engine.sampled_tokens / seconds,
        tokens=engine.sampled_tokens,
        seconds=seconds,
        tool_calls=sum(turn.tool is not None and turn.role == "tool" for t in done for turn in t.turns),
        failed=sum(t.outcome is not None for t in done),
    )


def latency(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    policy = Policy.from_pretrained(start_path()).eval()
    world = SandboxWorld()
    serve(policy, world, args, args.tool_ms, args.concurrent)  # not counted
    rounds = []
    for turn in range(args.rounds):
        load = os.getloadavg()[0]
        order = (0.0, args.tool_ms) if turn % 2 == 0 else (args.tool_ms, 0.0)
        made = {tool_ms: serve(policy, world, args, tool_ms, args.sessions) for tool_ms in order}
        at_once, late = made[0.0], made[args.tool_ms]
        ratio = late.tokens_per_second / at_once.tokens_per_second
        whole = late.whole_run_tokens_per_second / at_once.whole_run_tokens_per_second
        rounds.append({"ratio": ratio, "whole_run_ratio": whole, "load": load, "runs": [asdict(at_once), asdict(late)]})
        print(
            f"round {turn}: {at_once.tokens_per_second:,.0f} tokens/s at 0 ms, {late.tokens_per_second:,.0f} at "
            f"{args.tool_ms:g} ms, ratio {ratio:.3f} (whole run {whole:.3f}); load before {load:.2f}",
            flush=True,
        )
        assert not at_once.failed + late.failed, "rollouts failed"
    ratios = [r["ratio"] for r in rounds]
    settings = {k: v for k, v in vars(args).items() if k != "record"}
    if not args.record:
        print(f"median {median(ratios):.3f}, {min(ratios):.3f} to {max(ratios):.3f}; not recorded")
        return
    write_json(RESULTS, {"latency": {**settings, "device": device(), "commit": commit(), "rounds": rounds}})
    record(
        "serve/latency_hiding",
        round(median(ratios), 4),
        n=len(ratios),
        command="python -m benchmarks.serve",
        interval=(round(min(ratios), 4), round(max(ratios), 4)),
    )


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--sessions", type=int, default=384, help="of each run (default: %(default)s)")
    p.add_argument("--concurrent", type=int, default=64, help="sessions running at any time (default: %(default)s)")
    p.add_argument("--max-batch", type=int, default=64, help="rows the engine decodes together (default: %(default)s)")
    p.add_argument("--tool-ms", type=float, default=200.0, help="how late tools answer (default: %(default)s)")
    p.add_argument("--rounds", type=int, default=5, help="pairs of runs, taking turns (default: %(default)s)")
    p.add_argument("--threads", type=int, default=1, help="of torch (default: %(default)s)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--no-record", dest="record", action="store_false", help="print only")
    latency(p.parse_args())


if __name__ == "__main__":
    main()
