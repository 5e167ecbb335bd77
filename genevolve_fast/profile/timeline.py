"""A step's memory over time as one SVG file."""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate
from xml.sax.saxutils import escape

from genevolve_fast.profile.meter import PHASES, Report

WIDTH, HEIGHT, LEFT, TOP, LEGEND = 900, 320, 70, 64, 130
INK, PALE = "#343a40", "#dee2e6"
COLOURS = dict(
    zip(
        PHASES,
        ("#868e96", "#adb5bd", "#1c7ed6", "#0c8599", "#2f9e44", "#ae3ec9", "#f08c00", "#d9480f", "#5f3dc4"),
        strict=True,
    )
)
_POINTS = 2000  # of the curve; of every stretch its highest


def draw(report: Report, title: str) -> str:
    """Bytes above the start over seconds: a block per stretch of a phase up to its peak, the allocator's curve on top.

    Raises ValueError where nothing was measured.
    """
    if not report.segments:
        raise ValueError("no phase was measured")
    clock = _Clock(report)
    end = clock.end
    top = max(report.peak_bytes, 1)
    unit, name = (2**30, "GiB") if top >= 2**29 else (2**20, "MiB")

    def x(second: float) -> float:
        return LEFT + clock.at(second) / max(end, 1e-9) * WIDTH

    def y(size: float) -> float:
        return TOP + HEIGHT - max(size, 0) / top * HEIGHT

    out = [_text(LEFT, 24, title, font_size=16, font_weight=600)]
    out.append(_text(LEFT, 44, f"{name} above the start, over seconds inside phases", fill="#868e96"))
    for tick in _ticks(top / unit):
        at = y(tick * unit)
        out.append(f'<path d="M{LEFT} {at:.1f}h{WIDTH}" stroke="{PALE}"/>')
        out.append(_text(LEFT - 8, at + 4, f"{tick:g}", text_anchor="end"))
    for tick in _ticks(end):
        at = LEFT + tick / max(end, 1e-9) * WIDTH
        out.append(f'<path d="M{at:.1f} {TOP + HEIGHT}v5" stroke="{INK}"/>')
        out.append(_text(at, TOP + HEIGHT + 20, f"{tick:g}", text_anchor="middle"))
    for s in report.segments:
        wide = max((s.end - s.begin) / max(end, 1e-9) * WIDTH, 0.5)
        high = TOP + HEIGHT - y(s.peak)
        colour = COLOURS.get(s.phase, INK)
        out.append(
            f'<rect x="{x(s.begin):.1f}" y="{y(s.peak):.1f}" width="{wide:.1f}" height="{high:.1f}" '
            f'fill="{colour}" fill-opacity="0.45"><title>{escape(s.phase)}</title></rect>'
        )
    line = " ".join(f"{x(t):.1f},{y(size):.1f}" for t, size in _thinned(report.curve))
    if line:
        out.append(f'<polyline points="{line}" fill="none" stroke="{INK}" stroke-width="0.8"/>')
    out.append(f'<path d="M{LEFT} {TOP + HEIGHT}h{WIDTH}" stroke="{INK}"/>')
    for row, phase in enumerate(report.phases):
        at = TOP + 12 + 22 * row
        colour = COLOURS.get(phase.name, INK)
        out.append(f'<rect x="{LEFT + WIDTH + 20}" y="{at - 9}" width="14" height="14" fill="{colour}"/>')
        out.append(_text(LEFT + WIDTH + 40, at + 3, phase.name))
    wide, high = LEFT + WIDTH + LEGEND, TOP + HEIGHT + 40
    style = 'font-family="Helvetica, Arial, sans-serif" font-size="12.5"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high}" width="{wide}" {style} fill="{INK}">\n'
        f'<rect width="{wide}" height="{high}" fill="white"/>\n' + "\n".join(out) + "\n</svg>\n"
    )


class _Clock:
    """Seconds of a report with the time between phases cut out."""

    def __init__(self, report: Report) -> None:
        self._begins = [s.begin for s in report.segments]
        self._lengths = [s.end - s.begin for s in report.segments]
        self._elapsed = [0.0, *accumulate(self._lengths)]

    @property
    def end(self) -> float:
        return self._elapsed[-1]

    def at(self, second: float) -> float:
        index = max(bisect_right(self._begins, second) - 1, 0)
        return self._elapsed[index] + min(max(second - self._begins[index], 0.0), self._lengths[index])


def _text(x: float, y: float, content: str, **style: object) -> str:
    attributes = "".join(f' {k.replace("_", "-")}="{v}"' for k, v in style.items())
    return f'<text x="{x:.1f}" y="{y:.1f}"{attributes}>{escape(content)}</text>'


def _ticks(largest: float) -> list[float]:
    """About five round numbers from 0 to `largest`."""
    rough = max(largest, 1e-9) / 5
    power = 10.0 ** len(str(int(rough))) / 10 if rough >= 1 else 10.0 ** -len(str(int(1 / rough)))
    step = next(m * power for m in (1, 2, 5, 10, 20, 50, 100) if m * power >= rough)
    return [round(i * step, 10) for i in range(int(largest / step) + 1)]


def _thinned(curve: tuple[tuple[float, int], ...]) -> list[tuple[float, int]]:
    stride = max(1, -(-len(curve) // _POINTS))
    return [max(curve[i : i + stride], key=lambda point: point[1]) for i in range(0, len(curve), stride)]
