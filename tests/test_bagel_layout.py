"""The layout of BAGEL-style checkpoints on a small random one, and its names against our own model."""

from __future__ import annotations

import json
from math import prod

import numpy as np
import pytest
from safetensors.numpy import save_file

from genevolve_fast.process.unified.bagel import BagelShape, deviations, layout, our_name, shapes_in
from genevolve_fast.resumable import BatchError
from genevolve_fast.sandbox.tiny_unified import new_tiny, tiny_codec

SMALL = BagelShape(16, 2, 4, 2, 24, 40, 2, 4, 3)


@pytest.fixture
def folder(tmp_path):
    """A random checkpoint of SMALL with a part of its vision tower."""
    random = np.random.default_rng(0)
    tensors = {name: random.normal(size=sizes).astype(np.float32) for name, sizes in layout(SMALL).items()}
    tensors["connector.fc1.weight"] = np.zeros((16, 8), np.float32)
    save_file(tensors, tmp_path / "ema.safetensors")
    llm = dict(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=24,
        vocab_size=40,
    )  # fmt: skip
    (tmp_path / "llm_config.json").write_text(json.dumps(llm))
    whole = {"latent_patch_size": 2, "max_latent_size": 3, "vae_config": {"z_channels": 4, "downsample": 8}}
    (tmp_path / "config.json").write_text(json.dumps(whole))
    return tmp_path


def test_a_small_random_checkpoint_has_the_layout_and_deviations_are_named(folder):
    assert BagelShape.from_folder(folder) == SMALL
    held = shapes_in(folder)
    assert list(deviations(held, SMALL)) == []
    lacking = {k: v for k, v in held.items() if k != "llm2vae.bias"} | {"vae2llm.weight": (16, 4), "extra": (1,)}
    assert list(deviations(lacking, SMALL)) == [
        "vae2llm.weight is [16, 4], not [16, 16]",
        "llm2vae.bias [16] is missing",
        "extra [1] is in no BAGEL layout",
    ]
    (folder / "config.json").write_text("{}")
    with pytest.raises(BatchError, match="latent_patch_size"):
        BagelShape.from_folder(folder)
    with pytest.raises(BatchError, match="cannot be read"):
        shapes_in(folder / "nowhere")


def test_the_published_model_has_fourteen_billion_numbers_of_which_seven_draw():
    sizes = layout(BagelShape())
    billions = {
        side: sum(prod(v) for k, v in sizes.items() if ("_moe_gen" in k) == side) / 1e9 for side in (True, False)
    }
    assert billions[True] == pytest.approx(6.53, abs=0.02) and billions[False] == pytest.approx(7.64, abs=0.02)


def test_what_lies_outside_the_layers_has_a_place_in_our_model():
    model = new_tiny(tiny_codec(["a red circle"] * 8, 16, 8), hidden=64, layers=1, heads=2).model
    ours = dict(model.named_parameters()) | {"lm_head.weight": model.lm_head.weight}
    names = [n for n in map(our_name, layout(SMALL)) if n]
    assert len(names) == 11 and set(names) <= set(ours)
    assert our_name("language_model.model.layers.0.mlp.up_proj.weight") is None
    theirs = {our_name(n): v for n, v in layout(SMALL).items() if our_name(n)}
    assert all(len(theirs[n]) == ours[n].ndim for n in names)
