"""Requests embedded by Qwen3-Embedding, or a decoder trained like it (arXiv 2506.05176). Imports torch when opened."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

INSTRUCTION = "Given a request for a picture, retrieve requests that call for the same decisions"


class QwenEmbedder:
    """protocols.Embedder: the hidden state of the last token, unit length.

    Every text is a query with the model card's instruction prefix: requests are compared with requests, so both sides
    are embedded alike and equal texts have cosine 1. Padding stands on the left and has neither attention nor
    positions, so a text's embedding does not depend on its batch (to rounding: 1e-5 in float32).
    """

    def __init__(
        self,
        model: str = "Qwen/Qwen3-Embedding-0.6B",
        *,
        device: str = "auto",
        dtype: str = "auto",
        batch_size: int = 16,
        max_tokens: int = 2048,
        instruction: str = INSTRUCTION,
    ) -> None:
        """Raises ValueError where the model cannot be loaded."""
        import torch
        from transformers import AutoModel, AutoTokenizer

        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if dtype == "auto":
            dtype = "bfloat16" if device.startswith("cuda") else "float32"
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
            self._model = AutoModel.from_pretrained(model, dtype=getattr(torch, dtype)).to(device).eval()
        except (OSError, ValueError, RuntimeError, AssertionError) as error:  # the last two: no such device
            raise ValueError(f"the embedding model {model} cannot be loaded: {str(error).splitlines()[0]}") from error
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        self.name = f"{Path(model).name}: {instruction}"
        self.dimension = self._model.config.get_text_config().hidden_size
        self._batch_size = batch_size
        self._max_tokens = max_tokens
        self._prefix = f"Instruct: {instruction}\nQuery:"

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [len(texts), dimension]; a text longer than max_tokens counts with its beginning."""
        out = np.zeros((len(texts), self.dimension), dtype=np.float32)
        longest_first = sorted(range(len(texts)), key=lambda i: -len(texts[i]))  # batches of like lengths pad little
        for start in range(0, len(texts), self._batch_size):
            rows = longest_first[start : start + self._batch_size]
            out[rows] = self._batch([self._prefix + texts[i] for i in rows])
        return out

    def _batch(self, texts: Sequence[str]) -> np.ndarray:
        import torch

        tokens = self._tokenizer(
            list(texts), padding=True, truncation=True, max_length=self._max_tokens, return_tensors="pt"
        ).to(self._model.device)
        mask = tokens["attention_mask"]
        with torch.inference_mode():
            hidden = self._model(
                input_ids=tokens["input_ids"],
                attention_mask=mask,
                position_ids=(mask.cumsum(1) - 1).clamp(min=0),
                use_cache=False,
            ).last_hidden_state[:, -1]
            unit = torch.nn.functional.normalize(hidden.float(), dim=-1)
        return unit.cpu().numpy()
