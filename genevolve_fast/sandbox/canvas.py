"""The canvas: draws a program with Pillow, and fails as real generators do unless the prompt prevents it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from genevolve_fast.protocols import RenderError
from genevolve_fast.sandbox import grammar
from genevolve_fast.sandbox.scene import CELL_SIZE, CELLS, EMBLEMS, IMAGE_SIZE, PALETTE, SHAPES, Item, Scene, cell_box
from genevolve_fast.trajectory import Program

BOX = 26  # pixels of a cell that a figure fills
UNPAINTED = (225, 225, 225)  # background of a prompt that names none
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_REFERENCE_BOX = 72  # an emblem fills this much of its 96-pixel reference picture
Colour = tuple[int, int, int]


# --- figures ----------------------------------------------------------------------------------------------------------


def figure_mask(name: str, size: int) -> np.ndarray:
    """bool [size, size]: the pixels of a shape or emblem. Drawn large and reduced, so that edges are even."""
    scale = 8
    big = Image.new("L", (size * scale, size * scale), 0)
    _FIGURES[name](ImageDraw.Draw(big), size * scale)
    return np.asarray(big.resize((size, size), Image.Resampling.BOX)) > 127


def _polar(n: int, radius: float, turn: float = -math.pi / 2) -> list[tuple[float, float]]:
    return [
        (math.cos(turn + 2 * math.pi * i / n) * radius, math.sin(turn + 2 * math.pi * i / n) * radius) for i in range(n)
    ]


class _Pen:
    """Draws in coordinates from -1 to 1, ink 255, erased 0."""

    def __init__(self, draw: ImageDraw.ImageDraw, size: int) -> None:
        self.draw, self.half = draw, size / 2

    def _at(self, points):
        return [(self.half * (1 + x), self.half * (1 + y)) for x, y in points]

    def polygon(self, *points, ink: int = 255) -> None:
        self.draw.polygon(self._at(points), fill=ink)

    def box(self, left, top, right, bottom, ink: int = 255) -> None:
        self.polygon((left, top), (right, top), (right, bottom), (left, bottom), ink=ink)

    def disc(self, x, y, radius, ink: int = 255) -> None:
        (l, t), (r, b) = self._at([(x - radius, y - radius), (x + radius, y + radius)])
        self.draw.ellipse((l, t, r, b), fill=ink)

    def line(self, *points, width: float, ink: int = 255) -> None:
        self.draw.line(self._at(points), fill=ink, width=int(width * self.half), joint="curve")

    def arc(self, x, y, radius, start, stop, width: float) -> None:
        (l, t), (r, b) = self._at([(x - radius, y - radius), (x + radius, y + radius)])
        self.draw.arc((l, t, r, b), start, stop, fill=255, width=int(width * self.half))


def _figure(paint):
    return lambda draw, size: paint(_Pen(draw, size))


def _star(p: _Pen, points: int, inner: float, outer: float = 0.98) -> None:
    a, b = _polar(points, outer), _polar(points, inner, -math.pi / 2 + math.pi / points)
    p.polygon(*[q for pair in zip(a, b, strict=True) for q in pair])


def _ring(p: _Pen) -> None:
    p.disc(0, 0, 0.95)
    p.disc(0, 0, 0.5, ink=0)


def _anchor(p: _Pen) -> None:
    p.box(-0.1, -0.6, 0.1, 0.85)
    p.box(-0.45, -0.38, 0.45, -0.2)
    p.arc(0, 0.05, 0.85, 15, 165, 0.22)
    p.disc(0, -0.72, 0.24)
    p.disc(0, -0.72, 0.09, ink=0)
    p.polygon((-0.98, 0.42), (-0.86, 0.0), (-0.56, 0.36))
    p.polygon((0.98, 0.42), (0.86, 0.0), (0.56, 0.36))


def _arrow(p: _Pen) -> None:
    p.box(-0.16, -0.3, 0.16, 0.95)
    p.polygon((0, -0.98), (0.7, -0.15), (-0.7, -0.15))


def _chevron(p: _Pen) -> None:
    for y in (-0.75, 0.05):
        p.polygon((0, y), (0.9, y + 0.55), (0.9, y + 0.92), (0, y + 0.37), (-0.9, y + 0.92), (-0.9, y + 0.55))


def _cross(p: _Pen) -> None:
    p.box(-0.26, -0.95, 0.26, 0.95)
    p.box(-0.95, -0.26, 0.95, 0.26)


def _crown(p: _Pen) -> None:
    p.polygon((-0.9, 0.8), (-0.9, -0.6), (-0.45, 0.05), (0, -0.85), (0.45, 0.05), (0.9, -0.6), (0.9, 0.8))
    p.box(-0.9, 0.42, 0.9, 0.54, ink=0)


def _crescent(p: _Pen) -> None:
    p.disc(-0.02, 0, 0.93)
    p.disc(0.36, -0.12, 0.74, ink=0)


def _key(p: _Pen) -> None:
    p.disc(-0.5, 0, 0.46)
    p.disc(-0.5, 0, 0.2, ink=0)
    p.box(-0.1, -0.13, 0.97, 0.13)
    p.box(0.72, 0.1, 0.95, 0.58)
    p.box(0.38, 0.1, 0.58, 0.46)


def _leaf(p: _Pen) -> None:
    upper = [(x / 10, -0.62 * math.cos(x / 10 * math.pi / 2)) for x in range(-10, 11)]
    lower = [(x, -y) for x, y in reversed(upper)]
    turn = lambda x, y: ((x - y) * 0.7071, (x + y) * 0.7071)  # noqa: E731
    p.polygon(*(turn(x, -y) for x, y in upper + lower))
    p.line(turn(-0.85, 0), turn(0.75, 0), width=0.1, ink=0)


def _sun(p: _Pen) -> None:
    _star(p, 8, 0.5)
    p.disc(0, 0, 0.62)
    p.disc(0, 0, 0.3, ink=0)


def _tower(p: _Pen) -> None:
    p.polygon((-0.5, 0.95), (-0.4, -0.35), (0.4, -0.35), (0.5, 0.95))
    for left in (-0.65, -0.2, 0.25):
        p.box(left, -0.92, left + 0.4, -0.3)
    p.box(-0.65, -0.6, 0.65, -0.3)
    p.box(-0.16, 0.45, 0.16, 0.95, ink=0)


def _wave(p: _Pen) -> None:
    for y in (-0.62, 0.0, 0.62):
        p.line(*((x / 20, y + 0.2 * math.sin(x / 20 * math.pi * 2)) for x in range(-19, 20)), width=0.24)


def _hourglass(p: _Pen) -> None:
    p.polygon((-0.75, -0.85), (0.75, -0.85), (0.08, 0), (0.75, 0.85), (-0.75, 0.85), (-0.08, 0))
    p.box(-0.85, -0.97, 0.85, -0.75)
    p.box(-0.85, 0.75, 0.85, 0.97)


_FIGURES = {
    "circle": _figure(lambda p: p.disc(0, 0, 0.95)),
    "square": _figure(lambda p: p.box(-0.84, -0.84, 0.84, 0.84)),
    "triangle": _figure(lambda p: p.polygon((0, -0.95), (0.98, 0.85), (-0.98, 0.85))),
    "star": _figure(lambda p: _star(p, 5, 0.42)),
    "diamond": _figure(lambda p: p.polygon((0, -0.98), (0.7, 0), (0, 0.98), (-0.7, 0))),
    "ring": _figure(_ring),
    "anchor": _figure(_anchor),
    "arrow": _figure(_arrow),
    "chevron": _figure(_chevron),
    "cross": _figure(_cross),
    "crown": _figure(_crown),
    "crescent": _figure(_crescent),
    "key": _figure(_key),
    "leaf": _figure(_leaf),
    "sun": _figure(_sun),
    "tower": _figure(_tower),
    "wave": _figure(_wave),
    "hourglass": _figure(_hourglass),
}


def text_mask(text: str) -> np.ndarray:
    """bool [height, width]: `text` in Pillow's built-in bitmap font, trimmed to its line box."""
    font = ImageFont.load_default_imagefont()
    left, top, right, bottom = font.getbbox(text)
    picture = Image.new("1", (max(1, int(right - left)), max(1, int(bottom - top))), 0)
    ImageDraw.Draw(picture).text((-left, -top), text, font=font, fill=1)
    return np.asarray(picture)


def ink_on(background: Colour) -> Colour:
    """Black or white, whichever the background lets one read."""
    luminance = 0.299 * background[0] + 0.587 * background[1] + 0.114 * background[2]
    return PALETTE["black"] if luminance > 110 else PALETTE["white"]


def stamp(picture: np.ndarray, mask: np.ndarray, colour: Colour | np.ndarray, centre: tuple[int, int]) -> None:
    """Paint `colour` (one, or [h, w, 3]) where `mask` holds, centred at (x, y); what leaves the frame is cut off."""
    h, w = mask.shape
    top, left = centre[1] - h // 2, centre[0] - w // 2
    t, l = max(0, top), max(0, left)
    b, r = min(IMAGE_SIZE, top + h), min(IMAGE_SIZE, left + w)
    if t >= b or l >= r:
        return
    part = mask[t - top : b - top, l - left : r - left]
    paint = colour[t - top : b - top, l - left : r - left][part] if isinstance(colour, np.ndarray) else colour
    picture[t:b, l:r][part] = paint


def cell_centre(cell: str) -> tuple[int, int]:
    left, top, right, bottom = cell_box(cell)
    return (left + right) // 2, (top + bottom) // 2


# --- pictures ---------------------------------------------------------------------------------------------------------


def blank(colour: Colour) -> np.ndarray:
    return np.full((IMAGE_SIZE, IMAGE_SIZE, 3), colour, dtype=np.uint8)


def draw_reference(emblem: str, colour: str) -> np.ndarray:
    """uint8 [96, 96, 3]: the emblem, large, on white, in a thin frame of its colour."""
    picture = blank((255, 255, 255))
    stamp(picture, figure_mask(emblem, _REFERENCE_BOX), PALETTE[colour], (IMAGE_SIZE // 2, IMAGE_SIZE // 2))
    return picture


def copy_reference(picture: np.ndarray, reference: np.ndarray, centre: tuple[int, int]) -> None:
    """Copy what is not white in the middle of a reference picture, reduced to a cell's box."""
    edge = (IMAGE_SIZE - _REFERENCE_BOX) // 2
    middle = Image.fromarray(np.ascontiguousarray(reference[edge:-edge, edge:-edge]))
    small = np.asarray(middle.resize((BOX, BOX), Image.Resampling.NEAREST))
    stamp(picture, (small < 250).any(-1), small, centre)


def draw_map(seed: str) -> np.ndarray:
    """uint8 [96, 96, 3]: a small map of sea, land, hills and a road; the distractor among image results."""
    random = np.random.default_rng(int.from_bytes(hashlib.blake2b(seed.encode(), digest_size=8).digest(), "big"))
    big = Image.new("RGB", (IMAGE_SIZE * 2, IMAGE_SIZE * 2), (168, 200, 214))
    draw = ImageDraw.Draw(big)
    size = IMAGE_SIZE * 2
    coast = [
        (x, size * (0.3 + 0.12 * math.sin(x / size * 5 + random.random()) + 0.05 * random.random()))
        for x in range(0, size + 8, 8)
    ]
    draw.polygon([*coast, (size, size), (0, size)], fill=(206, 214, 166))
    for _ in range(6):
        x, y, r = random.integers(0, size), random.integers(size // 2, size), random.integers(12, 30)
        draw.ellipse((x - r, y - r // 2, x + r, y + r // 2), fill=(170, 190, 132))
    road = [
        (int(x), int(size * (0.75 + 0.12 * math.sin(x / size * 4 + random.random() * 0.3))))
        for x in range(0, size + 12, 12)
    ]
    draw.line(road, fill=(246, 240, 220), width=7)
    for x, y in road[2::6]:
        draw.rectangle((x - 5, y - 20, x + 5, y - 10), fill=(150, 90, 70))
    return np.asarray(big.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.LANCZOS)).copy()


def draw_item(picture: np.ndarray, item: Item, background: Colour, centre: tuple[int, int] | None = None) -> None:
    """Draw one item crisply, in the middle of its cell unless `centre` says otherwise."""
    centre = centre or cell_centre(item.cell)
    if item.kind == "text":
        stamp(picture, text_mask(item.value), ink_on(background), centre)
    elif item.kind == "emblem":
        copy_reference(picture, draw_reference(item.value, item.colour), centre)
    else:
        stamp(picture, figure_mask(item.value, BOX), PALETTE[item.colour], centre)


def draw_scene(scene: Scene) -> np.ndarray:
    """uint8 [96, 96, 3]: the picture that a perfect program gives."""
    background = PALETTE[scene.background]
    picture = blank(background)
    for item in scene.items:
        draw_item(picture, item, background)
    return picture


# --- the renderer -----------------------------------------------------------------------------------------------------


class _Chance:
    """Choices that depend on the program and the seed only."""

    def __init__(self, *parts: object) -> None:
        self._key = repr(parts).encode()
        self._count = 0

    def below(self, n: int) -> int:
        self._count += 1
        digest = hashlib.blake2b(self._key + b"/" + str(self._count).encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") % n

    def pick(self, options: Sequence):
        return options[self.below(len(options))]


class CanvasRenderer:
    """Draws programs in the sandbox's controlled English (docs/sandbox.md); implements protocols.Renderer."""

    name = "canvas"
    min_references = 0
    max_references = 2

    async def render(self, program: Program, references: Sequence[np.ndarray], seed: int) -> np.ndarray:
        """uint8 [96, 96, 3]. Raises RenderError when the references' pixels are not those of the program."""
        if len(references) != len(program.reference_images):
            raise RenderError(f"{len(program.reference_images)} references in the program, {len(references)} given")
        return draw_program(program.gen_prompt, references, seed)


def draw_program(prompt: str, references: Sequence[np.ndarray], seed: int) -> np.ndarray:
    """Draw what the prompt says; whatever it leaves open or entangles comes out wrong, the same way every time."""
    statements = grammar.parse(prompt)
    chance = _Chance(prompt, seed)
    named = [s.colour for s in statements if isinstance(s, grammar.Background)]
    background = PALETTE[named[-1]] if named else UNPAINTED
    picture = blank(background)
    shared = [s for s in statements if isinstance(s, grammar.Object) and s.shared]
    leaked = dict(zip(map(id, shared), _leak([s.colour for s in shared]), strict=True))
    for s in statements:
        match s:
            case grammar.Object():
                _draw_object(picture, s, leaked.get(id(s), s.colour), background, chance)
            case grammar.Group():
                _draw_group(picture, s, background, chance)
            case grammar.Text():
                _draw_text(picture, s, background, chance)
            case grammar.Emblem():
                _draw_emblem(picture, s, references, chance)
            case grammar.Unreadable():
                _smear(picture, _loose_centre(chance))
    return picture


def _leak(colours: Sequence[str]) -> list[str]:
    """Colours of objects that share a sentence move on by one; equal colours leave nothing to leak."""
    return [*colours[1:], *colours[:1]]


def _loose_centre(chance: _Chance, row: int | None = None) -> tuple[int, int]:
    """Somewhere that is no cell's middle: 6 to 9 pixels off in both directions."""
    cells = [c for c, (r, _) in CELLS.items() if row is None or r == row]
    x, y = cell_centre(chance.pick(cells))
    return x + (6 + chance.below(4)) * chance.pick((-1, 1)), y + (6 + chance.below(4)) * chance.pick((-1, 1))


def _draw_object(picture, s: grammar.Object, colour: str, background: Colour, chance: _Chance) -> None:
    loose = s.cell is None or s.relation is not None
    centre = _loose_centre(chance) if loose else cell_centre(s.cell)
    stamp(picture, figure_mask(s.shape, BOX), PALETTE[colour], centre)


def _draw_group(picture, s: grammar.Group, background: Colour, chance: _Chance) -> None:
    row = {"top": 0, "middle": 1, "bottom": 2}.get(s.row or "")
    for _ in range(s.count + chance.pick((-1, 1))):
        stamp(picture, figure_mask(s.shape, BOX), PALETTE[s.colour], _loose_centre(chance, row))


def _draw_text(picture, s: grammar.Text, background: Colour, chance: _Chance) -> None:
    garbled = s.shared or s.cell is None
    value = _garble(s.value, chance) if garbled else s.value
    centre = cell_centre(s.cell) if s.cell else _loose_centre(chance)
    stamp(picture, text_mask(value[:14]), ink_on(background), centre)


def _garble(text: str, chance: _Chance) -> str:
    """At least one letter becomes another; longer texts lose two."""
    letters = list(text)
    for _ in range(1 + (len(letters) > 2)):
        i = chance.below(len(letters))
        letters[i] = chance.pick([c for c in _LETTERS if c != letters[i] and c != text[i]])
    return "".join(letters)


def _draw_emblem(picture, s: grammar.Emblem, references: Sequence[np.ndarray], chance: _Chance) -> None:
    centre = cell_centre(s.cell) if s.cell else _loose_centre(chance)
    if s.reference is None:
        _invent_emblem(picture, references, centre, chance)
    elif s.reference >= len(references):
        _smear(picture, centre)
    else:
        copy_reference(picture, _as_canvas(references[s.reference]), centre)


def _as_canvas(reference: np.ndarray) -> np.ndarray:
    if reference.shape == (IMAGE_SIZE, IMAGE_SIZE, 3):
        return reference
    return np.asarray(Image.fromarray(reference).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX))


def _invent_emblem(picture, references: Sequence[np.ndarray], centre: tuple[int, int], chance: _Chance) -> None:
    """An emblem nobody asked for: never one whose picture was given."""
    for _ in range(32):
        invented = draw_reference(chance.pick(EMBLEMS), chance.pick([c for c in PALETTE if c != "white"]))
        if not any(np.array_equal(invented, r) for r in references):
            break
    copy_reference(picture, invented, centre)


def _smear(picture: np.ndarray, centre: tuple[int, int]) -> None:
    cloud = Image.new("L", (CELL_SIZE, CELL_SIZE), 0)
    ImageDraw.Draw(cloud).ellipse((6, 9, 26, 23), fill=190)
    weight = np.asarray(cloud.filter(ImageFilter.GaussianBlur(3)), dtype=np.float32) / 255
    left, top = centre[0] - CELL_SIZE // 2, centre[1] - CELL_SIZE // 2
    t, l, b, r = max(0, top), max(0, left), min(IMAGE_SIZE, top + CELL_SIZE), min(IMAGE_SIZE, left + CELL_SIZE)
    w = weight[t - top : b - top, l - left : r - left, None]
    picture[t:b, l:r] = (picture[t:b, l:r] * (1 - w) + 128 * w).astype(np.uint8)


assert set(_FIGURES) == {*SHAPES, *EMBLEMS}
