"""Names of images: conversations find their image after conversion and extraction, none outside a folder."""

import json
import os
import unicodedata

import numpy as np
import pytest
import torch
from PIL import Image

from open_unitok.cli.main import run
from open_unitok.core.errors import UserError
from open_unitok.tokenizer import UniTok, UniTokConfig
from open_unitok.tokenizer.images import load_image, to_pixels
from open_unitok.training.data.code_shards import CodeFolder
from open_unitok.training.data.convert import convert_dataset
from open_unitok.training.data.records import file_of_image, image_key, image_name, unused_key
from open_unitok.training.data.tar_index import BadSample, scan_tar
from open_unitok.training.data.text import Conversations

SIZE = 32
NAMES = (
    "cat.png", "猫.png", "犬.png", "Müller.png", "Mäller.png", "a b.png", "a_b.png", "a.b.png", "a-b.png",
    "x.png", "x.jpg", "UP.JPG", "v1.0.png", "v1.1.png", "2024.01.png", "2024.02.png", "sub/cat.png",
    "a b.c.png", "sub.cat.png", "😀.png", "😎.png", "-dash.png", "__.png", "__x__.png", "two.PNG",
    "k" * 150 + ".png", "k" * 150 + "2.png", "日" * 70 + ".png", "(1).png", "a+b&c=d.png",
    "sub dir/ü/é.png", "sub dir/ü/e\u0301.png", "a_b-2.png", "%41.png", "new\nline.png", "a..png",
)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    torch.manual_seed(0)
    sizes = {"stem_width": 8, "stage_widths": (8, 16), "stage_depths": (1, 1), "hidden_size": 32}
    decoder = {"decoder_widths": (16, 8), "decoder_depths": (1, 1), "num_attention_heads": 2}
    codes = {"num_codebooks": 3, "codebook_size": 16, "codebook_dim": 4, "num_hidden_layers": 1}
    text = {"text_hidden_size": 16, "text_num_layers": 1, "text_num_heads": 2, "text_vocab_size": 20}
    folder = tmp_path_factory.mktemp("tokenizer") / "unitok"
    UniTok(UniTokConfig(image_size=SIZE, embed_dim=8, **sizes, **decoder, **codes, **text)).save_pretrained(
        folder
    )
    return folder


def write_images(folder, names):
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)


def conversations(path, names):
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "This."}]
    path.write_text(json.dumps([{"image": n, "conversations": turns} for n in names]), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def folders(tokenizer, tmp_path_factory):
    """Images, and their codes by `data convert folder` and `extract-codes`."""
    root = tmp_path_factory.mktemp("names")
    write_images(root / "images", NAMES)
    run(["data", "convert", "folder", str(root / "images"), str(root / "tars"), "--shard", "9"])
    given = ["--tokenizer", str(tokenizer), "--data", f"{root}/tars/*.tar", "--out", str(root / "codes")]
    run(["extract-codes", *given])
    return root / "images", root / "codes"


@pytest.fixture(scope="module")
def codes_of(tokenizer):
    unitok = UniTok.from_pretrained(tokenizer).eval()
    return lambda path: unitok.encode(to_pixels(load_image(path), SIZE)[None])[0].tolist()


def test_every_conversation_finds_its_image(folders, codes_of, tmp_path):
    images, codes = folders
    found = Conversations(conversations(tmp_path / "talks.json", NAMES), CodeFolder(codes))
    for number, name in enumerate(NAMES):
        assert found.read(0, number).images[0].tolist() == codes_of(images / name), name


def test_converted_conversations_hold_the_same_codes(folders, tokenizer, codes_of, tmp_path):
    images, _ = folders
    talks = conversations(tmp_path / "talks.json", NAMES)
    run(["data", "convert", "llava", str(talks), str(tmp_path / "tars"), "--images", str(images)])
    given = ["--data", f"{tmp_path}/tars/*.tar", "--out", str(tmp_path / "codes"), "--mode", "pad"]
    run(["extract-codes", "--tokenizer", str(tokenizer), *given])
    codes = CodeFolder(tmp_path / "codes")
    for number, name in enumerate(NAMES):
        assert codes.read(0, number).codes.tolist() == codes_of(images / name)
        assert codes.image(name).codes.tolist() == codes_of(images / name)


def test_one_image_under_several_names(folders, codes_of, tmp_path):
    images, codes = folders
    same = ["cat.png", "./cat.png", "//cat.png", "/cat.png", "sub/../cat.png", str(images / "cat.png")]
    others = [
        "cat.PNG",
        "Cat.png",
        "sub\\cat.png",
        "cat.jpg",
        "cat",
        " cat.png",
        "cat.png?x=1",
        "file://cat.png",
    ]
    outside = ["../images/cat.png", "/elsewhere/cat.png", "..", "", "a/../../cat.png"]
    expected = codes_of(images / "cat.png")
    assert all(CodeFolder(codes).image(name).codes.tolist() == expected for name in same)
    for name in [*others, *outside]:
        with pytest.raises(BadSample):
            CodeFolder(codes).image(name)
    talks = conversations(tmp_path / "talks.json", [*same, *others, *[name for name in outside if name]])
    counts = convert_dataset("llava", talks, tmp_path / "tars", images=images, max_bad_share=1, quiet=True)
    assert counts["samples"] == len(same)


def test_composed_and_decomposed_letters_are_one_name(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "é.png") for form in ("NFC", "NFD"))
    (tmp_path / decomposed).write_bytes(b"")
    assert image_name(composed) == image_name(decomposed) and image_key(composed) == image_key(decomposed)
    assert file_of_image(tmp_path, composed).exists() and file_of_image(tmp_path, decomposed).exists()
    (tmp_path / composed).write_bytes(b"")  # both: each name is its own file
    assert file_of_image(tmp_path, composed).name == composed
    assert file_of_image(tmp_path, decomposed).name == decomposed


def test_keys_are_never_used_twice():
    used = set()
    keys = [unused_key(image_key(name), name, used) for name in [*NAMES, *NAMES]]
    assert len(set(keys)) == 2 * len(NAMES) == len(used)
    assert all("." not in key and len(key.encode()) < 120 for key in keys)


@pytest.mark.parametrize("name", ["../secret.png", "SECRET", "sub/../../secret.png", "/dev/zero"])
@pytest.mark.parametrize("kind", ["llava", "csv", "obelics"])
def test_names_that_lead_out_of_the_folder_are_refused(name, kind, tmp_path, capsys):
    write_images(tmp_path / "images", [f"{n}.png" for n in range(30)])
    write_images(tmp_path, ["secret.png"])
    name = name.replace("SECRET", str(tmp_path / "secret.png"))
    rows = [f"{n}.png" for n in range(30)] + [name]
    if kind == "llava":
        source = conversations(tmp_path / "data.json", rows)
    elif kind == "csv":
        source, kind = tmp_path / "metadata.csv", "folder"
        source.write_text("file_name,text\n" + "".join(f"{row},a\n" for row in rows))
    else:
        source = tmp_path / "data.jsonl"
        source.write_text(
            "".join(json.dumps({"texts": ["a", None], "images": [None, row]}) + "\n" for row in rows)
        )
    counts = convert_dataset(kind, source, tmp_path / "out", images=tmp_path / "images")
    assert counts["images"] == 30
    if kind == "obelics":
        assert counts["lost images"] == 1
    else:
        assert counts["skipped"] == 1 and "images" in capsys.readouterr().err


def test_devices_and_fifos_are_refused(tmp_path):
    write_images(tmp_path / "images", [f"{n}.png" for n in range(30)])
    os.mkfifo(tmp_path / "images" / "fifo.png")
    os.symlink("/dev/zero", tmp_path / "images" / "zero.png")
    os.symlink("loop.png", tmp_path / "images" / "loop.png")
    names = [*(f"{n}.png" for n in range(30)), "fifo.png", "zero.png", "loop.png"]
    talks = conversations(tmp_path / "talks.json", names)
    counts = convert_dataset("llava", talks, tmp_path / "out", images=tmp_path / "images", max_bad_share=0.2)
    assert (counts["samples"], counts["skipped"]) == (30, 3)
    assert convert_dataset("folder", tmp_path / "images", tmp_path / "folder")["samples"] == 30


def test_tars_of_others_are_found_by_member_names(tokenizer, tmp_path, codes_of):
    """img2dataset's numbers, dots, samples of one key: the name of the member is the name of the image."""
    import tarfile

    write_images(tmp_path / "i", ["000000001.jpg", "2024.01.png", "2024.02.png", "d/2024_01.png"])
    for tar in ("a", "b"):
        with tarfile.open(tmp_path / f"{tar}.tar", "w") as file:
            for name in ("000000001.jpg", "2024.01.png", "2024.02.png"):
                file.add(tmp_path / "i" / name, arcname=name)
            file.add(tmp_path / "i" / "d/2024_01.png", arcname="2024_01.png")
            if tar == "b":
                file.add(tmp_path / "i" / "2024.01.png", arcname="same.png")
                file.add(tmp_path / "i" / "2024.02.png", arcname="same.png")
    given = ["--data", f"{tmp_path}/a.tar", "--out", str(tmp_path / "codes")]
    run(["extract-codes", "--tokenizer", str(tokenizer), *given])
    codes = CodeFolder(tmp_path / "codes")
    for name, file in (
        ("2024.01.png", "2024.01.png"),
        ("2024_01.png", "d/2024_01.png"),
        ("000000001.jpg",) * 2,
    ):
        assert codes.image(name).codes.tolist() == codes_of(tmp_path / "i" / file)
    run(
        [
            "extract-codes",
            "--tokenizer",
            str(tokenizer),
            "--data",
            f"{tmp_path}/b.tar",
            "--out",
            str(tmp_path / "b"),
        ]
    )
    with pytest.raises(BadSample, match=r"same.png, which 2 images"):
        CodeFolder(tmp_path / "b").image("same.png")
    assert len(scan_tar(str(tmp_path / "b" / "codes-000000.tar")).samples) == 6


DAMAGED = [
    b"", b"[]", b"null", b"{", b"\xff\xfe", b'{"format": 3}',
    {"shards": {}}, {"shards": [3]}, {"shards": [{"file": "codes-000000.tar"}]}, {"num_tokens": "4"},
    {"num_tokens": 0}, {"codebook_size": -1}, {"tokenizer": None}, {"image_roots": 3},
    {"num_codebooks": True},
    *({"shards": [{"file": f, "samples": 1, "sha256": "0"}]} for f in
      ("../a.tar", "/dev/zero", "pipe:touch RAN", "https://127.0.0.1/a.tar", "", "a/b.tar")),
]  # fmt: skip


@pytest.mark.parametrize("change", DAMAGED, ids=str)
def test_odd_manifests_end_in_one_line(change, folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    manifest = folders[1] / "codes.json"
    given = json.loads(manifest.read_text())
    (tmp_path / "codes.json").write_bytes(
        change if isinstance(change, bytes) else json.dumps({**given, **change}).encode()
    )
    with pytest.raises(UserError) as error:
        CodeFolder(tmp_path).check_shard(0)
    assert "\n" not in str(error.value) and "codes.json" in str(error.value)
    assert not (tmp_path / "RAN").exists()


@pytest.mark.parametrize(
    "text", ["[]", "{}", "null", "{", '{"samples": "x"}', '{"samples": 1, "counts": [1]}']
)
def test_odd_descriptions_of_tars_end_in_one_line(text, tokenizer, tmp_path):
    write_images(tmp_path / "images", ["a.png"])
    convert_dataset("folder", tmp_path / "images", tmp_path / "tars", quiet=True)
    given = ["extract-codes", "--tokenizer", str(tokenizer), "--data", f"{tmp_path}/tars/*.tar"]
    run([*given, "--out", str(tmp_path / "codes")])
    (tmp_path / "codes" / "codes-000000.json").write_text(text)
    with pytest.raises(UserError, match=r"codes-000000.json"):
        run([*given, "--out", str(tmp_path / "codes")])
    (tmp_path / "tars" / "convert.json").write_text(text)
    with pytest.raises(UserError, match=r"convert.json"):
        convert_dataset("folder", tmp_path / "images", tmp_path / "tars", quiet=True)
