"""Every way into the model reads an image alike: Pipeline, server, page, stage 1, extract-codes, data convert
and eval give the codes of its upright, opaque, 8-bit twin."""

import base64
import io
import json
import random
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from open_unitok.cli.main import run
from open_unitok.core.errors import UserError
from open_unitok.core.files import model_path
from open_unitok.eval.core.image_files import read_sample_image, tar_images
from open_unitok.eval.core.model import Model
from open_unitok.generation import Pipeline
from open_unitok.generation.serving.image_urls import ImageLoader
from open_unitok.tokenizer.images import load_image, to_pixels
from open_unitok.training.data.code_shards import CodeFolder
from open_unitok.training.data.tar_index import scan_tar
from open_unitok.training.tokenizer.config import ImageOptions
from open_unitok.training.tokenizer.data import PairDecoder

# all eight are in tokenizer/test_image_formats.py
STORED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
}
KINDS = {"png": {}, "webp": {"lossless": True}, "tiff": {}, "jpg": {"quality": 95}, "avif": {"quality": 95}}


def scene():
    """A landscape image without symmetry, larger than the model's 64 x 64."""
    image = Image.new("RGB", (120, 80), (230, 230, 220))
    image.paste((220, 30, 30), (10, 5, 70, 35))
    image.paste((30, 30, 220), (80, 45, 115, 75))
    return image


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder of images; the name of each up to "-" is that of its twin."""
    folder = tmp_path_factory.mktemp("files")
    image = scene()
    for ending, options in KINDS.items():
        image.save(folder / f"{ending}.png")
        for orientation in (2, 3, 5, 6):
            exif = Image.Exif()
            exif[0x0112] = orientation
            stored = image.transpose(STORED[orientation])
            stored.save(folder / f"{ending}-{orientation}.{ending}", exif=exif, **options)
    clear = image.convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(image.size).point(lambda v: 0 if v < 128 else v))
    white = Image.alpha_composite(Image.new("RGBA", image.size, "white"), clear).convert("RGB")
    white.save(folder / "rgba.png")
    clear.save(folder / "rgba-1.png")
    grey = clear.convert("LA")
    Image.alpha_composite(Image.new("RGBA", image.size, "white"), grey.convert("RGBA")).convert("RGB").save(
        folder / "la.png"
    )
    grey.save(folder / "la-1.png")
    palette = image.quantize(16)
    first = palette.getpixel((0, 0))
    shown = np.asarray(palette.convert("RGB")).copy()
    shown[np.asarray(palette) == first] = 255
    for name, ending in (("palette", "png"), ("gif", "gif")):
        Image.fromarray(shown).save(folder / f"{name}.png")
        palette.save(folder / f"{name}-1.{ending}", transparency=first)
    keyed = np.asarray(image).copy()
    keyed[(keyed == (220, 30, 30)).all(-1)] = 255
    Image.fromarray(keyed).save(folder / "trns.png")
    image.save(folder / "trns-1.png", transparency=(220, 30, 30))
    grey8 = np.asarray(image.convert("L"))
    for name, array, ending in (
        ("grey16", grey8.astype(np.uint16) * 257, "png"),
        ("grey32", grey8.astype(np.int32) * 257, "tif"),
        ("float", (grey8 / 255).astype(np.float32), "tif"),
        ("one", grey8 > 128, "png"),
    ):
        Image.fromarray(array).save(folder / f"{name}-1.{ending}")
        Image.fromarray(grey8 if name != "one" else array.astype(np.uint8) * 255).save(folder / f"{name}.png")
    image.save(folder / "first.png")
    frames = {"save_all": True, "append_images": [Image.new("RGB", image.size)]}
    image.save(folder / "first-1.webp", lossless=True, **frames)
    image.save(folder / "first-2.tiff", **frames)
    return folder


@pytest.fixture(scope="module")
def pipe():
    torch.manual_seed(0)
    return Pipeline.from_pretrained("scenes")


def twins(folder):
    """(file, its twin, whether its codec loses something)."""
    for path in sorted(folder.glob("*-*")):
        yield path, folder / f"{path.name.split('-')[0]}.png", path.suffix in (".jpg", ".avif")


def agree(codes, twin, lossy, name):
    """Equal, or for lossy files within their own error."""
    share = float((np.asarray(codes) == np.asarray(twin)).mean())
    assert share == 1 if not lossy else share > 0.8, (name, share)


def write_tar(path, files):
    """The original bytes; the key of a-1.png is a_1_png."""
    with tarfile.open(path, "w") as tar:
        for file in files:
            member = tarfile.TarInfo(f"{file.stem}_{file.suffix[1:]}{file.suffix.upper()}")
            member.size = file.stat().st_size
            tar.addfile(member, io.BytesIO(file.read_bytes()))
    return path


def codes_of(folder):
    """Name of the image file -> codes."""
    codes = CodeFolder(folder)
    samples = (codes.read(0, number) for number in range(codes.sizes[0]))
    return {sample.info["file"]: np.asarray(sample.images[0]) for sample in samples}


@pytest.fixture(scope="module")
def extracted(files, tmp_path_factory):
    """Codes by image file: of the tar of originals, and of the converted folder."""
    out, tokenizer = tmp_path_factory.mktemp("extracted"), str(model_path("scenes"))
    write_tar(out / "originals.tar", sorted(files.iterdir()))
    run(["data", "convert", "folder", str(files), str(out / "converted")])
    found = []
    for name, data in (("a", out / "originals.tar"), ("b", out / "converted" / "*.tar")):
        run(["extract-codes", "--tokenizer", tokenizer, "--data", str(data), "--out", str(out / name)])
        found.append(codes_of(out / name))
    originals = {
        f"{k.rpartition('.')[0].rpartition('_')[0]}{Path(k).suffix.lower()}": v for k, v in found[0].items()
    }
    return originals, found[1], out


def test_pipeline_and_reconstruct(files, pipe):
    paths, twin, lossy = map(list, zip(*twins(files)))
    wanted = pipe.encode_for_reading(twin).codes
    opened = [Image.open(path) for path in paths]
    for sources in (paths, [path.read_bytes() for path in paths], opened):
        for found, right, loses, path in zip(pipe.encode_for_reading(sources).codes, wanted, lossy, paths):
            agree(found, right, loses, path.name)
    rows = zip(pipe.first_rows(paths, 3), pipe.first_rows(twin, 3), lossy, paths)
    for found, right, loses, path in rows:
        agree(found, right, loses, path.name)
    images = pipe.reconstruct([files / "png-6.png", files / "png.png"])
    assert images[0].tobytes() == images[1].tobytes()


def test_uploads(files, pipe):
    loader = ImageLoader(pipe.processor, max_side=4096, max_pixels=10**8, max_bytes=10**8)
    images, paths, twin, lossy = [], [], [], []
    for path, *others in twins(files):
        text = base64.b64encode(path.read_bytes()).decode()
        if path.suffix.startswith(".tif"):
            with pytest.raises(UserError, match="is not one of PNG, JPEG"):
                loader.read([f"data:image/tiff;base64,{text}"])
            continue
        contents, _ = loader.read([f"data:image/png;base64,{text}"])
        images += loader.decode(contents, threading.Event())
        paths, twin, lossy = [*paths, path], [*twin, others[0]], [*lossy, others[1]]
    for found, right, loses, path in zip(
        pipe.encode_for_reading(images).codes, pipe.encode_for_reading(twin).codes, lossy, paths
    ):
        agree(found, right, loses, path.name)


def test_page(files, pipe):
    """Both tabs that take an image show the same for its twin."""
    page = pytest.importorskip("open_unitok.generation.ui.page", reason="needs gradio")
    reconstruct, answer = page.ReconstructionHandler(pipe), page.AnswerHandler(pipe)
    for name, twin in (("png-6", "png"), ("webp-5", "webp"), ("rgba-1", "rgba"), ("la-1", "la")):
        path = next(str(file) for file in files.iterdir() if file.stem == name)
        upright = str(files / f"{twin}.png")
        assert reconstruct(path) == reconstruct(upright), name
        talks = [list(answer(image, "What color?", [], 4, 0))[-1] for image in (path, upright)]
        assert talks[0] == talks[1], name


def test_stage_one(files, pipe, tmp_path):
    options = ImageOptions(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0))
    decoder = PairDecoder(options, (64, 64), captions=False)
    records = scan_tar(str(write_tar(tmp_path / "a.tar", sorted(files.iterdir())))).samples
    pixels = np.stack([decoder(record, random.Random(0)).image for record in records])
    found = pipe.unitok.encode(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1)
    codes = {record.key: value for record, value in zip(records, found)}
    for path, twin, lossy in twins(files):
        agree(codes[f"{path.stem}_{path.suffix[1:]}"], codes[f"{twin.stem}_png"], lossy, path.name)


def test_extraction_and_conversion(files, extracted, pipe):
    originals, converted, out = extracted
    assert originals.keys() == converted.keys() == {p.name for p in files.iterdir()}
    for path, twin, lossy in twins(files):
        agree(originals[path.name], originals[twin.name], lossy, path.name)
        # a turned JPEG is encoded once more
        agree(converted[path.name], originals[path.name], path.suffix == ".jpg", path.name)
    names = sorted(originals)
    cropped = torch.stack([to_pixels(load_image(files / name), 64) for name in names])
    for name, codes in zip(names, pipe.unitok.encode(cropped)):
        agree(originals[name], codes, False, name)
    manifest = json.loads((out / "a" / "codes.json").read_text())
    assert manifest["transparent"] == sum(
        p.stem[:-2] in ("rgba", "la", "palette", "gif", "trns") for p in files.glob("*-1.*")
    )


def test_converted_images_are_upright_opaque_and_8_bit(files, extracted):
    with tarfile.open(next((extracted[2] / "converted").glob("*.tar"))) as tar:
        members = [m for m in tar if not m.name.endswith(".json")]
        for member in members:
            with Image.open(tar.extractfile(member)) as image:
                image.load()
                assert image.mode in ("1", "L", "P", "RGB") and not image.has_transparency_data, member.name
                assert image.getexif().get(0x0112, 1) == 1 and getattr(image, "n_frames", 1) == 1
    assert len(members) == len(list(files.iterdir()))


def test_eval(files, pipe, tmp_path):
    model = Model(model_path("scenes"), device="cpu")
    paths = sorted(files.iterdir())
    inside = {path.stem: path for path in tar_images(write_tar(tmp_path / "a.tar", paths))}
    assert len(inside) == len(paths)
    from_tar = [inside[f"{path.stem}_{path.suffix[1:]}"] for path in paths]
    pixels = model.pixels([read_sample_image(path) for path in (*paths, *from_tar)])
    assert torch.equal(*pixels.chunk(2))
    codes = dict(zip(paths, pipe.unitok.encode(pixels[: len(paths)])))
    for path, twin, lossy in twins(files):
        agree(codes[path], codes[twin], lossy, path.name)


def test_pixels_that_are_no_pixels_are_rejected(pipe):
    unitok = pipe.unitok
    image = to_pixels(scene(), 64)[None]
    for call in (unitok.encode, unitok.embed_image, unitok, unitok.encode_latents):
        for dtype in (torch.uint8, torch.int64, torch.bool):
            with pytest.raises(UserError, match=rf"pixels have dtype {dtype}; expected floats in \[-1, 1\]"):
                call((image * 127.5 + 127.5).to(dtype))
    for wrong in (image * 127.5 + 127.5, image * float("nan"), image * 50):
        for call in (unitok.encode, unitok.embed_image):
            with pytest.raises(UserError, match=r"pixels range from .*; expected \[-1, 1\]"):
                call(wrong)
    assert unitok.encode(image.half().float() * 1.2).shape == unitok.encode(image).shape


DTYPES = (torch.uint8, torch.uint16, torch.int32, torch.uint32, torch.uint64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_codes_of_every_integer_type_are_read(pipe, dtype):
    codes = pipe.unitok.encode(to_pixels(scene(), 64)[None])
    assert torch.equal(pipe.unitok.decode(codes.to(dtype)), pipe.unitok.decode(codes))
    assert pipe.decode(codes.to(dtype))[0].tobytes() == pipe.decode(codes)[0].tobytes()
    model = pipe.model
    assert torch.equal(model.embed_codes(codes.to(dtype)), model.embed_codes(codes))
    ids = torch.tensor([pipe.processor.question_ids("What is it?", 1)])
    outputs = [
        model(input_ids=ids, image_codes=c, return_logits=True).logits for c in (codes, codes.to(dtype))
    ]
    assert torch.equal(*outputs)
    if dtype == torch.uint16:  # as codes are stored
        prefix = codes[:, : pipe.layout.tokens_of_rows(3)]
        images = [pipe.generate(["a red square"], prefix=p)[0] for p in (prefix, prefix.to(dtype))]
        assert images[0].tobytes() == images[1].tobytes()
    too_large = torch.full_like(codes, 200).to(dtype)
    with pytest.raises(UserError, match="codes range from 200 to 200"):
        pipe.unitok.decode(too_large)
    with pytest.raises(UserError, match="expected integers"):
        pipe.unitok.decode(codes.float())
