"""The distribution that tokens are sampled from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from musicrl_jax.systems.system import Rollout, Sampling


@pytest.mark.parametrize("temperature", [0.0, -1.0, np.nan, np.inf, "hot", None])
def test_a_temperature_that_is_no_positive_number_is_refused(temperature):
    with pytest.raises(ValueError, match=f"temperature={temperature!r} must be above 0 and finite"):
        Sampling(temperature)


@pytest.mark.parametrize("top_k", [0, -1, 1.5, "all"])
def test_a_top_k_that_is_no_count_is_refused(top_k):
    with pytest.raises(ValueError, match=f"top_k={top_k!r} must be 1 or more, or None"):
        Sampling(top_k=top_k)


@pytest.mark.exactness(7)
def test_a_filter_allows_the_likeliest_and_those_as_likely_as_the_last_of_them():
    logits = jnp.log(jnp.array([[0.4, 0.1, 0.1, 0.3, 0.1], [0.2, 0.5, 0.1, 0.15, 0.05]]))
    for top_k, expected in ((2, ["10010", "11000"]), (3, ["11111", "11010"])):
        allowed = np.asarray(Sampling(top_k=top_k).allowed(logits))
        np.testing.assert_array_equal(allowed, [[c == "1" for c in row] for row in expected])
    assert Sampling(top_k=5).allowed(logits) is None is Sampling().allowed(logits)
    filtered = Sampling(1.0, top_k=2)
    found = np.exp(filtered.log_distribution(logits, filtered.allowed(logits)))
    np.testing.assert_allclose(found[0], np.array([4, 0, 0, 3, 0]) / 7, rtol=1e-5)


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
