"""Weights beside the student's, for reference and teacher passes: adapter off, a frozen copy, a running average."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from genevolve_fast.policy.adapters import AdapterError, adapters_off, copy_named, has_adapters
from genevolve_fast.policy.model import Policy


class WeightSource(Protocol):
    """Other weights that can score what the student sampled."""

    nbytes: int  # device memory held for the whole run, beside the student

    def weights(self) -> AbstractContextManager[Policy]:
        """A policy with the source's weights, in eval mode and without gradients, for the length of the block."""

    def describe(self) -> str:
        """One line for the log, bytes included."""


class AdapterOff:
    """The base under a LoRA policy: the same memory, the adapter switched off."""

    nbytes = 0

    def __init__(self, policy: Policy) -> None:
        if not has_adapters(policy):
            raise AdapterError("the policy has no adapter to switch off: use a FrozenCopy")
        self._policy = policy

    @contextmanager
    def weights(self) -> Iterator[Policy]:
        with adapters_off(self._policy), _scoring(self._policy):
            yield self._policy

    def describe(self) -> str:
        return "adapter off"


class FrozenCopy:
    """The policy as it is now. Parameters that are frozen already (the vision tower) are shared, not copied."""

    def __init__(self, policy: Policy) -> None:
        shared = {id(p): p for p in policy.model.parameters() if not p.requires_grad}
        self._policy = Policy(copy.deepcopy(policy.model, dict(shared)), policy.codec).requires_grad_(False).eval()
        self._policy.tile_tokens = policy.tile_tokens
        self.nbytes = sum(_nbytes(p) for p in self._policy.parameters() if id(p) not in shared)

    @contextmanager
    def weights(self) -> Iterator[Policy]:
        with torch.no_grad():
            yield self._policy

    def describe(self) -> str:
        return f"a frozen copy, {human_bytes(self.nbytes)}"


class Snapshot:
    """The trainable parameters as they are now, where the policy itself scores with them: sharded where it is."""

    def __init__(self, policy: Policy, at_least: torch.dtype | None = None) -> None:
        self._policy = policy
        self._students = {n: held_part(p) for n, p in policy.model.named_parameters() if p.requires_grad}
        if not self._students:
            raise ValueError("the policy has no trainable parameter to keep")
        kind = lambda p: p.dtype if at_least is None else torch.promote_types(p.dtype, at_least)  # noqa: E731
        self._average = {n: p.detach().to(kind(p), copy=True) for n, p in self._students.items()}
        self.nbytes = sum(map(_nbytes, self._average.values()))

    @contextmanager
    def weights(self) -> Iterator[Policy]:
        """The policy itself with the average in its parameters' storage; afterwards the student's bits are back.

        Where average and parameter have one dtype they change places, one tensor at a time; where the parameter is
        narrower the student waits in a copy of its own. Writing through `.data` keeps a graph that holds the student
        usable: at its backward the bits are the old ones.
        """
        waiting = {}
        swapped = []
        try:
            for name, student in self._students.items():
                average = self._average[name]
                if average.dtype == student.dtype:
                    _exchange(student.data, average)
                else:
                    waiting[name] = student.detach().clone()
                    student.data.copy_(average)
                swapped.append(name)
            self._forget_derived()
            with _scoring(self._policy):
                yield self._policy
        finally:
            for name in swapped:
                if name in waiting:
                    self._students[name].data.copy_(waiting.pop(name))
                else:
                    _exchange(self._students[name].data, self._average[name])
            self._forget_derived()

    def part(self, name: str) -> Tensor:
        """What this rank keeps of a parameter."""
        return self._average[name]

    def describe(self) -> str:
        return f"a snapshot of this rank's part, {human_bytes(self.nbytes)}"

    def _forget_derived(self) -> None:
        """Drop what was computed from the weights that just left: image features, FSDP2's gathered copies."""
        if any(".visual." in name for name in self._students):
            self._policy.forget_images()
        for module in {*self._policy.units, *self._policy.modules()}:
            if hasattr(module, "reshard"):
                module.reshard()


class Average(Snapshot):
    """Exponential average of the trainable parameters, at least fp32: average = (1 - rate)·average + rate·student.

    With LoRA, A and B are averaged one by one: each update is off the average of the products by the second-order term
    -rate·(1 - rate)·(B - B_avg)·(A - A_avg); the exact one has the rank of all steps together, or is dense.
    """

    def __init__(self, policy: Policy, rate: float) -> None:
        if not 0 < rate < 1:
            raise ValueError(f"rate must lie between 0 and 1, got {rate}")
        super().__init__(policy, torch.float32)
        self._rate = rate

    @torch.no_grad()
    def update(self) -> None:
        """Take in the student's weights: once after every optimizer step."""
        for name, average in self._average.items():
            average.mul_(1 - self._rate).add_(self._students[name], alpha=self._rate)

    def save(self, path: str | Path) -> None:
        """Write the average to one safetensors file."""
        from safetensors.torch import save_file

        tensors = {n: t.cpu().contiguous() for n, t in self._average.items()}
        save_file(tensors, path, metadata={"rate": repr(self._rate)})

    def load(self, path: str | Path) -> None:
        """Restore what `save` wrote, to the bit. Raises AdapterError where it is missing or another policy's."""
        from safetensors.torch import load_file

        if not Path(path).exists():
            raise AdapterError(f"{path} is missing: the checkpoint was written without teacher: ema")
        copy_named(load_file(path), self._average, str(path))

    def describe(self) -> str:
        of = "LoRA weights" if has_adapters(self._policy) else "all trained weights"
        dtypes = {str(t.dtype).replace("torch.float", "fp") for t in self._average.values()}
        line = f"EMA of {of}, rate {self._rate:g}, {'/'.join(sorted(dtypes))}, {human_bytes(self.nbytes)}"
        copied = sum(_nbytes(p) for n, p in self._students.items() if p.dtype != self._average[n].dtype)
        return f"{line}, +{human_bytes(copied)} while it scores" if copied else line


def held_part(p: Tensor) -> Tensor:
    """Where a rank holds its part of a weight: of ZeRO-3's parameters only that stays between visits."""
    return getattr(p, "ds_tensor", p)


def base_weights(policy: Policy, sharded: bool = False) -> AdapterOff | FrozenCopy | Snapshot:
    """The weights the run started from: under LoRA the adapter switched off, else a frozen copy made now; where ranks
    share weights or hook them (`sharded`) a snapshot of this rank's part."""
    if has_adapters(policy):
        return AdapterOff(policy)
    return Snapshot(policy) if sharded else FrozenCopy(policy)


def human_bytes(n: int) -> str:
    """16 400 000 000 -> 16.4 GB."""
    value, unit = (n / 1e9, "GB") if n >= 1e9 else (n / 1e6, "MB") if n >= 1e6 else (n / 1e3, "kB")
    return f"{value:.1f} {unit}"


@contextmanager
def _scoring(policy: Policy) -> Iterator[None]:
    """Eval mode without gradients; modules that were training are so again afterwards."""
    training = [m for m in policy.modules() if m.training]
    policy.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def _exchange(a: Tensor, b: Tensor) -> None:
    held = a.clone()
    a.copy_(b)
    b.copy_(held)


def _nbytes(x: Tensor) -> int:
    """Of what this rank holds: a DTensor counts the whole."""
    x = x.to_local() if hasattr(x, "to_local") else x
    return x.numel() * x.element_size()
