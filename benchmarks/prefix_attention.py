"""Attention over a shared prefix: its float64 error on a CPU, its time and bytes against repeated prefixes on a GPU.

`python -m benchmarks.prefix_attention` records the error on the scoreboard; on a GPU it also times, in turns:
replies only, the prefix's keys and values given
  shared         prefix_attention
  repeated       flash attention over keys and values that are copied for every reply
whole sequences, as a trainer's layer meets them
  shared_whole   the prefix once by itself, then the replies by prefix_attention, and back
  repeated_whole flash attention over the sequences, each with its own copy of the prefix
"""

from __future__ import annotations

import argparse
import gc
import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.memory import peak_bytes
from benchmarks.store import Row, fingerprint, machine
from benchmarks.timing import quantiles, take_turns
from genevolve_fast.evaluate.scoreboard import commit, record, write_json
from genevolve_fast.ops import Layout, attention_backward, attention_forward, attention_supported, prefix_attention
from genevolve_fast.ops.prefix_attention import IMPLEMENTATIONS, choose

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from dense_attention import LAYOUTS, NAMES, dense, error, inputs  # noqa: E402

COMMAND = "python -m benchmarks.prefix_attention"
FILE = Path("benchmarks/results/prefix_attention.json")
RED = 2e-2  # more than this from the repeated prefixes is no rounding of bf16


# --- error ------------------------------------------------------------------------------------------------------------


def float64_errors() -> dict[tuple, float]:
    """(layout, kv_heads, name) -> relative error of out and the gradients; those that are 0 are left out."""
    found = {}
    for (name, layout), kv_heads in itertools.product(LAYOUTS.items(), (1, 2, 4)):
        q, k, v, prefix_k, prefix_v, d_out = given = inputs(layout, kv_heads=kv_heads)
        into = None if prefix_k is None else (torch.zeros_like(prefix_k), torch.zeros_like(prefix_v))
        out, lse = attention_forward(q, k, v, layout, prefix_k, prefix_v, scale=0.3)
        grads = attention_backward(d_out, q, k, v, out, lse, layout, prefix_k, prefix_v, into, scale=0.3)
        want = dense(*given, layout, 0.3)
        for what, x in zip(NAMES, (out, *grads, *(into or ())), strict=False):
            if want[what].norm() > 1e-12:
                found[name, kv_heads, what] = error(x, want[what])
    return found


# --- time and bytes ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """K replies of `reply` tokens after one prefix."""

    k: int
    prefix: int
    reply: int
    heads: int
    kv_heads: int
    d: int

    def tensors(self, device: torch.device) -> dict[str, Tensor]:
        torch.manual_seed(0)
        sizes = {
            "q": (self.k * self.reply, self.heads), "k": (self.k * self.reply, self.kv_heads),
            "v": (self.k * self.reply, self.kv_heads), "prefix_q": (self.prefix, self.heads),
            "prefix_k": (self.prefix, self.kv_heads), "prefix_v": (self.prefix, self.kv_heads),
        }  # fmt: skip
        dtype = torch.bfloat16
        return {n: torch.randn(*s, self.d, device=device).to(dtype).requires_grad_() for n, s in sizes.items()}

    @property
    def replies(self) -> Layout:
        borders = tuple(i * self.reply for i in range(self.k + 1))
        return Layout(borders, ((0, self.prefix),) * self.k)


def repeated(x: Tensor, prefix: Tensor, k: int) -> Tensor:
    """[K·(prefix + reply), heads, d]: a copy of the prefix before every reply."""
    replies = x.unflatten(0, (k, -1))
    return torch.cat([prefix.expand(k, *prefix.shape), replies], 1).flatten(0, 1)


def later_queries(q: Tensor, k: Tensor, v: Tensor, case: Case) -> Tensor:
    """Causal attention of each reply's queries over prefix and reply, by flash attention with longer keys."""
    whole = case.prefix + case.reply
    if q.is_cuda:
        ends = torch.arange(case.k + 1, dtype=torch.int32, device=q.device)
        return torch.ops.aten._flash_attention_forward(
            q, k, v, ends * case.reply, ends * whole, case.reply, whole, 0.0, True, return_debug_mask=False,
            scale=case.d**-0.5,
        )[0]  # fmt: skip
    parts = [x.unflatten(0, (case.k, -1)).transpose(1, 2) for x in (q, k, v)]
    mask = torch.ones(case.reply, whole, dtype=torch.bool).tril(case.prefix)
    return F.scaled_dot_product_attention(*parts, attn_mask=mask, enable_gqa=True).transpose(1, 2).flatten(0, 1)


def shared(t: dict[str, Tensor], case: Case, impl: str) -> Tensor:
    return prefix_attention(t["q"], t["k"], t["v"], case.replies, t["prefix_k"], t["prefix_v"], impl=impl)


def shared_whole(t: dict[str, Tensor], case: Case, impl: str) -> Tensor:
    alone = prefix_attention(t["prefix_q"], t["prefix_k"], t["prefix_v"], Layout((0, case.prefix)), impl=impl)
    return torch.cat([alone, shared(t, case, impl)])


def repeated_kv(t: dict[str, Tensor], case: Case, impl: str) -> Tensor:
    keys, values = (repeated(t[n], t[f"prefix_{n}"], case.k) for n in "kv")
    return later_queries(t["q"], keys, values, case)


def repeated_whole(t: dict[str, Tensor], case: Case, impl: str) -> Tensor:
    q, k, v = (repeated(t[n], t[f"prefix_{n}"], case.k) for n in "qkv")
    whole = case.prefix + case.reply
    return prefix_attention(q, k, v, Layout(tuple(i * whole for i in range(case.k + 1))), impl=impl)


PAIRS = {"replies": ("shared", "repeated"), "whole": ("shared_whole", "repeated_whole")}
CALLS = dict(shared=shared, repeated=repeated_kv, shared_whole=shared_whole, repeated_whole=repeated_whole)


def forward_run(call: Callable, t: dict[str, Tensor], case: Case, impl: str) -> Callable[[], list[Tensor]]:
    def run() -> list[Tensor]:
        with torch.no_grad():
            return [call(t, case, impl)]

    return run


def backward_run(call: Callable, t: dict[str, Tensor], case: Case, impl: str) -> Callable[[], list[Tensor]]:
    """Forward and backward; the gradients are what is returned."""

    def run() -> list[Tensor]:
        out = call(t, case, impl)
        used = [x for n, x in t.items() if n != "prefix_q" or call in (shared_whole, repeated_whole)]
        return list(torch.autograd.grad(out, used, torch.ones_like(out)))

    return run


def gate(t: dict[str, Tensor], case: Case, impl: str) -> float:
    """Largest relative difference of out and gradients from the repeated prefixes; nothing is timed above RED."""
    found = []
    for run in (forward_run, backward_run):
        mine, theirs = (run(call, t, case, impl)() for call in (shared, repeated_kv))
        found += [error(a, b.double()) for a, b in zip(mine, theirs, strict=True)]
    return max(found)


def measure(case: Case, impl: str, device: torch.device, rounds: int, seconds: float) -> list[Row]:
    """One row for each pass and pair: milliseconds, peak MiB, and the ratio of times and of bytes."""
    t = case.tensors(device)
    impl = choose(impl, t["q"])
    if not (worst := gate(t, case, impl)) <= RED:
        raise SystemExit(f"{case} by {impl} is {worst:.2g} from the repeated prefixes: nothing is timed")
    rows = []
    for (pair, names), (pass_, make) in itertools.product(
        PAIRS.items(), (("forward", forward_run), ("forward+backward", backward_run))
    ):
        runs = {name: make(CALLS[name], t, case, impl) for name in names}
        peaks = {}
        for name, run in runs.items():
            peaks[name] = peak_bytes(run, device) / 2**20
            gc.collect()
        times = {name: quantiles(ms) for name, ms in take_turns(runs, device, rounds, seconds).items()}
        mine, theirs = names
        row = dict(
            pair=pair, K=case.k, prefix=case.prefix, reply=case.reply, heads=case.heads, kv_heads=case.kv_heads,
            d=case.d, dtype="bfloat16", impl=impl, **{"pass": pass_}, error=worst,
            ms={n: dict(zip(("q20", "median", "q80"), times[n], strict=True)) for n in names},
            peak_mib={n: round(peaks[n], 2) for n in names},
            speedup=times[theirs][1] / times[mine][1], memory_ratio=peaks[mine] / max(peaks[theirs], 1e-9),
        )  # fmt: skip
        print(
            f"K {case.k:2} prefix {case.prefix:5} {impl:10} {pair:7} {pass_:16} {times[mine][1]:9.3f} ms, repeated "
            f"{times[theirs][1]:9.3f} ms: {row['speedup']:.2f}x; {peaks[mine]:8.1f} MiB, repeated {peaks[theirs]:8.1f}",
            flush=True,
        )
        rows.append(row)
    return rows


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog=COMMAND, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--k", type=int, nargs="+", default=[4, 8, 16], help="replies of a group (default: %(default)s)")
    p.add_argument("--prefix", type=int, nargs="+", default=[2048, 6144, 16384], help="tokens (default: %(default)s)")
    p.add_argument("--reply", type=int, default=2048, help="tokens of each reply (default: %(default)s)")
    p.add_argument("--impls", nargs="+", default=["auto"], choices=["auto", *IMPLEMENTATIONS])
    p.add_argument("--rounds", type=int, default=20)
    p.add_argument("--seconds", type=float, default=1.0, help="of each contender (default: %(default)s)")
    p.add_argument("--file", type=Path, default=FILE, help="(default: %(default)s)")
    p.add_argument("--commit", help="what to record where the tree is a copy that git does not know")
    p.add_argument("--dry-run", action="store_true", help="toy sizes on the CPU; nothing is written")
    args = p.parse_args(argv)
    errors = float64_errors()
    worst = max(errors, key=errors.get)
    print(f"float64 against the dense softmax: {errors[worst]:.2g} at most ({', '.join(map(str, worst))})")
    if args.dry_run:
        for k, impl in itertools.product((2, 3), args.impls):
            measure(Case(k, 24, 8, 4, 2, 16), impl, torch.device("cpu"), 2, 0.1)
        return 0
    record("step/prefix_attention_error_f64", errors[worst], n=len(errors), command=COMMAND, at=args.commit)
    if not torch.cuda.is_available():
        print("no GPU: time and bytes against repeated prefixes are not measured")
        return 0
    device = torch.device("cuda")
    data: dict = {"machine": machine(device), "rows": []}
    stamp = dict(commit=args.commit or commit(), code=fingerprint(), date=date.today().isoformat())
    for impl in args.impls:
        if impl != "auto" and (reason := attention_supported(impl, device, torch.bfloat16, 128)):
            print(f"{impl} is left out: {reason}")
            continue
        for k, prefix in itertools.product(args.k, args.prefix):
            rows = measure(Case(k, prefix, args.reply, 32, 8, 128), impl, device, args.rounds, args.seconds)
            data["rows"] += [r | stamp for r in rows]
            write_json(args.file, data)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
