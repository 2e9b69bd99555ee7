"""Class-conditional ImageNet as measured by ADM: sFID of given features, and its evaluator's file."""

import tracemalloc

import numpy as np
import pytest

from open_unitok.core.errors import UserError
from open_unitok.eval.core.image_sets import ImageSet
from open_unitok.eval.metrics.adm_samples import write_adm_samples

from ..generation.test_generated_images import quick_net, random_image, result_of

assert quick_net  # a fixture


def test_sfid_is_the_distance_of_the_spatial_features(call, quick_net, tmp_path):
    """Expected: |m - n|^2 + tr(S + T - 2 (S T)^1/2) of 7 spatial features, with scipy's root."""
    import scipy.linalg

    random, data = np.random.default_rng(0), tmp_path / "data"
    data.mkdir()
    images = random.integers(0, 255, (60, 8, 8, 3), np.uint8)
    mean, root = random.normal(100, 20, 7), random.normal(0, 30, (7, 7))
    other = {"mu": np.zeros(12), "sigma": np.eye(12), "mu_s": mean, "sigma_s": root @ root.T}
    np.savez(data / "VIRTUAL_imagenet256_labeled.npz", **other)
    np.savez(tmp_path / "samples.npz", arr_0=images)
    words = ("imagenet_generation", "--data", data, "--inception-weights", quick_net, "--limit", 60)
    code, _, err = call("eval", "run", *words, "--model", tmp_path / "samples.npz", "--out", tmp_path)
    assert code == 0, err
    x = images[:, :2, :2].reshape(60, 12)[:, :7].astype(np.float64)  # the quick net's spatial features
    s = np.cov(x, rowvar=False)
    product = scipy.linalg.sqrtm(s @ other["sigma_s"]).real
    expected = ((x.mean(0) - mean) ** 2).sum() + np.trace(s + other["sigma_s"] - 2 * product)
    sfid = result_of(tmp_path, "imagenet_generation")["metrics"]["sfid"]
    assert sfid["value"] == pytest.approx(expected, rel=1e-6) and sfid["interval"] is None and sfid["n"] == 60


def test_adm_samples_file(tmp_path):
    def load(i):
        if i == 3:
            raise UserError("broken")
        return random_image("x", i, 8 if i == 5 else 64)

    images = ImageSet("samples", [str(i) for i in range(300)], load)
    path = tmp_path / "submission" / "samples.npz"
    tracemalloc.start()
    assert write_adm_samples(images, path) == 298
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 298 * 64 * 64 * 3 / 8  # never all images at once
    with np.load(path) as file:
        found = file["arr_0"]
    order = [i for i in np.random.RandomState(2020).permutation(300) if i not in (3, 5)]
    assert found.dtype == np.uint8 and found.shape == (298, 64, 64, 3)
    assert all(np.array_equal(a, load(i)) for a, i in zip(found, order))
    time = path.stat().st_mtime_ns
    assert write_adm_samples(images, path) == 298 and path.stat().st_mtime_ns == time
    assert write_adm_samples(ImageSet("samples", ["other"], load), path) == 1
    path.write_bytes(b"half a file")
    assert write_adm_samples(images, path) == 298
    assert write_adm_samples(ImageSet("samples", ["0"], lambda i: load(3)), tmp_path / "none.npz") == 0
