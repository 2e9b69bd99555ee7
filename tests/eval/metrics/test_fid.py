"""FID, Inception Score, KID, precision and recall against the published implementations' golden values."""

import json
from pathlib import Path

import numpy as np
import pytest

from open_unitok.core.errors import UserError
from open_unitok.eval.metrics import fid

GOLDEN = Path(__file__).parents[2] / "golden" / "eval"


@pytest.fixture(scope="module")
def expected():
    return json.loads((GOLDEN / "metrics.json").read_text())


@pytest.fixture(scope="module")
def arrays():
    return np.load(GOLDEN / "metrics.npz")


@pytest.mark.parametrize("case", ["a_b", "a_a", "small_n_lt_d", "const_column"])
def test_fid_equals_all_five_implementations(expected, arrays, case):
    row = expected["fid"][case]
    a, b = (fid.compute_moments([arrays[name]]) for name in row["inputs"])
    for name, value in row.items():
        if name != "inputs":
            assert fid.frechet_distance(a, b) == pytest.approx(value, rel=1e-4, abs=1e-6), name
    assert fid.frechet_distance(a, b) >= 0


def test_fid_of_known_gaussians(expected):
    row = expected["fid_closed_form"]
    a, b = (fid.Moments(np.array(row[f"mu{i}"]), np.diag(row[f"var{i}"]), 10) for i in (1, 2))
    assert fid.frechet_distance(a, b) == pytest.approx(row["fid"], rel=1e-9)


def test_moments_are_independent_of_the_batches(arrays):
    x = arrays["fid_a"].astype(np.float64) + 1e4  # far from 0: naive sums suffer cancellation
    whole, parts = fid.compute_moments([x]), fid.compute_moments(np.array_split(x, 7))
    assert parts.covariance == pytest.approx(np.cov(x, rowvar=False), abs=1e-9)
    assert parts.mean == pytest.approx(whole.mean, abs=1e-9) and parts.n == len(x)
    with pytest.raises(UserError, match="at least two images on either side, got 1"):
        fid.compute_moments([x[:1]])
    with pytest.raises(UserError, match="NaN or infinity"):
        fid.compute_moments([np.full((3, 2), np.nan)])
    with pytest.raises(UserError, match="48 and 6 features"):
        fid.frechet_distance(whole, fid.Moments(np.zeros(6), np.eye(6), 9))


@pytest.mark.parametrize(("splits", "shuffle"), [(10, False), (10, True), (1, False), (7, False)])
def test_inception_score_of_torch_fidelity(expected, arrays, splits, shuffle):
    row = expected["inception_score"][f"torch_fidelity_splits{splits}_shuffle{shuffle}_seed2020"]
    mean, deviation = fid.inception_score(arrays["is_logits"], splits, shuffle)
    assert mean == pytest.approx(row["inception_score_mean"], abs=1e-5)
    assert deviation == pytest.approx(row["inception_score_std"], abs=1e-5)


def test_inception_score_of_adm(expected, arrays):
    for block in (5000, 120):
        value = fid.inception_score_adm(arrays["is_logits"], block)
        assert value == pytest.approx(expected["inception_score"][f"adm_split_size_{block}"], abs=1e-5)
    with pytest.raises(UserError, match="10 splits needs at least 10 images, got 3"):
        fid.inception_score(arrays["is_logits"][:3])


def test_kid(expected, arrays):
    a, b = arrays["fid_a"], arrays["fid_b"]
    wanted = expected["kid"]
    assert fid.squared_mmd(a[:350], b) == pytest.approx(
        wanted["unbiased_mmd2_first350_torchmetrics_poly3"], abs=1e-5
    )
    row = wanted["torch_fidelity_subsets10_size100_seed2020"]
    mean, deviation = fid.kid(a, b, 10, 100)
    assert mean == pytest.approx(row["kernel_inception_distance_mean"], abs=1e-5)
    assert deviation == pytest.approx(row["kernel_inception_distance_std"], abs=1e-5)
    with pytest.raises(UserError, match="subsets of 1000"):
        fid.kid(a, b)


def test_precision_and_recall(expected, arrays):
    row = expected["precision_recall_adm_k3"]
    found = fid.precision_recall(arrays["fid_b"], arrays["fid_a"], rows=64)
    assert found.precision == pytest.approx(row["precision_float64"], abs=1e-9)
    assert found.recall == pytest.approx(row["recall_float64"], abs=1e-9)
    row = expected["precision_recall_torch_fidelity_k3"]
    assert tuple(found) == pytest.approx((row["precision"], row["recall"]), abs=0.006)
    with pytest.raises(UserError, match="more than 3 images"):
        fid.precision_recall(arrays["fid_a"][:3], arrays["fid_b"])
