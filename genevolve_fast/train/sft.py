"""Supervised fine-tuning on assistant tokens: streamed, packed, loss rows only, resumable at the exact sample."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from genevolve_fast.batch.balance import assign
from genevolve_fast.batch.groups import idle_prefix
from genevolve_fast.batch.packing import TrainingSequence, pack, plan_microbatches
from genevolve_fast.data.conversations import Conversation, Conversations, ImageFiles, open_conversations
from genevolve_fast.data.prefetch import Prefetch
from genevolve_fast.data.rows import BadRows
from genevolve_fast.ops import linear_logprob
from genevolve_fast.ops.head import NonFiniteError
from genevolve_fast.policy.model import Policy
from genevolve_fast.policy.passes import normed, through_layers
from genevolve_fast.policy.visits import Stream
from genevolve_fast.profile.flops import sequence_cost
from genevolve_fast.profile.meter import PeakBytes
from genevolve_fast.profile.shapes import ModelShape
from genevolve_fast.train.checkpoint import (
    checkpoints,
    load_checkpoint,
    refuse_full_disk,
    save_checkpoint,
    save_final,
    step_of,
)
from genevolve_fast.train.config import SftConfig
from genevolve_fast.train.finite import FiniteSteps
from genevolve_fast.train.optim import build_optimizer
from genevolve_fast.train.prepare import prepare
from genevolve_fast.train.retention import check_metric
from genevolve_fast.train.run import Run, RunError, claimed, peak_memory_gb
from genevolve_fast.train.stopping import Preempted, Stopping
from genevolve_fast.train.strategies import Strategy
from genevolve_fast.train.update import nothing


def sft(
    config: SftConfig,
    policy: Policy,
    data: Path,
    folder: Path,
    *,
    first: Path | None = None,
    resume: bool = False,
    strategy: Strategy | None = None,
) -> Path:
    """Train `policy` on the conversations at `data`; returns the folder of the final policy (`folder/policy`).

    `first` is a JSONL whose samples are seen once, in their order, before the first epoch. On SIGTERM the last whole
    step is saved and Preempted raised, an exit with status 0.
    """
    strategy = strategy or Strategy()
    stopping = Stopping(strategy.ranks)
    with stopping.listening(), claimed(folder, config, resume, strategy.ranks):
        return _sft(config, policy, data, folder, first, resume, strategy, stopping)


def _sft(config, policy, data, folder: Path, first, resume: bool, strategy: Strategy, stopping: Stopping) -> Path:
    ranks, kept = strategy.ranks, folder / "checkpoints"
    saved = ranks.from_first(lambda: checkpoints(kept)) if resume else []
    samples, opening = ranks.first_then_all(
        lambda: open_samples(config, policy, data, first, folder / "index", settled=bool(saved))
    )
    shape = ModelShape.from_config(policy.model.config.to_dict()) if ranks.world > 1 else None
    schedule = Schedule(config, samples, opening, world=ranks.world, shape=shape)
    prepare(policy, config.policy, config.seed)
    strategy.shard(policy)
    optimizer = build_optimizer(policy, config.optim, schedule.steps, strategy)
    run = Run(folder, config, device=policy.device, total=schedule.steps, resume=resume, ranks=ranks)
    step = load_checkpoint(saved[-1], policy, optimizer, strategy) if saved else 0
    run.begin(step)
    finite = FiniteSteps(policy, config.optim.skip_nonfinite, config.optim.release_gradients)
    refuse_full_disk(kept, step, policy, optimizer, config.checkpoint, ranks=ranks)
    deadline = time.time() + 60 * config.minutes if config.minutes else math.inf
    policy.train()
    save = lambda: save_checkpoint(kept, step, policy, optimizer, None, config.checkpoint, strategy)  # noqa: E731
    try:
        with prefetched(schedule, policy, config, step, ranks.rank) as feed:
            while step < schedule.steps and not ranks.any(time.time() >= deadline):
                plan = schedule.plan(step)
                with run.phase("update_actor", step):
                    begin, waited, memory = time.perf_counter(), feed.waited, PeakBytes(policy.device)
                    microbatches = (next(feed) for _ in plan.microbatches(ranks.rank))
                    try:
                        nll = accumulate(
                            policy, microbatches, plan.loss_tokens, strategy, plan.rounds, pause=stopping.pause
                        )
                    except NonFiniteError as error:
                        if ranks.world > 1:  # the others have a gradient of this step already
                            raise RunError(f"step {step}: {error}") from error
                        nll = math.nan
                        finite.note(error)
                        for _ in microbatches:
                            pass  # the next step begins at its own
                    norm, taken = finite.step(step, optimizer, strategy, config.optim.max_grad_norm, {"loss": nll})
                    peak, seconds = memory.read(), time.perf_counter() - begin
                step += 1
                row = run.log(
                    step,
                    {
                        "loss": nll,
                        **({} if config.optim.release_gradients else {"grad_norm": norm}),
                        "skipped_steps": float(not taken),
                        "lr": optimizer.lr,
                        "num_tokens": plan.tokens,
                        "samples": schedule.samples_before(step),
                        "dropped_samples": samples.dropped,
                        "perf/throughput": plan.tokens / seconds,
                        "perf/data_seconds": feed.waited - waited,
                        "perf/images": plan.images,
                        "perf/packing_efficiency": plan.packing_efficiency,
                        **({} if peak is None else {"perf/peak_bytes_per_token": peak / plan.largest}),
                        "perf/max_memory_allocated_gb": peak_memory_gb(policy.device),
                    },
                )
                if step == 1:
                    check_metric(config.checkpoint.metric, row)
                if step % config.checkpoint.every == 0 or step == schedule.steps:
                    save()
    except Preempted:
        policy.zero_grad(set_to_none=True)
        if step and not ranks.from_first(lambda: step in map(step_of, checkpoints(kept))):
            save()
        run.close()
        raise
    run.close()
    policy.eval()
    save_final(folder / "policy", policy, config.save_dtype and getattr(torch, config.save_dtype), strategy)
    stopping.pause()  # whoever called may have more to do, which nobody waits for now
    return folder / "policy"


# --- data -------------------------------------------------------------------------------------------------------------


def open_samples(
    config: SftConfig, policy: Policy, data: Path, first: Path | None, index: Path, *, settled: bool
) -> tuple[Conversations, Conversations | None]:
    """(samples of `data`, samples of `first`), counted in the folder `index`; `settled`: they may not have changed."""
    codec, d = policy.codec, config.data
    pictures = d.image_cache_mb << 18  # a quarter: a patch holds each pixel twice, in four bytes
    codec.cached_bytes = 3 * pictures
    bad = BadRows(d.strict)
    ways = {"threads": d.workers, "settled": settled, "pictures": ImageFiles(pictures)}
    samples = open_conversations(data, codec, d.cutoff, index / "data.npz", bad=bad, **ways)
    if bad.count:
        print(f"data: {bad.count} bad rows of {data} are left out; the first: {bad.first[0]}")
    return samples, open_conversations(first, codec, d.cutoff, index / "first.npz", **ways) if first else None


@dataclass(frozen=True)
class StepPlan:
    """What one optimizer step trains on, known before any of it is read.

    `packs[rank]` are the rank's micro-batches as indices into `source`; tokens, loss_tokens and images are those of all
    ranks. `largest` is the longest micro-batch of any rank, in tokens.
    """

    source: Conversations
    packs: tuple[tuple[tuple[int, ...], ...], ...]
    tokens: int
    loss_tokens: int
    images: int
    largest: int
    budget: int  # tokens the micro-batches could have held

    def microbatches(self, rank: int = 0) -> tuple[tuple[int, ...], ...]:
        return self.packs[rank]

    @property
    def rounds(self) -> int:
        """Micro-batches of the rank that has most: how often every rank must pass the layers."""
        return max(map(len, self.packs))

    @property
    def packing_efficiency(self) -> float:
        return self.tokens / self.budget


class Schedule:
    """The steps of a run: which samples each trains on, and on which rank. The same on every process."""

    def __init__(
        self,
        config: SftConfig,
        samples: Conversations,
        opening: Conversations | None = None,
        *,
        world: int = 1,
        shape: ModelShape | None = None,
    ) -> None:
        """`shape` weighs samples by FLOPs; without, by tokens."""
        self.config, self.samples, self.opening, self.world, self.shape = config, samples, opening, world, shape
        self.opening_steps = math.ceil(len(opening or ()) / config.batch_size)
        self.steps = self.opening_steps + config.epochs * math.ceil(len(samples) / config.batch_size)

    def batch(self, step: int) -> tuple[Conversations, np.ndarray]:
        """(where the step's samples come from, their indices there)."""
        size = self.config.batch_size
        if self.opening is not None and step < self.opening_steps:
            return self.opening, np.arange(step * size, min((step + 1) * size, len(self.opening)))
        return self.samples, batch_order(self.config, len(self.samples), step - self.opening_steps)

    def plan(self, step: int) -> StepPlan:
        source, batch = self.batch(step)
        lengths, loss_tokens = source.tokens[batch].tolist(), source.loss_tokens[batch].tolist()
        costs = lengths
        if self.shape is not None:
            costs = [sequence_cost(self.shape, *pair) for pair in zip(lengths, loss_tokens, strict=True)]
        budget, packs = self.config.max_tokens_per_microbatch, []
        for share in assign(costs, self.world):
            fitted = plan_microbatches([lengths[i] for i in share], budget)
            packs.append([[share[i] for i in members] for members in fitted])
        sizes = [sum(lengths[i] for i in members) for own in packs for members in own]
        return StepPlan(
            source=source,
            packs=tuple(tuple(tuple(int(batch[i]) for i in members) for members in own) for own in packs),
            tokens=sum(lengths),
            loss_tokens=sum(loss_tokens),
            images=int(source.images[batch].sum()),
            largest=max(sizes),
            budget=sum(max(budget, size) for size in sizes),  # a longer sample is alone in a micro-batch of its size
        )

    def samples_before(self, step: int) -> int:
        """How many samples the steps before `step` trained on; each epoch's last step may be smaller."""
        size, early = self.config.batch_size, min(step, self.opening_steps)
        seen = min(early * size, len(self.opening or ()))
        epoch, within = divmod(step - early, math.ceil(len(self.samples) / size))
        return seen + epoch * len(self.samples) + min(within * size, len(self.samples))


def batch_order(config: SftConfig, samples: int, step: int) -> np.ndarray:
    """Indices of the samples of one step; a function of seed and step only, so nothing needs to be remembered."""
    epoch, within = divmod(step, math.ceil(samples / config.batch_size))
    return _order(config.seed, epoch, samples)[within * config.batch_size : (within + 1) * config.batch_size]


@lru_cache(2)  # the feed is ahead of the step, and so perhaps in the next epoch
def _order(seed: int, epoch: int, samples: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(samples)


def prefetched(
    schedule: Schedule, policy: Policy, config: SftConfig, step: int, rank: int = 0
) -> Prefetch[tuple[Conversations, int], Conversation]:
    """The rank's micro-batches from `step` on, read and tokenized ahead, their pictures made patches."""

    def packs() -> Iterator[list[tuple[Conversations, int]]]:
        for s in range(step, schedule.steps):
            plan = schedule.plan(s)
            yield from ([(plan.source, i) for i in members] for members in plan.microbatches(rank))

    def read(place: tuple[Conversations, int]) -> Conversation:
        source, index = place
        conversation = source[index]
        for pixels in conversation.images:
            policy.codec.image_patches(pixels)  # kept there until the vision tower asks for them
        return conversation

    return Prefetch(read, packs(), threads=config.data.workers)


# --- update -----------------------------------------------------------------------------------------------------------


def accumulate(
    policy: Policy,
    microbatches: Iterable[Sequence[Conversation]],
    loss_tokens: int,
    strategy: Strategy | None = None,
    rounds: int = 0,
    pause: Callable[[], None] = lambda: None,
) -> float:
    """Gradients of the negative log-likelihood of the micro-batches' assistant tokens, and its sum, over `loss_tokens`.

    `loss_tokens` are those of the whole step, on all ranks of `strategy`, which return the same sum; a rank with fewer
    than `rounds` micro-batches passes idle rows. `pause` is called before every round, on all ranks.
    """
    strategy, feed, losses = strategy or Strategy(), iter(microbatches), []
    for _ in range(rounds) if rounds else iter(int, 1):
        pause()
        microbatch = next(feed, None)
        if microbatch is None and not rounds:
            break
        if microbatch is not None:
            losses.append(_one(policy, microbatch, loss_tokens, strategy))
        elif strategy.in_step:
            rows, layout = idle_prefix(policy.device)
            x, _ = through_layers(policy, None, (rows, Stream(policy.rotary(rows.positions), layout)))
            strategy.backward(policy.exit(partial(nothing, policy), x))
    strategy.finish(policy)
    own = float(torch.stack(losses).sum()) if losses else 0.0
    return math.fsum(strategy.ranks.gather(own))


def _one(policy: Policy, microbatch: Sequence[Conversation], loss_tokens: int, strategy: Strategy) -> Tensor:
    sequences = [TrainingSequence(c.ids, c.loss_mask, c.images, c.grids) for c in microbatch]
    packed = pack(sequences, policy.codec.image_pad_id, policy.codec.merge_size, policy.device)
    features = policy.image_features(packed.images)
    with policy.frame():
        rows = packed.stretch
        x, _ = through_layers(policy, features, (rows, Stream(policy.rotary(rows.positions), packed.layout)))
        states = x[packed.rows]
        del x
        loss = policy.exit(partial(_nll, policy, packed.targets, loss_tokens / strategy.loss_scale), states)
        del states
        strategy.backward(loss)
    return loss.detach() / strategy.loss_scale


def _nll(policy: Policy, targets: Tensor, count: float, states: Tensor) -> Tensor:
    return -linear_logprob(normed(policy, states), policy.head_weight, targets).logps.sum() / count
