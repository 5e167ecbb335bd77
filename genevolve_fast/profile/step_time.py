"""The time of a step on several GPUs, from measured rates alone: where one is missing there is no estimate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from genevolve_fast.profile.flops import (
    ATTENTION_BACKWARD,
    SHARED,
    GroupLengths,
    Layout,
    Passes,
    Work,
    attention_flops,
    pushed,
)
from genevolve_fast.profile.plan import (
    Plan,
    PlanError,
    Settings,
    has_master,
    layer_bytes,
    layer_parameters,
    plan,
    state_leaves,
    trainable,
    trained_bytes,
)
from genevolve_fast.profile.rates import MeasuredRun, NoRate, Rate, Rates, head_key, layer_key, model_key, same_device
from genevolve_fast.profile.shapes import ModelShape
from genevolve_fast.profile.sharding import DIVIDED

LARGE = 512 << 20  # bytes of an exchange from which on its rate does not grow
APART = Layout(share_prefix=True)  # a teacher with other weights computes the prefix itself
ARITHMETIC, TRANSFER, ROLLOUT, BESIDE = "arithmetic", "transfer", "rollout", "beside"


@dataclass(frozen=True)
class Engines:
    """Who samples: `gpus` 0, the training GPUs themselves; `one_step_off`: while the step before is trained on."""

    gpus: int = 0
    one_step_off: bool = False
    engine: str = "transformers"

    def __post_init__(self) -> None:
        if self.gpus < 0:
            raise PlanError(f"rollout_gpus must not be negative, got {self.gpus}")
        if self.one_step_off and not self.gpus:
            raise PlanError("one_step_off needs rollout_gpus: GPUs that train cannot sample at the same time")


@dataclass(frozen=True)
class Line:
    """Seconds of one part of a step on the busiest GPU; None where a rate is missing, and `how` says which."""

    name: str
    kind: str
    seconds: float | None
    how: str
    rates: tuple[Rate, ...] = ()


@dataclass(frozen=True)
class StepTime:
    """The parts of a step, and what they come to."""

    lines: tuple[Line, ...]
    engines: Engines
    idle: int = 0  # GPUs without a group
    measured: MeasuredRun | None = None

    def of(self, kind: str) -> list[Line]:
        return [line for line in self.lines if line.kind == kind]

    @property
    def missing(self) -> list[Line]:
        return [line for line in self.lines if line.seconds is None and line.kind != BESIDE]

    @property
    def training(self) -> tuple[float, float] | None:
        """Seconds (if all transfers hide behind arithmetic, if none does)."""
        lines = [*self.of(ARITHMETIC), *self.of(TRANSFER)]
        if any(line.seconds is None for line in lines):
            return None
        busy, moved = (sum(line.seconds for line in self.of(kind)) for kind in (ARITHMETIC, TRANSFER))
        return max(busy, moved), busy + moved

    @property
    def step(self) -> tuple[float, float] | None:
        """With the rollouts, in turn or at the same time."""
        rollout = sum(line.seconds for line in self.of(ROLLOUT)) if not self.missing else 0.0
        if self.missing or self.training is None:
            return None
        join: Callable[[float, float], float] = max if self.engines.one_step_off else lambda a, b: a + b
        return tuple(join(rollout, part) for part in self.training)

    def as_dict(self) -> dict[str, Any]:
        lines = [{"name": x.name, "kind": x.kind, "seconds": x.seconds, "how": x.how} for x in self.lines]
        measured = asdict(self.measured) if self.measured else None
        return {"lines": lines, "training": self.training, "step": self.step, "idle": self.idle, "measured": measured}


@dataclass(frozen=True)
class Streams:
    """How often the layers are visited: bundles of groups, and their replies in micro-batches."""

    bundles: int
    microbatches: int  # of one bundle

    @property
    def forwards(self) -> int:
        return self.bundles * (1 + self.microbatches)


def streams_of(s: Settings, groups: Sequence[GroupLengths]) -> Streams:
    """As `batch.groups.bundles` lays out groups that are all as long as the longest."""
    reply = max((r + max(g.patches, default=0) for g in groups for r in g.replies), default=0)
    rollouts, prefix = max(len(g.replies) for g in groups), max(g.prefix for g in groups)
    whole = prefix + rollouts * reply
    if whole <= s.max_tokens_per_microbatch:
        return Streams(-(-len(groups) // (s.max_tokens_per_microbatch // whole)), 1)
    together = max(1, s.max_tokens_per_microbatch // max(1, reply))
    return Streams(len(groups), -(-rollouts // together))


def expected_groups(s: Settings) -> list[GroupLengths]:
    """The groups of the busiest GPU: every reply as long as the mean."""
    reply = (s.mean_tokens or s.tokens) - s.prefix
    patch = 0 if s.teacher == "off" else s.patch
    loss = max(1, round(s.loss_share * reply))
    one = GroupLengths(s.prefix, (reply,) * s.num_generations, patch, loss_tokens=(loss,) * s.num_generations)
    return [one] * s.groups


def step_time(
    shape: ModelShape,
    s: Settings,
    rates: Rates,
    device: str,
    *,
    engines: Engines | None = None,
    groups: Sequence[GroupLengths] | None = None,
) -> StepTime:
    """The parts of a step of `groups` on one GPU called `device`; by default the groups that `s` makes expect.

    Tools, renderer and judges are not in it: their time is theirs.
    """
    engines = engines or Engines()
    groups = list(groups or expected_groups(s))
    made = plan(shape, s)
    step = _Step(shape, s, rates, device, groups)
    lines = [*step.rollout(engines), *step.passes(), *step.update(), *step.exchange(), *step.host(made)]
    lines.append(step.checkpoint())
    idle = max(0, s.world - s.prompts_per_step)
    run = next((r for r in rates.runs if same_device(r.device, device) and _is_run_of(r, s)), None)
    return StepTime(tuple(line for line in lines if line is not None), engines, idle, run)


def _is_run_of(run: MeasuredRun, s: Settings) -> bool:
    alone = {"strategy": "none"} if s.world == 1 and s.strategy == "ddp" else {}  # two names of one process
    mine, theirs = asdict(s) | alone, dict(run.settings)
    if theirs.get("strategy") == "ddp" and theirs.get("nodes") == theirs.get("gpus_per_node") == 1:
        theirs["strategy"] = "none"
    return bool(theirs) and all(mine.get(name) == value for name, value in theirs.items())


class _Step:
    """The lines of one step."""

    def __init__(self, shape: ModelShape, s: Settings, rates: Rates, device: str, groups: list[GroupLengths]) -> None:
        self.shape, self.s, self.rates, self.device, self.groups = shape, s, rates, device, groups
        self.work = pushed(groups, SHARED if s.teacher == "live" or s.teacher == "off" else APART)
        self.streams = streams_of(s, groups)
        frozen = s.lora > 0
        self.frozen_head = frozen or s.freeze_head
        self.products = Passes(
            weight_gradients=0.0 if frozen else 1.0,
            recompute=1.0 if s.gradient_checkpointing else 0.0,
            head=2.0 if self.frozen_head else 3.0,
        )

    def line(self, name: str, kind: str, *parts: tuple[float, str, dict[str, Any]]) -> Line | None:
        """The seconds of (amount, rate's name, conditions) one after another; None where there is nothing to do."""
        parts = [p for p in parts if p[0] > 0]
        if not parts:
            return None
        try:
            used = [self.rates.find(self.device, rate, **conditions) for _, rate, conditions in parts]
        except NoRate as error:
            return Line(name, kind, None, str(error))
        seconds = sum(amount / rate.value for (amount, *_), rate in zip(parts, used, strict=True))
        return Line(name, kind, seconds, "estimated from", tuple(used))

    # --- arithmetic ---------------------------------------------------------------------------------------------------

    def rollout(self, engines: Engines) -> list[Line | None]:
        s = self.s
        if not (s.rollout or s.engine_bytes or engines.gpus):
            return []
        samplers, kind = engines.gpus or 1, "transformers" if engines.engine == "transformers" else "server"
        every = sum(sum(g.rows) for g in self.groups) * (s.prompts_per_step / len(self.groups) if engines.gpus else 1)
        open_ = s.prompts_per_step * s.num_generations / engines.gpus if engines.gpus else s.open_rollouts
        context = sum(g.prefix * len(g.replies) + sum(g.replies) for g in self.groups)
        near = {"open": open_, "context": context / sum(len(g.replies) for g in self.groups)}
        packed = s.quantize if kind == "transformers" else "none"  # servers have wide weights
        at = dict(model=model_key(self.shape), dtype=s.dtype, engine=kind, quantize=packed, near=near)
        return [self.line("rollout", ROLLOUT, (every / samplers, "sampling", at))]

    def layers(self, work: Work, rows: float, backward: bool = False) -> list[tuple[float, str, dict[str, Any]]]:
        """Products with the layers' maps and attention, of a forward or of the backward after it."""
        s, shape, passes = self.s, self.shape, self.products
        at = dict(layer=layer_key(shape), dtype=s.dtype, adapters=s.lora > 0, quantize=s.quantize, near={"rows": rows})
        heads, span = [shape.heads, shape.kv_heads, shape.head_dim], 2 * work.pairs / max(1, work.tokens)
        attending = dict(heads=heads, dtype=s.dtype, near={"length": span})
        linear, pairs = 2.0 * shape.linear_parameters * work.tokens, attention_flops(shape, work)
        if not backward:
            return [(linear, "layer_forward", at), (pairs, "attention_forward", attending)]
        at["checkpointing"] = s.gradient_checkpointing
        return [
            (linear * passes.linear_backward, "layer_backward", at),
            (pairs * ATTENTION_BACKWARD, "attention_backward", attending),
            (pairs * passes.recompute, "attention_forward", attending),
        ]

    def passes(self) -> list[Line | None]:
        work, streams = self.work, self.streams
        micro = streams.bundles * streams.microbatches
        out = [
            self.line("prefix", ARITHMETIC, *self.layers(work.prefix, work.prefix.tokens / streams.bundles)),
            self.line("student", ARITHMETIC, *self.layers(work.student, work.student.tokens / micro)),
            self.line("teacher", ARITHMETIC, *self.layers(work.teacher, work.teacher.tokens / micro)),
        ]
        if self.s.reference:
            scored = work.prefix + work.student
            parts = self.layers(scored, scored.tokens / streams.forwards)
            out.append(self.line("reference", ARITHMETIC, *parts, self.head(scored.rows, "score", 1.0)))
        both = work.prefix + work.student
        kind = "frozen" if self.frozen_head else "objective"
        out += [
            self.line(
                "head",
                ARITHMETIC,
                self.head(both.rows, kind, self.products.head),
                self.head(work.teacher.rows, "score", 1.0),
            ),
            self.line("backward", ARITHMETIC, *self.layers(both, both.tokens / streams.forwards, True)),
        ]
        return out

    def head(self, rows: int, kind: str, products: float) -> tuple:
        flops = products * 2.0 * self.shape.vocabulary * self.shape.hidden * rows
        micro = self.streams.bundles * self.streams.microbatches
        at = dict(head=head_key(self.shape), dtype=self.s.dtype, near={"rows": max(1, rows / micro)})
        return flops, f"head_{kind}", at

    def update(self) -> list[Line | None]:
        """Clipping and stepping; what ZeRO steps on the host is DeepSpeed's CPU Adam, as implementation cpu is."""
        s = self.s
        count, on_host = s.part("state", trainable(self.shape, s)), state_leaves(s) and s.implementation != "paged_8bit"
        wide = has_master(s) or trained_bytes(s) == 4
        at = dict(
            optimizer=s.optimizer,
            implementation="cpu" if on_host else s.implementation,
            bf16="master" if has_master(s) and trained_bytes(s) < 4 else s.bf16,
            dtype="float32" if wide else s.dtype,
            where="host" if on_host else "device",
            near={"parameters": count},
        )
        return [self.line("optimizer", ARITHMETIC, (count, "optimizer", at))]

    # --- transfers ----------------------------------------------------------------------------------------------------

    def exchange(self) -> list[Line | None]:
        """Between GPUs; a collective of n bytes over W ranks sends n·(W − 1)/W, an all-reduce twice that."""
        s, shape = self.s, self.shape
        if s.world == 1:
            return []
        moved, width = (s.world - 1) / s.world, trained_bytes(s)
        learns = trainable(shape, s) * width
        spans = "nodes" if s.nodes > 1 else "node"
        layer = dict(spans=spans, near={"bytes": layer_bytes(shape, s), "ranks": s.world})
        whole = dict(spans=spans, near={"bytes": min(learns, LARGE), "ranks": s.world})
        name = "reducing gradients"
        if "weights" in DIVIDED[s.strategy]:
            gathered, reduced = self.units()
            wide = 4 if s.strategy == "fsdp2" else width  # it sums in fp32
            return [
                self.line("gathering weights", TRANSFER, (gathered * moved, "all_gather", layer)),
                self.line(name, TRANSFER, (reduced * wide * moved, "reduce_scatter", layer)),
            ]
        if not DIVIDED[s.strategy]:
            return [self.line(name, TRANSFER, (2 * learns * moved, "all_reduce", whole))]
        times = self.streams.forwards if "gradients" in DIVIDED[s.strategy] else 1
        return [
            self.line(name, TRANSFER, (times * learns * moved, "reduce_scatter", whole)),
            self.line("sharing new weights", TRANSFER, (learns * moved, "all_gather", whole)),
        ]

    def units(self) -> tuple[float, float]:
        """(bytes gathered, gradients reduced) of a step: a unit's weights come for each of its visits.

        Layers in forward and backward; embedding and head likewise where they are trained, else in the forward alone.
        """
        s, shape, streams = self.s, self.shape, self.streams
        other = s.reference + (s.teacher in ("ema", "base"))  # passes of their own, forward only
        micro = streams.bundles * streams.microbatches
        layers, table = shape.layers * layer_bytes(shape, s), shape.vocabulary * shape.hidden
        learns = 0 if s.lora else 1
        gathered = layers * streams.forwards * (2 + other)
        gathered += table * s.itemsize * (streams.forwards * (1 + learns + other) + micro * (2 + other))
        own = shape.lora_parameters(s.lora) if s.lora else shape.layers * layer_parameters(shape)
        reduced = streams.forwards * (own + learns * table) + micro * table * (not self.frozen_head)
        return gathered, reduced

    def host(self, made: Plan) -> list[Line | None]:
        """Between GPU and host."""
        s, away = self.s, next((t.bytes for t in made.host if t.name == "layer inputs"), 0)
        out = []
        if away:
            share = away / ((s.prefix + s.student_rows) * self.shape.layers * self.shape.hidden * s.itemsize)
            tokens = self.work.prefix.tokens + self.work.student.tokens
            moved = share * tokens * self.shape.layers * self.shape.hidden * s.itemsize
            out.append(self.line("layer inputs to the host", TRANSFER, (moved, "device_to_host", {})))
            out.append(self.line("layer inputs from the host", TRANSFER, (moved, "host_to_device", {})))
        if state_leaves(s) and s.implementation != "paged_8bit":
            count = s.part("state", trainable(self.shape, s))
            back = count * trained_bytes(s)
            out.append(self.line("gradients to the host", TRANSFER, (count * trained_bytes(s), "device_to_host", {})))
            out.append(self.line("weights from the host", TRANSFER, (back, "host_to_device", {})))
        if s.offload_params:
            mine = s.part("weights", self.units()[0])
            out.append(self.line("weights' parts from the host", TRANSFER, (mine, "host_to_device", {})))
        return out

    def checkpoint(self) -> Line | None:
        s, learns = self.s, trainable(self.shape, self.s)
        state = sum(t.bytes for t in (*plan(self.shape, s).held, *plan(self.shape, s).host) if _is_state(t.name))
        size = s.part("weights", learns * trained_bytes(s)) + state
        return self.line("a checkpoint, not in the step", BESIDE, (size, "checkpoint_write", {}))


def _is_state(name: str) -> bool:
    return name in ("optimizer state", "fp32 weights")


# --- telling ----------------------------------------------------------------------------------------------------------


def time_table(made: StepTime, s: Settings) -> str:
    """Line by line, with what each stands on."""
    sources: dict[str, int] = {}
    for line in made.lines:
        for rate in line.rates:
            sources.setdefault(rate.told(), len(sources) + 1)
    rows = []
    for line in made.lines:
        cited = ", ".join(f"[{sources[r.told()]}] {r.name}" for r in line.rates)
        seconds = f"{_seconds(line.seconds):>10}" if line.seconds is not None else f"{'-':>10}"
        rows.append((line.name, seconds, f"{line.how} {cited}".strip()))
    width = max(len(name) for name, *_ in rows)
    out = [f"{name:{width}} {seconds}  {how}".rstrip() for name, seconds, how in rows]
    out += _totals(made, s)
    out += [f"[{number}] {told}" for told, number in sources.items()]
    return "\n".join(out)


def _totals(made: StepTime, s: Settings) -> list[str]:
    out = []
    if made.idle:
        out.append(
            f"{made.idle} of {s.world} GPUs have no group: rollout.prompts_per_step {s.prompts_per_step} is below "
            "their number, and a group is not split"
        )
    if made.missing:
        names = ", ".join(line.name for line in made.missing)
        out.append(f"no estimate of the step: without a rate for {names}")
    for name, span in (("training", made.training), ("step", made.step)):
        if span is not None:
            hidden = (
                "" if span[0] == span[1] else f" to {_seconds(span[1])}, as transfers hide behind arithmetic or not"
            )
            how = " with rollouts one step off" if name == "step" and made.engines.one_step_off else ""
            out.append(f"{name}{how}: estimated {_seconds(span[0])}{hidden}")
    if made.step is not None:
        out.append("without tools, renderer and judges, whose time is theirs")
    if run := made.measured:
        parts = ", ".join(f"{name} {_seconds(value)}" for name, value in run.seconds.items())
        out.append(f"measured on {run.device} at {run.commit}, mean of {run.steps} steps: {parts}")
    return out


def _seconds(value: float) -> str:
    return f"{value:,.0f} s" if value >= 100 else f"{value:.3g} s"
