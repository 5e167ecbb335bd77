"""Judges that a command names: the chat judge of `reward`, or the sandbox's rules."""

from __future__ import annotations

import argparse

from genevolve_fast.commands.opening import read_section
from genevolve_fast.incidents import Incidents
from genevolve_fast.protocols import ImageJudge, ProgramJudge


def add_judge_flags(p: argparse.ArgumentParser) -> None:
    p.add_argument("--judge", choices=["chat", "sandbox"], default="chat", help="(default: %(default)s)")
    p.add_argument("--judge-model", help="name of the judging model")
    p.add_argument("--judge-base-url", help="chat server of the judge")
    p.add_argument("--judge-set", action="append", default=[], metavar="FIELD=VALUE", help="a field of the judge")
    p.add_argument("--judge-programs", action="store_true", help="let the program judge score every program as well")
    p.add_argument("--judge-parallel", type=int, default=8, help="judgements at a time (default: %(default)s)")


def open_judges(args: argparse.Namespace, incidents: Incidents) -> tuple[ImageJudge, ProgramJudge]:
    """The judges of `add_judge_flags`. Raises BatchError for flags that cannot be or would do nothing."""
    if args.judge == "sandbox":
        from genevolve_fast.sandbox.judges import SandboxImageJudge, SandboxProgramJudge

        return SandboxImageJudge(), SandboxProgramJudge()
    from genevolve_fast.resumable import BatchError
    from genevolve_fast.reward import config

    try:
        return config.open_judges(judge_config(args), incidents)
    except ValueError as error:  # what is missing, such as a key
        raise BatchError(str(error)) from None


def judge_config(args: argparse.Namespace):
    """The JudgeConfig that the flags describe. Raises BatchError."""
    from genevolve_fast.reward.config import JudgeConfig

    named = {"kind": "chat", "model": args.judge_model, "base_url": args.judge_base_url}
    fields = {name: value for name, value in named.items() if value is not None}
    return read_section(JudgeConfig, fields, args.judge_set, "--judge-set", "judge")


def judge_settings(args: argparse.Namespace) -> dict[str, str | float]:
    """What judgements of one ledger must share. Raises BatchError for flags that would do nothing."""
    from genevolve_fast.resumable import BatchError

    if args.judge_parallel < 1:
        raise BatchError("--judge-parallel must be at least 1")
    if args.judge == "sandbox":
        if args.judge_model or args.judge_base_url or args.judge_set:
            raise BatchError("--judge-model, --judge-base-url and --judge-set are of the chat judge, not the sandbox's")
        return {"judge": "sandbox"}
    from genevolve_fast.reward.rubric import VERSION

    config = judge_config(args)
    told = {"judge": config.model, "program_judge": config.program_model or config.model}
    return told | {"rubric": VERSION, "temperature": config.temperature}
