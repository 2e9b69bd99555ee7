"""Reconstruction, zero-shot and linear probe through the command line, in the common data layouts."""

import functools
import hashlib
import io
import json
import shutil
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from open_unitok.core.errors import UserError
from open_unitok.eval.core import crops, image_files, imagenet
from open_unitok.eval.core.model import Model, Reconstructions
from open_unitok.eval.metrics import fid, image_quality, inception, inception_features, inception_weights
from open_unitok.eval.tokenizer import linear_probe, zeroshot
from open_unitok.tokenizer import UniTok, UniTokConfig
from open_unitok.tokenizer.frozen.lpips import LPIPS, LPIPS_FILE

from ..conftest import GOLDEN, run_named, score_folder

WNIDS = ("n01440764", "n01443537", "n02123045", "n03255030", "n15075141")  # classes 0, 1, 281, 542, 999


TINY = {
    "stem_width": 16, "stage_widths": (16, 32), "stage_depths": (1, 1), "hidden_size": 64,
    "num_hidden_layers": 1, "num_attention_heads": 2, "decoder_widths": (32, 16), "decoder_depths": (1, 1),
    "num_codebooks": 4, "codebook_size": 64, "codebook_dim": 4, "embed_dim": 32, "text_hidden_size": 64,
    "text_num_layers": 1, "text_num_heads": 2, "text_vocab_size": 512, "text_context_length": 16,
}  # fmt: skip


class Scripted:
    """Reconstructions flip the lowest bit; re-encoding changes the first code of book 1; embeds by colour."""

    device = "cpu"

    def __init__(self, folder="scripted", *options):
        self.reads = 0

    def check_needs(self, needs, benchmark):
        pass

    def describe(self):
        return {"path": "scripted", "kind": "tokenizer", "fingerprint": "0"}

    def reconstruct(self, images, reencode=False):
        resized = [np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC)) for image in images]
        originals = np.stack(resized)
        self.reads += len(images)
        codes = np.stack([p.reshape(-1)[:8].reshape(4, 2).astype(np.int64) for p in originals])
        second = codes.copy()
        second[:, 0, 1] += 1
        return Reconstructions(originals, originals ^ 1, codes, 256, second if reencode else None)

    def features(self, images, pooling):
        return np.stack([np.asarray(i, np.float32).mean(axis=(0, 1)) / 255 for i in images])

    def embed_images(self, images):
        """The colour of class n is that of its caption's hash, so every image is classified correctly."""
        return np.stack([zeroshot.unit_rows(np.asarray(i, np.float64)[0, 0] - 127.5) for i in images])

    def embed_texts(self, texts):
        return np.stack([vectors()[t] for t in texts])


@functools.cache
def vectors():
    """Caption -> the direction of its class's colour."""
    colours = np.array([colour_of(n) for n in range(1000)], np.float64)
    prompts = zeroshot.fill_templates(imagenet.class_names(), zeroshot.clip_templates())
    rows = zeroshot.unit_rows(colours - 127.5)
    return {text: row for row, texts in zip(rows, prompts) for text in texts}


def colour_of(number):
    return list(hashlib.sha256(str(number).encode()).digest()[:3])


@pytest.fixture
def scripted(monkeypatch):
    monkeypatch.setattr("open_unitok.eval.core.model.Model", Scripted)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Five images in ImageNet's layout, 32 pixels and in noise."""
    folder, random = tmp_path_factory.mktemp("imagenet") / "data", np.random.default_rng(0)
    for wnid in WNIDS:
        path = folder / "val" / wnid / "ILSVRC2012_val_00000001.JPEG"
        path.parent.mkdir(parents=True)
        Image.fromarray(random.integers(0, 255, (32, 32, 3), np.uint8)).save(path, "PNG")
    return folder


def write_colours(folder, part, wnids=WNIDS, suffix="JPEG", count=1):
    for wnid in wnids:
        colour = colour_of(imagenet.class_numbers()[wnid])
        for k in range(count):
            path = folder / part / wnid / f"{wnid}_{k}.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((8, 8, 3), colour, np.uint8)).save(path, "PNG")


def test_reconstruction_through_the_command_line(call, scripted, photos, tmp_path, inception_file):
    torch.manual_seed(0)
    torch.save(LPIPS().state_dict(), tmp_path / LPIPS_FILE)
    words = ("eval", "run", "reconstruction", "--model", "m", "--data", photos, "--out", tmp_path / "o")
    more = ("--inception-weights", inception_file, "--lpips-weights", tmp_path)
    code, _, err = call(*words, *more)
    assert code == 0, err
    folder = tmp_path / "o" / "reconstruction"
    result = json.loads((folder / "results.json").read_text())
    values = {name: metric["value"] for name, metric in result["metrics"].items()}
    assert values["psnr"] == pytest.approx(20 * np.log10(255), abs=1e-6)
    assert values["reencode_agreement"] == pytest.approx(7 / 8) and result["details"][
        "reencode_agreement"
    ] == [1.0, 0.75]
    assert result["metrics"]["reencode_agreement"]["interval"] == pytest.approx([7 / 8, 7 / 8])
    lpips = LPIPS.from_file(tmp_path)
    images = [np.asarray(Image.open(p).convert("RGB")) for p in sorted(photos.rglob("*.JPEG"))]
    pairs = [torch.from_numpy(np.stack([p, p ^ 1])).permute(0, 3, 1, 2).float() / 127.5 - 1 for p in images]
    assert values["lpips"] == pytest.approx(np.mean([lpips(a[:1], a[1:]).item() for a in pairs]), rel=1e-4)
    assert 0 < values["rfid"] < 1e-3 and result["metrics"]["rfid"]["interval"] is None
    about = result["details"]["fid"]
    assert (about["variant"], about["images"]) == ("torch-fidelity", 5)
    assert any("5 images are few" in p for p in result["problems"])


@pytest.fixture
def quick_net(monkeypatch):
    """A fast replacement for Inception."""

    def net(images):
        pooled = np.stack([p[:2, :2].reshape(-1).astype(np.float32) for p in images])
        return inception_weights.Features(pooled, pooled[:, :5] / 50)

    monkeypatch.setattr(inception, "load_extractor", lambda variant, file, device: net)


def test_features_resume_after_a_kill(quick_net, photos, tmp_path, inception_file, monkeypatch):
    monkeypatch.setattr(inception_features, "PIECE_SIZE", 2)
    scoring = {"inception_weights": str(inception_file)}
    run_named("reconstruction", Scripted(), photos, tmp_path / "a", options=scoring, quiet=True)
    pieces = sorted((tmp_path / "a" / "judge_passes").rglob("*.npz"))
    assert len(pieces) == 6
    whole = (tmp_path / "a" / "results.json").read_bytes()
    pieces[1].unlink()
    partial = score_folder(tmp_path / "a", options=scoring)
    assert "rfid" not in partial["metrics"] and any("3 of 5" in p for p in partial["problems"])
    run_named("reconstruction", Scripted(), photos, tmp_path / "a", options=scoring, quiet=True)
    assert (tmp_path / "a" / "results.json").read_bytes() == whole
    assert b"rfid" in whole


def test_variants_are_separate_and_files_suffice_for_scoring(
    call, scripted, quick_net, photos, tmp_path, inception_file
):
    words = ("eval", "run", "reconstruction", "--model", "m", "--data", photos, "--out", tmp_path)
    folder, more = tmp_path / "reconstruction", ("--inception-weights", inception_file)
    code, out, err = call(*words, *more)
    assert code == 0 and "rfid" in out, err
    pieces = {p: p.stat().st_mtime_ns for p in (folder / "judge_passes").rglob("*.npz")}
    assert len(pieces) == 2
    assert call("eval", "score", folder)[1] == out  # without weights
    assert call(*words, *more)[1] == out  # nothing is computed again
    assert {p: p.stat().st_mtime_ns for p in (folder / "judge_passes").rglob("*.npz")} == pieces
    code, other, _ = call("eval", "score", folder, "--inception-variant", "pytorch-fid")
    assert code == 0 and "rfid" not in other
    code, _, err = call("eval", "score", folder, "--inception-variant", "fidelity")
    assert code == 2 and "inception_variant is 'fidelity'" in err


def test_bad_images_are_counted_and_left_out(quick_net, photos, tmp_path, inception_file):
    shutil.copytree(photos, tmp_path / "data")
    (tmp_path / "data" / "val" / WNIDS[0] / "broken.png").write_bytes(b"no image")
    scoring = {"inception_weights": str(inception_file)}
    result = run_named(
        "reconstruction", Scripted(), tmp_path / "data", tmp_path / "o", options=scoring, quiet=True
    )
    assert result["failed"] == 1 and "broken.png" in result["problems"][0]
    assert "(left out of the means; the next run" in result["problems"][0]
    assert result["metrics"]["psnr"]["n"] == result["metrics"]["rfid"]["n"] == 5


def test_a_tar_is_a_folder_of_images(call, scripted, photos, tmp_path):
    tar = tmp_path / "data" / "000.tar"
    tar.parent.mkdir()
    with tarfile.open(tar, "w") as file:
        for number, path in enumerate(sorted(photos.rglob("*.JPEG"))):
            for suffix, data in (("png", path.read_bytes()), ("cls", str(number).encode())):
                info = tarfile.TarInfo(f"{number:06d}.{suffix}")
                info.size = len(data)
                file.addfile(info, io.BytesIO(data))
    for name, data in (("a", photos), ("b", tar.parent)):
        words = ("eval", "run", "reconstruction", "--model", "m", "--data", data, "--out", tmp_path / name)
        assert call(*words)[0] == 0
    a, b = (json.loads((tmp_path / x / "reconstruction" / "results.json").read_text()) for x in "ab")
    assert a["metrics"] == b["metrics"] and b["n"] == 5
    assert imagenet.find_labelled_images(tar.parent)[3] == (tar / "000003.png", 3)
    (tmp_path / "cut.tar").write_bytes(
        tar.read_bytes()[: image_files.tar_member_offsets(tar)["000004.png"][0] + 9]
    )
    with pytest.raises(UserError, match=r"cut\.tar"):
        image_files.tar_images(tmp_path / "cut.tar")
    with tarfile.open(tmp_path / "x.tar", "w") as file:
        file.addfile(tarfile.TarInfo("1.png"), io.BytesIO())
    assert "1.png has no .cls file" in str(imagenet._by_class_file(tmp_path / "x.tar")[0][1])


def test_imagenet_zero_shot_through_the_command_line(call, scripted, tmp_path):
    write_colours(tmp_path / "data", "val")
    words = ("eval", "run", "zeroshot", "--model", "m", "--out", tmp_path / "o", "--data", tmp_path / "data")
    code, _, err = call(*words)
    assert code == 0, err
    result = json.loads((tmp_path / "o" / "zeroshot" / "results.json").read_text())
    assert result["metrics"]["top1"]["value"] == result["metrics"]["top5"]["value"] == 1.0
    assert result["n"] == 5 and result["metadata"]["classes"] == 1000
    assert result["metadata"]["prompts per class"] == 80 and "lanczos" in result["metadata"]["preprocessing"]
    # the flat layout with a table, one label wrong and one image missing: three of five
    flat = tmp_path / "flat"
    (flat / "val").mkdir(parents=True)
    lines = ["ImageId,PredictionString"]
    for i, path in enumerate(sorted((tmp_path / "data").rglob("*.JPEG"))):
        wnid = WNIDS[0] if i == 3 else path.parent.name
        lines.append(f"ILSVRC2012_val_{i:08d},{wnid} 1 2 3 4")
        if i != 4:
            shutil.copy(path, flat / "val" / f"ILSVRC2012_val_{i:08d}.JPEG")
    (flat / "LOC_val_solution.csv").write_text("\n".join(lines) + "\n")
    code, out, err = call(*words[:-2], "--data", flat, "--out", tmp_path / "p")
    assert code == 0, err
    result = json.loads((tmp_path / "p" / "zeroshot" / "results.json").read_text())
    assert result["value"] == pytest.approx(0.6) and result["failed"] == 1 and "00000004.JPEG" in out
    lines[1] = lines[1].replace(WNIDS[0], "n99999999")
    (flat / "LOC_val_solution.csv").write_text("\n".join([*lines, ",n01440764 1"]) + "\n")
    code, out, err = call(*words[:-2], "--data", flat, "--out", tmp_path / "r")
    assert code == 0, err
    result = json.loads((tmp_path / "r" / "zeroshot" / "results.json").read_text())
    assert result["value"] == pytest.approx(2 / 6) and result["malformed"] == 2
    assert "2 annotations are malformed" in out and "lacks ImageId or PredictionString" in out
    (flat / "LOC_val_solution.csv").write_text("ImageId,PredictionString\nx,n99999999 1\n")
    code, _, err = call(*words[:-2], "--data", flat, "--out", tmp_path / "q")
    assert code == 2 and "'n99999999' is not a WordNet id" in err
    (tmp_path / "empty").mkdir()
    code, _, err = call(*words[:-2], "--data", tmp_path / "empty", "--out", tmp_path / "q")
    assert code == 2 and "nothing to classify" in err


def test_class_names_are_the_published_ones():
    golden = json.loads((GOLDEN / "zeroshot.json").read_text())
    joined = hashlib.sha256("\n".join(imagenet.class_names()).encode()).hexdigest()
    assert joined == golden["imagenet_classnames_sha256_joined_by_newline"]
    assert [wnid for wnid, _ in imagenet.imagenet_classes()] == sorted(imagenet.class_numbers())
    assert (imagenet.class_names()[0], imagenet.imagenet_classes()[999][0]) == ("tench", "n15075141")


@pytest.mark.parametrize("protocol", ["lbfgs", "sgd"])
def test_linear_probe_through_the_command_line(call, scripted, tmp_path, protocol):
    wnids = WNIDS[:3]
    write_colours(tmp_path / "data", "train", wnids, count=12)
    write_colours(tmp_path / "data", "val", wnids)
    shutil.move(tmp_path / "data" / "train" / wnids[0], tmp_path / "data" / "train" / "x")
    shutil.move(tmp_path / "data" / "val" / wnids[0], tmp_path / "data" / "val" / "x")
    for part in ("train", "val"):  # folder names that are not WordNet ids
        for number, wnid in enumerate(wnids[1:]):
            shutil.move(tmp_path / "data" / part / wnid, tmp_path / "data" / part / f"y{number}")
    (tmp_path / "data" / "train" / "x" / "broken.png").write_bytes(b"")
    (tmp_path / "data" / "val" / "x" / "broken.png").write_bytes(b"")
    words = ("eval", "run", "linear_probe", "--model", "m", "--data", tmp_path / "data", "--scorer", protocol)
    code, out, err = call(*words, "--out", tmp_path / "o", "--pooling", "latents")
    assert code == 0, err
    result = json.loads((tmp_path / "o" / "linear_probe" / "results.json").read_text())
    assert result["value"] == pytest.approx(3 / 4)  # all but the broken one
    assert result["details"]["training images"] == 36 and "1 training images have no features" in out
    assert "before quantisation" in result["details"]["features"]
    code, _, err = call(*words, "--out", tmp_path / "q", "--pooling", "mean")
    assert code == 2 and "pooling is 'mean'" in err
    (tmp_path / "data" / "val" / "z").mkdir()
    code, _, err = call(*words, "--out", tmp_path / "q")
    assert code == 2 and "the class 'z', which train/ does not have" in err


def test_probe_finds_the_minimum_and_no_signal_in_noise():
    rng = torch.Generator().manual_seed(0)
    x, y = torch.randn(400, 6, generator=rng), torch.arange(400) % 4
    found = linear_probe.fit_lbfgs(x, y, 4, 0.1)
    z = (x - x.mean(dim=0)) / x.std(dim=0, correction=0)
    bias = found(x.mean(dim=0)[None])[0]
    steps = torch.diag(x.std(dim=0, correction=0))
    weight = torch.stack([found((x.mean(dim=0) + row)[None])[0] - bias for row in steps])
    error = torch.softmax(z @ weight + bias, dim=1) - torch.nn.functional.one_hot(y, 4)
    assert (z.T @ error / 400 + 0.1 * weight).abs().max() < 1e-4  # the gradient is zero there
    _, about = linear_probe.fit_probe(x, y, 4, "lbfgs")
    assert about["held-out accuracy"] < 0.5
    y = (x @ torch.randn(6, 4, generator=rng)).argmax(dim=1)
    found, about = linear_probe.fit_probe(x, y, 4, "lbfgs")
    assert (found(x).argmax(dim=1) == y).float().mean() > 0.98 and about["held-out accuracy"] > 0.9


def test_crops_equal_the_published_ones():
    arrays = np.load(GOLDEN / "metrics.npz")
    image = Image.fromarray(arrays["crop_in"])
    for size in (16, 32, 64):
        assert np.array_equal(np.asarray(crops.adm_crop(image, size)), arrays[f"adm_center_crop_{size}"])
    assert np.array_equal(crops.to_uint8_llamagen(arrays["float_pm1"]), arrays["to_uint8_llamagen"])
    pixels = crops.find_crop("adm")(image, 32)
    back = ((pixels + 1) * 127.5).round().permute(1, 2, 0).numpy()
    assert np.array_equal(back, arrays["adm_center_crop_32"])
    with pytest.raises(UserError, match="Did you mean 'lanczos'"):
        crops.find_crop("lancsoz")


@pytest.mark.parametrize("crop", sorted(crops.CROPS))
def test_a_tokenizer_of_2_x_8_tokens_is_evaluated_on_oblong_crops(crop, tmp_path):
    torch.manual_seed(0)
    layout = {"image_size": 128, "token_layout": {"rows": 2, "columns": 8}}
    UniTok(UniTokConfig(**TINY, **layout)).save_pretrained(tmp_path / "model")
    (tmp_path / "images").mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (300, 260, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "images" / "tall.png")
    model = Model(tmp_path / "model", crop=crop)
    found = model.reconstruct([Image.fromarray(noise)])
    assert found.originals.shape == found.decoded.shape == (1, 32, 128, 3)
    result = run_named("reconstruction", model, tmp_path, tmp_path / "o", {"crop": crop}, quiet=True)
    # the scorer crops the original exactly as the model does
    expected = image_quality.psnr(found.originals, found.decoded).item()
    assert result["metrics"]["psnr"]["value"] == pytest.approx(expected)


def test_adm_crop_of_equal_sides_is_the_square_crop():
    image = Image.fromarray(np.load(GOLDEN / "metrics.npz")["crop_in"])
    assert np.array_equal(np.asarray(crops.adm_crop(image, (32, 32))), np.asarray(crops.adm_crop(image, 32)))


def test_crop_is_part_of_the_settings(photos, tmp_path):
    run_named("reconstruction", Scripted(), photos, tmp_path, {"crop": "adm"}, quiet=True)
    with pytest.raises(UserError, match="setting crop = 'adm', this run has None"):
        run_named("reconstruction", Scripted(), photos, tmp_path, quiet=True)


def test_nan_features_are_rejected():
    with pytest.raises(UserError, match="NaN or infinity"):
        fid.compute_moments([np.array([[1.0, np.nan], [0.0, 1.0]])])


def test_linear_probe_counts_images_of_unknown_classes_as_wrong(scripted, call, tmp_path):
    for part, count in (("train", 4), ("val", 1)):
        write_colours(tmp_path / "data", part, WNIDS[:3], count=count)
        shutil.copytree(tmp_path / "data" / part / WNIDS[0], tmp_path / "data" / part / "n99999999")
    words = ("eval", "run", "linear_probe", "--model", "m", "--data", tmp_path / "data", "--out", tmp_path)
    code, out, err = call(*words, "--pooling", "latents")
    assert code == 0, err
    result = json.loads((tmp_path / "linear_probe" / "results.json").read_text())
    assert result["value"] == pytest.approx(3 / 4) and result["metrics"]["top1"]["n"] == 4
    assert "'n99999999' is not a WordNet id" in out and "4 training images have no features" in out


def test_scene_prompts_are_those_of_the_training_captions():
    """Zero-shot prompts are data: another wording gives another score."""
    assert zeroshot.SCENE_TEMPLATES == ("{}", "a picture of {}", "there is {}", "an image with {}")
