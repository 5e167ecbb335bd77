"""`render`: programs to pictures."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from genevolve_fast.commands.batches import follow, open_bar, tell_end
from genevolve_fast.commands.opening import AddCommand, open_any_renderer, read_section

RENDERERS = ("canvas", "qwen-image-edit", "text-to-image", "qwen-service", "nano-banana", "process")


def add(command: AddCommand) -> None:
    """Add the parsers of this module."""
    p = command(
        "render",
        run_render,
        "Draw the programs of a results.json; finished pictures survive a crash, failed ones are tried again.",
        "genevolve-fast render --input runs/batch/results.json --output-dir runs/pictures --renderer qwen-service "
        "--service-url http://gpu1:8001 --service-url http://gpu2:8001 --parallel 8",
    )
    p.add_argument("--input", type=Path, required=True, help="results.json of a rollout, a bench or a rendering")
    p.add_argument("--output-dir", type=Path, required=True, help="folder of results.json and images/; it continues")
    add_renderer_flags(p, default="canvas")
    p.add_argument("--seed", type=int, help="of every picture (default: 0)")
    p.add_argument("--parallel", type=int, default=4, help="pictures at a time (default: %(default)s)")
    p.add_argument("--fresh", action="store_true", help="forget the pictures that the folder already holds")
    add_without_references(p)


def add_without_references(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--without-references",
        choices=["program", "request"],
        help="what is drawn where a program has no references: its gen_prompt, or the request as the released script "
        "does (default: request with qwen-* alone and nano-banana, else program)",
    )


def add_renderer_flags(p: argparse.ArgumentParser, default: str | None, told: str = "") -> None:
    """--renderer and what it needs; required where it has no default and nothing is `told` of one."""
    required = default is None and not told
    told = told or ("" if default is None else " (default: %(default)s)")
    p.add_argument("--renderer", choices=RENDERERS, default=default, required=required, help=f"who draws{told}")
    p.add_argument(
        "--service-url", action="append", default=[], metavar="URL", help="a service with POST /generate, repeatable"
    )
    p.add_argument(
        "--renderer-set", action="append", default=[], metavar="FIELD=VALUE", help="a field of the renderer, repeatable"
    )


def run_render(args: argparse.Namespace) -> int:
    """Exit status 1 when nothing was drawn or the batch gave up, 128 + signal when it was interrupted."""
    import asyncio
    from contextlib import closing

    from genevolve_fast.incidents import Incidents
    from genevolve_fast.render.batch import RESULTS, Gallery, render_batch
    from genevolve_fast.render.rows import read_rows
    from genevolve_fast.resumable import BatchError

    if args.parallel < 1:
        raise BatchError("--parallel must be at least 1")
    rows, incidents, seed = read_rows(args.input), Incidents(), args.seed or 0
    renderer, identity = open_chosen_renderer(args, incidents)  # before --fresh forgets anything
    draw_request = (args.without_references or _without_references(renderer)) == "request"
    settings = {"renderer": identity, "seed": seed, "without_references": "request" if draw_request else "program"}
    with closing(Gallery(args.output_dir, rows, settings, args.fresh)) as gallery:
        if gallery.adopted:
            print(f"{gallery.adopted} pictures of an earlier {RESULTS} are kept, whatever drew them")
        if gallery.changed:
            print(f"{gallery.changed} rows ask for another picture than when they were drawn: they are drawn again")
        with open_bar(len(rows), "render", "picture") as bar:
            batch = asyncio.run(
                render_batch(
                    rows,
                    gallery,
                    renderer,
                    seed=seed,
                    parallel=args.parallel,
                    draw_request=draw_request,
                    bases=(args.input.resolve().parent, Path.cwd()),
                    progress=follow(bar),
                )
            )
    status = tell_end(batch, f"{batch.line()}, {gallery.folder / RESULTS}", incidents)
    return status or int(not batch.succeeded)


def _without_references(renderer) -> str:
    """The released script's own backends behave as there; the others draw programs without references."""
    return "request" if renderer.name in ("qwen-image-edit", "qwen-service", "nano-banana") else "program"


def open_chosen_renderer(
    args: argparse.Namespace, incidents, processes: Path | None = None
) -> tuple[Any, dict[str, Any]]:
    """(renderer, what of it changes the pictures) of the flags; grown pictures are kept in `processes`, or beside what
    the command writes. Raises BatchError naming what is wrong."""
    from genevolve_fast.render.config import RendererConfig
    from genevolve_fast.resumable import BatchError

    if args.seed is not None and args.seed < 0:
        raise BatchError("--seed must be at least 0")
    named = {name.partition("=")[0].strip() for name in args.renderer_set}
    if {"kind", "seed"} & named:
        raise BatchError("--renderer and --seed say who draws and from which seed, not --renderer-set")
    if args.service_url and "urls" in named:
        raise BatchError("--service-url and --renderer-set urls= say the same: give one of them")
    fields = {"kind": args.renderer} | ({"urls": args.service_url} if args.service_url else {})
    config = read_section(RendererConfig, fields, args.renderer_set, "--renderer-set", "renderer")
    try:
        return open_any_renderer(config, incidents, processes or args.output_dir / "processes"), config.identity()
    except (ValueError, ImportError) as error:  # what is missing: a key, a recording, a package
        raise BatchError(str(error)) from None
