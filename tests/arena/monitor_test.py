"""The alarm against over-optimisation: curves whose peak is known, seen through noise."""

import numpy as np
import pytest

from musicrl_jax.arena.monitor import over_optimised


def alarm(gold, noise, seed, checkpoints, shared=0.0):
    """The monitor's peak, as a checkpoint's number, when it first goes off in a run whose distance grows steadily and
    whose held-out judge sees `gold` through noise; None where it never does. It sees the past alone. A share of the
    noise's variance is that of the base's clips, the same at every look.
    """
    distances = np.arange(1, checkpoints + 1) / checkpoints
    own, base = np.split(np.random.default_rng(seed).normal(size=checkpoints + 1), [checkpoints])
    seen = gold(distances) + noise * (np.sqrt(1 - shared) * own + np.sqrt(shared) * base)
    errors = np.full(checkpoints, noise)
    for now in range(4, checkpoints + 1):
        if (peak := over_optimised(distances[:now], seen[:now], errors[:now])) is not None:
            return peak * checkpoints
    return None


@pytest.mark.exactness(21)
@pytest.mark.parametrize(
    ("looks", "noise"), [(12, 0.02), (16, 0.02), (100, 0.02), (100, 0.05), (100, 0.1)]
)
@pytest.mark.parametrize("c", [1.0, 1.5])
def test_the_peak_of_a_judge_whom_the_reward_leaves_behind_is_found(c, looks, noise):
    """The reward, gold + c f^2, rises with the drift f; gold has its peak at 1 / (2 c). Noise is up to four tenths of
    gold's peak with many looks, and a twelfth with as few as a run on a small machine takes.
    """
    found = [alarm(lambda f: f - c * f**2, noise, seed, looks) for seed in range(20)]
    peak = looks / (2 * c)
    assert sum(each is not None and abs(each - peak) <= 0.1 * peak for each in found) >= 18, found


@pytest.mark.exactness(21)
@pytest.mark.parametrize(
    "gold", [lambda f: f, lambda f: f - f**2 / 2, lambda f: 1 - np.exp(-3 * f), np.zeros_like]
)
@pytest.mark.parametrize("noise", [0.05, 0.3])
@pytest.mark.parametrize("looks", [12, 100])
@pytest.mark.parametrize("shared", [0.0, 0.5])
def test_a_judge_who_agrees_sets_off_no_alarm(gold, noise, looks, shared):
    """Rising, levelling off at the very end, saturating, and never moving at all."""
    assert sum(alarm(gold, noise, seed, looks, shared) is not None for seed in range(20)) <= 1


def test_a_reward_that_harms_from_the_start_sets_off_the_alarm_and_points_to_the_base():
    distances = np.arange(1, 9) / 2
    assert over_optimised(distances, -0.3 * distances, np.full(8, 0.05)) == 0.0
    assert over_optimised(distances, -0.01 * distances, np.full(8, 0.05)) is None
