"""Ten thousand malformed model replies through parser and session: `python -m benchmarks.fuzz`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from genevolve_fast.evaluate.scoreboard import record

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from fuzz_replies import fuzz  # noqa: E402


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--replies", type=int, default=10_000)
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args()
    failures = fuzz(args.replies, args.seed)
    print("\n".join(failures[:10]))
    record("loop/fuzz_failures", len(failures), n=args.replies, command="python -m benchmarks.fuzz")


if __name__ == "__main__":
    main()
