"""The policy's tensors as inference engines hold them: layouts written out by hand, digests, folders."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file

from genevolve_fast.policy.adapters import add_lora, merged_state_dict
from genevolve_fast.rollout.weights import (
    HeadShape,
    LayoutError,
    differing,
    digest,
    expected_weights,
    full_weights,
    write_folder,
)

HEADS = HeadShape(kv_heads=2, head_dim=4, vision_heads=4)
LAYER, BLOCK = "model.language_model.layers.0.", "model.visual.blocks.0."


def weights() -> dict[str, torch.Tensor]:
    """A Qwen3-VL of one layer and one block: 4 query heads, 2 key heads, vocabulary 100."""
    random = torch.Generator().manual_seed(0)
    shapes = {
        "model.visual.patch_embed.proj.weight": (8, 3, 2, 4, 4),
        "model.visual.pos_embed.weight": (9, 8),
        f"{BLOCK}norm1.bias": (8,),
        f"{BLOCK}attn.qkv.weight": (24, 8),
        f"{BLOCK}attn.qkv.bias": (24,),
        f"{BLOCK}attn.proj.weight": (8, 8),
        f"{BLOCK}attn.proj.bias": (8,),
        f"{BLOCK}mlp.linear_fc1.bias": (16,),
        f"{BLOCK}mlp.linear_fc2.weight": (8, 16),
        f"{BLOCK}mlp.linear_fc2.bias": (8,),
        "model.language_model.embed_tokens.weight": (100, 8),
        f"{LAYER}self_attn.q_proj.weight": (16, 8),
        f"{LAYER}self_attn.k_proj.weight": (8, 8),
        f"{LAYER}self_attn.v_proj.weight": (8, 8),
        f"{LAYER}self_attn.o_proj.weight": (8, 16),
        f"{LAYER}self_attn.q_norm.weight": (4,),
        f"{LAYER}mlp.gate_proj.weight": (24, 8),
        f"{LAYER}mlp.up_proj.weight": (24, 8),
        f"{LAYER}mlp.down_proj.weight": (8, 24),
        "lm_head.weight": (100, 8),
    }
    return {name: torch.randn(shape, generator=random) for name, shape in shapes.items()}


def by_hand(w: dict[str, torch.Tensor], rank: int, tp: int) -> dict[str, torch.Tensor]:
    """What vLLM keeps on one rank, every slice spelled out."""
    q, k, v = (w[f"{LAYER}self_attn.{n}_proj.weight"] for n in "qkv")
    gate, up = w[f"{LAYER}mlp.gate_proj.weight"], w[f"{LAYER}mlp.up_proj.weight"]
    vq, vk, vv = w[f"{BLOCK}attn.qkv.weight"].split(8)
    bq, bk, bv = w[f"{BLOCK}attn.qkv.bias"].split(8)
    vocabulary = torch.cat([w["model.language_model.embed_tokens.weight"], torch.zeros(28, 8)])  # 100 -> 128
    head = torch.cat([w["lm_head.weight"], torch.zeros(28, 8)])
    part = {
        1: {"q": slice(0, 16), "kv": slice(0, 8), "mlp": slice(0, 24), "vision": slice(0, 8), "wide": slice(0, 16)},
        2: {
            "q": slice(8 * rank, 8 * rank + 8),
            "kv": slice(4 * rank, 4 * rank + 4),
            "mlp": slice(12 * rank, 12 * rank + 12),
            "vision": slice(4 * rank, 4 * rank + 4),
            "wide": slice(8 * rank, 8 * rank + 8),
        },
        4: {  # 2 key heads on 4 ranks: ranks 0, 1 hold the first, ranks 2, 3 the second
            "q": slice(4 * rank, 4 * rank + 4),
            "kv": slice(4 * (rank // 2), 4 * (rank // 2) + 4),
            "mlp": slice(6 * rank, 6 * rank + 6),
            "vision": slice(2 * rank, 2 * rank + 2),
            "wide": slice(4 * rank, 4 * rank + 4),
        },
    }[tp]
    rows = slice(128 // tp * rank, 128 // tp * (rank + 1))
    return {
        "visual.patch_embed.proj.weight": w["model.visual.patch_embed.proj.weight"],
        "visual.pos_embed.weight": w["model.visual.pos_embed.weight"],
        "visual.blocks.0.norm1.bias": w[f"{BLOCK}norm1.bias"],
        "visual.blocks.0.attn.qkv.weight": torch.cat([vq[part["vision"]], vk[part["vision"]], vv[part["vision"]]]),
        "visual.blocks.0.attn.qkv.bias": torch.cat([bq[part["vision"]], bk[part["vision"]], bv[part["vision"]]]),
        "visual.blocks.0.attn.proj.weight": w[f"{BLOCK}attn.proj.weight"][:, part["vision"]],
        "visual.blocks.0.attn.proj.bias": w[f"{BLOCK}attn.proj.bias"],
        "visual.blocks.0.mlp.linear_fc1.bias": w[f"{BLOCK}mlp.linear_fc1.bias"][part["wide"]],
        "visual.blocks.0.mlp.linear_fc2.weight": w[f"{BLOCK}mlp.linear_fc2.weight"][:, part["wide"]],
        "visual.blocks.0.mlp.linear_fc2.bias": w[f"{BLOCK}mlp.linear_fc2.bias"],
        "language_model.model.embed_tokens.weight": vocabulary[rows],
        "language_model.model.layers.0.self_attn.qkv_proj.weight": torch.cat(
            [q[part["q"]], k[part["kv"]], v[part["kv"]]]
        ),
        "language_model.model.layers.0.self_attn.o_proj.weight": w[f"{LAYER}self_attn.o_proj.weight"][:, part["q"]],
        "language_model.model.layers.0.self_attn.q_norm.weight": w[f"{LAYER}self_attn.q_norm.weight"],
        "language_model.model.layers.0.mlp.gate_up_proj.weight": torch.cat([gate[part["mlp"]], up[part["mlp"]]]),
        "language_model.model.layers.0.mlp.down_proj.weight": w[f"{LAYER}mlp.down_proj.weight"][:, part["mlp"]],
        "language_model.lm_head.weight": head[rows],
    }


def reported(w: dict[str, torch.Tensor], tp: int, dtype: torch.dtype, dp: int = 1) -> dict[str, str]:
    """What vLLM's weight checker says of them."""
    return {
        f"dp{d}:pp0:pcp0:tp{rank}:{name}": digest(tensor.to(dtype))
        for d in range(dp)
        for rank in range(tp)
        for name, tensor in by_hand(w, rank, tp).items()
    }


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_every_rank_holds_what_is_written_out_by_hand(tp):
    w = weights()
    for rank in range(tp):
        expected = dict(expected_weights(w, HEADS, rank, tp))
        own = by_hand(w, rank, tp)
        assert expected.keys() == own.keys()
        for name, tensor in own.items():
            assert torch.equal(expected[name][0](), tensor), name


@pytest.mark.parametrize(("tp", "dp"), [(1, 1), (2, 1), (4, 2)])
def test_digests_agree_and_one_changed_value_is_found_on_its_rank(tp, dp):
    w = weights()
    said = reported(w, tp, torch.bfloat16, dp)
    assert differing(said, w, HEADS, torch.bfloat16) == []
    w[f"{LAYER}self_attn.k_proj.weight"][7, 3] += 1  # of the last key head
    wrong = differing(said, w, HEADS, torch.bfloat16)
    ranks = {1: [0], 2: [1], 4: [2, 3]}[tp]
    name = "language_model.model.layers.0.self_attn.qkv_proj.weight"
    assert wrong == ([name] if tp * dp == 1 else sorted(f"dp{d}:tp{r}:{name}" for d in range(dp) for r in ranks))


def test_a_vision_tower_that_is_whole_on_every_rank_is_accepted_and_a_wrong_one_is_not():
    w = weights()
    said = reported(w, 2, torch.float32)
    whole = dict(said)
    for key in said:
        if ":visual." in key:
            whole[key] = digest(w["model." + key.split(":")[-1]])
    assert differing(whole, w, HEADS, torch.float32) == []
    key = "dp0:pp0:pcp0:tp1:visual.blocks.0.attn.proj.weight"
    assert differing(whole | {key: digest(torch.ones(3))}, w, HEADS, torch.float32) == [
        "dp0:tp1:visual.blocks.0.attn.proj.weight"
    ]


def test_lost_unknown_and_rounded_parameters_differ():
    w = weights()
    said = reported(w, 1, torch.float32)
    key = "dp0:pp0:pcp0:tp0:language_model.lm_head.weight"
    assert differing({k: v for k, v in said.items() if k != key}, w, HEADS, torch.float32) == [key.split(":")[-1]]
    assert differing(said | {"dp0:pp0:pcp0:tp0:extra": "0"}, w, HEADS, torch.float32) == ["extra"]
    assert len(differing(said, w, HEADS, torch.bfloat16)) == len(said)
    assert differing({}, w, HEADS, torch.float32) == sorted(w)


def test_names_under_lora_and_checkpoint_names_are_understood():
    w = weights()
    said = {
        k.replace("qkv_proj.weight", "qkv_proj.base_layer.weight"): v for k, v in reported(w, 1, torch.float32).items()
    }
    assert differing(said, w, HEADS, torch.float32) == []
    assert differing({n: digest(t) for n, t in w.items()}, w, HEADS, torch.float32) == []
    assert differing({f"dp0:pp0:pcp0:tp0:{n}": digest(t) for n, t in w.items()}, w, HEADS, torch.float32) == []


def test_text_models_keep_their_prefix_and_split_the_bias_of_queries_and_keys():
    layer = "model.layers.0.self_attn."
    w = {f"{layer}{n}_proj.bias": torch.arange(8.0) + i for i, n in enumerate("qkv")}
    w["model.embed_tokens.weight"] = torch.ones(64, 2)
    rank1 = {n: ways[0]() for n, ways in expected_weights(w, HeadShape(kv_heads=4, head_dim=2), 1, 2)}
    assert rank1[f"{layer}qkv_proj.bias"].tolist() == [4, 5, 6, 7, 5, 6, 7, 8, 6, 7, 8, 9]
    assert rank1["model.embed_tokens.weight"].shape == (32, 2)


def test_pipeline_ranks_and_uneven_splits_are_refused_by_name():
    with pytest.raises(LayoutError, match="pipeline"):
        differing({"dp0:pp1:pcp0:tp0:x": "0"}, weights(), HEADS, torch.float32)
    ways = dict(expected_weights({"model.layers.0.mlp.down_proj.weight": torch.ones(2, 5)}, HEADS, 0, 2))
    with pytest.raises(LayoutError, match="down_proj.*2 tensor-parallel"):
        ways["model.layers.0.mlp.down_proj.weight"][0]()


def test_digest_is_that_of_the_bytes():
    tensor = torch.arange(6, dtype=torch.bfloat16).view(2, 3).t()  # not contiguous
    assert digest(tensor) == hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def test_folder_has_bounded_shards_that_hold_every_parameter_once_in_the_engines_dtype(policy, tmp_path):
    own = full_weights(policy)
    write_folder(tmp_path / "v1", own, torch.bfloat16, shard_bytes=100_000)
    index = json.loads((tmp_path / "v1" / "model.safetensors.index.json").read_text())
    files = sorted(p.name for p in (tmp_path / "v1").glob("*.safetensors"))
    assert len(files) > 2 and set(index["weight_map"].values()) == set(files)
    read: dict[str, torch.Tensor] = {}
    for file in files:
        shard = load_file(tmp_path / "v1" / file)
        sizes = [t.nbytes for t in shard.values()]
        assert sum(sizes) <= 100_000 or len(sizes) == 1
        assert not read.keys() & shard.keys()
        read |= shard
    assert read.keys() == own.keys() and "lm_head.weight" not in read
    assert all(torch.equal(read[n], t.to(torch.bfloat16)) for n, t in own.items())
    assert [p.name for p in tmp_path.iterdir()] == ["v1"]


def test_adapters_are_merged_or_left_out(policy):
    base = {n: t.clone() for n, t in full_weights(policy).items()}
    add_lora(policy, rank=2)
    for name, p in policy.model.named_parameters():
        if "lora_B" in name:
            p.data.normal_(generator=torch.Generator().manual_seed(1))
    assert all(torch.equal(t, base[n]) for n, t in full_weights(policy, merged=False).items())
    merged = full_weights(policy)
    assert merged.keys() == base.keys()
    adapted = merged_state_dict(policy.model)
    assert all(torch.equal(t, adapted[n]) for n, t in merged.items())
    assert any(not torch.equal(t, base[n]) for n, t in merged.items())
