"""From what a request says to ids and pixels: images in data URLs, placeholders, chat templates."""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from genevolve_fast.policy.codec import TransformersCodec
from genevolve_fast.rollout.server_protocol import RequestError

MAX_IMAGE_PIXELS = 1 << 25  # 33 megapixels, checked before a pixel is decoded
_VISION = "<|vision_start|><|image_pad|><|vision_end|>"


def image_of(url: str, where: str) -> np.ndarray:
    """Pixels uint8 [h, w, 3] of a data URL. Raises RequestError; this server fetches nothing."""
    from PIL import Image, UnidentifiedImageError

    head, comma, data = url.partition(",")
    if not (comma and head.startswith("data:image/") and head.endswith(";base64")):
        raise RequestError(
            f"{where}: send the image as data:image/png;base64,…; this server fetches no URLs", param=where
        )
    try:
        opened = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
        if opened.width * opened.height > MAX_IMAGE_PIXELS:
            size = f"{opened.width} x {opened.height}"
            raise RequestError(f"{where}: {size} pixels, at most {MAX_IMAGE_PIXELS} are taken", param=where)
        return np.asarray(opened.convert("RGB"))
    except (binascii.Error, UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise RequestError(f"{where}: not an image: {type(error).__name__}", param=where) from error


def images_of_parts(parts: Sequence[Mapping[str, Any]] | None) -> list[np.ndarray]:
    """Pixels of a generate request's content_parts, in order."""
    images = []
    for i, part in enumerate(parts or ()):
        where = f"content_parts[{i}]"
        if part.get("type") != "image_url" or not isinstance(part.get("url"), str):
            raise RequestError(f'{where}: only {{"type": "image_url", "url": "data:…"}} is taken', param=where)
        images.append(image_of(part["url"], where))
    return images


def expand(ids: Sequence[int], images: Sequence[np.ndarray], codec: TransformersCodec) -> tuple[list[int], list[dict]]:
    """(ids with one placeholder per image token, {"offset", "length"} of each image's run).

    `ids` hold one <|image_pad|> for each image. Raises RequestError where the numbers differ.
    """
    found = list(ids).count(codec.image_pad_id)
    if found != len(images):
        raise RequestError(
            f"token_ids hold {found} <|image_pad|> for {len(images)} images: send one for each, not expanded",
            param="token_ids",
        )
    expanded: list[int] = []
    ranges = []
    ahead = iter(images)
    for token in ids:
        if token == codec.image_pad_id:
            length = codec.image_tokens(codec.image_grid(next(ahead)))
            ranges.append({"offset": len(expanded), "length": length})
            expanded += [token] * length
        else:
            expanded.append(token)
    return expanded, ranges


def chat_prompt(
    messages: Sequence[Mapping[str, Any]],
    codec: TransformersCodec,
    add_generation_prompt: bool,
    template_arguments: Mapping[str, Any] | None,
) -> tuple[str, list[np.ndarray]]:
    """The text of a chat, one <|image_pad|> for each image, and the images; Qwen's form without a chat template."""
    images: list[np.ndarray] = []
    plain = [_plain(m, i, images) for i, m in enumerate(messages)]
    if codec.tokenizer.chat_template is not None:
        from jinja2 import TemplateError

        try:
            text = codec.tokenizer.apply_chat_template(
                plain, tokenize=False, add_generation_prompt=add_generation_prompt, **(template_arguments or {})
            )
        except (TemplateError, TypeError) as error:
            raise RequestError(f"messages: the chat template says: {error}", param="messages") from error
        return text, images
    if template_arguments:
        raise RequestError("chat_template_kwargs: this model has no chat template", param="chat_template_kwargs")
    turns = [f"<|im_start|>{m['role']}\n{_joined(m['content'])}<|im_end|>\n" for m in plain]
    return "".join(turns) + ("<|im_start|>assistant\n" if add_generation_prompt else ""), images


def _plain(message: Mapping[str, Any], index: int, images: list[np.ndarray]) -> dict[str, Any]:
    """A message as templates take it: content text, or text and {"type": "image"} parts; pixels go to `images`."""
    where = f"messages[{index}]"
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or message.get("tool_calls"):
        raise RequestError(f"{where}: needs a role and no tool_calls", param="messages")
    if content is None or isinstance(content, str):
        return {"role": role, "content": content or ""}
    if not isinstance(content, list):
        raise RequestError(f"{where}.content: text or a list of parts", param="messages")
    parts = []
    for j, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            parts.append({"type": "text", "text": part["text"]})
        elif kind == "image_url" and isinstance(part.get("image_url"), dict):
            images.append(image_of(str(part["image_url"].get("url")), f"{where}.content[{j}]"))
            parts.append({"type": "image"})
        else:
            raise RequestError(f"{where}.content[{j}]: only text and image_url parts are taken", param="messages")
    return {"role": role, "content": parts}


def _joined(content: str | list[dict[str, str]]) -> str:
    if isinstance(content, str):
        return content
    return "".join(part.get("text", _VISION) for part in content)
