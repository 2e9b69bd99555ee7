"""GenEval's detector with models of transformers: Mask2Former or OWL for objects, CLIP for their colours.

Published: mmdet's Mask2Former with a Swin-S backbone, and CLIP ViT-L/14. The same weights in transformers are
resized and filtered slightly differently, so results are close but not bit-compatible.
B images, Q queries of the detector, C classes, E embedding width.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from open_unitok.core.errors import UserError
from open_unitok.core.files import existing
from open_unitok.core.text_files import read_json

from ..core.benchmark import Record

# COCO class name -> the name in GenEval's prompts
GENEVAL_NAMES = {"mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard"}
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
MAX_DETECTIONS = 100  # per image, as in mmdet
MIN_SCORE = 0.05  # lower scores are not recorded; GenEval's threshold is 0.3
# the published prompts of the colour classifier
COLOUR_TEMPLATES = ("a photo of a {c} {name}", "a photo of a {c}-colored {name}", "a photo of a {c} object")
BACKGROUND = (0x99, 0x99, 0x99)


class Detection(NamedTuple):
    """One object: class, box [x0, y0, x1, y1, score], and mask (H, W), None = the whole box."""

    name: str
    box: list[float]
    mask: np.ndarray | None


Detector = Callable[[Sequence[Image.Image], Sequence[str]], list[list[Detection]]]


def load_detector(folder: str, device: str) -> Detector:
    """Load a detector: (images, class names) -> detections per image.

    Raises:
        UserError: the folder is missing, or the model type of its config.json is not supported.
    """
    path = existing(folder, "--detector-model must be a folder.")
    kind = read_json(path / "config.json").get("model_type")
    loaders = {"mask2former": _load_mask2former, "owlvit": _load_owl, "owlv2": _load_owl}
    if kind not in loaders:
        raise UserError(f"{path}/config.json: model_type is {kind!r}; allowed: {', '.join(loaders)}.")
    return loaders[kind](path, device)


def load_pretrained(path: Path, device: str, name: str) -> tuple[Any, Any]:
    """(processor, model in evaluation mode) of a folder, without network access."""
    import transformers

    processor = transformers.AutoImageProcessor if name.startswith("Mask2") else transformers.AutoProcessor
    try:
        model = getattr(transformers, name).from_pretrained(path, local_files_only=True)
        return processor.from_pretrained(path, local_files_only=True), model.to(device).eval()
    except (OSError, ValueError, ImportError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} cannot be loaded as {name}: {reason}") from error


def _load_mask2former(path: Path, device: str) -> Detector:
    """Instance segmentation of COCO classes; score = class probability x mean mask probability."""
    import torch

    processor, model = load_pretrained(path, device, "Mask2FormerForUniversalSegmentation")
    labels = {i: GENEVAL_NAMES.get(name, name) for i, name in model.config.id2label.items()}

    def detect(images: Sequence[Image.Image], names: Sequence[str]) -> list[list[Detection]]:
        inputs = processor(images=list(images), return_tensors="pt").to(device)
        with torch.inference_mode():
            out = model(**inputs)
            # (B, Q, C): the last class means "no object"
            probabilities = out.class_queries_logits.float().softmax(dim=-1)[..., :-1]
            side = inputs["pixel_values"].shape[-2:]
            return [
                _mask_detections(p, masks, side, image, labels)  # pyright: ignore
                for p, masks, image in zip(probabilities, out.masks_queries_logits.float(), images)
            ]

    return detect


def _mask_detections(
    probabilities: Any, masks: Any, side: Sequence[int], image: Image.Image, labels: dict[int, str]
) -> list[Detection]:
    """Detections of one image from class probabilities (Q, C) and mask logits (Q, h, w)."""
    import torch.nn.functional as F

    # top-k over (query, class) pairs as in mmdet: one query may yield two classes
    best = probabilities.flatten().topk(min(MAX_DETECTIONS, probabilities.numel()))
    query, label = best.indices // probabilities.shape[1], best.indices % probabilities.shape[1]
    # as mmdet: interpolate to the input size of the network, then to the image
    masks = F.interpolate(masks[None], side, mode="bilinear", align_corners=False)
    masks = F.interpolate(masks, (image.height, image.width), mode="bilinear", align_corners=False)[0]
    detections = []
    for value, q, c in zip(best.values.tolist(), query.tolist(), label.tolist()):
        mask = masks[q] > 0
        score = value * (masks[q].sigmoid()[mask].mean().item() if mask.any() else 0.0)
        if score > MIN_SCORE:
            array = mask.cpu().numpy()
            detections.append(Detection(labels[c], _bounding_box(array, score), array))
    return detections


def _bounding_box(mask: np.ndarray, score: float) -> list[float]:
    """[x0, y0, x1, y1, score] of a non-empty mask (H, W)."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return [float(v) for v in (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)] + [score]


def _load_owl(path: Path, device: str) -> Detector:
    """Open-vocabulary boxes for the given class names, without masks."""
    import torch

    kind = read_json(path / "config.json")["model_type"]
    name = {"owlvit": "OwlViTForObjectDetection", "owlv2": "Owlv2ForObjectDetection"}[kind]
    processor, model = load_pretrained(path, device, name)

    def detect(images: Sequence[Image.Image], names: Sequence[str]) -> list[list[Detection]]:
        queries = [[f"a photo of a {n}" for n in names]] * len(images)
        inputs = processor(text=queries, images=list(images), return_tensors="pt", padding=True).to(device)
        with torch.inference_mode():
            out = model(**inputs)
        results = []
        for logits, boxes, image in zip(out.logits.float(), out.pred_boxes.float(), images):
            # drop padding queries
            best = logits[:, : len(names)].sigmoid().max(dim=1)
            # boxes are relative; OWLv2 pads images to a square at the bottom right first
            square = max(image.size)
            scale = (square, square) if kind == "owlv2" else image.size
            detections = []
            for value, label, (x, y, w, h) in zip(
                best.values.tolist(), best.indices.tolist(), boxes.tolist()
            ):
                if value > MIN_SCORE:
                    corners = [(x - w / 2) * scale[0], (y - h / 2) * scale[1]]
                    corners += [(x + w / 2) * scale[0], (y + h / 2) * scale[1]]
                    detections.append(Detection(str(names[label]), [*corners, value], None))
            results.append(detections)
        return results

    return detect


class ColourClassifier:
    """Zero-shot CLIP classifier of object colours; pixels outside the mask are grey, as published."""

    def __init__(self, folder: str, device: str):
        path = existing(folder, "--colour-model must be a CLIP folder in transformers' layout.")
        self.processor, self.model = load_pretrained(path, device, "CLIPModel")
        self.device = device
        self._classifiers: dict[str, Any] = {}  # class name -> (E, 10)

    def classifier(self, name: str):
        """Classifier (E, 10) of a class: per colour the normalised mean text embedding of its templates."""
        import torch
        import torch.nn.functional as F

        if name not in self._classifiers:
            texts = [t.format(c=c, name=name) for c in COLOURS for t in COLOUR_TEMPLATES]
            inputs = self.processor(text=texts, return_tensors="pt", padding=True).to(self.device)
            with torch.inference_mode():
                rows = F.normalize(projected(self.model.get_text_features(**inputs)), dim=-1)
                means = rows.reshape(len(COLOURS), len(COLOUR_TEMPLATES), -1).mean(dim=1)
                self._classifiers[name] = F.normalize(means, dim=-1).T
        return self._classifiers[name]

    def __call__(self, image: Image.Image, detections: Sequence[Detection]) -> list[str]:
        """The colour of each detection."""
        import torch
        import torch.nn.functional as F

        if not detections:
            return []
        crops = [crop_object(image, detection) for detection in detections]
        inputs = self.processor(images=crops, return_tensors="pt").to(self.device)
        with torch.inference_mode():
            embeds = F.normalize(projected(self.model.get_image_features(**inputs)), dim=-1)
            best = [int((row @ self.classifier(d.name)).argmax()) for row, d in zip(embeds, detections)]
        return [COLOURS[i] for i in best]


def projected(output: Any):
    """The projected features: newer versions of transformers return an output object, not a tensor."""
    return output.pooler_output if hasattr(output, "pooler_output") else output


def crop_object(image: Image.Image, detection: Detection) -> Image.Image:
    """The image inside the box, grey outside the mask."""
    if detection.mask is not None:
        array = np.array(image)
        # GenEval's background colour, #999
        array[~detection.mask] = BACKGROUND
        image = Image.fromarray(array)
    x0, y0, x1, y1 = detection.box[:4]
    # clamp to the image, at least one pixel
    left, top = min(max(int(x0), 0), image.width - 1), min(max(int(y0), 0), image.height - 1)
    right, bottom = max(min(round(x1), image.width), left + 1), max(min(round(y1), image.height), top + 1)
    return image.crop((left, top, right, bottom))


def detections_record(detections: Sequence[Detection], colours: Sequence[str]) -> Record:
    """Boxes and colours by class, in the format of `detections.jsonl`."""
    record: Record = {"detections": {}, "colors": {}}
    for detection, colour in zip(detections, colours, strict=True):
        record["detections"].setdefault(detection.name, []).append([round(v, 4) for v in detection.box])
        record["colors"].setdefault(detection.name, []).append(colour)
    return record
