"""The scenes detector finds the objects of renders and good reconstructions and rejects broken images.

A broken image is accepted if it would still be scored as the scene that it was made from.
"""

import numpy as np
import pytest
from PIL import Image, ImageFilter

from open_unitok.core.errors import UserError
from open_unitok.core.files import write_json
from open_unitok.eval.judges.scenes_detector import ScenesDetector, only_object, same_scene
from open_unitok.training.scenes.config import SceneConfig
from open_unitok.training.scenes.dataset import scenes_description
from open_unitok.training.scenes.scene import Scene, SceneObject, object_centre, render_array, sample_scene

COUNT = 300
DEMO = SceneConfig()
RICH = SceneConfig(
    size=64,
    max_objects=4,
    shapes=8,
    colors=10,
    sizes=(16, 20, 25),
    size_names=("small", "medium", "large"),
    textures=("plain", "striped", "dotted"),
    jitter=2,
    gradient=20,
)


class World:
    """Test scenes of a configuration, their renders, and the detector for them."""

    def __init__(self, config: SceneConfig, count: int, path):
        self.config = config
        self.scenes = [sample_scene(config, "test", index) for index in range(count)]
        self.renders = np.stack([render_array(scene) for scene in self.scenes])
        write_json(path / "scenes.json", scenes_description(config))
        self.detect = ScenesDetector.from_file(path)
        self.random = np.random.default_rng(0)

    def accepted(self, images: np.ndarray) -> float:
        """Share of images that are scored as the original scene."""
        detections = self.detect(images)
        return float(np.mean([same_scene(r, s.as_json()) for r, s in zip(detections, self.scenes)]))

    def clean(self, images: np.ndarray) -> float:
        """Share of images that are taken for some scene."""
        return float(np.mean([detection.clean for detection in self.detect(images)]))

    def f1(self, images: np.ndarray) -> float:
        """F1 of the objects found, by shape, colour, texture and cell."""
        hits = found = expected = 0
        for detection, scene in zip(self.detect(images), self.scenes):
            wanted = [(t.shape, t.color, t.texture, t.cell) for t in scene.objects]
            got = list(detection.key.elements())
            hits += len(set(wanted) & set(got))  # one object per cell, so keys are unique
            found += len(got)
            expected += len(wanted)
        return 2 * hits / (found + expected)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return World(DEMO, COUNT, tmp_path_factory.mktemp("demo"))


@pytest.fixture(scope="module")
def rich(tmp_path_factory):
    return World(RICH, 100, tmp_path_factory.mktemp("rich"))


def blurred(images: np.ndarray, radius: float) -> np.ndarray:
    blurs = (Image.fromarray(p).filter(ImageFilter.GaussianBlur(radius)) for p in images)
    return np.stack([np.asarray(image) for image in blurs])


def as_levels(images: np.ndarray) -> np.ndarray:
    return images.clip(0, 255).round().astype(np.uint8)


def psnr(images: np.ndarray, renders: np.ndarray) -> float:
    error = ((images.astype(float) - renders) ** 2).mean(axis=(1, 2, 3))
    return float((10 * np.log10(255**2 / error)).mean())


def tiles(images: np.ndarray, side: int) -> np.ndarray:
    """(B, n * n, side, side, 3)"""
    n = images.shape[1] // side
    cut = images.reshape(len(images), n, side, n, side, 3).transpose(0, 1, 3, 2, 4, 5)
    return cut.reshape(len(images), n * n, side, side, 3)


def joined(cut: np.ndarray) -> np.ndarray:
    b, count, side = cut.shape[:3]
    n = round(count**0.5)
    return cut.reshape(b, n, n, side, side, 3).transpose(0, 1, 3, 2, 4, 5).reshape(b, n * side, n * side, 3)


# ---- accepted -------------------------------------------------------------------------------------


def test_renders_are_detected(demo):
    assert demo.f1(demo.renders) >= 0.99
    assert demo.accepted(demo.renders) >= 0.99


def test_richer_renders_are_detected(rich):
    assert rich.f1(rich.renders) >= 0.99


@pytest.mark.parametrize(("radius", "noise"), [(0.7, 7.4), (0.3, 10.0), (0.85, 2.0)])
def test_reconstructions_of_28_db_are_detected(demo, radius, noise):
    worse = blurred(demo.renders, radius)
    worse = as_levels(worse + demo.random.normal(0, noise, worse.shape))
    assert psnr(worse, demo.renders) < 29.3
    assert demo.accepted(worse) >= 0.95


def test_a_coarse_code_of_the_cells_is_detected(demo):
    """Structured errors like a tokenizer's: each cell from its 30 strongest principal components."""
    train = np.stack([render_array(sample_scene(DEMO, "train", index)) for index in range(1200)])
    side = DEMO.cell
    flat = tiles(train, side).reshape(-1, side * side * 3).astype(np.float32)
    mean = flat.mean(axis=0)
    _, axes = np.linalg.eigh((flat - mean).T @ (flat - mean))
    basis = axes[:, -30:]
    cells = tiles(demo.renders, side)
    coded = (cells.reshape(-1, len(mean)) - mean) @ basis @ basis.T + mean
    coarse = joined(as_levels(coded).reshape(cells.shape))
    assert psnr(coarse, demo.renders) < 29.5
    assert demo.accepted(coarse) >= 0.95


# ---- rejected ------------------------------------------------------------------------------


def test_strong_blur_is_rejected(demo):
    for radius in (2.5, 3.0, 4.0):
        broken = blurred(demo.renders, radius)
        assert demo.accepted(broken) <= 0.05 and demo.clean(broken) <= 0.05


def test_a_half_painted_over_is_rejected(demo):
    """The half of the image that holds an object, and the half of each object."""
    halves, parts = demo.renders.copy(), demo.renders.copy()
    for half, part, scene in zip(halves, parts, demo.scenes):
        thing = scene.objects[0]
        middle = scene.size // 2
        rows, columns = slice(0, middle), slice(middle, None)
        across = demo.random.integers(2)
        lost = rows if thing.cell[1 - across] == 0 else columns
        half[(slice(None), lost) if not across else lost] = scene.background
        for thing in scene.objects:
            x, y = (round(v) for v in object_centre(thing, DEMO.cell))
            top, left = thing.cell[0] * DEMO.cell, thing.cell[1] * DEMO.cell
            cell = part[top : top + DEMO.cell, left : left + DEMO.cell]
            lost = [np.s_[: y - top], np.s_[y - top :], np.s_[:, : x - left], np.s_[:, x - left :]]
            cell[lost[demo.random.integers(4)]] = scene.background
    grey = demo.renders.copy()
    grey[:, :, DEMO.size // 2 :] = 128
    for broken in (halves, parts, grey):
        assert demo.accepted(broken) <= 0.05
    for broken in (parts, grey):  # a half without its object may be detected as a scene with one object less
        assert demo.clean(broken) <= 0.05


def test_two_blended_images_are_rejected(demo):
    others = np.roll(demo.renders, 1, axis=0).astype(float)
    broken = as_levels((demo.renders + others) / 2)
    assert demo.accepted(broken) <= 0.05 and demo.clean(broken) <= 0.05


def test_shuffled_tiles_are_rejected(demo):
    for side in (4, 8):
        cut = tiles(demo.renders, side)
        mixed = np.stack([t[demo.random.permutation(len(t))] for t in cut])
        assert demo.accepted(joined(mixed)) <= 0.05 and demo.clean(joined(mixed)) <= 0.05


def test_images_like_random_codes_are_rejected(demo):
    cut = tiles(demo.renders, 8)
    flat = cut.reshape(-1, *cut.shape[2:])
    mixed = joined(flat[demo.random.permutation(len(flat))].reshape(cut.shape))
    noise = demo.random.integers(0, 256, demo.renders.shape, dtype=np.uint8)
    blends = demo.random.dirichlet(np.ones(4), len(mixed)) @ demo.renders[:4].reshape(4, -1)
    for broken in (mixed, noise, blurred(noise, 2), as_levels(blends).reshape(mixed.shape)):
        assert demo.accepted(broken) <= 0.05
    for broken in (mixed, noise, blurred(noise, 2)):
        assert demo.clean(broken) <= 0.05


def test_richer_broken_images_are_rejected(rich):
    cut = tiles(rich.renders, 8)
    shuffled = joined(np.stack([t[rich.random.permutation(len(t))] for t in cut]))
    blended = (rich.renders + np.roll(rich.renders, 1, axis=0).astype(float)) / 2
    for broken in (blurred(rich.renders, 4), shuffled, as_levels(blended)):
        assert rich.accepted(broken) <= 0.05


def test_a_smudge_next_to_an_object_rejects_the_image(demo):
    scene = Scene(32, 2, (SceneObject("circle", "red", 12.0, (0, 0)),), (240, 240, 240))
    image = render_array(scene)
    assert demo.detect([image])[0].clean
    image[22:27, 20:28] = (120, 90, 140)
    detection = demo.detect([image])[0]
    assert not detection.clean and not detection.objects and detection.reason


# ---- outputs --------------------------------------------------------------------------------------


def test_detections_in_geneval_format(demo):
    things = (
        SceneObject("circle", "red", 12.0, (0, 0), (1.0, -1.0)),
        SceneObject("circle", "blue", 10.0, (1, 1)),
    )
    detection = demo.detect([render_array(Scene(32, 2, things, (240, 236, 230)))])[0]
    boxes, colors = detection.geneval()
    assert list(boxes) == list(colors) == ["circle"] and sorted(colors["circle"]) == ["blue", "red"]
    by_color = dict(zip(colors["circle"], boxes["circle"]))
    assert by_color["red"][:4] == pytest.approx([3, 1, 15, 13], abs=0.6)
    assert by_color["blue"][:4] == pytest.approx([19, 19, 29, 29], abs=0.6)
    assert all(0.9 < box[4] <= 1 for box in boxes["circle"])
    assert not only_object(detection, "circle", "red")


def test_only_object(demo):
    image = render_array(Scene(32, 2, (SceneObject("cross", "green", 11.0, (1, 0)),), (240, 236, 230)))
    detection = demo.detect([image])[0]
    assert only_object(detection, "cross", "green") and only_object(detection, "cross", "green", [1, 0])
    assert not only_object(detection, "cross", "red")
    assert not only_object(detection, "cross", "green", (0, 0))
    empty = demo.detect([np.full((32, 32, 3), 240, np.uint8)])[0]
    assert empty.clean and not empty.objects and not only_object(empty, "cross", "green")


def test_one_by_one_equals_a_batch(demo):
    together = demo.detect(demo.renders[:8])
    for detection, image in zip(together, demo.renders):
        alone = demo.detect([Image.fromarray(image)])[0]
        assert alone.key == detection.key and alone.clean == detection.clean
    assert demo.detect([]) == []


def test_invalid_inputs_raise(demo, tmp_path):
    with pytest.raises(UserError, match=r"\(32, 32, 3\)"):
        demo.detect(np.zeros((1, 64, 64, 3), np.uint8))
    write_json(tmp_path / "scenes.json", {"size": 32})
    with pytest.raises(UserError, match="has no grid, palette"):
        ScenesDetector.from_file(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        ScenesDetector.from_file(tmp_path / "elsewhere.json")
