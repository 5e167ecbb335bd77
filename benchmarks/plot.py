"""Draw time and memory against rows from recorded results: `python -m benchmarks.plot [FILE] --out docs/head.svg`.

Two panels with log axes, one line a contender, measured points marked; a dashed line is the GEMM floor. Where some
contenders have one number of rows only, they are points. Plain SVG: no plotting library is needed.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable
from pathlib import Path
from xml.sax.saxutils import escape

from benchmarks.inputs import MODES
from benchmarks.peers import OURS
from benchmarks.store import Row, read

COLOURS = ["#d9480f", "#1c7ed6", "#2f9e44", "#ae3ec9", "#0c8599", "#f08c00", "#5f3dc4", "#868e96", "#c2255c", "#66a80f"]
LABELS = {"eager": "eager torch", "torch_compile": "torch.compile", "torch_chunked": "F.linear_cross_entropy"}
WIDTH, HEIGHT, LEFT, TOP, GAP = 400, 300, 62, 92, 84  # of a panel and around it
INK, PALE = "#343a40", "#dee2e6"

Points = dict[str, list[tuple[float, float]]]


def points(rows: Iterable[Row], field: str) -> Points:
    """Contender -> [(rows, value)], this library first, then by value at its largest number of rows."""
    found: Points = {}
    for row in rows:
        if row.get(field) is not None:
            found.setdefault(row["impl"], []).append((row["rows"], row[field]))
    ordered = sorted(found.items(), key=lambda item: (not item[0].startswith(OURS), item[1][-1][1]))
    return {name: sorted(values) for name, values in ordered}


def floor_points(rows: Iterable[Row]) -> list[tuple[float, float]]:
    """The GEMM floor as this library's rows measured it."""
    mine = [r for r in rows if r["impl"] == OURS and "gemm_ms" in r]
    return sorted((r["rows"], r["floor_gemms"] * r["gemm_ms"] * r["ratio"]) for r in mine)


class Axis:
    """A log axis from `low` to `high` on `first` to `last` pixels; a decade, or powers of two, between its ticks."""

    def __init__(self, values: list[float], first: float, last: float, binary: bool = False) -> None:
        self.first, self.last, self.base = first, last, 2.0 if binary else 10.0
        margin = 1.12 if binary else 1.25
        self.low, self.high = math.log(min(values) / margin), math.log(max(values) * margin)

    def at(self, value: float) -> float:
        return self.first + (math.log(value) - self.low) / (self.high - self.low) * (self.last - self.first)

    def ticks(self) -> list[float]:
        powers = range(math.ceil(self.low / math.log(self.base)), math.floor(self.high / math.log(self.base)) + 1)
        steps = (1.0,) if self.base == 2 or len(powers) > 2 else (1.0, 2.0, 5.0)
        lowest = powers.start - 1
        marks = [step * self.base**p for p in range(lowest, powers.stop + 1) for step in steps]
        return [m for m in marks if self.low <= math.log(m) <= self.high]


def text(x: float, y: float, content: str, **style: object) -> str:
    attributes = "".join(f' {k.replace("_", "-")}="{v}"' for k, v in style.items())
    return f'<text x="{x:.1f}" y="{y:.1f}"{attributes}>{escape(content)}</text>'


def number(value: float) -> str:
    """1024 -> 1k where it is a power of two, 0.5, 20, 1 000."""
    if value >= 1024 and math.log2(value).is_integer():
        return f"{value / 1024:g}k"
    return f"{value:g}"


def panel(left: float, title: str, unit: str, series: Points, colours: dict[str, str], dashed: list) -> list[str]:
    """One panel's SVG elements."""
    every = [p for values in series.values() for p in values] + dashed
    x = Axis([p[0] for p in every], left, left + WIDTH, binary=True)
    y = Axis([p[1] for p in every], TOP + HEIGHT, TOP)
    out = [text(left, TOP - 14, title, font_weight=600)]
    for tick in y.ticks():
        out.append(f'<path d="M{left} {y.at(tick):.1f}h{WIDTH}" stroke="{PALE}"/>')
        out.append(text(left - 8, y.at(tick) + 4, number(tick), text_anchor="end"))
    for tick in x.ticks():
        out.append(f'<path d="M{x.at(tick):.1f} {TOP + HEIGHT}v5" stroke="{INK}"/>')
        out.append(text(x.at(tick), TOP + HEIGHT + 20, number(tick), text_anchor="middle"))
    out.append(f'<path d="M{left} {TOP + HEIGHT}h{WIDTH}" stroke="{INK}"/>')
    out.append(text(left + WIDTH / 2, TOP + HEIGHT + 40, "rows", text_anchor="middle"))
    out.append(text(left + WIDTH, TOP - 14, unit, text_anchor="end", fill="#868e96"))
    if dashed:
        line = " ".join(f"{x.at(a):.1f},{y.at(b):.1f}" for a, b in dashed)
        out.append(f'<polyline points="{line}" fill="none" stroke="{INK}" stroke-dasharray="4 4"/>')
        if len(dashed) == 1:
            out.append(f'<path d="M{left} {y.at(dashed[0][1]):.1f}h{WIDTH}" stroke="{INK}" stroke-dasharray="4 4"/>')
    for name, values in reversed(series.items()):  # this library on top
        line = " ".join(f"{x.at(a):.1f},{y.at(b):.1f}" for a, b in values)
        wide = 2.6 if name.startswith(OURS) else 1.5
        out.append(f'<polyline points="{line}" fill="none" stroke="{colours[name]}" stroke-width="{wide}"/>')
        out += [
            f'<circle cx="{x.at(a):.1f}" cy="{y.at(b):.1f}" r="{wide + 1.2:.1f}" fill="{colours[name]}"/>'
            for a, b in values
        ]
    return out


def page(elements: Iterable[str], width: float, height: float) -> str:
    """The SVG that holds these elements, on white."""
    style = 'font-family="Helvetica, Arial, sans-serif" font-size="12.5"'
    size = f'viewBox="0 0 {width} {height}" width="{width}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style} fill="{INK}">\n'
        f'<rect width="{width}" height="{height}" fill="white"/>\n' + "\n".join(elements) + "\n</svg>\n"
    )


def draw(rows: list[Row], title: str, subtitle: str) -> str:
    """The SVG of rows that differ in contender and number of rows only. Raises ValueError where there are none."""
    if not rows:
        raise ValueError("no timed row fits: choose another --shape, --mode, --ratio or --logits, or measure it")
    time, memory = points(rows, "ms"), points(rows, "peak_mib")
    colours = dict(zip(time, COLOURS * 9, strict=False))
    second = LEFT + WIDTH + GAP
    legend = second + WIDTH + 28
    out = [text(LEFT, 24, title, font_size=17, font_weight=600), text(LEFT, 44, subtitle, fill="#868e96")]
    out += panel(LEFT, "time of one call, forward and backward", "ms", time, colours, floor_points(rows))
    out += panel(second, "peak above inputs and returned gradients", "MiB", memory, colours, [])
    for i, name in enumerate([*time, None]):
        at = TOP + 12 + 22 * i
        stroke = f'stroke="{colours[name]}" stroke-width="3"' if name else f'stroke="{INK}" stroke-dasharray="4 4"'
        out.append(f'<path d="M{legend} {at}h22" {stroke}/>')
        bold = {"font_weight": 600} if name and name.startswith(OURS) else {}
        out.append(text(legend + 30, at + 4, LABELS.get(name, name) if name else "GEMM floor", **bold))
    width, height = legend + 190, TOP + HEIGHT + 60
    return page(out, width, height)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("file", type=Path, nargs="?", default=Path("benchmarks/results/head.json"), help="(%(default)s)")
    p.add_argument("--out", type=Path, default=Path("docs/head.svg"), help="(default: %(default)s)")
    p.add_argument("--mode", choices=MODES, default="objective", help="(default: %(default)s)")
    p.add_argument("--shape", help="(default: that of the file's last row)")
    p.add_argument("--ratio", type=float, default=1.0)
    p.add_argument("--logits", help="(default: those of the file's last row)")
    p.add_argument("--impls", nargs="+", help="(default: all but other workspaces of this library)")
    args = p.parse_args()
    timed = [r for r in read(args.file)["rows"] if r["status"] == "timed" and r["mode"] == args.mode]
    if not timed:
        p.error(f"{args.file} has no timed row of mode {args.mode}: python -m benchmarks.run --modes {args.mode}")
    shape, logits = args.shape or timed[-1]["shape"], args.logits or timed[-1]["logits"]
    rows = [r for r in timed if (r["shape"], r["logits"], r["ratio"]) == (shape, logits, args.ratio)]
    rows = [r for r in rows if r["impl"] in args.impls] if args.impls else [r for r in rows if "[" not in r["impl"]]
    head = f"{MODES[args.mode][2][0].upper()}{MODES[args.mode][2][1:]}"
    newest = max(rows, key=lambda r: r["date"], default={})
    where = f"{newest.get('device')}, torch {newest.get('torch')}, commit {newest.get('commit')}, {newest.get('date')}"
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(draw(rows, head, f"head {shape}, {newest.get('dtype')}, {logits} logits · {where}"), "utf-8")
    print(f"{args.out}: {len(rows)} rows")


if __name__ == "__main__":
    main()
