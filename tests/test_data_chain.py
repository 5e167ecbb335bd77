"""The whole offline chain: eight steps, each known to be read by the next."""

from __future__ import annotations

import pytest

from benchmarks.data_chain import SMALL, STEPS, run_chain


@pytest.mark.slow
def test_every_step_of_the_chain_is_read_by_the_next(tmp_path):
    chain = run_chain(tmp_path, SMALL)
    assert chain.count == len(STEPS) == 8, chain.text()
    assert (tmp_path / "bench" / "score" / "summary.json").exists()
