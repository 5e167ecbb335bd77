"""What is measured of the training step, case by case. `python -m benchmarks.step` runs them; scores are made there."""

from __future__ import annotations

import gc
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from benchmarks.group import DeviceLost
from benchmarks.memory import peak_bytes, saved_bytes
from benchmarks.models import MODELS, Model, random_policy, ready_gradients, rollouts_of, shape_of, uneven_replies
from benchmarks.peers import first_line
from benchmarks.store import Row
from benchmarks.timing import quantiles, take_turns
from benchmarks.whole_sequences import former, unshared
from genevolve_fast.batch.groups import TrainingRollout
from genevolve_fast.ops import Objective
from genevolve_fast.policy.model import Policy
from genevolve_fast.policy.offload import ActivationOffload
from genevolve_fast.profile.flops import (
    SHARED,
    UNSHARED,
    GroupLengths,
    Layout,
    Passes,
    pushed,
    sharing_ratio,
    step_flops,
)
from genevolve_fast.profile.shapes import ModelShape
from genevolve_fast.train.update import accumulate_gradients

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # the naive passes that gradients are compared with

PROMPT, PATCH, MAX_TOKENS = 6144, 600, 32_768
REPLIES = {"reply8k": (8192, 1), "reply2k": (2048, 2)}  # name -> (mean tokens, requests)
ALONE = (32_768, 65_536)  # student tokens of one rollout
LONGEST = 262_144
HOST_RESERVE = 16 << 30  # bytes of host memory that the offload leaves alone
TEMPERATURE = 0.7
OBJECTIVE = Objective(kl_coef=0.0)
CLOSE = {torch.float32: 1e-4, torch.bfloat16: 0.15}  # relative distance of two gradients that are the same but rounding


@dataclass
class Bench:
    """Where and how often things run. `toy`: every model is the toy, tokens are divided by its scale."""

    device: torch.device
    repeats: int = 3
    toy: bool = False
    small: bool = False  # of the sections that run the sandbox
    _kept: tuple[tuple, Policy] | None = None

    def model(self, name: str) -> Model:
        if not self.toy:
            return MODELS[name]
        toy = MODELS["toy"]
        return toy if MODELS[name].lora else replace(toy, lora=0)

    def tokens(self, count: int) -> int:
        return max(1, count // MODELS["toy"].scale) if self.toy else count

    def policy(self, name: str, *, lora: int | None = None, layers: int | None = None) -> Policy:
        """The last one made is kept; its gradients are there and 0."""
        if self.toy:
            lora, layers = (None if lora is None else min(lora, 4)), (None if layers is None else 2)
        model = self.model(name)
        key = (model, lora, layers)
        if self._kept is None or self._kept[0] != key:
            self.forget()
            self._kept = key, random_policy(model, self.device, lora=lora, layers=layers)
        policy = self._kept[1]
        policy.offload = None
        ready_gradients(policy)
        return policy

    def forget(self) -> None:
        self._kept = None
        self.release()

    def release(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    def rollouts(
        self, replies: Sequence[int], vocabulary: int, *, requests: int = 1, teacher: bool = True
    ) -> list[TrainingRollout]:
        """Of `requests` prompts, each with replies of these lengths."""
        patch, turn = self.tokens(PATCH) if teacher else 0, self.tokens(1200)
        scaled = [self.tokens(r) for r in replies]
        groups = (
            rollouts_of(self.tokens(PROMPT), scaled, patch, vocabulary, group=str(g), turn=turn)
            for g in range(requests)
        )
        return [r for group in groups for r in group]

    def shared(self, policy: Policy, rollouts: Sequence[TrainingRollout]) -> Callable[[], None]:
        """The training pass; everything it returns is dropped."""

        def run() -> None:
            accumulate_gradients(
                policy, rollouts, {}, OBJECTIVE, temperature=TEMPERATURE, max_tokens=self.tokens(MAX_TOKENS)
            )

        return run

    # --- measuring ----------------------------------------------------------------------------------------------------

    def weigh(self, run: Callable[[], object]) -> Row:
        """Seconds and peak bytes of one run above what is there before it; or why there are none."""
        self.release()

        def nothing_returned() -> tuple:
            run()
            return ()

        try:
            begin = time.perf_counter()
            peak = peak_bytes(nothing_returned, self.device)
            return dict(status="timed", peak_bytes=peak, seconds=time.perf_counter() - begin, samples=1)
        except Exception as e:
            row = failure(e)
        self.survive(row)
        return row

    def survive(self, row: Row) -> None:
        """Free what a failure left. Raises DeviceLost where the CUDA context did not survive it."""
        try:
            self.release()
        except Exception as e:
            raise DeviceLost(f"the CUDA context is broken: {row['reason']}") from e

    def time(self, rows: dict[str, Row], runs: dict[str, Callable[[], object]], rounds: int | None = None) -> None:
        """Put the seconds of the runs that work, taken in turns, into their rows, and the ratio of each to the first.

        `ratio`, ratio_20 and ratio_80: of the other over the first, round by round, and of those the quantiles.
        """
        alive = {name: run for name, run in runs.items() if rows[name]["status"] == "timed"}

        def guarded(name: str, run: Callable[[], object]) -> Callable[[], object]:
            def once() -> None:
                if rows[name]["status"] != "timed":
                    return
                try:
                    run()
                    return
                except Exception as e:
                    rows[name] |= failure(e)
                self.survive(rows[name])

            return once

        if not alive:
            return
        times = take_turns({n: guarded(n, r) for n, r in alive.items()}, self.device, rounds or self.repeats)
        for name, ms in times.items():
            if rows[name]["status"] == "timed":
                q20, q50, q80 = (x / 1e3 for x in quantiles(ms))
                rows[name] |= dict(seconds=q50, seconds_20=q20, seconds_80=q80, samples=len(ms))
        first, *others = runs
        if rows[first]["status"] != "timed":
            return
        for name in others:
            if rows[name]["status"] == "timed":
                q20, q50, q80 = quantiles([b / a for a, b in zip(times[first], times[name], strict=True)])
                rows[name] |= dict(ratio=q50, ratio_20=q20, ratio_80=q80, ratio_to=first)


def failure(e: Exception) -> Row:
    status = "out of memory" if isinstance(e, torch.OutOfMemoryError) else "failed"
    return dict(status=status, reason=f"{type(e).__name__}: {first_line(e)}")


@dataclass(frozen=True)
class Case:
    """What is measured in one go: `measure` gives a row for each contender. The minutes on an H200 are an estimate."""

    section: str
    name: str
    model: str
    minutes: float
    measure: Callable[[Bench], dict[str, Row]]
    unless: Callable[[list[Row]], bool] = lambda rows: False  # what rows that are there make it needless


# --- sharing against packed whole sequences ---------------------------------------------------------------------------


def group_lengths(rollouts: Sequence[TrainingRollout]) -> list[GroupLengths]:
    """The groups as the FLOP formulas take them; train.profiled has it too, but reads configurations."""
    found = []
    for _, group in itertools.groupby(rollouts, key=lambda r: r.trajectory.group_id):
        members = list(group)
        prefix = int(members[0].trajectory.loss_mask.argmax())
        replies = tuple(len(r.trajectory) - prefix for r in members)
        patches = tuple(len(r.experience_ids) for r in members)
        rows = tuple(r.trajectory.num_loss_tokens for r in members)
        found.append(GroupLengths(prefix, replies, patches, members[0].trajectory.request_stop, rows))
    return found


def passes_of(lora: int) -> Passes:
    """Student 4 times the linear maps' forward and 4.5 times attention's; with frozen weights 3 times and 4.5."""
    return Passes(weight_gradients=0, head=2) if lora else Passes()


def work_of(shape: ModelShape, rollouts: Sequence[TrainingRollout], layout: Layout, lora: int) -> Row:
    """Tokens through the layers, and FLOPs of the step, for exactly these lengths."""
    groups = group_lengths(rollouts)
    work = pushed(groups, layout)
    return dict(
        tokens=work.student_tokens, teacher_tokens=work.teacher_tokens,
        flops=step_flops(shape, work, passes_of(lora)).total,
    )  # fmt: skip


def distance(policy: Policy, run: Callable[[], object], want: Sequence[torch.Tensor]) -> float:
    """Relative distance of the gradient that `run` adds to a fresh one from `want`."""
    ready_gradients(policy)
    run()
    have = gradients(policy)
    off = sum(float((a.float() - b.float()).square().sum()) for a, b in zip(have, want, strict=True))
    return (off / sum(float(b.float().square().sum()) for b in want)) ** 0.5


def gradients(policy: Policy) -> list[torch.Tensor]:
    return [p.grad for p in policy.parameters() if p.requires_grad]


def gradients_by(policy: Policy, run: Callable[[], object]) -> list[torch.Tensor]:
    """Copies of the gradient that `run` adds to a fresh one."""
    ready_gradients(policy)
    run()
    return [g.clone() for g in gradients(policy)]


def short_rollouts(bench: Bench, vocabulary: int) -> list[TrainingRollout]:
    """An eighth of the real lengths, for comparing gradients before anything is timed."""
    return rollouts_of(
        bench.tokens(PROMPT // 8), [bench.tokens(r) for r in uneven_replies(1024)], bench.tokens(PATCH), vocabulary,
        turn=bench.tokens(1200),
    )  # fmt: skip


def verdict(off: float, dtype: torch.dtype) -> Row:
    if off <= CLOSE[dtype]:
        return dict(gradient_distance=off)
    return dict(gradient_distance=off, status="wrong", reason=f"its gradient is {off:.2g} off ours")


EVERY_TOKEN = replace(OBJECTIVE, sdl_permille=1000)  # a selection could fall either way with rounding


def speedup(bench: Bench, name: str, reply: str) -> dict[str, Row]:
    policy, model = bench.policy(name), bench.model(name)
    shape = shape_of(policy)
    options = dict(temperature=TEMPERATURE, max_tokens=bench.tokens(MAX_TOKENS))
    short = short_rollouts(bench, shape.vocabulary)
    want = gradients_by(policy, lambda: accumulate_gradients(policy, short, {}, EVERY_TOKEN, **options))
    off = distance(policy, lambda: unshared(policy, short, {}, EVERY_TOKEN, **options), want)
    del want
    mean, requests = REPLIES[reply]
    rollouts = bench.rollouts(uneven_replies(mean), shape.vocabulary, requests=requests)
    runs = {
        "shared": bench.shared(policy, rollouts),
        "unshared": lambda: unshared(policy, rollouts, {}, OBJECTIVE, **options),
    }
    ready_gradients(policy)
    rows = {n: bench.weigh(run) for n, run in runs.items()}
    rows["unshared"] |= verdict(off, model.dtype) if rows["unshared"]["status"] == "timed" else {}
    bench.time(rows, runs)
    for n, layout in (("shared", SHARED), ("unshared", UNSHARED)):
        rows[n] |= work_of(shape, rollouts, layout, model.lora)
        if "seconds" in rows[n]:
            rows[n]["tflops"] = rows[n]["flops"] / rows[n]["seconds"] / 1e12
    rows["unshared"]["flop_ratio"] = sharing_ratio(shape, group_lengths(rollouts), passes_of(model.lora))
    return rows


# --- against TRL ------------------------------------------------------------------------------------------------------

TRL_BATCHES = (6, 3, 2)


def against_trl(bench: Bench, name: str) -> dict[str, Row]:
    """One request's six rollouts; where TRL's batch of six does not fit, the largest that does; batch 1 beside."""
    from benchmarks.trl_step import TrlStep, Unavailable

    policy, model = bench.policy(name), bench.model(name)
    shape = shape_of(policy)
    rollouts = bench.rollouts(uneven_replies(REPLIES["reply8k"][0]), shape.vocabulary)
    short = short_rollouts(bench, shape.vocabulary)
    options = dict(temperature=TEMPERATURE, max_tokens=bench.tokens(MAX_TOKENS))
    want = gradients_by(policy, lambda: accumulate_gradients(policy, short, {}, EVERY_TOKEN, **options))
    theirs = random_policy(model, bench.device)
    try:
        trl = TrlStep(theirs, OBJECTIVE, TEMPERATURE)
    except Unavailable as e:
        return {"trl": dict(status="absent", reason=str(e))}
    said = dict(liger=trl.liger, why_no_liger=trl.why_no_liger)
    trl.objective = EVERY_TOKEN
    off = distance(theirs, lambda: trl.run(short, len(short)), want)
    trl.objective = OBJECTIVE
    del want
    ready_gradients(policy), ready_gradients(theirs)
    runs: dict[str, Callable[[], object]] = {"shared": bench.shared(policy, rollouts)}
    rows = {"shared": bench.weigh(runs["shared"]) | work_of(shape, rollouts, SHARED, model.lora)}
    for batch in TRL_BATCHES:
        impl = f"trl [batch {batch}]"
        runs[impl] = lambda batch=batch: trl.run(rollouts, batch)
        rows[impl] = bench.weigh(runs[impl]) | said | dict(batch=batch)
        if rows[impl]["status"] == "timed":
            rows[impl] |= verdict(off, model.dtype)
            break
    bench.time(rows, runs, rounds=max(1, bench.repeats - 1))
    rows["trl [batch 1]"] = bench.weigh(lambda: trl.run(rollouts, 1)) | said | dict(batch=1)
    lengths = [len(r.trajectory) for r in rollouts]
    for row in rows.values():
        row["real_tokens"] = sum(lengths)
        if batch := row.get("batch"):
            parts = [lengths[i : i + batch] for i in range(0, len(lengths), batch)]
            row["tokens"] = sum(len(part) * max(part) for part in parts)
    return rows


# --- bytes of one rollout ---------------------------------------------------------------------------------------------


def offload_of(policy: Policy, tokens: int, device: torch.device) -> ActivationOffload:
    """Room for every layer input of `tokens` rows."""
    shape, width = shape_of(policy), policy.head_weight.element_size()
    return ActivationOffload(shape.layers * (tokens * shape.hidden * width + 2 * 512), device)


@contextmanager
def offloading(policy: Policy, offload: ActivationOffload | None) -> Iterator[None]:
    policy.offload = offload
    try:
        yield
    finally:
        policy.offload = None


def settings_of(bench: Bench, model: Model, replies: Sequence[int], *, teacher: bool, offload_bytes: int = 0) -> Row:
    """What `profile.plan.Settings` needs to predict this step; tokens as they are here."""
    scaled = [bench.tokens(r) for r in replies]
    prompt = bench.tokens(PROMPT)
    return dict(
        tokens=prompt + max(scaled), prefix=prompt, prompts_per_step=1, num_generations=len(scaled),
        max_tokens_per_microbatch=bench.tokens(MAX_TOKENS), patch=bench.tokens(PATCH), loss_share=0.3,
        dtype=str(model.dtype).removeprefix("torch."), lora=model.lora, teacher="live" if teacher else "off",
        reference=False, rollout=False, offload_gib=offload_bytes / 2**30 if bench.device.type == "cuda" else 0.0,
        device=bench.device.type,
    )  # fmt: skip


def alone(bench: Bench, name: str, tokens: int, teacher: bool, offloaded: bool) -> dict[str, Row]:
    """Peak of one rollout of `tokens` student tokens after the usual prompt."""
    policy, model = bench.policy(name), bench.model(name)
    rollouts = bench.rollouts([tokens], shape_of(policy).vocabulary, teacher=teacher)
    offload = offload_of(policy, len(rollouts[0].trajectory), bench.device) if offloaded else None
    with offloading(policy, offload):
        row = bench.weigh(bench.shared(policy, rollouts))
    room = offload.nbytes if offload else 0
    row |= dict(
        tokens=bench.tokens(tokens), teacher=teacher, offloaded=offloaded,
        host_bytes=offload.peak_bytes if offload else 0,
        settings=settings_of(bench, model, [tokens], teacher=teacher, offload_bytes=room),
    )  # fmt: skip
    return {"shared": row}


def offload_cost(bench: Bench, name: str) -> dict[str, Row]:
    """With all layer inputs offloaded and with none, in turns, at the longest rollout that both can hold."""
    policy = bench.policy(name)
    vocabulary, rows = shape_of(policy).vocabulary, {}
    for tokens in sorted(ALONE, reverse=True):
        rollouts = bench.rollouts([tokens], vocabulary)
        offload = offload_of(policy, len(rollouts[0].trajectory), bench.device)
        run = bench.shared(policy, rollouts)

        def offloaded(run=run, offload=offload) -> None:
            with offloading(policy, offload):
                run()

        runs = {"on the GPU": run, "offloaded": offloaded}
        rows = {n: dict(status="timed", tokens=bench.tokens(tokens), host_bytes=0) for n in runs}
        bench.time(rows, runs, rounds=max(1, bench.repeats - 1))
        rows["offloaded"]["host_bytes"] = offload.peak_bytes
        if all(r["status"] == "timed" for r in rows.values()):
            break
    return rows


# --- the longest rollout ----------------------------------------------------------------------------------------------


def available_host_bytes() -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024


def longest(bench: Bench, name: str, tokens: int, layers: int | None) -> dict[str, Row]:
    """One rollout of `tokens` in all, end to end, teacher included; as much offloaded as the host can hold."""
    policy = bench.policy(name, layers=layers)
    shape = shape_of(policy)
    rollouts = bench.rollouts([tokens - PROMPT], shape.vocabulary)
    wanted = shape.layers * (len(rollouts[0].trajectory) * shape.hidden * policy.head_weight.element_size() + 1024)
    room = max(0, min(wanted, available_host_bytes() - HOST_RESERVE))
    offload = ActivationOffload(room, bench.device)
    with offloading(policy, offload):
        row = bench.weigh(bench.shared(policy, rollouts))
    grads = [float(g.float().norm()) for g in gradients(policy)]
    if row["status"] == "timed" and not (all(map(torch.isfinite, map(torch.tensor, grads))) and sum(grads) > 0):
        row |= dict(status="wrong", reason="its gradient is not finite, or 0")
    row |= dict(
        tokens=len(rollouts[0].trajectory), layers=shape.layers, whole=layers is None, host_bytes=offload.peak_bytes,
        peak_on_device=_peak_on_device(bench.device),
    )  # fmt: skip
    return {"shared": row}


def _peak_on_device(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


# --- the planner ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Planned:
    """A configuration whose peak is predicted: every switch is on in some and off in others."""

    name: str
    model: str
    lora: int
    replies: tuple[int, ...]
    teacher: bool = True
    offload: bool = False


PLANNED = (
    Planned("2b lora group", "2b", 64, uneven_replies(8192)),
    Planned("2b full group", "2b", 0, uneven_replies(4096)),
    Planned("2b full long, offloaded, no teacher", "2b", 0, (49_152,), teacher=False, offload=True),
    Planned("8b lora group", "8b", 64, uneven_replies(4096)),
    Planned("8b lora long, offloaded", "8b", 64, (49_152,), offload=True),
    Planned("8b full group, no teacher", "8b", 0, uneven_replies(2048), teacher=False),
)


def planned(bench: Bench, p: Planned) -> dict[str, Row]:
    """Peak of a whole step, AdamW included, above an empty device and without the CUDA context."""
    policy = bench.policy(p.model, lora=p.lora)
    model = replace(bench.model(p.model), lora=min(p.lora, 4) if bench.toy else p.lora)
    rollouts = bench.rollouts(p.replies, shape_of(policy).vocabulary, teacher=p.teacher)
    offload = offload_of(policy, sum(len(r.trajectory) for r in rollouts), bench.device) if p.offload else None
    optimizer = torch.optim.AdamW((w for w in policy.parameters() if w.requires_grad), lr=1e-6, fused=True)

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0, error_if_nonfinite=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def step() -> None:
        bench.shared(policy, rollouts)()
        update()

    update()  # its state is there before the step that is measured, the gradients are not
    with offloading(policy, offload):
        row = bench.weigh(step)
    state = (t for s in optimizer.state.values() for t in s.values())
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for t in (*policy.parameters(), *policy.buffers(), *state) if isinstance(t, torch.Tensor)}  # fmt: skip
    if row["status"] == "timed":
        row["total_bytes"] = row["peak_bytes"] + sum(held.values())
    room = offload.nbytes if offload else 0
    settings = settings_of(bench, model, p.replies, teacher=p.teacher, offload_bytes=room)
    bench.forget()  # its weights have moved
    tokens = sum(len(r.trajectory) for r in rollouts)
    return {"shared": row | dict(settings=settings, held_bytes=sum(held.values()), tokens=tokens)}


# --- a whole step of evolve -------------------------------------------------------------------------------------------


def loop(bench: Bench, name: str) -> dict[str, Row]:
    """Rollouts by the engine with random weights, then training on them; experience and advantages are made up."""
    from transformers import AutoTokenizer

    from genevolve_fast.agent.session import SessionSettings
    from genevolve_fast.policy.codec import TransformersCodec
    from genevolve_fast.rollout.transformers_engine import TransformersEngine
    from genevolve_fast.sandbox.tiny_policy import start_path
    from genevolve_fast.sandbox.world import SandboxWorld, open_world
    from genevolve_fast.train.collect import sample_rollouts

    bench.forget()
    codec = TransformersCodec(AutoTokenizer.from_pretrained(start_path()), None)
    policy = random_policy(bench.model(name), bench.device, codec=codec)
    sandbox = SandboxWorld()
    world = open_world(sandbox)
    prompts, generations, new = (8, 6, 512) if not bench.toy else (2, 3, 16)
    engine = TransformersEngine(policy, max_batch=prompts * generations, deterministic=False)
    settings = SessionSettings(
        max_model_calls=2, max_tokens_per_turn=new, max_response_tokens=4 * new, max_prompt_tokens=4096,
        temperature=TEMPERATURE, top_p=1.0,
    )  # fmt: skip
    begin = time.perf_counter()
    sampled = sample_rollouts(
        sandbox.requests("train", prompts), generations, world=world, engine=engine, codec=codec, settings=settings,
        seed=0,
    )  # fmt: skip
    if bench.device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    engine.update_weights(1)
    patch = tuple(codec.encode("<experience>\n- Search the fact before the answer.\n</experience>"))
    batch = [TrainingRollout(t, (-1.0) ** i, patch) for i, t in enumerate(sampled.trajectories) if t.num_loss_tokens]
    ready_gradients(policy)
    row = bench.weigh(bench.shared(policy, batch))
    tokens, all_tokens = sum(r.trajectory.num_loss_tokens for r in batch), sum(len(r.trajectory) for r in batch)
    row |= dict(
        rollout_seconds=seconds, sampled_tokens=tokens, tokens=all_tokens, rollout_tokens_per_second=tokens / seconds
    )
    if row["status"] == "timed":
        row["train_tokens_per_second"] = all_tokens / row["seconds"]
        row["step_tokens_per_second"] = all_tokens / (seconds + row["seconds"])
    return {"shared": row}


# --- exactness and the demo, on a CPU ---------------------------------------------------------------------------------


def exact_cases():
    """name -> (policy, rollouts, images) in float32: Qwen3-VL with images, and Qwen3."""
    import numpy as np
    from grouped import mixed_batch, text_policy
    from transformers import AutoTokenizer

    from genevolve_fast.sandbox.tiny_policy import new_policy, start_path

    random = np.random.default_rng(0)
    pictures = [random.integers(0, 255, (96, 96, 3), dtype=np.uint8) for _ in range(4)]
    tokenizer = AutoTokenizer.from_pretrained(start_path())
    for name, policy in (("Qwen3-VL", new_policy(tokenizer, seed=1).eval()), ("Qwen3", text_policy("Qwen3"))):
        with torch.no_grad():
            for p in policy.parameters():
                p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
        policy.gradient_checkpointing = True
        yield name, policy, *mixed_batch(policy.codec, pictures if policy.has_vision else [])


def grad_error(bench: Bench) -> dict[str, Row]:
    """Relative distance of the shared pass's gradient from independent naive passes, float32."""
    from naive import gradient, naive_loss

    rows = {}
    for name, policy, rollouts, images in exact_cases():
        naive_loss(policy, rollouts, images, OBJECTIVE, TEMPERATURE).backward()
        want = gradient(policy)
        for max_tokens in (10**6, 90, 1):
            policy.zero_grad()
            accumulate_gradients(policy, rollouts, images, OBJECTIVE, temperature=TEMPERATURE, max_tokens=max_tokens)
            error = float((gradient(policy) - want).norm() / want.norm())
            rows[f"{name} [{max_tokens}]"] = dict(status="timed", error=error, samples=len(rollouts))
    return rows


def teacher_saved_bytes(bench: Bench) -> dict[str, Row]:
    """What a micro-batch's forward saves with the teacher riding, and without."""
    from genevolve_fast.batch.groups import bundles
    from genevolve_fast.policy.passes import Prefix, reading, through_layers

    rows = {}
    for name, policy, rollouts, images in exact_cases():
        policy.freeze_vision()
        (make,) = bundles(rollouts, images, policy.codec, "cpu", max_tokens=10**6)
        bundle = make()
        features = policy.image_features(bundle.images)
        prefix = Prefix(policy, bundle.prefix, bundle.layout, bundle.last_rows, features)
        (micro,) = bundle.microbatches
        student = reading(policy, micro.student, micro.student_layout, prefix)
        pair = (reading(policy, micro.teacher, micro.teacher_layout, prefix), None)
        with_it, without = (saved_bytes(partial(through_layers, policy, features, student, t)) for t in pair)
        rows[name] = dict(
            status="timed", saved_bytes=with_it, saved_bytes_without=without, teacher_rows=len(micro.teacher), samples=1
        )
    return rows


def demo_batch(small: bool):
    """(policy, rollouts, images, objective, options) of the demo's first step, sampled by its engine."""
    from genevolve_fast.commands.opening import config_path, open_policy, open_world
    from genevolve_fast.rollout.transformers_engine import TransformersEngine
    from genevolve_fast.train.collect import judge_rollouts, sample_rollouts
    from genevolve_fast.train.config import EvolveConfig, load_config
    from genevolve_fast.train.evolve import (
        group_by_request,
        learn_from,
        new_memory,
        requests_of_step,
        session_settings,
        training_rollouts,
    )
    from genevolve_fast.train.prepare import prepare

    fewer = ["rollout.prompts_per_step=2", "rollout.num_generations=2", "rollout.max_tokens_per_turn=24"]
    config = load_config(EvolveConfig, config_path("demo"), fewer if small else [])
    policy = open_policy(config.policy).to("cpu").eval()
    prepare(policy, config.policy, config.seed)
    sandbox, world = open_world(config)
    requests = {r.id: r for r in requests_of_step(sandbox.requests("train", config.pool_size), config, 0)}
    engine = TransformersEngine(policy, max_batch=config.rollout.max_batch, deterministic=config.rollout.deterministic)
    sampled = sample_rollouts(
        list(requests.values()), config.rollout.num_generations, world=world, engine=engine, codec=policy.codec,
        settings=session_settings(config.rollout, world), seed=config.seed,
    )  # fmt: skip
    judged = judge_rollouts(sampled, requests, world)
    groups = group_by_request(judged.trajectories)
    found, _ = learn_from(groups, requests, world, new_memory(config, world), config, 0)
    rollouts = training_rollouts(groups, found, policy, config)
    options = dict(temperature=config.rollout.temperature, max_tokens=config.max_tokens_per_microbatch)
    return policy, rollouts, judged.images, config.objective, options


def demo(bench: Bench) -> dict[str, Row]:
    """The demo's training phase on one real batch: this pass, and the one it was trained with before."""
    policy, rollouts, images, objective, options = demo_batch(bench.small)
    if bench.small:  # too few rollouts for a reward gap
        rollouts = [replace(r, advantage=(-1.0) ** i, experience_ids=(41, 42)) for i, r in enumerate(rollouts)]
    runs = {
        "shared": lambda: accumulate_gradients(policy, rollouts, images, objective, **options),
        "former": lambda: former(policy, rollouts, images, objective, **options),
    }
    off = distance(policy, runs["former"], gradients_by(policy, runs["shared"]))
    rows = {n: dict(status="timed", rollouts=len(rollouts)) for n in runs}
    rows["former"] |= verdict(off, torch.float32)
    bench.time(rows, runs)
    taught = sum(bool(r.experience_ids) for r in rollouts)
    live = sum(bool(r.advantage or r.experience_ids) for r in rollouts)
    for row in rows.values():
        row |= dict(tokens=sum(len(r.trajectory) for r in rollouts), taught=taught, live=live)
    return rows


# --- the list ---------------------------------------------------------------------------------------------------------


def _label(name: str) -> str:
    return f"{name} {'lora' if MODELS[name].lora else 'full'}"


def _speedup(name: str, reply: str, minutes: float) -> Case:
    return Case("speedup", f"{_label(name)} {reply}", name, minutes, lambda b: speedup(b, name, reply))


def _alone(tokens: int, teacher: bool, offloaded: bool) -> Case:
    label = f"{tokens} tokens, teacher {'on' if teacher else 'off'}, {'offloaded' if offloaded else 'on the GPU'}"
    minutes = 0.2 if tokens == ALONE[0] else 0.7
    return Case("bytes", label, "8b", minutes, lambda b: alone(b, "8b", tokens, teacher, offloaded))


def _longest(tokens: int, layers: int | None, minutes: float, **more) -> Case:
    label = f"{tokens} tokens, {'all' if layers is None else layers} layers"
    return Case("longest", label, "8b", minutes, lambda b: longest(b, "8b", tokens, layers), **more)


def _ran_longer(rows: list[Row]) -> bool:
    return any(r["mode"] == "longest" and r.get("whole") and r["status"] == "timed" for r in rows)


CASES = (
    _speedup("8b", "reply8k", 2.8),
    _speedup("8b", "reply2k", 1.8),
    _speedup("2b", "reply8k", 1.2),
    _speedup("2b", "reply2k", 0.8),
    Case("trl", "8b lora reply8k", "8b", 7.0, lambda b: against_trl(b, "8b")),
    *(_alone(n, t, o) for n, t, o in itertools.product(ALONE, (False, True), (False, True))),
    Case("bytes", "offload cost", "8b", 3.8, lambda b: offload_cost(b, "8b")),
    _longest(LONGEST, None, 7.5),
    _longest(LONGEST // 2, None, 2.5, unless=_ran_longer),
    _longest(2 * LONGEST, 8, 6.0),
    *(Case("planner", p.name, p.model, 0.8, lambda b, p=p: planned(b, p)) for p in PLANNED),
    Case("loop", "2b full, short replies", "2b", 1.5, lambda b: loop(b, "2b")),
    Case("exactness", "grad error", "tiny", 0.2, grad_error),
    Case("exactness", "teacher saved bytes", "tiny", 0.2, teacher_saved_bytes),
    Case("demo", "first step", "sandbox:start", 2.0, demo),
)
ON_CPU = ("exactness", "demo")
SECTIONS = tuple(dict.fromkeys(c.section for c in CASES))
