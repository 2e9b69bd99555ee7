"""Labels and ten crops in code folders: ADM's crops, of which one is sampled; documents refuse them."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from open_unitok.core.errors import UserError
from open_unitok.tokenizer import UniTok
from open_unitok.tokenizer.images import adm_crop, from_pil, ten_crops
from open_unitok.training.data.check import check_dataset
from open_unitok.training.data.code_shards import CodeFolder, CodeSample
from open_unitok.training.data.convert import convert_dataset
from open_unitok.training.data.mixture import open_datasets
from open_unitok.training.data.mixture_options import MixtureEntry, MixtureOptions
from open_unitok.training.data.sample_kinds import SAMPLE_KINDS, DropOptions
from open_unitok.training.data.tar_index import BadSample
from open_unitok.training.mllm.class_model import check_labels

from .conftest import extract, write_images

KIND = SAMPLE_KINDS["class_conditional"]


def photo(height, width):
    return Image.fromarray(np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_ten_crops_are_corners_and_centre_of_adms_crop_and_their_mirror_images():
    image = photo(300, 420)
    crops = ten_crops(image, 256, 1.1)
    scaled = from_pil(adm_crop(image, 281))  # int(256 * 1.1)
    assert len(crops) == 10 and scaled.shape == (3, 281, 281)
    flipped = scaled.flip(2)
    for one, whole in ((crops[:5], scaled), (crops[5:], flipped)):
        places = [(0, 0), (0, 25), (25, 0), (25, 25), (12, 12)]  # top, left; the rest of 25 is halved down
        for crop, (top, left) in zip(one, places, strict=True):
            assert torch.equal(crop, whole[:, top : top + 256, left : left + 256])


def test_folders_hold_ten_crops_and_the_labels(classes):
    plain, crops = (CodeFolder(classes.folder / name) for name in ("codes", "crops"))
    assert crops.manifest["crops"] == 10 and crops.manifest["crop_range"] == 1.1
    assert "crops" not in plain.manifest
    assert plain.manifest["labels"] == crops.manifest["labels"] == {"samples": 24, "highest": 2}
    sample = crops.read(0, 5)
    assert sample.codes.shape == (10, 4, 3) and sample.crops == 10 and sample.info["label"] == 2
    unitok = UniTok.from_pretrained(classes.folder / "unitok")
    pixels = np.random.default_rng(5).integers(0, 256, (40, 44, 3), dtype=np.uint8)
    expected = unitok.encode(torch.stack(ten_crops(Image.fromarray(pixels), 32, 1.1)))
    assert np.array_equal(sample.codes, expected.numpy())


def test_one_of_the_crops_is_sampled():
    codes = np.arange(10)[:, None, None] * np.ones((1, 4, 3), np.uint16)
    sample = CodeSample("x", codes, {"label": 7}, crops=10)
    for number in (0.0, 0.55, 0.999):
        text, crops = KIND.select(sample, DropOptions(unconditional=0.0), (number, 0.5, 0.5))
        assert text == "7" and crops == (int(number * 10),)
    assert KIND.select(sample, DropOptions(unconditional=0.1), (0.0, 0.95, 0.0)).text is None
    with pytest.raises(BadSample, match="has 10 images, expected 1"):  # of a document
        KIND.select(CodeSample("x", codes, {"label": 7}), DropOptions(), (0.0, 0.0, 0.0))
    for label in (None, -1, "7", True, 1.5):
        with pytest.raises(BadSample, match="expected an integer of 0 or more"):
            KIND.select(CodeSample("x", codes, {"label": label}, crops=10), DropOptions(), (0.0, 0.0, 0.0))


def test_training_on_crops_differs_by_the_sampled_crop_alone(classes):
    data = f"data.mixture=[{{kind: class_conditional, path: {classes.folder}/crops}}]"
    run = classes.train("crops-run", data, "steps=2")
    assert len(classes.rows(run)) == 2 and classes.rows(run) == classes.rows(
        classes.train("crops-again", data, "steps=2", "data.workers=1")
    )


def test_kinds_that_read_one_image_sample_a_crop():
    """Ten crops are augmentation: a caption or conversation is about whichever is sampled."""
    codes = np.arange(10)[:, None, None] * np.ones((1, 4, 3), np.uint16)
    turns = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "a rose"}]
    info = {"captions": ["a rose"], "conversations": [turns]}
    for kind in ("captioning", "conversation", "alignment"):
        for number in (0.0, 0.55, 0.999):
            sample = CodeSample("x", codes, info, crops=10)
            chosen = SAMPLE_KINDS[kind].select(sample, DropOptions(), (0.0, number, 0.0))
            assert chosen.images == (int(number * 10),) and chosen.text.count("<image>") <= 1
        one = CodeSample("x", codes[3], info)
        assert SAMPLE_KINDS[kind].select(one, DropOptions(), (0.0, 0.999, 0.0)).images == (0,)


def test_crops_are_checked_as_one_image(classes, tmp_path):
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "a rose"}]
    write_images(tmp_path / "x.tar", 2, captions=["a rose"], conversations=[turns])
    words = ("--tokenizer", classes.folder / "unitok", "--data", tmp_path / "x.tar", "--ten-crop")
    extract(*words, "--out", tmp_path / "crops")
    report = check_dataset(str(tmp_path / "crops"), quiet=True)
    assert not report.broken and any("2 samples with conversations" in line for line in report.lines)


def test_images_that_conversation_files_name_are_not_crops(classes, tmp_path):
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "a rose"}]
    (tmp_path / "c.json").write_text(json.dumps([{"id": "0", "image": "0.png", "conversations": turns}]))
    crops = str(classes.folder / "crops")
    entries = [MixtureEntry(kind="conversation", path=str(tmp_path / "c.json"), codes=crops)]
    with pytest.raises(UserError, match="10 crops of each image"):
        open_datasets(MixtureOptions(mixture=entries), None)


@pytest.mark.parametrize("kind", [name for name, kind in SAMPLE_KINDS.items() if "code folder" in kind.reads])
def test_other_kinds_refuse_ten_crops(classes, kind):
    entries = [MixtureEntry(kind=kind, path=str(classes.folder / "crops"))]
    if kind in ("class_conditional", "captioning", "conversation", "alignment"):
        assert len(open_datasets(MixtureOptions(mixture=entries), None)) == 1
        return
    with pytest.raises(UserError, match=f"10 crops of each image .* which kind {kind} would read as 10"):
        open_datasets(MixtureOptions(mixture=entries), None)


def test_labels_of_cls_members_and_what_is_missing(classes, tmp_path):
    def folder(name, **options):
        write_images(tmp_path / f"{name}.tar", 4, **options)
        words = ("--tokenizer", classes.folder / "unitok", "--data", tmp_path / f"{name}.tar")
        extract(*words, "--out", tmp_path / name)
        return CodeFolder(tmp_path / name)

    found = folder("cls", member="cls", label=lambda n: 10 * n)
    assert found.read(0, 3).info["label"] == 30
    check_labels(found, 31)
    with pytest.raises(UserError, match=r"labels up to 30, but the model has 30 classes .0 to 29."):
        check_labels(found, 30)
    without = folder("none", member="txt", label=lambda n: "a caption")
    with pytest.raises(UserError, match=r"samples need an integer `label` .* but 4 of 4 have none"):
        check_labels(without, 3)
    # folders of earlier versions do not count labels: the first sample of each tar is read
    for old, message in ((without, "the first of a tar has none"), (found, None)):
        path = old.folder / "codes.json"
        manifest = json.loads(path.read_text())
        del manifest["labels"]
        path.write_text(json.dumps(manifest))
        if message:
            with pytest.raises(UserError, match=message):
                check_labels(CodeFolder(old.folder), 3)
        else:
            check_labels(CodeFolder(old.folder), 1)  # its first label is 0


def test_bad_options_and_labels_of_an_extraction(classes, tmp_path):
    words = ("--tokenizer", classes.folder / "unitok", "--data", classes.folder / "images.tar")
    with pytest.raises(UserError, match=r"--ten-crop is 0.5; it must be from 1 to 4"):
        extract(*words, "--out", tmp_path / "a", "--ten-crop", "0.5")
    with pytest.raises(UserError, match=r"but --mode is pad: omit one"):
        extract(*words, "--out", tmp_path / "a", "--ten-crop", "--mode", "pad")
    with pytest.raises(UserError, match=r"holds codes of another extraction .ten_crop 1.1, now 1.05."):
        extract(*words, "--out", classes.folder / "crops", "--ten-crop", "1.05")
    # other data sets have labels of their own, which are no classes
    for member in ("cls", "json"):
        tar, out = tmp_path / f"{member}.tar", tmp_path / f"words-{member}"
        write_images(tar, 3, member, label=lambda n: "cat" if n else 4)
        extract(*words[:2], "--data", tar, "--out", out)
        assert CodeFolder(out).manifest["labels"] == {"samples": 1, "highest": 4}
        with pytest.raises(UserError, match="but 2 of 3 have none"):
            check_labels(CodeFolder(out), 5)


def test_class_folders_are_converted_in_a_mixed_order(classes, tmp_path):
    source = tmp_path / "train"
    for number in range(12):  # as in ImageNet: a folder per class
        folder = source / f"n{number % 3:02d}"
        folder.mkdir(parents=True, exist_ok=True)
        photo(40, 44).save(folder / f"{number}.png")
    counts = convert_dataset("classes", source, tmp_path / "tars", shard=6, quiet=True)
    assert counts["samples"] == counts["images"] == 12
    extract("--tokenizer", classes.folder / "unitok", "--data", *sorted((tmp_path / "tars").glob("*.tar")),
            "--out", tmp_path / "codes")  # fmt: skip
    codes = CodeFolder(tmp_path / "codes")
    found = [codes.read(shard, n).info for shard in range(2) for n in range(6)]
    assert {info["file"]: info["label"] for info in found} == {
        f"n{number % 3:02d}/{number}.png": number % 3 for number in range(12)
    }
    assert len({info["label"] for info in found[:6]}) == 3  # not in the order of the classes
    check_labels(codes, 3)
    with pytest.raises(UserError, match="expected a folder with a folder of images per class"):
        convert_dataset("classes", source / "n00" / "0.png", tmp_path / "x", quiet=True)
