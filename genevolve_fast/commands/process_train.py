"""`process train` and `process draw`: the unified model, trained on process rows, and at work."""

from __future__ import annotations

import argparse
from pathlib import Path

from genevolve_fast.commands.opening import RUNS, AddCommand, set_threads, show_fields


def add(step: AddCommand) -> None:
    """Add the parsers of this module."""
    p = step(
        "train",
        run_process_train,
        "Train a unified model, one decoder that writes and draws, on the rows of `process data`: text by "
        "cross-entropy, drafts by rectified flow, packed into one pass. Text is causal, rows of an image see each "
        "other and all before; a noised copy of every draft that is learnt is seen by nobody. Runs on a CPU.",
        "genevolve-fast process data --count 4000 --out data/strokes\n"
        "  genevolve-fast process train --set data=data/strokes --set name=strokes",
    )
    p.add_argument("--config", help="YAML file (default: every field's default)")
    p.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="override one field, repeatable")
    p.add_argument("--runs", type=Path, default=RUNS, help="folder of all runs (default: %(default)s)")
    p.add_argument("--resume", action="store_true", help="continue the run of that name from its last checkpoint")
    p.add_argument("--fields", action="store_true", help="list every field of the configuration and stop")

    p = step(
        "draw",
        run_process_draw,
        "Let a trained unified model draw: it plans, sketches, inspects and refines until it ends, at most five times. "
        "Writes every draft and the texts between them.",
        'genevolve-fast process draw --model runs/strokes/policy --out drawn "a red circle left of a blue square"',
    )
    p.add_argument("requests", nargs="+", metavar="REQUEST")
    p.add_argument("--model", type=Path, required=True, help="folder that `process train` wrote")
    p.add_argument("--out", type=Path, required=True, help="folder of the drafts, the strips and drawn.jsonl")
    p.add_argument("--steps", type=int, default=10, help="Euler steps of a draft (default: %(default)s)")
    p.add_argument("--temperature", type=float, default=0.0, help="of the texts; 0: the likeliest (default)")
    p.add_argument("--shift", type=float, help="of the times (default: as in training)")
    p.add_argument("--seed", type=int, default=0, help="of the noise (default: %(default)s)")


def run_process_train(args: argparse.Namespace) -> int:
    from genevolve_fast.commands.opening import config_path
    from genevolve_fast.process.rows import open_processes
    from genevolve_fast.process.unified.config import UnifiedConfig
    from genevolve_fast.resumable import BatchError
    from genevolve_fast.train.config import load_config

    if args.fields:
        return show_fields(UnifiedConfig)
    config = load_config(UnifiedConfig, args.config and config_path(args.config), args.set)
    if not config.data:
        raise BatchError("data is empty: --set data=FOLDER names the rows that `genevolve-fast process data` wrote")
    processes = open_processes(config.data)
    if not processes:
        raise BatchError(f"{config.data} holds no rows")
    set_threads(config.threads)
    from genevolve_fast.process.unified.model import Unified
    from genevolve_fast.process.unified.train import train_unified
    from genevolve_fast.sandbox.tiny_unified import model_for

    if config.model.path is not None:
        policy = Unified.from_pretrained(config.model.path)
    else:
        policy = model_for(config, processes, processes.pixels)
    numbers = sum(p.numel() for p in policy.parameters())
    print(
        f"{len(processes)} rows, {numbers:,} parameters, {policy.flow.place.num_embeddings} rows a picture", flush=True
    )
    final = train_unified(config, policy, processes, processes.pixels, args.runs / config.name, resume=args.resume)
    print(f"policy: {final}")
    return 0


def run_process_draw(args: argparse.Namespace) -> int:
    """Exit status 1 where a request got no draft."""
    from genevolve_fast.files import write_bytes
    from genevolve_fast.net.harmless import one_line
    from genevolve_fast.net.pictures import png_bytes
    from genevolve_fast.process.unified.model import Unified
    from genevolve_fast.process.unified.samples import write_drawn
    from genevolve_fast.process.unified.sampling import Drawing, draw, strip
    from genevolve_fast.resumable import BatchError

    try:
        drawing = Drawing(steps=args.steps, temperature=args.temperature, shift=args.shift, seed=args.seed)
    except ValueError as error:
        raise BatchError(str(error)) from None
    policy = Unified.from_pretrained(args.model).eval()
    drawn = draw(policy, args.requests, drawing)
    for n, (request, d) in enumerate(zip(args.requests, drawn, strict=True)):
        if d.drafts:
            write_bytes(args.out / f"{n:03d}_strip.png", png_bytes(strip(d.drafts)))
        print(
            f"{request}\n" + "".join(f"  {one_line(text, 600)}\n" for text in d.texts) + f"  {len(d.drafts)} drafts",
            flush=True,
        )
    write_drawn(args.out, args.requests, drawn)
    print(f"written to {args.out}")
    return int(not all(d.drafts for d in drawn))
