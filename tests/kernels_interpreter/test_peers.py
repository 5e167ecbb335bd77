"""The adapters of peers that are Triton kernels, in the interpreter, against float64."""

from __future__ import annotations

import pytest
import torch

from benchmarks.check import Truth, errors
from benchmarks.inputs import MODES, Inputs, Shape
from benchmarks.peers import find

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", ["liger_triton_grpo", "liger_flce"])
@pytest.mark.parametrize("layout", ["compact", "ignore"])
def test_a_triton_peer_gives_the_numbers_of_float64(name, layout):
    c = find(name, torch.device("cpu"))
    truth = Truth(Inputs.make(Shape("toy", 32, 1408, torch.float32), 64, torch.device("cpu"), "peaked", 0.5))
    offered = [mode for mode in MODES if c.why_not(mode) is None]
    assert "objective" in offered
    for mode in offered:
        found = errors(c, mode, truth, layout)
        assert found and all(error <= 2e-4 for error in found.values()), (mode, found)
