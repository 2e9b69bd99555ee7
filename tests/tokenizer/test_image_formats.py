"""The one reader of images: orientation, transparency, depth, frames, damage, draft mode."""

import io
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from open_unitok.core.errors import UserError
from open_unitok.tokenizer import image_modes, images
from open_unitok.tokenizer.images import (
    from_pil,
    header_size,
    is_plain,
    load_image,
    open_image_file,
    to_pixels,
)

ROOT = Path(__file__).parents[2]
RED, BLUE, WHITE = (220, 30, 30), (30, 30, 220), (255, 255, 255)
# how a camera stores an image that, turned as its EXIF orientation says, has red at the top
STORED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
LOSSLESS = {"PNG": {}, "WEBP": {"lossless": True}, "TIFF": {}, "BMP": {}}


def upright(width=48, height=32):
    """Red above blue, and a green spot at the top left."""
    image = Image.new("RGB", (width, height), RED)
    image.paste(BLUE, (0, height // 2, width, height))
    image.paste((30, 200, 30), (0, 0, width // 4, height // 4))
    return image


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def with_orientation(orientation, kind, image=None, **options):
    image, exif = image or upright(), Image.Exif()
    exif[0x0112] = orientation
    stored = image.transpose(STORED[orientation]) if orientation in STORED else image
    return encoded(stored, kind, exif=exif, **options)


def png_chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, depth, colour, rows, *chunks):
    """A PNG with any depth; `rows` are packed bytes, `chunks` go before the pixels."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    pixels = png_chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + pixels + png_chunk(b"IEND", b"")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_images_are_turned_upright(kind, orientation):
    data = with_orientation(orientation, kind, **LOSSLESS.get(kind, {"quality": 95}))
    loaded = load_image(data)
    twin = load_image(encoded(upright(), kind, **LOSSLESS.get(kind, {"quality": 95})))
    difference = np.abs(np.asarray(loaded, int) - np.asarray(twin, int))
    assert loaded.size == (48, 32)
    assert difference.max() == 0 if kind in LOSSLESS else difference.mean() < 2
    # an opened PIL image, loaded or not, and one read before: neither turned twice
    with Image.open(io.BytesIO(data)) as image:
        assert load_image(image).tobytes() == loaded.tobytes()
        assert load_image(image).tobytes() == loaded.tobytes()
    assert load_image(loaded).tobytes() == loaded.tobytes()
    assert loaded.info == {} and loaded.getexif().get(0x0112) is None


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "CMYK", "I;16"])
def test_tiff_files_are_turned_upright(tmp_path, mode, orientation):
    """By their path: Pillow maps the pixels of these modes into memory."""
    grey = Image.fromarray(np.asarray(upright().convert("L")).astype(np.uint16) * 257)
    image = grey if mode == "I;16" else upright().convert(mode)
    if mode == "RGBA":
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = image.transpose(STORED[orientation]) if orientation > 1 else image
    stored.save(tmp_path / "a.tif", exif=exif)
    wanted = load_image(image)
    assert load_image(tmp_path / "a.tif").tobytes() == wanted.tobytes() and wanted.size == (48, 32)
    with Image.open(tmp_path / "a.tif") as opened:
        assert load_image(opened).tobytes() == wanted.tobytes()


@pytest.mark.parametrize("value", [0, 9, 99])
def test_impossible_orientations_are_ignored(value):
    exif = Image.Exif()
    exif[0x0112] = value
    assert load_image(encoded(upright(), "PNG", exif=exif)).tobytes() == upright().tobytes()


def test_damaged_exif_is_ignored():
    for garbage in (
        b"Exif\0\0",
        b"Exif\0\0MM\0*\xff\xff\xff\xff",
        b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\x12" * 30,
    ):
        for kind in ("JPEG", "PNG", "WEBP"):
            data = encoded(upright(), kind, exif=garbage)
            assert load_image(data).size == (48, 32), (garbage, kind)


def test_exif_behind_the_pixels_of_a_png():
    exif = Image.Exif()
    exif[0x0112] = 3
    data = encoded(upright().transpose(Image.Transpose.ROTATE_180), "PNG")
    behind = data[:-12] + png_chunk(b"eXIf", exif.tobytes()[6:]) + data[-12:]
    assert load_image(behind).tobytes() == upright().tobytes()


def test_several_images_in_one_file_give_the_first():
    frames = [upright(), Image.new("RGB", (48, 32), "green")]
    for kind, options in (("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {}), ("TIFF", {})):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert load_image(data).tobytes() == upright().tobytes(), kind
    mpo = encoded(frames[0], "MPO", save_all=True, append_images=frames[1:], quality=95)
    assert load_image(mpo).tobytes() == load_image(encoded(frames[0], "JPEG", quality=95)).tobytes()


# ---- transparency ----


def disc(hidden):
    """An opaque red disc; behind it, `hidden` with alpha 0."""
    rgba = np.zeros((64, 64, 4), np.uint8)
    rgba[..., :3] = hidden
    y, x = np.mgrid[:64, :64]
    rgba[(y - 32) ** 2 + (x - 32) ** 2 < 400] = (*RED, 255)
    return Image.fromarray(rgba)


ON_WHITE = Image.composite(
    Image.new("RGB", (64, 64), RED), Image.new("RGB", (64, 64), WHITE), disc(0).getchannel("A")
)


def palette_disc():
    image = Image.new("P", (64, 64), 0)
    image.putpalette([*RED, *RED, 0, 0, 0] + [0] * 759)
    image.paste(1, (0, 0), disc(0).getchannel("A"))
    return image


def test_hidden_colours_do_not_show():
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3))
    sources = {
        "RGBA": [encoded(disc(hidden), "PNG") for hidden in (0, RED, noise)],
        "WebP": [encoded(disc(noise), "WEBP", lossless=True, exact=True)],
        "TIFF": [encoded(disc(noise), "TIFF")],
        "palette": [encoded(palette_disc(), kind, transparency=0) for kind in ("PNG", "GIF")],
        "palette with an alpha of each entry": [encoded(palette_disc(), "PNG", transparency=bytes([0, 255]))],
        "PIL": [disc(noise), disc(noise).convert("RGBa"), palette_disc().convert("PA")],
    }
    alpha = disc(0).getchannel("A")
    sources["PIL"][2].putalpha(alpha)
    for name, entries in sources.items():
        for source in entries:
            loaded = load_image(source)
            assert loaded.tobytes() == ON_WHITE.tobytes(), name
            assert loaded.info == {image_modes.WAS_TRANSPARENT: True}


def test_half_transparent_pixels_are_mixed():
    grey = Image.merge("LA", (Image.new("L", (2, 1), 55), Image.new("L", (2, 1))))
    grey.putpixel((0, 0), (55, 51))  # alpha 0.2
    for source in (grey, grey.convert("RGBA"), encoded(grey, "PNG"), grey.convert("La")):
        pixels = np.asarray(load_image(source))
        assert pixels[0, 1].tolist() == [255] * 3
        assert np.abs(pixels[0, 0].astype(int) - 215).max() <= 3  # La is rounded


def test_opaque_alpha_changes_nothing():
    image = upright().convert("RGBA")
    loaded = load_image(encoded(image, "PNG"))
    assert loaded.tobytes() == upright().tobytes() and loaded.info == {}


def test_one_transparent_colour():
    """tRNS of RGB, of greys of 1 to 16 bits, and of 16-bit colours."""
    blue_gone = Image.new("RGB", (48, 32), RED)
    blue_gone.paste(WHITE, (0, 16, 48, 32))
    image = Image.new("RGB", (48, 32), RED)
    image.paste(BLUE, (0, 16, 48, 32))
    assert load_image(encoded(image, "PNG", transparency=BLUE)).tobytes() == blue_gone.tobytes()
    for depth, black, row in (
        (1, 0, b"\x70"),
        (2, 1, b"\x6c"),
        (4, 5, b"\x50\xf5"),
        (8, 9, b"\x09\xff\xff\x09"),
    ):
        data = png(4, 1, depth, 0, [row], png_chunk(b"tRNS", struct.pack(">H", black)))
        pixels = np.asarray(load_image(data))[0, :, 0]
        plain = np.asarray(load_image(png(4, 1, depth, 0, [row])))[0, :, 0]
        hidden = plain == (black * 255 // (2**depth - 1) if depth < 8 else black)
        assert hidden.any() and not hidden.all() and pixels.tolist() == np.where(hidden, 255, plain).tolist()
    deep = struct.pack(">4H", 30, 40000, 30, 65535)
    pixels = np.asarray(load_image(png(4, 1, 16, 0, [deep], png_chunk(b"tRNS", struct.pack(">H", 30)))))
    assert pixels[0, :, 0].tolist() == [255, 156, 255, 255]
    deep = struct.pack(">6H", 30 << 8, 30 << 8, 220 << 8, 220 << 8, 30 << 8, 30 << 8)
    key = png_chunk(b"tRNS", struct.pack(">3H", 30 << 8, 30 << 8, 220 << 8))
    assert np.asarray(load_image(png(2, 1, 16, 2, [deep], key))).tolist() == [[list(WHITE), list(RED)]]


def test_the_background_is_set_in_one_place(monkeypatch):
    monkeypatch.setattr(image_modes, "BACKGROUND_COLOUR", (1, 2, 3))
    assert load_image(disc(0)).getpixel((0, 0)) == (1, 2, 3)


# ---- depth and colour ----

RAMP = np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (64, 1))
WANTED = np.round(RAMP / 257)


def deep_sources():
    bits16 = Image.fromarray(RAMP)
    yield "I;16 PNG", encoded(bits16, "PNG"), WANTED
    yield "I;16 TIFF", encoded(bits16, "TIFF"), WANTED
    for order in (">u2", "<u2"):
        mode = "I;16B" if order == ">u2" else "I;16"
        yield order, Image.frombytes(mode, (64, 64), RAMP.astype(order).tobytes()), WANTED
    yield "I TIFF", encoded(Image.fromarray(RAMP.astype(np.int32)), "TIFF"), WANTED
    yield "I of 8 bits", Image.fromarray(WANTED.astype(np.int32)), WANTED
    yield "F TIFF", encoded(Image.fromarray((RAMP / 65535).astype(np.float32)), "TIFF"), WANTED
    pgm = b"P5 64 64 65535\n" + RAMP.astype(">u2").tobytes()
    yield "PGM", pgm, WANTED
    yield "dark PGM", b"P5 64 64 65535\n" + (RAMP // 1000).astype(">u2").tobytes(), np.zeros((64, 64))
    rows = [np.repeat(row, 3).astype(">u2").tobytes() for row in RAMP]
    yield "RGB of 16 bits", png(64, 64, 16, 2, rows), RAMP >> 8


@pytest.mark.parametrize("case", list(deep_sources()), ids=lambda case: case[0])
def test_deep_images_are_scaled_to_8_bits(case):
    _, source, wanted = case
    pixels = np.asarray(load_image(source))
    assert np.array_equal(pixels, np.repeat(wanted[..., None], 3, axis=2))


@pytest.mark.parametrize(
    "values, message",
    [
        (np.array([[0.0, 255.0]], np.float32), "range from 0 to 255, expected floats from 0 to 1"),
        (np.array([[-0.5, 0.5]], np.float32), "range from -0.5 to 0.5"),
        (np.array([[0.5, np.nan]], np.float32), "range from nan"),
        (np.array([[0, 70000]], np.int32), "range from 0 to 70000, expected integers from 0 to 255 or 65535"),
        (np.array([[-3, 200]], np.int32), "range from -3 to 200"),
    ],
)
def test_other_ranges_are_rejected(values, message, tmp_path):
    Image.fromarray(values).save(tmp_path / "a.tif")
    for source in (tmp_path / "a.tif", Image.fromarray(values)):
        with pytest.raises(UserError, match=message) as error:
            load_image(source)
        assert "\n" not in str(error.value)


def test_other_colours():
    near = np.asarray(upright(), int)
    for source in (
        encoded(upright().convert("CMYK"), "JPEG", quality=95),
        encoded(upright().convert("YCbCr"), "JPEG", quality=95),
        encoded(upright().convert("LAB"), "TIFF"),
        upright().convert("HSV"),
    ):
        assert np.abs(np.asarray(load_image(source), int) - near).mean() < 4
    half = Image.fromarray(RAMP > 32767)
    assert np.asarray(load_image(encoded(half, "PNG"))).mean() == 127.5


def test_sizes_of_one_pixel_and_long_ones():
    for size in ((1, 1), (1, 2), (3, 200), (1, 5000), (4000, 1)):
        assert load_image(encoded(Image.new("RGB", size), "PNG")).size == size


# ---- files ----


def test_content_counts_and_not_the_name(tmp_path):
    upright().save(tmp_path / "jpeg.png", "JPEG")
    upright().save(tmp_path / "no_suffix", "PNG")
    assert load_image(tmp_path / "jpeg.png").size == load_image(tmp_path / "no_suffix").size == (48, 32)


def test_errors_are_one_line(tmp_path):
    whole = encoded(upright(200, 200), "JPEG")
    for name, data, reason in (
        ("cut.jpg", whole[: len(whole) // 2], "Truncated|truncated"),
        ("empty.png", b"", "it is empty"),
        ("page.jpg", b"<html>404 not found</html>", "it is not one of PNG, JPEG"),
        ("script.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "it is not one of PNG"),
    ):
        (tmp_path / name).write_bytes(data)
        for source in (tmp_path / name, data):
            with pytest.raises(UserError, match=reason) as error:
                load_image(source)
            assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="200 x 200 pixels; the limit per side is 100"):
        load_image(whole, max_side=100)


def test_heic(monkeypatch, tmp_path):
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.register_heif_opener()
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        stored = upright().transpose(STORED[orientation]) if orientation in STORED else upright()
        # bytes: then pillow-heif writes the turn into the image's properties, as cameras do
        data = encoded(stored, "HEIF", exif=exif.tobytes(), quality=95)
        difference = np.abs(np.asarray(load_image(data), int) - np.asarray(upright(), int))
        assert difference.mean() < 4
    assert sorted(header_size(data)) == [32, 48]
    monkeypatch.setattr(images, "_register_heif", lambda: False)
    with pytest.raises(UserError, match="HEIC needs pillow-heif: pip install pillow-heif"):
        load_image(data)


def test_the_limit_is_read_in_the_header(monkeypatch):
    """A lazily opened PIL image as well."""
    monkeypatch.setattr(images, "MAX_PIXELS", 100)
    data = encoded(upright(), "PNG")
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    for source in (data, Image.open(io.BytesIO(data))):
        with pytest.raises(UserError, match="48 x 32 pixels, more than 100"):
            load_image(source)


# ---- draft mode ----


def photo(width, height):
    noise = Image.effect_noise((width // 16, height // 16), 90).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    image = Image.merge(
        "RGB", [noise, noise.transpose(Image.Transpose.ROTATE_180), noise.point(lambda v: 255 - v)]
    )
    ImageDraw.Draw(image).rectangle((width // 4, height // 4, width // 2, height // 2), fill=RED)
    return image


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("needed", [(32, 32), (64, 16), (16, 64), (100, 100), (250, 250)])
def test_jpegs_are_decoded_at_reduced_size_never_below_twice_the_needed(orientation, needed):
    data = with_orientation(orientation, "JPEG", photo(600, 400), quality=95)
    whole, reduced = load_image(data), load_image(data, needed=needed)
    assert whole.size == (600, 400)
    height, width = needed
    assert reduced.width >= min(600, 2 * width) and reduced.height >= min(400, 2 * height)
    # the next smaller size would be too small
    factor = round(600 / reduced.width)
    assert factor == 8 or 600 / (2 * factor) < 2 * width or 400 / (2 * factor) < 2 * height
    psnr = images.image_psnr(*(i.resize((width, height), Image.Resampling.BICUBIC) for i in (whole, reduced)))
    assert psnr > 40


def test_only_jpegs_are_reduced():
    assert load_image(encoded(photo(600, 400), "PNG"), needed=(32, 32)).size == (600, 400)


def test_is_plain():
    exif = Image.Exif()
    exif[0x0112] = 3
    plain = {"JPEG": upright(), "PNG": upright(), "BMP": upright(), "MPO": upright()}
    for kind, image in plain.items():
        with open_image_file(encoded(image, kind)) as file:
            assert is_plain(file), kind
    for data in (
        encoded(upright(), "JPEG", exif=exif),
        encoded(upright().convert("CMYK"), "JPEG"),
        encoded(disc(0), "PNG"),
        encoded(Image.fromarray(RAMP), "PNG"),
        encoded(upright(), "GIF", save_all=True, append_images=[Image.new("RGB", (48, 32))]),
    ):
        with open_image_file(data) as file:
            assert not is_plain(file)


def test_nobody_else_opens_images():
    """But `tokenizer/images.py`; a reader of its own would have a policy of its own."""
    readers = []
    for folder in ("open_unitok", "tokenizer", "mllm", "generation", "training", "eval"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if re.search(
                r"\bImage\.open\(|from PIL\.Image import|PIL\.Image\.open", path.read_text(encoding="utf-8")
            ):
                readers.append(path.relative_to(ROOT).as_posix())
    assert readers == ["tokenizer/images.py"]


def test_pixels_of_images_that_were_opened_by_others():
    """`to_pixels` and `from_pil` take them upright and opaque too."""
    with Image.open(io.BytesIO(with_orientation(6, "PNG"))) as image:
        assert to_pixels(image, 16).equal(to_pixels(upright(), 16))
        assert from_pil(image).equal(from_pil(upright()))
    assert to_pixels(disc(RED), 16, "pad").equal(to_pixels(ON_WHITE, 16, "pad"))
