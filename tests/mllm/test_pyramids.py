"""An MLLM on a pyramid's codes: it reads the sum of all scales, and refuses to generate."""

import pytest
import torch

from open_unitok.core.errors import UserError
from open_unitok.mllm import UniTokForConditionalGeneration, UniTokMLLMConfig
from open_unitok.tokenizer import UniTok, UniTokConfig

SIZES = {
    "image_size": 64,
    "stem_width": 8,
    "stage_widths": (8, 8),
    "stage_depths": (1, 1),
    "hidden_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "decoder_widths": (8, 8),
    "decoder_depths": (1, 1),
    "num_codebooks": 2,
    "codebook_size": 16,
    "codebook_dim": 6,
    "text_hidden_size": 16,
    "text_num_layers": 1,
    "text_num_heads": 2,
    "text_vocab_size": 64,
}
TEXT = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
IMAGE = -200
LINE = (
    r"This visual tokenizer codes an image as a pyramid \(scales \[1, 2, 4\], 21 tokens\); the MLLM reads "
    r"it, but generates one grid: take a tokenizer without scales\."
)


def make(**options):
    torch.manual_seed(0)
    fields = {"quantizer": "residual", "quantizer_options": {"scales": [1, 2, 4], **options}}
    unitok = UniTok(UniTokConfig(**SIZES, **fields)).eval()
    config = UniTokMLLMConfig.for_tokenizer(unitok.config, text_config={**TEXT, "vocab_size": 64})
    model = UniTokForConditionalGeneration(config).eval()
    model.init_from_tokenizer(unitok)
    return unitok, model


@pytest.mark.parametrize(
    "options",
    [
        {"inner": "shared_index", "inner_options": {"block_widths": [4, 2]}},
        {"inner": "attention", "detach": False},
        {"inner": "nearest"},
    ],
    ids=lambda options: options["inner"],
)
def test_the_summed_grid_is_read(options):
    unitok, model = make(**options)
    assert unitok.encode(torch.rand(2, 3, 64, 64) * 2 - 1).shape == (2, 21, 2)
    codes = torch.randint(16, (2, 21, 2))
    assert (model.config.num_image_tokens, model.config.num_codes, codes.shape[1]) == (16, 21, 21)
    embedded = model.visual_embedder.embed(codes)
    torch.testing.assert_close(embedded, unitok.quantizer.embed(codes), rtol=0, atol=1e-6)
    ids = torch.tensor([[1, *[IMAGE] * 16, 5, 6, 7]] * 2)
    labels = ids.masked_fill(ids == IMAGE, -100)
    out = model(input_ids=ids, image_codes=codes, labels=labels)
    assert out.text_loss > 0 and out.image_loss == 0
    other = codes.roll(1, dims=0)
    assert not torch.equal(model(input_ids=ids, image_codes=other).logits[:, -1], out.logits[:, -1])
    assert model.generate(ids, codes, max_new_tokens=2).shape == (2, 2)


def test_the_config_is_saved(tmp_path):
    _, model = make(inner="nearest")
    model.save_pretrained(tmp_path)
    again = UniTokForConditionalGeneration.from_pretrained(tmp_path)
    assert again.config.scales == [1, 2, 4]
    codes = torch.randint(16, (1, 21, 2))
    assert torch.equal(again.embed_codes(codes), model.embed_codes(codes))


def test_what_is_refused():
    unitok, model = make(inner="nearest")
    codes = torch.randint(16, (1, 21, 2))
    ids = torch.tensor([[1, *[IMAGE] * 16, 5]])
    with pytest.raises(UserError, match=LINE):
        model(input_ids=ids, image_codes=codes, labels=ids)
    with pytest.raises(UserError, match=LINE):
        model.config.check_generates()
    with pytest.raises(
        UserError, match=r"image_codes have 20 visual tokens; the scales \[1, 2, 4\] take 21\."
    ):
        model(input_ids=ids, image_codes=codes[:, :20])
    with pytest.raises(UserError, match="21 image placeholders, but image_codes hold 1 images of 16 visual"):
        model(input_ids=torch.tensor([[1, *[IMAGE] * 21, 5]]), image_codes=codes)
    with pytest.raises(UserError, match=r"cannot be read by an MLLM \(Quantizer\.reads\)"):
        make(inner="nearest", shared_convolutions=4)
    with pytest.raises(
        UserError, match=r"scales = \[1, 2\]: num_image_tokens must be the square of the last"
    ):
        UniTokMLLMConfig(text_config=TEXT, scales=[1, 2], num_image_tokens=16)
    one_grid = UniTokMLLMConfig.for_tokenizer(
        unitok.config, text_config={**TEXT, "vocab_size": 64}, scales=None
    )
    with pytest.raises(
        UserError, match=r"scales = None in the model, but \[1, 2, 4\] in the visual tokenizer"
    ):
        UniTokForConditionalGeneration(one_grid).init_from_tokenizer(unitok)
