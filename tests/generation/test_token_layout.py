"""Images of 2 x 8 and of 4 x 4 visual tokens, 16 each: generation, stream, preview, decode, questions, page,
server."""

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

from open_unitok.core.errors import UserError
from open_unitok.generation import Pipeline, Sampling
from open_unitok.mllm import UniTokForConditionalGeneration, UniTokMLLMConfig, UniTokProcessor
from open_unitok.tokenizer import UniTok, UniTokConfig
from open_unitok.tokenizer.token_layout import TokenLayout

SAMPLING = Sampling(guidance=2.0)
PROMPTS = ["a red circle", "a star"]
OBLONG = {"rows": 2, "columns": 8, "registers": 0}


@pytest.fixture(scope="module")
def make_pipe(golden, tiny_unitok, make_model, tmp_path_factory):
    """make_pipe(token_layout, image_size) -> a pipeline, saved and loaded."""

    def make(token_layout, image_size, registers=0) -> Pipeline:
        sizes = tiny_unitok.config.to_dict()
        sizes |= {"token_layout": token_layout, "image_size": image_size, "num_register_tokens": registers}
        torch.manual_seed(0)
        unitok = UniTok(UniTokConfig(**sizes)).eval()
        with torch.no_grad():
            unitok.quantizer.codebooks.normal_()
        visual = UniTokMLLMConfig.for_tokenizer(unitok.config)
        names = ("num_image_tokens", "token_layout", "row_norm", "projection_heads")
        model = make_model(**{name: getattr(visual, name) for name in names})
        model.init_from_tokenizer(unitok)
        path = tmp_path_factory.mktemp("oblong")
        model.save_pretrained(path)
        unitok.save_pretrained(path / "unitok")
        UniTokProcessor.from_text_tokenizer(
            golden / "mllm" / "tokenizer.model",
            image_size=image_size,
            num_image_tokens=unitok.config.num_visual_tokens,
            token_layout=unitok.config.token_layout,
            template="plain",
        ).save_pretrained(path)
        return Pipeline.from_pretrained(path)

    return make


@pytest.fixture(scope="module")
def oblong(make_pipe):
    return make_pipe(OBLONG, 128)


@pytest.fixture(scope="module")
def square(make_pipe):
    return make_pipe(None, 64)


def test_both_have_16_tokens_and_their_own_shapes(oblong, square):
    assert oblong.model.config.num_image_tokens == square.model.config.num_image_tokens == 16
    assert oblong.layout == TokenLayout(2, 8) and square.layout == TokenLayout(4, 4)
    assert square.model.config.token_layout is None
    assert [image.size for image in oblong.generate(PROMPTS, SAMPLING)] == [(128, 32)] * 2
    assert [image.size for image in square.generate(PROMPTS, SAMPLING)] == [(64, 64)] * 2


@pytest.mark.parametrize(("layout", "size", "rows", "registers"), [(OBLONG, 128, 2, 0), (None, 64, 4, 2)])
def test_previews_come_after_each_row(make_pipe, layout, size, rows, registers):
    pipe = make_pipe(layout, size, registers)
    steps = list(pipe.stream(PROMPTS, SAMPLING, seed=3))
    final = pipe.generate(PROMPTS, SAMPLING, seed=3)
    assert len(steps) == rows
    assert all(np.array_equal(a, b) for a, b in zip(steps[-1], final))
    for row, images in enumerate(steps[:-1], 1):
        for image in images:
            pixels = np.asarray(image)
            assert pixels.shape == np.asarray(final[0]).shape
            assert (pixels[16 * row :] == 128).all() and (pixels[: 16 * row] != 128).any()


def test_decode_uses_the_layout(oblong):
    codes = oblong.generate_codes(PROMPTS, SAMPLING)
    assert codes.shape == (2, 16, 3)
    expected = oblong.unitok.decode(codes, grid=(2, 8))
    images = [torch.from_numpy(np.array(image)) for image in oblong.decode(codes)]
    pixels = torch.stack(images).permute(0, 3, 1, 2)
    assert expected.shape == (2, 3, 32, 128)
    torch.testing.assert_close(pixels.float() / 127.5 - 1, expected, atol=1 / 127, rtol=0)


def test_the_first_row_of_an_image_is_a_prefix_of_another(oblong, photos):
    prefix = oblong.first_rows(photos[:1], 1)
    assert prefix.shape == (1, 8, 3)
    assert torch.equal(oblong.generate_codes(PROMPTS[:1], SAMPLING, prefix=prefix)[:, :8], prefix)
    with pytest.raises(UserError, match="rows is 2; it must be a whole number from 1 to 1"):
        oblong.first_rows(photos[:1], 2)


def test_images_are_encoded_and_reconstructed_in_this_shape(oblong, photos):
    assert oblong.processor.image_shape == (32, 128)
    assert oblong.encode_for_reading(photos).codes.shape == (3, 16, 3)
    assert len(oblong.answer([photos[0]], ["What is it?"], max_new_tokens=2)) == 1
    assert [image.size for image in oblong.reconstruct(photos[:2])] == [(128, 32)] * 2
    assert oblong.processor.pixels(Image.new("RGB", (10, 10))).shape == (3, 32, 128)


def test_the_page_shows_this_shape(oblong, photos):
    from open_unitok.generation.ui.page import ImageHandler, ReconstructionHandler

    views = [view for view, _, _ in ImageHandler(oblong)("a star", "", 1, 5, False, 2.0, "constant", 1, 0, 1)]
    assert ["row 1 of 2" in view for view in views] == [False, True, False]
    _, maps = ReconstructionHandler(oblong)(str(photos[0]))
    assert maps.count("viewBox='0 0 8 2'") == 3 and "data-columns='8'" in maps


def test_the_server_generates_and_encodes_this_shape(oblong, photos, serving, ask):
    path = "/v1/images/generations"
    parts = [
        {"type": "text", "text": "What?"},
        {"type": "image_url", "image_url": {"url": data_url(photos[0])}},
    ]
    question = {"messages": [{"role": "user", "content": parts}], "max_tokens": 3}
    with serving(oblong) as (url, _):
        status, answer = ask(url, {"prompt": "a star", "size": "128x32", "seed": 1}, path)
        assert status == 200 and answer["size"] == "128x32"
        assert ask(url, {"prompt": "a star", "size": "64x64"}, path)[0] == 400
        text = ask(url, question)[1]["choices"][0]["message"]["content"]
    image = Image.open(io.BytesIO(base64.b64decode(answer["data"][0]["b64_json"])))
    assert np.array_equal(image, oblong.generate(["a star"], seed=1)[0])
    assert text == oblong.answer([photos[0]], ["What?"], max_new_tokens=3)[0]


def data_url(path):
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def test_a_layout_must_have_the_models_tokens():
    with pytest.raises(UserError, match="has 16 tokens, expected 9"):
        UniTokMLLMConfig(num_image_tokens=9, token_layout=OBLONG)


def test_configs_of_square_models_keep_their_keys(square, oblong, tmp_path):
    square.processor.save_pretrained(tmp_path)
    assert "token_layout" not in (tmp_path / "processor_config.json").read_text()
    oblong.model.save_pretrained(tmp_path)
    loaded = UniTokForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.config.token_layout == OBLONG
