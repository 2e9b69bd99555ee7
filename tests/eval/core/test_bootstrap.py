"""Bootstrap intervals: width as theory has it, clusters, ratios of sums, degenerate sets."""

import numpy as np
import pytest

from open_unitok.eval.core.bootstrap import (
    bootstrap,
    f1_statistic,
    group_mean_columns,
    group_mean_statistic,
    mean_columns,
)


def test_width_of_a_mean_is_that_of_the_normal_law():
    values = (np.arange(2000) % 10 < 7).astype(float)
    low, high = bootstrap(mean_columns(values))
    assert (low + high) / 2 == pytest.approx(0.7, abs=0.005)
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(0.7 * 0.3 / 2000), rel=0.12)


def test_clusters_widen_the_interval_as_many_equal_answers_do():
    values = np.repeat((np.arange(200) % 2).astype(float), 10)
    alone = bootstrap(mean_columns(values))
    clustered = bootstrap(mean_columns(values), np.repeat(np.arange(200), 10).tolist())
    assert (clustered[1] - clustered[0]) / (alone[1] - alone[0]) == pytest.approx(np.sqrt(10), rel=0.15)


def test_same_samples_in_another_order_of_clusters_give_nearly_the_same():
    values = mean_columns(np.random.default_rng(0).random(300))
    assert bootstrap(values) == bootstrap(values)
    assert bootstrap(values) == pytest.approx(bootstrap(values[::-1]), abs=0.01)


def test_f1_and_groups():
    columns = np.array([[1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]], float)
    assert f1_statistic(columns.sum(axis=0)) == pytest.approx(2 / 3)
    pairs = group_mean_columns([1.0, 0.0, 1.0], ["a", "a", "b"])
    assert group_mean_statistic(pairs.sum(axis=0)) == pytest.approx(0.75)
    low, high = bootstrap(pairs, statistic=group_mean_statistic)
    assert 0 <= low < high <= 1


def test_one_cluster_has_no_interval():
    assert bootstrap(mean_columns([1.0, 0.0]), ["a", "a"]) is None
    assert bootstrap(mean_columns([0.5])) is None
