"""Against SciPy, closed forms and loops."""

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
    uneven = mean_interval(
        np.asarray([1.0, 1.0, 1.0, 5.0]), clusters=np.asarray([0, 0, 0, 1]), least=2
    )
    assert uneven == {"mean": 2.0, "low": 1.0, "high": 5.0}


def test_an_interval_over_two_kinds_is_wide_where_either_decides():
    """Ratings that depend on the prompt alone, or on the listener alone, are as uncertain as so few of them."""
    rng = np.random.default_rng(0)
    prompts, listeners = (each.ravel() for each in np.meshgrid(range(30), range(20), indexing="ij"))
    for kind, size in ((prompts, 30), (listeners, 20)):
        effect = rng.normal(size=size)
        found = ratio_interval(effect[kind], np.ones(600), prompts, listeners)
        expected = 2 * 1.96 * effect.std() / np.sqrt(size)
        assert found["high"] - found["low"] == pytest.approx(expected, rel=0.1)
        assert found["mean"] == pytest.approx(effect.mean())


@pytest.mark.parametrize(("of_prompt", "of_listener"), [(0.0, 0.0), (1.0, 0.5), (1.5, 1.0)])
def test_an_interval_of_a_rate_covers_the_truth_as_often_as_it_says(of_prompt, of_listener):
    """Wins with a prompt's and a listener's share of luck, evenly balanced; neither too narrow nor too wide."""
    covered = 0
    for seed in range(400):
        rng = np.random.default_rng(seed)
        prompts = np.repeat(np.arange(60), 4)
        listeners = rng.integers(30, size=240)
        edge = (
            of_prompt * rng.normal(size=60)[prompts] + of_listener * rng.normal(size=30)[listeners]
        )
        felt = edge + rng.logistic(size=240)
        win, loss = felt > 0.3, felt < -0.3
        found = ratio_interval(win, win | loss, prompts, listeners)
        covered += found["low"] < 0.5 < found["high"]
    assert 0.91 <= covered / 400 <= 0.975


def test_a_rate_of_all_or_nothing_is_not_certain():
    """Ten prompts that all won: the rule of three."""
    prompts, raters = np.repeat(np.arange(10), 3), np.tile(np.arange(3), 10)
    wins = np.ones(30, bool)
    assert ratio_interval(wins, wins, prompts, raters) == pytest.approx(
        {"mean": 1, "low": 0.7, "high": 1}
    )
    assert ratio_interval(~wins, wins, prompts, raters) == pytest.approx(
        {"mean": 0, "low": 0, "high": 0.3}
    )


def test_a_rate_of_nothing_is_unknown():
    assert ratio_interval(np.zeros(3), np.zeros(3), np.arange(3), np.arange(3), least=3) == {
        "mean": 0.5,
        "low": 0.0,
        "high": 1.0,
    }


def test_of_too_few_things_there_is_no_figure():
    """Clusters count, however many values each has; the words and the figure are printed alike."""
    values, pieces = np.arange(70.0), np.repeat(np.arange(7), 10)
    few = mean_interval(values, clusters=pieces)
    assert (
        few
        == ratio_interval(values, np.ones(70), pieces, np.arange(70))
        == {"too_small": "n too small (7 < 8)"}
    )
    assert printed(few) == too_small(7, LEAST_INTERVAL) == "n too small (7 < 8)"
    enough = mean_interval(values[:8])
    assert enough["mean"] == 3.5 and too_small(8, LEAST_INTERVAL) == ""
    assert printed({"mean": 0.5, "low": -0.25, "high": 1.0}, 1, 100, "+") == "+50.0 [-25.0, +100.0]"


def test_frechet_distance_is_that_of_the_textbook():
    rng = np.random.default_rng(0)
    first, second = (
        rng.normal(size=(500, 6)),
        rng.normal(size=(400, 6)) @ rng.normal(size=(6, 6)) + 1,
    )
    s1, s2 = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    cross = scipy.linalg.sqrtm(s1 @ s2).real
    expected = np.square(first.mean(0) - second.mean(0)).sum() + np.trace(s1 + s2 - 2 * cross)
    np.testing.assert_allclose(frechet_distance(first, second), expected, rtol=1e-6)
    assert frechet_distance(first, first) < 1e-6


def test_pairwise_distance_is_the_mean_over_pairs():
    points = np.random.default_rng(0).normal(size=(7, 3))
    pairs = [
        np.sqrt(((a - b) ** 2).sum())
        for i, a in enumerate(points)
        for j, b in enumerate(points)
        if i != j
    ]
    np.testing.assert_allclose(mean_pairwise_distance(points), np.mean(pairs))
    assert mean_pairwise_distance(np.ones((4, 3))) == 0.0
