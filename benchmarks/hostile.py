"""Hostile search results, files and addresses against the live tools: `python -m benchmarks.hostile`."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from genevolve_fast.evaluate.scoreboard import record
from genevolve_fast.policy.codec import TransformersCodec
from genevolve_fast.sandbox.tiny_policy import start_path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from loopback.hostile import Arena, Canary, Case, PeakMemory, cases  # noqa: E402
from loopback.web import LoopbackWeb  # noqa: E402

MEMORY_LIMIT = 400 << 20  # two decoders at 20 megapixels, one search answer parsed


def run(chosen: Sequence[Case]) -> tuple[list[str], int]:
    """(failures, largest growth of resident bytes in one case)."""
    failures, largest = [], 0
    with LoopbackWeb() as web, Canary() as canary, tempfile.TemporaryDirectory() as folder:
        arena = Arena(web, canary, TransformersCodec.from_pretrained(start_path()), Path(folder))
        arena.run(chosen[0])  # imports and first connections are not growth
        for case in chosen:
            with PeakMemory() as memory:
                wrong = arena.run(case)
            if not wrong and memory.growth > MEMORY_LIMIT:
                wrong = f"grew by {memory.growth >> 20} MiB"
            largest = max(largest, memory.growth)
            if wrong:
                failures.append(f"{case.name}: {wrong}")
    return failures, largest


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--only", default="", help="cases whose name contains this; nothing is recorded")
    args = p.parse_args()
    chosen = [case for case in cases() if args.only in case.name]
    started = time.monotonic()
    failures, largest = run(chosen)
    print("\n".join(failures))
    seconds = time.monotonic() - started
    print(f"{len(chosen)} cases, {len(failures)} failures, {seconds:.0f} s, largest growth {largest / 2**20:.0f} MiB")
    if not args.only:
        record("serve/hostile_failures", len(failures), n=len(chosen), command="python -m benchmarks.hostile")


if __name__ == "__main__":
    main()
