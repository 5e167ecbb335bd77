"""Tiny random diffusers pipelines in the published layout: they draw noise, but every part of them really runs."""

from __future__ import annotations

import json
from pathlib import Path

from genevolve_fast.sandbox.tiny_policy import SPECIAL_TOKENS, start_path

SCHEDULER = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 0.9, "shift": 1.0, "shift_terminal": 0.02}


def shrink_references() -> None:
    """The pipeline's own sizes of a reference, 1024 * 1024 and 384 * 384 pixels, cost a minute on a processor."""
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as module

    module.VAE_IMAGE_SIZE, module.CONDITION_IMAGE_SIZE = 64 * 64, 56 * 56


def open_tiny(device: str, **settings):
    """A worker's factory: as render.local's, with small references."""
    from genevolve_fast.render.local import open_pipeline

    if settings.get("kind") == "qwen-image-edit":
        shrink_references()
    return open_pipeline(device=device, **settings)


def save_tiny_edit(folder: Path) -> Path:
    """QwenImageEditPlusPipeline of 0.5 million parameters."""
    import torch
    from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImageTransformer2DModel
    from transformers import AutoTokenizer, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    tokenizer = AutoTokenizer.from_pretrained(start_path())
    ids = {t: tokenizer.convert_tokens_to_ids(t) for t in SPECIAL_TOKENS}
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 2, 2]}
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "rope_parameters": rope,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": 32,
            "fullatt_block_indexes": [1],
        },
        image_token_id=ids["<|image_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = QwenImageTransformer2DModel(
            in_channels=64,
            out_channels=16,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=3,
            joint_attention_dim=32,
            axes_dims_rope=(8, 4, 4),
        )
        vae = AutoencoderKLQwenImage(base_dim=8, dim_mult=[1, 2, 2, 2], num_res_blocks=1)
        text_encoder = Qwen2_5_VLForConditionalGeneration(config)
    transformer.save_pretrained(folder / "transformer")
    vae.save_pretrained(folder / "vae")
    text_encoder.save_pretrained(folder / "text_encoder")
    FlowMatchEulerDiscreteScheduler(**SCHEDULER).save_pretrained(folder / "scheduler")
    tokenizer.save_pretrained(folder / "tokenizer")
    tokenizer.save_pretrained(folder / "processor")
    size = {"shortest_edge": 28 * 28, "longest_edge": 56 * 56}
    Qwen2VLImageProcessorPil(size=size).save_pretrained(folder / "processor")
    return _index(
        folder,
        "QwenImageEditPlusPipeline",
        scheduler=("diffusers", "FlowMatchEulerDiscreteScheduler"),
        vae=("diffusers", "AutoencoderKLQwenImage"),
        text_encoder=("transformers", "Qwen2_5_VLForConditionalGeneration"),
        tokenizer=("transformers", "PreTrainedTokenizerFast"),
        processor=("transformers", "Qwen2VLProcessor"),
        transformer=("diffusers", "QwenImageTransformer2DModel"),
    )


def save_tiny_flux(folder: Path) -> Path:
    """FluxPipeline of 0.3 million parameters, guidance embedded as in FLUX.1-dev."""
    import torch
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
    from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    tokenizer = AutoTokenizer.from_pretrained(start_path(), model_max_length=77)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            axes_dims_rope=(4, 4, 8),
            guidance_embeds=True,
        )
        vae = AutoencoderKL(
            block_out_channels=(8, 8, 8, 8),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=4,
            norm_num_groups=4,
            use_quant_conv=False,
            use_post_quant_conv=False,
            shift_factor=0.1,
            scaling_factor=0.4,
        )
        clip = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                bos_token_id=0,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        t5 = T5EncoderModel(
            T5Config(vocab_size=len(tokenizer), d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2)
        )
    transformer.save_pretrained(folder / "transformer")
    vae.save_pretrained(folder / "vae")
    clip.save_pretrained(folder / "text_encoder")
    t5.save_pretrained(folder / "text_encoder_2")
    FlowMatchEulerDiscreteScheduler(**{**SCHEDULER, "shift_terminal": None}).save_pretrained(folder / "scheduler")
    tokenizer.save_pretrained(folder / "tokenizer")
    tokenizer.save_pretrained(folder / "tokenizer_2")
    return _index(
        folder,
        "FluxPipeline",
        scheduler=("diffusers", "FlowMatchEulerDiscreteScheduler"),
        vae=("diffusers", "AutoencoderKL"),
        text_encoder=("transformers", "CLIPTextModel"),
        tokenizer=("transformers", "PreTrainedTokenizerFast"),
        text_encoder_2=("transformers", "T5EncoderModel"),
        tokenizer_2=("transformers", "PreTrainedTokenizerFast"),
        transformer=("diffusers", "FluxTransformer2DModel"),
        image_encoder=(None, None),
        feature_extractor=(None, None),
    )


def _index(folder: Path, name: str, **parts: tuple[str | None, str | None]) -> Path:
    index = {"_class_name": name, "_diffusers_version": "0.42.1", **{part: list(of) for part, of in parts.items()}}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder
