"""The residual network: one block against SciPy, the stages' shapes, its log-mels."""

import jax
import jax.numpy as jnp
import librosa
import numpy as np
import pytest
from scipy.signal import correlate

from musicrl_jax.models import resnet


def _norm(p, x):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]


def _conv(p, x):
    """Convolves x [S, M, W] with a 3 x 3 kernel, padded with zeros."""
    padded = np.pad(x, ((1, 1), (1, 1), (0, 0)))
    out = [
        correlate(padded, p["kernel"][..., w], mode="valid")[:, :, 0] + p["bias"][w]
        for w in range(p["bias"].size)
    ]
    return np.stack(out, axis=-1)


def test_one_block_equals_scipys():
    net = resnet.ResNet(resnet.ResNetConfig(mels=8, widths=(3,), blocks=1))
    mels = jax.random.normal(jax.random.key(0), (2, 20, 8))
    params = jax.jit(net.init)(jax.random.key(1), mels)["params"]
    rng = np.random.default_rng(2)
    params = jax.tree.map(
        lambda a: np.asarray(a + 0.3 * rng.normal(size=a.shape).astype(np.float32)), params
    )
    got = jax.jit(net.apply)({"params": params}, mels)
    wide = jax.tree.map(np.float64, params)
    patches = np.float64(mels[1]).reshape(5, 4, 2, 4).transpose(0, 2, 1, 3)  # [S/4, M/4, 4, 4]
    x = (
        np.einsum("smij,ijw->smw", patches, wide["patches"]["kernel"][:, :, 0])
        + wide["patches"]["bias"]
    )
    block = wide["stage_0_block_0"]
    y = _conv(block["first"], np.maximum(_norm(block["first_norm"], x), 0))
    x = x + _conv(block["second"], np.maximum(_norm(block["second_norm"], y), 0))
    np.testing.assert_allclose(got[1], _norm(wide["norm"], x).mean((0, 1)), atol=2e-5)


def test_stages_halve_time_and_frequency():
    net = resnet.ResNet(resnet.ResNetConfig(mels=32, widths=(2, 4, 8), blocks=2))
    mels = jnp.zeros((1, 400, 32))
    _, variables = jax.eval_shape(
        lambda: net.init_with_output(jax.random.key(0), mels, capture_intermediates=True)
    )
    shapes = [
        variables["intermediates"][f"stage_{stage}_block_1"]["__call__"][0].shape
        for stage in range(3)
    ]
    assert shapes == [(1, 100, 8, 2), (1, 50, 4, 4), (1, 25, 2, 8)]


def test_the_input_is_a_scaled_log_mel():
    wav = 0.1 * np.random.default_rng(3).normal(size=16_000).astype(np.float32)
    got = np.asarray(resnet.log_mels(jnp.asarray(wav)[None, :], 16_000, 32))[0]
    assert got.shape == (100, 32)
    frame = wav[80 + 160 * 50 - 512 : 80 + 160 * 50 + 512]  # 64 ms around the middle of hop 50
    magnitude = np.abs(np.fft.rfft(frame * np.hanning(1025)[:-1]))
    mel = librosa.filters.mel(sr=16_000, n_fft=1024, n_mels=32) @ magnitude
    np.testing.assert_allclose(got[50], (np.log(mel) + 3.5) / 4, atol=1e-4)


@pytest.mark.parametrize("change", [{"mels": 30}, {"widths": ()}, {"blocks": 0}])
def test_bad_sizes_are_named(change):
    name, value = next(iter(change.items()))
    with pytest.raises(
        ValueError, match=f"{name} = {value}".replace("(", r"\(").replace(")", r"\)")
    ):
        resnet.ResNetConfig(**change)
