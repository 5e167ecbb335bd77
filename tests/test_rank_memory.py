"""What two ranks hold in a training step, against the plan."""

from __future__ import annotations

import pytest

from benchmarks import rank_memory

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("strategy", ["ddp", "zero3", "fsdp2"])
def test_a_rank_holds_what_the_plan_says(strategy):
    found, made = rank_memory.measured(strategy), rank_memory.predicted(strategy)
    held = sum(t.bytes for t in made.held)
    assert found["held"] == pytest.approx(held, rel=0.02), "weights, states and what an engine keeps"
    for phase, peak in found["peaks"].items():
        above, predicted = peak - found["held"], made.phase_above(phase)
        print(f"{strategy} {phase}: {predicted / 2**20:.1f} MiB above what is held, measured {above / 2**20:.1f}")
    peak = max(found["peaks"].values())
    assert 0.5 < (made.total - held) / (peak - found["held"]) < 2
    assert 0.7 < made.total / peak < 1.4
