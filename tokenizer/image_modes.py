"""Any Pillow image to 8-bit RGB: deep greys are scaled, transparent pixels composited on one colour."""

import numpy as np
from PIL import Image

from open_unitok.core.errors import UserError

BACKGROUND_COLOUR = (255, 255, 255)  # what shows through transparent pixels, everywhere
WAS_TRANSPARENT = "was_transparent"  # key in `info` of a composited image
_DEEP_MODES = ("F", "I")  # and all of I;16, I;16B, I;16L, I;16N


def to_rgb(image: Image.Image) -> Image.Image:
    """A new RGB image without metadata; `info` has `WAS_TRANSPARENT` if a pixel was composited.

    16-bit greys are divided by 257, so that 65535 is white; 16-bit colours arrive from Pillow as their high
    bytes. Mode I is read as 8 bits up to 255 and as 16 bits up to 65535; mode F holds 0 to 1. ICC profiles
    are ignored, as in the published preprocessing.

    Raises:
        UserError: values outside these ranges.
    """
    alpha = None
    if image.mode.startswith(_DEEP_MODES):
        rgb, alpha = _from_deep(image)
    elif image.has_transparency_data:
        # premultiplied grey has one conversion only
        rgba = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        rgb, alpha = rgba.convert("RGB"), rgba.getchannel("A")
    else:
        rgb = image.convert("RGB")
    rgb.info = {}  # neither orientation nor transparency may be applied twice
    if alpha is not None and alpha.getextrema()[0] != 255:
        rgba = rgb.convert("RGBA")
        rgba.putalpha(alpha)
        canvas = Image.new("RGBA", rgb.size, (*BACKGROUND_COLOUR, 255))
        rgb = Image.alpha_composite(canvas, rgba).convert("RGB")
        rgb.info = {WAS_TRANSPARENT: True}
    return rgb


def scale_png_transparency(image: Image.Image) -> None:
    """Bring the transparent colour of an opened PNG to the depth of its pixels; call it before `load`."""
    colour = image.info.get("transparency")
    depth = getattr(image, "tile", None) and image.tile[0][3]  # pyright: ignore
    # Pillow stretches 2- and 4-bit greys to 0..255 and cuts 16-bit colours, but keeps the colour as stored
    if isinstance(colour, int) and depth in ("L;2", "L;4"):
        image.info["transparency"] = colour * 255 // (3 if depth == "L;2" else 15)
    elif isinstance(colour, tuple) and depth == "RGB;16B":
        image.info["transparency"] = tuple(value >> 8 for value in colour)


def _from_deep(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """An image of mode F, I or I;16 as RGB, with its alpha if one grey is transparent."""
    values = np.asarray(image)
    alpha = None
    if isinstance(key := image.info.get("transparency"), int):
        alpha = Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8))
    if image.mode == "F":
        # `not` because comparisons with NaN are false
        if not (values.min() >= 0 and values.max() <= 1):
            raise _out_of_range(values, "floats from 0 to 1")
        grey = np.round(values * 255)
    else:
        low, high = int(values.min()), int(values.max())
        if low < 0 or high > 65535:
            raise _out_of_range(values, "integers from 0 to 255 or 65535")
        # Pillow stretches every deep PGM to 16 bits, dark ones too
        is_8_bit = image.mode == "I" and high <= 255 and image.format != "PPM"
        grey = values if is_8_bit else (values.astype(np.int64) + 128) // 257
    return Image.fromarray(grey.astype(np.uint8)).convert("RGB"), alpha


def _out_of_range(values: np.ndarray, expected: str) -> UserError:
    found = f"from {values.min():g} to {values.max():g}"
    return UserError(f"its values range {found}, expected {expected}: scale them to 8 bits.")
