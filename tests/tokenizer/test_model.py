"""The UniTok model: shapes, folders, initialisation, errors."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModel

from open_unitok.core.errors import UserError
from open_unitok.tokenizer import TOKENIZER_SIZES, UniTok, UniTokConfig


@pytest.fixture
def model(tiny_config) -> UniTok:
    torch.manual_seed(0)
    return UniTok(tiny_config()).eval()


def pixels(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_not_square(model):
    images = pixels(2, 3, 32, 80)
    codes = model.encode(images)
    assert codes.shape == (2, 10, 4) and codes.dtype == torch.int64
    assert model.decode(codes, grid=(2, 5)).shape == images.shape
    assert model(images).reconstruction.shape == images.shape
    with pytest.raises(UserError, match=r"do not fill a square grid.*pass grid=\(rows, columns\)"):
        model.decode(codes)
    with pytest.raises(UserError, match=r"grid = \(3, 4\) does not fit 10 image tokens"):
        model.decode(codes, grid=(3, 4))


def test_registers_come_first(tiny_config):
    model = UniTok(tiny_config(num_register_tokens=3)).eval()
    assert model.config.num_visual_tokens == 19
    codes = model.encode(pixels(1, 3, 32, 48))
    assert codes.shape == (1, 9, 4)
    assert model.decode(codes, grid=(2, 3)).shape == (1, 3, 32, 48)
    with pytest.raises(UserError, match="9 visual tokens minus 3 registers do not fill a square grid"):
        model.decode(codes)


def test_batch_equals_one_by_one(model):
    images = pixels(4, 3, 64, 64)
    together = model.encode(images)
    assert torch.equal(together, torch.cat([model.encode(image[None]) for image in images]))
    alone = torch.cat([model.decode(code[None]) for code in together])
    torch.testing.assert_close(model.decode(together), alone, rtol=0, atol=1e-5)


def test_decode_clamps_and_builds_no_graph(model):
    with torch.no_grad():
        model.decoder.to_pixels.weight.mul_(1000)
    images = model.decode(model.encode(pixels(1, 3, 64, 64)))
    assert images.min() == -1 and images.max() == 1 and not images.requires_grad


def test_captions_may_be_shorter_than_the_context(model):
    ids = torch.zeros(2, 16, dtype=torch.int64)
    ids[:, :3] = torch.tensor([[510, 7, 511], [510, 9, 511]])
    torch.testing.assert_close(model.embed_text(ids), model.embed_text(ids[:, :3]), rtol=0, atol=1e-6)
    with pytest.raises(UserError, match="17 token ids are longer than text_context_length = 16"):
        model.embed_text(torch.zeros(2, 17, dtype=torch.int64))


def test_wrong_pixels(model):
    with pytest.raises(UserError, match=r"60 x 64 pixels \(height x width\): both must be multiples of 16"):
        model.encode(pixels(1, 3, 60, 64))
    with pytest.raises(UserError, match=r"pixels have shape \(3, 64, 64\)"):
        model.encode(pixels(3, 64, 64))


def test_wrong_codes(model):
    codes = torch.zeros(1, 16, 4, dtype=torch.int64)
    with pytest.raises(UserError, match="codes range from 0 to 64; allowed: 0 to 63"):
        model.decode(codes.index_fill(1, torch.tensor(3), 64))
    with pytest.raises(UserError, match="codes range from -1 to 0"):
        model.decode(codes.index_fill(1, torch.tensor(3), -1))
    with pytest.raises(UserError, match=r"shape \(1, 4, 16\).*4 sub-codebooks"):
        model.decode(codes.transpose(1, 2))
    with pytest.raises(UserError, match=r"float32; expected integers"):
        model.decode(codes.float())


def test_save_and_load_keep_everything(model, tmp_path):
    model.train()(pixels(2, 3, 64, 64))  # makes the usage statistics nonzero
    with torch.no_grad():
        model.encoder.position_offset.normal_()
    model.save_pretrained(tmp_path)
    loaded = UniTok.from_pretrained(tmp_path)
    assert not loaded.training
    mine, theirs = model.state_dict(), loaded.state_dict()
    assert mine.keys() == theirs.keys()
    assert {
        name for name, _ in model.named_buffers()
    } <= mine.keys()  # a non-persistent buffer would stay unset after loading
    for name, tensor in mine.items():
        assert torch.equal(theirs[name], tensor), name
    assert loaded.quantizer.calls == 1
    assert loaded.config.to_dict() == model.config.to_dict() | {"_name_or_path": loaded.config._name_or_path}
    assert loaded.fingerprint() == model.fingerprint()
    assert torch.equal(loaded.encode(pixels(1, 3, 64, 64)), model.eval().encode(pixels(1, 3, 64, 64)))


def test_auto_classes(model, tmp_path):
    model.save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), UniTokConfig)
    assert isinstance(AutoModel.from_pretrained(tmp_path), UniTok)


def test_missing_weights_are_initialised(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = UniTok.from_pretrained(tmp_path, num_register_tokens=2)
    assert 0.01 < loaded.encoder.register_tokens.std() < 0.03
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


def test_wrong_folders(tmp_path):
    with pytest.raises(UserError, match=r"is not a model folder: it has no config\.json"):
        UniTok.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(UserError, match=rf"{tmp_path} holds a model of type 'llama', not a visual tokenizer"):
        UniTok.from_pretrained(tmp_path)
    (tmp_path / "unitok").mkdir()
    with pytest.raises(UserError, match=r"Its visual tokenizer is in .*unitok"):
        UniTok.from_pretrained(tmp_path)


def test_gradient_checkpointing_changes_nothing(model):
    model.train()
    images = pixels(2, 3, 64, 64)

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        out = model(images)
        (out.reconstruction.square().mean() + out.losses["vq"]).backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain = gradients()
    model.gradient_checkpointing_enable()
    for one, other in zip(plain, gradients(), strict=True):
        assert torch.equal(one, other)


def test_drop_path(tiny_config):
    torch.manual_seed(0)
    model = UniTok(tiny_config(drop_path_rate=0.5))
    assert [block.drop_path_rate for block in model.encoder.blocks] == [0.0, 0.25, 0.5]
    images = pixels(2, 3, 64, 64)
    assert not torch.equal(model.train().encoder(images), model.encoder(images))
    assert torch.equal(model.eval().encoder(images), model.encoder(images))
    blocks = model.train().encoder.blocks
    blocks.drop_path_noise = torch.ones(3, 2, 5)  # noise of 1 drops nothing; kept branches are scaled up
    assert torch.equal(model.encoder(images), model.encoder(images))
    blocks.drop_path_noise[2, :, 0] = 0.4  # below the rate of 0.5: the last block is the identity for image 0
    hidden = torch.randn(2, 4, 64)
    after, before = blocks(hidden), blocks[1](blocks[0](hidden), blocks.drop_path_noise[1, :, :2])
    assert torch.equal(after[0], before[0]) and not torch.equal(after[1], before[1])


@pytest.mark.parametrize("name", TOKENIZER_SIZES)
@pytest.mark.parametrize("changes", [{}, {"projection": "linear", "num_register_tokens": 2}])
def test_every_size_gets_gradients_everywhere(name, changes):
    """Each named size with fewer and thinner layers."""
    sizes = TOKENIZER_SIZES[name]
    thin = {
        "stem_width": sizes["stem_width"] // 16,
        "stage_widths": [width // 16 for width in sizes["stage_widths"]],
        "decoder_widths": [width // 16 for width in sizes["decoder_widths"]],
        "hidden_size": sizes["hidden_size"] // 8,
        "num_attention_heads": sizes["num_attention_heads"] // 2,
    }
    small = {"num_hidden_layers": 2, "codebook_size": 16, "text_num_layers": 1, "text_vocab_size": 64}
    model = UniTok(UniTokConfig.named(name, **thin, **small, projection_heads=2, **changes)).train()
    out = model(pixels(2, 3, 32, 32), torch.randint(0, 64, (2, 5)), entropy=True)
    similarity = out.logit_scale * out.image_embeds @ out.text_embeds.T
    (
        out.reconstruction.square().mean() + sum(out.losses.values()) + similarity.logsumexp(-1).sum()
    ).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_initial_weights(tiny_config):
    torch.manual_seed(0)
    model = UniTok(tiny_config(hidden_size=256, num_attention_heads=4)).requires_grad_(False)
    assert model.encoder.blocks[0].mlp.gate.weight.std() == pytest.approx(0.02, rel=0.05)
    assert model.encoder.stem.conv2.weight.std() == pytest.approx((2 / (16 * 9)) ** 0.5, rel=0.05)
    wide = model.decoder.enter.conv
    assert wide.weight.std() == pytest.approx(0.5 * (2 / (9 * (256 + 32))) ** 0.5, rel=0.05)
    assert not wide.bias.any() and not model.down_projection.linear.bias.any()
    assert model.encoder.pool.bias.any()  # PyTorch's default
    assert model.quantizer.codebooks.abs().max() <= 1 / 72
    assert model.quantizer.codebooks.std() == pytest.approx(1 / 72 / 3**0.5, rel=0.05)
    assert not model.encoder.position_offset.any()
    assert model.logit_scale.exp().item() == pytest.approx(1 / 0.07)
    assert model.text_encoder.blocks[0].attention.qkv.weight.std() == pytest.approx(64**-0.5, rel=0.05)


def test_same_seed_same_weights(tiny_config):
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(UniTok(tiny_config()).state_dict())
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
