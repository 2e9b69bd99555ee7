"""The Inception port, the resizes of its variants, and how weights are found, against the golden vectors."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from open_unitok.core.errors import UserError
from open_unitok.eval.metrics import inception

GOLDEN = Path(__file__).parents[2] / "golden" / "eval"


@pytest.fixture(scope="module")
def arrays():
    return np.load(GOLDEN / "metrics.npz")


@pytest.fixture(scope="module")
def golden():
    return json.loads((GOLDEN / "inception.json").read_text()), np.load(GOLDEN / "inception.npz")


def test_port_equals_torch_fidelity(golden, inception_file):
    about, arrays = golden
    names = {name: tuple(shape) for name, shape in about["state_dict"]}
    extract = inception.load_extractor("torch-fidelity", inception_file.parent)
    assert {n: tuple(t.shape) for n, t in extract.net.state_dict().items()} == names
    images = torch.from_numpy(arrays["images"]).float()
    with torch.inference_mode():
        found = extract.net.taps(extract.resize(images))
    for tap in inception.TAPS:
        wanted = arrays[f"feat_{tap}"]
        assert np.abs(found[tap].numpy() - wanted).max() / np.abs(wanted).max() <= 1e-5, tap
    features = extract([i.transpose(1, 2, 0) for i in arrays["images"]])
    assert features.pooled == pytest.approx(arrays["feat_2048"], abs=1e-5)
    assert features.logits == pytest.approx(arrays["feat_logits_unbiased"], abs=1e-5)
    assert features.spatial is None


def test_variants_differ_and_adm_has_what_sfid_needs(golden, inception_file):
    images = [i.transpose(1, 2, 0) for i in golden[1]["images"]]
    other = inception.load_extractor("pytorch-fid", inception_file)(images).pooled
    # these weights barely depend on the image: the resize changes features little, but more than noise
    assert 5e-5 < np.abs(other - golden[1]["feat_2048"]).max() < 1
    adm = inception.load_extractor("adm", inception_file)
    # images of two sizes in one batch keep their order
    mixed = adm([images[0][:50], images[1], images[0]])
    assert mixed.spatial is not None and mixed.spatial.shape == (3, 2023) and (mixed.spatial >= 0).all()
    assert mixed.pooled[1:] == pytest.approx(golden[1]["feat_2048"][::-1], abs=1e-5)


@pytest.mark.parametrize("side", [23, 64])
def test_resizes_equal_the_published_ones(arrays, side):
    image = arrays["img_ref"][0]
    x = inception.stack([image])
    assert np.array_equal(
        inception.resize_tf1(x, side)[0].numpy(), arrays[f"resize_tf1_bilinear_{side}x{side}"]
    )
    clean = inception.resize_clean(image, side)
    assert np.array_equal(clean, arrays[f"resize_clean_pil_bicubic_{side}x{side}"])
    if side == 64:
        torch_way = inception.resize_torch(x / 255, side)[0].numpy()
        assert np.array_equal(torch_way, arrays["resize_torch_bilinear_64x64"])


def test_clean_runs_the_torchscript_file_as_it_is(arrays, tmp_path):
    class Base(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten())

        def forward(self, x):
            return self.layers(x)

    path = tmp_path / "inception-2015-12-05.pt"
    torch.jit.script(Base()).save(str(path))
    image = arrays["img_ref"][0]
    found = inception.load_extractor("clean", tmp_path)([image, image[:30]])
    x = torch.from_numpy(inception.resize_clean(image)).permute(2, 0, 1)
    assert found.pooled[0] == pytest.approx(Base()((x[None] - 128) / 128).numpy()[0], abs=1e-5)
    assert found.pooled.shape == (2, 12) and found.logits is None


def test_wrong_weights_are_named(tmp_path, inception_file):
    with pytest.raises(UserError, match="Did you mean 'clean'"):
        inception.load_extractor("cleen", inception_file)
    with pytest.raises(UserError, match=r"Inception \(clean\) has no weights.*inception-2015-12-05\.pt"):
        inception.load_extractor("clean", None)
    with pytest.raises(UserError, match=r"not clean-fid's torchscript file"):
        inception.load_extractor("clean", inception_file)
    some = torch.load(inception_file)
    some.pop("fc.bias")
    torch.save(some, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"missing \(fc\.bias"):
        inception.load_extractor("adm", tmp_path / "w.pth")
