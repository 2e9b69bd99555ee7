"""Conversion to tars: every source format exactly, resume, errors on bad input."""

import csv
import io
import json

import numpy as np
import pytest
from PIL import Image

from open_unitok.cli.main import run
from open_unitok.core.errors import UserError
from open_unitok.tokenizer.images import load_image
from open_unitok.training.data import convert as data_convert
from open_unitok.training.data.convert import convert_dataset
from open_unitok.training.data.tar_index import scan_tar

SIZE = 24


def write_image(path, number):
    """Write a random image in the format of the file's extension."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 256, (SIZE, SIZE + 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def samples(folder):
    """key -> (extensions, info) of everything in the tars of a folder."""
    records = [r for tar in sorted(folder.glob("*.tar")) for r in scan_tar(str(tar)).samples]
    assert all(scan_tar(str(tar)).problem is None for tar in folder.glob("*.tar"))
    return {r.key: (sorted(set(r.members) - {"json"}), r.json()) for r in records}


@pytest.fixture
def image_folder(tmp_path):
    """Twenty user images with .txt files, some in a subfolder, in four formats; one has no caption."""
    for number in range(20):
        folder = tmp_path / "images" / ("more" if number % 4 == 0 else "")
        path = write_image(
            folder / f"my photo.{number:02d}.{('jpg', 'png', 'webp', 'gif')[number % 4]}", number
        )
        if number != 7:
            path.with_suffix(".txt").write_text(
                f"a cat {number}\n\n a dog {number} \n" if number == 3 else "a cat"
            )
    (tmp_path / "images" / ".hidden.png").write_bytes(b"")
    (tmp_path / "images" / "notes.md").write_text("mine")
    (tmp_path / "images" / "more" / "lonely.TXT").write_text("of no image")
    return tmp_path / "images"


def test_a_folder_of_images_with_texts(image_folder, tmp_path, capsys):
    out = tmp_path / "tars"
    run(["data", "convert", "folder", str(image_folder), str(out), "--shard", "8"])
    printed = capsys.readouterr()
    assert "20 samples, 20 images, 1 without a caption" in printed.out
    assert "1 hidden (.hidden.png); 1 texts without an image (more/lonely.TXT)" in printed.err
    assert sorted(p.name for p in out.glob("*.tar")) == [f"part-00000{i}.tar" for i in range(3)]
    found = samples(out)
    assert len(found) == 20
    assert found["my_photo_03"] == (["png"], {  # a gif becomes a png
        "captions": ["a cat 3", "a dog 3"], "file": "my photo.03.gif", "images": 1,
    })  # fmt: skip
    assert found["more/my_photo_04"][0] == ["jpg"] and found["my_photo_07"][1]["captions"] == []
    record = next(r for r in scan_tar(str(out / "part-000000.tar")).samples if r.key == "more/my_photo_04")
    assert record.read("jpg") == (image_folder / "more" / "my photo.04.jpg").read_bytes()


def test_metadata_names_images_and_captions(tmp_path):
    rows = [
        {"file_name": write_image(tmp_path / "a" / f"{n}.png", n).name, "text": f"cat {n}"} for n in range(4)
    ]
    rows[1] = {"file_name": "1.png", "captions": ["cat", "dog"], "long_caption": "a long cat"}
    (tmp_path / "a" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert convert_dataset("folder", tmp_path / "a", tmp_path / "one")["samples"] == 4
    found = samples(tmp_path / "one")
    assert found["2"][1]["captions"] == ["cat 2"] and found["1"][1]["long_caption"] == "a long cat"
    with open(tmp_path / "b.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["image", "beschreibung"], ["0.png", "Katze, schwarz"], ["3.png", "Hund"]])
    convert_dataset(
        "folder", tmp_path / "b.csv", tmp_path / "two", images=tmp_path / "a", column="beschreibung"
    )
    assert samples(tmp_path / "two")["0"][1]["captions"] == ["Katze, schwarz"]


def test_exif_orientation_is_applied(tmp_path):
    path = write_image(tmp_path / "a" / "x.jpg", 1)
    with Image.open(path) as image:
        exif = image.getexif()
        exif[0x0112] = 6
        image.save(path, exif=exif)
    convert_dataset("folder", tmp_path / "a", tmp_path / "out")
    (record,) = scan_tar(str(tmp_path / "out" / "part-000000.tar")).samples
    (tmp_path / "turned.jpg").write_bytes(record.read("jpg"))
    with Image.open(tmp_path / "turned.jpg") as turned:
        assert turned.size == (SIZE, SIZE + 8)


def test_resumes_after_an_interruption(image_folder, tmp_path, monkeypatch):
    whole = tmp_path / "whole"
    counts = convert_dataset("folder", image_folder, whole, shard=6)
    real, calls = data_convert._add_sample, []

    def stopped(tar, item, *counted):
        calls.append(item.key)
        if len(calls) == 9:
            raise KeyboardInterrupt
        real(tar, item, *counted)

    monkeypatch.setattr(data_convert, "_add_sample", stopped)
    with pytest.raises(KeyboardInterrupt):
        convert_dataset("folder", image_folder, tmp_path / "out", shard=6)
    assert sorted(p.name for p in (tmp_path / "out").glob("*.tar")) == ["part-000000.tar"]
    assert convert_dataset("folder", image_folder, tmp_path / "out", shard=6) == counts
    assert len(calls) == 9 + 14  # the first tar was not written again
    for path in whole.iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    assert convert_dataset("folder", image_folder, tmp_path / "out", shard=6) == counts and len(calls) == 23


def test_bad_images_are_skipped_up_to_a_share(image_folder, tmp_path, capsys):
    (image_folder / "broken.png").write_bytes(b"no image")
    assert convert_dataset("folder", image_folder, tmp_path / "one")["skipped"] == 1
    err = capsys.readouterr().err
    assert "is not one of PNG" in err and "BytesIO" not in err
    (image_folder / "broken2.jpg").write_bytes(b"")
    with pytest.raises(UserError, match="2 of 22 samples"):
        convert_dataset("folder", image_folder, tmp_path / "two")
    assert not (tmp_path / "two").exists()
    (tmp_path / "m.jsonl").write_text('{"file_name": "nothing.png", "text": "a"}\n')
    with pytest.raises(UserError, match="no usable sample"):
        convert_dataset("folder", tmp_path / "m.jsonl", tmp_path / "three")
    assert "there is no such file" in capsys.readouterr().err


def test_a_failed_conversion_removes_leftovers_of_a_kill(image_folder, tmp_path, monkeypatch):
    def killed(*_):
        (tmp_path / "out" / ".part-000000.tar.1.tmp").write_bytes(b"half")
        raise KeyboardInterrupt

    (image_folder / "broken.png").write_bytes(b"no image")
    (image_folder / "broken2.jpg").write_bytes(b"")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(data_convert, "_add_sample", killed)
        convert_dataset("folder", image_folder, tmp_path / "out")
    with pytest.raises(UserError, match="2 of 22 samples"):
        convert_dataset("folder", image_folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_corrected_command_starts_over(image_folder, tmp_path, capsys):
    """Another --images is another conversion, and a failed conversion does not count as finished."""
    (tmp_path / "m.jsonl").write_text("".join(f'{{"file_name": "{n}.png", "text": "a"}}\n' for n in range(4)))
    for n in range(4):
        write_image(tmp_path / "right" / f"{n}.png", n)
    (tmp_path / "wrong").mkdir()
    for _ in range(2):
        with pytest.raises(UserError, match="4 of 4 samples"):
            convert_dataset("folder", tmp_path / "m.jsonl", tmp_path / "out", images=tmp_path / "wrong")
        assert "there is no such file" in capsys.readouterr().err  # reported each time
        assert not (tmp_path / "out").exists()
    counts = convert_dataset("folder", tmp_path / "m.jsonl", tmp_path / "out", images=tmp_path / "right")
    assert counts["samples"] == 4
    with pytest.raises(UserError, match="other images"):
        convert_dataset("folder", tmp_path / "m.jsonl", tmp_path / "out", images=tmp_path / "wrong")


def test_error_messages(image_folder, tmp_path):
    out = tmp_path / "out"
    convert_dataset("folder", image_folder, out)
    for changed, words in (({"shard": 3}, "other shard"), ({"column": "x"}, "other column")):
        with pytest.raises(UserError, match=words):
            convert_dataset("folder", image_folder, out, **changed)
    write_image(image_folder / "new.png", 99)
    with pytest.raises(UserError, match="the source has changed"):
        convert_dataset("folder", image_folder, out)
    (tmp_path / "m.jsonl").write_text('{"file_name": "a.png"\n')
    (tmp_path / "n.csv").write_text("file_name,text\na.png,b\n")
    (tmp_path / "empty").mkdir()
    for arguments, words in (
        (("fodler", image_folder, tmp_path / "x"), "Did you mean 'folder'"),
        (("folder", tmp_path / "nothing", tmp_path / "x"), "does not exist"),
        (("folder", tmp_path / "empty", tmp_path / "x"), r"metadata\.jsonl"),
        (("folder", tmp_path / "m.jsonl", tmp_path / "y"), "line 1, is not valid JSON"),
        (("folder", image_folder, image_folder / "tars"), "is inside"),
        (("folder", tmp_path / "n.csv", tmp_path), "has other contents"),
    ):
        with pytest.raises(UserError, match=words):
            convert_dataset(*arguments)
    with pytest.raises(UserError, match="--column is x"):
        convert_dataset("folder", tmp_path / "n.csv", tmp_path / "z", column="x")


@pytest.mark.parametrize("kind, ending", [("JPEG", "jpg"), ("PNG", "png")])
def test_size_scales_the_shorter_side_down(tmp_path, kind, ending):
    folder = tmp_path / "images"
    folder.mkdir()
    sizes = {"wide": (400, 100), "tall": (30, 90), "small": (20, 40), "thin": (3, 900), "exact": (32, 32)}
    for name, size in sizes.items():
        Image.effect_noise((8, 8), 60).resize(size).convert("RGB").save(folder / f"{name}.{ending}", kind)
    convert_dataset("folder", folder, tmp_path / "out", size=32, quiet=True)
    wanted = {**sizes, "wide": (128, 32)}
    for record in scan_tar(str(tmp_path / "out" / "part-000000.tar")).samples:
        data = record.read(ending)
        assert load_image(data).size == wanted[record.key]
        if record.key != "wide":  # not larger: byte for byte
            assert data == (folder / f"{record.key}.{ending}").read_bytes()
    with pytest.raises(UserError, match=r"converted before \(other size\)"):
        convert_dataset("folder", folder, tmp_path / "out", size=16, quiet=True)
    with pytest.raises(UserError, match="--size is 0"):
        convert_dataset("folder", folder, tmp_path / "other", size=0, quiet=True)


def test_size_turns_first(tmp_path):
    """The shorter side of the upright image, which is stored lying."""
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "images").mkdir()
    Image.new("RGB", (1000, 2000)).save(tmp_path / "images" / "a.jpg", exif=exif)
    convert_dataset("folder", tmp_path / "images", tmp_path / "out", size=64, quiet=True)
    [record] = scan_tar(str(tmp_path / "out" / "part-000000.tar")).samples
    with Image.open(io.BytesIO(record.read("jpg"))) as image:
        assert image.size == (128, 64) and image.getexif().get(0x0112, 1) == 1


def test_cut_images_are_skipped_and_named(tmp_path, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    for kind in ("JPEG", "PNG", "WEBP"):
        buffer = io.BytesIO()
        Image.effect_noise((64, 64), 60).convert("RGB").save(buffer, kind)
        (folder / f"cut_{kind}.{kind.lower()}").write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
        (folder / f"whole_{kind}.{kind.lower()}").write_bytes(buffer.getvalue())
    counts = convert_dataset("folder", folder, tmp_path / "out", max_bad_share=0.6, quiet=True)
    assert counts["samples"] == 3 and counts["skipped"] == 3
    errors = capsys.readouterr().err
    assert all(f"skipped cut_{kind}" in errors for kind in ("JPEG", "PNG", "WEBP"))
