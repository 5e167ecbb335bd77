"""Entities, documents and requests: a world small enough to learn, the same from the same seed everywhere."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from genevolve_fast.protocols import Tool, World
from genevolve_fast.sandbox.canvas import CanvasRenderer, draw_map, draw_reference, draw_scene
from genevolve_fast.sandbox.scene import CELLS, EMBLEMS, PALETTE, SHAPES, Item, Scene
from genevolve_fast.sandbox.search import (
    Document,
    Picture,
    SandboxImageSearch,
    SandboxKnowledge,
    SandboxSearch,
)
from genevolve_fast.trajectory import Request

FIRST_NAMES = ("Bel", "Dor", "Fen", "Gal", "Hul", "Jor", "Kel", "Lum", "Mor", "Nar")
SECOND_NAMES = ("Abo", "Deva", "Esk", "Ivo", "Oru", "Pim", "Ruk", "Tas", "Uma", "Zet")
KINDS = ("a harbor town", "a river town", "a hill town", "an old port", "a valley town")
MOTTOS = ("NOVA", "LUX", "VITA", "PAX", "TERA", "FIDE", "ARDE", "MIRA", "SOLE", "VERA", "IRIS", "AURA")
SIGNS = ("OPEN", "SHOP", "EXIT", "TAXI", "CAFE", "HOME", "PARK", "MENU", "SALE", "STOP", "ROAD", "NEWS")
LIGHT_FIRST = ("white", "yellow", "blue", "green", "black")  # backgrounds that requests name
NUMBER_WORDS = {2: "two", 3: "three"}
HELD_OUT_WORDING = 6  # of seven: six to train on, the last for the bench

SYSTEM_PROMPT = """\
You write programs for an image generator. Each turn: first <think> your plan </think>, then exactly one
<tool_call> {"name": ..., "arguments": {...}} </tool_call> or <answer> {...} </answer>.
Tools: search(queries) finds facts, image_search(query) finds pictures IMG_###, query_knowledge(skill_name) gives guidance.
The answer is {"gen_prompt": ..., "reference_images": [{"img_id": ..., "note": ...}]}. Name references as the first or second
reference image, never by id."""  # noqa: E501 - its line breaks are part of what the policy learned


@dataclass(frozen=True)
class WorldConfig:
    seed: int = 0
    entities: int = 60
    held_out: int = 12
    categories: tuple[str, ...] = ()  # of the requests, by the names of TEMPLATES; none: all


@dataclass(frozen=True)
class Entity:
    name: str
    kind: str
    field: str
    motto: str
    emblem: str
    emblem_colour: str


def _plural(count: int, colour: str, shape: str) -> str:
    return f"{NUMBER_WORDS[count]} {colour} {shape}s"


def _article(word: str) -> str:
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


class SandboxWorld:
    """Facts, pictures and requests of one seed."""

    def __init__(self, config: WorldConfig | None = None) -> None:
        self.config = config or WorldConfig()
        self.entities, self.held_out = self._make_entities()

    # --- facts --------------------------------------------------------------------------------------------------------

    def _make_entities(self) -> tuple[tuple[Entity, ...], tuple[Entity, ...]]:
        """(train entities, held-out entities); every part of a held-out name occurs among the train names."""
        c = self.config
        pairs = [(a, b) for a in FIRST_NAMES for b in SECOND_NAMES]
        if not c.entities - c.held_out >= 20 or c.entities > len(pairs):
            raise ValueError(f"between {20 + c.held_out} and {len(pairs)} entities can be named, not {c.entities}")
        random = np.random.default_rng((c.seed, 1))
        random.shuffle(pairs)
        diagonal = [(a, SECOND_NAMES[i]) for i, a in enumerate(FIRST_NAMES)]  # puts every part among the train names
        rest = [p for p in pairs if p not in diagonal]
        names = [*diagonal, *rest[: c.entities - len(diagonal)]]
        emblems = [(e, k) for e in EMBLEMS for k in PALETTE if k != "white"]
        random.shuffle(emblems)
        made = []
        for (first, second), (emblem, colour) in zip(names, emblems, strict=False):
            fields = [k for k in PALETTE if k != colour]
            made.append(
                Entity(
                    name=f"{first} {second}",
                    kind=KINDS[int(random.integers(len(KINDS)))],
                    field=fields[int(random.integers(len(fields)))],
                    motto=MOTTOS[int(random.integers(len(MOTTOS)))],
                    emblem=emblem,
                    emblem_colour=colour,
                )
            )
        split = c.entities - c.held_out
        return tuple(made[:split]), tuple(made[split:])

    @property
    def all_entities(self) -> tuple[Entity, ...]:
        return self.entities + self.held_out

    @cached_property
    def documents(self) -> tuple[Document, ...]:
        out = []
        for e in self.all_entities:
            out.append(Document(e.name, f"{e.name} is {e.kind}. The field of {e.name} is {e.field}."))
            out.append(Document(f"{e.name} motto", f"The motto of {e.name} is {e.motto}."))
        return tuple(out)

    @cached_property
    def pictures(self) -> tuple[Picture, ...]:
        out = []
        for e in self.all_entities:
            out.append(Picture(f"emblem of {e.name}", draw_reference(e.emblem, e.emblem_colour)))
            out.append(Picture(f"map of {e.name}", draw_map(f"{self.config.seed}/{e.name}")))
        return tuple(out)

    # --- requests -----------------------------------------------------------------------------------------------------

    def requests(self, split: str = "train", n: int = 1000, seed: int = 0) -> list[Request]:
        """n requests of "train" or "bench". Bench uses held-out entities, wordings and scenes only."""
        if split not in ("train", "bench"):
            raise ValueError(f"split must be 'train' or 'bench', not {split!r}")
        random = np.random.default_rng((self.config.seed, seed, split == "bench"))
        named = self.config.categories
        templates = [t for t in TEMPLATES if not named or t.__name__ in named]
        made, seen = [], set()
        for _ in range(n * 40):
            if len(made) == n:
                return made
            template = templates[len(made) % len(templates)]
            question, scene, entity = template(self, random, split)
            key = (question, json.dumps(scene.to_json()))
            if (_is_bench_scene(scene) != (split == "bench") and entity is None) or (split == "bench" and key in seen):
                continue
            seen.add(key)
            made.append(self._request(f"{split}-{seed}-{len(made):06d}", template.__name__, question, scene, entity))
        raise ValueError(f"the world has fewer than {n} different {split} requests")

    def _request(self, rid: str, template: str, question: str, scene: Scene, entity: Entity | None) -> Request:
        count = len(scene.items)
        return Request(
            id=rid,
            question=question,
            gt_image=f"images/{rid}.png",
            eval_type="Knowledge-Anchored" if entity else "Quality-Anchored",
            category=template.strip("_"),
            difficulty="easy" if count <= 1 else "medium" if count <= 3 else "hard",
            extra={"checklist": scene.to_json(), "entity": entity.name if entity else ""},
        )

    def truth(self, request: Request) -> np.ndarray:
        """uint8 [96, 96, 3]."""
        return draw_scene(Scene.from_json(request.extra["checklist"]))

    def tools(self) -> dict[str, Tool]:
        """The three tools over this world's documents and pictures."""
        search, images = SandboxSearch(self.documents), SandboxImageSearch(self.pictures, self.config.seed)
        return {t.name: t for t in (search, images, SandboxKnowledge())}

    def write_dataset(self, folder: Path, train: int = 1000, bench: int = 200) -> None:
        """Write `train.jsonl`, `bench.jsonl` and their ground-truth pictures in the released format."""
        from PIL import Image

        (folder / "images").mkdir(parents=True, exist_ok=True)
        for split, n in (("train", train), ("bench", bench)):
            rows = self.requests(split, n)
            text = "".join(json.dumps(r.to_row(), ensure_ascii=False) + "\n" for r in rows)
            (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")
            for r in rows:
                Image.fromarray(self.truth(r)).save(folder / r.gt_image)


def _is_bench_scene(scene: Scene) -> bool:
    """A fifth of all scenes, by hash, belong to the bench."""
    digest = hashlib.blake2b(json.dumps(scene.to_json(), sort_keys=True).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") % 5 == 0


def _pick(random: np.random.Generator, options: Sequence, k: int | None = None):
    if k is None:
        return options[int(random.integers(len(options)))]
    return [options[int(i)] for i in random.permutation(len(options))[:k]]


def _wording(random: np.random.Generator, split: str) -> int:
    return HELD_OUT_WORDING if split == "bench" else int(random.integers(HELD_OUT_WORDING))


def _entity(world: SandboxWorld, random: np.random.Generator, split: str) -> Entity:
    return _pick(random, world.held_out if split == "bench" else world.entities)


def _on_ground(what: str, ground: str) -> tuple[str, ...]:
    background = f"{_article(ground)} background"
    return (
        f"Draw {what} on {background}.",
        f"On {background} draw {what}.",
        f"Paint {what} on {background}.",
        f"On {background} paint {what}.",
        f"Show on {background} {what}.",
        f"Show {what} on {background}.",
        f"Draw on {background} {what}.",
    )


def emblem_field(world: SandboxWorld, random: np.random.Generator, split: str):
    """Look the field colour up, find the emblem, copy it."""
    e = _entity(world, random, split)
    cell = _pick(random, tuple(CELLS))
    question = (
        f"Draw the emblem of {e.name} at the {cell} on its field colour.",
        f"On the field colour of {e.name} draw its emblem at the {cell}.",
        f"Paint the emblem of {e.name} on its field colour, at the {cell}.",
        f"Show at the {cell} the emblem of {e.name} on its field colour.",
        f"On the field colour of {e.name} paint its emblem at the {cell}.",
        f"Show the emblem of {e.name} at the {cell} on its field colour.",
        f"Paint at the {cell} the emblem of {e.name} on its field colour.",
    )[_wording(random, split)]
    return question, Scene(e.field, (Item("emblem", e.emblem, cell, e.emblem_colour),)), e


def emblem_motto(world: SandboxWorld, random: np.random.Generator, split: str):
    """Look the motto up, find the emblem, write and copy."""
    e = _entity(world, random, split)
    ground = _pick(random, [k for k in LIGHT_FIRST if k != e.emblem_colour])
    cell, place = _pick(
        random, (("center", "bottom center"), ("center", "top center"), ("top center", "bottom center"))
    )
    question = (
        f"On {_article(ground)} background draw the emblem of {e.name} at the {cell} and its motto at the {place}.",
        f"Draw the emblem of {e.name} at the {cell} and its motto at the {place} on {_article(ground)} background.",
        f"Paint the motto of {e.name} at the {place} and its emblem at the {cell} on {_article(ground)} background.",
        f"Show on {_article(ground)} background the emblem of {e.name} at the {cell} and its motto at the {place}.",
        f"On {_article(ground)} background paint the motto of {e.name} at the {place} and its emblem at the {cell}.",
        f"Show the motto of {e.name} at the {place} and its emblem at the {cell} on {_article(ground)} background.",
        f"Draw on {_article(ground)} background the motto of {e.name} at the {place} and its emblem at the {cell}.",
    )[_wording(random, split)]
    items = (Item("emblem", e.emblem, cell, e.emblem_colour), Item("text", e.motto, place))
    return question, Scene(ground, items), e


def count_row(world: SandboxWorld, random: np.random.Generator, split: str):
    """A counted row of equal objects, sometimes two rows."""
    ground = _pick(random, LIGHT_FIRST)
    colours = _pick(random, [k for k in PALETTE if k != ground], 2)
    shapes = _pick(random, SHAPES, 2)
    rows = _pick(random, ("top", "middle", "bottom"), 2 if random.random() < 0.4 else 1)
    groups = [(int(_pick(random, (2, 3))), c, s, r) for c, s, r in zip(colours, shapes, rows, strict=False)]
    parts = [f"{_plural(n, c, s)} in a row at the {r}" for n, c, s, r in groups]
    what = " and ".join(parts)
    question = _on_ground(what, ground)[_wording(random, split)]
    items = tuple(Item("object", s, cell, c) for n, c, s, r in groups for cell in row_cells(r, n))
    return question, Scene(ground, items), None


def row_cells(row: str, count: int) -> list[str]:
    """The cells of a row of two (left and right) or three objects."""
    centre = "center" if row == "middle" else f"{row} center"
    return [f"{row} left", centre, f"{row} right"] if count == 3 else [f"{row} left", f"{row} right"]


def text_sign(world: SandboxWorld, random: np.random.Generator, split: str):
    """One or two exact texts, sometimes with an object between them."""
    ground = _pick(random, LIGHT_FIRST)
    words = _pick(random, SIGNS, 2 if random.random() < 0.7 else 1)
    items = [Item("text", w, cell) for w, cell in zip(words, ("top center", "bottom center"), strict=False)]
    if len(words) == 2:
        what = f"the words '{words[0]}' at the top center and '{words[1]}' at the bottom center"
    else:
        what = f"the word '{words[0]}' at the top center"
    if random.random() < 0.6:
        colour, shape = _pick(random, [k for k in PALETTE if k != ground]), _pick(random, SHAPES)
        items.append(Item("object", shape, "center", colour))
        what += f" with {_article(colour)} {shape} at the center"
    question = _on_ground(what, ground)[_wording(random, split)]
    return question, Scene(ground, tuple(items)), None


RELATION_CELLS = {
    "left of": ("middle left", "middle right"),
    "right of": ("middle right", "middle left"),
    "above": ("top center", "bottom center"),
    "below": ("bottom center", "top center"),
}


def relation(world: SandboxWorld, random: np.random.Generator, split: str):
    """Two objects placed by their relation, sometimes a third between them."""
    ground = _pick(random, LIGHT_FIRST)
    colours = _pick(random, [k for k in PALETTE if k != ground], 3)
    shapes = _pick(random, SHAPES, 3)
    how = _pick(random, tuple(RELATION_CELLS))
    cells = RELATION_CELLS[how]
    items = [Item("object", shapes[i], cells[i], colours[i]) for i in (0, 1)]
    what = f"{_article(colours[0])} {shapes[0]} {how} {_article(colours[1])} {shapes[1]}"
    if random.random() < 0.5:
        items.append(Item("object", shapes[2], "center", colours[2]))
        what += f" with {_article(colours[2])} {shapes[2]} at the center"
    question = _on_ground(what, ground)[_wording(random, split)]
    return question, Scene(ground, tuple(items)), None


TEMPLATES = (emblem_field, count_row, emblem_motto, text_sign, relation)


def open_world(world: SandboxWorld) -> World:
    """The sandbox behind the protocols: offline tools, canvas, rule-based judges and comparer, hashed embedder."""
    from genevolve_fast.experience.embedder import HashedNgramEmbedder
    from genevolve_fast.sandbox.judges import SandboxImageJudge, SandboxProgramJudge
    from genevolve_fast.sandbox.process_comparer import StageComparer

    return World(
        tools=world.tools(),
        renderer=CanvasRenderer(),
        image_judge=SandboxImageJudge(),
        program_judge=SandboxProgramJudge(),
        summarizer=StageComparer(),
        embedder=HashedNgramEmbedder(),
        system_prompt=SYSTEM_PROMPT,
        truth=world.truth,
    )


def vocabulary_texts(world: SandboxWorld) -> Iterator[str]:
    """Every document of the world; with the demonstrations, what the tokenizer is trained on."""
    for d in world.documents:
        yield f"{d.title} {d.text}"
