"""Judging by a detector: what is found becomes a verdict; tiny random detectors for shapes and wiring."""

from __future__ import annotations

import json

import numpy as np
import pytest

from genevolve_fast.process.detector import (
    ClipColours,
    ClosedDetector,
    DetectorJudge,
    ZeroShotDetector,
    open_detector,
    suppressed,
)
from genevolve_fast.process.scene_graph import Node, Relation, SceneGraph
from genevolve_fast.process.verdict import Found
from genevolve_fast.protocols import JudgeError
from genevolve_fast.sandbox.stroke_data import placed
from genevolve_fast.sandbox.strokes import draw, look, parse

SCENE = draw(
    placed(parse("a red circle at row 2 column 1, a blue square at row 2 column 3 and a blue ring at row 4 column 4"))
)


class FiguresDetector:
    """Finds the figures of a stroke picture, each of them twice, and one that is doubtful."""

    def detect(self, names, pixels):
        found = [Found(f.name, f.box, {}, 0.95) for f in look(pixels).figures if f.name in names]
        shifted = [Found(f.name, tuple(x + 1 for x in f.box), {}, 0.8) for f in found]
        return [*shifted, *found, Found(names[0], (0, 0, 5, 5), {}, 0.5)]


class MeanColour:
    def colour(self, crop, name):
        red, _, blue = crop.reshape(-1, 3).mean(0)
        return "red" if red > blue else "blue"


def test_what_a_detector_finds_becomes_a_verdict():
    red, blue = Node("a", "circle", {"colour": "red"}), Node("b", "square", {"colour": "blue"})
    judge = DetectorJudge(FiguresDetector(), MeanColour(), threshold=0.6)
    right = SceneGraph((red, blue), (Relation("a", "left of", "b"),))
    assert judge.judge(right, SCENE).correct  # the ring is nobody's business
    wrong = judge.judge(SceneGraph((red, blue), (Relation("a", "right of", "b"),)), SCENE)
    assert wrong.relations == (False,) and wrong.attributes == {"a": True, "b": True}
    exchanged = judge.judge(parse("a blue circle and a red square"), SCENE)
    assert exchanged.attributes == {"a": False, "b": False} and all(exchanged.present.values())
    assert not judge.judge(parse("a cross"), SCENE).correct


def test_counting_asks_for_surer_objects():
    two = draw(placed(parse("two red circles at row 1 column 1 and row 3 column 3")))
    assert (
        DetectorJudge(FiguresDetector()).judge(parse("two circles"), two).correct
    )  # the doubtful third is not counted
    loose = DetectorJudge(FiguresDetector(), threshold=0.3, counting_threshold=0.3)
    assert DetectorJudge(FiguresDetector()).judge(parse("three circles"), two).counts == {"a": False}
    assert not loose.judge(parse("three circles"), two).correct  # it lies over another one


def test_boxes_over_a_better_one_of_the_same_name_are_one_object():
    best, over, other, apart = (
        Found("dog", (0, 0, 10, 10), {}, 0.9),
        Found("dog", (1, 1, 11, 11), {}, 0.8),
        Found("cat", (1, 1, 11, 11), {}, 0.7),
        Found("dog", (8, 8, 18, 18), {}, 0.6),
    )
    assert suppressed([apart, over, other, best]) == [best, other, apart]


def test_what_a_judge_cannot_see_it_does_not_judge():
    with pytest.raises(JudgeError, match="does not see colour"):
        DetectorJudge(FiguresDetector()).judge(parse("a red circle"), SCENE)
    with pytest.raises(ValueError, match="must hold"):
        DetectorJudge(FiguresDetector(), threshold=0.9, counting_threshold=0.3)


# --- tiny random models -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from transformers import CLIPTokenizer

    letters = [chr(c) for c in range(33, 127)]
    vocab = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(vocab)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=40)


def text_config(tokenizer) -> dict:
    return dict(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=40, eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip


VISION = dict(
    hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8
)
WIDE = np.random.default_rng(0).integers(0, 255, (40, 80, 3)).astype(np.uint8)


@pytest.mark.slow
def test_a_detector_of_any_noun_gives_boxes_in_pixels(tmp_path, tokenizer):
    import torch
    from transformers import OwlViTConfig, OwlViTForObjectDetection, OwlViTImageProcessorPil, OwlViTProcessor

    torch.manual_seed(0)
    config = OwlViTConfig(text_config=text_config(tokenizer), vision_config=VISION, projection_dim=16)
    model = OwlViTForObjectDetection(config).eval()
    processor = OwlViTProcessor(OwlViTImageProcessorPil(size={"height": 32, "width": 32}), tokenizer)
    found = ZeroShotDetector(model, processor).detect(["dog", "cat"], WIDE)
    with torch.inference_mode():
        texts = [["a photo of a dog", "a photo of a cat"]]
        out = model(**processor(text=texts, images=[WIDE], return_tensors="pt"))
    best = out.logits[0].max(-1)
    assert len(found) == 16 and [f.name for f in found] == [("dog", "cat")[i] for i in best.indices.tolist()]
    x, y, w, h = out.pred_boxes[0].unbind(-1)
    wanted = torch.stack([(x - w / 2) * 80, (y - h / 2) * 40, (x + w / 2) * 80, (y + h / 2) * 40], -1)
    boxes, scores = np.array([f.box for f in found]), [f.score for f in found]
    assert np.allclose(boxes, wanted.clamp(min=0).numpy(), atol=1e-3) or np.allclose(boxes, wanted.numpy(), atol=1e-3)
    assert np.allclose(scores, best.values.sigmoid().numpy(), atol=1e-5)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = open_detector(str(tmp_path))
    assert isinstance(again, ZeroShotDetector)
    assert np.allclose([f.box for f in again.detect(["dog", "cat"], WIDE)], boxes, atol=1e-3)
    verdict = DetectorJudge(again, threshold=0, counting_threshold=0).judge(SceneGraph((Node("a", "dog"),)), WIDE)
    assert verdict.present == {"a": True}


@pytest.mark.slow
def test_a_detector_of_its_classes_gives_them_only(tmp_path):
    import torch
    from transformers import BertConfig, YolosConfig, YolosForObjectDetection, YolosImageProcessorPil

    torch.manual_seed(0)
    labels = {0: "Dog", 1: "cat", 2: "tree"}
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, patch_size=8)
    config = YolosConfig(**sizes, image_size=[32, 32], num_detection_tokens=12, id2label=labels)
    model = YolosForObjectDetection(config).eval()
    processor = YolosImageProcessorPil(size={"height": 32, "width": 32})
    detector = ClosedDetector(model, processor)
    found = detector.detect(["dog", "cat", "tree"], WIDE)
    assert len(found) == 12 and {f.name for f in found} <= {"dog", "cat", "tree"}
    boxes = np.array([f.box for f in found])
    assert boxes[:, 2].max() > 40 and boxes[:, 3].max() < 60  # width 80, height 40
    assert {f.name for f in detector.detect(["cat"], WIDE)} <= {"cat"}
    with pytest.raises(JudgeError, match="no class horse"):
        detector.detect(["horse"], WIDE)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert isinstance(open_detector(str(tmp_path)), ClosedDetector)
    BertConfig().save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match="no object detector"):
        open_detector(str(tmp_path / "bert"))


@pytest.mark.slow
def test_colours_are_those_whose_texts_are_nearest(tokenizer):
    import torch
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor

    torch.manual_seed(0)
    config = CLIPConfig(text_config=text_config(tokenizer), vision_config=VISION, projection_dim=16)
    model = CLIPModel(config).eval()
    size = {"height": 32, "width": 32}
    processor = CLIPProcessor(CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=size), tokenizer)
    namer = ClipColours(model, processor, ("red", "blue", "green"))
    seen = namer.colour(WIDE, "dog")
    with torch.inference_mode():
        image = model.get_image_features(**processor(images=[WIDE], return_tensors="pt"))
        image = getattr(image, "pooler_output", image)[0]
        best = {}
        for colour in ("red", "blue", "green"):
            texts = [
                f"a photo of a {colour} dog",
                f"a photo of a {colour}-colored dog",
                f"a photo of a {colour} object",
            ]
            each = model.get_text_features(**processor(text=texts, padding=True, return_tensors="pt"))
            each = torch.nn.functional.normalize(getattr(each, "pooler_output", each), dim=-1).mean(0)
            best[colour] = float(torch.nn.functional.cosine_similarity(each, image, 0))
    assert seen == max(best, key=best.get) and len(set(best.values())) == 3
