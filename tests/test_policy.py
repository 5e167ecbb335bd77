"""The layer loop against transformers' own forward, and packing against one sequence at a time."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

from benchmarks.whole_sequences import packed_causal
from genevolve_fast.batch.packing import TrainingSequence, pack, plan_microbatches, teacher_sequence
from genevolve_fast.cli import main
from genevolve_fast.policy.positions import ImageMismatchError, mrope_positions
from genevolve_fast.sandbox.tiny_policy import start_path


def text(n: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(40, 300, n).tolist()


def sequence(policy, pictures, layout: list[int | np.ndarray], seed: int) -> TrainingSequence:
    """`layout`: numbers are text lengths, arrays are pictures."""
    ids: list[int] = []
    images, grids = [], []
    for i, part in enumerate(layout):
        if isinstance(part, int):
            ids += text(part, seed * 100 + i)
        else:
            grid = policy.codec.image_grid(part)
            ids += [policy.codec.image_pad_id] * policy.codec.image_tokens(grid)
            images.append(part)
            grids.append(grid)
    ids = np.array(ids, dtype=np.int64)
    mask = (ids != policy.codec.image_pad_id) & (np.arange(len(ids)) >= 3)
    return TrainingSequence(ids, mask, tuple(images), tuple(grids))


def run(policy, sequences):
    batch = pack(sequences, policy.codec.image_pad_id, policy.codec.merge_size, "cpu")
    features = policy.image_features(batch.images)
    hidden = policy.hidden(batch.ids, batch.positions, packed_causal(batch.cu_seqlens), batch.image_rows, features)
    return hidden[0], batch


def test_layer_loop_equals_transformers(policy, pictures):
    one = sequence(policy, pictures, [5, pictures[0], 4, pictures[1], 2, pictures[2], 6], 1)
    mine, batch = run(policy, [one])
    policy.model.set_attn_implementation("sdpa")
    pixel_values = torch.cat([policy.codec.image_patches(p)[0] for p in one.images])
    is_image = (batch.ids == policy.codec.image_pad_id).int()
    theirs = policy.model.model(
        input_ids=batch.ids,
        pixel_values=pixel_values,
        image_grid_thw=torch.tensor(one.grids),
        mm_token_type_ids=is_image,
        use_cache=False,
    ).last_hidden_state[0]
    assert (mine - theirs).abs().max() < 2e-6
    reference, _ = policy.model.model.get_rope_index(batch.ids, is_image, torch.tensor(one.grids))
    assert torch.equal(reference, batch.positions)


def test_packed_equals_alone(policy, pictures):
    layouts = [[5, pictures[0], 9], [17], [3, pictures[1], 2, pictures[0], 8], [1, 1]]
    sequences = [sequence(policy, pictures, layout, i) for i, layout in enumerate(layouts)]
    packed, batch = run(policy, sequences)
    for i, alone in enumerate(sequences):
        hidden, _ = run(policy, [alone])
        a, b = batch.cu_seqlens[i : i + 2]
        assert (packed[a:b] - hidden).abs().max() < 2e-6
    assert batch.targets.tolist() == [t for s in sequences for t in s.ids[s.loss_mask].tolist()]
    assert torch.equal(batch.ids[0, batch.rows + 1], batch.targets)


def test_teacher_keeps_targets_and_moves_rows(policy, pictures):
    student = sequence(policy, pictures, [6, pictures[0], 5], 3)
    teacher = teacher_sequence(student, 3, [41, 42])
    assert teacher.ids[teacher.loss_mask].tolist() == student.ids[student.loss_mask].tolist()
    assert len(teacher.ids) == len(student.ids) + 2 and teacher.ids[3:5].tolist() == [41, 42]


@pytest.mark.parametrize("wrong", ["missing image", "short run", "spare image"])
def test_placeholders_without_their_image_raise(policy, pictures, wrong):
    pad, grid = policy.codec.image_pad_id, (1, 6, 6)
    runs = {
        "missing image": ([pad] * 9, []),
        "short run": ([pad] * 8, [grid]),
        "spare image": ([pad] * 9, [grid, grid]),
    }
    placeholders, grids = runs[wrong]
    with pytest.raises(ImageMismatchError):
        mrope_positions(np.array([50, *placeholders, 51]), pad, grids, 2)


def test_microbatches_hold_every_sequence_once_within_the_budget():
    lengths = [500, 90, 300, 1200, 700, 30, 30, 640]
    groups = plan_microbatches(lengths, 1000)
    assert sorted(i for g in groups for i in g) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in g) <= 1000 or len(g) == 1 for g in groups)
    assert len(groups) == 4


def test_kept_image_features_have_a_limit(policy, monkeypatch):
    """Every image of a run would otherwise stay on the device; those used last stay, and what is dropped comes back."""
    from genevolve_fast.policy import model

    policy.freeze_vision()
    random = np.random.default_rng(0)
    images = [random.integers(0, 256, (64, 64, 3), dtype=np.uint8) for _ in range(6)]
    want = policy.image_features(images[:2])
    each = want.nbytes // 2
    kept = lambda: sum(x.untyped_storage().nbytes() for f in policy._kept_features.values() for x in f.tensors)  # noqa: E731
    monkeypatch.setattr(model, "KEPT_FEATURES", 3 * each)
    for pixels in (*images[2:], images[4]):
        policy.image_features([pixels])
    assert kept() == policy._kept_bytes == 3 * each
    again = policy.image_features(images[:2])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(again.tensors, want.tensors, strict=True))
    assert len(policy.image_features(images).embeds) == 3 * len(want.embeds) and kept() == 3 * each
    policy.forget_images()
    assert kept() == policy._kept_bytes == 0


def test_kept_patches_have_a_limit(policy, monkeypatch):
    """4 096 pictures of a megapixel would take 100 GB of the host."""
    codec = policy.codec
    monkeypatch.setattr(codec, "_patches", type(codec._patches)())
    monkeypatch.setattr(codec, "_patch_bytes", 0)
    random = np.random.default_rng(0)
    images = [random.integers(0, 256, (64, 64, 3), dtype=np.uint8) for _ in range(5)]
    want = [codec.image_patches(pixels) for pixels in images]
    each = want[0][0].nbytes
    assert codec._patch_bytes == 5 * each
    monkeypatch.setattr(codec, "cached_bytes", 2 * each)
    for pixels, (patches, grid) in zip(images[::-1], want[::-1], strict=True):
        again, seen = codec.image_patches(pixels)
        assert torch.equal(again, patches) and seen == grid
    codec.image_patches(np.zeros((64, 32, 3), np.uint8))
    assert codec._patch_bytes == sum(p.nbytes for p, _ in codec._patches.values()) <= 2 * each


def test_a_grid_follows_from_the_size(tokenizer):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    from genevolve_fast.policy.codec import TransformersCodec

    edges = {"shortest_edge": 64 * 64, "longest_edge": 160 * 160}
    codec = TransformersCodec(tokenizer, Qwen2VLImageProcessorPil(patch_size=16, merge_size=2, size=edges))
    grids = set()
    for size in ((64, 64), (31, 77), (500, 40), (640, 480), (17, 1000), (158, 162)):
        pixels = np.zeros((*size, 3), np.uint8)
        grids.add(codec.image_grid(pixels))
        assert codec.image_grid(pixels) == codec.image_patches(pixels)[1], size
    assert len(grids) > 3


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_rotations_that_depend_on_the_call_are_refused(rope_type):
    from grouped import text_policy

    from genevolve_fast.policy.model import Policy

    plain = text_policy("Llama")
    plain.model.config.rope_parameters["rope_type"] = rope_type
    with pytest.raises(ValueError, match=f"rope_type '{rope_type}'"):
        Policy(plain.model, plain.codec)


@pytest.mark.parametrize("cut", [None, 1000])
def test_a_folder_without_its_weights_is_told_in_one_line(tmp_path, cut, capsys):
    """A crash while it was copied, or a policy that was never written whole."""
    folder = shutil.copytree(start_path(), tmp_path / "policy")
    weights = folder / "model.safetensors"
    data = weights.read_bytes()
    weights.unlink()
    if cut is not None:
        weights.write_bytes(data[:cut])
    assert main(["bench", "--policy", str(folder), "--out", str(tmp_path / "out")]) == 2
    assert f"the weights of {str(folder)!r} cannot be loaded" in capsys.readouterr().err
