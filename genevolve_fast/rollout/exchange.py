"""What goes to an inference engine and what must come back: image placeholders and sampled tokens, checked."""

from __future__ import annotations

import base64
import io
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from genevolve_fast.protocols import Codec, EngineError, Generation, Sampling
from genevolve_fast.trajectory import image_hash

MASK_TOP_K = 1024  # vLLM bounds the sets it returns by top_k and refuses to return any without one
SEEDS = 1 << 63  # vLLM keeps a seed in an int64
_CACHED_BYTES = 256 << 20  # of host memory for encoded images


def collapsed(ids: Sequence[int], images: Sequence[np.ndarray], codec: Codec) -> list[int]:
    """`ids` with one placeholder for each image: the engine expands them to what its own processor makes."""
    out, at, pad = [], 0, codec.image_pad_id
    ids = list(ids)
    for i, pixels in enumerate(images):
        count = codec.image_tokens(codec.image_grid(pixels))
        try:
            start = ids.index(pad, at)
        except ValueError:
            raise EngineError(f"{len(images)} images, but the ids hold placeholders for {i}", "bad_arguments") from None
        if ids[start : start + count] != [pad] * count:
            raise EngineError(
                f"image {i} of grid {codec.image_grid(pixels)} needs {count} placeholders", "bad_arguments"
            )
        out += [*ids[at:start], pad]
        at = start + count
    if pad in ids[at:]:
        raise EngineError(f"the ids hold more placeholders than the {len(images)} images need", "bad_arguments")
    return out + ids[at:]


def check_prompt(ids: Sequence[int], read: Sequence[int] | None, images: Sequence[np.ndarray], codec: Codec) -> None:
    """Raises EngineError unless the engine read exactly `ids`, naming the image that it expanded differently."""
    if read is None:
        raise EngineError(
            "the engine did not say which prompt ids it read: it ignores return_token_ids", "bad_response"
        )
    if list(read) == list(ids):
        return
    ours, theirs = _runs(ids, codec.image_pad_id), _runs(read, codec.image_pad_id)
    for i, pixels in enumerate(images[: len(ours)]):
        count = theirs[i] if i < len(theirs) else 0
        if count != codec.image_tokens(codec.image_grid(pixels)):
            raise EngineError(
                f"image {i} of {pixels.shape[1]} x {pixels.shape[0]} pixels has grid {codec.image_grid(pixels)} here, "
                f"{ours[i]} tokens, but {count} tokens in the engine: its image processor differs from the policy's "
                "preprocessor_config.json",
                "bad_response",
            )
    at = next((i for i, (a, b) in enumerate(zip(ids, read, strict=False)) if a != b), min(len(ids), len(read)))
    raise EngineError(
        f"the engine read {len(read)} prompt ids instead of {len(ids)}; they differ at {at}", "bad_response"
    )


def _runs(ids: Sequence[int], pad: int) -> list[int]:
    """Lengths of the runs of placeholders."""
    lengths, before = [], None
    for token in ids:
        if token == pad:
            lengths = [*lengths[:-1], lengths[-1] + 1] if before == pad else [*lengths, 1]
        before = token
    return lengths


def checked_generation(
    ids: Sequence[int],
    logps: Sequence[float],
    finish_reason: str | None,
    mask: Sequence[Sequence[int]] | None,
    sampling: Sampling,
    codec: Codec,
) -> Generation:
    """What an engine answered, as a Generation. Raises EngineError where it cannot be what `sampling` asked for."""
    if not ids or len(ids) != len(logps):
        raise EngineError(f"{len(ids)} sampled ids with {len(logps)} log-probs", "bad_response")
    if len(ids) > sampling.max_tokens:
        raise EngineError(f"{len(ids)} ids were sampled, max_tokens is {sampling.max_tokens}", "bad_response")
    if codec.image_pad_id in ids:
        raise EngineError("the engine sampled an image placeholder, behind which there is no image", "bad_response")
    if finish_reason not in ("stop", "length"):
        raise EngineError(f"the turn ended by {finish_reason!r}", "bad_response")
    if finish_reason == "stop" and ids[-1] not in sampling.stop_ids:
        raise EngineError(f"the turn was stopped by {ids[-1]}, which is none of {sampling.stop_ids}", "bad_response")
    if sampling.temperature == 0:
        logps = [0.0] * len(ids)
    if any(not -9000 < p <= 1e-3 for p in logps):  # vLLM writes -9999 for what it could not compute
        raise EngineError(
            f"log-probs of {min(logps)} to {max(logps)}: the engine could not compute them", "bad_response"
        )
    kept_ids = None
    if sampling.sampling_mask and sampling.temperature > 0 and mask is not None:
        if len(mask) != len(ids) or any(token not in kept for token, kept in zip(ids, mask, strict=True)):
            raise EngineError("a sampled id is not in its own sampling mask", "bad_response")
        kept_ids = [list(kept) for kept in mask]
    return Generation(list(ids), [min(0.0, p) for p in logps], finish_reason, kept_ids)


class DataUrls:
    """Images as PNG data URLs; those used last are kept, since every turn of a rollout sends them again."""

    def __init__(self) -> None:
        self._urls: OrderedDict[str, str] = OrderedDict()
        self._bytes = 0

    def __call__(self, pixels: np.ndarray) -> str:
        key = image_hash(pixels)
        if key not in self._urls:
            self._urls[key] = _data_url(pixels)
            self._bytes += len(self._urls[key])
            while self._bytes > _CACHED_BYTES and len(self._urls) > 1:
                self._bytes -= len(self._urls.popitem(last=False)[1])
        self._urls.move_to_end(key)
        return self._urls[key]


def _data_url(pixels: np.ndarray) -> str:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
