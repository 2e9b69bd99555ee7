"""Images to pixels and back, against the published scripts' preprocessing."""

import contextlib
import io
from random import Random

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from open_unitok.core.errors import UserError
from open_unitok.tokenizer import images
from open_unitok.tokenizer.images import from_pil, load_image, to_pil, to_pixels, to_uint8

Filter = Image.Resampling
TRANSFORMS = {
    "clip_val": {},
    "fid": {"resize": 0},
    "inference": {"resize": 72, "resample": Filter.BILINEAR},
    "vae_val": {"resize": 72, "resample": Filter.LANCZOS},
    "vqa_pad_square": {"mode": "pad"},
}


@pytest.fixture(scope="module")
def preprocess(golden):
    return load_file(golden / "preprocess" / "preprocess.safetensors")


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("number", [0, 1, 2])
def test_transforms(preprocess, name, number):
    image = Image.fromarray(preprocess[f"{number}.rgb_uint8_HWC"].numpy())
    difference = (to_pixels(image, 64, **TRANSFORMS[name]) - preprocess[f"{number}.{name}"]).abs()
    if name == "fid":
        assert difference.max() == 0
    # Pillow versions that resize in another order differ by some grey levels in single pixels.
    assert difference.max() <= 4 / 127.5 and difference.mean() < 0.2 / 127.5


def test_uint8(preprocess):
    got = to_uint8(preprocess["to_uint8.in"])
    assert torch.equal(got, preprocess["to_uint8.inference_py_and_fid"])
    assert to_uint8(torch.tensor([-2.0, -1.0, 1 / 255, 1.0, 2.0])).tolist() == [0, 0, 128, 255, 255]


def test_round_trip():
    image = Image.effect_noise((30, 20), 90).convert("RGB")
    assert to_pil(from_pil(image)).tobytes() == image.tobytes()


def test_small_images_get_a_black_border():
    pixels = to_pixels(Image.new("RGB", (5, 8), "white"), 8, resize=0)
    assert pixels[0, 0].tolist() == [-1, 1, 1, 1, 1, 1, -1, -1]


def test_squash():
    assert to_pixels(Image.new("RGB", (50, 10)), 16, mode="squash").shape == (3, 16, 16)
    with pytest.raises(UserError, match=r"mode = 'corp'. Did you mean 'crop'\?"):
        to_pixels(Image.new("RGB", (50, 10)), 16, mode="corp")


def test_load(tmp_path, monkeypatch):
    image = Image.effect_noise((12, 9), 90)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    (tmp_path / "a.png").write_bytes(buffer.getvalue())
    for source in (image, buffer.getvalue(), tmp_path / "a.png", str(tmp_path / "a.png")):
        loaded = load_image(source)
        assert loaded.mode == "RGB" and loaded.size == (12, 9)
    monkeypatch.setattr(images, "MAX_PIXELS", 100)
    with pytest.raises(UserError, match=r"a\.png has 12 x 9 pixels, more than 100"):
        load_image(tmp_path / "a.png")


def test_load_errors(tmp_path):
    (tmp_path / "a.png").write_text("not an image")
    with pytest.raises(UserError, match=r"a\.png is not a readable image"):
        load_image(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"b\.png is not an existing file"):
        load_image(tmp_path / "b.png")
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 90).save(buffer, "PNG")
    with pytest.raises(UserError, match="The given content is not a readable image"):
        load_image(buffer.getvalue()[:300])


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "AVIF", "QOI", "DDS", "TGA"])
def test_broken_images_of_every_format_are_rejected(kind):
    """Truncated files and corrupt headers: Pillow's readers raise many types of exception."""
    buffer, random = io.BytesIO(), Random(0)
    try:
        Image.effect_noise((17, 13), 80).convert("RGB").save(buffer, kind)
    except (KeyError, OSError):
        pytest.skip(f"this Pillow writes no {kind}")
    for _ in range(100):
        content = bytearray(buffer.getvalue())
        for _ in range(random.randint(0, 4)):
            content[random.randrange(min(len(content), 150))] = random.randrange(256)
        with contextlib.suppress(UserError):
            load_image(bytes(content[: random.randint(0, len(content))]))


def test_long_and_thin_images():
    """Cropped: what the whole image shows at that scale, without the memory for it."""
    thin = Image.new("RGB", (1, 10_000_000), (220, 30, 30))
    thin.paste((30, 30, 220), (0, 5_000_000, 1, 10_000_000))
    pixels = (to_pixels(thin, 256) * 127.5 + 127.5).round()  # whole: 2 TB
    assert pixels[:, 0, 0].tolist() == [220, 30, 30] and pixels[:, -1, -1].tolist() == [30, 30, 220]
    assert to_pixels(thin, 256, resize=0).shape == to_pixels(thin, 256, "squash").shape == (3, 256, 256)
    with pytest.raises(UserError, match="1 x 10000000 pixels"):
        to_pixels(thin, 256, "pad")


@pytest.mark.parametrize("shape", [(9, 300), (300, 9), (31, 77)])
@pytest.mark.parametrize(("size", "resize"), [((64, 48), None), ((64, 48), 200), ((40, 300), 90)])
def test_enlarged_crops_show_the_same_as_the_whole(monkeypatch, shape, size, resize):
    image = Image.effect_noise(shape, 90).convert("RGB")
    whole = to_pixels(image, size, resize=resize)
    monkeypatch.setattr("open_unitok.tokenizer.images._LARGE_CANVAS", 0)
    assert (whole - to_pixels(image, size, resize=resize)).abs().max() <= 2.01 / 127.5


def test_oblong_sizes():
    """A white image cropped, padded and squashed to 16 x 64."""
    image = Image.new("RGB", (80, 40), "white")
    for mode in ("crop", "pad", "squash"):
        assert to_pixels(image, (16, 64), mode).shape == (3, 16, 64)
        assert torch.equal(to_pixels(image, (24, 24), mode), to_pixels(image, 24, mode))
    assert to_pixels(image, (16, 64)).min() == 1  # covers the size: no border
    padded = to_pixels(image, (16, 64), "pad")
    assert padded[:, :, 30:34].min() == 1 and (padded[:, :, :15] < 0).all()  # 160 x 40 before scaling
    assert to_pixels(image, (64, 16), "crop").shape == (3, 64, 16)


def test_an_oblong_crop_is_the_centre():
    image = Image.new("RGB", (64, 64), "black")
    image.paste("white", (0, 24, 64, 40))
    assert to_pixels(image, (16, 64)).min() == 1
    image.paste("red", (0, 24, 64, 25))
    assert to_pixels(image, (16, 64))[1, 0].max() == -1 and to_pixels(image, (16, 64))[1, 1:].min() == 1
