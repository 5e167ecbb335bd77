"""Continuous batching: rows enter between two decode steps and leave when they end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from genevolve_fast.rollout.rows import GROW_BY, Forwards, Fresh, Row, WorkingCache


@dataclass
class _Flight:
    """Rows that decode together, in the order of their places in `cache`."""

    cache: WorkingCache
    rows: list[Row] = field(default_factory=list)

    def leave(self, index: int) -> None:
        self.cache.leave(index)
        last = self.rows.pop()
        if index < len(self.rows):
            self.rows[index] = last


class Flights:
    """The rows in flight, by the adapter that computes them.

    `sample` draws a token for each of some rows from logits [rows, V]. Not thread-safe: whoever runs the policy runs
    this.
    """

    def __init__(self, forwards: Forwards, places: int, sample: Callable[[Sequence[Row], Tensor], None]) -> None:
        self._forwards, self._places, self._sample = forwards, places, sample
        self._flights: dict[str | None, _Flight] = {}

    def __len__(self) -> int:
        return sum(len(flight.rows) for flight in self._flights.values())

    @property
    def adapters(self) -> list[str | None]:
        return list(self._flights)

    @property
    def rows(self) -> list[Row]:
        return [row for flight in list(self._flights.values()) for row in flight.rows]

    def rows_of(self, adapter: str | None) -> list[Row]:
        return list(self._flights[adapter].rows) if adapter in self._flights else []

    def step(self, adapter: str | None) -> Iterator[tuple[Row, Tensor]]:
        """One token for every row; those that end leave."""
        flight = self._flights[adapter]
        self._sample(flight.rows, self._forwards.decode(flight.rows, flight.cache))
        yield from self._land(adapter)

    def enter(self, adapter: str | None, rows: list[Row], new: Sequence[Fresh]) -> Iterator[tuple[Row, Tensor]]:
        """Compute what is new in these rows, sample their next token and let them in; those that end leave at once."""
        columns = max(row.length for row in rows) + max(len(fresh.ids) for fresh in new) + GROW_BY
        flight = self._flights.get(adapter) or _Flight(self._forwards.empty_cache(len(rows), 0, columns))
        places = flight.cache.places_after(len(rows), columns, self._places)
        self._sample(rows, self._forwards.prefill(rows, new, places))
        flight.cache.take(places)
        flight.rows += rows
        self._flights[adapter] = flight
        yield from self._land(adapter)

    def start_over(self, adapter: str | None) -> Iterator[tuple[Row, Tensor]]:
        """The rows again from their first id, with the weights as they are now; what they sampled stays."""
        rows = self.drop(adapter)
        for row in rows:
            row.start_over()
        yield from self.enter(adapter, rows, [self._forwards.fresh(row) for row in rows])

    def drop(self, adapter: str | None) -> list[Row]:
        flight = self._flights.pop(adapter, None)
        return flight.rows if flight else []

    @torch.inference_mode()
    def remove(self, unwanted: Callable[[Row], bool]) -> None:
        for adapter, flight in list(self._flights.items()):
            for i in reversed(range(len(flight.rows))):
                if unwanted(flight.rows[i]):
                    flight.leave(i)
            if not flight.rows:
                del self._flights[adapter]

    def _land(self, adapter: str | None) -> Iterator[tuple[Row, Tensor]]:
        """(row, its keys and values) of those that have ended; they leave when the next one is asked for."""
        flight = self._flights[adapter]
        for i in reversed(range(len(flight.rows))):
            row = flight.rows[i]
            if row.finish is not None:
                yield row, flight.cache.kv[:, :, i]
                flight.leave(i)
        if not flight.rows:
            del self._flights[adapter]
