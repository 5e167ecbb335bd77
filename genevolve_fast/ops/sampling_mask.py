"""The ids that a row could have been sampled from: its softmax is that of these ids alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from genevolve_fast.ops.masks import Rows

BANNED = -1e20  # of a logit: exp of it is 0 at any temperature, and 0 times it too
UNREACHABLE = torch.iinfo(torch.int64).max  # of a target: its log-prob is NaN
_INTEGERS = (torch.int32, torch.int64)


class SamplingMask(NamedTuple):
    """The sets of ids that rows were sampled from, row after row; a row of count 0 has its whole vocabulary.

    ids [sum of counts] int32 or int64 where hidden is; counts [rows] int32 or int64 on the CPU, because the host sizes
    its work by them.
    """

    ids: Tensor
    counts: Tensor

    def of(self, rows: Tensor) -> SamplingMask:
        """The sets of the rows where `rows` [rows] bool holds; synchronises a GPU."""
        rows = rows.cpu()
        chosen = torch.repeat_interleave(rows, self.counts.long())
        return SamplingMask(self.ids[chosen.to(self.ids.device)], self.counts[rows])


@dataclass(frozen=True)
class RowSets:
    """A sampling mask as the visits of a call read it.

    owners [rows]: which of the mask's sets each row of the call has, each set at most once, len(counts) for none;
    None: row i has set i.
    """

    ids: Tensor
    counts: Tensor
    owners: Tensor | None = None

    @cached_property
    def _table(self) -> tuple[Tensor, Tensor]:
        """(how many ids each set has, where it stops in `ids`), [sets + 1]: the last is the set of rows without one."""
        counts = torch.cat([self.counts.long(), torch.zeros(1, dtype=torch.int64)])
        if (counts < 0).any() or counts.sum() != len(self.ids):
            raise ValueError(
                f"sampling_mask.counts must be at least 0 and sum to the {len(self.ids)} ids of sampling_mask, "
                f"got {int(counts.min())} at least and a sum of {int(counts.sum())}"
            )
        return tuple(upload(torch.stack([counts, counts.cumsum(0)]), self.ids.device))

    @cached_property
    def _most(self) -> Tensor:
        """[sets + 1] on the host: how many ids n sets can have at most."""
        largest = self.counts.long().sort(descending=True).values
        return torch.cat([largest.new_zeros(1), largest.cumsum(0)])

    def owners_of(self, rows: Rows) -> Tensor:
        """[n] the sets of some rows, as indices."""
        if self.owners is not None:
            return self.owners[rows]
        if isinstance(rows, slice):
            return torch.arange(*rows.indices(len(self.counts)), device=self.ids.device)
        return rows

    def entries(self, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        """(which of the n rows have a set [n], for each id of their sets its row [m], and the id [m] int64).

        On a GPU there may be more entries than ids: those have row n.
        """
        counts, stops = self._table
        owners = self.owners_of(rows)
        own = counts[owners]
        last = own.cumsum(0)
        place = torch.arange(self._bound(rows, last), device=last.device)
        row = torch.searchsorted(last, place, right=True)
        shift = (stops[owners] - last)[row.clamp(max=len(last) - 1)]
        ids = self.ids[(place + shift).clamp(max=len(self.ids) - 1)].long()
        return own > 0, row, ids

    def _bound(self, rows: Rows, last: Tensor) -> int:
        """How many ids the rows have, or on a GPU at most."""
        return int(last[-1]) if last.device.type == "cpu" else self._at_most(rows, len(last))

    def _at_most(self, rows: Rows, n: int) -> int:
        """What the host knows without waiting for the device."""
        if isinstance(rows, slice) and self.owners is None:
            return int(self.counts[rows].sum())
        return int(self._most[min(n, len(self.counts))])

    def holds(self, row: int, target: int) -> bool:
        """Whether a row of the call could have been sampled as `target`; synchronises a GPU."""
        has, at, ids = self.entries(torch.tensor([row], device=self.ids.device))
        return not bool(has) or bool(((at == 0) & (ids == target)).any())


def check_sampling_mask(hidden: Tensor, mask: RowSets, softcap: float | None, scale: float) -> None:
    """Raises ValueError naming the argument of a wrong shape, dtype, device or value; nothing is synchronised."""
    ids, counts, rows = mask.ids, mask.counts, hidden.shape[0]
    if ids.ndim != 1 or ids.dtype not in _INTEGERS:
        raise ValueError(f"sampling_mask.ids must be int32 or int64 [ids], got {ids.dtype} {list(ids.shape)}")
    if ids.device != hidden.device:
        raise ValueError(f"sampling_mask.ids is on {ids.device}, hidden on {hidden.device}")
    if counts.shape != (rows,) or counts.dtype not in _INTEGERS:
        raise ValueError(
            f"sampling_mask.counts must be int32 or int64 [{rows}], got {counts.dtype} {list(counts.shape)}"
        )
    if counts.device.type != "cpu":
        raise ValueError(f"sampling_mask.counts must be on the CPU, whose work it sizes, got {counts.device}")
    if softcap is not None:
        raise ValueError("sampling_mask cannot be given with softcap: its tanh would bring banned logits back")
    if not scale > 0:
        raise ValueError(f"sampling_mask needs a positive logit_scale, got {scale}")


def upload(x: Tensor, device: torch.device) -> Tensor:
    """x of the host on `device`; nothing waits for the copy."""
    return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)
