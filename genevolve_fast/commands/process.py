"""`process`: pictures that grew in cycles, and what can be made of them."""

from __future__ import annotations

import argparse
from pathlib import Path

from genevolve_fast.commands import process_data, process_train
from genevolve_fast.commands.opening import AddCommand, subcommands


def add(command: AddCommand) -> None:
    """Add the parsers of this module."""
    top = command(
        "process",
        None,
        "Pictures that grow in cycles of plan, sketch, inspect and refine: rows to learn from, a unified model trained "
        "on them and at work, strips to look at.",
        "genevolve-fast process data --count 4000 --out data/strokes",
    )
    step = subcommands(top.add_subparsers(dest="step", required=True, metavar="STEP"))
    process_data.add(step)
    process_train.add(step)
    p = step(
        "strip",
        run_strip,
        "The drafts of one process side by side, over each what was planned, under it what was found.",
        "genevolve-fast process strip out.process -o strip.png",
    )
    p.add_argument("folder", type=Path, metavar="FOLDER", help="of one process, or a folder that holds one")
    p.add_argument("-o", "--output", type=Path, required=True, help="the strip, a PNG")


def run_strip(args: argparse.Namespace) -> int:
    from genevolve_fast.files import write_bytes
    from genevolve_fast.report.processes import process_folders
    from genevolve_fast.resumable import BatchError

    if args.output.suffix.lower() != ".png":
        raise BatchError("-o is the strip's file and ends in .png")
    found = process_folders(args.folder)
    if not found:
        raise BatchError(f"{args.folder} holds no process that has ended: there is no process.json")
    if len(found) > 1:
        names = ", ".join(folder.name for folder in found[:4])
        raise BatchError(f"{args.folder} holds {len(found)} processes: name one of them ({names}, …)")
    data, (width, height) = strip_png(found[0])
    write_bytes(args.output, data)
    print(f"strip: {args.output}, {width} × {height}")
    return 0


def strip_png(folder: Path) -> tuple[bytes, tuple[int, int]]:
    """(PNG, its size) of one process."""
    import io

    from genevolve_fast.report.strip import draw_strip

    picture, out = draw_strip(folder), io.BytesIO()
    picture.save(out, "PNG", optimize=True)
    return out.getvalue(), picture.size
