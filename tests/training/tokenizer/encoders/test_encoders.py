"""`unitok train` with other encoders than ViTamin: a transformers vision tower, VQGAN's network."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file

from open_unitok.cli.main import main
from open_unitok.tokenizer import UniTok

TOWER = (
    "{model_type: vit, hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 32}"
)


def test_a_vision_tower_trains_end_to_end(data, tmp_path):
    def train(steps: int) -> UniTok:
        out = tmp_path / f"run{steps}"
        changes = [f"out={out}", f"steps={steps}", "schedule.warmup=0", "codebooks.reset_after=0", "ema=null"]
        changes += ["optimizer.weight_decay=0.0", "model.encoder=hf_vision", f"model.encoder_options={TOWER}"]
        main(["train", str(data / "config.yaml"), *changes])
        assert "encoder.tower.embeddings.cls_token" in load_file(out / "model" / "model.safetensors")
        return UniTok.from_pretrained(out / "model")

    one, two = train(1), train(2)
    before = dict(one.named_parameters())
    same = {name for name, parameter in two.named_parameters() if torch.equal(parameter, before[name])}
    assert not same  # without weight decay a parameter moves only by its gradient
    assert one.fingerprint() != two.fingerprint()
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    assert two.decode(two.encode(pixels)).shape == pixels.shape


def test_vqgan_without_a_text_tower(data, tmp_path, capsys):
    sizes = "{channels: 8, norm_groups: 4, multipliers: [1, 1, 2, 2, 2], residual_blocks: 1}"
    changes = ["model.embed_dim=0", "model.projection=linear"]
    for part in ("encoder", "decoder"):
        changes += [f"model.{part}=vqgan", f"model.{part}_options={sizes}"]
    config = str(data / "config.yaml")
    for extra, words in (
        ([], "losses.clip is .* but embed_dim is 0: the tokenizer has no text tower"),
        (["losses.clip=0", "init_from_clip=x"], "init_from_clip is x, but embed_dim is 0"),
    ):
        with pytest.raises(SystemExit):
            main(["train", config, f"out={tmp_path / 'run'}", "steps=2", *changes, *extra])
        assert re.search(words, capsys.readouterr().err)
    run = ["train", config, f"out={tmp_path / 'run'}", "losses.clip=0", *changes]
    main([*run, "steps=2"])
    record = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert record["l2"] > 0 and "clip" not in record and "logit_scale" not in record
    model = UniTok.from_pretrained(tmp_path / "run" / "model")
    assert model.config.embed_dim == 0 and model.encode(torch.zeros(1, 3, 32, 32)).shape == (1, 4, 2)
