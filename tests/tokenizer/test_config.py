"""The config: published rules and errors."""

import pytest

from open_unitok.core.errors import UserError
from open_unitok.tokenizer import TOKENIZER_SIZES, UniTok, UniTokConfig


def test_published_sizes():
    large = UniTokConfig()
    assert large.to_dict() == UniTokConfig.named("vitamin_large").to_dict()
    assert (large.latent_dim, large.num_projection_heads, large.num_visual_tokens) == (64, 16, 256)
    assert large.patch_size == 16 and large.bits_per_token == 96
    assert UniTokConfig.named("vitamin_base").num_projection_heads == 12
    assert UniTokConfig.named("vitamin_small", image_size=128).num_visual_tokens == 64


def test_published_triples_are_accepted():
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "codebook_dim": 1}
    config = UniTokConfig(
        **sizes, stage_widths=(16, 32, 64), stage_depths=(2, 4, 1), decoder_widths=(64, 32, 16)
    )
    assert (config.stage_widths, config.stage_depths, config.decoder_widths) == ([16, 32], [2, 4], [32, 16])


@pytest.mark.parametrize("books, width", [(1, 8), (2, 4), (8, 4), (4, 16), (8, 32), (3, 5)])
def test_default_projection_heads_fit_many_sizes(books, width):
    config = UniTokConfig(
        hidden_size=120, num_attention_heads=4, num_codebooks=books, codebook_dim=width, projection="linear"
    )
    assert config.num_projection_heads == max(120 // (books * width), 1)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"image_size": 100}, "image_size = 100 is not a multiple of patch_size = 16"),
        ({"projection": "atention"}, "projection = 'atention'. Did you mean 'attention'?"),
        ({"num_codebook": 8}, "no field 'num_codebook'. Did you mean 'num_codebooks'?"),
        ({"hidden_size": 100}, "hidden_size = 100 is not a multiple of num_attention_heads = 16"),
        ({"projection_heads": 7}, "would have 7 heads, which do not divide 1024"),
        ({"stage_widths": (1, 2, 3)}, "stage_widths = [1, 2, 3]: expected two positive numbers"),
        ({"num_codebooks": 0}, "num_codebooks = 0: must be at least 1"),
        ({"drop_path_rate": 1.0}, "drop_path_rate = 1.0: must be in [0, 1)"),
        ({"num_register_tokens": -1}, "num_register_tokens = -1"),
        ({"hidden_size": "wide"}, "hidden_size = 'wide': expected a whole number"),
        ({"num_codebooks": 2.5}, "num_codebooks = 2.5: expected a whole number"),
        ({"embed_dim": None}, "embed_dim = None: expected a whole number"),
        ({"num_hidden_layers": True}, "num_hidden_layers = True: expected a whole number"),
        ({"stage_widths": 8}, "stage_widths = 8: expected two whole numbers"),
        ({"decoder_depths": ["a", "b"]}, "decoder_depths = ['a', 'b']: expected two whole numbers"),
        ({"mlp_ratio": 0}, "mlp_ratio = 0: must be above 0"),
        ({"mlp_ratio": float("nan")}, "mlp_ratio = nan: must be above 0"),
        ({"drop_path_rate": "0.1"}, "drop_path_rate = '0.1': expected a number"),
    ],
)
def test_invalid_fields_are_named(wrong, message):
    with pytest.raises(UserError) as error:
        UniTokConfig(**wrong)
    assert message in str(error.value)


def test_unknown_size():
    with pytest.raises(UserError, match=r"'vitamin_lage' is not a tokenizer size. Did you mean 'vitamin_lar"):
        UniTokConfig.named("vitamin_lage")
    assert set(TOKENIZER_SIZES) == {"vitamin_small", "vitamin_base", "vitamin_large"}


VIT = {"model_type": "vit", "hidden_size": 24, "num_attention_heads": 2, "intermediate_size": 48}


@pytest.mark.parametrize("depth", [0, -1])
def test_towers_without_layers_are_rejected(tiny_config, depth):
    tower = {**VIT, "patch_size": 16, "num_hidden_layers": depth}
    with pytest.raises(UserError, match=f"num_hidden_layers is {depth}: it must be 1 or more"):
        UniTok(tiny_config(encoder="hf_vision", encoder_options=tower))
    with pytest.raises(UserError, match=f"num_hidden_layers is {depth}: it must be 1 or more"):
        UniTok(tiny_config(decoder="vit", decoder_options={"num_hidden_layers": depth}))


@pytest.mark.parametrize("merge", [{}, [], False])
def test_an_empty_merge_is_rejected(tiny_config, merge):
    with pytest.raises(UserError, match=r"encoder_options\.merge"):
        UniTok(tiny_config(encoder_options={"merge": merge}))
    UniTok(tiny_config(encoder_options={"merge": None}))
