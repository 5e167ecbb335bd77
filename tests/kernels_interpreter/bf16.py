"""The interpreter's bfloat16 casts and products, mended (triton issue 11584, not to be fixed upstream)."""

from __future__ import annotations

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def _is_bf16(handle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _nearest_even(x: np.ndarray) -> np.ndarray:
    u = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return np.where(np.isnan(x), np.uint16(0x7FC0), ((u + 0x7FFF + ((u >> 16) & 1)) >> 16).astype(np.uint16))


def _widened(handle):
    if not _is_bf16(handle):
        return handle
    return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def mend() -> None:
    """Round fp32 to bf16 as torch does, and multiply what bf16 stands for.

    Kernels widen every bf16 load before they compute with it, but for tl.dot.
    """
    builder = interpreter.InterpreterBuilder
    if getattr(builder, "mended", False):  # once a process, whatever the number of test files
        return
    builder.mended = True
    cast, dot = builder.cast_impl, builder.create_dot
    builder.create_dot = lambda self, a, b, *rest: dot(self, _widened(a), _widened(b), *rest)

    def cast_impl(self, source, target):
        if source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16:
            return interpreter.TensorHandle(_nearest_even(source.data), tl.bfloat16)
        return cast(self, source, target)

    builder.cast_impl = cast_impl
    for name in ("create_fp_trunc", "create_fp_ext"):
        setattr(builder, name, lambda self, source, target: self.cast_impl(source, target))
