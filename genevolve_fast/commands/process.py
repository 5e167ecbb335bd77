"""`process-data`: rows of process-driven generation, built and verified."""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path

from genevolve_fast.commands.batches import follow, open_bar, tell_end
from genevolve_fast.commands.opening import AddCommand, read_section, show_fields

SUBSETS = ("multi_turn", "instruction_conflict", "image_alignment")


def add(command: AddCommand) -> None:
    """Add the parsers of this module."""
    p = command(
        "process-data",
        run_process_data,
        "Build rows of plan, sketch, inspect and refine in the world of strokes. multi_turn grows a request in "
        "increments and rewrites drafts; instruction_conflict mends plans that contradict the request; image_alignment "
        "holds drafts against their plans. Every draft is judged; what fails is left out and counted by its reason. "
        "Started again, it continues.",
        "genevolve-fast process-data --subset all --count 2000 --seed 0 --out data/strokes",
    )
    p.add_argument("--subset", choices=[*SUBSETS, "all"], default="all", help="all: a half, a quarter and a quarter")
    p.add_argument("--count", type=int, default=1000, help="requests to build rows from (default: %(default)s)")
    p.add_argument("--seed", type=int, default=0, help="of requests and rows (default: %(default)s)")
    p.add_argument("--out", type=Path, required=True, help="folder to write")
    p.add_argument("--split", choices=["train", "held_out"], default="train", help="(default: %(default)s)")
    p.add_argument("--categories", help="comma-separated (default: GenEval's six, and three times complex)")
    p.add_argument(
        "--sampler", metavar="MODULE:FUNCTION",
        help="whose wrong cycles are corrected: (request, seed) -> process.builders.Attempt of each sampled cycle "
        "(default: plans and drafts corrupted by rule)",
    )  # fmt: skip
    p.add_argument("--no-places", action="store_true", help="plans do not say in which cell a figure stands")
    p.add_argument("--tokenizer", help="also count tokens: a model's folder or hub name, or sandbox:start")
    p.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="a filter of the rows")
    p.add_argument("--fields", action="store_true", help="list the filters and stop")


def run_process_data(args: argparse.Namespace) -> int:
    from genevolve_fast.process.rows import ProcessFilters, build_rows, table

    if args.fields:
        return show_fields(ProcessFilters)
    filters, settings = read_section(ProcessFilters, {}, args.set, "--set", "filters"), _settings(args)
    codec = _codec(args.tokenizer) if args.tokenizer else None
    jobs = stroke_jobs(args)
    with open_bar(len(jobs), "process-data") as bar:
        made, tally = asyncio.run(build_rows(args.out, jobs, settings, filters, codec=codec, progress=follow(bar)))
    from genevolve_fast.incidents import Incidents

    status = tell_end(tally, tally.line(), Incidents())
    print(f"\n{table(made)}\nwritten to {args.out}")
    return status or int(not made["rows"])


def stroke_jobs(args: argparse.Namespace) -> list:
    """A job a request, of the subsets in turn. Raises BatchError."""
    from genevolve_fast.process.builders import Corrupter, image_alignment, instruction_conflict, multi_turn
    from genevolve_fast.process.rows import Job
    from genevolve_fast.sandbox.stroke_data import workshop
    from genevolve_fast.sandbox.strokes import requests

    shop = workshop(args.split, tell_places=not args.no_places)
    own = _sampler(args.sampler) if args.sampler else None
    sampler = own or Corrupter(shop)
    turns = (SUBSETS[0], SUBSETS[1], SUBSETS[0], SUBSETS[2]) if args.subset == "all" else (args.subset,)
    categories = _categories(args)
    jobs = []
    for n, request in enumerate(requests(args.split, args.seed, args.count, categories)):
        turn, again = n // len(categories) % len(turns), n // len(categories) // len(turns)
        build = {
            "multi_turn": lambda r=request: multi_turn(r, shop, args.seed),
            "instruction_conflict": lambda r=request: instruction_conflict(r, shop, args.seed, sampler),
            "image_alignment": lambda r=request, k=again: image_alignment(r, shop, args.seed, k % 2 == 0, own),
        }[turns[turn]]
        jobs.append(Job(f"{turns[turn]}-{request.id}", turns[turn], request.category, build))
    return jobs


# --- what was asked ---------------------------------------------------------------------------------------------------


def _categories(args: argparse.Namespace) -> tuple[str, ...]:
    from genevolve_fast.resumable import BatchError
    from genevolve_fast.sandbox.strokes import CATEGORIES, COMPLEX

    if not args.categories:
        return (*CATEGORIES, COMPLEX, COMPLEX, COMPLEX)
    asked = tuple(c.strip() for c in args.categories.split(",") if c.strip())
    if not asked or (unknown := set(asked) - {*CATEGORIES, COMPLEX}):
        told = ", ".join(sorted(unknown)) if asked else args.categories
        raise BatchError(f"--categories {told}: they are {', '.join((*CATEGORIES, COMPLEX))}")
    return asked


def _settings(args: argparse.Namespace) -> dict:
    from genevolve_fast.resumable import BatchError

    if args.count < 1:
        raise BatchError("--count must be at least 1")
    if args.sampler and args.subset == "multi_turn":
        raise BatchError("--sampler would do nothing: multi_turn rows come from graphs, without wrong cycles")
    names = ("subset", "seed", "split", "sampler")  # not the count: more of the same may follow
    settings = {name: getattr(args, name) for name in names}
    return settings | {"categories": list(_categories(args)), "places": not args.no_places}


def _sampler(name: str):
    import importlib

    from genevolve_fast.process.builders import ModelSampler
    from genevolve_fast.resumable import BatchError

    module, colon, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function) if colon else None
    except (ImportError, AttributeError, ValueError) as error:
        raise BatchError(f"--sampler {name}: {error}") from None
    if not callable(found):
        raise BatchError(f"--sampler takes MODULE:FUNCTION, not {name!r}")
    return ModelSampler(found)


def _codec(name: str):
    from genevolve_fast.policy.codec import TransformersCodec
    from genevolve_fast.resumable import BatchError

    if name == "sandbox:start":
        from genevolve_fast.sandbox.tiny_policy import start_path

        name = str(start_path())
    try:
        return TransformersCodec.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise BatchError(f"--tokenizer {name}: {str(error).splitlines()[0]}") from None
