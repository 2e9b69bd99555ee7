"""Class-conditional models through the command line: ImageNet by ADM's metrics, and the scenes' classes."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from open_unitok.core.errors import UserError
from open_unitok.core.files import write_json
from open_unitok.eval.core.model import Model
from open_unitok.generation import Pipeline, Sampling
from open_unitok.mllm.class_conditional import ClassConditionalConfig, ClassConditionalModel
from open_unitok.tokenizer import UniTok, UniTokConfig
from open_unitok.training.scenes.dataset import SceneConfig, write_scenes

from .test_generated_images import quick_net, random_image, result_of

assert quick_net  # a fixture

TOKENIZER = {
    "image_size": 32, "num_codebooks": 3, "codebook_size": 16, "codebook_dim": 4, "stem_width": 8,
    "stage_widths": (8, 8), "stage_depths": (1, 1), "hidden_size": 16, "decoder_widths": (8, 8),
    "decoder_depths": (1, 1), "num_attention_heads": 2, "num_hidden_layers": 1, "text_hidden_size": 16,
    "text_num_layers": 1, "text_num_heads": 2, "text_vocab_size": 20, "embed_dim": 8,
}  # fmt: skip


def save_model(folder, num_classes):
    """A random class-conditional folder whose images depend on the class."""
    torch.manual_seed(0)
    unitok = UniTok(UniTokConfig(**TOKENIZER))
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = ClassConditionalConfig.for_tokenizer(
        unitok.config, num_classes=num_classes, depth_layers=1, initializer_range=0.5, **sizes
    )
    config.unitok_fingerprint = unitok.fingerprint()
    model = ClassConditionalModel(config)
    torch.nn.init.normal_(model.depth_head.output.weight)
    model.save_pretrained(folder)
    unitok.save_pretrained(folder / "unitok")
    write_json(folder / "sampling.json", {"guidance": 1.0})
    return folder


@pytest.fixture(scope="module")
def imagenet_model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("c2i") / "model", 1000)


def write_reference(folder):
    """A small reference batch in ADM's layout, with the moments of `quick_net`'s features."""
    folder.mkdir()
    images = np.stack([random_image("real", i) for i in range(6)])
    x = images[:, :2, :2].reshape(6, -1).astype(np.float64)
    moments = {"mu": x.mean(0), "sigma": np.cov(x, rowvar=False)}
    spatial = {"mu_s": x[:, :7].mean(0), "sigma_s": np.cov(x[:, :7], rowvar=False)}
    np.savez(folder / "VIRTUAL_imagenet256_labeled.npz", arr_0=images, **moments, **spatial)
    return folder


def test_imagenet_generates_the_class_of_every_sample(call, imagenet_model, quick_net, tmp_path):
    data = write_reference(tmp_path / "data")
    words = (
        "eval",
        "run",
        "imagenet_generation",
        "--data",
        data,
        "--inception-weights",
        quick_net,
        "--limit",
        8,
    )
    sampling = ("--guidance", "2", "--temperature", "0.9", "--guidance-interval", "1", "--seed", "3")
    code, _, err = call(*words, *sampling, "--model", imagenet_model, "--out", tmp_path / "a")
    assert code == 0, err
    result = result_of(tmp_path / "a", "imagenet_generation")
    assert result["metrics"].keys() == {"gfid", "sfid", "inception_score", "precision", "recall"}
    assert "class names" not in result["not_comparable_reason"]
    assert "guidance 2.0 on visual tokens 0 to 2, temperature 0.9" in json.dumps(result)
    # the images of the labels, each from its own seed
    labels = np.random.default_rng(3).integers(0, 1000, 8).tolist()
    expected = Pipeline.from_pretrained(imagenet_model).generate(
        classes=labels, sampling=Sampling(2.0, 0.9, guidance_interval=1), seed=3
    )
    folder = tmp_path / "a" / "imagenet_generation" / "images"
    for i, image in enumerate(expected):
        assert np.array_equal(np.asarray(Image.open(folder / f"{i:06d}.png")), np.asarray(image))
    # a resumed run generates nothing anew; another number of classes is refused before the first batch
    code, _, err = call(*words, *sampling, "--model", imagenet_model, "--out", tmp_path / "a")
    assert code == 0, err
    few = save_model(tmp_path / "few", 10)
    code, _, err = call(*words, "--model", few, "--out", tmp_path / "b")
    assert code == 2 and "imagenet_generation has 1000 classes" in err and "has 10 (num_classes)" in err
    assert not (tmp_path / "b" / "imagenet_generation").exists()


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Scenes of single objects, and a model of their classes."""
    folder = tmp_path_factory.mktemp("scenes")
    config = SceneConfig(
        max_objects=1, classes=True, shapes=2, colors=3, train=6, shard=6, test=40, pope=2, prompts=2,
        text_lines=5, questions=1,
    )  # fmt: skip
    write_scenes(config, folder / "data", progress=False)
    return folder / "data", save_model(folder / "model", len(config.class_pairs))


def test_scenes_are_scored_by_class_beside_their_ceiling(call, scenes, tmp_path):
    data, model = scenes
    words = ("eval", "run", "scene_classes", "--data", data, "--images-per-prompt", "3")
    code, _, err = call(*words, "--model", model, "--out", tmp_path)
    assert code == 0, err
    result = result_of(tmp_path, "scene_classes")
    classes = len((data / "test" / "classes.jsonl").read_text().splitlines())
    assert result["metrics"]["accuracy"]["n"] == 3 * classes == 3 * 5
    assert result["metrics"]["accuracy"]["value"] < 0.5 and result["metrics"]["ceiling"]["n"] > 0
    # real images of the classes are all right
    rows = [json.loads(line) for line in (data / "test" / "classes.jsonl").read_text().splitlines()]
    labels = {(row["color"], row["class"]): row["label"] for row in rows}
    for scene in json.loads((data / "test" / "captions.json").read_text()):
        thing = scene["scene"]["objects"][0]
        label = labels.get((thing["color"], thing["shape"]))
        if label is not None:  # a pair that training shows
            target = tmp_path / "real" / f"{label:05d}" / "samples" / "0000.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((data / "test" / scene["file"]).read_bytes())
    code, _, err = call(*words[:-1], "1", "--model", tmp_path / "real", "--out", tmp_path / "b")
    assert code == 0, err
    accuracy = result_of(tmp_path / "b", "scene_classes")["metrics"]["accuracy"]
    assert accuracy["value"] == 1.0 and accuracy["n"] == classes


def test_other_benchmarks_refuse_a_model_without_text(call, scenes, tmp_path):
    data, model = scenes
    for name, message in (("geneval", "reads no text|without text"), ("pope", "without text")):
        code, _, err = call("eval", "run", name, "--data", data, "--model", model, "--out", tmp_path)
        assert code == 2 and err.count("\n") == 1 and any(m in err for m in message.split("|")), err
    # its tokenizer is measured as that of an MLLM
    code, _, err = call(
        "eval", "run", "reconstruction", "--data", data, "--model", model, "--out", tmp_path, "--limit", 4
    )
    assert code == 0, err
    with pytest.raises(UserError, match="reads neither text nor images"):
        Model(model).answer([None], ["who?"], 4)
