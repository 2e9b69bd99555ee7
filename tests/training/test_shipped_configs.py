"""Every shipped YAML is valid and documented; those of stage 1 run two steps, scaled down."""

import dataclasses
import json
import pathlib
import re

import numpy as np
import pytest
import torch

from open_unitok.cli.main import main
from open_unitok.core.errors import UserError
from open_unitok.tokenizer.convert import state_to_published
from open_unitok.tokenizer.frozen.lpips import LPIPS
from open_unitok.training.core.config import read_yaml
from open_unitok.training.run import load_run_config
from open_unitok.training.tokenizer.model import build_model, load_caption_tokenizer

CONFIGS = pathlib.Path(__file__).resolve().parents[2] / "configs"
STARTS = re.compile(r"\n(?:stage|inherits):")  # of what follows the card
RUNS = sorted(p for p in CONFIGS.rglob("*.yaml") if STARTS.search(p.read_text()))
STAGE_1 = [path for path in RUNS if read_yaml(path)["stage"] == "tokenizer"]
SMALL = {
    "image_size": 48,
    "stem_width": 8,
    "stage_widths": [8, 8],
    "stage_depths": [1, 1],
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "decoder_widths": [8, 8],
    "decoder_depths": [1, 1],
    "num_codebooks": 2,
    "codebook_size": 16,
    "codebook_dim": 4,
    "adapter_heads": 2,
    "embed_dim": 16,
    "text_hidden_size": 16,
    "text_num_layers": 1,
    "text_num_heads": 2,
    "text_context_length": 12,
}
SMALL_VQGAN = {"channels": 8, "multipliers": [1, 1, 1, 1, 2], "residual_blocks": 1, "norm_groups": 4}
SMALL_VIT = {"model_type": "vit", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def small_options(options: dict) -> dict:
    """Options of a quantiser for codes of 4 numbers and 3 x 3 visual tokens."""
    small = {"block_widths": [3, 1], "scales": [1, 2, 3], "levels": [2, 2, 2, 2]}
    changed = {name: small.get(name, value) for name, value in options.items()}
    levels = options.get("levels")
    if "levels" in options and (levels is None or len(levels) == 5):  # of a Gaussian's geometry
        changed["levels"] = levels and [8, 8, 4, 3, 2]
    if "inner_options" in options:
        changed["inner_options"] = small_options(options["inner_options"])
    return changed


def small_queries(model: dict) -> list[str]:
    """Overrides for 4 query tokens of an image of 48 pixels."""
    side = 48 // model.get("patch_size", 16)
    own = {"query_layers": 1, "query_heads": 2}
    encoder = {**own, "encoder": model["encoder_options"].get("encoder", "vitamin")}
    encoder |= SMALL_VIT if encoder["encoder"] == "hf_vision" else {}
    decoder = {**own, "decoder": model["decoder_options"].get("decoder", "vitamin")}
    layout = {"rows": side, "columns": side, "tokens": 4}
    fields = {"token_layout": layout, "encoder_options": encoder, "decoder_options": decoder}
    return [f"model.{name}={json.dumps(value)}" for name, value in fields.items()]


def small_gaussians(model: dict) -> list[str]:
    """Overrides for 4 Gaussians of an image of 48 pixels, 4 channels of a feature each."""
    step = model["patch_size"]
    network = {**SMALL_VQGAN, "multipliers": [1] * (step.bit_length() - 1) + [2], "attention_levels": []}
    fields = {
        "token_layout": {"rows": 48 // step, "columns": 48 // step, "tokens": 4},
        "encoder_options": {**network, "hidden_size": 16, "rounds": 2, "query_heads": 2},
        "decoder_options": {**network, "hidden_size": 4},
    }
    return [f"model.{name}={json.dumps(value)}" for name, value in fields.items()]


def small_encoder(options: dict, clip: pathlib.Path) -> dict:
    """Options of a small encoder of the same kind; a tower with a path becomes that of `clip`."""
    if {"semantic", "pixel"} <= options.keys():
        parts = {name: small_encoder(options[name], clip) for name in ("semantic", "pixel")}
        return {name: {**part, "encoder": options[name]["encoder"]} for name, part in parts.items()}
    if "path" in options:
        return {"path": str(clip), "resize": True}
    return {"vitamin": {}, "vqgan": SMALL_VQGAN}.get(options.get("encoder", ""), SMALL_VIT)


def small_words(folder: pathlib.Path, quantizer: str) -> str:
    """The section `words` with 16 nouns, and for SweetTok 5 adjectives before them."""
    counts = {"adjectives": 5, "nouns": 16} if quantizer == "language" else {"nouns": 16}
    for name, count in counts.items():
        (folder / f"{name}.txt").write_text("".join(f"{name}{i}\n" for i in range(count)))
    np.save(folder / "words.npy", np.random.default_rng(0).normal(size=(sum(counts.values()), 6)))
    lists = [str(folder / f"{name}.txt") for name in counts]
    return "words=" + json.dumps({"lists": lists, "vectors": str(folder / "words.npy"), "edges": None})


def test_the_published_configs_are_found():
    assert {"unitok_large.yaml", "unitok_base.yaml"} <= {path.name for path in STAGE_1}


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.relative_to(CONFIGS).as_posix())
def test_is_valid_and_begins_with_a_card(path):
    config = load_run_config(str(path), [])
    assert config.out.startswith("runs/") and path.read_text().startswith("#")
    card = STARTS.split(path.read_text())[0]
    name = f"configs/{path.relative_to(CONFIGS).as_posix()}"
    # a chain of the downstream study is started as a whole
    assert f"train {name}" in card or (
        "downstream/" in name and "study configs/study/downstream.yaml" in card
    )
    assert "# Hardware: " in card and "# Expected" in card


def test_published_constants():
    large = load_run_config("configs/tokenizer/unitok_large.yaml", [])
    base = load_run_config("configs/tokenizer/unitok_base.yaml", [])
    assert large.steps * large.batch_size == 1_280_000_000
    assert large.discriminator.start == round(0.375 * large.steps)
    assert large.losses == base.losses and large.optimizer == base.optimizer
    assert large.model | {"size": ""} == base.model | {"size": ""}


@pytest.fixture(scope="module")
def helpers(dino_file, tmp_path_factory):
    """A folder with both helper networks, random weights, under their published names."""
    folder = tmp_path_factory.mktemp("helpers")
    torch.manual_seed(0)
    torch.save(LPIPS().state_dict(), folder / "lpips_with_vgg.pth")
    (folder / dino_file.name).write_bytes(dino_file.read_bytes())
    return folder


@pytest.mark.parametrize("path", STAGE_1, ids=lambda path: path.relative_to(CONFIGS).as_posix())
def test_scaled_down_it_trains(data, helpers, clip_folder, tmp_path, path):
    config = load_run_config(str(path), [])
    quantizer = config.model.get("quantizer", "multi_codebook")
    if quantizer == "library":
        pytest.importorskip("vector_quantize_pytorch", reason="the extra `library` is not installed")
    out = tmp_path / "run"
    changes = [f"out={out}", "steps=2", "batch_size=4", "data.workers=0", "data.split=samples"]
    changes += [
        f"data.sources=[{{path: '{data}/pairs-*.tar'}}]",
        "images.captions=json",
        "engine.threads=1",
    ]
    changes += [
        f"caption_tokenizer={data}/tokenizer.model",
        "log.every=1",
        "codebooks.init_images=0",
        "engine.dtype=fp32",
    ]
    if config.teachers:
        small = {"model": str(clip_folder), "books": [1] if config.model["num_codebooks"] > 1 else None}
        teachers = [dataclasses.asdict(teacher) | small for teacher in config.teachers]
        changes.append(f"teacher={json.dumps(teachers)}")
    if quantizer == "gaussian":
        changes += small_gaussians(config.model)
    elif config.model.get("token_layout", {}).get("tokens"):
        changes += small_queries(config.model)
    elif config.model.get("encoder") == "vqgan":
        changes += [f"model.{part}_options={json.dumps(SMALL_VQGAN)}" for part in ("encoder", "decoder")]
    elif merge := (config.model.get("encoder_options") or {}).get("merge"):
        changes.append(f"model.encoder_options={json.dumps({'merge': merge | {'r': [2]}})}")  # of 9 tokens
    elif config.model.get("encoder_options"):
        options = small_encoder(config.model["encoder_options"], clip_folder)
        changes.append(f"model.encoder_options={json.dumps(options)}")
        if config.model.get("decoder") == "vqgan":
            changes.append(f"model.decoder_options={json.dumps(SMALL_VQGAN)}")
    if (config.init_from or "").startswith("runs/"):  # of another run
        changes += ["init_from=null", "freeze=[]"]
    if (config.init_from or "runs/").startswith("runs/"):  # else it trains the shipped model at full size
        without_text = {"embed_dim": 0} if config.model.get("embed_dim") == 0 else {}
        changes += [f"model.{name}={value}" for name, value in (SMALL | without_text).items()]
        options = config.model.get("quantizer_options") or {}
        changes.append(f"model.quantizer_options={json.dumps(small_options(options))}")
        changes.append("model.projection_heads=null")
        if quantizer == "gaussian":
            changes += [f"model.num_codebooks={config.model['num_codebooks']}", "model.codebook_dim=9"]
    if config.words.lists:
        changes += [small_words(tmp_path, quantizer), "model.codebook_size=null"]
        changes += ["model.num_codebooks=3"] if quantizer == "language" else []
    if config.losses.lpips:
        changes.append(f"losses.lpips_weights={helpers}")
    if config.losses.adversarial:
        changes += [f"discriminator.weights={helpers}", "discriminator.start=0", "discriminator.warmup=1"]
    main(["train", str(path), *changes])
    last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 2 and last["grad_norm"] > 0 and (out / "model" / "config.json").exists()
    assert ("lpips" in last) == bool(config.losses.lpips)
    assert last.get("adversarial_weight", 0) >= 0.4 * 0.015 if config.losses.adversarial else True


def test_missing_helper_weights_stop_the_run(data, helpers, tmp_path, capsys):
    """LPIPS first, then DINOv2; the message names the file and its source."""
    changes = [f"data.sources=[{{path: '{data}/pairs-*.tar'}}]", f"caption_tokenizer={data}/tokenizer.model"]
    changes += [f"out={tmp_path}/run", "images.captions=json", "batch_size=4", "data.workers=0"]
    changes += [f"model.{name}={value}" for name, value in SMALL.items()]
    for more, file in (
        ([], "lpips_with_vgg.pth"),
        ([f"losses.lpips_weights={helpers}"], "dinov2_vits14_pretrain.pth"),
    ):
        with pytest.raises(SystemExit):
            main(["train", "configs/tokenizer/unitok_base.yaml", *changes, *more])
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert f"external/{file} does not exist" in error and "huggingface.co" in error
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_lpips_rejects_small_images(data, helpers, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["train", str(data / "config.yaml"), f"out={tmp_path}/run",
              f"losses={{lpips: 1.0, lpips_weights: {helpers}}}"])  # fmt: skip
    assert "48 pixels or more" in capsys.readouterr().err


def test_init_from_clip(data, tmp_path):
    """CLIP weights replace only the two towers; a file without all of their weights is rejected."""
    config = str(data / "config.yaml")
    captions = load_caption_tokenizer(load_run_config(config, []))
    source, plain = (build_model(load_run_config(config, [f"seed={seed}"]), captions) for seed in (1, 0))
    prefixes = {"encoder.": "visual.trunk.", "text_encoder.": "text."}
    weights = {
        prefixes[prefix] + name.removeprefix(prefix): tensor
        for name, tensor in state_to_published(source.state_dict()).items()
        for prefix in prefixes
        if name.startswith(prefix) and not name.startswith("encoder.norm.")  # CLIP towers have no such layer
    }
    torch.save(weights, tmp_path / "open_clip_pytorch_model.bin")
    loaded = build_model(load_run_config(config, [f"init_from_clip={tmp_path}"]), captions).state_dict()
    for name, tensor in loaded.items():
        towers = name.startswith(("encoder.", "text_encoder.")) and "encoder.norm." not in name
        assert torch.equal(tensor, (source if towers else plain).state_dict()[name]), name
    torch.save({n: t for n, t in weights.items() if n.startswith("visual")}, tmp_path / "half.bin")
    with pytest.raises(UserError, match=r"lacks \d+ weights of the image and text towers \(text_encoder"):
        build_model(load_run_config(config, [f"init_from_clip={tmp_path}/half.bin"]), captions)
