"""Hostile and odd picture files, one case each, and what must hold wherever such a file comes in."""

from __future__ import annotations

import asyncio
import io
import json
import struct
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np

from genevolve_fast.incidents import KINDS
from genevolve_fast.protocols import Renderer, RenderError
from genevolve_fast.render.batch import Gallery, render_batch
from genevolve_fast.render.endpoints import CallLimits
from genevolve_fast.render.nano_banana import NanoBanana
from genevolve_fast.render.rows import MAX_SIDE, read_rows
from genevolve_fast.render.service_client import ServiceRenderer
from genevolve_fast.trajectory import Program, Reference

from .canvas_service import GEMINI, GENERATE, LoopbackCanvas

SECONDS = 15.0  # of one file
MEMORY_LIMIT = 1280 << 20  # two legal pictures of 40 megapixels with transparency decoded at a time, and handed on
REFUSED = ("not_an_image", "too_large", "bad_response")


@dataclass(frozen=True, eq=False)
class Case:
    """A file. `expect`: "drawn", the kind it is refused with, or "typed": either, but nothing else.

    `pixels` is what it must look like, no pixel off by more than `tolerance`.
    """

    name: str
    data: bytes = field(repr=False)
    expect: str = "typed"
    pixels: np.ndarray | None = field(default=None, repr=False)
    tolerance: int = 0
    shape: tuple[int, int] | None = None  # (height, width) where the pixels are not worth storing


def cases() -> list[Case]:
    """All of them, always the same."""
    return [*small_cases(), *_bombs(), *_chunks()]


def small_cases() -> list[Case]:
    """Those that are made in a second."""
    return [
        *(*_png(), *_jpeg(), *_gif(), *_webp(), *_turned(), *_mislabelled(), *_other_formats(), *_polyglots()),
        *(*_sizes(), *_depths(), *_beginnings(), *_truncated(), *_flipped()),
    ]


# --- writing files ----------------------------------------------------------------------------------------------------


def chunk(kind: bytes, body: bytes = b"", crc: int | None = None) -> bytes:
    said = zlib.crc32(kind + body) if crc is None else crc
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", said)


_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))


def png_file(
    values: np.ndarray, depth: int = 8, colour: int = 2, interlaced: bool = False, before: bytes = b"", split: int = 0
) -> bytes:
    """A PNG of [height, width, channels] sample values, written without any library."""
    height, width = values.shape[:2]
    values = values.reshape(height, width, -1)
    parts = [values[y::dy, x::dx] for x, y, dx, dy in _ADAM7] if interlaced else [values]
    lines = b"".join(b"\x00" + _packed(line, depth) for part in parts if part.size for line in part)
    data = zlib.compress(lines, 9)
    step = split or len(data)
    body = b"".join(chunk(b"IDAT", data[i : i + step]) for i in range(0, len(data), step))
    return png_header(width, height, depth, colour, interlaced) + before + body + chunk(b"IEND")


def png_header(width: int, height: int, depth: int = 8, colour: int = 2, interlaced: bool = False) -> bytes:
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head)


def _packed(line: np.ndarray, depth: int) -> bytes:
    flat = line.reshape(-1)
    if depth == 16:
        return flat.astype(">u2").tobytes()
    if depth == 8:
        return flat.astype(np.uint8).tobytes()
    bits = (flat[:, None].astype(np.uint8) >> np.arange(depth - 1, -1, -1)) & 1
    return np.packbits(bits.reshape(-1)).tobytes()


def saved(pixels: np.ndarray, form: str, mode: str | None = None, **options) -> bytes:
    from PIL import Image

    out, image = io.BytesIO(), Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(out, form, **options)
    return out.getvalue()


@lru_cache(maxsize=1)
def base() -> np.ndarray:
    """uint8 [16, 24, 3]: smooth, no two corners alike, so that a turn or a swap of channels shows."""
    y, x = np.mgrid[0:16, 0:24]
    return np.stack([x * 10, y * 15, 255 - x * 5 - y * 5], -1).astype(np.uint8)


def _over_white(rgb: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    a = alpha[..., None].astype(float) / 255
    return np.rint(rgb * a + 255 * (1 - a)).astype(np.uint8)


def _grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[..., None], 3, -1).astype(np.uint8)


# --- legal and odd: drawn rightly -------------------------------------------------------------------------------------


def _png() -> Iterator[Case]:
    rgb = base()
    grey, alpha = rgb[..., 0], rgb[..., 1]
    wide = rgb.astype(np.uint16) * 257 - (rgb % 3).astype(np.uint16)  # low bytes of their own
    high = (wide >> 8).astype(np.uint8)
    table = np.array([[200, 0, 0], [0, 200, 0], [0, 0, 200], [250, 250, 0]], np.uint8)
    index = (np.add.outer(np.arange(16), np.arange(24)) % 4).astype(np.uint8)
    palette = chunk(b"PLTE", table.tobytes())
    clear = np.where(index == 1, 0, 255).astype(np.uint8)
    half = np.array([255, 0, 128, 60], np.uint8)
    forms: dict[str, tuple[bytes, np.ndarray]] = {
        "rgb": (png_file(rgb), rgb),
        "rgba": (png_file(np.dstack([rgb, alpha]), colour=6), _over_white(rgb, alpha)),
        "grey": (png_file(grey, colour=0), _grey(grey)),
        "grey alpha": (png_file(np.dstack([grey, alpha]), colour=4), _over_white(_grey(grey), alpha)),
        "1 bit": (png_file(index % 2, 1, 0), _grey(index % 2 * 255)),
        "2 bit grey": (png_file(index, 2, 0), _grey(index * 85)),
        "4 bit grey": (png_file(index * 5, 4, 0), _grey(index * 85)),
        "16 bit grey": (png_file(wide[..., 0], 16, 0), _grey(high[..., 0])),
        "16 bit rgb": (png_file(wide, 16, 2), high),
        "16 bit grey alpha": (
            png_file(np.dstack([wide[..., 0], wide[..., 1]]), 16, 4),
            _over_white(_grey(high[..., 0]), high[..., 1]),
        ),
        "16 bit rgba": (png_file(np.dstack([wide, wide[..., 1]]), 16, 6), _over_white(high, high[..., 1])),
        "palette": (png_file(index, 8, 3, before=palette), table[index]),
        "2 bit palette": (png_file(index, 2, 3, before=palette), table[index]),
        "palette, one colour clear": (
            png_file(index, 8, 3, before=palette + chunk(b"tRNS", b"\xff\x00")),
            _over_white(table[index], clear),
        ),
        "palette, alphas": (
            png_file(index, 8, 3, before=palette + chunk(b"tRNS", half.tobytes())),
            _over_white(table[index], half[index]),
        ),
        "grey, one value clear": (
            png_file(index, 8, 0, before=chunk(b"tRNS", struct.pack(">H", 1))),
            _over_white(_grey(index), clear),
        ),
        "1 bit, black clear": (
            png_file(index % 2, 1, 0, before=chunk(b"tRNS", struct.pack(">H", 0))),
            _grey(np.full_like(index, 255)),
        ),
        "rgb, one colour clear": (
            png_file(table[index], 8, 2, before=chunk(b"tRNS", struct.pack(">HHH", 0, 200, 0))),
            _over_white(table[index], clear),
        ),
        "16 bit grey, one value clear": (
            png_file(index.astype(np.uint16) * 20_000, 16, 0, before=chunk(b"tRNS", struct.pack(">H", 20_000))),
            _over_white(_grey(index.astype(np.uint16) * 20_000 >> 8), clear),
        ),
        "16 bit rgb, one colour clear": (
            png_file(
                table[index].astype(np.uint16) * 257, 16, 2, before=chunk(b"tRNS", struct.pack(">HHH", 0, 51400, 0))
            ),
            _over_white(table[index], clear),
        ),
        "no gamma applied": (png_file(rgb, before=chunk(b"gAMA", struct.pack(">I", 100_000))), rgb),
        "many IDAT": (png_file(rgb, split=7), rgb),
        "an empty IDAT": (png_file(rgb, before=chunk(b"IDAT")), rgb),
        "with text": (png_file(rgb, before=chunk(b"tEXt", b"Comment\x00<script>alert(1)</script>")), rgb),
        "broken profile": (png_file(rgb, before=chunk(b"iCCP", b"x\x00\x00" + zlib.compress(b"no profile"))), rgb),
        "a private chunk": (png_file(rgb, before=chunk(b"evIl", bytes(1000))), rgb),
        "a tail": (png_file(rgb) + bytes(range(256)) * 40, rgb),
        "apng": (_apng(rgb, first_is_frame=True), rgb),
        "apng, still image first": (_apng(rgb, first_is_frame=False), rgb),
    }
    for name, (data, pixels) in forms.items():
        yield Case(f"png {name}", data, "drawn", pixels, 1 if "alpha" in name or "rgba" in name else 0)
    for depth, colour, values, pixels in (
        (8, 2, rgb, rgb),
        (8, 6, np.dstack([rgb, alpha]), _over_white(rgb, alpha)),
        (1, 0, index % 2, _grey(index % 2 * 255)),
        (16, 0, wide[..., 0], _grey(high[..., 0])),
        (16, 2, wide, high),
    ):
        yield Case(f"png interlaced {depth}, {colour}", png_file(values, depth, colour, True), "drawn", pixels, 1)


def _apng(rgb: np.ndarray, first_is_frame: bool) -> bytes:
    height, width = rgb.shape[:2]

    def control(number: int) -> bytes:
        return chunk(b"fcTL", struct.pack(">IIIIIHHBB", number, width, height, 0, 0, 1, 10, 0, 0))

    other = zlib.compress(b"".join(b"\x00" + line.tobytes() for line in 255 - rgb))
    before = chunk(b"acTL", struct.pack(">II", 2 if first_is_frame else 1, 0))
    before += control(0) if first_is_frame else b""
    still = png_file(rgb, before=before)
    frame = control(1 if first_is_frame else 0)
    frame += chunk(b"fdAT", struct.pack(">I", 2 if first_is_frame else 1) + other)
    return still[: -len(chunk(b"IEND"))] + frame + chunk(b"IEND")


def _jpeg() -> Iterator[Case]:
    rgb = base()
    forms: dict[str, tuple[bytes, np.ndarray]] = {
        "rgb": (saved(rgb, "JPEG", quality=98, subsampling=0), rgb),
        "subsampled": (saved(rgb, "JPEG", quality=98), rgb),
        "progressive": (saved(rgb, "JPEG", quality=98, progressive=True), rgb),
        "grey": (saved(rgb[..., 0], "JPEG", quality=98), _grey(rgb[..., 0])),
        "with restarts": (saved(rgb, "JPEG", quality=98, restart_marker_blocks=1), rgb),
        "not YCbCr": (saved(rgb, "JPEG", quality=98, keep_rgb=True), rgb),
        "broken profile": (saved(rgb, "JPEG", quality=98, icc_profile=b"no profile" * 50), rgb),
        "comment": (saved(rgb, "JPEG", quality=98, comment=b"<?php system('id') ?>"), rgb),
        "two pictures": (_mpo(rgb), rgb),
    }
    for name, (data, pixels) in forms.items():
        yield Case(f"jpeg {name}", data, "drawn", pixels, 40 if name == "subsampled" else 14)
    inks = np.dstack([255 - rgb, np.full(rgb.shape[:2], 51, np.uint8)])
    printed = np.rint((255 - inks[..., :3].astype(float)) * (255 - 51) / 255).astype(np.uint8)
    cmyk = _cmyk(inks)
    yield Case("jpeg cmyk", cmyk, "drawn", printed, 14)
    at = cmyk.index(b"Adobe\x00")
    y, cb, cr = _ycc(inks[..., :3])
    ycck = _cmyk(np.dstack([255 - y, 255 - cb, 255 - cr, inks[..., 3]]))
    ycck = ycck[: at + 11] + b"\x02" + ycck[at + 12 :]
    yield Case("jpeg ycck", ycck, "drawn", printed, 20)


def _cmyk(inks: np.ndarray) -> bytes:
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(inks, "CMYK").save(out, "JPEG", quality=98, subsampling=0)
    return out.getvalue()


def _ycc(rgb: np.ndarray) -> tuple[np.ndarray, ...]:
    r, g, b = (rgb[..., i].astype(float) for i in range(3))
    y = 0.299 * r + 0.587 * g + 0.114 * b
    planes = y, 128 + (b - y) / 1.772, 128 + (r - y) / 1.402
    return tuple(np.clip(np.rint(p), 0, 255).astype(np.uint8) for p in planes)


def _mpo(rgb: np.ndarray) -> bytes:
    from PIL import Image

    out = io.BytesIO()
    pictures = [Image.fromarray(rgb), Image.fromarray(255 - rgb)]
    pictures[0].save(out, "MPO", save_all=True, append_images=pictures[1:], quality=98, subsampling=0)
    return out.getvalue()


def _indexed() -> tuple[np.ndarray, np.ndarray]:
    """(index [16, 24], its colours [16, 24, 3])"""
    table = np.array([[200, 0, 0], [0, 200, 0], [0, 0, 200], [250, 250, 0]], np.uint8)
    index = (np.add.outer(np.arange(16), np.arange(24)) // 4 % 4).astype(np.uint8)
    return index, table[index]


def _animated(form: str, **options) -> bytes:
    from PIL import Image

    _, colours = _indexed()
    frames = [Image.fromarray(colours), *(Image.new("RGB", (24, 16), (i * 20, 9, 9)) for i in range(8))]
    out = io.BytesIO()
    frames[0].save(out, form, save_all=True, append_images=frames[1:], duration=50, **options)
    return out.getvalue()


def _gif() -> Iterator[Case]:
    from PIL import Image

    index, colours = _indexed()
    flat = Image.fromarray(index, "P")
    flat.putpalette(np.array([[200, 0, 0], [0, 200, 0], [0, 0, 200], [250, 250, 0]], np.uint8).tobytes())

    def gif(**options) -> bytes:
        out = io.BytesIO()
        flat.save(out, "GIF", **options)
        return out.getvalue()

    clear = np.where(index == 1, 0, 255).astype(np.uint8)
    yield Case("gif", gif(), "drawn", colours)
    yield Case("gif interlaced", gif(interlace=1), "drawn", colours)
    yield Case("gif one colour clear", gif(transparency=1), "drawn", _over_white(colours, clear))
    yield Case("gif with a comment", gif(comment=b"<script>" * 100), "drawn", colours)
    yield Case("gif with a tail", gif() + b"PK\x03\x04" + bytes(500), "drawn", colours)
    yield Case("gif animated", _animated("GIF"), "drawn", colours)
    yield Case("gif without a palette", _gif_of(4, 4, palette=False), "typed")
    yield Case("gif first frame is a part", _gif_of(8, 8, frame=(2, 2, 4, 4)), "drawn", shape=(8, 8))
    yield Case("gif first frame is outside", _gif_of(8, 8, frame=(100, 100, 4, 4)), "typed")


def _gif_of(width: int, height: int, frame: tuple[int, int, int, int] | None = None, palette: bool = True) -> bytes:
    left, top, w, h = frame or (0, 0, width, height)
    head = b"GIF89a" + struct.pack("<HH", width, height) + (b"\x80\x00\x00" if palette else b"\x00\x00\x00")
    head += b"\xc8\x00\x00\x00\xc8\x00" if palette else b""
    codes = bytes([0x8C | 0, 0x2D, 0x99, 0x87, 0x2A, 0x1C, 0xDC, 0x33, 0xA0, 0x02, 0x75, 0xEC, 0x95, 0xFA, 0xA8])
    body = b"\x2c" + struct.pack("<HHHH", left, top, w, h) + b"\x00" + b"\x02" + bytes([len(codes)]) + codes + b"\x00"
    return head + body + b"\x3b"


def _webp() -> Iterator[Case]:
    rgb = base()
    alpha = rgb[..., 1]
    yield Case("webp lossless", saved(rgb, "WEBP", lossless=True), "drawn", rgb)
    yield Case("webp lossy", saved(rgb, "WEBP", quality=98), "drawn", rgb, 40)
    both = saved(np.dstack([rgb, alpha]), "WEBP", lossless=True, exact=True)
    yield Case("webp alpha", both, "drawn", _over_white(rgb, alpha), 1)
    yield Case("webp animated", _animated("WEBP", lossless=True), "drawn", _indexed()[1])
    yield Case("webp broken profile", saved(rgb, "WEBP", lossless=True, icc_profile=b"no" * 99), "drawn", rgb)


_TURNS = {  # EXIF orientation -> what has to be done with the stored pixels
    1: lambda p: p,
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.transpose(1, 0, 2),
    6: lambda p: np.rot90(p, -1),
    7: lambda p: p[::-1, ::-1].transpose(1, 0, 2),
    8: lambda p: np.rot90(p, 1),
}


def _exif(orientation: int) -> bytes:
    entry = struct.pack("<HHIHH", 0x0112, 3, 1, orientation & 0xFFFF, 0)
    return b"Exif\x00\x00II*\x00\x08\x00\x00\x00\x01\x00" + entry + bytes(4)


def _turned() -> Iterator[Case]:
    rgb = base()
    for n, turn in _TURNS.items():
        for form, options in (("JPEG", {"quality": 98, "subsampling": 0}), ("WEBP", {"lossless": True}), ("PNG", {})):
            data = saved(rgb, form, exif=_exif(n), **options)
            yield Case(f"exif {n} {form}", data, "drawn", turn(rgb), 14 if form == "JPEG" else 0)
    broken = {
        "0": _exif(0),
        "9": _exif(9),
        "65535": _exif(65535),
        "of text": _exif(6).replace(b"\x12\x01\x03\x00", b"\x12\x01\x02\x00"),
        "far away": b"Exif\x00\x00II*\x00\xff\xff\xff\xff" + b"\xff" * 40,
        "in a circle": b"Exif\x00\x00II*\x00\x08\x00\x00\x00\x00\x00\x08\x00\x00\x00",
        "of 65535 tags": b"Exif\x00\x00II*\x00\x08\x00\x00\x00\xff\xff" + b"\x12\x01\x03\x00\x01\x00\x00\x00" * 7000,
        "empty": b"Exif\x00\x00",
        "big endian cut": b"Exif\x00\x00MM\x00*\x00\x00",
        "no header": b"\x00" * 64,
    }
    for name, exif in broken.items():
        yield Case(f"exif {name}", saved(rgb, "JPEG", quality=98, subsampling=0, exif=exif), "drawn", rgb, 14)
        yield Case(f"exif {name} PNG", png_file(rgb, before=chunk(b"eXIf", exif[6:])), "drawn", rgb)


_FORMS = ("PNG", "JPEG", "GIF", "WEBP")


def _files() -> dict[str, bytes]:
    rgb = base()
    options = {"JPEG": {"quality": 98, "subsampling": 0}, "WEBP": {"lossless": True}}
    return {form: saved(rgb, form, **options.get(form, {})) for form in _FORMS}


def _mislabelled() -> Iterator[Case]:
    """The name of a file and the type that came with it say nothing; the runner gives them to every case."""
    rgb, exact = base(), {"PNG": 0, "JPEG": 14, "GIF": 60, "WEBP": 0}
    for form, data in _files().items():
        for said in ("jpg", "png", "gif", "webp", "tiff", "txt", "exe", "svg"):
            yield Case(f"{form} called x.{said}", data, "drawn", rgb, exact[form])


# --- no picture -------------------------------------------------------------------------------------------------------


def _other_formats() -> Iterator[Case]:
    rgb = base()
    for form in (
        "TIFF",
        "BMP",
        "ICO",
        "PPM",
        "TGA",
        "PCX",
        "SGI",
        "JPEG2000",
        "DDS",
        "PDF",
        "EPS",
        "IM",
        "XBM",
        "AVIF",
    ):
        try:
            data = saved(rgb, form, "1" if form == "XBM" else None)
        except (KeyError, OSError, ValueError):
            continue
        yield Case(f"format {form}", data, "not_an_image")
    for name, data in {
        "svg": b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
        "html": b"<!doctype html><img src=x onerror=alert(1)>",
        "json": b'{"image": "x"}',
        "zip": b"PK\x03\x04" + bytes(200),
        "gzip": b"\x1f\x8b\x08" + bytes(200),
        "elf": b"\x7fELF" + bytes(200),
        "pickle": b"\x80\x04\x95" + bytes(100),
        "postscript": b"%!PS\n(/etc/passwd) (r) file",
        "mvg": b"push graphic-context\nimage over 0,0 0,0 'https://example.com/'\npop graphic-context",
        "xpm": b'/* XPM */ static char *x[] = {"1 1 1 1", ". c red", "."};',
        "psd": b"8BPS\x00\x01" + bytes(100),
        "heic": b"\x00\x00\x00\x18ftypheic" + bytes(100),
        "jpeg xl": b"\xff\x0a" + bytes(100),
        "mp4": b"\x00\x00\x00\x20ftypisom" + bytes(100),
        "wave": b"RIFF\x24\x00\x00\x00WAVEfmt " + bytes(100),
        "wmf": b"\xd7\xcd\xc6\x9a" + bytes(100),
        "fli": b"\x00\x00\x00\x00\x11\xaf" + bytes(200),
        "shell": b"#!/bin/sh\ntouch owned\n",
        "blanks": b" " * 1000,
        "text of base64": b"iVBORw0KGgoAAAANSUhEUg==",
        "a data url": b"data:image/png;base64,iVBORw0KGgo=",
        "utf-16 signature": "\x89PNG\r\n".encode("utf-16"),
        "a blank before": b" " + png_file(base()),
        "a mark before": b"\xef\xbb\xbf" + png_file(base()),
    }.items():
        yield Case(f"no picture: {name}", data, "not_an_image")


def _polyglots() -> Iterator[Case]:
    files, rgb = _files(), base()
    tails = {
        "html": b"<html><script>alert(1)</script></html>",
        "zip": b"PK\x05\x06" + bytes(18),
        "pdf": b"%PDF-1.4\n%%EOF",
        "shell": b"\n#!/bin/sh\nid\n",
    }
    for form, data in files.items():
        for name, tail in tails.items():
            tolerance = {"PNG": 0, "JPEG": 14, "GIF": 60, "WEBP": 0}[form]
            yield Case(f"{form} and {name}", data + tail, "drawn", rgb, tolerance)
        for second in _FORMS:
            if second != form:
                yield Case(f"{form} signature on {second}", data[:12] + files[second][12:], "typed")
    yield Case("gif of javascript", b"GIF89a/*" + b"\x00" * 40 + b"*/=1;alert(1)//", "typed")
    yield Case("jpeg with a jpeg as its comment", saved(rgb, "JPEG", comment=files["JPEG"]), "drawn", shape=(16, 24))


def _beginnings() -> Iterator[Case]:
    yield Case("nothing", b"", "refused")
    signatures = {
        "png": b"\x89PNG\r\n\x1a\n",
        "jpeg": b"\xff\xd8\xff",
        "gif": b"GIF89a",
        "webp": b"RIFF\x10\x00\x00\x00WEBP",
    }
    for form, signature in signatures.items():
        for length in range(1, len(signature) + 1):
            yield Case(f"{form} first {length}", signature[:length], "not_an_image")
        random = np.random.default_rng(len(form) + signature[1])
        for seed in range(4):
            noise = random.integers(0, 256, 2000, dtype=np.uint8).tobytes()
            yield Case(f"{form} of noise {seed}", signature + noise, "typed")
        yield Case(f"{form} of zeros", signature + bytes(4000), "not_an_image")
        yield Case(f"{form} of ones", signature + b"\xff" * 4000, "not_an_image")


# --- sizes ------------------------------------------------------------------------------------------------------------

_HUGE = ((50_000, 50_000), (2**31 - 1, 1), (2**31 - 1, 2**31 - 1), (2**32 - 1, 2**32 - 1), (65_535, 65_535))
_HUGE += ((1, 2**31 - 1), (100_000, 401), (40_001, 1000))


def _sizes() -> Iterator[Case]:
    for width, height in ((1, 1), (1, 100), (100, 1), (2, 3), (5000, 50)):
        pixels = np.full((height, width, 3), (10, 200, 30), np.uint8)
        drawn = pixels if width < MAX_SIDE else None
        yield Case(
            f"size {width} × {height}", png_file(pixels), "drawn", drawn, shape=None if width < 4096 else (41, 4096)
        )
    for width, height in ((1, 101), (101, 1), (4000, 2)):
        yield Case(f"strip {width} × {height}", png_file(np.zeros((height, width, 3), np.uint8)), "not_an_image")
    for width, height in _HUGE:
        for interlaced in (False, True):
            data = png_header(width, height, interlaced=interlaced)
            data += chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND")
            yield Case(f"png says {width} × {height}{' interlaced' * interlaced}", data, "refused")
    for width, height in ((0, 0), (0, 8), (8, 0)):
        data = png_header(width, height) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND")
        yield Case(f"png says {width} × {height}", data, "refused")
        yield Case(f"jpeg says {width} × {height}", jpeg_of(width, height), "refused")
        yield Case(f"gif says {width} × {height}", _gif_of(width, height, (0, 0, 4, 4)), "typed")
    for width, height in ((65_500, 65_500), (65_535, 65_535), (65_535, 700), (20_000, 20_000), (8000, 8000)):
        yield Case(f"jpeg says {width} × {height}", jpeg_of(width, height), "refused")
        yield Case(f"gif says {width} × {height}", _gif_of(width, height, (0, 0, 4, 4)), "refused")
        yield Case(f"gif frame of {width} × {height}", _gif_of(4, 4, (0, 0, width, height)), "refused")
    for width, height in ((16_383, 16_383), (16_384, 16_384), (16_383, 2500), (7000, 7000)):
        yield Case(f"webp says {width} × {height}", webp_of(width, height), "refused")
        yield Case(f"webp canvas of {width} × {height}", webp_canvas(width, height), "refused")
    yield Case("webp canvas of 2^24", webp_canvas(1 << 24, 1 << 24), "refused")


def jpeg_of(width: int, height: int) -> bytes:
    data = bytearray(_files()["JPEG"])
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def webp_of(width: int, height: int) -> bytes:
    """A lossless WEBP whose own header says width × height."""
    data = bytearray(_files()["WEBP"])
    at = data.index(b"VP8L") + 9
    bits = int.from_bytes(data[at : at + 4], "little")
    said = (width - 1) & 0x3FFF | ((height - 1) & 0x3FFF) << 14
    data[at : at + 4] = (bits & ~0xFFFFFFF | said).to_bytes(4, "little")
    return bytes(data)


def webp_canvas(width: int, height: int) -> bytes:
    """An animated WEBP whose canvas is declared huge."""
    size = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    extended = b"VP8X" + struct.pack("<I", 10) + b"\x02\x00\x00\x00" + size
    frame = saved(np.zeros((8, 8, 3), np.uint8), "WEBP", lossless=True)[12:]
    place = bytes(6) + (7).to_bytes(3, "little") * 2 + bytes(4)
    body = extended + b"ANIM" + struct.pack("<I", 6) + bytes(6)
    body += b"ANMF" + struct.pack("<I", len(place) + len(frame)) + place + frame
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


# --- bombs ------------------------------------------------------------------------------------------------------------


def _zeros(width: int, height: int, depth: int = 8, colour: int = 2, interlaced: bool = False) -> bytes:
    """A valid PNG of one colour, compressed as it comes so that it never lies in memory."""
    press, line = zlib.compressobj(9), bytes(1 + width * _CHANNELS[colour] * depth // 8)
    parts = [press.compress(line) for _ in range(height)] if not interlaced else []
    if interlaced:
        for x, y, dx, dy in _ADAM7:
            columns, rows = -(-(width - x) // dx), -(-(height - y) // dy)
            parts += [press.compress(bytes(1 + columns * _CHANNELS[colour] * depth // 8)) for _ in range(rows)]
    data = b"".join([*parts, press.flush()])
    return png_header(width, height, depth, colour, interlaced) + chunk(b"IDAT", data) + chunk(b"IEND")


def _bombs() -> Iterator[Case]:
    from PIL import Image

    yield Case("png bomb of 64 megapixels", _zeros(8000, 8000), "too_large")
    yield Case("png bomb of 100 megapixels, 1 bit", _zeros(10_000, 10_000, 1, 0), "too_large")
    yield Case("png of 39 megapixels", _zeros(6250, 6250), "drawn", shape=(4096, 4096))
    yield Case("png of 39 megapixels, 16 bit rgba", _zeros(6250, 6250, 16, 6), "drawn", shape=(4096, 4096))
    yield Case("png of 39 megapixels, interlaced", _zeros(6250, 6250, 8, 6, True), "drawn", shape=(4096, 4096))
    yield Case("png with a hundred times the pixels", _more_pixels(), "drawn", shape=(64, 64))

    def file(form: str, size: tuple[int, int], mode: str = "L", **options) -> bytes:
        out = io.BytesIO()
        Image.new(mode, size).save(out, form, **options)
        return out.getvalue()

    yield Case("jpeg bomb of 81 megapixels", file("JPEG", (9000, 9000), quality=1), "too_large")
    yield Case(
        "jpeg of 39 megapixels, progressive", file("JPEG", (6250, 6250), progressive=True), "drawn", shape=(4096, 4096)
    )
    yield Case("gif bomb of 49 megapixels", file("GIF", (7000, 7000)), "too_large")
    yield Case("webp bomb of 49 megapixels", file("WEBP", (7000, 7000), "RGB", lossless=True, method=0), "too_large")
    for scans in (50, 400, 501, 5000):
        expect = "too_large" if scans > 500 else "drawn"
        yield Case(f"jpeg of {scans} scans", _scans((64, 64), scans), expect, shape=(64, 64))
    for megapixels, side in ((4, 2000), (16, 4000), (39, 6250)):
        yield Case(f"jpeg of 450 scans, {megapixels} megapixels", _scans((side, side), 450), "typed")
    many = [Image.new("P", (16, 16), i % 250) for i in range(2000)]
    out = io.BytesIO()
    many[0].save(out, "GIF", save_all=True, append_images=many[1:])
    yield Case("gif of 2000 frames", out.getvalue(), "drawn", shape=(16, 16))


def _more_pixels() -> bytes:
    data = zlib.compress(bytes(64 * 193 * 100), 9)
    return png_header(64, 64) + chunk(b"IDAT", data) + chunk(b"IEND")


def _scans(size: tuple[int, int], scans: int) -> bytes:
    """A progressive JPEG whose last scan comes again and again."""
    from PIL import Image

    out = io.BytesIO()
    Image.new("RGB", size, (9, 200, 30)).save(out, "JPEG", progressive=True)
    whole = out.getvalue()
    last = whole[whole.rindex(b"\xff\xda") : -2]
    return whole[:-2] + last * (scans - whole.count(b"\xff\xda")) + whole[-2:]


# --- structure --------------------------------------------------------------------------------------------------------


def _chunks() -> Iterator[Case]:
    rgb = base()
    whole = png_file(rgb)
    bomb = zlib.compress(bytes(60 << 20), 9)
    text = {
        "zTXt bomb": chunk(b"zTXt", b"k\x00\x00" + bomb),
        "iTXt bomb": chunk(b"iTXt", b"k\x00\x01\x00\x00\x00" + bomb),
        "iCCP bomb": chunk(b"iCCP", b"k\x00\x00" + bomb),
        "10 MB of tEXt": chunk(b"tEXt", b"k\x00" + b"x" * (10 << 20)),
        "20000 tEXt": b"".join(chunk(b"tEXt", b"k%d\x00v" % i) for i in range(20_000)),
        "200 zTXt of 1 MB": chunk(b"zTXt", b"k\x00\x00" + zlib.compress(bytes(1_000_000), 9)) * 200,
        "a megabyte of eXIf": chunk(b"eXIf", b"II*\x00\x08\x00\x00\x00" + b"\xff" * (1 << 20)),
        "two headers": whole[8:33],
        "palette too long": chunk(b"PLTE", bytes(999)),
        "alphas without a palette": chunk(b"tRNS", bytes(500)),
        "animation without frames": chunk(b"acTL", struct.pack(">II", 0, 0)),
        "animation of 2^32 frames": chunk(b"acTL", struct.pack(">II", 2**32 - 1, 0)),
        "frame outside": chunk(b"acTL", struct.pack(">II", 2, 0))
        + chunk(b"fcTL", struct.pack(">IIIIIHHBB", 0, 9999, 9999, 9999, 9999, 0, 0, 9, 9)),
        "private size": chunk(b"pHYs", b"\xff" * 9),
        "no size": chunk(b"pHYs", b""),
        "no gamma": chunk(b"gAMA", b""),
        "unknown needed": chunk(b"XXXX", bytes(20)),
    }
    for name, extra in text.items():
        yield Case(f"png chunk: {name}", png_file(rgb, before=extra), "typed")
    for name, data in {
        "wrong crc of IHDR": whole[:29] + b"\x00\x00\x00\x00" + whole[33:],
        "wrong crc of IDAT": whole[:-16] + b"\x00\x00\x00\x00" + whole[-12:],
        "no IDAT": png_header(24, 16) + chunk(b"IEND"),
        "no IEND": whole[:-12],
        "IDAT first": whole[:8] + whole[33:],
        "not deflated": png_header(24, 16) + chunk(b"IDAT", b"no zlib" * 40) + chunk(b"IEND"),
        "filters of 9": png_header(24, 16)
        + chunk(b"IDAT", zlib.compress(b"".join(b"\x09" + line.tobytes() for line in rgb)))
        + chunk(b"IEND"),
        "palette without PLTE": png_file(rgb[..., 0], 8, 3),
        "indices beyond PLTE": png_file(rgb[..., 0], 8, 3, before=chunk(b"PLTE", b"\x01\x02\x03")),
    }.items():
        yield Case(f"png with {name}", data, "typed")
    for kind in (b"IHDR", b"IDAT", b"IEND"):
        for length in (0, 1, 2**31 - 1, 2**32 - 1):
            at = whole.index(kind) - 4
            yield Case(
                f"png {kind.decode()} of length {length}", whole[:at] + struct.pack(">I", length) + whole[at + 4 :]
            )
    jpeg = _files()["JPEG"]
    for name, extra in {
        "60000 comments": b"\xff\xfe\x00\x02" * 60_000,
        "segments of length 0": b"\xff\xe1\x00\x00" * 10,
        "a segment beyond the end": b"\xff\xe1\xff\xff",
        "profile 2 of 255": b"\xff\xe2\x00\x12ICC_PROFILE\x00\x02\xff\x00\x00",
        "profile 0 of 0": b"\xff\xe2\x00\x12ICC_PROFILE\x00\x00\x00\x00\x00",
        "photoshop": b"\xff\xed\x00\x20Photoshop 3.0\x008BIM\x03\xed\x00\x00\xff\xff\xff\xff\x00\x00\x00\x00",
        "mpf": b"\xff\xe2\x00\x20MPF\x00II*\x00\xff\xff\xff\xff" + bytes(16),
        "fill bytes": b"\xff" * 100_000,
        "a table of nothing": b"\xff\xdb\x00\x02",
        "a huffman table of ones": b"\xff\xc4\x00\x13\x00" + b"\xff" * 16,
    }.items():
        yield Case(f"jpeg with {name}", jpeg[:2] + extra + jpeg[2:], "typed")
    for marker in (0xC1, 0xC2, 0xC3, 0xC5, 0xC9, 0xCA, 0xCB):
        yield Case(f"jpeg of process {marker:x}", jpeg.replace(b"\xff\xc0", bytes([0xFF, marker]), 1), "typed")
    webp = _files()["WEBP"]
    for length in (0, 1, 4, 2**31, 2**32 - 1):
        yield Case(f"webp of length {length}", webp[:4] + struct.pack("<I", length) + webp[8:], "typed")
        yield Case(f"webp chunk of length {length}", webp[:16] + struct.pack("<I", length) + webp[20:], "typed")


def _depths() -> Iterator[Case]:
    """Every pair of bit depth and colour type, possible or not."""
    for depth in (0, 1, 2, 3, 4, 8, 16, 32):
        for colour in range(8):
            data = png_header(8, 8, depth, colour) + chunk(b"PLTE", bytes(48))
            yield Case(
                f"png depth {depth}, colour {colour}", data + chunk(b"IDAT", zlib.compress(bytes(999))) + chunk(b"IEND")
            )


def _victims() -> dict[str, bytes]:
    rgb = base()
    return _files() | {
        "interlaced PNG": png_file(rgb, interlaced=True),
        "APNG": _apng(rgb, True),
        "palette PNG": png_file(_indexed()[0], 8, 3, before=chunk(b"PLTE", bytes(range(12))) + chunk(b"tRNS", b"\x00")),
        "progressive JPEG": saved(rgb, "JPEG", progressive=True),
        "CMYK JPEG": _cmyk(np.dstack([rgb, rgb[..., 0]])),
        "animated GIF": _animated("GIF"),
        "animated WEBP": _animated("WEBP", lossless=True),
        "lossy WEBP": saved(rgb, "WEBP", quality=70),
    }


def _truncated() -> Iterator[Case]:
    for name, data in _victims().items():
        for part in (0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.95, 0.99):
            yield Case(f"{name} cut at {part:.0%}", data[: max(13, int(len(data) * part))], "typed")
        yield Case(f"{name} cut by 1", data[:-1], "typed")
        yield Case(f"{name} cut by 2", data[:-2], "typed")


def _flipped() -> Iterator[Case]:
    for name, data in _victims().items():
        random = np.random.default_rng(len(data))
        for seed in range(12):
            broken = bytearray(data)
            for at in random.integers(12, len(data), 1 + seed * 2):
                broken[at] = random.integers(0, 256)
            yield Case(f"{name} broken {seed}", bytes(broken), "typed")


# --- what must hold ---------------------------------------------------------------------------------------------------


def wrong(case: Case, pixels: np.ndarray | None, kind: str, scaled: bool = True) -> str:
    """What is not as it must be: the picture came out as `pixels`, or was refused with `kind`; "" if nothing is."""
    if pixels is None:
        if kind not in KINDS or kind not in REFUSED:
            return f"refused with {kind!r}"
        if case.expect == "drawn" or (case.expect in REFUSED and kind != case.expect):
            return f"refused with {kind}, expected {case.expect}"
        return ""
    if case.expect in ("refused", *REFUSED):
        return f"drawn, expected {case.expect}"
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        return f"pixels of {pixels.dtype} {pixels.shape}"
    if scaled and case.shape and pixels.shape[:2] != case.shape:
        return f"{pixels.shape[:2]}, expected {case.shape}"
    if case.pixels is None:
        return ""
    if pixels.shape != case.pixels.shape:
        return f"shape {pixels.shape}, expected {case.pixels.shape}"
    off = int(np.abs(pixels.astype(int) - case.pixels).max())
    return f"off by {off}" if off > case.tolerance else ""


class Echo:
    """A renderer (protocols.Renderer) whose picture is the reference it was given."""

    name, min_references, max_references = "echo", 1, 1

    async def render(self, program: Program, references: Sequence[np.ndarray], seed: int) -> np.ndarray:
        return references[0]


def as_references(chosen: Sequence[Case], folder: Path) -> dict[str, str]:
    """Every file as the reference of a row that `render` draws; {case: what was wrong}."""
    from PIL import Image

    rows = []
    for i, case in enumerate(chosen):
        said = case.name.rpartition(".")[2] if " called x." in case.name else ("png", "jpg", "gif", "webp")[i % 4]
        file = folder / f"{i}.{said}"
        file.write_bytes(case.data)
        reference = {"img_id": "IMG_001", "local_path": file.name}
        rows.append({"id": i, "gen_prompt": "Draw.", "prompt": "Draw.", "reference_images": [reference]})
    (folder / "results.json").write_text(json.dumps(rows))
    read = read_rows(folder / "results.json")
    stamps = [time.monotonic()]
    with closing(Gallery(folder / "out", read, {})) as gallery:

        def progress(batch) -> None:
            stamps.append(time.monotonic())

        batch = asyncio.run(render_batch(read, gallery, Echo(), parallel=1, bases=(folder,), progress=progress))
    failures = {} if batch.ends.total() == len(chosen) else {"the batch": f"stopped: {batch.stopped}"}
    done = json.loads((folder / "out" / "results.json").read_text())
    for case, row, seconds in zip(chosen, done, np.diff(stamps[1:]), strict=True):
        pixels = None
        if row["success"]:
            with Image.open(row["output_path"]) as picture:
                large = case.pixels is None  # its shape will do, and memory is being measured
                pixels = np.broadcast_to(np.uint8(0), (*picture.size[::-1], 3)) if large else np.asarray(picture)
        stage, _, kind = row.get("image_failure", "").partition("/")
        said = wrong(case, pixels, kind)
        if pixels is None and stage != "reference":
            said = f"a failure of {stage!r}: {row['image_status'][:200]}"
        if seconds > SECONDS:
            said = f"took {seconds:.1f} s"
        if said:
            failures[case.name] = said
    return failures


def as_answers(chosen: Sequence[Case], server: LoopbackCanvas, path: str) -> dict[str, str]:
    """Every file as the picture that a service answers with; {case: what was wrong}."""
    limits = CallLimits(request_timeout_s=SECONDS, patience_s=0, attempts=1, break_after=1 << 30)
    if path == GENERATE:
        renderer: Renderer = ServiceRenderer([server.url], limits=limits)
    else:
        renderer = NanoBanana("k", base_url=server.gemini, limits=limits)
    program, reference = Program("Draw.", (Reference("IMG_001"),)), np.zeros((8, 8, 3), np.uint8)

    async def one(case: Case) -> str:
        await asyncio.to_thread(server.file, "case", case.data)
        await asyncio.to_thread(server.fault, path, "picture:case", 1)
        started = time.monotonic()
        try:
            said = wrong(case, await renderer.render(program, [reference], 0), "", scaled=False)
        except RenderError as error:
            said = wrong(case, None, error.kind)
        seconds = time.monotonic() - started
        return f"took {seconds:.1f} s" if seconds > SECONDS else said

    async def every() -> dict[str, str]:
        return {case.name: said for case in chosen if (said := await _guarded(one(case)))}

    return asyncio.run(every())


async def _guarded(checked) -> str:
    try:
        return await checked
    except Exception as error:
        return f"{type(error).__name__}: {error}"


WAYS = {"service": GENERATE, "gemini": GEMINI}
