"""Images and tars that the parts make themselves: nothing is downloaded."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {"red": (200, 40, 40), "green": (40, 180, 60), "blue": (40, 60, 200), "yellow": (220, 200, 40)}


def square_image(number: int, side: int) -> tuple[Image.Image, str]:
    """A square of one colour on a grey ground with some noise, and its caption."""
    rng = np.random.default_rng(number)
    name = list(COLOURS)[number % len(COLOURS)]
    pixels = rng.integers(200, 240, (side, side, 3), dtype=np.uint8)
    x, y = rng.integers(0, side // 2, 2)
    pixels[y : y + side // 3, x : x + side // 3] = COLOURS[name]
    return Image.fromarray(pixels), f"a {name} square"


def write_tar(path: Path, count: int, side: int) -> None:
    """A shard of images with a caption and a conversation each."""
    with tarfile.open(path, "w") as tar:
        for number in range(count):
            image, caption = square_image(number, side)
            png = io.BytesIO()
            image.save(png, "PNG")
            turns = [
                {"from": "human", "value": "<image>\nWhat is this?"},
                {"from": "gpt", "value": caption},
            ]
            info = json.dumps({"captions": [caption], "conversations": [turns]}).encode()
            for ending, content in (("png", png.getvalue()), ("json", info)):
                member = tarfile.TarInfo(f"{number:04d}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
