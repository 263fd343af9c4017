import jax
import jax.numpy as jnp
import librosa
import numpy as np

from musicrl_jax.losses import codec


def numpy_mel(wav, window):
    hop = window // 4
    left = (window - hop) // 2
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)
    padded = np.pad(wav.astype(np.float64), (left, window))
    frames = np.stack([padded[s * hop : s * hop + window] * hann for s in range(len(wav) // hop)])
    return np.abs(np.fft.rfft(frames)) @ librosa.filters.mel(sr=16000, n_fft=window, n_mels=64).T


def waves():
    rng = np.random.default_rng(0)
    wav = 0.1 * rng.normal(size=(2, 2048)).astype(np.float32)
    return wav, (0.7 * wav + 0.02 * rng.normal(size=wav.shape)).astype(np.float32)


def test_reconstruction_equals_numpy():
    wav, decoded = waves()
    windows = (512, 1024)
    expected = 0.0
    for window in windows:
        for x, y in zip(wav, decoded, strict=True):
            a, b = numpy_mel(x, window), numpy_mel(y, window)
            l1 = np.abs(a - b).sum(-1).mean()
            log = np.sqrt(
                np.square(np.log(np.maximum(a, 1e-5 * window)) - np.log(np.maximum(b, 1e-5 * window))).sum(-1)
            ).mean()
            expected += (l1 + np.sqrt(window / 2) * log) / (len(windows) * len(wav))
    got, metrics = codec.reconstruction(jnp.asarray(wav), jnp.asarray(decoded), 16000, windows)
    np.testing.assert_allclose(got, expected, rtol=1e-4)
    assert set(metrics) == {"spectral_l1", "spectral_log"}


def test_perfect_and_silent_reconstructions_have_finite_gradients():
    wav = jnp.asarray(waves()[0])

    def loss(decoded):
        return codec.reconstruction(wav, decoded, 16000, (64, 256))[0]

    value, gradient = jax.jit(jax.value_and_grad(loss))(wav)
    assert value < 0.1
    assert np.isfinite(gradient).all()
    assert np.isfinite(jax.grad(loss)(jnp.zeros_like(wav))).all()


def test_si_sdr_is_the_ratio_it_was_made_with_and_ignores_gain():
    rng = np.random.default_rng(1)
    wav = rng.normal(size=(1, 4000))
    noise = rng.normal(size=(1, 4000))
    noise -= (noise * wav).sum() / np.square(wav).sum() * wav
    noise *= np.sqrt(np.square(wav).sum() / np.square(noise).sum()) * 10 ** (-12 / 20)
    for gain in (1.0, 0.3):
        decoded = jnp.asarray(gain * (wav + noise), jnp.float32)
        np.testing.assert_allclose(codec.si_sdr(jnp.asarray(wav, jnp.float32), decoded), [12.0], atol=1e-3)


def test_mel_distance_of_a_halved_clip_is_ln_2():
    wav = jnp.asarray(waves()[0])
    np.testing.assert_allclose(codec.mel_distance(wav, 0.5 * wav, 16000), np.log(2.0), rtol=1e-3)
