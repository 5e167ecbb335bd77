"""Fresh clone to finished demo, timed: `python -m benchmarks.demo --clone DIR`."""

from __future__ import annotations

import argparse
import subprocess
import time
from pathlib import Path

from genevolve_fast.evaluate.scoreboard import record

ROOT = Path(__file__).parents[1]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--clone", type=Path, required=True, help="folder to clone into; must not exist")
    args = p.parse_args()
    begin = time.time()
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(args.clone)], check=True)
    subprocess.run(["make", "demo"], cwd=args.clone, check=True)
    record("loop/demo_minutes", (time.time() - begin) / 60, n=1, command="python -m benchmarks.demo --clone DIR")


if __name__ == "__main__":
    main()
