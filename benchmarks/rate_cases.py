"""What one device does in a second: a layer's visit, attention, the head, the optimizer, sampling, copies, writing."""

from __future__ import annotations

import itertools
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
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


def optimizer(policy: Policy, model: Model, device: Device) -> Iterator[Found]:
    """Parameters a second of clipping and stepping, as a run does it."""
    from genevolve_fast.train.config import OptimConfig
    from genevolve_fast.train.optim import build_optimizer, gradient_norm

    made = build_optimizer(policy, OptimConfig(name="adamw"), 1000)
    learning = [p for p in policy.parameters() if p.requires_grad]
    gradients = [torch.randn_like(p) for p in learning]

    def step():
        for p, g in zip(learning, gradients, strict=True):
            p.grad = g
        gradient_norm(policy, 1.0, error_if_nonfinite=True)
        made.step()

    seconds = device.medians(step=step)["step"]
    count = sum(p.numel() for p in learning)
    dtypes = {str(p.dtype).removeprefix("torch.") for p in learning}
    dtype = dtypes.pop() if len(dtypes) == 1 else dtype_name(model)
    at = dict(
        optimizer="adamw", implementation="fused", bf16="nearest", dtype=dtype, where="device", parameters=count
    )  # fmt: skip
    yield found("optimizer", count, seconds, "parameters/s", device.repeats, **at)


def host_optimizer(device: Device, count: int = 20_000_000) -> Iterator[Found]:
    """Parameters a second of DeepSpeed's CPU Adam on fp32 copies; it compiles itself the first time."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    weight = torch.nn.Parameter(torch.zeros(count))
    weight.grad = torch.ones(count)
    made = DeepSpeedCPUAdam([weight], lr=1e-6)
    seconds = device.on_host(step=made.step)["step"]
    for kind, rounding in (("fused", "nearest"), ("cpu", "master"), ("cpu", "nearest")):  # by ZeRO, by config
        at = dict(
            optimizer="adamw", implementation=kind, bf16=rounding, dtype="float32", where="host", parameters=count
        )  # fmt: skip
        yield found("optimizer", count, seconds, "parameters/s", device.repeats, **at)


# --- sampling ---------------------------------------------------------------------------------------------------------


def sampling(policy: Policy, model: Model, device: Device, prompts: int, generations: int, new: int) -> Iterator[Found]:
    """Sampled tokens a second of the embedded engine with so many rollouts open: the sandbox's agent, tools too."""
    from genevolve_fast.agent.session import SessionSettings
    from genevolve_fast.rollout.transformers_engine import TransformersEngine
    from genevolve_fast.sandbox.world import SandboxWorld, open_world
    from genevolve_fast.train.collect import sample_rollouts

    sandbox = SandboxWorld()
    world = open_world(sandbox)
    engine = TransformersEngine(policy, max_batch=prompts * generations)
    limits = SessionSettings(
        max_tool_calls=4, max_model_calls=6, max_tokens_per_turn=new, max_response_tokens=6 * new,
        max_prompt_tokens=4096, temperature=0.9, top_p=1.0,
    )  # fmt: skip
    seconds, tokens = 0.0, 0
    now = time.perf_counter if device.where.type == "cuda" else clock()
    for turn in range(device.repeats + 1):
        before, begin = engine.sampled_tokens, now()
        sample_rollouts(
            sandbox.requests("train", prompts, seed=turn), generations, world=world, engine=engine, codec=policy.codec,
            settings=limits, seed=turn,
        )  # fmt: skip
        if device.where.type == "cuda":
            torch.cuda.synchronize()
        if turn:  # the first warms up
            seconds += now() - begin
            tokens += engine.sampled_tokens - before
        engine.update_weights(turn)
    at = dict(
        model=model_key(shape_of(policy)), dtype=dtype_name(model), engine="transformers", quantize="none",
        open=prompts * generations,
    )  # fmt: skip
    yield found("sampling", tokens, seconds, "tokens/s", device.repeats, **at)


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


def policy_of(model: Model, device: Device) -> Policy:
    """Random weights; two layers of a model that is not small."""
    return random_policy(model, device.where, layers=None if model.shape.total_parameters < SMALL else 2)
