"""SweetTok's video tokenizer on synthetic clips: the published sizes, and what its two paths see."""

import pytest
import torch
from torch import nn

from open_unitok.core.errors import UserError
from open_unitok.tokenizer.video import VideoCodes, VideoTokenizer, VideoTokenizerConfig
from open_unitok.tokenizer.words import Words
from open_unitok.training.core.config import read_yaml

TINY = {
    "image_size": 32,
    "num_frames": 9,
    "tube_frames": 2,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "spatial_layers": 3,
    "spatial_queries": 6,
    "windowed_layers": [1],
    "window_size": 2,
    "temporal_layers": 2,
    "temporal_after": [1, 3],
    "pixel_layers": 1,
    "codebook_dim": 16,
    "adjectives": 40,
    "nouns": 30,
    "spatial_edges": 3,
    "adverbs": 20,
    "verbs": 50,
    "temporal_edges": 2,
    "word_dim": 10,
    "map_hidden": 12,
}


def build(**changes) -> VideoTokenizer:
    torch.manual_seed(0)
    model = VideoTokenizer(VideoTokenizerConfig(**{**TINY, **changes})).eval()
    spatial, temporal = words(40, 30, 3), words(20, 50, 2)
    model.set_words(spatial, temporal)
    with torch.no_grad():  # in a new model weights and positions are small, biases 0: all tokens are alike
        for name, parameter in model.named_parameters():
            if (
                "quantizer" in name
            ):  # rows about as long as half-latents, or the shortest one is always nearest
                parameter.normal_(std=0.1) if name.endswith("weight") else parameter.zero_()
            elif name.endswith(("bias", "positions", "places", "times")):
                parameter.normal_(std=0.3)
            elif parameter.ndim == 2 and name.endswith("weight"):
                parameter.normal_(std=1.5 * parameter.shape[1] ** -0.5)
    return model


def words(first: int, second: int, edges: int) -> Words:
    generator = torch.Generator().manual_seed(first)
    vectors = torch.randn(first + second, 10, generator=generator)
    pairs = torch.stack([torch.arange(edges), first + torch.arange(edges)], dim=1)
    return Words([f"w{i}" for i in range(first + second)], [first, second], vectors, pairs)


def moving_clip(seed: int = 0, count: int = 2, frames: int = 9) -> torch.Tensor:
    """A bright square on noise that moves two pixels a frame."""
    generator = torch.Generator().manual_seed(seed)
    clip = (torch.rand(count, 3, 1, 32, 32, generator=generator) * 0.4 - 0.9).repeat(1, 1, frames, 1, 1)
    for frame in range(frames):
        clip[:, :, frame, 8:16, 2 * frame : 2 * frame + 8] = 0.8
    return clip


def still_clip(seed: int = 0) -> torch.Tensor:
    return moving_clip(seed)[:, :, :1].repeat(1, 1, 9, 1, 1)


def inputs_of(module: nn.Module, model: VideoTokenizer, clip: torch.Tensor) -> torch.Tensor:
    seen = []
    handle = module.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    model.encode(clip)
    handle.remove()
    return seen[0]


# ---- sizes -----------------------------------------------------------------------------------------------


def test_the_shipped_config_has_the_published_sizes():
    config = VideoTokenizerConfig(**read_yaml("configs/tokenizer/sweettok_video.yaml"))
    assert (config.steps, config.side, config.num_tokens) == (5, 32, (256, 1024))
    assert (config.hidden_size, config.spatial_layers, config.temporal_layers) == (512, 8, 4)
    assert (config.adjectives + config.nouns, config.adverbs, config.verbs) == (10481, 1872, 9267)
    assert config.temporal_after == [1, 3, 5, 7] and len(config.windowed_layers) == 2
    with torch.device("meta"):
        model = VideoTokenizer(config)
        out = model(torch.zeros(1, 3, 17, 256, 256))
    assert out.codes.spatial.shape == (1, 256, 3) and out.codes.temporal.shape == (1, 1024, 3)
    assert [codes.numel() for codes in out.codes] == [768, 3072]
    assert out.reconstruction.shape == (1, 3, 17, 256, 256)
    assert model.patches.tube.weight.shape == (512, 4 * 8 * 8 * 3)
    assert model.spatial.queries.queries.shape == (256, 512)
    assert model.temporal.queries.shape == (1024, 512)
    assert VideoTokenizerConfig().num_tokens == (256, 1024)


@pytest.mark.slow
def test_a_clip_of_the_published_size():
    torch.manual_seed(0)
    config = VideoTokenizerConfig(**read_yaml("configs/tokenizer/sweettok_video.yaml"))
    model = VideoTokenizer(config).eval()
    clip = torch.rand(1, 3, 17, 256, 256) * 2 - 1
    codes = model.encode(clip)
    assert [part.shape[1:] for part in codes] == [(256, 3), (1024, 3)]
    assert model.decode(codes).shape == clip.shape
    changes = inputs_of(model.temporal, model, clip[:, :, :1].repeat(1, 1, 17, 1, 1))
    assert changes.shape == (1, 4, 1024, 512) and not changes.any()


def test_patches_of_a_clip():
    """Tube values are those of its pixels in the order (channel, frame, row, column)."""
    model, clip = build(), moving_clip()
    tubes = model.patches.tubes(clip)
    assert tubes.shape == (2, 5, 16, 3 * 2 * 8 * 8)
    step, row, column = 2, 1, 3
    frames = slice(1 + 2 * (step - 1), 1 + 2 * step)
    expected = clip[:, :, frames, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8].flatten(1)
    assert torch.equal(tubes[:, step, 4 * row + column], expected)
    first = clip[:, :, 0, 8:16, 24:32]
    assert torch.equal(tubes[:, 0, 7], torch.stack([first, first], dim=2).flatten(1))


def test_pixels_of_a_patch_fill_it():
    head = build(pixel_layers=0).pixels
    with torch.no_grad():
        for layer in (head.first, head.tube):
            layer.weight.zero_()
            layer.bias.copy_(torch.arange(len(layer.bias)))
        clip = head(torch.zeros(1, 5, 16, 32))
    assert clip.shape == (1, 3, 9, 32, 32)
    assert torch.equal(clip[0, :, 0, 8:16, 24:32], torch.arange(192.0).view(3, 8, 8))
    assert torch.equal(clip[0, :, 3:5, 8:16, 24:32], torch.arange(384.0).view(3, 2, 8, 8))


# ---- what each path sees ---------------------------------------------------------------------------------


def test_a_still_clip_has_no_motion_at_all():
    model = build()
    assert not inputs_of(model.temporal, model, still_clip()).any()  # exactly 0
    assert inputs_of(model.temporal, model, moving_clip()).any()
    # so that its motion tokens are those of every other still clip
    first, second = model.encode(still_clip(0)), model.encode(still_clip(5))
    assert torch.equal(first.temporal, second.temporal) and not torch.equal(first.spatial, second.spatial)


def test_with_weights_of_its_own_the_first_frame_differs_from_a_tube_of_it():
    model = build(first_frame="own")
    changes = inputs_of(model.temporal, model, still_clip())
    assert changes[:, 0].any()
    torch.testing.assert_close(changes[:, 1:], torch.zeros_like(changes[:, 1:]), atol=1e-5, rtol=0)


def test_changes_are_differences_of_embeddings():
    model = build()
    tokens, changes = model.patches(moving_clip())
    torch.testing.assert_close(changes, tokens[:, 1:] - tokens[:, :-1], atol=1e-5, rtol=0)


def test_the_order_of_steps_is_motion_and_no_appearance():
    model, clip = build(), moving_clip()
    order = torch.tensor([0, 5, 6, 1, 2, 7, 8, 3, 4])  # tubes are kept whole
    tokens, shuffled = model.patches(clip)[0], model.patches(clip[:, :, order])[0]
    torch.testing.assert_close(model.spatial(shuffled), model.spatial(tokens), atol=1e-4, rtol=1e-4)
    first, second = model.encode(clip), model.encode(clip[:, :, order])
    assert torch.equal(first.spatial, second.spatial) and not torch.equal(first.temporal, second.temporal)


def test_appearance_may_be_that_of_the_first_frame():
    model, clip = build(spatial_input="first"), moving_clip()
    assert torch.equal(model.encode(clip).spatial, model.encode(still_clip()).spatial)
    assert not torch.equal(build().encode(clip).spatial, build().encode(still_clip()).spatial)


def test_motion_of_a_place_is_its_own_and_causal():
    model, clip = build(), moving_clip()
    changed = clip.clone()
    changed[:, :, 7:, 24:, 24:] *= -1  # the last tube of place 15
    before, after = (model.temporal(model.patches(x)[1]) for x in (clip, changed))
    moved = (before - after).abs().amax(dim=(0, 2)) > 1e-6
    assert moved.tolist() == [False] * 15 + [True]
    blocks = model.temporal.blocks
    hidden = torch.randn(3, 4, 32, generator=torch.Generator().manual_seed(1))
    later = hidden.clone()
    later[:, 3] += 1
    found, other = blocks[0](hidden), blocks[0](later)
    assert torch.equal(found[:, :3], other[:, :3]) and not torch.equal(found[:, 3], other[:, 3])


def test_windows_see_no_other_window():
    path = build().spatial
    block, hidden = path.blocks[1], torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(0))
    changed = hidden.clone()
    changed[:, 5] *= -1  # row 1, column 1: in the window of places 0, 1, 4, 5
    found, other = path._within_windows(block, hidden), path._within_windows(block, changed)
    moved = (found - other).abs().amax(dim=(0, 2)) > 1e-6
    assert moved.nonzero().flatten().tolist() == [0, 1, 4, 5]
    # a window is the block on its own places
    torch.testing.assert_close(found[:, [0, 1, 4, 5]], block(hidden[:, [0, 1, 4, 5]]), atol=1e-5, rtol=0)


# ---- codes -----------------------------------------------------------------------------------------------


def test_decoded_codes_are_the_quantised_forward_pass():
    model = build()
    with torch.no_grad():
        out = model(moving_clip())
    codes = model.encode(moving_clip())
    assert all(torch.equal(a, b) for a, b in zip(out.codes, codes))
    torch.testing.assert_close(model.decode(codes), out.reconstruction.clamp(-1, 1), atol=1e-4, rtol=0)


def test_stored_codes_keep_the_three_words_of_a_token_together():
    """Rows (N, 3): both adjectives of a token are averaged with each other, as in the forward pass."""
    model = build()
    codes = model.encode(moving_clip())
    stored = [part.reshape(-1, 3).to(torch.int16) for part in codes]
    again = VideoCodes(*(part.long().view(2, -1, 3) for part in stored))
    assert torch.equal(model.decode(again), model.decode(codes))
    rows, first = model.spatial_quantizer.map(), codes.spatial[0, 1]
    expected = torch.cat([(rows[first[0]] + rows[first[1]]) / 2, rows[40 + first[2]]])
    torch.testing.assert_close(model.spatial_quantizer.embed(codes.spatial)[0, 1], expected)
    # the published pairing, first all first adjectives and then all second ones, gives other latents
    flat = codes.spatial[0, :, :2].flatten().view(2, -1)
    wrong = torch.cat([flat.T, codes.spatial[0, :, 2:]], dim=1)
    assert not torch.equal(wrong, codes.spatial[0])


def test_permuted_words_permute_codes_and_change_nothing_else():
    model, clip = build(), moving_clip()
    order = torch.randperm(40, generator=torch.Generator().manual_seed(3))
    plain = words(40, 30, 3)
    new_number = torch.cat([order.argsort(), torch.arange(40, 70)])
    vectors = plain.vectors[torch.cat([order, torch.arange(40, 70)])]
    moved = plain._replace(vectors=vectors, edges=new_number[plain.edges])
    codes, shown = model.encode(clip), model.decode(model.encode(clip))
    model.set_words(moved, words(20, 50, 2))
    again = model.encode(clip)
    assert torch.equal(again.spatial[..., :2], new_number[codes.spatial[..., :2]])
    assert torch.equal(again.spatial[..., 2], codes.spatial[..., 2])
    assert torch.equal(again.temporal, codes.temporal)
    torch.testing.assert_close(model.decode(again), shown, atol=1e-5, rtol=0)


def test_frozen_maps_keep_all_rows_and_training_moves_them_together():
    model = build()
    rows = model.spatial_quantizer.map().clone()
    for quantizer in (model.spatial_quantizer, model.temporal_quantizer):
        quantizer.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()(moving_clip()).reconstruction.square().mean().backward()
    optimizer.step()
    assert torch.equal(model.eval().spatial_quantizer.map(), rows)


def test_appearance_and_motion_both_reach_the_pixels():
    model = build()
    codes = model.encode(moving_clip())
    shown = model.decode(codes)
    for name in VideoCodes._fields:
        part = getattr(codes, name).clone()
        part[:, 0, 2] = (part[:, 0, 2] + 1) % 30
        difference = (model.decode(codes._replace(**{name: part})) - shown).abs()
        assert difference.amax(dim=(0, 1, 3, 4)).gt(0).all(), name  # of every frame


def test_every_parameter_learns_and_the_loss_falls(tmp_path):
    model = build().train()
    clip = moving_clip()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-4)
    losses = []
    for step in range(8):
        out = model(clip)
        loss = (out.reconstruction - clip).square().mean() + out.losses["vq"]
        optimizer.zero_grad()
        loss.backward()
        for name, parameter in model.named_parameters() if step == 0 else ():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
            assert parameter.grad.any(), name
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert model.spatial_quantizer.calls == 8 and 0 < model.spatial_quantizer.usage[0].sum() <= 1.001
    model.eval().save_pretrained(tmp_path)
    again = VideoTokenizer.from_pretrained(tmp_path)
    assert again.config.num_tokens == model.config.num_tokens and again.config.map_hidden == 12
    codes = model.encode(clip)
    assert all(torch.equal(a, b) for a, b in zip(again.encode(clip), codes))
    assert torch.equal(again.decode(codes), model.decode(codes))


def test_the_codes_of_another_tokenizer_may_be_the_target():
    """Published stages: cross-entropy, then the softmax-weighted rows to a pixel head, all else frozen."""
    model = build(proxy_codes=11, proxy_dim=4).train()
    rows = torch.randn(11, 4, generator=torch.Generator().manual_seed(0))
    model.set_proxy_rows(rows)
    target = torch.randint(0, 11, (2, 5, 16), generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(6):
        out = model(moving_clip(), target)
        optimizer.zero_grad()
        (out.losses["proxy"] + out.losses["vq"]).backward()
        optimizer.step()
        losses.append(out.losses["proxy"].item())
    assert out.proxy_logits.shape == (2, 5, 16, 11) and losses[-1] < losses[0]
    by_hand = torch.nn.functional.cross_entropy(out.proxy_logits.movedim(-1, 1), target)
    torch.testing.assert_close(by_hand, out.losses["proxy"])
    model.freeze_for_pixels()
    trained = {name.partition(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"pixels", "proxy"} and not model.proxy.to_logits.weight.requires_grad
    model.zero_grad()
    first, second = (model(moving_clip()) for _ in range(2))  # no dropout in the frozen map
    assert torch.equal(first.codes.spatial, second.codes.spatial)
    (first.reconstruction - moving_clip()).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    with pytest.raises(UserError, match=r"Rows of shape \(11, 5\); the config has \(11, 4\)"):
        model.set_proxy_rows(torch.zeros(11, 5))
    with pytest.raises(UserError, match="the config has proxy_codes = 0"):
        build()(moving_clip(), target)


# ---- wrong input -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_frames": 8}, "num_frames = 8: must be 1 more than a multiple of tube_frames = 2"),
        ({"num_frames": 1}, "num_frames = 1: must be 1 more"),
        ({"image_size": 30}, "image_size = 30 is not a multiple of patch_size = 8"),
        ({"num_attention_heads": 3}, "hidden_size = 32 is not a multiple of num_attention_heads = 3"),
        ({"spatial_queries": 0}, "spatial_queries = 0: must be at least 1"),
        ({"windowed_layers": [3]}, r"windowed_layers = \[3\]: expected distinct layers from 0 to 2"),
        ({"window_size": 3}, "window_size = 3 does not divide the 4 patches of a row"),
        ({"temporal_after": [0]}, r"temporal_after = \[0\]: expected distinct layers from 1 to 3"),
        ({"temporal_after": []}, "without a temporal layer no motion reaches the pixels"),
        ({"spatial_input": "last"}, "spatial_input = 'last': must be mean or first"),
        ({"first_frame": "none"}, "first_frame = 'none': must be shared or own"),
        ({"spatial_querys": 4}, "no field 'spatial_querys'.*spatial_queries"),
        ({"codebook_dim": 15}, "codebook_dim is 15: .* cuts it into two halves"),
    ],
)
def test_wrong_configs_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        VideoTokenizer(VideoTokenizerConfig(**{**TINY, **changes}))


def test_wrong_clips_codes_and_words_are_named():
    model, clip = build(), moving_clip()
    codes = model.encode(clip)
    for wrong in (clip[:, :, :8], clip[0], clip[:, :1], (clip * 127).to(torch.uint8), clip[..., :24]):
        with pytest.raises(UserError, match=r"expected floats in \[-1, 1\] of shape \(clips, 3, 9, 32, 32\)"):
            model.encode(wrong)
    for wrong, message in (
        (codes._replace(spatial=codes.temporal), r"spatial codes have shape .* expected \(clips, 6, 3\)"),
        (codes._replace(temporal=codes.temporal.flatten(1)), "temporal codes have shape"),
        (codes._replace(temporal=codes.temporal[:1]), "temporal codes have shape"),
        (codes._replace(spatial=codes.spatial + 35), r"spatial codes must be .* less than \[40, 40, 30\]"),
        (codes._replace(temporal=codes.temporal - 60), "temporal codes must be 0 or more"),
    ):
        with pytest.raises(UserError, match=message):
            model.decode(wrong)
    with pytest.raises(UserError, match=r"Word lists of \[30, 40\] words, but the config has \[40, 30\]"):
        model.set_words(words(30, 40, 3), words(20, 50, 2))
