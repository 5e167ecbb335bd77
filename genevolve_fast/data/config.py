"""Where requests and their ground truth come from: typed configuration, and what is opened from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from genevolve_fast.data.published import LAYOUTS, TruthFiles, open_set, read_requests
from genevolve_fast.data.rows import BadRows, DataError
from genevolve_fast.trajectory import Request


class DataConfig(BaseModel):
    """Requests of evolve and bench."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    path: str = Field(
        "sandbox", description="`sandbox`, a published folder (repository or set), a table, or a hub id to stream from"
    )
    split: str | None = Field(None, description="Split to read; none: train of the RL set, test of the bench")
    limit: int | None = Field(None, ge=1, description="Requests taken, drawn with `seed`; none: all, in their order")
    seed: int = Field(0, description="Seed of the draw that `limit` makes")
    strict: bool = Field(True, description="Refuse the first bad row; false: leave bad rows out and count them")

    @model_validator(mode="after")
    def _refuse(self) -> DataConfig:
        plain = type(self).model_fields
        changed = [name for name in plain if name != "path" and getattr(self, name) != plain[name].default]
        if self.path == "sandbox" and changed:
            raise ValueError(f"{', '.join(changed)} with path 'sandbox' would do nothing: its requests follow a seed")
        if self.seed and self.limit is None:
            raise ValueError("seed without limit would do nothing: all requests are taken, in their order")
        return self


class Requests(Sequence[Request]):
    """Requests in memory, and what was left out."""

    def __init__(self, requests: Sequence[Request], bad: BadRows, where: str) -> None:
        self._requests = tuple(requests)
        self.bad = bad
        self.where = where

    def __len__(self) -> int:
        return len(self._requests)

    def __getitem__(self, index):
        return self._requests[index]


def open_requests(
    config: DataConfig, which: Literal["rl", "bench"]
) -> tuple[Requests, Callable[[Request], np.ndarray]]:
    """(requests, their ground truth as uint8 [height, width, 3]) of a published set.

    Raises DataError: no such data, a bad row (strict), no row left, or path "sandbox", whose world has its own.
    The rows are read here and kept; a ground-truth picture is read when it is asked for, and of a local folder it is
    looked for here, because a run must not find out at step 300.
    """
    if config.path == "sandbox":
        raise DataError("path 'sandbox': the sandbox's world brings its own requests and truth")
    source = open_set(config.path, which, config.split)
    bad = BadRows(config.strict)
    taken = list(read_requests(source, bad))
    if config.limit is not None and config.limit < len(taken):
        chosen = np.random.default_rng(config.seed).permutation(len(taken))[: config.limit]
        taken = [taken[i] for i in sorted(chosen)]
    if not taken:
        raise DataError(f"{source.where} holds no usable request ({bad.count} bad rows) of {LAYOUTS[which].folder}")
    return Requests(taken, bad, source.where), TruthFiles(source)
