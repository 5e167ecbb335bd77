"""What the operations of the head promise to hold."""

from __future__ import annotations

import torch


def formula_bytes(
    mode: str,
    rows: int,
    hidden: int,
    vocabulary: int,
    dtype: torch.dtype,
    device: torch.device,
    workspace_mb: float | None = None,
    main_grad: bool = False,
    block_rows: int = 1024,
) -> int:
    """Peak bytes that the operations' docstrings promise above inputs and returned gradients.

    mode "logprob" (no gradient), "frozen" (of hidden only), "objective" or "teacher" (the objective's sweep, without or
    with a teacher's rows), anything else: log-probs with a trainable head.
    """
    itemsize = torch.float64.itemsize if dtype == torch.float64 else torch.float32.itemsize
    block = block_rows * vocabulary * itemsize
    blocks = (1 if device.type == "cpu" else 4) if workspace_mb is None else int(workspace_mb * 2**20) // block
    blocks = min(blocks, -(-rows // block_rows))
    workspace = blocks * block if workspace_mb is None else workspace_mb * 2**20
    total = workspace + 16 * hidden * blocks * block_rows + 40 * rows + (32 << 20)
    if mode == "frozen":
        total += rows * hidden * dtype.itemsize
    elif mode != "logprob" and not main_grad:
        total += vocabulary * hidden * itemsize
    if mode in ("objective", "teacher"):
        total += 160 * rows
    return int(total)
