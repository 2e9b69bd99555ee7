"""Images saved as a benchmark lays them out, drawn by a model or drawn elsewhere."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from open_unitok.core.errors import UserError

from .harness import Record, Sample, Settings, Task, Work

FORMATS = ("jpg", "png")
JPEG_QUALITY = 75  # Pillow's default, with which the published drawings were saved


def generation_metadata(settings: Settings, default: str) -> dict[str, Any]:
    """What a result says of how its images came about.

    Raises:
        UserError: an unknown image format.
    """
    kind = settings.image_format or default
    if kind not in FORMATS:
        raise UserError(f"image_format is {kind!r}; allowed: {', '.join(FORMATS)}.")
    return {
        "decoding": settings.decoding,
        "images": "JPEG of quality 75" if kind == "jpg" else "PNG",
        "format": kind,
    }


def generate_images(model: Any, batch: list[Sample]) -> list[np.ndarray | str]:
    """One uint8 image per sample, or why there is none."""
    if hasattr(model, "load_batch"):  # drawn elsewhere
        return model.load_batch(batch)
    try:
        return [np.asarray(p) for p in model.generate([s.prompt for s in batch], [s.seed for s in batch])]
    except UserError as error:
        if len(batch) == 1:
            return [str(error)]
        return [generate_images(model, [sample])[0] for sample in batch]  # one of them is to blame: find it


def save_generated_images(model: Any, batch: list[Sample], out: Path, task: Task) -> list[Record]:
    """Draw a batch and save it below `out/images` under the samples' ids."""
    from PIL import Image

    rows: list[Record] = []
    kind = task.metadata["format"]
    for sample, result in zip(batch, generate_images(model, batch)):
        if isinstance(result, str):
            rows.append({"error": result})
            continue
        path = out / "images" / f"{sample.id}.{kind}"
        path.parent.mkdir(parents=True, exist_ok=True)
        options = {"quality": JPEG_QUALITY} if kind == "jpg" else {}
        Image.fromarray(result).save(path, **options)
        rows.append({"file": path.relative_to(out).as_posix(), "seed": sample.seed})
    return rows


def worker(data: Path, settings: Settings) -> Work:
    """`save_drawings`, whatever the data."""
    return save_generated_images


def require_generated_images(task: Task, rows: dict[int, Record], folder: Path) -> None:
    """Raise UserError where there is not one drawing to score."""
    if not any(rows.get(s.index, {}).get("file") for s in task.samples):
        raise UserError(f"{folder}: there is not one drawing, so there is nothing to score.")


def unscored_records(task: Task, rows: dict[int, Record]) -> list[Record]:
    """A row per sample; these benchmarks have no score per image."""
    return [
        {"index": s.index, "id": s.id, "prompt": s.prompt, "file": rows.get(s.index, {}).get("file")}
        for s in task.samples
    ]


class ExternalImages:
    """Images of another system in a model's place: a folder in the benchmark's layout or an .npz.

    With `grid` a prompt's images stand in one file `ID.png`, row by row in 2 x 2 squares of that side, as
    DPG-Bench's own scorer takes them.

    Raises:
        UserError: neither.
    """

    device, kind = "cpu", "images"

    def __init__(self, path: Path, device: str = "cpu", grid: int | None = None):
        self.path, self.device, self.grid, self.arrays = path, device, grid, None
        if path.is_file():
            from .image_sets import images_of_array

            self.arrays = images_of_array("samples", path)

    def needs(self, kind: str, benchmark: str) -> None:
        """Raise UserError for a benchmark that does not draw."""
        if kind != "generator":
            raise UserError(f"{benchmark} needs a model, but {self.path} holds images alone.")
        if self.grid and (benchmark != "dpg_bench" or self.arrays is not None):
            raise UserError("--grid is for DPG-Bench, whose drawings may be a folder of 2 x 2 images.")

    def describe(self) -> dict[str, Any]:
        """Path and fingerprint: of names and sizes."""
        import hashlib

        files = [self.path] if self.path.is_file() else sorted(p for p in self.path.rglob("*") if p.is_file())
        text = "\n".join(
            f"{p.name if p == self.path else p.relative_to(self.path)} {p.stat().st_size}" for p in files
        )
        found = hashlib.sha256(text.encode()).hexdigest()
        return {"path": str(self.path), "kind": "external images", "fingerprint": found}

    def load_batch(self, batch: Sequence[Sample]) -> list[np.ndarray | str]:
        """The image of each sample: by its place in an array, else by its id and any suffix."""
        from .annotations import read_image
        from .imagenet import SUFFIXES

        results: list[np.ndarray | str] = []
        for sample in batch:
            try:
                if self.arrays is not None:
                    if sample.index >= len(self.arrays.names):
                        raise UserError(f"{self.path} holds only {len(self.arrays.names)} images.")
                    results.append(self.arrays.load(sample.index))
                    continue
                name, _, number = str(sample.id).rpartition("/") if self.grid else (str(sample.id), "", "0")
                places = [self.path / f"{name}{suffix}" for suffix in SUFFIXES]
                path = next((p for p in places if p.exists()), places[0])
                image = np.asarray(read_image(path))
                results.append(grid_cell(image, int(number), self.grid, path) if self.grid else image)
            except UserError as error:
                results.append(str(error))
        return results


def grid_cell(image: np.ndarray, number: int, side: int, path: Path) -> np.ndarray:
    """The number-th of four images, row by row: uint8 (H, W, 3) -> (side, side, 3)."""
    top, left = side * (number // 2), side * (number % 2)
    if number > 3 or image.shape[0] < top + side or image.shape[1] < left + side:
        raise UserError(
            f"{path}: {image.shape[1]} x {image.shape[0]} pixels have no {number + 1}. square of {side}."
        )
    return image[top : top + side, left : left + side]


def holds_external_images(path: str | Path) -> bool:
    """Whether a path holds images in place of a model."""
    path = Path(path)
    if path.suffix == ".npz":
        return True
    from .imagenet import SUFFIXES

    if not path.is_dir() or (path / "config.json").exists():
        return False
    return any(p.suffix in SUFFIXES for p in path.rglob("*"))
