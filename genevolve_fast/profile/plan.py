"""Predicts a run's peak memory on one of its GPUs from the model's config alone: what is held when, what helps."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch

from genevolve_fast.ops.memory import formula_bytes
from genevolve_fast.profile.flops import GPUS, gpu_named
from genevolve_fast.profile.shapes import BUILT_IN, ModelShape
from genevolve_fast.profile.sharding import (
    DDP_BUCKET,
    DEEPSPEED,
    DIVIDED,
    GATHERED_LAYERS,
    NF4_BITS,
    ZERO_BUCKET,
    Strategy,
    What,
    refusal,
)

# What one layer's backward holds for each student row in attention: widths in the model's dtype, then bytes in fp32.
VISIT_HIDDEN = 1  # the gradient, written in place; the layer input is counted where it waits
VISIT_QUERIES = 4  # q, attention's output, and the gradients of both
VISIT_KEYS = 4  # k, v, dk, dv
VISIT_FLASH_DQ = 4  # bytes per query element: flash's fp32 accumulator
VISIT_FLASH_DKV = 2  # dk and dv for every query head, before the group is summed
MLP_HIDDEN = 2  # in the MLP: the gradient, the residual stream after attention
MLP_QUERIES = 2  # q, attention's output
MLP_KEYS = 2  # k, v
VISIT_CPU = 2  # the CPU's flash attention: dq of the prefix part, and its output with rows first
ROTARY = 2  # cos and sin, shared by all layers
ID_BYTES = 32  # a token's id and three positions
# What autograd keeps of a layer that is not recomputed, in widths of (H, q, kv, I); bf16 has fp32 copies in the norms.
GRAPH = {4: (6, 4, 4, 4), 2: (8, 5, 5, 4)}
# What the graph of the projections keeps beside the layer input, where all rows are one tile: widths of (H, q, kv).
PROJECTIONS = {4: (2, 2, 2), 2: (4, 3, 3)}
# What one layer's forward holds for each row.
FORWARD_HIDDEN = 1  # layer output
FORWARD_QUERIES = 2  # q, attention's output
FORWARD_KEYS = 2  # k, v
TEACHER_HIDDEN = 3  # the teacher's rows between two visits, and a visit's input and output
# What one layer holds for each padded prompt token in the engine's prefill, which has no tiles.
PREFILL_HIDDEN = 3  # layer input, norm, residual
PREFILL_QUERIES = 4  # q, keys and values for every query head, attention's output
PREFILL_INTERMEDIATE = 3  # gate, up, their product
# One token tile of the MLP: gate, up and their product, in the backward the gradients too; norms and residuals.
TILE_INTERMEDIATE = 7
TILE_HIDDEN = 6
TILE_FORWARD_INTERMEDIATE = 3
TILE_FORWARD_HIDDEN = 3
PREFETCHED_LAYERS = 2  # of the offloaded layer inputs: one in use, one on its way
MUON_COPIES = 4  # of one matrix in bf16 while it is orthogonalised
ADAPTER_BYTES = 4  # A and B are fp32, so that small updates are not lost
STATE_BYTES = {"8bit": 1 + 4 / 256, "paged_8bit": 1 + 4 / 256}  # of a moment: a byte, and a scale for every 256
MASTER_BYTES = 4  # of an fp32 weight that bf16 ones are rounded from
MASTER_GRADIENTS = 1 << 30  # bytes of fp32 gradients that exist at once while those are stepped
CUDA_CONTEXT = round(0.6 * 2**30)  # driver, kernels, cuBLAS: assumed
FRAGMENTATION = 1.04  # on what is allocated and freed within a step: assumed
GIB = 2**30

Teacher = Literal["live", "ema", "base", "off"]


class PlanError(ValueError):
    """The settings contradict each other; the message names one."""


@dataclass(frozen=True)
class Settings:
    """What a plan depends on besides the model. Tokens are those of the longest rollout, its prefix included."""

    tokens: int
    prefix: int = 0
    prompts_per_step: int = 8
    num_generations: int = 6
    max_tokens_per_microbatch: int = 16384
    max_batch: int = 64
    mean_tokens: int | None = None  # of the rollouts that the engine keeps open; none: all as long as the longest
    patch: int = 600  # tokens of experience
    loss_share: float = 1.0  # of a rollout's own tokens
    image_tokens: int = 0  # of all pictures whose features are kept
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    optimizer: Literal["adamw", "muon"] = "adamw"
    implementation: Literal["fused", "8bit", "paged_8bit", "cpu"] = "fused"
    bf16: Literal["nearest", "stochastic", "master"] = "nearest"
    quantize: Literal["none", "nf4"] = "none"  # of the decoder's linear maps, frozen under adapters
    lora: int = 0  # rank; 0 trains the weights themselves
    freeze_vision: bool = True
    freeze_head: bool = False
    teacher: Teacher = "live"
    reference: bool = True
    rollout: bool = True  # sampled on this device by the embedded engine
    offload_gib: float = 0.0
    workspace_mb: float | None = None
    tile_tokens: int = 8192
    gradient_checkpointing: bool = True
    engine_bytes: int = 0  # of a vLLM beside the policy while it samples; it sleeps otherwise
    engine_gpus: int = 1  # that share its weights and keys
    device: Literal["cuda", "cpu"] = "cuda"
    nodes: int = 1
    gpus_per_node: int = 1
    strategy: Strategy = "none"
    offload_optimizer: bool = False
    offload_params: bool = False

    def __post_init__(self) -> None:
        counts = ("tokens", "prompts_per_step", "num_generations", "max_tokens_per_microbatch", "max_batch")
        for name in (*counts, "nodes", "gpus_per_node"):
            if getattr(self, name) < 1:
                raise PlanError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("prefix", "patch", "image_tokens", "lora", "offload_gib"):
            if getattr(self, name) < 0:
                raise PlanError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.prefix >= self.tokens:
            raise PlanError(f"prefix {self.prefix} leaves no reply in a rollout of {self.tokens} tokens")
        if not 0 < self.loss_share <= 1:
            raise PlanError(f"loss_share must lie in (0, 1], got {self.loss_share}")
        if self.mean_tokens is not None and not self.prefix < self.mean_tokens <= self.tokens:
            raise PlanError(f"mean_tokens {self.mean_tokens} does not lie between prefix and tokens")
        if self.offload_gib and not self.gradient_checkpointing:
            raise PlanError("offload_gib needs gradient_checkpointing: without it a layer keeps everything")
        if self.device == "cpu" and self.offload_gib:
            raise PlanError("offload_gib moves layer inputs off a GPU: nothing to move on a CPU")
        if self.quantize != "none" and not self.lora:
            raise PlanError(f"quantize {self.quantize} freezes the weights: set a rank of LoRA adapters to train")
        offload = self.offload_optimizer, self.offload_params
        how = self.optimizer, self.implementation, self.bf16, self.quantize, self.freeze_vision or self.lora > 0
        if why := refusal(self.world, self.strategy, *offload, *how):
            raise PlanError(why)

    @property
    def world(self) -> int:
        """GPUs that train."""
        return self.nodes * self.gpus_per_node

    @property
    def groups(self) -> int:
        """Requests of the GPU that has the most of them: a group is never split."""
        return -(-self.prompts_per_step // self.world)

    def part(self, what: What, count: float) -> int:
        """What one GPU has of `count` bytes."""
        return math.ceil(count / self.world) if what in DIVIDED[self.strategy] else round(count)

    @property
    def itemsize(self) -> int:
        return getattr(torch, self.dtype).itemsize

    @property
    def reply(self) -> int:
        """Own tokens of the longest rollout."""
        return self.tokens - self.prefix

    @property
    def student_rows(self) -> int:
        """Rows of the largest micro-batch: as many replies as fit, or one that is longer."""
        return max(self.reply, min(self.max_tokens_per_microbatch, self.num_generations * self.reply))

    @property
    def teacher_rows(self) -> int:
        rollouts = -(-self.student_rows // self.reply)
        return 0 if self.teacher == "off" else self.student_rows + rollouts * self.patch

    @property
    def loss_rows(self) -> int:
        return math.ceil(self.loss_share * self.student_rows)

    @property
    def open_rollouts(self) -> int:
        """That one GPU samples at once."""
        return self.groups * self.num_generations


@dataclass(frozen=True)
class Term:
    """Bytes of one thing that is held, and the formula that says so."""

    name: str
    bytes: int
    formula: str
    at_once: bool = False  # taken and given back whole: it leaves no gaps


@dataclass(frozen=True)
class Plan:
    """`held`: what stays on the device all the time. `phases`: what each phase holds besides, gradients included."""

    held: tuple[Term, ...]
    phases: dict[str, tuple[Term, ...]]
    overhead: int  # of the CUDA context
    host: tuple[Term, ...] = ()  # pinned memory of this GPU's process

    @property
    def host_bytes(self) -> int:
        return sum(t.bytes for t in self.host)

    def phase_bytes(self, phase: str) -> int:
        return self.overhead + sum(t.bytes for t in self.held) + self.phase_above(phase)

    def phase_above(self, phase: str) -> int:
        """Without context, weights and optimizer state."""
        slack = FRAGMENTATION if self.overhead else 1.0
        return round(sum(t.bytes * (1.0 if t.at_once else slack) for t in self.phases[phase]))

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=self.phase_bytes)

    @property
    def total(self) -> int:
        return self.phase_bytes(self.peak_phase)

    @property
    def limiting(self) -> Term:
        """The largest thing held at the peak."""
        return max((*self.held, *self.phases[self.peak_phase]), key=lambda t: t.bytes)

    def as_dict(self) -> dict[str, Any]:
        return {
            "total": self.total,
            "peak_phase": self.peak_phase,
            "limiting": asdict(self.limiting),
            "host_bytes": self.host_bytes,
            "host": [asdict(t) for t in self.host],
            "overhead": self.overhead,
            "held": [asdict(t) for t in self.held],
            "phases": {
                name: {"bytes": self.phase_bytes(name), "terms": [asdict(t) for t in terms]}
                for name, terms in self.phases.items()
            },
        }


def plan(shape: ModelShape, settings: Settings) -> Plan:
    """The peak of each phase. Nothing is loaded."""
    s = settings
    prefix, gradients = _prefix(shape, s), _gradients(shape, s)
    inputs, host = _layer_inputs(shape, s)
    features = _features(shape, s)
    teacher = _forward(shape, s, s.teacher_rows, "teacher", TEACHER_HIDDEN)
    student = _forward(shape, s, s.student_rows, "student")
    widest = max(student, teacher, key=lambda t: t.bytes)
    forward, backward = _gathered(shape, s), (*_gathered(shape, s), *_reduced(shape, s))
    of_prefix = _backward(shape, s, s.prefix, "prefix"), _new_gradients(shape, s, s.prefix)
    visited = _backward(shape, s, s.student_rows, "student"), _new_gradients(shape, s, s.student_rows)
    phases = {
        "rollout": (*_rollout(shape, s), *features) if s.rollout or s.engine_bytes else (),
        "sync": _sync(shape, s),
        "prefix": (*gradients, *backward, *prefix, *of_prefix, *features) if s.prefix else (),
        "student": (*gradients, *forward, *prefix, *inputs, student, *features),
        "teacher": (*gradients, *forward, *prefix, *inputs, widest, *features) if s.teacher != "off" else (),
        "head": (*gradients, *_gathered_head(shape, s), *prefix, *inputs, *_head(shape, s), *features),
        "backward": (*gradients, *backward, *prefix, *inputs, *visited, *features),
        "step": (*gradients, *_step(shape, s), *features),
    }
    overhead = CUDA_CONTEXT if s.device == "cuda" else 0
    kept = {name: _present(terms) for name, terms in phases.items() if terms}
    return Plan(_held(shape, s), kept, overhead, _present((*host, *_moved(shape, s))))


def trainable(shape: ModelShape, s: Settings) -> int:
    """Parameters that receive a gradient."""
    if s.lora:
        return shape.lora_parameters(s.lora)
    counts = shape.parameters
    frozen = s.freeze_vision * counts["vision"]
    if s.freeze_head:
        frozen += counts["embedding"] if shape.tied else counts["head"]
    return shape.total_parameters - frozen


def _held(shape: ModelShape, s: Settings) -> tuple[Term, ...]:
    learns, adapters = trainable(shape, s), shape.lora_parameters(s.lora) if s.lora else 0
    frozen = [use for use, wanted in (("reference", s.reference), ("base teacher", s.teacher == "base")) if wanted]
    copied = learns * s.itemsize if frozen and not s.lora else 0  # what is frozen anyway is shared
    here = not s.offload_params
    return _present(
        (
            *(_weights(shape, s) if here else _weights(shape, s)[1:]),
            Term("adapters", s.part("weights", adapters * ADAPTER_BYTES) * here, f"{ADAPTER_BYTES} · parameters"),
            *_state(shape, s)[: 1 if s.implementation == "paged_8bit" else 0 if state_leaves(s) else 2],
            Term(f"frozen copy ({' and '.join(frozen)})", s.part("weights", copied), "trainable parameters · b"),
            Term(
                "EMA teacher",
                s.part("weights", 4 * learns) if s.teacher == "ema" else 0,
                "4 · trainable parameters",
            ),
            *_kept_by_zero3(shape, s),
        )
    )


def _weights(shape: ModelShape, s: Settings) -> tuple[Term, Term]:
    """What the strategy may divide, and the frozen tower, which every GPU keeps whole."""
    apart = shape.parameters["vision"] if s.freeze_vision and "weights" in DIVIDED[s.strategy] else 0
    count, told = shape.total_parameters - apart, "parameters · b"
    size = count * s.itemsize
    if s.quantize == "nf4":
        size -= shape.linear_parameters * (s.itemsize - NF4_BITS / 8)
        told = f"linear maps · {NF4_BITS / 8:.4f} + other parameters · b"
    return (
        Term("weights", s.part("weights", size), _among(s, "weights", told)),
        Term("frozen vision tower", apart * s.itemsize, "parameters · b, on every GPU"),
    )


def _state(shape: ModelShape, s: Settings) -> tuple[Term, ...]:
    """fp32 copies of the weights, and the moments; Muon's only one is as wide as what is stepped."""
    learns = trainable(shape, s)
    by_muon = (shape.lora_parameters(s.lora) or shape.linear_parameters) if s.optimizer == "muon" else 0
    wide = MASTER_BYTES if has_master(s) else trained_bytes(s)
    each = STATE_BYTES.get(s.implementation, wide)
    moments = 2 * (learns - by_muon) * each + by_muon * wide
    copies = MASTER_BYTES * learns * has_master(s)
    told = f"{each:.4g} · (2 · trainable parameters − those of Muon)"
    return (
        Term("fp32 weights", s.part("state", copies), _among(s, "state", "4 · trainable parameters")),
        Term("optimizer state", s.part("state", moments), _among(s, "state", told)),
    )


def has_master(s: Settings) -> bool:
    """Whether fp32 copies of the weights are what the optimizer steps; ZeRO's always are, and those on the host."""
    return s.strategy in DEEPSPEED or s.bf16 == "master" or (s.implementation == "cpu" and s.device == "cuda")


def state_leaves(s: Settings) -> bool:
    """Whether moments and fp32 weights lie in host memory, or go there where a GPU is full."""
    offloaded = s.offload_optimizer or (s.strategy == "fsdp2" and s.offload_params)
    return offloaded or (s.device == "cuda" and s.implementation in ("paged_8bit", "cpu"))


def _moved(shape: ModelShape, s: Settings) -> tuple[Term, ...]:
    """What lies in the host's memory instead of the GPU's."""
    moved: tuple[Term, ...] = ()
    if s.offload_params:
        moved += _weights(shape, s)[:1]
    if state_leaves(s):
        moved += _state(shape, s)[1 if s.implementation == "paged_8bit" else 0 :]
    if s.offload_optimizer or (s.strategy == "fsdp2" and s.offload_params):
        width = 4 if s.strategy in DEEPSPEED else gradient_bytes(s)
        size = s.part("state", width * trainable(shape, s))
        moved += (Term("gradients", size, _among(s, "state", f"{width} · trainable parameters")),)
    return moved


def _among(s: Settings, what: What, formula: str) -> str:
    return f"({formula}) / {s.world}" if s.world > 1 and what in DIVIDED[s.strategy] else formula


def _gradients(shape: ModelShape, s: Settings) -> tuple[Term, ...]:
    if s.strategy == "zero3" or (s.offload_params and s.strategy == "fsdp2"):
        return ()  # held all the time, or in host memory
    return (_all_gradients(shape, s),)


def _all_gradients(shape: ModelShape, s: Settings) -> Term:
    width = gradient_bytes(s)
    told = _among(s, "gradients", f"{width} · trainable parameters")
    return Term("gradients", s.part("gradients", trainable(shape, s) * width), told)


def _new_gradients(shape: ModelShape, s: Settings, rows: int) -> Term:
    """Of one layer's visit, beside those of earlier ones that they are added to; in fp32 where tiles are summed."""
    tiled = s.gradient_checkpointing and rows > s.tile_tokens
    count, of = (
        (shape.lora_parameters(s.lora) // shape.layers, "adapters of a layer")
        if s.lora
        else (layer_parameters(shape), "parameters of a layer")
        if s.gradient_checkpointing
        else (max(a * b for a, b in shape.matrices), "in · out")  # one weight after another
    )
    width = 4 if tiled else trained_bytes(s)
    return Term("a layer's new gradients", count * width, f"{width} · {of}")


def gradient_bytes(s: Settings) -> int:
    """Of one parameter's gradient while micro-batches add to it; ZeRO adds in fp32 where it divides them."""
    return 4 if s.strategy in DEEPSPEED and "gradients" in DIVIDED[s.strategy] else trained_bytes(s)


def layer_parameters(shape: ModelShape) -> int:
    """Of one decoder layer."""
    counts = shape.parameters
    return (counts["layers"] + counts["norms"] - shape.hidden) // shape.layers


def _gathered(shape: ModelShape, s: Settings) -> tuple[Term, ...]:
    """Whole layers that exist for the length of their visit."""
    if "weights" not in DIVIDED[s.strategy]:
        return _dequantized(shape, s)
    size = GATHERED_LAYERS * layer_bytes(shape, s)
    return (Term("gathered layers", size, f"{GATHERED_LAYERS} · parameters of a layer · b"),)


def layer_bytes(shape: ModelShape, s: Settings) -> int:
    """Of one decoder layer as its visit computes with it, adapters included."""
    adapters = shape.lora_parameters(s.lora) // shape.layers * ADAPTER_BYTES if s.lora else 0
    return layer_parameters(shape) * s.itemsize + adapters


def _dequantized(shape: ModelShape, s: Settings) -> tuple[Term, ...]:
    widest = max(a * b for a, b in shape.matrices) if s.quantize != "none" else 0
    return (Term("a dequantised matrix", widest * s.itemsize, "in · out · b"),)


def _gathered_head(shape: ModelShape, s: Settings) -> tuple[Term, ...]:
    if "weights" not in DIVIDED[s.strategy]:
        return ()
    return (Term("gathered head", shape.vocabulary * shape.hidden * s.itemsize, "V · H · b"),)


def _reduced(shape: ModelShape, s: Settings) -> tuple[Term, ...]:
    """Gradients on their way to the GPU that keeps them: a layer's and their sum, or ZeRO's bucket and its parts."""
    if s.strategy == "zero2":
        return (_bucket(s),)
    if s.strategy == "zero3":
        size = min(ZERO_BUCKET, trainable(shape, s)) * trained_bytes(s)
        return (Term("the bucket, cut for its ranks", size, "min(1.7e7, trainable parameters) · b"),)
    if "gradients" not in DIVIDED[s.strategy]:
        return ()
    count = shape.lora_parameters(s.lora) // shape.layers if s.lora else layer_parameters(shape)
    return (
        Term("a layer's gradients and their sum", count * (trained_bytes(s) + 4), "parameters of a layer · (b + 4)"),
    )


def _kept_by_zero3(shape: ModelShape, s: Settings) -> tuple[Term, ...]:
    """Gradients and their bucket: DeepSpeed makes both once."""
    if s.strategy != "zero3":
        return ()
    return (_bucket(s),) if s.offload_optimizer else (_all_gradients(shape, s), _bucket(s))


def _bucket(s: Settings) -> Term:
    return Term("ZeRO's bucket of gradients", ZERO_BUCKET * trained_bytes(s), "1.7e7 · b")


def trained_bytes(s: Settings) -> int:
    """Of one trained parameter and of its gradient."""
    return ADAPTER_BYTES if s.lora else s.itemsize


def _graph(shape: ModelShape, s: Settings) -> tuple[int, str]:
    """(bytes, formula) of what the backward of a row needs of all layers."""
    if s.gradient_checkpointing:
        return shape.layers * shape.hidden * s.itemsize, "L · H · b"
    h, q, kv, i = GRAPH[s.itemsize]
    widths = h * shape.hidden + q * shape.q + kv * shape.kv + i * shape.intermediate
    return shape.layers * widths * s.itemsize, f"L · b · ({h}H + {q}q + {kv}kv + {i}I)"


def _prefix(shape: ModelShape, s: Settings) -> tuple[Term, ...]:
    graph, formula = _graph(shape, s)
    stay = shape.layers - offloaded_layers(shape, s)[0]
    if stay < shape.layers:
        graph, formula = stay * shape.hidden * s.itemsize, "(L − offloaded) · H · b"
    cache = shape.layers * (2 * shape.kv * s.itemsize + 2 * shape.kv * 4)
    return (
        Term("prefix: keys, values, their gradients", s.prefix * cache, "P · L · (2kv·b + 2kv·4)"),
        Term("prefix: layer inputs", s.prefix * graph, f"P · {formula}"),
    )


def _layer_inputs(shape: ModelShape, s: Settings) -> tuple[tuple[Term, ...], tuple[Term, ...]]:
    """(What stays on the device, what the host holds)."""
    if not s.gradient_checkpointing:
        graph, formula = _graph(shape, s)
        return (Term("student's layers, kept whole", s.student_rows * graph, f"N · {formula}"),), ()
    row = shape.hidden * s.itemsize
    of_prefix, away = offloaded_layers(shape, s)
    return (
        Term("student's layer inputs", (shape.layers - away) * s.student_rows * row, "N · (L − offloaded) · H · b"),
        Term(
            "offload buffers", min(away, PREFETCHED_LAYERS) * s.student_rows * row, f"{PREFETCHED_LAYERS} · N · H · b"
        ),
    ), (Term("layer inputs", (of_prefix * s.prefix + away * s.student_rows) * row, "offloaded · tokens · H · b"),)


def offloaded_layers(shape: ModelShape, s: Settings) -> tuple[int, int]:
    """Layers of the prefix, then of the replies, whose inputs fit into the host budget."""
    budget, row = int(s.offload_gib * GIB), shape.hidden * s.itemsize
    of_prefix = min(shape.layers, budget // (s.prefix * row)) if s.prefix else 0
    budget -= of_prefix * s.prefix * row
    return of_prefix, min(shape.layers, budget // (s.student_rows * row))


def _tile(shape: ModelShape, s: Settings, rows: int, intermediate: int, hidden: int) -> int:
    return min(rows, s.tile_tokens) * s.itemsize * (intermediate * shape.intermediate + hidden * shape.hidden)


def _forward_tile(shape: ModelShape, s: Settings, rows: int) -> int:
    return _tile(shape, s, rows, TILE_FORWARD_INTERMEDIATE, TILE_FORWARD_HIDDEN)


def _forward(shape: ModelShape, s: Settings, rows: int, whose: str, hidden: int = FORWARD_HIDDEN) -> Term:
    widths = hidden * shape.hidden + FORWARD_QUERIES * shape.q + FORWARD_KEYS * shape.kv
    return Term(
        f"{whose}'s layer visit, forward", rows * s.itemsize * widths + _forward_tile(shape, s, rows),
        f"rows · b · ({hidden}H + {FORWARD_QUERIES}q + {FORWARD_KEYS}kv) + tile · b · "
        f"({TILE_FORWARD_INTERMEDIATE}I + {TILE_FORWARD_HIDDEN}H)",
    )  # fmt: skip


def _backward(shape: ModelShape, s: Settings, rows: int, whose: str) -> Term:
    """One layer's at its worse moment: attention's backward, or the MLP's with one token tile."""
    b = s.itemsize
    if s.device == "cpu":
        flash, told = VISIT_CPU * shape.q * b, f"{VISIT_CPU}q·b"
    else:
        expanded = VISIT_FLASH_DKV * shape.q * b if shape.heads != shape.kv_heads else 0
        flash, told = VISIT_FLASH_DQ * shape.q + expanded, f"{VISIT_FLASH_DQ}q + {VISIT_FLASH_DKV}q·b"
    always, also = ROTARY * shape.head_dim * b + ID_BYTES, f"{ROTARY}d·b + {ID_BYTES}"
    if rows <= s.tile_tokens:
        h, q, kv = PROJECTIONS[b]
        always += b * (h * shape.hidden + q * shape.q + kv * shape.kv)
        also += f" + b · ({h}H + {q}q + {kv}kv) as one tile"
    widths = VISIT_HIDDEN * shape.hidden + VISIT_QUERIES * shape.q + VISIT_KEYS * shape.kv
    attention = Term(
        f"{whose}'s layer visit, attention's backward", rows * (b * widths + flash + always),
        f"rows · (b · ({VISIT_HIDDEN}H + {VISIT_QUERIES}q + {VISIT_KEYS}kv) + {told} + {also})",
    )  # fmt: skip
    widths = MLP_HIDDEN * shape.hidden + MLP_QUERIES * shape.q + MLP_KEYS * shape.kv
    mlp = Term(
        f"{whose}'s layer visit, MLP's backward",
        rows * (b * widths + always) + _tile(shape, s, rows, TILE_INTERMEDIATE, TILE_HIDDEN),
        f"rows · (b · ({MLP_HIDDEN}H + {MLP_QUERIES}q + {MLP_KEYS}kv) + {also}) + tile · b · "
        f"({TILE_INTERMEDIATE}I + {TILE_HIDDEN}H)",
    )
    return max(attention, mlp, key=lambda t: t.bytes)


def _head(shape: ModelShape, s: Settings) -> tuple[Term, ...]:
    b, frozen, rows = s.itemsize, s.freeze_head or s.lora > 0, s.loss_rows
    taught = rows if s.teacher != "off" else 0
    mode = "frozen" if frozen else "objective"
    work = formula_bytes(
        mode, rows, shape.hidden, shape.vocabulary, getattr(torch, s.dtype), torch.device(s.device), s.workspace_mb
    )
    return (
        Term("head: rows and gradients", (2 * rows + taught) * shape.hidden * b, "3 · M · H · b"),
        Term("last hidden states and gradients", 2 * s.student_rows * shape.hidden * b, "2 · N · H · b"),
        Term("head: workspace" + ("" if frozen else " and dW"), work, "ops.memory.formula_bytes"),
    )


def _features(shape: ModelShape, s: Settings) -> tuple[Term, ...]:
    levels = 1 + (shape.vision.deepstack if shape.vision else 0)
    return (Term("image features", s.image_tokens * levels * shape.hidden * s.itemsize, "tokens · levels · H · b"),)


def _whole(shape: ModelShape, s: Settings) -> Term:
    """Every weight, gathered where a strategy divides them: what samples, or hands them over, reads them whole."""
    size = shape.total_parameters - shape.parameters["vision"] if "weights" in DIVIDED[s.strategy] else 0
    return Term("gathered weights", size * s.itemsize, "parameters · b")


def _sync(shape: ModelShape, s: Settings) -> tuple[Term, ...]:
    """New weights on their way to the engine beside the policy, which has its own awake already."""
    if not s.engine_bytes:
        return ()
    engine = shape.total_parameters * s.itemsize // s.engine_gpus
    return (_whole(shape, s), Term("the engine's weights", engine, "parameters · b", True))


def _rollout(shape: ModelShape, s: Settings) -> tuple[Term, ...]:
    """The transformers engine at its worse moment: the first prefill, or growing its working cache in the last turn."""
    if not s.rollout:
        least = (shape.total_parameters + s.tokens * shape.layers * 2 * shape.kv) * s.itemsize // s.engine_gpus
        told = "its share of the GPU, or weights and the longest rollout's keys where that is more"
        return (Term("the engine beside the policy", max(s.engine_bytes, least), told, True),)
    b, rows = s.itemsize, min(s.max_batch, s.open_rollouts)
    waiting, prompt = s.open_rollouts - rows, max(1, s.prefix)
    per_token = shape.layers * 2 * shape.kv * b
    widths = PREFILL_HIDDEN * shape.hidden + PREFILL_QUERIES * shape.q + PREFILL_INTERMEDIATE * shape.intermediate
    first = (
        Term("waiting rollouts' keys and values", waiting * prompt * per_token, "rollouts · prompt · L · 2kv · b"),
        Term("working cache", rows * prompt * per_token, "rows · prompt · L · 2kv · b"),
        Term(
            "prefill: one layer", rows * prompt * b * widths,
            f"rows · prompt · b · ({PREFILL_HIDDEN}H + {PREFILL_QUERIES}q + {PREFILL_INTERMEDIATE}I)",
        ),
        Term("prefill: mask", rows * prompt * prompt * (1 + b), "rows · prompt² · (1 + b)"),
    )  # fmt: skip
    kept, longest = waiting * (s.mean_tokens or s.tokens), 2 * rows * s.tokens
    last = (
        Term("waiting rollouts' keys and values", kept * per_token, "tokens · L · 2kv · b"),
        Term("working cache and its copy", longest * per_token, "2 · rows · longest · L · 2kv · b"),
    )
    return (_whole(shape, s), *max(first, last, key=lambda terms: sum(t.bytes for t in terms)))


def _step(shape: ModelShape, s: Settings) -> tuple[Term, ...]:
    """What the update holds besides: of DDP's sum, of fp32 copies, of Muon."""
    widest, largest = max(a * b for a, b in shape.matrices), shape.vocabulary * shape.hidden
    learns = trainable(shape, s)
    weight = s.lora * max(max(pair) for pair in shape.matrices) if s.lora else largest
    summed = min(learns * trained_bytes(s), DDP_BUCKET + weight * trained_bytes(s))
    summed *= s.strategy == "ddp" and s.world > 1
    if s.strategy == "zero1":
        summed = min(learns, ZERO_BUCKET) * trained_bytes(s)
    flat = s.part("gradients", 4 * learns) if s.strategy == "zero2" and not s.offload_optimizer else 0
    here = s.bf16 == "master" and s.strategy not in DEEPSPEED and not state_leaves(s)
    widened = min(
        s.part("state", MASTER_BYTES * learns), max(MASTER_GRADIENTS, s.part("state", MASTER_BYTES * largest))
    )
    paged = 2 * STATE_BYTES["paged_8bit"] * weight if s.implementation == "paged_8bit" else 0
    return (
        Term("gradients being summed", summed, "a bucket of them, and one weight's"),
        Term("gradients laid end to end", flat, _among(s, "gradients", "4 · trainable parameters")),
        Term("gradients in fp32", widened * here, "min(4 · trainable parameters, max(1 GiB, 4 · V · H))"),
        Term("paged moments in use", round(paged), "2 · widest trained matrix"),
        Term("Muon's matrices", MUON_COPIES * 2 * widest * (s.optimizer == "muon"), f"{MUON_COPIES} · 2 · in · out"),
    )


def _present(terms: Iterable[Term]) -> tuple[Term, ...]:
    return tuple(t for t in terms if t.bytes)


# --- questions --------------------------------------------------------------------------------------------------------


def savings(shape: ModelShape, s: Settings) -> list[tuple[str, int, Plan]]:
    """(switch, bytes of the peak it saves, the plan with it), the largest saving first; useless ones are left out."""
    block_mb = -(-1024 * shape.vocabulary * 4 // 2**20)
    budget = math.ceil(shape.layers * (s.prefix + s.student_rows) * shape.hidden * s.itemsize / GIB)
    half, short = resized(s, s.tokens - s.reply // 2), shorter_prompt(s)
    tries: list[tuple[str, dict[str, Any]]] = [
        ("LoRA of rank 64 (policy.lora.rank)", {} if s.lora else {"lora": 64, "bf16": "nearest"}),
        ("4-bit weights (policy.quantize nf4)", {"quantize": "nf4"} if may_quantize(s) else {}),
        (f"offload_gib {budget} of host memory", {"offload_gib": budget} if s.device == "cuda" else {}),
        ("optim.implementation 8bit", {"implementation": "8bit"} if narrows(s) else {}),
        (f"max_tokens_per_microbatch {s.reply}", {"max_tokens_per_microbatch": s.reply}),
        ("no teacher (objective.sdl_coef 0)", {"teacher": "off"}),
        ("the live teacher", {"teacher": "live"} if s.teacher in ("ema", "base") else {}),
        ("no reference (objective.kl_coef 0)", {"reference": False}),
        ("policy.freeze_head", {} if s.lora else {"freeze_head": True}),
        (f"head_workspace_mb {block_mb}", {"workspace_mb": block_mb}),
        ("policy.tile_tokens 2048", {"tile_tokens": min(2048, s.tile_tokens)}),
        ("rollout.max_batch 8", {"max_batch": min(8, s.max_batch)}),
        ("half the requests a step", {"prompts_per_step": max(1, s.prompts_per_step // 2)}),
        ("replies half as long", {"tokens": half.tokens, "mean_tokens": half.mean_tokens}),
        ("prompts half as long", {f: getattr(short, f) for f in ("tokens", "prefix", "mean_tokens")}),
        ("policy.gradient_checkpointing", {} if s.gradient_checkpointing else {"gradient_checkpointing": True}),
        ("bfloat16", {"dtype": "bfloat16"}),
    ]
    now = plan(shape, s).total
    found = [(name, plan(shape, replace(s, **change))) for name, change in tries if change]
    if smaller := next_smaller(shape):
        found.append((smaller, plan(BUILT_IN[smaller], s)))
    saved = [(name, now - other.total, other) for name, other in found]
    return sorted((row for row in saved if row[1] > 0), key=lambda row: -row[1])


def narrows(s: Settings) -> bool:
    return s.implementation == "fused" and not DIVIDED[s.strategy]


def may_quantize(s: Settings) -> bool:
    return s.lora > 0 and s.quantize == "none" and "weights" not in DIVIDED[s.strategy]


def shorter_prompt(s: Settings) -> Settings:
    """Half the prefix, the same replies."""
    cut = s.prefix - s.prefix // 2
    return replace(s, tokens=s.tokens - cut, prefix=s.prefix - cut, mean_tokens=s.mean_tokens and s.mean_tokens - cut)


def resized(s: Settings, tokens: int) -> Settings:
    """Rollouts of another length with the same prefix; the mean reply stays the same share of the longest."""
    mean = s.mean_tokens and s.prefix + max(1, (s.mean_tokens - s.prefix) * (tokens - s.prefix) // s.reply)
    return replace(s, tokens=tokens, mean_tokens=mean)


def next_smaller(shape: ModelShape) -> str | None:
    """The largest published model below this one; None where `shape` is not a published one."""
    below = [n for n, other in BUILT_IN.items() if other.total_parameters < shape.total_parameters]
    known = shape in BUILT_IN.values() and below
    return max(below, key=lambda n: BUILT_IN[n].total_parameters) if known else None


def longest_rollout(shape: ModelShape, s: Settings, limit: int) -> int:
    """Tokens of the longest rollout, prefix included, that fits into `limit` bytes; 0 if none does."""

    def fits(tokens: int) -> bool:
        return plan(shape, resized(s, tokens)).total <= limit

    low, high = s.prefix, s.prefix + 1
    while fits(high) and high < 2**26:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low if low > s.prefix else 0


def memory_of(text: str) -> int:
    """Bytes of "24GiB", "80GB", "24" (GiB) or a GPU's name. Raises PlanError listing what is known."""
    size = re.fullmatch(r"\s*([\d.]+)\s*(gib|gb|g|mib|mb)?\s*", text.lower())
    if size:
        unit = {"gb": 10**9, "mb": 10**6, "mib": 2**20}.get(size[2] or "gib", GIB)
        return int(float(size[1]) * unit)
    if found := gpu_named(text):
        named = re.search(r"(\d+)\s*gb", text.lower())
        return int(named[1]) << 30 if named else found.memory
    raise PlanError(f"{text!r} is neither a size such as 24GiB nor one of {', '.join(GPUS)}")


# --- telling ----------------------------------------------------------------------------------------------------------


def gib(count: float) -> str:
    """1.23 GiB, 45.6 MiB."""
    return f"{count / GIB:.2f} GiB" if abs(count) >= 0.1 * GIB else f"{count / 2**20:.1f} MiB"


def table(made: Plan) -> str:
    """What is held, phase by phase."""
    rows = [("held all the time", sum(t.bytes for t in made.held) + made.overhead, "")]
    rows += [(f"  {t.name}", t.bytes, t.formula) for t in made.held]
    if made.overhead:
        rows.append(("  CUDA context", made.overhead, "assumed"))
    for phase, terms in made.phases.items():
        mark = "  <- peak" if phase == made.peak_phase else ""
        rows.append((f"{phase}: {gib(made.phase_bytes(phase))} in all{mark}", made.phase_above(phase), ""))
        rows += [(f"  {t.name}", t.bytes, t.formula) for t in terms]
    width = max(len(name) for name, *_ in rows)
    return "\n".join(f"{name:{width}} {gib(size):>11}  {formula}".rstrip() for name, size, formula in rows)


def verdict(shape: ModelShape, s: Settings, limit: int) -> str:
    """Whether it fits, what limits, what helps, and how long a rollout may be."""
    made = plan(shape, s)
    fits = made.total <= limit
    t = made.limiting
    lines = [
        f"{'fits' if fits else 'does not fit'}: the peak of {gib(made.total)} comes in phase {made.peak_phase}, "
        f"{gib(abs(limit - made.total))} {'below' if fits else 'above'} {gib(limit)}",
        f"limited by {t.name}: {gib(t.bytes)} = {t.formula}",
    ]
    for t in made.host:
        if t.name == "layer inputs":
            of_prefix, away = offloaded_layers(shape, s)
            used = f"{gib(t.bytes)} of {s.offload_gib:g} GiB"
            lines.append(f"pinned host memory: {used}, for inputs of {away} layers (the prefix's: {of_prefix})")
        else:
            lines.append(f"host memory: {gib(t.bytes)} for {t.name} = {t.formula}")
    if made.host_bytes and s.gpus_per_node > 1:
        lines.append(f"host memory of a node: {gib(s.gpus_per_node * made.host_bytes)} for {s.gpus_per_node} GPUs")
    for name, saved, other in savings(shape, s)[:5]:
        lines.append(f"saves {gib(saved):>10}: {name}{'' if fits or other.total > limit else ' (then it fits)'}")
    longest, prefix = longest_rollout(shape, s, limit), f" with a prefix of {s.prefix:,}" if s.prefix else ""
    lines.append(f"longest rollout{prefix} that fits: {longest:,} tokens" if longest else f"no rollout{prefix} fits")
    if made.peak_phase == "rollout":
        lines += [
            "",
            "training alone, with the rollouts sampled elsewhere:",
            verdict(shape, replace(s, rollout=False, engine_bytes=0), limit),
        ]
    return "\n".join(lines)
