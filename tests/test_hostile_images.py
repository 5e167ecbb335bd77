"""Hostile and odd pictures: typed outcomes, legal ones drawn rightly. All: `python -m benchmarks.hostile_images`."""

from __future__ import annotations

import time

import numpy as np
import pytest
from loopback.canvas_service import LoopbackCanvas
from loopback.hostile import PeakMemory
from loopback.hostile_images import MEMORY_LIMIT, WAYS, Case, as_answers, as_references, small_cases, wrong

CASES = small_cases()


@pytest.fixture(scope="module")
def service():
    with LoopbackCanvas() as server:
        yield server


def test_every_picture_is_another_one_or_comes_under_another_name():
    assert len({case.name for case in CASES}) == len(CASES) >= 500
    assert len({case.data for case in CASES}) >= 500


def test_legal_pictures_are_drawn_rightly_and_the_others_refused_with_a_type(tmp_path):
    with PeakMemory() as memory:
        assert as_references(CASES[::3], tmp_path) == {}
    assert memory.growth < MEMORY_LIMIT


@pytest.mark.parametrize("way", WAYS)
def test_pictures_of_services_are_read_as_carefully(service, way):
    assert as_answers(CASES[1::17], service, WAYS[way]) == {}


@pytest.mark.slow
def test_every_picture(service, tmp_path):
    """As references all of them, over each protocol every second one; the benchmark does all ways with all."""
    from loopback.hostile_images import cases

    everything = cases()
    with PeakMemory() as memory:
        assert as_references(everything, tmp_path) == {}
        for path in WAYS.values():
            assert as_answers(everything[::2], service, path) == {}
    assert memory.growth < MEMORY_LIMIT


def test_a_jpeg_may_not_pass_all_its_pixels_hundreds_of_times():
    from loopback.hostile_images import _scans

    from genevolve_fast.net.pictures import decode_image
    from genevolve_fast.net.web import FetchError

    data, started = _scans((2400, 2400), 450), time.monotonic()
    with pytest.raises(FetchError, match="450 scans"):
        decode_image(data, 40_000_000, 4096)
    assert time.monotonic() - started < 10


def test_the_checker_sees_what_is_wrong():
    good = np.full((2, 3, 3), 9, np.uint8)
    case = Case("c", b"", "drawn", good)
    assert wrong(case, good, "") == "" and wrong(case, good + 1, "") == "off by 1"
    assert "expected (2, 3, 3)" in wrong(case, good[:1], "")
    assert "refused with not_an_image" in wrong(case, None, "not_an_image")
    assert "refused with 'other'" in wrong(Case("c", b""), None, "other")
    assert "expected too_large" in wrong(Case("c", b"", "too_large"), None, "not_an_image")
    assert "drawn" in wrong(Case("c", b"", "refused"), good, "")
