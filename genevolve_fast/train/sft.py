"""Supervised fine-tuning on assistant tokens: packed, loss rows only, resumable at the exact sample."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from genevolve_fast.batch.packing import TrainingSequence, pack, plan_microbatches
from genevolve_fast.data.conversations import Conversation, ImageFiles, load_conversations
from genevolve_fast.data.rows import BadRows
from genevolve_fast.ops import linear_logprob
from genevolve_fast.ops.head import NonFiniteError
from genevolve_fast.policy.model import Policy
from genevolve_fast.policy.passes import normed, through_layers
from genevolve_fast.policy.visits import Stream
from genevolve_fast.train.checkpoint import checkpoints, load_checkpoint, refuse_full_disk, save_checkpoint, save_final
from genevolve_fast.train.config import SftConfig
from genevolve_fast.train.finite import FiniteSteps
from genevolve_fast.train.optim import build_optimizer, gradient_norm
from genevolve_fast.train.prepare import prepare
from genevolve_fast.train.retention import check_metric
from genevolve_fast.train.run import Run, peak_memory_gb


def sft(
    config: SftConfig, policy: Policy, data: Path, folder: Path, *, first: Path | None = None, resume: bool = False
) -> Path:
    """Train `policy` on the JSONL `data`; returns the folder of the final policy (`folder/policy`).

    `first` is a JSONL whose samples are seen once, in their order, before the first epoch.
    """
    pixels = ImageFiles()
    bad = BadRows(config.data.strict)
    samples, dropped = load_conversations(data, policy.codec, pixels, config.data.cutoff, bad)
    if bad.count:
        print(f"data: {bad.count} bad rows of {data} are left out; the first: {bad.first[0]}")
    opening = load_conversations(first, policy.codec, pixels, config.data.cutoff)[0] if first else []
    opening_steps = math.ceil(len(opening) / config.batch_size)
    steps = opening_steps + config.epochs * math.ceil(len(samples) / config.batch_size)
    prepare(policy, config.policy, config.seed)
    optimizer = build_optimizer(policy, config.optim, steps)
    run = Run(folder, config, device=policy.device, total=steps, resume=resume)
    step = 0
    if resume and (saved := checkpoints(folder / "checkpoints")):
        step = load_checkpoint(saved[-1], policy, optimizer)
    run.begin(step)
    finite = FiniteSteps(policy, config.optim.skip_nonfinite)
    refuse_full_disk(folder / "checkpoints", step, policy, optimizer, config.checkpoint)
    deadline = time.time() + 60 * config.minutes if config.minutes else math.inf
    policy.train()
    while step < steps and time.time() < deadline:
        if step < opening_steps:
            batch = opening[step * config.batch_size : (step + 1) * config.batch_size]
        else:
            batch = [samples[i] for i in batch_order(config, len(samples), step - opening_steps)]
        with run.phase("update_actor", step):
            begin = time.perf_counter()
            try:
                nll, tokens = accumulate(policy, batch, pixels, config.max_tokens_per_microbatch)
            except NonFiniteError as error:
                nll, tokens = math.nan, 0
                finite.note(error)
            norm = gradient_norm(policy, config.optim.max_grad_norm)
            if taken := finite.may_step(step, norm, {"loss": nll}):
                optimizer.step()
            seconds = time.perf_counter() - begin
        step += 1
        row = run.log(
            step,
            {
                "loss": nll,
                **({} if config.optim.release_gradients else {"grad_norm": norm}),
                "skipped_steps": float(not taken),
                "lr": optimizer.lr,
                "num_tokens": tokens,
                "dropped_samples": dropped,
                "perf/throughput": tokens / seconds,
                "perf/max_memory_allocated_gb": peak_memory_gb(policy.device),
            },
        )
        if step == 1:
            check_metric(config.checkpoint.metric, row)
        if step % config.checkpoint.every == 0 or step == steps:
            save_checkpoint(folder / "checkpoints", step, policy, optimizer, keep=config.checkpoint)
    run.close()
    policy.eval()
    save_final(folder / "policy", policy, config.save_dtype and getattr(torch, config.save_dtype))
    return folder / "policy"


def batch_order(config: SftConfig, samples: int, step: int) -> np.ndarray:
    """Indices of the samples of one step; a function of seed and step only, so nothing needs to be remembered."""
    epoch, within = divmod(step, math.ceil(samples / config.batch_size))
    order = np.random.default_rng((config.seed, epoch)).permutation(samples)
    return order[within * config.batch_size : (within + 1) * config.batch_size]


def accumulate(policy: Policy, batch: Sequence[Conversation], pixels: ImageFiles, max_tokens: int) -> tuple[float, int]:
    """Gradients of the mean negative log-likelihood over the batch's assistant tokens; returns (it, tokens seen)."""
    total = int(sum(c.loss_mask.sum() for c in batch))
    losses, tokens = [], 0
    for group in plan_microbatches([len(c.ids) for c in batch], max_tokens):
        sequences = [
            TrainingSequence(c.ids, c.loss_mask, tuple(pixels(f) for f in c.images), c.grids)
            for c in (batch[i] for i in group)
        ]
        packed = pack(sequences, policy.codec.image_pad_id, policy.codec.merge_size, policy.device)
        features = policy.image_features(packed.images)
        with policy.frame():
            rows = packed.stretch
            x, _ = through_layers(policy, features, (rows, Stream(policy.rotary(rows.positions), packed.layout)))
            hidden = normed(policy, x[packed.rows])
            del x
            loss = -linear_logprob(hidden, policy.head_weight, packed.targets).logps.sum() / total
            del hidden
            loss.backward()
        losses.append(loss.detach())
        tokens += packed.num_tokens
    return float(torch.stack(losses).sum()), tokens
