"""Exported folders against the policy in memory: `python -m benchmarks.export`.

A tiny Qwen3-VL, its head tied and untied, trained whole or by LoRA, is exported and loaded again by transformers (and
peft). Both sides run transformers' own forward on the same prompt with a picture; the largest difference of a logit is
zero where the same weights arrived. In memory an adapter is merged by peft, not by the code that exports.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from genevolve_fast.evaluate.scoreboard import DEFAULT_FILE, record
from genevolve_fast.policy.adapters import add_lora
from genevolve_fast.policy.codec import TransformersCodec
from genevolve_fast.policy.export import export_adapter, export_merged
from genevolve_fast.policy.model import Policy
from genevolve_fast.sandbox.scene import IMAGE_SIZE
from genevolve_fast.sandbox.tiny_policy import start_path

COMMAND = "python -m benchmarks.export"


def errors(folder: Path) -> Iterator[tuple[str, float, int]]:
    """(case, largest absolute difference of a logit, logits compared); folders are made in `folder`."""
    for head in ("tied", "untied"):
        base = folder / f"base_{head}"
        start(head == "tied").save_pretrained(base)
        for dtype in (torch.float32, torch.bfloat16):
            yield _case(f"whole weights, {head} head, {_name(dtype)}", lambda d=dtype, b=base: whole(b, folder, d))
            for stored in (torch.float32, torch.bfloat16):
                told = f"LoRA on {_name(stored)} merged, {head} head, {_name(dtype)}"
                yield _case(told, lambda d=dtype, b=base, s=stored: merged(b, folder, s, d))
        yield _case(f"LoRA by peft, {head} head, float32", lambda b=base: by_peft(b, folder))


def _case(told: str, made: Callable[[], tuple[Tensor, Tensor]]) -> tuple[str, float, int]:
    memory, loaded = made()
    if memory.shape != loaded.shape or not memory.isfinite().all():
        raise RuntimeError(f"{told}: logits {list(memory.shape)} and {list(loaded.shape)} cannot be compared")
    return told, float((memory.double() - loaded.double()).abs().max()), memory.numel()


def whole(base: Path, folder: Path, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    policy = trained(Policy.from_pretrained(base, dtype))
    out, saved = _fresh(folder, "whole"), _fresh(folder, "saved")
    policy.save_pretrained(saved)
    export_merged(saved, out)
    return logits_of(policy), logits_of(_load(out), policy.codec)


def merged(base: Path, folder: Path, stored: torch.dtype, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    rounded, adapter, out = (_fresh(folder, name) for name in ("rounded", "adapter", "merged"))
    Policy.from_pretrained(base, stored).save_pretrained(rounded)
    policy = adapted(rounded, stored)
    policy.save_trainable(adapter)
    export_merged(adapter, out, dtype=dtype)
    in_memory = Policy(copy.deepcopy(policy.model), policy.codec)
    _cast(in_memory.model, torch.float32)
    for layer in in_memory.model.modules():
        if hasattr(layer, "lora_A"):
            layer.merge()
    _cast(in_memory.model, dtype)
    return logits_of(in_memory), logits_of(_load(out), policy.codec)


def by_peft(base: Path, folder: Path) -> tuple[Tensor, Tensor]:
    from peft import PeftModel

    adapter, out = _fresh(folder, "adapter"), _fresh(folder, "alone")
    policy = adapted(base, torch.float32)
    policy.save_trainable(adapter)
    export_adapter(adapter, out)
    loaded = PeftModel.from_pretrained(_load(base), str(out))
    return logits_of(policy), logits_of(loaded.eval(), policy.codec)


def start(tied: bool) -> Policy:
    """The sandbox's policy, with a head of its own or without."""
    from transformers import Qwen3VLForConditionalGeneration

    policy = Policy.from_pretrained(start_path())
    if tied:
        return policy
    config = copy.deepcopy(policy.model.config)
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = False
    model = Qwen3VLForConditionalGeneration(config)
    model.load_state_dict(policy.model.state_dict())
    model.lm_head.weight = nn.Parameter(torch.randn_like(policy.head_weight) * policy.head_weight.std())
    return Policy(model, policy.codec)


def trained(policy: Policy) -> Policy:
    """Every weight a little off, as steps leave it."""
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(torch.randn(p.shape, generator=random).to(p.dtype) * 1e-3)
    return policy.eval()


def adapted(base: Path, dtype: torch.dtype) -> Policy:
    policy = Policy.from_pretrained(base, dtype)
    add_lora(policy, rank=8, alpha=16, seed=1)
    random = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, p in policy.model.named_parameters():
            if ".lora_B" in name:  # zero at the start: nothing of the adapter would show
                p.copy_(torch.randn(p.shape, generator=random) * 0.02)
    return policy.eval()


@torch.no_grad()
def logits_of(model: Policy | nn.Module, codec: TransformersCodec | None = None) -> Tensor:
    """[tokens, V] by transformers' own forward, of a prompt with a picture."""
    if isinstance(model, Policy):
        with model.own_attention():
            return logits_of(model.model, model.codec)
    pixels = np.random.default_rng(0).integers(0, 255, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    patches, grid = codec.image_patches(pixels)
    picture = "<|vision_start|>" + "<|image_pad|>" * codec.image_tokens(grid) + "<|vision_end|>"
    text = f"<|im_start|>user\n{picture}Draw on a white background the emblem.<|im_end|>\n<|im_start|>assistant\n"
    ids = torch.tensor(codec.encode(text))[None]
    dtype = next(model.parameters()).dtype
    images = {"pixel_values": patches.to(dtype), "image_grid_thw": torch.tensor([grid])}
    given = {"input_ids": ids, "mm_token_type_ids": (ids == codec.image_pad_id).int(), **images}
    return model(**given, use_cache=False).logits[0]


def _load(folder: Path) -> nn.Module:
    """As a user of the folder would; the same attention as Policy.own_attention."""
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto", attn_implementation="sdpa")
    return model.eval()


def _fresh(folder: Path, name: str) -> Path:
    path = Path(tempfile.mkdtemp(prefix=f"{name}_", dir=folder))
    return path


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Parameters alone: `.to` would round the frequencies of the rotary embedding too, which no model stores."""
    for p in model.parameters():
        p.data = p.data.to(dtype)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--file", type=Path, default=DEFAULT_FILE, help="scoreboard (default: %(default)s)")
    args = p.parse_args()
    worst, n = 0.0, 0
    with tempfile.TemporaryDirectory() as folder:
        for told, error, count in errors(Path(folder)):
            print(f"{told:52} {error:.3g}")
            worst, n = max(worst, error), n + count
    record("scale/export_logit_error", worst, n=n, command=COMMAND, file=args.file)


if __name__ == "__main__":
    main()
