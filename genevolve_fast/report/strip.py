"""A grown picture as one PNG: its drafts side by side, over each what was planned, under it what was found."""

from __future__ import annotations

import textwrap
from pathlib import Path

from genevolve_fast.net.harmless import one_line
from genevolve_fast.report.processes import Strip, read_strip

_SIDE = 192  # pixels of a draft's longer side
_GAP, _LINE, _FONT = 18, 17, 13
_COLUMNS = 31  # characters of a line under a draft
_LINES = 7
_PAPER, _INK, _SOFT, _GOOD, _BAD = (251, 250, 247), (29, 31, 36), (107, 111, 122), (48, 150, 90), (206, 44, 49)


def draw_strip(folder: Path):
    """PIL image of the process in `folder`. Raises report.processes.ProcessError."""
    from PIL import Image, ImageDraw, ImageFont

    strip = read_strip(folder)
    font, bold = ImageFont.load_default(_FONT), ImageFont.load_default(_FONT + 2)
    said = [_wrapped(c.said) for c in strip.cells]
    found = [_wrapped(c.found) for c in strip.cells]
    above, below = (max(map(len, part), default=0) * _LINE + 6 for part in (said, found))
    top = 3 * _LINE + _GAP
    width = _GAP + max(len(strip.cells), 3) * (_SIDE + _GAP)
    picture = Image.new("RGB", (width, top + _LINE + above + _SIDE + 8 + below + _GAP), _PAPER)
    pen = ImageDraw.Draw(picture)
    request = textwrap.wrap(one_line(strip.request, 400), max(40, width // 8))[:2]
    for i, line in enumerate(request):
        pen.text((_GAP, _GAP // 2 + i * _LINE), line, _INK, bold)
    pen.text((_GAP, _GAP // 2 + len(request) * _LINE + 2), _told(strip), _SOFT, font)
    for i, cell in enumerate(strip.cells):
        x, y = _GAP + i * (_SIDE + _GAP), top
        pen.text((x, y), f"{cell.cycle + 1} · {cell.stage}", _SOFT, font)
        _lines(pen, (x, y + _LINE), said[i], _INK, font)
        y += _LINE + above
        if cell.file:
            picture.paste(_fitted(folder / cell.file), (x, y))
        pen.rectangle((x - 1, y - 1, x + _SIDE, y + _SIDE), outline=(228, 225, 217))
        colour = {True: _GOOD, False: _BAD, None: _SOFT}[cell.sound]
        _lines(pen, (x, y + _SIDE + 6), found[i], colour, font)
    return picture


def _told(strip: Strip) -> str:
    script = " · stages by the sandbox's script, a demonstration" if strip.writer == "sandbox" else ""
    return strip.line() + script


def _wrapped(text: str) -> list[str]:
    lines = textwrap.wrap(one_line(text, 1000), _COLUMNS)
    return lines if len(lines) <= _LINES else [*lines[: _LINES - 1], lines[_LINES - 1][: _COLUMNS - 1] + "…"]


def _lines(pen, at: tuple[int, int], lines: list[str], colour: tuple[int, int, int], font) -> None:
    for i, line in enumerate(lines):
        pen.text((at[0], at[1] + i * _LINE), line, colour, font)


def _fitted(path: Path):
    """The draft in a square; small ones keep their pixels."""
    from PIL import Image

    with Image.open(path) as draft:
        draft = draft.convert("RGB")
    scale = _SIDE / max(draft.size)
    size = [max(1, round(side * scale)) for side in draft.size]
    how = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
    square = Image.new("RGB", (_SIDE, _SIDE), (255, 255, 255))
    square.paste(draft.resize(size, how), ((_SIDE - size[0]) // 2, (_SIDE - size[1]) // 2))
    return square
