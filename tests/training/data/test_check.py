"""`unitok data check` on every type of data set: counts, broken samples, lengths, the tokenizer of codes."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from open_unitok.cli.main import run
from open_unitok.core.errors import UserError
from open_unitok.core.files import sha256, write_json
from open_unitok.training.data.check import check_dataset
from open_unitok.training.data.code_shards import CODES_FORMAT


def add(tar, name, data):
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def png(number):
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), number, dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def talk(question="<image>\nWhat", answer="a red cat"):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def write_codes(folder, infos, codes=None):
    """A code folder with a sample per info; the codes of sample i are all i, or those given."""
    folder.mkdir()
    path = folder / "codes-000000.tar"
    with tarfile.open(path, "w") as tar:
        for number, info in enumerate(infos):
            array = io.BytesIO()
            np.save(array, (codes or {}).get(number, np.full((4, 3), number % 8, dtype=np.uint16)))
            add(tar, f"{number:04d}.codes.npy", array.getvalue())
            add(tar, f"{number:04d}.json", json.dumps(info).encode())
    shapes = {"num_codebooks": 3, "codebook_size": 8, "num_tokens": 4, "grid": [2, 2]}
    shards = [{"file": path.name, "samples": len(infos), "sha256": sha256(path)}]
    write_json(
        folder / "codes.json", {"format": CODES_FORMAT, "tokenizer": "abc", **shapes, "shards": shards}
    )
    return folder


def test_codes(tmp_path, capsys):
    infos = [{"captions": ["a cat", "a red cat on a mat"], "conversations": [talk()]} for _ in range(16)]
    infos += [{"document": ["a cat", 0, "and a dog", 1]}] * 2 + [{"captions": []}] * 2
    two = np.full((2, 4, 3), 7, dtype=np.uint16)
    folder = write_codes(tmp_path / "codes", infos, {16: two, 17: two})
    run(["data", "check", str(folder)])
    out = capsys.readouterr().out
    for words in (
        "20 samples, 20 checked",
        "22 images",
        "16 samples with captions: 32 texts of 2 to 6 words, median 2, 95 % up to 6",
        "16 samples with conversations: 16 texts of 3 to 3 words",
        "2 samples with document: 2 texts of 5 to 5 words",
        "2 samples with images only",
        "codes use 100.0% to 100.0%",
        "tokenizer abc (not compared",
        "0 broken",
    ):
        assert words in out, out
    assert check_dataset(str(folder), samples=5, quiet=True).samples == 5
    assert check_dataset(str(folder), fingerprint="abc", quiet=True).broken == []
    other = check_dataset(str(folder), fingerprint="xyz", quiet=True)
    assert len(other.broken) == 1 and "another tokenizer (abc) than the one given (xyz)" in other.broken[0]


def test_codes_of_the_wrong_mode_give_a_warning(tmp_path):
    talks = [{"captions": ["a cat"], "conversations": [talk()]}] * 2
    for mode, infos, kind in (
        ("crop", talks, "conversation"),
        ("pad", [{"captions": ["a cat"]}], "text_to_image"),
    ):
        path = write_codes(tmp_path / mode, infos) / "codes.json"
        facts = json.loads(path.read_text())
        assert "note" not in " ".join(check_dataset(str(path.parent), quiet=True).lines)  # of an older folder
        write_json(path, {**facts, "mode": mode, "images": 2, "oblong": 1})
        report = check_dataset(str(path.parent), quiet=True)
        assert f"--mode {mode}; kind {kind} expects" in " ".join(report.lines) and not report.broken
    path = write_codes(tmp_path / "document", [{"document": ["a", 0]}]) / "codes.json"  # no mode suits better
    write_json(path, {**json.loads(path.read_text()), "mode": "pad", "images": 1, "oblong": 1})
    assert "note" not in " ".join(check_dataset(str(path.parent), quiet=True).lines)


def test_broken_codes(tmp_path, capsys):
    infos = [{"captions": 3}, {"conversations": [talk("What")]}, {"document": ["a", 3]}, {}, {}]
    infos += [{"conversations": [talk("<image><image>")]}]
    large, wrong = np.full((4, 3), 9, dtype=np.uint16), np.zeros((5, 3), dtype=np.uint16)
    folder = write_codes(tmp_path / "codes", infos, {3: large, 4: wrong})
    with pytest.raises(UserError, match=r"5 problem\(s\)"):
        run(["data", "check", str(folder)])
    out = capsys.readouterr().out
    for words in (
        "sample 0 has captions",
        "names images [3]",
        "code 9 is not below 8",
        "(5, 3)",
        "marks 2",
    ):
        assert words in out
    tar = folder / "codes-000000.tar"
    data = bytearray(tar.read_bytes())
    data[1024 + 512 + 2] ^= 1
    tar.write_bytes(bytes(data))
    assert any("has changed since" in text for text in check_dataset(str(folder), quiet=True).broken)
    tar.write_bytes(bytes(data[:3000]))
    assert any("is broken" in text for text in check_dataset(str(folder), quiet=True).broken)


def test_images(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number in range(20):
            add(tar, f"{number:03d}.png", b"no image" if number == 4 else png(number))
            if number != 7:
                add(tar, f"{number:03d}.txt", f"a cat {number}".encode())
        add(tar, "many.0.png", png(1))
        add(tar, "many.1.png", png(2))
        add(tar, "many.json", json.dumps({"images": 2, "document": [0, "a cat", 1]}).encode())
        add(tar, "few.json", json.dumps({"images": 1}).encode())
    report = check_dataset(str(tmp_path), quiet=True)
    assert report.samples == 22 and len(report.broken) == 2
    assert (
        "004 has a broken image" in report.broken[0]
        and "few has json, expected 1 image(s)" in report.broken[1]
    )
    text = "\n".join(report.lines)
    assert "21 images" in text and "18 samples with captions" in text
    assert "1 samples with images only" in text
    assert check_dataset(f"{tmp_path}/*.tar", quiet=True).samples == 22


def test_conversations_and_text(tmp_path):
    codes = write_codes(tmp_path / "codes", [{"file": f"{n:04d}.png"} for n in range(20)])
    rows = [{"image": f"{n:04d}.png", "conversations": talk()} for n in range(21)]
    (tmp_path / "talks.json").write_text(json.dumps(rows))
    report = check_dataset(str(tmp_path / "talks.json"), codes=str(codes), fingerprint="abc", quiet=True)
    assert "0020.png, which is not in" in report.broken[0] and len(report.broken) == 1
    assert "20 samples with conversations" in "\n".join(report.lines)
    (tmp_path / "text.jsonl").write_text(
        "".join(json.dumps({"text": f"a cat {n}"}) + "\n" for n in range(20))
    )
    (tmp_path / "text.txt").write_bytes(b"a cat\n\xff\xfe\na dog\n")
    assert "20 samples with text: 20 texts of 3" in "\n".join(
        check_dataset(f"{tmp_path}/text.jsonl", quiet=True).lines
    )
    assert "not UTF-8" in check_dataset(f"{tmp_path}/text.txt", quiet=True).broken[0]


def test_error_messages(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "o.jsonl").write_text('{"texts": [], "images": []}\n')
    (tmp_path / "x.jsonl").write_text('{"a": 1}\n')
    for path, words in (
        ("empty", "neither codes.json nor tars"),
        ("nothing.txt", "does not exist"),
        ("*.tar", "no file"),
        ("o.jsonl", "unitok data convert obelics"),
        ("x.jsonl", "expected conversations or text"),
    ):
        with pytest.raises(UserError, match=words):
            check_dataset(str(tmp_path / path), quiet=True)
    with pytest.raises(UserError, match="--codes is allowed only"):
        check_dataset(str(tmp_path / "x.txt"), codes="y")
    with pytest.raises(UserError, match="--samples"):
        check_dataset(str(tmp_path / "x.txt"), samples=-1)
