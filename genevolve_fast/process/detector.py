"""GenEval's way of judging real pictures: an object detector finds what is there, CLIP says which colour it has.

Needs `pip install 'genevolve-fast[detect]'`. Detectors of the OWL family find any noun, closed ones (DETR, YOLOS) the
classes that they were trained on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from genevolve_fast.process.scene_graph import SceneGraph
from genevolve_fast.process.verdict import Found, Verdict, compare
from genevolve_fast.protocols import JudgeError

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")  # GenEval's
_COLOUR_TEXTS = ("a photo of a {colour} {name}", "a photo of a {colour}-colored {name}", "a photo of a {colour} object")
_SAME = 0.5  # IoU above which two boxes of a name are one object


class Detector(Protocol):
    def detect(self, names: Sequence[str], pixels: np.ndarray) -> list[Found]:
        """Everything found of `names`, scored, boxes in pixels; may overlap. Raises JudgeError for unknown names."""
        ...


class ColourNamer(Protocol):
    def colour(self, crop: np.ndarray, name: str) -> str:
        """The colour of the `name` that fills `crop`, uint8 [height, width, 3]."""
        ...


class DetectorJudge:
    """process.verdict.GraphJudge over a detector.

    threshold: score of an object; counting_threshold: where more than one is asked for, higher as in GenEval, so that a
    doubtful one is not counted. exact: what nobody asked for is a fault, of the names that the graph has.
    """

    def __init__(
        self,
        detector: Detector,
        colours: ColourNamer | None = None,
        *,
        threshold: float = 0.3,
        counting_threshold: float = 0.9,
        exact: bool = False,
    ) -> None:
        if not 0 <= threshold <= counting_threshold <= 1:
            raise ValueError(f"0 <= threshold {threshold} <= counting_threshold {counting_threshold} <= 1 must hold")
        self._detector, self._colours, self._exact = detector, colours, exact
        self._threshold, self._counting = threshold, counting_threshold

    def judge(self, graph: SceneGraph, pixels: np.ndarray) -> Verdict:
        """Raises JudgeError for what this judge cannot see: other attributes than colour, colours without a namer."""
        asked = {key for node in graph.objects for key in node.attributes}
        if asked - ({"colour"} if self._colours else set()):
            raise JudgeError(f"this judge does not see {', '.join(sorted(asked))}", "bad_arguments")
        counted = {n.name for n in graph.objects if n.count > 1}
        names = sorted({n.name for n in graph.objects})
        found = [
            f
            for f in self._detector.detect(names, pixels)
            if f.score >= (self._counting if f.name in counted else self._threshold)
        ]
        found = suppressed(found)
        if asked:
            found = [replace(f, attributes={"colour": self._colour(f, pixels)}) for f in found]
        return compare(graph, found, exact=self._exact)

    def _colour(self, found: Found, pixels: np.ndarray) -> str:
        height, width = pixels.shape[:2]
        left, top, right, bottom = found.box
        rows = slice(max(0, int(top)), min(height, max(int(top) + 1, int(np.ceil(bottom)))))
        columns = slice(max(0, int(left)), min(width, max(int(left) + 1, int(np.ceil(right)))))
        crop = pixels[rows, columns]
        return self._colours.colour(crop, found.name) if crop.size else ""


def suppressed(found: Sequence[Found], same: float = _SAME) -> list[Found]:
    """Best first, without those that lie over a better one of the same name."""
    kept: list[Found] = []
    for f in sorted(found, key=lambda f: -f.score):
        if all(f.name != k.name or _iou(f.box, k.box) <= same for k in kept):
            kept.append(f)
    return kept


def _iou(a: Sequence[float], b: Sequence[float]) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    both = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
    return width * height / (both - width * height)


# --- detectors of transformers ----------------------------------------------------------------------------------------


class ZeroShotDetector:
    """OWL-ViT or OWLv2: any noun."""

    def __init__(self, model: Any, processor: Any, template: str = "a photo of a {name}") -> None:
        self._model, self._processor, self._template = model.eval(), processor, template

    def detect(self, names: Sequence[str], pixels: np.ndarray) -> list[Found]:
        import torch

        texts = [self._template.format(name=name) for name in names]
        inputs = self._processor(text=[texts], images=[pixels], return_tensors="pt").to(self._model.device)
        with torch.inference_mode():
            outputs = self._model(**inputs)
        (rows,) = self._processor.post_process_grounded_object_detection(
            outputs, threshold=0.0, target_sizes=[pixels.shape[:2]]
        )
        return _found(rows, dict(enumerate(names)))


class ClosedDetector:
    """DETR, YOLOS and their like: the classes of their labels."""

    def __init__(self, model: Any, processor: Any) -> None:
        self._model, self._processor = model.eval(), processor
        self._labels = {int(i): str(label).lower() for i, label in model.config.id2label.items()}

    def detect(self, names: Sequence[str], pixels: np.ndarray) -> list[Found]:
        import torch

        if unknown := sorted(set(names) - set(self._labels.values())):
            raise JudgeError(f"the detector has no class {', '.join(unknown)}", "bad_arguments")
        inputs = self._processor(images=[pixels], return_tensors="pt").to(self._model.device)
        with torch.inference_mode():
            outputs = self._model(**inputs)
        (rows,) = self._processor.post_process_object_detection(outputs, 0.0, [pixels.shape[:2]])
        return [f for f in _found(rows, self._labels) if f.name in names]


def _found(rows: Mapping[str, Any], names: Mapping[int, str]) -> list[Found]:
    columns = (rows[key].tolist() for key in ("boxes", "labels", "scores"))
    return [Found(names[label], tuple(box), {}, score) for box, label, score in zip(*columns, strict=True)]


class ClipColours:
    """The colour whose texts are nearest to a crop, as GenEval asks CLIP."""

    def __init__(self, model: Any, processor: Any, colours: Sequence[str] = COLOURS) -> None:
        self._model, self._processor, self._colours = model.eval(), processor, tuple(colours)
        self._texts: dict[str, Any] = {}

    def colour(self, crop: np.ndarray, name: str) -> str:
        import torch

        with torch.inference_mode():
            inputs = self._processor(images=[crop], return_tensors="pt").to(self._model.device)
            image = _unit(self._model.get_image_features(**inputs))
            return self._colours[int((self._of(name) @ image[0]).argmax())]

    def _of(self, name: str):
        """[colours, features]: the mean of a colour's texts."""
        if name not in self._texts:
            texts = [t.format(colour=c, name=name) for c in self._colours for t in _COLOUR_TEXTS]
            inputs = self._processor(text=texts, padding=True, return_tensors="pt").to(self._model.device)
            each = _unit(self._model.get_text_features(**inputs))
            self._texts[name] = _unit(each.view(len(self._colours), len(_COLOUR_TEXTS), -1).mean(1))
        return self._texts[name]


def _unit(features):
    features = getattr(features, "pooler_output", features)
    return features / features.norm(dim=-1, keepdim=True)


def open_detector(name: str, device: str = "cpu") -> Detector:
    """The detector in a folder or of a hub name. Raises ValueError for a model that is none or lacks a library."""
    from transformers import AutoConfig, AutoModelForObjectDetection, AutoModelForZeroShotObjectDetection, AutoProcessor
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_OBJECT_DETECTION_MAPPING,
        MODEL_FOR_ZERO_SHOT_OBJECT_DETECTION_MAPPING,
    )

    kind = type(AutoConfig.from_pretrained(name))
    try:
        if kind in MODEL_FOR_ZERO_SHOT_OBJECT_DETECTION_MAPPING:
            processor = AutoProcessor.from_pretrained(name)
            if not type(processor).__name__.lower().startswith("owl"):
                raise ValueError(f"{name}: of the detectors that find any noun only OWL-ViT and OWLv2 are known here")
            return ZeroShotDetector(AutoModelForZeroShotObjectDetection.from_pretrained(name).to(device), processor)
        if kind in MODEL_FOR_OBJECT_DETECTION_MAPPING:
            model = AutoModelForObjectDetection.from_pretrained(name).to(device)
            return ClosedDetector(model, _image_processor(name))
    except ImportError as error:
        needed = "needs `pip install 'genevolve-fast[detect]'`"
        raise ValueError(f"{name} {needed}: {str(error).strip().splitlines()[0]}") from error
    raise ValueError(f"{name} is a {kind.__name__}, which is no object detector")


def _image_processor(name: str):
    from transformers import AutoImageProcessor

    return AutoImageProcessor.from_pretrained(name)
