"""`image_set` through the command line: two folders, prompts with a scripted generator, wrong inputs."""

import json

import numpy as np
import pytest
from PIL import Image

from open_unitok.eval.judges.clip_model import ClipModel
from open_unitok.eval.metrics import fid
from open_unitok.eval.metrics.set_distances import Dinov2Extractor, cmmd
from open_unitok.generation import Sampling

from ..metrics.tiny_networks import blocky_image, write_clip, write_dinov2


class Painter:
    """Generates one blocky image per seed."""

    device, sampling, kind = "cpu", Sampling(), "mllm"

    def __init__(self, *_):
        pass

    def check_needs(self, needs, benchmark):
        pass

    def describe(self):
        return {"path": "painter", "kind": "mllm", "fingerprint": "0"}

    def generate(self, prompts, seeds):
        return [Image.fromarray(blocky_image(seed)) for seed in seeds]


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """A CLIP folder and a DINOv2 file."""
    folder = tmp_path_factory.mktemp("networks")
    return write_clip(folder / "clip"), write_dinov2(folder / "dinov2_vitl14_pretrain.pth")


def write_images(folder, seeds):
    folder.mkdir(parents=True)
    for seed in seeds:
        Image.fromarray(blocky_image(seed)).save(folder / f"{seed}.png")
    return [blocky_image(seed) for seed in sorted(seeds, key=str)]


def run(call, model, data, out, *more):
    return call("eval", "run", "image_set", "--model", model, "--data", data, "--out", out, *more)


def result_of(out):
    return json.loads((out / "image_set" / "results.json").read_text())


def test_two_folders_of_images(call, networks, tmp_path):
    clip, dinov2 = networks
    images = write_images(tmp_path / "ours", range(6))
    real = write_images(tmp_path / "real", range(10, 18))
    code, _, err = run(call, tmp_path / "ours", tmp_path / "real", tmp_path)
    assert code == 2 and "--dinov2-weights, --cmmd-model or --inception-weights" in err
    flags = ("--dinov2-weights", dinov2, "--cmmd-model", clip)
    code, out, err = run(call, tmp_path / "ours", tmp_path / "real", tmp_path, *flags)
    assert code == 0, err
    result = result_of(tmp_path)
    values = {name: metric["value"] for name, metric in result["metrics"].items()}
    net = Dinov2Extractor(dinov2)
    moments = [fid.compute_moments([net(part).pooled]) for part in (images, real)]
    assert values["fd_dinov2"] == pytest.approx(fid.frechet_distance(*moments), rel=1e-6)
    judge = ClipModel(str(clip), "cpu", "--cmmd-model")
    assert values["cmmd"] == pytest.approx(cmmd(judge.embed_squares(images), judge.embed_squares(real)))
    assert values["cmmd"] > 0 and result["metrics"]["cmmd"]["n"] == 6
    assert not result["comparable"] and result["details"]["cmmd"]["reference images"] == 8
    text = " ".join(result["problems"])
    assert "6 images are few" in text and "not DINOv2 ViT-L/14" in text and "at 336 pixels" in text
    # from files alone, without the networks
    assert call("eval", "score", tmp_path / "image_set")[1] == out


def test_an_array_against_an_array(call, networks, tmp_path):
    for name, seed in (("a", 1), ("b", 2)):
        pixels = np.random.RandomState(seed).randint(0, 256, (5, 20, 20, 3)).astype(np.uint8)
        np.savez(tmp_path / f"{name}.npz", arr_0=pixels)
    (tmp_path / "empty").mkdir()
    flags = ("--cmmd-model", networks[0], "--reference", tmp_path / "b.npz")
    code, _, err = run(call, tmp_path / "a.npz", tmp_path / "empty", tmp_path, *flags)
    assert code == 0, err
    assert list(result_of(tmp_path)["metrics"]) == ["cmmd"]


def test_prompts_are_generated_and_scored(call, networks, tmp_path, monkeypatch):
    monkeypatch.setattr("open_unitok.eval.core.model.Model", Painter)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "prompts.txt").write_text("a red cat\n\nthe blue dog on the mat\n")
    code, _, err = run(call, "m", tmp_path / "data", tmp_path, "--clip-model", networks[0])
    assert code == 0, err
    result = result_of(tmp_path)
    assert list(result["metrics"]) == ["clip_score"] and result["n"] == 2
    rows = [json.loads(r) for r in (tmp_path / "image_set" / "scores.jsonl").read_text().splitlines()]
    assert [row["file"] for row in rows] == ["images/00001.png", "images/00003.png"]
    assert result["value"] == pytest.approx(np.mean([row["score"] for row in rows])) and result["value"] > 0
    # with a reference in DATA the distances come too, and the images are kept
    write_images(tmp_path / "data" / "images", range(20, 24))
    code, _, err = run(call, "m", tmp_path / "data", tmp_path, "--cmmd-model", networks[0])
    assert code == 0 and set(result_of(tmp_path)["metrics"]) == {"cmmd", "clip_score"}, err


def test_a_killed_pass_gives_no_number(call, networks, tmp_path):
    write_images(tmp_path / "ours", range(3))
    write_images(tmp_path / "real", range(10, 13))
    assert run(call, tmp_path / "ours", tmp_path / "real", tmp_path, "--cmmd-model", networks[0])[0] == 0
    path = tmp_path / "image_set" / "judge_passes" / "cmmd.json"
    about = json.loads(path.read_text())
    path.write_text(json.dumps(about | {"images": {"samples": 1000, "reference": 3}}))
    code, _, err = call("eval", "score", tmp_path / "image_set")
    assert code == 2 and "997 images (samples) have no features (cmmd)" in err


@pytest.mark.parametrize("wrong", ["model", "folder", "weights"])
def test_what_is_missing_is_named(call, networks, tmp_path, monkeypatch, wrong):
    (tmp_path / "data").mkdir()
    if wrong == "model":
        monkeypatch.setattr("open_unitok.eval.core.model.Model", Painter)
        code, _, err = run(call, "m", tmp_path / "data", tmp_path, "--cmmd-model", networks[0])
        assert code == 2 and "no prompts.txt, so --model must be images" in err
        return
    write_images(tmp_path / "ours", range(3))
    if wrong == "folder":
        code, _, err = run(call, tmp_path / "ours", tmp_path / "data", tmp_path, "--cmmd-model", networks[0])
        assert code == 2 and "contains no images" in err
        return
    code, _, err = run(
        call, tmp_path / "ours", tmp_path / "ours", tmp_path, "--dinov2-weights", tmp_path / "no"
    )
    assert code == 2 and "dinov2_vitl14_pretrain.pth" in err
