"""`unitok train` with a transformers vision tower as the encoder."""

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
