"""From prompt pool to bench summary on the sandbox's data, all offline: `python -m benchmarks.data_chain`.

Eight steps in the published formats: pool, trajectories, filters, ground truth, SFT view, feedback view, evolve, bench.
A step counts when the next one demonstrably read what it wrote: the next one refuses it when a byte of it is changed,
and with one row less (and its hashes made right again) makes one row less of it.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from genevolve_fast import trajectory
from genevolve_fast.cli import main as command
from genevolve_fast.data.config import DataConfig, open_requests
from genevolve_fast.data.conversations import open_conversations
from genevolve_fast.data.steps import MANIFEST
from genevolve_fast.evaluate.scoreboard import record
from genevolve_fast.files import file_hash

COMMAND = "python -m benchmarks.data_chain"
SHARES = "0.7,0.1,0.2"
STEPS = ("pool", "trajectories", "filters", "ground truth", "SFT view", "feedback view", "evolve", "bench")


@dataclass(frozen=True)
class Size:
    requests: int = 400
    evolve_steps: int = 4
    prompts: int = 4
    generations: int = 4


SMALL = Size(requests=100, evolve_steps=2, prompts=2, generations=2)


@dataclass
class Chain:
    """What each step left: seconds, and by step why it is known that the next one read it ("" where it is not)."""

    folder: Path
    size: Size
    seconds: dict[str, float]
    proofs: dict[str, str]

    @property
    def count(self) -> int:
        return sum(bool(self.proofs.get(step)) for step in STEPS)

    def text(self) -> str:
        rows = [f"{s:14} {self.seconds.get(s, 0.0):7.1f} s  {self.proofs.get(s) or 'NOT READ'}" for s in STEPS]
        return "\n".join(rows)


def run_chain(folder: Path, size: Size) -> Chain:
    """Run every step in `folder`, which must be empty, and prove each step's output read."""
    chain = Chain(folder, size, {}, {})
    timed(chain, "pool", lambda: data("pool", folder / "pool", "--count", str(size.requests), "--shares", SHARES))
    steps = (
        ("trajectories", "trajectories", "pool", ["--teacher", "demonstrator"]),
        ("filters", "filter", "trajectories", []),
        ("ground truth", "truth", "filter", []),
        ("SFT view", "sft-view", "truth", []),
        ("feedback view", "feedback-view", "truth", []),
    )
    for name, step, source, flags in steps:
        target = folder / ("view" if step.endswith("view") else step)
        flags = ["--input", str(folder / source), *flags]
        timed(chain, name, lambda step=step, target=target, flags=flags: data(step, target, *flags))
    data("bench-view", folder / "view", "--input", str(folder / "truth"))
    run("data", "check", str(folder / "view"))
    chain.proofs["pool"] = prove(
        folder, "pool", "train.jsonl", "trajectories", "trajectories", ["--teacher", "demonstrator"]
    )
    chain.proofs["trajectories"] = prove(folder, "trajectories", "trajectories.jsonl", "filter", "read", [])
    chain.proofs["filters"] = prove(folder, "filter", "trajectories.jsonl", "truth", "read", [])
    chain.proofs["ground truth"] = prove_truth(folder)
    sft_and_prove(chain)
    evolve_and_prove(chain)
    return chain


# --- commands ---------------------------------------------------------------------------------------------------------


def run(*arguments: str) -> tuple[int, str]:
    """(exit status, what was said) of a `genevolve-fast` command."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = command(list(arguments))
    return status, said.getvalue()


def data(step: str, target: Path, *flags: str) -> str:
    status, said = run("data", step, "--output-dir", str(target), *flags)
    if status:
        raise RuntimeError(f"data {step} ended with status {status}:\n{said}")
    return said


def timed(chain: Chain, name: str, work: Callable[[], object]) -> object:
    begin = time.monotonic()
    out = work()
    chain.seconds[name] = chain.seconds.get(name, 0.0) + time.monotonic() - begin
    return out


# --- proofs -----------------------------------------------------------------------------------------------------------


def prove(folder: Path, step: str, table_: str, next_step: str, counted: str, flags: list[str]) -> str:
    """How `next_step` is known to read `step`'s table: refused with a byte changed, one row less with one row less."""
    changed, shorter = folder / "proof" / f"{step}-changed", folder / "proof" / f"{step}-shorter"
    with_a_byte_changed(folder / step, changed, table_)
    target = folder / "proof" / f"{next_step}-of-changed"
    status, said = run("data", next_step, "--input", str(changed), "--output-dir", str(target), *flags)
    if status != 2 or f"{table_} was changed" not in said or (target / MANIFEST).exists():
        return ""
    with_a_row_less(folder / step, shorter, table_)
    target = folder / "proof" / f"{next_step}-of-shorter"
    status, said = run("data", next_step, "--input", str(shorter), "--output-dir", str(target), *flags)
    rows = [counts(folder / next_step)[counted], counts(target)[counted] if (target / MANIFEST).exists() else None]
    if rows[1] != rows[0] - 1 or source_of(folder / next_step) != file_hash(folder / step / MANIFEST):
        return ""
    return f"{next_step}: a changed byte is refused; {rows[0]} rows, {rows[1]} without the last one"


def prove_truth(folder: Path) -> str:
    """Both views read the ground truth: its tables, and its pictures."""
    views = {"sft-view": "GenEvolve-Data-SFT", "feedback-view": "GenEvolve-Data-RL"}
    changed, painted = folder / "proof" / "truth-changed", folder / "proof" / "truth-painted"
    with_a_byte_changed(folder / "truth", changed, "truth.jsonl")
    shutil.copytree(folder / "truth", painted)
    for picture in (painted / "gt").iterdir():
        picture.unlink()
    for step, set_ in views.items():
        for source, why in ((changed, "truth.jsonl was changed"), (painted, "is missing")):
            target = folder / "proof" / f"{step}-of-{source.name}"
            status, said = run("data", step, "--input", str(source), "--output-dir", str(target))
            if status != 2 or why not in said or (target / set_).exists():
                return ""
        if source_of(folder / "view" / set_) != file_hash(folder / "truth" / MANIFEST):
            return ""
    return "both views: a changed byte is refused, missing pictures are refused"


def sft_and_prove(chain: Chain) -> None:
    """`sft` on the view: the tokens of its one epoch are the view's, and a broken row is refused by name."""
    view = chain.folder / "view"
    status, said = timed(chain, "SFT view", lambda: run(*sft_command(view, chain.folder / "runs")))
    if status:
        raise RuntimeError(f"sft ended with status {status}:\n{said}")
    from genevolve_fast.commands.opening import open_policy
    from genevolve_fast.train.config import PolicyConfig

    codec = open_policy(PolicyConfig(path=str(chain.folder / "runs" / "sft" / "policy"))).codec
    samples = open_conversations(view, codec, 32768, chain.folder / "proof" / "index.npz")
    metrics = (chain.folder / "runs" / "sft" / "metrics.jsonl").read_text().splitlines()
    seen, there = sum(int(json.loads(line)["num_tokens"]) for line in metrics), int(samples.tokens.sum())
    broken = chain.folder / "proof" / "view-broken"
    shutil.copytree(view, broken)
    table_ = broken / "GenEvolve-Data-SFT" / "train.jsonl"
    table_.write_text(table_.read_text().replace('"assistant"', '"assistent"', 1))
    status, said = run(*sft_command(broken, chain.folder / "proof" / "runs"))
    if seen == there and not samples.dropped and status == 2 and "line 1: messages[2].role" in said:
        chain.proofs["SFT view"] = (
            f"sft: {len(samples)} conversations, {seen} tokens seen of {there}; a bad role is named"
        )


def sft_command(view: Path, runs: Path) -> list[str]:
    fields = {
        "name": "sft",
        "policy.path": "sandbox:start",
        "policy.freeze_vision": "true",
        "data.path": view,
        "data.recitations": 0,
        "optim.name": "adamw",
        "optim.lr": 5e-5,
        "save_dtype": "float32",
        "checkpoint.every": 100,
    }
    flags = [part for name, value in fields.items() for part in ("--set", f"{name}={value}")]
    return ["sft", "--config", "sandbox_sft", "--runs", str(runs), *flags]


def evolve_and_prove(chain: Chain) -> None:
    """Evolve the SFT policy on the feedback view, then bench it on the bench view."""
    runs, view = chain.folder / "runs", chain.folder / "view"
    status, said = timed(chain, "evolve", lambda: run(*evolve_command(chain, view, runs)))
    if status:
        raise RuntimeError(f"evolve ended with status {status}:\n{said}")
    chain.proofs["feedback view"] = prove_feedback(chain)
    evolved, out = runs / "evolve" / "policy", chain.folder / "bench"
    status, said = timed(chain, "bench", lambda: run(*bench_command(view, evolved, out)))
    if status:
        raise RuntimeError(f"bench ended with status {status}:\n{said}")
    chain.proofs["evolve"] = prove_evolved(chain, evolved)
    chain.proofs["bench"] = prove_bench(chain, out)


def evolve_command(chain: Chain, view: Path, runs: Path) -> list[str]:
    size = chain.size
    fields = {
        "name": "evolve",
        "steps": size.evolve_steps,
        "data.path": view,
        "policy.path": chain.folder / "runs" / "sft" / "policy",
        "rollout.prompts_per_step": size.prompts,
        "rollout.num_generations": size.generations,
        "checkpoint.every": size.evolve_steps,
    }
    flags = [part for name, value in fields.items() for part in ("--set", f"{name}={value}")]
    return ["evolve", "--config", "demo", "--runs", str(runs), *flags]


def bench_command(view: Path, policy: Path, out: Path) -> list[str]:
    sandbox = ("--tools", "sandbox", "--judge", "sandbox", "--observe-images", "tokens", "--seed", "0")
    limits = ("--max-tokens", "160", "--max-rounds", "6", "--max-response-length", "900")
    return ["bench", "--data", str(view), "--policy", str(policy), "--out", str(out), *sandbox, *limits]


def prove_feedback(chain: Chain) -> str:
    """Every rollout's request is a row of the view and was judged; a picture less is named by line."""
    pool, _ = open_requests(DataConfig(path=str(chain.folder / "view")), "rl")
    questions = {request.id: request.question for request in pool}
    rollouts = [
        t
        for path in sorted((chain.folder / "runs" / "evolve" / "rollouts").glob("*.safetensors"))
        for t in trajectory.load(path)[0]
    ]
    size = chain.size
    whole = len(rollouts) == size.evolve_steps * size.prompts * size.generations
    same = all(t.messages[1].content == questions.get(t.request_id) for t in rollouts)
    judged = all(isinstance(t.outcome, trajectory.Judged) for t in rollouts)
    lacking = chain.folder / "proof" / "view-lacking"
    shutil.copytree(chain.folder / "view", lacking)
    (lacking / "GenEvolve-Data-RL" / "images" / "case_00000.png").unlink()
    status, said = run(*evolve_command(chain, lacking, chain.folder / "proof" / "runs"))
    if not (whole and same and judged and status == 2 and "line 1: gt_image" in said):
        return ""
    asked = {t.request_id for t in rollouts}
    return f"evolve: {len(rollouts)} judged rollouts of {len(asked)} of {len(pool)} requests; a lost picture is named"


def prove_evolved(chain: Chain, evolved: Path) -> str:
    """The bench samples from the evolved weights: it says other things with other weights, and nothing without."""
    other, gone = chain.folder / "proof" / "policy-other", chain.folder / "proof" / "policy-gone"
    shutil.copytree(evolved, other)
    shutil.copytree(evolved, gone)
    (gone / "model.safetensors").unlink()
    with_other_weights(other / "model.safetensors")
    view, answers = chain.folder / "view", []
    for policy, out in ((evolved, chain.folder / "bench"), (other, chain.folder / "proof" / "bench-other")):
        if policy is other:
            run(*bench_command(view, policy, out))
        rows = json.loads((out / "rollout" / "results.json").read_text())
        answers.append([row["messages"] for row in rows])
    status, _ = run(*bench_command(view, gone, chain.folder / "proof" / "bench-gone"))
    after, before = (file_hash(f / "model.safetensors") for f in (evolved, chain.folder / "runs" / "sft" / "policy"))
    if answers[0] == answers[1] or status == 0 or before == after:
        return ""
    return (
        f"bench: sampled from {after[:12]}, the start was {before[:12]}; other weights answer otherwise, none: refused"
    )


def prove_bench(chain: Chain, out: Path) -> str:
    """The summary is made of the bench's rows: `score` without one of the pictures counts one less."""
    summary = json.loads((out / "score" / "summary.json").read_text())["all"]
    rows = json.loads((out / "render" / "results.json").read_text())
    fewer = chain.folder / "proof" / "bench-fewer.json"
    rows[0] |= {"success": False, "image_status": "error: taken out"}
    fewer.write_text(json.dumps(rows))
    folder, truth = chain.folder / "proof" / "score", chain.folder / "view" / "GenEvolve-Bench"
    flags = ("--judge", "sandbox", "--gt-root", str(truth), "--output-dir", str(folder))
    run("score", "--results", str(fewer), *flags)
    less = json.loads((folder / "summary.json").read_text())["all"]
    if summary["count_eval_success"] != len(rows) or less["count_eval_success"] != len(rows) - 1:
        return ""
    return f"summary: {len(rows)} judged requests, overall {summary['overall']:.3f}; one picture less is one row less"


def with_other_weights(file: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(file)
    save_file({name: -value for name, value in weights.items()}, file, metadata={"format": "pt"})


# --- altered folders --------------------------------------------------------------------------------------------------


def with_a_byte_changed(folder: Path, target: Path, name: str) -> None:
    shutil.copytree(folder, target)
    content = bytearray((target / name).read_bytes())
    content[len(content) // 2] ^= 1
    (target / name).write_bytes(content)


def with_a_row_less(folder: Path, target: Path, name: str) -> None:
    """A copy without the last row of a table, its manifest put right."""
    shutil.copytree(folder, target)
    rows = (target / name).read_bytes().splitlines(keepends=True)
    (target / name).write_bytes(b"".join(rows[:-1]))
    manifest = json.loads((target / MANIFEST).read_text())
    manifest["files"][name] = file_hash(target / name)
    (target / MANIFEST).write_text(json.dumps(manifest))


def counts(folder: Path) -> dict[str, int]:
    return json.loads((folder / MANIFEST).read_text())["counts"]


def source_of(folder: Path) -> str:
    return json.loads((folder / MANIFEST).read_text())["source"]["sha256"]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--small", action="store_true", help="a quarter of the requests; nothing is recorded")
    p.add_argument("--folder", type=Path, help="empty folder to keep everything in (default: a temporary one)")
    p.add_argument("--no-record", action="store_true", help="only print")
    args = p.parse_args()
    size = SMALL if args.small else Size()
    begin = time.monotonic()
    with contextlib.ExitStack() as stack:
        folder = args.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        chain = run_chain(folder, size)
    print(chain.text())
    print(f"{chain.count} of {len(STEPS)} steps, {time.monotonic() - begin:.0f} s")
    if not (args.small or args.no_record):
        record("data/chain_steps", chain.count, n=size.requests, command=COMMAND)


if __name__ == "__main__":
    main()
