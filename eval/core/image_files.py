"""Reads the images of a batch of samples, writes PNG files."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from open_unitok.core.errors import UserError

from .annotations import read_image
from .harness import Record, Sample


def open_images(batch: list[Sample]) -> tuple[list[Record], dict[int, Any]]:
    """A record per sample, with an error if its image is unreadable, and the images by batch position."""
    records: list[Record] = [{} for _ in batch]
    images = {}
    for i, sample in enumerate(batch):
        try:
            images[i] = read_image(sample.image)
        except UserError as error:
            records[i] = {"error": str(error)}
    return records, images


def save_image(image: np.ndarray, path: Path) -> None:
    """Write uint8 (H, W, 3) as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)
