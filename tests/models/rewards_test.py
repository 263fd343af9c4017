"""The quality regressor: its range, and the mean of a long clip's first and last window."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from musicrl_jax.models import resnet, rewards

CONFIG = rewards.QualityConfig(16_000, 0.5, resnet.ResNetConfig(mels=16, widths=(4,), blocks=1))
MODULE = rewards.Quality(CONFIG)


@pytest.fixture(scope="module")
def score():
    """Returns a function wav -> MOS whose weights make it depend strongly on its input."""
    variables = jax.jit(MODULE.init)(jax.random.key(0), jnp.zeros((1, 8000)))
    rng = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda a: np.asarray(a) + 0.5 * rng.normal(size=a.shape).astype(np.float32), variables
    )
    return jax.jit(lambda wav: MODULE.apply(variables, wav))


@pytest.fixture(scope="module")
def wav():
    ramp = jnp.linspace(0.01, 0.5, 20_000)[None, :] ** jnp.arange(1.0, 4.0)[:, None]
    return ramp * jax.random.normal(jax.random.key(1), (3, 20_000))


def test_a_long_clip_has_the_mean_of_its_first_and_last_window(score, wav):
    first, last, middle = score(wav[:, :8000]), score(wav[:, 12_000:]), score(wav[:, 6000:14_000])
    assert np.abs(first - last).min() > 1e-3
    np.testing.assert_allclose(score(wav), (first + last) / 2, atol=1e-5)
    assert np.abs(score(wav) - middle).max() > 1e-3


def test_windows_of_a_clip_shorter_than_two_overlap(score, wav):
    clip = wav[:, :10_000]
    expected = (np.asarray(score(clip[:, :8000])) + np.asarray(score(clip[:, -8000:]))) / 2
    np.testing.assert_allclose(score(clip), expected, atol=1e-5)


def test_a_short_clip_is_one_window(score, wav):
    clip = wav[:, :4000]
    padded = jnp.pad(clip, ((0, 0), (0, 4000)))
    assert score(clip).shape == (3,)
    assert np.abs(score(clip) - score(padded)).max() > 1e-3


def test_scores_are_between_1_and_5(score):
    loud = 1e3 * jax.random.normal(jax.random.key(2), (3, 8000))
    for clip in (loud, jnp.zeros((3, 8000)), jnp.ones((3, 8000))):
        value = np.asarray(score(clip))
        assert np.all((value >= 1) & (value <= 5))
        assert value.dtype == np.float32


def test_initial_scores_are_about_3():
    variables = jax.jit(MODULE.init)(jax.random.key(0), jnp.zeros((1, 8000)))
    got = jax.jit(MODULE.apply)(variables, 0.1 * jax.random.normal(jax.random.key(3), (2, 8000)))
    np.testing.assert_allclose(got, 3, atol=0.5)


def test_a_negative_window_is_refused():
    with pytest.raises(ValueError, match="window_seconds = -1"):
        rewards.QualityConfig(window_seconds=-1.0)
