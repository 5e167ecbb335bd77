"""Calls while they are sampled: one row each, their keys and values side by side, the forwards they share."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from genevolve_fast.policy.attention import repeat_kv
from genevolve_fast.policy.model import Policy
from genevolve_fast.policy.positions import mrope_positions
from genevolve_fast.protocols import EngineError, Sampling
from genevolve_fast.rollout.sampling import RequestRandom

GROW_BY = 64  # columns the working cache has beyond what is in it


@dataclass
class Session:
    """What is kept between turns: keys and values [layers, 2, kv_heads, len(ids), d] of `ids`."""

    adapter: str | None = None
    ids: list[int] = field(default_factory=list)
    next_position: int = 0
    images: int = 0
    cache: Tensor | None = None

    def forget(self) -> None:
        self.ids, self.next_position, self.images, self.cache = [], 0, 0, None


@dataclass
class Call:
    session_id: str
    ids: list[int]
    images: Sequence[np.ndarray]
    sampling: Sampling
    seed: int
    future: asyncio.Future
    aborted: bool = False


@dataclass
class Row:
    """One call while it is being sampled. `cache` is the session's until the row's place in the batch is filled."""

    call: Call
    session: Session
    random: RequestRandom
    length: int  # tokens in the working cache
    position: int
    images: int  # how many of the call's are in it
    cache: Tensor | None
    cached: int = 0  # tokens that the session kept
    out_ids: list[int] = field(default_factory=list)
    out_logps: list[float] = field(default_factory=list)
    out_kept: list[list[int]] = field(default_factory=list)  # what top-p left of the vocabulary, where asked for
    finish: str | None = None
    versions: list[tuple[int | str, int]] = field(default_factory=list)  # (weights, first token they sampled)

    @classmethod
    def of(cls, call: Call, session: Session) -> Row:
        """The row takes what the session keeps, where it is the beginning of this call's ids."""
        known = len(session.ids)
        if session.cache is None or known >= len(call.ids) or session.ids != call.ids[:known]:
            session.forget()  # another history
        kept = (len(session.ids), session.next_position, session.images, session.cache)
        session.forget()  # an error on the way must not leave ids without their cache
        return cls(call, session, RequestRandom(call.seed), *kept, cached=kept[0])

    @property
    def ids(self) -> list[int]:
        return self.call.ids + self.out_ids

    def start_over(self) -> None:
        """Nothing of it is computed any more; what was sampled stays."""
        self.length, self.position, self.images, self.cache = 0, 0, 0, None

    def keep(self, kv: Tensor) -> None:
        """Hand the session what was computed: everything but the last sampled id, which no forward has seen."""
        self.session.cache = kv[:, :, :, : self.length].clone()
        self.session.ids = self.ids[: self.length]
        self.session.next_position = self.position
        self.session.images = self.images


@dataclass(frozen=True)
class Fresh:
    """What a row has not computed yet: ids [n], positions [3, n], their images, the position after them."""

    ids: np.ndarray
    positions: np.ndarray
    images: Sequence[np.ndarray]
    next_position: int


class WorkingCache:
    """Keys and values of the rows in flight, [layers, 2, places, kv_heads, capacity, d]; rows are left-aligned.

    The rows are the first len(starts) places.
    """

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
            self._reserve(0, self.extent + GROW_BY)
        allowed = torch.arange(self.extent, device=starts.device) <= self.columns[:, :, None]
        self.mask = allowed[:, None]  # [rows, 1, new, extent]
        self.rows = torch.arange(len(starts), device=starts.device)[:, None]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float, layer: int) -> Tensor:
        keys, values = self.kv[layer, 0, : len(q)], self.kv[layer, 1, : len(q)]
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

    def select(self, rows: Sequence[int]) -> WorkingCache:
        """A cache of its own of some rows."""
        keep = torch.tensor(rows, device=self.starts.device)
        return WorkingCache(self.kv[:, :, keep], self.starts[keep])

    def places_after(self, rows: int, columns: int, at_most: int) -> WorkingCache:
        """`rows` new places behind ours, of at least `columns`, in the same memory; `take` makes them ours."""
        used = len(self.starts)
        if used + rows > self.kv.shape[2]:
            self._reserve(min(at_most, max(used + rows, 2 * self.kv.shape[2])), 0)
        if columns > self.kv.shape[4]:
            self._reserve(0, columns)
        return WorkingCache(self.kv[:, :, used : used + rows], self.starts.new_zeros(rows))

    def take(self, places: WorkingCache) -> None:
        self.starts = torch.cat([self.starts, places.starts])

    def leave(self, row: int) -> None:
        """The last row moves to the place of `row`."""
        last = len(self.starts) - 1
        if row != last:
            length = int(self.starts[last])
            self.kv[:, :, row, :, :length] = self.kv[:, :, last, :, :length]
            self.starts[row] = self.starts[last]
        self.starts = self.starts[:last]

    def _reserve(self, places: int, columns: int) -> None:
        more = max(0, places - self.kv.shape[2]), max(0, columns - self.kv.shape[4])
        self.kv = F.pad(self.kv, (0, 0, 0, more[1], 0, 0, 0, more[0]))


class Forwards:
    """The policy's forwards over rows and their working cache."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    def fresh(self, row: Row) -> Fresh:
        """Raises EngineError for ids that this policy cannot compute."""
        codec, ids = self.policy.codec, np.asarray(row.ids[row.length :], dtype=np.int64)
        vocabulary = self.policy.head_weight.shape[0]
        if len(ids) == 0 or ids.min() < 0 or ids.max() >= vocabulary:
            raise EngineError(f"ids must be some of 0 to {vocabulary - 1}", "bad_arguments")
        images = row.call.images[row.images :]
        grids = [codec.image_grid(pixels) for pixels in images]
        try:
            where, after = mrope_positions(ids, codec.image_pad_id, grids, codec.merge_size, row.position)
        except ValueError as error:
            raise EngineError(f"{type(error).__name__}: {error}", "bad_arguments") from error
        return Fresh(ids, where, images, after)

    def empty_cache(self, places: int, rows: int, columns: int) -> WorkingCache:
        """Zeros; the first `rows` places are taken."""
        config = self.policy.text_config
        shape = (config.num_hidden_layers, 2, places, config.num_key_value_heads, columns, config.head_dim)
        kv = torch.zeros(shape, dtype=self.policy.head_weight.dtype, device=self.policy.device)
        return WorkingCache(kv, torch.zeros(rows, dtype=torch.int64, device=self.policy.device))

    def prefill(self, rows: Sequence[Row], new: Sequence[Fresh], cache: WorkingCache) -> Tensor:
        """Run what each row has not computed yet, padded on the right; logits [rows, V] of each row's last id."""
        codec, device = self.policy.codec, self.policy.device
        width = max(len(fresh.ids) for fresh in new)
        ids = np.zeros((len(rows), width), dtype=np.int64)
        positions = np.zeros((3, len(rows), width), dtype=np.int64)
        image_rows, images = [], []
        for i, (row, fresh) in enumerate(zip(rows, new, strict=True)):
            if row.cache is not None:
                cache.kv[:, :, i, :, : row.length] = row.cache
                row.cache = None
            ids[i, : len(fresh.ids)] = fresh.ids
            positions[:, i, : len(fresh.ids)] = fresh.positions
            image_rows.append(np.flatnonzero(fresh.ids == codec.image_pad_id) + i * width)
            images.extend(fresh.images)
        features = self.policy.image_features(images)
        flat_rows = torch.from_numpy(np.concatenate(image_rows)).to(device) if features is not None else None
        cache.begin(torch.tensor([row.length for row in rows], device=device), width)
        hidden = self.policy.hidden(
            torch.from_numpy(ids).to(device), torch.from_numpy(positions).to(device), cache.attend, flat_rows, features
        )
        last = torch.tensor([len(fresh.ids) - 1 for fresh in new], device=device)
        for row, fresh in zip(rows, new, strict=True):
            row.length, row.position, row.images = len(row.ids), fresh.next_position, len(row.call.images)
        cache.starts = cache.starts + last + 1
        return self._logits(hidden[torch.arange(len(rows), device=device), last])

    def decode(self, rows: Sequence[Row], cache: WorkingCache) -> Tensor:
        """Run the last sampled id of each row; logits [rows, V]."""
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
