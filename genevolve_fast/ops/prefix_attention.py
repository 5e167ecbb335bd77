"""Attention of packed segments that read a shared prefix: causal over their own tokens, full over a range of its rows.

The own part and the prefix part are two calls of a flash attention, merged by log-sum-exp. The backward gives each part
the *merged* out and log-sum-exp: P = exp(S - lse) and dS = P·(dP - rowsum(dO·O)) are then those of the whole softmax.
The merge itself is never differentiated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

IMPLEMENTATIONS = ("torch", "flash", "triton", "flash_attn")  # auto is the first that can serve
_STRIP_NUMBERS = 1 << 24  # of the merge at a time: what it widens stays small beside a layer's activations


@dataclass(frozen=True)
class Run:
    """Tokens [begin, end) that read the same prefix rows [start, stop): one sequence without a mask."""

    begin: int
    end: int
    start: int
    stop: int

    @property
    def tokens(self) -> slice:
        return slice(self.begin, self.end)

    @property
    def rows(self) -> slice:
        return slice(self.start, self.stop)


@dataclass(frozen=True)
class Layout:
    """Where packed segments lie, as the host knows it: segment i is the tokens [cu_seqlens[i], cu_seqlens[i + 1]).

    prefix_ranges: (start, stop) of the prefix rows that each segment reads, start == stop for none; () where there is
    no prefix at all. Segments may be empty. Raises ValueError naming the field.
    """

    cu_seqlens: tuple[int, ...]
    prefix_ranges: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "cu_seqlens", tuple(self.cu_seqlens))
        object.__setattr__(self, "prefix_ranges", tuple((a, b) for a, b in self.prefix_ranges))
        if not self.cu_seqlens or self.cu_seqlens[0] != 0 or any(a > b for a, b in pairwise(self.cu_seqlens)):
            raise ValueError(f"cu_seqlens must rise from 0 to the number of tokens, got {_shortened(self.cu_seqlens)}")
        segments = len(self.cu_seqlens) - 1
        if self.prefix_ranges and len(self.prefix_ranges) != segments:
            raise ValueError(
                f"prefix_ranges must be one for each of {segments} segments, got {len(self.prefix_ranges)}"
            )
        if wrong := [r for r in self.prefix_ranges if not 0 <= r[0] <= r[1]]:
            raise ValueError(f"prefix_ranges must be (start, stop) with 0 <= start <= stop, got {wrong[0]}")

    @property
    def tokens(self) -> int:
        return self.cu_seqlens[-1]

    @cached_property
    def borders(self) -> tuple[int, ...]:
        """cu_seqlens of the segments that have tokens."""
        return (0, *(b for a, b in pairwise(self.cu_seqlens) if a < b))

    @cached_property
    def longest(self) -> int:
        return max((b - a for a, b in pairwise(self.borders)), default=0)

    @cached_property
    def runs(self) -> tuple[Run, ...]:
        """Segments that follow one another and read the same rows are one run; what reads nothing is in none."""
        runs: list[Run] = []
        for (begin, end), (start, stop) in zip(pairwise(self.cu_seqlens), self.prefix_ranges, strict=False):
            if begin == end or start == stop:
                continue
            if runs and (runs[-1].end, runs[-1].rows) == (begin, slice(start, stop)):
                begin = runs.pop().begin
            runs.append(Run(begin, end, start, stop))
        return tuple(runs)

    @cached_property
    def prefix_rows(self) -> int:
        """How many rows the prefix must have at least."""
        return max((stop for _, stop in self.prefix_ranges), default=0)


def _shortened(numbers: Sequence[int]) -> str:
    return str(list(numbers)) if len(numbers) <= 8 else f"[{', '.join(map(str, numbers[:4]))}, … {numbers[-1]}]"


def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    prefix_k: Tensor | None = None,
    prefix_v: Tensor | None = None,
    *,
    scale: float | None = None,
    prefix_grads: tuple[Tensor, Tensor] | None = None,
    impl: str = "auto",
) -> Tensor:
    """out [tokens, heads, d]: each segment of `layout` attends causally to itself and fully to its prefix rows.

    q [tokens, heads, d], k, v [tokens, kv_heads, d], prefix_k, prefix_v [prefix rows, kv_heads, d], all of one dtype;
    heads is a multiple of kv_heads. scale: of the scores, default d^-½.

    Differentiable once. With `prefix_grads` = (dk, dv) [prefix rows, kv_heads, d] fp32 (fp64 for fp64), the gradients
    of the prefix are added there in the backward, and prefix_k, prefix_v get none of their own. Without it, and if they
    require gradients, they get them: summed over the runs in fp32, rounded once.
    Saves q, k, v, out, the prefix and fp32 [heads, tokens]. impl: as `attention_supported`. Nothing is synchronised.
    Raises ValueError naming the argument.
    """
    if prefix_grads is not None and prefix_k is None:
        raise ValueError("prefix_grads takes the gradients of prefix_k and prefix_v: give these too")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return _PrefixAttention.apply(q, k, v, prefix_k, prefix_v, layout, scale, prefix_grads, impl)


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    prefix_k: Tensor | None = None,
    prefix_v: Tensor | None = None,
    *,
    scale: float,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """(out [tokens, heads, d], lse [heads, tokens] fp32, fp64 for fp64), outside autograd; as `prefix_attention`."""
    _check(q, k, v, layout, prefix_k, prefix_v)
    impl = choose(impl, q)
    return _forward(q, k, v, prefix_k, prefix_v, *_numbers(layout), scale, impl)


def attention_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    layout: Layout,
    prefix_k: Tensor | None = None,
    prefix_v: Tensor | None = None,
    prefix_grads: tuple[Tensor, Tensor] | None = None,
    *,
    scale: float,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of the segments in their dtypes, outside autograd.

    out, lse: what `attention_forward` returned. The prefix's gradients are added to prefix_grads (fp32, fp64 for fp64);
    None: the prefix is detached.
    """
    _check(q, k, v, layout, prefix_k, prefix_v)
    _check_results(q, d_out, out, lse)
    _check_grads(prefix_grads, prefix_k)
    impl = choose(impl, q)
    into = prefix_grads if prefix_grads is not None else (None, None)
    return _backward(d_out, q, k, v, out, lse, prefix_k, prefix_v, *into, *_numbers(layout), scale, impl)


def full_forward(q: Tensor, k: Tensor, v: Tensor, *, scale: float, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """(out [n, heads, d], lse [heads, n]) of queries that all see all of k, v [m, kv_heads, d], outside autograd.

    Parts over disjoint keys become one by `merge`. Not with impl triton, which has no such part.
    """
    return _two_parts(impl, q).full(*map(_unit_stride, (q, k, v)), scale)


def full_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, scale: float, impl: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of one part, outside autograd; out, lse are those of all parts together, merged."""
    return _two_parts(impl, q).full_backward(*map(_unit_stride, (d_out, q, k, v, out, lse)), scale)


def _two_parts(impl: str, q: Tensor) -> type[_TwoParts]:
    about = q.device, q.dtype, q.shape[-1]
    names = [n for n in IMPLEMENTATIONS if issubclass(_BACKENDS[n], _TwoParts)] if impl == "auto" else [impl]
    able = [n for n in names if attention_supported(n, *about) is None and issubclass(_BACKENDS[n], _TwoParts)]
    if not able:
        raise ValueError(f"impl {impl!r} has no attention without a mask for {q.dtype} on {q.device}")
    return _BACKENDS[able[0]]


# --- what runs where --------------------------------------------------------------------------------------------------


def attention_supported(impl: str, device: torch.device | str, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why `impl` cannot serve; None where it can.

    torch: torch's flash attention for CPUs. flash: torch's packed flash attention on a GPU, fp16 and bf16, heads of a
    multiple of 8 up to 256. triton: one kernel for both parts, fp32 too, heads up to 256; its gradients repeat bit for
    bit, those of flash only under torch.use_deterministic_algorithms. flash_attn: the package, as flash. auto: the
    first of these that can.
    """
    if impl == "auto":
        reasons = [attention_supported(name, device, dtype, head_dim) for name in IMPLEMENTATIONS]
        return None if None in reasons else "; ".join(reasons)
    if impl not in IMPLEMENTATIONS:
        return f"impl must be one of auto, {', '.join(IMPLEMENTATIONS)}, not {impl!r}"
    return _BACKENDS[impl].reason(torch.device(device), dtype, head_dim)


def choose(impl: str, q: Tensor) -> str:
    """The implementation that runs. Raises ValueError with the reason where none can."""
    about = q.device, q.dtype, q.shape[-1]
    if reason := attention_supported(impl, *about):
        raise ValueError(f"impl {impl!r}: {reason}")
    return next(n for n in IMPLEMENTATIONS if attention_supported(n, *about) is None) if impl == "auto" else impl


def _check(q: Tensor, k: Tensor, v: Tensor, layout: Layout, prefix_k: Tensor | None, prefix_v: Tensor | None) -> None:
    if q.ndim != 3 or len(q) != layout.tokens:
        raise ValueError(f"q must be [{layout.tokens}, heads, d] for layout's tokens, got {list(q.shape)}")
    if k.ndim != 3 or len(k) != len(q) or k.shape[2] != q.shape[2] or not k.shape[1] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"k must be [{len(q)}, kv_heads, {q.shape[2]}] with kv_heads a divisor of {q.shape[1]}, got {list(k.shape)}"
        )
    if v.shape != k.shape:
        raise ValueError(f"v must be {list(k.shape)} as k, got {list(v.shape)}")
    if (prefix_k is None) != (prefix_v is None):
        raise ValueError("prefix_k and prefix_v belong together")
    if prefix_k is None:
        if layout.prefix_rows:
            raise ValueError(f"layout.prefix_ranges reads {layout.prefix_rows} prefix rows: give prefix_k and prefix_v")
    elif len(layout.cu_seqlens) > 1 and not layout.prefix_ranges:
        raise ValueError("prefix_k is given, but layout.prefix_ranges is empty: nothing would read it")
    for name, x in (("prefix_k", prefix_k), ("prefix_v", prefix_v)):
        if x is not None and (x.ndim != 3 or x.shape[1:] != k.shape[1:] or len(x) < layout.prefix_rows):
            raise ValueError(
                f"{name} must be [{layout.prefix_rows} or more, {k.shape[1]}, {k.shape[2]}], got {list(x.shape)}"
            )
    if prefix_k is not None and len(prefix_k) != len(prefix_v):
        raise ValueError(f"prefix_v must have {len(prefix_k)} rows as prefix_k, got {len(prefix_v)}")
    for name, x in (("k", k), ("v", v), ("prefix_k", prefix_k), ("prefix_v", prefix_v)):
        if x is not None and (x.dtype != q.dtype or x.device != q.device):
            raise ValueError(f"{name} must be {q.dtype} on {q.device} as q, got {x.dtype} on {x.device}")


def _check_results(q: Tensor, d_out: Tensor, out: Tensor, lse: Tensor) -> None:
    for name, x in (("d_out", d_out), ("out", out)):
        if x.shape != q.shape or x.dtype != q.dtype:
            raise ValueError(f"{name} must be {q.dtype} {list(q.shape)} as q, got {x.dtype} {list(x.shape)}")
    if lse.shape != (q.shape[1], len(q)) or lse.dtype != accumulator(q.dtype):
        want = f"{accumulator(q.dtype)} {[q.shape[1], len(q)]}"
        raise ValueError(f"lse must be {want}, as attention_forward returned it, got {lse.dtype} {list(lse.shape)}")


def _check_grads(prefix_grads: tuple[Tensor, Tensor] | None, prefix_k: Tensor | None) -> None:
    if prefix_grads is None:
        return
    if prefix_k is None:
        raise ValueError("prefix_grads takes the gradients of prefix_k and prefix_v: give these too")
    for x in prefix_grads:
        if x.shape != prefix_k.shape or x.dtype != accumulator(prefix_k.dtype) or x.device != prefix_k.device:
            want = f"{accumulator(prefix_k.dtype)} {list(prefix_k.shape)} on {prefix_k.device}"
            raise ValueError(f"prefix_grads must be {want}, got {x.dtype} {list(x.shape)} on {x.device}")
        if x.stride(2) != 1:
            raise ValueError(f"prefix_grads must have unit stride in their last dimension, got strides {x.stride()}")


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """What lse and gradients of the prefix are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# --- autograd and the registered operators ----------------------------------------------------------------------------


class _PrefixAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, prefix_k, prefix_v, layout, scale, prefix_grads, impl):
        _check_grads(prefix_grads, prefix_k)
        out, lse = attention_forward(q, k, v, layout, prefix_k, prefix_v, scale=scale, impl=impl)
        ctx.save_for_backward(q, k, v, prefix_k, prefix_v, out, lse)
        ctx.layout, ctx.scale, ctx.prefix_grads, ctx.impl = layout, scale, prefix_grads, impl
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        q, k, v, prefix_k, prefix_v, out, lse = ctx.saved_tensors
        own = ctx.prefix_grads is None and any(ctx.needs_input_grad[3:5])
        into = ctx.prefix_grads
        if own:
            into = tuple(torch.zeros_like(x, dtype=accumulator(x.dtype)) for x in (prefix_k, prefix_v))
        options = dict(scale=ctx.scale, impl=ctx.impl)
        grads = attention_backward(d_out, q, k, v, out, lse, ctx.layout, prefix_k, prefix_v, into, **options)
        of_prefix = [x.to(q.dtype) for x in into] if own else [None, None]
        return *grads, *of_prefix, None, None, None, None


def _numbers(layout: Layout) -> tuple[list[int], list[int]]:
    """A layout as an operator's schema can hold it."""
    return list(layout.cu_seqlens), [x for r in layout.prefix_ranges for x in r]


@lru_cache(maxsize=256)
def _layout(cu_seqlens: tuple[int, ...], ranges: tuple[int, ...]) -> Layout:
    return Layout(cu_seqlens, tuple(zip(ranges[::2], ranges[1::2], strict=True)))


@torch.library.custom_op(
    "genevolve_fast::prefix_attention",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor? prefix_k, Tensor? prefix_v, SymInt[] cu_seqlens, "
    "SymInt[] prefix_ranges, float scale, str impl) -> (Tensor out, Tensor lse)",
)
def _forward(q, k, v, prefix_k, prefix_v, cu_seqlens, prefix_ranges, scale, impl):
    layout = _layout(tuple(cu_seqlens), tuple(prefix_ranges))
    if not q.numel():
        return _empty_results(q)
    out, lse = _BACKENDS[impl].forward(*map(_unit_stride, (q, k, v, prefix_k, prefix_v)), layout, scale)
    return out.contiguous(), lse.contiguous()


@_forward.register_fake
def _(q, k, v, prefix_k, prefix_v, cu_seqlens, prefix_ranges, scale, impl):
    return _empty_results(q)


def _empty_results(q: Tensor) -> tuple[Tensor, Tensor]:
    tokens, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty(heads, tokens, dtype=accumulator(q.dtype))


@torch.library.custom_op(
    "genevolve_fast::prefix_attention_backward",
    mutates_args=("prefix_dk", "prefix_dv"),
    schema="(Tensor d_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? prefix_k, Tensor? prefix_v, "
    "Tensor(a!)? prefix_dk, Tensor(b!)? prefix_dv, SymInt[] cu_seqlens, SymInt[] prefix_ranges, float scale, str impl) "
    "-> (Tensor dq, Tensor dk, Tensor dv)",
)
def _backward(
    d_out, q, k, v, out, lse, prefix_k, prefix_v, prefix_dk, prefix_dv, cu_seqlens, prefix_ranges, scale, impl
):  # fmt: skip
    layout = _layout(tuple(cu_seqlens), tuple(prefix_ranges))
    if not q.numel():
        return _empty_gradients(q, k, v)
    into = None if prefix_dk is None else (prefix_dk, prefix_dv)
    tensors = map(_unit_stride, (d_out, q, k, v, out, lse, prefix_k, prefix_v))
    return tuple(x.contiguous() for x in _BACKENDS[impl].backward(*tensors, layout, scale, into))


@_backward.register_fake
def _(d_out, q, k, v, out, lse, prefix_k, prefix_v, prefix_dk, prefix_dv, cu_seqlens, prefix_ranges, scale, impl):
    return _empty_gradients(q, k, v)


def _empty_gradients(*inputs: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in inputs)


def _unit_stride(x: Tensor | None) -> Tensor | None:
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


# --- two parts, one softmax -------------------------------------------------------------------------------------------


def merge(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> None:
    """Two attentions of the same queries over different keys become, in place in the first, the one over both.

    out, other [n, heads, d]; lse, other_lse [heads, n].
    """
    for first in range(0, len(out), rows := max(1, _STRIP_NUMBERS // out[0].numel())):
        s = slice(first, first + rows)
        gap = (lse[:, s] - other_lse[:, s]).T[..., None]  # each weight by its own sigmoid keeps its digits near 0
        wide = out[s].to(gap.dtype).mul_(gap.sigmoid())
        out[s] = wide.addcmul_(other[s].to(gap.dtype), gap.neg_().sigmoid_())
    torch.logaddexp(lse, other_lse, out=lse)


class _TwoParts:
    """A backend of two flash attentions: packed causal over the own tokens, and without a mask over prefix rows.

    Subclasses give `causal`, `causal_backward`, `full` and `full_backward`; lse is [heads, n] throughout.
    """

    @classmethod
    def forward(cls, q, k, v, prefix_k, prefix_v, layout: Layout, scale: float) -> tuple[Tensor, Tensor]:
        out, lse = cls.causal(q, k, v, layout, scale)
        for run in layout.runs:
            part = cls.full(q[run.tokens], prefix_k[run.rows], prefix_v[run.rows], scale)
            cls.merge(out[run.tokens], lse[:, run.tokens], *part)
        return out, lse

    @classmethod
    def backward(
        cls, d_out, q, k, v, out, lse, prefix_k, prefix_v, layout: Layout, scale: float, prefix_grads
    ) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = cls.causal_backward(d_out, q, k, v, out, lse, layout, scale)
        for run in layout.runs:
            t, rows = run.tokens, run.rows
            part = cls.full_backward(d_out[t], q[t], prefix_k[rows], prefix_v[rows], out[t], lse[:, t], scale)
            dq[t] += part[0]
            if prefix_grads is not None:
                for total, new in zip(prefix_grads, part[1:], strict=True):
                    total[rows] += new
        return dq, dk, dv

    merge = staticmethod(merge)


class _Torch(_TwoParts):
    """torch's flash attention for CPUs, one call a segment and one a run."""

    @staticmethod
    def reason(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        if device.type != "cpu":
            return f"torch is for CPUs, q is on {device}"
        served = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
        return None if dtype in served else f"torch computes in fp64, fp32, bf16 and fp16, not {dtype}"

    @classmethod
    def causal(cls, q, k, v, layout: Layout, scale: float):
        parts = [_cpu_forward(q[a:b], k[a:b], v[a:b], True, scale) for a, b in pairwise(layout.borders)]
        return _joined([p[0] for p in parts], 0), _joined([p[1] for p in parts], 1)

    @classmethod
    def full(cls, q, k, v, scale: float):
        return _cpu_forward(q, k, v, False, scale)

    @classmethod
    def causal_backward(cls, d_out, q, k, v, out, lse, layout: Layout, scale: float):
        parts = [
            _cpu_backward(d_out[a:b], q[a:b], k[a:b], v[a:b], out[a:b], lse[:, a:b], True, scale)
            for a, b in pairwise(layout.borders)
        ]
        return tuple(_joined(list(column), 0) for column in zip(*parts, strict=True))

    @classmethod
    def full_backward(cls, d_out, q, k, v, out, lse, scale: float):
        return _cpu_backward(d_out, q, k, v, out, lse, False, scale)


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _heads_first(x: Tensor) -> Tensor:
    """[n, heads, d] <-> [1, heads, n, d]."""
    return x.transpose(0, 1)[None]


def _cpu_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        _heads_first(q), _heads_first(k), _heads_first(v), 0.0, causal, scale=scale
    )
    return out[0].transpose(0, 1), lse[0].contiguous()


def _cpu_backward(d_out, q, k, v, out, lse, causal: bool, scale: float) -> tuple[Tensor, ...]:
    grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *map(_heads_first, (d_out, q, k, v, out)), lse.contiguous()[None], 0.0, causal, scale=scale
    )
    return tuple(x[0].transpose(0, 1) for x in grads)


@lru_cache(maxsize=1024)
def _on_device(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """int32, copied once: every layer asks for the same, and a copy from pageable memory would synchronise."""
    made = torch.tensor(numbers, dtype=torch.int32)
    return made.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else made.to(device)


class _Flash(_TwoParts):
    """torch's own flash attention over packed sequences (the calls of torch.nn.attention.varlen)."""

    @staticmethod
    def reason(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        if device.type != "cuda":
            return f"flash needs a GPU, q is on {device}"
        if not torch.backends.cuda.is_flash_attention_available():
            return "this build of torch has no flash attention"
        return _flash_reason("flash", device, dtype, head_dim)

    @staticmethod
    def attend(q, k, v, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, causal: bool, scale: float):
        return torch.ops.aten._flash_attention_forward(
            q, k, v, cu_q, cu_k, max_q, max_k, 0.0, causal, return_debug_mask=False, scale=scale
        )[:2]

    @staticmethod
    def attend_backward(
        d_out, q, k, v, out, lse, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, causal: bool, scale: float
    ):
        no_dropout = torch.zeros(2, dtype=torch.uint64, device=q.device)
        return torch.ops.aten._flash_attention_backward(
            d_out, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, 0.0, causal, no_dropout,
            torch.empty(0, device=q.device), scale=scale,
        )  # fmt: skip

    @classmethod
    def causal(cls, q, k, v, layout: Layout, scale: float):
        out, lse = cls.attend(q, k, v, *_own(q, layout), True, scale)
        return out.contiguous(), lse  # flash gives out the strides of q

    @classmethod
    def full(cls, q, k, v, scale: float):
        out, lse = cls.attend(q, k, v, *_one_sequence(q, k), False, scale)
        return out.contiguous(), lse

    @classmethod
    def causal_backward(cls, d_out, q, k, v, out, lse, layout: Layout, scale: float):
        return cls.attend_backward(d_out, q, k, v, out, lse.contiguous(), *_own(q, layout), True, scale)

    @classmethod
    def full_backward(cls, d_out, q, k, v, out, lse, scale: float):
        return cls.attend_backward(d_out, q, k, v, out, lse.contiguous(), *_one_sequence(q, k), False, scale)

    @staticmethod
    def merge(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> None:
        if _triton_reason(out.device) is None:
            from genevolve_fast.kernels.prefix_attention import merge_attention

            merge_attention(out, lse, other, other_lse)
        else:
            merge(out, lse, other, other_lse)


def _own(q: Tensor, layout: Layout) -> tuple[Tensor, Tensor, int, int]:
    """cu_seqlens and longest of queries and keys, for flash attention."""
    cu = _on_device(layout.borders, q.device)
    return cu, cu, layout.longest, layout.longest


def _one_sequence(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, int, int]:
    return _on_device((0, len(q)), q.device), _on_device((0, len(k)), k.device), len(q), len(k)


def _flash_reason(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """What flash attention 2 cannot do."""
    if dtype not in (torch.float16, torch.bfloat16):
        return f"{name} computes in fp16 and bf16, not {dtype}"
    if head_dim % 8 or head_dim > 256:
        return f"{name} needs heads of a multiple of 8 up to 256, not {head_dim}"
    if not torch.cuda.is_available():
        return f"{name} needs a GPU, and none is available"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"{name} needs compute capability 8.0, {device} has {major}.{minor}"
    if head_dim > 192 and (major, minor) in ((8, 6), (8, 9), (12, 0), (12, 1)):
        return f"{name} trains heads above 192 on data-centre GPUs only, not on {major}.{minor}"
    return None


class _FlashAttn(_Flash):
    """The flash-attn package, 2.8 or newer."""

    @staticmethod
    def reason(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        if device.type != "cuda":
            return f"flash_attn needs a GPU, q is on {device}"
        try:
            import flash_attn.flash_attn_interface  # noqa: F401
        except ImportError as e:
            return f"flash-attn cannot be imported: {e}"
        return _flash_reason("flash_attn", device, dtype, head_dim)

    @staticmethod
    def attend(q, k, v, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, causal: bool, scale: float):
        from flash_attn.flash_attn_interface import _flash_attn_varlen_forward

        return _flash_attn_varlen_forward(q, k, v, cu_q, cu_k, max_q, max_k, 0.0, scale, causal)[:2]

    @staticmethod
    def attend_backward(
        d_out, q, k, v, out, lse, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, causal: bool, scale: float
    ):
        from flash_attn.flash_attn_interface import _flash_attn_varlen_backward

        grads = _empty_gradients(q, k, v)
        _flash_attn_varlen_backward(
            d_out, q, k, v, out, lse, *grads, cu_q, cu_k, max_q, max_k, 0.0, scale, causal, window_size_left=-1,
            window_size_right=-1, softcap=0.0, alibi_slopes=None,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )  # fmt: skip
        return grads


# --- one kernel for both parts ----------------------------------------------------------------------------------------


class _Triton:
    """kernels/prefix_attention.py: one online softmax over prefix and own keys."""

    @staticmethod
    def reason(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        if dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return f"triton computes in fp32, fp16 and bf16, not {dtype}"
        if head_dim > 256:
            return f"triton holds heads up to 256, not {head_dim}"
        return _triton_reason(device)

    @staticmethod
    def forward(q, k, v, prefix_k, prefix_v, layout: Layout, scale: float):
        from genevolve_fast.kernels.prefix_attention import prefix_attention_forward, tile_tokens

        block = tile_tokens(q.shape[2], q.dtype)
        tiles = _tiles(layout, block, q.device)
        return prefix_attention_forward(q, k, v, prefix_k, prefix_v, tiles, block=block, scale=scale)

    @staticmethod
    def backward(d_out, q, k, v, out, lse, prefix_k, prefix_v, layout: Layout, scale: float, prefix_grads):
        from genevolve_fast.kernels.prefix_attention import prefix_attention_backward, tile_tokens

        block = tile_tokens(q.shape[2], q.dtype)
        tiles, runs = _tiles(layout, block, q.device), _runs(layout, q.device)
        return prefix_attention_backward(
            d_out, q, k, v, out, lse, prefix_k, prefix_v, tiles, runs, prefix_grads, block=block, scale=scale
        )


def _triton_reason(device: torch.device) -> str | None:
    try:
        import triton
    except ImportError:
        return "triton is not installed"
    if device.type != "cuda" and not triton.knobs.runtime.interpret:
        return f"triton needs a GPU, q is on {device}"
    return None


@lru_cache(maxsize=64)
def _tiles(layout: Layout, block: int, device: torch.device) -> Tensor:
    """int32 [n, 5]: (first token, begin, end of its segment, start, stop of its prefix rows) of every tile."""
    ranges = layout.prefix_ranges or ((0, 0),) * (len(layout.cu_seqlens) - 1)
    segments = zip(pairwise(layout.cu_seqlens), ranges, strict=True)
    numbers = [(first, a, b, *rows) for (a, b), rows in segments for first in range(a, b, block)]
    return _on_device(tuple(x for tile in numbers for x in tile), device).view(-1, 5)


@lru_cache(maxsize=64)
def _runs(layout: Layout, device: torch.device) -> Tensor:
    """int32 [runs, 4]: (begin, end, start, stop)."""
    return _on_device(tuple(x for r in layout.runs for x in (r.begin, r.end, r.start, r.stop)), device).view(-1, 4)


_BACKENDS = {"torch": _Torch, "flash": _Flash, "triton": _Triton, "flash_attn": _FlashAttn}
