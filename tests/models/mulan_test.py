"""MuLan: the unit sphere, padding, windows of long clips, the quantizer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from musicrl_jax.models import bert, mulan, musicnn, resnet

CONFIG = mulan.MuLanConfig(
    sample_rate_hz=16_000,
    window_seconds=0.5,
    audio=resnet.ResNetConfig(mels=16, widths=(4, 8), blocks=1),
    text=bert.BertConfig(layers=2, heads=2, embed=16, mlp=32, positions=20, pieces=40),
    text_length=12,
    embed=8,
    levels=3,
    codes=5,
)
MODULE = mulan.MuLan(CONFIG)
TEXT = jnp.array(
    [[7, 3, 9, 0, 0, 0], [4, 4, 5, 6, 30, 39], [9, 3, 7, 0, 0, 0], [0, 0, 0, 0, 0, 0]], jnp.int32
)


@pytest.fixture(scope="module")
def fresh():
    return nn.unbox(jax.jit(MODULE.init)(jax.random.key(0), jnp.zeros((1, 8000)), TEXT[:1]))


@pytest.fixture(scope="module")
def variables(fresh):
    """Returns weights without zeros, so that every path has an effect."""
    rng = np.random.default_rng(0)
    shake = jax.tree.map(
        lambda a: np.asarray(a) + 0.1 * rng.normal(size=a.shape).astype(np.float32), fresh["params"]
    )
    return fresh | {"params": shake}


@pytest.fixture(scope="module")
def wav():
    noise = 0.3 * jax.random.normal(jax.random.key(1), (4, 20_000))
    return noise * jnp.linspace(0, 1, 20_000)[None, :]


@functools.partial(jax.jit, static_argnums=1)
def apply(variables, method, *arguments):
    return MODULE.apply(variables, *arguments, method=method)


def test_embeddings_have_length_one(variables, wav):
    for embedding in (apply(variables, "embed_audio", wav), apply(variables, "embed_text", TEXT)):
        assert embedding.shape == (4, 8)
        np.testing.assert_allclose(np.linalg.norm(embedding, axis=1), 1, rtol=1e-5)


def test_padding_changes_nothing_and_order_does(variables):
    text = apply(variables, "embed_text", TEXT)
    np.testing.assert_allclose(apply(variables, "embed_text", TEXT[:1, :3]), text[:1], atol=1e-5)
    longer = jnp.pad(TEXT, ((0, 0), (0, 6)))
    np.testing.assert_allclose(apply(variables, "embed_text", longer)[:3], text[:3], atol=1e-5)
    assert np.abs(text[0] - text[2]).max() > 1e-3  # the same pieces in reverse
    assert np.all(np.isfinite(text[3]))  # nothing but padding


def test_windows_cover_the_clip_from_start_to_end():
    wav = jnp.arange(30.0)[None, :]
    np.testing.assert_array_equal(mulan.windows(wav, 10)[0], np.arange(30.0).reshape(3, 10))
    np.testing.assert_array_equal(mulan.windows(wav[:, :25], 10)[0, :, 0], [0, 8, 15])
    np.testing.assert_array_equal(mulan.windows(wav[:, :10], 10)[0], wav[:, :10])
    np.testing.assert_array_equal(mulan.windows(wav[:, :7], 10)[0], wav[:, :7])


def test_a_long_clip_is_the_mean_of_its_windows(variables, wav):
    parts = [
        np.float64(apply(variables, "embed_audio", wav[:, start : start + 8000]))
        for start in (0, 6000, 12_000)
    ]
    mean = np.mean(parts, axis=0)
    mean /= np.linalg.norm(mean, axis=1, keepdims=True)
    np.testing.assert_allclose(apply(variables, "embed_audio", wav), mean, atol=1e-5)
    windows = apply(variables, "embed_windows", wav)
    np.testing.assert_allclose(windows, np.stack(parts, axis=1), atol=1e-5)


def test_a_clip_does_not_depend_on_its_batch(variables, wav):
    together = apply(variables, "embed_audio", wav)
    np.testing.assert_allclose(apply(variables, "embed_audio", wav[3:]), together[3:], atol=1e-5)


def test_quantize_is_residual_nearest_neighbour(variables, wav):
    books = np.random.default_rng(1).normal(size=(3, 5, 8)).astype(np.float32)
    embedding = apply(variables, "embed_audio", wav)
    got = apply(variables | {"rvq": {"codebooks": jnp.asarray(books)}}, "quantize", embedding)
    assert got.dtype == jnp.int32
    rest = np.float64(embedding)
    for level in range(3):
        code = ((rest[:, None] - books[level]) ** 2).sum(-1).argmin(1)
        np.testing.assert_array_equal(got[:, level], code)
        rest = rest - books[level, code]


def test_temperature_starts_at_a_tenth_and_has_a_floor(fresh):
    np.testing.assert_allclose(apply(fresh, "temperature"), 0.1, rtol=1e-5)
    cold = fresh["params"] | {"log_temperature": jnp.float32(-20)}
    np.testing.assert_allclose(apply(fresh | {"params": cold}, "temperature"), 0.01, rtol=1e-5)


def test_zero_stays_zero_and_has_a_gradient():
    np.testing.assert_array_equal(mulan.on_sphere(jnp.zeros(4)), 0)
    assert np.all(np.isfinite(jax.jacobian(mulan.on_sphere)(jnp.zeros(4))))


def test_a_text_that_is_too_long_is_named(variables):
    with pytest.raises(ValueError, match=r"13 pieces.*text_length = 12"):
        apply(variables, "embed_text", jnp.ones((1, 13), jnp.int32))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"text_length": 513}, "text_length = 513 must not exceed BertConfig.positions = 512"),
        ({"window_seconds": 0.0}, "window_seconds = 0"),
    ],
)
def test_bad_sizes_are_named(change, word):
    with pytest.raises(ValueError, match=word):
        mulan.MuLanConfig(**change)


def test_musicnn_gives_about_the_same_at_any_rate():
    """A sweep at 24 kHz and at 16 kHz differ less than two windows of it."""
    small = {
        "window_seconds": 0.5,
        "audio": musicnn.MusicnnConfig(3, 2, 4),
        "text": CONFIG.text,
        "text_length": 12,
    }
    low, high = (
        mulan.MuLan(mulan.MuLanConfig(sample_rate_hz=rate, **small)) for rate in (16_000, 24_000)
    )
    variables = nn.unbox(jax.jit(low.init)(jax.random.key(0), jnp.zeros((1, 8000)), TEXT[:1]))
    embeddings = []
    for module in (low, high):
        time = np.arange(module.config.sample_rate_hz) / module.config.sample_rate_hz
        sweep = 0.3 * np.sin(2 * np.pi * (300 + 1500 * time) * time)
        embed = jax.jit(functools.partial(module.apply, method="embed_windows"))
        embeddings.append(np.asarray(embed(variables, np.float32(sweep)[None])))
    first, second = embeddings
    assert first.shape == (1, 2, 128)
    assert np.abs(first - second).max() < 0.1 * np.abs(first[:, 0] - first[:, 1]).max()
