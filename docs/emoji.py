"""Renders twenty emoji with their Unicode names as captions: example images for docs/own_images.md.

    python docs/emoji.py my_emoji

Needs Google's Noto Color Emoji (Debian: apt install fonts-noto-color-emoji).
"""

import sys
import unicodedata
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
EMOJI = "😀😎🐱🐶🦊🐸🐧🐢🦋🌵🌻🍎🍌🍕🎂⚽🎸🚗🚀🏠"
IMAGE_SIZE = 64
FONT_SIZE, CANVAS = 109, 136  # the font contains bitmaps of this one size; the canvas fits them


def main(folder: Path) -> None:
    """Write FOLDER/NAME.png and FOLDER/NAME.txt for each emoji."""
    if not Path(FONT).exists():
        sys.exit(
            f"{FONT} does not exist: apt install fonts-noto-color-emoji, or change FONT in docs/emoji.py."
        )
    folder.mkdir(parents=True, exist_ok=True)
    centre = (CANVAS // 2, CANVAS // 2)
    font = ImageFont.truetype(FONT, FONT_SIZE)
    for emoji in EMOJI:
        name = unicodedata.name(emoji).lower()
        image = Image.new("RGB", (CANVAS, CANVAS), (240, 240, 240))
        ImageDraw.Draw(image).text(centre, emoji, font=font, embedded_color=True, anchor="mm")
        stem = folder / name.replace(" ", "-")
        image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.LANCZOS).save(stem.with_suffix(".png"))
        stem.with_suffix(".txt").write_text(name + "\n")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
