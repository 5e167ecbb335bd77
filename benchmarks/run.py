"""The head's operations against the naive path and the GEMM floor: `python -m benchmarks.run`.

One row per (mode, implementation): time (median, 20 % and 80 % quantile), its ratio to the floor, which is one GEMM of
the same shape timed in the same round times the GEMMs that the mode cannot do without, and peak bytes above inputs and
returned gradients. Implementations take turns, and a mode whose numbers are wrong is not timed.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.memory import peak_bytes
from genevolve_fast.evaluate.scoreboard import commit, device, record
from genevolve_fast.ops import Objective, grpo_sdl, linear_grpo_sdl, linear_logprob
from genevolve_fast.train.run import write_atomic

FLOOR = {"logprob": 1, "frozen": 2, "trainable": 3, "objective": 3, "teacher": 4.3}  # GEMMs of 2·rows·H·V
TIME_TARGETS = {"frozen": 1.0, "trainable": 1.45, "objective": 1.0, "teacher": 1.0}  # of the naive path, on a CPU
RESULTS = Path("benchmarks/results/head.json")


@dataclass
class Inputs:
    """Hidden states [rows, H] and head [V, H] of one shape, sixteen sequences of equal length."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    upstream: Tensor
    advantages: Tensor
    cu_seqlens: Tensor
    teacher: Tensor

    @classmethod
    def make(cls, rows: int, hidden: int, vocabulary: int, dtype: torch.dtype, where: torch.device) -> Inputs:
        torch.manual_seed(0)
        h, t = torch.randn(2, rows, hidden, device=where, dtype=dtype)
        w = (torch.randn(vocabulary, hidden, device=where) * hidden**-0.5 * 3).to(dtype)
        sequences = 16
        return cls(
            h,
            w,
            torch.randint(vocabulary, (rows,), device=where),
            torch.randn(rows, device=where),
            torch.randn(sequences, device=where),
            torch.linspace(0, rows, sequences + 1, device=where).long(),
            h + 0.1 * t,
        )

    def leaves(self, mode: str) -> tuple[Tensor, Tensor]:
        hidden = self.hidden.detach().requires_grad_(mode != "logprob")
        return hidden, self.weight.detach().requires_grad_(mode not in ("logprob", "frozen"))


def ours(mode: str, x: Inputs) -> Callable[[], Iterable[Tensor]]:
    """Losses' gradients by this library; what the closure returns counts as result, not as overhead."""

    def run():
        h, w = x.leaves(mode)
        if mode in ("logprob", "frozen", "trainable"):
            logps = linear_logprob(h, w, x.targets).logps
            loss = (logps * x.upstream).sum()
        else:
            more = {}
            if mode == "teacher":
                index = torch.arange(len(h), device=h.device)
                more = dict(teacher_hidden=x.teacher, teacher_index=index)
            more |= dict(advantages=x.advantages, cu_seqlens=x.cu_seqlens, objective=Objective(kl_coef=0))
            loss, _ = linear_grpo_sdl(h, w, x.targets, **more)
        return finish(loss, h, w)

    return run


def naive(mode: str, x: Inputs) -> Callable[[], Iterable[Tensor]]:
    """The same by full logits and autograd."""

    def logprob(h: Tensor, w: Tensor) -> Tensor:
        return torch.log_softmax((h @ w.T).float(), -1).gather(1, x.targets[:, None])[:, 0]

    def run():
        h, w = x.leaves(mode)
        logps = logprob(h, w)
        if mode in ("logprob", "frozen", "trainable"):
            loss = (logps * x.upstream).sum()
        else:
            teacher = None
            if mode == "teacher":
                with torch.no_grad():
                    teacher = logprob(x.teacher, w)
            seq_ids = torch.searchsorted(x.cu_seqlens[1:], torch.arange(len(h), device=h.device), right=True)
            loss, _ = grpo_sdl(
                logps, advantages=x.advantages, seq_ids=seq_ids, teacher_logps=teacher, objective=Objective(kl_coef=0)
            )
        return finish(loss, h, w)

    return run


def finish(loss: Tensor, h: Tensor, w: Tensor) -> list[Tensor]:
    if loss.requires_grad:
        loss.backward()
    return [loss.detach(), *(x.grad for x in (h, w) if x.grad is not None)]


IMPLEMENTATIONS = {"genevolve_fast (torch)": ours, "naive (full logits)": naive}


def agree(a: Iterable[Tensor], b: Iterable[Tensor], tolerance: float) -> None:
    for x, y in zip(a, b, strict=True):
        error = (x.double() - y.double()).norm() / y.double().norm().clamp(min=1e-30)
        if not error <= tolerance:
            raise SystemExit(f"implementations disagree by {error:.2e}: nothing is timed while results are wrong")


def timed(run: Callable[[], object], where: torch.device) -> float:
    if where.type == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    run()
    if where.type == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - begin)


def measure(modes: list[str], x: Inputs, repeats: int) -> list[dict]:
    """One row per mode and implementation."""
    where, rows = x.hidden.device, []
    for mode in modes:
        runs = {name: make(mode, x) for name, make in IMPLEMENTATIONS.items()}
        agree(*(run() for run in runs.values()), tolerance=1e-4 if x.hidden.dtype == torch.float32 else 3e-2)
        bytes_above = {name: peak_bytes(run, where) for name, run in runs.items()}
        times: dict[str, list[float]] = {name: [] for name in runs}
        gemm: list[float] = []
        for _ in tqdm(range(repeats), desc=mode, unit="round", leave=False):
            gemm.append(timed(lambda: torch.mm(x.hidden, x.weight.T), where))
            for name, run in runs.items():
                times[name].append(timed(run, where))
        floor = FLOOR[mode] * torch.tensor(gemm).median().item()
        for name, each in times.items():
            q20, q50, q80 = torch.tensor(each).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
            rows.append(
                dict(
                    mode=mode,
                    impl=name,
                    ms=q50,
                    ms_20=q20,
                    ms_80=q80,
                    floor_gemms=FLOOR[mode],
                    ratio_to_floor=q50 / floor,
                    peak_mib=bytes_above[name] / 2**20,
                )
            )
            r = rows[-1]
            print(f"{mode:10} {name:24} {q50:9.1f} ms  {r['ratio_to_floor']:5.2f} × floor  {r['peak_mib']:8.1f} MiB")
    return rows


def record_cpu(rows: list[dict], command: str, n: int) -> None:
    """The worst mode against its target: time of the naive path, and a tenth of its memory."""
    by = {(r["mode"], r["impl"]): r for r in rows}
    mine, theirs = IMPLEMENTATIONS
    slowness, memory = [], []
    for mode, allowed in TIME_TARGETS.items():
        a, b = by[mode, mine], by[mode, theirs]
        slowness.append(a["ms"] / b["ms"] / allowed)
        memory.append(a["peak_mib"] / b["peak_mib"])
    record("head/cpu_time_vs_naive", max(slowness), n=n, command=command)
    record("head/cpu_memory_vs_naive", max(memory), n=n, command=command)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--modes", nargs="+", choices=FLOOR, default=list(FLOOR))
    p.add_argument("--rows", type=int, default=4096)
    p.add_argument("--hidden", type=int, default=1024)
    p.add_argument("--vocabulary", type=int, default=32_000)
    p.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--repeats", type=int, default=5)
    args = p.parse_args()
    where = torch.device(args.device)
    x = Inputs.make(args.rows, args.hidden, args.vocabulary, getattr(torch, args.dtype), where)
    rows = measure(args.modes, x, args.repeats)
    shape = {k: getattr(args, k) for k in ("rows", "hidden", "vocabulary", "dtype")}
    result = dict(**shape, device=device(), commit=commit(), torch=torch.__version__, rows_measured=rows)
    write_atomic(RESULTS, json.dumps(result, indent=1) + "\n")
    whole = where.type == "cpu" and (args.rows, args.hidden, args.vocabulary, args.dtype) == (
        4096,
        1024,
        32_000,
        "float32",
    )
    if whole and set(args.modes) == set(FLOOR):
        record_cpu(rows, "python -m benchmarks.run", args.repeats)


if __name__ == "__main__":
    main()
