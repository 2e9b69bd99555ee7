"""The layout of an image's visual tokens, and a tokenizer with 2 x 8 tokens."""

import pytest
import torch

from open_unitok.core.errors import UserError
from open_unitok.tokenizer import UniTok
from open_unitok.tokenizer.images import to_pil, to_pixels
from open_unitok.tokenizer.token_layout import TokenLayout

OBLONG = {"image_size": 128, "token_layout": {"rows": 2, "columns": 8}}


def test_square():
    assert TokenLayout.square(19, registers=3) == TokenLayout(4, 4, 3)
    for tokens, registers in ((10, 0), (3, 3), (2, 3), (0, 0)):
        with pytest.raises(
            UserError, match=f"{tokens} visual tokens minus {registers} registers do not fill"
        ):
            TokenLayout.square(tokens, registers)


def test_num_tokens_grid_and_dict():
    layout = TokenLayout(2, 8, registers=3)
    assert (layout.num_tokens, layout.grid) == (19, (2, 8))
    assert layout.to_dict() == {"rows": 2, "columns": 8, "registers": 3}
    assert [layout.tokens_of_rows(rows) for rows in range(3)] == [3, 11, 19]


def test_complete_rows():
    layout = TokenLayout(2, 8, registers=3)
    assert [layout.complete_rows(n) for n in (0, 2, 10, 11, 18, 19, 40)] == [0, 0, 0, 1, 1, 2, 2]
    for n in range(layout.num_tokens + 1):
        assert layout.tokens_of_rows(layout.complete_rows(n)) <= max(n, layout.registers)


def test_a_set_of_tokens_has_their_number_and_completes_no_row_before_the_last():
    layout = TokenLayout(2, 8, registers=1, tokens=5)
    assert (layout.num_tokens, layout.grid, layout.row_ends) == (6, (2, 8), [6])
    assert [layout.complete_rows(n) for n in (0, 1, 5, 6, 7)] == [0, 0, 0, 2, 2]
    assert [layout.tokens_of_rows(rows) for rows in range(3)] == [1, 6, 6]
    assert layout.to_dict() == {"rows": 2, "columns": 8, "registers": 1, "tokens": 5}
    assert TokenLayout.from_config(layout.to_dict(), 6) == layout
    assert str(layout) == "5 visual tokens of 2 x 8 patches"
    assert TokenLayout(2, 8).row_ends == [8, 16] and str(TokenLayout(2, 8)) == "2 x 8 visual tokens"
    assert TokenLayout.from_config({"rows": 2, "columns": 8, "tokens": 0}, 16).to_dict().keys() == {
        "rows", "columns", "registers"
    }  # fmt: skip


def test_from_config():
    oblong = TokenLayout(2, 8)
    assert TokenLayout.from_config(None, 16) == TokenLayout(4, 4)
    assert TokenLayout.from_config({"rows": 2, "columns": 8}, 16) == oblong
    assert TokenLayout.from_config({"rows": 2, "columns": 8}, None) == oblong
    assert TokenLayout.from_config({"rows": 2, "columns": 8}, 19, registers=3) == TokenLayout(2, 8, 3)
    assert TokenLayout.from_config(oblong.to_dict(), 16) == TokenLayout.from_config(oblong, 16) == oblong


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"rows": 2}, "expected the integers rows, columns and, optionally, registers and tokens"),
        ({"rows": 2, "columns": 8, "depth": 1}, "expected the integers"),
        ({"rows": 2.0, "columns": 8}, "expected the integers"),
        ({"rows": True, "columns": 16}, "expected the integers"),
        ({"rows": 0, "columns": 8}, "rows and columns must be at least 1"),
        ({"rows": 2, "columns": 8, "registers": -1}, "registers and tokens at least 0"),
        ({"rows": 2, "columns": 8, "tokens": -1}, "registers and tokens at least 0"),
        ({"rows": 2, "columns": 8, "tokens": 1.5}, "expected the integers"),
        ({"rows": 2, "columns": 8, "tokens": 9}, "has 9 tokens, expected 16"),
        ({"rows": 3, "columns": 8}, "has 24 tokens, expected 16"),
    ],
)
def test_invalid_layouts(value, message):
    with pytest.raises(UserError, match=message):
        TokenLayout.from_config(value, 16)


@pytest.fixture
def oblong(tiny_config) -> UniTok:
    torch.manual_seed(0)
    return UniTok(tiny_config(**OBLONG)).eval()


def pixels() -> torch.Tensor:
    return torch.rand(2, 3, 32, 128, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_a_tokenizer_of_2_x_8_tokens_encodes_decodes_and_embeds(oblong, tmp_path):
    config = oblong.config
    assert (config.layout, config.image_shape, config.num_visual_tokens) == (TokenLayout(2, 8), (32, 128), 16)
    codes = oblong.encode(pixels())
    assert codes.shape == (2, 16, 4)
    decoded = oblong.decode(codes)
    assert decoded.shape == (2, 3, 32, 128)
    assert torch.equal(oblong.decode(codes, grid=(2, 8)), decoded)
    assert oblong.decode(codes, grid=(4, 4)).shape == (2, 3, 64, 64)  # an explicit grid takes precedence
    assert oblong.decode(codes[:, :9]).shape == (2, 3, 48, 48)  # other numbers of tokens are square
    assert oblong.embed_image(pixels()).shape == (2, 32)
    image = to_pil(decoded[0])
    assert image.size == (128, 32) and to_pixels(image, config.image_shape).shape == (3, 32, 128)
    oblong.save_pretrained(tmp_path)
    loaded = UniTok.from_pretrained(tmp_path)
    assert loaded.config.layout == TokenLayout(2, 8)
    assert torch.equal(loaded.decode(codes), decoded)


def test_an_encoder_with_one_token_per_cell_rejects_a_set_of_tokens(tiny_config):
    with pytest.raises(UserError, match=r"tokens = 5, but (en|de)coder 'vitamin' has one token per cell"):
        UniTok(tiny_config(**OBLONG | {"token_layout": {"rows": 2, "columns": 8, "tokens": 5}}))


def test_a_tokenizer_of_2_x_8_tokens_trains(tiny_config):
    torch.manual_seed(0)
    model = UniTok(
        tiny_config(**OBLONG | {"token_layout": {"rows": 2, "columns": 8, "registers": 1}})
    ).train()
    assert model.config.num_register_tokens == 1 and model.config.num_visual_tokens == 17
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(6):
        out = model(pixels())
        assert out.reconstruction.shape == pixels().shape and out.codes.shape == (2, 17, 4)
        loss = (out.reconstruction - pixels()).square().mean() + out.losses["vq"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_square_tokenizers_reject_other_numbers_of_tokens(tiny_config):
    model = UniTok(tiny_config(token_layout={"rows": 4, "columns": 4})).eval()
    assert model.decode(torch.zeros(1, 16, 4, dtype=torch.int64)).shape == (1, 3, 64, 64)
    with pytest.raises(UserError, match=r"pass grid=\(rows, columns\)"):
        model.decode(torch.zeros(1, 10, 4, dtype=torch.int64))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"image_size": 64},
            "image_size = 64 is not the longer side of 2 x 8 tokens of 16 pixels: set it to 128",
        ),
        ({"token_layout": {"rows": 2}}, "expected the integers"),
        (
            {"num_register_tokens": 2, "token_layout": {"rows": 2, "columns": 8, "registers": 1}},
            "token_layout has 1 registers, but num_register_tokens = 2",
        ),
    ],
)
def test_configs_with_contradicting_layouts(tiny_config, wrong, message):
    with pytest.raises(UserError, match=message):
        tiny_config(**OBLONG | wrong)
