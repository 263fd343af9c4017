"""Cross-entropy against NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from musicrl_jax.losses.lm import cross_entropy

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(3, 4, 5)).astype(np.float32)
TOKENS = RNG.integers(0, 5, (3, 4)).astype(np.int32)
NATS = -np.take_along_axis(
    scipy.special.log_softmax(LOGITS.astype(np.float64), axis=-1), TOKENS[..., None], -1
)[..., 0]
HITS = LOGITS.argmax(axis=-1) == TOKENS


def test_the_loss_is_the_mean_over_all_tokens():
    loss, metrics = cross_entropy(LOGITS, TOKENS)
    np.testing.assert_allclose(loss, NATS.mean(), rtol=1e-5)
    assert 0 < HITS.mean() < 1
    np.testing.assert_allclose(metrics["accuracy"], HITS.mean(), rtol=1e-6)


@pytest.mark.parametrize("rows", [[0], [1, 2]])
def test_tokens_of_weight_zero_do_not_count(rows):
    weights = np.zeros((3, 4), np.float32)
    weights[rows, 1:] = 1
    loss, metrics = cross_entropy(LOGITS, TOKENS, weights)
    np.testing.assert_allclose(loss, NATS[rows, 1:].mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy"], HITS[rows, 1:].mean(), rtol=1e-6)


def test_the_loss_of_no_tokens_is_zero():
    loss, metrics = cross_entropy(LOGITS, TOKENS, jnp.zeros((3, 4)))
    assert (float(loss), float(metrics["accuracy"])) == (0.0, 0.0)


def test_equal_logits_have_the_loss_of_a_uniform_guess():
    np.testing.assert_allclose(cross_entropy(jnp.zeros((3, 4, 5)), TOKENS)[0], np.log(5), rtol=1e-6)
