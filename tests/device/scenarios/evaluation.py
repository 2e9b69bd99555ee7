"""Models that evaluation runs: features of images, detectors, judges; class-conditional generation."""

import importlib
from typing import Any

import numpy as np
import torch
from emulated_cuda import host_copy, measure
from PIL import Image

from open_unitok.eval.core.model import Model
from open_unitok.eval.judges import object_detector
from open_unitok.eval.judges.clip_model import ClipModel
from open_unitok.eval.judges.vqa_model import VqaModel
from open_unitok.eval.metrics.inception import Inception, PortExtractor, resize_torch
from open_unitok.generation import Sampling

from .parts import TESTS, Folders, load_conftest

rng = np.random.default_rng(0)
PICTURES = [rng.integers(0, 255, (48, 64, 3), np.uint8) for _ in range(2)]
IMAGES = [Image.fromarray(pixels) for pixels in PICTURES]


def _both(work: Any) -> dict:
    """Results on the device and on the CPU, as the largest difference; what the device counted."""
    on_cpu = work("cpu")
    found, report = measure(work, "cuda")
    assert found.keys() == on_cpu.keys()
    error = {
        name: float(np.abs(np.asarray(found[name], float) - np.asarray(on_cpu[name], float)).max())
        for name in found
    }
    return {**report, "error": error}


def scenario_features() -> dict:
    """Inception's features, and a tokenizer's reconstructions and embeddings (zero-shot, linear probe)."""
    conftest = load_conftest("generation")
    parts = (conftest.tiny_model(), conftest.tiny_unitok.__wrapped__(), TESTS / "golden")
    folder = conftest.folder.__wrapped__(Folders(), *parts)
    torch.manual_seed(0)
    net = Inception().eval()

    def work(device: str) -> dict:
        model = Model(folder / "unitok", device)
        features = PortExtractor(net, resize_torch, False, device)(PICTURES)
        return {
            "inception": features[0],
            "reconstruction": model.reconstruct(IMAGES).decoded,
            "zero-shot": model.embed_images(IMAGES),
            "linear probe": model.features(IMAGES, "mean"),
        }

    return _both(work)


def scenario_judges() -> dict:
    """A Mask2Former as detector, colours and embeddings by CLIP, a VQA model."""
    tests = importlib.import_module("tests.eval.judges.test_judges")
    words = tests.words.__wrapped__(Folders())
    clip = str(tests.clip.__wrapped__(words, Folders()))
    mask2former, llava = (getattr(tests, n).__wrapped__ for n in ("mask2former", "llava"))
    detector, vqa = str(mask2former(Folders())), llava(words, Folders())

    def work(device: str) -> dict:
        detections = object_detector.load_detector(detector, device)(IMAGES, ["cup"])
        things = [object_detector.Detection("cup", [4, 4, 20, 20, 0.9], None)]
        colours = object_detector.ColourClassifier(clip, device)(IMAGES[0], things)
        embedder = ClipModel(clip, device, "--clip-model")
        judge = VqaModel(vqa, device)
        return {
            "boxes": [detection.box for found in detections for detection in found],
            "colours": [object_detector.COLOURS.index(colour) for colour in colours],
            "image embeddings": embedder.embed_images(IMAGES),
            "text embeddings": embedder.embed_texts(["red cup", "a photo"]),
            "probabilities": judge.probabilities(IMAGES, ["red cup"] * 2, "Yes"),
        }

    return _both(work)


def scenario_classes() -> dict:
    """Class-conditional generation: captured, eager and CPU codes."""
    tests = importlib.import_module("tests.generation.test_class_sampling")
    sampling = Sampling(guidance=2.0, temperature=0.8, top_k=7)

    def codes(device: str, **options: Any) -> torch.Tensor:
        return host_copy(tests.generate(tests.build().to(device), [0, 3], sampling, **options))

    captured, report = measure(codes, "cuda")
    equal = torch.equal(captured, codes("cuda", backend="torch"))
    return {**report, "equal": equal, "equal_to_cpu": torch.equal(captured, codes("cpu"))}
