"""Shapes and FLOPs against real models and the published arithmetic; the planner; the meter on real passes."""

from __future__ import annotations

import json
import time

import pytest
import torch

from genevolve_fast.profile.flops import (
    GPUS,
    SHARED,
    UNSHARED,
    GroupLengths,
    Layout,
    Passes,
    attention_share,
    gpu_named,
    pushed,
    sharing_ratio,
    step_flops,
)
from genevolve_fast.profile.meter import Meter, snapshot
from genevolve_fast.profile.shapes import BUILT_IN, ModelShape, ShapeError

EIGHT = BUILT_IN["qwen3-vl-8b"]


# --- shapes -----------------------------------------------------------------------------------------------------------


def on_meta(config):
    import transformers

    kinds = {"qwen3_vl": "Qwen3VL", "qwen3": "Qwen3", "llama": "Llama"}
    suffix = "ForConditionalGeneration" if config.model_type == "qwen3_vl" else "ForCausalLM"
    with torch.device("meta"):
        return getattr(transformers, kinds[config.model_type] + suffix)(config)


def parts(model) -> dict[str, int]:
    """Parameter counts by the names of a real model; tied weights once."""
    found = dict.fromkeys(("embedding", "head", "layers", "norms", "vision"), 0)
    for name, p in model.named_parameters():
        where = next(
            part
            for part, mark in {
                "vision": "visual.", "embedding": "embed_tokens", "head": "lm_head", "norms": "norm", "layers": "",
            }.items()
            if mark in name
        )  # fmt: skip
        found[where] += p.numel()
    return found


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("Qwen3Config", dict(tie_word_embeddings=True, head_dim=24)),
        ("Qwen3Config", dict(attention_bias=True)),
        ("LlamaConfig", dict(tie_word_embeddings=False, head_dim=16)),
        ("LlamaConfig", dict(attention_bias=True, mlp_bias=True, num_key_value_heads=4)),
    ],
)
def test_parameters_of_text_models(tmp_path, kind, options):
    import transformers

    sizes = dict(vocab_size=99, hidden_size=64, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4)
    config = getattr(transformers, kind)(**(sizes | dict(num_key_value_heads=2) | options))
    config.save_pretrained(tmp_path)
    shape = ModelShape.from_config(tmp_path)
    assert shape.parameters == parts(on_meta(config))
    assert shape == ModelShape.from_config(tmp_path / "config.json")
    assert shape == ModelShape.from_config(json.loads((tmp_path / "config.json").read_text()))


def test_parameters_of_the_tiny_policy(policy, tmp_path):
    policy.save_pretrained(tmp_path)
    shape = ModelShape.from_config(tmp_path)
    assert shape.parameters == parts(policy.model)
    assert shape.total_parameters == sum(p.numel() for p in policy.parameters())


@pytest.mark.parametrize("name", BUILT_IN)
def test_parameters_of_the_published_sizes(name):
    from transformers import Qwen3VLConfig

    s = BUILT_IN[name]
    text = dict(
        hidden_size=s.hidden, intermediate_size=s.intermediate, num_hidden_layers=s.layers, head_dim=s.head_dim,
        num_attention_heads=s.heads, num_key_value_heads=s.kv_heads, vocab_size=s.vocabulary,
    )  # fmt: skip
    tower = dict(
        depth=s.vision.depth, hidden_size=s.vision.hidden, intermediate_size=s.vision.intermediate,
        out_hidden_size=s.hidden, deepstack_visual_indexes=[1, 2, 3],
    )  # fmt: skip
    config = Qwen3VLConfig(text_config=text, vision_config=tower, tie_word_embeddings=s.tied)
    assert s.parameters == parts(on_meta(config))
    assert s == ModelShape.from_config(config.to_dict())
    published = {"qwen3-vl-2b": 2.13e9, "qwen3-vl-4b": 4.44e9, "qwen3-vl-8b": 8.77e9, "qwen3-vl-32b": 33.4e9}
    assert s.total_parameters == pytest.approx(published[name], rel=0.005)


def test_lora_parameters_are_those_of_peft():
    import transformers
    from peft import LoraConfig, get_peft_model

    sizes = dict(vocab_size=99, hidden_size=64, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4)
    config = transformers.Qwen3Config(**sizes, num_key_value_heads=2, head_dim=24)
    shape = ModelShape.from_config(config.to_dict())
    tuned = get_peft_model(transformers.Qwen3ForCausalLM(config), LoraConfig(r=5, target_modules="all-linear"))
    assert shape.lora_parameters(5) == sum(p.numel() for p in tuned.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "qwen3_moe"}, "model_type 'qwen3_moe'"),
        ({"model_type": "qwen3", "hidden_size": 8, "num_attention_heads": 2}, "num_hidden_layers"),
        ({"model_type": "qwen3", "hidden_size": 0, "num_attention_heads": 2}, "hidden_size"),
    ],
)
def test_shapes_that_cannot_be_read_are_refused(config, message):
    with pytest.raises(ShapeError, match=message):
        ModelShape.from_config(config)


def test_an_unknown_model_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="qwen3-vl-8b"):
        ModelShape.from_config("qwen9")
    with pytest.raises(FileNotFoundError, match="cache"):
        ModelShape.from_config("nobody/nothing-at-all")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ShapeError, match="not JSON"):
        ModelShape.from_config(tmp_path)


# --- FLOPs ------------------------------------------------------------------------------------------------------------


def paper_step(reply: int = 8192, generations: int = 6) -> list[GroupLengths]:
    """8 requests, prompt 6144, 30 % of the reply sampled, 600 tokens of experience."""
    loss = round(0.3 * reply)
    return [GroupLengths(6144, (reply,) * generations, 600, loss_tokens=(loss,) * generations)] * 8


UNFUSED = Passes(head=4)  # the table's head: forward, its recomputation and two gradients
LOOSE = dict(share_prefix=True, patch_per_group=True)
TABLE = {  # research: student tokens, teacher tokens, attention's share of the forward, PFLOPs
    "a1 padded to 30 000": (Layout(pad_to=30_000, head="reply"), 1_734_912, 1_763_712, 0.436, 232.2),
    "a2 padded to 20 000": (Layout(pad_to=20_000, head="reply"), 1_254_912, 1_283_712, 0.360, 147.2),
    "b packed, head on all": (Layout(head="all"), 688_128, 716_928, 0.237, 68.8),
    "b2 packed": (UNSHARED, 688_128, 716_928, 0.237, 65.2),
    "c shared": (Layout(**LOOSE), 442_368, 447_168, 0.292, 45.2),
    "c patch per rollout": (Layout(share_prefix=True), 442_368, 471_168, 0.290, 45.7),
    "d teacher reads": (Layout(**LOOSE, teacher_reads_student=True), 442_368, 398_016, 0.300, 44.5),
    "d patch per rollout": (SHARED, 442_368, 422_016, 0.298, 44.9),
    "e system prompt": (Layout(**LOOSE, teacher_reads_student=True, system=4608), 410_112, 398_016, 0.306, 42.5),
}


@pytest.mark.parametrize("name", TABLE)
def test_tokens_and_flops_of_the_layouts(name):
    layout, student, teacher, share, petaflops = TABLE[name]
    work = pushed(paper_step(), layout)
    assert (work.student_tokens, work.teacher_tokens) == (student, teacher)
    assert attention_share(EIGHT, work) == pytest.approx(share, abs=0.002)
    assert step_flops(EIGHT, work, UNFUSED).total == pytest.approx(petaflops * 1e15, rel=0.01)


@pytest.mark.parametrize(
    ("reply", "generations", "ratio"),
    [(2048, 6, 2.65), (4096, 6, 1.92), (8192, 6, 1.47), (16384, 6, 1.22), (30000, 6, 1.10), (8192, 16, 1.54)],
)
def test_what_sharing_can_give(reply, generations, ratio):
    layout = Layout(**LOOSE, teacher_reads_student=True)
    assert sharing_ratio(EIGHT, paper_step(reply, generations), UNFUSED, layout) == pytest.approx(ratio, rel=0.01)


def test_one_rollout_shares_nothing():
    alone = [GroupLengths(500, (300,), 40)]
    both = [pushed(alone, layout) for layout in (UNSHARED, Layout(share_prefix=True))]
    assert step_flops(EIGHT, both[0]).total == pytest.approx(step_flops(EIGHT, both[1]).total, rel=1e-12)
    assert both[0].student_tokens == both[1].student_tokens == 800


def test_tokens_are_counted_pair_by_pair():
    """Every query and key of a small step by enumeration, patch before the end of the prefix, one rollout untaught."""
    group = GroupLengths(7, (3, 0, 4), (2, 2, 0), request_stop=5, loss_tokens=(1, 0, 2))
    prefix = [(i, j) for i in range(7) for j in range(i + 1)]
    replies = [(i, j) for r in group.replies for i in range(7, 7 + r) for j in range(i + 1)]
    taught = [(i, j) for r in (3, 0) for i in range(5, 5 + 2 + 2 + r) for j in range(i + 1)]
    work = pushed([group], SHARED)
    assert (work.prefix.tokens, work.prefix.pairs, work.prefix.rows) == (7, len(prefix), 0)
    assert (work.student.tokens, work.student.pairs, work.student.rows) == (7, len(replies), 3)
    assert (work.teacher.tokens, work.teacher.pairs, work.teacher.rows) == (4 + 3 + 4, len(taught), 1)
    apart = pushed([group], UNSHARED)
    assert apart.teacher.tokens == 12 + 9 and apart.student_tokens == 10 + 7 + 11


def test_adapters_and_recomputation():
    work = pushed(paper_step(), SHARED)
    full, model = step_flops(EIGHT, work), step_flops(EIGHT, work, Passes(recompute=0))
    lora = step_flops(EIGHT, work, Passes(weight_gradients=0, head=2))
    linear = 2.0 * EIGHT.linear_parameters * work.student_tokens
    assert full.backward - lora.backward == pytest.approx(linear)
    assert full.total - model.total == pytest.approx(full.prefix + full.student)


def test_lengths_that_contradict_each_other_are_refused():
    with pytest.raises(ValueError, match="loss_tokens"):
        GroupLengths(5, (1, 2), loss_tokens=(1,))
    with pytest.raises(ValueError, match="request_stop"):
        GroupLengths(5, (1, 2), request_stop=6)
    with pytest.raises(ValueError, match="share_prefix"):
        Layout(teacher_reads_student=True)
    with pytest.raises(ValueError, match="system"):
        pushed([GroupLengths(5, (1, 2))], Layout(share_prefix=True, system=6))


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100-PCIE-40GB", "a100"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100 pcie"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA GeForce RTX 4090", "rtx 4090"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA A10G", None),
        ("cpu", None),
    ],
)
def test_gpus_are_known_by_their_drivers_name(name, key):
    assert gpu_named(name) == GPUS.get(key)


# --- meter ------------------------------------------------------------------------------------------------------------

MIB = 2**20


def test_the_meter_hears_what_each_phase_held():
    meter = Meter("cpu")
    with meter.phase("weights"):
        weights = torch.empty(4 * MIB, dtype=torch.uint8)
    with meter.phase("student"):
        kept = torch.empty(2 * MIB, dtype=torch.uint8)
        with meter.phase("teacher"):
            for _ in range(3):
                passing = torch.empty(8 * MIB, dtype=torch.uint8)
                del passing
        after = torch.empty(MIB, dtype=torch.uint8)
        del after
    assert meter.held == 6 * MIB
    with meter.phase("step"):
        del weights, kept
    report = meter.report()
    peaks = {p.name: p.peak_bytes for p in report.phases}
    assert peaks == {"weights": 4 * MIB, "student": 7 * MIB, "teacher": 14 * MIB, "step": 6 * MIB}
    assert [s.phase for s in report.segments] == ["weights", "student", "teacher", "student", "step"]
    assert [s.held for s in report.segments] == [x * MIB for x in (4, 6, 6, 6, 0)]
    assert report.peak_bytes == max(size for _, size in report.curve) == 14 * MIB
    begins = [s.begin for s in report.segments]
    assert begins == sorted(begins) and all(s.begin <= s.end for s in report.segments)


def test_time_goes_to_the_innermost_phase():
    meter = Meter("cpu")
    with meter.phase("student"):
        time.sleep(0.05)
        with meter.phase("head"):
            time.sleep(0.1)
        time.sleep(0.05)
    time.sleep(0.05)
    with meter.phase("backward"):
        time.sleep(0.02)
    report = meter.report(
        tokens={"student": 100}, flops={"student": 1e6, "head": 1e6}, peak_flops=1e8, microbatch_tokens=7
    )
    student, head, backward = report.phases
    assert (student.name, head.name, backward.name) == ("student", "head", "backward")
    for phase, seconds in ((student, 0.1), (head, 0.1), (backward, 0.02)):
        assert seconds <= phase.seconds < seconds + 0.04
    assert sum(p.share for p in report.phases) == pytest.approx(1)
    assert student.tokens_per_second == pytest.approx(100 / student.seconds)
    assert student.mfu == pytest.approx(1e6 / student.seconds / 1e8) and backward.mfu is None
    assert report.mfu == pytest.approx(2e6 / (student.seconds + head.seconds) / 1e8)


def test_without_a_known_device_there_is_no_utilisation():
    meter = Meter("cpu")
    with meter.phase("student"):
        torch.ones(10)
    assert meter.report(flops={"student": 1.0}).mfu_reason == "no peak FLOP/s known"
    assert meter.report(peak_flops=1.0).mfu_reason == "no FLOPs counted"


def test_a_phase_that_raises_is_over():
    meter = Meter("cpu")
    with pytest.raises(KeyError), meter.phase("student"), meter.phase("head"):
        raise KeyError
    with meter.phase("student"), pytest.raises(RuntimeError, match="still open"):
        meter.report()
    assert [s.phase for s in meter.report().segments] == ["student", "head", "student", "student"]


def test_a_snapshot_needs_a_gpu(tmp_path):
    with pytest.raises(ValueError, match="CUDA allocator"), snapshot("cpu", tmp_path / "s.pickle"):
        pass
    with snapshot("cpu", None):
        pass
