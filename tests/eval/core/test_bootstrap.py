"""Bootstrap intervals: width as theory has it, clusters, ratios of sums, degenerate sets."""

import numpy as np
import pytest

from open_unitok.eval.core.bootstrap import bootstrap, by_group, f1_of, mean_of_groups, with_ones


def test_width_of_a_mean_is_that_of_the_normal_law():
    values = (np.arange(2000) % 10 < 7).astype(float)
    low, high = bootstrap(with_ones(values))
    assert (low + high) / 2 == pytest.approx(0.7, abs=0.005)
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(0.7 * 0.3 / 2000), rel=0.12)


def test_clusters_widen_the_interval_as_many_equal_answers_do():
    values = np.repeat((np.arange(200) % 2).astype(float), 10)
    alone = bootstrap(with_ones(values))
    clustered = bootstrap(with_ones(values), np.repeat(np.arange(200), 10).tolist())
    assert (clustered[1] - clustered[0]) / (alone[1] - alone[0]) == pytest.approx(np.sqrt(10), rel=0.15)


def test_same_samples_in_another_order_of_clusters_give_nearly_the_same():
    values = with_ones(np.random.default_rng(0).random(300))
    assert bootstrap(values) == bootstrap(values)
    assert bootstrap(values) == pytest.approx(bootstrap(values[::-1]), abs=0.01)


def test_f1_and_groups():
    columns = np.array([[1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]], float)
    assert f1_of(columns.sum(axis=0)) == pytest.approx(2 / 3)
    pairs = by_group([1.0, 0.0, 1.0], ["a", "a", "b"])
    assert mean_of_groups(pairs.sum(axis=0)) == pytest.approx(0.75)
    low, high = bootstrap(pairs, statistic=mean_of_groups)
    assert 0 <= low < high <= 1


def test_one_cluster_has_no_interval():
    assert bootstrap(with_ones([1.0, 0.0]), ["a", "a"]) is None
    assert bootstrap(with_ones([0.5])) is None
