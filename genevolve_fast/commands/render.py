"""`render`: programs to pictures."""

from __future__ import annotations

import argparse
from pathlib import Path

from genevolve_fast.commands.opening import AddCommand


def add(command: AddCommand) -> None:
    """Add the parsers of this module."""
    p = command(
        "render",
        run_render,
        "Draw the programs of a results.json with the sandbox's canvas; finished rows are skipped.",
        "genevolve-fast render --input runs/demo/bench/after/results.json --output-dir runs/pictures",
    )
    p.add_argument("--input", type=Path, required=True, help="results.json of a bench or a rollout")
    p.add_argument("--output-dir", type=Path, required=True, help="folder for the pictures and their results.json")
    p.add_argument("--seed", type=int, default=0, help="seed of the renderer (default: %(default)s)")


def run_render(args: argparse.Namespace) -> int:
    from genevolve_fast.render.batch import render_results
    from genevolve_fast.sandbox.canvas import CanvasRenderer

    done, failed = render_results(args.input, args.output_dir, CanvasRenderer(), args.seed)
    print(f"{done} pictures in {args.output_dir}, {failed} rows without one")
    return 1 if failed and not done else 0
