"""The meter on a GPU: bytes from the allocator, seconds from events, nothing synchronised in between."""

from __future__ import annotations

import pytest
import torch

from genevolve_fast.profile.meter import Meter, PeakBytes, snapshot

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
MIB = 2**20


def block(mib: int) -> torch.Tensor:
    return torch.empty(mib * MIB, dtype=torch.uint8, device="cuda")


def test_the_meter_reads_the_allocator():
    meter = Meter("cuda")
    with meter.phase("weights"):
        weights = block(4)
    with meter.phase("student"):
        kept = block(2)
        with meter.phase("teacher"):
            passing = block(8)
            del passing
    assert meter.held == 6 * MIB
    with meter.phase("step"):
        del weights, kept
    report = meter.report()
    peaks = {p.name: p.peak_bytes for p in report.phases}
    assert peaks == {"weights": 4 * MIB, "student": 6 * MIB, "teacher": 14 * MIB, "step": 6 * MIB}
    assert [s.held for s in report.segments] == [x * MIB for x in (4, 6, 6, 6, 0)]


def test_nothing_synchronises_inside_a_phase():
    meter = Meter("cuda")
    x = torch.randn(4096, 4096, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with meter.phase("student"):
            for _ in range(20):
                y = x @ x
            with meter.phase("head"):
                y = y @ x
    finally:
        torch.cuda.set_sync_debug_mode("default")
    student, head = meter.report().phases
    assert student.seconds > head.seconds > 0


def test_peak_bytes_of_a_step():
    peak = PeakBytes("cuda")
    passing = block(64)
    del passing
    assert peak.read() == 64 * MIB and PeakBytes("cuda").read() == 0


def test_a_snapshot_is_written(tmp_path):
    with snapshot("cuda", tmp_path / "snapshot.pickle"):
        block(2)
    assert (tmp_path / "snapshot.pickle").stat().st_size > 0
