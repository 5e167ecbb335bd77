"""Draw what the planner says of several GPUs: `python -m benchmarks.plot_plan --out docs/plan.svg`.

One panel a kind of training: bytes of one GPU while it trains against the number of GPUs, a line for each strategy.
With --device, whose rates are in the file, a third panel has the seconds of a training step; without a rate for all of
it there is none. Estimates, no measurement: the formulas are those of `genevolve-fast plan`.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from benchmarks.plot import COLOURS, GAP, HEIGHT, INK, LEFT, PALE, TOP, WIDTH, Axis, number, page, text
from genevolve_fast.profile.plan import Settings, plan
from genevolve_fast.profile.rates import FILE, Rates
from genevolve_fast.profile.shapes import BUILT_IN, ModelShape
from genevolve_fast.profile.step_time import step_time

STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
GPUS = (1, 2, 4, 8, 16, 32)
PAPER = Settings(
    tokens=36_144, prefix=6144, max_tokens_per_microbatch=37_000, prompts_per_step=32, loss_share=1.0, rollout=False
)
KINDS = {"all weights": replace(PAPER, bf16="master"), "LoRA of rank 64": replace(PAPER, lora=64)}
LINES = (24, 40, 48, 80, 141)  # GiB of GPUs, dotted
Curves = dict[str, list[tuple[float, float]]]


def placed(s: Settings, strategy: str, gpus: int) -> Settings:
    """On nodes of eight."""
    nodes = -(-gpus // 8)
    return replace(s, strategy=strategy, nodes=nodes, gpus_per_node=gpus // nodes)


def memory(shape: ModelShape, s: Settings) -> Curves:
    """Strategy -> [(GPUs, GiB of one)]."""
    return {
        name: [(n, plan(shape, placed(s, name, n)).total / 2**30) for n in GPUS] for name in STRATEGIES
    }  # fmt: skip


def seconds(shape: ModelShape, s: Settings, rates: Rates, device: str) -> Curves:
    """Strategy -> [(GPUs, seconds of training if no transfer hides)], only where every rate is there."""
    found: Curves = {}
    for name in STRATEGIES:
        made = [(n, step_time(shape, placed(s, name, n), rates, device).training) for n in GPUS]
        found[name] = [(n, span[1]) for n, span in made if span is not None]
    return {name: values for name, values in found.items() if values}


def panel(left: float, title: str, unit: str, curves: Curves, dotted: tuple[float, ...]) -> list[str]:
    every = [p for values in curves.values() for p in values]
    x = Axis([p[0] for p in every], left, left + WIDTH, binary=True)
    y = Axis([p[1] for p in every], TOP + HEIGHT, TOP, binary=True)
    out = [text(left, TOP - 14, title, font_weight=600), text(left + WIDTH, TOP - 14, unit, text_anchor="end")]
    for tick in y.ticks():
        out.append(f'<path d="M{left} {y.at(tick):.1f}h{WIDTH}" stroke="{PALE}"/>')
        out.append(text(left - 8, y.at(tick) + 4, number(tick), text_anchor="end"))
    for size in dotted:
        if TOP < y.at(size) < TOP + HEIGHT:
            out.append(f'<path d="M{left} {y.at(size):.1f}h{WIDTH}" stroke="{INK}" stroke-dasharray="2 5"/>')
            out.append(text(left + WIDTH + 4, y.at(size) + 4, f"{size:g}", fill="#868e96"))
    for gpus in GPUS:
        out.append(text(x.at(gpus), TOP + HEIGHT + 20, str(gpus), text_anchor="middle"))
    out.append(f'<path d="M{left} {TOP + HEIGHT}h{WIDTH}" stroke="{INK}"/>')
    out.append(text(left + WIDTH / 2, TOP + HEIGHT + 40, "GPUs", text_anchor="middle"))
    for (name, values), wide in zip(curves.items(), (6.5, 5, 3.5, 3.5, 1.6), strict=False):  # equal lines stay visible
        colour = COLOURS[STRATEGIES.index(name)]
        line = " ".join(f"{x.at(a):.1f},{y.at(b):.1f}" for a, b in values)
        out.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="{wide}"/>')
    return out


def draw(panels: list[list[str]], title: str, subtitle: str) -> str:
    out = [text(LEFT, 24, title, font_size=17, font_weight=600), text(LEFT, 44, subtitle, fill="#868e96")]
    for elements in panels:
        out += elements
    legend = LEFT + len(panels) * (WIDTH + GAP) - 20
    for i, name in enumerate(STRATEGIES):
        at = TOP + 12 + 22 * i
        out.append(f'<path d="M{legend} {at}h22" stroke="{COLOURS[i]}" stroke-width="3"/>')
        out.append(text(legend + 30, at + 4, name))
    width, height = legend + 110, TOP + HEIGHT + 60
    return page(out, width, height)


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", choices=BUILT_IN, default="qwen3-vl-8b", help="(default: %(default)s)")
    p.add_argument("--device", help="of the file of rates: seconds of a step too")
    p.add_argument("--rates", type=Path, default=FILE, help="(default: %(default)s)")
    p.add_argument("--out", type=Path, default=Path("docs/plan.svg"), help="(default: %(default)s)")
    args = p.parse_args(argv)
    shape, panels = BUILT_IN[args.model], []
    for i, (name, settings) in enumerate(KINDS.items()):
        left = LEFT + i * (WIDTH + GAP)
        panels.append(panel(left, f"training, {name}", "GiB of one GPU", memory(shape, settings), LINES))
    if args.device:
        curves = seconds(shape, KINDS["all weights"], Rates.read(args.rates), args.device)
        if not curves:
            p.error(f"{args.rates} has not every rate of {args.device} that a step of {args.model} needs")
        left = LEFT + len(KINDS) * (WIDTH + GAP)
        panels.append(panel(left, "training step, all weights", "seconds", curves, ()))
    told = f"{args.model}, rollouts of {PAPER.tokens:,} tokens, bf16 · estimated by genevolve-fast plan, not measured"
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(draw(panels, "What one GPU holds", told), "utf-8")
    print(f"{args.out}: {len(panels)} panels")


if __name__ == "__main__":
    main()
