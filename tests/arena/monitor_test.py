"""The alarm against over-optimisation, on noisy curves with a known peak."""

import numpy as np
import pytest

from musicrl_jax.arena.monitor import overoptimisation_peak


def alarm(gold, noise, seed, checkpoints, shared=0.0):
    """Returns the number of the peak's checkpoint at the first alarm of a run; None without alarm.

    The distance grows steadily, and the judge's score is `gold` with noise. A share of the noise's
    variance is that of the base's clips, which is the same at every look.
    """
    distances = np.arange(1, checkpoints + 1) / checkpoints
    own, base = np.split(np.random.default_rng(seed).normal(size=checkpoints + 1), [checkpoints])
    scores = gold(distances) + noise * (np.sqrt(1 - shared) * own + np.sqrt(shared) * base)
    errors = np.full(checkpoints, noise)
    for now in range(4, checkpoints + 1):
        peak = overoptimisation_peak(distances[:now], scores[:now], errors[:now])
        if peak is not None:
            return peak * checkpoints
    return None


@pytest.mark.exactness(21)
@pytest.mark.parametrize(
    ("looks", "noise"), [(12, 0.02), (16, 0.02), (100, 0.02), (100, 0.05), (100, 0.1)]
)
@pytest.mark.parametrize("c", [1.0, 1.5])
def test_the_alarm_gives_the_peak_of_an_overoptimised_judge(c, looks, noise):
    """The reward, gold + c f^2, rises with the distance f; gold peaks at 1 / (2 c).

    The noise is up to 40 % of gold's peak with many looks, and a twelfth with few.
    """
    peaks = [alarm(lambda f: f - c * f**2, noise, seed, looks) for seed in range(20)]
    peak = looks / (2 * c)
    assert sum(each is not None and abs(each - peak) <= 0.1 * peak for each in peaks) >= 18, peaks


@pytest.mark.exactness(21)
@pytest.mark.parametrize(
    "gold", [lambda f: f, lambda f: f - f**2 / 2, lambda f: 1 - np.exp(-3 * f), np.zeros_like]
)
@pytest.mark.parametrize("noise", [0.05, 0.3])
@pytest.mark.parametrize("looks", [12, 100])
@pytest.mark.parametrize("shared", [0.0, 0.5])
def test_a_judge_that_agrees_with_the_reward_gives_no_alarm(gold, noise, looks, shared):
    """Its score rises, levels off at the very end, saturates, or never moves."""
    assert sum(alarm(gold, noise, seed, looks, shared) is not None for seed in range(20)) <= 1


def test_a_harmful_reward_gives_an_alarm_that_selects_the_base():
    distances = np.arange(1, 9) / 2
    assert overoptimisation_peak(distances, -0.3 * distances, np.full(8, 0.05)) == 0.0
    assert overoptimisation_peak(distances, -0.01 * distances, np.full(8, 0.05)) is None
