"""`process data`: rows of process-driven generation, built and verified."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genevolve_fast.commands.batches import follow, open_bar, tell_end
from genevolve_fast.commands.opening import AddCommand, read_section, show_fields
from genevolve_fast.commands.render import add_renderer_flags, open_chosen_renderer

if TYPE_CHECKING:
    from genevolve_fast.incidents import Incidents
    from genevolve_fast.net.asking import JsonChat
    from genevolve_fast.process.rows import Job
    from genevolve_fast.process.scene_graph import SceneRequest

SUBSETS = ("multi_turn", "instruction_conflict", "image_alignment")
DRAWING = ("temperature", "steps", "shift")  # how a model given as --sampler draws


def add(step: AddCommand) -> None:
    """Add the parser of this module."""
    p = step(
        "data",
        run_process_data,
        "Build rows of plan, sketch, inspect and refine: in the world of strokes, or for your own requests by a chat "
        "model and a renderer. multi_turn grows a request in increments and rewrites drafts; instruction_conflict "
        "mends plans that contradict the request; image_alignment holds drafts against their plans. Every draft is "
        "judged; what fails is left out and counted by its reason. Started again, it continues.",
        "genevolve-fast process data --subset all --count 2000 --out data/strokes\n"
        "  genevolve-fast process data --requests prompts.jsonl --model VLM --base-url http://host/v1 \\\n"
        "    --renderer nano-banana --out data/process",
    )
    p.add_argument("--subset", choices=[*SUBSETS, "all"], default="all", help="all: a half, a quarter and a quarter")
    p.add_argument("--count", type=int, help="requests to build rows from (default: 1000, or all of --requests)")
    p.add_argument("--seed", type=int, default=0, help="of requests and rows (default: %(default)s)")
    p.add_argument("--out", type=Path, required=True, help="folder to write")
    p.add_argument("--parallel", type=int, help="rows at a time, with --requests (default: 4)")
    p.add_argument("--tokenizer", help="also count tokens: a model's folder or hub name, or sandbox:start")
    p.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="a filter of the rows")
    p.add_argument("--fields", action="store_true", help="list the filters and stop")
    own = p.add_argument_group("in the world of strokes")
    own.add_argument("--split", choices=["train", "held_out"], help="(default: train)")
    own.add_argument("--categories", help="comma-separated (default: GenEval's six, and three times complex)")
    own.add_argument(
        "--sampler", metavar="FOLDER|MODULE:FUNCTION",
        help="whose wrong cycles are corrected: a unified model's (the folder that `process train` wrote), or a "
        "function's (request, seed) -> process.builders.Attempt of each sampled cycle (default: plans and drafts "
        "corrupted by rule)",
    )  # fmt: skip
    own.add_argument("--temperature", type=float, help="of the texts of a model given as --sampler (default: 1)")
    own.add_argument("--steps", type=int, help="Euler steps of its drafts (default: 10)")
    own.add_argument("--shift", type=float, help="of the times of its drafts (default: as in its training)")
    own.add_argument("--no-places", action="store_true", help="plans do not say in which cell a figure stands")
    real = p.add_argument_group("for your own requests")
    real.add_argument("--requests", type=Path, help="JSONL of {id, text}, or a text file with a request a line")
    real.add_argument("--model", help="the chat model that reads, writes and looks at drafts; it must see pictures")
    real.add_argument("--base-url", help="its OpenAI-compatible server")
    real.add_argument("--api-key-env", metavar="NAME", help="environment variable with its key")
    real.add_argument(
        "--chat-set", action="append", default=[], metavar="FIELD=VALUE", help="a field of the chat model"
    )
    add_renderer_flags(real, default=None, told=" with --requests")


def run_process_data(args: argparse.Namespace) -> int:
    """Exit status 1 when no row is there or the building gave up, 128 + signal when it was interrupted."""
    from genevolve_fast.incidents import Incidents
    from genevolve_fast.process.rows import ProcessFilters, build_rows, table

    if args.fields:
        return show_fields(ProcessFilters)
    filters = read_section(ProcessFilters, {}, args.set, "--set", "filters")
    _refuse(args)
    incidents = Incidents()
    if args.requests:
        jobs, settings, status = picture_jobs(args, incidents)
        if status:
            return status
    else:
        jobs, settings = stroke_jobs(args), _settings(args)
    codec = _codec(args.tokenizer) if args.tokenizer else None
    with open_bar(len(jobs), "process data") as bar:
        parallel = (args.parallel or 4) if args.requests else 1
        run = build_rows(args.out, jobs, settings, filters, codec=codec, parallel=parallel, progress=follow(bar))
        made, tally = asyncio.run(run)
    status = tell_end(tally, tally.line(), incidents)
    print(f"\n{table(made)}\nwritten to {args.out}")
    return status or int(not made["rows"])


def stroke_jobs(args: argparse.Namespace) -> list[Job]:
    """A job a request, of the subsets in turn. Raises BatchError."""
    from genevolve_fast.process.builders import Corrupter
    from genevolve_fast.sandbox.stroke_data import workshop
    from genevolve_fast.sandbox.strokes import requests

    split, categories = args.split or "train", _categories(args)
    shop = workshop(split, tell_places=not args.no_places)
    asked = requests(split, args.seed, 1000 if args.count is None else args.count, categories)
    turns = _turns(args.subset, len(asked), len(categories))
    mended = [request for request, (_, wrong) in zip(asked, turns, strict=True) if wrong]
    own = _sampler(args, mended) if args.sampler else None
    return _jobs(args.seed, asked, turns, shop, own or Corrupter(shop), own)


def picture_jobs(args: argparse.Namespace, incidents: Incidents) -> tuple[list[Job], dict[str, Any], int]:
    """(jobs, settings, exit status of a reading that ended early) for the requests of a file. Raises BatchError."""
    from genevolve_fast.files import file_hash
    from genevolve_fast.process.builders import Corrupter
    from genevolve_fast.process.chat_workshop import ChatReader, chat_workshop, read_requests, words_of
    from genevolve_fast.process.rows import BuildTally
    from genevolve_fast.resumable import BatchError, Ledger

    texts = _texts(args.requests, args.count)
    chat = _chat(args, incidents)
    renderer, identity = open_chosen_renderer(args, incidents, args.out / "processes")
    settings = {"requests": file_hash(args.requests), "model": args.model, "renderer": identity}
    settings |= {"subset": args.subset, "seed": args.seed}
    tally = BuildTally()
    with (
        closing(Ledger(args.out / "reading.jsonl", settings, "graph")) as ledger,
        open_bar(len(texts) - len(ledger.done.keys() & texts), "read", "request") as bar,
    ):
        parallel = args.parallel or 4
        run = read_requests(texts, ChatReader(chat), ledger, tally, parallel=parallel, progress=follow(bar))
        asked = asyncio.run(run)
    status = tell_end(tally, f"{len(asked)} of {len(texts)} requests are read", incidents)
    if not asked and not status:
        raise BatchError(f"{args.requests}: of no request came a scene graph")
    try:
        shop = chat_workshop(chat, renderer, words_of(r.graph for r in asked))
    except ValueError as error:
        raise BatchError(f"--renderer {args.renderer}: {error}") from None
    turns = _turns(args.subset, len(asked), 1)
    return _jobs(args.seed, asked, turns, shop, Corrupter(shop), None), settings, status


def _turns(subset: str, count: int, block: int) -> list[tuple[str, bool]]:
    """(subset, whether its row holds a mistake that is mended) of each request; `block` of them are of one subset."""
    turns = (SUBSETS[0], SUBSETS[1], SUBSETS[0], SUBSETS[2]) if subset == "all" else (subset,)
    made = []
    for part in (n // block for n in range(count)):
        name, again = turns[part % len(turns)], part // len(turns)
        made.append((name, name == "instruction_conflict" or (name == "image_alignment" and again % 2 == 0)))
    return made


def _jobs(seed: int, asked: Sequence[SceneRequest], turns, shop, sampler, own) -> list[Job]:
    from genevolve_fast.process.builders import image_alignment, instruction_conflict, multi_turn
    from genevolve_fast.process.rows import Job

    jobs = []
    for request, (subset, wrong) in zip(asked, turns, strict=True):
        build = {
            "multi_turn": lambda r=request: multi_turn(r, shop, seed),
            "instruction_conflict": lambda r=request: instruction_conflict(r, shop, seed, sampler),
            "image_alignment": lambda r=request, w=wrong: image_alignment(r, shop, seed, w, own),
        }[subset]
        jobs.append(Job(f"{subset}-{request.id}", subset, request.category, build))
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


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """Not the count: more of the same may follow."""
    settings = {"subset": args.subset, "seed": args.seed, "split": args.split or "train", "sampler": args.sampler}
    if args.sampler and _is_model(args.sampler):
        from genevolve_fast.files import file_hash

        weights = sorted(Path(args.sampler).glob("*.safetensors"))
        settings["sampler"] = [file_hash(path) for path in weights]
        settings |= {name: getattr(args, name) for name in DRAWING}
    return settings | {"categories": list(_categories(args)), "places": not args.no_places}


def _refuse(args: argparse.Namespace) -> None:
    """Raise BatchError for what cannot work or would do nothing."""
    from genevolve_fast.resumable import BatchError

    strokes = ("split", "categories", "sampler", "no_places", *DRAWING)
    real = ("model", "base_url", "api_key_env", "chat_set", "renderer", "service_url", "renderer_set", "parallel")
    useless, why = (strokes, "with --requests") if args.requests else (real, "without --requests")
    if told := [f"--{name.replace('_', '-')}" for name in useless if getattr(args, name)]:
        raise BatchError(f"{', '.join(told)} would do nothing {why}")
    if args.renderer == "process":
        raise BatchError("--renderer process grows a picture by itself; name the renderer that draws one state of it")
    for name in ("count", "parallel"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise BatchError(f"--{name} must be at least 1")
    if args.sampler and args.subset == "multi_turn":
        raise BatchError("--sampler would do nothing: multi_turn rows come from graphs, without wrong cycles")
    told = [f"--{name}" for name in DRAWING if getattr(args, name) is not None]
    if told and not (args.sampler and _is_model(args.sampler)):
        raise BatchError(f"{', '.join(told)} would do nothing: --sampler names no folder of a unified model")
    if args.requests and (lacking := [f for f in ("model", "base_url", "renderer") if not getattr(args, f)]):
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in lacking)
        raise BatchError(f"--requests needs {flags}: who reads, writes and looks, and who draws")


def _texts(path: Path, count: int | None) -> dict[str, str]:
    """Request texts by id. Raises BatchError naming the line."""
    from genevolve_fast.resumable import BatchError, parse_json

    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").split("\n")]  # a text may hold others
    except (OSError, UnicodeDecodeError) as error:
        raise BatchError(f"--requests {path} cannot be read: {error}") from None
    texts: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        row = parse_json(line, f"{path}, line {number}") if path.suffix == ".jsonl" else {"id": number, "text": line}
        if (
            not isinstance(row, dict)
            or not isinstance(row.get("text"), str)
            or not row["text"].strip()
            or "id" not in row
        ):
            raise BatchError(f"{path}, line {number}: a request is an object with id and text")
        if str(row["id"]) in texts:
            raise BatchError(f"{path}, line {number}: the id {row['id']} is given twice")
        texts[str(row["id"])] = " ".join(row["text"].split())
    if not texts:
        raise BatchError(f"{path} holds no request")
    return dict(list(texts.items())[:count])


def _chat(args: argparse.Namespace, incidents: Incidents) -> JsonChat:
    from genevolve_fast.net.asking import Lane
    from genevolve_fast.net.chat_config import open_cache, open_chat, read_key
    from genevolve_fast.process.config import ProcessChatConfig
    from genevolve_fast.resumable import BatchError

    fields = {"model": args.model, "base_url": args.base_url, "api_key_env": args.api_key_env}
    config = read_section(ProcessChatConfig, fields, args.chat_set, "--chat-set", "chat model")
    try:
        return open_chat(
            config,
            "process",
            incidents,
            model=config.model,
            base_url=config.base_url,
            api_key=read_key(config, "--api-key-env", config.api_key_env),
            lane=Lane(config.concurrency, config.requests_per_minute),
            cache=open_cache(config, "process", incidents),
        )
    except ValueError as error:
        raise BatchError(str(error)) from None


def _is_model(sampler: str) -> bool:
    return Path(sampler).is_dir()


def _sampler(args: argparse.Namespace, asked: Sequence[SceneRequest]):
    import importlib

    from genevolve_fast.process.builders import ModelSampler
    from genevolve_fast.resumable import BatchError

    name = args.sampler
    if _is_model(name):
        return _model_sampler(args, asked)
    module, colon, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function) if colon else None
    except (ImportError, AttributeError, ValueError) as error:
        raise BatchError(f"--sampler {name}: {error}") from None
    if not callable(found):
        raise BatchError(f"--sampler takes a folder of a unified model or MODULE:FUNCTION, not {name!r}")
    return ModelSampler(found)


def _model_sampler(args: argparse.Namespace, asked: Sequence[SceneRequest]):
    from genevolve_fast.process.unified.model import Unified
    from genevolve_fast.process.unified.sampling import Drawing
    from genevolve_fast.process.unified.traces import UnifiedSampler
    from genevolve_fast.resumable import BatchError

    told = {"temperature": 1.0} | {n: v for n in DRAWING if (v := getattr(args, n)) is not None}
    try:
        return UnifiedSampler(Unified.from_pretrained(args.sampler).eval(), Drawing(seed=args.seed, **told), asked)
    except (OSError, ValueError) as error:
        raise BatchError(f"--sampler {args.sampler}: {str(error).splitlines()[0]}") from None


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
