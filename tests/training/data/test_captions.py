"""Captions: from .txt files, .json and names; by conversion, extraction, stage 1 and `data check` alike."""

import io
import json
import random
import tarfile

import pytest
from PIL import Image

from open_unitok.core.errors import UserError
from open_unitok.training.data.captions import name_captions, with_captions
from open_unitok.training.data.check import check_dataset
from open_unitok.training.data.convert import convert_dataset
from open_unitok.training.data.tar_index import BadSample, image_members, scan_tar
from open_unitok.training.tokenizer.config import ImageOptions
from open_unitok.training.tokenizer.data import PairDecoder

BOM = b"\xef\xbb\xbf"


def png(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path, samples: dict[str, dict[str, bytes]]) -> str:
    """{key: {extension: content}}, each with an image."""
    with tarfile.open(path, "w") as tar:
        for key, members in samples.items():
            for extension, content in {"png": png("red"), **members}.items():
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return str(path)


# the members of a sample -> its captions
CAPTIONS = {
    "crlf": ({"txt": BOM + b"red square\r\nsecond line\r\n"}, ["red square", "second line"]),
    "blank": ({"txt": b"\n  red \n \n"}, ["red"]),
    "separators": ({"txt": "a\u2028b\x85c\x0bd".encode()}, ["a\u2028b\x85c\x0bd"]),
    "empty": ({"txt": b""}, []),
    "none": ({}, []),
    "captions": ({"json": b'{"captions": ["a", "b"]}'}, ["a", "b"]),
    "caption": ({"json": b'{"caption": "c 0", "width": 64}'}, ["c 0"]),
    "img2dataset": ({"json": b'{"caption": "from json"}', "txt": b"from txt"}, ["from txt"]),
    "bom_json": ({"json": BOM + b'{"text": "t"}'}, ["t"]),
    "class": ({"cls": b"3"}, []),
    "caption_file": ({"caption": BOM + b"red\n"}, ["red"]),
}
BROKEN = {
    "latin1": ({"txt": "café".encode("latin-1")}, ".txt, line 1, byte 4, is not UTF-8"),
    "utf16": ({"txt": "red".encode("utf-16")}, ".txt is UTF-16, expected UTF-8"),
    "number": ({"json": b'{"captions": [3]}'}, "expected a list of texts"),
    "surrogate": ({"json": b'{"captions": ["\\ud83d"]}'}, "half of a surrogate pair"),
    "cut": ({"json": b'{"captions": '}, ".json is not valid JSON"),
}


@pytest.mark.parametrize("name", CAPTIONS)
@pytest.mark.parametrize("choice", ["all", "first"])
def test_captions_of_tars(tmp_path, name, choice):
    members, captions = CAPTIONS[name]
    (sample,) = scan_tar(write_tar(tmp_path / "a.tar", {"k": members})).samples
    expected = captions if choice == "all" else captions[:1]
    assert with_captions(sample, image_members(sample)[1], choice).get("captions", []) == expected
    decode = PairDecoder(ImageOptions(captions=choice), (8, 8), True)
    if expected:  # stage 1 samples one of them, another in each epoch
        seen = {decode(sample, random.Random(seed)).caption for seed in range(20)}
        assert seen == set(expected)
    else:
        with pytest.raises(
            BadSample, match=rf"has no caption, images\.captions is '{choice}' \(it has \.png"
        ):
            decode(sample, random.Random(0))


@pytest.mark.parametrize("name", BROKEN)
def test_check_extraction_and_training_agree_on_what_is_broken(tmp_path, name):
    members, reason = BROKEN[name]
    path = write_tar(tmp_path / "a.tar", {"k": members, "good": {"txt": b"fine"}})
    broken, good = scan_tar(path).samples
    report = check_dataset(path, quiet=True)
    (problem,) = report.broken
    with pytest.raises(BadSample) as extraction:
        with_captions(broken, image_members(broken)[1])
    decode = PairDecoder(ImageOptions(), (8, 8), True)
    with pytest.raises(BadSample) as training:
        decode(broken, random.Random(0))
    for text in (problem, str(extraction.value), str(training.value)):
        assert reason in text
    assert decode(good, random.Random(0)).caption == "fine"


def test_stage_1_reads_txt_or_json_and_names_the_key(tmp_path):
    path = write_tar(
        tmp_path / "a.tar", {"t": {"txt": b"from\ntxt"}, "j": {"json": b'{"captions": ["from json"]}'}}
    )
    txt, converted = scan_tar(path).samples

    def caption(sample, choice):
        return PairDecoder(ImageOptions(captions=choice), (8, 8), True)(sample, random.Random(0)).caption

    assert caption(txt, "all") in ("from", "txt") and caption(converted, "all") == "from json"
    assert caption(txt, "txt") == "from\ntxt" and caption(converted, "json") == "from json"
    for sample, choice in ((converted, "txt"), (txt, "json")):
        with pytest.raises(BadSample):
            caption(sample, choice)
    with pytest.raises(BadSample, match=r"images\.captions is 'json'"):
        caption(txt, "json")


@pytest.mark.parametrize(
    ("path", "captions"),
    [
        ("dogs/golden_retriever_01.jpg", ["dogs, golden retriever"]),
        ("a red circle.PNG", ["a red circle"]),
        ("tench/0001.jpg", ["tench"]),
        ("猫/黒-猫 (2).png", ["猫, 黒 猫"]),
        ("0001.jpg", []),
        ("2024/7.png", []),
        ("cat07.jpg", ["cat"]),
        ("v2 engine/side view.webp", ["v2 engine, side view"]),
    ],
)
def test_names_as_captions(path, captions):
    assert name_captions(path) == captions


def write_images(folder) -> None:
    (folder / "dogs").mkdir(parents=True)
    (folder / "dogs" / "golden_retriever_1.png").write_bytes(png("red"))
    (folder / "dogs" / "golden_retriever_1.txt").write_bytes(BOM + b"ein Hund\r\na dog\r\n\r\nun chien")
    (folder / "b.png").write_bytes(png("blue"))


@pytest.mark.parametrize(
    ("choice", "captions"),
    [
        ("all", [["ein Hund", "a dog", "un chien"], []]),
        ("first", [["ein Hund"], []]),
        ("name", [["dogs, golden retriever"], ["b"]]),
    ],
)
def test_convert_takes_the_captions_that_are_asked_for(tmp_path, choice, captions):
    write_images(tmp_path / "images")
    convert_dataset("folder", tmp_path / "images", tmp_path / "out", captions=choice, quiet=True)
    samples = scan_tar(str(tmp_path / "out" / "part-000000.tar")).samples
    infos = {sample.json()["file"]: sample.json()["captions"] for sample in samples}
    assert [infos["dogs/golden_retriever_1.png"], infos["b.png"]] == captions
    # names also after the conversion, when they are asked for only then
    named = with_captions(samples[-1], samples[-1].json(), "name")
    assert named["captions"] == ["dogs, golden retriever"]
    with pytest.raises(UserError, match="converted before"):
        other = "first" if choice != "first" else "all"
        convert_dataset("folder", tmp_path / "images", tmp_path / "out", captions=other, quiet=True)


def test_metadata_files(tmp_path):
    (tmp_path / "a.png").write_bytes(png("red"))
    table = BOM + 'file_name,text\r\na.png,"one, two\u2028three"\r\n'.encode()
    records = {
        "m.csv": table,
        "m.CSV": table,
        "m.tsv": table.replace(b",text", b"\ttext").replace(b"png,", b"png\t"),
        "m.jsonl": BOM
        + json.dumps({"file_name": "a.png", "text": "one, two\u2028three"}).encode()
        + b"\r\n\r\n",
    }
    for number, (name, data) in enumerate(records.items()):
        (tmp_path / name).write_bytes(data)
        counts = convert_dataset("folder", tmp_path / name, tmp_path / f"out{number}", quiet=True)
        assert counts["samples"] == 1
        (sample,) = scan_tar(str(tmp_path / f"out{number}" / "part-000000.tar")).samples
        assert sample.json()["captions"] == ["one, two\u2028three"]
    # a comma without quotes would cut the caption off
    (tmp_path / "cut.csv").write_bytes(b"file_name,text\na.png,one, two\n")
    with pytest.raises(UserError, match=r"cut\.csv, line 2, has more cells than the table has columns"):
        convert_dataset("folder", tmp_path / "cut.csv", tmp_path / "cut", quiet=True)


def test_check_shows_a_sample_of_captions(tmp_path):
    samples = {f"{i:03d}": {"txt": f"caption {i}\nLegende {i}".encode()} for i in range(40)}
    report = check_dataset(write_tar(tmp_path / "a.tar", samples), quiet=True)
    shown = [line.strip() for line in report.lines if line.startswith("    ")]
    assert len(shown) == 5 and len({line.split()[1] for line in shown}) == 5
    assert all(line.split()[0] in ("caption", "Legende") for line in shown)
    assert "40 samples with captions: 80 texts" in "\n".join(report.lines)
