"""The Triton epilogue in the interpreter against float64 (TRITON_INTERPRET=1 in a process of its own)."""

from __future__ import annotations

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 before triton is imported", allow_module_level=True)
pytest.importorskip("triton")

from genevolve_fast.kernels.logprob_epilogue import logprob_epilogue

DISTRIBUTIONS = {
    "flat": lambda rows, v: 1e-3 * torch.randn(rows, v),
    "normal": lambda rows, v: 3 * torch.randn(rows, v),
    "peaked": lambda rows, v: 60 * torch.randn(rows, v),
    "shifted": lambda rows, v: torch.randn(rows, v) - 14,
}


def truth(logits, targets, temperature=1.0, softcap=None, scale=1.0):
    z = logits.double() * scale
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    z = z / (temperature.double()[:, None] if isinstance(temperature, torch.Tensor) else temperature)
    log_p = z.log_softmax(-1)
    return log_p[torch.arange(len(targets)), targets], z.logsumexp(-1), -(log_p.exp() * log_p).sum(-1)


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
@pytest.mark.parametrize("vocabulary", [1, 97, 1000, pytest.param(32003, marks=pytest.mark.slow)])
def test_against_float64(kind, vocabulary):
    torch.manual_seed(0)
    logits = DISTRIBUTIONS[kind](5, vocabulary)
    targets = torch.randint(vocabulary, (5,))
    targets[0], targets[1] = vocabulary - 1, logits[1].argmax()
    got = logprob_epilogue(logits, targets, block=1024)
    for mine, want in zip(got, truth(logits, targets), strict=True):
        assert ((mine - want).abs() <= 2e-6 * (got[1].abs().double() / 16).clamp(min=1) * want.abs().clamp(min=1)).all()
    assert (got[0] <= 0).all()


def test_options_and_ignored_rows():
    torch.manual_seed(1)
    logits, targets = 4 * torch.randn(6, 301), torch.randint(301, (6,))
    tau = torch.rand(6) + 0.4
    got = logprob_epilogue(logits, targets, temperature=tau, softcap=5.0, logit_scale=1.7, block=128)
    want = truth(logits, targets, tau, 5.0, 1.7)
    assert all((a - b).abs().max() < 4e-6 for a, b in zip(got, want, strict=True))
    targets[2] = -100
    ignored = logprob_epilogue(logits, targets, temperature=tau, softcap=5.0, logit_scale=1.7, block=128)
    assert all(x[2] == 0 for x in ignored) and torch.equal(ignored[0][3:], got[0][3:])


def test_equal_rows_give_equal_bits_and_strides_are_followed():
    torch.manual_seed(2)
    wide = torch.randn(8, 500)
    wide[5] = wide[1]
    view, targets = wide[:, :333], torch.full((8,), 17)
    got = logprob_epilogue(view, targets, block=64)
    assert all(x[5] == x[1] for x in got)
    assert all(
        torch.equal(a, b) for a, b in zip(got, logprob_epilogue(view.contiguous(), targets, block=64), strict=True)
    )
    assert logprob_epilogue(view[:0], targets[:0])[0].shape == (0,)


def test_wrong_inputs_are_named():
    with pytest.raises(ValueError, match="logits"):
        logprob_epilogue(torch.zeros(2, 3, dtype=torch.float64), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="targets"):
        logprob_epilogue(torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64))
