"""Spectra equal those of librosa and SciPy; gradients are finite."""

import jax
import jax.numpy as jnp
import librosa
import numpy as np
import pytest
import scipy.signal

from musicrl_jax.core import spectral

# Compiled once for all tests.
stft_magnitude = jax.jit(spectral.stft_magnitude, static_argnums=(1, 2))
log_mel = jax.jit(lambda wav: spectral.log_mel(wav, 16000, 16, 256, 64))


# --- Against librosa and SciPy. ---


@pytest.mark.parametrize(("rate", "n_fft", "n_mels"), [(16000, 1024, 64), (24000, 2048, 128)])
def test_filterbank_equals_librosa(rate, n_fft, n_mels):
    expected = librosa.filters.mel(sr=rate, n_fft=n_fft, n_mels=n_mels).T
    np.testing.assert_allclose(spectral.mel_filterbank(rate, n_fft, n_mels), expected, atol=1e-8)


@pytest.mark.parametrize(("window", "hop"), [(1024, 320), (64, 16), (240, 240)])
def test_magnitude_equals_scipy(window, hop):
    wav = np.random.default_rng(0).normal(size=(2, 3000)).astype(np.float32)
    before = (window - hop) // 2
    padded = np.pad(wav, ((0, 0), (before, 2 * window)))
    hann = scipy.signal.get_window("hann", window, fftbins=True)
    transform = scipy.signal.ShortTimeFFT(hann, hop, fs=1.0, phase_shift=None)
    # SciPy's slice p is centred on p * hop, and ours starts at s * hop: shift the signal.
    first = -(-(window // 2) // hop)
    shifted = np.pad(padded, ((0, 0), (first * hop - window // 2, 0)))
    expected = np.abs(transform.stft(shifted, p0=first, p1=first + 3000 // hop)).transpose(0, 2, 1)
    np.testing.assert_allclose(stft_magnitude(jnp.asarray(wav), window, hop), expected, atol=3e-5)


def test_log_mel_is_the_log_of_librosas_filters_times_magnitudes():
    wav = 0.1 * np.random.default_rng(1).normal(size=(2, 1610)).astype(np.float32)
    # A part below the floor.
    wav[:, 800:1200] = 0
    result = log_mel(jnp.asarray(wav))
    filters = librosa.filters.mel(sr=16000, n_fft=256, n_mels=16)
    mel = stft_magnitude(jnp.asarray(wav), 256, 64) @ filters.T
    assert result.shape == (2, 1610 // 64, 16) and result.dtype == jnp.float32
    np.testing.assert_allclose(result, np.log(np.maximum(mel, 1e-5)), atol=1e-4)


# --- Frames. ---


def test_a_frame_is_centred_on_its_hop():
    click = np.zeros((1, 1600), np.float32)
    click[0, 5 * 160 + 80] = 1.0
    energy = stft_magnitude(jnp.asarray(click), 400, 160).sum(-1)[0]
    assert int(jnp.argmax(energy)) == 5
    np.testing.assert_allclose(energy[4], energy[6], rtol=1e-4)


def test_a_nan_does_not_pass_for_silence():
    wav = np.zeros((1, 1600), np.float32)
    wav[0, 800] = np.nan
    mels = np.asarray(log_mel(jnp.asarray(wav)))
    # The frames whose window has the NaN.
    reached = np.isnan(mels).all(axis=-1)[0]
    centre = np.arange(25) * 64 + 32
    np.testing.assert_array_equal(reached, (centre - 128 <= 800) & (centre + 128 > 800))
    assert (mels[0, ~reached] == np.log(np.float32(1e-5))).all()


# --- The gradient. ---


def test_the_gradient_is_finite_at_silence_and_correct_elsewhere():
    @jax.jit
    def total(wav):
        return jnp.sum(log_mel(wav))

    gradient = jax.jit(jax.grad(total))
    assert np.isfinite(gradient(jnp.zeros((1, 512)))).all()
    wav = jnp.asarray(np.random.default_rng(2).normal(size=(1, 512)), jnp.float32)
    # A central difference.
    step = jnp.zeros_like(wav).at[0, 200].set(1e-2)
    slope = (total(wav + step) - total(wav - step)) / 2e-2
    np.testing.assert_allclose(gradient(wav)[0, 200], slope, rtol=2e-2)


@pytest.mark.parametrize(("samples", "window", "hop"), [(100, 64, 128), (10, 64, 16)])
def test_bad_sizes_are_refused(samples, window, hop):
    with pytest.raises(ValueError, match="hop"):
        spectral.frames(jnp.zeros(samples), window, hop)
