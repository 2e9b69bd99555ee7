"""Draws twenty emoji with their names beside them: images of one's own for the README's LoRA example.

    python docs/emoji.py my_emoji

Needs Google's Noto Color Emoji (Debian: apt install fonts-noto-color-emoji).
"""

import sys
import unicodedata
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
EMOJI = "😀😎🐱🐶🦊🐸🐧🐢🦋🌵🌻🍎🍌🍕🎂⚽🎸🚗🚀🏠"
SIDE, FONT_SIZE = 64, 109  # the font holds bitmaps of this one size


def main(folder: Path) -> None:
    """Write FOLDER/NAME.png and FOLDER/NAME.txt for each."""
    if not Path(FONT).exists():
        sys.exit(f"{FONT} does not exist: apt install fonts-noto-color-emoji, or change FONT in this file.")
    folder.mkdir(parents=True, exist_ok=True)
    font = ImageFont.truetype(FONT, FONT_SIZE)
    for emoji in EMOJI:
        name = unicodedata.name(emoji).lower()
        image = Image.new("RGB", (136, 136), (240, 240, 240))
        ImageDraw.Draw(image).text((68, 68), emoji, font=font, embedded_color=True, anchor="mm")
        stem = folder / name.replace(" ", "-")
        image.resize((SIDE, SIDE), Image.Resampling.LANCZOS).save(stem.with_suffix(".png"))
        stem.with_suffix(".txt").write_text(name + "\n")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
