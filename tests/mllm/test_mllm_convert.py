"""Published folders: conversion in both directions, sizes from tensor shapes, errors."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from open_unitok.cli import main
from open_unitok.core.errors import UserError
from open_unitok.mllm import UniTokForConditionalGeneration, UniTokProcessor
from open_unitok.mllm.convert import read_published, read_shards, to_ours
from open_unitok.mllm.convert_folder import from_published_folder
from open_unitok.tokenizer import UniTok, UniTokConfig


@pytest.fixture
def folder(tmp_path, golden, reference):
    """A published folder in two safetensors shards, with its text tokenizer."""
    path = tmp_path / "published"
    path.mkdir()
    for name in ("config.json", "tokenizer.model"):
        shutil.copy(golden / "mllm" / name, path / name)
    weights = reference("tiny").weights
    names = sorted(weights)
    parts = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for file, keys in parts.items():
        save_file({key: weights[key].clone() for key in keys}, path / file)
    index = {"weight_map": {key: file for file, keys in parts.items() for key in keys}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def test_round_trip(folder, reference, tmp_path, capsys):
    main.run(["convert", "mllm", str(folder), str(tmp_path / "ours")])
    assert "--unitok" in capsys.readouterr().out
    model = UniTokForConditionalGeneration.from_pretrained(tmp_path / "ours")
    published = reference("tiny")
    for key, tensor in to_ours(published.weights).items():
        assert torch.equal(model.state_dict()[key], tensor), key
    config = model.config
    assert (config.num_codebooks, config.codebook_size, config.codebook_dim) == (4, 64, 4)
    assert (config.visual_hidden_size, config.num_projection_heads) == (64, 4)
    assert (config.visual_context, config.num_image_tokens, config.context_length) == ("last", 256, 512)
    assert config.depth_config.num_hidden_layers == 3 and config.text_config.rms_norm_eps == 1e-5
    processor = UniTokProcessor.from_pretrained(tmp_path / "ours")
    assert processor.legacy and processor.template == "vicuna_v1"
    assert processor.encode_text("A photo of a cat") == [1, 368, 348, 360, 260, 335]

    main.run(["convert", "mllm", str(tmp_path / "ours"), str(tmp_path / "back")])
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == published.weights.keys()
    for key, tensor in back.items():
        assert key.endswith("vocab_usage") or torch.equal(tensor, published.weights[key]), key
    config, state = read_published(tmp_path / "back", dtype=torch.bfloat16, visual_context="full")
    again = UniTokForConditionalGeneration.from_state(config, state, "back")
    assert again.dtype == torch.bfloat16 and again.config.visual_context == "full"


def test_rotary_tables_are_built_after_loading(folder, reference):
    loaded, expected = UniTokForConditionalGeneration.from_pretrained(folder), reference("tiny").model
    for (name, ours), theirs in zip(loaded.named_buffers(), expected.buffers()):
        assert torch.equal(ours, theirs) and not ours.is_meta, name
    ids = torch.arange(5, 15)[None]
    assert torch.equal(loaded(ids).logits, expected(ids).logits)


def test_torch_files_run_no_code(folder, reference):
    for file in folder.glob("model*"):
        file.unlink()
    weights = {key: tensor.clone() for key, tensor in reference("tiny").weights.items()}
    torch.save(weights, folder / "pytorch_model.bin")
    assert read_shards(folder).keys() == weights.keys()
    torch.save({"a": print}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model.bin is not a checkpoint that can be read"):
        read_shards(folder)


def test_errors(folder, tmp_path):
    def load(folder):
        UniTokForConditionalGeneration.from_state(*read_published(folder), source=folder)

    shards = sorted(folder.glob("*.safetensors"))
    weights = load_file(shards[0])
    name = next(n for n in weights if n.startswith("model.layers"))
    save_file({n: t for n, t in weights.items() if n != name}, shards[0])
    with pytest.raises(UserError, match=rf"does not fit an MLLM: 1 weights are missing \(language_{name}"):
        load(folder)
    save_file({**weights, name: weights[name][:1].clone()}, shards[0])
    with pytest.raises(UserError, match=f"does not fit an MLLM: language_{name} has shape"):
        load(folder)
    save_file({**weights, "vision_tower.weight": torch.zeros(1)}, shards[0])
    with pytest.raises(UserError, match=r"'vision_tower.weight' is not a weight"):
        load(folder)
    shards[1].unlink()
    with pytest.raises(UserError, match=f"{shards[1].name} does not exist"):
        load(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match=r"type 'llama', not a published MLLM"):
        load(folder)
    with pytest.raises(UserError, match=r"already exists"):
        main.run(["convert", "mllm", str(folder), str(tmp_path)])


def test_another_visual_tokenizer_is_rejected(folder, reference, tmp_path):
    sizes = {"stem_width": 8, "stage_widths": (8, 16), "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"decoder_widths": (16, 8), "text_hidden_size": 16, "text_num_layers": 1, "text_num_heads": 2}
    sizes |= {"num_codebooks": 4, "codebook_size": 64, "codebook_dim": 4, "hidden_size": 64, "image_size": 64}
    unitok = UniTok(UniTokConfig(**sizes, text_vocab_size=64))
    unitok.save_pretrained(tmp_path / "other")
    command = ["convert", "mllm", str(folder), str(tmp_path / "ours"), "--unitok"]
    with pytest.raises(UserError, match=r"sub-codebooks are not those of the MLLM"):
        main.run([*command, str(tmp_path / "other")])
    assert not (tmp_path / "ours").exists()
    with torch.no_grad():
        unitok.quantizer.codebooks.copy_(2 * reference("tiny").model.visual_embedder.codebooks)
    unitok.save_pretrained(tmp_path / "right")
    main.run([*command, str(tmp_path / "right")])
    model = UniTokForConditionalGeneration.from_pretrained(tmp_path / "ours")
    assert model.config.unitok_fingerprint == unitok.fingerprint()
    assert model.config.num_image_tokens == 16
    assert UniTok.from_pretrained(tmp_path / "ours" / "unitok").fingerprint() == unitok.fingerprint()


def test_the_layout_and_norm_of_a_visual_tokenizer(folder, reference, tmp_path):
    sizes = {"stem_width": 8, "stage_widths": (8, 16), "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"decoder_widths": (16, 8), "text_hidden_size": 16, "text_num_layers": 1, "text_num_heads": 2}
    sizes |= {"num_codebooks": 4, "codebook_size": 64, "codebook_dim": 4, "hidden_size": 64}
    sizes |= {"image_size": 64, "token_layout": {"rows": 2, "columns": 4, "registers": 0}}

    def make_unitok(quantizer: str) -> UniTok:
        unitok = UniTok(UniTokConfig(**sizes, text_vocab_size=64, quantizer=quantizer))
        with torch.no_grad():
            unitok.quantizer.codebooks.copy_(reference("tiny").model.visual_embedder.codebooks)
        return unitok

    with pytest.raises(UserError, match="row_norm = 'unit' in the published MLLM, but 'none' in the visual"):
        from_published_folder(folder, tmp_path / "ours", make_unitok("nearest"))
    assert not (tmp_path / "ours").exists()
    from_published_folder(folder, tmp_path / "ours", make_unitok("multi_codebook"))
    config = UniTokForConditionalGeneration.from_pretrained(tmp_path / "ours").config
    processor = UniTokProcessor.from_pretrained(tmp_path / "ours")
    for part in (config, processor):
        assert (part.num_image_tokens, part.token_layout) == (8, sizes["token_layout"])
    assert processor.image_shape == (32, 64)


def test_init_from_tokenizer(tiny, tiny_config):
    sizes = {"stem_width": 8, "stage_widths": (8, 16), "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"decoder_widths": (16, 8), "text_hidden_size": 16, "text_num_layers": 1, "text_num_heads": 2}
    sizes |= {"num_codebooks": 3, "codebook_size": 8, "codebook_dim": 4, "hidden_size": 24, "image_size": 32}
    unitok = UniTok(UniTokConfig(**sizes, text_vocab_size=64)).eval()
    model = tiny()
    model.init_from_tokenizer(unitok)
    assert model.config.unitok_fingerprint == unitok.fingerprint()
    codes = torch.randint(0, 8, (2, 1, 3))  # one token: causal and full attention are equal
    torch.testing.assert_close(model.visual_embedder.embed(codes), unitok.quantizer.embed(codes))
    projected = model.visual_embedder.projection(model.visual_embedder.embed(codes))
    torch.testing.assert_close(projected, unitok.up_projection(unitok.quantizer.embed(codes)))
    with pytest.raises(UserError, match=r"codebook_size = 9 in the model, but 8"):
        tiny(codebook_size=9).init_from_tokenizer(unitok)
    with pytest.raises(UserError, match=r"visual_hidden_size = 48 with 4 heads does not fit"):
        tiny(visual_hidden_size=48).init_from_tokenizer(unitok)
    fitted = type(tiny_config()).for_tokenizer(unitok.config, text_config=tiny_config().text_config)
    assert (fitted.num_image_tokens, fitted.num_projection_heads, fitted.latent_dim) == (4, 2, 12)
