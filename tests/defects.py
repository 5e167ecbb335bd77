"""Scenes with one known defect, and what each judge dimension must say of them, worked out from the scene alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import numpy as np

from genevolve_fast.sandbox.canvas import (
    _LETTERS,
    BOX,
    _garble,
    _smear,
    blank,
    cell_centre,
    draw_item,
    figure_mask,
    text_mask,
)
from genevolve_fast.sandbox.canvas import _Chance as Chance
from genevolve_fast.sandbox.scene import CELLS, EMBLEMS, PALETTE, SHAPES, Item, Scene
from genevolve_fast.sandbox.world import SandboxWorld

DEFECTS = (
    "none",
    "missing",
    "extra",
    "wrong colour",
    "wrong shape",
    "wrong place",
    "garbled text",
    "missing text",
    "wrong emblem",
    "wrong background",
    "straying",
    "smear",
    "cut off",
    "lookalike shape",
    "lookalike letter",
)


_KINDS = {  # what a defect needs
    "garbled text": "text",
    "missing text": "text",
    "lookalike letter": "text",
    "wrong emblem": "emblem",
    "wrong shape": "object",
    "lookalike shape": "object",
}


@dataclass(frozen=True)
class Case:
    """A picture of `scene` with one defect, and the true scores."""

    scene: Scene
    defect: str
    picture: np.ndarray
    truth: dict[str, float]


def cases(count: int, seed: int = 0) -> list[Case]:
    """`count` cases over all defects that their scenes can have."""
    random = np.random.default_rng(seed)
    requests = SandboxWorld().requests("train", count * 3, seed=seed + 77)
    out: list[Case] = []
    for r in requests:
        if len(out) == count:
            break
        turn, k = divmod(len(out), len(DEFECTS))
        defect = DEFECTS[(k + turn) % len(DEFECTS)]  # moves on each turn: the templates repeat in a fixed order too
        case = make(Scene.from_json(r.extra["checklist"]), defect, random)
        if case is None:
            case = make(Scene.from_json(r.extra["checklist"]), "wrong background", random)
        out.append(case)
    return out


def make(scene: Scene, defect: str, random: np.random.Generator) -> Case | None:
    """The scene with `defect`, or None where it cannot have it."""
    wanted = _KINDS.get(defect)
    able = [k for k, i in enumerate(scene.items) if wanted in (None, i.kind)]
    if defect == "cut off":
        able = [k for k, i in enumerate(scene.items) if i.kind != "text" and i.cell != "center"]
    if defect == "wrong colour":
        able = [k for k in able if scene.items[k].kind != "text"]
    if not able and defect not in ("none", "extra", "wrong background", "smear"):
        return None
    at = able[int(random.integers(len(able)))] if able else 0
    free = [c for c in CELLS if c not in {i.cell for i in scene.items}]
    shown, ground, moved, garbled = list(scene.items), scene.background, None, None
    spare = [c for c in PALETTE if c != ground and c not in {i.colour for i in scene.items}]
    pick = lambda options: options[int(random.integers(len(options)))]  # noqa: E731
    match defect:
        case "missing" | "missing text":
            del shown[at]
        case "extra":
            shown.append(Item("object", pick(SHAPES), pick(free), pick(spare)))
        case "wrong colour":
            shown[at] = replace(shown[at], colour=pick(spare))
        case "wrong shape":
            shown[at] = replace(shown[at], value=pick([s for s in SHAPES if s != shown[at].value]))
        case "wrong emblem":
            shown[at] = replace(shown[at], value=pick([e for e in EMBLEMS if e != shown[at].value]))
        case "wrong place":
            shown[at] = replace(shown[at], cell=pick(free))
        case "garbled text":
            garbled = _garble(shown[at].value, Chance(int(random.integers(1 << 30))))
            shown[at] = replace(shown[at], value=garbled)
        case "wrong background":
            ground = pick(spare)
        case "lookalike shape":
            shown[at] = replace(shown[at], value=lookalike(shown[at].value, SHAPES, lambda s: figure_mask(s, BOX)))
        case "lookalike letter":
            k = int(random.integers(len(shown[at].value)))
            other = lookalike(shown[at].value[k], _LETTERS, text_mask)
            garbled = shown[at].value[:k] + other + shown[at].value[k + 1 :]
            shown[at] = replace(shown[at], value=garbled)
        case "straying" | "cut off":
            moved = at
    picture = blank(PALETTE[ground])
    for k, item in enumerate(shown):
        x, y = cell_centre(item.cell)
        inward = (x + (8 if x < 60 else -8), y + (8 if y < 60 else -8))
        outward = (x + 8 * ((x > 60) - (x < 40)), y + 8 * ((y > 60) - (y < 40)))
        off = (outward if defect == "cut off" else inward) if k == moved else None
        draw_item(picture, item, PALETTE[ground], off)
    if defect == "smear":
        _smear(picture, cell_centre(pick(free)))
    return Case(
        scene, defect, picture, true_scores(scene, Scene(ground, tuple(shown)), moved, defect == "smear", garbled)
    )


def lookalike(name: str, among, mask) -> str:
    """The other name whose mask has most pixels in common (IoU) with this one's."""

    def common(other: str) -> float:
        a, b = mask(name), mask(other)
        return (a & b).sum() / (a | b).sum() if a.shape == b.shape else 0.0

    return max((other for other in among if other != name), key=common)


def true_scores(asked: Scene, shown: Scene, moved: int | None, smeared: bool, garbled: str | None) -> dict[str, float]:
    """The four scores by definition, from what is asked and what is shown."""
    key = lambda i: (i.kind, i.value, i.colour if i.kind != "text" else "")  # noqa: E731
    there = Counter(map(key, shown.items))
    in_place = {(key(i), i.cell) for k, i in enumerate(shown.items) if k != moved}
    present, used = 0, Counter()
    half_read = 0
    for i in asked.items:
        if used[key(i)] < there[key(i)]:
            used[key(i)] += 1
            present += 1
        elif i.kind == "text" and letters_off(garbled, i.value) <= len(i.value) // 2:
            present += 1
            half_read += 1
    surplus = sum(there.values()) - sum(used.values()) - half_read > 0 or smeared
    others = [i for i in asked.items if i.kind != "text"]
    texts = asked.texts
    checks = [(key(i), i.cell) in in_place for i in others] + [shown.background == asked.background]
    return {
        "faithfulness": grade(present, len(asked.items), not surplus),
        "visual_correctness": grade(sum(checks), len(checks), True),
        "text_accuracy": text_score(texts, in_place, key, garbled),
        "aesthetics": 1.0 - 0.5 * ((moved is not None) + smeared),
    }


def letters_off(shown: str | None, asked: str) -> int:
    """How many letters of a garbled text differ; all of them where it has another length or there is none."""
    if shown is None or len(shown) != len(asked):
        return len(asked)
    return sum(a != b for a, b in zip(shown, asked, strict=True))


def grade(right: int, total: int, clean: bool) -> float:
    return 1.0 if right == total and clean else 0.5 if 2 * right >= total else 0.0


def text_score(texts, in_place, key, garbled: str | None) -> float:
    if not texts:
        return 0.5
    exact = [(key(t), t.cell) in in_place for t in texts]
    if all(exact):
        return 1.0
    near = all(e or letters_off(garbled, t.value) <= 1 for e, t in zip(exact, texts, strict=True))
    return 0.5 if any(exact) or near else 0.0
