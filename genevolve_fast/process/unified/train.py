"""Training of a unified model on processes: text and drafts in one packed pass, resumable at the exact step."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from genevolve_fast.batch.packing import plan_microbatches
from genevolve_fast.ops.head import NonFiniteError
from genevolve_fast.process.trace import Process, interleave, supervised
from genevolve_fast.process.unified.codec import LatentCodec
from genevolve_fast.process.unified.config import KEPT, Target, UnifiedConfig
from genevolve_fast.process.unified.loss import losses
from genevolve_fast.process.unified.model import Unified
from genevolve_fast.process.unified.samples import Samples
from genevolve_fast.process.unified.sequences import Noise, drawn_images, pack_processes, rows_of
from genevolve_fast.train.checkpoint import checkpoints, load_checkpoint, refuse_full_disk, save_checkpoint, save_final
from genevolve_fast.train.collect import stable_seed
from genevolve_fast.train.finite import FiniteSteps
from genevolve_fast.train.optim import build_optimizer
from genevolve_fast.train.run import Run, RunError, claimed, peak_memory_gb
from genevolve_fast.train.stopping import Preempted, Stopping
from genevolve_fast.train.strategies import Strategy
from genevolve_fast.trajectory import Trajectory

Pixels = Mapping[str, np.ndarray]  # uint8 [h, w, 3] of drafts by pixel hash


def rows_for(processes: Sequence[Process], target: Target) -> list[Process]:
    """Rows that have a form under `target`: one that ended by mending a plan has none without inspection."""
    if target != "plan":
        return list(processes)
    return [p for p in processes if "plan" in p.cycles[-1].trained]


def trajectory_of(process: Process, config: UnifiedConfig, codec: LatentCodec, pixels: Pixels) -> Trajectory:
    """What one row is to learn from."""
    (chosen,) = supervised([interleave(process, codec, pixels, KEPT[config.target])], config.flow.stages)
    return chosen


def train_unified(
    config: UnifiedConfig,
    policy: Unified,
    processes: Sequence[Process],
    pixels: Pixels,
    folder: Path,
    *,
    resume: bool = False,
) -> Path:
    """Train `policy` on processes and their drafts; returns the folder of the final model (`folder/policy`).

    On SIGTERM the last whole step is saved and Preempted raised. Raises RunError like `sft`, and where no row has a
    form under the target.
    """
    strategy = Strategy()
    if not (processes := rows_for(processes, config.target)):
        raise RunError(f"no row has a form under target {config.target!r}: add rows of other subsets")
    stopping = Stopping(strategy.ranks)
    with stopping.listening(), claimed(folder, config, resume):
        return _train(config, policy, processes, pixels, folder, resume, strategy, stopping)


def _train(config, policy: Unified, processes, pixels, folder: Path, resume: bool, strategy, stopping) -> Path:
    kept = folder / "checkpoints"
    saved = checkpoints(kept) if resume else []
    optimizer = build_optimizer(policy, config.optim, config.steps)
    samples = Samples(config, processes, folder)
    run = Run(folder, config, device=policy.device, total=config.steps, resume=resume)
    step = load_checkpoint(saved[-1], policy, optimizer) if saved else 0
    run.begin(step)
    policy.model.config.shift = config.flow.shift  # who draws reads it there
    finite = FiniteSteps(policy, config.optim.skip_nonfinite)
    refuse_full_disk(kept, step, policy, optimizer, config.checkpoint)
    policy.train()
    save = lambda: save_checkpoint(kept, step, policy, optimizer, None, config.checkpoint)  # noqa: E731
    try:
        while step < config.steps:
            stopping.pause()
            with run.phase("update_actor", step):
                begin = time.perf_counter()
                told = accumulate(config, policy, processes, pixels, step, finite)
                norm, taken = finite.step(step, optimizer, strategy, config.optim.max_grad_norm, {"loss": told["loss"]})
                seconds = time.perf_counter() - begin
            step += 1
            memory = peak_memory_gb(policy.device)  # of the step, not of drawing
            if samples.due(step):
                with run.phase("samples", step - 1):
                    samples.draw(policy, step)
            run.log(
                step,
                told
                | {
                    "grad_norm": norm,
                    "skipped_steps": float(not taken),
                    "lr": optimizer.lr,
                    "samples": step * config.batch_size,
                    "perf/throughput": told["num_tokens"] / seconds,
                    "perf/max_memory_allocated_gb": memory,
                },
            )
            if step % config.checkpoint.every == 0 or step == config.steps:
                save()
    except Preempted:
        policy.zero_grad(set_to_none=True)
        if step:
            save()
        run.close()
        raise
    run.close()
    policy.eval()
    save_final(folder / "policy", policy)
    return folder / "policy"


def batch_of(rows: int, batch_size: int, seed: int, step: int) -> list[int]:
    """Indices of the rows of a step: a function of seed and step alone. Every row once before any is seen again."""
    first, out = step * batch_size, []
    while len(out) < batch_size:
        epoch, within = divmod(first + len(out), rows)
        order = np.random.default_rng((seed, epoch)).permutation(rows)
        out += order[within : within + batch_size - len(out)].tolist()
    return out


def accumulate(
    config: UnifiedConfig, policy: Unified, processes: Sequence[Process], pixels: Pixels, step: int, finite: FiniteSteps
) -> dict[str, float]:
    """Gradients of a step's loss; its numbers. Text counts by token and drafts by number, over the whole step."""
    chosen = [processes[i] for i in batch_of(len(processes), config.batch_size, config.seed, step)]
    trajectories = [trajectory_of(p, config, policy.codec, pixels) for p in chosen]
    patches, numbers = policy.flow.place.num_embeddings, policy.flow.leave.out_features
    tokens = sum(t.num_loss_tokens for t in trajectories)
    copies = config.flow.copies
    noised = copies * sum(len(drawn_images(t)) for t in trajectories)
    costs = [rows_of(t, copies) for t in trajectories]
    nll = squares = 0.0
    for n, members in enumerate(plan_microbatches(costs, config.max_tokens_per_microbatch)):
        batch = pack_processes([trajectories[i] for i in members], pixels, policy.codec, policy.device, copies)
        generator = torch.Generator().manual_seed(stable_seed("noise", config.seed, step, n))
        noise = Noise.draw(batch.noised, patches, numbers, generator, config.flow.times, config.flow.shift).to(
            policy.device
        )
        try:
            sums = losses(policy, batch, noise)
        except NonFiniteError as error:
            finite.note(error)
            nll = float("nan")
            break
        ce, mse = sums.nll / max(1, tokens), sums.squares / max(1, noised * patches * numbers)
        (config.flow.ce_weight * ce + mse).backward()
        nll, squares = nll + ce.detach(), squares + mse.detach()
    nll, squares = float(nll), float(squares)  # one wait a step
    return {
        "loss": config.flow.ce_weight * nll + squares,
        "loss/text": nll,
        "loss/flow": squares,
        "num_tokens": float(sum(costs)),
        "text_tokens": float(tokens),
        "noised_drafts": float(noised),
    }
