"""`wise`: pictures of the WISE prompts judged into its score files."""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path

from genevolve_fast.commands.batches import follow, open_bar, tell_end
from genevolve_fast.commands.opening import AddCommand


def add(command: AddCommand) -> None:
    """Add the parsers of this module."""
    p = command(
        "wise",
        run_wise,
        "Judge pictures of the WISE prompts and print the six categories beside the published rows; or only print what "
        "score files hold.",
        "genevolve-fast wise --data WISE_legacy/data --images runs/wise/pictures --output-dir runs/wise/scores "
        "--judge-model gpt-4o-2024-05-13 --judge-base-url https://api.openai.com/v1 --judge-api-key-env OPENAI_API_KEY",
    )
    p.add_argument("--data", type=Path, help="data folder of WISE, or one of its files")
    p.add_argument("--images", type=Path, help="folder of {prompt_id}.png")
    p.add_argument("--output-dir", type=Path, help="folder of the score files; started again, it continues")
    p.add_argument("--name", default="this run", help="how the table names it (default: %(default)s)")
    p.add_argument("--score-only", type=Path, nargs="+", metavar="FILE", help="print what these score files hold")
    p.add_argument("--fresh", action="store_true", help="forget the judgements that the folder already holds")
    add_wise_flags(p)


def add_wise_flags(p: argparse.ArgumentParser) -> None:
    p.add_argument("--protocol", choices=["original", "verified"], help="(default: by the names of the data files)")
    p.add_argument("--judge-model", help="name of the judging model")
    p.add_argument("--judge-base-url", help="chat server of the judge")
    p.add_argument("--judge-api-key-env", metavar="NAME", help="environment variable with its key, if it needs one")
    p.add_argument("--judge-parallel", type=int, default=8, help="judgements at a time (default: %(default)s)")


def run_wise(args: argparse.Namespace) -> int:
    from genevolve_fast.evaluate.wise import PROTOCOLS, pictures_in, read_prompts, read_scores, summary, table
    from genevolve_fast.resumable import BatchError

    if args.score_only:
        useless = [n for n in ("data", "images", "output_dir", "judge_model", "judge_base_url") if getattr(args, n)]
        if useless or args.fresh:
            raise BatchError(
                "--score-only reads score files and nothing else: give it alone, with --protocol and --name"
            )
        protocol = PROTOCOLS[args.protocol or "original"]
        made = summary(protocol, read_scores(args.score_only, protocol))
        print(table(args.name, made))
        return 0 if made["judged"] else 1
    missing = [f"--{n.replace('_', '-')}" for n in ("data", "images", "output_dir") if getattr(args, n) is None]
    if missing:
        raise BatchError(f"{', '.join(missing)} is missing: what is judged, and where the scores go")
    protocol, prompts = read_prompts(args.data, args.protocol)
    if not args.images.is_dir():
        raise BatchError(f"--images {args.images} is no folder")
    return judge_pictures(args, protocol, prompts, pictures_in(args.images, prompts), args.output_dir, args.name)


def judge_pictures(
    args: argparse.Namespace, protocol, prompts: Sequence, pictures: Mapping[int, Path], folder: Path, name: str
) -> int:
    """Judge, write the score files and summary.json, print the table.

    Exit status 1 when no picture is judged or judging gave up, 128 + signal when it was interrupted.
    """
    from genevolve_fast.evaluate.wise import WiseScoring, summary, table
    from genevolve_fast.files import write_text
    from genevolve_fast.resumable import BatchError

    if not pictures:
        raise BatchError("there is no picture to judge: they are named {prompt_id}.png")
    judge_address(args)  # before anything is forgotten
    scoring = WiseScoring(protocol, prompts, pictures, folder.resolve(), args.judge_model, args.fresh)
    with closing(scoring):
        try:
            status = _judge(args, scoring) if scoring.todo() else 0
        finally:
            scoring.write()
        made = summary(protocol, {g.prompt.prompt_id: g.scores for g in scoring.graded()})
    write_text(folder / "summary.json", json.dumps(made | {"judge": args.judge_model}, indent=1))
    print(f"\n{table(name, made)}\njudged by {args.judge_model}; written to {folder}")
    return status or int(not made["judged"])


def _judge(args: argparse.Namespace, scoring) -> int:
    """Judge what is left; returns the exit status of what ended early, else 0."""
    from genevolve_fast.evaluate.wise import WiseJudge, open_wise_chat
    from genevolve_fast.incidents import Incidents

    incidents, todo = Incidents(), scoring.todo()
    chat = open_wise_chat(args.judge_model, *judge_address(args), args.judge_parallel, incidents)
    judge = WiseJudge(chat, scoring.protocol)
    with open_bar(len(todo), "wise", "picture") as bar:
        counts = asyncio.run(scoring.run(judge, parallel=args.judge_parallel, progress=follow(bar)))
    return tell_end(counts, counts.line(), incidents)


def judge_address(args: argparse.Namespace) -> tuple[str, str]:
    """(base URL, key) of the judge. Raises BatchError naming the flag that is missing or wrong."""
    import os

    from genevolve_fast.net.chat import NO_KEY, checked_base_url, checked_key
    from genevolve_fast.resumable import BatchError

    if args.judge_parallel < 1:
        raise BatchError("--judge-parallel must be at least 1")
    for name, what in (("judge_model", "who grades the pictures"), ("judge_base_url", "where the judge is served")):
        if not getattr(args, name):
            raise BatchError(f"--{name.replace('_', '-')} is missing: {what}")
    key = os.environ.get(args.judge_api_key_env, "") if args.judge_api_key_env else NO_KEY
    if not key:
        raise BatchError(f"--judge-api-key-env: {args.judge_api_key_env} is not set")
    try:
        return checked_base_url(args.judge_base_url), checked_key(key)
    except ValueError as error:
        raise BatchError(f"the judge's server: {error}") from None
