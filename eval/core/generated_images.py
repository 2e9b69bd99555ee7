"""Generate and save the images of a benchmark, or read images of another system instead."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from open_unitok.core.errors import UserError
from open_unitok.core.image_names import IMAGE_SUFFIXES, is_image_name

from .benchmark import Options, Record, Sample, Task
from .image_files import read_sample_image
from .image_sets import images_of_array

JPEG_QUALITY = 75  # Pillow's default, used for the published images
SAMPLING_KEYS = ("guidance", "temperature", "top_k", "top_p", "greedy", "guidance_schedule")
EXTERNAL = "external images"  # the model kind in run.json if --model is a folder or .npz of images


def generation_metadata(settings: Options, default_format: str) -> dict[str, Any]:
    """The part of a result that describes how images were generated and saved."""
    image_format = settings.image_format or default_format
    return {
        "decoding": describe_sampling(settings),
        "images": f"JPEG of quality {JPEG_QUALITY}" if image_format == "jpg" else "PNG",
        "format": image_format,
    }


def describe_sampling(settings: Options) -> str:
    """The sampling settings in words: guidance scale and schedule, then temperature, top-k and top-p."""
    schedule = "" if settings.guidance_schedule == "constant" else f" ({settings.guidance_schedule})"
    sampled = f"temperature {settings.temperature}, top-k {settings.top_k}, top-p {settings.top_p}"
    return f"guidance {settings.guidance}{schedule}, {'greedy' if settings.greedy else sampled}"


def generate_images(model: Any, batch: list[Sample]) -> list[np.ndarray | str]:
    """Per sample a uint8 image (H, W, 3), or an error message."""
    if isinstance(model, ExternalImages):
        return model.load_batch(batch)
    try:
        return [np.asarray(p) for p in model.generate([s.prompt for s in batch], [s.seed for s in batch])]
    except UserError as error:
        # one rejected prompt fails the whole batch: generate one by one to isolate it
        if len(batch) == 1:
            return [str(error)]
        return [generate_images(model, [sample])[0] for sample in batch]


def save_generated_images(model: Any, batch: list[Sample], out: Path, task: Task) -> list[Record]:
    """Generate a batch and save it below `out/images` under the samples' ids."""
    records: list[Record] = []
    image_format = task.metadata["format"]
    for sample, result in zip(batch, generate_images(model, batch)):
        if isinstance(result, str):
            records.append({"error": result})
            continue
        path = out / "images" / f"{sample.id}.{image_format}"
        path.parent.mkdir(parents=True, exist_ok=True)
        # JPEG only where it is published: compression changes FID and VQAScore
        options = {"quality": JPEG_QUALITY} if image_format == "jpg" else {}
        Image.fromarray(result).save(path, **options)
        records.append({"file": path.relative_to(out).as_posix(), "seed": sample.seed})
    return records


def require_generated_images(task: Task, records: dict[int, Record], folder: Path) -> None:
    """Raise UserError if no image was generated."""
    if not any(records.get(s.index, {}).get("file") for s in task.samples):
        raise UserError(f"{folder}: there is no generated image, so there is nothing to score.")


def unscored_records(task: Task, records: dict[int, Record]) -> list[Record]:
    """Records of scores.jsonl for a benchmark without a score per image, such as FID."""
    return [
        {"index": s.index, "id": s.id, "prompt": s.prompt, "file": records.get(s.index, {}).get("file")}
        for s in task.samples
    ]


def holds_external_images(path: str | Path) -> bool:
    """Whether `path` is an .npz, or a folder of images without config.json, rather than a model."""
    path = Path(path)
    if path.suffix == ".npz":
        return True
    if not path.is_dir() or (path / "config.json").exists():
        return False
    return any(is_image_name(p) for p in path.rglob("*"))


class ExternalImages:
    """Images of another system, used as a model: a folder in the benchmark's layout, or an .npz.

    Args:
        grid: side in pixels of the squares if each file `ID.png` is a 2 x 2 grid of a prompt's images, the
            input format of DPG-Bench's scorer; None = one image per file.

    Raises:
        UserError: an .npz without images.
    """

    kind = EXTERNAL

    def __init__(self, path: Path, device: str = "cpu", grid: int | None = None):
        self.path, self.device, self.grid = path, device, grid
        self.arrays = images_of_array("samples", path) if path.is_file() else None

    def check_needs(self, needs: str, benchmark: str) -> None:
        """Raise UserError unless the benchmark scores generated images."""
        if needs != "generator":
            raise UserError(f"{benchmark} needs a model, but {self.path} holds images.")
        if self.grid and self.arrays is not None:
            raise UserError("--grid needs a folder of 2 x 2 images, but --model is an .npz.")

    def describe(self) -> dict[str, Any]:
        """Path and a fingerprint of file names and sizes, for run.json."""
        files = [self.path] if self.path.is_file() else sorted(p for p in self.path.rglob("*") if p.is_file())
        # names and sizes, not contents: hashing 50,000 images would take minutes
        text = "\n".join(
            f"{p.name if p == self.path else p.relative_to(self.path)} {p.stat().st_size}" for p in files
        )
        digest = hashlib.sha256(text.encode()).hexdigest()
        return {"path": str(self.path), "kind": self.kind, "fingerprint": digest}

    def load_batch(self, batch: Sequence[Sample]) -> list[np.ndarray | str]:
        """Per sample its image, by index in an array or by id in a folder, or an error message."""
        results: list[np.ndarray | str] = []
        for sample in batch:
            try:
                results.append(self._load(sample))
            except UserError as error:
                results.append(str(error))
        return results

    def _load(self, sample: Sample) -> np.ndarray:
        if self.arrays is not None:
            if sample.index >= len(self.arrays.names):
                raise UserError(f"{self.path} holds only {len(self.arrays.names)} images.")
            return self.arrays.load(sample.index)
        # ids of DPG-Bench are ITEM/NUMBER; with a grid, the number is the cell
        name, _, number = str(sample.id).rpartition("/") if self.grid else (str(sample.id), "", "0")
        paths = [self.path / f"{name}{s}" for suffix in IMAGE_SUFFIXES for s in (suffix, suffix.upper())]
        path = next((p for p in paths if p.exists()), paths[0])
        image = np.asarray(read_sample_image(path))
        return _grid_cell(image, int(number), self.grid, path) if self.grid else image


def _grid_cell(image: np.ndarray, number: int, side: int, path: Path) -> np.ndarray:
    """Cell `number` of a 2 x 2 grid, in row-major order from 0: uint8 (H, W, 3) -> (side, side, 3)."""
    top, left = side * (number // 2), side * (number % 2)
    if number > 3 or image.shape[0] < top + side or image.shape[1] < left + side:
        height, width = image.shape[:2]
        raise UserError(f"{path}: {width} x {height} pixels have no cell {number + 1} of side {side}.")
    return image[top : top + side, left : left + side]
