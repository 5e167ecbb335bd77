"""Opening what a configuration names: file, policy, world."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Any, Protocol, TypeVar

RUNS = Path("runs")
C = TypeVar("C")


class AddCommand(Protocol):
    """Adds a command to the command line and returns its parser, to which flags are added."""

    def __call__(self, name: str, run, help_: str, example: str) -> argparse.ArgumentParser: ...


def subcommands(group) -> AddCommand:
    """What adds commands to argparse's `group` of them, each with its example."""

    def command(name: str, run, help_: str, example: str) -> argparse.ArgumentParser:
        p = group.add_parser(
            name,
            help=help_,
            description=help_,
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        p.set_defaults(run=run)
        return p

    return command


def config_path(name: str) -> Path:
    """A YAML file, or one of the built-in configurations by its bare name."""
    path = Path(name)
    if path.exists():
        return path
    built_in = Path(__file__).parents[1] / "configs" / f"{name}.yaml"
    if not built_in.exists():
        known = ", ".join(sorted(p.stem for p in built_in.parent.glob("*.yaml")))
        raise FileNotFoundError(f"no configuration {name!r}: neither a file nor one of {known}")
    return built_in


def set_threads(threads: int | None) -> None:
    import torch

    if threads:
        torch.set_num_threads(threads)


def open_policy(config, where=None):
    """The policy that a configuration names, its weights on `where`, or the GPU where there is one; 4-bit weights are
    made on the way there."""
    import torch

    from genevolve_fast.policy.model import Policy
    from genevolve_fast.policy.quantize import load_bitsandbytes, quantize

    if config.quantize != "none":
        load_bitsandbytes(f"policy.quantize {config.quantize}")  # told before gigabytes are read
    policy = Policy.from_pretrained(policy_path(config), getattr(torch, config.dtype))
    if config.quantize != "none":
        quantize(policy, config.quantize, where or device())
    if where is not None:
        policy.computes_on = device()
    return policy.to(where or device())


@contextmanager
def open_ranks(config):
    """The strategy over the ranks that a launcher started; only the first one talks. Left in order at the end."""
    from genevolve_fast.train.ranks import join, leave
    from genevolve_fast.train.strategies import open_strategy

    d = config.distributed
    ranks = join(d.timeout_s)
    strategy = open_strategy(d.strategy, ranks, offload_optimizer=d.offload_optimizer, offload_params=d.offload_params)
    with open(os.devnull, "w") as silence, nullcontext() if ranks.first else redirect_stdout(silence):
        try:
            yield strategy
        except SystemExit:  # all ranks were asked to end
            leave(ranks)
            raise
    leave(ranks)


def refuse_ranks(config, command: str) -> None:
    """Raise ConfigError where `command`, which is one process, would pass over what several ranks are to share."""
    from genevolve_fast.train.config import ConfigError

    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1 or config.distributed.shards:
        raise ConfigError(
            f"{command} is one process, and this is {world} with distributed.strategy {config.distributed.strategy!r}: "
            "start it without a launcher and with --set distributed.strategy=ddp; evolve and sft run on several"
        )


def loaded_on(strategy):
    """Where the policy's weights are read to: the host where only parts of them go to a GPU."""
    import torch

    return torch.device("cpu") if strategy.sharded_weights else device()


def policy_path(config) -> str | Path:
    """Folder of the weights that a policy section names; a hub id that is not cached yet gets its config.json."""
    from genevolve_fast.policy.model import no_policy
    from genevolve_fast.sandbox.tiny_policy import start_path

    if config.path == "sandbox:start":
        return start_path()
    if config.path.count("/") == 1 and not Path(config.path).exists():
        from huggingface_hub import snapshot_download, try_to_load_from_cache

        if not isinstance(try_to_load_from_cache(config.path, "config.json"), str):
            try:
                snapshot_download(config.path, allow_patterns=["config.json"])
            except OSError as error:
                raise no_policy(config.path) from error
    return config.path


def device():
    """The GPU where there is one; of several ranks on a node, each its own."""
    from genevolve_fast.train.ranks import local_device

    return local_device()


def open_sandbox(config):
    """The SandboxWorld of a world section."""
    from genevolve_fast.sandbox.world import SandboxWorld, WorldConfig

    return SandboxWorld(WorldConfig(seed=config.seed, categories=tuple(config.categories)))


def open_world(config, truth=None):
    """(SandboxWorld, World) of a configuration: the sandbox, where no section names something else.

    `truth` gives the ground truth of requests that are not the sandbox's. Raises ConfigError naming what is missing.
    """
    from dataclasses import replace

    from genevolve_fast.agent.prompts import system_prompt
    from genevolve_fast.agent.tools import open_tools
    from genevolve_fast.sandbox import world as sandbox
    from genevolve_fast.train.config import ConfigError

    embedded = open_sandbox(config.world)
    world = sandbox.open_world(embedded)
    world = world if truth is None else replace(world, truth=truth)
    if config.tools.kind != "sandbox":
        try:
            live = open_tools(config.tools, world.incidents)
        except ValueError as error:
            raise ConfigError(f"tools: {error}") from error
        if config.world.system_prompt == "short":
            live["query_knowledge"] = world.tools["query_knowledge"]  # the short guidance goes with the short prompt
        world = replace(world, tools=live)
    if config.world.system_prompt == "full":
        world = replace(world, system_prompt=system_prompt(world.tools))
    world = replace(world, **services(config, world))
    return embedded, replace(world, rolling=open_rolling(config, world.renderer))


def open_rolling(config, renderer, temperature: float | None = None, top_p: float | None = None):
    """How rollouts go that are no agent's (protocols.Rolling); sampled as the rollout section says, or as is told here.

    Raises ConfigError.
    """
    if not config.process.enabled:
        return None
    from genevolve_fast.process.growing import GrowthSettings
    from genevolve_fast.process.rollouts import ProcessRolling
    from genevolve_fast.train.config import ConfigError

    if renderer.min_references:
        raise ConfigError(
            f"process.enabled: {renderer.name} draws nothing without references, and a process begins with none: set "
            "renderer.text_to_image, who draws the first drafts"
        )
    p, r = config.process, config.rollout
    if p.prompts == "edit" and (config.renderer.kind in ("canvas", "text-to-image") or not renderer.max_references):
        raise ConfigError(f"process.prompts edit: {renderer.name} edits no drafts")
    settings = GrowthSettings(
        max_cycles=p.max_cycles,
        max_renders=p.max_renders or 2 * p.max_cycles,
        max_prompt_tokens=r.max_prompt_length,
        max_tokens=r.max_response_length,
        max_tokens_per_stage=r.max_tokens_per_turn,
        attempts=p.attempts,
        temperature=r.temperature if temperature is None else temperature,
        top_p=r.top_p if top_p is None else top_p,
        sampling_mask=r.replay_sampling_mask and top_p is None,  # the bench trains nothing
        prompts=p.prompts,
    )
    return ProcessRolling(settings, p.score_drafts)


def services(config, world) -> dict:
    """Renderer, judges, summarizer and embedder that a configuration names in place of the sandbox's."""
    from genevolve_fast.experience.config import open_embedder, open_summarizer
    from genevolve_fast.reward.config import open_judges
    from genevolve_fast.train.config import ConfigError

    opened: dict = {}
    try:
        if config.renderer.kind != "canvas":
            opened["renderer"] = open_any_renderer(config.renderer, world.incidents)
        if config.judge.kind != "rules":
            opened["image_judge"], opened["program_judge"] = open_judges(config.judge, world.incidents, world.truth)
        if config.summarizer.kind != "rules":
            opened["summarizer"] = open_summarizer(config.summarizer, world.incidents)
        if config.embedder.kind != "hashed":
            opened["embedder"] = open_embedder(config.embedder)
    except (ValueError, ImportError) as error:
        raise ConfigError(str(error)) from error
    return opened


def open_any_renderer(config, incidents, processes: Path | None = None):
    """The renderer of a section, the canvas and the process among them; `processes`: where grown pictures are kept
    when the section names no folder. Raises ValueError naming what is missing."""
    from genevolve_fast.render.config import open_renderer
    from genevolve_fast.render.routed import FixedSeed
    from genevolve_fast.sandbox.canvas import CanvasRenderer

    if config.kind == "canvas":
        return CanvasRenderer()
    if config.kind != "process":
        return open_renderer(config, incidents)
    from genevolve_fast.process.growing import GrowthSettings
    from genevolve_fast.process.renderer import ProcessRenderer

    grown = config.grown
    folder = grown.folder or processes
    if folder is None:
        raise ValueError("renderer.process.folder is not set: every process is kept there, and goes on from there")
    names = ("max_cycles", "max_tokens", "max_tokens_per_stage", "attempts", "temperature", "top_p")
    settings = GrowthSettings(
        **{name: getattr(grown, name) for name in names}, max_renders=grown.renders, prompts=grown.drawn_by
    )
    inner = open_any_renderer(grown.renderer, incidents)
    process = ProcessRenderer(inner, open_writer(grown, incidents), settings, folder, config.identity(), incidents)
    return process if config.seed is None else FixedSeed(process, config.seed)


def open_writer(grown, incidents):
    """Who writes the stages of a process section (process.renderer.OpenTalk). Raises ValueError."""
    from genevolve_fast.process.renderer import chat_talk, token_talk

    if grown.writer == "sandbox":
        from genevolve_fast.sandbox.process_writer import symbolic_talk

        return symbolic_talk(grown.max_cycles)
    if grown.writer == "policy":
        from genevolve_fast.commands.rollout import open_rollout_policy
        from genevolve_fast.rollout.transformers_engine import TransformersEngine

        policy = open_rollout_policy(grown.policy)
        return token_talk(TransformersEngine(policy, deterministic=False), policy.codec)
    from genevolve_fast.net.chat import NO_KEY, ChatEndpoint

    key = os.environ.get(grown.api_key_env, "").strip() if grown.api_key_env else NO_KEY
    if not key:
        raise ValueError(f"{grown.api_key_env} is not set: renderer.process.api_key_env names it")
    limits = {"request_timeout": grown.request_timeout_s, "attempts": grown.engine_attempts}

    def endpoint() -> ChatEndpoint:
        return ChatEndpoint(
            grown.model,
            grown.base_url,
            key,
            incidents=incidents,
            source="process.engine",
            patience_s=grown.patience_s,
            **limits,
        )

    return chat_talk(endpoint)


def refuse_shared_gpu(renderer) -> None:
    """Raise ConfigError for a pipeline of this process that was given no device and would take the policy's GPU."""
    from genevolve_fast.train.config import ConfigError

    if renderer.cache_mode == "replay" or device().type != "cuda":
        return
    sections = [("renderer", renderer), ("renderer.text_to_image", renderer.text_to_image)]
    if renderer.kind == "process":
        inner = renderer.grown.renderer
        sections = [("renderer.process.renderer", inner)]
        sections += [("renderer.process.renderer.text_to_image", inner.text_to_image)]
        if renderer.grown.writer == "policy":
            raise ConfigError(
                "renderer.process.writer policy would load a second policy beside the one in training, on a GPU whose "
                "memory is planned for training: serve it (genevolve-fast serve) and set writer chat"
            )
    for name, section in sections:
        local = section is not None and section.kind in ("qwen-image-edit", "text-to-image") and not section.urls
        if local and section.device is None:
            raise ConfigError(
                f"{name}.device is not set: the {section.kind} pipeline would load beside the policy on its GPU, whose "
                f"memory is planned for training. Name another GPU, such as {name}.device=cuda:1, or draw elsewhere: "
                "genevolve-fast render-serve, and kind qwen-service"
            )


def open_pool(config):
    """(requests to train on, World with their ground truth) of a configuration.

    Raises ConfigError for parts of the sandbox over requests that are not its own, and for a pipeline that would take
    the training GPU.
    """
    from genevolve_fast.data.config import open_requests
    from genevolve_fast.train.config import ConfigError

    if config.data.path == "sandbox":
        refuse_shared_gpu(config.renderer)
        embedded, world = open_world(config)
        return embedded.requests("train", config.pool_size, seed=config.seed), world
    pool, truth = open_requests(config.data, "rl")
    if pool.bad.count:
        print(f"data: {pool.bad.count} bad rows of {pool.where} are left out; the first: {pool.bad.first[0]}")
    asked = {"renderer": "canvas", "judge": "rules", "tools": "sandbox"}
    asked |= {"summarizer": "rules"} if config.experience.enabled else {}
    offline = [f"{name}.kind {kind}" for name, kind in asked.items() if getattr(config, name).kind == kind]
    if offline and any("checklist" not in r.extra for r in pool):
        raise ConfigError(
            f"{', '.join(offline)}: these are the sandbox's and know its requests only, and rows of {pool.where} have "
            "no checklist: set kind chat for judge and summarizer, with model and base_url; for the renderer "
            "qwen-service, with urls, or nano-banana; for tools serper or another search"
        )
    refuse_shared_gpu(config.renderer)
    return pool, open_world(config, truth)[1]


def load(args: argparse.Namespace, kind):
    from genevolve_fast.train.config import load_config

    return load_config(kind, config_path(args.config), args.set)


def read_section(kind: type[C], fields: Mapping[str, Any], pairs: Sequence[str], flag: str, what: str) -> C:
    """The section `kind` of `fields` and of what `flag` sets; `what` names it. Raises BatchError."""
    from pydantic import ValidationError

    from genevolve_fast.fields import FieldError, set_fields, wrong_fields
    from genevolve_fast.resumable import BatchError

    given = dict(fields)
    try:
        set_fields(given, pairs, flag)
        return kind(**given)
    except FieldError as error:
        raise BatchError(str(error)) from None
    except ValidationError as error:
        wrong = "; ".join(wrong_fields(error, what))
        raise BatchError(f"{wrong} ({flag} FIELD=VALUE sets a field)") from None


def show_fields(kind) -> int:
    from genevolve_fast.fields import describe

    for name, default, text in describe(kind):
        print(f"{name:36} {json.dumps(default, default=str):24} {text}".rstrip())
    return 0
