"""Exported folders: the same bits by transformers and peft, what vLLM and the hub read, and what is refused."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from loopback.model_hub import LoopbackModelHub
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from benchmarks import export as benchmark
from genevolve_fast.cli import main
from genevolve_fast.policy import export
from genevolve_fast.policy.adapters import add_lora, merged_state_dict
from genevolve_fast.policy.codec import TransformersCodec
from genevolve_fast.policy.export import CHAT_TEMPLATE, ExportError, export_adapter, export_merged
from genevolve_fast.policy.model import Policy
from genevolve_fast.report.card import Model, card, read_record, shareable
from genevolve_fast.rollout.server_prompts import chat_prompt
from genevolve_fast.rollout.weights import HeadShape, expected_weights, full_weights
from genevolve_fast.sandbox.tiny_policy import start_path
from genevolve_fast.train.checkpoint import save_checkpoint
from genevolve_fast.train.config import EvolveConfig, OptimConfig, parse_config
from genevolve_fast.train.optim import build_optimizer
from genevolve_fast.train.run import Run

ROOT = Path(__file__).parents[1]
PRIVATE = ("/home/alice", "hunter2", "10.1.2.3", "corp.example", "ALICE_KEY", "runs/private")
STEPS = 4
REWARDS = (0.2, 0.3, 0.8, 0.4)


def config(rank: int) -> EvolveConfig:
    """Of a run with all that nobody else shall see."""
    url = "http://alice:hunter2@10.1.2.3:8000/v1"
    fields = {
        "name": "lora" if rank else "whole",
        "steps": STEPS,
        "policy": {"path": "sandbox:start", "lora": {"rank": rank}},
        "judge": {"kind": "chat", "model": "/home/alice/judge", "base_url": url, "api_key_env": "ALICE_KEY"},
        "renderer": {"kind": "qwen-service", "urls": ["http://gpu7.corp.example:8001"]},
        "tools": {"kind": "searxng", "base_url": "http://corp.example", "image_dir": "/home/alice/images"},
        "checkpoint": {"every": 1, "keep_last": 2, "keep_best": 1, "metric": "reward"},
    }
    return parse_config(EvolveConfig, fields)


def trained_run(folder: Path, rank: int) -> Policy:
    """A run's folder by the pieces that write it: four steps with rewards, checkpoints, the final policy."""
    settings = config(rank)
    policy = Policy.from_pretrained(start_path()).eval()
    policy.freeze_vision()
    if rank:
        add_lora(policy, rank=rank, seed=0)
    optimizer = build_optimizer(policy, OptimConfig(lr=1e-2), STEPS)
    run = Run(folder, settings, device=policy.device, total=STEPS, resume=False)
    run.begin(0)
    for step, reward in enumerate(REWARDS, 1):
        with policy.own_attention():
            policy.model(input_ids=torch.arange(9)[None], use_cache=False).logits.logsumexp(-1).sum().backward()
        optimizer.step()
        run.log(step, {"reward": reward, "rollouts/failed": 0.0})
        save_checkpoint(folder / "checkpoints", step, policy, optimizer, keep=settings.checkpoint)
    run.close()
    policy.save_pretrained(folder / "policy")
    bench = {"name": "/home/alice/policies/mine", "summary": {"n": 200, "reward": 0.75, "valid": 1.0}, "rows": []}
    (folder / "bench" / "after").mkdir(parents=True)
    (folder / "bench" / "after" / "bench.json").write_text(json.dumps(bench))
    (folder / "summary.json").write_text(json.dumps({"gain": {"mean": 0.1, "low": 0.05, "high": 0.2, "n": 200}}))
    return policy


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return folder, trained_run(folder, 0)


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "lora"
    return folder, trained_run(folder, 4)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for file in sorted(folder.glob("*.safetensors")) for n, t in load_file(file).items()}


def equal(a, b) -> bool:
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


def told(capsys, *arguments: object) -> str:
    """The error of a command that must be refused, one line."""
    assert main(["export", *map(str, arguments)]) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("genevolve-fast export: ")]
    return line


# --- the same bits ----------------------------------------------------------------------------------------------------


def test_an_exported_folder_gives_the_logits_of_the_policy_in_memory(tmp_path):
    cases = benchmark.errors(tmp_path)
    for _, error, n in (next(cases), next(cases)):
        assert error == 0 and n > 20 * 1017


@pytest.mark.slow
def test_every_form_of_export_is_exact(tmp_path):
    cases = list(benchmark.errors(tmp_path))
    assert len(cases) == 14 and {error for _, error, _ in cases} == {0.0}


def test_the_benchmark_sees_a_weight_that_is_off_by_its_last_bit(tmp_path, monkeypatch):
    real = export._weights

    def off(policy, dtype):
        makes = real(policy, dtype)
        name = "model.language_model.layers.0.mlp.up_proj.weight"
        changed = makes[name]()
        changed.view(torch.int32)[0, 0] ^= 1
        return makes | {name: lambda: changed}

    monkeypatch.setattr(export, "_weights", off)
    assert next(benchmark.errors(tmp_path))[1] > 0


def test_a_run_is_exported_with_the_final_weights(whole, tmp_path, capsys):
    folder, policy = whole
    assert main(["export", str(folder), "-o", str(tmp_path / "out")]) == 0
    assert equal(weights(tmp_path / "out"), {n: p.detach() for n, p in policy.model.named_parameters()})
    said = capsys.readouterr().out
    assert "step 4 (final)" in said and f"genevolve-fast serve --model {tmp_path / 'out'}" in said


@pytest.mark.slow
def test_an_adapter_is_merged_with_one_rounding(lora, tmp_path):
    folder, policy = lora
    exact = merged_state_dict(policy.model)
    exact.pop("lm_head.weight")
    for dtype in ("bfloat16", "float32"):
        source = folder / "checkpoints" / "step_000004"
        assert main(["export", str(source), "-o", str(tmp_path / dtype), "--dtype", dtype]) == 0
        assert equal(weights(tmp_path / dtype), {n: t.to(export.DTYPES[dtype]) for n, t in exact.items()})
        told = json.loads((tmp_path / dtype / "config.json").read_text())
        assert told["dtype"] == told["text_config"]["dtype"] == dtype  # what dtype="auto" and vLLM load it in
    assert main(["export", str(source), "-o", str(tmp_path / "plain")]) == 0  # as trained: not as the base is stored
    assert equal(weights(tmp_path / "plain"), weights(tmp_path / "float32"))


@pytest.mark.slow
def test_checkpoints_are_chosen_by_step_by_score_and_by_age(whole, tmp_path):
    folder, _ = whole
    there = folder / "checkpoints"
    assert sorted(p.name for p in there.glob("step_*")) == ["step_000003", "step_000004"]
    best = REWARDS.index(max(REWARDS)) + 1
    for flags, step in ((["--best"], best), (["--last"], 4), (["--step", "3"], 3)):
        out = tmp_path / "_".join(flags)
        assert main(["export", str(folder), "-o", str(out), *flags]) == 0
        assert equal(weights(out), weights(there / f"step_{step:06d}" / "policy"))
    assert "gain" not in (tmp_path / "--best" / "README.md").read_text()  # the bench is not this policy's


def test_weights_are_split_into_shards_with_an_index(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "SHARD", "1MB")
    tmp_path.joinpath("out").mkdir()
    written = export_merged(start_path(), tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = {p.name for p in (tmp_path / "out").glob("*.safetensors")}
    assert written.files == len(files) > 2 and set(index["weight_map"].values()) == files
    assert index["metadata"]["total_size"] == written.nbytes
    loaded = Policy.from_pretrained(tmp_path / "out", torch.bfloat16)
    again = Policy.from_pretrained(start_path(), torch.bfloat16)
    assert equal(full_weights(loaded), full_weights(again))


# --- what others read -------------------------------------------------------------------------------------------------


def test_tokenizer_and_processors_are_found_by_their_auto_classes(whole, tmp_path, pictures):
    from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer

    (tmp_path / "out").mkdir()
    export_merged(whole[0] / "policy", tmp_path / "out")
    codec = TransformersCodec.from_pretrained(whole[0] / "policy")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "<|im_start|>user\nA stamp.<|im_end|>\n<tool_call>"
    assert tokenizer(text)["input_ids"] == codec.encode(text) and tokenizer.eos_token == "<|im_end|>"
    images = AutoImageProcessor.from_pretrained(tmp_path / "out")
    patches = images(images=[pictures[0]], return_tensors="pt")["pixel_values"]
    assert torch.equal(patches, codec.image_patches(pictures[0])[0])
    assert AutoConfig.from_pretrained(tmp_path / "out").architectures == ["Qwen3VLForConditionalGeneration"]
    video = json.loads((tmp_path / "out" / "video_preprocessor_config.json").read_text())
    assert video["video_processor_type"] == "Qwen3VLVideoProcessor" and video["patch_size"] == images.patch_size
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"  # a name that transformers 4 has


def test_auto_processor_finds_the_whole_processor(whole, tmp_path, pictures):
    from transformers import AutoProcessor

    (tmp_path / "out").mkdir()
    export_merged(whole[0] / "policy", tmp_path / "out")
    try:
        processor = AutoProcessor.from_pretrained(tmp_path / "out")
    except ImportError as error:  # all that is missing is what reads videos
        assert "Qwen3VLVideoProcessor requires the Torchvision library" in str(error)
        return
    assert type(processor).__name__ == "Qwen3VLProcessor" and processor.chat_template == CHAT_TEMPLATE


def test_files_of_the_base_are_carried_over(tmp_path):
    base, out = tmp_path / "base", tmp_path / "out"
    export_merged(start_path(), _made(base))
    (base / "video_preprocessor_config.json").write_text('{"fps": 7}')
    export_merged(start_path(), _made(out), origin=str(base))
    assert json.loads((out / "video_preprocessor_config.json").read_text()) == {"fps": 7}


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_the_chat_template_writes_turns_as_sessions_do(tmp_path):
    from transformers import AutoTokenizer

    codec = TransformersCodec.from_pretrained(start_path())
    export_merged(start_path(), _made(tmp_path / "out"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    picture = {"type": "image_url", "image_url": {"url": _png()}}
    messages = [
        {"role": "system", "content": "Be {brief}."},
        {"role": "user", "content": [{"type": "text", "text": "See: "}, picture, {"type": "text", "text": " and <b>"}]},
        {"role": "assistant", "content": "Done."},
    ]
    shown = [m | {"content": [_as_image(p) for p in m["content"]]} if m["role"] == "user" else m for m in messages]
    for more in (True, False):
        ours, _ = chat_prompt(messages, codec, more, None)
        assert tokenizer.apply_chat_template(shown, tokenize=False, add_generation_prompt=more) == ours


def _as_image(part: dict) -> dict:
    return {"type": "image"} if part["type"] == "image_url" else part


def _png() -> str:
    import base64
    import io

    from PIL import Image

    out = io.BytesIO()
    Image.new("RGB", (96, 96)).save(out, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}"


def test_weights_have_the_names_that_vllm_maps(whole, tmp_path):
    """Of the hub's Qwen3-VL checkpoints; rollout/weights.py knows what vLLM makes of each."""
    export_merged(whole[0] / "policy", _made(tmp_path / "out"))
    names = set(weights(tmp_path / "out"))
    begin = (
        "model.language_model.layers.",
        "model.language_model.embed_tokens.",
        "model.language_model.norm.",
        "model.visual.",
    )
    assert all(n.startswith(begin) for n in names)  # a tied head is not stored
    policy = Policy.from_pretrained(tmp_path / "out")
    mapped = dict(expected_weights(full_weights(policy), HeadShape.of(policy.model.config), 0, 1, ()))
    assert {n.split(".")[0] for n in mapped} == {"language_model", "visual"}
    assert sum("qkv_proj" in n for n in mapped) == sum("q_proj" in n for n in names) == 5


def test_the_adapter_is_of_the_form_that_peft_and_vllm_take(lora, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    folder, policy = lora
    assert main(["export", str(folder), "--adapter", "-o", str(tmp_path / "out"), "--base", "Qwen/Base"]) == 0
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "Qwen/Base" and config["r"] == 4 and config["lora_alpha"] == 8
    # vllm/lora/peft_helper.py: r, lora_alpha and target_modules; no bias, DoRA or modules to save
    assert config["bias"] == "none" and not config["use_dora"] and config["modules_to_save"] is None
    known = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert config["target_modules"] == known  # names, not an expression
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    form = r"base_model\.model\.model\.language_model\.layers\.\d\.(self_attn|mlp)\.\w+_proj\.lora_[AB]\.weight"
    assert len(tensors) == 5 * 7 * 2 and all(re.fullmatch(form, n) for n in tensors)
    base = AutoModelForImageTextToText.from_pretrained(start_path(), dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "out"))
    own = {n: p for n, p in policy.model.named_parameters() if ".lora_" in n}
    found = {n.removeprefix("base_model.model."): p for n, p in loaded.named_parameters() if ".lora_" in n}
    assert equal({n: p.detach() for n, p in own.items()}, {n: p.detach() for n, p in found.items()})


@pytest.mark.parametrize("kind", ["Qwen3VLConfig", "Qwen3Config"])
def test_names_of_layers_adapt_the_same_layers_as_the_expression(kind):
    """In the shapes of real models, without their weights: the vision tower is left alone."""
    import transformers
    from peft import LoraConfig, inject_adapter_in_model

    config = getattr(transformers, kind)()
    text = config.get_text_config()
    text.num_hidden_layers = 2
    made = {"Qwen3VLConfig": "Qwen3VLForConditionalGeneration", "Qwen3Config": "Qwen3ForCausalLM"}[kind]
    names = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    with torch.device("meta"):
        model = getattr(transformers, made)(config)
        inject_adapter_in_model(LoraConfig(target_modules=names), model)
    adapted = [n for n, m in model.named_modules() if hasattr(m, "lora_A")]
    assert len(adapted) == 14 and all(".layers." in n and "visual" not in n for n in adapted)


# --- the card ---------------------------------------------------------------------------------------------------------


def test_the_card_says_what_the_run_left_and_nothing_private(lora, tmp_path):
    from huggingface_hub import ModelCard

    folder, _ = lora
    assert main(["export", str(folder), "-o", str(tmp_path / "merged")]) == 0
    text = (tmp_path / "merged" / "README.md").read_text()
    read = ModelCard(text)
    assert read.data.library_name == "transformers" and read.data.pipeline_tag == "image-text-to-text"
    assert {"genevolve-fast", "grpo", "agent"} <= set(read.data.tags) and read.data.license is None
    assert read.data.base_model is None  # it began with no model of the hub
    for fact in (
        "LoRA of rank 4, merged into the base",
        "4 of 4",
        "| reward (`reward`) | 0.2 | 0.4 |",
        "| 200 | 0.750 |",
    ):
        assert fact in text, fact
    assert "+0.100, 95 % interval +0.050 to +0.200" in text and "genevolve-fast 0.1.0" in text
    assert "num_generations: 6" in text and "kind: chat" in text
    machine = [*PRIVATE, str(tmp_path), str(folder.parent), str(ROOT), os.environ.get("HOME", "/root"), "site-packages"]
    for name in (p for p in (tmp_path / "merged").rglob("*.json")):
        assert not any(m in name.read_text() for m in machine), name
    assert not any(m in text for m in machine), [m for m in machine if m in text]


def test_no_folder_address_or_host_of_a_configuration_is_shareable():
    places = {"path": "/home/alice/models/base", "name_or_path": "runs/private"}
    private = {
        "policy": places | {"dtype": "bfloat16", "lora": {"rank": 8, "targets": ["q_proj", "/home/alice/x"]}},
        "data": {"path": "/home/alice/rows.jsonl", "limit": 7},
        "rollout": {"temperature": 0.5, "server": {"urls": ["http://10.1.2.3"]}},
        "judge": {"kind": "chat", "model": "/home/alice/judge", "base_url": "http://corp.example", "api_key_env": "K"},
        "optim": {"lr": 1e-5, "name": "http://hunter2@corp.example"},
        "cache": "/home/alice",
    }
    told = shareable(private)
    assert not any(p in json.dumps(told) for p in (*PRIVATE, "http", "alice"))
    assert told["policy"]["lora"]["rank"] == 8 and told["data"]["limit"] == 7 and told["optim"]["lr"] == 1e-5
    assert told["policy"]["path"] == "(a local folder)" and told["judge"] == {"kind": "chat"}


def test_the_cards_of_hub_models_name_base_data_and_licence(tmp_path):
    from huggingface_hub import ModelCard
    from huggingface_hub.utils import validate_repo_id

    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(
        "epochs: 2\npolicy: {path: Qwen/Qwen3-VL-8B-Instruct, lora: {rank: 64}}\n"
        "data: {path: MeiGen-AI/GenEvolve-Data}\n"
    )
    model = Model(
        repo="me/agent", step=9, final=False, parameters=8_770_000_000, dtype="bfloat16", vision=True, rank=64,
        base="Qwen/Qwen3-VL-8B-Instruct", license={"license": "apache-2.0"},
    )  # fmt: skip
    read = ModelCard(card(model, read_record(run, 9, False)))
    assert read.data.to_dict() == {
        "license": "apache-2.0",
        "library_name": "peft",
        "pipeline_tag": "image-text-to-text",
        "tags": ["genevolve", "genevolve-fast", "agent", "tool-use", "image-generation", "sft", "lora"],
        "base_model": "Qwen/Qwen3-VL-8B-Instruct",
        "base_model_relation": "adapter",
        "datasets": ["MeiGen-AI/GenEvolve-Data"],
    }
    validate_repo_id(read.data.base_model)
    assert "--max-lora-rank 64 --lora-modules GenEvolve=me/agent" in read.content and "8.77 billion" in read.content
    assert "not measured on held-out requests" in read.content


def test_the_licence_is_the_bases(tmp_path):
    from genevolve_fast.report.card import license_of

    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: house-rules\ntags: [a]\n---\n# Base\n")
    assert license_of(tmp_path / "README.md") == {"license": "other", "license_name": "house-rules"}
    (tmp_path / "README.md").write_text("# Base without metadata\n")
    assert license_of(tmp_path / "README.md") == {} == license_of(None)


@pytest.mark.parametrize("form", ["--merged", "--adapter"])
def test_what_the_card_tells_users_to_run_runs(lora, tmp_path, form, monkeypatch):
    folder, _ = lora
    assert main(["export", str(folder), form, "-o", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    code = code.replace('name = "out"', f"name = {str(tmp_path / 'out')!r}").replace('"BASE"', repr(str(start_path())))
    said = []
    exec(compile(code.replace("max_new_tokens=512", "max_new_tokens=4"), "card", "exec"), {"print": said.append})
    assert said and isinstance(said[0], str)
    (commands,) = re.findall(r"```bash\n(.*?)```", text, re.S)
    assert ("--lora-modules GenEvolve=out" in commands) == (form == "--adapter")


# --- what is refused, and what is left --------------------------------------------------------------------------------


def test_what_cannot_be_exported_is_refused_with_the_reason(whole, lora, tmp_path, capsys):
    out = tmp_path / "out"
    run, adapters = whole[0], lora[0]
    assert "trained whole weights: there is no adapter" in told(capsys, run, "-o", out, "--adapter")
    assert "holds whole weights" in told(capsys, run, "-o", out, "--adapter", "--last")
    assert "only of 3, 4" in told(capsys, run, "-o", out, "--step", 2)
    assert "choose a checkpoint of a run" in told(capsys, run / "policy", "-o", out, "--last")
    assert "--private without --upload" in told(capsys, run, "-o", out, "--private")
    assert "a repository is called OWNER/NAME" in told(capsys, run, "-o", out, "--upload", "no name")
    assert "--base would do nothing" in told(capsys, run, "-o", out, "--base", "a/b")
    assert "give --base OWNER/NAME" in told(capsys, adapters, "-o", out, "--adapter", "--upload", "a/b")
    assert "within each other" in told(capsys, run, "-o", run)
    assert "is no run, checkpoint or policy" in told(capsys, tmp_path, "-o", out)
    lost = told(capsys, adapters, "-o", out, "--last", "--base", str(tmp_path / "gone"))
    assert "its base is missing" in lost and "--base" in lost and "--adapter" in lost
    assert not list(tmp_path.iterdir())


def test_a_run_that_kept_no_best_says_so(whole, tmp_path, capsys):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text((whole[0] / "config.yaml").read_text())
    assert "does not know its best checkpoint" in told(capsys, run, "-o", tmp_path / "out", "--best")
    assert "has no checkpoint yet" in told(capsys, run, "-o", tmp_path / "out")


def test_the_adapter_of_a_final_policy_that_was_not_kept_is_not_replaced_by_an_older_one(lora, tmp_path, capsys):
    import shutil

    run = shutil.copytree(lora[0], tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / "step_000004")
    assert "step 4 was not kept: --last exports that of step 3" in told(capsys, run, "-o", tmp_path / "o", "--adapter")


@pytest.mark.slow
def test_nothing_is_replaced_unasked_or_by_half(whole, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    assert "is not empty" in told(capsys, whole[0], "-o", out)
    assert "holds something else than a model" in told(capsys, whole[0], "-o", out, "--overwrite")
    assert [p.name for p in out.iterdir()] == ["thesis.tex"]
    (out / "thesis.tex").unlink()
    assert main(["export", str(whole[0]), "-o", str(out)]) == 0
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    broken = tmp_path / "broken"
    export_merged(whole[0] / "policy", _made(broken))
    tensors = load_file(broken / "model.safetensors")
    tensors["model.language_model.norm.weight"][3] = torch.nan
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    said = told(capsys, broken, "-o", out, "--overwrite")
    assert "model.language_model.norm.weight of the policy holds 1 NaN or infinite numbers" in said
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["broken", "out"]
    assert main(["export", str(whole[0]), "-o", str(out), "--overwrite", "--dtype", "bfloat16"]) == 0
    with safe_open(out / "model.safetensors", "pt") as f:
        assert f.get_slice("model.language_model.norm.weight").get_dtype() == "BF16"


def test_an_adapter_with_numbers_that_are_none_is_refused(lora, tmp_path):
    import shutil

    source = shutil.copytree(lora[0] / "checkpoints" / "step_000004" / "policy", tmp_path / "a")
    tensors = load_file(source / "adapter_model.safetensors")
    name = sorted(tensors)[0]
    tensors[name][0, 0] = torch.inf
    save_file(tensors, source / "adapter_model.safetensors")
    for make in (export_adapter, export_merged):
        with pytest.raises(ExportError, match="holds .* NaN or infinite numbers"):
            make(source, _made(tmp_path / make.__name__))


# --- the hub ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_export_is_uploaded_with_the_users_own_token(whole, tmp_path):
    def uploading(hub, token: str, out: str, *flags: str) -> subprocess.CompletedProcess:
        environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        environment |= {"HF_TOKEN": token, "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "genevolve_fast.cli", "export", str(whole[0]), "-o", str(tmp_path / out)]
        command += ["--upload", "me/agent", *flags]
        return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)

    with LoopbackModelHub(tmp_path / "hub") as hub:
        refused = uploading(hub, "hf_wrong", "first")
        last = refused.stderr.splitlines()[-1]
        assert refused.returncode == 2 and "is written, but not uploaded: " in last and "401" in last
        assert "hf_wrong" not in refused.stderr and (tmp_path / "first" / "model.safetensors").exists()
        done = uploading(hub, hub.token, "second", "--private")
        assert done.returncode == 0, done.stderr[-2000:]
        assert f"uploaded: {hub.url}/me/agent" in done.stdout and hub.token not in done.stdout + done.stderr
        there, here = tmp_path / "hub" / "me" / "agent", tmp_path / "second"
        assert {p.name for p in there.iterdir()} - {".private"} == {p.name for p in here.iterdir()}
        assert all((there / p.name).read_bytes() == p.read_bytes() for p in here.iterdir())
        assert (there / ".private").read_text() == "private" and "# agent\n" in (here / "README.md").read_text()
