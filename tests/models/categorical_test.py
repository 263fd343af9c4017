"""Sampling of codes: frequencies, the inverse in float64, and codes that must not be sampled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax
from scipy.stats import chisquare

from musicrl_jax.models.categorical import sample_codes

# The least and the greatest number that `jax.random.uniform` returns.
ENDS = np.float32([0, 1 - 2**-23])


def inverse(log_probs, numbers):
    """Returns the code of two numbers, in float64, by sums over runs of ceil(sqrt(V)) codes."""
    probabilities, size = np.exp(np.float64(log_probs)), int(np.ceil(np.sqrt(len(log_probs))))
    runs = [probabilities[start : start + size] for start in range(0, len(log_probs), size)]
    sums = [run.sum() for run in runs]
    run = int(np.sum(np.cumsum(sums) <= numbers[0] * sum(sums)))
    return run * size + int(np.sum(np.cumsum(runs[run]) <= numbers[1] * sums[run]))


@pytest.mark.parametrize("codes", [1, 2, 7, 9, 256, 1000])
def test_codes_are_those_of_the_inverse_cumulative_distribution(codes):
    rng = np.random.default_rng(codes)
    scores = log_softmax(3 * rng.standard_normal((400, codes)), axis=1).astype(np.float32)
    numbers = rng.random((400, 2), np.float32)
    expected = [inverse(*pair) for pair in zip(scores, numbers, strict=True)]
    sampled = jax.jit(sample_codes)(scores, numbers)
    assert sampled.dtype == jnp.int32
    # A number within rounding of a border may pick the neighbour.
    assert np.mean(np.asarray(sampled) == expected) > 0.99


@pytest.mark.exactness(24)
@pytest.mark.parametrize("allowed", [40, 5])
def test_frequencies_are_the_probabilities(allowed):
    rng = np.random.default_rng(0)
    scores = np.full(40, -np.inf)
    chosen = rng.choice(40, allowed, replace=False)
    scores[chosen] = log_softmax(rng.standard_normal(allowed))
    numbers = jax.random.uniform(jax.random.key(1), (20_000, 2))
    sampled = sample_codes(jnp.broadcast_to(jnp.float32(scores), (20_000, 40)), numbers)
    counts = np.bincount(sampled, minlength=40)
    expected = 20_000 * np.exp(scores)
    assert not counts[expected == 0].any()
    assert chisquare(counts[chosen], expected[chosen]).pvalue > 0.01


@settings(max_examples=30, deadline=None)
@given(st.data(), st.sampled_from([7, 64, 100]))
def test_a_code_that_is_not_allowed_is_never_sampled(data, codes):
    allowed = data.draw(st.sets(st.integers(0, codes - 1), min_size=1, max_size=9))
    logits = np.full(codes, -np.inf, np.float32)
    for code in allowed:
        logits[code] = data.draw(st.floats(-60, 60, width=32))
    scores = jax.nn.log_softmax(jnp.asarray(logits))
    numbers = np.stack(np.meshgrid(ENDS, ENDS), axis=-1).reshape(-1, 2)
    sampled = sample_codes(jnp.broadcast_to(scores, (4, codes)), numbers)
    assert set(np.asarray(sampled).tolist()) <= allowed


def test_a_place_of_a_clip_has_its_own_numbers():
    """Shapes before the codes are kept: [B, T, V] gives [B, T]."""
    scores = jnp.log(jnp.float32([[[0.5, 0.5, 0, 0]], [[0, 0, 0.5, 0.5]]]))
    numbers = jnp.float32([[[0.1, 0.9]], [[0.9, 0.1]]])
    np.testing.assert_array_equal(sample_codes(scores, numbers), [[1], [2]])
