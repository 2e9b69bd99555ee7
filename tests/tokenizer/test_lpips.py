"""LPIPS against the published loss, and its weight file."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from open_unitok.core.errors import UserError
from open_unitok.tokenizer.frozen.lpips import LPIPS, layer_distance

SEED = 20250


@pytest.fixture(scope="module")
def model(formula):
    lpips = LPIPS()
    lpips.load_state_dict({n: formula(f"lpips.{n}", t.shape, SEED) for n, t in lpips.state_dict().items()})
    return lpips


def test_golden_value_and_gradient(model, golden):
    values = load_file(golden / "losses" / "losses.outputs.safetensors")
    numbers = json.loads((golden / "losses" / "losses.meta.json").read_text())
    reconstruction = values["lpips.rec"].clone().requires_grad_()
    layers = model.by_layer(values["lpips.inp"], reconstruction)
    assert layers.mean(dim=0).tolist() == pytest.approx(numbers["lpips.per_layer"], abs=1e-6)
    layers.sum(dim=1).mean().backward()
    assert layers.sum(dim=1).mean().item() == pytest.approx(numbers["lpips.value"], abs=1e-6)
    assert reconstruction.grad.norm().item() == pytest.approx(numbers["lpips.rec_grad_norm"], rel=1e-4)
    assert all(p.grad is None for p in model.parameters())


def test_batch_equals_one_by_one(model, formula):
    first, second = formula("a", (3, 3, 48, 64), 1), formula("b", (3, 3, 48, 64), 1)
    together = model(first, second)
    alone = torch.cat([model(a[None], b[None]) for a, b in zip(first, second)])
    torch.testing.assert_close(together, alone)
    assert model(first, first).abs().max() == 0


def test_names_are_those_of_the_published_file(golden):
    keys = json.loads((golden / "losses" / "loss_nets_keys.json").read_text())
    wanted = next(v for k, v in keys.items() if k.startswith("lpips"))
    with torch.device("meta"):
        found = {name: list(tensor.shape) for name, tensor in LPIPS().state_dict().items()}
    assert found == wanted.get("keys", wanted)


def test_file(model, tmp_path):
    for path in (None, tmp_path, tmp_path / "missing.pth"):
        with pytest.raises(UserError, match=r"lpips_with_vgg\.pth.*huggingface\.co"):
            LPIPS.from_file(path)
    file = tmp_path / "lpips_with_vgg.pth"
    torch.save({"net.slice1.0.weight": torch.zeros(1)}, file)
    with pytest.raises(UserError, match=r"lpips_with_vgg\.pth does not fit LPIPS: .* weights are missing"):
        LPIPS.from_file(tmp_path)
    file.write_bytes(b"no weights")
    with pytest.raises(UserError, match="is not a checkpoint that can be read"):
        LPIPS.from_file(file)
    torch.save(model.state_dict(), file)
    loaded = LPIPS.from_file(tmp_path)
    assert torch.equal(loaded.net["slice5"][1].weight, model.net["slice5"][1].weight)
    assert not any(p.requires_grad for p in loaded.parameters())


def test_distance_of_given_features_equals_the_published_formula(golden):
    numbers = json.loads((golden / "eval" / "metrics.json").read_text())["lpips_formula"]
    arrays = np.load(golden / "eval" / "metrics.npz")
    total = 0.0
    for i, wanted in enumerate(numbers["per_layer"]):
        first, second, weight = (torch.from_numpy(arrays[f"lpips_{k}_{i}"]) for k in ("f0", "f1", "w"))
        found = layer_distance(first, second, weight.view(1, -1, 1, 1))
        assert found.tolist() == pytest.approx(wanted, abs=1e-5)
        total = total + found
    assert torch.as_tensor(total).tolist() == pytest.approx(numbers["distance"], abs=1e-5)
    scaled = (torch.from_numpy(arrays["lpips_scaling_in"]) - LPIPS().shift) / LPIPS().scale
    assert scaled.numpy() == pytest.approx(arrays["lpips_scaling_out"], abs=1e-5)
