"""Pictures from files that nobody vouches for, and pictures as bytes."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from genevolve_fast.net.web import FetchError

MAX_ASPECT = 100  # image processors refuse longer strips, and no picture is one
MAX_SCANS = 500  # of a JPEG; progressive ones have about ten, and each passes all pixels though it may hold no byte
MAX_SCANNED = 2_000_000_000  # pixels of all scans together: about two seconds
EXTENSIONS = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp", "GIF": ".gif"}
_MAX_IMAGE_SIDE = 1024
_LOSSLESS_SIDE = 256  # small pictures travel as PNG
_MAX_JUDGED_SIDE = 4096


@dataclass(frozen=True)
class Picture:
    pixels: np.ndarray  # uint8 [height, width, 3]
    extension: str


def sniff(data: bytes) -> str | None:
    """JPEG, PNG, WEBP or GIF by the first bytes, or None."""
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data[:6] in (b"GIF87a", b"GIF89a"):
        return "GIF"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    return None


def decode_image(data: bytes, max_pixels: int, max_side: int) -> Picture:
    """First frame, upright, transparency on white, the longest side at most `max_side`. Raises FetchError."""
    from PIL import Image

    form = sniff(data)
    if form is None:
        raise FetchError("neither JPEG, PNG, WEBP nor GIF", "not_an_image", permanent=True)
    scans = data.count(b"\xff\xda") if form == "JPEG" else 1
    try:
        with Image.open(io.BytesIO(data), formats=(form,)) as image:
            _check_size(image.size, max_pixels)
            if scans > MAX_SCANS or scans * image.width * image.height > MAX_SCANNED:
                raise FetchError(f"a JPEG of {scans} scans", "too_large", permanent=True)
            image.load()
            return Picture(_rgb(_upright(image), max_side), EXTENSIONS[form])
    except FetchError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise FetchError(f"more than {max_pixels} pixels", "too_large", permanent=True) from None
    except Exception as error:  # decoders raise anything on broken files
        message = f"a broken {form} file: {type(error).__name__}"
        raise FetchError(message, "not_an_image", permanent=True) from None


def _check_size(size: Iterable[int], max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels:
        message = f"{width} × {height} pixels, the limit is {max_pixels}"
        raise FetchError(message, "too_large", permanent=True)
    if min(width, height) < 1 or max(width, height) > MAX_ASPECT * min(width, height):
        raise FetchError(f"{width} × {height} pixels are no picture", "not_an_image", permanent=True)


def _upright(image):
    """Turned as its EXIF orientation says; a picture with broken EXIF stays as it is."""
    from PIL import ImageOps

    with suppress(Exception):  # the parser raises anything
        ImageOps.exif_transpose(image, in_place=True)
    return image


def _rgb(image, max_side: int) -> np.ndarray:
    """Few copies at a time: a legal picture takes 160 MB in Pillow."""
    from PIL import Image

    if image.mode.startswith("I"):
        image = _eight_bits(image)
    if image.has_transparency_data:
        layer = image if image.mode == "RGBA" else image.convert("RGBA")
        image = Image.new("RGB", layer.size, "white")
        image.paste(layer, mask=layer.getchannel("A"))
        del layer
    if image.mode != "RGB":
        image = image.convert("RGB")
    image.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    return np.array(image)


def _eight_bits(image):
    """16-bit grey, which convert() would clip at 255 and whose clear value it would forget."""
    from PIL import Image

    values, clear = np.asarray(image), image.info.get("transparency")
    grey = Image.fromarray((values.clip(0, 65535) >> 8).astype(np.uint8))
    if isinstance(clear, int):
        grey.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return grey


def png_bytes(pixels: np.ndarray) -> bytes:
    """uint8 [height, width, 3] as a PNG file."""
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def encoded(pixels: np.ndarray, max_side: int = _MAX_IMAGE_SIDE) -> tuple[str, bytes]:
    """(media type, file): uint8 [height, width, 3] as PNG when small, else as JPEG, its longest side <= max_side."""
    from PIL import Image

    if max(pixels.shape[:2]) <= _LOSSLESS_SIDE:
        return "image/png", png_bytes(pixels)
    picture = Image.fromarray(pixels)
    picture.thumbnail((max_side, max_side))
    return _jpeg(picture, quality=95)


def _encoded_for_judges(pixels: np.ndarray) -> tuple[str, bytes]:
    from PIL import Image

    picture = Image.fromarray(pixels)
    longest = max(picture.size)
    if longest <= _LOSSLESS_SIDE:
        return "image/png", png_bytes(pixels)
    if longest > _MAX_JUDGED_SIDE:
        scale = _MAX_JUDGED_SIDE / longest
        picture = picture.resize([max(1, int(side * scale)) for side in picture.size], Image.Resampling.LANCZOS)
    return _jpeg(picture, quality=100, optimize=True)


def _jpeg(picture, **options: Any) -> tuple[str, bytes]:
    out = io.BytesIO()
    picture.save(out, "JPEG", **options)
    return "image/jpeg", out.getvalue()


def data_url(pixels: np.ndarray, max_side: int = _MAX_IMAGE_SIDE) -> str:
    """The file of `encoded` as a data URL."""
    return as_url(*encoded(pixels, max_side))


def judged_url(pixels: np.ndarray) -> str:
    """As the released evaluator encodes what it judges: JPEG of quality 100, the longest side at most 4096.

    Small pictures are PNG: they lose nothing.
    """
    return as_url(*_encoded_for_judges(pixels))


def as_url(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def from_base64(text: object) -> bytes:
    """Bytes of base64, with or without `data:…;base64,` before it and line breaks in it. Raises FetchError."""
    if not isinstance(text, str):
        raise FetchError(f"base64 of type {type(text).__name__}", "bad_response")
    head, comma, rest = text.partition(",") if text[:5] == "data:" else ("", ",", text)
    try:
        return base64.b64decode("".join(rest.split()), validate=True)
    except ValueError:
        raise FetchError("this is not base64", "bad_response") from None
