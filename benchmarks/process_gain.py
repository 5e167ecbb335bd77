"""Does drawing in strokes help? One tiny unified model, trained twice: `python -m benchmarks.process_gain --out DIR`.

From the same weights, on the same rows in the same order, for the same number of optimizer steps, with the same
settings: once on one-pass pairs (request, last picture), once on whole processes. Both draw the same held-out requests;
one pass gets for its one picture as many Euler steps as the process took for all its drafts of that request. Every part
is kept under DIR, so that the same command goes on where it stopped; `--minutes` stops it after the step that passes
them (exit status 3 where something is left to do). `--jobs 2` trains two models at a time.

`--arms` adds ablations of the same start, rows and steps: `plan` (nothing is inspected), `inspect` (nothing is planned:
all is drawn at once, inspected and mended) and `unmended` (the process, without the quarter of the rows that hold a
wrong draft, its fault and the correction; the others come more often); and three that train the process further, half
of the rows new: `more` (of the same kind), `symbolic` (plans and drafts corrupted by rule, found and mended) and
`self_sampled` (the model's own wrong plans and drafts, for the same requests). Every draft of an ablation has `euler`
steps.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import ChainMap
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from genevolve_fast.evaluate.scoreboard import DEFAULT_FILE, record
from genevolve_fast.files import replacing, write_text
from genevolve_fast.process.builders import TraceSampler
from genevolve_fast.process.compositional import Share, Step, by_category, consistency, parts, score, score_table
from genevolve_fast.process.rows import Processes, open_processes
from genevolve_fast.process.scene_graph import PLACE, GraphError, SceneGraph, SceneRequest
from genevolve_fast.process.states import matching
from genevolve_fast.process.trace import SOUND, Process
from genevolve_fast.process.unified.config import UnifiedConfig
from genevolve_fast.resumable import BatchError, changes, held
from genevolve_fast.sandbox.stroke_data import placed
from genevolve_fast.sandbox.strokes import PixelJudge, parse, requests
from genevolve_fast.sandbox.strokes import draw as paint
from genevolve_fast.train.config import parse_config
from genevolve_fast.trajectory import json_text

ARMS = ("one_pass", "process")  # the comparison
ABLATIONS = ("plan", "inspect", "unmended", "more", "symbolic", "self_sampled")
FURTHER = ("more", "symbolic", "self_sampled")  # from the weights of the process
COUNTED = ("position", "color_attr")
RESULTS = Path("benchmarks/results/process_gain.json")
_UNFINISHED = 3
_CHUNK = 50  # requests drawn and kept at a time
_SOUND = f"plan: {SOUND} draft: {SOUND}"
_PLAN = re.compile(r"<ins>.*?</ins><des>(.*?)</des>", re.DOTALL)


@dataclass(frozen=True)
class Settings:
    """What is compared. Chosen with --tune, on training requests of another seed; the held-out ones are for the end."""

    rows: int = 12_000
    steps: int = 1500
    batch_size: int = 32
    requests: int = 300  # held out, half position and half attribute binding
    euler: int = 10  # steps of each draft of a process
    hidden: int = 128
    layers: int = 4
    patch_size: int = 8
    optimizer: str = "muon"
    lr: float = 3e-3
    copies: int = 4
    shift: float = 2.0
    ce_weight: float = 0.25
    critique_requests: int = 1500  # whose traces are sampled, of another seed
    critique_steps: int = 300
    critique_lr: float = 1e-3
    data_seed: int = 0
    drawn_seed: int = 20_251_128
    split: str = "held_out"

    @classmethod
    def small(cls) -> Settings:
        """Everything once, in seconds; of no meaning."""
        small = dict(rows=24, steps=3, batch_size=4, requests=4, euler=2, hidden=32, layers=1)
        return cls(**small, critique_requests=8, critique_steps=2)

    def config(self, seed: int, arm: str, start: Path | None = None) -> UnifiedConfig:
        """start: the process to go on from, for those that do."""
        heads = max(2, self.hidden // 32)
        shape = dict(hidden=self.hidden, layers=self.layers, heads=heads, patch_size=self.patch_size)
        steps, lr = (self.critique_steps, self.critique_lr) if start else (self.steps, self.lr)
        return parse_config(
            UnifiedConfig,
            dict(
                name=f"{arm}_{seed}", seed=seed, steps=steps, batch_size=self.batch_size,
                target="process" if arm in ("unmended", *FURTHER) else arm,
                model=dict(path=str(start)) if start else shape,
                flow=dict(copies=self.copies, shift=self.shift, ce_weight=self.ce_weight),
                optim=dict(name=self.optimizer, lr=lr, weight_decay=0.01, warmup_ratio=0.03, schedule="cosine"),
                checkpoint=dict(every=max(1, min(100, steps // 2)), keep_last=1),
                samples=dict(every=0),
            ),
        )  # fmt: skip


def asked(settings: Settings) -> list[SceneRequest]:
    """What both arms draw."""
    return requests(settings.split, settings.drawn_seed, settings.requests, COUNTED)


# --- the parts, each kept ---------------------------------------------------------------------------------------------


def build(settings: Settings, folder: Path) -> Processes:
    """The rows that both arms learn from: three quarters grow a request, a quarter holds a wrong draft and mends it."""
    import asyncio

    from genevolve_fast.process.builders import image_alignment, multi_turn
    from genevolve_fast.process.rows import Job, build_rows
    from genevolve_fast.sandbox.stroke_data import workshop

    shop, jobs = workshop("train"), []
    for n, r in enumerate(requests("train", settings.data_seed, settings.rows, COUNTED)):
        if n // len(COUNTED) % 4 < 3:
            build = lambda r=r: multi_turn(r, shop, settings.data_seed, rewritten=False)  # noqa: E731
            jobs.append(Job(f"multi_turn-{r.id}", "multi_turn", r.category, build))
        else:
            build = lambda r=r: image_alignment(r, shop, settings.data_seed, negative=True)  # noqa: E731
            jobs.append(Job(f"image_alignment-{r.id}", "image_alignment", r.category, build))
    _, tally = asyncio.run(build_rows(folder, jobs, {"seed": settings.data_seed}))
    print(tally.line(), flush=True)
    if tally.stopped:
        sys.exit(_UNFINISHED)
    return open_processes(folder)


def critiques(settings: Settings, out: Path, seed: int, arm: str, sampler: TraceSampler | None) -> Processes:
    """Rows with a wrong plan or draft that is found and mended: of the sampler's traces, None: corrupted by rule.

    Both are of the requests for which the model's own traces gave a row, so those come first.
    """
    import asyncio

    from genevolve_fast.process.builders import Corrupter, image_alignment, instruction_conflict
    from genevolve_fast.process.rows import Job, build_rows
    from genevolve_fast.sandbox.stroke_data import workshop

    shop, jobs = workshop("train"), []
    kept = None if sampler else {p.id for p in open_processes(_rows(out, seed, "self_sampled"))}
    for n, r in enumerate(sampled_for(settings)):
        if n // len(COUNTED) % 2:
            subset, traces = "instruction_conflict", sampler or Corrupter(shop)
            build = lambda r=r, traces=traces: instruction_conflict(r, shop, seed, traces)  # noqa: E731
        else:
            subset = "image_alignment"
            build = lambda r=r: image_alignment(r, shop, seed, negative=True, sampler=sampler)  # noqa: E731
        job = Job(f"{subset}-{r.id}", subset, r.category, build)
        jobs += [job] * (kept is None or job.id in kept)
    made, tally = asyncio.run(build_rows(_rows(out, seed, arm), jobs, {"seed": seed, "arm": arm}))
    print(f"{arm} {seed}: {tally.line()}\n{made['filtered']}", flush=True)
    return open_processes(_rows(out, seed, arm))


def sampled_for(settings: Settings) -> list[SceneRequest]:
    """Training requests whose traces are sampled; of another seed than the rows."""
    return requests("train", settings.data_seed + 1, settings.critique_requests, COUNTED)


def learnt(settings: Settings, out: Path, seed: int, arm: str) -> tuple[list[Process], Mapping[str, np.ndarray]]:
    """(rows of an arm, their pixels)."""
    rows = open_processes(out / "rows")
    if arm == "unmended":
        return [p for p in rows if not any(cycle.correction for cycle in p.cycles)], rows.pixels
    if arm not in FURTHER:
        return list(rows), rows.pixels
    sampler = own_traces(settings, out, seed) if arm == "self_sampled" else None
    new = rows if arm == "more" else critiques(settings, out, seed, arm, sampler)
    count = len(open_processes(_rows(out, seed, "self_sampled")))
    if not count:
        sys.exit(f"no trace of the process of seed {seed} gave a row: it is trained too little")
    return [*rows[:count], *new[len(new) - min(count, len(new)) :]], ChainMap(new.pixels, rows.pixels)


def own_traces(settings: Settings, out: Path, seed: int) -> TraceSampler:
    from genevolve_fast.process.unified.model import Unified
    from genevolve_fast.process.unified.sampling import Drawing
    from genevolve_fast.process.unified.traces import UnifiedSampler

    drawing = Drawing(steps=settings.euler, shift=settings.shift, temperature=1.0, seed=seed)
    model = Unified.from_pretrained(_policy(out, seed, "process")).eval()
    return UnifiedSampler(model, drawing, sampled_for(settings))


def _rows(out: Path, seed: int, arm: str) -> Path:
    return out / f"{arm}_{seed}" / "rows"


def train(settings: Settings, out: Path, seed: int, arm: str) -> None:
    from genevolve_fast.process.unified.model import Unified
    from genevolve_fast.process.unified.train import train_unified
    from genevolve_fast.sandbox.tiny_unified import model_for

    if _policy(out, seed, arm).exists():
        return
    start = _policy(out, seed, "process") if arm in FURTHER else None
    config, (rows, pixels) = settings.config(seed, arm, start), learnt(settings, out, seed, arm)
    # of the seed and all rows: the same weights in all arms that start anew
    policy = Unified.from_pretrained(start) if start else model_for(config, open_processes(out / "rows"), pixels)
    train_unified(config, policy, rows, pixels, out / f"{arm}_{seed}", resume=True)


def _policy(out: Path, seed: int, arm: str) -> Path:
    return out / f"{arm}_{seed}" / "policy"


def draw_arm(settings: Settings, out: Path, seed: int, arm: str) -> None:
    """The drafts of every held-out request; one pass needs those of the process, to know its steps."""
    from genevolve_fast.process.unified.model import Unified
    from genevolve_fast.process.unified.sampling import Drawing, draw

    folder, wanted = out / f"{arm}_{seed}", asked(settings)
    todo = [n for n in range(0, len(wanted), _CHUNK) if not _chunk(folder, n).exists()]
    if not todo:
        return
    policy = Unified.from_pretrained(_policy(out, seed, arm)).eval()
    spent = [d.steps for d in drawn(settings, out, seed, "process")] if arm == "one_pass" else []
    for first in todo:
        texts = [r.text for r in wanted[first : first + _CHUNK]]
        drafts = {"max_drafts": 1} if arm == "one_pass" else {}
        drawing = Drawing(steps=settings.euler, shift=settings.shift, seed=seed * 1000 + first, **drafts)
        if arm == "one_pass":
            steps = [n or settings.euler for n in spent[first : first + _CHUNK]]
            made = draw(policy, texts, drawing, steps=steps)
        else:
            made = draw(policy, texts, drawing)
        with replacing(_chunk(folder, first)) as partial, partial.open("wb") as f:
            np.savez_compressed(
                f,
                drafts=np.array([d for m in made for d in m.drafts], dtype=np.uint8),
                told=json_text(
                    [{"texts": m.texts, "drafts": len(m.drafts), "steps": m.steps, "ended": m.ended} for m in made]
                ),
            )
        print(f"{arm} {seed}: {first + len(texts)} of {len(wanted)} requests drawn", flush=True)


def _chunk(folder: Path, first: int) -> Path:
    return folder / "drawn" / f"{first:05d}.npz"


@dataclass(frozen=True)
class Kept:
    """What was drawn for one request."""

    texts: list[str]
    drafts: list[np.ndarray]
    steps: int
    ended: bool

    @property
    def picture(self) -> np.ndarray:
        """The last draft; a white sheet where nothing was drawn, which no request asks for."""
        return self.drafts[-1] if self.drafts else np.full((32, 32, 3), 255, dtype=np.uint8)


def drawn(settings: Settings, out: Path, seed: int, arm: str) -> list[Kept]:
    made: list[Kept] = []
    for first in range(0, settings.requests, _CHUNK):
        with np.load(_chunk(out / f"{arm}_{seed}", first)) as file:
            drafts = iter(file["drafts"])
            for told in json.loads(str(file["told"])):
                mine = [next(drafts) for _ in range(told["drafts"])]
                made.append(Kept(told["texts"], mine, told["steps"], told["ended"]))
    return made


# --- what is counted --------------------------------------------------------------------------------------------------


def steps_told(made: Kept) -> Iterator[list[Step]]:
    """The drafts with what their plans describe, broken where a plan cannot be read or was itself at fault."""
    along: list[Step] = []
    graph = None
    for text, draft in zip(made.texts, made.drafts, strict=False):
        if _PLAN.search(text):
            graph = _described(text)
        elif "<refine>" in text and f"plan: {SOUND}" not in text:
            graph = None  # drawn after another plan, which is not written
        if graph is None:
            yield along
            along = []
        else:
            along.append(Step(graph, draft))
    yield along


def plans_told(made: Kept) -> list[SceneGraph | None]:
    """What the plan before each draft describes; None where there is none that can be read."""
    return [_described(text) for text, _ in zip(made.texts, made.drafts, strict=False)]


def first_two_plans(made: Kept) -> tuple[SceneGraph | None, SceneGraph | None]:
    first, second, *_ = [*plans_told(made), None, None]
    return first, second


def _described(text: str) -> SceneGraph | None:
    found = _PLAN.search(text)
    try:
        return parse(found[1]) if found else None
    except GraphError:
        return None


def inspected(wanted: Sequence[SceneRequest], made: Sequence[Kept], judge: PixelJudge) -> dict[str, int]:
    """What inspections saw: drafts that contradict their plan (without one: the request), how many of them were found,
    right ones that were called wrong, processes that refined and those that are right then."""
    counted = dict.fromkeys(("drafts", "wrong", "found", "false_alarms", "refined", "right_after_refining"), 0)
    for request, m in zip(wanted, made, strict=True):
        for n, (plan, draft) in enumerate(zip(plans_told(m), m.drafts, strict=True)):
            said = m.texts[n + 1] if n + 1 < len(m.texts) else ""
            if "<inspect>" not in said or (plan is None and "<ins>" in "".join(m.texts)):
                continue
            right, sound = judge.judge(plan or request.graph, draft).correct, _SOUND in said
            counted["drafts"] += 1
            counted["wrong"] += not right
            counted["found"] += not right and not sound
            counted["false_alarms"] += right and not sound
        if any("<refine>" in text for text in m.texts):
            counted["refined"] += 1
            counted["right_after_refining"] += judge.judge(request.graph, m.picture).correct
    return counted


def exchanged(made: Kept) -> bool:
    """Whether the second plan describes the first plan's object in another cell."""
    first, second = first_two_plans(made)
    if not first or not second:
        return False
    cells = [
        {(o.name, o.attributes.get("colour")): o.attributes.get(PLACE) for o in g.objects} for g in (first, second)
    ]
    return any(key in cells[1] and cells[1][key] != cell for key, cell in cells[0].items())


def second_plans(wanted: Sequence[SceneRequest], made: Sequence[Kept], judge: PixelJudge) -> dict[str, int]:
    """Of position: second plans that can be read, those that are what was asked (drawn by rule), those that exchange
    cells; and how many began with the figure that the request names first, and exchanged then."""
    counted = dict.fromkeys(("read", "right", "exchanged", "named_first", "named_first_exchanged"), 0)
    for request, m in zip(wanted, made, strict=True):
        first, second = first_two_plans(m)
        if request.category != "position" or not first or not second:
            continue
        named_first = request.graph.objects[0].id in matching(first, request.graph).values()
        counted["read"] += 1
        counted["right"] += _drawn_right(request, second, judge)
        counted["exchanged"] += exchanged(m)
        counted["named_first"] += named_first
        counted["named_first_exchanged"] += named_first and exchanged(m)
    return counted


def _drawn_right(request: SceneRequest, plan: SceneGraph, judge: PixelJudge) -> bool:
    if not all({"colour", PLACE} <= set(n.attributes) for n in plan.objects):
        return False
    return judge.judge(request.graph, paint(placed(plan))).correct


def two_level(differences: np.ndarray, samples: int = 10_000) -> Share:
    """Mean of [seeds, requests] with an interval that resamples seeds, then requests of each."""
    seeds, n = differences.shape
    random = np.random.default_rng(0)
    means = np.empty(samples)
    for i in range(samples):
        rows = random.integers(seeds, size=(seeds, 1))
        means[i] = differences[rows, random.integers(n, size=(seeds, n))].mean()
    low, high = np.percentile(means, [2.5, 97.5])
    return Share(float(differences.mean()), float(low), float(high), differences.size)


def summary(settings: Settings, out: Path, seeds: Sequence[int], arms: Sequence[str] = ARMS) -> dict:
    wanted, judge = asked(settings), PixelJudge()
    made = {(arm, s): drawn(settings, out, s, arm) for arm in arms for s in seeds}
    scores = {
        key: score(wanted, {r.id: m.picture for r, m in zip(wanted, of, strict=True)}, judge)
        for key, of in made.items()
    }
    result: dict = {"settings": asdict(settings), "seeds": list(seeds)}
    result |= {name: {} for name in ("categories", "shares", "gains", "over_more", "parts", "forgotten")}
    for category in COUNTED:
        which = [n for n, r in enumerate(wanted) if r.category == category]
        right = {a: np.array([[float(scores[a, s][n].correct) for n in which] for s in seeds]) for a in arms}
        result["gains"][category] = {a: asdict(two_level(right[a] - right["one_pass"])) for a in arms[1:]}
        if "more" in arms:  # as many steps, without critiques
            critics = [a for a in arms if a in FURTHER and a != "more"]
            result["over_more"][category] = {a: asdict(two_level(right[a] - right["more"])) for a in critics}
        result["shares"][category] = {a: asdict(two_level(right[a])) for a in arms}
        result["categories"][category] = {a: right[a].mean(1).round(4).tolist() for a in arms}
    for arm in arms:
        every = [x for s in seeds for x in scores[arm, s]]
        of = [m for s in seeds for m in made[arm, s]]
        result["parts"][arm] = {k: round(v, 4) for k, v in parts(every).items()}
        result[arm] = {
            "drafts": float(np.mean([len(m.drafts) for m in of])),
            "euler_steps": float(np.mean([m.steps for m in of])),
            "ended": float(np.mean([m.ended for m in of])),
            "nothing_drawn": float(np.mean([not m.drafts for m in of])),
            "inspected": inspected(list(wanted) * len(seeds), of, judge),
            "second_plans": second_plans(list(wanted) * len(seeds), of, judge),
            "exchanged": sum(map(exchanged, of)),
            "wrong_positions": sum(x.category == "position" and not x.correct for x in every),
            "of_them_exchanged": sum(
                exchanged(m) for m, x in zip(of, every, strict=True) if x.category == "position" and not x.correct
            ),
            "curves": {str(s): curve(out / f"{arm}_{s}" / "metrics.jsonl") for s in seeds},
        }
        if runs := [steps for m in of for steps in steps_told(m) if len(steps) > 1]:
            result["forgotten"][arm] = asdict(consistency(runs, judge))
    result["table"] = score_table({a: by_category([x for s in seeds for x in scores[a, s]]) for a in arms})
    return result


def curve(path: Path, points: int = 40) -> dict[str, list]:
    """Means of the losses over equal stretches of the run."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    stretches = np.array_split(np.arange(len(rows)), min(points, len(rows)))
    names = ("loss/text", "loss/flow")
    means = {n: [round(float(np.mean([rows[i][n] for i in s])), 5) for s in stretches] for n in names}
    return {"step": [rows[s[-1]]["step"] for s in stretches]} | means


# --- the command ------------------------------------------------------------------------------------------------------


def one(settings: Settings, out: Path, seed: int, arm: str) -> None:
    """Train, and draw where that can be: one pass waits for the drafts of the process, what follows for its weights."""
    there = lambda earlier: is_drawn(settings, out, seed, earlier)  # noqa: E731
    if arm in FURTHER and not there("process" if arm == "self_sampled" else "self_sampled"):
        return
    train(settings, out, seed, arm)
    if arm != "one_pass" or there("process"):
        draw_arm(settings, out, seed, arm)


def is_drawn(settings: Settings, out: Path, seed: int, arm: str) -> bool:
    return all(_chunk(out / f"{arm}_{seed}", n).exists() for n in range(0, settings.requests, _CHUNK))


@contextmanager
def stopping_at(deadline: float) -> Iterator[None]:
    """SIGTERM for this process then: training saves its last whole step, other parts are whole or not there."""
    timer = threading.Timer(max(0.0, deadline - time.time()), os.kill, (os.getpid(), signal.SIGTERM))
    timer.daemon = True
    if deadline < math.inf:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, required=True, help="folder that keeps rows, models and drafts")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(default: %(default)s)")
    p.add_argument("--jobs", type=int, default=1, help="models trained at a time (default: %(default)s)")
    p.add_argument("--minutes", type=float, help="stop after so many; the same command goes on")
    p.add_argument(
        "--arms", nargs="+", choices=ABLATIONS, default=[], metavar="ARM", help=f"ablations: {', '.join(ABLATIONS)}"
    )
    p.add_argument("--small", action="store_true", help="everything in miniature, of no meaning")
    p.add_argument("--tune", action="store_true", help="draw training requests of another seed, to choose settings by")
    p.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="another setting, repeatable")
    p.add_argument("--record", action="store_true", help="write the scoreboard and the curves")
    p.add_argument("--one", metavar="SEED:ARM", help=argparse.SUPPRESS)
    p.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    args = p.parse_args(argv)
    settings = Settings.small() if args.small else Settings()
    if args.tune:
        settings = replace(settings, split="train", drawn_seed=99)
    for pair in args.set:
        name, _, value = pair.partition("=")
        if name not in asdict(settings):
            p.error(f"--set {pair}: settings are {', '.join(asdict(settings))}")
        settings = replace(settings, **{name: type(getattr(settings, name))(value)})
    args.arms = [*ARMS, *(a for a in ABLATIONS if a in args.arms)]
    if {"more", "symbolic"} & set(args.arms) and "self_sampled" not in args.arms:
        p.error("--arms more and symbolic are of the requests that self_sampled gave rows for: name it too")
    if args.record and (args.small or args.tune or args.set):
        p.error("only the comparison as it stands in Settings is recorded: without --small, --tune and --set")
    if args.record and not {0, 1, 2} <= set(args.seeds):
        p.error("what is recorded is of the seeds 0, 1 and 2 at least")
    keep_settings(args.out, settings)
    deadline = args.deadline or (time.time() + 60 * args.minutes if args.minutes else math.inf)
    if args.one:
        seed, arm = args.one.split(":")
        with stopping_at(deadline):
            one(settings, args.out, int(seed), arm)
        return 0
    try:
        lock = held(args.out / ".lock")
    except BatchError as error:
        p.error(str(error))
    with lock:
        return compare(args, settings, deadline)


def compare(args: argparse.Namespace, settings: Settings, deadline: float) -> int:
    """Do what is missing, then sum up; the exit status."""
    with stopping_at(deadline):
        build(settings, args.out / "rows")
    if not all_parts(args, settings, deadline):
        print("not finished: the same command goes on", flush=True)
        return _UNFINISHED
    result = summary(settings, args.out, args.seeds, args.arms)
    write_text(args.out / "result.json", json.dumps(result, indent=1) + "\n")
    tell(result)
    if args.record:
        record_all(result, args)
    return 0


def keep_settings(out: Path, settings: Settings) -> None:
    path, now = out / "settings.json", asdict(settings)
    if path.exists() and (changed := changes(json.loads(path.read_text()), now)):
        sys.exit(f"{out} holds a comparison of other settings ({changed}): choose another --out")
    write_text(path, json.dumps(now, indent=1) + "\n")


def all_parts(args: argparse.Namespace, settings: Settings, deadline: float) -> bool:
    """Train and draw in processes of their own, then what had to wait for others; whether all is there."""
    order = ("process", "one_pass", "plan", "inspect", "unmended", "self_sampled", "symbolic", "more")
    for _ in range(3):
        left = [(a, s) for a in order for s in args.seeds if a in args.arms and not is_drawn(settings, args.out, s, a)]
        with ThreadPoolExecutor(args.jobs) as pool:
            done = [pool.submit(_part, args, seed, arm, deadline) for arm, seed in left]
            for part in done:
                part.result()
    return all(is_drawn(settings, args.out, s, a) for a in args.arms for s in args.seeds)


def _part(args: argparse.Namespace, seed: int, arm: str, deadline: float) -> None:
    if time.time() >= deadline:
        return
    command = [sys.executable, "-m", "benchmarks.process_gain", "--out", str(args.out), "--one", f"{seed}:{arm}"]
    command += [f"--{name}" for name in ("small", "tune") if getattr(args, name)]
    command += [word for pair in args.set for word in ("--set", pair)]
    command += ["--deadline", str(deadline)] if deadline < math.inf else []
    threads = str(max(1, (os.cpu_count() or 1) // args.jobs))
    code = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": threads}).returncode
    if code not in (0, -signal.SIGTERM):
        raise SystemExit(f"{arm} of seed {seed} failed with status {code}")


def tell(result: dict) -> None:
    print(f"\n{result['table']}\n")
    for category, gains in result["gains"].items():
        for arm, gain in gains.items():
            print(f"{category}: {arm} - one pass {Share(**gain)}; by seed {result['categories'][category][arm]}")
        for arm, gain in result["over_more"].get(category, {}).items():
            print(f"{category}: {arm} - more {Share(**gain)}")
    for arm, shares in result["parts"].items():
        told = ", ".join(f"{k} {v:.3f}" for k, v in result[arm].items() if isinstance(v, float))
        counts = {k: v for k, v in result[arm].items() if isinstance(v, int)} | result[arm]["inspected"]
        plans = f"second plans {result[arm]['second_plans']}"
        print(f"{arm}: {told}; {shares}; {counts}; {plans}; forgotten {result['forgotten'].get(arm)}")


def record_all(result: dict, args: argparse.Namespace) -> None:
    command = f"python -m benchmarks.process_gain --out DIR --seeds {' '.join(map(str, result['seeds']))}"
    for id, category in (("process/position_gain", "position"), ("process/attribute_gain", "color_attr")):
        g = result["gains"][category]["process"]
        record(id, g["value"], n=g["n"], command=command, interval=(g["low"], g["high"]), file=DEFAULT_FILE)
    if (share := result["forgotten"].get("process", {}).get("forgotten")) is not None:
        record("process/forgotten_objects", share, n=result["forgotten"]["process"]["at_stake"], command=command)
    write_text(RESULTS, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
