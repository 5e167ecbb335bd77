"""`render`: programs to pictures."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from genevolve_fast.commands.opening import AddCommand

RENDERERS = ("canvas", "qwen-image-edit", "text-to-image", "qwen-service", "nano-banana")


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
    from collections import Counter
    from contextlib import closing

    from tqdm import tqdm

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
        with tqdm(total=len(rows), desc="render", unit="picture", dynamic_ncols=True) as bar:

            def progress(ends: Counter[str]) -> None:
                bar.set_postfix(ok=ends["drawn"], failed=ends.total() - ends["drawn"], refresh=False)
                bar.update(ends.total() - bar.n)

            batch = asyncio.run(
                render_batch(
                    rows,
                    gallery,
                    renderer,
                    seed=seed,
                    parallel=args.parallel,
                    draw_request=draw_request,
                    bases=(args.input.resolve().parent, Path.cwd()),
                    progress=progress,
                )
            )
    if attempts := incidents.take():
        print("failed attempts: " + ", ".join(f"{what} {n}" for what, n in attempts.items()))
    print(f"{batch.line()}, {gallery.folder / RESULTS}")
    if not batch.stopped:
        for failure, reason in sorted(batch.reasons.items()):
            print(f"{failure}, the first of them: {reason}", file=sys.stderr)
    if batch.stopped:
        print(f"stopped: {batch.stopped}\nthe same command continues where it stopped", file=sys.stderr)
    if batch.signal is not None:
        return 128 + batch.signal
    return 0 if batch.drawn and not batch.stopped else 1


def _without_references(renderer) -> str:
    """The released script's own backends behave as there; the others draw programs without references."""
    return "request" if renderer.name in ("qwen-image-edit", "qwen-service", "nano-banana") else "program"


def open_chosen_renderer(args: argparse.Namespace, incidents) -> tuple[Any, dict[str, Any]]:
    """(renderer, what of it changes the pictures) of the flags. Raises BatchError naming what is wrong."""
    from pydantic import ValidationError

    from genevolve_fast.render.config import RendererConfig, open_renderer
    from genevolve_fast.resumable import BatchError

    fields: dict[str, Any] = {"kind": args.renderer, **_renderer_fields(args.renderer_set)}
    if args.service_url:
        if "urls" in fields:
            raise BatchError("--service-url and --renderer-set urls= say the same: give one of them")
        fields["urls"] = args.service_url
    if fields["kind"] != args.renderer or "seed" in fields:
        raise BatchError("--renderer and --seed say who draws and from which seed, not --renderer-set")
    if args.seed is not None and args.seed < 0:
        raise BatchError("--seed must be at least 0")
    try:
        config = RendererConfig(**fields)
        if config.kind == "canvas":
            from genevolve_fast.sandbox.canvas import CanvasRenderer

            return CanvasRenderer(), config.identity()
        return open_renderer(config, incidents), config.identity()
    except ValidationError as error:
        from genevolve_fast.train.config import wrong_fields  # with torch

        wrong = "; ".join(line.replace("(combination)", "renderer") for line in wrong_fields(error))
        raise BatchError(f"{wrong} (--renderer-set FIELD=VALUE sets a field)") from None
    except (ValueError, ImportError) as error:  # what is missing: a key, a recording, a package
        raise BatchError(str(error)) from None


def _renderer_fields(pairs: list[str]) -> dict[str, Any]:
    """{field: value}; `text_to_image.kind=…` sets a field of the section."""
    import yaml

    from genevolve_fast.resumable import BatchError

    fields: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals:
            raise BatchError("--renderer-set takes FIELD=VALUE")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise BatchError(f"--renderer-set {name}: its value is not YAML") from None
        section, dot, inner = name.partition(".")
        if not dot:
            fields[name] = value
        elif isinstance(fields.setdefault(section, {}), dict):
            fields[section][inner] = value
    return fields
