"""musicnn against the original's TensorFlow operations, librosa's mels and SciPy's resampling."""

import jax
import jax.numpy as jnp
import librosa
import numpy as np
import pytest
import scipy.signal
import tensorflow as tf

from musicrl_jax.models import musicnn

CONFIG = musicnn.MusicnnConfig(timbral=5, temporal=3, middle=4)


def checkpoint(seed=0):
    """Draws variables of `CONFIG` with the original's names."""
    rng = np.random.default_rng(seed)
    kernels = [
        (7, 38, 5),
        (7, 67, 5),
        (128, 1, 3),
        (64, 1, 3),
        (32, 1, 3),
        (7, 19, 4),
        (7, 4, 4),
        (7, 4, 4),
    ]
    tensors = {}
    for number, (frames, bands, width) in enumerate(kernels):
        name = f"conv2d_{number}" if number else "conv2d"
        tensors[f"{name}/kernel"] = rng.normal(size=(frames, bands, 1, width)) / np.sqrt(
            frames * bands
        )
        tensors[f"{name}/bias"] = 0.3 * rng.normal(size=width)
    for number, width in enumerate([1, *(width for _, _, width in kernels), 62, 200]):
        name = f"batch_normalization_{number}" if number else "batch_normalization"
        for part in ("gamma", "moving_variance"):
            tensors[f"{name}/{part}"] = rng.uniform(0.5, 2, size=width)
        for part in ("beta", "moving_mean"):
            tensors[f"{name}/{part}"] = 0.3 * rng.normal(size=width)
    return {name: tensor.astype(np.float32) for name, tensor in tensors.items()}


def original(tensors, mels):
    """Computes the output of the original's define_model by its operations."""

    def norm(number, x):
        name = f"batch_normalization_{number}" if number else "batch_normalization"
        parts = (
            tensors[f"{name}/{part}"]
            for part in ("moving_mean", "moving_variance", "beta", "gamma")
        )
        return tf.nn.batch_normalization(x, *parts, variance_epsilon=1e-3)

    def block(number, x, padding):
        name = f"conv2d_{number}" if number else "conv2d"
        x = tf.nn.relu(
            tf.nn.conv2d(x, tensors[f"{name}/kernel"], 1, padding) + tensors[f"{name}/bias"]
        )
        return norm(number + 1, x)

    def in_time(x):
        return tf.pad(x, [[0, 0], [3, 3], [0, 0], [0, 0]])

    x = norm(0, mels[..., None])
    front = [tf.reduce_max(block(number, in_time(x), "VALID"), axis=2) for number in (0, 1)]
    front += [tf.reduce_max(block(number, x, "SAME"), axis=2) for number in (2, 3, 4)]
    front = tf.concat(front, 2)
    first = tf.transpose(block(5, in_time(front[..., None]), "VALID"), [0, 1, 3, 2])
    second = tf.transpose(block(6, in_time(first), "VALID"), [0, 1, 3, 2]) + first
    third = tf.transpose(block(7, in_time(second), "VALID"), [0, 1, 3, 2]) + second
    features = tf.concat([front[..., None], first, second, third], 2)
    mean, _ = tf.nn.moments(features, axes=[1])
    flat = tf.reshape(tf.concat([tf.reduce_max(features, axis=1), mean], 2), [len(mels), -1])
    return norm(9, flat).numpy()


def test_the_network_equals_the_originals():
    tensors = checkpoint()
    mels = np.random.default_rng(1).uniform(0, 4, size=(2, 150, 96)).astype(np.float32)
    params = musicnn.params(CONFIG, tensors, "here")
    got = jax.jit(musicnn.Musicnn(CONFIG).apply)({"params": params}, mels)
    np.testing.assert_allclose(got, original(tensors, mels), rtol=1e-4, atol=1e-4)


def test_loaded_weights_have_the_shapes_of_a_new_network():
    fresh = jax.eval_shape(musicnn.Musicnn(CONFIG).init, jax.random.key(0), jnp.zeros((1, 20, 96)))[
        "params"
    ]
    loaded = musicnn.params(CONFIG, checkpoint(), "here")
    assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, loaded)


@pytest.mark.parametrize("samples", [513, 16_000, 16_127])
def test_mels_equal_librosas(samples):
    wav = np.random.default_rng(2).normal(size=samples).astype(np.float32) * np.linspace(
        0, 1, samples, dtype=np.float32
    )
    got = np.asarray(jax.jit(musicnn.log_mels)(wav[None]))[0]
    power = librosa.feature.melspectrogram(
        y=wav, sr=16_000, n_fft=512, hop_length=256, n_mels=96, pad_mode="reflect"
    )
    np.testing.assert_allclose(got, np.log10(10_000 * power.T + 1), atol=2e-5)


def test_silence_is_zero_and_full_scale_is_finite():
    assert not np.asarray(musicnn.log_mels(jnp.zeros((1, 4000)))).any()
    full_scale = jnp.tile(jnp.array([1.0, -1]), 2000)[None]
    assert np.isfinite(np.asarray(musicnn.log_mels(full_scale))).all()


@pytest.mark.parametrize(
    ("rate", "up", "down"), [(24_000, 2, 3), (8000, 2, 1), (44_100, 160, 441), (48_000, 1, 3)]
)
def test_other_rates_are_resampled_as_by_scipy(rate, up, down):
    wav = np.random.default_rng(3).normal(size=(2, 1001)).astype(np.float32)
    expected = scipy.signal.resample_poly(wav, up, down, axis=1)
    np.testing.assert_allclose(
        musicnn.resample_to_16_khz(jnp.asarray(wav), rate), expected, atol=1e-5
    )


def test_16_khz_is_not_resampled():
    wav = jnp.ones((1, 5))
    assert musicnn.resample_to_16_khz(wav, 16_000) is wav


def test_bad_weights_clips_and_sizes_are_named():
    tensors = checkpoint()
    with pytest.raises(
        ValueError,
        match=r"conv2d/kernel has the shape \(7, 38, 1, 5\).*timbral=6.*needs \(7, 38, 1, 6\)",
    ):
        musicnn.params(musicnn.MusicnnConfig(6, 3, 4), tensors, "here")
    del tensors["batch_normalization_9/beta"]
    with pytest.raises(ValueError, match="here has no tensor batch_normalization_9/beta"):
        musicnn.params(CONFIG, tensors, "here")
    with pytest.raises(ValueError, match="256 samples is too short for musicnn: use at least 257"):
        musicnn.log_mels(jnp.zeros((1, 256)))
    with pytest.raises(ValueError, match="temporal = 0"):
        musicnn.MusicnnConfig(temporal=0)
