import jax
import jax.numpy as jnp
import librosa
import numpy as np
import pytest
import scipy.signal

from musicrl_jax.core import spectral


@pytest.mark.parametrize(("rate", "n_fft", "n_mels"), [(16000, 1024, 64), (24000, 2048, 128)])
def test_filterbank_equals_librosa(rate, n_fft, n_mels):
    expected = librosa.filters.mel(sr=rate, n_fft=n_fft, n_mels=n_mels).T
    np.testing.assert_allclose(spectral.mel_filterbank(rate, n_fft, n_mels), expected, atol=1e-8)


def test_filterbank_with_edges_equals_librosa():
    expected = librosa.filters.mel(sr=16000, n_fft=512, n_mels=20, fmin=300.0, fmax=5000.0).T
    np.testing.assert_allclose(
        spectral.mel_filterbank(16000, 512, 20, 300.0, 5000.0), expected, atol=1e-8
    )


@pytest.mark.parametrize(("window", "hop"), [(1024, 320), (64, 16), (240, 240)])
def test_magnitude_equals_scipy(window, hop):
    wav = np.random.default_rng(0).normal(size=(2, 3000)).astype(np.float32)
    left = (window - hop) // 2
    padded = np.pad(wav, ((0, 0), (left, 2 * window)))
    transform = scipy.signal.ShortTimeFFT(
        scipy.signal.get_window("hann", window, fftbins=True), hop, fs=1.0, phase_shift=None
    )
    first = window // 2 // hop + 1 if (window // 2) % hop else window // 2 // hop
    # SciPy's slice p is centred on p * hop; ours starts at s * hop: compare by moving the signal.
    shifted = np.pad(padded, ((0, 0), (first * hop - window // 2, 0)))
    expected = np.abs(transform.stft(shifted, p0=first, p1=first + 3000 // hop)).transpose(0, 2, 1)
    np.testing.assert_allclose(
        spectral.stft_magnitude(jnp.asarray(wav), window, hop), expected, atol=3e-5
    )


def test_log_mel_equals_librosa_and_has_one_frame_a_hop():
    wav = 0.1 * np.random.default_rng(1).normal(size=(2, 4100)).astype(np.float32)
    got = spectral.log_mel(jnp.asarray(wav), 16000, 40, 512, 160)
    padded = np.pad(wav, ((0, 0), (176, 512)))
    mel = librosa.feature.melspectrogram(
        y=padded, sr=16000, n_fft=512, hop_length=160, n_mels=40, power=1.0, center=False
    )
    expected = np.log(np.maximum(mel, 1e-5)).transpose(0, 2, 1)[:, :25]
    assert got.shape == (2, 4100 // 160, 40)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, atol=1e-4)


def test_frame_is_centred_on_its_hop():
    click = np.zeros((1, 1600), np.float32)
    click[0, 5 * 160 + 80] = 1.0
    energy = spectral.stft_magnitude(jnp.asarray(click), 400, 160).sum(-1)[0]
    assert int(jnp.argmax(energy)) == 5
    np.testing.assert_allclose(energy[4], energy[6], rtol=1e-4)


def test_a_nan_is_not_taken_for_silence():
    wav = np.zeros((1, 1600), np.float32)
    wav[0, 800] = np.nan
    mels = np.asarray(spectral.log_mel(jnp.asarray(wav), 16000, 16, 256, 64))
    reached = np.isnan(mels).all(axis=-1)[0]
    centre = np.arange(25) * 64 + 32
    np.testing.assert_array_equal(reached, (centre - 128 <= 800) & (centre + 128 > 800))
    assert (mels[0, ~reached] == np.log(np.float32(1e-5))).all()


def test_gradient_is_finite_at_silence_and_right_elsewhere():
    def total(wav):
        return jnp.sum(spectral.log_mel(wav, 16000, 16, 256, 64))

    silent = jax.grad(total)(jnp.zeros((1, 512)))
    assert np.isfinite(silent).all()

    wav = jnp.asarray(np.random.default_rng(2).normal(size=(1, 512)), jnp.float32)
    step = jnp.zeros_like(wav).at[0, 200].set(1e-2)
    slope = (total(wav + step) - total(wav - step)) / 2e-2
    np.testing.assert_allclose(jax.grad(total)(wav)[0, 200], slope, rtol=2e-2)


@pytest.mark.parametrize(("samples", "window", "hop"), [(100, 64, 128), (10, 64, 16)])
def test_bad_sizes_are_refused(samples, window, hop):
    with pytest.raises(ValueError, match="hop"):
        spectral.frames(jnp.zeros(samples), window, hop)
