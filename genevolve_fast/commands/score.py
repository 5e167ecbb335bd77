"""`score`: pictures of a results.json judged into the released score files."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Sequence
from contextlib import closing, nullcontext
from pathlib import Path

from genevolve_fast.commands.batches import follow, open_bar, tell_end
from genevolve_fast.commands.judging import add_judge_flags, judge_settings, open_judges
from genevolve_fast.commands.opening import AddCommand


def add(command: AddCommand) -> None:
    """Add the parsers of this module."""
    p = command(
        "score",
        run_score,
        "Judge the pictures of a results.json; writes results_eval.json, summary.json and summary.csv as the released "
        "evaluator does. Started again, it judges what is left and what failed.",
        "genevolve-fast score --results runs/qwen/results.json --gt-root GenEvolve-Bench --judge-model gemini-3.1-pro",
    )
    p.add_argument("--results", type=Path, required=True, help="results.json with pictures, of any of the two runtimes")
    p.add_argument(
        "--gt-root", type=Path, action="append", default=[], help="where gt_image is relative to, repeatable"
    )
    p.add_argument("--output-dir", type=Path, help="folder of the score files (default: that of --results)")
    p.add_argument("--name", help="how the table names it (default: the folder of --results)")
    p.add_argument("--fresh", action="store_true", help="forget the judgements that the folder already holds")
    add_score_flags(p)


def add_score_flags(p: argparse.ArgumentParser) -> None:
    p.add_argument("--total-cases", type=int, default=0, help="denominator of missing-as-zero (default: all rows)")
    p.add_argument(
        "--price", action="append", default=[], metavar="NAME=DOLLARS",
        help="what one million_tokens, search, image_search, picture or judgement costs, repeatable",
    )  # fmt: skip
    add_judge_flags(p)


def run_score(args: argparse.Namespace) -> int:
    folder = (args.output_dir or args.results.parent).resolve()
    return score_results(args, args.results, folder, args.gt_root, name=args.name or args.results.resolve().parent.name)


def score_results(
    args: argparse.Namespace,
    results: Path,
    folder: Path,
    truth_roots: Sequence[Path],
    *,
    name: str,
    sampled_tokens: int | None = None,
    stages=None,
) -> int:
    """Judge, write the score files, evaluation.json and diagnostics.json, print the tables.

    `stages` (bench.Stages) keeps the time of a bench. Exit status 1 when no picture is judged or judging gave up,
    128 + signal when it was interrupted.
    """
    from genevolve_fast.evaluate import diagnostics, tracks
    from genevolve_fast.evaluate.score import Scoring
    from genevolve_fast.evaluate.score_files import read_rows, roots_of
    from genevolve_fast.files import write_text
    from genevolve_fast.incidents import Incidents
    from genevolve_fast.resumable import BatchError

    prices = _prices(args.price)
    if args.total_cases < 0:
        raise BatchError("--total-cases cannot be negative")
    rows, roots, settings = read_rows(results), roots_of(results, truth_roots), judge_settings(args)
    if 0 < args.total_cases < len(rows):
        raise BatchError(f"--total-cases {args.total_cases} is less than the {len(rows)} rows of {results}")
    incidents = Incidents()
    if args.fresh:
        open_judges(args, incidents)  # before anything is forgotten
    scoring = Scoring(rows, folder, settings, roots=roots, programs=args.judge_programs, fresh=args.fresh)
    with closing(scoring):
        if scoring.adopted:
            print(f"{scoring.adopted} rows of an earlier results_eval.json are kept, whatever judge scored them")
        if missing := scoring.without_truth:
            first = rows[missing[0]].get("gt_image")
            print(
                f"{len(missing)} of {len(rows)} rows have a picture but no ground truth and are not judged: gt_image "
                f"{str(first)[:200]!r} is looked up beside {results}, here, and in each --gt-root",
                file=sys.stderr,
            )
        try:
            with stages.timed("score") if stages else nullcontext():
                status = _judge(args, scoring, incidents)
        finally:
            made = scoring.write(args.total_cases)
        evaluation = tracks.tracks(scoring.evaluated_rows(), args.total_cases)
        programs = [line["program_score"] for line in scoring.verdicts("program").values()]
        found = diagnostics.diagnose(
            rows,
            roots=roots,
            sampled_tokens=sampled_tokens,
            seconds=stages.seconds if stages else None,
            program_scores=programs,
            judged=len(scoring.verdicts("image")),
            prices=prices,
        )
    write_text(folder / "evaluation.json", json.dumps(evaluation, indent=1))
    write_text(folder / "diagnostics.json", json.dumps(found, indent=1))
    print(f"\n{tracks.table(evaluation)}\n\n{diagnostics.table(found)}\n")
    if args.judge != "sandbox":  # its rules judge pictures that no published row drew
        print(f"{tracks.beside_published(name, settings['judge'], made)}\n")
    print(f"written to {folder}")
    return status or int(not made["all"]["count_eval_success"])


def _judge(args: argparse.Namespace, scoring, incidents) -> int:
    """Judge what is left; returns the exit status of what ended early, else 0."""
    todo = scoring.todo()
    if not todo:
        return 0
    image_judge, program_judge = open_judges(args, incidents)
    with open_bar(len(todo), "score", "judgement") as bar:
        run = scoring.run(image_judge, program_judge, parallel=args.judge_parallel, progress=follow(bar))
        counts = asyncio.run(run)
    return tell_end(counts, counts.line(), incidents)


def _prices(pairs: Sequence[str]) -> dict[str, float]:
    from genevolve_fast.evaluate.diagnostics import PRICES
    from genevolve_fast.resumable import BatchError

    out = {}
    for pair in pairs:
        name, _, value = pair.partition("=")
        if name not in PRICES:
            raise BatchError(f"--price {name}: there are prices of {', '.join(PRICES)}")
        try:
            out[name] = float(value)
        except ValueError:
            raise BatchError(f"--price {name} takes dollars, not {value!r}") from None
        if not 0 <= out[name] < float("inf"):
            raise BatchError(f"--price {name} takes dollars, not {value!r}")
    return out
