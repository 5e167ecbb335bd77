"""Draw the comparison of one pass and process: `python -m benchmarks.plot_process DIR --out docs/process_gain.svg`.

DIR is that of `python -m benchmarks.process_gain`. Above: the flow's loss, and the share of right pictures of each arm
with its interval and a dot a seed. Below: what the first seed drew for the first requests, whatever came of it.
"""

from __future__ import annotations

import argparse
import base64
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.plot import COLOURS, GAP, HEIGHT, INK, LEFT, PALE, TOP, WIDTH, Axis, number, page, text
from benchmarks.process_gain import COUNTED, Kept, Settings, asked, drawn
from genevolve_fast.files import write_text
from genevolve_fast.net.pictures import png_bytes
from genevolve_fast.process.scene_graph import SceneRequest
from genevolve_fast.sandbox.strokes import PixelJudge

LABELS = {"one_pass": "one pass", "self_sampled": "own mistakes", "symbolic": "mistakes by rule"}
RIGHT, WRONG = "#2f9e44", "#e03131"
CHANCE = 0.35  # of position, with the right figures in places by lot
SIDE, ROW, COLUMNS, SHOWN = 56, 92, 2, 12


def label(arm: str) -> str:
    return LABELS.get(arm, arm)


def arms_of(result: dict) -> list[str]:
    return list(result["shares"][COUNTED[0]])


def losses(result: dict) -> list[str]:
    """The flow's loss of every seed against steps, log axes; later seeds are fainter."""
    arms = arms_of(result)
    curves = {a: [(c["step"], c["loss/flow"]) for c in result[a]["curves"].values()] for a in arms}
    every = [(x, y) for of in curves.values() for xs, ys in of for x, y in zip(xs, ys, strict=True)]
    x, y = Axis([p[0] for p in every], LEFT, LEFT + WIDTH), Axis([p[1] for p in every], TOP + HEIGHT, TOP)
    out = [text(LEFT, TOP - 14, "flow loss", font_weight=600)]
    for tick in y.ticks():
        out.append(f'<path d="M{LEFT} {y.at(tick):.1f}h{WIDTH}" stroke="{PALE}"/>')
        out.append(text(LEFT - 8, y.at(tick) + 4, number(tick), text_anchor="end"))
    for tick in x.ticks():
        out.append(text(x.at(tick), TOP + HEIGHT + 20, number(tick), text_anchor="middle"))
    out.append(f'<path d="M{LEFT} {TOP + HEIGHT}h{WIDTH}" stroke="{INK}"/>')
    out.append(text(LEFT + WIDTH / 2, TOP + HEIGHT + 40, "steps", text_anchor="middle"))
    for n, arm in enumerate(arms):
        for k, (xs, ys) in enumerate(curves[arm]):
            line = " ".join(f"{x.at(a):.1f},{y.at(b):.1f}" for a, b in zip(xs, ys, strict=True))
            faint = f'stroke-opacity="{max(0.25, 1 - 0.3 * k):.3g}"'
            out.append(f'<polyline points="{line}" fill="none" stroke="{COLOURS[n]}" stroke-width="1.6" {faint}/>')
        at = TOP + 14 + 18 * n
        out.append(f'<path d="M{LEFT + WIDTH - 130} {at}h22" stroke="{COLOURS[n]}" stroke-width="3"/>')
        out.append(text(LEFT + WIDTH - 100, at + 4, label(arm)))
    return out


def shares(result: dict) -> list[str]:
    """Share of right pictures, a group a category: mean and interval, a dot a seed, chance dashed."""
    left, arms = LEFT + WIDTH + GAP, arms_of(result)
    at = lambda share: TOP + HEIGHT * (1 - share)  # noqa: E731
    split = result["settings"]["split"].replace("_", "-")
    out = [text(left, TOP - 14, f"right pictures of {split} requests", font_weight=600)]
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        out.append(f'<path d="M{left} {at(share):.1f}h{WIDTH}" stroke="{PALE}"/>')
        out.append(text(left - 8, at(share) + 4, f"{share:g}", text_anchor="end"))
    group = WIDTH / len(COUNTED)
    step = min(44.0, group / (len(arms) + 0.5))
    for g, category in enumerate(COUNTED):
        middle = left + group * (g + 0.5)
        out.append(text(middle, TOP + HEIGHT + 20, category, text_anchor="middle"))
        if category == "position":
            out.append(
                f'<path d="M{left + group * g + 6:.1f} {at(CHANCE):.1f}h{group - 12:.1f}" stroke="{INK}" '
                f'stroke-dasharray="3 4"><title>right figures in places by lot</title></path>'
            )
        for n, arm in enumerate(arms):
            x, s = middle + (n - (len(arms) - 1) / 2) * step, result["shares"][category][arm]
            told = f"{label(arm)}: {s['value']:.3f} [{s['low']:.3f}, {s['high']:.3f}]"
            out.append(
                f'<g stroke="{COLOURS[n]}" fill="{COLOURS[n]}"><title>{told}</title>'
                f'<path d="M{x:.1f} {at(s["high"]):.1f}V{at(s["low"]):.1f}" stroke-width="2"/>'
                f'<path d="M{x - 8:.1f} {at(s["value"]):.1f}h16" stroke-width="4"/>'
                + "".join(
                    f'<circle cx="{x + 12:.1f}" cy="{at(v):.1f}" r="2"/>' for v in result["categories"][category][arm]
                )
                + "</g>"
            )
    return out


def samples(requests: Sequence[SceneRequest], made: dict[str, Sequence[Kept]], top: int) -> list[str]:
    """Two columns of requests: the picture of one pass, then the drafts of the process; green is right."""
    judge, out = PixelJudge(), []
    for n, request in enumerate(requests):
        left = LEFT + n % COLUMNS * (WIDTH + GAP)
        y = top + n // COLUMNS * ROW
        out.append(text(left, y, request.text))
        x = left
        for arm, of in made.items():
            out += [text(x, y + SIDE + 22, label(arm), font_size=10, fill="#868e96")]
            for k, draft in enumerate(of[n].drafts or [of[n].picture]):
                last = k >= len(of[n].drafts) - 1
                right = judge.judge(request.graph, draft).correct
                out.append(picture(draft, x, y + 8, (RIGHT if right else WRONG) if last else PALE))
                x += SIDE + 8
            x += 16
    return out


def picture(pixels: np.ndarray, x: float, y: float, frame: str) -> str:
    data = base64.b64encode(png_bytes(pixels)).decode()
    return (
        f'<image x="{x:.1f}" y="{y:.1f}" width="{SIDE}" height="{SIDE}" style="image-rendering:pixelated" '
        f'href="data:image/png;base64,{data}"/><rect x="{x:.1f}" y="{y:.1f}" width="{SIDE}" height="{SIDE}" '
        f'fill="none" stroke="{frame}" stroke-width="2"/>'
    )


def draw(result: dict, requests: Sequence[SceneRequest], made: dict[str, Sequence[Kept]]) -> str:
    seeds, steps = result["seeds"], result["settings"]["steps"]
    told = f"{len(seeds)} seed{'s' * (len(seeds) > 1)}, {steps} steps each, {result['settings']['requests']} requests"
    out = [text(LEFT, 24, "One pass and process", font_size=17, font_weight=600), text(LEFT, 44, told, fill="#868e96")]
    below = TOP + HEIGHT + 84
    out += losses(result) + shares(result) + samples(requests, made, below)
    width = LEFT + 2 * WIDTH + GAP + 40
    height = below + -(-len(requests) // COLUMNS) * ROW + 10
    return page(out, width, height)


def main(argv: Sequence[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("folder", type=Path, metavar="DIR", help="the --out of benchmarks.process_gain, finished")
    p.add_argument("--out", type=Path, default=Path("docs/process_gain.svg"), help="(default: %(default)s)")
    p.add_argument("--count", type=int, default=SHOWN, help="requests that are shown (default: %(default)s)")
    args = p.parse_args(argv)
    try:
        result = json.loads((args.folder / "result.json").read_text("utf-8"))
    except OSError as error:
        p.error(f"{args.folder} holds no finished comparison: {error.strerror}")
    settings = Settings(**result["settings"])
    made = {arm: drawn(settings, args.folder, result["seeds"][0], arm) for arm in ("one_pass", "process")}
    shown = asked(settings)[: args.count]
    write_text(args.out, draw(result, shown, made))
    print(f"{args.out}: {len(shown)} requests")


if __name__ == "__main__":
    main()
