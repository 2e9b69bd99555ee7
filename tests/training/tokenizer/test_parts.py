"""Parts of the tokenizer stage: crops, per-image random numbers, codebooks, EMA, losses."""

import io
import random

import numpy as np
import pytest
import torch
from PIL import Image

from open_unitok.core.errors import UserError
from open_unitok.tokenizer import MultiCodebookQuantizer
from open_unitok.training.core import deepspeed_engine
from open_unitok.training.core.ema import EMA
from open_unitok.training.data import seeding
from open_unitok.training.data.tar_index import scan_tar
from open_unitok.training.tokenizer import losses as tokenizer_losses
from open_unitok.training.tokenizer.config import ImageOptions, LossWeights
from open_unitok.training.tokenizer.data import (
    PairDecoder,
    crop_box,
    order_decoded_first,
    reconstruction_grid,
)
from open_unitok.training.tokenizer.dead_codes import (
    DeadCodes,
    init_codebooks_from_latents,
    usage_and_perplexity,
)


def test_crop_boxes_stay_in_bounds():
    rng = random.Random(0)
    for width, height in ((64, 48), (10, 300), (5, 5)):
        for _ in range(200):
            left, top, w, h = crop_box(width, height, (0.64, 1.0), (0.75, 4 / 3), rng)
            assert 0 <= left <= width - w and 0 <= top <= height - h and w > 0 and h > 0
    boxes = [crop_box(64, 64, (0.9, 1.0), (0.75, 4 / 3), rng) for _ in range(500)]
    shares = [w * h / 64**2 for _, _, w, h in boxes]
    assert 0.88 < min(shares) < 0.92 and max(shares) <= 1.0
    assert crop_box(64, 64, (1.0, 1.0), (1.0, 1.0), rng) == (0, 0, 64, 64)


def test_whole_images_are_not_cropped(data):
    record = scan_tar(str(data / "pairs-0.tar")).samples[0]
    options = ImageOptions(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), captions="json")
    pair = PairDecoder(options, (32, 32), True)(record, random.Random(0))
    assert np.array_equal(pair.image, np.asarray(Image.open(io.BytesIO(record.read("png")))))
    assert pair.caption in record.json()["captions"]
    assert PairDecoder(options, (8, 16), False)(record, random.Random(0)).image.shape == (8, 16, 3)


def test_a_shift_moves_whole_images_and_repeats_edges(data):
    record = scan_tar(str(data / "pairs-0.tar")).samples[0]
    plain = np.asarray(Image.open(io.BytesIO(record.read("png"))))
    options = ImageOptions(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), shift=2)
    decoder, rng = PairDecoder(options, (32, 32), False), random.Random(0)
    rows = {
        (down, right): plain[np.clip(np.arange(32) - down, 0, 31)][:, np.clip(np.arange(32) - right, 0, 31)]
        for down in range(-2, 3)
        for right in range(-2, 3)
    }
    found = set()
    for _ in range(300):  # decoded once, shifted anew each time
        image = decoder(record, rng).image
        found |= {shift for shift, moved in rows.items() if np.array_equal(image, moved)}
    assert found == rows.keys()


def test_a_shift_must_leave_half_of_the_image():
    with pytest.raises(UserError, match=r"images\.shift is -1: it must be 0 or more"):
        ImageOptions(shift=-1).check()
    with pytest.raises(UserError, match=r"images\.shift is 16: it must be less than half"):
        PairDecoder(ImageOptions(shift=16), (64, 32), False)


def test_codebooks_are_initialised_on_latents():
    latents = torch.randn(40, 6)
    for entries in (16, 64):
        quantizer = MultiCodebookQuantizer(2, entries, 3)
        init_codebooks_from_latents(quantizer, latents, seed=0)
        books = quantizer.codebooks
        chunks = torch.nn.functional.normalize(latents.view(40, 2, 3), dim=-1)
        nearest = (books.detach()[1] @ chunks[:, 1].T).max(-1).values
        assert (nearest > 0.95).all()
        assert len(torch.unique(books.detach()[0], dim=0)) == entries


def test_dead_codes_are_reset_to_latents(monkeypatch):
    torch.manual_seed(0)
    quantizer = MultiCodebookQuantizer(2, 8, 3)
    monkeypatch.setattr(
        deepspeed_engine, "overwrite_rows", lambda _, p, rows, values: p.data.__setitem__(rows, values)
    )
    dead_codes = DeadCodes(quantizer, reset_after=2, last_step=6, seed=0)
    latents = torch.randn(4, 5, 6)
    resets = []
    for step in range(1, 13):
        quantizer(latents)
        resets.append(dead_codes.reset_codes(step, None))
    assert resets[0] is None and resets[1] is not None
    assert all(mask is None for mask in resets[6:])  # not after last_step
    chunks = torch.nn.functional.normalize(latents.view(20, 2, 3), dim=-1)
    values = quantizer.codebooks.detach()[resets[1]]
    best = torch.stack([(values @ chunks[:, k].T).max(-1).values for k in (0, 1)]).max(0).values
    assert (best > 0.999).all()
    used, perplexity = usage_and_perplexity(quantizer.usage)
    assert len(used) == 2 and all(0 < u <= 100 for u in used) and all(1 <= p <= 8 for p in perplexity)


def test_ema_updates_and_swaps():
    layer = torch.nn.Linear(2, 2)
    ema = EMA(layer, 0.5)
    before = layer.weight.detach().clone()
    layer.weight.data += 1
    ema.update(1000)
    with ema.applied():
        assert torch.allclose(layer.weight, before + 0.5)
    assert torch.allclose(layer.weight, before + 1)


def test_contrastive_loss_is_clip_loss_by_hand():
    image, text = (torch.nn.functional.normalize(torch.randn(5, 4), dim=-1) for _ in range(2))
    logits = 3.0 * image @ text.T
    want = -(logits.log_softmax(0).diag() + logits.log_softmax(1).diag()).mean() / 2
    found = tokenizer_losses.contrastive_loss(image, text, torch.tensor(3.0))
    torch.testing.assert_close(found, want)


def test_a_weight_of_zero_omits_a_loss():
    weights = LossWeights(lpips=0.0, l1=0.0, clip=0.0).by_name()
    losses = {"l1": torch.tensor(float("inf")), "l2": torch.tensor(2.0), "vq": torch.tensor(3.0)}
    assert tokenizer_losses.weighted_sum(losses, weights) == 5.0


def test_the_same_images_are_decoded_however_a_batch_is_split():
    for count, share, parts in ((16, 0.25, 2), (12, 0.5, 3), (20, 0.3, 2), (8, 1.0, 4)):
        order, decoded = order_decoded_first(count, share)
        assert sorted(order) == list(range(count)) and decoded == count * share
        found = []
        for part in range(parts):
            positions, own = order_decoded_first(count // parts, share)
            found += [part * count // parts + position for position in positions[:own]]
        assert found == order[:decoded]
    assert order_decoded_first(4, 1e-9) == ([0, 1, 2, 3], 1)
    assert order_decoded_first(10, 0.11)[1] == 2  # rounded up


def test_drop_path_noise_belongs_to_the_image():
    one = seeding.uniform_per_sample((2, 3), [4, 9], 0, "drop path", 5)
    assert one.shape == (2, 3, 2) and torch.equal(
        one[..., 1:], seeding.uniform_per_sample((2, 3), [9], 0, "drop path", 5)
    )
    assert not torch.equal(one[..., 0], one[..., 1])


@pytest.mark.parametrize("images", [1, 3, 8, 20])
@pytest.mark.parametrize("decoded", [1, 3, 8, 20])
@pytest.mark.parametrize("columns", [1, 8])
def test_reconstruction_grid_of_any_number_of_images(images, decoded, columns):
    grid = reconstruction_grid(torch.zeros(images, 3, 4, 6), torch.ones(decoded, 3, 4, 6), columns)
    assert grid.shape == (8, 6 * min(images, decoded, columns), 3)
    assert (grid[4:] == 255).all() and (grid[:4] < 255).all()
