"""One group: its contenders are checked, weighed, and then timed in turns."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.check import Gate, Truth, errors, judge, make_run
from benchmarks.inputs import MODES, Inputs
from benchmarks.memory import peak_bytes
from benchmarks.peers import OURS, Contender, first_line
from benchmarks.store import Results, Row
from benchmarks.timing import quantiles, take_turns
from genevolve_fast.ops.memory import formula_bytes

FLOOR_ROWS = 16_384  # of one product; more rows are several


class DeviceLost(Exception):
    """A contender broke the CUDA context; nothing more can run in this process."""


def measure(
    group: Row,
    truth: Truth,
    contenders: dict[str, Contender | str],
    gate: Gate,
    results: Results,
    repeats: int,
    seconds: float | None,
) -> None:
    """Check, weigh and time the contenders of one group, and put one row of each into `results`."""
    weight, mode = truth.inputs.weight, group["mode"]
    into = None
    if any(not isinstance(c, str) and c.settings.get("main_grad") for c in contenders.values()):
        into = torch.zeros_like(weight, dtype=torch.float32)
    rows: dict[str, Row] = {}
    runs: dict[str, Callable] = {}
    for name, c in contenders.items():
        row = rows[name] = results.stamp(group, name, version_of(c))
        if isinstance(c, str):
            row |= dict(status="absent", reason=c)
        elif reason := c.why_not(mode):
            row |= dict(status="not offered", reason=reason)
        else:
            results.note(row)
            try:
                run = make_run(c, mode, truth.inputs, group["layout"], into if c.settings.get("main_grad") else None)
                row |= c.settings | dict(per_token=c.per_token) | _weigh(c, group, truth, gate, run, into)
                runs |= {name: run} if row["status"] == "timed" else {}
            except Exception as e:
                row |= failure(e)
                _clear(weight.device, results, row)
            finally:
                results.note(None)
        if row["status"] == "wrong" and name.startswith(OURS):
            raise SystemExit(f"{name} is wrong in mode {mode}: {row['reason']}; nothing is timed")
    if runs:
        _time(group, truth.inputs, rows, runs, results, repeats, seconds)
    results.add(rows.values())
    for row in rows.values():
        if row["status"] not in ("absent", "not offered"):
            tqdm.write(line(row))


def _weigh(c: Contender, group: Row, truth: Truth, gate: Gate, run: Callable, into: Tensor | None) -> Row:
    """status timed or wrong, its errors, its peak above inputs and what it returns."""
    mode, where = group["mode"], truth.inputs.weight.device
    into = into if c.settings.get("main_grad") else None
    if wrong := gate.verdict(c, mode):
        return dict(status="wrong", reason=f"on a small shape: {wrong}")
    found = errors(c, mode, truth, group["layout"], into)
    if wrong := judge(c, mode, found, truth.inputs.weight.dtype):
        return found | dict(status="wrong", reason=wrong)
    return found | dict(status="timed", peak_mib=peak_bytes(run, where) / 2**20)


def version_of(c: Contender | str) -> str:
    return "" if isinstance(c, str) else c.version


def failure(e: Exception) -> Row:
    return dict(status="failed", reason=f"{type(e).__name__}: {first_line(e)}")


def release(where: torch.device) -> None:
    """Give back what nobody refers to."""
    gc.collect()
    if where.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def _clear(where: torch.device, results: Results, row: Row) -> None:
    """After a failure: free what it left. Raises DeviceLost where the CUDA context did not survive it."""
    try:
        release(where)
    except Exception as e:
        results.add([row | {"fatal": True}])
        raise DeviceLost(f"{row['impl']} broke the CUDA context: {row['reason']}") from e


def _time(
    group: Row, x: Inputs, rows: dict[str, Row], runs: dict, results: Results, repeats: int, seconds: float | None
) -> None:
    where, (_, floor, _) = x.hidden.device, MODES[group["mode"]]
    broken: set[str] = set()

    def guarded(name: str) -> Callable[[], object]:
        def run() -> object:
            if name in broken:
                return None
            try:
                return runs[name]()
            except Exception as e:
                broken.add(name)
                rows[name] |= failure(e)
                return _clear(where, results, rows[name])

        return run

    def product() -> None:
        for part in x.hidden.split(FLOOR_ROWS):
            torch.mm(part, x.weight.T)

    turns = {"": product} | {name: guarded(name) for name in runs}
    with tqdm(total=repeats * len(turns), desc=describe(group), unit="run", leave=False) as bar:
        times = take_turns(turns, where, repeats, seconds, tick=bar.update)
    gemm = quantiles(times.pop(""))[1]
    share = len(x.loss_rows) / len(x.targets)
    work = 2 * floor * len(x.loss_rows) * x.weight.numel()
    for name in runs:
        if name in broken:
            continue
        q20, q50, q80 = quantiles(times[name])
        rows[name] |= dict(
            ms=q50, ms_20=q20, ms_80=q80, samples=len(times[name]), floor_gemms=floor, gemm_ms=gemm,
            ratio_to_floor=q50 / (floor * gemm * share), tflops=work / q50 / 1e9,
        )  # fmt: skip
        if name.startswith(OURS):
            size = {k: rows[name][k] for k in ("workspace_mb", "main_grad")}
            n = len(x.loss_rows) if group["layout"] == "compact" else len(x.targets)
            bytes_ = formula_bytes(group["mode"], n, *x.weight.shape[::-1], x.hidden.dtype, where, **size)
            rows[name]["formula_mib"] = bytes_ / 2**20


def describe(group: Row) -> str:
    layout = "" if group["layout"] == "dense" else f" {group['ratio']:g} {group['layout']}"
    return f"{group['shape']} {group['rows']} rows{layout} {group['logits']} {group['mode']}"


def line(row: Row) -> str:
    head = f"{describe(row):44} {row['impl']:28}"
    if row["status"] != "timed":
        return f"{head} {row['status']}: {row['reason']}"
    speed = f"{row['ms']:9.1f} ms {row['ratio_to_floor']:6.2f} × floor {row['tflops']:7.3g} TFLOP/s"
    return f"{head} {speed} {row['peak_mib']:8.0f} MiB"
