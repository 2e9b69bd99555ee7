"""The moving-average codebook by sums and counts: a step, dead rows, k-means, the rotation trick."""

import json

import pytest
import torch
from safetensors.torch import load_file

from open_unitok.core.errors import UserError
from open_unitok.tokenizer.quantizers import QUANTIZERS
from open_unitok.tokenizer.quantizers.kmeans import kmeans_by_distance


@pytest.fixture(scope="module")
def vectors(golden):
    tensors = load_file(golden / "heads" / "gaussian.safetensors")
    own = {name[3:]: tensor for name, tensor in tensors.items() if name.startswith("vq.")}
    return own, json.loads((golden / "heads" / "gaussian.meta.json").read_text())["vq"]


def started(tensors, meta, **options):
    """The quantiser with the vectors' rows and averages, in training."""
    options = {"decay": meta["decay"], "eps": meta["eps"], "dead_below": meta["dead_below"]} | options
    quantizer = QUANTIZERS["nearest_ema"](1, *tensors["rows"].shape, **options).train()
    with torch.no_grad():
        quantizer.codebooks[0] = tensors["rows"]
        quantizer.size[0], quantizer.total[0] = tensors["size"], tensors["total"]
    return quantizer


def test_a_step_equals_the_vectors(vectors):
    tensors, meta = vectors
    quantizer = started(tensors, meta, commitment=1.0)
    z = tensors["z"][None].clone().requires_grad_()  # a batch of one image with 60 tokens
    quantizer._picks = tensors["draws"][None]
    out = quantizer(z)
    assert torch.equal(out.codes[0, :, 0], tensors["out.codes"])
    torch.testing.assert_close(out.quantised[0].double(), tensors["out.picked"], rtol=0, atol=1e-6)
    assert float(out.losses["vq"].detach()) == pytest.approx(meta["commitment_mse"], abs=1e-6)
    for name, found in (("rows", quantizer.codebooks), ("size", quantizer.size), ("total", quantizer.total)):
        torch.testing.assert_close(found[0].double(), tensors[f"out.{name}"], rtol=0, atol=1e-5)
    assert tensors["out.dead"].any()  # so dead rows were replaced
    value = out.quantised[0]
    torch.testing.assert_close(value.double(), tensors["rotation_trick.value"], rtol=0, atol=1e-6)
    (value * tensors["probe"]).sum().backward()
    torch.testing.assert_close(z.grad[0].double(), tensors["rotation_trick.grad_z"], rtol=0, atol=1e-5)


def test_books_are_independent(vectors):
    tensors, meta = vectors
    one, two = started(tensors, meta), QUANTIZERS["nearest_ema"](2, 16, 8).train()
    with torch.no_grad():
        for book in range(2):
            two.codebooks[book], two.size[book] = tensors["rows"], tensors["size"]
            two.total[book] = tensors["total"]
    one._picks = tensors["draws"][None]
    two._picks = torch.stack([tensors["draws"].flip(0), tensors["draws"]])
    z = tensors["z"][None]
    both = two(torch.cat([z.flip(1), z], dim=-1))
    assert torch.equal(both.codes[..., 1:], one(z).codes)
    torch.testing.assert_close(two.codebooks[1], one.codebooks[0])


def test_frozen_and_evaluation_stand_still(vectors):
    tensors, meta = vectors
    quantizer = started(tensors, meta)
    before = {name: tensor.clone() for name, tensor in quantizer.state_dict().items()}
    quantizer.eval()(tensors["z"][None])
    quantizer.train().frozen = True
    quantizer(tensors["z"][None])
    after = quantizer.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in ("codebooks", "size", "total"))


def test_picks_depend_on_the_step_alone(vectors):
    tensors, meta = vectors

    def rows(seed):
        quantizer = started(tensors, meta)
        quantizer.start_step(torch.Generator().manual_seed(seed))
        quantizer(tensors["z"][None])
        return quantizer.codebooks

    assert torch.equal(rows(1), rows(1)) and not torch.equal(rows(1), rows(2))


def test_kmeans_finds_separate_clusters_and_their_sizes():
    generator = torch.Generator().manual_seed(0)
    centres = torch.tensor([[0.0, 0.0], [9.0, 0.0], [0.0, 20.0]])
    features = centres.repeat_interleave(torch.tensor([5, 7, 9]), dim=0)
    features = features + 0.1 * torch.randn(21, 2, generator=generator)
    rows, counts = kmeans_by_distance(features, torch.tensor([0, 6, 15]))
    torch.testing.assert_close(rows, centres, rtol=0, atol=0.2)
    assert counts.tolist() == [5, 7, 9]
    quantizer = QUANTIZERS["nearest_ema"](1, 3, 2)
    quantizer.start_kmeans(features, torch.tensor([[0, 6, 15]]))
    assert quantizer.started and torch.equal(quantizer.size[0], counts)
    torch.testing.assert_close(quantizer.total[0], rows * counts[:, None])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": 1.0}, "quantizer_options.decay is 1.0"),
        ({"dead_below": -1.0}, "quantizer_options.dead_below is -1.0"),
        ({"eps": 0.0}, "quantizer_options.eps is 0.0"),
        ({"gradient": "turn"}, "quantizer_options.gradient is 'turn'"),
    ],
)
def test_options_out_of_range_are_rejected(options, message):
    with pytest.raises(UserError, match=message):
        QUANTIZERS["nearest_ema"](1, 4, 2, **options)
