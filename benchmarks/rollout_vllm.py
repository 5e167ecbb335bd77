"""Rollouts by vLLM beside the embedded engine, on a machine with a GPU and vLLM: `python -m benchmarks.rollout_vllm`.

Sandbox requests are rolled out by the embedded engine, by vLLM in this process and by a vLLM server, without and with
the sampling mask. For each: tokens/s; how far the trainer's log-probs are from those reported; seconds of sleep, wake
and update; parameters that differ after an update; the share of prompt tokens found in the prefix cache.
`--dry-run` goes through all of it on a CPU, with the tiny policy, our own server and a stand-in for vLLM.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from genevolve_fast.batch.groups import TrainingRollout, bundles
from genevolve_fast.commands.opening import config_path, open_policy, open_world
from genevolve_fast.evaluate.scoreboard import commit, device
from genevolve_fast.files import write_text
from genevolve_fast.incidents import Incidents
from genevolve_fast.policy.model import Policy
from genevolve_fast.rollout.serve import command, vllm_installed
from genevolve_fast.rollout.transformers_engine import TransformersEngine
from genevolve_fast.rollout.vllm_colocated import VllmEngine
from genevolve_fast.rollout.vllm_server import VllmServerEngine
from genevolve_fast.train.collect import Rollouts
from genevolve_fast.train.config import EvolveConfig, load_config
from genevolve_fast.train.engines import longest
from genevolve_fast.train.evolve import sample
from genevolve_fast.train.update import score
from genevolve_fast.trajectory import Failed, Request

RESULTS = Path(__file__).parent / "results" / "rollout_vllm.json"
UPDATES = 3


@dataclass(frozen=True)
class Bench:
    """What every engine is given."""

    config: EvolveConfig
    policy: Policy
    world: Any
    requests: dict[str, Request]
    open_colocated: Callable[[bool], VllmEngine]
    serving: Callable[[bool], Any]  # a context manager that yields a server's address


class _Own:
    """The trainer's weights as they are, for `score`."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    def weights(self):
        return nullcontext(self.policy)


def measure(bench: Bench, engine: Any, name: str, mask: bool) -> dict[str, Any]:
    """One engine: rollouts, then UPDATES changes of the weights with sleep and wake, then rollouts again."""
    config = bench.config
    if mask:
        config = config.model_copy(update={"rollout": config.rollout.model_copy(update={"replay_sampling_mask": True})})
    timed("update", lambda: engine.update_weights(0))
    sample(config, bench.policy, bench.world, engine, bench.requests, 0)  # compiles, captures graphs, fills caches
    before, begin = engine.sampled_tokens, time.perf_counter()
    prompt, cached = getattr(engine, "prompt_tokens", 0), getattr(engine, "cached_tokens", 0)
    rollouts = sample(config, bench.policy, bench.world, engine, bench.requests, 1)
    seconds, tokens = time.perf_counter() - begin, engine.sampled_tokens - before
    row: dict[str, Any] = {"engine": name, "mask": mask, "tokens": tokens, "tokens_per_second": tokens / seconds}
    if hasattr(engine, "cached_tokens"):
        row["prefix_cache_hits"] = (engine.cached_tokens - cached) / max(1, engine.prompt_tokens - prompt)
    row |= mismatch(bench.policy, rollouts, config)
    phases: dict[str, list[float]] = {"sleep": [], "update": [], "wake": []}
    for version in range(1, UPDATES + 1):
        phases["sleep"].append(timed("sleep", engine.sleep))
        change(bench.policy, version)
        phases["update"].append(timed("update", lambda v=version: engine.update_weights(v)))
        phases["wake"].append(timed("wake", engine.wake))
    row |= {f"{phase}_seconds": float(np.median(times)) for phase, times in phases.items()}
    after = sample(config, bench.policy, bench.world, engine, bench.requests, 2)
    row |= {f"{k}_after_updates": v for k, v in mismatch(bench.policy, after, config).items()}
    row |= {k: getattr(engine, k) for k in ("verified", "mismatches") if hasattr(engine, k)}
    return row


def timed(what: str, call: Callable[[], Any]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin


@torch.no_grad()
def change(policy: Policy, seed: int) -> None:
    """A step's worth of change in every trained weight."""
    random = torch.Generator(policy.device).manual_seed(seed)
    for p in policy.parameters():
        if p.requires_grad:
            p.add_(1e-2 * p.std() * torch.randn(p.shape, generator=random, device=p.device, dtype=p.dtype))


def mismatch(policy: Policy, rollouts: Rollouts, config: EvolveConfig) -> dict[str, float]:
    """Nats between the trainer's log-probs and the engine's, over all sampled tokens."""
    live = [TrainingRollout(t, 1.0, ()) for t in rollouts.trajectories if t.num_loss_tokens]
    failed = [t.outcome for t in rollouts.trajectories if isinstance(t.outcome, Failed) and t.outcome.stage == "engine"]
    if failed or not live:
        raise SystemExit(f"{len(failed)} rollouts failed, the first: {failed[0] if failed else 'no tokens'}")
    gaps = []
    scope = config.objective.sdl_scope
    for make in bundles(
        live,
        rollouts.images,
        policy.codec,
        policy.device,
        max_tokens=config.max_tokens_per_microbatch,
        sdl_scope=scope,
    ):
        bundle = make()
        ours = score(_Own(policy), bundle, config.rollout.temperature, teacher=False)
        gaps += [o.float() - m.rollout_logps for o, m in zip(ours, bundle.microbatches, strict=True)]
    gap = torch.cat(gaps).abs()
    return {"logp_difference_mean": float(gap.mean()), "logp_difference_max": float(gap.max())}


# --- on a GPU ---------------------------------------------------------------------------------------------------------


def with_vllm(config: EvolveConfig, args: argparse.Namespace) -> tuple[Policy, Callable, Callable]:
    policy = open_policy(config.policy).eval()
    policy.freeze_vision()

    def colocated(mask: bool) -> VllmEngine:
        return VllmEngine(
            policy, incidents=Incidents(), max_model_len=longest(config.rollout), sampling_mask=mask,
            gpu_memory_utilization=args.gpu_memory_utilization,
        )  # fmt: skip

    @contextmanager
    def serving(mask: bool) -> Iterator[str]:
        made = command(
            policy.model.name_or_path, backend="vllm", port=args.port, training=True,
            max_model_len=longest(config.rollout), gpu_memory_utilization=args.gpu_memory_utilization,
        )  # fmt: skip
        arguments = [a for a in made.arguments if mask or a != "--return-sampling-mask"]
        print(made, flush=True)
        process = subprocess.Popen(arguments, env={**os.environ, **made.environment})
        try:
            _wait(f"http://127.0.0.1:{args.port}", process)
            yield f"http://127.0.0.1:{args.port}"
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)

    return policy, colocated, serving


def _wait(url: str, process: subprocess.Popen) -> None:
    import httpx

    until = time.monotonic() + 1200
    while time.monotonic() < until and process.poll() is None:
        try:
            if httpx.get(f"{url}/health", timeout=5, trust_env=False).status_code == 200:
                return
        except httpx.HTTPError:
            time.sleep(1)
    raise SystemExit(f"the server is not up, exit status {process.poll()}")


# --- on a CPU ---------------------------------------------------------------------------------------------------------


def rehearsed(config: EvolveConfig) -> tuple[Policy, Callable, Callable]:
    """The same parts over a stand-in that checks the released signatures, and our own server."""
    import pytest

    from genevolve_fast.rollout import vllm_colocated
    from tests import vllm_stand_in
    from tests.loopback.engine import LoopbackEngine

    patch = pytest.MonkeyPatch()
    vllm_stand_in.install(patch)
    patch.setattr(vllm_colocated, "_gpu", lambda: True)
    policy = open_policy(config.policy).eval()
    policy.freeze_vision()

    def colocated(mask: bool) -> VllmEngine:
        return VllmEngine(policy, incidents=Incidents(), max_model_len=longest(config.rollout), sampling_mask=mask)

    @contextmanager
    def serving(mask: bool) -> Iterator[str]:
        with LoopbackEngine(*(["--return-sampling-mask"] if mask else [])) as server:
            yield server.url

    return policy, colocated, serving


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="Qwen/Qwen3-VL-2B-Instruct", help="(default: %(default)s)")
    p.add_argument("--requests", type=int, default=32, help="sandbox requests (default: %(default)s)")
    p.add_argument("--generations", type=int, default=4, help="rollouts of each (default: %(default)s)")
    p.add_argument("--port", type=int, default=8077, help="of the server (default: %(default)s)")
    p.add_argument("--gpu-memory-utilization", type=float, default=0.45, help="of vLLM (default: %(default)s)")
    p.add_argument("--out", type=Path, default=None, help="(default: benchmarks/results/rollout_vllm.json)")
    p.add_argument("--dry-run", action="store_true", help="the whole flow on a CPU, without vLLM")
    args = p.parse_args()
    if not args.dry_run and not (vllm_installed() and torch.cuda.is_available()):
        missing = "a GPU" if vllm_installed() else "vLLM: pip install 'genevolve-fast[vllm]'"
        raise SystemExit(f"this benchmark needs {missing}; --dry-run goes through its flow without")
    overrides = [f"policy.path={'sandbox:start' if args.dry_run else args.model}", "rollout.top_p=0.95"]
    if not args.dry_run:
        limits = "max_prompt_length=2048", "max_tokens_per_turn=512", "max_response_length=4096"
        overrides += ["policy.dtype=bfloat16", *(f"rollout.{limit}" for limit in limits)]
    overrides += ["rollout.deterministic=false", f"rollout.num_generations={args.generations}"]
    config = load_config(EvolveConfig, config_path("demo"), overrides)
    sandbox, world = open_world(config)
    requests = {r.id: r for r in sandbox.requests("train", args.requests, seed=1)}
    policy, colocated, serving = rehearsed(config) if args.dry_run else with_vllm(config, args)
    bench = Bench(config, policy, world, requests, colocated, serving)
    rows = []
    for mask in (False, True):
        for run in (_embedded, _colocated, _server):
            rows.append(run(bench, mask))
            show(rows[-1], args.dry_run)
            gc.collect()
    stamped = {"device": device(), "commit": commit(), "model": config.policy.path, "dry_run": args.dry_run}
    if out := args.out or (None if args.dry_run else RESULTS):
        write_text(out, json.dumps(stamped | {"rows": rows}, indent=1) + "\n")


def _embedded(bench: Bench, mask: bool) -> dict[str, Any]:
    engine = TransformersEngine(bench.policy, max_batch=bench.config.rollout.max_batch, deterministic=False)
    return measure(bench, engine, "embedded", mask)


def _colocated(bench: Bench, mask: bool) -> dict[str, Any]:
    engine = bench.open_colocated(mask)
    try:
        return measure(bench, engine, "colocated", mask)
    finally:
        engine.shutdown()


def _server(bench: Bench, mask: bool) -> dict[str, Any]:
    with bench.serving(mask) as url, tempfile.TemporaryDirectory() as folder:
        engine = VllmServerEngine(bench.policy, [url], incidents=Incidents(), sync_dir=Path(folder))
        try:
            return measure(bench, engine, "server", mask)
        finally:
            engine.shutdown()


def show(row: dict[str, Any], dry_run: bool) -> None:
    numbers = {k: f"{v:.3g}" if isinstance(v, float) else v for k, v in row.items() if k not in ("engine", "mask")}
    said = f"{'dry run, ' if dry_run else ''}{row['engine']}{' with mask' if row['mask'] else ''}"
    print(f"{said}: {numbers}", flush=True)


if __name__ == "__main__":
    main()
