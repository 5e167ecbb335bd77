"""`data`: from a prompt pool to the published views, one step a command; every step reads what the one before wrote."""

from __future__ import annotations

import argparse
import asyncio
import os
from collections.abc import Mapping
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

from genevolve_fast.commands.batches import follow, open_bar, tell_attempts, tell_end
from genevolve_fast.commands.opening import AddCommand, read_section, show_fields, subcommands
from genevolve_fast.commands.render import add_renderer_flags, open_chosen_renderer
from genevolve_fast.commands.rollout import add_agent_flags, open_runner, rollout_settings


def add(command: AddCommand) -> None:
    """Add the parsers of this module."""
    top = command(
        "data",
        None,
        "Make and check training data: prompt pool, teacher trajectories, filters, ground truth, published views.",
        "genevolve-fast data check GenEvolve-Data-Bench",
    )
    step = subcommands(top.add_subparsers(dest="step", required=True, metavar="STEP"))

    p = step(
        "pool",
        run_pool,
        "Write requests from recipes, drop repetitions, split by recipe cells; recipes stay in a file of their own.",
        "genevolve-fast data pool --writer chat --model MODEL --count 12000 --output-dir data/pool",
    )
    output(p)
    p.add_argument("--writer", choices=["sandbox", "chat"], default="sandbox", help="(default: %(default)s)")
    p.add_argument("--count", type=int, default=400, help="requests to write (default: %(default)s)")
    p.add_argument("--recipes", type=Path, help="JSONL of your own recipes, instead of --count drawn ones")
    p.add_argument("--seed", type=int, default=0, help="of recipes and splits (default: %(default)s)")
    p.add_argument("--shares", default="0.8,0.1,0.1", help="of train, eval and bench (default: %(default)s)")
    near(p)
    chat(p, "writes the requests")

    p = step(
        "trajectories",
        run_trajectories,
        "Let a teacher answer the pool through the real tool loop; finished rows survive a crash.",
        "genevolve-fast data trajectories --input data/pool --output-dir data/trajectories --model MODEL",
    )
    source(p, "a pool")
    output(p)
    p.add_argument(
        "--teacher",
        choices=["agent", "demonstrator", "perfect-demonstrator"],
        default="agent",
        help="agent: the flags below; else the sandbox's script, with its habits or without (default: %(default)s)",
    )
    p.add_argument("--parallel", type=int, default=4, help="rollouts at a time (default: %(default)s)")
    add_agent_flags(p)

    p = step(
        "filter",
        run_filter,
        "Keep the trajectories that pass every filter and then a review; each dropped one keeps its reasons.",
        "genevolve-fast data filter --input data/trajectories --output-dir data/filtered --review chat --model VLM",
    )
    source(p, "trajectories")
    output(p)
    p.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="a limit of the filters")
    p.add_argument("--fields", action="store_true", help="list the limits and stop")
    review(p)
    p.add_argument("--min-score", type=float, help="review rule: score to pass (default: 1)")
    chat(p, "reviews")

    p = step(
        "truth",
        run_truth,
        "Draw the ground truth of every kept program and let a second review look at it.",
        "genevolve-fast data truth --input data/filtered --output-dir data/truth --renderer canvas --review rule",
    )
    source(p, "filtered trajectories")
    output(p)
    add_renderer_flags(p, default="canvas")
    p.add_argument("--seed", type=int, default=0, help="of the renderer (default: %(default)s)")
    review(p)
    chat(p, "reviews")

    for name, run, help_ in (
        ("sft-view", run_sft_view, "Write GenEvolve-Data-SFT: train and eval conversations, no ground truth in them."),
        ("feedback-view", run_feedback_view, "Write GenEvolve-Data-RL: train requests with their ground truth."),
        ("bench-view", run_bench_view, "Write GenEvolve-Bench: bench requests with ground truth and skill tags."),
    ):
        p = step(name, run, help_, f"genevolve-fast data {name} --input data/truth --output-dir data/view")
        source(p, "ground truth" + (", or filtered trajectories" if name == "sft-view" else ""))
        output(p)
        if name != "bench-view":
            p.add_argument("--bench", default="", help="also leave out what repeats this published bench")
            near(p)

    p = step(
        "check",
        run_check,
        "Validate a published folder row by row and picture by picture, and print what it holds; exit status 1 if bad.",
        "genevolve-fast data check data/view",
    )
    p.add_argument("path", help="repository folder, folder of one set, or a hub id")
    p.add_argument("--no-pictures", action="store_true", help="look whether pictures are there, do not decode them")


# --- shared flags -----------------------------------------------------------------------------------------------------


def source(p: argparse.ArgumentParser, what: str) -> None:
    p.add_argument("--input", type=Path, required=True, help=f"folder of {what}")


def output(p: argparse.ArgumentParser) -> None:
    p.add_argument("--output-dir", type=Path, required=True, help="folder to write; started again, it continues")


def near(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--near",
        type=float,
        default=0.85,
        help="requests with this share of common three-word runs are the same (default: %(default)s)",
    )


def review(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--review",
        choices=["rule", "chat", "none"],
        default="rule",
        help="rule: the sandbox's judge; chat: a vision-language model (default: %(default)s)",
    )


def chat(p: argparse.ArgumentParser, what: str) -> None:
    p.add_argument("--model", help=f"the chat model that {what}")
    p.add_argument("--base-url", help="its OpenAI-compatible server (default: $OPENAI_BASE_URL)")
    p.add_argument("--api-key-env", metavar="NAME", help="variable with its key (default: OPENAI_API_KEY)")
    p.add_argument("--parallel", type=int, default=8, help="at a time (default: %(default)s)")
    p.add_argument("--patience", type=float, default=120.0, help="seconds to wait for a server that restarts")


@asynccontextmanager
async def endpoint(args: argparse.Namespace, name: str, incidents):
    """The chat endpoint of the flags. Raises DataError for what cannot work."""
    from genevolve_fast.data.rows import DataError
    from genevolve_fast.net.chat import DEFAULT_BASE_URL, NO_KEY, ChatEndpoint

    if args.api_key_env and args.api_key_env not in os.environ:
        raise DataError(f"--api-key-env {args.api_key_env}: there is no such variable")
    key = os.environ.get(args.api_key_env or "OPENAI_API_KEY") or NO_KEY
    url = args.base_url or os.environ.get("OPENAI_BASE_URL") or DEFAULT_BASE_URL
    try:
        made = ChatEndpoint(args.model, url, key, patience_s=args.patience, incidents=incidents, source=name)
    except ValueError as error:
        raise DataError(str(error)) from None
    try:
        yield made
    finally:
        await made.close()


def chat_settings(args: argparse.Namespace, used: bool, flag: str) -> dict[str, Any]:
    """What of a chat model belongs to a step's settings. Raises DataError for flags that would do nothing."""
    from genevolve_fast.data.rows import DataError

    if args.parallel < 1:
        raise DataError("--parallel must be at least 1")
    if used and not args.model:
        raise DataError(f"{flag} needs --model: the name under which a server knows it")
    if not used and (given := [n for n in ("model", "base_url", "api_key_env") if getattr(args, n) is not None]):
        names = ", ".join("--" + n.replace("_", "-") for n in given)
        raise DataError(f"{names} would do nothing without {flag}")
    return {"model": args.model} if used else {}


def say(folder: Path, manifest: Mapping[str, Any], incidents=None) -> None:
    """What a step made, a line a count; of what did not happen nothing is said."""
    for name, count in manifest["counts"].items():
        if count or ":" not in name:
            print(f"{name:34} {count:7}")
    if incidents is not None:
        tell_attempts(incidents)
    print(f"written to {folder}")


def already(folder: Path, manifest: Mapping[str, Any]) -> int:
    print(f"{folder} is complete")
    say(folder, manifest)
    return 0


# --- steps ------------------------------------------------------------------------------------------------------------


def run_pool(args: argparse.Namespace) -> int:
    """Exit status 1 where recipes are left unanswered: the same command asks again."""
    from genevolve_fast.data.pool import ChatWriter, finished_pool, read_recipes, write_pool, write_requests
    from genevolve_fast.data.recipes import draw_recipes
    from genevolve_fast.data.rows import DataError
    from genevolve_fast.files import file_hash
    from genevolve_fast.incidents import Incidents
    from genevolve_fast.resumable import Ledger

    by_chat, incidents = args.writer == "chat", Incidents()
    settings = {"writer": args.writer, "seed": args.seed, "shares": args.shares, "near": args.near}
    settings |= chat_settings(args, by_chat, "--writer chat")
    if args.recipes and not by_chat:
        raise DataError("--recipes would do nothing with --writer sandbox: its templates are its recipes")
    if args.count < 1:
        raise DataError("--count must be at least 1")
    settings |= {"recipes": file_hash(args.recipes)} if args.recipes else {"count": args.count}
    shares = read_shares(args.shares)
    if done := finished_pool(args.output_dir, settings):
        return already(args.output_dir, done)
    if by_chat:
        recipes = read_recipes(args.recipes) if args.recipes else draw_recipes(args.count, args.seed)

        async def write():
            async with endpoint(args, "pool", incidents) as at:
                return await write_requests(
                    recipes, ChatWriter(at), ledger, parallel=args.parallel, progress=lambda: shown.update(1)
                )

        opened = closing(Ledger(args.output_dir / "written.jsonl", settings, "request"))
        with opened as ledger, open_bar(len(recipes), "pool") as shown:
            items, dropped = asyncio.run(write())
            unanswered = sum(r.id not in ledger.done for r in recipes)
    else:
        from genevolve_fast.sandbox.recipes import sandbox_items
        from genevolve_fast.sandbox.world import SandboxWorld

        items, dropped, unanswered = sandbox_items(SandboxWorld(), args.count, args.seed), {}, 0
    manifest = write_pool(
        args.output_dir,
        items,
        dropped,
        shares=shares,
        near=args.near,
        seed=args.seed,
        settings=settings,
        unanswered=unanswered,
    )
    print((args.output_dir / "coverage.txt").read_text(encoding="utf-8"))
    say(args.output_dir, manifest, incidents)
    return 1 if unanswered else 0


def read_shares(text: str) -> dict[str, float]:
    from genevolve_fast.data.pool import SPLITS
    from genevolve_fast.data.rows import DataError

    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != len(SPLITS) or min(numbers) < 0 or not numbers[0] > 0 or not sum(numbers) < float("inf"):
        raise DataError(f"--shares {text!r}: three numbers such as 0.8,0.1,0.1 for {', '.join(SPLITS)}")
    return dict(zip(SPLITS, numbers, strict=True))


def run_trajectories(args: argparse.Namespace) -> int:
    """Exit status 1 where rows failed: the same command runs them again; 128 + signal when interrupted."""
    from genevolve_fast.agent.batch import run_batch
    from genevolve_fast.agent.journal import Journal
    from genevolve_fast.data.steps import finished, open_step
    from genevolve_fast.data.trajectories import samples_of, write_trajectories
    from genevolve_fast.incidents import Incidents
    from genevolve_fast.resumable import BatchError

    incidents = Incidents()
    pool = open_step(args.input, "pool")
    args.output_dir = args.output_dir.resolve()
    settings = teacher_settings(args)
    if (done := finished(args.output_dir, "trajectories", pool, settings)) and not done["counts"]["failed"]:
        return already(args.output_dir, done)
    samples = samples_of(pool)
    try:
        opening = open_teacher(args, pool, incidents)
    except ValueError as error:  # the tools' and the agent's, which name what is missing
        raise BatchError(str(error)) from None
    journal = Journal(args.output_dir, samples, settings | {"pool": pool.digest}, fresh=False)
    with closing(journal), open_bar(len(samples), "trajectories") as shown:

        async def whole():
            async with opening as runner:
                return await run_batch(samples, journal, runner, parallel=args.parallel, progress=follow(shown))

        batch = asyncio.run(whole())
        if batch.signal is None:
            manifest = write_trajectories(args.output_dir, pool, settings)
    status = tell_end(batch, batch.line(), incidents)
    if batch.signal is not None:
        return status
    say(args.output_dir, manifest, incidents)
    return 1 if manifest["counts"]["failed"] or not manifest["counts"]["trajectories"] else 0


_SCRIPT_READS = ("seed", "tools")


def teacher_settings(args: argparse.Namespace) -> dict[str, Any]:
    """What trajectories of one folder must share. Raises BatchError for flags that would do nothing."""
    from genevolve_fast.resumable import BatchError

    if args.teacher == "agent":
        return {"teacher": "agent"} | rollout_settings(args)
    fresh = argparse.ArgumentParser()
    add_agent_flags(fresh)
    plain = vars(fresh.parse_args([]))
    changed = [n for n in plain if n not in _SCRIPT_READS and getattr(args, n) != plain[n]]
    if changed or args.tools not in (plain["tools"], "sandbox"):
        names = ", ".join("--" + n.replace("_", "-") for n in changed or ["tools"])
        raise BatchError(f"{names} would do nothing with --teacher {args.teacher}: its script has the sandbox's tools")
    if args.parallel < 1:
        raise BatchError("--parallel must be at least 1")
    return {"teacher": args.teacher, "seed": args.seed or 0}


def open_teacher(args: argparse.Namespace, pool, incidents):
    """What answers a pool's rows, opened by `async with`."""
    if args.teacher == "agent":
        return open_runner(args, incidents, args.output_dir / "images")
    from dataclasses import replace

    from genevolve_fast.agent.batch import policy_runner
    from genevolve_fast.agent.results import Filed
    from genevolve_fast.data.demonstrations import ScriptedEngine
    from genevolve_fast.data.pool import pool_requests
    from genevolve_fast.data.rows import DataError
    from genevolve_fast.sandbox.bootstrap import SETTINGS, bootstrap_codec
    from genevolve_fast.sandbox.demonstrator import Demonstrator, PerfectDemonstrator
    from genevolve_fast.sandbox.world import SYSTEM_PROMPT, SandboxWorld

    if pool.manifest["settings"]["writer"] != "sandbox":
        raise DataError(f"--teacher {args.teacher} knows the sandbox's requests only, {args.input} was written by chat")
    world = SandboxWorld()
    codec = bootstrap_codec(world)
    requests = {f"{i:06d}": request for i, (_, request) in enumerate(pool_requests(pool))}
    script = PerfectDemonstrator() if args.teacher == "perfect-demonstrator" else Demonstrator()
    tools, pictures = world.tools(), args.output_dir / "images"
    return policy_runner(
        ScriptedEngine(script.next_turn, codec, requests),
        codec,
        tools | {"image_search": Filed(tools["image_search"], pictures)},
        SYSTEM_PROMPT,
        replace(SETTINGS, max_prompt_tokens=10**6, max_tokens_per_turn=10**6, max_response_tokens=10**7),
        args.seed or 0,
        pictures,
    )


def run_filter(args: argparse.Namespace) -> int:
    """Exit status 1 where nothing is kept, or reviews are undecided: the same command asks for them again."""
    from genevolve_fast.data.filters import FilterConfig, sift
    from genevolve_fast.data.review import ChatTrajectoryReviewer, JudgedProgram
    from genevolve_fast.data.rows import DataError
    from genevolve_fast.data.sifting import review_all, write_filtered
    from genevolve_fast.data.steps import finished, open_step
    from genevolve_fast.data.trajectories import read_trajectories
    from genevolve_fast.incidents import Incidents
    from genevolve_fast.resumable import Ledger

    if args.fields:
        return show_fields(FilterConfig)
    config, incidents = read_section(FilterConfig, {}, args.set, "--set", "limits"), Incidents()
    source_step = open_step(args.input, "trajectories")
    settings = {"limits": config.model_dump(), "review": args.review} | review_settings(args)
    if args.min_score is not None and args.review != "rule":
        raise DataError("--min-score would do nothing without --review rule")
    min_score = 1.0 if args.min_score is None else args.min_score
    settings |= {"min_score": min_score} if args.review == "rule" else {}
    if (done := finished(args.output_dir, "filter", source_step, settings)) and not done["counts"]["undecided"]:
        return already(args.output_dir, done)
    refuse_rule(args, read_trajectories(source_step))
    total = source_step.manifest["counts"]["trajectories"]
    with open_bar(total, "filter") as passed:
        sifted = sift(read_trajectories(source_step), config, source_step, progress=lambda: passed.update(1))

    async def reviewed():
        if args.review == "rule":
            from genevolve_fast.sandbox.judges import SandboxProgramJudge

            return await all_of(JudgedProgram(SandboxProgramJudge(), min_score))
        async with endpoint(args, "review", incidents) as at:
            return await all_of(ChatTrajectoryReviewer(at))

    async def all_of(reviewer):
        return await review_all(
            sifted.kept, reviewer, source_step, ledger, parallel=args.parallel, progress=lambda: shown.update(1)
        )

    reviews = None
    if args.review != "none":
        shared = settings | {"input": source_step.digest}
        opened = closing(Ledger(args.output_dir / "reviews.jsonl", shared, "review"))
        with opened as ledger, open_bar(len(sifted.kept), "review") as shown:
            reviews = asyncio.run(reviewed())
    manifest = write_filtered(args.output_dir, source_step, sifted, reviews, settings)
    say(args.output_dir, manifest, incidents)
    return 1 if manifest["counts"]["undecided"] or not manifest["counts"]["kept"] else 0


def review_settings(args: argparse.Namespace) -> dict[str, Any]:
    return chat_settings(args, args.review == "chat", "--review chat")


def refuse_rule(args: argparse.Namespace, trajectories) -> None:
    """Raise DataError for the sandbox's judge over requests that lack what it reads."""
    from genevolve_fast.data.rows import DataError

    if args.review == "rule" and any("checklist" not in t.request.extra for t in trajectories):
        raise DataError(
            f"--review rule is the sandbox's own judge, and requests of {args.input} have no checklist: --review chat "
            "with --model, or --review none"
        )


def run_truth(args: argparse.Namespace) -> int:
    """Exit status 1 where nothing is kept, or something failed: the same command tries it again."""
    from genevolve_fast.data.review import ChatPictureReviewer, JudgedPicture
    from genevolve_fast.data.steps import finished, open_step
    from genevolve_fast.data.trajectories import read_trajectories
    from genevolve_fast.data.truth import draw_truth, write_truth
    from genevolve_fast.incidents import Incidents
    from genevolve_fast.resumable import Ledger

    incidents = Incidents()
    filtered = open_step(args.input, "filter")
    renderer, identity = open_chosen_renderer(args, incidents)
    settings = {"renderer": identity, "seed": args.seed, "review": args.review} | review_settings(args)
    if (done := finished(args.output_dir, "truth", filtered, settings)) and not done["counts"]["failed"]:
        return already(args.output_dir, done)
    trajectories = list(read_trajectories(filtered))
    refuse_rule(args, trajectories)

    async def drawn_by(reviewer):
        return await draw_truth(
            trajectories,
            filtered,
            args.output_dir,
            renderer,
            reviewer,
            ledger,
            seed=args.seed,
            parallel=args.parallel,
            progress=lambda: shown.update(1),
        )

    async def whole():
        if args.review == "none":
            return await drawn_by(None)
        if args.review == "rule":
            from genevolve_fast.sandbox.judges import SandboxImageJudge
            from genevolve_fast.sandbox.world import SandboxWorld

            return await drawn_by(JudgedPicture(SandboxImageJudge(), SandboxWorld().truth))
        async with endpoint(args, "review", incidents) as at:
            return await drawn_by(ChatPictureReviewer(at))

    shared = settings | {"input": filtered.digest}
    opened = closing(Ledger(args.output_dir / "done.jsonl", shared, "picture"))
    with opened as ledger, open_bar(len(trajectories), "ground truth") as shown:
        drawn = asyncio.run(whole())
    manifest = write_truth(args.output_dir, filtered, trajectories, drawn, settings)
    say(args.output_dir, manifest, incidents)
    return 1 if manifest["counts"]["failed"] or not manifest["counts"]["kept"] else 0


def run_sft_view(args: argparse.Namespace) -> int:
    from genevolve_fast.data.steps import open_step
    from genevolve_fast.data.views import write_sft_view

    made = open_step(args.input, "truth", "filter")
    settings = {"bench": args.bench, "near": args.near}
    with open_bar(made.manifest["counts"]["kept"], "sft-view") as shown:
        manifest = write_sft_view(
            args.output_dir, made, settings, bench=args.bench, near=args.near, progress=lambda: shown.update(1)
        )
    say(args.output_dir, manifest)
    return 0


def run_feedback_view(args: argparse.Namespace) -> int:
    from genevolve_fast.data.steps import open_step
    from genevolve_fast.data.views import write_feedback_view

    made = open_step(args.input, "truth")
    settings = {"bench": args.bench, "near": args.near}
    say(args.output_dir, write_feedback_view(args.output_dir, made, settings, bench=args.bench, near=args.near))
    return 0


def run_bench_view(args: argparse.Namespace) -> int:
    from genevolve_fast.data.steps import open_step
    from genevolve_fast.data.views import write_bench_view

    say(args.output_dir, write_bench_view(args.output_dir, open_step(args.input, "truth"), {}))
    return 0


def run_check(args: argparse.Namespace) -> int:
    """Exit status 1 where a row or a picture is bad."""
    from genevolve_fast.data.published import LAYOUTS, find_set, find_tables, inspect, open_set
    from genevolve_fast.data.rows import DataError

    bad = found = 0
    local = Path(args.path)
    for which, layout in LAYOUTS.items():
        if local.exists():
            folder = find_set(local, which) if local.is_dir() else None
            splits = [s for s in layout.splits if folder is not None and find_tables(folder, s)]
        else:
            splits = list(layout.splits)
        for split in splits:
            opened = open_set(args.path, which, split)
            with open_bar(0, f"{layout.folder} {split}") as shown:
                contents = inspect(opened, which, split, lambda shown=shown: shown.update(1), not args.no_pictures)
            print(contents.text())
            bad, found = bad + contents.bad.count, found + 1
    if not found:
        raise DataError(f"{args.path} holds none of {', '.join(layout.folder for layout in LAYOUTS.values())}")
    return 1 if bad else 0
