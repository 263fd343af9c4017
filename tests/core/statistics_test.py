"""Against SciPy, closed forms and loops."""

import numpy as np
import pytest
import scipy.linalg
import scipy.stats

from musicrl_jax.core.statistics import frechet_distance, mean_interval, mean_pairwise_distance


def test_interval_is_scipys_percentile_bootstrap():
    values = np.random.default_rng(0).exponential(size=80)
    ours = mean_interval(values)
    theirs = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=10_000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    assert ours["mean"] == values.mean()
    np.testing.assert_allclose([ours["low"], ours["high"]], [theirs.low, theirs.high], atol=0.02)


def test_values_of_a_cluster_are_drawn_together():
    """Each value ten times says no more than once; drawn as if they were independent, the interval is too narrow."""
    values = np.random.default_rng(0).exponential(size=80)
    once = mean_interval(values)
    tenfold = mean_interval(np.repeat(values, 10), clusters=np.repeat(np.arange(80), 10))
    assert tenfold == pytest.approx(once, rel=1e-12)
    alone = mean_interval(np.repeat(values, 10))
    assert alone["high"] - alone["low"] < 0.4 * (once["high"] - once["low"])
    uneven = mean_interval(np.asarray([1.0, 1.0, 1.0, 5.0]), clusters=np.asarray([0, 0, 0, 1]))
    assert uneven == {"mean": 2.0, "low": 1.0, "high": 5.0}


def test_frechet_distance_is_that_of_the_textbook():
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(500, 6)), rng.normal(size=(400, 6)) @ rng.normal(size=(6, 6)) + 1
    s1, s2 = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    cross = scipy.linalg.sqrtm(s1 @ s2).real
    expected = np.square(first.mean(0) - second.mean(0)).sum() + np.trace(s1 + s2 - 2 * cross)
    np.testing.assert_allclose(frechet_distance(first, second), expected, rtol=1e-6)
    assert frechet_distance(first, first) < 1e-6


def test_pairwise_distance_is_the_mean_over_pairs():
    points = np.random.default_rng(0).normal(size=(7, 3))
    pairs = [np.sqrt(((a - b) ** 2).sum()) for i, a in enumerate(points) for j, b in enumerate(points) if i != j]
    np.testing.assert_allclose(mean_pairwise_distance(points), np.mean(pairs))
    assert mean_pairwise_distance(np.ones((4, 3))) == 0.0
