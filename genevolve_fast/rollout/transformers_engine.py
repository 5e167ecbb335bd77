"""The embedded engine: a transformers policy that keeps every rollout's keys and values between its turns."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from genevolve_fast.policy.attention import repeat_kv
from genevolve_fast.policy.model import Policy
from genevolve_fast.policy.positions import mrope_positions
from genevolve_fast.protocols import EngineError, Generation, Sampling
from genevolve_fast.rollout.sampling import RequestRandom, sample

_GROW_BY = 64  # columns the working cache grows by when a row runs past its end
_COMPACT_BELOW = 0.6  # drop finished rows from the batch once fewer than this share are still sampling


@dataclass
class _Session:
    """What is kept between turns: keys and values [layers, 2, kv_heads, length, d] of ids[:length]."""

    ids: list[int] = field(default_factory=list)
    next_position: int = 0
    images: int = 0
    cache: Tensor | None = None


@dataclass
class _Call:
    session_id: str
    ids: list[int]
    images: Sequence[np.ndarray]
    sampling: Sampling
    seed: int
    future: asyncio.Future


@dataclass
class _Row:
    """One call while it is being sampled."""

    call: _Call
    session: _Session
    random: RequestRandom
    length: int  # tokens in the working cache
    position: int
    out_ids: list[int] = field(default_factory=list)
    out_logps: list[float] = field(default_factory=list)
    out_kept: list[list[int]] = field(default_factory=list)
    finish: str | None = None


class _WorkingCache:
    """Keys and values of the rows in flight, [layers, 2, rows, kv_heads, capacity, d]; rows are left-aligned."""

    def __init__(self, kv: Tensor, starts: Tensor) -> None:
        self.kv = kv
        self.starts = starts  # [rows] first free column of each row
        self.extent = 0  # columns any row may look at

    def begin(self, starts: Tensor, new: int) -> None:
        """Set where the next `new` tokens of each row go and build the mask they share in every layer."""
        self.starts = starts
        self.columns = starts[:, None] + torch.arange(new, device=starts.device)
        self.extent = int(self.columns.max()) + 1
        if self.extent > self.kv.shape[4]:
            self.kv = F.pad(self.kv, (0, 0, 0, self.extent - self.kv.shape[4] + _GROW_BY))
        allowed = torch.arange(self.extent, device=starts.device) <= self.columns[:, :, None]
        self.mask = allowed[:, None]  # [rows, 1, new, extent]
        self.rows = torch.arange(len(starts), device=starts.device)[:, None]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float, layer: int) -> Tensor:
        keys, values = self.kv[layer, 0], self.kv[layer, 1]
        keys[self.rows, :, self.columns] = k.transpose(1, 2)
        values[self.rows, :, self.columns] = v.transpose(1, 2)
        keys, values = keys[:, :, : self.extent], values[:, :, : self.extent]
        groups = q.shape[1] // k.shape[1]
        if q.shape[2] == 1:  # decoding: query heads of a group become query rows, so keys are read once and not copied
            rows, heads, _, d = q.shape
            out = F.scaled_dot_product_attention(q.view(rows, -1, groups, d), keys, values, self.mask, scale=scale)
            return out.reshape(rows, heads, 1, d)
        keys, values = repeat_kv(keys, groups), repeat_kv(values, groups)
        return F.scaled_dot_product_attention(q, keys, values, self.mask, scale=scale)


class TransformersEngine:
    """Batches the turns of concurrent sessions through one policy (protocols.Engine).

    deterministic=True waits until every open session asks for a turn and then runs them in order of session id, so
    that batches, and with them every bit, do not depend on which tool answered first. Otherwise whatever waits is run.
    `executor` runs the batches, one at a time; none: a thread of the engine's own.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        max_batch: int = 64,
        deterministic: bool = True,
        executor: Executor | None = None,
    ) -> None:
        self.policy = policy
        self.max_batch = max_batch
        self.deterministic = deterministic
        self._sessions: dict[str, _Session] = {}
        self._waiting: list[_Call] = []
        self._running = False
        self._executor = executor or ThreadPoolExecutor(1, "engine")
        self.sampled_tokens = 0

    def open(self, session_id: str) -> None:
        self._sessions.setdefault(session_id, _Session())

    def close(self, session_id: str) -> None:
        self._sessions.pop(session_id, None)
        self._wake()

    def weights_updated(self) -> None:
        """Forget everything computed with the old weights."""
        for session in self._sessions.values():
            session.cache, session.ids, session.next_position, session.images = None, [], 0, 0
        if not self.policy.vision_frozen:
            self.policy.forget_images()

    async def generate(
        self, session_id: str, ids: Sequence[int], images: Sequence[np.ndarray], sampling: Sampling, seed: int
    ) -> Generation:
        if session_id not in self._sessions:
            raise EngineError(f"session {session_id!r} is not open")
        if sampling.max_tokens < 1:
            raise EngineError(f"max_tokens must be at least 1, got {sampling.max_tokens}")
        call = _Call(session_id, list(ids), images, sampling, seed, asyncio.get_running_loop().create_future())
        self._waiting.append(call)
        self._wake()
        return await call.future

    def _wake(self) -> None:
        if not self._running and self._ready():
            self._running = True
            asyncio.get_running_loop().create_task(self._drain())

    async def _drain(self) -> None:
        try:
            await asyncio.sleep(0)  # let every session that is ready in this tick queue its turn
            while self._ready():
                round_ = sorted(self._waiting, key=lambda c: c.session_id)
                self._waiting = []
                for first in range(0, len(round_), self.max_batch):
                    await self._answer(round_[first : first + self.max_batch])
                await asyncio.sleep(0)
        finally:
            self._running = False

    def _ready(self) -> bool:
        return bool(self._waiting) and (not self.deterministic or len(self._waiting) >= len(self._sessions))

    async def _answer(self, calls: list[_Call]) -> None:
        try:
            done = await asyncio.get_running_loop().run_in_executor(self._executor, self._run, calls)
        except Exception as error:
            for call in calls:
                if not call.future.done():
                    call.future.set_exception(EngineError(f"{type(error).__name__}: {error}"))
            return
        for call, generation in zip(calls, done, strict=True):
            if not call.future.done():
                call.future.set_result(generation)

    # --- one batch ----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def _run(self, calls: Sequence[_Call]) -> list[Generation]:
        self.policy.eval()
        rows = [self._row(call) for call in calls]
        active = list(rows)
        cache = self._working_cache(active)
        logits = self._prefill(active, cache)
        while True:
            self._sample(active, logits)
            still = [i for i, row in enumerate(active) if row.finish is None]
            for i, row in enumerate(active):
                if row.finish is not None and row.session.cache is None:
                    self._store(row, cache.kv[:, :, i])
            if not still:
                break
            if len(still) < _COMPACT_BELOW * len(active):
                keep = torch.tensor(still, device=self.policy.device)
                cache = _WorkingCache(cache.kv[:, :, keep], cache.starts[keep])
                active = [active[i] for i in still]
            logits = self._decode(active, cache)
        self.sampled_tokens += sum(len(row.out_ids) for row in rows)
        return [Generation(row.out_ids, row.out_logps, row.finish or "stop", row.out_kept or None) for row in rows]

    def _row(self, call: _Call) -> _Row:
        session = self._sessions.get(call.session_id) or _Session()
        known = len(session.ids)
        if session.ids != call.ids[:known] or known >= len(call.ids):
            session.cache, session.ids, session.next_position, session.images = None, [], 0, 0  # another history
        return _Row(call, session, RequestRandom(call.seed), length=len(session.ids), position=session.next_position)

    def _working_cache(self, rows: Sequence[_Row]) -> _WorkingCache:
        config = self.policy.text_config
        width = max(len(row.call.ids) - row.length for row in rows)
        capacity = max(row.length for row in rows) + width + _GROW_BY
        shape = (config.num_hidden_layers, 2, len(rows), config.num_key_value_heads, capacity, config.head_dim)
        kv = torch.zeros(shape, dtype=self.policy.head_weight.dtype, device=self.policy.device)
        for i, row in enumerate(rows):
            if row.session.cache is not None:
                kv[:, :, i, :, : row.length] = row.session.cache
                row.session.cache = None
        return _WorkingCache(kv, torch.tensor([row.length for row in rows], device=self.policy.device))

    def _prefill(self, rows: Sequence[_Row], cache: _WorkingCache) -> Tensor:
        """Run the ids each row has not computed yet, padded on the right; logits [rows, V] of each row's last id."""
        codec, device = self.policy.codec, self.policy.device
        new = [np.asarray(row.call.ids[row.length :], dtype=np.int64) for row in rows]
        width = max(map(len, new))
        ids = np.zeros((len(rows), width), dtype=np.int64)
        positions = np.zeros((3, len(rows), width), dtype=np.int64)
        image_rows, images = [], []
        for i, (row, fresh) in enumerate(zip(rows, new, strict=True)):
            row_images = row.call.images[row.session.images :]
            grids = [codec.image_grid(pixels) for pixels in row_images]
            where, row.position = mrope_positions(fresh, codec.image_pad_id, grids, codec.merge_size, row.position)
            ids[i, : len(fresh)] = fresh
            positions[:, i, : len(fresh)] = where
            image_rows.append(np.flatnonzero(fresh == codec.image_pad_id) + i * width)
            images.extend(row_images)
            row.session.images = len(row.call.images)
        features = self.policy.image_features(images)
        flat_rows = torch.from_numpy(np.concatenate(image_rows)).to(device) if features is not None else None
        cache.begin(cache.starts, width)
        hidden = self.policy.hidden(
            torch.from_numpy(ids).to(device), torch.from_numpy(positions).to(device), cache.attend, flat_rows, features
        )
        last = torch.tensor([len(fresh) - 1 for fresh in new], device=device)
        for row in rows:
            row.length = len(row.call.ids)
        cache.starts = cache.starts + last + 1
        return self._logits(hidden[torch.arange(len(rows), device=device), last])

    def _decode(self, rows: Sequence[_Row], cache: _WorkingCache) -> Tensor:
        device = self.policy.device
        ids = torch.tensor([[row.out_ids[-1]] for row in rows], device=device)
        positions = torch.tensor([[row.position] for row in rows], device=device).expand(3, -1, -1)
        cache.begin(cache.starts, 1)
        hidden = self.policy.hidden(ids, positions, cache.attend)
        cache.starts = cache.starts + 1
        for row in rows:
            if row.finish is None:
                row.length += 1
                row.position += 1
        return self._logits(hidden[:, 0])

    def _logits(self, hidden: Tensor) -> Tensor:
        """[rows, V]; an image placeholder is never sampled, because no image would stand behind it."""
        logits = F.linear(hidden, self.policy.head_weight)
        logits[:, self.policy.codec.image_pad_id] = -torch.inf
        return logits

    def _sample(self, rows: Sequence[_Row], logits: Tensor) -> None:
        """One token for every row still sampling; rows with equal settings are drawn together."""
        settings: dict[tuple[float, float, bool], list[int]] = {}
        for i, row in enumerate(rows):
            if row.finish is None:
                s = row.call.sampling
                settings.setdefault((s.temperature, s.top_p, s.sampling_mask), []).append(i)
        for (temperature, top_p, masked), members in settings.items():
            uniforms = torch.tensor([rows[i].random.uniform() for i in members], dtype=torch.float64)
            picked = logits[torch.tensor(members, device=logits.device)]
            ids, logps, kept = sample(picked, temperature, top_p, uniforms.to(logits.device), return_kept=masked)
            if kept is not None:
                for i, allowed in zip(members, kept, strict=True):
                    rows[i].out_kept.append(allowed)
            for i, token, logp in zip(members, ids.tolist(), logps.tolist(), strict=True):
                row = rows[i]
                row.out_ids.append(token)
                row.out_logps.append(logp)
                if token in row.call.sampling.stop_ids:
                    row.finish = "stop"
                elif len(row.out_ids) >= row.call.sampling.max_tokens:
                    row.finish = "length"

    def _store(self, row: _Row, kv: Tensor) -> None:
        """Keep what was computed: everything but the last sampled id, which no forward has seen."""
        row.session.cache = kv[:, :, :, : row.length].clone()
        row.session.ids = (row.call.ids + row.out_ids)[: row.length]
        row.session.next_position = row.position
