"""Run by test_trl.py in two gloo processes: TRL, patched TRL and the trainer with a teacher, under DDP and FSDP2."""

from __future__ import annotations

import os
import sys
import tempfile
import time

import torch
import transformers
from test_trl import TEXT_ROWS, Plain, Taught, build, rollouts, run, weights
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from genevolve_fast.integrations.trl import objective_of, patch_trl


def uneven(prompts, trainer):
    """Other completions on each process."""
    torch.manual_seed(trainer.state.global_step)
    out = rollouts(prompts, trainer)
    if trainer.accelerator.process_index:
        out["completion_ids"] = [ids[len(ids) // 2 :] for ids in out["completion_ids"]]
        out["logprobs"] = [[-1.0] * len(ids) for ids in out["completion_ids"]]
    return out


def under_ddp(folder: str, tokens, loss_type: str) -> dict:
    """name -> losses, weights and logged entropies of three steps."""
    results = {}
    for name in ("theirs", "patched", "fused", "taught"):
        kind = Taught if name in ("fused", "taught") else Plain
        more = {"fused": lambda c: objective_of(c, sdl_coef=0.0), "taught": lambda c: objective_of(c)}.get(name)
        trainer = build(
            kind, folder, tokens, tempfile.mkdtemp(), rows=TEXT_ROWS, rollout_func=uneven, more=more,
            loss_type=loss_type, gradient_accumulation_steps=2, num_iterations=2, beta=0.05, ddp_backend="gloo",
        )  # fmt: skip
        if name == "patched":
            patch_trl(trainer)
        run(trainer)
        assert trainer.accelerator.num_processes == 2
        entropies = [x["entropy"] for x in trainer.state.log_history if "entropy" in x]
        results[name] = dict(losses=trainer.losses, weights=weights(trainer), entropy=entropies)
    return results


def under_fsdp2(folder: str, tokens) -> dict:
    """name -> loss and whole gradient of one micro-batch, "theirs" without sharding and averaged over the processes.

    Sharded by hand: accelerate shards on accelerators only.
    """
    first = build(Plain, folder, tokens, tempfile.mkdtemp(), rollout_func=uneven, max_steps=1, ddp_backend="gloo")
    run(first)
    results = {}
    for name in ("theirs", "patched", "fused"):
        more = (lambda c: objective_of(c, sdl_coef=0.0)) if name == "fused" else None
        kind = Taught if name == "fused" else Plain
        trainer = build(kind, folder, tokens, tempfile.mkdtemp(), more=more, ddp_backend="gloo")
        trainer.current_gradient_accumulation_steps = 1
        model = trainer.model.train()
        if name == "patched":
            patch_trl(trainer)
        if name != "theirs":
            for layer in model.model.layers:
                fully_shard(layer)
            fully_shard(model)
            assert isinstance(model.lm_head.weight, DTensor)
        loss = trainer._compute_loss(model, first.inputs[0])
        loss.backward()
        grads = [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in model.parameters()]
        if name == "theirs":
            for g in grads:
                torch.distributed.all_reduce(g)
            grads = [g / 2 for g in grads]
        results[name] = dict(losses=[loss.item()], gradient=torch.cat([g.flatten() for g in grads]))
    return results


def main(folder: str, into: str) -> None:
    tokens = transformers.AutoTokenizer.from_pretrained(folder)
    results = {loss_type: under_ddp(folder, tokens, loss_type) for loss_type in ("dapo", "grpo")}
    results["fsdp2"] = under_fsdp2(folder, tokens)
    torch.save(results, f"{into}.{torch.distributed.get_rank()}")
    torch.distributed.barrier()
    time.sleep(0.2)  # the other rank has the barrier's last message too
    os._exit(0)  # gloo's threads now and then abort an orderly end


if __name__ == "__main__":
    main(*sys.argv[1:])
