"""How often the image judge agrees with the truth: `python -m benchmarks.judges`."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

from genevolve_fast.evaluate.scoreboard import record
from genevolve_fast.sandbox.canvas import draw_scene
from genevolve_fast.sandbox.judges import judge_picture

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from defects import cases  # noqa: E402


def measure(count: int, seed: int) -> dict[str, float]:
    """Agreement of each dimension over `count` scenes with one known defect each; prints every disagreement's kind."""
    wrong: dict[str, Counter] = {}
    for case in cases(count, seed):
        verdict = judge_picture(case.scene, case.picture, draw_scene(case.scene))
        for name, truth in case.truth.items():
            said = getattr(verdict, name)
            wrong.setdefault(name, Counter())[f"{case.defect}: {truth} judged {said}"] += said != truth
    out = {}
    for name, kinds in wrong.items():
        out[name] = 1 - sum(kinds.values()) / count
        print(f"{name:20} {out[name]:.4f}  {', '.join(f'{k} ×{n}' for k, n in kinds.most_common(3) if n)}")
    return out


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--scenes", type=int, default=500)
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args()
    agreement = measure(args.scenes, args.seed)
    record("loop/judge_agreement", min(agreement.values()), n=args.scenes, command="python -m benchmarks.judges")


if __name__ == "__main__":
    main()
