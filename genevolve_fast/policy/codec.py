"""A transformers tokenizer and image processor behind the Codec protocol."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from genevolve_fast.policy.positions import ImageMismatchError
from genevolve_fast.trajectory import image_hash

NO_TOKEN = -1  # stands for the image placeholder of a policy that has none
_CACHED_BYTES = 2 << 30  # of host memory for patches of images


class TransformersCodec:
    """Text and images to tokens for a Qwen-VL style policy.

    `tokenizer` is a fast transformers tokenizer; `image_processor` is callable as
    `image_processor(images=[PIL], return_tensors="pt")` and returns `pixel_values` and `image_grid_thw`, or None for a
    policy that sees no images.
    """

    def __init__(self, tokenizer, image_processor) -> None:
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.image_pad_id = tokenizer.convert_tokens_to_ids("<|image_pad|>") if image_processor else NO_TOKEN
        self.markers = tuple(tokenizer.get_added_vocab())
        self.end_of_turn_id = tokenizer.convert_tokens_to_ids("<|im_end|>")
        self.merge_size = image_processor.merge_size if image_processor else 1
        self._patches: OrderedDict[str, tuple[torch.Tensor, tuple[int, int, int]]] = OrderedDict()
        self._patch_bytes = 0
        self._grids: dict[str, tuple[int, int, int]] = {}
        self._lock = threading.Lock()  # the next step's rollouts may be sampled while this one trains

    @classmethod
    def from_pretrained(cls, path: str | Path) -> TransformersCodec:
        from transformers import AutoTokenizer
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        try:
            processor = Qwen2VLImageProcessorPil.from_pretrained(path)
        except OSError:  # no preprocessor_config.json: a policy for text
            processor = None
        return cls(AutoTokenizer.from_pretrained(path), processor)

    def save_pretrained(self, path: str | Path) -> None:
        self.tokenizer.save_pretrained(path)
        if self.image_processor:
            self.image_processor.save_pretrained(path)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def image_patches(self, pixels: np.ndarray) -> tuple[torch.Tensor, tuple[int, int, int]]:
        """(pixel_values [patches, channels·temporal·patch²], grid) of a uint8 [h, w, 3] image, cached by pixel hash."""
        if self.image_processor is None:
            raise ImageMismatchError("this policy sees no images: set rollout.observe_images to text")
        key = image_hash(pixels)
        with self._lock:
            if key not in self._patches:
                from PIL import Image

                out = self.image_processor(images=[Image.fromarray(pixels)], return_tensors="pt")
                self._patches[key] = out["pixel_values"], tuple(out["image_grid_thw"][0].tolist())
                self._grids[key] = self._patches[key][1]
                self._patch_bytes += out["pixel_values"].nbytes
                while self._patch_bytes > _CACHED_BYTES and len(self._patches) > 1:
                    self._patch_bytes -= self._patches.popitem(last=False)[1][0].nbytes
            self._patches.move_to_end(key)
            return self._patches[key]

    def image_grid(self, pixels: np.ndarray) -> tuple[int, int, int]:
        return self._grids.get(image_hash(pixels)) or self.image_patches(pixels)[1]

    def image_tokens(self, grid: tuple[int, int, int]) -> int:
        return grid[0] * grid[1] * grid[2] // self.merge_size**2
