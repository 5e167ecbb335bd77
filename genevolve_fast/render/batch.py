"""Programs of a results.json to pictures: several at a time, every finished one kept, continued where it stopped."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from genevolve_fast.files import file_hash, write_bytes, write_text
from genevolve_fast.net.harmless import one_line
from genevolve_fast.net.pictures import png_bytes
from genevolve_fast.protocols import Renderer, RenderError
from genevolve_fast.render.endpoints import off_loop
from genevolve_fast.render.rows import Row, RowError, drawn, not_drawn, program_of, read_references, read_rows
from genevolve_fast.render.service_client import refusal
from genevolve_fast.resumable import BatchError, Log, Tally, changes, work_off
from genevolve_fast.trajectory import json_text

JOURNAL = "renders.jsonl"
RESULTS = "results.json"
PICTURES = "images"
_HEADER = "genevolve_fast_renders"


# --- what is done -----------------------------------------------------------------------------------------------------


class Gallery:
    """`images/`, and `renders.jsonl` with the settings and a line for each finished row; one process at a time.

    A row is done when its picture is the file that was written for the same program. `adopted` pictures stand in the
    results.json of the released script; `changed` rows ask for something else since they were drawn.
    """

    def __init__(self, folder: Path, rows: Sequence[Row], settings: Mapping[str, Any], fresh: bool = False) -> None:
        """Raises BatchError where the folder holds pictures of another input, renderer or seed."""
        self.folder = folder.resolve()
        self.rows: dict[str, dict[str, Any]] = {}  # by name: the row as results.json has it
        self.adopted = self.changed = 0
        self._files: dict[str, dict[str, Any]] = {}  # by name: the journal's line of a picture
        self._log = Log(self.folder / JOURNAL, _HEADER, "rendering")
        try:
            (self.folder / PICTURES).mkdir(exist_ok=True)
            self._open(rows, dict(settings), fresh)
        except BaseException:
            self._log.close()
            raise

    def _open(self, rows: Sequence[Row], settings: dict[str, Any], fresh: bool) -> None:
        if fresh:
            self._log.clear()
        header, lines = self._log.read()
        if header is None or len(lines) < header.get("adopted", 0):  # new, or ended while it adopted
            found = {} if fresh else self._adoptable(rows)
            self._log.begin(settings=settings, adopted=len(found))
            for name, line in found.items():
                self._log.append({"name": name} | line)
            self.adopted, lines = len(found), [{"name": name} | line for name, line in found.items()]
        elif changed := changes(header["settings"], settings):
            if any(line.get("file") for line in lines):
                raise BatchError(
                    f"{self.folder} holds pictures of other settings ({changed}): choose another --output-dir, or "
                    "--fresh to start over"
                )
            self._log.begin(settings=settings, adopted=0)
            lines = []
        self._take(rows, lines)

    def _take(self, rows: Sequence[Row], lines: Sequence[Mapping[str, Any]]) -> None:
        known = {row.name: row for row in rows}
        last = {line.get("name"): line for line in lines if isinstance(line.get("name"), str)}
        for name, line in last.items():
            if name not in known:
                raise BatchError(
                    f"{self.folder} holds pictures of another input, {name} is not in this one: choose another "
                    "--output-dir, or --fresh to start over"
                )
            row = known[name]
            if line.get("digest") != row.digest:
                self.changed += bool(line.get("file"))
            elif (picture := self._picture(line)) is not None:
                self.rows[name] = drawn(row.fields, picture)
            elif not line.get("file"):
                self.rows[name] = not_drawn(row.fields, str(line.get("error")), str(line.get("failure")))

    def _picture(self, line: Mapping[str, Any]) -> Path | None:
        """The file that a line names, if it is still the one that was written."""
        if not isinstance(line.get("file"), str):
            return None
        path = self.folder / line["file"]
        try:
            same = file_hash(path) == line.get("sha256")
        except (OSError, ValueError):
            return None
        return path if same and path.parent == self.folder / PICTURES else None

    def _adoptable(self, rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
        """Pictures of a results.json without a journal, such as the released script's: same id, same program."""
        path = self.folder / RESULTS
        if not path.exists():
            return {}
        before = read_rows(path)
        known = {row.name: row for row in rows}
        files = Counter(_file_of(row.fields) for row in before)
        adopted = {}
        for row in before:
            if row.name not in known or known[row.name].digest != row.digest:
                raise BatchError(
                    f"{path} has a row that is not of this input (id {row.fields.get('id')!r}): choose another "
                    "--output-dir, or --fresh to start over"
                )
            file = _file_of(row.fields)
            picture = self.folder / PICTURES / file
            # The released script lets rows that share an id overwrite one file: nobody knows whose picture it is.
            if row.fields.get("success") is True and file and files[file] == 1 and picture.is_file():
                line = {"digest": row.digest, "file": f"{PICTURES}/{file}"}
                adopted[row.name] = line | {"sha256": file_hash(picture)}
        return adopted

    @property
    def done(self) -> set[str]:
        """Names of the rows that have their picture."""
        return {name for name, row in self.rows.items() if row["success"]}

    async def add(self, row: Row, png: bytes, seconds: float) -> None:
        """Keep a picture for good. Raises BatchError."""
        file = f"{PICTURES}/{row.name}.png"
        try:
            await asyncio.to_thread(write_bytes, self.folder / file, png)
        except OSError as error:
            raise BatchError(f"{self.folder / file} cannot be written: {error.strerror}") from None
        line = {"name": row.name, "digest": row.digest, "file": file, "sha256": hashlib.sha256(png).hexdigest()}
        self._log.append(line | {"seconds": round(seconds, 3)})
        self.rows[row.name] = drawn(row.fields, self.folder / file)

    def add_failure(self, row: Row, error: str, failure: str) -> None:
        self._log.append({"name": row.name, "digest": row.digest, "failure": failure, "error": error})
        self.rows[row.name] = not_drawn(row.fields, error, failure)

    def write_results(self, rows: Sequence[Row]) -> None:
        """results.json in input order; rows that were never tried are absent."""
        write_text(self.folder / RESULTS, json_text([self.rows[r.name] for r in rows if r.name in self.rows], indent=2))

    def close(self) -> None:
        self._log.close()


def _file_of(row: Mapping[str, Any]) -> str:
    """The name of a row's picture, without the folder: it may have been moved."""
    path = row.get("image_path") or row.get("output_path")
    return Path(path).name if isinstance(path, str) and "\x00" not in path else ""


# --- a batch ----------------------------------------------------------------------------------------------------------


@dataclass
class Batch(Tally):
    """Counts of one `render_batch`; `ends` are over all rows: "drawn", or the failure."""

    good = "drawn"
    hopeless = ("render/connect", "render/client_error")

    rendered: int = 0  # pictures of this run

    def line(self) -> str:
        """One line: n drawn, n failed by type, seconds, pictures a minute."""
        speed = f", {60 * self.rendered / self.seconds:.0f} pictures/min" if self.rendered and self.seconds else ""
        return f"{self.succeeded} drawn, {self.failures()}, {self.seconds:.1f} s{speed}"


async def render_batch(
    rows: Sequence[Row],
    gallery: Gallery,
    renderer: Renderer,
    *,
    seed: int = 0,
    parallel: int = 1,
    draw_request: bool = False,
    bases: Sequence[Path] = (Path(),),
    progress: Callable[[Batch], None] = lambda batch: None,
) -> Batch:
    """Draw what has no picture yet, `parallel` at a time. SIGINT and SIGTERM end it with every finished row written.

    Relative paths of references are looked up under `bases`. It also ends when row after row is refused, or the
    service cannot be reached.
    """
    done = gallery.done
    batch = Batch(Counter({"drawn": len(done)} if done else {}))

    async def draw(row: Row) -> tuple[str, str]:
        began = time.monotonic()
        try:
            png = await _draw(row, renderer, seed, draw_request, bases)
            await gallery.add(row, png, time.monotonic() - began)
        except RowError as reason:
            error, end = str(reason), reason.failure
        except RenderError as reason:
            error, end = str(reason), f"render/{reason.kind}"
        except BatchError:
            raise
        except Exception as reason:  # one row's bug must not end the others
            error, end = f"{type(reason).__name__}: {reason}", "render/other"
        else:
            batch.rendered += 1
            return "drawn", ""
        gallery.add_failure(row, one_line(error, 500), end)
        return end, error

    todo = [row for row in rows if row.name not in done]
    return await work_off(
        todo, draw, batch, parallel=parallel, progress=progress, write=lambda: gallery.write_results(rows)
    )


async def _draw(row: Row, renderer: Renderer, seed: int, draw_request: bool, bases: Sequence[Path]) -> bytes:
    """The row's picture as PNG. Raises RowError and RenderError."""
    program = program_of(row.fields, draw_request)
    count = len(program.reference_images)
    if not renderer.min_references <= count <= renderer.max_references:
        raise RowError(refusal(renderer, count), "program")
    references = await off_loop(read_references, program, bases)
    pixels = await renderer.render(program, references, seed)
    return await off_loop(png_bytes, pixels)
