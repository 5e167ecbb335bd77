"""`rollout`: prompts answered by an agent, a program each."""

from __future__ import annotations

import argparse
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from genevolve_fast.commands.batches import follow, open_bar, tell_end
from genevolve_fast.commands.opening import AddCommand, device, read_section


def add(command: AddCommand) -> None:
    """Add the parsers of this module."""
    p = command(
        "rollout",
        run_rollout,
        "Answer prompts with an agent: search, references, a program each; finished rows survive a crash.",
        "genevolve-fast rollout --input prompts.jsonl --output-dir runs/batch --base-url http://localhost:8000/v1",
    )
    source = p.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", type=Path, help="JSON list or JSON lines with `prompt` or `question`")
    source.add_argument("--prompt", help="a single prompt")
    p.add_argument("--output-dir", type=Path, required=True, help="folder of results.json; started again, it continues")
    p.add_argument("--max-samples", type=int, help="only the first rows")
    p.add_argument("--fresh", action="store_true", help="forget the rows that the folder already holds")
    p.add_argument("--parallel", type=int, default=4, help="rollouts at a time (default: %(default)s)")
    add_agent_flags(p)


def add_agent_flags(p: argparse.ArgumentParser, seeded: str = "the sampling", policy: bool = True) -> None:
    """Who answers, with which tools and limits; `seeded` is what --seed is of, `policy` adds its flag."""
    if policy:
        p.add_argument("--policy", help="folder of a policy, or sandbox:start: sampled in this process, without server")
    p.add_argument("--model", help="name the server gave the model (default: $GENEVOLVE_MODEL, else GenEvolve)")
    p.add_argument("--base-url", help="chat server (default: $OPENAI_BASE_URL, else http://localhost:8000/v1)")
    p.add_argument("--patience", type=float, help="seconds to wait for a server that restarts (default: 120)")
    p.add_argument("--temperature", type=float, default=0.6, help="(default: %(default)s)")
    p.add_argument("--top-p", type=float, default=0.9, help="(default: %(default)s)")
    p.add_argument("--seed", type=int, help=f"of {seeded} (default: 0 with --policy, the server's own choice else)")
    p.add_argument("--max-tokens", type=int, default=4096, help="tokens of one reply (default: %(default)s)")
    p.add_argument("--max-rounds", type=int, default=11, help="replies of one rollout (default: %(default)s)")
    p.add_argument(
        "--max-prompt-length", type=int, default=6144, help="tokens of system prompt and request (default: %(default)s)"
    )
    p.add_argument(
        "--max-response-length", type=int, default=30000, help="tokens after the request (default: %(default)s)"
    )
    p.add_argument("--system-prompt", type=Path, help="file of the system prompt your policy was trained with")
    p.add_argument("--n-max-reference-images", type=int, default=2, help="(default: %(default)s)")
    p.add_argument("--observe-images", choices=["text", "tokens"], default="text", help="how found pictures are shown")
    p.add_argument(
        "--tools", choices=["serper", "searxng", "template", "sandbox"], default="serper", help="(default: %(default)s)"
    )
    p.add_argument("--tool-set", action="append", default=[], metavar="FIELD=VALUE", help="a field of the tools")
    p.add_argument("--tool-cache", choices=["record", "replay"], help="keep what the web answered, or answer from it")
    p.add_argument("--tool-cache-dir", type=Path, help="folder of the cache")


def run_rollout(args: argparse.Namespace) -> int:
    from genevolve_fast.agent.journal import read_samples, sample_of

    one = {"id": "single", "prompt": args.prompt}
    return roll_out(args, read_samples(args.input) if args.input else [sample_of(0, one, "--prompt")])


def roll_out(args: argparse.Namespace, samples: Sequence) -> int:
    """Answer what is not answered yet in args.output_dir.

    Exit status 1 when nothing was answered or the batch gave up, 128 + signal when it was interrupted.
    """
    import asyncio
    from contextlib import closing

    from genevolve_fast.agent.batch import run_batch
    from genevolve_fast.agent.journal import RESULTS, Journal
    from genevolve_fast.incidents import Incidents
    from genevolve_fast.resumable import BatchError

    args.output_dir = args.output_dir.resolve()
    incidents = Incidents()
    settings = rollout_settings(args)
    try:
        opening = open_runner(args, incidents, args.output_dir / "images")  # before --fresh forgets anything
    except ValueError as error:  # the tools' and the agent's, which name what is missing
        raise BatchError(str(error)) from None
    with closing(Journal(args.output_dir, samples, settings, args.fresh)) as journal:
        if journal.adopted:
            print(f"{journal.adopted} rows of an earlier {RESULTS} are kept, whatever settings made them")
        samples = samples[: args.max_samples]
        with open_bar(len(samples), "rollout", "prompt") as bar:

            async def whole():
                async with opening as runner:
                    return await run_batch(samples, journal, runner, parallel=args.parallel, progress=follow(bar))

            batch = asyncio.run(whole())
    status = tell_end(batch, f"{batch.line()}, {args.output_dir / RESULTS}", incidents)
    return status or int(not batch.succeeded)


_LIMITS = "max_rounds max_prompt_length max_response_length n_max_reference_images temperature top_p observe_images"


def rollout_limits(args: argparse.Namespace) -> dict:
    """Limits and sampling under the agent's names."""
    return {name: getattr(args, name) for name in _LIMITS.split()} | {"max_tokens_per_round": args.max_tokens}


def rollout_settings(args: argparse.Namespace) -> dict:
    """What rollouts of one folder must share. Raises BatchError for flags that would do nothing."""
    from genevolve_fast.resumable import BatchError

    for name in ("parallel", "max_samples"):
        if getattr(args, name, None) is not None and getattr(args, name) < 1:
            raise BatchError(f"--{name.replace('_', '-')} must be at least 1")
    for name in ("model", "base_url", "patience"):
        if args.policy and getattr(args, name) is not None:
            raise BatchError(f"--{name.replace('_', '-')} is of a server, and --policy samples without one")
    if args.tools == "sandbox" and (args.tool_set or args.tool_cache or args.tool_cache_dir):
        raise BatchError("--tool-set and --tool-cache are of live tools; the sandbox's need none")
    if bool(args.tool_cache) != bool(args.tool_cache_dir):
        raise BatchError("--tool-cache and --tool-cache-dir go together: record or replay, and the folder")
    who = {"policy": args.policy} if args.policy else {"model": rollout_model(args)}
    if prompt := given_prompt(args):
        who["system_prompt"] = hashlib.sha256(prompt.encode()).hexdigest()
    return who | rollout_limits(args) | {"tools": args.tools, "seed": args.seed}


def given_prompt(args: argparse.Namespace) -> str | None:
    """The text of --system-prompt. Raises BatchError where the file holds none."""
    from genevolve_fast.resumable import BatchError

    if args.system_prompt is None:
        return None
    try:
        text = args.system_prompt.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise BatchError(f"--system-prompt {args.system_prompt} cannot be read: {error}") from error
    if not text:
        raise BatchError(f"--system-prompt {args.system_prompt} is empty")
    return text


def rollout_model(args: argparse.Namespace) -> str:
    return args.model or os.environ.get("GENEVOLVE_MODEL") or "GenEvolve"


def open_runner(args: argparse.Namespace, incidents, pictures: Path, wrap=lambda tool: tool):
    """What answers rows, opened by `async with`: an agent over a chat server, or a policy in this process.

    Found pictures are kept in the folder `pictures`; the agent is given `wrap(tool)` for every tool.
    """
    from genevolve_fast.agent.batch import chat_runner, policy_runner
    from genevolve_fast.agent.inference import Agent, session_settings
    from genevolve_fast.agent.prompts import system_prompt

    settings = session_settings(**rollout_limits(args))
    tools, prompt = open_rollout_tools(args, pictures, incidents)
    tools = {name: wrap(tool) for name, tool in tools.items()}
    prompt = given_prompt(args) or prompt
    if args.policy:
        from genevolve_fast.rollout.transformers_engine import TransformersEngine

        policy = open_rollout_policy(args.policy)
        engine = TransformersEngine(policy, max_batch=args.parallel, deterministic=False)
        prompt = prompt or system_prompt(tools)
        return policy_runner(engine, policy.codec, tools, prompt, settings, args.seed or 0, pictures)
    agent = Agent(
        rollout_model(args),
        args.base_url or None,
        tools=tools,
        system_prompt=prompt,
        patience=120.0 if args.patience is None else args.patience,
        seed=args.seed,
        incidents=incidents,
        **rollout_limits(args),
    )
    return chat_runner(agent, pictures)


def open_rollout_policy(path: str):
    """A policy for sampling: bfloat16 on a GPU, float32 elsewhere."""
    import torch

    from genevolve_fast.policy.model import Policy
    from genevolve_fast.sandbox.tiny_policy import start_path

    where = device()
    dtype = torch.bfloat16 if where.type == "cuda" else torch.float32
    return Policy.from_pretrained(start_path() if path == "sandbox:start" else path, dtype).to(where).eval()


def open_rollout_tools(args: argparse.Namespace, pictures: Path, incidents):
    """(tools, the system prompt that belongs to them or None); found pictures are kept in the folder `pictures`."""
    if args.tools == "sandbox":
        from genevolve_fast.agent.results import Filed
        from genevolve_fast.sandbox.world import SYSTEM_PROMPT, SandboxWorld

        tools = SandboxWorld().tools()
        return tools | {"image_search": Filed(tools["image_search"], pictures)}, SYSTEM_PROMPT
    from genevolve_fast.agent.tools import ToolsConfig, open_tools

    fields = {"kind": args.tools, "image_dir": pictures}
    if args.tool_cache:
        fields |= {"cache_mode": args.tool_cache, "cache": args.tool_cache_dir}
    return open_tools(read_section(ToolsConfig, fields, args.tool_set, "--tool-set", "tools"), incidents), None
