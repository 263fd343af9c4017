"""The semantic encoder against NumPy: rates, masks, random targets and k-means tokens."""

import functools

import jax
import jax.numpy as jnp
import librosa
import numpy as np
import pytest
from flax import linen as nn

from musicrl_jax.models import conformer, semantic

CONFIG = semantic.SemanticConfig(
    sample_rate_hz=16_000,
    mels=16,
    encoder=conformer.ConformerConfig(layers=2, heads=2, embed=16, mlp=32, kernel=3),
    layer=1,
    targets=24,
    codes=8,
)
MODULE = semantic.SemanticEncoder(CONFIG)


@pytest.fixture(scope="module")
def wav():
    return 0.1 * jax.random.normal(jax.random.key(0), (3, 16_000))


@functools.partial(jax.jit, static_argnums=1)
def apply(variables, method, *arguments):
    return MODULE.apply(variables, *arguments, method=method)


@pytest.fixture(scope="module")
def variables(wav):
    arguments = (wav, jnp.zeros((3, 25), bool), jnp.zeros((3, 25, 64)))
    variables = nn.unbox(jax.jit(MODULE.init)(jax.random.key(1), *arguments))
    mels = apply(variables, "log_mels", wav)
    return variables | {"statistics": {"mean": mels.mean((0, 1)), "std": mels.std((0, 1))}}


@pytest.mark.parametrize(
    ("rate", "samples", "frames"),
    [
        (16_000, 16_000, 25),
        (16_000, 64_000, 100),
        (16_000, 16_639, 25),
        (16_000, 16_640, 26),
        (24_000, 720_000, 750),
    ],
)
def test_there_are_25_frames_a_second_exactly(rate, samples, frames):
    config = semantic.SemanticConfig(rate, 16, CONFIG.encoder, 1, 24, 8)
    module = semantic.SemanticEncoder(config)
    mask, noise = jnp.zeros((1, frames), bool), jnp.zeros((1, frames, 64))
    shapes = jax.eval_shape(
        lambda: module.init_with_output(jax.random.key(0), jnp.zeros((1, samples)), mask, noise)
    )
    assert shapes[0][0].shape == (1, frames, 24)
    tokens = jax.eval_shape(
        lambda v: module.apply(v, jnp.zeros((1, samples)), method="tokens"), shapes[1]
    )
    assert (tokens.shape, tokens.dtype) == ((1, frames), jnp.int32)


def test_stacked_frames_are_standardised_in_time_order(variables, wav):
    rng = np.random.default_rng(0)
    mean, std = rng.normal(size=16).astype(np.float32), rng.uniform(0.5, 2, 16).astype(np.float32)
    stacked = apply(variables | {"statistics": {"mean": mean, "std": std}}, "stacked", wav)
    mels = np.asarray(apply(variables, "log_mels", wav))
    assert mels.shape == (3, 100, 16)
    for f in (0, 7, 24):
        for step in range(4):
            part = stacked[1, f, 16 * step : 16 * (step + 1)]
            np.testing.assert_allclose(part, (mels[1, 4 * f + step] - mean) / std, atol=1e-5)


def test_front_end_equals_librosa(variables, wav):
    # Frame s is centred on the middle of hop s.
    padded = np.pad(np.asarray(wav), ((0, 0), ((1024 - 160) // 2, 1024)))
    mel = librosa.feature.melspectrogram(
        y=padded, sr=16_000, n_fft=1024, hop_length=160, n_mels=16, power=1.0, center=False
    )
    expected = np.log(np.maximum(mel, 1e-5)).transpose(0, 2, 1)[:, :100]
    np.testing.assert_allclose(apply(variables, "log_mels", wav), expected, atol=1e-4)


def test_targets_are_the_nearest_random_codeword(variables):
    quantizer = jax.tree.map(np.asarray, variables["quantizer"])
    assert quantizer["projection"].shape == (64, 16)
    np.testing.assert_allclose(np.linalg.norm(quantizer["codebook"], axis=1), 1, rtol=1e-5)
    stacked = np.random.default_rng(1).normal(size=(2, 9, 64)).astype(np.float32)
    got = apply(variables, "targets", stacked)
    projected = stacked @ quantizer["projection"]
    projected /= np.linalg.norm(projected, axis=-1, keepdims=True)
    distance = ((projected[:, :, None] - quantizer["codebook"]) ** 2).sum(-1)
    np.testing.assert_array_equal(got, distance.argmin(-1))
    assert len(np.unique(got)) > 5


def test_masked_frames_change_targets_but_not_logits(variables, wav):
    mask = jnp.zeros((3, 25), bool).at[:, 10:20].set(True)
    noise = jax.random.normal(jax.random.key(2), (3, 25, 64))
    logits, targets = apply(variables, None, wav, mask, noise)
    # Other sound amid the masked frames leaves the logits and changes the targets.
    other = wav.at[:, 12 * 640 : 18 * 640].set(jnp.sin(jnp.arange(6.0 * 640) / 5.0)[None, :])
    logits_other, targets_other = apply(variables, None, other, mask, noise)
    np.testing.assert_array_equal(logits, logits_other)
    assert np.mean(targets[:, 12:18] != targets_other[:, 12:18]) > 0.5
    stacked = apply(variables, "stacked", wav)
    np.testing.assert_array_equal(targets, apply(variables, "targets", stacked))
    # A tenth of the noise replaces masked frames.
    masked = jnp.where(mask[:, :, None], 0.1 * noise, stacked)
    by_hand = MODULE.apply(variables, masked, method=lambda m, x: m.head(m.encoder(m.entry(x))))
    np.testing.assert_allclose(logits, by_hand, atol=1e-5)


def test_blocks_of_400_ms_are_masked_independently():
    mask = np.asarray(semantic.draw_mask(jax.random.key(3), 2000, 47))
    assert mask.shape == (2000, 47)
    np.testing.assert_allclose(mask.mean(), 0.6, atol=0.02)
    blocks = np.pad(mask, ((0, 0), (0, 3)), mode="edge").reshape(2000, 5, 10)
    assert np.all(blocks == blocks[:, :, :1])  # the last block is cut
    shares = blocks[:, :, 0].astype(float)
    np.testing.assert_allclose(np.corrcoef(shares.T), np.eye(5), atol=0.1)
    assert not np.array_equal(mask, semantic.draw_mask(jax.random.key(4), 2000, 47))


def test_tokens_are_the_nearest_standardised_centroid(variables, wav):
    rng = np.random.default_rng(5)
    features = np.asarray(apply(variables, "features", wav))
    assert features.shape == (3, 25, 16)
    mean, std = features.mean((0, 1)), features.std((0, 1)) * rng.uniform(0.5, 2, 16)
    centroids = rng.normal(size=(8, 16))
    fitted = {"mean": mean, "std": std, "centroids": centroids}
    fitted = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), fitted)
    got = apply(variables | {"kmeans": variables["kmeans"] | fitted}, "tokens", wav)
    distance = ((((features - mean) / std)[:, :, None] - centroids) ** 2).sum(-1)
    np.testing.assert_array_equal(got, distance.argmin(-1))
    assert len(np.unique(got)) > 2


def test_tokens_do_not_depend_on_the_batch(variables, wav):
    together = apply(variables, "features", wav)
    np.testing.assert_allclose(apply(variables, "features", wav[2:]), together[2:], atol=1e-5)


def test_features_come_from_the_named_layer(variables, wav):
    last = semantic.SemanticEncoder(semantic.SemanticConfig(16_000, 16, CONFIG.encoder, 2, 24, 8))
    first = apply(variables, "features", wav)
    second = jax.jit(functools.partial(last.apply, method="features"))(variables, wav)
    assert np.abs(first - second).max() > 0.1
    changed = jax.tree.map(lambda a: a, variables)
    encoder = changed["params"]["encoder"]
    encoder["block_1"] = jax.tree.map(jnp.zeros_like, encoder["block_1"])
    np.testing.assert_array_equal(apply(changed, "features", wav), first)


@pytest.mark.parametrize(
    ("change", "word"), [({"layer": 3}, "layer = 3"), ({"sample_rate_hz": 22_050}, "22050")]
)
def test_bad_sizes_are_named(change, word):
    with pytest.raises(ValueError, match=word):
        semantic.SemanticConfig(
            **{"sample_rate_hz": 16_000, "encoder": CONFIG.encoder, "layer": 1} | change
        )
