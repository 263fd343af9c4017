"""Sampling distributions, rollouts, and systems without values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from musicrl_jax.systems.sampling import Sampling
from musicrl_jax.systems.system import MusicSystem, Rollout
from musicrl_jax.systems.tiny import TinyConfig, TinySystem


@pytest.mark.parametrize("temperature", [0.0, -1.0, np.nan, np.inf, "hot", None])
def test_a_temperature_that_is_no_positive_number_is_refused(temperature):
    with pytest.raises(ValueError, match=f"temperature={temperature!r} must be above 0 and finite"):
        Sampling(temperature)


@pytest.mark.parametrize("top_k", [0, -1, 1.5, "all"])
def test_a_top_k_that_is_no_count_is_refused(top_k):
    with pytest.raises(ValueError, match=f"top_k={top_k!r} must be 1 or more, or None"):
        Sampling(top_k=top_k)


@pytest.mark.exactness(7)
def test_top_k_allows_the_likeliest_tokens_and_ties_with_the_last_of_them():
    logits = jnp.log(jnp.array([[0.4, 0.1, 0.1, 0.3, 0.1], [0.2, 0.5, 0.1, 0.15, 0.05]]))
    for top_k, expected in ((2, ["10010", "11000"]), (3, ["11111", "11010"])):
        allowed = np.asarray(Sampling(top_k=top_k).allowed(logits))
        np.testing.assert_array_equal(allowed, [[c == "1" for c in row] for row in expected])
    assert Sampling(top_k=5).allowed(logits) is None is Sampling().allowed(logits)
    top_2 = Sampling(1.0, top_k=2)
    probabilities = np.exp(top_2.log_distribution(logits, top_2.allowed(logits)))
    np.testing.assert_allclose(probabilities[0], np.array([4, 0, 0, 3, 0]) / 7, rtol=1e-5)


def test_each_clip_may_have_its_own_temperature():
    logits = jax.random.normal(jax.random.key(0), (3, 7))
    temperatures = jnp.array([0.5, 1.0, 2.0])
    together = Sampling(temperatures[:, None]).log_distribution(logits, None)
    for row, temperature in enumerate((0.5, 1.0, 2.0)):
        alone = Sampling(temperature).log_distribution(logits[row], None)
        np.testing.assert_allclose(together[row], alone, rtol=1e-6)


def test_mono_is_the_mean_of_the_channels():
    wav = jax.random.normal(jax.random.key(0), (2, 3, 8))
    np.testing.assert_allclose(Rollout(None, None, None, wav).mono, wav.mean(axis=1), rtol=1e-6)
    np.testing.assert_array_equal(Rollout(None, None, None, wav[:, :1]).mono, wav[:, 0])


def test_a_system_without_values_says_what_to_do():
    system = TinySystem(TinyConfig(learns_values=False))
    with pytest.raises(ValueError, match=r"TinySystem has no values: set PolicyGradient\.baseline"):
        system.init_values(None)
    with pytest.raises(ValueError, match="TinySystem has init_values, but no values: define both"):
        MusicSystem.values(system, {}, (), None)
