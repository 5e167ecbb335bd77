"""The packed pass of a unified model against plain sequences: values, gradients, and who sees whom."""

from __future__ import annotations

import dataclasses
import resource

import numpy as np
import pytest
import torch

from genevolve_fast.process.trace import Correction, Cycle, Inspection, Plan, Process, interleave
from genevolve_fast.process.unified.attention import (
    Blocks,
    GeneralisedAttention,
    ImageBlock,
    MaskedAttention,
    TextBlock,
)
from genevolve_fast.process.unified.latents import to_latents, to_pictures
from genevolve_fast.process.unified.loss import forward, losses
from genevolve_fast.process.unified.model import Unified
from genevolve_fast.process.unified.reference import reference_losses
from genevolve_fast.process.unified.sequences import Noise, drawn_images, pack_processes
from genevolve_fast.sandbox.tiny_unified import new_tiny, tiny_codec
from genevolve_fast.trajectory import STAGES, InvariantError, image_hash

RNG = np.random.default_rng(0)
PICTURES = [RNG.integers(0, 256, (16, 16, 3), dtype=np.uint8) for _ in range(6)]
PIXELS = {image_hash(p): p for p in PICTURES}
SHAS = list(PIXELS)


def process(name: str, *cycles: Cycle) -> Process:
    return Process(name, f"a red circle and a blue square {name}", cycles)


def sound(n: int) -> Cycle:
    return Cycle(Plan(f"Add {n}.", f"A scene of {n}."), SHAS[n], Inspection())


def mended(first: int, second: int, trained=STAGES) -> Cycle:
    plan, fault = Plan("Add a square.", "A circle and a square."), Inspection(draft="the square is green")
    return Cycle(plan, SHAS[first], fault, Correction("Paint it blue."), SHAS[second], trained)


PROCESSES = [
    process("one", sound(0)),
    process("three", sound(1), mended(2, 3, ("inspect", "refine")), sound(4)),
    process("two", mended(5, 0)),
]


@pytest.fixture(scope="module")
def codec():
    texts = [t for p in PROCESSES for t in (p.request, *(str(c.plan) + str(c.inspection) for c in p.cycles))]
    return tiny_codec(texts, 16, 8)


@pytest.fixture(scope="module")
def trajectories(codec):
    return [interleave(p, codec, PIXELS) for p in PROCESSES]


def model(codec, predicts: str = "picture") -> Unified:
    policy = new_tiny(codec, 3, hidden=64, layers=2, heads=2, predicts=predicts)
    with torch.no_grad():
        for p in policy.parameters():
            p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    return policy


def noise_for(batch, seed: int = 0) -> Noise:
    generator = torch.Generator().manual_seed(seed)
    return Noise.draw(batch.noised, batch.patches, batch.latents.shape[1], generator, "uniform", shift=1.0)


def in_double(noise: Noise) -> Noise:
    return Noise(noise.times.double(), noise.z0.double())


def split(noise: Noise, trajectory, batch, before: int, copies: int = 1) -> Noise:
    """The noise of one trajectory's copies, which `before` others precede."""
    own = len(drawn_images(trajectory)) * copies
    rows = slice(before * batch.patches, (before + own) * batch.patches)
    return Noise(noise.times[before : before + own], noise.z0[rows])


def parts(batch, dtype=torch.float32):
    return GeneralisedAttention(batch.blocks, torch.device("cpu"))


def masked(batch, dtype=torch.float32):
    return MaskedAttention(batch.blocks, torch.device("cpu"), dtype)


@pytest.mark.parametrize("way", [parts, masked])
@pytest.mark.parametrize(("predicts", "copies"), [("picture", 1), ("velocity", 2)])
def test_the_packed_pass_equals_one_plain_sequence_a_copy_in_values_and_gradients(
    codec, trajectories, predicts, copies, way
):
    policy = model(codec, predicts).double()
    batch = pack_processes(trajectories, PIXELS, codec, copies=copies)
    noise = in_double(noise_for(batch))
    assert batch.noised == copies * (1 + 3 + 2)  # the sketch that was wrong on purpose is read, never drawn

    packed = losses(policy, batch, noise, way(batch, torch.float64))
    (0.25 * packed.nll + packed.squares).backward()
    got = {n: p.grad for n, p in policy.named_parameters() if p.grad is not None}
    policy.zero_grad(set_to_none=True)

    nll = squares = 0
    before = 0
    for t in trajectories:
        one = reference_losses(
            policy, t, [PIXELS[i.sha256] for i in t.images], split(noise, t, batch, before, copies), torch.float64
        )
        before += copies * len(drawn_images(t))
        nll, squares = nll + one.nll, squares + one.squares
    (0.25 * nll + squares).backward()
    assert packed.nll.item() == pytest.approx(nll.item(), rel=1e-9)
    assert packed.squares.item() == pytest.approx(squares.item(), rel=1e-9)
    for name, p in policy.named_parameters():
        torch.testing.assert_close(got[name], p.grad, rtol=1e-7, atol=1e-7 * p.grad.abs().max().item(), msg=name)
        assert p.grad.abs().max() > 0, name


def test_single_precision_agrees_with_the_reference_as_far_as_it_reaches(codec, trajectories):
    policy = model(codec)
    batch = pack_processes(trajectories[1:2], PIXELS, codec)
    noise = noise_for(batch)
    got = losses(policy, batch, noise)
    pictures = [PIXELS[i.sha256] for i in trajectories[1].images]
    want = reference_losses(policy.double(), trajectories[1], pictures, in_double(noise), torch.float64)
    assert got.nll.item() == pytest.approx(want.nll.item(), rel=1e-5)
    assert got.squares.item() == pytest.approx(want.squares.item(), rel=1e-5)


@pytest.mark.parametrize("way", [parts, masked])
def test_nothing_is_seen_that_stands_later_in_another_sequence_or_in_a_noised_copy(codec, trajectories, way):
    """What must not be seen is changed, and every row that must not see it keeps its bits."""
    policy = model(codec)
    batch = pack_processes(trajectories, PIXELS, codec)
    noise = noise_for(batch)
    with torch.no_grad():
        hidden, velocity = forward(policy, batch, noise, way(batch))

        def changed(batch, noise):
            h, v = forward(policy, batch, noise, way(batch))
            return (h != hidden).any(1), (v != velocity).any(1).view(batch.noised, -1).any(1)

        # another noise in copy 2: that copy alone
        z0 = noise.z0.clone()
        z0[2 * batch.patches] += 1
        clean, copies = changed(batch, Noise(noise.times, z0))
        assert not clean.any() and copies.tolist() == [n == 2 for n in range(6)]

        # another clean picture, the third of sequence "three": rows from its begin on, and copies behind it
        latents = batch.latents.clone()
        index = 1 + 2
        latents[index * batch.patches] += 1
        clean, copies = changed(dataclasses.replace(batch, latents=latents), Noise(noise.times, noise.z0))
        start, stop = batch.clean.cu_seqlens[1:3]
        begin = start + trajectories[1].images[2].start
        assert not clean[:begin].any() and not clean[stop:].any() and clean[begin:stop].all()
        assert copies.tolist() == [False, False, True, True, False, False]  # its own copy: by its z_t

        # another text token behind the first image of "three"
        ids = batch.ids.clone()
        at = start + trajectories[1].images[0].stop + 3
        ids[0, at] = codec.encode("circle")[0] if ids[0, at] != codec.encode("circle")[0] else 5
        clean, copies = changed(dataclasses.replace(batch, ids=ids), noise)
        assert not clean[:at].any() and not clean[stop:].any() and clean[at:stop].all()
        assert copies.tolist() == [False, False, True, True, False, False]


def test_rows_of_an_image_see_each_other_and_text_is_causal(codec, trajectories):
    batch = pack_processes(trajectories[:1], PIXELS, codec)
    (t,) = trajectories[:1]
    sees, n, image = batch.blocks.mask(), len(t), t.images[0]
    assert batch.blocks.rows == len(sees) == n + batch.patches
    inside = slice(image.start, image.stop)
    assert sees[inside, : image.stop].all() and not sees[inside, image.stop :].any()
    assert sees[n:, : image.start].all() and sees[n:, n:].all() and not sees[n:, image.start : n].any()
    text = torch.ones(n, n).tril().bool()
    text[inside] = sees[inside, :n]
    assert (sees[:n, :n] == text).all() and not sees[:n, n:].any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("masks", [True, False])
def test_attention_of_blocks_equals_attention_under_their_mask(dtype, masks):
    blocks = Blocks(
        (TextBlock(0, 5, 0), TextBlock(9, 12, 0), TextBlock(12, 20, 12)),
        (ImageBlock(5, 9, ((0, 9),)), ImageBlock(20, 24, ((0, 5), (20, 24))), ImageBlock(24, 28, ((12, 20), (24, 28)))),
    )
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 4, 28, 8, generator=generator, dtype=dtype, requires_grad=True)
    k, v = (torch.randn(1, 2, 28, 8, generator=generator, dtype=dtype, requires_grad=True) for _ in "kv")
    weight = torch.randn(1, 4, 28, 8, generator=generator, dtype=dtype)
    attend = MaskedAttention(blocks, q.device, dtype) if masks else GeneralisedAttention(blocks, q.device)
    got = attend(q, k, v, 0.3, 0)
    grads = torch.autograd.grad((got * weight).sum(), (q, k, v))
    want = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=blocks.mask(), scale=0.3, enable_gqa=True
    )
    wanted = torch.autograd.grad((want * weight).sum(), (q, k, v))
    tolerance = {"rtol": 1e-10, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    for a, b in zip((got, *grads), (want, *wanted), strict=True):
        torch.testing.assert_close(a, b, **tolerance)


def test_latents_are_pictures_and_back():
    latents = to_latents(PICTURES, 4)
    assert latents.shape == (6 * 16, 48) and latents.abs().max() <= 1
    assert all((a == b).all() for a, b in zip(to_pictures(latents, 4, 16), PICTURES, strict=True))


def test_a_process_without_a_draft_is_refused(codec, trajectories):
    t = trajectories[0]
    start = t.images[0].start
    short = t.replace(
        ids=t.ids[:start], loss_mask=t.loss_mask[:start], rollout_logps=t.rollout_logps[:start], images=(),
        turns=(t.turns[0], dataclasses.replace(t.turns[1], stop=start)), stages=(),
    )  # fmt: skip
    with pytest.raises(InvariantError, match="no draft"):
        pack_processes([t, short], PIXELS, codec)


def test_a_saved_model_is_the_same_model(codec, trajectories, tmp_path):
    policy = model(codec)
    policy.save_pretrained(tmp_path)
    again = Unified.from_pretrained(tmp_path)
    assert again.codec.fingerprint() == codec.fingerprint()
    batch = pack_processes(trajectories, PIXELS, codec)
    a, b = losses(policy, batch, noise_for(batch)), losses(again, batch, noise_for(batch))
    assert (a.nll, a.squares) == (b.nll, b.squares)


@pytest.mark.slow
def test_33k_rows_in_one_pass_equal_their_sequences_one_after_another(capsys):
    """As many rows as a published step packs, masks nowhere: long processes of ten drafts of 64 rows each."""
    rng = np.random.default_rng(1)
    pictures = [rng.integers(0, 256, (32, 32, 3), dtype=np.uint8) for _ in range(20)]
    pixels = {image_hash(p): p for p in pictures}
    shas = list(pixels)
    fault = Inspection(draft="the square is green")
    processes = []
    for n in range(24):
        cycles = []
        for k in range(5):
            plan = Plan("add a circle " * 5, "a scene of circles " * (5 + k))
            cycles.append(Cycle(plan, shas[(n + k) % 20], fault, Correction("paint it"), shas[(n + 7 * k + 1) % 20]))
        processes.append(process(f"p{n}", *cycles))
    codec = tiny_codec([f"{c.plan}{c.inspection}{c.correction}" for p in processes for c in p.cycles], 32, 4)
    policy = new_tiny(codec, 0, hidden=64, layers=2, heads=2)
    trajectories = [interleave(p, codec, pixels) for p in processes]
    batch = pack_processes(trajectories, pixels, codec)
    assert batch.ids.shape[1] >= 33_000 and batch.blocks.longest > 512
    noise = noise_for(batch)

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    packed = losses(policy, batch, noise)
    (packed.nll + packed.squares).backward()
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    got = {n: p.grad.clone() for n, p in policy.named_parameters()}
    policy.zero_grad()
    nll = squares = 0.0
    for n, t in enumerate(trajectories):
        one = pack_processes([t], pixels, codec)
        sums = losses(policy, one, split(noise, t, batch, 10 * n))
        (sums.nll + sums.squares).backward()
        nll, squares = nll + sums.nll.item(), squares + sums.squares.item()
    assert packed.nll.item() == pytest.approx(nll, rel=1e-5)
    assert packed.squares.item() == pytest.approx(squares, rel=1e-5)
    for name, p in policy.named_parameters():
        scale = p.grad.abs().max().item()
        torch.testing.assert_close(got[name], p.grad, rtol=1e-3, atol=2e-4 * scale, msg=name)
    with capsys.disabled():
        print(f"\n{batch.ids.shape[1]} rows in one pass: {peak:.0f} MiB above what was there before")
