"""Training with token merging, with parts of different sizes, and at another image size than `init_from`."""

import json

import pytest
import torch

from open_unitok.cli.main import main
from open_unitok.cli.main import run as unitok
from open_unitok.core.errors import UserError
from open_unitok.tokenizer import UniTok, UniTokConfig
from open_unitok.tokenizer.encoders.merging_blocks import MergingTransformer
from open_unitok.training.core.flops import tokenizer_flops

SHORT = ("codebooks={init_images: 0, reset_after: 0}", "schedule.warmup=0", "ema=null", "losses.entropy=0")
CLUSTER = {"method": "cluster", "at": 0, "keep": 0.5, "k": 2}


def train(data, out, *changes: str) -> UniTok:
    main(["train", str(data / "config.yaml"), f"out={out}", "steps=1", *SHORT, *changes])
    return UniTok.from_pretrained(out / "model")


@pytest.fixture(scope="module")
def plain(data, tmp_path_factory):
    """The folder of a tokenizer without merging, of 32 pixels."""
    folder = tmp_path_factory.mktemp("plain")
    train(data, folder)
    return folder / "model"


def have_equal_weights(one: UniTok, other: UniTok) -> bool:
    state = other.state_dict()
    return all(torch.equal(tensor, state[name]) for name, tensor in one.named_parameters())


def test_merging_starts_from_a_model_without_it_and_back(data, plain, tmp_path):
    before = UniTok.from_pretrained(plain)
    merge = f"model={{encoder_options: {json.dumps({'merge': CLUSTER})}}}"
    merged = train(data, tmp_path / "merged", f"init_from={plain}", "optimizer.lr=0", merge)
    assert merged.config.encoder_options == {"merge": CLUSTER}
    assert isinstance(merged.encoder.blocks, MergingTransformer)
    assert merged.fingerprint() != before.fingerprint() and have_equal_weights(merged, before)
    # without the key the options stay, and null switches merging off
    start = f"init_from={tmp_path / 'merged' / 'model'}"
    again = train(data, tmp_path / "again", start, "model={}")
    assert again.config.encoder_options == {"merge": CLUSTER} and not have_equal_weights(again, before)
    off = train(data, tmp_path / "off", start, "optimizer.lr=0", "model={encoder_options: {merge: null}}")
    assert off.config.encoder_options is None and not isinstance(off.encoder.blocks, MergingTransformer)


def test_a_run_starts_from_a_model_of_another_image_size(data, plain, tmp_path):
    """No weight of ViTamin depends on the image size: there are no position embeddings."""
    small = UniTok.from_pretrained(plain)
    large = train(data, tmp_path / "large", f"init_from={plain}", "optimizer.lr=0", "model={image_size: 48}")
    assert (large.config.image_size, large.config.num_visual_tokens) == (48, 9)
    assert have_equal_weights(large, small)
    pixels = torch.rand(1, 3, 48, 48) * 2 - 1
    assert torch.equal(small.encode(pixels), large.encode(pixels))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"codebook_size": 32}, r"model\.codebook_size is 32.*has 16: omit it"),
        ({"encoder_options": {"merge": CLUSTER, "mlp_ratio": 3.0}}, r"model\.encoder_options is .*: omit it"),
        ({"encoder_options": {"merge": {"method": "tome", "r": 3}}}, r"merge\.r = 3: block 1 of 1 has 4 tok"),
    ],
)
def test_other_changes_of_a_model_are_refused(data, plain, tmp_path, model, message):
    command = ["train", str(data / "config.yaml"), f"out={tmp_path / 'run'}", "steps=1", f"init_from={plain}"]
    with pytest.raises(UserError, match=message):
        unitok([*command, f"model={json.dumps(model)}"])
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_wrong_merging_stops_before_the_first_batch(data, tmp_path):
    for merge, message in (
        ({"method": "tome", "r": 3}, r"merge\.r = 3: block 1 of 1 has 4 tokens left and can merge 2"),
        ({**CLUSTER, "k": 5}, r"merge\.k = 5: expected 1 to 3 neighbours"),
    ):
        options = f"model.encoder_options={json.dumps({'merge': merge})}"
        with pytest.raises(UserError, match=message):
            unitok(["train", str(data / "config.yaml"), f"out={tmp_path / 'run'}", "steps=1", options])
        assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_both_parts_count_with_their_own_sizes():
    """FLOPs of a step: merging saves in the encoder alone, sizes of one part do not change the other."""
    sizes = {"image_size": 64, "stem_width": 8, "stage_widths": (8, 8), "stage_depths": (1, 1)}
    sizes |= {"decoder_widths": (8, 8), "decoder_depths": (1, 1), "num_attention_heads": 2}
    sizes |= {"num_hidden_layers": 2, "projection_heads": 1, "hidden_size": 32, "embed_dim": 8}
    sizes |= {"text_num_layers": 1, "text_hidden_size": 8, "text_num_heads": 1, "codebook_size": 16}

    def counts(**options) -> tuple[float, float]:
        config = UniTokConfig(**sizes, **options)
        whole, encoded = (tokenizer_flops(config, False, decoded) for decoded in (1.0, 0.0))
        return encoded, whole - encoded

    encoder, decoder = counts()
    merged = counts(encoder_options={"merge": {"method": "tome", "r": 4}})
    assert merged[0] < encoder and merged[1] == decoder
    deep_decoder = counts(decoder_options={"num_hidden_layers": 4, "num_attention_heads": 4})
    assert deep_decoder[0] == encoder and deep_decoder[1] > decoder
    wide_encoder = counts(encoder_options={"hidden_size": 64, "num_hidden_layers": 3})
    assert wide_encoder[0] > encoder and wide_encoder[1] == decoder
