"""Template-matching detector for scenes of coloured shapes; replaces GenEval's Mask2Former and CLIP.

`scenes.json` defines the classes (shapes), the palette and the grid. If any cell of an image is explained
neither by the background nor by a template, no objects are returned.

Shapes: B images, H side of an image, G cells, c side of a cell, P pixels of a cell, T templates, M non-empty
cells.
"""

import functools
import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from open_unitok.core.errors import UserError
from open_unitok.core.text_files import read_json

SUPERSAMPLING = 4  # samples per pixel and axis when templates are rendered
POSITION_STEP = 0.5  # pixels between the tested positions
SLACK = 0.5  # pixels by which an object may exceed the sizes and shifts of the scenes
CHUNK = 256  # images or cells per step: bounds the memory


@dataclass(frozen=True)
class Tolerances:
    """Accepted deviations from a perfect rendering, in levels of 0 to 255.

    Tuned so that reconstructions of at least 28 dB pass, and strong blur, blends and shuffled tiles fail.
    """

    empty: float = 16.0  # RMS difference from the background in an empty cell
    blob: float = 60.0  # largest 3 x 3 mean of the residual
    dark: float = 25.0  # distance of a background below the darkest of the scenes
    local: float = 18.0  # distance of a cell's background from that of the image
    residual: float = 0.25  # fraction of an object's energy that its template does not explain
    color: float = 60.0  # Euclidean distance of an object's colour from the palette's
    margin: float = 1.1  # lower limit of the ratio of second-best to best residual over shapes


@dataclass(frozen=True)
class DetectedObject:
    """An object: `cell` is (row, column), `box` x0, y0, x1, y1 in pixels, `score` from 0.9 to a perfect 1."""

    shape: str
    color: str
    texture: str
    size: float
    cell: tuple[int, int]
    box: tuple[float, float, float, float]
    score: float


@dataclass(frozen=True)
class SceneDetection:
    """The objects of one image; if anything is unexplained, not `clean`: no objects, and a `reason`."""

    clean: bool
    objects: tuple[DetectedObject, ...]
    reason: str = ""

    @property
    def key(self) -> Counter:
        """Counts of (shape, colour, texture, cell): equal for equal scenes."""
        return Counter((o.shape, o.color, o.texture, o.cell) for o in self.objects)

    def geneval(self) -> tuple[dict[str, list[list[float]]], dict[str, list[str]]]:
        """Boxes with scores per class, best first, and their colours, in the format of the GenEval scorer."""
        boxes: dict[str, list[list[float]]] = {}
        colors: dict[str, list[str]] = {}
        for found in sorted(self.objects, key=lambda o: -o.score):
            boxes.setdefault(found.shape, []).append([*found.box, found.score])
            colors.setdefault(found.shape, []).append(found.color)
        return boxes, colors

    def textures(self) -> dict[str, list[str]]:
        """Textures per class, in the order of the boxes of `geneval`."""
        textures: dict[str, list[str]] = {}
        for found in sorted(self.objects, key=lambda o: -o.score):
            textures.setdefault(found.shape, []).append(found.texture)
        return textures


def same_scene(detection: SceneDetection, scene: dict[str, Any]) -> bool:
    """Whether the detected objects are exactly those of a scene of `captions.json`."""
    wanted = Counter((o["shape"], o["color"], o["texture"], tuple(o["cell"])) for o in scene["objects"])
    return detection.clean and detection.key == wanted


def only_object(detection: SceneDetection, shape: str, color: str, cell: Sequence[int] | None = None) -> bool:
    """Whether exactly one object is detected, with this shape and colour (and grid cell)."""
    if len(detection.objects) != 1:
        return False
    found = detection.objects[0]
    return (found.shape, found.color) == (shape, color) and (cell is None or found.cell == tuple(cell))


class ScenesDetector:
    """Detector for the scenes of one `scenes.json`."""

    def __init__(self, description: dict[str, Any], tolerances: Tolerances = Tolerances()):
        self.tolerances = tolerances
        self.size, self.grid = int(description["size"]), int(description["grid"])
        self.cell = self.size // self.grid
        self.palette = {name: np.array(color, np.float32) for name, color in description["palette"].items()}
        self.shapes = [shape for shape, _ in description["outlines"].items()]
        # "light" is the range of background levels; older files have none: any background passes
        self._darkest = description.get("light", [0, 255])[0] - self.tolerances.dark
        self._description = description

    @classmethod
    def from_file(cls, path: str | Path, tolerances: Tolerances = Tolerances()) -> "ScenesDetector":
        """The detector for a `scenes.json`, or for a folder that contains one.

        Raises:
            UserError: the file is missing or does not describe scenes.
        """
        path = Path(path)
        path = path / "scenes.json" if path.is_dir() else path
        description = read_json(path)
        missing = [
            k for k in ("size", "grid", "palette", "outlines", "sizes", "jitter") if k not in description
        ]
        if missing:
            raise UserError(f"{path} does not describe scenes: it has no {', '.join(missing)}.")
        try:
            return cls(description, tolerances)
        except (AttributeError, LookupError, TypeError, ValueError, ZeroDivisionError) as error:
            raise UserError(f"{path} does not describe scenes: {type(error).__name__}: {error}.") from error

    def __call__(self, images: Any) -> list[SceneDetection]:
        """Detect objects in images, (B, H, H, 3) uint8 or a sequence of (H, H, 3) arrays or PIL images.

        Raises:
            UserError: an image does not have the size of the scenes.
        """
        batch = np.stack([np.asarray(image) for image in images]) if len(images) else None
        if batch is None:
            return []
        if batch.shape[1:] != (self.size, self.size, 3):
            raise UserError(
                f"images of shape {batch.shape[1:]}; these scenes are {(self.size, self.size, 3)}."
            )
        starts = range(0, len(batch), CHUNK)
        return [found for i in starts for found in self._detect(batch[i : i + CHUNK])]

    # ---- one batch -----------------------------------------------------------------------------------------

    def _detect(self, batch: np.ndarray) -> list[SceneDetection]:
        """Detect objects in (B, H, H, 3)."""
        cells = self._cells(batch.astype(np.float32))  # (B, G, c, c, 3)
        background = self._background(cells)  # (B, G, c, c, 3), a plane per image
        # shapes do not reach the rim of their cell, so the rim shows the background
        rim = _rim(cells - background)  # (B, G, R, 3)
        local = np.median(rim, axis=2)  # (B, G, 3)
        off = (np.abs(local).max(axis=2) > self.tolerances.local).any(axis=1)
        off |= (background.mean(axis=(1, 2, 3)) < self._darkest).any(axis=1)
        # compare with the background of the cell, not of the image: reconstructions may tint single cells
        ground = background + local[:, :, None, None]
        difference = cells - ground
        full = np.sqrt((difference**2).mean(axis=(2, 3, 4))) > self.tolerances.empty
        full |= _blob(difference) > self.tolerances.blob
        where = np.argwhere(full)
        found: dict[tuple[int, int], DetectedObject | str] = {}
        for start in range(0, len(where), CHUNK):
            picked = where[start : start + CHUNK]
            results = self._fit(difference[tuple(picked.T)], ground[tuple(picked.T)], picked[:, 1])
            found.update({(int(b), int(g)): result for (b, g), result in zip(picked, results)})
        detections = []
        for b in range(len(batch)):
            results = [found[b, g] for g in range(self.grid**2) if (b, g) in found]
            bad = [r for r in results if isinstance(r, str)]  # one unexplained cell rejects the whole image
            bad += ["background"] if off[b] else []
            objects = () if bad else tuple(r for r in results if isinstance(r, DetectedObject))
            detections.append(SceneDetection(not bad, objects, bad[0] if bad else ""))
        return detections

    def _cells(self, batch: np.ndarray) -> np.ndarray:
        """(B, H, H, 3) -> (B, G, c, c, 3), row by row."""
        g, c = self.grid, self.cell
        cut = batch.reshape(-1, g, c, g, c, 3).transpose(0, 1, 3, 2, 4, 5)
        return np.ascontiguousarray(cut.reshape(-1, g * g, c, c, 3))

    def _background(self, cells: np.ndarray) -> np.ndarray:
        """The background of each image: the median over the rims of its cells, or a plane fitted to them."""
        rim = _rim(cells)
        flat = rim.reshape(len(cells), -1, 3)
        ground = np.median(flat, axis=1)[:, None, None, None]
        if not self._description.get("gradient"):
            return np.broadcast_to(ground, cells.shape)
        # least squares per image: value = a x + b y + c on the rim pixels near the median
        at = (np.arange(self.size, dtype=np.float32) + 0.5) / self.size - 0.5
        y, x = np.meshgrid(at, at, indexing="ij")
        plane = self._cells(np.stack([x, y, np.ones_like(x)], axis=2)[None])  # (1, G, c, c, 3): x, y, 1
        design = _rim(plane).reshape(-1, 3)
        keep = np.abs(flat - ground[:, 0, 0]).max(axis=2) < self._description["gradient"] + 16
        planes = []
        for values, good in zip(flat, keep):
            # two fits: the second excludes outliers of the first
            for _ in range(2):
                usable = good if good.sum() > 8 else np.ones_like(good)
                solution = np.linalg.lstsq(design[usable], values[usable], rcond=None)[0]
                good = np.abs(values - design @ solution).max(axis=1) < 12
            planes.append(plane[0] @ solution)
        return np.stack(planes).astype(np.float32)

    @functools.cached_property
    def _templates(self) -> tuple[np.ndarray, np.ndarray, list[tuple[str, str, float, float, float]]]:
        """Coverages (T, P), energies (T,) and (shape, texture, size, x shift, y shift) of the templates."""
        about = self._description
        steps = math.floor((about["jitter"] + SLACK) / POSITION_STEP + 1e-6)
        sizes = sorted({float(size) + slack for size in about["sizes"] for slack in (-SLACK, 0, SLACK)})
        masks, kinds = [], []
        for (shape, outline), texture, size in itertools.product(
            about["outlines"].items(), about.get("textures", ["plain"]), sizes
        ):
            fine, unit = _supersampled_shape(outline, texture, size, self.cell, steps, about.get("pale", 1.0))
            pixels = _box_means(fine, SUPERSAMPLING)  # coverage of the pixel that starts at each sample
            # a shift by one step is a shift by `unit` samples: slice instead of rendering again
            for right, down in itertools.product(range(-steps, steps + 1), repeat=2):
                rows, columns = (
                    slice(first, first + (self.cell - 1) * SUPERSAMPLING + 1, SUPERSAMPLING)
                    for first in ((steps - down) * unit, (steps - right) * unit)
                )
                masks.append(pixels[rows, columns].ravel())
                kinds.append((shape, texture, size, right * POSITION_STEP, down * POSITION_STEP))
        matrix = np.stack(masks)
        return matrix, (matrix**2).sum(axis=1), kinds

    @functools.cached_property
    def _shape_of(self) -> np.ndarray:
        """(T,) index of each template's shape."""
        return np.array([self.shapes.index(kind[0]) for kind in self._templates[2]])

    def _fit(
        self, difference: np.ndarray, ground: np.ndarray, where: np.ndarray
    ) -> list["DetectedObject | str"]:
        """Per cell (M, c, c, 3) the object that explains it, or one word with the reason why none does."""
        matrix, norms, kinds = self._templates
        flat = difference.reshape(len(difference), -1, 3)
        energy = (flat**2).sum(axis=(1, 2)) + 1e-6
        # an object is coverage x colour, so its cell has rank one: project on the main colour axis and
        # compare the energy that each template explains there, (flat . axis . template)^2 / |template|^2
        _, axes = np.linalg.eigh(np.einsum("mpi,mpj->mij", flat, flat))
        gain = (np.einsum("mpi,mi->mp", flat, axes[:, :, -1]) @ matrix.T) ** 2 / norms  # (M, T)
        best = gain.argmax(axis=1)
        by_shape = [gain[:, self._shape_of == index].max(axis=1) for index in range(len(self.shapes))]
        residuals = np.sort(1 - np.stack(by_shape, axis=1) / energy[:, None], axis=1)  # per shape, best first
        # least-squares colour of the best template, and the residual without it
        mask = matrix[best]  # (M, P)
        amount = np.einsum("mp,mpi->mi", mask, flat) / norms[best][:, None]
        left = flat - mask[:, :, None] * amount[:, None]
        residual = (left**2).sum(axis=(1, 2)) / energy
        blobs = _blob(left.reshape(difference.shape)[:, None])[:, 0]
        # mean background under the mask: colour = background + amount
        base = (mask[:, :, None] * ground.reshape(flat.shape)).sum(axis=1) / mask.sum(axis=1)[:, None]
        results: list[DetectedObject | str] = []
        for m, cell in enumerate(where):
            color, distance = self._color(base[m] + amount[m])
            if residual[m] > self.tolerances.residual:
                results.append("shape")
            elif blobs[m] > self.tolerances.blob:
                results.append("smudge")
            elif distance > self.tolerances.color:
                results.append("color")
            elif residuals[m, 1] < self.tolerances.margin * residuals[m, 0]:
                results.append("unsure")
            else:
                results.append(self._detected(kinds[best[m]], color, int(cell), float(residual[m])))
        return results

    def _color(self, color: np.ndarray) -> tuple[str, float]:
        """The nearest colour of the palette and its distance."""
        distances = {name: float(np.linalg.norm(color - known)) for name, known in self.palette.items()}
        name = min(distances, key=lambda n: distances[n])
        return name, distances[name]

    def _detected(self, kind: tuple, color: str, cell: int, residual: float) -> DetectedObject:
        shape, texture, size, dx, dy = kind
        row, column = divmod(cell, self.grid)
        x, y, half = (column + 0.5) * self.cell + dx, (row + 0.5) * self.cell + dy, size / 2
        score = 1 - 0.3 * residual  # residual <= 0.25, so it exceeds GenEval's 0.9 for counting
        return DetectedObject(
            shape, color, texture, size, (row, column), (x - half, y - half, x + half, y + half), score
        )


def _rim(cells: np.ndarray) -> np.ndarray:
    """The R outermost pixels of each cell, (B, G, R, 3)."""
    top, bottom = cells[:, :, 0], cells[:, :, -1]
    left, right = cells[:, :, 1:-1, 0], cells[:, :, 1:-1, -1]
    return np.concatenate([top, bottom, left, right], axis=2)


def _blob(difference: np.ndarray) -> np.ndarray:
    """Largest absolute 3 x 3 mean of any channel, (B, G)."""
    c = difference.shape[2] - 2
    rows = np.sum([difference[:, :, i : c + i] for i in range(3)], axis=0)
    means = np.sum([rows[:, :, :, i : c + i] for i in range(3)], axis=0) / 9
    return np.abs(means).max(axis=(2, 3, 4))


def _box_means(fine: np.ndarray, side: int) -> np.ndarray:
    """Means of all side x side boxes of (S, S), as (S - side + 1, S - side + 1) float32."""
    # summed-area table
    sums = np.pad(fine.astype(np.float64), ((1, 0), (1, 0))).cumsum(axis=0).cumsum(axis=1)
    boxes = sums[side:, side:] - sums[:-side, side:] - sums[side:, :-side] + sums[:-side, :-side]
    return (boxes / side**2).astype(np.float32)


def _supersampled_shape(
    outline: Sequence, texture: str, size: float, cell: int, steps: int, pale: float
) -> tuple[np.ndarray, int]:
    """Supersampled coverage of a shape in the centre of a cell, with a border for shifts by `steps`.

    Returns (S, S) float32 in [0, 1], S = SUPERSAMPLING * cell + 2 * steps * unit, and the samples per step.
    """
    unit = round(POSITION_STEP * SUPERSAMPLING)
    count = cell * SUPERSAMPLING + 2 * steps * unit
    at = (np.arange(count, dtype=np.float32) + 0.5 - count / 2) / SUPERSAMPLING
    x, y = at[None, :], at[:, None]
    inside = np.zeros((count, count), bool)
    for ring in outline:
        corners = np.asarray(ring, np.float32) * size
        for (x0, y0), (x1, y1) in zip(corners, np.roll(corners, -1, axis=0)):
            if y0 != y1:  # even-odd rule: toggle where a ray to the right crosses this edge
                inside ^= ((y0 > y) != (y1 > y)) & (x < x0 + (y - y0) * (x1 - x0) / (y1 - y0))
    weight = np.ones((count, count), np.float32)
    if texture == "striped":
        weight[np.broadcast_to(np.mod(y + 2, 6) >= 4, weight.shape)] = pale
    elif texture == "dotted":
        weight[(np.mod(x, 6) - 3) ** 2 + (np.mod(y, 6) - 3) ** 2 <= 1.9**2] = pale
    return inside * weight, unit
