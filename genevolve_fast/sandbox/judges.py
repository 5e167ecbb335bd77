"""Rule-based judges. The image judge sees pictures and checklist, the program judge sees program and checklist."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from genevolve_fast.protocols import ImageVerdict, JudgeError, ProgramVerdict
from genevolve_fast.sandbox import grammar
from genevolve_fast.sandbox.canvas import BOX, cell_centre, figure_mask, ink_on, text_mask
from genevolve_fast.sandbox.scene import CELL_SIZE, EMBLEMS, IMAGE_SIZE, PALETTE, SHAPES, Item, Scene, cell_box
from genevolve_fast.sandbox.world import RELATION_CELLS, row_cells
from genevolve_fast.trajectory import Diagnostic, Program, Request

_NEAR = 40  # two colours closer than this (sum of channel differences) are the same paint
_MATCH = 0.8  # share of common pixels (IoU) that makes a figure recognisable, unless another figure has more
_READABLE = 0.9  # the same of a word; then each letter must be the closest of the alphabet
_MARGIN = 8  # pixels a figure may reach over the frame
_VISIBLE = 0.6  # share of a cut-off figure that must lie within the frame
_IN_PLACE = 2  # pixels a figure may be off its cell's middle
_LEFT_OVER = 40  # pixels of paint that nothing on the checklist explains
_MUD = 25  # pixels of no palette colour that make a smear
_ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_SKILLS = ("quantity_counting", "text_rendering", "spatial_layout", "attribute_binding")


# --- seeing -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """A figure recognised at (x, y) with `share` of its pixels in common."""

    x: int
    y: int
    share: float


class Sight:
    """What a picture shows: its background, its paint, and where a given figure stands."""

    def __init__(self, picture: np.ndarray) -> None:
        if picture.shape != (IMAGE_SIZE, IMAGE_SIZE, 3) or picture.dtype != np.uint8:
            raise JudgeError(f"the picture must be uint8 [96, 96, 3], got {picture.dtype} {picture.shape}")
        self.pixels = picture.astype(np.int32)
        packed = self.pixels @ np.array([65536, 256, 1], dtype=np.int32)  # unique rows are ten times slower
        colours, counts = np.unique(packed, return_counts=True)
        ground = int(colours[counts.argmax()])
        self.ground = (ground >> 16, ground >> 8 & 255, ground & 255)
        self.painted = self._distance(self.ground) > _NEAR
        self.background = next((n for n, c in PALETTE.items() if _far(c, self.ground) <= _NEAR), None)
        self.explained = np.zeros((IMAGE_SIZE, IMAGE_SIZE), dtype=bool)

    def _distance(self, colour: Sequence[int]) -> np.ndarray:
        return np.abs(self.pixels - np.asarray(colour)).sum(-1)

    def find(
        self, mask: np.ndarray, colour: Sequence[int], rivals: Sequence[np.ndarray] = (), share: float = _MATCH
    ) -> list[Found]:
        """Every place where `mask` stands in `colour`, best first; found pixels count as explained.

        A place that one of `rivals` (masks of the same size) fits better shows the rival. A figure may be cut off at
        the frame: only its visible part is compared.
        """
        paint = (self._distance(colour) <= _NEAR) & self.painted
        if paint.sum() < share * _VISIBLE * mask.sum():
            return []
        paint = np.pad(paint, _MARGIN)
        score = _overlap(paint, mask)
        h, w = mask.shape
        out = []
        while (best := float(score.max())) >= share:
            y, x = (int(k) for k in np.unravel_index(int(score.argmax()), score.shape))
            if best == 1 or not any(_fits(paint, rival, y, x) > best for rival in rivals):
                out.append(Found(x - _MARGIN + w // 2, y - _MARGIN + h // 2, best))
                self._explain(mask, y - _MARGIN, x - _MARGIN)
            score[max(0, y - h // 2) : y + h // 2 + 1, max(0, x - w // 2) : x + w // 2 + 1] = 0
        return out

    def _explain(self, mask: np.ndarray, top: int, left: int) -> None:
        """Mark a found figure, one pixel wider than it is."""
        h, w = mask.shape
        grown = np.pad(mask, 1)
        grown = grown | np.roll(grown, 1, 0) | np.roll(grown, -1, 0) | np.roll(grown, 1, 1) | np.roll(grown, -1, 1)
        t, l = top - 1, left - 1
        t0, l0, b, r = max(0, t), max(0, l), min(IMAGE_SIZE, t + h + 2), min(IMAGE_SIZE, l + w + 2)
        self.explained[t0:b, l0:r] |= grown[t0 - t : b - t, l0 - l : r - l]

    def left_over(self) -> int:
        return int((self.painted & ~self.explained).sum())

    def flaws(self) -> list[str]:
        """Kinds of untidiness: cut off at the frame, straying over cell borders, smeared."""
        p, found = self.painted, []
        if p[0].any() or p[-1].any() or p[:, 0].any() or p[:, -1].any():
            found.append("something is cut off at the frame")
        borders = [k * CELL_SIZE + d for k in (1, 2) for d in (-1, 0)]
        if any((p[b - 1] & p[b]).any() or (p[:, b - 1] & p[:, b]).any() for b in borders):
            found.append("something strays out of its place")
        palette = np.stack([self._distance(c) for c in PALETTE.values()]).min(0)
        if int((self.painted & (palette > _NEAR)).sum()) > _MUD:
            found.append("something is smeared")
        return found

    def cell(self, name: str) -> np.ndarray:
        left, top, right, bottom = cell_box(name)
        return self.painted[top:bottom, left:right]


def _far(a: Sequence[int], b: Sequence[int]) -> int:
    return sum(abs(x - y) for x, y in zip(a, b, strict=True))


_PADDED = IMAGE_SIZE + 2 * _MARGIN


def _overlap(paint: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """IoU of `mask` and the paint in its box, at every place of the padded picture, by FFT."""
    shape = (_PADDED, _PADDED)
    spectrum = np.fft.rfft2(paint.astype(np.float64))
    place, box = (np.conj(np.fft.rfft2(m.astype(np.float64), shape)) for m in (mask, np.ones(mask.shape)))
    h, w = mask.shape
    common, boxed, visible = (
        np.rint(np.fft.irfft2(x, shape)[: _PADDED - h + 1, : _PADDED - w + 1])
        for x in (spectrum * place, spectrum * box, _frame_spectrum() * place)
    )
    share = common / np.maximum(1, boxed + visible - common)
    return np.where(visible >= _VISIBLE * mask.sum(), share, 0)


@lru_cache(maxsize=1)
def _frame_spectrum() -> np.ndarray:
    return np.fft.rfft2(_frame().astype(np.float64))


@lru_cache(maxsize=1)
def _frame() -> np.ndarray:
    return np.pad(np.ones((IMAGE_SIZE, IMAGE_SIZE), dtype=bool), _MARGIN)


def _fits(paint: np.ndarray, mask: np.ndarray, top: int, left: int) -> float:
    """IoU of `mask` and the padded paint at one place or a pixel beside it."""
    h, w = mask.shape
    shares = []
    for t in range(max(0, top - 1), min(_PADDED - h, top + 1) + 1):
        for l in range(max(0, left - 1), min(_PADDED - w, left + 1) + 1):
            box = slice(t, t + h), slice(l, l + w)
            shares.append(_iou(paint[box], mask & _frame()[box]))
    return max(shares)


@lru_cache(maxsize=64)
def _figure(name: str) -> np.ndarray:
    return figure_mask(name, BOX)


@lru_cache(maxsize=16)
def _others(name: str, among: tuple[str, ...]) -> tuple[np.ndarray, ...]:
    return tuple(_figure(other) for other in among if other != name)


@lru_cache(maxsize=512)
def _word(text: str) -> np.ndarray:
    return text_mask(text)


# --- the image judge --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seen:
    """One checklist item: whether it is in the picture, and whether in its place."""

    item: Item
    present: bool
    in_place: bool
    letters_wrong: int = 0  # of a text in its place


def _stands(found: Sequence[Found], cell: str) -> bool:
    x, y = cell_centre(cell)
    return any(abs(f.x - x) <= _IN_PLACE and abs(f.y - y) <= _IN_PLACE for f in found)


class SandboxImageJudge:
    """protocols.ImageJudge: sees picture, ground truth and checklist, never the program or the canvas."""

    async def judge(self, request: Request, image: np.ndarray, truth: np.ndarray) -> ImageVerdict:
        """Scores and diagnostics. Raises JudgeError for a request without checklist or a picture of another size."""
        if "checklist" not in request.extra:
            raise JudgeError(f"request {request.id} has no checklist")
        return judge_picture(Scene.from_json(request.extra["checklist"]), image, truth)


def judge_picture(scene: Scene, image: np.ndarray, truth: np.ndarray) -> ImageVerdict:
    sight = Sight(image)
    seen, surplus = look(scene, sight, Sight(truth))
    texts = [s for s in seen if s.item.kind == "text"]
    others = [s for s in seen if s.item.kind != "text"]
    extra = surplus or sight.left_over() > _LEFT_OVER
    right_ground = sight.background == scene.background
    flaws = sight.flaws()
    checks = [s.in_place for s in others] + [right_ground]
    return ImageVerdict(
        faithfulness=_graded(sum(s.present for s in seen), len(seen), perfect=not extra),
        visual_correctness=_graded(sum(checks), len(checks)),
        text_accuracy=_text_score(texts),
        aesthetics=(1.0, 0.5, 0.0)[min(2, len(flaws))],
        text_required=bool(texts),
        diagnostics=tuple(_image_diagnostics(seen, surplus, flaws)),
    )


def look(scene: Scene, sight: Sight, truth: Sight) -> tuple[list[Seen], bool]:
    """What of the checklist the picture shows, and whether it shows more of something than was asked."""
    wanted = Counter((i.kind, i.value, i.colour) for i in scene.items)
    found: dict[tuple[str, str, str], list[Found]] = {}
    for kind, value, colour in wanted:
        if kind == "text":
            places = sight.find(_word(value), ink_on(sight.ground), share=_READABLE)
            found[kind, value, colour] = [f for f in places if not _misspelt(value, sight, f.x, f.y)]
        elif kind == "emblem":
            figure = _emblem_of(truth, next(i.cell for i in scene.items if i.value == value and i.kind == kind))
            found[kind, value, colour] = sight.find(figure, PALETTE[colour], _others(value, EMBLEMS))
        else:
            found[kind, value, colour] = sight.find(_figure(value), PALETTE[colour], _others(value, SHAPES))
    remaining = {key: len(places) for key, places in found.items()}
    seen = []
    for item in scene.items:
        key = (item.kind, item.value, item.colour)
        in_place = _stands(found[key], item.cell)
        wrong = 0 if item.kind != "text" or in_place else letters_wrong(item, sight)
        readable = item.kind == "text" and wrong <= len(item.value) // 2
        present = remaining[key] > 0 or readable
        remaining[key] -= 1
        seen.append(Seen(item, present, in_place, wrong))
    return seen, any(len(found[key]) > n for key, n in wanted.items())


def _emblem_of(truth: Sight, cell: str) -> np.ndarray:
    """The figure that the ground truth shows in `cell`, as a 26-pixel mask."""
    edge = (CELL_SIZE - BOX) // 2
    return truth.cell(cell)[edge : edge + BOX, edge : edge + BOX]


def letters_wrong(item: Item, sight: Sight) -> int:
    """How many letters of a text differ from what stands in its cell (all of them where nothing does)."""
    x, y = cell_centre(item.cell)
    wrong = _misspelt(item.value, sight, x, y)
    if wrong < len(item.value):
        height, width = _word(item.value).shape
        top, left = y - height // 2, x - width // 2
        sight.explained[top - 1 : top + height + 1, left - 1 : left + width + 1] = True
    return wrong


def _misspelt(text: str, sight: Sight, x: int, y: int) -> int:
    """How many letters of `text`, centred at (x, y), are not the closest of the alphabet to the paint there."""
    height, width = _word(text).shape
    advance = width // len(text)
    painted = np.pad(sight.painted, _MARGIN)
    top, left = y - height // 2 + _MARGIN, x - width // 2 + _MARGIN
    wrong = 0
    for i, letter in enumerate(text):
        box = slice(top, top + height), slice(left + i * advance, left + (i + 1) * advance)
        shares = {c: _iou(painted[box], _glyph(c, advance) & _frame()[box]) for c in {*_ALPHABET, letter}}
        wrong += shares[letter] < _MATCH or shares[letter] < max(shares.values())
    return wrong


@lru_cache(maxsize=64)
def _glyph(letter: str, advance: int) -> np.ndarray:
    """One letter, `advance` pixels wide."""
    mask = _word(letter)[:, :advance]
    return np.pad(mask, ((0, 0), (0, advance - mask.shape[1])))


def _iou(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / max(1, (a | b).sum()))


def _graded(right: int, total: int, perfect: bool = True) -> float:
    if right == total and perfect:
        return 1.0
    return 0.5 if right * 2 >= total else 0.0


def _text_score(texts: Sequence[Seen]) -> float:
    if not texts or all(s.in_place for s in texts):
        return 1.0 if texts else 0.5
    some_exact = any(s.in_place for s in texts)
    return 0.5 if some_exact or all(s.letters_wrong <= 1 for s in texts) else 0.0


def _verdict(right: int, total: int) -> str:
    return "pass" if right == total else "partial" if right else "fail"


def _image_diagnostics(seen: Sequence[Seen], surplus: bool, flaws: Sequence[str]) -> list[Diagnostic]:
    """One verdict a skill; the evidence counts, it never says what the truth is."""
    texts = [s for s in seen if s.item.kind == "text"]
    figures = [s for s in seen if s.item.kind != "text"]
    repeated = Counter((s.item.value, s.item.colour) for s in figures)
    counted = [s for s in figures if repeated[s.item.value, s.item.colour] > 1]
    rows: dict[str, tuple[int, int, str]] = {}
    if counted:
        there = sum(s.present for s in counted)
        rows["quantity_counting"] = (
            there - (there == len(counted) and surplus),
            len(counted),
            "counted objects are there",
        )
    if texts:
        rows["text_rendering"] = (sum(s.in_place for s in texts), len(texts), "texts are exact and in place")
    if len(figures) > 1:
        rows["spatial_layout"] = (sum(s.in_place for s in figures), len(figures), "objects stand in their place")
    if figures:
        rows["attribute_binding"] = (
            sum(s.present for s in figures),
            len(figures),
            "objects have their shape and colour",
        )
    return _diagnostics("image", rows, "; ".join(flaws))


def _diagnostics(judge: str, rows: dict[str, tuple[int, int, str]], remark: str = "") -> list[Diagnostic]:
    out = []
    for skill in _SKILLS:
        if skill not in rows:
            out.append(Diagnostic(judge, skill, "not applicable", "The request does not ask for it."))
            continue
        right, total, what = rows[skill]
        evidence = f"{max(0, right)} of {total} {what}{'; ' + remark if remark else ''}."
        out.append(Diagnostic(judge, skill, _verdict(max(0, right), total), evidence))
    return out


# --- the program judge ------------------------------------------------------------------------------------------------


class SandboxProgramJudge:
    """protocols.ProgramJudge: would a strong generator, which understands what it reads, have all it needs?"""

    async def judge(self, request: Request, program: Program) -> ProgramVerdict:
        """Score and diagnostics. Raises JudgeError for a request without checklist."""
        if "checklist" not in request.extra:
            raise JudgeError(f"request {request.id} has no checklist")
        scene = Scene.from_json(request.extra["checklist"])
        return judge_program(scene, program, str(request.extra.get("entity", "")))


@dataclass(frozen=True)
class Stated:
    """One item a program asks for, as a strong generator reads it; unknown parts are None."""

    kind: str
    value: str | None
    colour: str | None
    cell: str | None


def judge_program(scene: Scene, program: Program, entity: str) -> ProgramVerdict:
    """Share of the checklist's facts (ground, what, where) the program states, less its wrong items, in quarters."""
    statements = grammar.parse(program.gen_prompt)
    grounds = [s.colour for s in statements if isinstance(s, grammar.Background)]
    stated = [item for s in statements for item in _read(s, program, entity)] + _related(statements)
    facts, total = int(bool(grounds) and grounds[-1] == scene.background), 1
    named, placed, pool = [], [], list(stated)
    for item in scene.items:
        match = _best_match(item, pool)
        if match is not None:
            pool.remove(match)
        named.append(match is not None)
        placed.append(match is not None and match.cell == item.cell)
        total += 2
        facts += named[-1] + placed[-1]
    score = max(0, facts - len(pool)) / total
    return ProgramVerdict(int(score * 4 + 1e-9) / 4, tuple(_program_diagnostics(scene, named, placed, pool)))


def _read(s: grammar.Statement, program: Program, entity: str) -> list[Stated]:
    match s:
        case grammar.Object() if not s.relation:
            return [Stated("object", s.shape, s.colour, s.cell)]
        case grammar.Group():
            cells = row_cells(s.row, s.count) if s.row and s.count in (2, 3) else [None] * s.count
            return [Stated("object", s.shape, s.colour, cell) for cell in cells]
        case grammar.Text():
            return [Stated("text", s.value, None, s.cell)]
        case grammar.Emblem():
            bound = s.reference is not None and s.reference < len(program.reference_images)
            reference = program.reference_images[s.reference] if bound else None
            right = reference is not None and reference.title == f"emblem of {entity}"
            return [Stated("emblem", entity if right else None, None, s.cell)]
    return []


def _related(statements: Sequence[grammar.Statement]) -> list[Stated]:
    """Objects placed beside each other: a strong generator works the places out."""
    objects = [s for s in statements if isinstance(s, grammar.Object) and s.relation]
    out = []
    for a, b in zip(objects[::2], objects[1::2], strict=False):
        cells = RELATION_CELLS[a.relation]
        out += [Stated("object", o.shape, o.colour, o.cell or cell) for o, cell in zip((a, b), cells, strict=True)]
    return out + [Stated("object", o.shape, o.colour, o.cell) for o in objects[len(objects) // 2 * 2 :]]


def _best_match(item: Item, pool: Sequence[Stated]) -> Stated | None:
    """The stated item that means `item`, one in the same place first."""
    if item.kind == "text":
        fitting = [s for s in pool if s.kind == "text" and s.value == item.value]
    elif item.kind == "emblem":
        fitting = [s for s in pool if s.kind == "emblem" and s.value]
    else:
        fitting = [s for s in pool if (s.kind, s.value, s.colour) == ("object", item.value, item.colour)]
    return next((s for s in fitting if s.cell == item.cell), fitting[0] if fitting else None)


def _program_diagnostics(
    scene: Scene, named: Sequence[bool], placed: Sequence[bool], wrong: Sequence[Stated]
) -> list[Diagnostic]:
    kinds = [i.kind for i in scene.items]
    texts = [k for k, kind in enumerate(kinds) if kind == "text"]
    figures = [k for k, kind in enumerate(kinds) if kind != "text"]
    repeated = Counter((i.value, i.colour) for i in scene.items if i.kind == "object")
    counted = [k for k in figures if repeated[scene.items[k].value, scene.items[k].colour] > 1]
    rows = {}
    if counted:
        rows["quantity_counting"] = (sum(named[k] for k in counted), len(counted), "counted objects are asked for")
    if texts:
        rows["text_rendering"] = (sum(placed[k] for k in texts), len(texts), "texts are quoted with their place")
    if len(figures) > 1:
        rows["spatial_layout"] = (sum(placed[k] for k in figures), len(figures), "objects are given their place")
    if figures:
        rows["attribute_binding"] = (sum(named[k] for k in figures), len(figures), "objects are named as requested")
    return _diagnostics("program", rows, f"{len(wrong)} things were not asked for" if wrong else "")
