"""Run by test_trl.py in two gloo processes: TRL, patched TRL and the trainer with a teacher under DDP."""

from __future__ import annotations

import sys
import tempfile

import torch
import transformers
from test_trl import TEXT_ROWS, Plain, Taught, build, rollouts, run, weights

from genevolve_fast.integrations.trl import objective_of, patch_trl


def uneven(prompts, trainer):
    """Other completions on each process."""
    torch.manual_seed(trainer.state.global_step)
    out = rollouts(prompts, trainer)
    if trainer.accelerator.process_index:
        out["completion_ids"] = [ids[len(ids) // 2 :] for ids in out["completion_ids"]]
        out["logprobs"] = [[-1.0] * len(ids) for ids in out["completion_ids"]]
    return out


def main(folder: str, loss_type: str, into: str) -> None:
    tokens = transformers.AutoTokenizer.from_pretrained(folder)
    results = {}
    for name in ("theirs", "patched", "fused", "taught"):
        kind = Taught if name in ("fused", "taught") else Plain
        more = {"fused": lambda c: objective_of(c, sdl_coef=0.0), "taught": lambda c: objective_of(c)}.get(name)
        trainer = build(
            kind, folder, tokens, tempfile.mkdtemp(), rows=TEXT_ROWS, rollout_func=uneven, more=more,
            loss_type=loss_type, gradient_accumulation_steps=2, num_iterations=2, beta=0.05, ddp_backend="gloo",
        )  # fmt: skip
        start = weights(trainer)
        if name == "patched":
            patch_trl(trainer)
        run(trainer)
        assert trainer.accelerator.num_processes == 2
        results[name] = dict(losses=trainer.losses, weights=weights(trainer), start=start)
        entropies = [x["entropy"] for x in trainer.state.log_history if "entropy" in x]
        results[name]["entropy"] = entropies
    torch.save(results, f"{into}.{torch.distributed.get_rank()}")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
