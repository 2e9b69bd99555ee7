"""Objects and their colours in images, by models of transformers from local folders: GenEval's detector.

The published detector is mmdet's Mask2Former with a Swin-S backbone, the colours are CLIP ViT-L/14's. The
same weights in transformers are resized and filtered a little differently: close, but not bit-compatible.
B images, Q queries of the detector, C classes.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from open_unitok.core.errors import UserError
from open_unitok.core.files import existing, read_json

from ..core.harness import Record

# COCO's names that GenEval's prompts put in other words
GENEVAL_NAMES = {"mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard"}
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
KEPT = 100  # instances per image, as mmdet keeps them
LEAST = 0.05  # scores below are not written down; GenEval's own threshold is 0.3
COLOUR_TEMPLATES = ("a photo of a {c} {name}", "a photo of a {c}-colored {name}", "a photo of a {c} object")
BACKGROUND = (0x99, 0x99, 0x99)


class Thing(NamedTuple):
    """One object: its class, box x0, y0, x1, y1 with score, and mask (H, W), or None for the whole box."""

    name: str
    box: list[float]
    mask: np.ndarray | None


Find = Callable[[Sequence[Image.Image], Sequence[str]], list[list[Thing]]]


def load(folder: str, device: str) -> Find:
    """The detector in a folder, by the model type of its config.json.

    Raises:
        UserError: the folder is missing, or its model is no detector that is known here.
    """
    path = existing(folder, "It is what --detector-model names.")
    kind = read_json(path / "config.json").get("model_type")
    known = {"mask2former": mask2former, "owlvit": owl, "owlv2": owl}
    if kind not in known:
        raise UserError(f"{path}/config.json: model_type is {kind!r}; allowed: {', '.join(known)}.")
    return known[kind](path, device)


def pretrained(path: Path, device: str, name: str) -> tuple[Any, Any]:
    """(processor, model in evaluation mode) of one folder, never from the network."""
    import transformers

    processor = transformers.AutoImageProcessor if name.startswith("Mask2") else transformers.AutoProcessor
    try:
        model = getattr(transformers, name).from_pretrained(path, local_files_only=True)
        return processor.from_pretrained(path, local_files_only=True), model.to(device).eval()
    except (OSError, ValueError, ImportError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} cannot be loaded as {name}: {reason}") from error


def mask2former(path: Path, device: str) -> Find:
    """COCO's instances with masks; a score is the class's probability times the mask's certainty."""
    import torch
    import torch.nn.functional as F

    processor, model = pretrained(path, device, "Mask2FormerForUniversalSegmentation")
    labels = {i: GENEVAL_NAMES.get(name, name) for i, name in model.config.id2label.items()}

    def find(pictures: Sequence[Image.Image], names: Sequence[str]) -> list[list[Thing]]:
        inputs = processor(images=list(pictures), return_tensors="pt").to(device)
        with torch.inference_mode():
            out = model(**inputs)
            shares = out.class_queries_logits.float().softmax(dim=-1)[
                ..., :-1
            ]  # (B, Q, C); the last is nothing
            side = inputs["pixel_values"].shape[-2:]
            results = []
            for share, masks, image in zip(shares, out.masks_queries_logits.float(), pictures):
                best = share.flatten().topk(min(KEPT, share.numel()))
                query, kind = best.indices // share.shape[1], best.indices % share.shape[1]
                grown = F.interpolate(masks[None], side, mode="bilinear", align_corners=False)
                size = (image.height, image.width)
                grown = F.interpolate(grown, size, mode="bilinear", align_corners=False)[0]
                things = []
                for value, q, c in zip(best.values.tolist(), query.tolist(), kind.tolist()):
                    mask = grown[q] > 0
                    score = value * (grown[q].sigmoid()[mask].mean().item() if mask.any() else 0.0)
                    if score > LEAST:
                        things.append(Thing(labels[c], box_of(mask.cpu().numpy(), score), mask.cpu().numpy()))
                results.append(things)
        return results

    return find


def box_of(mask: np.ndarray, score: float) -> list[float]:
    """The box around a mask (H, W) that is not empty, with its score behind."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return [float(v) for v in (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)] + [score]


def owl(path: Path, device: str) -> Find:
    """Boxes of the names that are asked for, without masks."""
    import torch

    kind = read_json(path / "config.json")["model_type"]
    name = {"owlvit": "OwlViTForObjectDetection", "owlv2": "Owlv2ForObjectDetection"}[kind]
    processor, model = pretrained(path, device, name)

    def find(pictures: Sequence[Image.Image], names: Sequence[str]) -> list[list[Thing]]:
        queries = [[f"a photo of a {n}" for n in names]] * len(pictures)
        inputs = processor(text=queries, images=list(pictures), return_tensors="pt", padding=True).to(device)
        with torch.inference_mode():
            out = model(**inputs)
        results = []
        for logits, boxes, image in zip(out.logits.float(), out.pred_boxes.float(), pictures):
            best = logits[:, : len(names)].sigmoid().max(dim=1)
            # OWLv2 sees the image in the corner of a square of its longer side
            square = max(image.size)
            scale = (square, square) if kind == "owlv2" else image.size
            things = []
            for value, label, (x, y, w, h) in zip(
                best.values.tolist(), best.indices.tolist(), boxes.tolist()
            ):
                if value > LEAST:
                    corners = [(x - w / 2) * scale[0], (y - h / 2) * scale[1]]
                    corners += [(x + w / 2) * scale[0], (y + h / 2) * scale[1]]
                    things.append(Thing(names[label], [*corners, value], None))
            results.append(things)
        return results

    return find


class Colours:
    """Names the colour of an object by CLIP, everything outside of its mask painted grey."""

    def __init__(self, folder: str, device: str):
        path = existing(folder, "It is what --colour-model names: a CLIP folder in transformers' layout.")
        self.processor, self.model = pretrained(path, device, "CLIPModel")
        self.device, self.known = device, {}

    def classifier(self, name: str):
        """(E, 10) unit columns: per colour the mean of its sentences about a class."""
        import torch
        import torch.nn.functional as F

        if name not in self.known:
            texts = [t.format(c=c, name=name) for c in COLOURS for t in COLOUR_TEMPLATES]
            inputs = self.processor(text=texts, return_tensors="pt", padding=True).to(self.device)
            with torch.inference_mode():
                rows = F.normalize(features_of(self.model.get_text_features(**inputs)), dim=-1)
                means = rows.reshape(len(COLOURS), len(COLOUR_TEMPLATES), -1).mean(dim=1)
                self.known[name] = F.normalize(means, dim=-1).T
        return self.known[name]

    def __call__(self, image: Image.Image, things: Sequence[Thing]) -> list[str]:
        """The colour of each object."""
        import torch
        import torch.nn.functional as F

        if not things:
            return []
        crops = [crop(image, thing) for thing in things]
        inputs = self.processor(images=crops, return_tensors="pt").to(self.device)
        with torch.inference_mode():
            seen = F.normalize(features_of(self.model.get_image_features(**inputs)), dim=-1)
            return [COLOURS[int((row @ self.classifier(t.name)).argmax())] for row, t in zip(seen, things)]


def features_of(output: Any):
    """CLIP's projected features: a tensor, or what wraps it in newer versions."""
    return output.pooler_output if hasattr(output, "pooler_output") else output


def crop(image: Image.Image, thing: Thing) -> Image.Image:
    """The object's box, grey where its mask is not."""
    if thing.mask is not None:
        array = np.array(image)
        array[~thing.mask] = BACKGROUND
        image = Image.fromarray(array)
    x0, y0, x1, y1 = thing.box[:4]
    left, top = min(max(int(x0), 0), image.width - 1), min(max(int(y0), 0), image.height - 1)
    right, bottom = max(min(round(x1), image.width), left + 1), max(min(round(y1), image.height), top + 1)
    return image.crop((left, top, right, bottom))


def as_row(things: Sequence[Thing], colours: Sequence[str]) -> Record:
    """What `geneval` takes: boxes and colours by class."""
    row: Record = {"detections": {}, "colors": {}}
    for thing, colour in zip(things, colours, strict=True):
        row["detections"].setdefault(thing.name, []).append([round(v, 4) for v in thing.box])
        row["colors"].setdefault(thing.name, []).append(colour)
    return row
