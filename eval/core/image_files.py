"""Images of a batch of samples from disk, and to disk."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from open_unitok.core.errors import UserError

from .annotations import read_image
from .harness import Record, Sample


def open_images(batch: list[Sample]) -> tuple[list[Record], dict[int, Any]]:
    """Rows with an error where an image cannot be read, and the images that can, by place in the batch."""
    rows: list[Record] = [{} for _ in batch]
    images = {}
    for i, sample in enumerate(batch):
        try:
            images[i] = read_image(sample.image)
        except UserError as error:
            rows[i] = {"error": str(error)}
    return rows, images


def save_image(picture: np.ndarray, path: Path) -> None:
    """uint8 (H, W, 3) to a PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path)
