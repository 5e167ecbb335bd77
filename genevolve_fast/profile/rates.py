"""Rates that were measured, device by device, and the search for the one that an estimate may stand on."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from genevolve_fast.profile.flops import gpu_named
from genevolve_fast.profile.shapes import ModelShape

FILE = Path("benchmarks/results/rates.json")
FAR = 16  # times more or less than what was measured: nothing is estimated from there


HIDDEN = ("layer", "model", "head")  # conditions that a plan always matches
PLAIN = (False, 0, "none", "plain")


class RatesError(ValueError):
    """A file of rates cannot be read; the message says why."""


class NoRate(LookupError):
    """Nothing was measured that an estimate could stand on; the message says what to run."""


@dataclass(frozen=True)
class Rate:
    """`value` in `unit` of one thing, measured on `device` under the conditions `at`."""

    device: str
    name: str
    value: float
    unit: str
    at: Mapping[str, Any] = field(default_factory=dict)
    commit: str = "unknown"
    date: str = ""

    def told(self) -> str:
        """What an estimate says of its source."""
        at = ", ".join(_condition(k, v) for k, v in self.at.items() if k not in HIDDEN and v not in PLAIN)
        where = f"{self.device}, {self.commit}"
        return f"{self.name} {_short(self.value)} {self.unit}" + (f" ({at})" if at else "") + f": {where}"


@dataclass(frozen=True)
class MeasuredRun:
    """A real step: what was run, and the seconds that its phases took."""

    device: str
    settings: Mapping[str, Any]
    seconds: Mapping[str, float]
    steps: int
    commit: str = "unknown"
    command: str = ""


@dataclass(frozen=True)
class Rates:
    """The rates and runs of a file; `find` gives the one of a device that is measured under the asked conditions."""

    rates: tuple[Rate, ...] = ()
    runs: tuple[MeasuredRun, ...] = ()

    @classmethod
    def read(cls, file: Path) -> Rates:
        """Of `benchmarks.rates`' file. Raises RatesError, FileNotFoundError."""
        try:
            devices = json.loads(file.read_text(encoding="utf-8"))["devices"]
            rates = [
                Rate(device, r["name"], r["value"], r["unit"], r["at"], r["commit"], r["date"])
                for device, found in devices.items()
                for r in found["rates"]
            ]
            runs = [
                MeasuredRun(device, r["settings"], r["seconds"], r["steps"], r["commit"], r["command"])
                for device, found in devices.items()
                for r in found.get("runs", ())
            ]
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise RatesError(f"{file} is no file of `python -m benchmarks.rates`: {error!r}") from error
        if wrong := [r for r in rates if not (isinstance(r.value, int | float) and 0 < r.value < math.inf)]:
            raise RatesError(f"{file}: {wrong[0].name} of {wrong[0].device} is {wrong[0].value!r}, not above 0")
        return cls(tuple(rates), tuple(runs))

    @property
    def devices(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(r.device for r in self.rates))

    def find(self, device: str, name: str, *, near: Mapping[str, float] | None = None, **at: Any) -> Rate:
        """The rate `name` of `device` with exactly the conditions `at`, and of those the one nearest to `near`.

        Near is the smallest quotient. Raises NoRate where none is there, or the nearest is FAR times off.
        """
        mine = [r for r in self.rates if r.name == name and same_device(r.device, device)]
        near = near or {}
        fitting = [r for r in mine if all(_plain(r.at.get(k)) == _plain(v) for k, v in at.items())]
        fitting = [r for r in fitting if near.keys() <= r.at.keys()]

        def distance(r: Rate) -> float:
            return max((abs(math.log(r.at[k] / v)) for k, v in near.items() if v > 0), default=0.0)

        best = min(fitting, key=distance, default=None)
        if best is None or distance(best) > math.log(FAR):
            wanted = ", ".join(f"{k} {_short(v)}" for k, v in {**at, **near}.items())
            raise NoRate(
                f"no rate {name}"
                + (f" ({wanted})" if wanted else "")
                + f" for {device}: {how(name, at)} and pass --rates"
            )
        return best


def how(name: str, at: Mapping[str, Any]) -> str:
    """The commands that measure a rate."""
    if name in ("all_gather", "reduce_scatter", "all_reduce"):
        if at.get("spans") == "nodes":
            return "`torchrun --nnodes 2 --nproc-per-node N -m benchmarks.collectives`"
        return "`python -m benchmarks.rates --only collectives`"
    if name == "sampling" and at.get("engine") == "server":
        return "`genevolve-fast serve --training` and `python -m benchmarks.rates --only sampling --servers URL`"
    return "`python -m benchmarks.rates`"


def named_with_threads(processor: str) -> str:
    """A processor by the threads that work here: other threads, other rates."""
    import torch

    threads = torch.get_num_threads()
    return f"{processor}, {threads} thread{'s' * (threads > 1)}"


def same_device(recorded: str, asked: str) -> bool:
    """Equal names, or two names of one GPU."""
    if recorded == asked:
        return True
    known = gpu_named(recorded)
    return known is not None and known == gpu_named(asked)


def layer_key(shape: ModelShape) -> list[int]:
    """What the speed of a layer depends on: hidden, query, key and MLP widths, head dimension."""
    return [shape.hidden, shape.q, shape.kv, shape.intermediate, shape.head_dim]


def head_key(shape: ModelShape) -> list[int]:
    return [shape.vocabulary, shape.hidden]


def model_key(shape: ModelShape) -> list[int]:
    return [shape.layers, *layer_key(shape), *head_key(shape)]


def _condition(name: str, value: Any) -> str:
    """adapters, dtype bfloat16, rows 8,192."""
    return name if value is True else f"{name} {_short(value)}"


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _short(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "×".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    if value >= 10_000:
        return f"{value:.3g}" if value >= 1e6 else f"{value:,.0f}"
    return f"{value:.4g}"
