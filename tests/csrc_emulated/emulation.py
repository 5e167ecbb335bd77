"""csrc/logprob_epilogue.cu compiled as host C++, and what its results are held to."""

from __future__ import annotations

import ctypes
import math
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from genevolve_fast.ops import csrc
from genevolve_fast.ops.epilogues import Upstream

HERE = Path(__file__).parent
SOURCE = HERE.parents[1] / "csrc" / "logprob_epilogue.cu"
ORDERS = {"forwards": 0, "backwards": 1, "shuffled": 2}
DISTRIBUTIONS = {
    "flat": lambda rows, v: 1e-3 * torch.randn(rows, v),
    "normal": lambda rows, v: 3 * torch.randn(rows, v),
    "peaked": lambda rows, v: 60 * torch.randn(rows, v),
    "shifted": lambda rows, v: torch.randn(rows, v) - 14,
}


class Counts(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_longlong)
        for name in ("launches", "cluster", "bytes_read", "wide_reads", "bytes_written", "wide_writes")
    ]


class Emulated(csrc.Library):
    """Runs on CPU tensors, as a GPU of the configured compute capability would."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, device="cpu")

    def configure(self, capability: int = 90, order: str = "forwards", seed: int = 0, shared_limit: int = 0) -> None:
        self.handle.emulator_configure(capability, ORDERS[order], seed, shared_limit)

    def counts(self) -> Counts:
        counts = Counts()
        self.handle.emulator_counts(ctypes.byref(counts))
        return counts


def compile_for_host(target: Path, source: Path = SOURCE) -> Emulated:
    """Each library has an emulator of its own: none of its symbols are shared with another's."""
    command = [
        shutil.which("g++"), "-std=c++20", "-O1", "-ffp-contract=off", "-fno-strict-aliasing", "-Wno-unknown-pragmas",
        "-fPIC", "-shared", "-fno-extern-tls-init", "-fvisibility=hidden", "-fno-gnu-unique",
        f"-I{HERE / 'shim'}", f'-DCSRC="{source}"', HERE / "emulated.cpp", "-o", target,
    ]  # fmt: skip
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return Emulated(target)


# --- cases ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Laid:
    """A [rows, V] view that starts `offset` elements into a buffer of NaN and has `padding` more columns."""

    buffer: torch.Tensor
    view: torch.Tensor

    @classmethod
    def out(cls, like: torch.Tensor, offset: int = 0, padding: int = 0, dtype: torch.dtype | None = None) -> Laid:
        rows, columns = like.shape
        stride = columns + padding
        buffer = torch.full((offset + rows * stride + 64,), torch.nan, dtype=dtype or like.dtype)
        return cls(buffer, buffer.as_strided((rows, columns), (stride, 1), offset))

    @classmethod
    def filled(cls, values: torch.Tensor, offset: int = 0, padding: int = 0) -> Laid:
        laid = cls.out(values, offset, padding)
        laid.view.copy_(values)
        return laid

    def untouched_around(self) -> bool:
        inside = torch.zeros_like(self.buffer, dtype=torch.bool)
        inside.as_strided(self.view.shape, self.view.stride(), self.view.storage_offset()).fill_(True)
        return bool(self.buffer[~inside].isnan().all())


class Truth(NamedTuple):
    """float64: (logps, lse, entropy) and the largest |logit| [rows]; of each upstream the gradient and the size of its
    terms before they cancel [rows, V]."""

    values: list[torch.Tensor]
    largest: torch.Tensor
    gradients: list[torch.Tensor]
    terms: list[torch.Tensor]


def truth(products, targets, upstream=(), *, bias=None, temperature=1.0, softcap=None, logit_scale=1.0) -> Truth:
    tau = temperature.double().reshape(-1, 1) if isinstance(temperature, torch.Tensor) else temperature
    x = products.double().requires_grad_()
    z = logit_scale * (x if bias is None else x + bias.double())
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    z = z / tau
    lse = z.logsumexp(1)
    here = (targets >= 0) & (targets < z.shape[1])
    at = torch.where(here, targets, 0)[:, None]
    log_p = z.log_softmax(1)
    p = log_p.exp()
    entropy = -(p * log_p).sum(1)
    values = [torch.where(here, log_p.gather(1, at)[:, 0], -lse), lse, entropy]
    gradients, terms = [], []
    for up in upstream:
        g = [torch.zeros(len(z)) if x is None else x for x in (up.logps, up.lse, up.entropy)]
        total = sum((value * each.double()).sum() for value, each in zip(values, g, strict=True))
        gradients.append(torch.autograd.grad(total, x, retain_graph=True)[0])
        size = p * (g[0].abs() + g[1].abs())[:, None] + p * (1 + (log_p + entropy[:, None]).abs()) * g[2].abs()[:, None]
        size = size.scatter_add(1, at, torch.where(here, g[0].abs(), 0.0).double()[:, None])
        terms.append((size * logit_scale / tau).detach())
    values = [value.detach() for value in values]
    values[0] = values[0].clamp(max=0)  # where the target is not in the shard
    return Truth(values, z.detach().abs().amax(1), gradients, terms)


def check_softmax(got, want: Truth) -> None:
    """2e-6·max(1, |lse|/16), one rounding of a number of logp's size, and four of the largest logit (the options)."""
    logps, lse, entropy = want.values
    bound = 2e-6 * (lse.abs() / 16).clamp(min=1) + 2.0**-24 * (logps.abs() + 4 * want.largest)
    assert (got.logps <= 0).all()
    assert ((got.logps - logps).abs() <= bound).all()
    assert ((got.maximum.double() + got.log_sum - lse).abs() <= bound).all()
    assert ((got.entropy - entropy).abs() <= bound).all()


def check_gradient(got: torch.Tensor, want: Truth, which: int = 0) -> None:
    """Each term to the roundings of exp's argument, the result to one rounding of its dtype."""
    unit, smallest = {torch.float32: (24, 126), torch.bfloat16: (8, 126), torch.float16: (11, 24)}[got.dtype]
    roundings = 8 + 8 * want.largest + 3 * math.log(got.shape[1])  # of z, log s and the entropy
    bound = 2.0**-24 * roundings[:, None] * want.terms[which]
    bound += 2.0**-unit * want.gradients[which].abs() + 2.0**-smallest
    assert ((got.double() - want.gradients[which]).abs() <= bound).all()


def upstream_of(names, rows: int) -> Upstream:
    return Upstream(**{name: torch.randn(rows) for name in names})


def options_of(name: str, rows: int, vocabulary: int) -> dict:
    bias = torch.randn(vocabulary)
    return {
        "plain": {},
        "temperature, scale": dict(temperature=0.7, logit_scale=1.3),
        "temperature on the device": dict(temperature=torch.tensor(0.6)),
        "temperature per row": dict(temperature=torch.rand(rows) + 0.4),
        "softcap": dict(softcap=5.0, logit_scale=1.7),
        "bias fp32": dict(bias=bias),
        "bias bf16": dict(bias=bias.bfloat16(), temperature=0.8),
        "everything": dict(bias=bias.half(), softcap=4.0, logit_scale=1.7, temperature=torch.rand(rows) + 0.4),
    }[name]


OPTIONS = (
    "plain", "temperature, scale", "temperature on the device", "temperature per row", "softcap", "bias fp32",
    "bias bf16", "everything",
)  # fmt: skip


def targets_of(rows: int, vocabulary: int) -> torch.Tensor:
    """The first and the last column among them."""
    targets = torch.randint(vocabulary, (rows,))
    targets[:1], targets[1:2] = vocabulary - 1, 0
    return targets
