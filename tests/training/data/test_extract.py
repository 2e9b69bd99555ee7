"""Code extraction: equal to the tokenizer's codes, resumed per tar, split over ranks; error messages."""

import argparse
import io
import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from open_unitok.cli import extract_codes
from open_unitok.core import distributed
from open_unitok.core.errors import UserError
from open_unitok.mllm import UniTokProcessor
from open_unitok.tokenizer import UniTok, UniTokConfig
from open_unitok.tokenizer.images import to_pixels
from open_unitok.training.data import extract
from open_unitok.training.data.check import check_dataset
from open_unitok.training.data.code_shards import CodeFolder
from open_unitok.training.data.mixture import Mixture
from open_unitok.training.data.mixture_options import MixtureEntry, MixtureOptions
from open_unitok.training.data.sample_kinds import crop_mismatch
from open_unitok.training.data.sequences import SequenceBuilder

SIZE = 32
SIZES = {
    "stem_width": 8,
    "stage_widths": (8, 16),
    "stage_depths": (1, 1),
    "hidden_size": 32,
    "decoder_widths": (16, 8),
    "decoder_depths": (1, 1),
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "text_hidden_size": 16,
    "text_num_layers": 1,
    "text_num_heads": 2,
    "text_vocab_size": 20,
    "embed_dim": 8,
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    torch.manual_seed(0)
    config = UniTokConfig(image_size=SIZE, num_codebooks=3, codebook_size=16, codebook_dim=4, **SIZES)
    folder = tmp_path_factory.mktemp("tokenizer") / "unitok"
    UniTok(config).save_pretrained(folder)
    return folder


def image(number):
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8))


def write_tar(path, numbers, bad=()):
    """A webdataset tar of random images; those in `bad` cannot be read."""
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number in numbers:
            png = io.BytesIO()
            image(number).save(png, "PNG")
            info = {"conversations": [], "note": number}
            content = b"no image" if number in bad else png.getvalue()
            for ending, data in (
                ("png", content),
                ("txt", f"caption {number}".encode()),
                ("json", json.dumps(info).encode()),
            ):
                member = tarfile.TarInfo(f"{number:05d}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


@pytest.fixture
def data(tmp_path):
    for shard in range(3):
        write_tar(tmp_path / "data" / f"part-{shard}.tar", range(10 * shard, 10 * shard + 10))
    return tmp_path / "data"


def run(tokenizer, data, out, *more):
    parser = argparse.ArgumentParser()
    extract_codes.add_arguments(parser)
    given = ["--tokenizer", tokenizer, "--data", f"{data}/*.tar", "--out", out, "--batch-size", 4, *more]
    extract_codes.run(parser.parse_args(list(map(str, given))))


def test_codes_equal_those_of_the_tokenizer(tokenizer, data, tmp_path, capsys):
    run(tokenizer, data, tmp_path / "codes", "--workers", 2)
    printed = capsys.readouterr()
    assert "30 images in 3 tar(s), 4 x 3 codes each; 0 unreadable; reconstruction" in printed.out
    # noise, by a random tokenizer
    assert "dB is less than 15 dB: this tokenizer does not suit the images" in printed.err
    unitok = UniTok.from_pretrained(tokenizer).eval()
    codes = CodeFolder(tmp_path / "codes", unitok.fingerprint())
    assert (
        len(codes) == 30
        and codes.manifest["layout"] == {"rows": 2, "columns": 2, "registers": 0}
        and codes.manifest["psnr"] > 0
    )
    for shard, index in ((0, 0), (1, 7), (2, 9)):
        sample, number = codes.read(shard, index), 10 * shard + index
        expected = unitok.encode(to_pixels(image(number), SIZE)[None])[0]
        assert sample.codes.dtype == np.uint16 and sample.codes.tolist() == expected.tolist()
        assert sample.info == {
            "conversations": [],
            "note": number,
            "captions": [f"caption {number}"],
            "grid": [2, 2],
            "file": f"{number:05d}.png",
        }


def test_a_missing_device_is_an_error(tokenizer, data, tmp_path):
    with pytest.raises(UserError, match="device is 'gpu'; it must be cpu"):
        run(tokenizer, data, tmp_path / "codes", "--device", "gpu")
    assert not (tmp_path / "codes").exists()


def test_resumes_after_an_interruption(tokenizer, data, tmp_path, monkeypatch):
    out = tmp_path / "codes"
    real, calls = extract._extract_tar, []

    def stopped(unitok, tar, *rest):
        calls.append(tar)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(unitok, tar, *rest)

    monkeypatch.setattr(extract, "_extract_tar", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(tokenizer, data, out)
    assert sorted(p.name for p in out.iterdir()) == ["codes-000000.json", "codes-000000.tar"]
    run(tokenizer, data, out)
    assert len(calls) == 4 and len(CodeFolder(out)) == 30  # the first tar was not extracted again
    whole = (out / "codes.json").read_bytes()
    (out / "codes-000001.json").unlink()
    run(tokenizer, data, out)
    assert len(calls) == 5 and (out / "codes.json").read_bytes() == whole


@pytest.mark.parametrize("old_key, images", [("pictures", 37), (None, 30)])
def test_image_counts_of_older_tar_descriptions_are_read(tokenizer, data, tmp_path, old_key, images):
    out = tmp_path / "codes"
    run(tokenizer, data, out)
    # the key of the count was `pictures`; before samples could have several images there was none
    for path, count in zip(sorted(out.glob("codes-*.json")), (10, 15, 12)):
        facts = json.loads(path.read_text())
        del facts["images"]
        path.write_text(json.dumps({**facts, **({old_key: count} if old_key else {})}))
    run(tokenizer, data, out)
    assert CodeFolder(out).manifest["images"] == images


def test_ranks_share_the_tars(tokenizer, data, tmp_path, monkeypatch, capsys):
    run(tokenizer, data, tmp_path / "alone")
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    out = tmp_path / "shared"
    for rank in range(2):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        run(tokenizer, data, out)
        assert (out / "codes.json").exists() == (rank == 1)
    assert "others are still running" in capsys.readouterr().out
    for file in (tmp_path / "alone").iterdir():
        assert (out / file.name).read_bytes() == file.read_bytes()


def test_unreadable_images_are_skipped_up_to_a_share(tokenizer, tmp_path, capsys):
    write_tar(tmp_path / "few" / "a.tar", range(20), bad=(4,))
    run(tokenizer, tmp_path / "few", tmp_path / "codes")
    assert len(CodeFolder(tmp_path / "codes")) == 19
    assert "00004" in capsys.readouterr().err
    write_tar(tmp_path / "many" / "a.tar", range(20), bad=range(6))
    with pytest.raises(UserError, match="max-bad-share"):
        run(tokenizer, tmp_path / "many", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_error_messages(tokenizer, data, tmp_path):
    out = tmp_path / "codes"
    run(tokenizer, data, out)
    with pytest.raises(UserError, match="another extraction"):
        run(tokenizer, data, out, "--mode", "squash")
    with pytest.raises(UserError, match=r"nothing/\*\.tar"):
        run(tokenizer, tmp_path / "nothing", out)
    with pytest.raises(UserError, match="batch-size"):
        run(tokenizer, data, out, "--batch-size", 0)
    broken = tmp_path / "broken"
    write_tar(broken / "a.tar", range(5))
    (broken / "a.tar").write_bytes((broken / "a.tar").read_bytes()[:4000])
    with pytest.raises(UserError, match=r"a\.tar is broken"):
        run(tokenizer, broken, tmp_path / "none")


def test_codes_of_the_wrong_mode_give_a_warning(tokenizer, tmp_path):
    data = tmp_path / "data"
    write_tar(data / "a.tar", range(4))
    run(tokenizer, data, tmp_path / "square")
    assert crop_mismatch(CodeFolder(tmp_path / "square"), "conversation") is None  # there was nothing to cut
    wide = io.BytesIO()
    image(5).resize((SIZE, SIZE // 2)).save(wide, "PNG")
    with tarfile.open(data / "a.tar", "a") as tar:
        member = tarfile.TarInfo("wide.png")
        member.size = len(wide.getvalue())
        tar.addfile(member, io.BytesIO(wide.getvalue()))
    for mode, bad in (("crop", {"conversation", "alignment"}), ("pad", {"text_to_image"})):
        run(tokenizer, data, tmp_path / mode, "--mode", mode)
        codes = CodeFolder(tmp_path / mode)
        assert codes.manifest["mode"] == mode and codes.manifest["oblong"] == 1
        found = {
            kind: crop_mismatch(codes, kind)
            for kind in ("text_to_image", "captioning", "conversation", "alignment")
        }
        assert {kind for kind, text in found.items() if text} == bad
        assert all("1 of 5 images" in found[kind] and f"--mode {mode};" in found[kind] for kind in bad)


def test_codebooks_above_65536_entries_are_stored_as_uint32(data, tmp_path, golden, capsys):
    """From extraction through `data check` to the int64 codes of a batch."""
    torch.manual_seed(0)
    many = {"num_codebooks": 2, "codebook_size": 70_000, "codebook_dim": 2}
    unitok = UniTok(UniTokConfig(image_size=SIZE, **SIZES, **many)).eval()
    unitok.save_pretrained(tmp_path / "many")
    out = tmp_path / "codes"
    run(tmp_path / "many", data, out)
    codes = CodeFolder(out, unitok.fingerprint())
    samples = [codes.read(shard, number) for shard in range(3) for number in range(10)]
    assert all(sample.codes.dtype == np.uint32 == codes.dtype for sample in samples)
    assert max(sample.codes.max() for sample in samples) > 65_535
    # so many entries of width 2 are close together: encode the same batch, which rounds the same way
    expected = unitok.encode(torch.stack([to_pixels(image(n), SIZE) for n in range(14, 18)]))
    assert codes.read(1, 7).codes.tolist() == expected[3].tolist()
    report = check_dataset(str(out), fingerprint=unitok.fingerprint(), quiet=True)
    assert report.samples == 30 and not report.broken

    path = golden / "mllm" / "tokenizer.model"
    sequences = SequenceBuilder(UniTokProcessor.from_text_tokenizer(path, num_image_tokens=4), 100)
    options = MixtureOptions(mixture=[MixtureEntry(kind="captioning", path=str(out))])
    (batch,) = Mixture(options, sequences, seed=0, batch_size=30).next()
    found = batch.inputs["image_codes"]
    assert found.dtype == torch.int64
    assert sorted(found.tolist()) == sorted(sample.codes.tolist() for sample in samples)


def test_images_that_the_tokenizer_suits_give_no_warning_and_transparent_ones_are_counted(tmp_path, capsys):
    """The shipped tokenizer on a scene of its kind, once with a transparent border."""
    scene = Image.new("RGB", (64, 64), "white")
    scene.paste((220, 40, 40), (20, 20, 44, 44))
    clear = scene.convert("RGBA")
    clear.putalpha(Image.new("L", (64, 64)))
    clear.paste((220, 40, 40, 255), (20, 20, 44, 44))
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, shown in (("opaque", scene), ("clear", clear)):
            png = io.BytesIO()
            shown.save(png, "PNG")
            member = tarfile.TarInfo(f"{name}.PNG")
            member.size = len(png.getvalue())
            tar.addfile(member, io.BytesIO(png.getvalue()))
    run("scenes", tmp_path, tmp_path / "codes")
    printed = capsys.readouterr()
    assert "2 images in 1 tar(s)" in printed.out and "does not suit" not in printed.err
    assert "0 unreadable; 1 with transparent parts, which are put on white; recon" in printed.out
    codes = CodeFolder(tmp_path / "codes")
    first, second = (codes.read(0, number).images[0] for number in range(2))
    assert np.array_equal(first, second)
    assert "  1 images with transparent parts" in "\n".join(check_dataset(str(tmp_path / "a.tar")).lines)
