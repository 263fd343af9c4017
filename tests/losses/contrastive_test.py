"""InfoNCE against NumPy, its value at chance, and captions that occur twice in a batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import logsumexp

from musicrl_jax.losses import contrastive


def _unit(rng, rows, width):
    x = rng.normal(size=(rows, width))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


@functools.partial(jax.jit, static_argnums=2)
def _loss(audio, text, temperature, identical):
    return contrastive.contrastive(audio, text, jnp.float32(temperature), identical)


def test_equals_numpy():
    rng = np.random.default_rng(0)
    audio, text = _unit(rng, 12, 5), _unit(rng, 12, 5)
    loss, metrics = _loss(audio, text, 0.2, np.eye(12, dtype=bool))
    logits = np.float64(audio) @ np.float64(text).T / 0.2
    own = np.diag(logits)
    expected = np.mean(logsumexp(logits, axis=1) - own + logsumexp(logits, axis=0) - own) / 2
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    rank = (logits > own[:, None]).sum(axis=1)
    np.testing.assert_allclose(metrics["recall_1"], np.mean(rank < 1), atol=1e-6)
    np.testing.assert_allclose(metrics["recall_10"], np.mean(rank < 10), atol=1e-6)
    np.testing.assert_allclose(metrics["median_rank"], np.median(rank) + 1, atol=1e-6)


def test_equal_embeddings_are_at_chance():
    same = np.tile(_unit(np.random.default_rng(1), 1, 4), (16, 1))
    loss, metrics = _loss(same, same, 0.1, np.eye(16, dtype=bool))
    np.testing.assert_allclose(loss, np.log(16), rtol=1e-6)
    np.testing.assert_allclose(metrics["chance"], np.log(16), rtol=1e-6)
    assert metrics["recall_1"] == 0  # ties are not hits
    assert metrics["recall_10"] == 1  # the expected rank among 16 ties is 7.5


def test_identical_captions_are_not_negatives():
    rng = np.random.default_rng(2)
    audio, text = _unit(rng, 3, 6), _unit(rng, 3, 6)
    # Rows 0 and 3 are equal.
    audio, text = (np.concatenate([x, x[:1]]) for x in (audio, text))
    identical = np.eye(4, dtype=bool)
    identical[0, 3] = identical[3, 0] = True
    loss, metrics = _loss(audio, text, 0.1, identical)
    logits = np.float64(audio @ text.T) / 0.1
    nats = []
    for row in range(4):
        others = [column for column in range(4) if column == row or not identical[row, column]]
        nats += [
            logsumexp(logits[row, others]) - logits[row, row],
            logsumexp(logits[others, row]) - logits[row, row],
        ]
    np.testing.assert_allclose(loss, np.mean(nats), rtol=1e-5)
    strict, _ = _loss(audio, text, 0.1, np.eye(4, dtype=bool))
    assert strict > loss + 0.1
    assert metrics["recall_10"] == 1


def test_all_captions_identical_cost_nothing():
    x = _unit(np.random.default_rng(3), 5, 4)
    loss, metrics = _loss(x, x[::-1].copy(), 0.1, np.ones((5, 5), bool))
    assert loss == 0
    assert metrics["recall_1"] == 1


def test_identical_rows_compares_whole_texts():
    text = jnp.array([[4, 5, 0], [4, 5, 6], [4, 5, 0], [5, 4, 0]], jnp.int32)
    expected = np.eye(4, dtype=bool)
    expected[0, 2] = expected[2, 0] = True
    np.testing.assert_array_equal(contrastive.identical_rows(text), expected)


def test_gradient_equals_finite_differences():
    rng = np.random.default_rng(4)
    audio, text = _unit(rng, 4, 3), _unit(rng, 4, 3)
    identical = jnp.eye(4, dtype=bool).at[0, 1].set(True).at[1, 0].set(True)
    audio, text = jnp.asarray(audio), jnp.asarray(text)
    loss = jax.jit(
        lambda audio: contrastive.contrastive(audio, text, jnp.float32(0.5), identical)[0]
    )
    slope = jax.jit(jax.grad(loss))(audio)
    for row, column in ((0, 0), (2, 1), (3, 2)):
        step = jnp.zeros_like(audio).at[row, column].set(1e-2)
        np.testing.assert_allclose(
            (loss(audio + step) - loss(audio - step)) / 2e-2, slope[row, column], atol=1e-4
        )
