"""Hostile and odd pictures as references and as answers of services: `python -m benchmarks.hostile_images`."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from genevolve_fast.evaluate.scoreboard import record

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from loopback.canvas_service import LoopbackCanvas  # noqa: E402
from loopback.hostile import PeakMemory  # noqa: E402
from loopback.hostile_images import MEMORY_LIMIT, WAYS, Case, as_answers, as_references, cases  # noqa: E402


def run(chosen: Sequence[Case]) -> tuple[list[str], int]:
    """(failures, largest growth of resident bytes)."""
    failures = []
    with PeakMemory() as memory:
        with tempfile.TemporaryDirectory() as folder:
            failures += [f"{name} as a reference: {said}" for name, said in as_references(chosen, Path(folder)).items()]
        with LoopbackCanvas() as server:
            for way, path in WAYS.items():
                wrong = as_answers(chosen, server, path)
                failures += [f"{name} from {way}: {said}" for name, said in wrong.items()]
    if memory.growth > MEMORY_LIMIT:
        failures.append(f"grew by {memory.growth >> 20} MiB")
    return failures, memory.growth


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--only", default="", help="cases whose name contains this; nothing is recorded")
    p.add_argument("--dry-run", action="store_true", help="record nothing")
    args = p.parse_args()
    chosen = [case for case in cases() if args.only in case.name]
    started = time.monotonic()
    failures, grown = run(chosen)
    print("\n".join(failures))
    seconds = time.monotonic() - started
    print(f"{len(chosen)} pictures, {len(failures)} failures, {seconds:.0f} s, grew by {grown / 2**20:.0f} MiB")
    if not args.only and not args.dry_run:
        command = "python -m benchmarks.hostile_images"
        record("render/hostile_failures", len(failures), n=len(chosen), command=command)


if __name__ == "__main__":
    main()
