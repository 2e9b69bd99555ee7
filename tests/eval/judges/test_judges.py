"""Judges of generated images: Mask2Former, OWL, colours by CLIP, a VQA model; tiny, random weights."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from open_unitok.core.errors import UserError
from open_unitok.eval.judges import detections, object_detector
from open_unitok.eval.judges.vqa_model import VqaModel

from ..generation.test_generated_images import ScriptedGenerator, result_of

WORDS = [
    "[UNK]",
    "[PAD]",
    "[BOS]",
    "[EOS]",
    "<image>",
    "Yes",
    "No",
    "a",
    "photo",
    "of",
    "red",
    "cup",
    "USER",
    ":",
]


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]", "bos_token": "[BOS]", "eos_token": "[EOS]"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **special, additional_special_tokens=["<image>"]
    )


@pytest.fixture(scope="module")
def clip(words, tmp_path_factory):
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip")
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = small | {
        "vocab_size": len(WORDS),
        "max_position_embeddings": 16,
        "eos_token_id": 3,
        "pad_token_id": 1,
    }
    vision = small | {"image_size": 16, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    CLIPProcessor(image_processor=images, tokenizer=words).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def mask2former(tmp_path_factory):
    from transformers import (
        Mask2FormerConfig,
        Mask2FormerForUniversalSegmentation,
        Mask2FormerImageProcessor,
        SwinConfig,
    )

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("mask2former")
    backbone = SwinConfig(
        image_size=64, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_layers=1,
        encoder_feedforward_dim=16, decoder_layers=2, dim_feedforward=16, num_attention_heads=2,
        num_queries=6,
        id2label={0: "cup", 1: "mouse", 2: "dog"},
    )  # fmt: skip
    Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)
    Mask2FormerImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder


def test_mask2former_gives_boxes_around_its_masks(mask2former):
    detect = object_detector.load_detector(str(mask2former), "cpu")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8))
    (found, other) = detect([image, image], ["cup"])
    assert found and len(found) == len(other)
    for detection in found:
        assert detection.name in ("cup", "computer mouse", "dog") and detection.mask.shape == (48, 64)
        x0, y0, x1, y1, score = detection.box
        assert detection.mask[int(y0) : int(y1), int(x0) : int(x1)].sum() == detection.mask.sum()
        assert object_detector.MIN_SCORE < score <= 1
    row = object_detector.detections_record(found, ["red"] * len(found))
    assert sum(map(len, row["detections"].values())) == len(found)


def test_owl_scales_its_boxes_to_the_image(words, tmp_path):
    from transformers import OwlViTConfig, OwlViTForObjectDetection, OwlViTImageProcessor, OwlViTProcessor

    torch.manual_seed(0)
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = small | {"vocab_size": len(WORDS), "max_position_embeddings": 16, "pad_token_id": 1}
    config = OwlViTConfig(
        text_config=text, vision_config=small | {"image_size": 32, "patch_size": 16}, projection_dim=8
    )
    OwlViTForObjectDetection(config).save_pretrained(tmp_path)
    images = OwlViTImageProcessor(size={"height": 32, "width": 32}, crop_size={"height": 32, "width": 32})
    OwlViTProcessor(image_processor=images, tokenizer=words).save_pretrained(tmp_path)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 80, 3), np.uint8))
    (found,) = object_detector.load_detector(str(tmp_path), "cpu")([image], ["cup", "red cup"])
    assert found and {d.name for d in found} <= {"cup", "red cup"}
    centres = [((d.box[0] + d.box[2]) / 2, (d.box[1] + d.box[3]) / 2) for d in found]
    assert max(x for x, _ in centres) > 40  # the whole width is used
    assert all(-80 < x < 160 and -40 < y < 80 for x, y in centres)


def test_colours_depend_on_the_object_alone(clip):
    colours = object_detector.ColourClassifier(str(clip), "cpu")
    image = np.full((32, 32, 3), 200, np.uint8)
    image[8:16, 8:16] = (255, 0, 0)
    mask = np.zeros((32, 32), bool)
    mask[8:16, 8:16] = True
    cut = object_detector.crop_object(
        Image.fromarray(image), object_detector.Detection("cup", [4, 4, 20, 20, 0.9], mask)
    )
    assert np.asarray(cut)[0, 0].tolist() == [0x99] * 3 and np.asarray(cut)[8, 8].tolist() == [255, 0, 0]
    whole = object_detector.crop_object(
        Image.fromarray(image), object_detector.Detection("cup", [-9, 30.2, 99, 99, 0.9], None)
    )
    assert whole.size == (32, 2)
    things = [object_detector.Detection("cup", [4, 4, 20, 20, 0.9], mask)] * 2
    found = colours(Image.fromarray(image), things)
    assert (
        found[0] == found[1]
        and found[0] in object_detector.COLOURS
        and colours(Image.fromarray(image), []) == []
    )


def test_geneval_through_the_command_line_with_a_detector(call, clip, mask2former, monkeypatch, tmp_path):
    monkeypatch.setattr("open_unitok.eval.core.model.Model", ScriptedGenerator)
    data, tags = tmp_path / "data", ("single_object", "counting", "colors", "position", "color_attr")
    data.mkdir()
    rows = [{"tag": tag, "prompt": f"a cup {tag}", "include": [{"class": "cup", "count": 1}]} for tag in tags]
    (data / "evaluation_metadata.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    words = ("eval", "run", "geneval", "--model", "m", "--data", data, "--out", tmp_path)
    code, _, err = call(*words)
    assert code == 2 and "--detector-model and --colour-model" in err
    code, _, err = call(*words, "--detector-model", mask2former)
    assert code == 2 and "needs --colour-model" in err
    code, _, err = call(*words, "--detector-model", clip, "--colour-model", clip)
    assert code == 2 and "model_type is 'clip'; allowed: mask2former" in err

    # a scripted detector: a cup is in every image but those of the fourth prompt
    def detect(images, names):
        assert names == ["cup"]
        return [
            [object_detector.Detection("cup", [0, 0, 9, 9, 0.95], None)] * (not is_fourth(p)) for p in images
        ]

    def is_fourth(image):
        return any(np.array_equal(np.asarray(image), known) for known in fourth)

    folder = tmp_path / "geneval"
    fourth = [np.asarray(Image.open(p)) for p in sorted((folder / "images" / "00003").rglob("*.png"))]
    assert len(fourth) == 4
    monkeypatch.setattr(detections, "load_detector", lambda path, device: detect)
    code, out, err = call(*words, "--detector-model", mask2former, "--colour-model", clip)
    assert code == 0, err
    result = result_of(tmp_path, "geneval")
    assert result["value"] == pytest.approx(4 / 5) and result["metrics"]["tag/position"]["value"] == 0.0
    assert not result["comparable"] and "not by mmdet Mask2Former" in result["not_comparable_reason"]
    assert call("eval", "score", folder)[1] == out


@pytest.fixture(scope="module")
def llava(words, tmp_path_factory):
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("llava")
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**small | {"num_hidden_layers": 2}, image_size=16, patch_size=8),
        text_config=LlamaConfig(
            **small, vocab_size=len(WORDS), pad_token_id=1, bos_token_id=2, eos_token_id=3
        ),
        image_token_index=4,
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    LlavaProcessor(
        image_processor=images, tokenizer=words, patch_size=8, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, image_token="<image>",
    ).save_pretrained(folder)  # fmt: skip
    return folder


def test_image_text_model_gives_probabilities_and_answers(llava, tmp_path):
    model = VqaModel(llava)
    random = np.random.default_rng(0)
    images = [Image.fromarray(random.integers(0, 255, (20, 20, 3), np.uint8)) for _ in range(2)]
    questions = ["red cup", "a photo of red cup"]
    together = model.probabilities(images, questions, "Yes")
    alone = [model.probabilities([p], [q], "Yes")[0] for p, q in zip(images, questions)]
    assert together == pytest.approx(alone, abs=1e-5) and all(0 < v < 1 for v in together)
    total = sum(model.probabilities(images[:1], questions[:1], word)[0] for word in WORDS)
    assert total == pytest.approx(1.0, abs=1e-4)
    assert len(model.answers(images, questions)) == 2 and len(model.about["fingerprint"]) == 64
    with pytest.raises(UserError, match="does not exist"):
        VqaModel(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match="holds no image-text model"):
        VqaModel(tmp_path)
