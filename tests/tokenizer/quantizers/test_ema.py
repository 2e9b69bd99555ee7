"""VQ-KD's moving-average codebook and its cluster variant: published steps, k-means; the rotation trick."""

import json

import pytest
import torch
from safetensors.torch import load_file

from open_unitok.core.errors import UserError
from open_unitok.tokenizer.quantizers import QUANTIZERS
from open_unitok.tokenizer.quantizers.base import pass_through
from open_unitok.tokenizer.quantizers.cluster import keep_share
from open_unitok.tokenizer.quantizers.kmeans import kmeans

EMA_CASES = ["ema", "ema_books", "ema_decay", "ema_zero", "first_step", "first_step_books", "evaluation"]


@pytest.fixture(scope="module")
def vectors(golden):
    tensors = load_file(golden / "quantizers" / "vqkd.safetensors")
    return tensors, json.loads((golden / "quantizers" / "vqkd.meta.json").read_text())["cases"]


def near(found, expected, relative):
    """Differences are measured against the largest magnitude of the tensor."""
    torch.testing.assert_close(found, expected.to(found), rtol=0, atol=relative * expected.abs().max().item())


@pytest.mark.parametrize("case", EMA_CASES)
def test_published_steps(vectors, case):
    tensors, meta = vectors[0], vectors[1][case]
    settings = meta["settings"]
    rows = tensors[f"{case}.codebooks"]
    quantizer = QUANTIZERS["ema"](*rows.shape, decay=settings["decay"])
    quantizer.codebooks.data = rows.clone()
    quantizer.train(settings["training"])
    for step in range(settings["steps"]):
        name = f"{case}.{step}"
        latents = tensors[f"{name}.latents"]
        if settings["kmeans_iterations"] and not quantizer.started:
            quantizer.start_kmeans(latents.flatten(0, 1), tensors[f"{case}.kmeans_indices"])
        before = {key: value.clone() for key, value in quantizer.state_dict().items()}

        def run(wanted, latents=latents, name=name, before=before):
            quantizer.load_state_dict(before)
            leaf = latents.clone().requires_grad_()
            out = quantizer(leaf)
            parts = {
                "out": (tensors[f"{name}.cotangent"] * out.quantised).sum(),
                "commitment": out.losses["vq"],
            }
            parts["total"] = parts["out"] + parts["commitment"]
            parts[wanted].backward()
            near(leaf.grad, tensors[f"{name}.grad_latents.{wanted}"], 2e-5)
            return out

        for wanted in ("out", "commitment", "total"):
            out = run(wanted)
        assert torch.equal(out.codes, tensors[f"{name}.codes"])
        near(out.quantised.detach(), tensors[f"{name}.quantised"], 3e-6)
        near(quantizer.codebooks.detach(), tensors[f"{name}.codebooks_after"], 3e-6)
        expected = meta["scalars"][f"{step}.commitment"]["float32"]
        assert out.losses["vq"].item() == pytest.approx(expected, rel=1e-5, abs=5e-6)
        assert quantizer.codebooks.grad is None


def test_nothing_moves_in_evaluation_or_when_frozen(vectors):
    rows, latents = vectors[0]["ema.codebooks"], vectors[0]["ema.0.latents"]
    for frozen, training in ((False, False), (True, True)):
        quantizer = QUANTIZERS["ema"](*rows.shape)
        quantizer.codebooks.data = rows.clone()
        quantizer.train(training).frozen = frozen
        quantizer(latents)
        assert torch.equal(quantizer.codebooks, rows)


def test_two_halves_of_a_batch_move_the_rows_as_the_whole(vectors):
    """What two processes do: sums and counts are averaged over them."""
    tensors = vectors[0]
    rows, latents = tensors["ema.codebooks"], tensors["ema.0.latents"]
    whole = QUANTIZERS["ema"](*rows.shape)
    whole.codebooks.data = rows.clone()
    whole(latents)
    halves = [QUANTIZERS["ema"](*rows.shape) for _ in range(2)]
    seen = [[], []]
    for half, sent, part in zip(halves, seen, latents.split(1)):
        half.codebooks.data = rows.clone()
        half.average_over_ranks = lambda tensor, sent=sent: sent.append(tensor.clone()) or tensor
        half(part)
    means = [(a + b) / 2 for a, b in zip(*seen)]
    for half, part in zip(halves, latents.split(1)):
        half.codebooks.data = rows.clone()
        left = iter(means)
        half.average_over_ranks = lambda _, left=left: next(left)
        half(part)
        torch.testing.assert_close(half.codebooks, whole.codebooks, rtol=0, atol=1e-6)


def test_kmeans(vectors):
    tensors = vectors[0]
    given = (tensors["kmeans.features"], tensors["kmeans.codebook"], tensors["kmeans.indices"])
    cosine = []
    for iterations in (1, 2, 10):
        rows = kmeans(*given, iterations)
        near(rows, tensors[f"kmeans.codebook_after_{iterations}"], 3e-6)
        unit = torch.nn.functional.normalize(given[0], dim=-1)
        cosine.append((unit @ rows.T).max(dim=-1).values.mean().item())
    expected = vectors[1]["kmeans"]["measured"]["mean_cosine_to_nearest_row_after"]
    assert cosine == pytest.approx(expected, abs=1e-5) and cosine == sorted(cosine)
    few = kmeans(
        tensors["kmeans_few.features"], tensors["kmeans_few.codebook"], torch.empty(0, dtype=torch.int64)
    )
    near(few, torch.nn.functional.normalize(tensors["kmeans_few.codebook_after"], dim=-1), 3e-6)


def test_the_start_is_saved(tmp_path, tiny_config):
    from open_unitok.tokenizer import UniTok

    model = UniTok(tiny_config(quantizer="ema"))
    assert not model.quantizer.started
    latents = torch.randn(200, model.quantizer.latent_dim)
    indices = torch.stack([torch.randperm(200)[:64] for _ in model.quantizer.code_sizes])
    model.quantizer.start_kmeans(latents, indices)
    model.save_pretrained(tmp_path)
    loaded = UniTok.from_pretrained(tmp_path)
    assert loaded.quantizer.started and torch.equal(loaded.quantizer.codebooks, model.quantizer.codebooks)
    assert not loaded.quantizer.codebooks.requires_grad


def test_decay_zero_makes_rows_the_unit_mean_of_their_members():
    torch.manual_seed(0)
    quantizer = QUANTIZERS["ema"](1, 8, 4, decay=0.0)
    latents = torch.randn(2, 30, 4)
    before = torch.nn.functional.normalize(quantizer.codebooks[0], dim=-1).clone()
    codes = quantizer(latents).codes.flatten()
    unit = torch.nn.functional.normalize(latents.flatten(0, 1), dim=-1)
    for entry in range(8):
        members = unit[codes == entry]
        wanted = torch.nn.functional.normalize(members.mean(0), dim=-1) if len(members) else before[entry]
        torch.testing.assert_close(quantizer.codebooks[0, entry], wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("case", ["cluster", "cluster_given"])
def test_published_steps_of_clustering(vectors, case):
    tensors, meta = vectors[0], vectors[1][case]
    rows = tensors[f"{case}.codebook"][None]
    quantizer = QUANTIZERS["cluster"](
        *rows.shape, decay=meta["settings"]["decay"], eps=meta["settings"]["eps"]
    )
    quantizer.codebooks.data = rows.clone()
    move = quantizer.move_rows
    for step in range(meta["settings"]["steps"]):
        name = f"{case}.{step}"
        features = tensors[f"{name}.features"]
        anchors = features.flatten(0, 1)[tensors[f"{name}.anchors"]][None]
        if case == "cluster":
            # the nearest feature of the batch
            assert torch.equal(quantizer._anchors(features.unsqueeze(2)), anchors)
        else:
            quantizer.move_rows = lambda f, c, anchors=anchors: move(f, c, anchors)
        out = quantizer(features)
        assert torch.equal(out.codes[..., 0], tensors[f"{name}.codes"])
        near(quantizer.probability[0], tensors[f"{name}.probability_after"], 3e-6)
        near(quantizer.codebooks.detach()[0], tensors[f"{name}.codebook_after"], 3e-6)
        expected = meta["scalars"][f"{step}.codebook"]["float32"]
        assert out.losses["vq"].item() == pytest.approx(expected, rel=1e-5, abs=5e-6)
        quantizer.codebooks.grad = None
        out.losses["vq"].backward()
        near(quantizer.codebooks.grad[0], tensors[f"{name}.grad_codebook"], 2e-5)
        assert torch.equal(out.quantised.detach(), quantizer.embed(out.codes).detach())


def test_anchors_of_all_processes():
    torch.manual_seed(0)
    quantizer = QUANTIZERS["cluster"](2, 12, 4)
    features = torch.randn(4, 10, 2, 4)
    whole = quantizer._anchors(features)
    parts, sent = features.split(2), [[], []]
    for part, seen in zip(parts, sent):
        quantizer.gather_over_ranks = lambda tensor, seen=seen: seen.append(tensor) or tensor
        quantizer._anchors(part)
    gathered = iter([torch.cat(pair) for pair in zip(*sent)])
    quantizer.gather_over_ranks = lambda _: next(gathered)
    assert torch.equal(quantizer._anchors(parts[0]), whole)


def test_law_of_decay(vectors):
    tensors, settings = vectors[0], vectors[1]["decay_law"]["settings"]
    arguments = (settings["V"], settings["decay"], settings["eps"])
    found = keep_share(tensors["decay_law.probability"], *arguments)
    torch.testing.assert_close(found.float(), tensors["decay_law.keep_float32"].float(), rtol=0, atol=2e-6)
    exact = keep_share(tensors["decay_law.probability"].double(), *arguments)
    torch.testing.assert_close(exact, tensors["decay_law.keep_float64"].double(), rtol=1e-6, atol=1e-7)
    # a row without hits keeps .0999 %
    assert keep_share(torch.zeros(1), 64, 0.99, 1e-3).item() == pytest.approx(0.0009995, abs=1e-6)


def test_rotation_trick(golden):
    tensors = load_file(golden / "quantizers" / "rotation_trick.safetensors")
    latents = tensors["vq.z"].clone().requires_grad_()
    value = pass_through(latents, tensors["vq.out.picked"], "rotation")
    near(value.detach(), tensors["vq.rotation_trick.value"], 3e-6)
    (value * tensors["vq.probe"]).sum().backward()
    near(latents.grad, tensors["vq.rotation_trick.grad_z"], 2e-5)


@pytest.mark.parametrize("name", ["multi_codebook", "nearest", "ema"])
def test_every_kind_that_passes_gradients_takes_either_rule(name):
    torch.manual_seed(0)
    latents = torch.randn(2, 6, 12)
    found = {}
    for gradient in ("straight_through", "rotation"):
        torch.manual_seed(1)
        quantizer = QUANTIZERS[name](3, 16, 4, gradient=gradient).eval()
        leaf = latents.clone().requires_grad_()
        out = quantizer(leaf).quantised
        (out * torch.arange(12.0)).sum().backward()
        found[gradient] = (out.detach(), leaf.grad)
    torch.testing.assert_close(found["rotation"][0], found["straight_through"][0], rtol=0, atol=1e-6)
    assert (found["rotation"][1] - found["straight_through"][1]).abs().max() > 1e-3
    with pytest.raises(UserError, match="gradient is 'turn': it must be straight_through or rotation"):
        QUANTIZERS[name](3, 16, 4, gradient="turn")


@pytest.mark.parametrize("name", ["ema", "cluster"])
def test_bad_options(name):
    with pytest.raises(UserError, match=r"quantizer_options\.decay is 1.0: it must be from 0 to below 1"):
        QUANTIZERS[name](1, 8, 4, decay=1.0)
    with pytest.raises(UserError, match=f"quantizer '{name}' has no entropy loss"):
        QUANTIZERS[name](1, 8, 4)(torch.randn(1, 4, 4), entropy=True)


def test_clustering_with_an_encoder_that_learns():
    """CVQ-VAE's case: the codes and rows of the frozen case, and a gradient to the latents."""
    latents = torch.randn(2, 6, 8, requires_grad=True)
    outputs = []
    for options in ({}, {"gradient": "straight_through", "commitment": 0.25}):
        torch.manual_seed(0)
        quantizer = QUANTIZERS["cluster"](2, 12, 4, **options)
        outputs.append(quantizer(latents))
    plain, learning = outputs
    assert torch.equal(plain.codes, learning.codes)
    torch.testing.assert_close(plain.quantised, learning.quantised)
    assert learning.losses["vq"].item() == pytest.approx(1.25 * plain.losses["vq"].item(), rel=1e-5)
    (learning.quantised.sum() + 0 * learning.losses["vq"]).backward()
    torch.testing.assert_close(latents.grad, torch.ones_like(latents))
    with pytest.raises(UserError, match="needs an encoder that learns"):
        QUANTIZERS["cluster"](2, 12, 4, commitment=0.25)
