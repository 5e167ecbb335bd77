"""Checkpoints whose weights several ranks wrote: exported to the same bits, and refused with what to do elsewhere."""

from __future__ import annotations

import os
import shutil
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from warm_ranks import on_two_ranks

from benchmarks.export import logits_of, start
from genevolve_fast.cli import main, reader
from genevolve_fast.policy import export
from genevolve_fast.policy.export import ExportError, export_sharded
from genevolve_fast.policy.model import Policy
from genevolve_fast.policy.shards import FOLDER
from genevolve_fast.sandbox.tiny_policy import start_path

pytestmark = pytest.mark.slow

STEP = "step_000001"


def checkpoint(rank: int, base: str, run: str, strategy: str, bf16: str = "nearest") -> None:
    """One step of a real run by several ranks: its checkpoint, and beside it what the first rank has in memory.

    base: folder of the policy, whose dtype it trains in.
    """
    import torch.distributed as dist

    from genevolve_fast.ops import Objective
    from genevolve_fast.train.checkpoint import save_checkpoint
    from genevolve_fast.train.config import EvolveConfig, parse_config
    from genevolve_fast.train.optim import build_optimizer
    from genevolve_fast.train.prepare import prepare
    from genevolve_fast.train.ranks import Ranks
    from genevolve_fast.train.run import Run
    from genevolve_fast.train.strategies import open_strategy
    from genevolve_fast.train.update import accumulate_gradients
    from tests.grouped import mixed_batch

    policy = Policy.from_pretrained(base, export.stored_dtype(base)).eval()
    dtype = str(policy.head_weight.dtype).removeprefix("torch.")
    fields = dict(
        name="run", seed=7, policy=dict(path=base, dtype=dtype, gradient_checkpointing=True),
        optim=dict(lr=1e-2, bf16=bf16), distributed=dict(strategy=strategy),
    )  # fmt: skip
    config = parse_config(EvolveConfig, fields)
    ranks = Ranks(rank, dist.get_world_size())
    held = open_strategy(strategy, ranks)
    prepare(policy, config.policy, config.seed)
    held.shard(policy)
    optimizer = build_optimizer(policy, config.optim, 1, held)
    rollouts, _ = mixed_batch(policy.codec, [])
    accumulate_gradients(policy, rollouts, {}, Objective(kl_coef=0), temperature=0.7, max_tokens=80, strategy=held)
    held.norm(policy, None)
    optimizer.step()
    log = Run(Path(run), config, device=policy.device, total=1, resume=False, ranks=ranks)
    log.begin(0)
    log.close()
    save_checkpoint(Path(run) / "checkpoints", 1, policy, optimizer, strategy=held)
    with held.whole(policy):
        if rank == 0:
            whole = {n: p.detach().contiguous() for n, p in policy.model.named_parameters()}
            save_file(whole, Path(run) / "memory.safetensors")


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """A group of one rank in this process, which shards as many ranks do."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """`run`, of one rank under FSDP2, which began with `base`."""
    folder = tmp_path_factory.mktemp("sharded")
    Policy.from_pretrained(start_path()).save_pretrained(folder / "base")
    with alone(folder):
        checkpoint(0, str(folder / "base"), str(folder / "run"), "fsdp2")
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for file in sorted(folder.glob("*.safetensors")) for n, t in load_file(file).items()}


def equal(a, b) -> bool:
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


def test_the_exported_checkpoint_has_the_logits_of_the_policy_in_memory(runs, tmp_path, capsys):
    run = runs / "run"
    assert not list((run / "checkpoints" / STEP / "policy").glob("*.safetensors")), "nothing is tested"
    assert main(["export", str(run), "--last", "-o", str(tmp_path / "out")]) == 0
    assert f"from {run / 'checkpoints' / STEP / 'policy'}, step 1" in capsys.readouterr().out
    in_memory, before = load_file(run / "memory.safetensors"), tensors(runs / "base")
    assert equal(tensors(tmp_path / "out"), in_memory)
    moved = {n.split(".")[1] for n, t in in_memory.items() if not torch.equal(t, before[n])}
    assert moved == {"language_model"}, "the vision tower did not train and is the base's"
    policy = Policy.from_pretrained(runs / "base")
    policy.model.load_state_dict(in_memory, strict=False)
    loaded = Policy.from_pretrained(tmp_path / "out")
    assert torch.equal(logits_of(loaded), logits_of(policy))
    assert not torch.equal(logits_of(loaded), logits_of(Policy.from_pretrained(runs / "base")))


@pytest.mark.parametrize("source", ["run", f"run/checkpoints/{STEP}", f"run/checkpoints/{STEP}/policy"])
def test_run_checkpoint_and_policy_folder_are_the_same_export(runs, tmp_path, source):
    flags = ["--step", "1"] if source == "run" else []
    assert main(["export", str(runs / source), *flags, "-o", str(tmp_path / "out"), "--dtype", "bfloat16"]) == 0
    memory = load_file(runs / "run" / "memory.safetensors")
    assert equal(tensors(tmp_path / "out"), {n: t.bfloat16() for n, t in memory.items()})
    assert "Qwen3VLForConditionalGeneration" in (tmp_path / "out" / "config.json").read_text()


def test_files_hold_what_one_of_them_may(runs, tmp_path, monkeypatch):
    """Weights are read as their file is written: no more of them than a file's are alive at once."""
    from genevolve_fast.train import sharded

    monkeypatch.setattr(export, "SHARD", "1MB")
    alive, most, read = 0, 0, sharded._read

    def counted(folder, into):
        nonlocal alive, most
        read(folder, into)
        alive += (size := sum(t.nbytes for t in into.values()))
        most = max(most, alive)
        for t in into.values():
            weakref.finalize(t.untyped_storage(), gone, size)

    def gone(size):
        nonlocal alive
        alive -= size

    monkeypatch.setattr(sharded, "_read", counted)
    assert main(["export", str(runs / "run"), "--last", "-o", str(tmp_path / "out")]) == 0
    whole = tensors(tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3
    largest = max(t.nbytes for t in whole.values())
    assert 0 < most <= 1e6 + 2 * largest < sum(t.nbytes for t in whole.values())


def test_who_opens_the_policy_of_such_a_checkpoint_is_told_to_export_it(runs, tmp_path, capsys):
    policy = runs / "run" / "checkpoints" / STEP / "policy"
    message = f"Export it first: genevolve-fast export {policy.parent} -o FOLDER"
    with pytest.raises(FileNotFoundError, match=message):
        Policy.from_pretrained(policy)
    evolve = ["evolve", "--config", "demo", "--set", f"policy.path={policy}", "--runs", str(tmp_path)]
    serve = ["serve", "--model", str(policy), "--dry-run"]
    for command in (["bench", "--policy", str(policy), "--requests", "1", "--out", str(tmp_path / "b")], evolve, serve):
        assert main(command) == 2
        (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("genevolve-fast ")]
        assert message in line
    assert not list(tmp_path.iterdir())


def test_the_base_may_have_moved_and_is_asked_for_where_it_is_unknown(runs, tmp_path, capsys):
    moved, other = tmp_path / "elsewhere", tmp_path / "other"
    alone = shutil.copytree(runs / "run" / "checkpoints" / STEP, tmp_path / "alone")  # without its run
    shutil.copytree(runs / "base", moved)

    def told(*flags: str) -> str:
        assert main(["export", str(alone), "-o", str(tmp_path / "out"), *flags]) == 2
        return capsys.readouterr().err.splitlines()[-1]

    assert "no config.yaml says which: give --base" in told()
    assert "Say where it is now with --base" in told("--base", str(tmp_path / "gone"))
    assert "there is no adapter to export" in told("--adapter")
    shutil.copytree(moved, other)
    weights = load_file(other / "model.safetensors")
    name = "model.visual.blocks.0.norm1.weight"
    save_file(weights | {name: torch.ones(3)}, other / "model.safetensors", metadata={"format": "pt"})
    assert f"{name} of {other} is [3]" in told("--base", str(other))
    assert not (tmp_path / "out").exists()
    assert main(["export", str(alone), "-o", str(tmp_path / "out"), "--base", str(moved)]) == 0
    assert equal(tensors(tmp_path / "out"), load_file(runs / "run" / "memory.safetensors"))


def test_weights_of_another_policy_are_refused(runs, tmp_path):
    outline = runs / "run" / "checkpoints" / STEP / "policy"
    with pytest.raises(ExportError, match="it has no model.nothing"):
        export_sharded(outline, tmp_path, {"model.nothing": lambda: torch.ones(1)})


def test_numbers_that_are_none_are_refused_by_name(runs, tmp_path):
    from genevolve_fast.train.sharded import weight_readers

    outline = runs / "run" / "checkpoints" / STEP / "policy"
    readers = weight_readers(outline.parent / FOLDER)
    name = "model.language_model.norm.weight"
    spoilt = readers | {name: lambda: torch.full_like(readers[name](), torch.nan)}
    with pytest.raises(ExportError, match=f"{name} of the policy holds .* NaN"):
        export_sharded(outline, tmp_path, spoilt, base=runs / "base")


def test_a_report_of_such_a_run_reads_its_tokenizer(runs, tmp_path, capsys):
    run = shutil.copytree(runs / "run", tmp_path / "run")
    (run / "metrics.jsonl").write_text('{"step": 1, "reward": 0.5}\n')
    assert main(["report", str(run)]) == 0 and (run / "report.html").exists()
    assert reader(run)([5, 6])  # what decodes its rollouts, had it left any


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp2", "zero3"])
def test_what_two_ranks_wrote_is_exported_to_the_bit(tmp_path, strategy):
    base, run = tmp_path / "base", tmp_path / "run"
    start(tied=True).save_pretrained(base)
    on_two_ranks(tmp_path, checkpoint, str(base), str(run), strategy)
    assert len(list((run / "checkpoints" / STEP / FOLDER).glob("*.distcp"))) == 2
    assert main(["export", str(run), "--last", "-o", str(tmp_path / "out")]) == 0
    assert equal(tensors(tmp_path / "out"), load_file(run / "memory.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize("strategy, bf16", [("zero3", "nearest"), ("zero2", "nearest"), ("fsdp2", "master")])
def test_bf16_weights_of_fp32_copies_are_exported_as_both(tmp_path, strategy, bf16):
    """Untied head, two ranks: as trained the bits in memory; --dtype float32 gives the copies."""
    base, run = tmp_path / "base", tmp_path / "run"
    start(tied=False).save_pretrained(base, torch.bfloat16)
    on_two_ranks(tmp_path, checkpoint, str(base), str(run), strategy, bf16)
    assert main(["export", str(run), "--last", "-o", str(tmp_path / "plain")]) == 0
    plain, memory = tensors(tmp_path / "plain"), load_file(run / "memory.safetensors")
    assert equal(plain, memory) and "lm_head.weight" in plain
    assert main(["export", str(run), "--last", "-o", str(tmp_path / "wide"), "--dtype", "float32"]) == 0
    wide = tensors(tmp_path / "wide")
    assert equal({n: t.bfloat16() for n, t in wide.items()}, memory)
    finer = {n for n, t in wide.items() if not torch.equal(t, t.bfloat16().float())}
    assert finer and not any("visual" in n for n in finer)


@pytest.mark.slow
def test_names_that_only_transformers_knows_are_read_by_it(runs, tmp_path):
    """A base whose vision tower has the name of older files."""
    base = shutil.copytree(runs / "base", tmp_path / "base")
    older = {n.replace("model.visual.", "visual."): t for n, t in load_file(base / "model.safetensors").items()}
    save_file(older, base / "model.safetensors", metadata={"format": "pt"})
    run = shutil.copytree(runs / "run", tmp_path / "run")
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["policy"]["path"] = os.path.relpath(base)
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["export", str(run), "--last", "-o", str(tmp_path / "out")]) == 0
    assert equal(tensors(tmp_path / "out"), load_file(run / "memory.safetensors"))
