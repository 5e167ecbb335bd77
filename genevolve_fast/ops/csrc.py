"""csrc/ by ctypes: the head's epilogues in CUDA C++, over plain pointers.

Nothing is loaded and no GPU is asked for before the first call. The structs mirror those of csrc/logprob_epilogue.cu.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Sequence
from ctypes import c_char_p, c_float, c_int, c_longlong, c_void_p
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from genevolve_fast.ops.epilogues import Softmax, Upstream

if TYPE_CHECKING:
    from genevolve_fast.ops.blocks import Head

_PATH = Path(__file__).parents[1] / "_csrc" / "libgenevolve.so"
_ABI = 1
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class _Problem(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("products", "targets", "bias", "temperatures")),
        *((name, c_longlong) for name in ("rows", "vocabulary", "stride")),
        *((name, c_float) for name in ("temperature", "softcap", "scale")),
        *((name, c_int) for name in ("bias_dtype", "temperature_per_row")),
    ]


class _Softmax(ctypes.Structure):
    _fields_ = [(name, c_void_p) for name in ("logps", "maximum", "log_sum", "entropy")]


class _Gradient(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("logps", "lse", "entropy", "out")),
        ("stride", c_longlong),
        ("dtype", c_int),
    ]


class Library:
    """The compiled csrc/ at `path`, whose kernels address memory of torch's `device` type.

    Raises OSError where there is none or one built from other sources.
    """

    def __init__(self, path: Path = _PATH, device: str = "cuda") -> None:
        if not path.exists():
            raise OSError(f"{path.name} is not compiled: reinstall genevolve-fast where nvcc is on PATH")
        self.device = device
        self.handle = ctypes.CDLL(str(path))
        if not hasattr(self.handle, "genevolve_abi") or self.handle.genevolve_abi() != _ABI:
            raise OSError(f"{path.name} is of another version: reinstall genevolve-fast where nvcc is on PATH")
        pointer = ctypes.POINTER
        self._argtypes("genevolve_softmax", pointer(_Problem), pointer(_Softmax), c_void_p)
        both = (pointer(_Problem), pointer(_Softmax), pointer(_Gradient), pointer(_Gradient), c_void_p)
        self._argtypes("genevolve_d_logits", *both)
        self._argtypes("genevolve_softmax_d_logits", *both)
        for name in ("genevolve_error_name", "genevolve_error_text"):
            self._argtypes(name, c_int, result=c_char_p)

    def _argtypes(self, name: str, *arguments, result=c_int) -> None:
        function = getattr(self.handle, name)
        function.argtypes, function.restype = arguments, result

    def launch(self, name: str, on: torch.device, *arguments) -> None:
        """Call an entry point on the current stream of `on`. Raises RuntimeError with the CUDA error."""
        on_gpu = self.device == "cuda"
        with torch.cuda.device(on) if on_gpu else contextlib.nullcontext():
            stream = torch.cuda.current_stream(on).cuda_stream if on_gpu else None
            status = getattr(self.handle, name)(*arguments, stream)
        if status:
            what, why = (
                f(status).decode() for f in (self.handle.genevolve_error_name, self.handle.genevolve_error_text)
            )
            raise RuntimeError(f"{name}: {what} ({status}): {why}")


@functools.lru_cache(maxsize=1)
def installed() -> Library:
    """The library of this installation, loaded once."""
    return Library()


def reason(hidden: Tensor | None = None) -> str | None:
    """Why csrc/ cannot run here (on hidden's device and dtype); None where it can."""
    if hidden is not None and hidden.dtype == torch.float64:
        return "csrc/ computes in fp32, not fp64"
    try:
        library = installed()
    except OSError as error:
        return str(error)
    if library.device == "cuda" and torch.version.cuda is None:
        return "this torch is built without CUDA"
    if library.device == "cuda" and not torch.cuda.is_available():
        return "no GPU is available"
    if hidden is not None and hidden.device.type != library.device:
        return f"csrc/ needs a GPU, hidden is on {hidden.device}"
    return None


class SoftmaxRows(NamedTuple):
    """fp32 [rows]: log-prob of the target, largest logit, log of the sum of exp(z - maximum), entropy."""

    logps: Tensor
    maximum: Tensor
    log_sum: Tensor
    entropy: Tensor


def softmax_epilogue(
    products: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> SoftmaxRows:
    """The softmax of z = softcap·tanh(scale·(products + b)/softcap)/temperature at `targets`, in one read.

    products fp32 [rows, V] with unit column stride, targets int64 [rows] (outside [0, V): not in this shard, its z
    counts as 0), bias [V] fp32, bf16 or fp16, temperature a number or a tensor [] or [rows]. Raises ValueError naming
    an argument of another dtype, shape, stride or device, RuntimeError with the CUDA error where the launch fails.
    """
    library = installed()
    problem, _alive = _problem(library, products, targets, bias, temperature, softcap, logit_scale)
    out = _new_softmax(products)
    library.launch("genevolve_softmax", products.device, problem, _softmax(out))
    return out


def d_logits_epilogue(
    products: Tensor,
    targets: Tensor,
    softmax: Softmax | SoftmaxRows,
    gradients: Sequence[tuple[Tensor, Upstream]],
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> None:
    """Write d/d products of logps·logp + lse·lse + entropy·H into `out`, for one or two (out, upstream) in one pass.

    out [rows, V] fp32, bf16 or fp16 with unit column stride; upstream gradients [rows] or None. The first `out` may be
    the products themselves, or the left half of their rows seen in a 16-bit dtype; a second one must lie elsewhere.
    Options and errors as in `softmax_epilogue`.
    """
    library = installed()
    problem, _alive = _problem(library, products, targets, bias, temperature, softcap, logit_scale)
    if softmax.entropy is None and any(upstream.entropy is not None for _, upstream in gradients):
        raise ValueError("softmax.entropy is missing, and an upstream gradient of the entropy needs it")
    rows = [softmax.maximum, softmax.log_sum, softmax.entropy]
    for name, x in zip(("maximum", "log_sum", "entropy"), rows, strict=True):
        if x is not None:
            _expect(f"softmax.{name}", x, products, (len(products),), (torch.float32,))
    given = [x if x is None else x.contiguous() for x in (None, *rows)]
    first, second, _upstreams = _gradients(products, gradients)
    library.launch("genevolve_d_logits", products.device, problem, _softmax(given), first, second)


def softmax_d_logits_epilogue(
    products: Tensor,
    targets: Tensor,
    gradients: Sequence[tuple[Tensor, Upstream]],
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> SoftmaxRows:
    """`softmax_epilogue` and `d_logits_epilogue` in one launch, for upstream gradients known beforehand.

    One read of the products where a thread-block cluster's shared memory holds a row (compute capability 9.0 and up),
    else two. The softmax has the bits of `softmax_epilogue` either way.
    """
    library = installed()
    problem, _alive = _problem(library, products, targets, bias, temperature, softcap, logit_scale)
    first, second, _upstreams = _gradients(products, gradients)
    out = _new_softmax(products)
    library.launch("genevolve_softmax_d_logits", products.device, problem, _softmax(out), first, second)
    return out


class CudaEpilogue:
    """csrc/logprob_epilogue.cu: two gradients in one pass; softmax and gradients in one launch."""

    @staticmethod
    def _options(head: Head, tau) -> dict:
        tau = tau[:, 0] if isinstance(tau, Tensor) and tau.ndim else tau
        return dict(bias=head.bias, temperature=tau, softcap=head.softcap, logit_scale=head.scale)

    @classmethod
    def softmax(cls, logits: Tensor, targets: Tensor, head: Head, tau, entropy: bool) -> Softmax:
        return Softmax(*softmax_epilogue(logits, targets, **cls._options(head, tau)))

    @classmethod
    def d_logits(cls, logits, out: list[Tensor], softmax: Softmax, targets: Tensor, head: Head, tau, upstream) -> None:
        pairs = list(zip(out, upstream, strict=True))
        d_logits_epilogue(logits, targets, softmax, pairs, **cls._options(head, tau))

    @classmethod
    def softmax_d_logits(cls, logits, out: list[Tensor], targets: Tensor, head: Head, tau, upstream) -> Softmax:
        """Both, where the upstream gradients are known before the softmax."""
        pairs = list(zip(out, upstream, strict=True))
        return Softmax(*softmax_d_logits_epilogue(logits, targets, pairs, **cls._options(head, tau)))


# --- arguments --------------------------------------------------------------------------------------------------------


def _problem(library, products, targets, bias, temperature, softcap, scale) -> tuple[_Problem, list[Tensor]]:
    """The struct, and the tensors that must outlive the launch."""
    if products.dtype != torch.float32 or products.ndim != 2 or (products.shape[1] > 1 and products.stride(1) != 1):
        raise ValueError(
            f"products must be fp32 [rows, V], unit column stride; got {products.dtype} {products.stride()}"
        )
    rows, vocabulary = products.shape
    if not vocabulary:
        raise ValueError(f"products must have at least one column, got {list(products.shape)}")
    if products.device.type != library.device:
        raise ValueError(f"products must be on a {library.device} device, got {products.device}")
    _expect("targets", targets, products, (rows,), (torch.int64,))
    if bias is not None:
        _expect("bias", bias, products, (vocabulary,), _DTYPES)
        bias = bias.contiguous()
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive, got {softcap}")
    if isinstance(temperature, Tensor):
        _expect("temperature", temperature, products, (rows,) if temperature.ndim else (), None)
        tau, temperatures, per_row = 1.0, temperature.to(torch.float32).contiguous(), temperature.ndim == 1
    elif temperature > 0:
        tau, temperatures, per_row = temperature, None, False
    else:
        raise ValueError(f"temperature must be positive, got {temperature}")
    targets = targets.contiguous()
    problem = _Problem(
        products.data_ptr(), targets.data_ptr(), _pointer(bias), _pointer(temperatures), rows, vocabulary,
        products.stride(0), tau, softcap or 0.0, scale, 0 if bias is None else _DTYPES[bias.dtype], per_row,
    )  # fmt: skip
    return problem, [x for x in (targets, bias, temperatures) if x is not None]


def _gradients(products: Tensor, gradients) -> tuple[_Gradient, _Gradient | None, list[Tensor]]:
    if len(gradients) not in (1, 2):
        raise ValueError(f"gradients must be one or two pairs (out, upstream), got {len(gradients)}")
    structs, alive = [], []
    for at, (out, upstream) in enumerate(gradients):
        name = "out" if at == 0 else "second out"
        _expect(name, out, products, products.shape, _DTYPES)
        if out.shape[1] > 1 and out.stride(1) != 1:
            raise ValueError(f"{name} must have unit column stride, got {out.stride()}")
        _check_overlap(name, out, products, may_overlay=at == 0)
        for other, _ in gradients[:at]:
            _check_overlap(name, out, other, may_overlay=False)
        given = []
        for kind in ("logps", "lse", "entropy"):
            g = getattr(upstream, kind)
            if g is not None:
                _expect(f"upstream {kind}", g, products, (len(products),), None)
                g = g.float().contiguous()
                alive.append(g)
            given.append(_pointer(g))
        structs.append(_Gradient(*given, out.data_ptr(), out.stride(0), _DTYPES[out.dtype]))
    return structs[0], structs[1] if len(structs) == 2 else None, alive


def _check_overlap(name: str, out: Tensor, other: Tensor, may_overlay: bool) -> None:
    """A row is read before its own bytes are written, but in no order with other rows."""
    if not out.numel():
        return
    (rows, columns), (a, b) = out.shape, (out.stride(0) * out.itemsize, other.stride(0) * other.itemsize)
    if rows > 1 and a < columns * out.itemsize:
        raise ValueError(f"{name}'s rows overlap each other: stride {out.stride(0)} for {columns} columns")
    mine, theirs = out.data_ptr(), other.data_ptr()
    last_mine, last_theirs = (rows - 1) * a + columns * out.itemsize, (rows - 1) * b + columns * other.itemsize
    apart = mine + last_mine <= theirs or theirs + last_theirs <= mine
    overlay = may_overlay and mine == theirs and (rows == 1 or a == b)
    if not (apart or overlay):
        raise ValueError(
            f"{name} overlaps the products or the other gradient: only left in their rows, and only the first"
        )


def _expect(name: str, x: Tensor, products: Tensor, shape: Sequence[int], dtypes) -> None:
    if tuple(x.shape) != tuple(shape) or (dtypes is not None and x.dtype not in dtypes):
        kinds = "" if dtypes is None else " or ".join(str(d).removeprefix("torch.") for d in dtypes) + " "
        raise ValueError(f"{name} must be {kinds}{list(shape)}, got {x.dtype} {list(x.shape)}")
    if x.device != products.device:
        raise ValueError(f"{name} is on {x.device}, products on {products.device}")


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _new_softmax(products: Tensor) -> SoftmaxRows:
    return SoftmaxRows(*torch.empty(4, len(products), dtype=torch.float32, device=products.device))


def _softmax(rows: Sequence[Tensor | None]) -> _Softmax:
    return _Softmax(*map(_pointer, rows))
