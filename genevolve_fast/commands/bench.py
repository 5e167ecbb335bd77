"""`bench`: a policy on held-out requests, in the sandbox at once or stage by stage on a published bench."""

from __future__ import annotations

import argparse
import json
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path, PurePosixPath

from genevolve_fast.commands.opening import RUNS, AddCommand, load, open_policy, open_rolling, open_world, set_threads
from genevolve_fast.commands.render import add_renderer_flags, add_without_references
from genevolve_fast.commands.rollout import add_agent_flags
from genevolve_fast.commands.score import add_score_flags

_SANDBOX_REQUESTS = 200


def add(command: AddCommand) -> None:
    """Add the parsers of this module."""
    p = command(
        "bench",
        run_bench_command,
        "Judge a policy on held-out requests; the same seeds for every policy. On a published bench: rollout, render, "
        "score and tables, each stage in its own folder, continued where it stopped.",
        "genevolve-fast bench --policy runs/demo/policy --name after --out runs/demo/bench/after\n"
        "  genevolve-fast bench --data GenEvolve-Bench --base-url http://localhost:8000/v1 --judge-model MODEL "
        "--judge-base-url URL",
    )
    what = p.add_mutually_exclusive_group()
    what.add_argument(
        "--data",
        default="sandbox",
        help="sandbox, or a bench: folder, table or hub id (default: %(default)s)",
    )
    what.add_argument("--wise", type=Path, metavar="FOLDER", help="data folder of WISE in place of --data")
    p.add_argument("--policy", help="folder of a policy (default: sandbox:start; on a published bench a chat server)")
    p.add_argument("--name", default=None, help="how the table names it (default: the policy or model)")
    p.add_argument("--requests", type=int, help=f"the first requests only (sandbox: {_SANDBOX_REQUESTS})")
    p.add_argument("--out", type=Path, default=None, help="folder of everything that is made")
    p.add_argument("--config", default="demo", help="sandbox: configuration of rollout and evaluate sections")
    p.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="sandbox: override one field, repeatable"
    )
    known = vars(p.parse_args([]))
    rollouts = p.add_argument_group("rollout, on a published bench")
    rollouts.add_argument("--parallel", type=int, default=4, help="rollouts at a time (default: %(default)s)")
    add_agent_flags(rollouts, policy=False)
    rest = p.add_argument_group("render and score, on a published bench")
    add_renderer_flags(rest, default=None, told="; must be named, or is the canvas with --judge sandbox")
    add_without_references(rest)
    rest.add_argument("--render-seed", type=int, default=0, help="seed of the renderer (default: %(default)s)")
    rest.add_argument("--fresh", action="store_true", help="forget what the stages' folders hold")
    add_score_flags(rest)
    rest.add_argument("--protocol", choices=["original", "verified"], help="of WISE (default: by its data files)")
    rest.add_argument("--judge-api-key-env", metavar="NAME", help="WISE: environment variable with the judge's key")
    staged = {name: default for name, default in vars(p.parse_args([])).items() if name not in known}
    p.set_defaults(of_stages=staged, of_sandbox={name: known[name] for name in ("config", "set")})


def run_bench_command(args: argparse.Namespace) -> int:
    from genevolve_fast.resumable import BatchError

    if args.requests is not None and args.requests < 1:
        raise BatchError("--requests must be at least 1")
    if args.data == "sandbox" and args.wise is None:
        _refuse(args, args.of_stages, "is of a published bench: give --data FOLDER or --wise FOLDER")
        return run_sandbox(args)
    _refuse(args, args.of_sandbox, "is of the sandbox: a published bench takes the flags of its stages")
    return run_stages(args)


def _refuse(args: argparse.Namespace, defaults: dict, why: str) -> None:
    """Raise BatchError for a flag that would do nothing."""
    from genevolve_fast.resumable import BatchError

    for name, default in defaults.items():
        if getattr(args, name) != default:
            raise BatchError(f"--{name.replace('_', '-')} {why}")


# --- the sandbox ------------------------------------------------------------------------------------------------------


def run_sandbox(args: argparse.Namespace) -> int:
    from genevolve_fast.evaluate.bench import ends, table
    from genevolve_fast.train.config import EvolveConfig

    policy = args.policy or "sandbox:start"
    requests = _SANDBOX_REQUESTS if args.requests is None else args.requests
    args.set = [f"evaluate.requests={requests}", f"policy.path={policy}", *args.set]
    config = load(args, EvolveConfig)
    set_threads(config.threads)
    sandbox, world = open_world(config)
    name = args.name or policy
    folder = args.out or RUNS / "bench" / name.replace("/", "_").replace(":", "_")
    bench = bench_once(folder, name, open_policy(config.policy), sandbox, world, config)
    print(table([bench]))
    if world.rolling is not None:
        print(ends(bench))
    print(f"written to {folder}")
    return 0


def bench_once(folder: Path, name: str, policy, sandbox, world, config):
    """The bench of `policy`, or the one already in `folder`."""
    from tqdm import tqdm

    from genevolve_fast.evaluate.bench import load_bench, run_bench, save_bench, save_truth
    from genevolve_fast.rollout.transformers_engine import TransformersEngine
    from genevolve_fast.train.evolve import session_settings

    if (folder / "bench.json").exists():
        return load_bench(folder)
    requests = sandbox.requests("bench", config.evaluate.requests)
    sampled = config.evaluate.temperature, config.evaluate.top_p
    settings = session_settings(config.rollout, world, *sampled)
    if world.rolling is not None:
        world = replace(world, rolling=open_rolling(config, world.renderer, *sampled))
    with tqdm(total=len(requests), desc=f"bench {name}", unit="request", dynamic_ncols=True) as bar:
        bench = run_bench(
            name,
            requests,
            world=world,
            engine=TransformersEngine(policy, max_batch=config.rollout.max_batch),
            codec=policy.codec,
            settings=settings,
            on_done=lambda: bar.update(1),
        )
    save_truth(requests, world, folder.parent / "truth")
    save_bench(bench, requests, folder)
    return bench


# --- a published bench, stage by stage --------------------------------------------------------------------------------


class Stages:
    """The folders of a bench, and `stages.json`: the seconds that each stage took, all its runs together."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self._file = self.folder / "stages.json"
        self.seconds: dict[str, float] = {}
        if self._file.exists():
            self.seconds = json.loads(self._file.read_text(encoding="utf-8"))

    @contextmanager
    def timed(self, stage: str) -> Iterator[Path]:
        """Run a stage in its folder."""
        from genevolve_fast.files import write_text

        begun = time.monotonic()
        try:
            yield self.folder / stage
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.monotonic() - begun
            write_text(self._file, json.dumps(self.seconds, indent=1))


def run_stages(args: argparse.Namespace) -> int:
    """Rollout, render, score. A stage that gave up ends the command with its status; the next run goes on there."""
    from genevolve_fast.agent.journal import sample_of

    name = args.name or args.policy or args.model or "GenEvolve"
    stages = Stages(args.out or RUNS / "bench" / name.replace("/", "_").replace(":", "_"))
    if args.wise is None:
        samples, truth_root = read_bench(args.data)
    else:
        from genevolve_fast.evaluate.wise import read_prompts

        protocol, prompts = read_prompts(args.wise, args.protocol)
        rows = ({"id": p.prompt_id, "prompt": p.prompt} for p in prompts)
        samples = [sample_of(i, row, str(args.wise)) for i, row in enumerate(rows)]
    samples = samples[: args.requests]
    _check_scoring(args)
    args.renderer = _renderer(args)
    if status := roll_out_stage(args, samples, stages):
        return status
    if status := render_stage(args, stages):
        return status
    if args.wise is None:
        return score_stage(args, truth_root, stages, name)
    return wise_stage(args, protocol, prompts[: args.requests], stages, name)


def read_bench(data: str) -> tuple[list, Path]:
    """(rows of a published bench to answer, the folder of their ground truth). Raises DataError, for a bad row too.

    The pictures of a bench on the hub are brought here first.
    """
    from genevolve_fast.agent.journal import sample_of
    from genevolve_fast.data.published import check_request, open_set
    from genevolve_fast.data.rows import BadRow, DataError

    source = open_set(data, "bench")
    samples, root = [], None
    for line, row in source.rows():
        if isinstance(row, BadRow):
            raise row
        check_request(row, source.where, line)
        truth = source.file(row["gt_image"])
        root = root or truth.parents[len(PurePosixPath(row["gt_image"]).parts) - 1]
        samples.append(sample_of(len(samples), row, f"{source.where}, line {line}"))
    if root is None:
        raise DataError(f"{source.where} holds no rows")
    return samples, root


def _renderer(args: argparse.Namespace) -> str:
    """Who draws. Raises BatchError where nobody is named: the canvas draws nothing that a model could grade."""
    from genevolve_fast.resumable import BatchError

    if args.renderer is None and (args.wise is not None or args.judge != "sandbox"):
        raise BatchError("--renderer is missing: who draws, such as qwen-service with --service-url, or nano-banana")
    return args.renderer or "canvas"


def _check_scoring(args: argparse.Namespace) -> None:
    """Raise BatchError for a judge that cannot be, before anything is sampled."""
    from genevolve_fast.commands.judging import judge_settings, open_judges
    from genevolve_fast.commands.wise import judge_address
    from genevolve_fast.incidents import Incidents
    from genevolve_fast.resumable import BatchError

    if args.wise is None:
        for name in ("protocol", "judge_api_key_env"):
            if getattr(args, name) is not None:
                raise BatchError(f"--{name.replace('_', '-')} is of --wise")
        judge_settings(args)
        open_judges(args, Incidents())
        return
    for name in ("judge", "judge_set", "judge_programs", "total_cases", "price"):
        if getattr(args, name) != args.of_stages[name]:
            raise BatchError(f"--{name.replace('_', '-')} is of GenEvolve-Bench; WISE has a judge of its own")
    judge_address(args)


def roll_out_stage(args: argparse.Namespace, samples: Sequence, stages: Stages) -> int:
    from contextlib import closing

    from genevolve_fast.agent.journal import JOURNAL, Journal
    from genevolve_fast.commands.rollout import roll_out, rollout_settings

    folder = stages.folder / "rollout"
    mine = Namespace(**vars(args) | {"output_dir": folder, "max_samples": None})
    if (folder / JOURNAL).exists() and not args.fresh:
        with closing(Journal(folder, samples, rollout_settings(mine), False)) as journal:
            done = len(journal.done)
        if done == len(samples):
            print(f"rollout: {done} rows are answered already")
            return 0
    print(f"rollout: {len(samples)} requests, {folder}", flush=True)
    with stages.timed("rollout"):
        return roll_out(mine, samples)


def render_stage(args: argparse.Namespace, stages: Stages) -> int:
    """Draw the programs of the rollout stage. The one place where `bench` asks for pictures."""
    from genevolve_fast.commands.render import run_render

    source, folder = stages.folder / "rollout" / "results.json", stages.folder / "render"
    print(f"render: {folder}", flush=True)
    with stages.timed("render"):
        return run_render(Namespace(**vars(args) | {"input": source, "output_dir": folder, "seed": args.render_seed}))


def score_stage(args: argparse.Namespace, truth_root: Path, stages: Stages, name: str) -> int:
    from genevolve_fast.commands.score import score_results

    print(f"score: {stages.folder / 'score'}", flush=True)
    results = stages.folder / "render" / "results.json"
    return score_results(
        args,
        results,
        stages.folder / "score",
        [truth_root],
        name=name,
        sampled_tokens=sampled_tokens(stages.folder / "rollout"),
        stages=stages,
    )


def wise_stage(args: argparse.Namespace, protocol, prompts: Sequence, stages: Stages, name: str) -> int:
    from genevolve_fast.commands.wise import judge_pictures
    from genevolve_fast.evaluate.score_files import picture_path, read_rows

    rows = read_rows(stages.folder / "render" / "results.json")
    drawn = {row["id"]: picture_path(row, [stages.folder / "render"]) for row in rows if row.get("success")}
    pictures = {i: path for i, path in drawn.items() if path is not None}
    print(f"score: {stages.folder / 'score'}", flush=True)
    with stages.timed("score") as folder:
        return judge_pictures(args, protocol, prompts, pictures, folder, name)


def sampled_tokens(folder: Path) -> int | None:
    """Tokens that the policy sampled for the rows of a rollout folder; None where no server told."""
    from genevolve_fast.agent.journal import JOURNAL

    last: dict[int, int] = {}
    for line in (folder / JOURNAL).read_bytes().splitlines():  # of text, line ends within a line count too
        row = json.loads(line)
        if isinstance(row.get("tokens"), int):
            last[row["position"]] = row["tokens"]
    return sum(last.values()) if last else None
