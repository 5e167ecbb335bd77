"""`genevolve-fast`: everything from the command line."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

RUNS = Path("runs")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; errors a user can mend are one line on stderr and exit status 2."""
    args = parser().parse_args(argv)
    try:
        return args.run(args) or 0
    except KeyboardInterrupt:
        print("\ninterrupted; `--resume` continues from the last checkpoint", file=sys.stderr)
        return 130
    except user_errors() as error:
        print(f"genevolve-fast {args.command}: {error}", file=sys.stderr)
        return 2


def user_errors() -> tuple[type[Exception], ...]:
    from genevolve_fast.data.conversations import DataError
    from genevolve_fast.report.build import ReportError
    from genevolve_fast.train.config import ConfigError
    from genevolve_fast.train.run import RunError
    from genevolve_fast.trajectory import InvariantError

    return ConfigError, DataError, InvariantError, ReportError, RunError, FileNotFoundError


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="genevolve-fast",
        description="Train tool-using image-generation agents on few GPUs.",
        epilog="First steps: `genevolve-fast demo` lets the sandbox agent evolve on this machine, no GPU needed.",
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run, help_: str, example: str) -> argparse.ArgumentParser:
        p = commands.add_parser(
            name,
            help=help_,
            description=help_,
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        p.set_defaults(run=run)
        return p

    def training(p: argparse.ArgumentParser, config: str | None) -> None:
        p.add_argument("--config", default=config, required=config is None, help="YAML file, or a built-in name")
        p.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="override one field, repeatable")
        p.add_argument("--runs", type=Path, default=RUNS, help="folder of all runs (default: %(default)s)")
        p.add_argument("--resume", action="store_true", help="continue the run of that name from its last checkpoint")
        p.add_argument("--fields", action="store_true", help="list every field of the configuration and stop")

    p = command(
        "sft",
        run_sft,
        "Supervised fine-tuning on {messages, images} conversations.",
        "genevolve-fast sft --config configs/sandbox_sft.yaml",
    )
    training(p, None)
    return top


# --- opening what a configuration names -------------------------------------------------------------------------------


def config_path(name: str) -> Path:
    """A YAML file, or one of the built-in configurations by its bare name."""
    path = Path(name)
    if path.exists():
        return path
    built_in = Path(str(resources.files("genevolve_fast.configs"))) / f"{name}.yaml"
    if not built_in.exists():
        known = ", ".join(sorted(p.stem for p in built_in.parent.glob("*.yaml")))
        raise FileNotFoundError(f"no configuration {name!r}: neither a file nor one of {known}")
    return built_in


def set_threads(threads: int | None) -> None:
    import torch

    if threads:
        torch.set_num_threads(threads)


def open_policy(config):
    """The policy that a configuration names, on the GPU where there is one."""
    import torch

    from genevolve_fast.policy.model import Policy
    from genevolve_fast.sandbox.tiny_policy import start_path

    path = start_path() if config.path == "sandbox:start" else config.path
    policy = Policy.from_pretrained(path, getattr(torch, config.dtype))
    return policy.to("cuda" if torch.cuda.is_available() else "cpu")


def open_sandbox(config):
    """(SandboxWorld, World) of a configuration's world."""
    from genevolve_fast.sandbox.world import SandboxWorld, WorldConfig, open_world

    world = SandboxWorld(WorldConfig(seed=config.seed))
    return world, open_world(world)


def load(args: argparse.Namespace, kind):
    from genevolve_fast.train.config import load_config

    return load_config(kind, config_path(args.config), args.set)


def show_fields(kind) -> int:
    from genevolve_fast.train.config import describe

    for name, default, text in describe(kind):
        print(f"{name:36} {json.dumps(default, default=str):24} {text}")
    return 0


# --- commands ---------------------------------------------------------------------------------------------------------


def run_sft(args: argparse.Namespace) -> int:
    from genevolve_fast.sandbox.bootstrap import new_start
    from genevolve_fast.sandbox.world import SandboxWorld, WorldConfig
    from genevolve_fast.train.config import SftConfig
    from genevolve_fast.train.sft import sft

    if args.fields:
        return show_fields(SftConfig)
    config = load(args, SftConfig)
    set_threads(config.threads)
    folder = args.runs / config.name
    if config.policy.path == "sandbox:new":
        policy, data = new_start(config, SandboxWorld(WorldConfig(seed=config.world.seed)), folder / "data")
    else:
        policy, data = open_policy(config.policy), Path(config.data.path)
    print(f"policy: {sft(config, policy, data, folder, resume=args.resume)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
