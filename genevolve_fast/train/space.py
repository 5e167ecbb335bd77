"""A full disk: seen before a checkpoint is written where that is possible, and never the end of an older one."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from genevolve_fast.files import out_of_space
from genevolve_fast.policy.adapters import has_adapters
from genevolve_fast.policy.model import Policy
from genevolve_fast.policy.weights import human_bytes
from genevolve_fast.train.optim import Optimizer
from genevolve_fast.train.run import RunError

BESIDE = 4 << 20  # bytes of tokenizer, random states and memory


def checkpoint_bytes(policy: Policy, optimizer: Optimizer, beside: int = 0) -> int:
    """About what a checkpoint takes: weights (with LoRA the adapter's), optimizer states and `beside` bytes of others.

    Before the first step, when there are no states yet, two of every trained parameter's size are assumed.
    """
    if optimizer.shared:  # master weights and two moments in fp32, over all ranks
        count = sum(getattr(p, "ds_numel", p.numel()) for p in policy.parameters() if p.requires_grad)
        return int(1.01 * (16 if beside else 12) * count) + BESIDE  # `beside` is this rank's part of the average
    trained = [p for p in policy.parameters() if p.requires_grad]
    written = trained if has_adapters(policy) else policy.parameters()
    states = sum(_tensor_bytes(optimizer.state_dict()["parts"])) or 2 * sum(p.nbytes for p in trained)
    return int(1.01 * (sum(p.nbytes for p in written) + states + beside)) + BESIDE


def _tensor_bytes(value) -> Iterator[int]:
    if hasattr(value, "nbytes"):
        yield value.nbytes
    elif isinstance(value, dict | list | tuple):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _tensor_bytes(each)


def check_room(folder: Path, needed: int, replaced: Sequence[Path] = ()) -> None:
    """Raise RunError where `folder` has no room for `needed` bytes, also not in place of `replaced`."""
    gained = sum(f.stat().st_size for old in replaced for f in old.rglob("*") if f.is_file())
    if shutil.disk_usage(folder).free + gained < needed:
        raise no_room(folder, needed)


def make_room(folder: Path, needed: int, replaced: Sequence[Path] = ()) -> None:
    """Remove of `replaced`, oldest first, what stands in the way of `needed` bytes. Raises RunError, with none removed,
    where that does not help."""
    check_room(folder, needed, replaced)
    for old in replaced:
        if shutil.disk_usage(folder).free >= needed:
            return
        shutil.rmtree(old)


@contextmanager
def writing(partial: Path, needed: int) -> Iterator[None]:
    """Around what fills the folder `partial`: after an error it is gone, and a full disk is a RunError."""
    try:
        yield
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if out_of_space(error):
            raise no_room(partial.parent, needed) from error
        raise


def no_room(folder: Path, needed: int) -> RunError:
    free = human_bytes(shutil.disk_usage(folder).free)
    return RunError(
        f"no room to save in {folder}: {human_bytes(needed)} are needed, {free} are free. Older checkpoints are "
        "whole and so is what was sampled: make room and run again with --resume"
    )
