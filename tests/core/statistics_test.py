"""Intervals and distances equal SciPy's, closed forms and loops."""

import itertools

import numpy as np
import pytest
import scipy.linalg
import scipy.stats

from musicrl_jax.core.statistics import (
    LEAST_INTERVAL,
    frechet_distance,
    mean_interval,
    mean_pairwise_distance,
    printed,
    ratio_interval,
    too_small,
)

# --- Intervals. ---


def test_the_interval_is_scipys_percentile_bootstrap():
    values = np.random.default_rng(0).exponential(size=80)
    ours = mean_interval(values)
    theirs = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=10_000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    assert ours["mean"] == values.mean()
    np.testing.assert_allclose([ours["low"], ours["high"]], [theirs.low, theirs.high], atol=0.02)


def test_values_of_a_cluster_are_resampled_together():
    """Repeating each value ten times adds no information."""
    values = np.random.default_rng(0).exponential(size=80)
    once = mean_interval(values)
    tenfold = mean_interval(np.repeat(values, 10), clusters=np.repeat(np.arange(80), 10))
    assert tenfold == pytest.approx(once, rel=1e-12)
    # Independent resampling gives an interval that is too narrow.
    alone = mean_interval(np.repeat(values, 10))
    assert alone["high"] - alone["low"] < 0.4 * (once["high"] - once["low"])
    values, clusters = np.asarray([1.0, 1.0, 1.0, 5.0]), np.asarray([0, 0, 0, 1])
    uneven = mean_interval(values, clusters=clusters, least=2)
    assert uneven == {"mean": 2.0, "low": 1.0, "high": 5.0}


def test_the_interval_over_two_factors_is_wide_if_either_decides():
    """30 prompts or 20 listeners decide 600 ratings: the interval is that of 30 or 20 values."""
    rng = np.random.default_rng(0)
    prompts, listeners = (each.ravel() for each in np.meshgrid(range(30), range(20), indexing="ij"))
    for kind, size in ((prompts, 30), (listeners, 20)):
        effect = rng.normal(size=size)
        figure = ratio_interval(effect[kind], np.ones(600), prompts, listeners)
        expected = 2 * 1.96 * effect.std() / np.sqrt(size)
        assert figure["high"] - figure["low"] == pytest.approx(expected, rel=0.1)
        assert figure["mean"] == pytest.approx(effect.mean())


@pytest.mark.parametrize(("of_prompt", "of_listener"), [(0.0, 0.0), (1.0, 0.5), (1.5, 1.0)])
def test_the_interval_of_a_win_rate_covers_the_truth_95_percent_of_the_time(of_prompt, of_listener):
    """Wins depend on random effects of prompts and listeners, and on noise."""
    covered = 0
    for seed in range(400):
        rng = np.random.default_rng(seed)
        prompts = np.repeat(np.arange(60), 4)
        listeners = rng.integers(30, size=240)
        edge = of_prompt * rng.normal(size=60)[prompts]
        edge = edge + of_listener * rng.normal(size=30)[listeners]
        margin = edge + rng.logistic(size=240)
        win, loss = margin > 0.3, margin < -0.3
        figure = ratio_interval(win, win | loss, prompts, listeners)
        covered += figure["low"] < 0.5 < figure["high"]
    assert 0.91 <= covered / 400 <= 0.975


def test_a_rate_of_all_or_none_is_not_certain():
    """The rule of three for ten prompts that all won or all lost."""
    prompts, raters = np.repeat(np.arange(10), 3), np.tile(np.arange(3), 10)
    wins = np.ones(30, bool)
    for won, (mean, low, high) in ((wins, (1, 0.7, 1)), (~wins, (0, 0, 0.3))):
        expected = pytest.approx({"mean": mean, "low": low, "high": high})
        assert ratio_interval(won, wins, prompts, raters) == expected


def test_a_rate_of_no_decided_pair_is_unknown():
    unknown = ratio_interval(np.zeros(3), np.zeros(3), np.arange(3), np.arange(3), least=3)
    assert unknown == {"mean": 0.5, "low": 0.0, "high": 1.0}


# --- Figures. ---


def test_a_small_n_has_no_figure():
    """The number of clusters counts, not that of values."""
    values, pieces = np.arange(70.0), np.repeat(np.arange(7), 10)
    few = mean_interval(values, clusters=pieces)
    assert few == {"too_small": "n too small (7 < 8)"}
    assert few == ratio_interval(values, np.ones(70), pieces, np.arange(70))
    assert printed(few) == too_small(7, LEAST_INTERVAL) == "n too small (7 < 8)"
    enough = mean_interval(values[:8])
    assert enough["mean"] == 3.5 and too_small(8, LEAST_INTERVAL) == ""
    assert printed({"mean": 0.5, "low": -0.25, "high": 1.0}, 1, 100, "+") == "+50.0 [-25.0, +100.0]"


# --- Distances. ---


def test_the_frechet_distance_is_the_textbooks():
    rng = np.random.default_rng(0)
    first = rng.normal(size=(500, 6))
    second = rng.normal(size=(400, 6)) @ rng.normal(size=(6, 6)) + 1
    s1, s2 = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    cross = scipy.linalg.sqrtm(s1 @ s2).real
    expected = np.square(first.mean(0) - second.mean(0)).sum() + np.trace(s1 + s2 - 2 * cross)
    np.testing.assert_allclose(frechet_distance(first, second), expected, rtol=1e-6)
    assert frechet_distance(first, first) < 1e-6


def test_the_pairwise_distance_is_the_mean_over_pairs():
    points = np.random.default_rng(0).normal(size=(7, 3))
    pairs = [np.linalg.norm(a - b) for a, b in itertools.permutations(points, 2)]
    np.testing.assert_allclose(mean_pairwise_distance(points), np.mean(pairs))
    assert mean_pairwise_distance(np.ones((4, 3))) == 0.0
