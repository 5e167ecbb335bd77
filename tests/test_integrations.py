"""Drop-ins against the real peers on CPU: the same call, the same numbers."""

from __future__ import annotations

import pytest
import torch

from genevolve_fast.integrations.cut_cross_entropy import linear_cross_entropy
from genevolve_fast.integrations.liger import FusedLinearGRPOLoss

B, T, H, V = 3, 7, 12, 61


def grpo_inputs(seed: int = 0):
    torch.manual_seed(seed)
    x, w = torch.randn(B, T, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
    mask = (torch.rand(B, T) < 0.8).long()
    now = torch.log_softmax(x.detach() @ w.detach().T, -1)
    ids = torch.randint(V, (B, T))
    logps = now.gather(-1, ids[..., None])[..., 0]
    return x, w, ids, mask, torch.tensor([1.0, -0.7, 0.0]), logps


@pytest.mark.parametrize(
    ("options", "given"),
    [
        (dict(loss_type="dapo", beta=0.0), ()),
        (dict(loss_type="dapo", beta=0.1, temperature=0.7), ("old", "ref", "items")),
        (dict(loss_type="grpo", beta=0.1, epsilon_low=0.1, epsilon_high=0.3), ("old", "ref")),
        (dict(loss_type="bnpo", beta=0.0, delta=1.5), ("old",)),
        (dict(loss_type="dr_grpo", beta=0.04, max_completion_length=20), ("old", "ref_input")),
    ],
)
def test_liger_grpo_loss(options, given):
    peer = pytest.importorskip("liger_kernel.chunked_loss").LigerFusedLinearGRPOLoss
    x, w, ids, mask, advantages, logps = grpo_inputs()
    more = {}
    if "old" in given:
        more["old_per_token_logps"] = logps + 0.3 * torch.randn(B, T)
    if "ref" in given:
        more["ref_per_token_logps"] = logps + 0.3 * torch.randn(B, T)
    if "ref_input" in given:
        more |= dict(ref_input=x.detach() + 0.1, ref_weight=w.detach())
    if "items" in given:
        more["num_items_in_batch"] = 40
    options["use_ref_model"] = bool({"ref", "ref_input"} & set(given))
    results = []
    for loss_of in (FusedLinearGRPOLoss(**options), peer(compiled=False, **options)):
        loss, metrics = loss_of(x, w, ids, mask, advantages, **more)
        results.append([loss, *metrics, *torch.autograd.grad(loss, [x, w])])
    for mine, theirs in zip(*results, strict=True):
        assert (mine - theirs).abs().max() <= 1e-5 * theirs.abs().max().clamp(min=1)


def test_the_teacher_is_what_liger_has_not():
    x, w, ids, mask, advantages, logps = grpo_inputs()
    plain = FusedLinearGRPOLoss(beta=0.0)(x, w, ids, mask, advantages)[0]
    taught = FusedLinearGRPOLoss(beta=0.0, sdl_coef=1.0)(
        x, w, ids, mask, advantages, teacher_per_token_logps=logps + 1.0
    )[0]
    assert taught > plain


@pytest.mark.parametrize(
    "wrong",
    [
        dict(loss_type="cispo"),
        dict(importance_sampling_level="sequence"),
        dict(use_bias_correction_kl=True),
        dict(delta=1.1),
        dict(loss_type="dr_grpo"),
    ],
)
def test_what_the_objective_lacks_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        FusedLinearGRPOLoss(**wrong)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{}, dict(reduction="sum"), dict(reduction="none"), dict(shift=True), dict(softcap=5.0)]
)
def test_cut_cross_entropy(options):
    cce = pytest.importorskip("cut_cross_entropy")
    torch.manual_seed(0)
    e, c = torch.randn(2, 9, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
    targets = torch.randint(V, (2, 9))
    targets[0, 3] = -100
    torch._dynamo.reset()
    results = []
    for loss_of in (linear_cross_entropy, lambda *a, **k: cce.linear_cross_entropy(*a, impl="torch_compile", **k)):
        loss = loss_of(e, c, targets, **options)
        results.append([loss, *torch.autograd.grad(loss.sum(), [e, c])])
    for mine, theirs in zip(*results, strict=True):
        assert mine.shape == theirs.shape
        assert (mine - theirs).abs().max() <= 1e-5 * theirs.abs().max().clamp(min=1)
    with pytest.raises(ValueError, match="filter_eps"):
        linear_cross_entropy(e, c, targets, filter_eps=0.1)
