"""What one device does in a second: a layer's visit, attention, the head, the optimizer, sampling, copies, writing."""

from __future__ import annotations

import itertools
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch

from benchmarks.models import Model, random_policy, ready_gradients, shape_of
from benchmarks.timing import quantiles, take_turns
from genevolve_fast.ops import Objective, linear_grpo_sdl, linear_logprob
from genevolve_fast.ops.prefix_attention import Layout, attention_backward, attention_forward
from genevolve_fast.policy.model import Policy
from genevolve_fast.policy.visits import Stream
from genevolve_fast.profile.flops import ATTENTION_BACKWARD, Passes, Work, attention_flops, causal
from genevolve_fast.profile.rates import head_key, layer_key, model_key
from genevolve_fast.profile.shapes import ModelShape

SMALL = 50_000_000  # parameters: a model below is measured with all its layers
COPIED = 256 << 20  # bytes of a copy between host and GPU, and of a checkpoint
OBJECTIVE = Objective(kl_coef=0.0)
Found = dict[str, Any]


@dataclass(frozen=True)
class Device:
    """Where, how often, and in which row counts and lengths things are measured."""

    where: torch.device
    repeats: int
    rows: tuple[int, ...]
    lengths: tuple[int, ...]

    def medians(self, **runs: Callable[[], object]) -> dict[str, float]:
        """Seconds of each run, in turns."""
        if self.where.type == "cuda":
            times = take_turns(runs, self.where, self.repeats)
            return {name: quantiles(ms)[1] / 1e3 for name, ms in times.items()}
        return self.on_host(clock(), **runs)

    def on_host(self, now: Callable[[], float] = time.perf_counter, **runs: Callable[[], object]) -> dict[str, float]:
        """The same, by a clock of the host."""
        times: dict[str, list[float]] = {name: [] for name in runs}
        for turn in range(self.repeats + 1):  # the first warms up
            for name, run in runs.items():
                begin = now()
                run()
                times[name] += [now() - begin] if turn else []
        return {name: median(seconds) for name, seconds in times.items()}


def clock() -> Callable[[], float]:
    """Seconds on a CPU: of one thread its own, so that neighbours do not count; of several, the wall's."""
    return time.process_time if torch.get_num_threads() == 1 else time.perf_counter


def found(name: str, amount: float, seconds: float, unit: str, n: int, **at: Any) -> Found:
    """A rate as the file holds it."""
    if not seconds > 0:
        raise ArithmeticError(f"{name} took {seconds:.3g} s: too short to be told from what it is measured beside")
    return dict(name=name, value=float(f"{amount / seconds:.4g}"), unit=unit, n=n, at=at)


def dtype_name(model: Model) -> str:
    return str(model.dtype).removeprefix("torch.")


# --- attention and layers ---------------------------------------------------------------------------------------------


def packed(rows: int, length: int) -> tuple[Layout, Work]:
    """Sequences of `length` tokens, `rows` in all, and their work."""
    cu = (*range(0, rows, length), rows)
    return Layout(cu), sum((causal(b - a) for a, b in pairwise(cu)), Work())


def attention_runs(shape: ModelShape, model: Model, where: torch.device, layout: Layout) -> dict[str, Callable]:
    torch.manual_seed(0)
    heads = shape.heads, shape.kv_heads, shape.kv_heads
    q, k, v = (torch.randn(layout.tokens, n, shape.head_dim, dtype=model.dtype, device=where) for n in heads)
    scale = shape.head_dim**-0.5
    out, lse = attention_forward(q, k, v, layout, scale=scale)
    g = torch.randn_like(out)
    return {
        "forward": lambda: attention_forward(q, k, v, layout, scale=scale),
        "backward": lambda: attention_backward(g, q, k, v, out, lse, layout, scale=scale),
    }


def attention(shape: ModelShape, model: Model, device: Device) -> Iterator[Found]:
    """FLOP/s of causal attention at each length."""
    one = replace(shape, layers=1)
    for length in device.lengths:
        layout, work = packed(max(length, min(device.rows)), length)
        seconds = device.medians(**attention_runs(shape, model, device.where, layout))
        at = dict(
            heads=[shape.heads, shape.kv_heads, shape.head_dim], dtype=dtype_name(model),
            length=round(2 * work.pairs / work.tokens),
        )  # fmt: skip
        flops = attention_flops(one, work)
        yield found("attention_forward", flops, seconds["forward"], "FLOP/s", device.repeats, **at)
        backward = ATTENTION_BACKWARD * flops
        yield found("attention_backward", backward, seconds["backward"], "FLOP/s", device.repeats, **at)


def layers(policy: Policy, model: Model, device: Device, quantize: str = "none") -> Iterator[Found]:
    """FLOP/s of a layer's linear maps in its visit, norms and rotary embedding included, attention taken off."""
    shape = shape_of(policy)
    visit, length = policy.visits[0], min(device.lengths)
    linear = 2.0 * shape.linear_parameters / shape.layers
    for rows, checkpointing in itertools.product(device.rows, (True, False)):
        policy.gradient_checkpointing = checkpointing
        layout, _ = packed(rows, length)
        positions = torch.arange(rows, device=device.where).expand(3, -1)
        stream = Stream(policy.rotary(positions), layout)
        torch.manual_seed(0)
        x, g = (torch.randn(rows, shape.hidden, dtype=model.dtype, device=device.where) for _ in range(2))

        def forward(x=x, stream=stream):
            with torch.no_grad():
                visit(x, stream)

        def both(x=x, g=g, stream=stream):
            y, _ = visit(x.detach().requires_grad_(), stream)
            y.backward(g.clone())

        ready_gradients(policy)
        runs = attention_runs(shape, model, device.where, layout)
        attend = {f"attention_{n}": run for n, run in runs.items()}
        t = device.medians(forward=forward, both=both, **attend)
        passes = Passes(weight_gradients=0 if model.lora else 1, recompute=1 if checkpointing else 0)
        at = dict(
            layer=layer_key(shape), dtype=dtype_name(model), adapters=model.lora > 0, rank=model.lora,
            quantize=quantize, rows=rows,
        )  # fmt: skip
        if checkpointing:
            seconds = t["forward"] - t["attention_forward"]
            yield found("layer_forward", linear * rows, seconds, "FLOP/s", device.repeats, **at)
        again = t["attention_forward"] if checkpointing else 0.0
        seconds = t["both"] - t["forward"] - t["attention_backward"] - again
        flops = linear * rows * passes.linear_backward
        at["checkpointing"] = checkpointing
        yield found("layer_backward", flops, seconds, "FLOP/s", device.repeats, **at)
    policy.gradient_checkpointing = True


# --- the head ---------------------------------------------------------------------------------------------------------


def head(shape: ModelShape, model: Model, device: Device) -> Iterator[Found]:
    """FLOP/s of the loss with its gradients, of a trained and of a frozen head, and of scoring."""
    for rows in device.rows:
        torch.manual_seed(0)
        hidden = torch.randn(rows, shape.hidden, dtype=model.dtype, device=device.where, requires_grad=True)
        weight = torch.randn(shape.vocabulary, shape.hidden, dtype=model.dtype, device=device.where) * 0.02
        targets = torch.randint(shape.vocabulary, (rows,), device=device.where)
        trained = weight.clone().requires_grad_()
        options = dict(advantages=torch.ones(1), cu_seqlens=(0, rows), temperature=0.7, objective=OBJECTIVE)

        def loss(w, hidden=hidden, targets=targets, options=options):
            linear_grpo_sdl(hidden, w, targets, **options)[0].backward()

        def score(hidden=hidden, weight=weight, targets=targets):
            with torch.no_grad():
                linear_logprob(hidden, weight, targets, temperature=0.7)

        t = device.medians(
            objective=lambda loss=loss, w=trained: loss(w), frozen=lambda loss=loss, w=weight: loss(w), score=score
        )
        product = 2.0 * shape.vocabulary * shape.hidden * rows
        at = dict(head=head_key(shape), dtype=dtype_name(model), rows=rows)
        for kind, products in (("objective", 3), ("frozen", 2), ("score", 1)):
            yield found(f"head_{kind}", products * product, t[kind], "FLOP/s", device.repeats, **at)


# --- the optimizer ----------------------------------------------------------------------------------------------------


def optimizer(
    policy: Policy, model: Model, device: Device, implementation: str = "fused", bf16: str = "nearest"
) -> Iterator[Found]:
    """Parameters a second of clipping and stepping, as a run does it."""
    from genevolve_fast.train.config import OptimConfig
    from genevolve_fast.train.optim import build_optimizer
    from genevolve_fast.train.strategies import Strategy

    made = build_optimizer(policy, OptimConfig(implementation=implementation, bf16=bf16), 1000)
    learning = [p for p in policy.parameters() if p.requires_grad]
    gradients = [torch.randn_like(p) for p in learning]

    def step():
        for p, g in zip(learning, gradients, strict=True):
            p.grad = g
        Strategy().norm(policy, 1.0)
        made.step()

    seconds = device.medians(step=step)["step"]
    count = sum(p.numel() for p in learning)
    wide = bf16 == "master" or implementation == "cpu" or all(p.dtype == torch.float32 for p in learning)
    at = dict(
        optimizer="adamw", implementation=implementation, bf16=bf16, dtype="float32" if wide else dtype_name(model),
        where="host" if implementation == "cpu" else "device", parameters=count,
    )  # fmt: skip
    yield found("optimizer", count, seconds, "parameters/s", device.repeats, **at)


def kinds_of_steps(model: Model, device: Device, implementations: Sequence[str]) -> list[tuple[str, str]]:
    """(implementation, bf16) that a run may have `model` stepped with, of those that work here."""
    from genevolve_fast.train.config import OptimConfig
    from genevolve_fast.train.optim import check_optimizer
    from genevolve_fast.train.run import RunError

    roundings = (
        ("nearest", "stochastic", "master") if model.dtype == torch.bfloat16 and not model.lora else ("nearest",)
    )
    found = []
    for kind in itertools.product(implementations, roundings):
        try:
            check_optimizer(OptimConfig(implementation=kind[0], bf16=kind[1]), device.where)
        except (RunError, ValueError) as error:
            print(f"optimizer {' '.join(kind)} is left out: {error}", flush=True)
        else:
            found.append(kind)
    return found


# --- sampling ---------------------------------------------------------------------------------------------------------


def sampling(
    policy: Policy, model: Model, device: Device, prompts: int, generations: int, new: int, urls: Sequence[str] = ()
) -> Iterator[Found]:
    """Sampled tokens a second with so many rollouts open: the sandbox's agent, tools too.

    By the embedded engine, or by the servers at `urls`, which are given the policy's weights first: then of one server.
    """
    from genevolve_fast.agent.session import SessionSettings
    from genevolve_fast.sandbox.world import SandboxWorld, open_world
    from genevolve_fast.train.collect import sample_rollouts

    sandbox = SandboxWorld()
    world = open_world(sandbox)
    limits = SessionSettings(
        max_tool_calls=4, max_model_calls=6, max_tokens_per_turn=new, max_response_tokens=6 * new,
        max_prompt_tokens=4096, temperature=0.9, top_p=1.0,
    )  # fmt: skip
    seconds, tokens, lengths = 0.0, 0, []
    now = time.perf_counter if urls or device.where.type == "cuda" else clock()
    with sampling_engine(policy, prompts * generations, urls) as engine:
        for turn in range(device.repeats + 1):
            engine.update_weights(turn)
            before, begin = engine.sampled_tokens, now()
            made = sample_rollouts(
                sandbox.requests("train", prompts, seed=turn), generations, world=world, engine=engine,
                codec=policy.codec, settings=limits, seed=turn,
            )  # fmt: skip
            if device.where.type == "cuda":
                torch.cuda.synchronize()
            if turn:  # the first warms up
                seconds += now() - begin
                tokens += engine.sampled_tokens - before
                lengths += [len(t) for t in made.trajectories]
    servers = len(urls) or 1
    at = dict(
        model=model_key(shape_of(policy)), dtype=dtype_name(model), engine="server" if urls else "transformers",
        quantize="none", open=prompts * generations / servers, context=round(mean(lengths)),
    )  # fmt: skip
    yield found("sampling", tokens / servers, seconds, "tokens/s", device.repeats, **at)


@contextmanager
def sampling_engine(policy: Policy, most: int, urls: Sequence[str]) -> Iterator[Any]:
    if not urls:
        from genevolve_fast.rollout.transformers_engine import TransformersEngine

        yield TransformersEngine(policy, max_batch=most)
        return
    from genevolve_fast.incidents import Incidents
    from genevolve_fast.rollout.vllm_server import VllmServerEngine

    with tempfile.TemporaryDirectory() as folder:
        engine = VllmServerEngine(policy, urls, incidents=Incidents(), sync_dir=Path(folder))
        try:
            yield engine
        finally:
            engine.shutdown()


# --- copies and files -------------------------------------------------------------------------------------------------


def copies(device: Device) -> Iterator[Found]:
    """Bytes a second between pinned host memory and the GPU, one direction at a time."""
    host = torch.empty(COPIED, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(COPIED, dtype=torch.uint8, device=device.where)
    t = device.medians(
        host_to_device=lambda: there.copy_(host, non_blocking=True),
        device_to_host=lambda: host.copy_(there, non_blocking=True),
    )
    for name, seconds in t.items():
        yield found(name, COPIED, seconds, "bytes/s", device.repeats, bytes=COPIED)


def writing(device: Device, folder: Path, count: int = COPIED) -> Iterator[Found]:
    """Bytes a second of a safetensors file, until the disk has it."""
    from safetensors.torch import save_file

    tensors = {"weight": torch.randint(256, (count,), dtype=torch.uint8)}

    def write():
        with tempfile.TemporaryDirectory(dir=folder) as inside:
            path = Path(inside) / "x.safetensors"
            save_file(tensors, path)
            with path.open("rb") as f:
                os.fsync(f.fileno())

    yield found("checkpoint_write", count, device.on_host(write=write)["write"], "bytes/s", device.repeats)


# --- all of a model ---------------------------------------------------------------------------------------------------


def policy_of(model: Model, device: Device, quantize: str = "none") -> Policy:
    """Random weights, under an adapter 4-bit ones on request; two layers of a model that is not small."""
    layers = None if model.shape.total_parameters < SMALL else 2
    if quantize == "none":
        return random_policy(model, device.where, layers=layers)
    from genevolve_fast.policy import quantize as quantized
    from genevolve_fast.policy.adapters import add_lora

    policy = random_policy(model, device.where, lora=0, layers=layers)
    quantized.quantize(policy, quantize)
    add_lora(policy, rank=model.lora)
    return policy.to(device.where)
