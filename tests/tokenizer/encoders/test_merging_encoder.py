"""Token merging in the encoder: identity, files, fingerprints, training, refusals in one line."""

import pytest
import torch

from open_unitok.cli.main import main
from open_unitok.cli.main import run as unitok_command
from open_unitok.core.errors import UserError
from open_unitok.tokenizer import UniTok
from open_unitok.tokenizer.encoders.merging_blocks import MergingTransformer

TOME = {"method": "tome", "r": 2}
TOFU = {"method": "tofu", "r": 2, "prune_until": 1}
CLUSTER = {"method": "cluster", "at": 1, "keep": 0.5}
SPATIAL = {**CLUSTER, "alpha": 0.3, "k": 3}
SMALL = {"stem_width": 8, "stage_widths": (8, 8), "stage_depths": (1, 1), "hidden_size": 32}
SMALL |= {"decoder_widths": (8, 8), "decoder_depths": (1, 1), "text_num_layers": 1, "text_hidden_size": 16}
ALL = {"tome": TOME, "tofu": TOFU, "cluster": CLUSTER, "spatial": SPATIAL}


def pixels(count: int = 2, height: int = 64, width: int = 64, seed: int = 1) -> torch.Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture(scope="module")
def seeded(tiny_config):
    """seeded(merge, **changes) -> UniTok of seed 0, whose weights do not depend on `merge`."""

    def build(merge, **changes) -> UniTok:
        torch.manual_seed(0)
        options = None if merge is None else {"merge": merge}
        return UniTok(tiny_config(**SMALL, encoder_options=options, **changes)).eval()

    return build


def representatives(model: UniTok, images: torch.Tensor) -> torch.Tensor:
    """(B, N): of each token, the position of the one that stands for it."""
    encoder = model.encoder
    tokens = encoder.patches(images)
    if encoder.register_tokens is not None:
        tokens = torch.cat([encoder.register_tokens.expand(len(tokens), -1, -1), tokens], dim=1)
    *_, (_, state) = encoder.blocks.merged_outputs(tokens, (images.shape[2] // 16, images.shape[3] // 16))
    return state[1]


def test_without_merging_nothing_changes(seeded):
    plain = seeded(None)
    assert not isinstance(plain.encoder.blocks, MergingTransformer)
    for merge in ({"method": "tome", "r": 0}, {**CLUSTER, "keep": 1.0}, {**CLUSTER, "keep": 16}):
        same = seeded(merge)
        assert isinstance(same.encoder.blocks, MergingTransformer)
        state = same.state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in plain.state_dict().items())
        assert torch.equal(same.encode_latents(pixels()), plain.encode_latents(pixels()))
        assert same.fingerprint() != plain.fingerprint()


@pytest.mark.parametrize("name", ALL)
def test_merged_tokens_share_their_latents_and_the_grid_stays(seeded, name):
    model, plain = seeded(ALL[name]), seeded(None)
    images = pixels()
    tokens = model.encoder(images)
    assert tokens.shape == (2, 16, 32)
    assign = representatives(model, images)
    left = {"tome": 10, "tofu": 10, "cluster": 8, "spatial": 8}[name]
    for image in range(2):
        assert len(assign[image].unique()) == left
        assert torch.equal(tokens[image], tokens[image, assign[image]])
    codes = model.encode(images)
    assert codes.shape == (2, 16, 4) and not torch.equal(codes, plain.encode(images))
    assert model.decode(codes).shape == images.shape
    assert model.fingerprint() != plain.fingerprint()
    # each image on its own, and other sizes
    torch.testing.assert_close(model.encode_latents(images[:1]), model.encode_latents(images)[:1])
    for height, width in ((16, 16), (32, 48), (96, 32)):
        assert model.encoder(pixels(1, height, width)).shape == (1, height * width // 256, 32)


@pytest.mark.parametrize("name", ["tofu", "spatial"])
def test_registers_are_protected(seeded, name):
    model = seeded(ALL[name], num_register_tokens=3)
    assign = representatives(model, pixels())
    assert torch.equal(assign[:, :3], torch.arange(3).expand(2, -1))
    assert (assign[:, 3:] >= 3).all() and len(assign[0].unique()) < 19
    assert model.encode(pixels()).shape == (2, 19, 4)


@pytest.mark.parametrize("name", ["tofu", "spatial"])
def test_it_trains_with_and_without_recomputed_activations(seeded, name):
    model = seeded(ALL[name], drop_path_rate=0.2).train()
    model.encoder.blocks.drop_path_noise = torch.rand(3, 2, 2, generator=torch.Generator().manual_seed(2))
    model.decoder.blocks.drop_path_noise = model.encoder.blocks.drop_path_noise
    images, captions = pixels(), torch.randint(0, 512, (2, 5), generator=torch.Generator().manual_seed(3))

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        out = model(images, captions, entropy=True)
        pairs = (out.image_embeds @ out.text_embeds.T) * out.logit_scale
        (out.reconstruction.square().mean() + sum(out.losses.values()) + pairs.logsumexp(1).sum()).backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    for parameter, weight in model.named_parameters():
        assert parameter in plain and plain[parameter].isfinite().all() and weight.requires_grad, parameter
        assert plain[parameter].any(), parameter
    model.gradient_checkpointing_enable()
    again = gradients()
    assert all(torch.equal(again[parameter], gradient) for parameter, gradient in plain.items())


def test_half_precision_and_autocast(seeded):
    for merge in (TOFU, SPATIAL):
        model = seeded(merge)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert model.encode_latents(pixels()).isfinite().all()
        assert model.to(torch.bfloat16).encode_latents(pixels()).isfinite().all()


def test_the_published_order_gives_other_groups_and_the_same_grid(seeded):
    raster, published = seeded({**TOME, "r": 4}), seeded({**TOME, "r": 4, "order": "published"})
    images = pixels()
    one, other = representatives(raster, images), representatives(published, images)
    assert not torch.equal(one, other) and len(other[0].unique()) == 4
    tokens = published.encoder(images)
    for image in range(2):
        assert torch.equal(tokens[image], tokens[image, other[image]])
    assert raster.fingerprint() != published.fingerprint()


def test_every_option_is_in_the_fingerprint(seeded):
    changes = [None, TOME, TOFU, CLUSTER, SPATIAL, {**TOME, "r": [2, 2]}, {**TOME, "slope": 0.5}]
    changes += [{**TOME, "proportional_attention": False}, {**TOFU, "prune_until": 2}, {**CLUSTER, "at": 2}]
    changes += [{**CLUSTER, "keep": 4}, {**CLUSTER, "k": 4}, {**SPATIAL, "alpha": 0.5}]
    assert len({seeded(merge).fingerprint() for merge in changes}) == len(changes)


def test_a_trained_folder_switches_it_on_and_off(tiny_config, tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "num_hidden_layers": 2}
    plain = UniTok(tiny_config(**SMALL, encoder_options=sizes)).eval()
    plain.save_pretrained(tmp_path / "plain")
    (tmp_path / "plain" / "caption_tokenizer").mkdir()
    codes = plain.encode(pixels())
    merged = UniTok.from_pretrained(tmp_path / "plain", encoder_options={"merge": TOME})
    assert merged.config.encoder_options == {**sizes, "merge": TOME}  # added to the stored options
    assert merged.fingerprint() != plain.fingerprint() and not torch.equal(merged.encode(pixels()), codes)
    # the command writes the same model
    main(
        ["convert", "token-merging", str(tmp_path / "plain"), str(tmp_path / "merged"), "method=tome", "r=2"]
    )
    again = UniTok.from_pretrained(tmp_path / "merged")
    assert (tmp_path / "merged" / "caption_tokenizer").is_dir()
    assert again.fingerprint() == merged.fingerprint()
    assert torch.equal(again.encode(pixels()), merged.encode(pixels()))
    # and off
    off = UniTok.from_pretrained(tmp_path / "merged", encoder_options={"merge": None})
    assert off.config.encoder_options == sizes and off.fingerprint() == plain.fingerprint()
    assert torch.equal(off.encode(pixels()), codes)
    main(["convert", "token-merging", str(tmp_path / "merged"), str(tmp_path / "off"), "method=none"])
    assert UniTok.from_pretrained(tmp_path / "off").fingerprint() == plain.fingerprint()
    assert UniTok.from_pretrained(tmp_path / "plain", encoder_options={}).fingerprint() == plain.fingerprint()


def test_the_published_file_switches_it_on(golden_folder, tiny_config):
    file, config = golden_folder / "reference_ckpt.pth", tiny_config()
    plain = UniTok.from_pretrained(file, config=config)
    merged = UniTok.from_pretrained(file, config=config, encoder_options={"merge": TOME})
    assert config.encoder_options is None
    assert isinstance(merged.encoder.blocks, MergingTransformer)
    assert merged.fingerprint() != plain.fingerprint()


@pytest.mark.parametrize(
    ("merge", "message"),
    [
        ("tome", r"merge = 'tome': expected \{method: tome \| tofu \| cluster"),
        ({"r": 4}, r"merge = \{'r': 4\}: expected \{method:"),
        ({"method": "tme", "r": 4}, r"merge\.method = 'tme'.*'tome'"),
        ({"method": "tome", "rr": 4}, r"merge\.rr is not an option of method 'tome'\..*'r'"),
        ({"method": "tome", "keep": 4, "r": 1}, r"merge\.keep is not an option of method 'tome'"),
        ({"method": "cluster", "r": 4}, r"merge\.r is not an option of method 'cluster'"),
        ({"method": "tome"}, r"merge\.r is missing: method 'tome' needs it"),
        ({"method": "tofu", "r": 2}, r"merge\.prune_until is missing"),
        ({"method": "cluster", "at": 1}, r"merge\.keep is missing"),
        ({**TOME, "r": -1}, r"merge\.r = -1: expected a number of at least 0"),
        ({**TOME, "r": 1.5}, r"merge\.r = 1\.5: expected a number of at least 0"),
        ({**TOME, "r": True}, r"merge\.r = True: expected"),
        ({**TOME, "r": [1, -1]}, r"merge\.r = \[1, -1\]: expected"),
        ({**TOME, "r": [1, 1, 1, 1]}, r"it has 4 numbers, but the encoder has 3 blocks"),
        ({**TOME, "r": (2, -1)}, r"for \(r, slope\) set slope"),
        ({**TOME, "r": 9}, r"merge\.r = 9: block 1 of 3 has 16 tokens left and can merge 8 of them"),
        ({**TOME, "r": 6}, r"merge\.r = 6: block 2 of 3 has 10 tokens left and can merge 5 of them"),
        ({**TOME, "slope": 2}, r"merge\.slope = 2: expected -1 to 1"),
        ({**TOME, "r": [2], "slope": 0.5}, r"merge\.slope = 0\.5: r is a list"),
        ({**TOME, "order": "random"}, r"merge\.order = 'random': expected raster or published"),
        (
            {**TOME, "proportional_attention": "yes"},
            r"proportional_attention = 'yes': expected true or false",
        ),
        ({**TOFU, "prune_until": 4}, r"merge\.prune_until = 4: expected 0 to 3"),
        ({**CLUSTER, "at": 3}, r"merge\.at = 3: expected 0 to 2"),
        ({**CLUSTER, "at": -1}, r"merge\.at = -1: expected 0 to 2"),
        ({**CLUSTER, "keep": 0}, r"merge\.keep = 0: expected 1 to 16 clusters, or a share"),
        ({**CLUSTER, "keep": 17}, r"merge\.keep = 17: expected 1 to 16"),
        ({**CLUSTER, "keep": 0.0}, r"merge\.keep = 0\.0: expected 1 to 16"),
        ({**CLUSTER, "keep": 1.5}, r"merge\.keep = 1\.5: expected 1 to 16"),
        ({**CLUSTER, "keep": float("nan")}, r"merge\.keep = nan: expected 1 to 16"),
        ({**CLUSTER, "k": 16}, r"merge\.k = 16: expected 1 to 15 neighbours"),
        ({**CLUSTER, "k": 0}, r"merge\.k = 0: expected 1 to 15"),
        ({**SPATIAL, "alpha": 1.5}, r"merge\.alpha = 1\.5: expected null, or 0 to 1"),
    ],
)
def test_wrong_options_are_refused_in_one_line(tiny_config, merge, message):
    with pytest.raises(UserError, match=message) as refusal:
        UniTok(tiny_config(**SMALL, encoder_options={"merge": merge}))
    assert "\n" not in str(refusal.value)


def test_refusals_elsewhere(tiny_config, tmp_path):
    with pytest.raises(UserError, match=r"order = 'published': it allows one register token, not 2"):
        options = {"merge": {**TOME, "order": "published"}}
        UniTok(tiny_config(encoder_options=options, num_register_tokens=2))
    with pytest.raises(UserError, match=r"decoder_options\.merge is not an option of decoder 'vitamin'"):
        UniTok(tiny_config(decoder_options={"merge": TOME}))
    with pytest.raises(UserError, match=r"encoder_options\.merge: encoder 'hf_vision' cannot merge tokens"):
        UniTok(tiny_config(encoder="hf_vision", encoder_options={"model_type": "vit", "merge": TOME}))
    UniTok(tiny_config(**SMALL)).save_pretrained(tmp_path / "plain")
    target = tmp_path / "new"
    for options, message in (
        (["method=tome", "r"], r"'r' is not key=value"),
        (["method=tome", "r=99"], r"merge\.r = 99: block 1 of 3"),
        (["method=tome", "r=[1"], r"'\[1' is not a valid value"),
    ):
        with pytest.raises(UserError, match=message):
            unitok_command(["convert", "token-merging", str(tmp_path / "plain"), str(target), *options])
        assert not target.exists()
