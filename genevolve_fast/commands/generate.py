"""`generate`: a request to a picture, in one line."""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from genevolve_fast.commands.opening import AddCommand
from genevolve_fast.commands.render import add_renderer_flags, open_chosen_renderer
from genevolve_fast.commands.rollout import add_agent_flags, open_runner, rollout_settings


def add(command: AddCommand) -> None:
    """Add the parsers of this module."""
    p = command(
        "generate",
        run_generate,
        "From a request to its picture: an agent writes the program, a renderer draws it; prints both and the timings.",
        'genevolve-fast generate "A stamp with the emblem of Dor Abo" --renderer canvas -o stamp.png '
        "--policy sandbox:start --tools sandbox",
    )
    p.add_argument("prompt", metavar="PROMPT", help="what the picture shall show")
    p.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        help="OUT.png; beside it go OUT.json, OUT.references/ and, of a process, OUT.process/ and OUT.strip.png",
    )
    add_renderer_flags(p, default=None)
    add_agent_flags(p, seeded="sampling and picture")


class TimedTool:
    """A tool (protocols.Tool) that adds the seconds of its calls to `seconds[name]`."""

    def __init__(self, tool, seconds: dict[str, float]) -> None:
        self.name, self.description, self.parameters = tool.name, tool.description, tool.parameters
        self._tool, self._seconds = tool, seconds

    async def __call__(self, arguments: Mapping[str, Any]):
        began = time.monotonic()
        try:
            return await self._tool(arguments)
        finally:
            self._seconds[self.name] = self._seconds.get(self.name, 0.0) + time.monotonic() - began


def run_generate(args: argparse.Namespace) -> int:
    """Exit status 1 when the agent wrote no program or it was not drawn; OUT.json says why."""
    import asyncio
    import tempfile

    from genevolve_fast.files import write_text
    from genevolve_fast.incidents import Incidents
    from genevolve_fast.resumable import BatchError
    from genevolve_fast.trajectory import json_text

    if args.output.suffix.lower() != ".png":
        raise BatchError("-o is the picture's file and ends in .png")
    if not args.prompt.strip():
        raise BatchError("the prompt is empty: say what the picture shall show")
    args.output, args.parallel, args.max_samples = args.output.resolve(), 1, None
    settings, incidents = rollout_settings(args), Incidents()
    renderer, identity = open_chosen_renderer(args, incidents, args.output.with_suffix(".process"))
    with tempfile.TemporaryDirectory() as found:
        tools: dict[str, float] = {}
        try:
            opening = open_runner(args, incidents, Path(found), lambda tool: TimedTool(tool, tools))
        except ValueError as error:  # the tools' and the agent's, which name what is missing
            raise BatchError(str(error)) from None
        try:
            made = asyncio.run(_generate(args, opening, renderer, tools))
        except OSError as error:
            raise BatchError(f"{args.output} cannot be written: {error.strerror}") from None
    told = {"renderer": identity, "seed": args.seed or 0, "settings": settings, "failed_attempts": incidents.take()}
    write_text(args.output.with_suffix(".json"), json_text(made | told, indent=2))
    _show(made | told, args.output)
    return 0 if made["success"] else 1


async def _generate(args: argparse.Namespace, opening, renderer, tools: dict[str, float]) -> dict[str, Any]:
    """A row of results.json with picture and seconds by phase; the picture and its references are written."""
    import asyncio

    from genevolve_fast.agent.journal import sample_of
    from genevolve_fast.files import write_bytes
    from genevolve_fast.net.pictures import png_bytes
    from genevolve_fast.protocols import RenderError
    from genevolve_fast.render.rows import RowError, drawn, not_drawn, program_of, read_references
    from genevolve_fast.render.service_client import refusal

    seconds: dict[str, Any] = {}
    clock = _Clock(seconds)
    async with opening as runner:
        with clock("agent"):
            finished = await runner(sample_of(0, {"id": args.output.stem, "prompt": args.prompt}, "PROMPT"))
    seconds["tools"] = {name: round(value, 3) for name, value in sorted(tools.items())}
    row = finished.result.to_row({"id": args.output.stem}) | {"sampled_tokens": finished.tokens, "seconds": seconds}
    if finished.result.termination != "answer":
        why = finished.result.error or f"the agent ended with {finished.result.termination}"
        return not_drawn(row, why, finished.failure or "agent")
    row["reference_images"] = _keep_references(row["reference_images"], args.output)
    try:
        program = program_of(row, draw_request=False)
        if not renderer.min_references <= len(program.reference_images) <= renderer.max_references:
            raise RowError(refusal(renderer, len(program.reference_images)), "program")
        with clock("references"):
            references = await asyncio.to_thread(read_references, program, (Path(),))
        with clock("render"):
            pixels, told = await _drawn(renderer, program, references, args.seed or 0)
    except RowError as error:
        return not_drawn(row, str(error), error.failure)
    except RenderError as error:
        return not_drawn(row, str(error), f"render/{error.kind}")
    with clock("write"):
        write_bytes(args.output, await asyncio.to_thread(png_bytes, pixels))
        if told:
            write_bytes(*(await asyncio.to_thread(_strip, Path(told["process"]), args.output)))
    return drawn(row, args.output) | told | {"size": [pixels.shape[1], pixels.shape[0]]}


async def _drawn(renderer, program, references, seed: int) -> tuple[Any, dict[str, Any]]:
    """(pixels, of a process its folder and its end). Raises RenderError."""
    if not hasattr(renderer, "grow"):
        return await renderer.render(program, references, seed), {}
    grown = await renderer.grow(program, references, seed)
    return grown.picture, {"process": str(grown.folder), "process_end": grown.end}


def _strip(folder: Path, output: Path) -> tuple[Path, bytes]:
    from genevolve_fast.commands.process import strip_png

    return output.with_suffix(".strip.png"), strip_png(folder)[0]


class _Clock:
    def __init__(self, seconds: dict[str, Any]) -> None:
        self._seconds = seconds

    def __call__(self, phase: str) -> _Clock:
        self._phase, self._began = phase, time.monotonic()
        return self

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None:
        self._seconds[self._phase] = round(time.monotonic() - self._began, 3)


def _keep_references(references: list[dict[str, str]], output: Path) -> list[dict[str, str]]:
    """The references with their files copied beside the picture: the folder they were found in does not stay."""
    from genevolve_fast.trajectory import safe_name

    folder = output.with_suffix(".references")
    kept = []
    for reference in references:
        source = Path(reference.get("local_path") or "")
        if source.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            target = folder / f"{safe_name(reference.get('img_id') or 'reference')}{source.suffix}"
            shutil.copyfile(source, target)
            reference = reference | {"local_path": str(target)}
        kept.append(reference)
    return kept


def _show(made: Mapping[str, Any], output: Path) -> None:
    """Program, references and timings; what went wrong on stderr."""
    from genevolve_fast.net.harmless import readable

    if made["gen_prompt"]:
        print(readable(f"program     {made['gen_prompt']}"))
    for i, r in enumerate(made["reference_images"], 1):
        print(readable(f"reference {i} {r['img_id']} {r['title']}: {r['note']} ({r['local_path'] or r['url']})"))
    seconds = made["seconds"]
    inside = ", ".join(f"{name} {value:.1f}" for name, value in seconds["tools"].items())
    phases = ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items() if name != "tools")
    print(f"seconds     {phases}{f' (in the agent: {inside})' if inside else ''}, {made['rounds']} rounds")
    if made["failed_attempts"]:
        print("failed attempts: " + ", ".join(f"{what} {n}" for what, n in made["failed_attempts"].items()))
    if made["success"]:
        print(f"picture     {output}, {made['size'][0]} × {made['size'][1]}")
        if "process" in made:
            _show_process(Path(made["process"]), output)
    else:
        print(f"no picture ({made['image_failure']}): {made['image_status'].removeprefix('error: ')}", file=sys.stderr)


def _show_process(folder: Path, output: Path) -> None:
    from genevolve_fast.report.processes import read_strip

    strip = read_strip(folder)
    print(f"process     {strip.line()}; {output.with_suffix('.strip.png')}, {folder}")
    if strip.writer == "sandbox":
        print("            its stages were written by the sandbox's script: a demonstration, not a measurement")
