"""Every entry of ENCODERS and DECODERS through what comes after it: a step, files, codes, an MLLM's step."""

import json
from types import SimpleNamespace

import pytest
import torch
import yaml
from PIL import Image

from open_unitok.cli.main import main
from open_unitok.tokenizer import UniTok
from open_unitok.training.data.code_shards import CodeFolder

from .coders import CASES, entries_without_a_case, overrides


def test_every_entry_has_a_case():
    assert not entries_without_a_case()


@pytest.fixture(scope="module", params=CASES)
def trained(request, data, clip_folder, tmp_path_factory):
    """case; out: the run directory of one step; model: the tokenizer that it left; codes: of 20 images."""
    name, folder = request.param, tmp_path_factory.mktemp("encoder")
    options = ["steps=1", "ema=null", "losses.entropy=0", "optimizer.weight_decay=0.0", "schedule.warmup=0"]
    options += ["codebooks={init_images: 16}", *overrides(name, clip_folder)]
    main(["train", str(data / "config.yaml"), f"out={folder / 'run'}", *options])
    main(["extract-codes", "--tokenizer", str(folder / "run" / "model"),
          "--data", str(data / "pairs-0.tar"), "--out", str(folder / "codes")])  # fmt: skip
    model = UniTok.from_pretrained(folder / "run" / "model")
    return SimpleNamespace(name=name, case=CASES[name], folder=folder, model=model)


def some_pixels() -> torch.Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_every_trainable_parameter_learns(trained):
    """Saved folders need nothing else, so a model of the same config has all of its parameters."""
    torch.manual_seed(0)
    model = UniTok(trained.model.config).train()
    has_text, clip = model.config.embed_dim > 0, torch.zeros(())
    captions = torch.randint(1, model.config.text_vocab_size, (2, 12)) if has_text else None
    out = model(some_pixels(), captions)
    if has_text:
        pairs = (out.image_embeds @ out.text_embeds.T) * out.logit_scale
        clip = torch.nn.functional.cross_entropy(pairs, torch.arange(2))
    (out.reconstruction.square().mean() + clip + sum(out.losses.values())).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_a_step_moves_what_is_trained_and_nothing_else(trained, data, clip_folder):
    record = json.loads((trained.folder / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert record["vq"] >= 0 and record["grad_norm"] > 0 and record["usage/0"] > 0
    if not trained.case.frozen:  # then a gradient for all parameters, tested above, says it
        return
    main(["train", str(data / "config.yaml"), f"out={trained.folder / 'two'}", "steps=2", "ema=null",
          "losses.entropy=0", "optimizer.weight_decay=0.0", "schedule.warmup=0",
          "codebooks={init_images: 16}", *overrides(trained.name, clip_folder)])  # fmt: skip
    before = dict(trained.model.named_parameters())
    for name, parameter in UniTok.from_pretrained(trained.folder / "two" / "model").named_parameters():
        # without weight decay a parameter moves only by its gradient
        moved = not torch.equal(parameter, before[name])
        assert moved != name.startswith(trained.case.frozen), name


def test_it_saves_and_loads(trained, tmp_path):
    model = trained.model
    model.save_pretrained(tmp_path)
    again = UniTok.from_pretrained(tmp_path)
    state, other = model.state_dict(), again.state_dict()
    assert state.keys() == other.keys() and all(torch.equal(state[key], other[key]) for key in state)
    codes = model.encode(some_pixels())
    assert codes.shape == (2, model.config.num_visual_tokens, model.config.num_codebooks)
    assert torch.equal(again.encode(some_pixels()), codes)
    assert torch.equal(again.decode(codes), model.decode(codes))
    assert again.fingerprint() == model.fingerprint()
    half = UniTok.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.decode(half.encode(some_pixels())).isfinite().all()


def test_the_fingerprint_covers_all_that_changes_codes(trained):
    model, found = trained.model, trained.model.fingerprint()
    latents = model.encode_latents(some_pixels()).detach()
    for name, tensor in model.encoder.state_dict().items():
        kept = tensor.clone()
        if tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)))
        changed = not torch.equal(model.encode_latents(some_pixels()), latents)
        assert not changed or model.fingerprint() != found, name
        tensor.copy_(kept)
    for options in trained.case.other_codes:
        config = type(model.config)(**{**model.config.to_dict(), **options})
        other = UniTok(config)
        other.load_state_dict(model.state_dict())
        assert not torch.equal(other.encode_latents(some_pixels()), latents)
        assert other.fingerprint() != found


def test_codes_are_extracted_and_reconstructed(trained, tmp_path, capsys):
    model, codes = trained.model, CodeFolder(trained.folder / "codes", trained.model.fingerprint())
    assert codes.read(0, 0).images[0].shape == (model.config.num_visual_tokens, model.config.num_codebooks)
    Image.new("RGB", (40, 30), (200, 40, 40)).save(tmp_path / "photo.png")
    main(["reconstruct", str(tmp_path / "photo.png"), "--model", str(trained.folder / "run" / "model"),
          "--out", str(tmp_path / "out")])  # fmt: skip
    assert (tmp_path / "out" / "photo.png").exists() and "PSNR" in capsys.readouterr().out


def test_an_mllm_learns_from_the_codes(trained, golden, tmp_path):
    text = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    kinds = ["captioning", *(["text_to_image"] if trained.case.generates else [])]
    config = {
        "stage": "mllm",
        "out": str(tmp_path / "mllm"),
        "steps": 1,
        "batch_size": 2,
        "model": {
            "unitok": str(trained.folder / "run" / "model"),
            "text_tokenizer": str(golden / "mllm" / "tokenizer.model"),
            "text": {**text, "max_position_embeddings": 64},
            "depth": {"num_hidden_layers": 1},
            "processor": {"template": "plain"},
        },
        "data": {
            "mixture": [{"kind": kind, "path": str(trained.folder / "codes")} for kind in kinds],
            "max_length": 64,
        },
        "engine": {"threads": 1},
        "log": {"every": 1},
    }
    (tmp_path / "mllm.yaml").write_text(yaml.safe_dump(config))
    main(["train", str(tmp_path / "mllm.yaml")])
    record = json.loads((tmp_path / "mllm" / "metrics.jsonl").read_text().splitlines()[-1])
    assert (
        (record["image_loss"] > 0) == trained.case.generates
        and record["text_loss"] > 0
        and record["grad_norm"] > 0
    )
