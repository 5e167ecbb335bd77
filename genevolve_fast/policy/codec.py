"""A transformers tokenizer and image processor behind the Codec protocol."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from genevolve_fast.policy.positions import ImageMismatchError
from genevolve_fast.trajectory import image_hash

NO_TOKEN = -1  # stands for the image placeholder of a policy that has none
CACHED_BYTES = 2 << 30  # of host memory for patches of images


class TransformersCodec:
    """Text and images to tokens for a Qwen-VL style policy.

    `tokenizer` is a fast transformers tokenizer; `image_processor` is Qwen2-VL's, or None for a policy that sees no
    images. Threads may share a codec.
    """

    def __init__(self, tokenizer, image_processor) -> None:
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.image_pad_id = tokenizer.convert_tokens_to_ids("<|image_pad|>") if image_processor else NO_TOKEN
        self.markers = tuple(tokenizer.get_added_vocab())
        self.end_of_turn_id = tokenizer.convert_tokens_to_ids("<|im_end|>")
        self.merge_size = image_processor.merge_size if image_processor else 1
        self.cached_bytes = CACHED_BYTES
        self._patches: OrderedDict[str, tuple[torch.Tensor, tuple[int, int, int]]] = OrderedDict()
        self._patch_bytes = 0
        self._lock = threading.Lock()

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
            if key in self._patches:
                self._patches.move_to_end(key)
                return self._patches[key]
        from PIL import Image

        out = self.image_processor(images=[Image.fromarray(pixels)], return_tensors="pt")
        made = out["pixel_values"], tuple(out["image_grid_thw"][0].tolist())
        with self._lock:
            if key not in self._patches:  # another thread may have been quicker
                self._patches[key] = made
                self._patch_bytes += made[0].nbytes
            while self._patch_bytes > self.cached_bytes and len(self._patches) > 1:
                self._patch_bytes -= self._patches.popitem(last=False)[1][0].nbytes
        return made

    def image_grid(self, pixels: np.ndarray) -> tuple[int, int, int]:
        """The grid that image_patches gives, from the size alone."""
        processor = self.image_processor
        if processor is None:
            raise ImageMismatchError("this policy sees no images: set rollout.observe_images to text")
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

        height, width = pixels.shape[:2]
        if processor.do_resize:
            block, size = processor.patch_size * processor.merge_size, processor.size
            height, width = smart_resize(height, width, block, size["shortest_edge"], size["longest_edge"])
        return 1, height // processor.patch_size, width // processor.patch_size

    def image_tokens(self, grid: tuple[int, int, int]) -> int:
        return grid[0] * grid[1] * grid[2] // self.merge_size**2

    def fingerprint(self) -> str:
        """A hash of what ids and grids follow from: the tokenizer and the image processor's settings."""
        digest = hashlib.sha256(self.tokenizer.backend_tokenizer.to_str().encode())
        digest.update(self.image_processor.to_json_string().encode() if self.image_processor else b"")
        return digest.hexdigest()
